"""Deployed detectors beside eager torch: torch deployed, ONNX Runtime, OpenVINO; and what post-processing costs.

All runtimes of a size are measured in turn (`deimkit.deploy.bench.benchmark`); a ratio is the median of the rounds',
its note says where that median lies with 95 % confidence. What eager torch is beside transformers', `models` tells.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from deimkit import recipes
from deimkit.deploy.bench.benchmark import compare
from deimkit.deploy.bench.latency import Result
from deimkit.deploy.bench.timing import Method, Ratio
from deimkit.deploy.eager import TorchSession
from deimkit.deploy.onnx_file import write_onnx
from deimkit.deploy.ort import OrtSession
from deimkit.deploy.session import Session
from deimkit.deploy.vino import VinoSession
from deimkit.models.detector import Detector
from deimkit.models.postprocess import best
from deimkit.structures import Predictions
from tests.bench.paired import Row, paired

SIZES = ("dfine_n", "dfine_s", "dfine_l")
SIDE_BY_SIDE = Method(rounds=15, seconds=6.0)
CALL_BY_CALL = Method(rounds=80, seconds=0.0, pause=0.02)  # pairs of single calls, for differences of a few percent


def rows() -> Iterator[Row]:
    """N, S and L at 640 x 640, one image at a time, random weights, on the CPU."""
    for name in SIZES:
        recipe = recipes.get(name)
        detector = recipe.build(80).eval()
        with tempfile.TemporaryDirectory() as folder:
            yield from runtimes(detector, name, Path(folder))
            if name == SIZES[0]:
                yield from endings(detector, name, Path(folder))


def runtimes(detector: Detector, name: str, folder: Path) -> Iterator[Row]:
    """Each runtime beside eager torch."""
    path = folder / f"{name}.onnx"
    write_onnx(detector, path, recipe=name)
    threads = torch.get_num_threads()  # the same for all
    with ExitStack() as opened:
        made: list[Session] = [
            TorchSession(detector, name, deployed=False),
            TorchSession(detector, name),
            OrtSession(path, threads=threads),
            VinoSession(path, threads=threads),
        ]
        sessions = [opened.enter_context(session) for session in made]
        report = compare(sessions, method=SIDE_BY_SIDE)
    eager, *others = report.results
    for result in others:
        yield row(f"{result.name}: {name}", result, eager, report.speedup(result))


def endings(detector: Detector, name: str, folder: Path) -> Iterator[Row]:
    """Post-processing: graphs with and without it, in pairs of calls; and alone, beside a forward pass."""
    whole, raw = folder / f"{name}.onnx", folder / f"{name}_raw.onnx"
    write_onnx(detector, raw, recipe=name, postprocess=False)
    pairs = [
        (OrtSession(raw), OrtSession(whole)),
        (TorchSession(detector, name, postprocess=False), TorchSession(detector, name)),
    ]
    for pair in pairs:
        with pair[0], pair[1]:
            report = compare(pair, method=CALL_BY_CALL)
        without, result = report.results
        yield row(f"{result.name} with post-processing: {name}", result, without, report.speedup(result), "without it")
    yield alone(detector, name)


def row(called: str, result: Result, other: Result, ratio: Ratio, peer: str = "eager torch") -> Row:
    """A result beside another that was measured in turn with it, by their medians."""
    ours, theirs = 1e3 * result.wall.median, 1e3 * other.wall.median
    return Row(called, ours, theirs, "ms", ratio.median, f"peer: {peer}; {ratio.low:.2f} to {ratio.high:.2f}")


def alone(detector: Detector, name: str) -> Row:
    """The post-processing of given logits and boxes, and the whole forward pass before it."""
    deployed, images = detector.deploy(fold_all=True), torch.rand(1, 3, *detector.size)
    sizes = torch.tensor([detector.size])
    with torch.inference_mode():
        preds: Predictions = deployed(images)
        ours, forward, ratio = paired(lambda: best(preds, sizes), lambda: deployed(images), runs=30, warmup=3)
    note = f"peer: the forward pass, of which this is {100 / ratio:.2f} %"
    return Row(f"post-processing alone, torch: {name}", 1e3 * ours, 1e3 * forward, "ms", ratio, note)
