"""What the tests of training with several processes run in each: a training in float64, step by step.

`python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.together DATA OUT` writes OUT/metrics.jsonl.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from deimkit import recipes
from deimkit.data.dataset import Dataset
from deimkit.ranks import Ranks
from deimkit.recipes.recipe import Recipe
from deimkit.structures import Batch
from deimkit.training.run import Plan
from deimkit.training.trainer import Trainer
from tests.micro import MICRO, Silent

PLAIN = replace(MICRO.augment, mixup=0.0)  # which image shines through the first of a share depends on the shares
RECIPES = {
    "dfine": replace(MICRO, batch=4, augment=PLAIN),
    "rtdetrv2": replace(
        recipes.get("deim_rtdetrv2_tiny"), timeline=MICRO.timeline, batch=4, size=(64, 64), augment=PLAIN
    ),
}


class Double(Trainer):
    """A training in float64, in which rounding does not grow into another training.

    TOGETHER_HANGS in the environment: the rank that falls asleep at its third step.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for model in (self.learner.model, self.learner.ema.model):
            model.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))

    def _step(self, batch: Batch) -> dict[str, float]:
        if self.global_step == 2 and os.environ.get("TOGETHER_HANGS") == str(self.ranks.rank):
            time.sleep(3600)
        return super()._step(batch)


def train(recipe: Recipe, data: Dataset, out: Path, ranks: Ranks) -> None:
    """Train into the folder `out`; one process writes the run down."""
    if ranks.main:
        out.mkdir(parents=True)
        (out / "recipe.py").write_text(recipes.to_python(recipe))
        Plan(data=data.source, device="cpu", workers=0).write(out)
    ranks.agree(None)
    torch.set_default_dtype(torch.float64)
    try:
        Double(recipe, Plan.read(out), data, out, Silent(), ranks).fit()
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, source, folder = sys.argv[1:]
    train(RECIPES[name], Dataset.open(source), Path(folder), Ranks.join())
    Ranks.leave()
