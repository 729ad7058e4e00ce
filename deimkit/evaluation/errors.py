"""Where a detector fails: what is wrong with each detection, what it misses, and what every kind of error costs.

    found = errors(data.val, detections)
    found.costs()  # {"class": 0.012, "location": 0.081, ..., "missed": 0.064}
    found.page("errors.html")

Nothing is needed but the annotations and the detections, no detector and no picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.data.split import Split
from deimkit.errors import DeimkitError
from deimkit.evaluation import breakdown
from deimkit.evaluation.breakdown import Confusions
from deimkit.evaluation.coco import Results, curves, packed, turn
from deimkit.evaluation.overlaps import Pairs, rank_in
from deimkit.evaluation.precision import NAN, Ranked, best_threshold, precision_recall
from deimkit.evaluation.repairs import costs, overlooked
from deimkit.evaluation.verdicts import IGNORED, RIGHT, VERDICTS, image_pairs, judge, objects_of, passing
from deimkit.structures import Detections
from deimkit.training.run import plain

Array = NDArray[Any]

BACKGROUND_IOU = 0.1  # TIDE's: below it a detection has nothing to do with an annotation


@dataclass(frozen=True, eq=False, repr=False)
class Errors:
    """The verdict on every detection of a split, and what follows from it.

    results: the n detections in question, image by image, the best first: of each image and class at most `max_dets`.
    verdict: (n,) int8, which of `VERDICTS`. target: (n,) int64, the row of the split's boxes that a detection is about:
    the one it found or should have found, -1 without one. overlap: (n,) float32, the IoU with it, 0 without one.
    found: (N,) int64, for each annotation the row of `results` that is right about it, or -1.
    iou: from which IoU on a detection is right. background: below which IoU it has nothing to do with an annotation.

    The verdicts: "right"; "class", it covers an object of another class; "location", it overlaps one of its class by
    less than `iou`; "both"; "duplicate", others of its class found what it covers; "background", there is nothing;
    "ignored", it lies in a crowd region, which COCO neither rewards nor punishes.
    """

    split: Split
    results: Results
    verdict: NDArray[np.int8]
    target: NDArray[np.int64]
    overlap: NDArray[np.float32]
    found: NDArray[np.int64]
    iou: float
    background: float
    max_dets: int

    def missed(self, threshold: float = 0.0) -> NDArray[np.bool_]:
        """Which annotations (N,) nobody is right about with a score of at least `threshold`; never a crowd region."""
        score = np.append(self.results.score, -np.inf)[self.found]  # row -1 is the one that was appended
        return objects_of(self.split) & ~(score >= threshold)

    def overlooked(self, threshold: float = 0.0) -> NDArray[np.bool_]:
        """Which annotations (N,) are missed, with no detection about them that errs by class or place alone."""
        return overlooked(self, threshold)

    def counts(self, threshold: float = 0.0) -> dict[str, int]:
        """How many detections with a score of at least `threshold` have each verdict, in the order of `VERDICTS`."""
        counts = np.bincount(self.verdict[self.results.score >= threshold], minlength=len(VERDICTS))
        return dict(zip(VERDICTS, counts.tolist(), strict=True))

    def costs(self) -> dict[str, float]:
        """The AP at `iou` that repairing one kind of error alone would gain, whatever the scores.

        Keys: "class", "location", "both", "duplicate", "background", "missed", and over all of them "false positives"
        and "false negatives". They do not add up: one repair may uncover or include another.
        """
        return costs(self)

    def per_class(self) -> list[dict[str, Any]]:
        """For each class its name, AP, AP50 and count, and the threshold of largest F1 with precision, recall and F1.

        AP is COCO's over IoU .50 to .95, F1 is at `iou`. NaN where there is nothing to measure.
        """
        return breakdown.per_class(self)

    def best_threshold(self) -> float:
        """The score at which F1 at `iou` of all classes together is largest; 0 if no detection is right."""
        threshold = best_threshold(self.ranked, int(self.ranked.objects.sum())).threshold
        return 0.0 if np.isnan(threshold) else threshold

    def precision_recall(self, label: int) -> tuple[Array, Array, Array]:
        """Recall, precision and score after each detection of class index `label`, from the best on, at `iou`."""
        return precision_recall(self.ranked.of(label), int(self.ranked.objects[label]))

    def confusion(self, threshold: float = 0.0) -> NDArray[np.int64]:
        """How often an object of one class was taken for another, (C + 1, C + 1): annotated by predicted class.

        The last row is of detections without an object, the last column of objects nobody chose; see `confusions`.
        """
        return self.confusions(threshold).matrix(len(self.split.categories))

    def confusions(self, threshold: float = 0.0) -> Confusions:
        """What was taken for what, and in which image.

        The detections of an image choose by descending score, whatever their class, the free object of largest IoU
        that is at least `iou`. "ignored" detections and those below `threshold` are left out.
        """
        return breakdown.confusions(self, threshold)

    def by_size(self, threshold: float = 0.0) -> list[dict[str, Any]]:
        """Small, medium and large objects: how many are annotated, found with at least that score, recall, and AP.

        Sizes and AP are COCO's; an area on the border between two sizes belongs to both.
        """
        return breakdown.by_size(self, threshold)

    def by_crowding(self, threshold: float = 0.0) -> list[dict[str, Any]]:
        """Objects by their largest IoU with another one of the image: how many are annotated and found, and recall."""
        return breakdown.by_crowding(self, threshold)

    def per_image(self, threshold: float = 0.0) -> dict[str, Array]:
        """For each image its AP at `iou`, and how many detections are right, wrong, and how many objects missed.

        AP is of that image alone whatever the scores, NaN if it shows no object. Each (images,).
        """
        return breakdown.per_image(self, threshold)

    def summary(self, threshold: float | None = None) -> dict[str, Any]:
        """All of this in plain values, by default at the best threshold."""
        threshold = self.best_threshold() if threshold is None else threshold
        return {
            "images": len(self.split),
            "objects": int(self.ranked.objects.sum()),
            "iou": self.iou,
            "background": self.background,
            "max_dets": self.max_dets,
            "threshold": threshold,
            "AP": self.coco["AP"],
            "AP50": self.coco["AP50"],
            "AP_at_iou": self.average_precision,
            "costs": self.costs(),
            "verdicts": self.counts(threshold),
            "missed": int(self.missed(threshold).sum()),
            "overlooked": int(self.overlooked(threshold).sum()),
            "classes": self.per_class(),
            "sizes": self.by_size(threshold),
            "crowding": self.by_crowding(threshold),
            "confusion": self.confusion(threshold).tolist(),
        }

    def to_json(self, threshold: float | None = None) -> str:
        """The `summary` as JSON; null where there was nothing to measure."""
        return json.dumps(plain(self.summary(threshold)), allow_nan=False)

    def page(self, path: str | Path, threshold: float | None = None) -> Path:
        """Write the `summary` as one HTML file with tables and curves, and return its path."""
        from deimkit.evaluation.errors_page import write_page

        return write_page(self, Path(path), threshold)

    @property
    def average_precision(self) -> float:
        """AP at `iou`, mean over the classes that there are to find; NaN if there is nothing to find."""
        ap = self.ranked.average_precision()
        return float(ap[~np.isnan(ap)].mean()) if not np.isnan(ap).all() else NAN

    @property
    def counting(self) -> NDArray[np.bool_]:
        """Which detections (n,) count, for or against: all that are not "ignored"."""
        return self.verdict != IGNORED

    @cached_property
    def coco(self) -> dict[str, Any]:
        """COCO's numbers of the same detections."""
        return curves(self.split, self.results, max_dets=(self.max_dets,)).summary()

    @cached_property
    def turns(self) -> NDArray[np.int64]:
        """When each detection (n,) has its turn among those with the same score."""
        return turn(self.split.ids)[self.results.image]

    @cached_property
    def ranked(self) -> Ranked:
        """The detections that count, as precision and recall are made from."""
        objects = self.objects_per_class(objects_of(self.split))
        whole = Ranked(self.turns, self.results.label, self.results.score, self.verdict == RIGHT, objects)
        return whole.take(self.counting)

    @cached_property
    def covering(self) -> Pairs:
        """All pairs of a detection and an annotation of one image, of whatever class, with an IoU of at least `iou`."""
        return image_pairs(self.split, self.results, passing(self.iou))

    def objects_per_class(self, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the annotations in `rows` (N,) are of each class: (C,)."""
        return np.bincount(self.split.labels[rows], minlength=len(self.split.categories))

    def __repr__(self) -> str:
        said = ", ".join(f"{count} {name}" for name, count in self.counts().items() if count)
        return f"Errors({self.split.name!r}, {len(self.verdict)} detections: {said or 'none'})"


def errors(
    split: Split,
    detections: Results | Sequence[Detections] | Sequence[dict[str, Any]],
    iou: float = 0.5,
    background: float = BACKGROUND_IOU,
    max_dets: int = 100,
) -> Errors:
    """Judge `detections` against the annotations of `split`.

    detections: packed `Results`, or one `Detections` per image of the split, or COCO result rows. iou: from which IoU
    on a detection is right. background: below which IoU it has nothing to do with an annotation. max_dets: the best so
    many of each image and class are judged, as COCO does.
    Raises `DataError` if a detection belongs to no image or class of the split or is not finite.
    """
    if not 0 < background <= iou <= 1:
        raise DeimkitError(f"IoUs must be in order, 0 < background <= iou <= 1; got {background} and {iou}.")
    if max_dets < 1:
        raise DeimkitError(f"max_dets must be a positive count such as 100; got {max_dets}.")
    results = best_first(packed(split, detections), max_dets)
    return Errors(split, results, *judge(split, results, iou, background), iou, background, max_dets)


def best_first(results: Results, max_dets: int) -> Results:
    """The same rows image by image, by descending score, of each image and class at most `max_dets`."""
    order = np.lexsort((-results.score, results.image))  # stable: equal scores stay as given
    results = Results(*(column[order] for column in results))
    classes = results.label.max(initial=0) + 1
    kept = rank_in(results.image * classes + results.label) < max_dets
    return Results(*(column[kept] for column in results))
