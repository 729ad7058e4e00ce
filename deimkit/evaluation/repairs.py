"""What every kind of error costs: the AP that would be gained were it, and nothing else, repaired.

After Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (2020). Each kind is repaired with
no regard to the others, and classes without objects have no part in the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deimkit.evaluation.precision import NAN, Ranked
from deimkit.evaluation.verdicts import BACKGROUND, BOTH, CLASS, DUPLICATE, LOCATION, RIGHT, VERDICTS, Array

if TYPE_CHECKING:
    from deimkit.evaluation.errors import Errors


def costs(errors: Errors) -> dict[str, float]:
    """AP at `errors.iou` gained by each repair alone; NaN throughout if there is nothing to find.

    class, location: of these detections the best about each object that nobody found becomes right, the others go.
    both, duplicate, background: these detections go. missed: objects that nobody found, nor erred about by class or
    place alone, are no longer asked for. false positives: all wrong detections go. false negatives: all objects that
    nobody found are no longer asked for. A class of which nothing is left to find is solved: its AP is 1.
    """
    whole, now = errors.ranked, errors.verdict[errors.counting]
    before = whole.average_precision()
    if np.isnan(before).all():
        return dict.fromkeys((*VERDICTS[CLASS : BACKGROUND + 1], "missed", "false positives", "false negatives"), NAN)

    after = {VERDICTS[kind]: _moved(errors, kind) for kind in (CLASS, LOCATION)}
    after |= {VERDICTS[kind]: whole.take(now != kind) for kind in (BOTH, DUPLICATE, BACKGROUND)}
    after["missed"] = _without(errors, overlooked(errors))
    after["false positives"] = whole.take(now == RIGHT)
    after["false negatives"] = _without(errors, errors.missed())
    asked = whole.objects > 0
    gain = {kind: np.where(asked & (x.objects == 0), 1.0, x.average_precision()) for kind, x in after.items()}
    return {kind: float((ap - before)[asked].mean()) for kind, ap in gain.items()}


def overlooked(errors: Errors, threshold: float = 0.0) -> Array:
    """Which annotations (N,) nobody found and nobody would, were every class or every place right."""
    near = np.isin(errors.verdict, (CLASS, LOCATION)) & (errors.results.score >= threshold)
    missed = errors.missed(threshold)
    missed[errors.target[near]] = False
    return missed


def _moved(errors: Errors, kind: int) -> Ranked:
    """All that counts, those with an error of `kind` made right or taken out."""
    rows = np.flatnonzero(errors.verdict == kind)
    rows = rows[errors.found[errors.target[rows]] < 0]
    rows = rows[np.unique(errors.target[rows], return_index=True)[1]]  # the best of each, as they stand in that order
    label, right = errors.results.label.copy(), errors.verdict == RIGHT
    label[rows], right[rows] = errors.split.labels[errors.target[rows]], True
    kept = errors.counting & ((errors.verdict != kind) | right)
    whole = errors.ranked
    return Ranked(errors.turns[kept], label[kept], errors.results.score[kept], right[kept], whole.objects)


def _without(errors: Errors, objects: Array) -> Ranked:
    """All that counts, with these `objects` (N,) no longer asked for."""
    return errors.ranked._replace(objects=errors.ranked.objects - errors.objects_per_class(objects))
