"""Errors taken apart: by class, by the size of objects, by how they crowd, by what is mistaken for what, by image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deimkit.evaluation.coco import SIZES, in_range
from deimkit.evaluation.overlaps import overlapping, xywh_of
from deimkit.evaluation.precision import average_precision, best_threshold
from deimkit.evaluation.verdicts import IGNORED, RIGHT, Array, assign, objects_of

if TYPE_CHECKING:
    from deimkit.evaluation.errors import Errors

CROWDING = {"none": (0, 0), "<0.25": (0, 0.25), "<0.5": (0.25, 0.5), "more": (0.5, np.inf)}  # IoU; the lower end is in


def per_class(errors: Errors) -> list[dict[str, Any]]:
    """A row for every class; see `Errors.per_class`."""
    coco, counts = errors.coco["per_class"], errors.ranked.objects.tolist()
    rows = []
    for label, (name, ap) in enumerate(coco.items()):
        best = best_threshold(errors.ranked.of(label), counts[label])
        row = {"name": name, "AP": ap["AP"], "AP50": ap["AP50"], "count": counts[label]}
        rows.append(
            row | {"threshold": best.threshold, "precision": best.precision, "recall": best.recall, "F1": best.f1}
        )
    return rows


def by_size(errors: Errors, threshold: float) -> list[dict[str, Any]]:
    """A row for small, medium and large objects; see `Errors.by_size`."""
    member = in_range(errors.split.areas)
    rows = []
    for column, size in enumerate(SIZES):
        if size != "all":
            rows.append(_bucket(errors, size, member[:, column], threshold) | {"AP": errors.coco[f"AP{size[0]}"]})
    return rows


def by_crowding(errors: Errors, threshold: float) -> list[dict[str, Any]]:
    """A row for each degree of overlap with another object; see `Errors.by_crowding`."""
    closest = crowding(errors)
    rows = []
    for name, (low, high) in CROWDING.items():
        member = closest == 0 if high == 0 else (closest >= low) & (closest < high) & (closest > 0)
        rows.append(_bucket(errors, name, member, threshold))
    return rows


def crowding(errors: Errors) -> Array:
    """The largest IoU of each annotation (N,) with another object of its image, of whatever class."""
    split, objects = errors.split, objects_of(errors.split)
    boxes, images = xywh_of(split.boxes), split.images_of_rows
    pairs = overlapping(images, boxes, images[objects], boxes[objects], split.crowd[objects], 0.0)
    other = pairs.take(pairs.det != np.flatnonzero(objects)[pairs.obj])
    closest = np.zeros(len(boxes))
    np.maximum.at(closest, other.det, other.iou)
    return closest


def _bucket(errors: Errors, name: str, member: Array, threshold: float) -> dict[str, Any]:
    """How many of the objects in a bucket (N,) there are, and how many are found."""
    member = member & objects_of(errors.split)
    annotated, missed = int(member.sum()), int((member & errors.missed(threshold)).sum())
    recall = 1 - missed / annotated if annotated else float("nan")
    return {"bucket": name, "annotated": annotated, "found": annotated - missed, "recall": recall}


class Confusions(NamedTuple):
    """What was taken for what, once for each detection and each object that nobody detected.

    image: (k,) index of its image. annotated, predicted: (k,) class index, or the number of classes for "nothing".
    """

    image: Array
    annotated: Array
    predicted: Array

    def matrix(self, classes: int) -> Array:
        """How often each happened, (C + 1, C + 1) int64: annotated by predicted."""
        side = classes + 1
        return np.bincount(self.annotated * side + self.predicted, minlength=side * side).reshape(side, side)


def confusions(errors: Errors, threshold: float) -> Confusions:
    """What is taken for what; see `Errors.confusions`."""
    split, results, nothing = errors.split, errors.results, len(errors.split.categories)
    objects = objects_of(split)
    shown = (results.score >= threshold) & (errors.verdict != IGNORED)
    pairs = errors.covering
    pairs = assign(split, results, pairs.take(shown[pairs.det] & objects[pairs.obj]), objects, classes=False)
    shown[pairs.det] = objects[pairs.obj] = False  # what is left has no partner
    false, missed = results.label[shown], split.labels[objects]
    image = np.concatenate([results.image[pairs.det], results.image[shown], split.images_of_rows[objects]])
    annotated = np.concatenate([split.labels[pairs.obj], np.full(len(false), nothing), missed])
    predicted = np.concatenate([results.label[pairs.det], false, np.full(len(missed), nothing)])
    return Confusions(image, annotated, predicted)


def per_image(errors: Errors, threshold: float) -> dict[str, Array]:
    """Numbers of every image, each (images,); see `Errors.per_image`."""
    images, image = len(errors.split), errors.results.image
    right, shown = errors.verdict == RIGHT, errors.results.score >= threshold
    missed = errors.split.images_of_rows[errors.missed(threshold)]
    return {
        "AP": _image_ap(errors),
        "right": np.bincount(image[right & shown], minlength=images),
        "wrong": np.bincount(image[errors.counting & ~right & shown], minlength=images),
        "missed": np.bincount(missed, minlength=images),
    }


def _image_ap(errors: Errors) -> Array:
    """AP of each image alone, mean over the classes that it shows, at one IoU and whatever the scores."""
    classes, images, counting = len(errors.split.categories), len(errors.split), errors.counting
    objects = objects_of(errors.split)
    there = (errors.split.images_of_rows * classes + errors.split.labels)[objects]
    groups, asked = np.unique(there, return_counts=True)
    own = (errors.results.image * classes + errors.results.label)[counting]
    order = np.argsort(own, kind="stable")  # each group the best first, as they stand in that order
    right = (errors.verdict[counting] == RIGHT)[order]
    begin, end = (np.searchsorted(own[order], groups + k) for k in (0, 1))
    ap = [average_precision(right[b:e], n) for b, e, n in zip(*map(list, (begin, end, asked)), strict=True)]
    shown = np.bincount(groups // classes, minlength=images)
    total = np.bincount(groups // classes, np.array(ap, float), minlength=images)
    return np.divide(total, shown, out=np.full(images, np.nan), where=shown > 0)
