"""The verbs that bring a detector out of PyTorch: export, bench, and whether this machine can be measured."""

from __future__ import annotations

import re
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
from deimkit.deploy.bench.self_test import Check, no_gpu, self_test
from deimkit.deploy.bench.smoke import smoke
from deimkit.deploy.bench.timing import USUAL
from deimkit.deploy.export import SUFFIXES, Exported, export_detector
from deimkit.deploy.open_file import RUNTIMES, open_session
from deimkit.deploy.served import Served
from deimkit.deploy.session import Session
from deimkit.errors import DataError, DeimkitError, DeployError
from deimkit.models.detector import Detector
from deimkit.recipes.recipe import Recipe, as_size
from deimkit.training import checkpoint
from deimkit.training.machine import pick_device
from deimkit.training.progress import Progress, Silent
from deimkit.training.run import Run, as_run

UNTOLD = "a file does not say of which architecture it is: measure the recipe itself"


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

    source: as of `load`, or a detector; a recipe's name without `weights` has fresh ones, the same every time, good for
    latency alone. out: the file, by default below the run's folder, or here, named after the recipe and what is not as
    by default, such as tiny_fp16_b8_480x800.onnx; an engine adds to its name which GPU it is for. format: "onnx",
    "openvino" (.xml), or "tensorrt" (an engine for the GPU of this machine). data: annotated images, a dataset's val or
    a split, of which `images` measure AP on both sides; without it the file is compared, and not called verified. size:
    of the input, by default the detector's. batch: images at a time, None for any number, of which an engine takes 1 to
    8. precision: "fp32", "fp16", or "int8", which looks at images of data, of its train split if it has one. device:
    the GPU that an engine is for, and where files are tried. how: postprocess=False for the answers of all queries,
    opset, exporter, top (boxes per image, 300). Raises `DeployError`, and a file that was there stays as it was then.
    """
    shown = Progress() if progress else Silent()
    detector, name = _to_export(source, weights, progress)
    run = as_run(source)
    folder = Path() if run is None else run.folder / "exported"
    asked = None if size is None else as_size(size)
    words = _not_usual(precision, batch, None if asked == detector.size else asked, **how)
    called = "_".join([name or "detector", *words]) + SUFFIXES.get(format, "")
    split, calibration = _annotated(data)
    done = export_detector(
        detector,
        folder / called if out is None else out,
        format,
        precision,
        batch,
        split,
        images,
        calibration,
        None if device in (None, "auto") else str(pick_device(device)),
        shown.note,
        recipe=name,
        size=asked,
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
    each is timed. The first way of each detector, plain torch in FP32, is what its others are compared with, and files
    of it too; `print` shows the table, and `write` keeps all of it. What is missing here or fails is left out with a
    remark in the report. Raises `DeployError` if nothing is measured.
    """
    if not batches or min(batches) < 1:
        raise DeployError(f"batches are numbers of images from 1 on, such as (1, 8); got {tuple(batches)}.")
    if not (isfinite(seconds) and seconds > 0):
        raise DeployError(f"seconds must be above 0 and finite; got {seconds}.")
    shown, where = Progress() if progress else Silent(), pick_device(device)
    entries: list[tuple[str, Session]] = []
    doubts: dict[str, str] = {}
    remarks: list[str] = []
    seen: Counter[str] = Counter()

    def remark(sentence: str) -> None:
        remarks.append(sentence)
        shown.line(sentence)

    with TemporaryDirectory() as folder, ExitStack() as stack:
        for i, source in enumerate(sources):
            if isinstance(source, (str, Path)) and Path(source).suffix.lower() in RUNTIMES:
                if (size, compile, raw, *precisions) != (None, False, False, "fp32"):
                    shown.line(f"{source} is measured as it is; size, precision and the like are of its export.")
                sessions, name, doubt = [_opened(Path(source), where)], Path(source).name, UNTOLD
            else:
                detector, name = _to_export(source, None, progress)
                shown.note(f"making {name or 'the detector'} ready in every runtime")
                asked = None if size is None else as_size(size)
                own = Lineup(detector, Path(folder) / str(i), name, where, asked, tuple(batches), compile)
                sessions, doubt = own.sessions(precisions, raw, remark), _doubt(detector, name)
            seen[name] += 1
            called = name if seen[name] == 1 else f"{name} #{seen[name]}"
            doubts[called] = doubt
            entries += [(called, stack.enter_context(session)) for session in sessions]
        shown.note(f"measuring {len(entries)} sessions")
        called_by, opened = [name for name, _ in entries], [session for _, session in entries]
        method = replace(USUAL, seconds=seconds)
        return compare(opened, batches, method, _claims(opened), called_by, doubts=doubts, remarks=remarks)


def can_bench(device: str = "auto") -> list[Check]:
    """What to ask of a machine before its latencies are believed; `print` each, and mend those that fail.

    Among it a small detector goes through every runtime of `device`. A GPU that torch does not find fails if it was
    asked for, and is told of under "auto". Never raises, but for a device that no machine has.
    """
    where = _device_to_ask(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build("tiny", 4)
        with torch.no_grad():  # heads that start at zero give every query the same score, and no order to compare
            for weight in detector.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    checks = self_test(where, smoke=partial(smoke, detector, where))
    return [*checks, no_gpu()] if device == "auto" and where.type != "cuda" else checks


def _device_to_ask(device: str) -> torch.device:
    """As `pick_device`, but for a GPU that is not found: to say so, and what to do, is the self-test's part."""
    try:
        return pick_device(device)
    except DeimkitError:
        if re.fullmatch(r"cuda(:\d+)?", device) is None:
            raise
        return torch.device(device)


def _opened(path: Path, device: torch.device) -> Session:
    """An exported file where it can be measured: on the device that was asked for, if its runtime runs there."""
    kind = path.suffix.lower()
    if kind == ".engine" and device.type != "cuda":
        raise DeployError(
            f"Expected a CUDA device for {path.name}, a TensorRT engine; got {device}. Use device='cuda' on a "
            "machine with the GPU that it was built for, or measure the ONNX file."
        )
    return open_session(path, None, None if kind == ".xml" else str(device), torch.get_num_threads())


def _claims(sessions: Sequence[Session]) -> dict[str, float | None]:
    """What papers claim of the recipes that sessions are of."""
    names = {session.card.recipe for session in sessions} & set(recipes.names())
    papers = {name: recipes.get(name).paper for name in names}
    return {name: paper.latency_ms for name, paper in papers.items() if paper is not None}


def _doubt(detector: Detector, name: str) -> str:
    """Why a detector is not that of the recipe whose name it has, or ""; a run may change it and keep the name."""
    same = name not in recipes.names() or detector.arch == recipes.get(name).arch
    return "" if same else f"its architecture is another than that of the recipe {name}"


def _not_usual(
    precision: str,
    batch: int | None,
    size: tuple[int, int] | None,
    postprocess: bool = True,
    top: int = 300,
    opset: int | None = None,
    exporter: str | None = None,
) -> list[str]:
    """What an export's file is called by beside its recipe, so that exports of other options do not replace it."""
    words = {
        precision: precision != "fp32",
        "any" if batch is None else f"b{batch}": batch != 1,
        f"{size[0]}x{size[1]}" if size else "": size is not None,
        "raw": not postprocess,
        f"top{top}": top != 300,
        f"opset{opset}": opset is not None,
        str(exporter): exporter is not None,
    }
    return [word for word, named in words.items() if named]


def _fresh(recipe: Recipe) -> Detector:
    """A detector of a recipe with fresh weights, the same every time; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone
        return build(recipe)


def _to_export(source: Any, weights: str | Path | None, progress: bool) -> tuple[Detector, str]:
    """The detector, and the name of its recipe, or "" where it has none."""
    if isinstance(source, Served):
        raise DeployError(f"Expected a detector, a run, a recipe or a file; got {source!r}, which is exported already.")
    if isinstance(source, Recipe) or source in recipes.names():
        recipe = as_recipe(source)
        return (_fresh(recipe) if weights is None else load_detector(recipe, weights, progress=progress)), recipe.name
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
