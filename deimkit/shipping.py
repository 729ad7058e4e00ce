"""The verbs that bring a detector out of PyTorch: export, bench, and whether this machine can be measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deimkit import recipes
from deimkit.api import as_recipe, build, load_detector
from deimkit.data.dataset import Dataset, Split
from deimkit.deploy.bench.benchmark import compare
from deimkit.deploy.bench.latency import Report
from deimkit.deploy.bench.lineup import Lineup
from deimkit.deploy.bench.self_test import Check, self_test
from deimkit.deploy.bench.smoke import smoke
from deimkit.deploy.bench.timing import USUAL
from deimkit.deploy.export import SUFFIXES, Exported, export_detector
from deimkit.deploy.open_file import RUNTIMES, open_session
from deimkit.deploy.served import Served
from deimkit.deploy.session import Session
from deimkit.errors import DataError, DeployError
from deimkit.models.detector import Detector
from deimkit.recipes.recipe import Recipe, as_size
from deimkit.training import checkpoint
from deimkit.training.machine import pick_device
from deimkit.training.progress import Progress, Silent
from deimkit.training.run import Run, as_run


def export(
    source: Detector | Run | Recipe | str | Path,
    out: str | Path | None = None,
    format: str = "onnx",
    data: str | Path | Dataset | Split | None = None,
    weights: str | Path | None = None,
    size: int | tuple[int, int] | None = None,
    batch: int | None = 1,
    precision: str = "fp32",
    images: int = 100,
    device: str | None = None,
    progress: bool = True,
    **how: Any,
) -> Exported:
    """Write a detector as a file that runs without torch, and hold the file against it.

    source: as of `load`, or a detector; a recipe's name without `weights` has fresh ones, good for latency alone. out:
    the file, by default below the run's folder, or here, named after the recipe; an engine adds to its name which GPU
    it is for. format: "onnx", "openvino" (.xml), or "tensorrt" (an engine for the GPU of this machine). data: annotated
    images, a dataset's val or a split, of which `images` measure AP on both sides; without it the file is compared, and
    not called verified. size: of the input, by default the detector's. batch: images at a time, None for any number.
    precision: "fp32", "fp16", or "int8", which looks at images of data, of its train split if it has one. device: the
    GPU that an engine is for, and where files are tried. how: postprocess=False for the answers of all queries, opset,
    exporter, top (boxes per image, 300). Raises `DeployError`, and a file that was there stays as it was then.
    """
    shown = Progress() if progress else Silent()
    detector, name = _to_export(source, weights, progress)
    run = as_run(source)
    folder = Path() if run is None else run.folder / "exported"
    path = folder / f"{name or 'detector'}{SUFFIXES.get(format, '')}" if out is None else Path(out)
    split, calibration = _annotated(data)
    done = export_detector(
        detector,
        path,
        format,
        precision,
        batch,
        split,
        images,
        calibration,
        None if device in (None, "auto") else str(pick_device(device)),
        shown.note,
        recipe=name,
        size=None if size is None else as_size(size),
        **how,
    )
    shown.line(f"{done.path}: {done.parity.headline}")
    return done


def bench(
    *sources: Detector | Run | Recipe | str | Path,
    device: str = "auto",
    batches: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    size: int | tuple[int, int] | None = None,
    compile: bool = False,
    raw: bool = False,
    seconds: float = 10.0,
    progress: bool = True,
) -> Report:
    """How long detectors take, in every runtime of this machine side by side, with all that the numbers depend on.

    sources: as of `export`, fresh weights included, or exported files, which are measured as they are. device: "cpu",
    "cuda", or "auto" for the best. batches: images at a time. precisions: of "fp32" and "fp16". size: of the input.
    compile: measure what torch.compile makes of it too. raw: measure also without post-processing. seconds: for which
    each is timed. The first way of each detector, plain torch in FP32, is what its others are compared with; `print`
    shows the table, and `write` keeps all of it.
    """
    if not batches or min(batches) < 1:
        raise DeployError(f"batches are numbers of images from 1 on, such as (1, 8); got {tuple(batches)}.")
    if not (isfinite(seconds) and seconds > 0):
        raise DeployError(f"seconds must be above 0 and finite; got {seconds}.")
    shown, where = Progress() if progress else Silent(), pick_device(device)
    entries: list[tuple[str, Session]] = []
    seen: Counter[str] = Counter()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        for i, source in enumerate(sources):
            if isinstance(source, (str, Path)) and Path(source).suffix.lower() in RUNTIMES:
                if (size, compile, raw, *precisions) != (None, False, False, "fp32"):
                    shown.line(f"{source} is measured as it is; size, precision and the like are of its export.")
                sessions, name = [_opened(Path(source), where)], Path(source).name
            else:
                detector, name = _to_export(source, None, progress)
                shown.note(f"making {name or 'the detector'} ready in every runtime")
                asked = None if size is None else as_size(size)
                own = Lineup(detector, Path(folder) / str(i), name, where, asked, tuple(batches), compile)
                sessions = own.sessions(precisions, raw, shown.line)
            seen[name] += 1
            called = name if seen[name] == 1 else f"{name} #{seen[name]}"
            entries += [(called, stack.enter_context(session)) for session in sessions]
        names = {session.card.recipe for _, session in entries} & set(recipes.names())
        papers = {name: recipes.get(name).paper for name in names}
        claims = {name: paper.latency_ms for name, paper in papers.items() if paper is not None}
        shown.note(f"measuring {len(entries)} sessions")
        called_by = [name for name, _ in entries]
        return compare([session for _, session in entries], batches, replace(USUAL, seconds=seconds), claims, called_by)


def can_bench(device: str = "auto") -> list[Check]:
    """What to ask of a machine before its latencies are believed; `print` each, and mend those that fail.

    Among it a small detector goes through every runtime of `device`. Never raises, but for a device that is not there.
    """
    where = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build("tiny", 4)
        with torch.no_grad():  # heads that start at zero give every query the same score, and no order to compare
            for weight in detector.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return self_test(where, smoke=partial(smoke, detector, where))


def _opened(path: Path, device: torch.device) -> Session:
    """An exported file where it can be measured: on the device that was asked for, if its runtime runs there."""
    at_home = path.suffix.lower() != ".onnx"
    return open_session(path, None, None if at_home else str(device), None if at_home else torch.get_num_threads())


def _to_export(source: Any, weights: str | Path | None, progress: bool) -> tuple[Detector, str]:
    """The detector, and the name of its recipe, or "" where it has none."""
    if isinstance(source, Served):
        raise DeployError(f"Expected a detector, a run, a recipe or a file; got {source!r}, which is exported already.")
    if isinstance(source, Recipe) or source in recipes.names():
        recipe = as_recipe(source)
        return (build(recipe) if weights is None else load_detector(recipe, weights, progress=progress)), recipe.name
    if weights is not None:
        raise DeployError(f"weights= fills a recipe; {source} has weights of its own. Leave out one of them.")
    if isinstance(source, Detector):
        return source, ""
    run = as_run(source)
    if run is not None:
        return load_detector(run), recipes.parse((run.folder / "recipe.py").read_text(encoding="utf-8")).name
    detector = load_detector(source)
    return detector, recipes.parse(checkpoint.load(source)["recipe"]).name if Path(source).suffix == ".pt" else ""


def _annotated(data: str | Path | Dataset | Split | None) -> tuple[Split | None, Split | None]:
    """The images to measure AP on, and others for INT8 to look at, if there are any."""
    if data is None or isinstance(data, Split):
        return data, None
    dataset = data if isinstance(data, Dataset) else Dataset.open(data)
    split = dataset.val or dataset.train
    if split is None:
        raise DataError(f"{dataset.source} has neither a val nor a train split to measure AP on.")
    return split, dataset.train if split is dataset.val else None
