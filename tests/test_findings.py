"""Findings as columns and views as data, on five images in which everything goes wrong once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deimkit.errors import DataError
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.findings import Findings, find, size_of
from deimkit.explore.views import CHANGES, TRACED, VIEWS, changed, views_of
from tests import findings_scene, micro, scenes


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return findings_scene.findings(tmp_path)


def test_detections_are_columns(found: Findings) -> None:
    table = found.detections
    assert table["verdict"].tolist() == findings_scene.VERDICTS
    assert table["label"].tolist() == ["猫", "猫", "dog", "dog", "猫", "猫", "dog"]
    assert table["target"].tolist() == [0, 0, 2, 3, -1, -1, 5]
    assert table["sure"].tolist() == [True, True, True, True, False, True, True]
    assert table["size"].tolist() == ["medium", "medium", "large", "medium", "small", "medium", "medium"]
    assert np.allclose(table["overlap"], [1, 39 * 39 / 1600, 1, 0.6, 0, 0, 1500 / 4500])
    assert table["layer_iou"].shape == (7, 3) and np.isnan(table["layer_iou"][5]).all()
    assert np.allclose(table["layer_iou"][:4, -1], table["overlap"][:4])
    assert table["drop"][0] == 0 and np.isnan(table["drop"][4])


def test_annotations_are_columns(found: Findings) -> None:
    table = found.annotations
    assert table["missed"].tolist() == [False, True, True, False, False, True]  # a crowd is never missed
    assert table["size"].tolist() == ["medium", "small", "large", "large", "large", "medium"]
    assert table["switches"].tolist() == [1, 0, 0, 0, 0, 0]


def test_mistakenness_weighs_who_contradicts_against_who_agrees(found: Findings) -> None:
    assert np.allclose(found.annotations["mistakenness"], [0, 0, 0.95, 0, 0, 0.85])
    beside = [*findings_scene.ROWS, (1, 0, 0.6, [10, 10, 110, 112])]  # somebody agrees
    judged = errors(found.split, findings_scene.results(beside))
    assert np.allclose(Findings(judged).annotations["mistakenness"], [0, 0, 0.95 * 0.4, 0, 0, 0.85])
    assert np.isnan(found.detections["mistakenness"][5]) and found.detections["mistakenness"][2] == 0.95


def test_images_are_columns(found: Findings) -> None:
    table = found.images
    assert table["right"].tolist() == [1, 0, 1, 0, 0]
    assert table["wrong"].tolist() == [1, 1, 0, 1, 1]
    assert table["missed"].tolist() == [1, 1, 0, 0, 1]
    assert np.isnan(table["ap"][3]) and np.allclose(table["ap"][[0, 1, 2, 4]], [0.5, 0, 1, 0])


# The images each view shows, by position, and the rows of the first of them.
SELECTED = {
    "worst images": ([1, 4, 0], [1]),
    "missed small objects": ([0], [1]),
    "confident false positives": ([1, 4, 3], [2]),
    "duplicates": ([0], [1]),
    "low-quality matches": ([2], [3]),
    "doubtful annotations": ([1, 4], [2]),
    "contested objects": ([0], [0]),
}


@pytest.mark.parametrize("name", SELECTED)
def test_views_select(found: Findings, name: str) -> None:
    view = next(view for view in views_of(found) if view.name == name)
    shown = view.select(found)
    assert ([s.image for s in shown], shown[0].rows.tolist()) == SELECTED[name]
    assert [s.image for s in view.select(found, most=1)] == SELECTED[name][0][:1]


def test_rows_of_an_image_stand_worst_first(tmp_path: Path) -> None:
    more = [*findings_scene.ROWS, (3, 1, 0.99, [70, 70, 90, 90])]
    found = findings_scene.findings(tmp_path, rows=more)
    first = next(v for v in VIEWS if v.name == "confident false positives").select(found)[0]
    assert first.image == 3 and found.detections["score"][first.rows].tolist() == [0.99, 0.6]


def test_refined_for_the_worse(found: Findings) -> None:
    traces = found.traces
    assert traces is not None
    boxes = traces.boxes.copy()
    boxes[3, 0] = found.split.boxes[3]  # it was perfect after the first layer
    worse = replace(found, traces=replace(traces, boxes=boxes))
    (shown,) = next(v for v in TRACED if v.name == "refined for the worse").select(worse)
    assert (shown.image, shown.rows.tolist()) == (2, [3]) and np.isclose(worse.detections["drop"][3], 0.4)


def test_what_changed_between_two(found: Findings, tmp_path: Path) -> None:
    rows = [(0, 1, 0.9, [100.0, 100, 120, 120]), *findings_scene.ROWS[1:]]  # one object is lost, another one found
    rows = [row for row in rows if row[:3] != (0, 0, 0.8)]
    second = changed(found, findings_scene.findings(tmp_path, name="second", rows=rows))
    assert views_of(second) == (*VIEWS, *TRACED, *CHANGES) and views_of(replace(found, traces=None)) == VIEWS
    images, lost, anew = (view.select(second) for view in CHANGES)
    assert [s.image for s in images] == [] and np.isclose(second.images["ap"][0], 0.5)  # one for the other
    assert [(s.image, s.rows.tolist()) for s in lost] == [(0, [0])]
    assert [(s.image, s.rows.tolist()) for s in anew] == [(0, [1])]
    better = changed(second, findings_scene.findings(tmp_path, rows=[*findings_scene.ROWS, rows[0]]))
    assert [s.image for s in CHANGES[0].select(better)] == [0] and np.isclose(better.images["change"][0], 0.5)


def test_the_threshold_is_where_f1_is_largest(found: Findings) -> None:
    judged = replace(found, threshold=None)
    assert judged.least == judged.errors.best_threshold()
    nothing = Results.concat([])
    assert Findings(errors(found.split, nothing)).least == 0.5


def test_nothing_at_all_has_all_columns() -> None:
    split = scenes.split_of([[], []], [[], []])
    found = Findings(errors(split, Results.concat([])))
    assert {len(column) for column in found.detections.values()} == {0}
    assert {len(column) for column in found.annotations.values()} == {0}
    assert np.isnan(found.images["ap"]).all()
    assert all(view.select(found) == [] for view in VIEWS)


def test_what_does_not_belong_together_is_refused(found: Findings, tmp_path: Path) -> None:
    fewer = errors(found.split, findings_scene.results(findings_scene.ROWS[:3]))
    with pytest.raises(DataError, match="same detections"):
        Findings(fewer, found.traces)
    other = Findings(errors(found.split.take([0, 1]), Results.concat([])))
    with pytest.raises(DataError, match="same images"):
        changed(other, found)


def test_classes_of_one_name_are_told_apart() -> None:
    split = scenes.split_of([[[0, 0, 9, 9]]], [[1]], names=("cat", "cat"))
    assert Findings(errors(split, Results.concat([]))).annotations["label"].tolist() == ["cat (4)"]


def test_sizes_are_coco_s() -> None:
    assert size_of(np.array([0, 1024, 1025, 9216, 9217])).tolist() == ["small", "small", "medium", "medium", "large"]


def test_one_call_from_a_detector(tmp_path: Path) -> None:
    data = micro.scenes(tmp_path)
    assert data.val is not None
    said: list[str] = []
    found = find(micro.MICRO.build(data.categories), data.val, top=7, progress=said.append)
    assert len(found.errors.results.score) == 14 and found.traces is not None and said
    assert found.detections["start"].shape == (14, 4) and found.name == "detector"
    again = find(micro.MICRO.build(data.categories), data.val, name="mine", top=150, threshold=0.3)
    assert (again.name, again.least) == ("mine", 0.3)
