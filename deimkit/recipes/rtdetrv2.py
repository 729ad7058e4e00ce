"""RT-DETRv2 as its authors trained it on COCO, and with DEIM: five sizes on ResNet-vd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deimkit.data.augment import Augment
from deimkit.losses import L1, MAL, VFL, GIoU
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.training_tables import TRAINING

# What DEIM claims on COCO val2017: Tables 2 and 11, which give the large two no latency. In the row of r18vd, AP75 to
# APl are those of r50vd, and in that of r34vd some of r101vd: slips of the table, kept as they stand.
# fmt: off
PAPER = {
    #            table                   AP   AP50  AP75  APs   APm   APl  epochs  M  GFLOPs  ms
    "r18vd":    ("DEIM Table 11", 48.1, 65.1, 57.4, 36.1, 57.9, 70.8, 120, 20,  60, 4.59),
    "r34vd":    ("DEIM Table 11", 49.9, 67.5, 58.6, 35.8, 58.6, 72.1, 120, 31,  92, 6.40),
    "r50vd_m":  ("DEIM Table 11", 51.9, 69.9, 56.5, 33.5, 56.8, 69.2,  72, 33, 100, 6.90),
    "r50vd":    ("DEIM Table 2",  53.4, 71.6, 57.4, 36.1, 57.9, 70.8,  72, 42, 136, None),
    "r101vd":   ("DEIM Table 2",  54.3, 72.8, 58.8, 35.8, 58.8, 72.1,  72, 76, 259, None),
}
DEIM_PAPER = {
    "r18vd":    ("DEIM Table 11", 49.0, 66.1, 53.3, 32.6, 52.5, 64.1, 120, 20,  60, 4.59),
    "r34vd":    ("DEIM Table 11", 50.9, 68.6, 55.2, 34.3, 54.4, 67.1, 120, 31,  92, 6.40),
    "r50vd_m":  ("DEIM Table 11", 53.2, 71.2, 57.8, 35.3, 57.6, 70.2,  60, 33, 100, 6.90),
    "r50vd":    ("DEIM Table 2",  54.3, 72.3, 58.8, 37.5, 58.7, 70.8,  60, 42, 136, None),
    "r101vd":   ("DEIM Table 2",  55.5, 73.5, 60.3, 37.9, 59.9, 73.0,  60, 76, 259, None),
}
# fmt: on


def rtdetr_losses(classification: Any) -> tuple[Any, ...]:
    """`classification` and boxes, weighted as in RT-DETR."""
    return classification, L1(5.0), GIoU(2.0)


def rtdetrv2(size: str) -> Recipe:
    """RT-DETRv2 of size r18vd, r34vd, r50vd_m, r50vd or r101vd."""
    name = f"rtdetrv2_{size}"
    training = TRAINING[name]
    return Recipe(
        name=name,
        arch=rtdetrv2_arch(size, activation="relu"),
        losses=rtdetr_losses(VFL()),
        timeline=training.timeline(),
        optim=training.optim(),
        augment=Augment(multi_scale=training.repeat),
        share=False,
        return_to_best=False,
        batch=training.batch,
        paper=Paper(*PAPER[size]),
    )


def deim_rtdetrv2(size: str) -> Recipe:
    """RT-DETRv2 of that size, trained with DEIM."""
    name = f"deim_rtdetrv2_{size}"
    training = TRAINING[name]
    return replace(
        rtdetrv2(size),
        name=name,
        arch=rtdetrv2_arch(size, activation="silu"),
        losses=rtdetr_losses(MAL()),
        timeline=training.timeline(),
        optim=training.optim(),
        augment=Augment(multi_scale=training.repeat),
        return_to_best=True,
        paper=Paper(*DEIM_PAPER[size]),
    )


RTDETRV2 = {size: rtdetrv2(size) for size in PAPER}
DEIM_RTDETRV2 = {size: deim_rtdetrv2(size) for size in PAPER}
