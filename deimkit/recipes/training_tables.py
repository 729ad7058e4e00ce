"""How D-FINE and RT-DETRv2 were trained on COCO, with and without DEIM: all numbers in one table."""

from __future__ import annotations

from typing import Any, NamedTuple

from deimkit.training.optim import ALL_NORMS_FREE, NORMS_AND_BIASES_FREE, NORMS_FREE, Group, Optim
from deimkit.training.timeline import FlatCosine, StepDecay, Timeline

COCO_TRAIN = 118287
"""Images of COCO train2017, those without annotations included; the last incomplete batch of an epoch is dropped."""


class Training(NamedTuple):
    """One row of the table: how one detector is trained.

    batch: images per step, over all devices. warm, dense, augment, total: epochs of the `Timeline`. lr, backbone_lr,
    decay: of AdamW. shape: of the learning rate over time. repeat: how often 640 stands in the list of multi-scale
    sizes, or None for a fixed size. groups: what decays. ramp: of the EMA. restart: the EMA decay that the published
    file names for the clean stage, to no effect (see `Timeline.ema_restart`).
    """

    batch: int
    warm: int
    dense: int
    augment: int
    total: int
    lr: float
    backbone_lr: float
    decay: float
    shape: FlatCosine | StepDecay
    repeat: int | None
    groups: tuple[Group, ...]
    ramp: int
    restart: float = 0.9999

    def timeline(self) -> Timeline:
        """The clock of this row, for COCO."""
        return Timeline(
            warm=self.warm,
            dense=self.dense,
            augment=self.augment,
            total=self.total,
            lr=self.shape,
            multi_scale_until=0 if self.repeat is None else None,
            ema_ramp=self.ramp,
            steps_per_epoch=COCO_TRAIN // self.batch,
        )

    def optim(self) -> Optim:
        """The optimiser of this row."""
        return Optim(self.lr, self.backbone_lr, self.decay, groups=self.groups)


RISE_500, RISE_2000 = StepDecay(warmup=500), StepDecay(warmup=2000)
FLAT, FALL, FALL_RT = FlatCosine(floor=1.0), FlatCosine(floor=0.5), FlatCosine(floor=0.5, first=1 / 2000)
NORMS, BIASES_TOO, ALL_NORMS = NORMS_FREE, NORMS_AND_BIASES_FREE, ALL_NORMS_FREE
R34 = (
    Group(("backbone",), slow=True),
    Group(("backbone_norm",), slow=True, decay=False),
    Group(("norm", "bias"), decay=False),
    Group(("weight",)),
)

# DEIM-N is constant after its warm-up: its file keeps the rate flat until epoch 7800 (78 was meant?) and ends at 1.
# fmt: off
TABLE: dict[str, tuple[Any, ...]] = {
    # batch, warm, dense, augment, total | lr, the backbone's, decay | shape, repeats of 640, groups, EMA ramp, restart
    "dfine_n":              (128, 0,  0, 148, 160, 8e-4,   4e-4,    1e-4,    RISE_500,  None, BIASES_TOO, 1000),
    "dfine_s":              ( 32, 0,  0, 120, 132, 2e-4,   1e-4,    1e-4,    RISE_500,  20,   BIASES_TOO, 1000),
    "dfine_m":              ( 32, 0,  0, 120, 132, 2e-4,   2e-5,    1e-4,    RISE_500,  6,    BIASES_TOO, 1000),
    "dfine_l":              ( 32, 0,  0,  72,  80, 2.5e-4, 1.25e-5, 1.25e-4, RISE_500,  4,    NORMS,      1000),
    "dfine_x":              ( 32, 0,  0,  72,  80, 2.5e-4, 2.5e-6,  1.25e-4, RISE_500,  3,    NORMS,      1000, 0.9998),
    "deim_dfine_n":         (128, 4, 78, 148, 160, 8e-4,   4e-4,    1e-4,    FLAT,      None, BIASES_TOO, 1000),
    "deim_dfine_s":         ( 32, 4, 64, 120, 132, 4e-4,   2e-4,    1e-4,    FALL,      20,   ALL_NORMS,  1000),
    "deim_dfine_m":         ( 32, 4, 49,  90, 102, 4e-4,   4e-5,    1e-4,    FALL,      6,    ALL_NORMS,  1000),
    "deim_dfine_l":         ( 32, 4, 29,  50,  58, 5e-4,   2.5e-5,  1.25e-4, FALL,      4,    NORMS,      1000),
    "deim_dfine_x":         ( 32, 4, 29,  50,  58, 5e-4,   5e-6,    1.25e-4, FALL,      3,    NORMS,      1000, 0.9998),
    "rtdetrv2_r18vd":       ( 16, 0,  0, 117, 120, 1e-4,   1e-4,    1e-4,    RISE_2000, None, ALL_NORMS,  2000),
    "rtdetrv2_r34vd":       ( 16, 0,  0, 117, 120, 1e-4,   5e-5,    1e-4,    RISE_2000, 3,    R34,        2000),
    "rtdetrv2_r50vd_m":     ( 16, 0,  0,  81,  84, 1e-4,   1e-5,    1e-4,    RISE_2000, 3,    ALL_NORMS,  2000),
    "rtdetrv2_r50vd":       ( 16, 0,  0,  71,  72, 1e-4,   1e-5,    1e-4,    RISE_2000, 3,    ALL_NORMS,  2000),
    "rtdetrv2_r101vd":      ( 16, 0,  0,  71,  72, 1e-4,   1e-6,    1e-4,    RISE_2000, 3,    ALL_NORMS,  2000),
    "deim_rtdetrv2_r18vd":  ( 16, 4, 64, 117, 120, 2e-4,   2e-4,    1e-4,    FALL_RT,   3,    ALL_NORMS,  2000),
    "deim_rtdetrv2_r34vd":  ( 16, 4, 64, 117, 120, 2e-4,   1e-4,    1e-4,    FALL_RT,   3,    ALL_NORMS,  2000),
    "deim_rtdetrv2_r50vd_m":( 16, 4, 34,  58,  60, 2e-4,   2e-5,    1e-4,    FALL_RT,   3,    ALL_NORMS,  2000),
    "deim_rtdetrv2_r50vd":  ( 16, 4, 34,  58,  60, 2e-4,   2e-5,    1e-4,    FALL_RT,   3,    ALL_NORMS,  2000),
    "deim_rtdetrv2_r101vd": ( 16, 4, 34,  58,  60, 2e-4,   2e-6,    1e-4,    FALL_RT,   3,    ALL_NORMS,  2000),
}
# fmt: on

TRAINING = {name: Training(*row) for name, row in TABLE.items()}
