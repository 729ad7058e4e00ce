"""A lab for D-FINE's W(n): where its bins lie beside uniform ones, and how well an edge survives the way into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deimkit.boxes import xyxy_to_cxcywh
from deimkit.distribution import decode, encode, expectation, weighting
from deimkit.errors import DeimkitError
from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.edges import shares
from deimkit.explore.labs.lab import Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing, Sheet, powers

Floats = NDArray[np.float64]
BLUE, RED, GREEN, PINK = LINES[:4]
REACH = 1.25  # sides of the box: how far out and in the offsets go
POINTS = 501  # of each error curve
FLOOR = 1e-7  # pixels: what a logarithmic axis shows of an error of 0


@dataclass(frozen=True)
class Weighting:
    """What `WeightingLab` found; offsets are fractions of the box's side, outwards.

    W, uniform: (N + 1,) where the bins are. left, right: the bin left of `offset`, and the share of the bin right of
    it. rebuilt: the offset that these two stand for. offsets: (X,), errors: of each the error in pixels by name.
    """

    offset: float
    side: float
    W: Floats
    uniform: Floats
    left: int
    right: float
    rebuilt: float
    offsets: Floats
    errors: dict[str, Floats]


class WeightingLab(Lab):
    """W(n) for every a, c and N beside uniform bins, and the error of an edge that is encoded and decoded again.

    a and c are the paper's (D-FINE Eq. 3); in this package they are `up` and 1 / `scale`. A click on a bin takes its
    offset.
    """

    title = "The weighting function W(n)"

    def controls(self) -> tuple[Control, ...]:
        return (
            Slider("a", 0.125, 1.0, 0.125, 0.5, "a (half the reach)"),
            Slider("c", 0.025, 2.0, 0.025, 0.25, "c (large: even steps)"),
            Slider("N", 4, 64, 2, 32, "N (bins, even)"),
            Slider("offset", -REACH, REACH, 0.01, 0.13, "true offset, sides"),
            Slider("side", 10, 640, 10, 100, "side of the box, px"),
        )

    def compute(self, a: float, c: float, N: int, offset: float, side: float) -> Weighting:
        """Put every offset into bins and take it out again, in several ways."""
        if N % 2:
            raise DeimkitError(f"N is even, as many bins lie inwards as outwards; got {N}.")
        scale = 1 / c
        W = weighting(N, a, scale, torch.float64)
        uniform = torch.linspace(-2 * a, 2 * a, N + 1, dtype=torch.float64) * scale
        offsets = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
        kinds = {
            "W(n), nearest bin": _nearest(offsets, W, scale),
            "uniform, nearest bin": _nearest(offsets, uniform, scale),
            "W(n), two bins, float32": rebuilt(offsets.float(), W.float(), scale).double(),
            "W(n), two bins, float16": _in_half(offsets, W, scale),
        }
        errors = {name: ((found - offsets).abs() * side).numpy() for name, found in kinds.items()}
        here = torch.tensor([offset], dtype=torch.float64)
        left, right = two_bins(here, W, scale)
        return Weighting(
            offset=offset,
            side=side,
            W=(W / scale).numpy(),
            uniform=(uniform / scale).numpy(),
            left=int(left),
            right=float(right),
            rebuilt=float(rebuilt(here, W, scale)),
            offsets=offsets.numpy(),
            errors=errors,
        )

    def draw(self, found: Weighting) -> Drawing:
        """Draw the bins twice, and under them the errors."""
        sheet = Sheet()
        _bins(sheet, found)
        _rugs(sheet, found)
        _errors(sheet, found)
        return sheet.drawing(
            700,
            legend={"orientation": "h", "x": 0, "y": 1.07, "yanchor": "bottom"},
            margin={"l": 60, "r": 20, "t": 90, "b": 50},
        )

    def words(self, found: Weighting) -> str:
        """Say between which bins the offset lies, and how fine they are there."""
        fine, even = (np.diff(values)[len(values) // 2] for values in (found.W, found.uniform))
        if abs(found.offset) <= found.W[-1]:
            goes = f"{1 - found.right:.0%} to bin {found.left} and {found.right:.0%} to bin {found.left + 1}"
        else:
            goes = f"wholly to the last bin, and it ends up at {found.rebuilt:+.2f}: it lies beyond the last bin"
        near, far, last = (f"{step * found.side:.2g} px" for step in (fine, even, np.diff(found.W)[-1]))
        return (
            f"An edge that should move by {found.offset:+.2f} sides of its box goes {goes}. Next to zero, W(n) has "
            f"a bin every {near} of this box and uniform bins one every {far}; its last gap is {last}."
        )

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """Take the offset of the bin that was clicked."""
        place = {"W(n)": y, "uniform": y, "bins of W(n)": x, "bins, uniform": x}.get(trace)
        return {} if place is None else {"offset": float(np.clip(place, -REACH, REACH))}


def two_bins(offsets: Tensor, W: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bin left of each offset (X,) of a right edge, in sides of its box, and the share of the bin right of it."""
    left, right = encode(_anchors(offsets), _boxes(offsets), W, scale)
    return left[:, 2], right[:, 2]


def rebuilt(offsets: Tensor, W: Tensor, scale: float) -> Tensor:
    """Offsets (X,) of a right edge, in sides of its box, after the way into two bins and back."""
    left, right = encode(_anchors(offsets), _boxes(offsets), W, scale)
    boxes = decode(_anchors(offsets), expectation(shares(left, right, len(W)).log(), W), scale)
    return boxes[:, 0] + boxes[:, 2] / 2 - 0.5


def _anchors(offsets: Tensor) -> Tensor:
    """A box of side 1 around the origin for every offset. -> (X, 4) cxcywh."""
    return offsets.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(offsets), 4)


def _boxes(offsets: Tensor) -> Tensor:
    """The box with its right edge so far out; its left one is far out too, so that no size is negative."""
    out = torch.full_like(offsets, 0.5)
    return xyxy_to_cxcywh(torch.stack([-10 * out, -out, out + offsets, out], -1))


def _nearest(offsets: Tensor, W: Tensor, scale: float) -> Tensor:
    """The offset of the bin that has the larger share, alone."""
    left, right = two_bins(offsets, W, scale)
    return W[left + (right > 0.5)] / scale


def _in_half(offsets: Tensor, W: Tensor, scale: float) -> Tensor:
    """As `rebuilt`, but shares, W(n) and their sum in float16, which `expectation` never does."""
    left, right = two_bins(offsets, W, scale)
    low, high = W.half()[left], W.half()[left + 1]
    return ((1 - right).half() * low + right.half() * high).double() / scale


LEFT, RIGHT, TOP, LOW = (0.0, 0.46), (0.54, 1.0), (0.58, 1.0), (0.0, 0.42)  # where panels are


def _bins(sheet: Sheet, found: Weighting) -> None:
    """Offset against bin, and the two bins that share the offset."""
    n, reach = np.arange(len(found.W)), 1.06 * max(REACH, found.W[-1])
    panel = sheet.panel(
        "where the bins are",
        LEFT,
        TOP,
        {"title": "bin n", "range": [-1, len(n)]},
        {"title": "offset, sides of the box", "range": [-reach, reach]},
    )
    looks = (("W(n)", found.W, BLUE, "solid", "circle"), ("uniform", found.uniform, RED, "dash", "diamond"))
    for name, values, tint, dash, mark in looks:
        line, marker = {"color": tint, "dash": dash}, {"size": 5, "symbol": mark}
        panel.add("scatter", x=n, y=values, name=name, mode="lines+markers", line=line, marker=marker)
    ends, thin = [found.offset] * 2, {"color": INK, "width": 1}
    panel.add("scatter", x=[0, n[-1]], y=ends, name="offset", mode="lines", line=thin, showlegend=False)
    two, size = [found.left, found.left + 1], 8 + 14 * np.array([1 - found.right, found.right])
    ring = {"symbol": "circle-open", "size": size, "color": INK, "line": {"width": 2}}
    panel.add("scatter", x=two, y=found.W[two], name="the offset's two bins", mode="markers", marker=ring)


def _rugs(sheet: Sheet, found: Weighting) -> None:
    """Every bin as a stroke along the axis of offsets."""
    names = {"range": [-0.7, 1.7], "tickvals": [0, 1], "ticktext": ["uniform", "W(n)"], "showgrid": False}
    along = {"title": "offset, sides of the box", "range": [-REACH, REACH]}
    panel = sheet.panel("the same bins along the offset", RIGHT, TOP, along, names)
    for place, (name, at, tint) in enumerate((("bins, uniform", found.uniform, RED), ("bins of W(n)", found.W, BLUE))):
        mark = {"symbol": "line-ns-open", "size": 54, "color": tint, "line": {"width": 1.5}}
        panel.add("scatter", x=at, y=np.full(len(at), place), name=name, mode="markers", marker=mark, showlegend=False)
    line = {"color": INK, "width": 1}
    panel.add("scatter", x=[found.offset] * 2, y=[-0.6, 1.6], name="here", mode="lines", line=line, showlegend=False)


def _errors(sheet: Sheet, found: Weighting) -> None:
    """Errors in pixels against the offset: of one bin, and of two."""
    one, two = dict(list(found.errors.items())[:2]), dict(list(found.errors.items())[2:])
    inside = np.abs(found.offsets) < found.W[-2]
    top = 1.1 * max(error[inside].max() for error in one.values())
    along = {"title": "true offset, sides of the box", "range": [-REACH, REACH]}
    panel = sheet.panel("error of the nearest bin alone", LEFT, LOW, along, {"title": "px", "range": [0, top]})
    for (name, error), tint, dash in zip(one.items(), (BLUE, RED), ("solid", "dash"), strict=True):
        line = {"color": tint, "dash": dash, "width": 1.6}
        panel.add("scatter", x=found.offsets, y=error, name=name, mode="lines", line=line, showlegend=False)
    panel = sheet.panel(
        "error of two bins that share it (log)", RIGHT, LOW, along, {"title": "px", **powers(FLOOR, 1e3, 2)}
    )
    for (name, error), tint, dash in zip(two.items(), (GREEN, PINK), ("solid", "dot"), strict=True):
        line = {"color": tint, "dash": dash, "width": 2}
        panel.add("scatter", x=found.offsets, y=np.maximum(error, FLOOR), name=name, mode="lines", line=line)
