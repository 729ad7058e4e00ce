"""How far two answers to the same pictures lie apart, detection by detection.

Rows cannot be compared one below the other. Two scores that are equal but for rounding change places, and whatever
ties with the last of the best 300 may be missing on the other side. So detections are paired first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deimkit.errors import DeployError, NonFiniteError
from deimkit.models.postprocess import best
from deimkit.structures import Predictions

Floats = NDArray[np.float64]

BOX_REACH, SCORE_REACH = 0.05, 0.1  # a pair this far apart, in sides of the image or in score, is no pair
MOST = 300  # detections of an image that are compared, as pairing more takes time by the cube of their number
SEEN = 0.05  # an image is silent if no score reaches half of this where one should reach it


@dataclass(frozen=True)
class Difference:
    """What sets one answer apart from another that should be the same; differences of batches add up.

    images: that were compared. matched: pairs of detections of one class that lie close together. box_max, box_mean: of
    the largest difference among a pair's four edges, as a fraction of the image's longer side. score_max: in [0, 1].
    moved: pairs in another order than before. lost, extra: detections that only the first, only the second has.
    border: the same, but where the score ties with the last that the other one kept, so that chance decided.
    relabelled: detections of the same place and score, but of another class. nonfinite, silent: images in which the
    second has NaN or infinity, or has no detection of any confidence while the first has. unsorted: images in which
    the second's scores do not descend.
    """

    images: int = 0
    matched: int = 0
    box_max: float = 0.0
    box_mean: float = 0.0
    score_max: float = 0.0
    moved: int = 0
    lost: int = 0
    extra: int = 0
    border: int = 0
    relabelled: int = 0
    nonfinite: int = 0
    silent: int = 0
    unsorted: int = 0

    def __add__(self, other: Difference) -> Difference:
        matched = self.matched + other.matched
        mean = (self.box_mean * self.matched + other.box_mean * other.matched) / max(matched, 1)
        return Difference(
            images=self.images + other.images,
            matched=matched,
            box_max=max(self.box_max, other.box_max),
            box_mean=mean,
            score_max=max(self.score_max, other.score_max),
            moved=self.moved + other.moved,
            lost=self.lost + other.lost,
            extra=self.extra + other.extra,
            border=self.border + other.border,
            relabelled=self.relabelled + other.relabelled,
            nonfinite=self.nonfinite + other.nonfinite,
            silent=self.silent + other.silent,
            unsorted=self.unsorted + other.unsorted,
        )

    @property
    def unmatched(self) -> int:
        """Detections of either answer without a partner of their class, where no tie explains it."""
        return self.lost + self.extra + 2 * self.relabelled

    @property
    def detections(self) -> int:
        """Of both answers, without those at the border."""
        return 2 * self.matched + self.unmatched


class Found(NamedTuple):
    """The detections of one image. boxes: (K, 4) xyxy in longer sides of the image. scores, labels: (K,)."""

    boxes: Floats
    scores: Floats
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Found:
        """Those at `rows`."""
        return Found(self.boxes[rows], self.scores[rows], self.labels[rows])


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], sizes: Tensor, slack: float = 1e-4, above: float = 0.0
) -> Difference:
    """The difference of two answers to one batch, each as `Session.run` gives it: post-processed or raw.

    sizes: (B, 2) height and width of the images in pixels. Of raw answers the best 300 count, or as many as the other
    answer has. slack: scores so close are taken for equal at the border of the best. above: only detections that reach
    this score on either side count. Raises `NonFiniteError` if `ours` is not finite, `DeployError` if the answers are
    not of the same number of images.
    """
    if not len(ours["boxes"]) == len(theirs["boxes"]) == len(sizes):
        raise DeployError(
            f"Expected two answers to the same images; got answers to {len(ours['boxes'])} and {len(theirs['boxes'])} "
            f"for {len(sizes)} sizes."
        )
    top = next((len(answer["scores"][0]) for answer in (ours, theirs) if len(sizes) and "scores" in answer), MOST)
    mine, other = _found(ours, sizes, top), _found(theirs, sizes, top)
    if None in mine:
        raise NonFiniteError(
            f"Expected finite numbers to compare with; got NaN or infinity in image {mine.index(None)} of the batch. "
            "The detector itself is broken: weights that diverged in training?"
        )
    total = Difference()
    for a, b in zip(mine, other, strict=True):
        if a is not None:
            total += Difference(images=1, nonfinite=1) if b is None else _of_image(a, b, slack, above)
    return total


def _found(answer: dict[str, Tensor], sizes: Tensor, top: int) -> list[Found | None]:
    """The detections of each image, None where a number of its answer is not finite."""
    numbers = [answer[name].flatten(1) for name in ("boxes", "scores", "logits") if name in answer]
    finite = torch.cat([x.isfinite().all(1)[:, None] for x in numbers], 1).all(1).tolist()
    if "scores" not in answer:
        preds = Predictions(answer["logits"], answer["boxes"])
        answer = dict(zip(("boxes", "scores", "labels"), best(preds, sizes.to(preds.boxes.device), top), strict=True))
    sides = sizes.amax(1).double().cpu()[:, None, None]
    boxes, scores = (answer["boxes"].double().cpu() / sides).numpy(), answer["scores"].double().cpu().numpy()
    images = zip(boxes, scores, answer["labels"].cpu().numpy(), finite, strict=True)
    return [Found(b[:MOST], s[:MOST], c[:MOST]) if is_finite else None for b, s, c, is_finite in images]


def _of_image(a: Found, b: Found, slack: float, above: float) -> Difference:
    """The difference of the detections `a` and `b` of one image."""
    i, j = pairs(a, b)
    lost, tied = _beyond(a, i, b, slack)
    extra, tied_there = _beyond(b, j, a, slack)
    m, n = pairs(a.take(lost), b.take(extra), labels=False)
    relabelled = np.maximum(a.scores[lost[m]], b.scores[extra[n]])
    alone = np.delete(lost, m), np.delete(extra, n)

    counts = np.maximum(a.scores[i], b.scores[j]) >= above
    i, j = i[counts], j[counts]
    box = np.abs(a.boxes[i] - b.boxes[j]).max(1, initial=0.0)
    return Difference(
        images=1,
        matched=len(i),
        box_max=float(box.max(initial=0.0)),
        box_mean=float(box.mean()) if len(box) else 0.0,
        score_max=float(np.abs(a.scores[i] - b.scores[j]).max(initial=0.0)),
        moved=int((j.argsort().argsort() != np.arange(len(j))).sum()),
        lost=int((a.scores[alone[0]] >= above).sum()),
        extra=int((b.scores[alone[1]] >= above).sum()),
        border=int((a.scores[tied] >= above).sum() + (b.scores[tied_there] >= above).sum()),
        relabelled=int((relabelled >= above).sum()),
        silent=int(a.scores.max(initial=0.0) >= SEEN > 2 * b.scores.max(initial=0.0)),
        unsorted=int((np.diff(b.scores) > slack).any()),
    )


def pairs(a: Found, b: Found, labels: bool = True) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of `a` and of `b` are one detection: those at the least total distance, in the order of `a`.

    The distance is that of the boxes in `BOX_REACH` plus that of the scores in `SCORE_REACH`; from 1 on there is none.
    labels: only detections of the same class make a pair.
    """
    box = np.abs(a.boxes[:, None] - b.boxes[None]).max(2)  # (K, 1, 4) - (1, L, 4) -> (K, L)
    score = np.abs(a.scores[:, None] - b.scores[None])
    distance = np.minimum(box / BOX_REACH + score / SCORE_REACH, 1)
    if labels:
        distance[a.labels[:, None] != b.labels[None]] = 1
    i, j = linear_sum_assignment(distance)
    close = distance[i, j] < 1
    return i[close], j[close]


def _beyond(a: Found, paired: NDArray[np.int64], b: Found, slack: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of `a` that are in no pair: those that `b` should have, and those at the border of what it kept."""
    alone = np.setdiff1d(np.arange(len(a.scores)), paired)
    tied = a.scores[alone] <= b.scores.min(initial=np.inf) + slack if len(b.scores) else np.zeros(len(alone), bool)
    return alone[~tied], alone[tied]
