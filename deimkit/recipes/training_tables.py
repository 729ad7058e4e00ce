"""How D-FINE and RT-DETRv2 were trained, with and without DEIM, on COCO and beyond: all numbers in one table."""

from __future__ import annotations

from typing import Any, NamedTuple

from deimkit.training.optim import ALL_NORMS_FREE, NORMS_AND_BIASES_FREE, NORMS_FREE, Group, Optim
from deimkit.training.timeline import FlatCosine, StepDecay, Timeline

COCO_TRAIN = 118287
"""Images of COCO train2017, those without annotations included; the last incomplete batch of an epoch is dropped."""

O365, CROWD = 1_742_292 + 80_000 - 5_000, 15_000
"""Images of Objects365 (version 2, train and all of val but its first 5,000) and of CrowdHuman's train split."""


class Training(NamedTuple):
    """One row of the table: how one detector is trained.

    batch: images per step, over all devices. warm, dense, augment, total: epochs of the `Timeline`. lr, backbone_lr,
    decay: of AdamW. shape: of the learning rate over time. repeat: how often 640 stands in the list of multi-scale
    sizes, or None for a fixed size. groups: what decays. ramp: of the EMA. images: of the dataset. restart: the EMA
    decay that the published file names for the clean stage, to no effect (see `Timeline.ema_restart`).
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
    images: int = COCO_TRAIN

    def timeline(self) -> Timeline:
        """The clock of this row, for its dataset."""
        return Timeline(
            warm=self.warm,
            dense=self.dense,
            augment=self.augment,
            total=self.total,
            lr=self.shape,
            multi_scale_until=0 if self.repeat is None else None,
            ema_ramp=self.ramp,
            steps_per_epoch=self.images // self.batch,
        )

    def optim(self) -> Optim:
        """The optimiser of this row."""
        return Optim(self.lr, self.backbone_lr, self.decay, groups=self.groups)


RISE_500, RISE_2000, CONSTANT = StepDecay(warmup=500), StepDecay(warmup=2000), StepDecay(warmup=0)
FLAT, FALL, FALL_RT = FlatCosine(floor=1.0), FlatCosine(floor=0.5), FlatCosine(floor=0.5, first=1 / 2000)
FLAT_AT_ONCE = FlatCosine(warmup=0, floor=1.0)
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
# Beyond COCO, in the same columns.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    # Objects365, then COCO from there: no warm-up, no EMA ramp. Last, how many images there are.
    "dfine_n_obj365": (128, 0, 0, 48, 48, 8e-4, 4e-4, 1e-4, RISE_500, None, BIASES_TOO, 1000, 0.9999, O365),
    "dfine_s_obj365": (32, 0, 0, 36, 36, 2.5e-4, 1.25e-4, 1.25e-4, RISE_500, 20, BIASES_TOO, 1000, 0.9999, O365),
    "dfine_m_obj365": (32, 0, 0, 36, 36, 2.5e-4, 2.5e-5, 1.25e-4, RISE_500, 6, BIASES_TOO, 1000, 0.9999, O365),
    "dfine_l_obj365": (32, 0, 0, 24, 24, 2.5e-4, 1.25e-5, 1.25e-4, RISE_500, 4, NORMS, 1000, 0.9999, O365),
    "dfine_x_obj365": (32, 0, 0, 24, 24, 2.5e-4, 2.5e-6, 1.25e-4, RISE_500, 3, NORMS, 1000, 0.9998, O365),
    "dfine_n_obj2coco":     (128, 0,  0,  56,  64, 8e-4,   4e-4,    1e-4,    CONSTANT,  None, BIASES_TOO, 0),
    "dfine_s_obj2coco":     ( 32, 0,  0,  56,  64, 2.5e-4, 1.25e-4, 1.25e-4, CONSTANT,  10,   BIASES_TOO, 0),
    "dfine_m_obj2coco":     ( 32, 0,  0,  48,  56, 2.5e-4, 2.5e-5,  1.25e-4, CONSTANT,  6,    BIASES_TOO, 0),
    "dfine_l_obj2coco":     ( 32, 0,  0,  30,  36, 2.5e-4, 1.25e-5, 1.25e-4, CONSTANT,  4,    NORMS,      0),
    "dfine_x_obj2coco":     ( 32, 0,  0,  30,  36, 2.5e-4, 2.5e-6,  1.25e-4, CONSTANT,  3,    NORMS,      0),
    "deim_dfine_x_obj2coco":( 32, 2, 12,  20,  24, 2.5e-4, 2.5e-6,  1.25e-4, FLAT_AT_ONCE, 3, NORMS,      0),
    # CrowdHuman
    "dfine_n_crowdhuman": (128, 0, 0, 200, 220, 8e-4, 4e-4, 1e-4, RISE_500, None, BIASES_TOO, 1000, 0.9999, CROWD),
    "dfine_s_crowdhuman": (64, 0, 0, 200, 220, 4e-4, 2e-4, 1e-4, RISE_500, 20, BIASES_TOO, 1000, 0.9999, CROWD),
    "dfine_m_crowdhuman": (32, 0, 0, 200, 220, 2.5e-4, 2.5e-5, 1.25e-4, RISE_500, 6, BIASES_TOO, 1000, 0.9999, CROWD),
    "dfine_l_crowdhuman": (32, 0, 0, 120, 140, 2.5e-4, 1.25e-5, 1.25e-4, RISE_500, 4, NORMS, 1000, 0.9999, CROWD),
    "dfine_x_crowdhuman": (32, 0, 0, 120, 140, 2.5e-4, 2.5e-6, 1.25e-4, RISE_500, 3, NORMS, 1000, 0.9998, CROWD),
}
# fmt: on

TRAINING = {name: Training(*row) for name, row in TABLE.items()}
TRAINING_ELSEWHERE = {name: Training(*row) for name, row in ELSEWHERE.items()}
