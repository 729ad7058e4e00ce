"""The single clock: learning rate, augmentation stages, multi-scale and EMA all read the same `Timeline`.

Epochs count from 0 and steps (optimiser steps of the whole run) from 0. A learning-rate shape answers in factors: every
parameter group multiplies its own base rate by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from deimkit.errors import RecipeError

Stage = Literal["warm", "dense", "augment", "clean"]


class Event(NamedTuple):
    """Something that lasts from `start` to `end` (in epochs): `track` groups what is drawn on one line."""

    track: str
    name: str
    start: float
    end: float
    what: str


def momentum(update: int, decay: float, ramp: float) -> float:
    """What an EMA keeps of itself at update 1, 2, ...: decay * (1 - exp(-update / ramp)), or decay if ramp is 0."""
    return decay * (1 - math.exp(-update / ramp)) if ramp else decay


def _portion(epoch: int, total: int, new_total: int) -> int:
    """`epoch` of `total`, moved to the same share of `new_total` and rounded (halves up)."""
    return (2 * epoch * new_total + total) // (2 * total)


def _fit_warmup(warmup: int, before: Timeline, after: Timeline) -> int:
    """The warm-up of `before`, in steps, for the run `after`; see `Timeline.scaled_to`."""
    shrunk = max(round(warmup * after.steps / before.steps), Timeline.WARMUP_STEPS)
    return min(warmup, shrunk, int(Timeline.WARMUP_SHARE * after.steps))


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise RecipeError(f"warmup must be >= 0 steps; got {warmup}.")


@dataclass(frozen=True)
class FlatCosine:
    """Rise quadratically, stay flat, fall along half a cosine, and stay at the floor for the clean tail (DEIM 3.3).

    warmup: steps from 0 to the base rate. floor: the last factor (DEIM's gamma; 1 means constant after the warm-up).
    flat: the epoch until which the rate stays at its base; None: the end of the dense stage. tail: how many last epochs
    run at the floor; None: the clean stage.

    one_step_late: the published loop evaluates the curve after the optimiser step, so that step k runs with the value
    for k - 1, step 1 with a rate of 0, and step 0 with `first`, left over from a linear warm-up that is built but never
    stepped (1/500 for D-FINE, 1/2000 for RT-DETRv2). False is the corrected loop: step k runs with the value for k + 1.
    """

    warmup: int = 2000
    floor: float = 0.5
    flat: int | None = None
    tail: int | None = None
    one_step_late: bool = True
    first: float = 1 / 500

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"FlatCosine.floor must be a factor in [0, 1]; got {self.floor}. Published: 0.5, or 1.")
        if (self.flat or 0) < 0 or (self.tail or 0) < 0:
            raise RecipeError(f"FlatCosine.flat and tail must be epochs >= 0; got {self.flat} and {self.tail}.")

    def flat_end(self, clock: Timeline) -> int:
        """The epoch at which the rate starts to fall."""
        return clock.dense if self.flat is None else self.flat

    def tail_start(self, clock: Timeline) -> int:
        """The epoch from which the rate stays at its floor."""
        return clock.augment if self.tail is None else clock.total - self.tail

    def check(self, clock: Timeline) -> None:
        """Raise `RecipeError` if the shape does not fit into `clock`."""
        flat, tail = self.flat_end(clock), self.tail_start(clock)
        if self.floor < 1 and flat > tail:
            raise RecipeError(
                f"FlatCosine stays flat until epoch {flat} but its tail starts at epoch {tail} of {clock.total}, which "
                f"leaves no time for the cosine. Choose flat <= {tail}, or floor=1 for a constant rate."
            )

    def curve(self, k: int, clock: Timeline, steps_per_epoch: int) -> float:
        """The published curve at iteration `k`: a factor in [0, 1]."""
        flat = steps_per_epoch * self.flat_end(clock)
        tail = steps_per_epoch * self.tail_start(clock)
        if k <= self.warmup:
            return (k / self.warmup) ** 2 if self.warmup else 1.0
        if k <= flat:
            return 1.0
        if k >= tail:
            return self.floor
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * (k - flat) / (tail - flat)))

    def factor(self, step: int, clock: Timeline, steps_per_epoch: int) -> float:
        """The factor that optimiser step `step` runs with."""
        if not self.one_step_late:
            return self.curve(step + 1, clock, steps_per_epoch)
        if step > 0:
            return self.curve(step - 1, clock, steps_per_epoch)
        return self.first if self.warmup else 1.0

    def scaled(self, before: Timeline, after: Timeline) -> FlatCosine:
        """The same shape in the proportions of a run that was `before` and is `after`."""
        end = _portion(self.tail_start(before), before.total, after.total)
        tail = None if self.tail is None else after.total - end
        flat = self.flat
        if flat is not None:
            flat = _portion(flat, before.total, after.total)
            flat = min(flat, end, after.augment) if self.floor < 1 else flat
        return replace(self, warmup=_fit_warmup(self.warmup, before, after), flat=flat, tail=tail)

    def events(self, clock: Timeline) -> list[Event]:
        """Warm-up, flat part, cosine and floor, as far as they exist."""
        warm = min(self.warmup / clock.steps_per_epoch, clock.total)
        if self.floor == 1:
            parts = [("warm-up", 0.0, warm, "quadratic"), ("constant", warm, clock.total, "x 1")]
        else:
            flat, tail = max(self.flat_end(clock), warm), max(self.tail_start(clock), warm)
            parts = [
                ("warm-up", 0.0, warm, "quadratic"),
                ("flat", warm, flat, "x 1"),
                ("cosine", flat, tail, f"x 1 to x {self.floor:g}"),
                ("floor", tail, clock.total, f"x {self.floor:g}"),
            ]
        return [Event("learning rate", *part) for part in parts if part[2] > part[1]]


@dataclass(frozen=True)
class StepDecay:
    """Rise linearly, stay constant, and multiply by `by` at every epoch in `drops` (the DETR family; plain D-FINE).

    warmup: steps, of which step k >= 0 runs with (k + 1) / warmup. drops: increasing epochs; empty: constant.
    """

    warmup: int = 500
    drops: tuple[int, ...] = ()
    by: float = 0.1

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if list(self.drops) != sorted({max(epoch, 1) for epoch in self.drops}):
            raise RecipeError(f"StepDecay.drops must be increasing epochs >= 1; got {self.drops}.")

    def check(self, clock: Timeline) -> None:
        """Raise `RecipeError` if a drop would never happen."""
        if self.drops and self.drops[-1] >= clock.total:
            raise RecipeError(
                f"StepDecay drops at epoch {self.drops[-1]} of a run that ends after {clock.total} epochs. "
                f"Choose epochs below {clock.total}."
            )

    def factor(self, step: int, clock: Timeline, steps_per_epoch: int) -> float:
        """The factor that optimiser step `step` runs with."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * self.by ** sum(step >= epoch * steps_per_epoch for epoch in self.drops)

    def scaled(self, before: Timeline, after: Timeline) -> StepDecay:
        """The same shape in the proportions of a run that was `before` and is `after`; drops at one epoch merge."""
        drops = {min(_portion(epoch, before.total, after.total), after.total - 1) for epoch in self.drops}
        return replace(self, warmup=_fit_warmup(self.warmup, before, after), drops=tuple(sorted(drops - {0})))

    def events(self, clock: Timeline) -> list[Event]:
        """The warm-up and every constant part."""
        warm = min(self.warmup / clock.steps_per_epoch, clock.total)
        edges = [warm, *(epoch for epoch in self.drops if epoch > warm), clock.total]
        parts = [("warm-up", 0.0, warm, "linear")]
        for start, end in zip(edges, edges[1:], strict=False):
            factor = self.by ** sum(start >= epoch for epoch in self.drops)
            parts.append(("constant", start, end, f"x {factor:g}"))
        return [Event("learning rate", *part) for part in parts if part[2] > part[1]]


@dataclass(frozen=True)
class Timeline:
    """When everything happens in a run, in epochs: the one clock that every other part of the training reads.

    | epochs | stage | photometric | zoom-out, crop | mosaic (p 0.5) | MixUp (p 0.5) |
    |---|---|---|---|---|---|
    | [0, warm) | "warm" | | | | |
    | [warm, dense) | "dense" | x | x without mosaic | x | x |
    | [dense, augment) | "augment" | x | x | | |
    | [augment, total) | "clean" | | | | |

    (DEIM Fig. 4.) Flip and resize are always on. Plain D-FINE and RT-DETRv2 are warm = dense = 0. The start of the
    clean stage is also where the best checkpoint so far is reloaded (`BestTracker`).

    lr: the shape of the learning rate. multi_scale_until: the epoch at which the input size becomes fixed; None: with
    the clean stage; 0: never varied. ema_decay, ema_ramp: update t >= 1 of the EMA keeps decay * (1 - exp(-t / ramp))
    of itself (ramp 0: decay). ema_restart: the decay from the clean stage on, lowered by 1e-4 at each return to the
    best; None leaves it alone, which is what the published code does in effect although its files name values: they
    never reach the average. steps_per_epoch: what these numbers were made for; 3696 is COCO at a batch of 32.

    The defaults are those of DEIM-D-FINE-L. An impossible timeline is refused with a `RecipeError`.
    """

    warm: int = 4
    dense: int = 29
    augment: int = 50
    total: int = 58
    lr: FlatCosine | StepDecay = FlatCosine()
    multi_scale_until: int | None = None
    ema_decay: float = 0.9999
    ema_ramp: float = 1000
    ema_restart: float | None = None
    steps_per_epoch: int = 3696

    WARMUP_SHARE: ClassVar[float] = 0.1
    """`scaled_to` lets the warm-up take at most this share of the run."""
    WARMUP_STEPS: ClassVar[int] = 250
    """`scaled_to` does not shorten the warm-up below this many steps, unless the share above demands it."""

    def __post_init__(self) -> None:
        if self.total < 1 or self.steps_per_epoch < 1:
            raise RecipeError(
                f"A timeline needs at least one epoch of one step; got total={self.total}, "
                f"steps_per_epoch={self.steps_per_epoch}."
            )
        marks = {"0": 0, "warm": self.warm, "dense": self.dense, "augment": self.augment, "total": self.total}
        for (early, a), (late, b) in zip(marks.items(), list(marks.items())[1:], strict=False):
            if a > b:
                raise RecipeError(
                    f"Timeline needs 0 <= warm <= dense <= augment <= total (in epochs); got {late}={b} before {early}"
                    f"{f'={a}' if early != '0' else ''}. `scaled_to(epochs, steps_per_epoch)` moves all together."
                )
        if self.multi_scale_until is not None and not 0 <= self.multi_scale_until <= self.total:
            raise RecipeError(f"Timeline.multi_scale_until must be in [0, {self.total}]; got {self.multi_scale_until}.")
        if not 0 <= self.ema_decay < 1 or self.ema_ramp < 0 or not 0 <= (self.ema_restart or 0) < 1:
            raise RecipeError(
                f"EMA decays must be in [0, 1) and the ramp >= 0 updates; got ema_decay={self.ema_decay}, "
                f"ema_restart={self.ema_restart}, ema_ramp={self.ema_ramp}."
            )
        if self.lr.warmup > self.steps:
            raise RecipeError(
                f"The warm-up of {self.lr.warmup} steps is longer than the run of {self.steps} steps "
                f"({self.total} epochs of {self.steps_per_epoch}). `scaled_to(epochs, steps_per_epoch)` fits it."
            )
        self.lr.check(self)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.total * self.steps_per_epoch

    def stage(self, epoch: int) -> Stage:
        """The augmentation stage of `epoch`: "warm", "dense", "augment" or "clean"."""
        if epoch < self.warm:
            return "warm"
        if epoch < self.dense:
            return "dense"
        return "augment" if epoch < self.augment else "clean"

    def mixup(self, epoch: int) -> bool:
        """Whether batches of `epoch` may be blended: MixUp belongs to the dense stage."""
        return self.stage(epoch) == "dense"

    @property
    def multi_scale_end(self) -> int:
        """The first epoch of fixed input size."""
        return self.augment if self.multi_scale_until is None else self.multi_scale_until

    def multi_scale(self, epoch: int) -> bool:
        """Whether batches of `epoch` change their size: from the very first epoch, warm stage included."""
        return epoch < self.multi_scale_end

    def lr_factor(self, step: int, steps_per_epoch: int | None = None) -> float:
        """What every base rate is multiplied by for optimiser step `step` (from 0) of the run.

        steps_per_epoch: the length of the loader; None takes the one that this timeline was made for.
        """
        return self.lr.factor(step, self, steps_per_epoch or self.steps_per_epoch)

    def ema_decay_at(self, epoch: int, refreshes: int = 0) -> float:
        """The EMA's decay in `epoch`, after `refreshes` returns to the best checkpoint within the clean stage."""
        if self.ema_restart is None or epoch < self.augment:
            return self.ema_decay
        return max(self.ema_restart - 1e-4 * refreshes, 0.0)

    def scaled_to(self, epochs: int, steps_per_epoch: int) -> Timeline:
        """This timeline in the same proportions for another number of epochs and another dataset or batch.

        Stages: every boundary keeps its share of the run, rounded to whole epochs, but the warm stage never grows, and
        from 8 epochs on a clean stage, where there was one, keeps at least one epoch. Warm-up: shrinks with the steps
        of the run, not below `WARMUP_STEPS`, and never takes more than `WARMUP_SHARE` of it. EMA: its window and ramp
        keep their share of the run; for double the batch that is the authors' rule: 1 - decay doubles, the ramp halves.
        Warm-up and EMA never grow beyond the published ones. With the published epochs and steps nothing changes.
        """
        if epochs < 1 or steps_per_epoch < 1:
            raise RecipeError(
                f"scaled_to needs epochs >= 1 and steps_per_epoch >= 1; got {epochs} and {steps_per_epoch}."
            )
        augment = _portion(self.augment, self.total, epochs)
        if self.augment < self.total and epochs >= 8:
            augment = min(augment, epochs - 1)
        until = self.multi_scale_until
        share = min(1.0, epochs * steps_per_epoch / self.steps)
        # The stages first: the learning rate's shape is cut to them.
        frame = Timeline(
            warm=min(self.warm, _portion(self.warm, self.total, epochs)),
            dense=min(_portion(self.dense, self.total, epochs), augment),
            augment=augment,
            total=epochs,
            lr=StepDecay(warmup=0),
            multi_scale_until=None if until is None else _portion(until, self.total, epochs),
            ema_decay=self._scaled_decay(self.ema_decay, share),
            ema_ramp=self.ema_ramp * share,
            ema_restart=None if self.ema_restart is None else self._scaled_decay(self.ema_restart, share),
            steps_per_epoch=steps_per_epoch,
        )
        return replace(frame, lr=self.lr.scaled(self, frame))

    @staticmethod
    def _scaled_decay(decay: float, share: float) -> float:
        """The decay whose window is `share` of the given one's, at least two updates (and exactly `decay` at 1)."""
        return decay if share == 1 else max(1 - (1 - decay) / share, min(decay, 0.5))

    def events(self) -> list[Event]:
        """All that begins and ends, for drawing: tracks "stage", "MixUp", "multi-scale" and "learning rate"."""
        stages = [
            Event("stage", "warm", 0, self.warm, "flip and resize only"),
            Event("stage", "dense", self.warm, self.dense, "mosaic for half of the images, the rest as in augment"),
            Event("stage", "augment", self.dense, self.augment, "colour, zoom-out and crop"),
            Event("stage", "clean", self.augment, self.total, "flip and resize only, from the best checkpoint"),
        ]
        others = [
            Event("MixUp", "MixUp", self.warm, self.dense, "half of the batches"),
            Event("multi-scale", "multi-scale", 0, self.multi_scale_end, "a random size per batch"),
        ]
        return [event for event in stages + others if event.end > event.start] + self.lr.events(self)


class Verdict(NamedTuple):
    """What to do after an epoch: `save` as the best of "stage1" or "stage2" (or None), then perhaps `reload`."""

    save: Literal["stage1", "stage2"] | None
    reload: bool


@dataclass
class BestTracker:
    """Which checkpoint is the best, and when training returns to it: a state machine over (epoch, AP).

    Stage 1 is every epoch before `stop` (the first clean one): a new record is saved. The clean stage starts by
    reloading everything (model, EMA, optimiser, scaler) from stage 1's best; only the epoch counter and the clock run
    on. In stage 2 an AP above all before is saved, and an epoch that does not beat the running record sends training
    back to stage 1's best and forgets the record, so that the epoch after it always sets a new one. `reloads=False` is
    RT-DETRv2's own solver: one best checkpoint, never reloaded. The fields are the whole state:
    `BestTracker(**asdict(tracker))` continues a run.

        if tracker.starts(epoch): reload stage 1's best
        ... train the epoch, measure AP ...
        save, reload = tracker.ends(epoch, ap)
    """

    stop: int
    reloads: bool = True
    best: float | None = None
    record: float | None = None
    has_stage1: bool = False
    refreshes: int = 0

    def starts(self, epoch: int) -> bool:
        """Whether stage 1's best must be reloaded before `epoch` is trained."""
        return self.reloads and epoch == self.stop and self.has_stage1

    def ends(self, epoch: int, ap: float) -> Verdict:
        """What the AP of the EMA model after `epoch` calls for."""
        is_record = self.record is None or ap > self.record
        is_best = self.best is None or ap > self.best
        self.best = ap if is_best else self.best
        if epoch < self.stop or not self.reloads:
            self.record = self.best
            self.has_stage1 = self.has_stage1 or epoch < self.stop
            return Verdict(("stage1" if epoch < self.stop else "stage2") if is_best else None, False)
        self.record = ap if is_record else None
        reload = self.has_stage1 and not is_record
        self.refreshes += reload
        return Verdict("stage2" if is_best else None, reload)
