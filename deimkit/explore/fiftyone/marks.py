"""From the App to the dataset doctor: annotations that somebody tagged there become a fix list."""

from __future__ import annotations

from typing import Any

from deimkit.data.doctor import Report, short
from deimkit.data.problems import Problem, problem
from deimkit.data.split import Split
from deimkit.explore.fiftyone.database import connect, guarded, quiet
from deimkit.explore.fiftyone.documents import TRUTH


def marked(dataset: Any, split: Split, tag: str = "fix") -> Report:
    """The annotations and images that were tagged in the App, as a report of the dataset doctor.

    dataset: a FiftyOne dataset that `to_fiftyone` made of `split`, or a view of it. tag: what they were tagged with.
    `Report.to_json` writes the list, `doctor(data, fixes=...)` and `deimkit doctor DATA --fixes FILE` read it.
    """
    connect()
    with guarded("tags were read"), quiet():
        shown = dataset.match_tags(split.name)
        columns = ["image_id", "tags", *(f"{TRUTH}.detections.{name}" for name in ("label", "tags", "bounding_box"))]
        rows = list(zip(*shown.values(columns), strict=True))
    index = {str(id_): i for i, id_ in enumerate(split.ids)}
    problems: list[Problem] = []
    for image_id, tags, labels, label_tags, boxes in rows:
        if image_id not in index:
            continue
        i = index[image_id]
        if tag in (tags or ()):
            problems.append(_of(split, i, f"the image is tagged {tag!r}"))
        for label, own, box in zip(labels or (), label_tags or (), boxes or (), strict=True):
            if tag in (own or ()):
                problems.append(_of(split, i, f"{label} at {_pixels(split, i, box)} is tagged {tag!r}"))
    return Report(split.name, f"{len(rows):,} images of {split.name}, as tagged in FiftyOne.", tuple(problems))


def _of(split: Split, image: int, detail: str) -> Problem:
    return problem("marked for repair", short(split.paths[image]), detail, split.ids[image], split.name)


def _pixels(split: Split, image: int, box: list[float]) -> str:
    """A relative box as left, top, width and height in pixels."""
    height, width = split.sizes[image].tolist()
    left, top, across, down = (value * side for value, side in zip(box, (width, height) * 2, strict=True))
    return f"({left:.0f}, {top:.0f}, {across:.0f}, {down:.0f})"
