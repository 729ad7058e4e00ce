"""Which boxes of an image overlap, and how much: the pairs that every matching of detections with objects starts from.

IoU is computed as COCO's code does it, on (x, y, width, height) in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_AT_ONCE = 1 << 16  # pairs whose IoU is computed at once: fits a cache


class Pairs(NamedTuple):
    """Pairs of a detection and an object: rows of the one, rows of the other, and their IoU, each (P,)."""

    det: Array
    obj: Array
    iou: Array

    def take(self, rows: Array) -> Pairs:
        """The pairs at `rows`, which may be indices or a mask."""
        return Pairs(*(x[rows] for x in self))


def overlapping(det_group: Array, det: Array, obj_group: Array, obj: Array, crowd: Array, least: float) -> Pairs:
    """All pairs of the same group whose IoU is above 0 and at least `least`, detection by detection.

    det_group: (n,) and obj_group: (N,), such as the image of each box. det: (n, 4) and obj: (N, 4) xywh.
    crowd: (N,) bool; of a crowd region IoU is the part of the detection that lies in it.
    """
    order = np.argsort(obj_group, kind="stable")
    begin = np.searchsorted(obj_group[order], det_group, side="left")
    count = np.searchsorted(obj_group[order], det_group, side="right") - begin
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for rows in _portions(count):
        d = np.repeat(rows, count[rows])
        nth = np.arange(len(d)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
        o = order[np.repeat(begin[rows], count[rows]) + nth]
        iou = iou_of(det[d], obj[o], crowd[o])
        near = (iou > 0) & (iou >= least)
        parts.append((d[near], o[near], iou[near]))
    return Pairs(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def iou_of(det: Array, obj: Array, crowd: Array) -> Array:
    """IoU of pairs of (P, 4) xywh boxes; for a crowd, the part of the detection that lies in it."""
    low = np.maximum(det[:, :2], obj[:, :2])
    side = np.maximum(np.minimum(det[:, :2] + det[:, 2:], obj[:, :2] + obj[:, 2:]) - low, 0)
    inter, area = side[:, 0] * side[:, 1], det[:, 2] * det[:, 3]
    union = np.where(crowd, area, area + obj[:, 2] * obj[:, 3] - inter)
    return np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)


def xywh_of(xyxy: Any) -> Array:
    """Boxes in the form and precision in which COCO's code computes IoU and area."""
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4).copy()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def rank_in(group: Array) -> Array:
    """How many rows of the same group stand before each row."""
    order = np.argsort(group, kind="stable")
    row, ordered = np.arange(len(group)), group[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]][: len(group)]
    rank = np.empty_like(row)
    rank[order] = row - np.maximum.accumulate(np.where(first, row, 0))
    return rank


def _portions(count: Array) -> Iterator[Array]:
    """Rows with something to compare, in portions of about `_AT_ONCE` comparisons."""
    rows = np.flatnonzero(count)
    total = np.cumsum(count[rows])
    cuts = np.searchsorted(total, np.arange(_AT_ONCE, total[-1:].sum(), _AT_ONCE))
    return (part for part in np.split(rows, cuts) if len(part))
