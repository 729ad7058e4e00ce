"""What an engine is to be like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deimkit.deploy.card import PRECISIONS
from deimkit.errors import DeployError

# Half precision ends at 65504 and has 11 bits. Sums of many numbers, squares, exponentials and divisions leave that
# range (normalisation, reductions, softmax, unary functions, powers); a confidence or a coordinate needs more bits
# (top-k, sampling). Published engines that ignored this lost boxes, or found nothing at all.
SENSITIVE = ("NORMALIZATION", "SOFTMAX", "REDUCE", "UNARY", "TOPK", "GRID_SAMPLE", "pow")


@dataclass(frozen=True)
class Plan:
    """How an engine is to be built.

    precision: "fp32", "fp16" or "int8". workspace: bytes that one layer may use, or None for all of the GPU. level:
    0 to 5, how long to search for fast kernels, or None for TensorRT's own. timing_cache: a file that remembers what
    was measured, for the next build. batches: (fewest, usual, most) images at a time, where the ONNX file leaves it
    open.

    keep: what stays in FP32 where TensorRT chooses precisions itself (up to 10): types of layers in capitals, as in
    `tensorrt.LayerType`, and parts of names. ends: keep in FP32 also all arithmetic between the last product of
    matrices and an output or a place to sample: coordinates and confidences. ((), False) is plain `trtexec --fp16`.
    """

    precision: str = "fp32"
    workspace: int | None = None
    level: int | None = None
    timing_cache: Path | None = None
    batches: tuple[int, int, int] = (1, 1, 8)
    keep: tuple[str, ...] = SENSITIVE
    ends: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DeployError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}.")
        if not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            raise DeployError(
                f"batches must be (fewest, usual, most) images, at least one, rising; got {self.batches}."
            )
        if self.level is not None and not 0 <= self.level <= 5:
            raise DeployError(f"level must be 0 (quickly built) to 5 (quickly run); got {self.level}.")
        if self.workspace is not None and self.workspace <= 0:
            raise DeployError(f"workspace must be a number of bytes above 0, or None; got {self.workspace}.")
