"""A detector becomes a file that runs elsewhere, and the file is held against the detector."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deimkit.data.split import Split
from deimkit.deploy.card import PRECISIONS, Card
from deimkit.deploy.onnx_file import write_onnx, written_whole
from deimkit.deploy.open_file import RUNTIMES, open_session
from deimkit.deploy.parity import Parity, prove
from deimkit.deploy.quantize import write_int8
from deimkit.errors import DeployError
from deimkit.models.detector import Detector

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".engine"}
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
AT_MOST = 8  # images that an engine for any number of them takes


@dataclass(frozen=True)
class Exported:
    """What an export wrote. path: the file. card: what it says of itself. parity: how it compares with torch.

    made: how its precision was reached, where the runtime has a say in that (TensorRT), or "".
    """

    path: Path
    card: Card
    parity: Parity
    made: str = ""

    def __str__(self) -> str:
        size = f"{self.card.size[0]} x {self.card.size[1]}"
        batch = "any batch" if self.card.batch is None else f"batch {self.card.batch}"
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
    device: str | None = None,
    note: Callable[[str], None] | None = None,
    **how: Any,
) -> Exported:
    """Write `detector` to `path` as "onnx", "openvino" or "tensorrt", and hold it against torch in what runs it here.

    precision: "fp32", "fp16", or "int8", which looks at images of `split`. split: annotated images; `images` of them
    measure AP, without which nothing is called verified. device: the GPU that an engine is for, and where the file is
    tried, as of `open_session`. batch, how: as of `write_onnx`. The report is written beside the file, as
    .parity.json. note: called with what is being done. Raises `DeployError`.
    """
    path, tell = Path(path), note or (lambda _: None)
    expect(path, format, precision, split)
    with tempfile.TemporaryDirectory() as folder:
        onnx = path if format == "onnx" and precision != "int8" else Path(folder) / f"{path.stem}.onnx"
        tell(f"writing {onnx.name} as ONNX")
        card = write_onnx(detector, onnx, batch=batch, precision=_typed(format, precision), **how)
        if precision == "int8":
            assert split is not None
            tell("looking how large the numbers get, for INT8")
            quantised = path if format == "onnx" else onnx.with_suffix(".int8.onnx")
            card, onnx = write_int8(onnx, quantised, split), quantised
        file, card, made = FORMATS[format](onnx, path, card, precision, device)
    parity = hold_against(detector, file, split, images, device, tell)
    with written_whole(parity_file(file)) as beside:
        beside.write_text(json.dumps(parity.to_dict(), indent=1), encoding="utf-8")
    return Exported(file, card, parity, made)


def hold_against(
    detector: Detector,
    path: Path,
    split: Split | None = None,
    images: int = 100,
    device: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Parity:
    """How a deployed file compares with its detector, in every runtime that is installed here and opens it."""
    there = [name for name in RUNTIMES[path.suffix] if MODULES[name] in sys.modules or find_spec(MODULES[name])]
    there = [name for name in there if name != "openvino" or device in (None, "cpu")]
    if not there:
        raise DeployError(
            f"{path} is written, but nothing here runs it, so it is not held against torch: "
            f"pip install {' or '.join(RUNTIMES[path.suffix])}."
        )
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(path, name, device)) for name in there]
        return prove(detector, sessions, split, count=images, note=note)


def parity_file(path: Path) -> Path:
    """Where the report on a deployed file lies."""
    return path.with_suffix(path.suffix + ".parity.json")


def expect(path: Path, format: str, precision: str, split: Split | None) -> None:
    """Raise `DeployError` for what cannot be exported so, before anything is written."""
    if format not in SUFFIXES:
        raise DeployError(f"format is one of {', '.join(SUFFIXES)}; got {format!r}.")
    if precision not in PRECISIONS:
        raise DeployError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}.")
    if path.suffix != SUFFIXES[format]:
        raise DeployError(f"A file of format {format} ends in {SUFFIXES[format]}; got {str(path)!r}.")
    if precision == "int8" and split is None:
        raise DeployError("INT8 has to see images, to know how large the numbers get: give data= (--data).")
    if format == "tensorrt":
        from deimkit.deploy.trt.library import tensorrt

        tensorrt()


def _typed(format: str, precision: str) -> str:
    """The precision in which torch has to write the ONNX file."""
    if precision == "int8":
        return "fp32"  # of which it is made
    if format != "tensorrt":
        return precision
    from deimkit.deploy.trt.library import tensorrt
    from deimkit.deploy.trt.precision import written

    return written(tensorrt(), precision)


def _as_onnx(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> tuple[Path, Card, str]:
    return path, card, ""


def _as_openvino(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> tuple[Path, Card, str]:
    from deimkit.deploy.vino import write_openvino

    return path, write_openvino(onnx, path), ""


def _as_tensorrt(onnx: Path, path: Path, card: Card, precision: str, device: str | None) -> tuple[Path, Card, str]:
    """The engine beside `path`, under a name that says which GPU and TensorRT it is for."""
    from deimkit.deploy.trt.build import build
    from deimkit.deploy.trt.plan import Plan

    plan = Plan(precision=precision, timing_cache=path.with_suffix(".timing"), batches=(1, 1, AT_MOST))
    kept = path.with_suffix(".onnx")
    kept.write_bytes(onnx.read_bytes())  # what the engine is built from anew on another machine
    built = build(kept, card, plan, device=device or "cuda")
    return built.path, built.card, built.recipe


FORMATS: dict[str, Callable[[Path, Path, Card, str, str | None], tuple[Path, Card, str]]] = {
    "onnx": _as_onnx,
    "openvino": _as_openvino,
    "tensorrt": _as_tensorrt,
}
