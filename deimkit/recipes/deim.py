"""DEIM on D-FINE: Dense O2O in the timeline, MAL as the classification loss, SiLU heads, a flat and cosine rate."""

from __future__ import annotations

from dataclasses import replace

from deimkit.losses import MAL
from deimkit.recipes.archs import dfine_arch
from deimkit.recipes.dfine import DFINE, dfine_losses
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.training_tables import TRAINING

# fmt: off
PAPER = {
    #        table                   AP   AP50  AP75  APs   APm   APl  epochs  M  GFLOPs  ms
    "n": ("DEIM Table 11", 43.0, 60.4, 46.2, 24.5, 47.1, 62.1, 148,  4,   7,  2.12),
    "s": ("DEIM Table 11", 49.0, 65.9, 53.1, 30.4, 52.6, 65.7, 120, 10,  25,  3.49),
    "m": ("DEIM Table 11", 52.7, 70.0, 57.3, 35.3, 56.7, 69.5,  90, 19,  57,  5.55),
    "l": ("DEIM Table 1",  54.7, 72.4, 59.4, 36.9, 59.6, 71.8,  50, 31,  91,  8.07),
    "x": ("DEIM Table 1",  56.5, 74.0, 61.5, 38.8, 61.4, 74.2,  50, 62, 202, 12.89),
}
# fmt: on


def deim(size: str) -> Recipe:
    """D-FINE of size n, s, m, l or x, trained with DEIM."""
    parent, name = DFINE[size], f"deim_dfine_{size}"
    training, arch = TRAINING[name], dfine_arch(size, activation="silu")
    return replace(
        parent,
        name=name,
        arch=arch,
        losses=dfine_losses(MAL(), arch),
        timeline=training.timeline(),
        optim=training.optim(),
        paper=Paper(*PAPER[size]),
    )


DEIM = {size: deim(size) for size in PAPER}
