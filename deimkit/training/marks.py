"""When the parts of a training step begin: marks that a step leaves, and what is read from them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import record_function

from deimkit.criterion import Criterion
from deimkit.structures import Match, Targets
from deimkit.training.learner import Learner

Mark = Callable[[str], None]
LABEL = "deimkit: "  # how the names of parts begin in a trace


def ignore(part: str) -> None:
    """The mark of steps that nobody takes apart."""


@contextmanager
def marks(learner: Learner, mark: Mark) -> Iterator[None]:
    """A block in which a learner's step says `mark(part)` whenever a part of it begins."""
    model, criterion = learner.model, learner.criterion
    handles = [
        model.register_forward_pre_hook(lambda *_: mark("queries")),
        model.backbone.register_forward_pre_hook(lambda *_: mark("backbone")),
        model.encoder.register_forward_pre_hook(lambda *_: mark("encoder")),
        model.encoder.register_forward_hook(lambda *_: mark("decoder")),
        model.register_forward_hook(lambda *_: mark("losses")),
        learner.optimizer.register_step_post_hook(lambda *_: mark("average")),
    ]
    losses, clip = learner.losses, learner._clip

    def marked_losses(*args: Any, **kwargs: Any) -> Any:
        found = losses(*args, **kwargs)
        mark("backward")
        return found

    def marked_clip() -> None:
        mark("optimiser")
        clip()

    learner.criterion = MarkedCriterion(criterion.losses, criterion.matcher, criterion.share, mark)
    vars(learner).update(losses=marked_losses, _clip=marked_clip)
    try:
        yield
    finally:
        del learner.losses, learner._clip  # those of the class are seen again
        learner.criterion = criterion
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class MarkedCriterion(Criterion):
    """A criterion that says when it begins to match, and when it has."""

    mark: Mark = ignore

    def match(self, outputs: Any, targets: Targets) -> list[Match]:
        """As of `Criterion`."""
        self.mark("matching")
        found = super().match(outputs, targets)
        self.mark("losses")
        return found


class Stopwatch:
    """Notes when each part begins; a part lasts until the next one begins, and a step until the next "images".

    On a GPU a note is an event in its queue. Nothing waits for it, so that what overlaps goes on to; and what lies
    between two of them is what the GPU took from one to the other, the time included in which it had nothing to do.
    Elsewhere it is the clock of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.device = device.type == "cuda", device
        self.noted: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """A part begins."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.noted.append((part, event))
        else:
            self.noted.append((part, time.perf_counter()))

    def steps(self) -> list[dict[str, float]]:
        """The seconds of each part in every step between two waits for images."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        found: list[dict[str, float]] = []
        for (part, start), (_, end) in pairwise(self.noted):
            if part == "images":
                found.append(defaultdict(float))
            if found:
                found[-1][part] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
        return [dict(step) for step in found]


class Labels:
    """Names the parts of a step in a trace."""

    def __init__(self) -> None:
        self.now: record_function | None = None

    def __enter__(self) -> Labels:
        return self

    def __exit__(self, *_: object) -> None:
        if self.now is not None:
            self.now.__exit__(None, None, None)

    def mark(self, part: str) -> None:
        """A part begins, so that the one before ends."""
        self.__exit__()
        self.now = record_function(LABEL + part)
        self.now.__enter__()


@dataclass
class Peaks:
    """The most bytes of a GPU during each part; asking for them takes the host a while, so not while it is timed."""

    device: torch.device
    bytes: dict[str, int] = field(default_factory=dict)
    part: str = ""

    def mark(self, part: str) -> None:
        """A part begins."""
        if self.part:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.bytes[self.part] = max(self.bytes.get(self.part, 0), peak)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.part = part
