"""A dry run: a few real steps of every stage of a training, and what they say about the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

import torch

from deimkit.data.dataset import Dataset
from deimkit.data.fetch import amount
from deimkit.errors import RecipeError
from deimkit.structures import Batch
from deimkit.training.machine import default_workers
from deimkit.training.memory import Fit
from deimkit.training.progress import Silent
from deimkit.training.run import Plan
from deimkit.training.timeline import StepDecay, Timeline
from deimkit.training.trainer import Trainer

SHOWN = 16  # images that are evaluated
CHECKPOINTS = 4  # of a run at most: the last, the best, the best of stage one, and one that is being written


@dataclass(frozen=True)
class Pace:
    """How the steps of one stage went, but for the first, which warms up.

    step_s: seconds of each. load_s: seconds that one process took to load the batch of each. boxes: per image, on
    average. loss: of each.
    """

    stage: str
    step_s: tuple[float, ...]
    load_s: tuple[float, ...]
    boxes: float
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run of `recipe` measured.

    batch: images per step, all on one device. device, precision: where and in what. paces: one per stage.
    evaluate_s: seconds per image of evaluation, loading included; None without a val split. memory: bytes that
    the steps took on a GPU; on a CPU the most that this process has had so far. checkpoint: bytes on the disk. fit:
    what there is memory for, where that was asked.
    """

    recipe: Any
    batch: int
    device: str
    precision: str
    paces: tuple[Pace, ...]
    evaluate_s: float | None
    memory: int
    checkpoint: int
    fit: Fit | None = None

    def forecast(
        self,
        images: int,
        val_images: int,
        epochs: int | None = None,
        batch: int | None = None,
        devices: int | None = None,
        workers: int | None = None,
    ) -> Forecast:
        """How long the whole training takes on so many `images`, measured on `val_images` after every epoch.

        epochs, batch: of the whole training (`Recipe.fit_to`). devices: such as the one rehearsed on, which share the
        batch, with nothing lost in between; by default all there are. workers: loader processes for all of them
        together. A step is taken to cost as much per image as in the rehearsal, which for a larger batch is too much
        rather than too little, and the next batch to be loaded meanwhile, where there are workers.
        """
        whole = self.recipe.fit_to(images, epochs=epochs, batch=batch)
        devices = (torch.cuda.device_count() if self.device.startswith("cuda") else 1) if devices is None else devices
        workers = default_workers() if workers is None else workers
        if devices < 1 or workers < 0 or val_images < 0 or whole.batch % devices:
            raise RecipeError(
                "Expected devices >= 1 that divide the batch, workers >= 0 and val_images >= 0; got "
                f"devices={devices} for a batch of {whole.batch}, workers={workers}, val_images={val_images}."
            )
        clock, scale = whole.timeline, whole.batch / self.batch
        stages = []
        for pace in self.paces:
            steps = lengths(clock)[pace.stage] * clock.steps_per_epoch
            compute = [scale / devices * seconds for seconds in pace.step_s]
            load = [scale / max(workers, 1) * seconds for seconds in pace.load_s]
            spread = 2 * stdev(compute) / sqrt(len(compute)) if len(compute) > 1 else mean(compute)
            stages.append(StageForecast(pace.stage, steps, mean(compute), mean(load), spread, overlap=workers > 0))
        evaluation = (self.evaluate_s or 0.0) * val_images * clock.total / devices
        return Forecast(whole, self.device, devices, workers, tuple(stages), evaluation, self.checkpoint * CHECKPOINTS)

    def __str__(self) -> str:
        head = f"{self.recipe.name}, {self.batch} image(s) of {' x '.join(map(str, self.recipe.size))} a step"
        lines = [f"{head}, {self.device}, {self.precision}", "stage    a step    to load it  boxes/image   loss"]
        for pace in self.paces:
            lines.append(
                f"{pace.stage:8} {1e3 * mean(pace.step_s):6.0f} ms  {1e3 * mean(pace.load_s):6.0f} ms  "
                f"{pace.boxes:10.1f}  {mean(pace.loss):6.1f}"
            )
        if self.evaluate_s is not None:
            lines.append(f"evaluation: {1e3 * self.evaluate_s:.0f} ms an image")
        lines.append(f"memory {amount(self.memory)}; a checkpoint is {amount(self.checkpoint)}")
        if self.fit is not None:
            lines.append(str(self.fit))
        return "\n".join(lines)


@dataclass(frozen=True)
class StageForecast:
    """One stage of a training to come.

    steps: how many. compute, load: seconds that each takes the devices, and the loader. spread: two standard errors of
    the former. overlap: whether the loader works meanwhile.
    """

    stage: str
    steps: int
    compute: float
    load: float
    spread: float
    overlap: bool

    @property
    def step(self) -> float:
        """Seconds from one step to the next."""
        return max(self.compute, self.load) if self.overlap else self.compute + self.load

    @property
    def hours(self) -> float:
        """Of the stage."""
        return self.steps * self.step / 3600


@dataclass(frozen=True)
class Forecast:
    """What a training will take: hours by stage and for evaluation, bytes on the disk.

    recipe: the whole training. evaluation: seconds. disk: bytes of its checkpoints.
    """

    recipe: Any
    device: str
    devices: int
    workers: int
    stages: tuple[StageForecast, ...]
    evaluation: float
    disk: int

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return sum(stage.hours for stage in self.stages) + self.evaluation / 3600

    @property
    def range(self) -> tuple[float, float]:
        """Hours between which the whole is, as far as the steps' spread tells."""
        spread = sum(stage.steps * stage.spread for stage in self.stages) / 3600
        return max(self.hours - spread, 0.0), self.hours + spread

    @property
    def device_hours(self) -> float:
        """What is paid for: hours of one device."""
        return self.hours * self.devices

    def __str__(self) -> str:
        clock, low_high = self.recipe.timeline, " to ".join(in_words(hours) for hours in self.range)
        run = f"{clock.total} epochs of {clock.steps_per_epoch} x {self.recipe.batch} images"
        head = f"{self.recipe.name} on {self.devices} x {self.device}, {self.workers} loader process(es): {run}"
        lines = [head, "stage         steps    a step  of it waiting for images      total"]
        for s in self.stages:
            waiting = f"{s.step - s.compute:6.2f} s"
            lines.append(f"{s.stage:10} {s.steps:8,} {s.step:7.2f} s  {waiting:>23}  {in_words(s.hours):>9}")
        lines.append(f"{'evaluation':10} {'':8} {'':9}  {'':>23}  {in_words(self.evaluation / 3600):>9}")
        lines.append(f"in all {in_words(self.hours)} ({low_high}), {amount(self.disk)} of checkpoints")
        return "\n".join(lines)


class Short(Trainer):
    """A training with an epoch of a few steps for every stage; it keeps no decoded image: a large dataset would not."""

    cache_bytes = 0
    probed = 0
    each: int  # steps of an epoch

    @classmethod
    def of(cls, recipe: Any, batch: int, plan: Plan, dataset: Dataset, folder: Path, steps: int) -> Self:
        """One of `steps` steps of `batch` images in all stages of `recipe` together, in an empty `folder`."""
        stages = stages_of(recipe.timeline)
        each = ceil(steps / len(stages))
        if each < 2:
            raise RecipeError(
                f"A dry run needs at least two steps for each of the {len(stages)} stages of {recipe.name}; got "
                f"steps={steps}. Give {2 * len(stages)} or more."
            )
        short = replace(recipe, timeline=one_epoch_each(recipe.timeline), batch=batch, return_to_best=False)
        plan = replace(plan, evaluate_every=len(stages), save_every=None, patience=None)
        learned = dataset.train
        if learned is not None and len(learned) < batch:
            dataset = replace(dataset, train=learned.take(i % len(learned) for i in range(batch)))
        plan.write(folder)
        trainer = cls(short, plan, dataset, folder, Silent())
        trainer.each = each
        return trainer

    def _batches(self) -> Iterator[Batch]:
        """The first batches of the epoch, over and over if there are too few."""
        taken = 0
        while taken < self.each:
            for batch in islice(self._together(self.loader.epoch(self.epoch)), self.each - taken):
                taken += 1
                yield batch


def rehearse(recipe: Any, batch: int, plan: Plan, dataset: Dataset, folder: Path, steps: int) -> Rehearsal:
    """Train `steps` steps of `batch` images in all stages of `recipe` together, in an empty `folder`, and measure them.

    plan: of the training; its device, precision, weights and seed count. Raises what a training raises.
    """
    if dataset.val is not None:
        dataset = replace(dataset, val=dataset.val.take(range(min(len(dataset.val), SHOWN))))
    trainer = Short.of(recipe, batch, replace(plan, workers=0), dataset, folder, steps)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    run = trainer.fit()
    rows, evaluated, stages = run.rows("step"), run.rows("epoch"), stages_of(recipe.timeline)
    return Rehearsal(
        recipe=recipe,
        batch=batch,
        device=str(trainer.device),
        precision=str(trainer.precision).removeprefix("torch."),
        paces=tuple(_pace(name, [row for row in rows if row["epoch"] == i], batch) for i, name in enumerate(stages)),
        evaluate_s=evaluated[-1]["evaluate_s"] / len(trainer.splits["val"]) if evaluated else None,
        memory=round(rows[-1]["memory_mib"] * 2**20),
        checkpoint=run.last.stat().st_size,
    )


def _pace(stage: str, rows: list[dict[str, Any]], batch: int) -> Pace:
    """The pace of a stage, from the rows of its steps."""
    return Pace(
        stage=stage,
        step_s=tuple(row["step_s"] for row in rows[1:]),
        load_s=tuple(row["wait_s"] for row in rows[1:]),
        boxes=mean(row["boxes"] for row in rows) / batch,
        loss=tuple(row["loss"] for row in rows),
    )


def lengths(clock: Timeline) -> dict[str, int]:
    """How many epochs each stage of a timeline lasts."""
    warm, dense = clock.warm, max(clock.dense, clock.warm)
    return {"warm": warm, "dense": dense - warm, "augment": clock.augment - dense, "clean": clock.total - clock.augment}


def stages_of(clock: Timeline) -> list[str]:
    """The stages that a timeline has, in order."""
    return [name for name, length in lengths(clock).items() if length]


def one_epoch_each(clock: Timeline) -> Timeline:
    """The timeline with every stage that it has cut to one epoch, and rates that hardly rise from zero."""
    warm, dense, augment, clean = (int(length > 0) for length in lengths(clock).values())
    total = warm + dense + augment + clean
    return replace(
        clock,
        warm=warm,
        dense=warm + dense,
        augment=warm + dense + augment,
        total=total,
        lr=StepDecay(warmup=total * clock.steps_per_epoch),
        multi_scale_until=None if clock.multi_scale_end else 0,
    )


def in_words(hours: float) -> str:
    """Hours as people say them: 0.2 -> "12 min", 100 -> "4.2 days"."""
    if hours < 1.5:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
