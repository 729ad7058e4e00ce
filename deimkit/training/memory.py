"""How much of a batch a device has memory for: its heaviest step is tried, in more and more parts until it fits."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from deimkit.data.augment import scales
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.data.loader import Always, Loader
from deimkit.errors import DeimkitError
from deimkit.structures import Batch
from deimkit.training.deterministic import deterministic
from deimkit.training.learner import Learner
from deimkit.training.machine import pick_device, pick_precision
from deimkit.training.run import Plan

BY_WEIGHT = ("dense", "augment", "clean", "warm")  # stages, the one with the most boxes in an image first
TRIED = 2  # steps; from the second on there is the optimiser's memory of the first beside everything else


@dataclass(frozen=True)
class Fit:
    """What devices such as the one that was tried have memory for: `devices` of them train `batch` images a step.

    images: that one of them takes at once. accumulate: how often it does so in a step, hence micro-batches.
    """

    batch: int
    devices: int
    images: int
    accumulate: int

    def __str__(self) -> str:
        where = f" on {self.devices} devices" if self.devices > 1 else ""
        how = f"with accumulate={self.accumulate}" if self.accumulate > 1 else "as they are"
        return f"{self.images} image(s) fit at once; {self.batch} a step{where} are trained {how}"


def largest_fit(recipe: Any, plan: Plan, dataset: Dataset, devices: int = 1) -> Fit:
    """The fewest micro-batches in which one of `devices` trains its share of the recipe's batch, at its heaviest.

    Parts are of equal size. The memory that the tries take is given back, and no random number is drawn that would be
    missed. Raises `DeimkitError` if not even a single image fits, and what loading images and a first step raise.
    """
    device = pick_device(plan.device)
    share = max(recipe.batch // devices, 1)
    assert dataset.train is not None, "whoever rehearses has made sure"
    batch = heaviest(recipe, share, dataset.train, plan.seed)
    with deterministic() if plan.deterministic else nullcontext():  # which takes more
        for parts in (n for n in range(1, share + 1) if share % n == 0):
            if fits(recipe, batch, parts, dataset.categories, device, pick_precision(plan.precision, device)):
                return Fit(share * devices, devices, share // parts, parts)
    height, width = batch.size or recipe.size
    raise DeimkitError(
        f"Not even one image of {height} x {width} at a time fits into the memory of {device}, to train {recipe.name}. "
        "Take a smaller recipe or size, or a device with more memory."
    )


def heaviest(recipe: Any, images: int, learned: Split, seed: int = 0) -> Batch:
    """A batch such as takes the most memory: the most crowded images, in the stage and size with the most of them.

    Mosaic and MixUp, where the recipe has them, are sure to happen, and they draw from the same images.
    """
    clock, augment = recipe.timeline, recipe.augment
    crowded = np.argsort(-np.diff(learned.starts), kind="stable")[:images]
    chosen = learned.take(crowded[i % len(crowded)] for i in range(images))
    there = {clock.stage(epoch) for epoch in range(clock.total)}
    stage = next(name for name in BY_WEIGHT if name in there)
    sure = replace(augment, mosaic=float(augment.mosaic > 0), mixup=float(augment.mixup > 0))
    loader = Loader(chosen, images, recipe.size, sure, Always(stage, varied=False), seed)
    varied = augment.multi_scale is not None and clock.multi_scale_end > 0
    sizes = scales(recipe.size, augment.multi_scale) if varied else [recipe.size]
    return replace(next(loader.epoch()), size=max(sizes, key=prod))


def fits(
    recipe: Any, batch: Batch, parts: int, categories: CategoryMap, device: torch.device, precision: torch.dtype
) -> bool:
    """Whether a fresh detector learns from a batch in so many parts within the memory of a device."""
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _learn(Learner(recipe, recipe.build(categories).to(device), precision, parts), batch)
        enough = True
    except torch.OutOfMemoryError:
        enough = False
    release()  # only here is the error forgotten, and with it the frames that held what it was short of
    return enough


def _learn(learner: Learner, batch: Batch) -> None:
    """A few steps that move no weight, so that all are as the first."""
    learner.set_rates(0.0)
    for _ in range(TRIED):
        learner.learn(batch)


def release() -> None:
    """Give back the memory that nothing uses any more, to other processes and to larger pieces."""
    gc.collect()
    torch.cuda.empty_cache()
