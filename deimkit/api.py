"""The verbs of deimkit: build, load, rehearse, profile, prepare, train, resume, replay, evaluate."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from deimkit import recipes
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.deploy.open_file import RUNTIMES, open_session
from deimkit.deploy.served import Served
from deimkit.errors import CheckpointError, DataError, DeimkitError, DeployError, RecipeError
from deimkit.evaluation.measure import measure
from deimkit.evaluation.report import report_run
from deimkit.models.detector import Detector
from deimkit.ranks import Ranks
from deimkit.recipes.recipe import Recipe, as_size
from deimkit.training import checkpoint
from deimkit.training import replay as replays
from deimkit.training.claim import Claim
from deimkit.training.learner import Learner
from deimkit.training.loggers import expect_loggers
from deimkit.training.machine import has_device, pick_device, pick_precision
from deimkit.training.memory import largest_fit
from deimkit.training.profile import Profile, profile_steps
from deimkit.training.progress import Progress, Silent
from deimkit.training.ready import expect_equal_shares, usable
from deimkit.training.rehearsal import Rehearsal
from deimkit.training.rehearsal import rehearse as measured_steps
from deimkit.training.replay import Replay
from deimkit.training.run import Plan, Run
from deimkit.training.trainer import Trainer
from deimkit.weights import sources
from deimkit.weights.addresses import WebFile, is_address


def build(recipe: str | Recipe, categories: int | list[str] | CategoryMap = 80) -> Detector:
    """A detector with fresh weights for `categories` (a count, names, or a CategoryMap)."""
    return as_recipe(recipe).build(CategoryMap.of(categories))


def load(
    source: str | Path | Recipe | Run,
    weights: str | Path | None = None,
    categories: int | list[str] | CategoryMap | None = None,
    replace_head: bool = False,
    progress: bool = True,
    device: str | None = None,
    runtime: str | None = None,
) -> Detector | Served:
    """A trained detector, ready to predict.

    source: a run, its folder, a checkpoint (.pt) of deimkit, a Hugging Face folder; or a recipe or its name, with
    `weights` the published .pth, .safetensors or Hugging Face folder to fill it with, or what to fetch once and keep:
    the address of such a file, or a name that `deimkit weights` lists, as "coco", or "imagenet" for the backbone alone;
    or a file that `export` wrote, .onnx, .xml or .engine, which predicts and is evaluated just so (`Served`).
    categories: the classes to detect, with `weights` only; by default those of the file (COCO's 80 where a published
    one does not say). A head for other classes is an error unless `replace_head`. progress: say what is fetched.
    device: "cpu", "cuda", or "auto" for the best of this machine, which leaves exported files where their runtime is at
    home; by default the CPU, and a GPU for an engine. runtime: of an exported file, "onnxruntime" or "openvino". Raises
    `CheckpointError`, and `DeployError` for exported files.
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in RUNTIMES:
        if weights is not None or categories is not None or replace_head:
            raise DeployError(f"{source} has weights and classes inside; got weights=, categories= or replace_head=.")
        return Served(open_session(source, runtime, None if device == "auto" else device))
    if runtime is not None:
        raise DeployError(f"runtime= is for exported files ({', '.join(RUNTIMES)}); {source} is run by torch.")
    detector = load_detector(source, weights, categories, replace_head, progress)
    return detector if device is None else detector.to(pick_device(device))


def load_detector(
    source: str | Path | Recipe | Run,
    weights: str | Path | None = None,
    categories: int | list[str] | CategoryMap | None = None,
    replace_head: bool = False,
    progress: bool = True,
) -> Detector:
    """As `load`, where it has to be torch's detector: what is inside of an exported file cannot be looked at."""
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in RUNTIMES:
        raise DeployError(f"Expected a run or a checkpoint; got {source}, an exported file, which only predicts.")
    if weights is not None:
        recipe = as_recipe(source)
        file = weight_file(weights, recipe, Progress() if progress else Silent())
        return _filled(recipe, file, categories, replace_head)
    if categories is not None or replace_head:
        raise CheckpointError(
            f"{source} says itself which classes it detects. To change them, load(recipe, weights={str(source)!r}, "
            "categories=...)."
        )
    if isinstance(source, Run):
        return from_checkpoint(source.best)
    if isinstance(source, Recipe) or source in recipes.names():
        name = source.name if isinstance(source, Recipe) else source
        raise CheckpointError(
            f"load({name!r}) needs weights=PATH of a trained file; `deimkit.build({name!r})` gives fresh weights."
        )
    path = Path(source)
    if (path / "run.json").is_file():
        return from_checkpoint(Run(path).best)
    if (path / "config.json").is_file():
        from deimkit.weights import load_hf

        return load_hf(path).eval()
    if path.is_file():
        return from_checkpoint(path)
    raise CheckpointError(
        f"Nothing to load at {source}: expected a run folder, a .pt file, a Hugging Face folder, or a recipe's name "
        "with weights=."
    )


def from_checkpoint(path: Path) -> Detector:
    """The detector of a deimkit checkpoint with its averaged (EMA) weights."""
    state = checkpoint.load(path)
    detector = recipes.parse(state["recipe"]).build(CategoryMap.from_dict(state["categories"]))
    try:
        detector.load_state_dict(state["ema"]["shadow"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} was written by another version of deimkit, whose detector has other weights: "
            f"{str(error).splitlines()[-1].strip()[:200]} Load it with that version, or train anew."
        ) from error
    return detector.eval()


def train(
    recipe: str | Recipe,
    data: str | Path | Dataset,
    out: str | Path,
    epochs: int | None = None,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    lr: float | None = None,
    device: str = "auto",
    seed: int = 0,
    wait: bool = True,
    progress: bool = True,
    weights: str | Path | Run | None = None,
    **plan: Any,
) -> Run:
    """Train `recipe` on `data` into the folder `out`, and return the run.

    epochs, batch (total per step), size (pixels, a multiple of 32) and lr (the base rate) default to the recipe's;
    everything coupled to them follows (`Recipe.fit_to`). wait=False trains in a process of its own and returns at
    once. weights: what to start from, a run, a checkpoint, a published file, a Hugging Face folder, or an address or a
    name as in `load` ("imagenet" for the backbone alone); a head is mapped by class name. Further options are the
    fields of `Plan`: precision, workers, accumulate, on_problem, patience, evaluate_every, save_every, devices (GPUs of
    this machine that share every batch), nodes and rdzv (machines that do). Under torchrun, its processes share. Raises
    `DataError`, `RecipeError`, and `CheckpointError` for weights that are not there, and nothing is written then; a
    folder that already holds a trained run is refused: `resume(out)` continues it.
    """
    folder, ranks = Path(out), Ranks.join()
    shown = Progress() if progress and ranks.main else Silent()
    fit = {"epochs": epochs, "batch": batch, "size": size, "lr": lr}
    options = {"device": device, "seed": seed, "weights": weights, **plan}
    restarted = ranks.most(int(ranks.restarted)) > 0  # each machine counts its own
    begun = ranks.most(int(restarted and ranks.main and (folder / "run.json").is_file())) > 0
    dataset = None if begun else ranks.once(partial(_begin, folder, recipe, data, fit, options, shown, wait=wait))
    return resume(folder, wait=wait, progress=progress, dataset=dataset if wait and not ranks.many else None)


def prepare(
    recipe: str | Recipe,
    data: str | Path | Dataset,
    out: str | Path,
    epochs: int | None = None,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    lr: float | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
    weights: str | Path | Run | None = None,
    **plan: Any,
) -> Run:
    """Write the folder of a run as `train` does, and leave its training to a job (`Run.sbatch`) or to `resume(out)`.

    Arguments and errors are those of `train`, but it is no matter what this machine lacks: a GPU, or the `rdzv` for
    several `nodes`, which a job of Slurm does without.
    """
    fit = {"epochs": epochs, "batch": batch, "size": size, "lr": lr}
    options = {"device": device, "seed": seed, "weights": weights, **plan}
    _begin(Path(out), recipe, data, fit, options, Progress() if progress else Silent(), elsewhere=True)
    return Run(out)


def _begin(
    folder: Path,
    recipe: str | Recipe,
    data: str | Path | Dataset,
    fit: dict[str, Any],
    options: dict[str, Any],
    shown: Progress,
    wait: bool = False,
    elsewhere: bool = False,
) -> Dataset:
    """Write the folder of a run, or raise and write nothing; returns what it learns from.

    fit: for `Recipe.fit_to`. options: for `make_plan`. wait: whether this process trains, where one does. elsewhere:
    whether another machine does.
    """
    refuse_used(folder)
    dataset = data if isinstance(data, Dataset) else Dataset.open(data)
    weights = options["weights"]
    planned = make_plan(
        data=str(dataset.source),
        fingerprint=dataset.fingerprint(),
        **options | {"weights": weights and weight_file(weights, as_recipe(recipe), shown)},
    )
    if dataset is data and not (wait and planned.processes == 1):
        _same_data(planned)  # another process cannot be handed a value, it opens the source
    if not elsewhere:
        planned.expect_meeting()
        expect_loggers(planned.loggers)
        pick_precision(planned.precision, pick_device(planned.device))
    learned = usable(dataset, planned.on_problem)
    fitted = as_recipe(recipe).fit_to(learned, **fit)
    expect_equal_shares(fitted.batch, len(learned.train or ()), planned.processes, planned.parts)
    text = recipes.to_python(fitted)
    recipes.parse(text)  # a recipe that could not be read back could not be resumed either
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.py").write_text(text, encoding="utf-8")
    planned.write(folder)
    return dataset


def rehearse(
    recipe: str | Recipe,
    data: str | Path | Dataset,
    steps: int = 20,
    batch: int | Literal["largest"] | None = None,
    size: int | tuple[int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: str | Path | Run | None = None,
    **plan: Any,
) -> Rehearsal:
    """Train a few real steps of every stage of a recipe, measure them, and keep nothing else.

    `rehearse(...).forecast(images, val_images)` says what the whole training will take. data: a dataset like the one to
    come; a hundred images will do. batch: images per step on one device; by default the share of the recipe's that one
    of the GPUs here gets, and 2 on a CPU; "largest": as many of that share as there is memory for in its heaviest
    steps, and the `fit` of what is returned says in how many micro-batches it then trains. weights: as in `train`.
    Further options are the fields of `Plan`. Raises what `train` raises, so that a batch that does not fit into memory
    is known beforehand, or a file that cannot be read among the images it takes (`doctor` looks at all).
    """
    if isinstance(batch, str) and batch != "largest":
        raise RecipeError(f"batch is a number of images or 'largest'; got {batch!r}.")
    options = {"device": device, "seed": seed, "weights": weights, **plan}
    whole, planned, dataset, devices = _dry(recipe, data, size, options)
    room = largest_fit(whole, planned, dataset, devices) if batch == "largest" else None
    if room is not None:
        batch = room.images
    elif batch is None:
        batch = _images_at_once(whole, planned, devices)
    with TemporaryDirectory() as folder:
        return replace(measured_steps(whole, int(batch), planned, dataset, Path(folder), steps), fit=room)


def profile(
    recipe: str | Recipe,
    data: str | Path | Dataset,
    steps: int = 20,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: str | Path | Run | None = None,
    compile: bool = False,
    trace: str | Path | None = None,
    **plan: Any,
) -> Profile:
    """Take a few real steps of every stage of a recipe apart: where their time and memory go, and what to change.

    `print(profile(...))` is the whole report, and its `advice` the last part of it. compile: measure compiled steps
    beside the others. trace: a file for what torch's profiler saw, to open in chrome://tracing or Perfetto. Everything
    else is as for `rehearse`, but that images are loaded by as many processes as in a training (workers).
    """
    options = {"device": device, "seed": seed, "weights": weights, **plan}
    whole, planned, dataset, devices = _dry(recipe, data, size, options)
    batch = _images_at_once(whole, planned, devices) if batch is None else batch
    with TemporaryDirectory() as folder:
        return profile_steps(
            whole, batch, planned, dataset, Path(folder), steps, compile, None if trace is None else Path(trace)
        )


def _dry(
    recipe: str | Recipe, data: str | Path | Dataset, size: int | tuple[int, int] | None, options: dict[str, Any]
) -> tuple[Recipe, Plan, Dataset, int]:
    """What a dry run takes: the recipe at that size, its plan, what it learns from, and how many devices are here."""
    dataset, whole = data if isinstance(data, Dataset) else Dataset.open(data), as_recipe(recipe)
    weights = options["weights"]
    planned = make_plan(
        data=str(dataset.source), **options | {"weights": weights and weight_file(weights, whole, Silent())}
    )
    if planned.processes > 1:
        raise RecipeError("A dry run measures one device; ask its forecast(devices=...) about several.")
    dataset, chosen = usable(dataset, planned.on_problem), pick_device(planned.device)
    whole = whole if size is None else whole.fit_to(whole.batch * whole.timeline.steps_per_epoch, size=size)
    return whole, planned, dataset, torch.cuda.device_count() if chosen.type == "cuda" else 1


def _images_at_once(recipe: Recipe, plan: Plan, devices: int) -> int:
    """The share of a recipe's batch that one of so many GPUs gets, or two on a CPU."""
    return max(recipe.batch // devices, 1) if pick_device(plan.device).type == "cuda" else 2


def resume(folder: str | Path | Run, wait: bool = True, progress: bool = True, dataset: Dataset | None = None) -> Run:
    """Continue the run in `folder` from its last checkpoint, exactly as if it had never stopped.

    A finished run is left as it is. dataset: what to go on with; by default the data that the run began with is opened
    again, and `DataError` is raised if it is not what it was.
    """
    run, ranks = folder if isinstance(folder, Run) else Run(folder), Ranks.join()
    shown = Progress() if progress and ranks.main else Silent()
    if run.finished and run.pid is None:
        shown.line(f"{run.folder} is finished: nothing is left to train.")
        return run
    if dataset is not None:
        ranks.once(partial(_go_on_with, dataset, run, by_itself=not wait))
    plan = Plan.read(run.folder)
    if not wait:
        return run.start()
    if plan.processes > 1 and not ranks.many:
        run.start()
        shown.line(f"{plan.processes} processes train {run.folder}; their output is in {run.folder / 'log.txt'}")
        return run.wait()
    with run.training(ranks):
        recipe = recipes.parse((run.folder / "recipe.py").read_text(encoding="utf-8"))
        dataset = dataset or _same_data(plan)
        for note in dataset.notes:
            shown.line(note)
        Trainer(recipe, plan, dataset, run.folder, shown, ranks).fit()
        if ranks.main:
            report_run(run, dataset)
    return run


def replay(file: str | Path, device: str | None = None, precision: str | None = None) -> Replay:
    """Try the batch of a step that was not finite again, with the weights of that moment, and say what is wrong.

    file: below the folder replay of a run, as its events and its log say. device, precision ("bf16", "fp16", "fp32"):
    by default those of then; where this machine has no such device, the best it has. Of several processes each kept its
    own share of the batch, and here batch norms see that share alone. Raises `CheckpointError`.
    """
    state = replays.read(Path(file))
    chosen = pick_device(device or (state["device"] if has_device(state["device"]) else "auto"))
    dtype = getattr(torch, state["precision"]) if precision is None else pick_precision(precision, chosen)
    recipe = recipes.parse(state["recipe"])
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        model = recipe.build(CategoryMap.from_dict(state["categories"])).to(chosen)
        return replays.try_again(Learner(recipe, model, dtype, state["accumulate"]), state)


def _go_on_with(dataset: Dataset, run: Run, by_itself: bool) -> None:
    """Write into the plan of a run that it goes on with this dataset, if that is not the one it began with.

    by_itself: the run will open it at its source, so that must hold the same.
    """
    plan = Plan.read(run.folder)
    if plan.fingerprint == dataset.fingerprint():
        return
    plan = replace(plan, data=str(dataset.source), fingerprint=dataset.fingerprint())
    with Claim(run.folder):
        if by_itself:
            _same_data(plan)
        plan.write(run.folder)
        run.note("other data", data=plan.data, fingerprint=plan.fingerprint)


def _same_data(plan: Plan) -> Dataset:
    """The dataset at the source of a run; `DataError` unless it holds what it held when the run began."""
    dataset = Dataset.open(plan.data)
    if plan.fingerprint not in ("", dataset.fingerprint()):
        raise DataError(
            f"The run was made for a dataset of ({plan.fingerprint}), and {plan.data} holds ({dataset.fingerprint()}). "
            "To train on a value that no file holds, use wait=True; to go on with other data, say so: "
            "resume(run, dataset=...)."
        )
    return dataset


def evaluate(
    what: Run | Detector | Served | str | Path,
    split: Split,
    size: int | tuple[int, int] | None = None,
    batch: int = 8,
    device: str | None = None,
    backend: str = "fast",
) -> dict[str, Any]:
    """COCO's twelve numbers of a run, a detector or a file on `split`, and per class: {"AP": ..., "per_class": {...}}.

    device: by default where a detector is, and the best of this machine for everything else.
    """
    if isinstance(what, Detector):
        detector: Detector | Served = what if device is None else what.to(pick_device(device))
    else:
        detector = what if isinstance(what, Served) else load(what, device=device or "auto")
    return measure(detector, split, size=None if size is None else as_size(size), batch=batch, backend=backend)


def as_recipe(recipe: Any) -> Recipe:
    """The recipe itself, or the one of that name."""
    return recipe if isinstance(recipe, Recipe) else recipes.get(str(recipe))


def refuse_used(folder: Path) -> None:
    """Raise `DeimkitError` if the folder holds a run that has trained or is training."""
    if (folder / "run.json").is_file() and (Run(folder).last.is_file() or Run(folder).pid is not None):
        raise DeimkitError(
            f"{folder} already holds a run. Continue it with resume({str(folder)!r}), on the command line "
            f"`deimkit train --resume {folder}`, or choose another folder."
        )


def make_plan(**options: Any) -> Plan:
    """The plan with these options; `RecipeError` names one that does not exist and its nearest neighbour."""
    known = [field.name for field in fields(Plan)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(known)}."
            raise RecipeError(f"train has no option {name!r}. {hint}")
    return Plan(**options)


def weight_file(source: str | Path | Run, recipe: Recipe, shown: Progress) -> str:
    """Where the weights of a run, a run folder, a file or a Hugging Face folder lie; `CheckpointError` if nowhere.

    What lies at an address, or is published for `recipe` under a name such as "coco", is fetched and kept, unless
    there is something here of that name. shown: told what is fetched.
    """
    if is_address(source):
        return _fetched(WebFile(str(source)), f"weights from {source}", shown)
    path = source.best if isinstance(source, Run) else Path(source).expanduser()
    path = Run(path).best if (path / "run.json").is_file() else path
    if source in sources.NAMES and not path.is_file() and not (path / "config.json").is_file():
        published = sources.find(recipe, str(source))
        return _fetched(published.place, str(published), shown)
    if not path.exists():
        raise CheckpointError(f"No weights at {path}: expected a run, a checkpoint, a .pth, .safetensors or a folder.")
    return str(path.absolute())


def _fetched(place: sources.Place, what: str, shown: Progress) -> str:
    """Where what lies at a place is kept, once it is fetched."""
    shown.line(what)
    path = place.fetch(shown.note)
    shown.line(f"kept in {path}")
    return str(path)


def _filled(
    recipe: Recipe,
    weights: str | Path,
    categories: int | list[str] | CategoryMap | None,
    replace_head: bool,
) -> Detector:
    """A detector of `recipe` with the weights of a file, for its classes or for others."""
    from deimkit.weights import default_categories, load_weights, read

    state = read(weights)
    detector = recipe.build(default_categories(state) if categories is None else CategoryMap.of(categories))
    load_weights(detector, state, replace_head=replace_head)
    return detector.eval()
