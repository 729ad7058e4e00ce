"""A detector becomes a file that runs elsewhere, and the file is held against the detector."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deimkit.data.split import Split
from deimkit.deploy.card import PRECISIONS, Card
from deimkit.deploy.onnx_file import choice, write_onnx
from deimkit.deploy.open_file import RUNTIMES, open_session
from deimkit.deploy.parity import Parity, prove, spread
from deimkit.deploy.quantize import write_int8
from deimkit.deploy.session import as_device
from deimkit.errors import DeployError
from deimkit.evaluation.measure import common_classes
from deimkit.models.detector import Detector

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".engine"}
AT_MOST = 8  # images that an engine for any number of them takes


@dataclass(frozen=True)
class Exported:
    """What an export wrote. path: the file. card: what it says of itself. parity: how it compares with torch.

    made: how its precision was reached, where TensorRT has a say in that, and which images INT8 looked at, or "".
    """

    path: Path
    card: Card
    parity: Parity
    made: str = ""

    def __str__(self) -> str:
        size = f"{self.card.size[0]} x {self.card.size[1]}"
        many = f"batches of 1 to {AT_MOST}" if self.path.suffix == SUFFIXES["tensorrt"] else "any batch"
        batch = many if self.card.batch is None else f"batch {self.card.batch}"
        made = f", {self.made}" if self.made else ""
        ends = "boxes, scores and labels" if self.card.postprocess else "the logits and boxes of all queries"
        what = f"{self.card.precision}{made}, {size}, {batch}, opset {self.card.opset} by {self.card.exporter}"
        return f"{self.path}: {what}; gives {ends}\n{self.parity}"

    def _repr_html_(self) -> str:
        return f"<p><code>{self.path}</code></p>{self.parity.html()}"

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain JSON types."""
        return {
            "path": str(self.path),
            "card": self.card.to_dict(),
            "made": self.made,
            "parity": self.parity.to_dict(),
        }


def export_detector(
    detector: Detector,
    path: str | Path,
    format: str = "onnx",
    precision: str = "fp32",
    batch: int | None = 1,
    split: Split | None = None,
    images: int = 100,
    calibration: Split | None = None,
    device: str | None = None,
    note: Callable[[str], None] | None = None,
    **how: Any,
) -> Exported:
    """Write `detector` to `path` as "onnx", "openvino" or "tensorrt", and hold it against torch in what runs it here.

    precision: "fp32", "fp16" or "int8". split: annotated images; `images` of them measure AP, without which nothing is
    called verified. calibration: images that INT8 looks at, by default those of the split that AP leaves out. device:
    the GPU that an engine is for, and where the file is tried, as of `open_session`. batch, how: as of `write_onnx`; an
    engine for any batch takes 1 to 8 images. The report is written beside the file, as .parity.json, with the SHA-256
    of what was written, by name. All are there at the end, or what was there before. note: called with what is being
    done. Raises `DeployError`, and `OSError` where files cannot be written.
    """
    path, tell = Path(path), note or (lambda _: None)
    expect(detector, path, format, precision, split, images, device)
    expect_graph(detector, batch, _typed(format, precision), **how)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        onnx = Path(folder) / f"{path.stem}.onnx"
        tell(f"writing {onnx.name}")
        card, made = write_onnx(detector, onnx, batch=batch, precision=_typed(format, precision), **how), ""
        if precision == "int8" and split is not None:
            seen, made = _calibration(split, images, calibration)
            tell("looking how large the numbers get, for INT8")
            card = write_int8(onnx, onnx, seen)
        files, card, way = FORMATS[format](onnx, Path(folder) / path.name, card, precision, device)
        parity = hold_against(detector, files[-1], split, images, device, tell)
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        report = parity.to_dict() | {"sha256": digests}
        parity_file(files[-1]).write_text(json.dumps(report, indent=1), encoding="utf-8")
        put([*files, parity_file(files[-1])], path.parent)
    return Exported(path.parent / files[-1].name, card, parity, ", ".join(filter(None, (way, made))))


def hold_against(
    detector: Detector,
    path: Path,
    split: Split | None = None,
    images: int = 100,
    device: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Parity:
    """How a deployed file compares with its detector, in every runtime that is installed here and opens it."""
    runtimes = RUNTIMES[path.suffix]
    there = [name for name in runtimes if name in sys.modules or find_spec(name)]
    there = [name for name in there if name != "openvino" or device in (None, "cpu")] or there[:1]
    if not there:
        raise DeployError(f"Nothing here runs {path.suffix} files, to hold one against torch: {_install(runtimes)}")
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(path, name, device)) for name in there]
        return prove(detector, sessions, split, count=images, note=note)


def _install(runtimes: Sequence[str]) -> str:
    return f"pip install {' or '.join(runtimes)}."


def _calibration(split: Split, images: int, calibration: Split | None) -> tuple[Split, str]:
    """The images that INT8 looks at, and in words where they are from; not those of AP if there are others."""
    if calibration is not None and len(calibration):
        return calibration, f"calibrated on images of {calibration.name}"
    chosen = set(spread(split, images).ids)
    others = [i for i, id_ in enumerate(split.ids) if id_ not in chosen]
    if others:
        return split.take(others), f"calibrated on images of {split.name} that AP leaves out"
    return split, f"calibrated on the images of {split.name} that AP is measured on too"


def parity_file(path: Path) -> Path:
    """Where the report on a deployed file lies."""
    return path.with_suffix(path.suffix + ".parity.json")


def expect(
    detector: Detector,
    path: Path,
    format: str,
    precision: str,
    split: Split | None,
    images: int,
    device: str | None,
) -> None:
    """Raise `DeployError` or `DataError` for what cannot be exported and proved so, before anything is written."""
    if format not in SUFFIXES:
        raise DeployError(f"format is one of {', '.join(SUFFIXES)}; got {format!r}.")
    if precision not in PRECISIONS:
        raise DeployError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if path.suffix != SUFFIXES[format]:
        raise DeployError(f"A file of format {format} ends in {SUFFIXES[format]}; got {str(path)!r}.")
    if precision == "int8" and split is None:
        raise DeployError("INT8 has to see images, to know how large the numbers get: give data= (--data).")
    if images < 1:
        raise DeployError(f"images, of which AP is measured, must be at least 1; got {images}.")
    as_device(RUNTIMES[path.suffix][0], device)
    if format != "tensorrt":  # the name of an engine is known only once it is built
        beside = [path.with_suffix(".bin")] if format == "openvino" else []
        expect_free([path, parity_file(path), *beside])
    if split is not None:
        common_classes(detector.categories, split.categories)
    if format == "tensorrt":
        from deimkit.deploy.trt.library import tensorrt

        tensorrt()


def expect_graph(
    detector: Detector,
    batch: int | None,
    precision: str,
    size: tuple[int, int] | None = None,
    opset: int | None = None,
    exporter: str | None = None,
    top: int = 300,
    **_: Any,
) -> None:
    """Raise `DeployError` for arguments that `write_onnx` refuses, before anything is written."""
    choice(precision, opset, exporter, batch, size or detector.size, top)


def expect_free(paths: Sequence[Path]) -> None:
    """Raise `DeployError` unless files can be put at these paths: nothing is there, or a file to be replaced."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise DeployError(f"An export writes the file {str(path)!r}, and there is a folder. Move it, or give out=.")


def put(files: Sequence[Path], folder: Path) -> None:
    """Move files into `folder`, in place of those of the same names; if one cannot be moved, all is as it was."""
    targets = [folder / file.name for file in files]
    expect_free(targets)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside, ExitStack() as undo:
        for file, target in zip(files, targets, strict=True):
            if os.path.lexists(target):
                target.replace(kept := Path(aside) / file.name)
                undo.callback(kept.replace, target)
            else:
                undo.callback(target.unlink, missing_ok=True)
            file.replace(target)
        undo.pop_all()


def _typed(format: str, precision: str) -> str:
    """The precision in which torch has to write the ONNX file."""
    if precision == "int8":
        return "fp32"  # of which it is made
    if format != "tensorrt":
        return precision
    from deimkit.deploy.trt.library import tensorrt
    from deimkit.deploy.trt.precision import written

    return written(tensorrt(), precision)


def _as_onnx(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> Made:
    return [onnx], card, ""


def _as_openvino(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> Made:
    from deimkit.deploy.vino import write_openvino

    card = write_openvino(onnx, path)
    return [path.with_suffix(".bin"), path], card, ""


def _as_tensorrt(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> Made:
    """The engine, under a name that says which GPU and TensorRT it is for, and what it can be built from anew."""
    from deimkit.deploy.trt.build import build
    from deimkit.deploy.trt.key import sidecar
    from deimkit.deploy.trt.plan import Plan

    plan = Plan(precision=precision, batches=(1, 1, AT_MOST))
    built = build(onnx, card, plan, device=device or "cuda")
    kept = onnx.replace(built.path.with_suffix(".onnx"))
    return [kept, sidecar(built.path), built.path], built.card, built.recipe


# How an ONNX file becomes a file of a format: what was written, the file itself at the end, its card, and the way to
# its precision where that is the runtime's.
Made = tuple[list[Path], Card, str]
FORMATS: dict[str, Callable[[Path, Path, Card, str, str | None], Made]] = {
    "onnx": _as_onnx,
    "openvino": _as_openvino,
    "tensorrt": _as_tensorrt,
}
