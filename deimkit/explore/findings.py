"""What a detector found, missed and got wrong in a split, as plain columns that every front shows.

found = find("runs/bccd", data.val)
found.images["ap"]            # (images,)
found.detections["verdict"]   # (n,) "right", "class", "location", ...
found.annotations["missed"]   # (N,) bool
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deimkit.data.split import Split
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import SIZES, Results
from deimkit.evaluation.errors import BACKGROUND_IOU, Errors, errors
from deimkit.evaluation.verdicts import VERDICTS
from deimkit.explore.traces import Traces, trace
from deimkit.models.detector import Detector
from deimkit.training.machine import pick_device
from deimkit.training.run import Run, as_run

if TYPE_CHECKING:
    from deimkit.matching import Matcher

Array = NDArray[Any]
Table = dict[str, Array]  # columns of equal length

CONTRADICTING = ("class", "location", "both")  # verdicts of a detection that says something else than its target


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The verdicts on a detector's detections, how each of them came to be, and what is to be seen of both.

    errors: what is right and wrong. traces: the same detections layer by layer, or None. name: whose they are.
    threshold: the score from which on a detection is `sure`, and counts as right or wrong in `images`; by default the
    one with the largest F1. before: the findings of another detector on the same split, to compare with, or None.
    """

    errors: Errors
    traces: Traces | None = None
    name: str = "predictions"
    threshold: float | None = None
    before: Findings | None = None

    def __post_init__(self) -> None:
        if self.traces is not None and not _same_rows(self.errors.results, self.traces.results):
            raise DataError(
                "Errors and traces must be about the same detections; got "
                f"{len(self.errors.results.score)} and {len(self.traces.results.score)}. "
                "Judge the traced ones: errors(split, traces.results)."
            )
        if self.before is not None and self.before.split.fingerprint() != self.split.fingerprint():
            raise DataError(
                f"Only findings of the same images and annotations can be compared; got {self.before.split!r} and "
                f"{self.split!r}. Let both detectors look at one split."
            )

    def __repr__(self) -> str:
        count = len(self.errors.results.score)
        return f"Findings({self.name!r}, {count} detections in {len(self.split)} images of {self.split.name!r})"

    @property
    def split(self) -> Split:
        """The images and annotations that all of this is about."""
        return self.errors.split

    @cached_property
    def least(self) -> float:
        """The score from which on a detection is sure; 0.5 if none was given and nothing is right at any."""
        return self.threshold if self.threshold is not None else self.errors.best_threshold() or 0.5

    def table(self, of: str) -> Table:
        """The columns of "images", "annotations" or "detections"."""
        tables: dict[str, Table] = {
            "images": self.images,
            "annotations": self.annotations,
            "detections": self.detections,
        }
        return tables[of]

    @cached_property
    def images(self) -> Table:
        """A row per image of the split.

        ap: COCO's AP of that image alone, NaN without objects. right, wrong: how many sure detections are. missed: how
        many objects no sure detection is right about. change: |ap - ap before|, where there is something before.
        """
        rows = {name.lower(): column for name, column in self.errors.per_image(self.least).items()}
        if self.before is not None:
            rows["change"] = np.abs(rows["ap"] - self.before.images["ap"])
        return rows

    @cached_property
    def detections(self) -> Table:
        """A row per detection, image by image, the best first.

        image: index. label: name. score. sure: bool. verdict: one of `VERDICTS`. target: the annotation it is about, or
        -1, and overlap: the IoU with it. size: of its box, "small", "medium" or "large". mistakenness: its target's,
        NaN without one.

        Of traces also: query: who said it. layer_iou: (n, L) IoU with the target after each decoder layer, NaN without
        one, and layer_score: (n, L). drop: by how much the last layer's IoU is below the best one's, NaN without a
        target. spread: (n, 4) pixels, how unsure the left, top, right and bottom edge are. start: (n, 4) xyxy pixels,
        the query's first box.
        """
        results, target = self.errors.results, self.errors.target
        wide = np.asarray(results.boxes, np.float64).reshape(-1, 4)
        rows = {
            "image": results.image,
            "label": self._names[results.label],
            "score": results.score,
            "sure": results.score >= self.least,
            "verdict": np.array(VERDICTS, object)[self.errors.verdict],
            "target": target,
            "overlap": self.errors.overlap,
            "size": size_of((wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])),
            "mistakenness": np.where(target >= 0, np.append(self._mistakenness, np.nan)[target], np.nan),
        }
        if self.traces is not None:
            iou = self.traces.iou(target)
            rows |= {"query": self.traces.query, "layer_iou": iou, "layer_score": self.traces.scores}
            rows |= {"drop": iou.max(1) - iou[:, -1], "spread": self.traces.spread, "start": self.traces.start}
        return rows

    @cached_property
    def annotations(self) -> Table:
        """A row per annotation of the split.

        image: index. label: name. crowd: bool. area: px². size: "small", "medium" or "large". missed: no sure detection
        is right about it. mistakenness: how sure the detector is that the annotation is wrong, in [0, 1]: the highest
        score of a detection that puts another class or another box in its place, times one minus the highest score of
        those that agree with it. lost, found: missed now and not before, or the other way round, where there is
        something before.

        Of traces also: layer_query: (N, L) the query that the matcher gives it at each decoder layer, or -1, with
        layer_iou and layer_score: (N, L) that query's IoU and its score for the class. switches: how often the query
        changes from layer to layer.
        """
        split = self.split
        rows = {
            "image": split.images_of_rows,
            "label": self._names[split.labels],
            "crowd": split.crowd,
            "area": split.areas,
            "size": size_of(split.areas),
            "missed": self.errors.missed(self.least),
            "mistakenness": self._mistakenness,
        }
        if self.before is not None:
            missed = self.before.annotations["missed"]
            rows |= {"lost": rows["missed"] & ~missed, "found": missed & ~rows["missed"] & ~split.crowd}
        if self.traces is not None:
            query = self.traces.matched
            rows |= {"layer_query": query, "layer_iou": self.traces.matched_iou}
            rows |= {"layer_score": self.traces.matched_score, "switches": (np.diff(query, axis=1) != 0).sum(1)}
        return rows

    @cached_property
    def _names(self) -> Array:
        return np.array(self.split.categories.distinct, object)

    @cached_property
    def _mistakenness(self) -> Array:
        target, score = self.errors.target, self.errors.results.score
        against, agreeing = np.zeros(len(self.split.labels)), np.zeros(len(self.split.labels))
        verdict = np.array(VERDICTS, object)[self.errors.verdict]
        contradicting = np.isin(verdict, CONTRADICTING) & (target >= 0)
        right = (verdict == "right") & (target >= 0)
        np.maximum.at(against, target[contradicting], score[contradicting])
        np.maximum.at(agreeing, target[right], score[right])
        return against * (1 - agreeing)


def find(
    what: Detector | Run | str | Path,
    split: Split,
    name: str | None = None,
    top: int = 300,
    threshold: float | None = None,
    iou: float = 0.5,
    size: int | tuple[int, int] | None = None,
    batch: int = 8,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Findings:
    """Let a detector look at a split, judge what it says, and keep how it came to say it.

    what: a detector, a run or its folder, or whatever `deimkit.load` makes a detector of; the matcher is that of the
    run's recipe. top: detections of an image at most, by default as many as evaluation takes; 100 of them of a class.
    threshold: see `Findings`. iou: from which IoU on a detection is right. size, batch: as in `evaluate`. device: by
    default where a detector is, and the best here for everything else.
    progress: called with a remark such as "tracing 40/100".
    """
    from deimkit.api import load_detector

    if not BACKGROUND_IOU <= iou <= 1:
        raise DeimkitError(f"iou must be in [{BACKGROUND_IOU}, 1]; got {iou}.")
    run = as_run(what)
    detector = what if isinstance(what, Detector) else load_detector(run or what).to(pick_device(device or "auto"))
    if device is not None:
        detector.to(pick_device(device))
    traces = trace(detector, split, matcher_of(run), top=top, batch=batch, size=size, progress=progress)
    judged = errors(split, traces.results, iou=iou)
    return Findings(judged, traces.of_class(judged.max_dets), name or _name(what), threshold)


def matcher_of(run: Run | None) -> Matcher | None:
    """The matcher of a run's recipe, if there is a run."""
    from deimkit.recipes import parse

    return None if run is None else parse((run.folder / "recipe.py").read_text(encoding="utf-8")).matcher


def size_of(area: Array) -> Array:
    """COCO's name for the size of each area in px²: "small", "medium" or "large"."""
    names = ("small", "medium", "large")
    return np.array(names, object)[np.searchsorted([SIZES[name][1] for name in names[:2]], area, side="left")]


def _same_rows(ours: Results, theirs: Results) -> bool:
    return len(ours.score) == len(theirs.score) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _name(what: Any) -> str:
    """What to call whoever is asked: by the folder of its run or by its file."""
    if isinstance(what, Run):
        return what.folder.resolve().name
    if not isinstance(what, (str, Path)):
        return "detector"
    place = Path(what).expanduser().resolve()
    return place.name if place.is_dir() else place.stem
