"""What is to be said of each detection: right, or wrong in one of five ways.

Who finds what is decided as in COCO's code, ties included. The kinds of error are those of Bolya et al., "TIDE" (2020).
Letters in shapes: n detections, N annotations, P pairs of the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.data.split import Split
from deimkit.evaluation.coco import Results, in_range
from deimkit.evaluation.overlaps import Pairs, overlapping, rank_in, xywh_of

Array = NDArray[Any]

VERDICTS = ("right", "class", "location", "both", "duplicate", "background", "ignored")
RIGHT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(len(VERDICTS))


class Judgement(NamedTuple):
    """What is said of each detection and who found each annotation; the arrays are those of `Errors`."""

    verdict: Array
    target: Array
    overlap: Array
    found: Array


def judge(split: Split, results: Results, iou: float, background: float) -> Judgement:
    """The verdicts on `results`, whose rows stand image by image and best first.

    A detection that is not right is about the annotation that it covers best (IoU of at least `iou`, of whatever
    class); if it covers none, about the one of its own class that it overlaps most; failing that, about the one of
    another class. An IoU below `background` is no overlap. In a tie of IoU the own class decides, then the last.
    """
    pairs = image_pairs(split, results, min(background, iou))
    own, covers = results.label[pairs.det] == split.labels[pairs.obj], pairs.iou >= passing(iou)
    counted = objects_of(split)
    n = len(results.label)
    verdict, target, overlap = np.full(n, BACKGROUND, np.int8), np.full(n, -1), np.zeros(n, np.float32)

    kind = np.select([covers & own, covers, own], [DUPLICATE, CLASS, LOCATION], BOTH)
    weight = np.select([covers, own], [2, 1], 0)
    order = np.lexsort((pairs.obj, own, pairs.iou, weight, pairs.det))
    order = order[counted[pairs.obj[order]]]
    last = order[np.diff(pairs.det[order], append=-1) != 0]
    verdict[pairs.det[last]], target[pairs.det[last]], overlap[pairs.det[last]] = kind[last], *pairs.take(last)[1:]

    excused = ~in_range(_areas(results))[:, 0]
    verdict[excused], target[excused], overlap[excused] = IGNORED, -1, 0
    taken = assign(split, results, pairs.take(own & covers), counted)
    right = counted[taken.obj]
    verdict[taken.det] = np.where(right, RIGHT, IGNORED)
    target[taken.det], overlap[taken.det] = taken.obj, taken.iou
    found = np.full(len(counted), -1)
    found[taken.obj[right]] = taken.det[right]
    return Judgement(verdict, target, overlap, found)


def image_pairs(split: Split, results: Results, least: float) -> Pairs:
    """The pairs of a detection and an annotation of the same image, whatever their classes, with an IoU >= `least`."""
    boxes, objects = xywh_of(results.boxes), xywh_of(split.boxes)
    return overlapping(results.image, boxes, split.images_of_rows, objects, split.crowd, least)


def objects_of(split: Split) -> Array:
    """Which annotations are objects to be found: (N,) bool, all that COCO counts, so not the crowd regions."""
    return in_range(split.areas)[:, 0] & ~split.crowd


def passing(iou: float) -> float:
    """The least IoU that counts as `iou`, as in COCO's code."""
    return min(iou, 1 - 1e-10)


def assign(split: Split, results: Results, pairs: Pairs, counted: Array, classes: bool = True) -> Pairs:
    """Who gets what: of `pairs` those in which a detection takes an object, at most one of each detection.

    By descending score each detection takes, among the objects that are still free, the one of largest IoU; what does
    not count (N,) only if there is nothing better, and a crowd however often. classes: detections of different classes
    do not compete.
    """
    own = results.label[pairs.det] == split.labels[pairs.obj]
    group = results.image * len(split.categories) + results.label if classes else results.image
    walk = np.lexsort((-pairs.obj, ~own, -pairs.iou, ~counted[pairs.obj], pairs.det))
    step = rank_in(group[pairs.det[walk]])
    walk = walk[np.argsort(step, kind="stable")]  # the first step of all groups, then the second of all, ...
    free, searching = np.ones(len(counted), bool), np.ones(len(results.label), bool)
    taken = [np.empty(0, np.int64)]
    for now in np.split(walk, np.cumsum(np.bincount(step))[:-1]):  # no detection and no object occurs twice in a step
        now = now[free[pairs.obj[now]] & searching[pairs.det[now]]]
        searching[pairs.det[now]] = False
        free[pairs.obj[now]] = split.crowd[pairs.obj[now]]
        taken.append(now)
    return pairs.take(np.concatenate(taken))


def _areas(results: Results) -> Array:
    return xywh_of(results.boxes)[:, 2:].prod(1)
