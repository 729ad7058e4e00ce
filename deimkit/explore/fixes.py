"""The fix list: what a detector's findings say is wrong with a dataset and not with the detector, for the doctor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deimkit.data.doctor import Report, short
from deimkit.data.problems import Problem, problem
from deimkit.errors import DeimkitError
from deimkit.explore.findings import CONTRADICTING, Findings


def fix_list(findings: Findings, doubt: float = 0.5, sight: float = 0.5) -> Report:
    """The annotations of a split that are worth a second look, as a report of the dataset doctor, the surest first.

    doubt: from which mistakenness on an annotation is listed (see `Findings.annotations`). sight: from which score on a
    detection of what nobody annotated is. `Report.to_json` writes the list, `doctor(data, fixes=...)` and
    `deimkit doctor DATA --fixes FILE` read it, `Split.without(report.problems)` leaves the images out.

    A detector is no judge: these are questions. Raises `DeimkitError` for thresholds outside [0, 1].
    """
    if not (0 <= doubt <= 1 and 0 <= sight <= 1):
        raise DeimkitError(f"doubt and sight are in [0, 1]; got {doubt} and {sight}.")
    problems = (*_doubtful(findings, doubt), *_unannotated(findings, sight))
    summary = f"{len(findings.split):,} images of {findings.split.name}, as {findings.name} sees them."
    return Report(findings.split.name, summary, problems)


def _doubtful(findings: Findings, least: float) -> Iterator[Problem]:
    """Annotations that a detection contradicts while none agrees."""
    table, rows = findings.annotations, findings.detections
    doubt = table["mistakenness"]
    against = np.flatnonzero(np.isin(rows["verdict"], CONTRADICTING) & (rows["target"] >= 0))
    against = against[np.argsort(rows["score"][against], kind="stable")]
    strongest = dict(zip(rows["target"][against].tolist(), against.tolist(), strict=True))  # the last one stays
    listed = np.flatnonzero((doubt >= least) & (doubt > 0))
    for row in listed[np.argsort(-doubt[listed], kind="stable")].tolist():
        seen = strongest[row]
        detail = (
            f"{table['label'][row]} at {_place(findings.split.boxes[row])} is seen as {_said(findings, seen)}, "
            f"IoU {rows['overlap'][seen]:.2f}; mistakenness {doubt[row]:.2f}"
        )
        yield _of_image(findings, int(table["image"][row]), "doubtful annotation", detail)


def _unannotated(findings: Findings, least: float) -> Iterator[Problem]:
    """Sure detections where nothing is annotated."""
    rows = findings.detections
    listed = np.flatnonzero((rows["verdict"] == "background") & (rows["score"] >= least))
    for row in listed[np.argsort(-rows["score"][listed], kind="stable")].tolist():
        detail = f"nothing is annotated where a detector sees {_said(findings, row)}"
        yield _of_image(findings, int(rows["image"][row]), "object without annotation", detail)


def _said(findings: Findings, row: int) -> str:
    """A detection in words."""
    rows, box = findings.detections, findings.errors.results.boxes[row]
    return f"{rows['label'][row]} {rows['score'][row]:.2f} at {_place(box)}"


def _place(box: np.ndarray) -> str:
    """An xyxy box as annotation tools write it: left, top, width and height in pixels."""
    left, top, right, bottom = (float(side) for side in box)
    return f"({left:.0f}, {top:.0f}, {right - left:.0f}, {bottom - top:.0f})"


def _of_image(findings: Findings, image: int, kind: str, detail: str) -> Problem:
    split = findings.split
    return problem(kind, short(split.paths[image]), detail, split.ids[image], split.name)
