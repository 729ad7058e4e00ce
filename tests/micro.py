"""A detector, a recipe and a dataset so small that a test can train to the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deimkit import recipes
from deimkit.data.augment import Augment
from deimkit.data.dataset import Dataset
from deimkit.data.synthetic import Synthetic
from deimkit.models.groups import Denoise
from deimkit.models.queries import TopK
from deimkit.recipes.recipe import Recipe
from deimkit.training import checkpoint
from deimkit.training.progress import Silent
from deimkit.training.run import Plan, Run
from deimkit.training.timeline import FlatCosine, Timeline
from deimkit.training.trainer import Trainer

TINY = recipes.get("tiny")
ARCH = replace(
    TINY.arch,
    backbone=replace(TINY.arch.backbone, stem=(4, 4), mid=(4, 4, 8, 8), out=(8, 8, 16, 16), layers=1),
    encoder=replace(TINY.arch.encoder, width=16, ffn=16, heads=2),
    decoder=replace(TINY.arch.decoder, width=16, ffn=16, heads=2, layers=2),
    queries=TopK(20),
    groups=(Denoise(4),),
)
CLOCK = Timeline(
    warm=0,
    dense=1,
    augment=2,
    total=3,
    lr=FlatCosine(warmup=1, floor=0.1, one_step_late=False),
    multi_scale_until=0,
    ema_decay=0.9,
    ema_ramp=2,
    steps_per_epoch=3,
)
MICRO = replace(TINY, name="micro", arch=ARCH, timeline=CLOCK, augment=Augment(tile=32), batch=2, size=(64, 64))


def scenes(folder: Path, train: int = 6, val: int = 2) -> Dataset:
    """A few synthetic images."""
    return Dataset.open(Synthetic(train=train, val=val, size=64).write(folder / "scenes"))


class Watcher(Silent):
    """Shows nothing, but calls `seen(trainer's row)` after every step and keeps the lines."""

    def __init__(self, seen: Any = None) -> None:
        super().__init__()
        self.seen = seen
        self.lines: list[str] = []

    def step(self, row: dict[str, Any], steps: int, epochs: int, remaining: float) -> None:
        if self.seen is not None:
            self.seen(row)

    def line(self, text: str) -> None:
        self.lines.append(text)


def trainer(folder: Path, data: Dataset, recipe: Recipe = MICRO, seen: Any = None, **plan: Any) -> Trainer:
    """A trainer of the run in `folder`, which is written if it is not there; `seen` is called after every step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.py").write_text(recipes.to_python(recipe))
    Plan(**{"data": data.source, "device": "cpu", "workers": 0, **plan}).write(folder)
    return Trainer(recipe, Plan.read(folder), data, folder, Watcher(seen))


def tensors(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts and lists by its place."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {place: x for key, item in items for place, x in tensors(item, f"{path}/{key}").items()}


def equal(a: Any, b: Any) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def same(a: Run, b: Run) -> bool:
    """Whether two runs ended in the same state: model, average, optimiser, random numbers."""
    return equal(checkpoint.load(a.last), checkpoint.load(b.last))
