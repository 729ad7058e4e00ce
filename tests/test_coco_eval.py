"""COCO's numbers: by hand, against COCO's own code, and on annotations that pretend to be detections."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deimkit.data.dataset import Dataset
from deimkit.data.split import CategoryMap, Split
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import Evaluator, Results, curves, evaluate, ground_truth_as_predictions
from deimkit.structures import Detections
from tests.scenes import random_results, random_split, split_of

TWELVE = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
NOTHING = Results.concat([])


def results(*rows: tuple[int, int, float, list[float]]) -> Results:
    """Packed detections from (image, label, score, xyxy) rows."""
    image, label, score, boxes = zip(*rows, strict=True)
    return Results(np.array(image), np.array(label), np.array(score), np.array(boxes))


def coco_rows(split: Split, found: Results) -> list[dict[str, Any]]:
    """The same detections as rows of a COCO results file."""
    return [
        {
            "image_id": split.ids[i],
            "category_id": split.categories.ids[k],
            "score": float(s),
            "bbox": [float(x), float(y), float(right) - float(x), float(bottom) - float(y)],
        }
        for i, k, s, (x, y, right, bottom) in zip(*found, strict=True)
    ]


def numbers(stats: dict[str, Any]) -> list[float]:
    """All numbers of a result, class by class as well."""
    return [stats[key] for key in TWELVE] + [x for row in stats["per_class"].values() for x in row.values()]


def by_hand_with_pycocotools(split: Split, found: Results) -> np.ndarray:
    """The twelve numbers as everybody computes them: a ground-truth file, a results file, COCOeval."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = split.to_coco()
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(coco_rows(split, found)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.where(run.stats < 0, np.nan, run.stats)


# --------------------------------------------------------------------------------------------------- by hand

BOX, FAR = [0.0, 0, 100, 100], [300.0, 300, 400, 400]


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_two_objects_three_detections(backend: str) -> None:
    """Hit, miss, hit: precision 1 up to recall 0.5 (51 of 101 points), then 2/3."""
    split = split_of([[BOX, FAR]], [[0, 0]])
    found = results((0, 0, 0.9, BOX), (0, 0, 0.8, [500, 500, 600, 600]), (0, 0, 0.7, FAR))
    stats = evaluate(split, found, backend)
    assert stats["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (stats["AR1"], stats["AR10"], stats["AR100"]) == pytest.approx((0.5, 1, 1))
    assert stats["per_class"]["cat"]["count"] == 2 and stats["per_class"]["cat"]["AP"] == stats["AP"]
    assert np.isnan(stats["APs"]) and np.isnan(stats["per_class"]["dog"]["AP"])


@pytest.mark.parametrize("overlap, thresholds", [(100, 10), (94, 9), (76, 6), (74, 5), (50, 1), (49, 0)])
def test_iou_decides_at_how_many_thresholds_a_box_counts(overlap: int, thresholds: int) -> None:
    """A box of `overlap` percent of the object is found at the thresholds up to and including that IoU."""
    split = split_of([[BOX]], [[0]])
    assert evaluate(split, results((0, 0, 1.0, [0, 0, 100, overlap])))["AP"] == pytest.approx(thresholds / 10)


def test_crowd_excuses_what_lies_in_it() -> None:
    split = split_of([[BOX, [200, 0, 640, 640]]], [[0, 0]], crowd=[[False, True]])
    inside = [(0, 0, 0.9, [210.0 + 40 * i, 10, 240 + 40 * i, 40]) for i in range(5)]
    assert evaluate(split, results(*inside, (0, 0, 0.5, BOX)))["AP"] == pytest.approx(1)
    assert evaluate(replace(split, crowd=np.array([False, False])), results(*inside, (0, 0, 0.5, BOX)))["AP"] < 0.1


def test_second_detection_of_an_object_is_a_mistake() -> None:
    split = split_of([[BOX], [BOX]], [[0], [0]])
    found = results((0, 0, 0.9, BOX), (0, 0, 0.8, BOX), (1, 0, 0.7, BOX))
    assert evaluate(split, found)["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_only_the_best_hundred_of_an_image_and_class_count(backend: str) -> None:
    split = split_of([[BOX]], [[0]])
    noise = [(0, 0, 0.9, [300.0, 300, 310 + i, 310 + i]) for i in range(100)]
    assert evaluate(split, results(*noise, (0, 0, 0.5, BOX)), backend)["AR100"] == 0
    assert evaluate(split, results(*noise[1:], (0, 0, 0.5, BOX)), backend)["AR100"] == 1
    assert evaluate(split, results(*noise, (0, 1, 0.5, BOX), (0, 0, 0.95, BOX)), backend)["AP"] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
@pytest.mark.parametrize(
    "boxes, labels, found, expected",
    [
        ([[BOX], []], [[0], []], NOTHING, 0.0),
        ([[], []], [[], []], NOTHING, np.nan),
        ([[], []], [[], []], results((1, 0, 0.5, BOX)), np.nan),
        ([[BOX], []], [[0], []], results((1, 0, 0.5, BOX)), 0.0),
        ([[BOX], []], [[0], []], results((0, 1, 0.5, BOX)), 0.0),
        ([[BOX], []], [[0], []], results((1, 0, 0.9, BOX), (0, 0, 0.5, BOX)), 0.5),
        ([[BOX], []], [[0], []], results((0, 0, 0.5, [5, 5, 5, 5])), 0.0),
    ],
    ids=["nothing found", "nothing there", "no object", "empty image", "wrong class", "false alarm first", "no area"],
)
def test_empty(boxes: Any, labels: Any, found: Results, expected: float, backend: str) -> None:
    stats = evaluate(split_of(boxes, labels), found, backend)
    assert_allclose(stats["AP"], expected, equal_nan=True)
    assert -1 not in [stats[key] for key in TWELVE]


def test_split_without_images_or_classes() -> None:
    assert np.isnan(evaluate(split_of([], []), NOTHING)["AP"])
    assert evaluate(split_of([[]], [[]], names=()), [])["per_class"] == {}


# --------------------------------------------------------------------------------------------------- the peer


@pytest.mark.parametrize("seed", range(40))
def test_equals_pycocotools(seed: int) -> None:
    """Crowds, empty images, classes without objects, tied scores and IoUs, over 100 detections, huge and tiny boxes."""
    rng = np.random.default_rng(seed)
    grid = 16 if seed % 2 else 0  # on a grid many IoUs are equal, and many lie exactly on a threshold
    split = random_split(
        rng,
        images=int(rng.integers(1, 25)),
        classes=int(rng.integers(1, 8)),
        objects=int(rng.integers(0, 12)),
        crowded=float(rng.choice([0, 0.1, 0.5])),
        side=int(rng.choice([80, 640])),
        grid=grid,
    )
    found = random_results(rng, split, noise=int(rng.choice([0, 20, 250])), ties=seed % 3 == 0, grid=grid // 2)
    max_dets = (1, 10, 100) if seed % 4 else (2, 5, 20)
    ours, theirs = (curves(split, found, backend, max_dets) for backend in ("fast", "pycocotools"))
    assert_allclose(ours.precision, theirs.precision, rtol=0, atol=1e-9, equal_nan=True)
    assert_allclose(ours.recall, theirs.recall, rtol=0, atol=1e-9, equal_nan=True)
    assert ours.precision.shape == (10, 101, len(split.categories), 4)
    if seed % 4 and len(found.image):
        stats = ours.summary()
        assert_allclose([stats[key] for key in TWELVE], by_hand_with_pycocotools(split, found), rtol=0, atol=1e-9)


def test_equal_scores_go_by_image_id_as_in_pycocotools() -> None:
    """The hit is in image id 7, the miss in id 5: with equal scores the miss comes first, wherever it stands."""
    split = split_of([[BOX], []], [[0], []], ids=[7, 5])
    found = results((0, 0, 0.5, BOX), (1, 0, 0.5, BOX))
    assert evaluate(split, found)["AP"] == pytest.approx(0.5) == by_hand_with_pycocotools(split, found)[0]


# --------------------------------------------------------------------------------------------------- the forms


def test_all_forms_of_detections_agree() -> None:
    rng = np.random.default_rng(5)
    split = random_split(rng, 12, 5, 6)
    found = random_results(rng, split, 10)
    listed = []
    for i in range(len(split)):
        rows = np.flatnonzero(found.image == i)
        boxes, scores, labels = (torch.from_numpy(x[rows]) for x in (found.boxes, found.score, found.label))
        listed.append(Detections(boxes, scores, labels))
    evaluator = Evaluator(split)
    for i in reversed(range(len(split))):
        evaluator.add(i, listed[i])
    expected = numbers(evaluate(split, found))
    for stats in (evaluate(split, coco_rows(split, found)), evaluate(split, listed), evaluator.result()):
        assert_allclose(numbers(stats), expected, rtol=0, atol=1e-12)
        assert stats["AP"] > 0.01
    assert_array_equal(evaluator.curves().precision, curves(split, found).precision)


def test_coco_rows_from_detections_with_ids_of_strings() -> None:
    split = split_of([[BOX], [FAR]], [[0], [1]], ids=["b", "a"])
    split = replace(split, categories=CategoryMap(ids=("x", "y"), names=("cat", "dog")))
    found = [
        Detections(torch.tensor([b]), torch.ones(1), torch.tensor([k]), ids=[i])
        for b, k, i in ((BOX, 0, "x"), (FAR, 1, "y"))
    ]
    rows = found[0].to_coco("b") + found[1].to_coco("a")
    for backend in ("fast", "pycocotools"):
        assert evaluate(split, rows, backend)["AP"] == pytest.approx(1)


def test_ids_of_mixed_kinds_and_equal_names() -> None:
    split = split_of([[BOX], [FAR]], [[0], [1]], ids=["b", 1], names=("cat", "cat"))
    stats = evaluate(split, ground_truth_as_predictions(split))
    assert list(stats["per_class"]) == ["cat (3)", "cat (4)"] and stats["AP"] == pytest.approx(1)


def test_ranks_exchange_packed_results() -> None:
    split = split_of([[BOX], [FAR]], [[0], [1]])
    one, two = Evaluator(split), Evaluator(split)
    one.add(0, Detections(torch.tensor([BOX]), torch.ones(1), torch.tensor([0])))
    two.add(1, Detections(torch.tensor([FAR]), torch.ones(1), torch.tensor([1])))
    assert one.result()["AP"] == pytest.approx(0.5)
    assert evaluate(split, Results.concat([one.packed(), two.packed()]))["AP"] == pytest.approx(1)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(split_of([[BOX]], [[0]]), results((0, 0, 1.0, BOX)), "pycocotools")
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------- refusals

ONE = split_of([[BOX]], [[0]])
GOOD: dict[str, Any] = {"image_id": 0, "category_id": 3, "score": 0.5, "bbox": [0, 0, 10, 10]}


@pytest.mark.parametrize(
    "found, says",
    [
        (results((1, 0, 0.5, BOX)), r"Results.image must be indices in \[0, 1\); got 1"),
        (results((0, -1, 0.5, BOX)), r"Results.label must be indices in \[0, 2\); got -1"),
        (results((0, 0, np.nan, BOX)), "must be finite; got score nan"),
        (results((0, 0, 0.5, [0, 0, np.inf, 1])), "must be finite"),
        (Results(np.array([0]), np.array([0]), np.array([0.5, 0.6]), np.array([BOX])), r"image \(n,\)"),
        ([GOOD | {"image_id": 9}], "nothing fits 9"),
        ([GOOD | {"category_id": 0}], "category 3; nothing fits 0"),
        ([{"image_id": 0, "category_id": 3, "bbox": BOX}], "nothing fits 'score'"),
        (
            [Detections(torch.tensor([BOX]), torch.ones(1), torch.tensor([0]))] * 2,
            "one Detections per image of the split, 1; got 2",
        ),
    ],
)
def test_refuses(found: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        evaluate(ONE, found)


def test_refuses_unknown_options() -> None:
    with pytest.raises(DeimkitError, match=r"backend must be one of \['fast', 'pycocotools'\]; got 'slow'"):
        evaluate(ONE, NOTHING, backend="slow")
    with pytest.raises(DeimkitError, match="max_dets must be positive"):
        evaluate(ONE, NOTHING, max_dets=(0, 10))


def test_evaluator_takes_each_image_once() -> None:
    evaluator, nothing = Evaluator(ONE), Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0).long())
    evaluator.add(0, nothing)
    with pytest.raises(DataError, match="image 0 was added before"):
        evaluator.add(0, nothing)
    with pytest.raises(DataError, match=r"must be in \[0, 1\); got 1"):
        evaluator.add(1, nothing)


# --------------------------------------------------------------------------------------------------- perfection


def perfect(split: Split) -> float:
    return evaluate(split, ground_truth_as_predictions(split))["AP"]


@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_annotations_are_perfect_detections(shared: Path, name: str) -> None:
    data = Dataset.open(shared / "data" / name)
    for split in (data.train, data.val):
        assert split is not None and len(split.labels) > 100
        assert perfect(split) == pytest.approx(1, abs=1e-9)
        shifted = replace(split, labels=(split.labels + 1) % len(split.categories))
        assert evaluate(split, ground_truth_as_predictions(shifted))["AP"] < 0.1


def test_synthetic_annotations_are_perfect_detections(tmp_path: Path) -> None:
    split = Dataset.open(Synthetic(train=1, val=12, size=128).write(tmp_path / "scenes")).val
    assert split is not None and perfect(split) == pytest.approx(1, abs=1e-9)
