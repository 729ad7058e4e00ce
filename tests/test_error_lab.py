"""The lab of errors: its numbers by hand, where a click leads, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.findings import Findings
from deimkit.explore.labs.error_lab import ErrorLab
from deimkit.explore.labs.error_panels import _ends_of_runs
from deimkit.explore.still import png
from tests.scenes import random_results, random_split, split_of

BOX, FAR = [0.0, 0, 100, 100], [300.0, 300, 400, 400]
CAT, DOG = 0, 1


def three_images() -> Findings:
    """Image 0: a cat right, a cat missed. Image 1: a dog taken for a cat, twice. Image 2: a false dog."""
    split = split_of([[BOX, FAR], [BOX, FAR], []], [[CAT, CAT], [DOG, DOG], []])
    rows = [(0, CAT, 0.9, BOX), (1, CAT, 0.8, BOX), (1, CAT, 0.7, FAR), (2, DOG, 0.6, BOX)]
    image, label, score, boxes = zip(*rows, strict=True)
    found = Results(np.array(image), np.array(label), np.array(score), np.array(boxes))
    return Findings(errors(split, found), threshold=0.5)


def test_it_begins_with_the_most_frequent_mistake() -> None:
    lab = ErrorLab(three_images())
    cat, dog = lab.names[:2]
    assert lab.values == {"threshold": 0.5, "annotated": dog, "predicted": cat}
    assert lab.found.matrix.tolist() == [[1, 0, 1], [2, 0, 0], [0, 1, 0]]
    assert lab.found.images.tolist() == [1]
    assert lab.words(lab.found).startswith(
        f"From a score of 0.50 on: 2 of 2 {dog} taken for {cat}, in 1 image, most in"
    )


@pytest.mark.parametrize(
    "annotated, predicted, images, words",
    [
        (0, 2, [0], "1 of 2 {0} that nobody found"),
        (0, 0, [0], "1 of 2 {0} found as what they are"),
        (2, 1, [2], "1 detection of {1} where nothing is annotated"),
        (1, 2, [], "0 of 2 {1} that nobody found, in 0 images. At"),
        (2, 2, [], "0 of 1 nothing"),
    ],
)
def test_every_cell_says_what_it_is(annotated: int, predicted: int, images: list[int], words: str) -> None:
    lab = ErrorLab(three_images())
    lab.set(annotated=lab.names[annotated], predicted=lab.names[predicted])
    assert lab.found.images.tolist() == images and lab.found.cell == (annotated, predicted)
    if (annotated, predicted) != (2, 2):
        assert words.format(*lab.names) in lab.words(lab.found)


def test_the_star_is_where_the_threshold_is() -> None:
    lab = ErrorLab(three_images())
    everything, dog = lab.set(threshold=0.85).found.curves
    assert everything.name == "all classes" and everything.point == (0.25, 1.0)
    assert dog.name == lab.names[DOG] and dog.point == (0.0, 1.0), "no dog is as sure"
    assert lab.set(threshold=0.0).found.curves[0].point == (0.25, 0.25)


def test_a_click_leads_to_the_cell_or_to_the_threshold() -> None:
    lab = ErrorLab(three_images())
    matrix, curve = (trace.name for trace in lab.figure().data[:2])
    assert lab.clicked(matrix, 2, 0) == {"annotated": lab.names[0], "predicted": "nothing"}
    everything = lab.found.curves[0]
    assert lab.clicked(curve, everything.recall[1], everything.precision[1]) == {"threshold": 0.8}
    assert lab.clicked("score 0.50", 0, 0) == {}


def test_the_images_are_shown_when_they_change_and_only_then() -> None:
    shown: list[list[int]] = []
    lab = ErrorLab(three_images(), show=shown.append)
    lab.set(threshold=0.4)
    lab.set(annotated=lab.names[0], predicted="nothing")
    assert shown == [[0]]
    with pytest.raises(DeimkitError, match="annotated is one of"):
        lab.set(annotated="cow")
    assert shown == [[0]]


@pytest.mark.parametrize("classes, written", [(1, True), (12, True), (13, False), (80, False)])
def test_it_is_drawn_for_any_number_of_classes(classes: int, written: bool) -> None:
    rng = np.random.default_rng(classes)
    split = random_split(rng, 6, classes, 5)
    lab = ErrorLab(Findings(errors(split, random_results(rng, split, 8))))
    figure = lab.figure()
    assert np.asarray(figure.data[0].z).shape == (classes + 1,) * 2
    numbers = [note.text for note in figure.layout.annotations if note.text.isdigit()]
    assert numbers == ([str(count) for count in lab.found.matrix.ravel()] if written else [])
    assert png(figure).startswith(b"\x89PNG") and "data:image/png" in lab.still()["text/html"]


def test_a_class_may_be_called_nothing() -> None:
    split = split_of([[BOX]], [[0]], names=("nothing", "dog"))
    lab = ErrorLab(Findings(errors(split, Results.concat([]))))
    assert lab.names == ["nothing", "dog", "(nothing)"]
    assert lab.values["predicted"] == "(nothing)" and lab.found.matrix[0, 2] == 1


def test_nothing_to_confuse_is_explained() -> None:
    split = split_of([[]], [[]], names=())
    with pytest.raises(DataError, match="Errors are counted by class"):
        ErrorLab(Findings(errors(split, Results.concat([]))))


def test_a_live_click_moves_the_controls() -> None:
    lab = ErrorLab(three_images())
    live: Any = lab.live
    live._heard(live.chart, {"clicked": [{"trace": "matrix", "x": 2, "y": 0}]}, [])
    assert live.controls["predicted"].value == "nothing" and "1 of 2" in live.said.value


@pytest.mark.parametrize("recall", [[], [0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.4], [0.2, 0.4, 0.4, 0.4, 0.4, 0.6]])
def test_a_drawn_curve_has_the_corners_of_the_whole_one(recall: list[float]) -> None:
    before, after = [None, *recall[:-1]], [*recall[1:], None]
    corners = [k for k, value in enumerate(recall) if before[k] != value or after[k] != value]
    assert _ends_of_runs(np.array(recall)).tolist() == corners
