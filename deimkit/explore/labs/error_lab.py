"""The lab of errors: what is taken for what, what every threshold costs, and the images behind a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.errors import DataError
from deimkit.evaluation.precision import precision_recall
from deimkit.explore.findings import Findings
from deimkit.explore.labs.error_panels import CURVE, MATRIX, panels
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing

Array = NDArray[Any]
NOTHING = "nothing"  # what a false alarm was annotated as, and a missed object predicted as


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision over recall of one class, or of all together, and the point at the threshold.

    recall, precision, score: (n,) from the surest detection on. at: index of the last one above the threshold, or -1.
    """

    name: str
    recall: Array
    precision: Array
    score: Array
    at: int

    @property
    def point(self) -> tuple[float, float]:
        """Recall and precision at the threshold; a precision of 1 where nothing is above it."""
        return (float(self.recall[self.at]), float(self.precision[self.at])) if self.at >= 0 else (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Confused:
    """What is taken for what at a threshold, and the cell of it that is looked at.

    matrix: (C + 1, C + 1) counts, annotated by predicted class, "nothing" last. names: of its rows and columns.
    cell: the row and the column that were chosen. images: (k,) indices of the images behind that cell, the one with
    most of them first. curves: of all classes together, and of the chosen one.
    """

    threshold: float
    matrix: Array
    names: list[str]
    cell: tuple[int, int]
    images: Array
    curves: tuple[Curve, Curve]


class ErrorLab(Lab):
    """The confusion matrix and the precision-recall curves of a detector's findings, and the images behind them.

    A click on a cell of the matrix, or on a curve, moves the controls there. `lab.found.images` are the images of the
    cell that is chosen; `show` is called with them whenever they change, and can lead an open App to them.
    """

    title = "Errors: what is taken for what, and at which threshold"

    def __init__(self, findings: Findings, show: Callable[[list[int]], Any] | None = None) -> None:
        """findings: as of `find`. show: what to do with the indices of the images behind the chosen cell.

        Raises `DataError` if there is no class to be confused.
        """
        if not len(findings.split.categories):
            raise DataError(f"Errors are counted by class; {findings.split!r} has none.")
        self.findings, self.show = findings, show
        classes = findings.split.categories.distinct
        self.names = [*classes, NOTHING if NOTHING not in classes else f"({NOTHING})"]
        self._controls = self._first_controls()
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        """The threshold and the cell of the matrix, at first the most frequent mistake."""
        return self._controls

    def _first_controls(self) -> tuple[Control, ...]:
        least = min(self.findings.least, 1.0)
        row, column = _worst(self.findings.errors.confusion(least))
        names = tuple(self.names)
        return (
            Slider("threshold", 0.0, 1.0, 0.01, least, "least score"),
            Choice("annotated", names, names[row], "annotated"),
            Choice("predicted", names, names[column], "predicted"),
        )

    def compute(self, threshold: float, annotated: str, predicted: str) -> Confused:
        """The matrix, the images behind its chosen cell, and the curves."""
        errors, classes = self.findings.errors, len(self.names) - 1
        row, column = self.names.index(annotated), self.names.index(predicted)
        pairs = errors.confusions(threshold)
        there = pairs.image[(pairs.annotated == row) & (pairs.predicted == column)]
        images, counts = np.unique(there, return_counts=True)
        label = next((k for k in (row, column) if k < classes), None)
        everything = precision_recall(errors.ranked, int(errors.ranked.objects.sum()))
        one = everything if label is None else errors.precision_recall(label)
        curves = (("all classes", everything), ("all classes" if label is None else self.names[label], one))
        return Confused(
            threshold,
            pairs.matrix(classes),
            self.names,
            (row, column),
            images[np.argsort(-counts, kind="stable")],
            tuple(Curve(name, *values, int((values[2] >= threshold).sum()) - 1) for name, values in curves),  # type: ignore[arg-type]
        )

    def words(self, found: Confused) -> str:
        """The chosen cell in words, where to look, and what the threshold costs."""
        row, column = found.cell
        count, annotated = int(found.matrix[row, column]), int(found.matrix[row].sum())
        nothing = len(found.names) - 1
        if row == nothing:
            what = f"{count} {_count(count, 'detection')} of {found.names[column]} where nothing is annotated"
        elif column == nothing:
            what = f"{count} of {annotated} {found.names[row]} that nobody found"
        else:
            taken = "found as what they are" if row == column else f"taken for {found.names[column]}"
            what = f"{count} of {annotated} {found.names[row]} {taken}"
        first = f", most in {self.findings.split.paths[int(found.images[0])].name}" if len(found.images) else ""
        images = f"{len(found.images)} {_count(len(found.images), 'image')}"
        (recall, precision), name = found.curves[1].point, found.curves[1].name
        return (
            f"From a score of {found.threshold:.2f} on: {what}, in {images}{first}. "
            f"At that threshold {name}: precision {precision:.2f}, recall {recall:.2f}."
        )

    def draw(self, found: Confused) -> Drawing:
        """The confusion matrix, and beside it precision over recall."""
        return panels(found)

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """The cell of the matrix, or the threshold at a point of a curve."""
        if trace == MATRIX:
            return {"annotated": self.names[int(y)], "predicted": self.names[int(x)]}
        if not trace.startswith(CURVE):
            return {}
        curve = self.found.curves[int(trace[len(CURVE) :])]
        nearest = np.argmin((curve.recall - float(x)) ** 2 + (curve.precision - float(y)) ** 2)
        return {"threshold": float(np.floor(curve.score[nearest] * 100) / 100)}

    def set(self, **values: Any) -> ErrorLab:
        """Move controls as every lab does, and show the images if they are other ones."""
        before = self.found.images
        super().set(**values)
        if self.show is not None and not np.array_equal(before, self.found.images):
            self.show(self.found.images.tolist())
        return self


def _worst(matrix: Array) -> tuple[int, int]:
    """The row and the column of the most frequent mistake; of the first class if there is none."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return int(row), int(column)


def _count(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"
