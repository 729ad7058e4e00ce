"""Augmentation: geometry is decided first, pixels move once.

Zoom-out and IoU-crop only choose a *view*, the rectangle of the picture that will be seen; the view is then resampled
once, straight to the model's size. Boxes are xyxy pixels until the very end, pictures are (H, W, 3) uint8 arrays, and
every draw comes from the generator passed in. Ranges, odds and order are those published with DEIM.

Where pixels, not distributions, differ from the published chain of transforms:
- zoom-out and resize are one resampling: the picture's border against the black is sharp, and lies on a whole pixel;
- the photometric chain runs before or after the resize, whichever side has fewer pixels (it acts on pixels one by one),
  in float32 with one rounding at the end; its hue is a real number where Pillow's has 256 steps;
- contrast turns about the mean grey of a grid of at most 64 x 64 pixels of the picture, not of all its pixels;
- the longer side of a mosaic tile is at most 8 times its shorter side's goal: a strip one pixel high stays affordable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, cos, radians, sin
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from deimkit.errors import RecipeError

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]
Labels = NDArray[np.int64]


class Sample(NamedTuple):
    """A picture and what is in it. image: (H, W, 3) uint8. boxes: (n, 4) float32 xyxy pixels. labels: (n,) int64."""

    image: Pixels
    boxes: Boxes
    labels: Labels


class Source(Protocol):
    """Where samples come from; `deimkit.data.loader.Pictures` is one."""

    def __len__(self) -> int:
        """How many pictures there are."""

    def sample(self, index: int) -> Sample:
        """Picture `index` as it is."""

    def tile(self, index: int, side: int) -> Sample:
        """Picture `index` as a mosaic tile, its shorter side `side` pixels."""


# ------------------------------------------------------------------------------------------------------------ boxes


def sanitise(boxes: Boxes, labels: Labels, height: int, width: int) -> tuple[Boxes, Labels]:
    """Clip boxes to the picture and drop those that keep less than a pixel of width or height, with their labels."""
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return boxes[keep], labels[keep]


def to_fractions(boxes: Boxes, height: int, width: int) -> Boxes:
    """Pixel xyxy -> cxcywh as fractions of the picture, in [0, 1]. (n, 4) -> (n, 4)."""
    low, high = boxes[:, :2], boxes[:, 2:]
    fractions = np.concatenate([(low + high) / 2, high - low], 1) / np.array([width, height] * 2, np.float32)
    return np.clip(fractions, 0, 1)


# ----------------------------------------------------------------------------------------------------------- resize


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Straight to (height, width), aspect not kept, bilinear with antialias: Pillow's, bit for bit, for evaluation."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def fast_resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The filter of `resize` to within a grey level, several times faster: torch's kernel for channels-last bytes."""
    if image.shape[:2] == size:
        return image
    packed = np.require(image, requirements=["C", "W"])  # dense for the fast kernel, writable for torch
    nchw = torch.from_numpy(packed)[None].permute(0, 3, 1, 2)  # (1, 3, h, w), a view
    out = torch.nn.functional.interpolate(nchw, size, mode="bilinear", antialias=True)
    return out[0].permute(1, 2, 0).numpy()  # (H, W, 3)


def mirror(image: Pixels) -> Pixels:
    """The picture as seen from behind. torch flips whole pixels, several times faster than a negative stride copies."""
    return torch.from_numpy(image)[None].permute(0, 3, 1, 2).flip(3)[0].permute(1, 2, 0).numpy()


def to_tile(sample: Sample, side: int) -> Sample:
    """The sample with its shorter side resized to `side` pixels, aspect kept (see the top of this file for strips)."""
    h, w = sample.image.shape[:2]
    scale = min(side / min(h, w), 8 * side / max(h, w))
    size = max(1, int(h * scale + 1e-6)), max(1, int(w * scale + 1e-6))  # published: rounds down
    boxes = sample.boxes * np.array([size[1] / w, size[0] / h] * 2, np.float32)
    return Sample(fast_resize(sample.image, size), boxes, sample.labels)


# ------------------------------------------------------------------------------------------------------------- view


class View(NamedTuple):
    """The rectangle of a picture that will be seen, in its pixels; where it sticks out of the picture, it is black."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """In pixels of the picture."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels of the picture."""
        return self.bottom - self.top

    @staticmethod
    def whole(image: Pixels) -> View:
        """All of the picture and nothing else."""
        return View(0, 0, image.shape[1], image.shape[0])

    def cut(self, pixels: Pixels) -> Pixels:
        """The part of an array that lies in the view, not copied; the view must lie within the array."""
        return pixels[self.top : self.bottom, self.left : self.right]


def zoom_out(view: View, side: tuple[float, float], rng: Generator) -> View:
    """A view between side[0] and side[1] times as large, with the old one somewhere on it (SSD's expansion)."""
    factor = rng.uniform(*side)
    width, height = int(view.width * factor), int(view.height * factor)
    left = view.left - int((width - view.width) * rng.random())
    top = view.top - int((height - view.height) * rng.random())
    return View(left, top, left + width, top + height)


def iou_crop(
    view: View,
    boxes: Boxes,
    overlaps: Sequence[float],
    scale: tuple[float, float],
    aspect: tuple[float, float],
    trials: int,
    rng: Generator,
) -> tuple[View, NDArray[np.bool_]]:
    """A part of the view that shows some box well, and which boxes stay: those whose centre it contains (SSD's crop).

    Each round draws a least IoU from `overlaps`. 1 leaves the view as it is. Otherwise the first of `trials` rectangles
    whose sides are U(scale) of the view's, whose width / height is in `aspect`, and one of whose boxes has that IoU
    with it, is taken; if there is none, the next round begins.
    """
    everything = np.ones(len(boxes), bool)
    if not len(boxes):
        return view, everything  # every round but the one that draws 1 would fail
    extent, corner = np.array([view.width, view.height]), np.array([view.left, view.top])
    while (least := rng.choice(overlaps)) < 1:
        u = rng.random((trials, 2, 2))
        sides = (extent * (scale[0] + (scale[1] - scale[0]) * u[:, 0])).astype(np.int64)  # (trials, 2) width, height
        low = corner + ((extent - sides) * u[:, 1]).astype(np.int64)
        shape = sides[:, 0] / np.maximum(sides[:, 1], 1)
        inside, iou = _overlap(low, low + sides, boxes)
        good = (sides > 0).all(1) & (shape >= aspect[0]) & (shape <= aspect[1])
        good &= inside.any(1) & (np.where(inside, iou, 0).max(1) >= least)
        if good.any():
            t = int(good.argmax())
            return View(*low[t].tolist(), *(low[t] + sides[t]).tolist()), inside[t]
    return view, everything


def _overlap(low: NDArray[Any], high: NDArray[Any], boxes: Boxes) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether T rectangles contain the centres of n boxes, and their IoU. (T, 2), (T, 2), (n, 4) -> (T, n), (T, n)."""
    low, high = low[:, None], high[:, None]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside: NDArray[np.bool_] = np.all((low < centre) & (centre < high), 2)
    inter = np.maximum(np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2]), 0).prod(2, dtype=np.float64)
    union = (high - low).prod(2) + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter
    return inside, inter / np.maximum(union, 1e-9)


class Placement(NamedTuple):
    """The part of a picture that a view shows, and the part of the output that it fills."""

    source: View
    target: View

    @staticmethod
    def of(view: View, image: Pixels, size: tuple[int, int]) -> Placement:
        """Where what is seen of `image` comes to lie, in whole pixels, when the view is resized to (height, width)."""
        x1, x2, u1, u2 = _span(view.left, view.right, image.shape[1], size[1])
        y1, y2, v1, v2 = _span(view.top, view.bottom, image.shape[0], size[0])
        return Placement(View(x1, y1, x2, y2), View(u1, v1, u2, v2))

    def move(self, boxes: Boxes) -> Boxes:
        """Boxes from pixels of the picture to pixels of the output, exactly as the pixels move. (n, 4) -> (n, 4)."""
        s, t = self.source, self.target
        scale = np.array([t.width / s.width, t.height / s.height] * 2)
        return ((boxes - np.array(s[:2] * 2)) * scale + np.array(t[:2] * 2)).astype(np.float32)


def _span(start: int, stop: int, length: int, out: int) -> tuple[int, int, int, int]:
    """One axis of a placement: of `length` pixels [a, b) are seen in [start, stop), and fill [c, d) of `out` pixels."""
    a, b, scale = max(start, 0), min(stop, length), out / (stop - start)
    c = min(round((a - start) * scale), out - 1)
    return a, b, c, max(round((b - start) * scale), c + 1)


def render(image: Pixels, view: View, out: Pixels, look: Look | None = None) -> Placement:
    """Resize what the view shows of `image` into `out` (H, W, 3), in other colours if a `look` is given."""
    place = Placement.of(view, image, out.shape[:2])
    part, target = place.source.cut(image), place.target.cut(out)
    size = target.shape[:2]
    if target.size < out.size:
        out[:] = 0
    if look is None:
        np.copyto(target, fast_resize(part, size))
    elif part.size < target.size:
        np.copyto(target, fast_resize(recolour(part, look, image), size))
    else:
        recolour(fast_resize(part, size), look, image, target)
    return place


# ------------------------------------------------------------------------------------------------------ photometric


class Look(NamedTuple):
    """One draw of the photometric distortion: factors, a turn of the hue in circles, and the order of the channels."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_first: bool = True
    channels: tuple[int, int, int] = (0, 1, 2)


Planes = NDArray[np.float32]  # (3, h, w) in [0, 255]
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCK = 1 << 15  # pixels at a time, so that three float planes and their scratch stay in a core's second-level cache


def recolour(image: Pixels, look: Look, whole: Pixels | None = None, out: Pixels | None = None) -> Pixels:
    """Brightness, contrast, saturation, hue and channel order of a picture. (h, w, 3) uint8 -> the same.

    whole: the picture that `image` is a part of; its mean grey is what contrast turns about. out: where to write.
    """
    out = np.empty_like(image) if out is None else out
    pivot = _pivot(image if whole is None else whole, look)
    rows = ceil(_BLOCK / image.shape[1])
    for y in range(0, len(image), rows):
        planes = _chain(_planes(image[y : y + rows]), look, pivot)
        planes += np.float32(0.5)  # the cast below rounds down
        for c, source in enumerate(look.channels):
            out[y : y + rows, :, c] = planes[source]
    return out


def _planes(image: Pixels) -> Planes:
    """(h, w, 3) uint8 -> (3, h, w) float32."""
    planes = np.empty((3, *image.shape[:2]), np.float32)
    for c in range(3):
        planes[c] = image[..., c]
    return planes


def _pivot(image: Pixels, look: Look) -> float:
    """The mean grey of the picture as it is when contrast comes to it."""
    if look.contrast == 1:
        return 0.0
    step_y, step_x = (ceil(n / 64) for n in image.shape[:2])
    before = Look(brightness=look.brightness) if look.contrast_first else look._replace(contrast=1.0)
    planes = _chain(_planes(image[::step_y, ::step_x]), before, 0.0)
    return float(_GREY @ planes.reshape(3, -1).mean(1))


def _chain(planes: Planes, look: Look, pivot: float) -> Planes:
    """Brightness, contrast (here or last), saturation and hue, in place."""
    if look.brightness != 1:
        _blend(planes, look.brightness, 0.0)
    if look.contrast != 1 and look.contrast_first:
        _blend(planes, look.contrast, pivot)
    if look.saturation != 1:
        _blend(planes, look.saturation, np.tensordot(_GREY, planes, 1))
    if look.hue:
        turn_hue(planes, look.hue)
    if look.contrast != 1 and not look.contrast_first:
        _blend(planes, look.contrast, pivot)
    return planes


def _blend(planes: Planes, factor: float, other: float | Planes) -> None:
    """In place factor * planes + (1 - factor) * other, clipped to [0, 255]."""
    planes *= np.float32(factor)
    planes += np.float32(1 - factor) * other
    np.clip(planes, 0, 255, out=planes)


def turn_hue(planes: Planes, turn: float) -> None:
    """Turn the hue by `turn` circles, in place, keeping HSV's value and saturation; |turn| is at most 1/6.

    With the hue h in sixths of the circle times the span between the greatest and the least channel, red, green and
    blue are |h - 3 spans| - span, 2 spans - |h - 2 spans| and 2 spans - |h - 4 spans| above the least channel, clipped
    to [least, greatest]: the six branches of the textbook without a branch and without a division.
    """
    r, g, b = planes
    high = np.maximum(np.maximum(r, g), b)
    low = np.minimum(np.minimum(r, g), b)
    span = high - low
    two, other = 2 * span, b - r
    other += two
    hue = two + two
    hue += r
    hue -= g  # right where blue is greatest; now where green is, then where red is
    np.copyto(hue, other, where=g == high)
    np.copyto(hue, g - b, where=r == high)
    hue += np.float32(6 * turn) * span
    np.add(hue, 6 * span, out=hue, where=hue < 0)
    top = two + low
    for plane, centre in ((r, two + span), (g, two), (b, two + two)):
        np.subtract(hue, centre, out=plane)
        np.abs(plane, out=plane)
        if plane is r:
            plane -= span - low
        else:
            np.subtract(top, plane, out=plane)
        np.maximum(plane, low, out=plane)
        np.minimum(plane, high, out=plane)


# ----------------------------------------------------------------------------------------------------------- mosaic


def mosaic(tiles: Sequence[Sample]) -> Sample:
    """Four samples on one black canvas, each in the top left corner of its quadrant."""
    mh, mw = (max(tile.image.shape[axis] for tile in tiles) for axis in (0, 1))
    canvas = np.zeros((2 * mh, 2 * mw, 3), np.uint8)
    boxes = []
    for tile, (top, left) in zip(tiles, ((0, 0), (0, mw), (mh, 0), (mh, mw)), strict=True):
        h, w = tile.image.shape[:2]
        canvas[top : top + h, left : left + w] = tile.image
        boxes.append(tile.boxes + np.array([left, top] * 2, np.float32))
    return Sample(canvas, np.concatenate(boxes), np.concatenate([tile.labels for tile in tiles]))


def affine(sample: Sample, angle: float, shift: tuple[int, int], scale: float) -> Sample:
    """The sample turned by `angle` degrees (clockwise) and scaled about its centre, then shifted by (x, y) pixels.

    Nearest neighbour, black outside; a box becomes the upright rectangle around its turned corners, clipped.
    """
    h, w = sample.image.shape[:2]
    c, s = cos(radians(angle)), sin(radians(angle))
    turn = np.array([[c, -s], [s, c]])
    centre = np.array([w / 2, h / 2])
    x1, y1, x2, y2 = sample.boxes.T
    corners = np.stack([[x1, x2, x2, x1], [y1, y1, y2, y2]])  # (2, 4, n)
    moved = np.tensordot(scale * turn, corners - centre[:, None, None], 1) + (centre + shift)[:, None, None]
    boxes = np.concatenate([moved.min(1), moved.max(1)]).T.clip(0, [w, h, w, h]).astype(np.float32)
    back = turn.T / scale
    origin = centre - back @ (centre + shift)
    image = Image.fromarray(sample.image).transform(
        (w, h), Image.Transform.AFFINE, (*back[0], origin[0], *back[1], origin[1]), Image.Resampling.NEAREST
    )
    return Sample(np.asarray(image), boxes, sample.labels)


# ------------------------------------------------------------------------------------------------------ the whole


class Stage(NamedTuple):
    """What a stretch of training does to its images besides flip and resize."""

    strong: bool
    dense: bool

    @staticmethod
    def named(name: str) -> Stage:
        """The stage of that name, or a `RecipeError` that lists the names."""
        if name not in STAGES:
            raise RecipeError(f"Expected a stage of augmentation, one of {', '.join(STAGES)}; got {name!r}.")
        return STAGES[name]


STAGES = {
    "warm": Stage(strong=False, dense=False),
    "dense": Stage(strong=True, dense=True),
    "augment": Stage(strong=True, dense=False),
    "clean": Stage(strong=False, dense=False),
}


def scales(size: tuple[int, int], repeat: int) -> list[tuple[int, int]]:
    """The sizes multi-scale training draws from: steps of 32 up to a quarter either way, the base `repeat` times.

    The longer side takes the published steps, the shorter keeps the aspect to the nearest multiple of 32.
    """
    base = max(size)
    low, high = (int(base * f / 32) * 32 for f in (0.75, 1.25))
    steps = range((base - low) // 32)
    sides = [low + 32 * i for i in steps] + [base] * repeat + [high - 32 * i for i in steps]
    height, width = (([max(32, round(own * side / base / 32) * 32) for side in sides]) for own in size)
    return list(zip(height, width, strict=True))


@dataclass(frozen=True)
class Augment:
    """What happens to training images, with the published odds and ranges; the name of a stage says which of it is on.

    "warm" and "clean" only flip and resize. "augment" adds photometric distortion, zoom-out and IoU-crop. In "dense" a
    sample is, with the odds `mosaic`, a distorted mosaic instead, and a batch is blended with the odds `mixup`.
    Source: DEIM, "Dense O2O", and its configurations.

    mosaic, photometric, zoom_out, iou_crop, flip: odds per sample (photometric: of each of its parts). mixup: odds per
    batch. tile: shorter side of a mosaic tile in pixels; half the input gives a mosaic the input's resolution, which is
    why `scaled_to_size` scales it. rotation: degrees either way. translation: fraction of the canvas either way.
    scale: of the mosaic. zoom_side: how many times larger the side gets. overlaps: the least IoUs a crop draws from.
    multi_scale: how often the base size is in the list of `scales`; None trains at one size.
    """

    mosaic: float = 0.5
    tile: int = 320
    rotation: float = 10.0
    translation: float = 0.1
    scale: tuple[float, float] = (0.5, 1.5)
    mixup: float = 0.5
    mixup_weight: tuple[float, float] = (0.45, 0.55)
    photometric: float = 0.5
    brightness: tuple[float, float] = (0.875, 1.125)
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: tuple[float, float] = (-0.05, 0.05)
    zoom_out: float = 0.5
    zoom_side: tuple[float, float] = (1.0, 4.0)
    iou_crop: float = 0.8
    overlaps: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect: tuple[float, float] = (0.5, 2.0)
    crop_trials: int = 40
    flip: float = 0.5
    multi_scale: int | None = None

    def __post_init__(self) -> None:
        for name in ("mosaic", "mixup", "photometric", "zoom_out", "iou_crop", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"Augment.{name} is a probability in [0, 1]; got {getattr(self, name)}.")
        if 1 not in self.overlaps:
            raise RecipeError(f"Augment.overlaps must hold 1, which ends the search for a crop; got {self.overlaps}.")

    def scaled_to_size(self, before: tuple[int, int], after: tuple[int, int]) -> Augment:
        """This augmentation for another input size, (height, width): the tile is scaled with the shorter side."""
        return replace(self, tile=max(1, round(self.tile * min(after) / min(before))))

    def sample(self, source: Source, index: int, stage: str, rng: Generator, out: Pixels) -> tuple[Boxes, Labels]:
        """Write picture `index` of the source, augmented, into `out` (H, W, 3); its boxes are cxcywh fractions."""
        height, width = out.shape[:2]
        on = Stage.named(stage)
        tiled = on.dense and rng.random() < self.mosaic
        image, boxes, labels = self._mosaic(source, index, rng) if tiled else source.sample(index)
        look = self.draw_look(rng) if on.strong else None
        view = View.whole(image)
        if on.strong and not tiled:
            view, keep = self._draw_view(view, boxes, rng)
            boxes, labels = boxes[keep], labels[keep]
        place = render(image, view, out, look)
        corner = np.array(view[:2] * 2, np.float32)
        boxes, labels = sanitise(boxes - corner, labels, view.height, view.width)
        boxes, labels = sanitise(place.move(boxes + corner), labels, height, width)
        if rng.random() < self.flip:
            out[:] = mirror(out)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return to_fractions(boxes, height, width), labels

    def mixed(self, stage: str, rng: Generator) -> float | None:
        """MixUp's weight of a batch's own images, or None for no MixUp."""
        if Stage.named(stage).dense and rng.random() < self.mixup:
            return round(rng.uniform(*self.mixup_weight), 6)
        return None

    def resized(self, size: tuple[int, int], rng: Generator) -> tuple[int, int] | None:
        """The multi-scale size of a batch whose base is `size`, or None if there is no multi-scale."""
        if self.multi_scale is None:
            return None
        choices = scales(size, self.multi_scale)
        return choices[rng.integers(len(choices))]

    def draw_look(self, rng: Generator) -> Look | None:
        """One draw of the photometric distortion, or None where it leaves everything as it is."""

        def maybe(span: tuple[float, float], neutral: float) -> float:
            return rng.uniform(*span) if rng.random() < self.photometric else neutral

        look = Look(
            brightness=maybe(self.brightness, 1.0),
            contrast=maybe(self.contrast, 1.0),
            saturation=maybe(self.saturation, 1.0),
            hue=maybe(self.hue, 0.0),
            channels=tuple(rng.permutation(3).tolist()) if rng.random() < self.photometric else (0, 1, 2),
        )
        return None if look == Look() else look._replace(contrast_first=rng.random() < 0.5)

    def _mosaic(self, source: Source, index: int, rng: Generator) -> Sample:
        """Picture `index` and three others of the source, tiled, turned, scaled and shifted."""
        others = rng.integers(len(source), size=3).tolist()
        canvas = mosaic([source.tile(i, self.tile) for i in (index, *others)])
        h, w = canvas.image.shape[:2]
        angle = rng.uniform(-self.rotation, self.rotation)
        shift = [round(rng.uniform(-1, 1) * self.translation * n) for n in (w, h)]
        return affine(canvas, angle, (shift[0], shift[1]), rng.uniform(*self.scale))

    def _draw_view(self, view: View, boxes: Boxes, rng: Generator) -> tuple[View, NDArray[np.bool_]]:
        """Zoom-out, then IoU-crop, each with its odds; and which boxes stay."""
        if rng.random() < self.zoom_out:
            view = zoom_out(view, self.zoom_side, rng)
        if rng.random() < self.iou_crop:
            return iou_crop(view, boxes, self.overlaps, self.crop_scale, self.crop_aspect, self.crop_trials, rng)
        return view, np.ones(len(boxes), bool)
