"""The matcher's lab and its counts: what is shown is what the library's matchers say of all queries."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deimkit import api
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.data.loader import Always, Loader
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.measure import in_classes_of
from deimkit.explore.labs import match_panels, positives
from deimkit.explore.labs.lab import Choice
from deimkit.explore.labs.match_lab import DENSE, RULES, Matched, MatchLab
from deimkit.explore.labs.match_scene import alone, in_mosaic
from deimkit.explore.layers import all_layers
from deimkit.matching import Hungarian, PositionModulated, SimOTA
from deimkit.models.detector import Detector
from deimkit.structures import Match
from tests.micro import MICRO, scenes

MATCHERS: dict[str, Any] = {
    "Hungarian": Hungarian(),
    "SimOTA": SimOTA(),
    "position-modulated": PositionModulated(),
    DENSE: Hungarian(),
}
QUERIES = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("match"), train=6, val=4)


@pytest.fixture(scope="module")
def model(data: Dataset) -> Detector:
    torch.manual_seed(1)
    return api.build(MICRO, data.categories).eval()


@pytest.fixture
def lab(model: Detector, data: Dataset) -> MatchLab:
    return MatchLab(model, data.val, 1)


def told(lab: MatchLab, **values: Any) -> Matched:
    lab.set(**values)
    found: Matched = lab.found
    return found


def without_objects(data: Dataset) -> Any:
    """The validation images with nothing annotated."""
    count = len(data.val)
    empty = {"boxes": np.empty((0, 4), np.float32), "labels": np.empty(0, np.int64), "crowd": np.empty(0, bool)}
    empty |= {"areas": np.empty(0), "annotation_ids": np.empty(0, np.int64), "starts": np.zeros(count + 1, np.int64)}
    return replace(data.val, **empty)


@pytest.mark.parametrize("rule", RULES)
def test_all_queries_are_matched_as_the_library_does(lab: MatchLab, rule: str) -> None:
    for layer in lab.layers:
        found = told(lab, rule=rule, layer=layer)
        scene = lab.mosaic if rule == DENSE else lab.alone
        match = MATCHERS[rule]([scene.outputs[layer]], scene.targets)[0]
        assert found.pairs.tolist() == torch.stack([match.target, match.query], 1).tolist()
        assert found.pairs.tolist() == found.unmoved.tolist() and not len(found.gained) and not len(found.lost)
        costs = MATCHERS[rule].costs([scene.outputs[layer]], scene.targets, torch.arange(len(scene.targets)))
        np.testing.assert_allclose(found.cost, costs.total.numpy())
        assert found.cost.shape == (len(scene.targets), QUERIES) and found.boxes.shape == (QUERIES, 4)
        assert {found.query, *found.pairs[:, 1].tolist()} <= set(found.columns.tolist())
        assert found.positives[rule] == len(found.pairs)


def test_what_the_layers_say_is_what_the_model_says(lab: MatchLab, model: Detector, data: Dataset) -> None:
    batch = next(iter(Loader(data.val.take([1]), 1, model.size).epoch())).finish()
    for output in all_layers(model, batch.images):
        torch.testing.assert_close(lab.alone.outputs[output.name].preds.boxes, output.preds.boxes)
    torch.testing.assert_close(lab.alone.targets.boxes, batch.targets.boxes)
    assert len(lab.alone.names) == len(batch.targets) and lab.alone.names[0] in data.categories.names


def test_weights_reach_the_rules_that_have_them(lab: MatchLab) -> None:
    plain = told(lab).cost.copy()
    assert not np.allclose(told(lab, l1=9.0).cost, plain)
    np.testing.assert_array_equal(told(lab, l1=5.0, candidates=3, iou=1.0).cost, plain)
    several = told(lab, rule="SimOTA", candidates=20)
    np.testing.assert_array_equal(told(lab, cls=0.0, giou=0.0).cost, several.cost)
    assert len(told(lab, candidates=1).pairs) <= len(several.pairs)
    assert len(told(lab, candidates=1).pairs) <= len(lab.alone.targets)


def test_a_box_that_leaves_loses_its_target(lab: MatchLab) -> None:
    before = told(lab, cls=0.0)
    target, query = before.pairs[0].tolist()
    found = told(lab, query=query, right=-64, down=-64)
    np.testing.assert_allclose(found.moved, (-64, -64))
    np.testing.assert_allclose(np.delete(found.boxes, query, 0), np.delete(before.boxes, query, 0))
    np.testing.assert_allclose(found.boxes[query] - found.before, -64)
    mine = found.pairs[:, 1] == query
    assert not mine.any() or found.pairs[mine, 0] != target or len(lab.alone.targets) >= QUERIES
    assert [target, query] in found.lost.tolist() or mine.any()
    assert found.unmoved.tolist() == before.pairs.tolist()
    words = lab.words(found)
    assert f"Query {query}, moved 64 px left and 64 px up" in words and "The move changed this: target" in words


def test_an_answer_on_the_very_spot_wins(model: Detector, data: Dataset) -> None:
    """A query is given a target's size; dragged onto it, by position alone, it is that target's."""
    lab = MatchLab(model, data.val, 1)
    wanted, free = lab.alone.targets.boxes, int(np.setdiff1d(np.arange(QUERIES), told(lab).pairs[:, 1])[0])
    boxes = lab.alone.outputs["final"].preds.boxes
    boxes[0, free] = torch.cat([wanted[0, :2] + 60 / 64, wanted[0, 2:]])
    found = told(lab, query=free, right=-60, down=-60, cls=0.0)
    assert [0, free] in found.pairs.tolist() and [0, free] in found.gained.tolist()
    assert found.cost[0, free] == pytest.approx(-2, abs=1e-4), "no distance, and a GIoU of 1"
    assert f"answers for target 1 ({lab.alone.names[0]}) at a cost of -2.00" in lab.words(found)


def test_a_mosaic_has_the_boxes_of_four_pictures(model: Detector, data: Dataset) -> None:
    four, parts = in_mosaic(model, data.val, 2), [alone(model, data.val, i) for i in (2, 3, 0, 1)]
    places = [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    moved = [part.targets.boxes / 2 + torch.tensor([x, y, 0, 0]) for part, (x, y) in zip(parts, places, strict=True)]
    torch.testing.assert_close(four.targets.boxes, torch.cat(moved))
    assert four.names == sum((part.names for part in parts), ()) and four.picture.shape == parts[0].picture.shape
    left = parts[0].picture.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(four.picture[:32, :32].astype(float) - left).mean() < 8, "small, but the same"


def test_drags_and_clicks_move_the_controls(lab: MatchLab) -> None:
    found = told(lab)
    x0, y0, x1, y1 = found.before
    shape = SimpleNamespace(x0=x0 + 7, x1=x1 + 7, y0=y0 - 3, y1=y1 - 3)
    assert lab.dragged([shape]) == {"right": 7, "down": -3}
    far = SimpleNamespace(x0=1e4, x1=1e4, y0=-1e4, y1=-1e4)
    assert lab.dragged([far]) == {"right": 64, "down": -64}
    centre = (found.boxes[5, :2] + found.boxes[5, 2:]) / 2
    near = np.abs((found.boxes[:, :2] + found.boxes[:, 2:]) / 2 - centre).sum(1)
    chosen = lab.clicked(match_panels.DOTS, *centre)
    assert near[chosen["query"]] < 1e-6 and chosen["right"] == chosen["down"] == 0
    assert lab.clicked(match_panels.CELLS, 2, 0)["query"] == found.columns[2]
    assert lab.clicked("targets", 1, 1) == {}


@pytest.mark.parametrize("rule", RULES)
def test_what_is_drawn_is_what_was_found(lab: MatchLab, rule: str) -> None:
    found = told(lab, rule=rule, right=5)
    figure = lab.figure()
    traces = {trace.name: trace for trace in figure.data}
    assert [trace.name for trace in figure.data] == [trace.name for trace in lab.set(right=0).figure().data]
    heat = traces[match_panels.CELLS]
    shown = np.array(heat.z, float)
    expected = np.where(found.far, np.nan, found.cost)[:, found.columns]
    np.testing.assert_allclose(shown, expected, atol=6e-4)
    json.dumps(heat.z, allow_nan=False)
    marks = traces[match_panels.MARKS]
    pairs = [[int(t), int(found.columns[int(c)])] for c, t in zip(marks.x, marks.y, strict=True)]
    assert pairs == found.pairs.tolist()
    assert len(traces[match_panels.DOTS].x) == QUERIES and len(traces["for which target"].x) == 3 * len(found.pairs)
    shape = figure.layout.shapes[0]
    np.testing.assert_allclose([shape.x0, shape.y0, shape.x1, shape.y1], found.boxes[found.query])
    assert shape.editable and len(figure.layout.shapes) == 1
    assert list(traces["positives"].x) == list(found.positives.values())


def test_every_control_works_at_both_ends(lab: MatchLab) -> None:
    start = dict(lab.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in RULES:
            for control in lab.controls():
                ends = control.options if isinstance(control, Choice) else (control.low, control.high)
                for value in ends:
                    lab.set(**start | {"rule": rule, "right": 9} | {control.name: value})
                    lab.figure()
                    assert "queries answer for" in lab.words(lab.found)
    assert (
        lab.set(
            **start,
        )
        .still()["text/html"]
        .count("data:image/png")
        == 1
    )


def test_nothing_to_find_is_no_trouble(model: Detector, data: Dataset) -> None:
    lab = MatchLab(model, without_objects(data))
    for rule in RULES:
        found = told(lab, rule=rule, right=3)
        assert not len(found.pairs) and found.positives[rule] == 0
        assert "0 of 20 queries answer for 0 of 0 targets" in lab.words(found) and "Nothing changed" in lab.words(found)
        assert len(lab.figure().data) > 5
    assert "data:image/png" in lab.still()["text/html"]


def test_an_image_that_is_not_there_is_named(model: Detector, data: Dataset) -> None:
    with pytest.raises(DataError, match="val has the images 0 to 3; got 4"):
        MatchLab(model, data.val, 4)


# ------------------------------------------------------------------------------------------------------ a dataset


def test_positives_are_counted_image_by_image(model: Detector, data: Dataset) -> None:
    counts = positives.positives_per_image(model, data.val, batch=3)
    for i in range(len(data.val)):
        seen = alone(model, data.val, i)
        assert counts["targets"][i] == len(seen.targets)
        assert counts["Hungarian"][i] == min(len(seen.targets), QUERIES)
        assert counts["SimOTA"][i] == len(SimOTA()([seen.outputs["final"]], seen.targets)[0].query)
    nothing = positives.positives_per_image(model, without_objects(data))
    assert all(not values.any() and len(values) == 4 for values in nothing.values())


def test_positives_of_training_are_those_of_the_loaders_images(model: Detector, data: Dataset) -> None:
    only = {"Hungarian": Hungarian()}
    counts = positives.positives_per_image(model, data.train, only, MICRO.augment, "dense", seed=3, batch=2)
    loader = Loader(data.train, 2, model.size, MICRO.augment, Always("dense"), 3, shuffle=False)
    targets = [torch.bincount(batch.targets.image, minlength=2) for batch in loader.epoch()]
    assert counts["targets"].tolist() == torch.cat(targets).tolist()
    assert counts["Hungarian"].tolist() == counts["targets"].clip(max=QUERIES).tolist()


def test_the_unstable_score_by_hand(model: Detector, data: Dataset) -> None:
    told_by = positives.unstable(model, data.val, Hungarian(), batch=3)
    layers = ["proposals", *told_by]
    assert layers == ["proposals", "layer0", "final"]
    changed, all_targets = np.zeros(2), 0
    for i in range(len(data.val)):
        seen = alone(model, data.val, i)
        who = np.full((3, len(seen.targets)), -1)
        for row, match in zip(who, Hungarian()([seen.outputs[name] for name in layers], seen.targets), strict=True):
            row[match.target] = match.query
        changed += (who[1:] != who[:-1]).sum(1)
        all_targets += int(((who >= 0).any(0)).sum())
    np.testing.assert_allclose(list(told_by.values()), changed / all_targets, atol=0.03)


def test_ratios_leave_out_images_without_positives() -> None:
    np.testing.assert_allclose(positives.ratios(np.array([6, 0, 5]), np.array([2, 0, 5])), [3, 1])


def test_the_figures_hold_every_image() -> None:
    one, many = np.array([3, 4, 9, 12]), np.array([10, 11, 30, 41])
    drawn = positives.draw_distribution({"one": one, "many": many})
    for trace, values in zip(drawn.data, (one, many), strict=True):
        assert sum(trace.y[:-1]) == 4 and f"{values.mean():.1f} on average" in trace.name
        inside = [np.sum((values >= low) & (values < low + 5)) for low in trace.x[:-1]]
        assert list(trace.y[:-1]) == inside
    bars, *lines = positives.draw_ratios(positives.ratios(many, one), claim=10).data
    assert sum(bars.y) == 4 and [line.x[0] for line in lines] == [1.0, pytest.approx(np.mean(many / one)), 10]
    assert len(positives.draw_ratios(np.empty(0), claim=10).data) == 4


def test_who_changes_is_asked_of_one_to_one_matchers_and_of_boxes_alone(model: Detector, data: Dataset) -> None:
    with pytest.raises(DeimkitError, match="one query at most; got SimOTA"):
        positives.unstable(model, data.val, CrowdOfTwo())
    with pytest.raises(DeimkitError, match="has no objects"):
        positives.unstable(model, data.val.take([]), Hungarian())


class CrowdOfTwo(SimOTA):
    """Gives the first target two queries, whatever they say."""

    def __call__(self, outputs: Any, targets: Any) -> list[Match]:
        two = torch.zeros(2, dtype=torch.long)
        return [Match(two, torch.arange(2), two) for _ in outputs]

    def __repr__(self) -> str:
        return "SimOTA of two"


def reordered(split: Split, order: list[int]) -> Split:
    """The same annotations, in a dataset that lists the first classes in another order."""
    full = [*order, *range(len(order), len(split.categories))]
    categories = CategoryMap.of([split.categories.names[k] for k in full])
    return replace(split, labels=np.argsort(full)[split.labels], categories=categories)


def test_classes_are_those_of_the_same_name(model: Detector, data: Dataset) -> None:
    other = reordered(data.val, [2, 0, 1])
    assert not np.array_equal(other.labels, data.val.labels)
    labs = [MatchLab(model, split, 1) for split in (data.val, other)]
    assert labs[0].words(labs[0].found) == labs[1].words(labs[1].found)
    np.testing.assert_array_equal(labs[0].found.cost, labs[1].found.cost)
    assert labs[0].alone.names == labs[1].alone.names
    for ask in (positives.positives_per_image, partial(positives.unstable, matcher=Hungarian())):
        assert str(ask(model, data.val)) == str(ask(model, other))


def test_objects_that_the_model_does_not_know_are_named(model: Detector, data: Dataset) -> None:
    names = list(data.val.categories.names)
    label = int(data.val.labels[0])
    strange = replace(data.val, categories=CategoryMap.of([*names[:label], "walrus", *names[label + 1 :]]))
    expected = "val has objects whose class the detector does not know: walrus. Take"
    unstable = partial(positives.unstable, matcher=Hungarian())
    for ask in (partial(MatchLab, image=1), positives.positives_per_image, unstable):
        with pytest.raises(DataError, match=expected):
            ask(model, strange)
    empty = replace(without_objects(data), categories=strange.categories)
    assert in_classes_of(model.categories, empty).categories == model.categories, (
        "a class that is not there does no harm"
    )


def test_another_query_begins_at_its_own_place(lab: MatchLab) -> None:
    lab.set(right=10, down=-4)
    lab.set(query=(lab.first + 1) % QUERIES)
    assert (lab.values["right"], lab.values["down"]) == (0, 0)
    lab.set(query=(lab.first + 2) % QUERIES, right=7)
    assert (lab.values["right"], lab.values["down"]) == (7, 0), "unless it is said"
