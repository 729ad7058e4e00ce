"""D-FINE as its authors trained it on COCO: five sizes, VFL, and no Dense O2O."""

from __future__ import annotations

from typing import Any

from deimkit.data.augment import Augment
from deimkit.losses import DDF, FGL, L1, VFL, GIoU
from deimkit.models.detector import Arch
from deimkit.models.refine import FDR
from deimkit.recipes.archs import dfine_arch
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.training_tables import TRAINING

# What the papers claim on COCO val2017: DEIM, Tables 1 and 11. Epochs as they count them (without the clean tail).
# fmt: off
PAPER = {
    #        table                   AP   AP50  AP75  APs   APm   APl  epochs  M  GFLOPs  ms
    "n": ("DEIM Table 11", 42.8, 60.3, 45.5, 22.9, 46.8, 62.1, 148,  4,   7,  2.12),
    "s": ("DEIM Table 11", 48.5, 65.6, 52.6, 29.1, 52.2, 65.4, 120, 10,  25,  3.49),
    "m": ("DEIM Table 11", 52.3, 69.8, 56.4, 33.2, 56.5, 70.2, 120, 19,  57,  5.55),
    "l": ("DEIM Table 1",  54.0, 71.6, 58.4, 36.5, 58.0, 71.9,  72, 31,  91,  8.07),
    "x": ("DEIM Table 1",  55.8, 73.7, 60.2, 37.3, 60.5, 73.4,  72, 62, 202, 12.89),
}
# fmt: on


def dfine_losses(classification: Any, arch: Arch) -> tuple[Any, ...]:
    """`classification`, boxes, FGL and DDF, weighted as in D-FINE, in the units of the detector's distributions."""
    assert isinstance(arch.refine, FDR), "D-FINE's boxes are distributions"
    up, scale = arch.refine.up, arch.refine.scale
    return classification, L1(5.0), GIoU(2.0), FGL(0.15, up=up, scale=scale), DDF(1.5)


def dfine(size: str) -> Recipe:
    """D-FINE of size n, s, m, l or x."""
    name = f"dfine_{size}"
    training, arch = TRAINING[name], dfine_arch(size, activation="relu", frozen=size in "lx")
    return Recipe(
        name=name,
        arch=arch,
        losses=dfine_losses(VFL(), arch),
        timeline=training.timeline(),
        optim=training.optim(),
        augment=Augment(multi_scale=training.repeat),
        batch=training.batch,
        paper=Paper(*PAPER[size]),
    )


DFINE = {size: dfine(size) for size in PAPER}
