"""What the matching microscope adds to a training step: steps it looks at, in turn with steps it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from deimkit.structures import Batch
from deimkit.training.microscope import Microscope
from tests.bench.bench_criterion import OURS
from tests.bench.bench_criterion import Step as Crowd
from tests.bench.bench_step import Ours, noise
from tests.bench.paired import Row, paired, seconds

EVERY = Microscope().every


class Watched(Ours):
    """A training step that may be looked at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain, self.scope = self.criterion, Microscope(every=1)

    def look(self, batch: Batch) -> None:
        """A step that the microscope sees, with its row."""
        self.criterion = lambda outputs, targets: self.plain(outputs, targets, watch=self.scope.watch_for(0))
        self(batch)
        assert self.scope.row() is not None

    def train(self, batch: Batch) -> None:
        """A step as it is without."""
        self.criterion = self.plain
        self(batch)


def rows() -> Iterator[Row]:
    """The step with and without, what that is per step, and the look alone: at this step and at D-FINE-L's shapes."""
    yield from step("cpu", 320, 4)
    if torch.cuda.is_available():
        yield from step("cuda", 640, 32)
    yield alone("  a look and its row, D-FINE-L's shapes, 8 images of 20 targets", Crowd().ours())
    yield alone("  the same, 8 images of 300 targets", Crowd(per_image=300, groups=1).ours())


def step(device: str, pixels: int, batch: int, runs: int = 9) -> Iterator[Row]:
    """The whole step of D-FINE-N, then the look alone."""
    ours, images = Watched("dfine_n", pixels, batch, device), noise(batch, pixels, device)
    seen, unseen, ratio = paired(lambda: ours.look(images), lambda: ours.train(images), runs=runs, warmup=2)
    name = f"D-FINE-N step that is looked at, {batch} x {pixels} px, {device}"
    yield Row(name, seen * 1e3, unseen * 1e3, "ms", ratio, "peer: the same step without the microscope")
    said = f"one step in {EVERY} is looked at; as noisy as the steps"
    yield Row("  added to a step, by the paired steps", 100 * (1 / ratio - 1) / EVERY, None, "% of a step", None, said)
    outputs = ours.model(images.images, images.targets)
    row = alone("  a look and its row", (outputs, images.targets))
    yield row
    share = row.ours / 1e3 / unseen / EVERY
    yield Row("  added to a step, by that", 100 * share, None, "% of a step", None, f"one step in {EVERY} is looked at")


def alone(name: str, seen: tuple[Any, Any]) -> Row:
    """A look at outputs and targets, and its row."""
    own, shared = OURS.pairs(*seen)
    scope = Microscope(every=1)

    def look() -> None:
        scope.look(own, shared)
        assert scope.row() is not None

    return Row(name, 1e3 * _median(look), None, "ms", None, "")


def _median(f: Callable[[], None], runs: int = 21) -> float:
    f()
    return median(seconds(f) for _ in range(runs))
