"""The GPU's side of a session: a stream of its own, ordered with the caller's, buffers on it, and recorded graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from deimkit.deploy.machine import Gpu


class Cuda:
    """One GPU, and a stream of our own on it. TensorRT waits for the whole GPU if it is given the default stream."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)

    def gpu(self) -> Gpu:
        """The GPU's name, compute capability and driver."""
        return Gpu.of(self.device)

    def current(self) -> AbstractContextManager[None]:
        """In here, TensorRT works on this GPU."""
        return torch.cuda.device(self.device)

    @contextmanager
    def ours(self) -> Iterator[int]:
        """In here, work is queued on our stream, whose handle this gives.

        It begins after all that the caller has queued so far, and what the caller queues later begins after it. So
        nobody waits on the host, and memory that the caller frees is not used again too early.
        """
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield self.stream.cuda_stream
        finally:
            caller.wait_stream(self.stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` queues, as a CUDA graph: queue it again, all at once, by calling what this returns."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with the GPU meanwhile, such as a loader that pins memory, is no error
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            enqueue()
        return graph.replay

    def finish(self) -> None:
        """Wait until everything on our stream is done."""
        self.stream.synchronize()
