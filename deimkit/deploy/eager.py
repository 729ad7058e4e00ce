"""torch itself as a runtime: the detector as it is trained, deployed, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from deimkit.deploy.card import Card
from deimkit.deploy.graph import Graph
from deimkit.deploy.session import Session
from deimkit.errors import DeployError
from deimkit.models.detector import Detector

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
WARM_UP = 3  # runs before a CUDA graph is captured: libraries choose their kernels in the first ones


class TorchSession(Session):
    """A detector run by torch.

    size, batch, postprocess, top: as of `Card`. precision: "fp32" or "fp16", of the weights; boxes and distributions
    are computed in float32 either way. deployed: batch norms folded, twin convolutions merged. compile: by
    torch.compile, in the first run of every batch size. graph: replay a CUDA graph, one for every batch size; what a
    run returns is then written over by the next. Raises `DeployError` for what this device cannot do.
    """

    def __init__(
        self,
        detector: Detector,
        recipe: str = "",
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        postprocess: bool = True,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        deployed: bool = True,
        compile: bool = False,
        graph: bool = False,
        top: int = 300,
    ) -> None:
        if precision not in DTYPES:
            raise DeployError(f"precision is one of {', '.join(DTYPES)} in torch; got {precision!r}.")
        self.device = torch.device(device)
        if graph and self.device.type != "cuda":
            raise DeployError(f"A CUDA graph needs a CUDA device; got {self.device}. Leave out graph.")
        self.card = Card(
            recipe=recipe,
            categories=detector.categories,
            size=size or detector.size,
            batch=batch,
            postprocess=postprocess,
            top=top,
            precision=precision,
            versions={name: version(name) for name in ("deimkit", "torch")},
        )
        ways = {"deployed": deployed, "compiled": compile, "CUDA graph": graph, "FP16": precision == "fp16"}
        how = [way for way, taken in ways.items() if taken] or ["eager"]
        self.name = ", ".join([f"PyTorch {torch.__version__}", *how]) + f" on {described(self.device)}"
        module: Any = Graph(detector, postprocess, top, DTYPES[precision], deployed).to(self.device)
        if compile:
            module.compile()
        self._module: Any = module
        self._graphs: dict[int, Replay] | None = {} if graph else None

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As `Session.run`."""
        self.expect(images, sizes)
        with torch.no_grad(), exact():
            if self._graphs is None:
                return dict(zip(self.card.outputs, self._module(images, sizes), strict=True))
            if len(images) not in self._graphs:
                self._graphs[len(images)] = Replay(self._module, images, sizes)
            return dict(zip(self.card.outputs, self._graphs[len(images)](images, sizes), strict=True))

    def close(self) -> None:
        """As `Session.close`."""
        self.closed = True
        self._module, self._graphs = None, None


class Replay:
    """A function of images and sizes as a CUDA graph: recorded once, replayed without Python in between."""

    def __init__(self, function: Any, images: Tensor, sizes: Tensor) -> None:
        self.images, self.sizes = images.clone(), sizes.clone()
        aside = torch.cuda.Stream(images.device)
        aside.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(self.images, self.sizes)
        torch.cuda.current_stream(images.device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(self.images, self.sizes)

    def __call__(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Copy the inputs to where the graph reads them, and replay it."""
        self.images.copy_(images)
        self.sizes.copy_(sizes)
        self.graph.replay()
        return tuple(self.outputs)


@contextmanager
def exact() -> Iterator[None]:
    """FP32 that is meant: torch would round what goes into convolutions, and into products if asked, on GPUs."""
    backends: Any = torch.backends  # whose stubs do not know all of it
    parts = (backends.cudnn.conv, backends.cuda.matmul)
    kept = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, precision in zip(parts, kept, strict=True):
            part.fp32_precision = precision


def described(device: torch.device) -> str:
    """A device by its name: "CPU", or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
