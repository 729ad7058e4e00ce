"""COCO's mAP as FiftyOne computes it, beside ours, on the same detections.

Both follow COCO's code and agree to 1e-6 but for three conventions; `Agreement.reasons` names those that may matter:

- Equal scores: of two detections of a class and the same score COCO ranks that of the earlier image first, FiftyOne the
  right one. A wrong detection in image 1 and a right one in image 2, both of score 0.9: AP 0.5 here, 1.0 there.
- Rounding: FiftyOne computes IoU on fractions of the image, COCO on pixels, so that of an IoU that is a threshold to
  the last bit one may see a match and the other none. A box of 51 × 18 pixels in an image of 84 × 26 is found by its
  upper half, with an IoU of 0.5: AP 0.1 here, 0.0 there.
- Crowds: COCO tries crowd regions after all objects, FiftyOne in the order of its spatial index, which is another one
  with more than 100 annotations of a class in an image; so a region may take a detection that is right about an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deimkit.errors import DataError
from deimkit.evaluation.coco import IOUS, evaluate
from deimkit.evaluation.verdicts import image_pairs
from deimkit.explore.fiftyone.database import connect, guarded, quiet
from deimkit.explore.fiftyone.documents import TRUTH
from deimkit.explore.findings import Findings

EXACT = 1e-9  # an IoU so close to a threshold is decided by rounding


@dataclass(frozen=True)
class Agreement:
    """Two APs of the same detections, COCO's mean over IoU .50 to .95 and classes, and why they differ if they do.

    ours, theirs: the means. per_class: both for each class with objects. equal_scores: detections of a class that share
    their score with another one. crowds: crowd regions. exact: pairs whose IoU is a threshold up to rounding.
    """

    ours: float
    theirs: float
    per_class: dict[str, tuple[float, float]]
    equal_scores: int
    crowds: int
    exact: int

    @property
    def difference(self) -> float:
        """By how much FiftyOne's is larger."""
        return self.theirs - self.ours

    @property
    def reasons(self) -> list[str]:
        """The conventions that differ and may explain a difference, as sentences; none if there is no difference."""
        if not abs(self.difference) > 1e-6:
            return []
        said = {
            f"{self.equal_scores} detections share a score: COCO ranks them by image, FiftyOne the right one first.": (
                self.equal_scores
            ),
            f"{self.crowds} crowd regions: COCO tries them last, FiftyOne where its index has them.": self.crowds,
            f"{self.exact} IoUs are a threshold to the last bit: FiftyOne computes on fractions.": self.exact,
        }
        return [sentence for sentence, count in said.items() if count]


def agreement(dataset: Any, findings: Findings, field: str = "predictions") -> Agreement:
    """Let FiftyOne evaluate what `to_fiftyone` wrote into `field`, and compare it with `deimkit.evaluate`.

    FiftyOne takes about 15 s for 1,000 detections, and nothing is written into the dataset. Raises `DataError` if that
    does not have the images of the findings.
    """
    split, results = findings.split, findings.errors.results
    ours = evaluate(split, results)
    connect()
    with guarded("FiftyOne evaluated"), quiet():
        mine = {str(id_) for id_ in split.ids}
        shown = dataset.match_tags(split.name).exists(field)
        if set(shown.values("image_id")) != mine:
            raise DataError(
                f"Expected the {len(mine)} images of {split.name!r} with {field!r} in the FiftyOne dataset; "
                f"got {len(shown)}. Write them with to_fiftyone(split, findings, field={field!r})."
            )
        names = list(ours["per_class"])
        found = shown.evaluate_detections(
            field, gt_field=TRUTH, method="coco", compute_mAP=True, classes=names, progress=False
        )
    theirs = {name: _number(found.mAP(classes=[name])) for name in names}
    counted = {name: row["AP"] for name, row in ours["per_class"].items() if row["count"]}
    pairs = image_pairs(split, results, float(IOUS[0]) - EXACT)
    exact = np.abs(pairs.iou[:, None] - IOUS).min(1, initial=1) < EXACT
    _, times = np.unique(np.stack([results.label, results.score], 1), axis=0, return_counts=True)
    return Agreement(
        ours=ours["AP"],
        theirs=_number(found.mAP()),
        per_class={name: (ap, theirs[name]) for name, ap in counted.items()},
        equal_scores=int(times[times > 1].sum()),
        crowds=int(split.crowd.sum()),
        exact=int(exact.sum()),
    )


def _number(ap: float) -> float:
    """An AP, NaN where FiftyOne says -1: there is nothing to find."""
    return float(ap) if ap >= 0 else float("nan")
