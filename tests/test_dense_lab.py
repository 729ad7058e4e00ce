"""Dense O2O counted, timed and shown: every box has its source picture, and the numbers are the loader's own."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deimkit import recipes
from deimkit.data.augment import Augment
from deimkit.data.dataset import Dataset
from deimkit.data.loader import Always, Assembler, Loader, Pictures, Task
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DataError, DeimkitError
from deimkit.explore.labs import dense_figures as figures
from deimkit.explore.labs.dense import (
    SIZE,
    Cache,
    boxes_per_picture,
    cache_of,
    costs,
    expected_targets,
    shares,
    targets_per_image,
)
from deimkit.explore.labs.dense_lab import DenseLab, Mixed
from deimkit.explore.labs.lab import Choice
from deimkit.structures import Batch, Targets
from tests.scenes import split_of

BOXES = [[4, 4, 20, 20], [30, 10, 60, 40], [10, 24, 28, 44]]
LOSSLESS = Augment(rotation=0, translation=0, scale=(1, 1), photometric=0, zoom_out=0, iou_crop=0)


def dataset(folder: Path, boxes: list[list[list[int]]]) -> Dataset:
    """Noisy pictures of 64 x 48 pixels, each with the boxes of its list; classes alternate."""
    rng, paths = np.random.default_rng(0), []
    for i in range(len(boxes)):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(paths[-1])
    labels = [[(i + j) % 2 for j in range(len(mine))] for i, mine in enumerate(boxes)]
    split = replace(split_of(boxes, labels), paths=paths, sizes=np.tile([48, 64], (len(boxes), 1)))
    return Dataset("noise", str(folder), folder, split.categories, split)


@pytest.fixture
def lab(tmp_path: Path) -> DenseLab:
    """Five pictures with three boxes each, and one with none."""
    return DenseLab(dataset(tmp_path, [BOXES] * 5 + [[]]), size=64)


def told(lab: DenseLab, **values: Any) -> Mixed:
    lab.set(**values)
    found: Mixed = lab.found
    return found


# ----------------------------------------------------------------------------------------------------- the lab


@pytest.mark.parametrize("stage", ["warm", "dense", "augment", "clean"])
def test_it_shows_what_the_loader_makes_label_for_label(lab: DenseLab, stage: str) -> None:
    """The same task with real labels gives the same boxes, the same classes and the same pixels."""
    kinds = set()
    for seed in range(12):
        found = told(lab, stage=stage, seed=seed, picture=seed % 6, weight=0.3)
        other = [origin.picture for origin in found.origins if origin.blended][:1]
        task = Task(0, stage, [seed % 6, *other], found.weight)
        augment = replace(lab.augment, mosaic=0.5, mixup=0.5)
        parts: Any = Assembler(Pictures(lab.pictures.split, 0), (64, 64), augment, seed)[task]
        mine = parts["image"] == 0
        centre, half = parts["boxes"][mine, :2], parts["boxes"][mine, 2:] / 2
        np.testing.assert_allclose(found.boxes, np.concatenate([centre - half, centre + half], 1), atol=1e-6)
        np.testing.assert_array_equal(found.labels, parts["labels"][mine])
        targets = Targets(parts["image"], parts["labels"], parts["boxes"])
        finished = Batch(parts["images"], targets, mix=found.weight).finish()
        np.testing.assert_allclose(found.image, 255 * finished.images[0].permute(1, 2, 0), atol=0.51)
        kinds.add((found.origins[0].tiled, found.weight))
    assert len(kinds) > (3 if stage == "dense" else 0) and (stage == "dense" or kinds == {(False, None)})


def test_a_blend_is_the_weighted_sum_of_two_images(lab: DenseLab) -> None:
    found = told(lab, mosaic=1.0, mixup=1.0, weight=0.25, seed=4)
    own, other = found.origins[0].picture, found.origins[4].picture
    assembler = Assembler(Pictures(lab.pictures.split, 0), (64, 64), replace(lab.augment, mosaic=1.0), 4)
    a, b = (assembler[Task(0, "dense", [i])]["images"][0].permute(1, 2, 0).numpy() for i in (own, other))  # type: ignore[index]
    np.testing.assert_allclose(found.image, 0.25 * a + 0.75 * b, atol=0.51)


def test_what_is_put_in_either_arrives_or_is_lost(lab: DenseLab) -> None:
    lost = border = 0
    for seed in range(20):
        found = told(lab, mosaic=1.0, mixup=1.0, seed=seed)
        assert len(found.origins) == 8 and [o.place for o in found.origins] == [0, 1, 2, 3] * 2
        assert [o.blended for o in found.origins] == [False] * 4 + [True] * 4
        assert found.put_in == sum(len(o.boxes) for o in found.origins)
        assert sorted([*found.numbers, *found.lost]) == list(range(found.put_in))
        assert sum(found.arrived(o).sum() for o in found.origins) == len(found.numbers) == len(found.boxes)
        for origin in found.origins:
            assert len(origin.boxes) == (0 if origin.picture == 5 else 3)
        lost, border = lost + len(found.lost), border + found.at_border
    assert lost > 10 and border > 20


def test_without_anything_the_picture_is_itself(lab: DenseLab) -> None:
    found = told(lab, stage="clean", picture=2)
    assert (found.put_in, found.alone, found.weight, len(found.lost), found.at_border) == (3, 3, None, 0, 0)
    straight = np.array(BOXES) / [64, 48, 64, 48]
    flipped = np.stack([1 - straight[:, 2], straight[:, 1], 1 - straight[:, 0], straight[:, 3]], 1)
    assert any(np.allclose(found.boxes, boxes, atol=1e-6) for boxes in (straight, flipped))
    assert found.expected == found.mean == 2.5, "five times three boxes, and once none"


def test_an_empty_picture_mixes_with_others(lab: DenseLab) -> None:
    found = told(lab, picture=5, mosaic=0.0, mixup=1.0, seed=3)
    assert (found.alone, found.put_in) == (0, 3) and all(found.numbers < 3)
    assert "Picture 5 alone has 0 boxes. Here it is no mosaic, and picture" in lab.words(found)
    assert "of 3 boxes put in" in lab.words(found)


@pytest.mark.parametrize("boxes", [[[]], [[], []], [BOXES]], ids=["one empty", "two empty", "one"])
def test_tiny_datasets(tmp_path: Path, boxes: list[list[list[int]]]) -> None:
    lab = DenseLab(dataset(tmp_path, boxes), size=32)
    found = told(lab, mosaic=1.0, mixup=1.0)
    assert (found.weight is None) == (len(boxes) == 1), "MixUp needs a neighbour"
    assert found.put_in == (12 if boxes == [BOXES] else 0)
    assert len(lab.figure().data) == 26 and lab.words(found)


def test_every_control_at_both_ends_draws_the_same_traces_without_a_warning(lab: DenseLab) -> None:
    kinds = [(trace.type, trace.name) for trace in lab.figure().data]
    assert len(kinds) == 26
    for control in lab.controls():
        ends = control.options if isinstance(control, Choice) else (control.low, control.high)
        for end in ends:
            lab.set(**{one.name: one.value for one in lab.controls()} | {control.name: end})
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                figure = lab.figure()
            assert [(trace.type, trace.name) for trace in figure.data] == kinds
            assert len(figure.layout.images) == len(lab.found.origins) + 1


def test_the_figure_shows_what_was_computed(lab: DenseLab) -> None:
    found = told(lab, mosaic=1.0, mixup=1.0, seed=1)
    figure = lab.figure()
    by_axis = {axis: {t.name: t for t in figure.data if t.xaxis == axis} for axis in ("x", "x2", "x3", "x4")}
    for i, origin in enumerate(found.origins):
        mine = found.boxes[found.arrived(origin)]
        line = by_axis["x2"]["abcdefgh"[i]]
        np.testing.assert_allclose(np.reshape(line.x, (-1, 6))[:, [0, 1]], mine[:, [0, 2]])
        np.testing.assert_allclose(np.reshape(line.y, (-1, 6))[:, [0, 2]], mine[:, [1, 3]])
        assert line.line.dash == ("dot" if origin.blended else "solid")
    numbers = by_axis["x2"]["numbers"].text
    assert sorted(int(n) - 1 for n in numbers) == sorted(found.numbers)
    sheet = by_axis["x"]["numbers"]
    white = {int(n) - 1 for n, tint in zip(sheet.text, sheet.marker.color, strict=True) if tint == "#FFFFFF"}
    assert white == set(found.lost.tolist()) and len(sheet.text) == found.put_in
    assert sum(by_axis["x3"]["put in"].y) == found.put_in and sum(by_axis["x3"]["arrived"].y) == len(found.numbers)
    assert by_axis["x4"]["these odds"].y[0] == pytest.approx(8 * 2.5)


def test_the_still_picture_and_its_words(lab: DenseLab) -> None:
    found = told(lab, mosaic=1.0, mixup=0.0, seed=2, picture=1)
    html = lab.still()["text/html"]
    assert "data:image/png;base64," in html and "Picture 1 alone has 3 boxes. Here it is a mosaic of four" in html
    assert f"of {found.put_in} boxes put in, {len(found.numbers)} arrived" in html
    assert "put 10.0 boxes into an image, 4.00 times what a picture has." in html


def test_what_cannot_be_mixed_is_refused(lab: DenseLab, tmp_path: Path) -> None:
    nothing = Dataset("nothing", "", tmp_path, lab.pictures.split.categories)
    with pytest.raises(DataError, match="mixes training pictures"):
        DenseLab(nothing)
    with pytest.raises(DeimkitError, match=re.escape("picture is a whole number from 0 to 5; got 6.")):
        lab.set(picture=6)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png"):
        told(lab, picture=1)


# ----------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "mean, mosaic, mixup, kept, expected",
    [
        (7.0, 0.0, 0.0, (1, 1), 7.0),
        (7.0, 1.0, 0.0, (1, 1), 28.0),
        (7.0, 0.0, 1.0, (1, 1), 14.0),
        (7.0, 1.0, 1.0, (1, 1), 56.0),
        (8.0, 0.5, 0.5, (1, 1), 30.0),  # 8 x 2.5 x 1.5
        (8.0, 0.5, 0.5, (0.5, 0.75), 21.0),  # 8 x (0.5 x 0.5 + 4 x 0.5 x 0.75) x 1.5
        (0.0, 1.0, 1.0, (1, 1), 0.0),
    ],
)
def test_expected_targets_by_hand(
    mean: float, mosaic: float, mixup: float, kept: tuple[float, float], expected: float
) -> None:
    assert expected_targets(mean, mosaic, mixup, *kept) == pytest.approx(expected)


@pytest.mark.parametrize("mosaic, mixup, times", [(0, 0, 1), (1, 0, 4), (0, 1, 2), (1, 1, 8)])
def test_where_nothing_is_lost_the_law_is_exact(tmp_path: Path, mosaic: int, mixup: int, times: int) -> None:
    split = dataset(tmp_path, [BOXES] * 4).train
    assert split is not None and boxes_per_picture(split).tolist() == [3] * 4
    counts = targets_per_image(split, replace(LOSSLESS, mosaic=mosaic, mixup=mixup), size=320)
    assert counts.tolist() == [3 * times] * 4
    assert expected_targets(3, mosaic, mixup) == 3 * times


def test_measured_counts_follow_the_law_with_its_losses(tmp_path: Path) -> None:
    split = dataset(tmp_path, [BOXES, BOXES[:1], [], BOXES[1:]]).train
    assert split is not None
    mean = boxes_per_picture(split).mean()
    assert mean == 1.5

    def measured(mosaic: float, mixup: float) -> Any:
        return targets_per_image(split, Augment(mosaic=mosaic, mixup=mixup), size=64, epochs=60)

    kept = shares((measured(0, 0), measured(1, 0)), mean)
    assert 0.6 < kept[0] < 1 and 0.6 < kept[1] < 1
    for mosaic, mixup in ((0, 1), (0.5, 0.5), (1, 1)):
        counts = measured(mosaic, mixup)
        spread = 4 * counts.std() / np.sqrt(len(counts) / 2)  # MixUp counts every image twice
        assert counts.mean() == pytest.approx(expected_targets(mean, mosaic, mixup, *kept), abs=spread)


def test_crowds_and_boxes_without_area_are_no_targets(tmp_path: Path) -> None:
    split = dataset(tmp_path, [BOXES, BOXES]).train
    assert split is not None
    boxes = split.boxes.copy()
    boxes[4, 2] = boxes[4, 0]
    changed = replace(split, boxes=boxes, crowd=np.arange(6) == 0)
    assert boxes_per_picture(changed).tolist() == [2, 2]
    assert targets_per_image(changed, LOSSLESS, "clean", 64).tolist() == [2, 2]


def test_costs_name_every_transform_and_start_from_plain(tmp_path: Path) -> None:
    split = dataset(tmp_path, [BOXES] * 2).train
    assert split is not None
    found = costs(split, size=64, images=2, repeats=2)
    names = [cost.name for cost in found]
    assert names[0] == "flip and resize" and {"colour", "zoom-out", "IoU crop", "MixUp", "mosaic"} < set(names)
    assert found[0].ratio == 1 and all(cost.seconds > 0 and cost.ratio > 0 for cost in found)
    assert len(figures.draw_costs(found).patches) == len(found) == 10


def test_the_cache_says_how_full_it_is(tmp_path: Path) -> None:
    split, one = dataset(tmp_path, [BOXES] * 4).train, 48 * 64 * 3
    assert split is not None
    loader = Loader(split, 2, 64, LOSSLESS, Always("clean"), cache_bytes=2 * one + 100)
    assert cache_of(loader.assembler.pictures) == Cache(2 * one + 100, 0, 4 * one, 0)
    assert len(list(loader.epoch(0))) == 2
    full = cache_of(loader.assembler.pictures)
    assert full == Cache(2 * one + 100, 2 * one, 4 * one, 2)
    assert figures.draw_caches({"small": full}).texts[0].get_text() == "0 MiB, 2 pictures"


# ----------------------------------------------------------------------------------------------------- pictures


def test_claims_are_the_papers_tables() -> None:
    twelve, twenty_four, objects = figures.draw_claims().axes
    assert [bar.get_height() for bar in twelve.patches] == [49.6, 50.4, 50.1, 50.4]
    assert [bar.get_height() for bar in twenty_four.patches] == [51.7, 51.9, 51.5, 52.5]
    np.testing.assert_array_equal(objects.lines[0].get_xydata(), [[10, 51.7], [25, 52.5], [50, 52.2]])


def test_the_law_is_drawn_with_what_was_measured() -> None:
    ax = figures.draw_law(8.0, {(0.5, 0.5): 21.5, (1.0, 1.0): 50.0}, (0.5, 0.75))
    marks = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert marks == [[[0.5, 21.5]], [[1.0, 50.0]]]
    stars = next(line for line in ax.lines if line.get_marker() == "*")
    assert stars.get_xydata().tolist() == [[0, 10], [0.5, 25], [1, 50]]
    dashed = [line.get_ydata()[-1] for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    np.testing.assert_allclose(dashed, [24, 36, 48])


def test_counts_are_drawn_with_their_means() -> None:
    ax = figures.draw_counts({"plain": np.array([1, 2, 3]), "both": np.array([8, 16, 24])})
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["plain: 2.0 on average", "both: 16.0 on average"]


def test_figure_5_goes_through_the_corners_of_the_papers_own() -> None:
    recipe = recipes.get("deim_rtdetrv2_r50vd")
    ax = figures.draw_figure5(recipe.timeline, recipe.optim.lr)
    curve = max(ax.lines, key=lambda line: len(line.get_xdata())).get_xydata()
    for epoch, rate in figures.FIGURE5.items():
        if rate is not None:
            assert np.interp(epoch, *curve.T) == pytest.approx(rate, rel=1e-4)
    assert curve[0, 1] < 1e-6 and ax.get_xticks().tolist() == [0, 4, 34, 58, 60]
    bands = {text.get_text() for text in ax.get_legend().get_texts()}  # type: ignore[union-attr]
    assert {"DataAug warm-up", "Dense O2O", "Default DataAug", "Closed DataAug"} < bands


def test_coco128_has_about_as_many_targets_as_table_12_says(shared: Path) -> None:
    """DEIM: about 25 with the default odds. Both counts are small samples, so a fifth either way is close."""
    split = Dataset.open(shared / "data" / "coco128").train
    assert split is not None
    counts = targets_per_image(split, Augment(), size=128)
    assert boxes_per_picture(split).mean() == pytest.approx(7.26, abs=0.01)
    assert counts.mean() == pytest.approx(25, rel=0.2) and SIZE == (640, 640)


def test_a_background_picture_can_be_looked_at(tmp_path: Path) -> None:
    data = Dataset.open(Synthetic(train=2, val=1, size=64).write(tmp_path / "scenes"))
    assert data.train is not None
    bare = replace(data.train, crowd=np.ones_like(data.train.crowd))
    lab = DenseLab(replace(data, train=bare), size=64).set(picture=0, stage="clean")
    assert "image/png" in lab.still()["text/html"] and lab.found.put_in == 0


def test_the_most_crowded_image_is_drawn_too() -> None:
    ax = figures.draw_counts({"a": np.array([10] * 99 + [330])})
    steps = ax.patches[0].get_data()
    assert steps.values.sum() == pytest.approx(100) and steps.edges[-1] > 330
