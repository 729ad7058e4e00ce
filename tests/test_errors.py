"""Where a detector fails: verdicts and costs by hand, against a slow matching, and in agreement with COCO's AP50."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from deimkit import recipes
from deimkit.__main__ import main
from deimkit.data.dataset import CategoryMap, Dataset
from deimkit.data.split import Split
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import Results, curves, evaluate, ground_truth_as_predictions
from deimkit.evaluation.errors import Errors, errors
from deimkit.evaluation.verdicts import VERDICTS
from deimkit.structures import Detections
from tests.micro import MICRO, scenes
from tests.scenes import random_results, random_split, split_of
from tests.test_report import Page, read

NOTHING = Results.concat([])
KINDS = ["class", "location", "both", "duplicate", "background", "missed", "false positives", "false negatives"]
BOX, FAR = [0.0, 0, 100, 100], [300.0, 300, 400, 400]
CAT, DOG = 0, 1


def part(percent: float, box: list[float] = BOX) -> list[float]:
    """The upper part of a box: its IoU with it is that many percent."""
    return [*box[:3], box[1] + (box[3] - box[1]) * percent / 100]


def results(*rows: tuple[int, int, float, list[float]]) -> Results:
    """Packed detections from (image, label, score, xyxy) rows."""
    image, label, score, boxes = zip(*rows, strict=True)
    return Results(np.array(image), np.array(label), np.array(score), np.array(boxes))


def said(found: Errors) -> list[str]:
    """The verdicts in words."""
    return [VERDICTS[v] for v in found.verdict]


# ----------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "label, percent, verdict",
    [
        (CAT, 100, "right"),
        (CAT, 50, "right"),
        (CAT, 49, "location"),
        (CAT, 10, "location"),
        (CAT, 9, "background"),
        (DOG, 100, "class"),
        (DOG, 50, "class"),
        (DOG, 49, "both"),
        (DOG, 10, "both"),
        (DOG, 9, "background"),
    ],
)
def test_one_cat_and_one_detection(label: int, percent: float, verdict: str) -> None:
    found = errors(split_of([[BOX]], [[CAT]]), results((0, label, 0.5, part(percent))))
    assert said(found) == [verdict]
    assert found.target.tolist() == [-1 if verdict == "background" else 0]
    assert_allclose(found.overlap, [0 if verdict == "background" else percent / 100], rtol=1e-6)
    assert found.found.tolist() == [0 if verdict == "right" else -1]
    assert found.missed().tolist() == [verdict != "right"]
    assert found.overlooked().tolist() == [verdict in ("both", "background")]


@pytest.mark.parametrize(
    "truth, labels, rows, verdicts, targets",
    [
        # the better detection finds the object, whichever of the two overlaps it more
        ([BOX], [CAT], [(CAT, 0.9, part(60)), (CAT, 0.8, BOX)], ["right", "duplicate"], [0, 0]),
        # equal scores: the first one has it
        ([BOX], [CAT], [(CAT, 0.9, part(60)), (CAT, 0.9, BOX)], ["right", "duplicate"], [0, 0]),
        # the object that fits best is taken, so the second detection takes what is left
        ([BOX, part(80)], [CAT, CAT], [(CAT, 0.9, BOX), (CAT, 0.8, BOX)], ["right", "right"], [0, 1]),
        # of two equal objects COCO takes the last
        ([BOX, BOX], [CAT, CAT], [(CAT, 0.9, BOX), (CAT, 0.8, BOX)], ["right", "right"], [1, 0]),
        # a covered dog says more than a cat that is grazed
        ([part(20), BOX], [CAT, DOG], [(CAT, 0.9, BOX)], ["class"], [1]),
        # nothing is covered: the own class comes first
        ([part(20), part(40)], [CAT, DOG], [(CAT, 0.9, BOX)], ["location"], [0]),
        # a cat and a dog are covered, the cat is taken: the one that is covered best decides, in a tie the own class
        ([BOX, part(60)], [CAT, DOG], [(CAT, 0.9, BOX), (CAT, 0.8, BOX)], ["right", "duplicate"], [0, 0]),
        ([part(60), BOX], [CAT, DOG], [(CAT, 0.9, BOX), (CAT, 0.8, BOX)], ["right", "class"], [0, 1]),
        ([BOX, BOX], [CAT, DOG], [(CAT, 0.9, BOX), (CAT, 0.8, BOX)], ["right", "duplicate"], [0, 0]),
        # another place of the image is another object
        ([BOX, FAR], [CAT, CAT], [(CAT, 0.9, BOX), (CAT, 0.8, part(30, FAR))], ["right", "location"], [0, 1]),
    ],
)
def test_who_is_about_what(truth: Any, labels: Any, rows: Any, verdicts: list[str], targets: list[int]) -> None:
    found = errors(split_of([truth], [labels]), results(*((0, *row) for row in rows)))
    assert said(found) == verdicts and found.target.tolist() == targets


def test_crowds_excuse_their_own_class_only() -> None:
    region = [200.0, 0, 640, 640]
    split = split_of([[BOX, region]], [[CAT, CAT]], crowd=[[False, True]])
    inside, half = [210.0, 10, 240, 40], [190.0, 0, 210, 100]
    found = errors(
        split, results((0, CAT, 0.9, inside), (0, CAT, 0.8, half), (0, DOG, 0.7, inside), (0, CAT, 0.6, BOX))
    )
    assert said(found) == ["ignored", "ignored", "background", "right"]
    assert found.target.tolist() == [1, 1, -1, 0]
    assert_allclose(found.overlap, [1, 0.5, 0, 1])  # of a crowd it is the part of the detection that lies in it
    assert found.found.tolist() == [3, -1] and found.missed().tolist() == [False, False]
    assert found.confusion().tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert [row["annotated"] for row in found.by_crowding()] == [1, 0, 0, 0]


def test_rows_stand_image_by_image_and_best_first() -> None:
    split = split_of([[BOX], [BOX], []], [[CAT], [CAT], []])
    rows = [(1, CAT, 0.1, BOX), (0, CAT, 0.3, FAR), (1, CAT, 0.9, part(40)), (0, DOG, 0.4, BOX), (0, CAT, 0.35, BOX)]
    found = errors(split, results(*rows), max_dets=1)
    assert found.results.image.tolist() == [0, 0, 1] and found.results.score.tolist() == [0.4, 0.35, 0.9]
    assert said(found) == ["class", "right", "location"] and found.found.tolist() == [1, -1]
    assert errors(split, results(*rows)).found.tolist() == [1, 4]


def test_missed_depends_on_the_score() -> None:
    found = errors(split_of([[BOX, FAR]], [[CAT, CAT]]), results((0, CAT, 0.6, BOX), (0, CAT, 0.3, part(30, FAR))))
    assert found.missed(0.6).tolist() == [False, True] and found.missed(0.61).tolist() == [True, True]
    assert not found.overlooked().any() and found.overlooked(0.4).tolist() == [False, True]
    assert found.counts(0.5) == dict.fromkeys(VERDICTS, 0) | {"right": 1}


def slow_matching(split: Split, results: Results, iou: float) -> list[int]:
    """Row of the object each detection finds, -1 for none, -2 if it is excused: COCO's rules, one by one."""

    def overlap(box: Any, k: int) -> float:
        low, high = np.maximum(box[:2], split.boxes[k, :2]), np.minimum(box[2:], split.boxes[k, 2:].astype(float))
        inter = float(np.maximum(high - low, 0).prod())
        area, other = ((b[2:] - b[:2]).prod() for b in (box, split.boxes[k].astype(float)))
        return inter / (area if split.crowd[k] else area + other - inter) if inter else 0.0

    free, answer = np.ones(len(split.labels), bool), []
    for image, label, _, box in zip(*results, strict=True):
        rows = range(len(split.labels))[split.rows(int(image))]
        near = [(overlap(box, k), k) for k in rows if split.labels[k] == label]
        open_ = [pair for pair in near if pair[0] >= iou and free[pair[1]] and not split.crowd[pair[1]]]
        crowds = [pair for pair in near if pair[0] >= iou and split.crowd[pair[1]]]
        answer.append(max(open_)[1] if open_ else -2 if crowds else -1)
        if open_:
            free[answer[-1]] = False
    return answer


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_the_slow_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, iou = (40 if seed % 2 else 0), (0.5, 0.75)[seed // 3]
    split = random_split(rng, 12, 4, 8, grid=grid)
    found = errors(split, random_results(rng, split, 10, ties=True, grid=grid), iou=iou)
    expected = np.array(slow_matching(split, found.results, iou))
    right, ignored = found.verdict == VERDICTS.index("right"), found.verdict == VERDICTS.index("ignored")
    assert_array_equal(np.where(right, found.target, -1), np.maximum(expected, -1))
    assert_array_equal(ignored, expected == -2)
    assert right.sum() > 10 and ignored.sum() > 1
    rows = np.flatnonzero(found.found >= 0)
    assert_array_equal(found.target[found.found[rows]], rows)
    assert len(rows) == right.sum()
    assert len(set(said(found))) == len(VERDICTS)


# ------------------------------------------------------------------------------------------ agreement with COCO


def perturbed(split: Split, seed: int = 0) -> Results:
    """The annotations, moved, renamed, repeated and dropped, among inventions."""
    return random_results(np.random.default_rng(seed), split, 10, ties=seed % 2 == 1)


@pytest.mark.parametrize("name", ["bccd", "coco128"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ap_from_verdicts_is_cocos(shared: Path, name: str, seed: int) -> None:
    split = Dataset.open(shared / "data" / name).val
    assert split is not None
    detections = perturbed(split, seed)
    found, coco = errors(split, detections), evaluate(split, detections)
    assert 0.1 < coco["AP50"] < 0.9
    assert found.average_precision == pytest.approx(coco["AP50"], abs=1e-12)
    ap50 = [row["AP50"] for row in coco["per_class"].values()]
    assert_allclose(found.ranked.average_precision(), ap50, atol=1e-12)
    assert_allclose([row["AP50"] for row in found.per_class()], ap50, atol=1e-12)
    assert found.coco["AP"] == pytest.approx(coco["AP"], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step, iou", [(0, 0.5), (5, 0.75), (9, 0.95)])
def test_ap_from_verdicts_is_cocos_with_crowds_ties_and_limits(seed: int, step: int, iou: float) -> None:
    rng = np.random.default_rng(seed)
    split = random_split(rng, 20, 4, 10, crowded=0.2, grid=40 * (seed % 2))
    detections = random_results(rng, split, 30, ties=True, grid=40 * (seed % 2))
    for most in (100, 5):
        found = errors(split, detections, iou=iou, max_dets=most)
        precision = curves(split, detections, max_dets=(most,)).precision[step, ..., 0]
        assert found.average_precision == pytest.approx(np.nanmean(precision), abs=1e-12)


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_per_size_is_cocos(backend: str) -> None:
    rng = np.random.default_rng(3)
    split = random_split(rng, 20, 4, 10)
    detections = random_results(rng, split, 10)
    coco = evaluate(split, detections, backend)
    rows = errors(split, detections).by_size()
    assert [row["bucket"] for row in rows] == ["small", "medium", "large"]
    assert_allclose([row["AP"] for row in rows], [coco[name] for name in ("APs", "APm", "APl")], atol=1e-12)


def test_every_form_of_detections_is_understood() -> None:
    split = split_of([[BOX], [FAR]], [[CAT], [DOG]], ids=["b", "a"])
    flat = results((0, CAT, 0.9, BOX), (1, CAT, 0.5, FAR))
    listed = [
        Detections(torch.tensor([BOX]), torch.tensor([0.9]), torch.tensor([CAT])),
        Detections(torch.tensor([FAR]), torch.tensor([0.5]), torch.tensor([CAT])),
    ]
    rows = [
        {"image_id": "b", "category_id": 3, "score": 0.9, "bbox": [0, 0, 100, 100]},
        {"image_id": "a", "category_id": 3, "score": 0.5, "bbox": [300, 300, 100, 100]},
    ]
    for form in (flat, listed, rows):
        found = errors(split, form)
        assert said(found) == ["right", "class"]
        assert_array_equal(found.results.boxes, flat.boxes)
    with pytest.raises(DataError, match="image_id"):
        errors(split, [{"image_id": "c", "category_id": 3, "score": 0.9, "bbox": [0, 0, 1, 1]}])
    with pytest.raises(DataError, match="finite"):
        errors(split, results((0, CAT, math.nan, BOX)))
    with pytest.raises(DeimkitError, match="0 < background <= iou <= 1; got 0.6 and 0.5"):
        errors(split, flat, background=0.6)
    with pytest.raises(DeimkitError, match="max_dets"):
        errors(split, flat, max_dets=0)


# -------------------------------------------------------------------------------------------------------- costs

TWO = split_of([[BOX, FAR]], [[CAT, CAT]])  # two cats, and no dog in any image
HALF = 51 / 101  # AP of one cat found and the other not: precision 1 at the recalls 0, .01, ..., .50


@pytest.mark.parametrize(
    "rows, before, gains",
    [
        # the one cat is found, the other called a dog: as a cat it is found as well
        ([(CAT, 0.9, BOX), (DOG, 0.8, FAR)], HALF, {"class": 1 - HALF, "false negatives": 1 - HALF}),
        # the same for its place; a wrong place also counts against precision, but below the last hit that is free
        ([(CAT, 0.9, BOX), (CAT, 0.8, part(40, FAR))], HALF, {"location": 1 - HALF, "false negatives": 1 - HALF}),
        # missed altogether
        ([(CAT, 0.9, BOX)], HALF, {"missed": 1 - HALF, "false negatives": 1 - HALF}),
        # hit, duplicate, hit: precision 1 up to recall 0.5, then 2/3
        (
            [(CAT, 0.9, BOX), (CAT, 0.8, BOX), (CAT, 0.7, FAR)],
            (51 + 50 * 2 / 3) / 101,
            {"duplicate": 50 / 3 / 101, "false positives": 50 / 3 / 101},
        ),
        # an invention, hit, hit: precision 2/3 throughout
        (
            [(CAT, 0.9, [500, 500, 600, 600]), (CAT, 0.8, BOX), (CAT, 0.7, FAR)],
            2 / 3,
            {"background": 1 / 3, "false positives": 1 / 3},
        ),
        # two misplaced ones about the same cat: the better one is moved, the other goes
        (
            [(CAT, 0.9, part(40)), (CAT, 0.8, part(30)), (CAT, 0.7, FAR)],
            HALF / 3,
            {"location": 1 - HALF / 3, "false positives": HALF - HALF / 3, "false negatives": 1 / 3 - HALF / 3},
        ),
        # a misplaced one about a cat that is found only goes
        (
            [(CAT, 0.9, part(40)), (CAT, 0.8, BOX), (CAT, 0.7, FAR)],
            2 / 3,
            {"location": 1 / 3, "false positives": 1 / 3},
        ),
        # all right
        ([(CAT, 0.9, BOX), (CAT, 0.8, FAR)], 1, {}),
        # no detection: what was missed is all that is wrong
        ([], 0, {"missed": 1, "false negatives": 1}),
    ],
)
def test_what_a_repair_gains(rows: Any, before: float, gains: dict[str, float]) -> None:
    found = errors(TWO, results(*((0, *row) for row in rows)) if rows else NOTHING)
    assert found.average_precision == pytest.approx(before)
    assert found.costs() == pytest.approx(dict.fromkeys(KINDS, 0.0) | gains)


def test_a_wrong_class_and_place_is_only_taken_out() -> None:
    """A cat's detection that grazes a dog stands before the cat: precision 1/2 until it goes; the dog stays missed."""
    split = split_of([[BOX], [FAR]], [[CAT], [DOG]])
    found = errors(split, results((1, CAT, 0.9, part(30, FAR)), (0, CAT, 0.8, BOX)))
    assert said(found) == ["right", "both"]
    gains = {"both": 0.25, "missed": 0.5, "false positives": 0.25, "false negatives": 0.5}
    assert found.costs() == pytest.approx(dict.fromkeys(KINDS, 0.0) | gains)


@pytest.mark.parametrize("seed", range(3))
def test_repairs_never_harm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    split = random_split(rng, 15, 4, 8)
    costs = errors(split, random_results(rng, split, 10)).costs()
    assert list(costs) == KINDS and all(cost >= -1e-12 for cost in costs.values())
    assert costs["false positives"] >= max(costs[kind] for kind in ("both", "duplicate", "background")) - 1e-12
    assert costs["false negatives"] >= costs["missed"] - 1e-12


# ---------------------------------------------------------------------------------------------------- breakdown


def test_best_threshold_by_hand() -> None:
    """Hit, invention, hit, invention: F1 is 2/3, 1/2, 4/5, 2/3."""
    rows = [(0.9, BOX), (0.8, [500, 500, 600, 600]), (0.7, FAR), (0.6, [550, 0, 600, 50])]
    found = errors(TWO, results(*((0, CAT, *row) for row in rows)))
    recall, precision, score = found.precision_recall(CAT)
    assert_allclose(recall, [0.5, 0.5, 1, 1])
    assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2])
    assert score.tolist() == [0.9, 0.8, 0.7, 0.6] and found.best_threshold() == 0.7
    cat, dog = found.per_class()
    assert cat == pytest.approx(
        {"name": "cat", "AP": cat["AP"], "AP50": (51 + 50 * 2 / 3) / 101, "count": 2}
        | {"threshold": 0.7, "precision": 2 / 3, "recall": 1, "F1": 0.8}
    )
    assert dog["count"] == 0 and all(math.isnan(dog[name]) for name in ("AP", "AP50", "threshold", "F1"))


def test_equal_scores_pass_a_threshold_together() -> None:
    """Hit and invention have the same score: F1 is that of both, 2/(2 + 2), and not the 2/3 of the hit alone."""
    found = errors(TWO, results((0, CAT, 0.9, BOX), (0, CAT, 0.9, [500, 500, 600, 600])))
    cat = found.per_class()[CAT]
    assert (cat["threshold"], cat["precision"], cat["recall"], cat["F1"]) == pytest.approx((0.9, 0.5, 0.5, 0.5))


def test_nothing_right_recommends_no_threshold() -> None:
    found = errors(TWO, results((0, CAT, 0.9, part(30))))
    cat = found.per_class()[CAT]
    assert math.isnan(cat["threshold"]) and cat["recall"] == cat["F1"] == 0
    assert found.best_threshold() == 0


def test_confusion_by_hand() -> None:
    """A dog covers a cat and takes it, so the cat's own detection has nothing; a cat is right; a dog is missed."""
    split = split_of([[BOX, FAR], [BOX]], [[CAT, CAT], [DOG]])
    rows = [(0, DOG, 0.9, BOX), (0, CAT, 0.8, BOX), (0, CAT, 0.7, FAR), (1, DOG, 0.2, BOX)]
    found = errors(split, results(*rows))
    assert found.confusion(0.5).tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert found.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found.confusion(0.95).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
    everywhere = zip(*(column.tolist() for column in found.confusions(0.5)), strict=True)
    assert sorted(everywhere) == [(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 1, 2)], "image, annotated, predicted; 2: nothing"


def test_confusion_prefers_the_own_class_where_two_fit_equally() -> None:
    split = split_of([[BOX, BOX]], [[CAT, DOG]])
    assert errors(split, results((0, CAT, 0.9, BOX), (0, DOG, 0.8, BOX))).confusion()[:2, :2].tolist() == [
        [1, 0],
        [0, 1],
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_confusion_counts_every_object_and_every_detection_once(threshold: float) -> None:
    rng = np.random.default_rng(0)
    split = random_split(rng, 20, 5, 8)
    found = errors(split, random_results(rng, split, 10))
    table = found.confusion(threshold)
    assert_array_equal(table[:-1].sum(1), np.bincount(split.labels[~split.crowd], minlength=5))
    shown = (found.results.score >= threshold) & (found.verdict != VERDICTS.index("ignored"))
    assert_array_equal(table[:, :-1].sum(0), np.bincount(found.results.label[shown], minlength=5))


def test_sizes_and_crowding_by_hand() -> None:
    """Alone and found; two that overlap by 1/3, one of them found; two by 2/3, none found; a small one, found."""
    a, b = [0.0, 0, 200, 200], [100.0, 0, 300, 200]  # IoU 100 / 300
    c, d = [0.0, 300, 250, 500], [50.0, 300, 300, 500]  # IoU 200 / 300
    alone, small = [500.0, 0, 600, 100], [500.0, 500, 520, 520]
    split = split_of([[a, b, c, d, alone, small]], [[CAT, DOG, CAT, CAT, CAT, DOG]])
    rows = [(0, CAT, 0.9, a), (0, CAT, 0.8, alone), (0, DOG, 0.7, small)]
    found = errors(split, results(*rows))
    table = [(row["bucket"], row["annotated"], row["found"]) for row in found.by_crowding()]
    assert table == [("none", 2, 2), ("<0.25", 0, 0), ("<0.5", 2, 1), ("more", 2, 0)]
    assert [row["recall"] for row in found.by_crowding()] == pytest.approx([1, math.nan, 0.5, 0], nan_ok=True)
    table = [(row["bucket"], row["annotated"], row["found"]) for row in found.by_size(0.75)]
    assert table == [("small", 1, 0), ("medium", 0, 0), ("large", 5, 2)]


def test_numbers_of_each_image() -> None:
    split = split_of([[BOX, FAR], [BOX], []], [[CAT, DOG], [CAT], []])
    rows = [(0, CAT, 0.9, BOX), (0, DOG, 0.4, FAR), (1, CAT, 0.8, part(30)), (1, CAT, 0.7, BOX), (2, CAT, 0.6, BOX)]
    numbers = errors(split, results(*rows)).per_image(0.5)
    assert_allclose(numbers["AP"], [1, 0.5, np.nan])
    assert numbers["right"].tolist() == [1, 1, 0]
    assert numbers["wrong"].tolist() == [0, 1, 1]
    assert numbers["missed"].tolist() == [1, 0, 0]


def test_ap_of_an_image_is_that_of_a_split_of_it_alone() -> None:
    rng = np.random.default_rng(1)
    split = random_split(rng, 8, 4, 8)
    found = errors(split, random_results(rng, split, 10))
    for i, ap in enumerate(found.per_image()["AP"]):
        mine = found.results.image == i
        alone = Results(np.zeros(mine.sum(), np.int64), *(column[mine] for column in found.results[1:]))
        assert ap == pytest.approx(evaluate(split.take([i]), alone)["AP50"], nan_ok=True)


# -------------------------------------------------------------------------------------------- nothing, and pages


@pytest.mark.parametrize("split", [TWO, split_of([], []), split_of([[], []], [[], []])], ids=["full", "none", "bare"])
def test_without_detections(split: Split, tmp_path: Path) -> None:
    found = errors(split, NOTHING)
    assert len(found.verdict) == 0 and found.missed().tolist() == [True] * len(split.labels)
    assert found.confusion().shape == (3, 3) and found.confusion().sum() == len(split.labels)
    costs = np.array(list(found.costs().values()))
    assert np.isnan(costs).all() if not len(split.labels) else costs.max() == 1
    assert json.loads(found.to_json())["objects"] == len(split.labels)
    assert "no detections" in repr(found) or "0 detections" in repr(found)
    assert "Confusion" in " ".join(read(found.page(tmp_path / "x.html")).text)


def test_detections_where_nothing_is() -> None:
    found = errors(split_of([[]], [[]]), results((0, CAT, 0.9, BOX)))
    assert said(found) == ["background"] and found.per_image()["wrong"].tolist() == [1]
    assert math.isnan(found.average_precision) and all(map(math.isnan, found.costs().values()))


def test_perfect_detections_cost_nothing() -> None:
    split = random_split(np.random.default_rng(0), 10, 4, 6)
    found = errors(split, ground_truth_as_predictions(split))
    assert set(said(found)) == {"right"} and found.average_precision == pytest.approx(1)
    assert found.costs() == pytest.approx(dict.fromkeys(KINDS, 0.0))


@pytest.fixture(scope="module")
def mixed() -> Errors:
    """Errors of every kind, in classes whose names a page has to escape."""
    rng = np.random.default_rng(0)
    split = replace(random_split(rng, 20, 4, 8), categories=CategoryMap.of(["<b>", "katze & 猫", "c", "d"]))
    return errors(split, random_results(rng, split, 10))


def test_json_says_the_same(mixed: Errors) -> None:
    again, summary = json.loads(mixed.to_json(0.25)), mixed.summary(0.25)
    assert again["costs"] == summary["costs"] == mixed.costs()
    assert again["confusion"] == mixed.confusion(0.25).tolist()
    assert again["verdicts"] == mixed.counts(0.25) and again["threshold"] == 0.25
    assert again["classes"][0] == summary["classes"][0] == mixed.per_class()[0]
    assert again["classes"][1]["AP"] is None  # no object of that class
    assert json.loads(mixed.to_json())["threshold"] == mixed.best_threshold()


@pytest.mark.parametrize("classes", [4, 40])
def test_the_page_holds_the_numbers(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    split = random_split(rng, 20, classes, 8)
    split = replace(split, categories=CategoryMap.of([f"<{k}> & 猫" for k in range(classes)]))
    found = errors(split, random_results(rng, split, 10))
    page = read(found.page(tmp_path / "new" / "errors.html", 0.25))
    words, tags = " ".join(page.text), [attributes.get("id") for attributes in page.all("section")]
    assert tags[:4] == ["accuracy", "what-errors-cost", "classes", "confusion"]
    for cost in found.costs().values():
        assert f"{100 * cost:.1f}" in words
    assert f"{100 * found.coco['AP']:.1f}" in words and f"{found.counts(0.25)['right']:,}" in words
    assert "<0> & 猫" in page.text
    plots = [
        attributes for attributes in page.all("svg") if "precision against recall" in str(attributes["aria-label"])
    ]
    assert len(plots) == min(np.count_nonzero(found.ranked.objects), 12)
    assert not list((tmp_path / "new").glob(".*"))


def test_the_page_is_read_by_a_parser_that_sees_mistakes() -> None:
    with pytest.raises(AssertionError, match="closes nothing"):
        Page("<p><b></p>")


def test_a_thousand_images_take_seconds() -> None:
    rng = np.random.default_rng(0)
    split = random_split(rng, 1000, 80, 7)
    detections = random_results(rng, split, 90)
    assert len(detections.score) > 99_000
    begin = time.perf_counter()
    errors(split, detections).to_json()
    assert time.perf_counter() - begin < 20  # some 2 s on two cores that have nothing else to do


# -------------------------------------------------------------------------------------------------- command line


def test_the_command_line_says_what_errors_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes._ALL, "micro", MICRO)
    data, weights, page = scenes(tmp_path), tmp_path / "weights.pth", tmp_path / "errors.html"
    torch.save(MICRO.build(list(data.categories.names)).state_dict(), weights)
    command = ["errors", "micro", "--weights", str(weights), "--data", data.source, "--device", "cpu"]
    assert main([*command, "--threshold", "0", "--out", str(page), "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    said, text = json.loads(printed[-1]), "\n".join(printed[:-1])
    assert list(said["costs"]) == KINDS and all(kind in text for kind in KINDS)
    assert said["objects"] == (~data.val.crowd).sum() and said["threshold"] == 0
    assert said["page"] == str(page) and f"page: {page}" in text and "Confusion" in " ".join(read(page).text)

    assert main(["eval", "micro", "--weights", str(weights), "--data", data.source, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["AP50"] == pytest.approx(said["AP50"], abs=1e-12)
    assert main([*command, "--split", "test"]) == 1 and "has no test split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--threshold", "50"])
    assert "must be in [0, 1]; got 50" in capsys.readouterr().err


def test_the_command_line_hands_its_findings_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes._ALL, "micro", MICRO)
    data, weights = scenes(tmp_path), tmp_path / "weights.pth"
    sheet, fixes = tmp_path / "sheet.html", tmp_path / "fixes.json"
    torch.save(MICRO.build(list(data.categories.names)).state_dict(), weights)
    command = ["errors", "micro", "--weights", str(weights), "--data", data.source, "--device", "cpu", "--json"]
    assert main([*command, "--threshold", "0", "--sheet", str(sheet), "--fixes", str(fixes)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["sheet"], said["fixes"]) == (str(sheet), str(fixes)) and "page" not in said
    assert "Worst images" in " ".join(read(sheet).text)
    listed = json.loads(fixes.read_text())["problems"]
    main(["doctor", data.source, "--fixes", str(fixes), "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p for p in report["problems"] if p in listed] == listed
    assert main(["doctor"]) == 1 and "Which dataset?" in capsys.readouterr().err
