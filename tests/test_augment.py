"""Boxes follow pixels, draws have the published distributions, and pixels agree with torchvision's own transforms."""

from __future__ import annotations

import colorsys
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from deimkit.data import augment as module
from deimkit.data.augment import (
    STAGES,
    Augment,
    Look,
    Placement,
    Sample,
    View,
    affine,
    fast_resize,
    iou_crop,
    mirror,
    mosaic,
    recolour,
    render,
    resize,
    sanitise,
    scales,
    to_fractions,
    to_tile,
)
from deimkit.errors import RecipeError

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)
NOTHING = np.empty((0, 4), np.float32), np.empty(0, np.int64)
PLAIN = Augment(mosaic=0, mixup=0, photometric=0, zoom_out=0, iou_crop=0, flip=0)


def painted(boxes: list[list[int]], height: int = 240, width: int = 320) -> Sample:
    """Rectangles of six pure colours on grey; the colour of a box is its label."""
    image = np.full((height, width, 3), 128, np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, COLOURS, strict=False):
        image[y1:y2, x1:x2] = colour
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(boxes)))


def where(image: np.ndarray, colour: np.ndarray) -> list[int] | None:
    """The xyxy box around the pixels of nearly that colour, or None."""
    ys, xs = np.nonzero((np.abs(image.astype(int) - colour) < 60).all(2))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with every colour in it, and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return (np.asarray(coarse) + rng.normal(0, 5, (height, width, 3))).clip(0, 255).astype(np.uint8)


class Shelf:
    """Samples at hand, as a source."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]

    def tile(self, index: int, side: int) -> Sample:
        return to_tile(self.samples[index], side)


def augmented(
    augment: Augment, stage: str, seed: int, *samples: Sample, size: tuple[int, int] = (160, 192)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image 0 of the samples after augmentation, its boxes in pixels (xyxy) and its labels."""
    out = np.full((*size, 3), 7, np.uint8)
    boxes, labels = augment.sample(Shelf(*samples), 0, stage, np.random.default_rng(seed), out)
    assert boxes.dtype == np.float32 and (boxes >= 0).all() and (boxes <= 1).all() and len(boxes) == len(labels)
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return out, np.concatenate([centre - half, centre + half], 1) * np.array([size[1], size[0]] * 2), labels


# ------------------------------------------------------------------------------------------------ published numbers


def test_defaults_are_the_published_parameters(shared: Path) -> None:
    published = json.loads((shared / "golden/data/transform_parameters.json").read_text())
    ours, colour = Augment(), published["RandomPhotometricDistort"]
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert getattr(ours, name) == tuple(colour[name])
    assert ours.photometric == colour["p"]
    assert (ours.zoom_out, ours.zoom_side) == (
        published["RandomZoomOut"]["p"],
        tuple(published["RandomZoomOut"]["side_range"]),
    )
    crop = published["RandomIoUCrop"]
    assert (ours.iou_crop, ours.overlaps, ours.crop_trials) == (crop["p"], tuple(crop["options"]), crop["trials"])
    assert ours.crop_scale == (crop["min_scale"], crop["max_scale"])
    assert ours.crop_aspect == (crop["min_aspect_ratio"], crop["max_aspect_ratio"])
    assert ours.flip == published["RandomHorizontalFlip"]["p"]
    turn = published["Mosaic"]["affine"]
    assert published["Mosaic"]["resize"]["size"] == f"[{ours.tile}]"
    assert turn["degrees"] == f"[{-ours.rotation}, {ours.rotation}]"
    assert turn["translate"] == f"[{ours.translation}, {ours.translation}]"
    assert turn["scale"] == f"[{ours.scale[0]}, {ours.scale[1]}]"


def test_scales_are_the_published_lists(shared: Path) -> None:
    golden = np.load(shared / "golden/data/pipeline.npz")
    names = [name for name in golden if name.startswith("scales/")]
    assert len(names) >= 6
    for name in names:
        base, repeat = map(int, name.removeprefix("scales/base").split("_repeat"))
        assert scales((base, base), repeat) == [(side, side) for side in golden[name].tolist()], name


@pytest.mark.parametrize("size", [(384, 640), (640, 384), (320, 960)])
def test_scales_keep_the_aspect(size: tuple[int, int]) -> None:
    sizes = scales(size, 4)
    assert sizes.count(size) >= 4 and all(h % 32 == 0 and w % 32 == 0 for h, w in sizes)
    ratios = [h / w * size[1] / size[0] for h, w in sizes]
    assert min(ratios) > 0.85 and max(ratios) < 1.15
    assert {max(s) for s in sizes} == {max(s) for s in scales((max(size), max(size)), 4)}


def test_resize_is_the_published_evaluation(shared: Path) -> None:
    golden = np.load(shared / "golden/data/pipeline.npz")
    for kind in ("down", "up", "mixed"):
        image, expected = golden[f"eval/{kind}/in_hwc_uint8"], golden[f"eval/{kind}/out_chw"]
        ours = resize(image, (64, 64)).transpose(2, 0, 1)
        assert np.array_equal(ours.astype(np.float32) / 255, expected), kind
        assert np.abs(fast_resize(image, (64, 64)).transpose(2, 0, 1) / 255 - expected).max() <= 1.01 / 255, kind


def test_clean_stage_is_the_published_tail(shared: Path) -> None:
    golden = {k: v for k, v in np.load(shared / "golden/data/pipeline.npz").items() if k.startswith("train_tail/")}
    boxes = golden["train_tail/boxes_in_xyxy"]
    sample = Sample(golden["train_tail/in_hwc_uint8"], boxes, np.array([3, 5, 9, 11]))
    out = np.empty((64, 64, 3), np.uint8)
    found, labels = PLAIN.sample(Shelf(sample), 0, "clean", np.random.default_rng(0), out)
    assert np.abs(out.transpose(2, 0, 1) / 255 - golden["train_tail/out_chw"]).max() <= 1.01 / 255
    assert np.allclose(found, golden["train_tail/boxes_out_cxcywh"], atol=1e-6)
    assert labels.tolist() == golden["train_tail/labels_out"].tolist()


# ------------------------------------------------------------------------------------------------------------ boxes


@pytest.mark.parametrize(
    "box, kept",
    [
        ([1, 2, 5, 6], [1, 2, 5, 6]),
        ([-3, -4, 5, 6], [0, 0, 5, 6]),
        ([15, 5, 25, 15], [15, 5, 20, 10]),
        ([3, 3, 4, 9], [3, 3, 4, 9]),  # exactly one pixel wide
        ([3, 3, 3.9, 9], None),
        ([19.5, 3, 25, 9], None),  # half a pixel inside
        ([30, 3, 35, 9], None),
        ([5, 5, 2, 9], None),
    ],
)
def test_sanitise(box: list[float], kept: list[float] | None) -> None:
    boxes, labels = sanitise(np.array([box], np.float32), np.array([4]), height=10, width=20)
    assert boxes.tolist() == ([] if kept is None else [kept]) and labels.tolist() == [4] * len(boxes)


def test_fractions_by_hand() -> None:
    boxes = np.array([[2, 1, 6, 9], [0, 0, 20, 10]], np.float32)
    assert np.allclose(to_fractions(boxes, 10, 20), [[0.2, 0.5, 0.2, 0.8], [0.5, 0.5, 1, 1]])
    assert to_fractions(*NOTHING[:1], 10, 20).shape == (0, 4)


@pytest.mark.parametrize(
    "name, augment, stage",
    [
        ("resize", PLAIN, "clean"),
        ("flip", replace(PLAIN, flip=1), "clean"),
        ("zoom-out", replace(PLAIN, zoom_out=1), "augment"),
        ("crop", replace(PLAIN, iou_crop=1), "augment"),
        ("all geometry", Augment(photometric=0, zoom_out=1, iou_crop=1), "augment"),
        ("mosaic", replace(PLAIN, mosaic=1, tile=80, flip=0.5), "dense"),
    ],
)
def test_boxes_follow_pixels(name: str, augment: Augment, stage: str) -> None:
    """Wherever a colour can still be seen, its box is around it; whatever vanished has no box."""
    samples = painted([[20, 30, 120, 130], [180, 40, 300, 200]]), painted([], 300, 200)
    checked = 0
    for seed in range(100):
        image, boxes, labels = augmented(augment, stage, seed, *samples)
        for label in (0, 1):
            seen, rows = where(image, COLOURS[label]), boxes[labels == label]
            if seen is None or not len(rows):
                assert stage != "clean"
                continue
            box = np.array([*rows[:, :2].min(0), *rows[:, 2:].max(0)])  # a mosaic may show a colour in several tiles
            outside = np.array([box[0] - seen[0], box[1] - seen[1], seen[2] - box[2], seen[3] - box[3]])
            assert outside.max() <= 2, (seed, label)
            # a turned box is drawn around its corners and then clipped, so it may be loose where it meets the border
            if stage != "dense" or (box[:2].min() > 0 and box[2] < 192 and box[3] < 160):
                assert outside.min() >= -2, (seed, label)
                checked += 1
    assert checked >= 60


def test_a_placement_moves_boxes_as_it_moves_pixels() -> None:
    """Where rounding to whole pixels stretches the picture a little, its boxes stretch with it."""
    image = painted([[0, 0, 37, 23]], 23, 37).image
    for seed in range(50):
        rng = np.random.default_rng(seed)
        view = module.zoom_out(View.whole(image), (1, 4), rng)
        out = np.full((64, 96, 3), 9, np.uint8)
        place = render(image, view, out)
        assert place.move(np.array([[0, 0, 37, 23]], np.float32)).tolist() == [list(map(float, where(out, COLOURS[0])))]
        assert ((out == 0).all(2) | (out == COLOURS[0]).all(2)).all()


def test_view_of_a_crop_is_crop_then_resize() -> None:
    image = noise(120, 160)
    out = np.empty((64, 64, 3), np.uint8)
    place = render(image, View(10, 20, 90, 100), out)
    assert place == Placement(View(10, 20, 90, 100), View(0, 0, 64, 64))
    assert np.array_equal(out, fast_resize(image[20:100, 10:90], (64, 64)))


def test_mirror() -> None:
    image = noise(5, 7)
    assert np.array_equal(mirror(image), image[:, ::-1])


# ------------------------------------------------------------------------------------- zoom-out, crop: distributions


def test_zoom_out_is_uniform_in_side_and_place() -> None:
    rng = np.random.default_rng(0)
    whole = View(0, 0, 400, 300)
    views = [module.zoom_out(whole, (1, 4), rng) for _ in range(4000)]
    side = np.array([v.width / 400 for v in views])
    assert abs(side.mean() - 2.5) < 0.05 and abs(side.std() - 3 / 12**0.5) < 0.03
    assert all(v.left <= 0 and v.top <= 0 and v.right >= 400 and v.bottom >= 300 for v in views)
    assert all(abs(v.width / 400 - v.height / 300) < 0.01 for v in views)
    room = np.array([[-v.left / (v.width - 400), -v.top / (v.height - 300)] for v in views if v.width > 600])
    assert np.abs(room.mean(0) - 0.5).max() < 0.03 and np.abs(np.corrcoef(room.T)[0, 1]) < 0.05


def test_crop_keeps_its_promise() -> None:
    augment = Augment()
    image = painted([[20, 30, 120, 130], [180, 40, 300, 200], [150, 210, 160, 220]])
    rng = np.random.default_rng(1)
    least = {0.0: 0.0, 0.1: 0.1, 0.5: 0.5, 0.9: 0.9}
    for overlap, floor in least.items():
        for _ in range(50):
            view, keep = iou_crop(View.whole(image.image), image.boxes, (overlap, 1.0), (0.3, 1), (0.5, 2), 40, rng)
            assert 0 <= view.left < view.right <= 320 and 0 <= view.top < view.bottom <= 240
            if view == View.whole(image.image):
                continue
            assert 0.5 <= view.width / view.height <= 2 and view.width >= 95 and view.height >= 71
            centre = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2
            inside = (centre > [view.left, view.top]).all(1) & (centre < [view.right, view.bottom]).all(1)
            assert keep.tolist() == inside.tolist() and keep.any()
            rows = torch.from_numpy(image.boxes[keep])
            crop = torch.tensor([view], dtype=torch.float32)
            assert _iou(rows, crop).max() >= floor - 1e-6
    assert augment.overlaps[-1] == 1


def _iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    side = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    inter = side.prod(1)
    return inter / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter)


def test_zoom_out_and_crop_have_torchvisions_distribution() -> None:
    """The same table of statistics from the transforms that the published pipeline uses."""
    torch.manual_seed(0)
    sample = painted([[20, 30, 120, 130], [180, 40, 300, 200], [150, 210, 160, 220]])
    peer = v2.Compose([v2.RandomZoomOut(fill=0), v2.RandomApply([v2.RandomIoUCrop()], p=0.8)])
    tensor = torch.from_numpy(sample.image).permute(2, 0, 1)
    boxes = BoundingBoxes(torch.from_numpy(sample.boxes), format="XYXY", canvas_size=(240, 320))
    rng, augment, n = np.random.default_rng(2), Augment(), 600
    ours, theirs = [], []
    for _ in range(n):
        view, keep = augment._draw_view(View.whole(sample.image), sample.boxes, rng)
        ours.append([view.width, view.height, keep.sum(), view == View.whole(sample.image)])
        out, found = peer(tensor, {"boxes": boxes})
        alive = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1).sum()
        theirs.append([out.shape[2], out.shape[1], alive, tuple(out.shape[1:]) == (240, 320)])
    a, b = np.array(ours, float), np.array(theirs, float)
    error = 4 * np.sqrt((a.var(0) + b.var(0)) / n) + 1e-3
    assert (np.abs(a.mean(0) - b.mean(0)) < error).all(), (a.mean(0), b.mean(0))
    assert (
        np.abs(np.quantile(a[:, :2], [0.1, 0.5, 0.9], 0) / np.quantile(b[:, :2], [0.1, 0.5, 0.9], 0) - 1) < 0.15
    ).all()


def test_odds() -> None:
    """How often each part of the augmentation happens, over 3000 draws."""
    rng, augment, n = np.random.default_rng(3), Augment(), 3000
    looks = [augment.draw_look(rng) or Look() for _ in range(n)]
    for name, (low, high) in {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}.items():
        drawn = np.array([v for look in looks if (v := getattr(look, name)) != 1])
        assert (
            abs(len(drawn) / n - 0.5) < 0.04 and low <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high
        )
        assert abs(drawn.mean() - 1) < 0.03
    turns = np.array([look.hue for look in looks if look.hue])
    assert (
        abs(len(turns) / n - 0.5) < 0.04 and turns.min() >= -0.05 and turns.max() <= 0.05 and abs(turns.mean()) < 0.003
    )
    first = [look.contrast_first for look in looks if look.contrast != 1]
    assert abs(np.mean(first) - 0.5) < 0.05
    orders = [look.channels for look in looks]
    assert len(set(orders)) == 6 and abs(orders.count((0, 1, 2)) / n - (0.5 + 0.5 / 6)) < 0.04
    together = np.corrcoef([[look.brightness != 1, look.contrast != 1, look.hue != 0] for look in looks], rowvar=False)
    assert np.abs(together - np.eye(3)).max() < 0.06


# ------------------------------------------------------------------------------------------------------ photometric


@pytest.mark.parametrize(
    "look, peer",
    [
        (Look(brightness=1.12), lambda x: F.adjust_brightness(x, 1.12)),
        (Look(brightness=0.88), lambda x: F.adjust_brightness(x, 0.88)),
        (Look(contrast=1.5), lambda x: F.adjust_contrast(x, 1.5)),
        (Look(contrast=0.5, contrast_first=False), lambda x: F.adjust_contrast(x, 0.5)),
        (Look(saturation=1.5), lambda x: F.adjust_saturation(x, 1.5)),
        (Look(saturation=0.5), lambda x: F.adjust_saturation(x, 0.5)),
        (Look(hue=0.05), lambda x: F.adjust_hue(x, 0.05)),
        (Look(hue=-0.05), lambda x: F.adjust_hue(x, -0.05)),
        (Look(channels=(2, 0, 1)), lambda x: x[[2, 0, 1]]),
        (
            Look(brightness=1.1, contrast=0.7, saturation=1.4, hue=0.03, channels=(1, 0, 2)),
            lambda x: F.adjust_hue(F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(x, 1.1), 0.7), 1.4), 0.03)[
                [1, 0, 2]
            ],
        ),
        (
            Look(brightness=0.9, contrast=1.4, saturation=0.6, hue=-0.04, contrast_first=False),
            lambda x: F.adjust_contrast(
                F.adjust_hue(F.adjust_saturation(F.adjust_brightness(x, 0.9), 0.6), -0.04), 1.4
            ),
        ),
    ],
)
def test_recolour_is_torchvisions_chain(look: Look, peer: Any) -> None:
    image = noise(60, 90)
    expected = peer(torch.from_numpy(image).permute(2, 0, 1) / 255).permute(1, 2, 0).numpy() * 255
    error = np.abs(recolour(image, look) - expected)
    # contrast's pivot comes from a grid of the image, and torchvision rounds it
    assert error.mean() < 0.6 and error.max() < 2.5


def test_hue_by_the_textbook() -> None:
    rng = np.random.default_rng(0)
    colours = np.concatenate([rng.integers(0, 256, (300, 3)), COLOURS, [[0, 0, 0], [90, 90, 90], [255, 255, 255]]])
    for turn in (-0.05, 0.02, 0.05):
        planes = colours.T.astype(np.float32).reshape(3, 1, -1).copy()
        module.turn_hue(planes, turn)
        for colour, ours in zip(colours, planes[:, 0].T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(colour / 255))
            assert np.allclose(ours, np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255, atol=0.02)


def test_contrast_turns_about_the_whole_picture() -> None:
    """A crop of a recoloured picture is the recoloured crop, also across blocks and into any memory."""
    image, look = noise(300, 500), Look(brightness=0.9, contrast=1.5, saturation=1.2, hue=0.03)
    whole, part = recolour(image, look), View(50, 40, 400, 290)
    planar = np.empty((3, 250, 350), np.uint8).transpose(1, 2, 0)
    assert np.array_equal(recolour(part.cut(image), look, image, planar), part.cut(whole))


def test_colour_and_resize_in_either_order_look_alike() -> None:
    image, look = noise(200, 300), Look(brightness=1.1, contrast=1.3, saturation=0.7, hue=-0.03)
    small, large = np.empty((100, 150, 3), np.uint8), np.empty((240, 360, 3), np.uint8)
    for out in (small, large):
        render(image, View.whole(image), out, look)
        first = fast_resize(recolour(image, look), out.shape[:2])
        assert np.abs(out.astype(int) - first).mean() < 1


def test_black_around_a_zoomed_out_picture_stays_black() -> None:
    image, look = noise(60, 80), Look(brightness=1.1, contrast=0.5)
    out = np.full((64, 64, 3), 99, np.uint8)
    place = render(image, View(-80, -60, 160, 120), out, look)
    t = place.target
    inner = out[t.top : t.bottom, t.left : t.right].copy()
    out[t.top : t.bottom, t.left : t.right] = 0
    assert (out == 0).all() and inner.mean() > 50


# ----------------------------------------------------------------------------------------------------------- mosaic


def test_mosaic_puts_each_tile_into_the_corner_of_its_quadrant() -> None:
    tiles = [painted([[0, 0, w, h]], h, w) for h, w in ((30, 40), (30, 50), (60, 30), (30, 30))]
    for k, tile in enumerate(tiles):
        tile.image[:] = COLOURS[k]
    canvas = mosaic([tile._replace(labels=np.array([k])) for k, tile in enumerate(tiles)])
    assert canvas.image.shape == (120, 100, 3) and canvas.labels.tolist() == [0, 1, 2, 3]
    assert canvas.boxes.tolist() == [[0, 0, 40, 30], [50, 0, 100, 30], [0, 60, 30, 120], [50, 60, 80, 90]]
    for k, box in enumerate(canvas.boxes.astype(int).tolist()):
        assert where(canvas.image, COLOURS[k]) == box
    assert (canvas.image.reshape(-1, 3).max(1) == 0).sum() == 12000 - 1200 - 1500 - 1800 - 900


@pytest.mark.parametrize("angle, shift, scale", [(0, (0, 0), 1), (7, (10, -20), 0.6), (-10, (-31, 12), 1.4)])
def test_affine_is_torchvisions(angle: float, shift: tuple[int, int], scale: float) -> None:
    sample = painted([[20, 30, 120, 130], [180, 40, 300, 200]])
    ours = affine(sample, angle, shift, scale)
    peer, boxes = (
        F.affine(x, angle, list(shift), scale, [0.0, 0.0])
        for x in (
            Image.fromarray(sample.image),
            BoundingBoxes(torch.from_numpy(sample.boxes), format="XYXY", canvas_size=(240, 320)),
        )
    )
    assert (ours.image != np.asarray(peer)).any(2).mean() < 0.002  # nearest neighbour: ties at pixel borders
    assert np.allclose(ours.boxes, boxes.numpy(), atol=1e-3)


@pytest.mark.parametrize("height, width, side, expected", [(480, 640, 320, (320, 426)), (640, 427, 320, (479, 320))])
def test_tile_has_the_published_size(height: int, width: int, side: int, expected: tuple[int, int]) -> None:
    tile = to_tile(Sample(noise(height, width), np.array([[0, 0, width, height]], np.float32), np.array([1])), side)
    assert tile.image.shape[:2] == expected
    assert tuple(F.resize(Image.new("RGB", (width, height)), [side]).size[::-1]) == expected
    assert tile.boxes.tolist() == [[0, 0, expected[1], expected[0]]]


def test_mosaic_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, tuple[int, int], float]] = []
    partners: list[int] = []
    samples = [Sample(np.zeros((40, 60, 3), np.uint8), *NOTHING) for _ in range(5)]
    real = module.affine
    monkeypatch.setattr(module, "affine", lambda s, *a: (drawn.append(a), real(s, *a))[1])

    class Watched(Shelf):
        def tile(self, index: int, side: int) -> Sample:
            partners.append(index)
            return super().tile(index, side)

    rng, out = np.random.default_rng(0), np.empty((32, 32, 3), np.uint8)
    for _ in range(1000):
        Augment(mosaic=1, photometric=0, tile=20).sample(Watched(*samples), 2, "dense", rng, out)
    angle, shift, scale = (np.array(x) for x in zip(*drawn, strict=True))
    assert abs(angle.mean()) < 0.7 and -10 <= angle.min() < -9.8 and 9.8 < angle.max() <= 10
    assert np.abs(shift).max(0).tolist() == [6, 4] and np.abs(shift.mean(0)).max() < 0.4  # a tenth of 60 x 40
    assert abs(scale.mean() - 1) < 0.03 and 0.5 <= scale.min() < 0.51 and 1.49 < scale.max() <= 1.5
    rows = np.array(partners).reshape(-1, 4)
    assert (rows[:, 0] == 2).all()
    assert np.abs(np.bincount(rows[:, 1:].ravel()) / 3000 - 0.2).max() < 0.04


# ------------------------------------------------------------------------------------------------------------ stages


def ran(monkeypatch: pytest.MonkeyPatch, stage: str, n: int = 400) -> dict[str, float]:
    """How often each op ran per sample when its own odds are 1."""
    counts = dict.fromkeys(("mosaic", "recolour", "zoom_out", "iou_crop"), 0)
    mosaics: set[frozenset[str]] = set()
    current: set[str] = set()
    for name in counts:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _f=real: (current.add(_n), _f(*a))[1])
    augment = Augment(photometric=1, zoom_out=1, iou_crop=1, tile=16)
    shelf = Shelf(painted([[2, 2, 20, 20]], 24, 32))
    for seed in range(n):
        current.clear()
        augment.sample(shelf, 0, stage, np.random.default_rng(seed), np.empty((32, 32, 3), np.uint8))
        mosaics.add(frozenset(current))
        for name in current:
            counts[name] += 1
    monkeypatch.undo()
    assert not any("mosaic" in ops and ops & {"zoom_out", "iou_crop"} for ops in mosaics)
    return {name: count / n for name, count in counts.items()}


def test_stages_run_what_the_published_policy_runs(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = json.loads((shared / "golden/data/policy_ops_by_epoch.json").read_text())
    warm, dense, clean = policy["example_policy"]
    ops = {
        "mosaic": "Mosaic",
        "recolour": "RandomPhotometricDistort",
        "zoom_out": "RandomZoomOut",
        "iou_crop": "RandomIoUCrop",
    }
    for key, variants in policy["ran"].items():
        epoch = int(key.split()[1])
        stage = "warm" if epoch < warm else "dense" if epoch < dense else "augment" if epoch < clean else "clean"
        ours = ran(monkeypatch, stage)
        for name, published in ops.items():
            expected = sum(variant["fraction"] for variant in variants if published in variant["ops"])
            assert abs(ours[name] - expected) < 0.08, (key, name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "image",
    [
        Sample(noise(48, 64), *NOTHING),
        Sample(noise(1, 1), np.array([[0, 0, 1, 1]], np.float32), np.array([0])),
        Sample(noise(1, 300), np.array([[0, 0, 300, 1]], np.float32), np.array([0])),
        Sample(noise(300, 1), *NOTHING),
        Sample(noise(48, 64), np.array([[5, 5, 6, 6], [10, 10, 10.5, 20]], np.float32), np.array([0, 1])),
    ],
    ids=["no boxes", "one pixel", "one row", "one column", "one-pixel boxes"],
)
def test_nothing_is_too_small(stage: str, image: Sample) -> None:
    for seed in range(40):
        out, boxes, labels = augmented(Augment(tile=16), stage, seed, image, size=(32, 64))
        assert (boxes[:, 2:] > boxes[:, :2]).all() and np.isin(labels, image.labels).all()


def test_a_panorama_costs_no_more_than_its_pixels() -> None:
    panorama = Sample(noise(300, 12000), np.array([[11000, 10, 11900, 290]], np.float32), np.array([0]))
    assert to_tile(panorama, 320).image.shape[:2] == (64, 2560)
    for seed in range(3):
        out, boxes, _ = augmented(Augment(mosaic=1), "dense", seed, panorama)
        assert out.shape == (160, 192, 3) and np.isfinite(boxes).all()


def test_same_generator_same_sample() -> None:
    samples = [painted([[20, 30, 120, 130]]), Sample(noise(100, 90), *NOTHING)]
    for stage in STAGES:
        torch.manual_seed(1)
        np.random.seed(1)
        a = augmented(Augment(tile=40), stage, 5, *samples)
        torch.manual_seed(2)
        np.random.seed(2)
        b = augmented(Augment(tile=40), stage, 5, *samples)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    c = augmented(Augment(tile=40), "augment", 6, *samples)
    assert not np.array_equal(augmented(Augment(tile=40), "augment", 5, *samples)[0], c[0])


def test_mixup_and_multi_scale_draws() -> None:
    rng, augment = np.random.default_rng(0), Augment(multi_scale=4)
    weights = [augment.mixed("dense", rng) for _ in range(2000)]
    drawn = np.array([w for w in weights if w is not None])
    assert abs(len(drawn) / 2000 - 0.5) < 0.04 and drawn.min() >= 0.45 and drawn.max() <= 0.55
    assert all(round(w, 6) == w for w in drawn) and abs(drawn.mean() - 0.5) < 0.003
    assert all(augment.mixed(stage, rng) is None for stage in ("warm", "augment", "clean"))
    sizes = [augment.resized((640, 640), rng) for _ in range(3000)]
    assert abs(sizes.count((640, 640)) / 3000 - 4 / 14) < 0.03 and len(set(sizes)) == 11
    assert Augment().resized((640, 640), rng) is None


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"mosaic": -0.1}, {"overlaps": (0.1, 0.5)}])
def test_impossible_augmentation_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Augment(**wrong)


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(RecipeError, match="warm, dense, augment, clean"):
        augmented(Augment(), "strong", 0, Sample(noise(8, 8), *NOTHING))


def test_the_tile_scales_with_the_input() -> None:
    assert Augment().scaled_to_size((640, 640), (320, 416)).tile == 160
    assert Augment().scaled_to_size((640, 640), (640, 640)) == Augment()
    assert eval(repr(Augment(multi_scale=3)), {"Augment": Augment}) == Augment(multi_scale=3)
