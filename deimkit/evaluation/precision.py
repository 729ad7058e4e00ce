"""Detections in the order of their scores become precision and recall, average precision, and a best threshold.

The average precision is COCO's at one IoU: interpolated precision at 101 recalls, mean over the classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.evaluation.coco import RECALLS

Array = NDArray[Any]
NAN = float("nan")


class Ranked(NamedTuple):
    """Detections and whether each is right, with what there was to find.

    turn: (n,) which of two equal scores comes first, the one of the lower number. label: (n,) class index. score: (n,).
    right: (n,) bool. objects: (C,) how many of each class there are to find.
    """

    turn: Array
    label: Array
    score: Array
    right: Array
    objects: Array

    def take(self, rows: Array) -> Ranked:
        """The detections at `rows`, which may be indices or a mask; what there is to find stays."""
        return Ranked(self.turn[rows], self.label[rows], self.score[rows], self.right[rows], self.objects)

    def sorted(self) -> Ranked:
        """The same detections class by class, the best first."""
        return self.take(np.lexsort((self.turn, -self.score, self.label)))

    def of(self, label: int) -> Ranked:
        """Those of one class."""
        return self.take(self.label == label)

    def average_precision(self) -> Array:
        """AP of every class (C,), NaN where there is nothing to find."""
        ranked, classes = self.sorted(), len(self.objects)
        ends = np.searchsorted(ranked.label, np.arange(classes + 1))
        return np.array(
            [average_precision(ranked.right[ends[k] : ends[k + 1]], self.objects[k]) for k in range(classes)]
        )


class Best(NamedTuple):
    """The score from which on detections are worth most: where F1, the harmonic mean of both, is largest."""

    threshold: float
    precision: float
    recall: float
    f1: float


def average_precision(right: Array, objects: int) -> float:
    """AP of one class from whether each of its detections is right (n,), best first; NaN if there is no object.

    Precision only rises at a right detection, so the best precision at or beyond the j-th of them is all that counts.
    """
    if not objects:
        return NAN
    at = np.flatnonzero(right)
    best = np.zeros(objects + 1)  # position j: precision at the (j+1)-th right detection, 0 if there are fewer
    best[: len(at)] = np.arange(1, len(at) + 1) / (at + 1 + np.spacing(1))
    best = np.maximum.accumulate(best[::-1])[::-1]
    needed = np.searchsorted(np.arange(1, objects + 1) / objects, RECALLS)  # right ones to reach each recall, less one
    return float(best[needed].mean())


def precision_recall(ranked: Ranked, objects: int) -> tuple[Array, Array, Array]:
    """Recall, precision and score (n,), detection by detection from the best on, whatever their classes."""
    order = np.lexsort((ranked.turn, -ranked.score))
    hits = np.cumsum(ranked.right[order])
    recall = hits / objects if objects else np.full(len(hits), NAN)
    return recall, hits / np.arange(1, len(hits) + 1), ranked.score[order]


def best_threshold(ranked: Ranked, objects: int) -> Best:
    """The threshold of largest F1 for detections that are taken together, of equal ones the highest.

    NaN without objects; if no detection is right, there is no threshold to recommend and F1 is 0.
    """
    if not objects:
        return Best(NAN, NAN, NAN, NAN)
    recall, precision, score = precision_recall(ranked, objects)
    if not recall.any():
        return Best(NAN, NAN, 0.0, 0.0)
    f1 = np.divide(2 * precision * recall, precision + recall, out=np.zeros_like(recall), where=recall > 0)
    f1[:-1][score[:-1] == score[1:]] = 0  # equal scores are above a threshold together
    k = int(f1.argmax())
    return Best(*(float(x[k]) for x in (score, precision, recall, f1)))
