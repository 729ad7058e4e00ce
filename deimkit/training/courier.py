"""Brings batches to the device ahead of time: while one is learned, the next is on its way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from deimkit.errors import DataError
from deimkit.structures import Batch, Targets


class Sent(NamedTuple):
    """A batch on its way. batch: as the loader gave it. moved: the same on the device, once the event has come."""

    batch: Batch
    moved: Batch
    arrived: torch.cuda.Event


class Courier:
    """Copies batches to a device; to a GPU on a stream of its own, beside the step before, if they come by `ahead`.

    Only batches in pinned memory, as the loader's processes give them, travel beside anything. On the GPU there is one
    batch more for it, of bytes; if it has no room for that, the batch is copied when it is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._sent: deque[Sent] = deque()

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each handed out when the next is on its way; what failed is raised in its turn."""
        return self._ahead(batches) if self.device.type == "cuda" else batches

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._sent.clear()
        now, failure = next(batches, None), None
        while now is not None:
            then = None
            try:
                then = next(batches, None)
            except DataError as error:
                failure = error
            if then is not None:
                self._send(then)
            yield now
            if failure is not None:
                raise failure
            now = then

    def bring(self, batch: Batch) -> Batch:
        """The batch on the device, where what the current stream does next may use it."""
        if any(sent.batch is batch for sent in self._sent):
            while (sent := self._sent.popleft()).batch is not batch:
                pass  # those before it were never learned
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(sent.arrived)  # not for the whole other stream, where the next batch travels by now
            for tensor in tensors(sent.moved):
                tensor.record_stream(stream)
            return sent.moved
        moved: Batch = batch.to(self.device, non_blocking=True)
        return moved

    def _send(self, batch: Batch) -> None:
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with suppress(torch.OutOfMemoryError), torch.cuda.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
            self._sent.append(Sent(batch, moved, self._stream.record_event()))


def tensors(part: Batch | Targets) -> Iterator[Tensor]:
    """All tensors of a batch, those of its targets too."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Targets):
            yield from tensors(value)
