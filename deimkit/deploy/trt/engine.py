"""An engine opened and run: tensors in, tensors out, on a stream of its own, or as one recorded CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from deimkit.deploy.session import Session
from deimkit.deploy.trt.cuda import Cuda
from deimkit.deploy.trt.key import read
from deimkit.deploy.trt.library import tensorrt
from deimkit.deploy.trt.logger import complaint, listener
from deimkit.errors import DeployError

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "INT32": torch.int32,  # TensorRT 8 has no INT64, and makes it INT32
    "INT64": torch.int64,
}


@dataclass
class Bound:
    """Buffers whose addresses TensorRT holds: they live as long as it may use them. replay: the recorded graph."""

    batch: int
    buffers: dict[str, Tensor]
    replay: Callable[[], None] | None = None


class TrtSession(Session):
    """An engine of `build`, opened on the GPU it was built for.

    path: the engine; its JSON lies beside it. graph: record each run's kernels once as a CUDA graph, and launch them
    all at once from then on. A run copies its inputs into buffers of the session, without waiting for the GPU: what it
    returns can be used at once by whatever is queued on the caller's stream. After a run with another number of images
    everything is set up anew, and so is the graph: it would read shapes that are no longer the context's.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cuda", graph: bool = False) -> None:
        path = Path(path)
        self._trt = tensorrt()
        self.card, self.key, self.recipe = read(path)
        self._cuda = Cuda(device)
        self.device = self._cuda.device
        gpu = self._cuda.gpu()
        self.key.expect(self._trt, gpu, path.name)
        self.name = f"TensorRT {self.key.tensorrt}, {self.recipe}{', CUDA graph' if graph else ''}, on {gpu.name}"
        self._graph = graph
        # in the order in which they are let go: each needs the next ones for as long as it lives
        self._bound: Bound | None = None
        self._context: Any = None
        self._engine: Any = None
        self._runtime: Any = None
        complaint(self._trt)  # what came before is not this engine's
        with self._cuda.current():
            self._open(path)

    def _open(self, path: Path) -> None:
        """Open the runtime, in it the engine, and of that a context."""
        self._runtime = self._trt.Runtime(listener(self._trt))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise DeployError(f"TensorRT cannot read {path.name}: {complaint(self._trt)}. Build the engine again.")
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        if names != {*self.card.inputs, *self.card.outputs}:
            raise DeployError(f"{path.name} has {sorted(names)}, not what is written beside it. Build it again.")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise DeployError(f"No room on the GPU to run {path.name}: {complaint(self._trt)}. Free some memory.")
        self._fewest, self._most = self._batches()

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """See `Session.run`."""
        self.expect(images, sizes)
        with self._cuda.ours() as stream:
            bound = self._bound
            if bound is None or bound.batch != len(images):
                bound = self._bind(len(images))
            for name, given in zip(self.card.inputs, (images, sizes), strict=False):  # raw graphs take no sizes
                bound.buffers[name].copy_(given)
            if bound.replay is not None:
                bound.replay()
            else:
                self._enqueue(stream)
                if self._graph:  # only now: the first run after a change of shapes still sets things up
                    bound.replay = self._cuda.record(lambda: self._enqueue(stream))
        found = {name: bound.buffers[name] for name in self.card.outputs}
        return {name: x.to(torch.int64 if name == "labels" else torch.float32) for name, x in found.items()}

    @property
    def most(self) -> int | None:
        """The most images that the engine was built for."""
        return self._most

    def _batches(self) -> tuple[int, int]:
        """The (fewest, most) images that the engine was built for."""
        if self.card.batch is not None:
            return self.card.batch, self.card.batch
        fewest, _, most = (int(shape[0]) for shape in self._engine.get_tensor_profile_shape("images", 0))
        return fewest, most

    def _bind(self, batch: int) -> Bound:
        """Set the context up for so many images: shapes first, as the outputs' follow from them, then addresses."""
        self._bound = None
        context = self._context
        rest = {"images": (3, *self.card.size), "sizes": (2,)}
        for name in self.card.inputs:
            if not context.set_input_shape(name, (batch, *rest[name])):
                self._refuse(batch)
        if context.infer_shapes():
            self._refuse(batch)
        buffers = {name: self._buffer(name) for name in (*self.card.inputs, *self.card.outputs)}
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise DeployError(f"TensorRT does not take the memory for {name!r}: {complaint(self._trt)}.")
        self._bound = Bound(batch, buffers)
        return self._bound

    def _buffer(self, name: str) -> Tensor:
        """Memory for an input or output, as large and of the type that the engine asks for."""
        dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
        return self._cuda.empty(tuple(self._context.get_tensor_shape(name)), dtype)

    def _refuse(self, batch: int) -> NoReturn:
        """Say that the engine was not built for so many images."""
        raise DeployError(
            f"{self.name} was built for {self._fewest} to {self._most} images at a time; got {batch} "
            f"({complaint(self._trt)}). Show it so many, or export with batch= the number that is to be."
        )

    def _enqueue(self, stream: int) -> None:
        """Queue one inference."""
        if not self._context.execute_async_v3(stream):
            raise DeployError(f"{self.name} could not run: {complaint(self._trt)}.")

    def close(self) -> None:
        """Let go of the graph, the buffers, the context, the engine and the runtime, in this order."""
        self.closed = True
        self._cuda.finish()
        self._bound = None
        self._context = None
        self._engine = None
        self._runtime = None
