"""The views that show where a detector fails, as data: which rows of the findings, and which of them first.

The App of FiftyOne and the contact sheet show the same images in the same order, because both follow these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import eq, ge, lt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.findings import CONTRADICTING, Findings

# What a condition may ask; columns of numpy and fields of FiftyOne understand these alike.
TESTS: dict[str, Callable[[Any, Any], Any]] = {"=": eq, "≥": ge, "<": lt}


class Condition(NamedTuple):
    """What a row must fulfil: its `column` stands as `test`, one of `TESTS`, to `values`, of which any one will do."""

    column: str
    test: str
    values: tuple[Any, ...]


class Shown(NamedTuple):
    """An image of a view, and the rows of the view's table for which it is shown, the worst first."""

    image: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Images that hold rows of a kind, those with the worst of them first.

    name: in a few words. words: what is to be seen, in a sentence. of: the table whose rows are asked for, "images",
    "annotations" or "detections". where: what all of these rows fulfil. by: the column that ranks them, from its
    largest value on if `descending`; rows without a value (NaN) are left out. Equal ones keep the order of the images.
    """

    name: str
    words: str
    of: str
    where: tuple[Condition, ...]
    by: str
    descending: bool = True

    def select(self, findings: Findings, most: int | None = None) -> list[Shown]:
        """The images of this view and the rows that put them there: all, or the first so many images."""
        table = findings.table(self.of)
        key = np.asarray(table[self.by], np.float64)
        rows = np.flatnonzero(np.all([_fulfilled(table, c) for c in self.where], axis=0) & ~np.isnan(key))
        rows = rows[np.argsort(-key[rows] if self.descending else key[rows], kind="stable")]
        image = rows if self.of == "images" else table["image"][rows]
        first = np.sort(np.unique(image, return_index=True)[1])
        return [Shown(int(i), rows[image == i]) for i in image[first[:most]]]


def views_of(findings: Findings) -> tuple[View, ...]:
    """The views for which the findings have what it takes: some need traces, some other findings to compare with."""
    traced = TRACED if findings.traces is not None else ()
    return (*VIEWS, *traced, *(CHANGES if findings.before is not None else ()))


def changed(first: Findings, second: Findings) -> Findings:
    """The second findings with what has changed since the first, such as an earlier checkpoint or another recipe.

    `views_of` them has the images that changed most, and the objects that were lost and found. Raises `DataError` if
    the two are not about the same images and annotations.
    """
    return replace(second, before=first)


def _fulfilled(table: dict[str, NDArray[Any]], condition: Condition) -> NDArray[np.bool_]:
    test, column = TESTS[condition.test], table[condition.column]
    return np.any([test(column, value) for value in condition.values], axis=0)


def _is(column: str, test: str, *values: Any) -> Condition:
    return Condition(column, test, values)


_SURE = _is("sure", "=", True)

VIEWS = (
    View(
        "worst images",
        "Images that are not read perfectly, those of the lowest AP first.",
        "images",
        (_is("ap", "<", 0.9999),),  # a perfect one is 1 up to rounding
        "ap",
        descending=False,
    ),
    View(
        "missed small objects",
        "Objects below 32² pixels that no sure detection is right about, the largest of them first.",
        "annotations",
        (_is("missed", "=", True), _is("size", "=", "small")),
        "area",
    ),
    View(
        "confident false positives",
        "Sure detections of what is not there, of another class, or in the wrong place, the surest first.",
        "detections",
        (_SURE, _is("verdict", "=", *CONTRADICTING, "background")),
        "score",
    ),
    View(
        "duplicates",
        "Sure detections of objects that a surer one has found, the surest first.",
        "detections",
        (_SURE, _is("verdict", "=", "duplicate")),
        "score",
    ),
    View(
        "low-quality matches",
        "Sure detections that are right with an IoU below 0.65, the loosest first.",
        "detections",
        (_SURE, _is("verdict", "=", "right"), _is("overlap", "<", 0.65)),
        "overlap",
        descending=False,
    ),
    View(
        "doubtful annotations",
        "Annotations that the detector contradicts, those first that it is most sure are wrong.",
        "annotations",
        (_is("mistakenness", "≥", 0.25),),
        "mistakenness",
    ),
)
TRACED = (
    View(
        "refined for the worse",
        "Sure detections whose IoU was at least 0.1 better in an earlier decoder layer, the largest loss first.",
        "detections",
        (_SURE, _is("drop", "≥", 0.1)),
        "drop",
    ),
    View(
        "contested objects",
        "Objects that the matcher gives to other queries from layer to layer, those that change hands most first.",
        "annotations",
        (_is("switches", "≥", 1),),
        "switches",
    ),
)
CHANGES = (
    View(
        "most changed images",
        "Images whose AP differs from what it was before, the largest difference first.",
        "images",
        (_is("change", "≥", 1e-9),),
        "change",
    ),
    View(
        "lost objects",
        "Objects that were found before and are missed now, the largest first.",
        "annotations",
        (_is("lost", "=", True),),
        "area",
    ),
    View(
        "newly found objects",
        "Objects that were missed before and are found now, the largest first.",
        "annotations",
        (_is("found", "=", True),),
        "area",
    ),
)
