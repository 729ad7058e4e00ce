"""The verbs of deimkit: build, load, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deimkit import recipes
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.errors import CheckpointError, DeimkitError, RecipeError
from deimkit.evaluation.measure import measure
from deimkit.models.detector import Detector
from deimkit.recipes.recipe import Recipe
from deimkit.training import checkpoint
from deimkit.training.progress import Progress, Silent
from deimkit.training.run import Plan, Run
from deimkit.training.trainer import Trainer, pick_device


def build(recipe: str | Recipe, categories: int | list[str] | CategoryMap = 80) -> Detector:
    """A detector with fresh weights for `categories` (a count, names, or a CategoryMap)."""
    return as_recipe(recipe).build(CategoryMap.of(categories))


def load(
    source: str | Path | Run,
    weights: str | Path | None = None,
    categories: int | list[str] | CategoryMap | None = None,
    replace_head: bool = False,
) -> Detector:
    """A trained detector, ready to predict.

    source: a run, its folder, a checkpoint (.pt) of deimkit, a Hugging Face D-FINE folder; or a recipe's name, with
    `weights` the published .pth, .safetensors or Hugging Face folder to fill it with. categories: the classes to
    detect, by default those of the source (COCO's 80 where a published file does not say). A head for other classes
    is an error unless `replace_head`. Raises `CheckpointError`.
    """
    if weights is not None:
        from deimkit.weights import default_categories, load_weights

        detector = as_recipe(str(source)).build(CategoryMap.of(categories or default_categories(weights)))
        load_weights(detector, weights, replace_head=replace_head)
        return detector.eval()
    if isinstance(source, Run):
        return from_checkpoint(source.best)
    path = Path(source)
    if (path / "run.json").is_file():
        return from_checkpoint(Run(path).best)
    if (path / "config.json").is_file():
        from deimkit.weights import load_hf

        return load_hf(path).eval()
    if path.is_file():
        return from_checkpoint(path)
    if str(source) in recipes.names():
        raise CheckpointError(
            f"load({str(source)!r}) needs weights=PATH of a trained file; `deimkit.build({str(source)!r})` gives fresh weights."
        )
    raise CheckpointError(
        f"Nothing to load at {source}: expected a run folder, a .pt file, a Hugging Face folder, or a recipe's name with weights=."
    )


def from_checkpoint(path: Path) -> Detector:
    """The detector of a deimkit checkpoint with its averaged (EMA) weights."""
    state = checkpoint.load(path)
    detector = recipes.parse(state["recipe"]).build(CategoryMap.from_dict(state["categories"]))
    detector.load_state_dict(state["ema"]["shadow"])
    return detector.eval()


def train(
    recipe: str | Recipe,
    data: str | Path | Dataset,
    out: str | Path,
    epochs: int | None = None,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    wait: bool = True,
    progress: bool = True,
    **plan: Any,
) -> Run:
    """Train `recipe` on `data` into the folder `out`, and return the run.

    epochs, batch (total per step) and size (pixels, a multiple of 32) default to the recipe's; everything coupled to
    them follows (`Recipe.fit_to`). wait=False trains in a process of its own and returns at once. Further options
    are the fields of `Plan`: precision, workers, accumulate, on_problem, patience, evaluate_every, save_every, weights.
    Raises `DataError`, `RecipeError`; a folder that already holds a run is refused: `resume(out)` continues it.
    """
    folder = Path(out)
    if (folder / "run.json").exists():
        raise DeimkitError(
            f"{folder} already holds a run. Continue it with resume({str(folder)!r}), or choose another folder."
        )
    recipe = as_recipe(recipe)
    dataset = data if isinstance(data, Dataset) else Dataset.open(data)
    try:
        plan_ = Plan(data=str(dataset.source), device=device, seed=seed, **plan)
    except TypeError as error:
        raise RecipeError(
            f"{str(error).split(') ')[-1].capitalize()}. train also takes: {', '.join(Plan.__dataclass_fields__)}."
        ) from error
    fitted = recipe.fit_to(dataset, epochs=epochs, batch=batch, size=size)
    pick_device(device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.py").write_text(recipes.to_python(fitted))
    plan_.write(folder)
    return resume(folder, wait=wait, progress=progress, dataset=dataset if wait else None)


def resume(folder: str | Path, wait: bool = True, progress: bool = True, dataset: Dataset | None = None) -> Run:
    """Continue the run in `folder` from its last checkpoint, exactly as if it had never stopped."""
    run = Run(folder)
    if not wait:
        return run.start()
    plan = Plan.read(run.folder)
    recipe = recipes.parse((run.folder / "recipe.py").read_text())
    dataset = dataset or Dataset.open(plan.data)
    shown = Progress() if progress else Silent()
    for note in dataset.notes:
        shown.line(note)
    Trainer(recipe, plan, dataset, run.folder, shown).fit()
    from deimkit.evaluation.report import report_run

    report_run(run, dataset)
    return run


def evaluate(
    what: Run | Detector | str | Path,
    split: Split,
    size: int | tuple[int, int] | None = None,
    batch: int = 8,
    device: str = "auto",
    backend: str = "fast",
) -> dict[str, Any]:
    """COCO's twelve numbers of a run, a detector or a file on `split`, and per class: {"AP": ..., "per_class": {...}}."""
    detector = what if isinstance(what, Detector) else load(what)
    where = next(detector.parameters()).device if isinstance(what, Detector) else pick_device(device)
    height_width = (size, size) if isinstance(size, int) else size
    return measure(detector.to(where), split, size=height_width, batch=batch, device=where, backend=backend)


def as_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe itself, or the one of that name."""
    return recipe if isinstance(recipe, Recipe) else recipes.get(recipe)
