"""A detector opened in a runtime: tensors in, tensors out, whichever runtime it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from deimkit.deploy.card import Card
from deimkit.errors import DeployError

# What a runtime is called, and the kinds of device that it is used on here; it is at home on the first.
RUNS_ON = {
    "onnxruntime": ("ONNX Runtime", ("cpu", "cuda")),
    "openvino": ("OpenVINO", ("cpu",)),
    "tensorrt": ("TensorRT", ("cuda",)),
}


def as_device(runtime: str, device: str | torch.device | None = None) -> torch.device:
    """The device of that name for a runtime, by default where it is at home; `DeployError` if it does not run there."""
    name, kinds = RUNS_ON[runtime]
    try:
        found = torch.device(kinds[0] if device is None else device)
    except RuntimeError:
        found = None  # of a name that torch does not know
    if found is None or found.type not in kinds:
        raise DeployError(
            f"{name} is used on {' or '.join(kinds)} here; got device={str(device)!r}. "
            f"Ask for device='{kinds[0]}', or leave device out."
        )
    return found


class Session(ABC):
    """One opened detector. card: what it is. name: runtime, version and device. device: where its tensors live.

    Not safe to be run by two threads at once. A context manager: `close` lets go of its memory.
    """

    card: Card
    name: str
    device: torch.device
    closed = False

    @property
    def most(self) -> int | None:
        """The most images that one run takes, or None for any number."""
        return self.card.batch

    @property
    def batches(self) -> str:
        """How many images one run takes, in words: "batch 1", "batches of 1 to 8", or "any batch"."""
        if self.card.batch is not None:
            return f"batch {self.card.batch}"
        return "any batch" if self.most is None else f"batches of 1 to {self.most}"

    @abstractmethod
    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """What the graph says of images (B, 3, H, W), float32 in [0, 1], with sizes (B, 2), int64 (height, width).

        Both lie on `device`, and so does what comes back, by name: boxes (B, K, 4) float32 xyxy in pixels of `sizes`,
        scores (B, K) float32 descending, labels (B, K) int64 class indices; or, without post-processing, logits
        (B, Q, C) and boxes (B, Q, 4) cxcywh fractions. B is `card.batch`, where that is not None. The next `run` may
        write over what this one returned.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the runtime's memory; nothing runs afterwards."""

    def expect(self, images: Tensor, sizes: Tensor) -> None:
        """Raise `DeployError` unless the session is open and its graph takes inputs of these shapes and types."""
        if self.closed:
            raise DeployError(f"{self.name} is closed. Open the file again.")
        card = self.card
        right = images.ndim == 4 and images.shape[0] == (card.batch or images.shape[0])
        right = right and 0 < len(images) <= (self.most or len(images))
        if not right or tuple(images.shape[1:]) != (3, *card.size) or images.dtype != torch.float32:
            batch = card.batch or ("B" if self.most is None else f"1 to {self.most}")
            raise DeployError(
                f"{self.name} takes images as float32 ({batch}, 3, {card.size[0]}, {card.size[1]}) in [0, 1]; got "
                f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}. Another size or "
                "batch is another export."
            )
        if tuple(sizes.shape) != (len(images), 2) or sizes.dtype != torch.int64:
            raise DeployError(
                f"Expected sizes as int64 ({len(images)}, 2), a (height, width) each; got "
                f"{str(sizes.dtype).removeprefix('torch.')} {tuple(sizes.shape)}."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
