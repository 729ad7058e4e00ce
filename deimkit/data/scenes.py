"""Scenes of textured shapes, drawn from a number: the same number is the same picture on every machine.

Only PCG64's raw bits and arithmetic that IEEE 754 defines exactly are used per pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Shape = Callable[[Floats, Floats], NDArray[np.bool_]]
Colour = Floats  # (3,) red, green, blue in [0, 1]


# ------------------------------------------------------------------------------------------------------ shapes
# Each says which points belong to it: x, y in units of its radius, origin in its centre.


def _disc(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return x * x + y * y <= 1


def _ring(x: Floats, y: Floats) -> NDArray[np.bool_]:
    r2 = x * x + y * y
    return (r2 <= 1) & (r2 >= 0.3)


def _triangle(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return (y >= -0.5) & (np.abs(x) * 1.7320508 + y <= 1)


def _square(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return (np.abs(x) <= 0.707) & (np.abs(y) <= 0.707)


def _star(x: Floats, y: Floats) -> NDArray[np.bool_]:
    """The points inside at least four of the five half-planes of a pentagram."""
    planes = [_turn(i / 5) for i in range(5)]
    inside = [(x * c + y * s <= 0.309017).astype(np.int8) for c, s in planes]
    return sum(inside[1:], inside[0]) >= 4


def _cross(x: Floats, y: Floats) -> NDArray[np.bool_]:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) <= 0.3) & (np.maximum(x, y) <= 0.95)


def _crescent(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return _disc(x, y) & ((x - 0.5) * (x - 0.5) + y * y > 0.6)


def _gear(x: Floats, y: Floats) -> NDArray[np.bool_]:
    r2 = x * x + y * y
    body = r2 <= 0.52
    for c, s in (_turn(i / 8) for i in range(4)):
        along, across = np.abs(x * c + y * s), np.abs(y * c - x * s)
        body |= (across <= 0.17) & (along <= 1)
    return body & (r2 >= 0.1)


def _bar(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return (np.abs(x) <= 1) & (np.abs(y) <= 0.14)


def _ellipse(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return x * x + y * y * 8 <= 1


def _wedge(x: Floats, y: Floats) -> NDArray[np.bool_]:
    return _disc(x, y) & (x >= 0) & (y >= 0)


def _turn(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle in turns, rounded so that every machine's agree."""
    return round(math.cos(2 * math.pi * turns), 9), round(math.sin(2 * math.pi * turns), 9)


SHAPES: dict[str, Shape] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "gear": _gear,
}
_CLUTTER: tuple[Shape, ...] = (_bar, _ellipse, _wedge)


# ------------------------------------------------------------------------------------------------------- chance


class _Dice:
    """Numbers from the raw bits of PCG64, which NumPy promises never to change, unlike its distributions."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def field(self, *shape: int) -> Floats:
        """Numbers in [0, 1) of some shape."""
        raw = self._bits.random_raw(math.prod(shape)).reshape(shape)
        return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

    def below(self, count: int) -> int:
        """One integer in [0, count)."""
        return int(self.uniform(0, count))

    def choice(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return values[self.below(len(values))]

    def ratio(self, low: float, high: float) -> float:
        """One number in [low, high), every factor between them as likely as every other."""
        return round(low * (high / low) ** self.uniform(), 3)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    """The RGB of a hue in turns, a saturation and a value."""
    k = [(n + hue * 6) % 6 for n in (5, 3, 1)]
    return np.array([value * (1 - saturation * max(0.0, min(v, 4 - v, 1.0))) for v in k], np.float32)


# ----------------------------------------------------------------------------------------------------- surfaces


def _noise(dice: _Dice, size: int, cells: int) -> Floats:
    """Smooth value noise in [0, 1): (size, size), with `cells` bumps along a side."""
    lattice = dice.field(cells + 2, cells + 2)
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
    cell = at.astype(np.int64)
    t = at - cell
    t = t * t * (3 - 2 * t)  # smoothstep
    rows = lattice[cell] * (1 - t)[:, None] + lattice[cell + 1] * t[:, None]  # (size, cells + 2)
    return rows[:, cell] * (1 - t) + rows[:, cell + 1] * t


def _fractal(dice: _Dice, size: int, cells: int, octaves: int) -> Floats:
    """Noise upon finer and weaker noise: (size, size) in [0, 1)."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        total += _noise(dice, size, cells << octave) * np.float32(0.5**octave)
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def _wave(x: Floats) -> Floats:
    """A triangle wave of period 1 in [0, 1]."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _plain(x: Floats, y: Floats, dice: _Dice) -> Floats:
    return np.zeros_like(x)


def _fade(x: Floats, y: Floats, dice: _Dice) -> Floats:
    return np.clip(0.5 + 0.5 * x, 0, 1)


def _stripes(x: Floats, y: Floats, dice: _Dice) -> Floats:
    return np.clip((_wave(x * dice.uniform(1.2, 2.6)) - 0.5) * 8 + 0.5, 0, 1)


def _checks(x: Floats, y: Floats, dice: _Dice) -> Floats:
    f = dice.uniform(1.0, 1.8)
    return np.clip((_wave(x * f) - 0.5) * (_wave(y * f) - 0.5) * 40 + 0.5, 0, 1)


def _dots(x: Floats, y: Floats, dice: _Dice) -> Floats:
    f = dice.uniform(1.2, 2.2)
    u, v = _wave(x * f), _wave(y * f)
    return np.clip((u * u + v * v - 0.35) * 6 + 0.5, 0, 1)


def _marble(x: Floats, y: Floats, dice: _Dice) -> Floats:
    bend = _fractal(dice, len(x), 3, 2)[:, : x.shape[1]]
    return _wave(x * np.float32(1.1) + bend * 2)


_TEXTURES = (_plain, _fade, _stripes, _checks, _dots, _marble)


# -------------------------------------------------------------------------------------------------------- scene


def _sum(array: Any, count: int, part: Callable[[Any, int], Any]) -> Any:
    """The sum of `count` equally large parts of an array."""
    return sum((part(array, i) for i in range(1, count)), part(array, 0))


class Thing(NamedTuple):
    """Something to be painted: where, how large, which way, and in which colours."""

    shape: Shape
    label: int  # -1: clutter
    x: float
    y: float
    radius: float
    turn: float
    squash: float
    colours: tuple[Colour, Colour]
    texture: Callable[[Floats, Floats, _Dice], Floats]
    strength: float


class Scene(NamedTuple):
    """An image (S, S, 3) uint8 with its objects: boxes (n, 4) xyxy pixels, labels (n,), visible areas (n,) in px^2."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.int64]
    labels: NDArray[np.int64]
    areas: NDArray[np.int64]


def _background(dice: _Dice, size: int) -> tuple[Floats, Colour]:
    """A textured ground (size, size, 3) and its mean colour."""
    hue = dice.uniform()
    value = dice.uniform(0.25, 0.8)
    low = _colour(hue, dice.uniform(0.1, 0.5), value * 0.75)
    high = _colour(hue + dice.uniform(-0.12, 0.12), dice.uniform(0.1, 0.5), value * 1.2)
    mix = _fractal(dice, size, 3, 4)
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    c, s = _turn(dice.uniform())
    x, y = np.meshgrid(axis * 12, axis * 12)
    pattern = dice.choice(_TEXTURES)(x * c + y * s, y * c - x * s, dice)
    mix = np.clip(
        mix * np.float32(1.5) - np.float32(0.25) + (pattern - np.float32(0.5)) * np.float32(dice.uniform(0, 0.25)), 0, 1
    )
    ground = low + (high - low) * mix[:, :, None]
    return ground, (low + high) * np.float32(0.5)


def _palette(dice: _Dice, ground: Colour, favourite: float | None = None) -> tuple[Colour, Colour]:
    """Two colours for a thing, of which the first stands out from the ground.

    favourite: a hue in turns that most things of a class are near to, as ripe tomatoes are red: colour helps to tell
    the classes apart, but does not decide.
    """
    for _ in range(6):
        hue, value = dice.uniform(), dice.uniform(0.35, 1.0)
        if favourite is not None and dice.uniform() < 0.75:
            hue = favourite + dice.uniform(-0.05, 0.05)
        first = _colour(hue, dice.uniform(0.35, 0.95), value)
        if float(np.abs(first - ground).max()) > 0.3:
            break
    second = _colour(
        hue + dice.choice((0.08, 0.5, -0.08)), dice.uniform(0.2, 0.9), min(1.0, value * dice.choice((0.55, 1.6)))
    )
    return first, second


def _things(dice: _Dice, size: int, labels: Sequence[int], shapes: Sequence[Shape], ground: Colour) -> list[Thing]:
    """Objects of the given labels at places that leave most of each visible, the larger ones mostly below."""
    placed: list[Thing] = []
    for label in labels:
        radius = dice.ratio(size * 0.026, size * 0.19)
        patience = dice.uniform(0.25, 0.9)  # how deep it may sink into another
        for _ in range(8):
            x, y = dice.uniform(0, size), dice.uniform(0, size)
            depth = max((_depth(x, y, radius, other) for other in placed), default=0.0)
            if depth <= patience:
                break
        placed.append(
            Thing(
                shapes[label],
                label,
                x,
                y,
                radius,
                dice.uniform(),
                dice.uniform(0.8, 1.0),
                _palette(dice, ground, favourite=list(SHAPES.values()).index(shapes[label]) / len(SHAPES)),
                dice.choice(_TEXTURES),
                1.0,
            )
        )
    return sorted(placed, key=lambda thing: -thing.radius * (0.8 + 0.4 * (thing.turn * 7 % 1)))


def _depth(x: float, y: float, radius: float, other: Thing) -> float:
    """How far two discs overlap, in diameters of the smaller."""
    apart = math.sqrt((x - other.x) ** 2 + (y - other.y) ** 2)
    return max(0.0, radius + other.radius - apart) / (2 * min(radius, other.radius))


def _clutter(dice: _Dice, size: int, ground: Colour) -> list[Thing]:
    """Things that are nobody's class, fainter than objects."""
    return [
        Thing(
            dice.choice(_CLUTTER),
            -1,
            dice.uniform(0, size),
            dice.uniform(0, size),
            dice.ratio(size * 0.03, size * 0.3),
            dice.uniform(),
            1.0,
            _palette(dice, ground),
            dice.choice(_TEXTURES),
            dice.uniform(0.35, 0.9),
        )
        for _ in range(6 + dice.below(8))
    ]


class _Canvas:
    """The picture in the making, and which object owns each pixel."""

    def __init__(self, ground: Floats, light: tuple[float, float]) -> None:
        self.pixels = ground
        self.owner = np.full(ground.shape[:2], -1, np.int16)
        self.light = light

    def paint(self, thing: Thing, number: int, dice: _Dice) -> int:
        """Paint a thing with its shadow; its pixels belong to `number`. Returns its area in px^2, visible or not."""
        size = len(self.owner)
        reach = math.ceil(thing.radius * 1.05) + 2
        left, top = math.floor(thing.x) - reach, math.floor(thing.y) - reach
        side = 2 * reach + 1
        fine = 4 if thing.radius < 12 else 2
        u, v = self._local(thing, left, top, side, fine)
        inner = thing.shape(u, v).view(np.uint8)  # (side·fine, side·fine)
        counts = _sum(_sum(inner, fine, lambda a, i: a[i::fine]), fine, lambda a, i: a[:, i::fine])
        cover = counts.astype(np.float32) / np.float32(fine * fine)  # (side, side)

        inside = (slice(max(0, -top), min(side, size - top)), slice(max(0, -left), min(side, size - left)))
        if inside[0].start < inside[0].stop and inside[1].start < inside[1].stop:
            self._shade(cover, thing, left, top)
            u, v = self._local(thing, left, top, side, 1)
            mix = thing.texture(u, v, dice)[:, :, None]
            first, second = thing.colours
            lit = np.float32(1) - np.float32(0.22) * (self._towards_light(thing, left, top, side))[:, :, None]
            surface = (first + (second - first) * mix) * lit
            here = (
                slice(inside[0].start + top, inside[0].stop + top),
                slice(inside[1].start + left, inside[1].stop + left),
            )
            alpha = (cover * np.float32(thing.strength))[inside][:, :, None]
            self.pixels[here] = self.pixels[here] * (1 - alpha) + surface[inside] * alpha
            if number >= 0:
                self.owner[here][cover[inside] >= 0.5] = number
        return int((cover >= 0.5).sum())

    def _local(self, thing: Thing, left: int, top: int, side: int, fine: int) -> tuple[Floats, Floats]:
        """Points of a patch, `fine` by `fine` to a pixel, as the thing sees them: two (side·fine, side·fine)."""
        offset = (np.arange(side * fine, dtype=np.float32) + np.float32(0.5)) / np.float32(fine)
        x = ((offset + np.float32(left - thing.x)) / np.float32(thing.radius))[None, :]
        y = ((offset + np.float32(top - thing.y)) / np.float32(thing.radius))[:, None]
        c, s = _turn(thing.turn)
        return x * c + y * s, (y * c - x * s) * np.float32(1 / thing.squash)

    def _towards_light(self, thing: Thing, left: int, top: int, side: int) -> Floats:
        """How far each pixel of a patch lies away from the light, in radii: (side, side)."""
        offset = np.arange(side, dtype=np.float32) + np.float32(0.5)
        x = (offset + np.float32(left - thing.x)) / np.float32(thing.radius)
        y = (offset + np.float32(top - thing.y)) / np.float32(thing.radius)
        return x[None, :] * np.float32(self.light[0]) + y[:, None] * np.float32(self.light[1])

    def _shade(self, cover: Floats, thing: Thing, left: int, top: int) -> None:
        """Darken the ground beside a thing, away from the light."""
        size, shift = len(self.owner), 1 + thing.radius * 0.12
        left, top = left + round(self.light[0] * shift) - 1, top + round(self.light[1] * shift) - 1
        wide, side = np.pad(cover, 2), len(cover) + 2
        soft = _sum(_sum(wide, 3, lambda a, i: a[i : i + side]), 3, lambda a, i: a[:, i : i + side]) / np.float32(9)
        rows = slice(max(0, -top), max(0, min(len(soft), size - top)))
        cols = slice(max(0, -left), max(0, min(len(soft), size - left)))
        here = (slice(rows.start + top, rows.stop + top), slice(cols.start + left, cols.stop + left))
        self.pixels[here] *= 1 - np.float32(0.4 * thing.strength) * soft[rows, cols][:, :, None]

    def objects(self, things: Sequence[Thing], areas: Sequence[int]) -> tuple[list[list[int]], list[int], list[int]]:
        """Boxes around what is visible of each object, labels and visible areas; without those that hardly show."""
        boxes, labels, visible = [], [], []
        for number, (thing, area) in enumerate(zip(things, areas, strict=True)):
            mine = self.owner == number
            shown = int(np.count_nonzero(mine))
            if shown == 0 or shown < 0.25 * area:
                continue
            rows, cols = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
            x1, y1, x2, y2 = int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1
            if min(x2 - x1, y2 - y1) >= 4:
                boxes.append([x1, y1, x2, y2])
                labels.append(thing.label)
                visible.append(shown)
        return boxes, labels, visible


def draw(key: Sequence[int], size: int, classes: Sequence[str]) -> Scene:
    """The scene of a key: `size` px wide and high, with 5 to 25 objects of `classes`, or in one of 30 cases none."""
    dice = _Dice(*key)
    ground, mean = _background(dice, size)
    canvas = _Canvas(ground, _turn(dice.uniform()))
    count = 0 if dice.below(30) == 0 else 5 + dice.below(21)
    labels = [dice.below(len(classes)) for _ in range(count)]
    for thing in _clutter(dice, size, mean):
        canvas.paint(thing, -1, dice)
    things = _things(dice, size, labels, [SHAPES[name] for name in classes], mean)
    areas = [canvas.paint(thing, number, dice) for number, thing in enumerate(things)]
    glow = np.float32(dice.uniform(0.6, 0.9)) + np.float32(0.5) * _noise(dice, size, 2)
    image = np.floor(np.clip(canvas.pixels * glow[:, :, None], 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    boxes, found, visible = canvas.objects(things, areas)
    return Scene(
        image, np.array(boxes, np.int64).reshape(-1, 4), np.array(found, np.int64), np.array(visible, np.int64)
    )
