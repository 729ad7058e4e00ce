"""What is measured side by side: one detector in every runtime that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from deimkit.deploy.bench.benchmark import FAILURES, why
from deimkit.deploy.eager import TorchSession
from deimkit.deploy.onnx_file import read_card, write_onnx
from deimkit.deploy.ort import OrtSession
from deimkit.deploy.session import Session
from deimkit.errors import DeployError
from deimkit.models.detector import Detector


@dataclass(frozen=True)
class Lineup:
    """A detector, and how all runtimes are to run it.

    folder: where exported files are put. recipe: its name. batches: images at a time; of several, files take any
    number. compile: let torch compile it too, which takes minutes. All runtimes use as many threads as torch does.
    """

    detector: Detector
    folder: Path
    recipe: str = ""
    device: torch.device = torch.device("cpu")
    size: tuple[int, int] | None = None
    batches: tuple[int, ...] = (1,)
    compile: bool = False

    def sessions(
        self, precisions: Sequence[str] = ("fp32",), raw: bool = False, remark: Callable[[str], None] | None = None
    ) -> list[Session]:
        """The detector as torch runs it, first of all plainly, and then as every other runtime here does.

        precisions: of "fp32" and "fp16". raw: once more without post-processing, to see what that costs. remark: called
        with why a way of running it is left out.
        """
        left_out = remark or (lambda _: None)
        found: list[Session] = []
        by_torch = dict.fromkeys(("fp32", *(precisions if self.device.type == "cuda" else ())))  # CPUs compute in FP32
        for postprocess in (True, False) if raw else (True,):
            for precision in by_torch:
                found += self._by_torch(precision, postprocess, left_out)
            for precision in precisions:
                found += self._by_others(precision, postprocess, left_out)
        return found

    @property
    def called(self) -> str:
        """The detector in a word."""
        return self.recipe or "detector"

    @property
    def batch(self) -> int | None:
        """Images at a time, or None for any number."""
        return self.batches[0] if len(set(self.batches)) == 1 else None

    def _by_torch(self, precision: str, postprocess: bool, remark: Callable[[str], None]) -> list[Session]:
        ways: list[dict[str, Any]] = [{"deployed": False}, {}]
        ways += [{"compile": True}] if self.compile else []
        ways += [{"graph": True}] if self.device.type == "cuda" else []
        found: list[Session] = []
        for way in ways:
            given = {"size": self.size, "batch": self.batch, "postprocess": postprocess, "precision": precision, **way}
            try:
                found.append(TorchSession(self.detector, self.recipe, device=self.device, **given))
            except FAILURES as error:
                remark(f"{self.called}, {precision}, PyTorch: left out, {why(error)}")
        return found

    def _by_others(self, precision: str, postprocess: bool, remark: Callable[[str], None]) -> list[Session]:
        def onnx(precision: str) -> Path:
            """The detector as an ONNX file."""
            path = self.folder / f"{self.called}_{precision}{'' if postprocess else '_raw'}.onnx"
            if not path.is_file():
                write_onnx(
                    self.detector,
                    path,
                    self.recipe,
                    self.size,
                    self.batch,
                    postprocess=postprocess,
                    precision=precision,
                )
            return path

        own = ("OpenVINO", _openvino) if self.device.type == "cpu" else ("TensorRT", _tensorrt)
        found: list[Session] = []
        for name, opened in (("ONNX Runtime", _ort), own):
            try:
                found += opened(onnx, precision, self)
            except (DeployError, torch.OutOfMemoryError) as error:
                remark(f"{self.called}, {name}, {precision}: left out, {why(error)}")
        return found


def _ort(onnx: Callable[[str], Path], precision: str, own: Lineup) -> list[Session]:
    return [OrtSession(onnx(precision), own.device, torch.get_num_threads())]


def _openvino(onnx: Callable[[str], Path], precision: str, own: Lineup) -> list[Session]:
    if find_spec("openvino") is None:
        raise DeployError("OpenVINO is not installed: pip install openvino.")
    from deimkit.deploy.vino import VinoSession

    return [VinoSession(onnx(precision), torch.get_num_threads())]


def _tensorrt(onnx: Callable[[str], Path], precision: str, own: Lineup) -> list[Session]:
    """An engine built for this GPU, launched kernel by kernel and as a CUDA graph."""
    from deimkit.deploy.trt.build import build
    from deimkit.deploy.trt.engine import TrtSession
    from deimkit.deploy.trt.library import tensorrt
    from deimkit.deploy.trt.plan import Plan
    from deimkit.deploy.trt.precision import written

    path = onnx(written(tensorrt(), precision))
    plan = Plan(precision=precision, batches=(min(own.batches), own.batches[0], max(own.batches)))
    built = build(path, read_card(path), plan, device=str(own.device))
    return [TrtSession(built.path, str(own.device), graph) for graph in (False, True)]
