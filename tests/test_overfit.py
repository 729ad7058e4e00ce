"""Model, matching, losses and evaluation at once: who sees four images often enough must know them by heart."""

from pathlib import Path

import pytest
import torch

import deimkit as dk
from deimkit.data.augment import Augment
from deimkit.data.loader import Always, Loader
from deimkit.data.synthetic import Synthetic
from deimkit.evaluation.measure import measure
from deimkit.training.timeline import FlatCosine, Timeline

STEPS = 400


@pytest.mark.slow
def test_four_images_are_learned_by_heart(tmp_path: Path) -> None:
    data = dk.Dataset.open(Synthetic(train=4, val=1, size=96).write(tmp_path / "four"))
    assert data.train is not None
    recipe = dk.recipes.tiny
    detector = recipe.build(data.categories)
    detector.size = (128, 128)
    loader = Loader(data.train, batch=4, size=(128, 128), augment=Augment(flip=0.0), timeline=Always("clean", False))
    criterion, optimizer = recipe.criterion(), recipe.optim.build(detector)
    rates = [group["lr"] for group in optimizer.param_groups]
    clock = Timeline(
        warm=0, dense=0, augment=STEPS, total=STEPS, steps_per_epoch=1, lr=FlatCosine(50, 0.05, one_step_late=False)
    )
    losses = []
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * clock.lr_factor(step)
        batch = next(iter(loader.epoch(step))).finish()
        loss = torch.stack(list(criterion(detector(batch.images, batch.targets), batch.targets).values())).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), recipe.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert measure(detector, data.train)["AP"] > 0.9
    assert losses[-1] < losses[0] / 2  # never near 0: denoising goes on asking for the impossible
