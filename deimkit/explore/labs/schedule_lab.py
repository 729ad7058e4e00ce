"""The lab of the schedule: what happens when in a training, and what an impossible schedule is (DEIM Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deimkit.errors import RecipeError
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.schedule_panels import panels
from deimkit.explore.labs.sheet import Drawing
from deimkit.training.timeline import FlatCosine, Timeline, momentum

if TYPE_CHECKING:
    from deimkit.recipes.recipe import Recipe

Array = NDArray[np.float64]
POINTS = 500  # of a curve
MARKS = ("warm", "dense", "augment")  # the stages whose ends can be moved
FOLLOWS, STAYS = "follow in proportion", "stay where they are"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a schedule does, as numbers.

    clock: the timeline that is drawn. asked: the epochs at which "warm", "dense" and "augment" were asked to end, and
    "total". trouble: why that is impossible, in the library's words, or None; `clock` is then the recipe's own in
    proportion. epochs: (n,) where the curves are known. rates: (n,) the learning rate. news: (n,) the share of new
    weights that each update lets into the average (1 - its decay).
    """

    clock: Timeline
    asked: dict[str, float]
    trouble: str | None
    epochs: Array
    rates: Array
    news: Array

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """Name, first epoch and end of every stage that lasts."""
        return [(e.name, int(e.start), int(e.end)) for e in self.clock.events() if e.track == "stage"]

    @property
    def wrong(self) -> list[str]:
        """Which of the ends that were asked for lie before the one in front of them, or after the end of the run."""
        if self.trouble is None:
            return []
        names, found = [*MARKS, "total"], set()
        for early, late in zip(names, names[1:], strict=False):
            if self.asked[early] > self.asked[late]:
                found |= {early, late}
        return [name for name in names if name in found]


class ScheduleLab(Lab):
    """One clock for everything: learning rate, stages, odds of mosaic and MixUp, multi-scale and the average.

    The ends of the stages can be dragged in the figure, too.
    """

    title = "The schedule: what happens when"

    def __init__(self, recipe: Recipe) -> None:
        """recipe: the one that the lab begins with, such as `deimkit.recipes.get("deim_dfine_l")`."""
        self.recipe = recipe
        clock = recipe.timeline
        self.longest = max(2 * clock.total, 150)
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        """How long, what becomes of the rest, the ends of the stages, and the shape of the learning rate."""
        clock, longest = self.recipe.timeline, self.longest
        pace = _step(clock.steps_per_epoch, max(1, clock.steps_per_epoch // 40))
        rise = max(2 * clock.lr.warmup, 4000)
        floor = clock.lr.floor if isinstance(clock.lr, FlatCosine) else None
        return (
            Slider("epochs", 1, longest, 1, clock.total, "epochs"),
            Slider("steps", pace, 2 * clock.steps_per_epoch, pace, clock.steps_per_epoch, "steps per epoch"),
            Choice("rest", (FOLLOWS, STAYS), FOLLOWS, "the rest will"),
            Slider("warm", 0, longest, 1, clock.warm, "warm stage ends"),
            Slider("dense", 0, longest, 1, clock.dense, "dense stage ends"),
            Slider("augment", 0, longest, 1, clock.augment, "augment stage ends"),
            Slider("warmup", 0, rise, _step(clock.lr.warmup, 50), clock.lr.warmup, "steps of warm-up"),
            *([] if floor is None else [Slider("floor", 0.0, 1.0, 0.05, floor, "floor of the rate")]),
        )

    def compute(self, epochs: int, steps: int, rest: str, floor: float | None = None, **ends: int) -> Schedule:
        """The curves of the timeline that was asked for, or, if it is impossible, of the recipe's own in proportion."""
        own = self.recipe.timeline
        total = own.total if rest == FOLLOWS else epochs
        asked: dict[str, Any] = {name: ends[name] for name in MARKS} | {"total": total}
        trouble = None
        try:
            lr = replace(own.lr, warmup=ends["warmup"])
            if floor is not None and isinstance(lr, FlatCosine):
                lr = replace(lr, floor=floor)
            pace = own.steps_per_epoch if rest == FOLLOWS else steps
            clock = replace(own, **asked, steps_per_epoch=pace, lr=lr)
            if rest == FOLLOWS:
                clock = clock.scaled_to(epochs, steps)
                asked = {name: getattr(clock, name) for name in asked}
        except RecipeError as error:
            trouble, clock = str(error), own.scaled_to(epochs, steps)
            asked = {name: end * epochs / total for name, end in asked.items()}  # as on the axis
        at = _steps(clock)
        news = [
            1 - momentum(k + 1, clock.ema_decay_at(k // clock.steps_per_epoch), clock.ema_ramp) for k in at.tolist()
        ]
        rates = self.recipe.optim.lr * np.array([clock.lr_factor(k) for k in at.tolist()])
        return Schedule(clock, asked, trouble, at / clock.steps_per_epoch, rates, np.array(news))

    def words(self, found: Schedule) -> str:
        """The stages and the rate, or why it cannot be."""
        clock = found.clock
        if found.trouble is not None:
            return f"Impossible: {found.trouble} Drawn is what the recipe would be in {clock.total} epochs instead."
        stages = ", ".join(f"{name} {start} to {end}" for name, start, end in found.stages)
        rate = ", ".join(f"{e.name} until {e.end:.3g}" for e in clock.lr.events(clock))
        return (
            f"{clock.total} epochs of {clock.steps_per_epoch} steps. Stages: {stages}. "
            f"Learning rate: {rate}; it ends at {found.rates[-1]:.3g}."
        )

    def dragged(self, shapes: Sequence[Any]) -> dict[str, Any]:
        """Where the ends of the stages were dragged to."""
        found = self.found
        own = self.recipe.timeline.total if self.values["rest"] == FOLLOWS else found.clock.total
        total = found.clock.total if self.values["rest"] == FOLLOWS else own
        ends = {}
        for name, shape in zip(MARKS, shapes, strict=False):
            here = found.asked[name]
            place = max((float(shape.x0), float(shape.x1)), key=lambda x: abs(x - here))
            moved = abs(place - here) > 1e-6
            ends[name] = min(max(round(place * own / total), 0), self.longest) if moved else self.values[name]
        return ends

    def draw(self, found: Schedule) -> Drawing:
        """The learning rate over the stages; what the images go through; and the average of the weights."""
        return panels(found, self.recipe.optim.lr, self.recipe.augment)


def _step(value: int, most: int) -> int:
    """The longest step up to `most` in which a slider reaches this value from zero."""
    return max(step for step in range(1, most + 1) if value % step == 0)


def _steps(clock: Timeline) -> NDArray[np.int64]:
    """The steps at which curves are drawn: all over the run, and more of them while rate and average warm up."""
    last = clock.steps - 1
    early = int(min(max(2 * clock.lr.warmup, 4 * clock.ema_ramp), last))
    spread = [np.linspace(0, last, POINTS), np.linspace(0, early, POINTS // 4)]
    return np.unique(np.concatenate(spread).astype(np.int64))
