"""Detectors small enough to train in minutes on two CPU cores: for the demo, the notebooks and the tests."""

from __future__ import annotations

from dataclasses import replace

from deimkit.data.augment import Augment
from deimkit.losses import MAL, VFL
from deimkit.recipes.archs import dfine_arch, rtdetrv2_arch
from deimkit.recipes.dfine import dfine_losses
from deimkit.recipes.recipe import Recipe
from deimkit.recipes.rtdetrv2 import rtdetr_losses
from deimkit.training.optim import NORMS_AND_BIASES_FREE, Optim
from deimkit.training.timeline import FlatCosine, StepDecay, Timeline

_ARCH = dfine_arch("tiny")

tiny = Recipe(
    name="tiny",
    arch=_ARCH,
    losses=dfine_losses(MAL(), _ARCH),
    timeline=Timeline(
        warm=2,
        dense=8,
        augment=13,
        total=16,
        lr=FlatCosine(warmup=100, floor=0.1, one_step_late=False),
        multi_scale_until=0,
        ema_decay=0.99,
        ema_ramp=20,
        steps_per_epoch=100,
    ),
    optim=Optim(lr=1.5e-3, backbone_lr=1.5e-3, weight_decay=1e-4, groups=NORMS_AND_BIASES_FREE),
    augment=Augment(tile=96, photometric=0.2),
    batch=4,
    size=(192, 192),
)

deim_rtdetrv2_tiny = replace(
    tiny, name="deim_rtdetrv2_tiny", arch=rtdetrv2_arch("tiny", "silu"), losses=rtdetr_losses(MAL()), share=False
)

rtdetrv2_tiny = replace(
    deim_rtdetrv2_tiny,
    name="rtdetrv2_tiny",
    arch=rtdetrv2_arch("tiny", "relu"),
    losses=rtdetr_losses(VFL()),
    timeline=replace(tiny.timeline, warm=0, dense=0, lr=StepDecay(warmup=100)),
    return_to_best=False,
)

TINY = {recipe.name: recipe for recipe in (tiny, rtdetrv2_tiny, deim_rtdetrv2_tiny)}
