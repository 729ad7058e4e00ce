"""Plotly's bars, drawn by matplotlib: beside one another, stacked, standing or lying, with words at their ends."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from deimkit.explore.still.axes import Subplot, Way
from deimkit.explore.still.page import SHARP, Page
from deimkit.explore.still.traces import COLOURS, ERROR, TEXT, errors, points_of, texts
from deimkit.explore.still.values import (
    POINT,
    Part,
    colour,
    ink_on,
    knows_trace,
    lettering,
    listed,
    numbers,
    one_of,
    plain,
    shades,
)

BAR = {"x", "y", "base", "width", "offset", "marker", "orientation", "error_x", "error_y", "insidetextanchor", *TEXT}


def bar(page: Page, trace: Part) -> Artist:
    """Bars, beside or upon those of the other traces of their subplot."""
    knows_trace(trace, BAR, marker=COLOURS | {"opacity", "line", "pattern"}, error_x=ERROR, error_y=ERROR)
    sub = page.subplot(trace)
    flat = _flat(trace)
    at, long, base, low, wide = _placed(page, trace)
    marker, count = trace.get("marker", {}), len(at)
    tints, drawn = shades(marker, count, trace["tint"])
    tints[:, 3] *= trace.get("opacity", 1.0) * numbers(marker.get("opacity", 1.0))
    hatch = 2 * str(marker.get("pattern", {}).get("shape", "")) or None
    line = marker.get("line", {})
    rim: Part = {"linewidth": POINT * line.get("width", 0), "edgecolor": colour(line.get("color", "#444"))}
    if hatch:
        rim = {"linewidth": 0, "edgecolor": (0, 0, 0, 0.45)}  # in which it is hatched
    for i in np.flatnonzero(np.isfinite(long)):
        corner, sides = (low[i], base[i]), (wide[i], long[i])
        if flat:
            corner, sides = corner[::-1], sides[::-1]
        patch = Rectangle(corner, *sides, facecolor=tuple(tints[i]), hatch=hatch, zorder=1.5, **rim)
        (patch.sticky_edges.x if flat else patch.sticky_edges.y).append(base[i])
        sub.ax.add_patch(patch)
    outside = "outside" in listed(trace.get("textposition", "auto"), 1)
    _measure(sub, flat, at, _step(page, trace), outside)
    middle = np.stack([low + wide / 2, base + long], 1)
    way: Way = "x" if flat else "y"
    errors(sub, way, middle[:, ::-1] if flat else middle, trace.get(f"error_{way}", {}), colour("#444"))
    page.later.append(lambda: _texts(sub, trace, page.font, middle, long, wide, tints))
    along = sub.y if flat else sub.x
    along.said = {"showgrid": False, **along.said}
    if drawn is not None:
        page.scale(drawn, marker)
    return Patch(facecolor=tuple(tints[0]) if count else colour(trace["tint"]), hatch=hatch, **rim)


def _flat(trace: Part) -> bool:
    """Whether bars lie."""
    return bool(trace.get("orientation", "v" if trace.get("y") is not None else "h") == "h")


def _placed(page: Page, trace: Part) -> tuple[NDArray[Any], ...]:
    """Where the bars are, how long and from where, each (n,): position, length, base; lower side and width across."""
    at, long = _along(page, trace)
    mates, step = page.bars(trace), _step(page, trace)
    mode, share = page.layout.get("barmode", "group"), 1 - page.layout.get("bargap", 0.2)
    base = np.broadcast_to(numbers(trace.get("base", 0.0)), at.shape)
    groups = list(dict.fromkeys(mate.get("offsetgroup", mate["index"]) for mate in mates))
    wide = np.full(at.shape, step * share)
    low = at - wide / 2
    if mode == "group":
        wide = wide / len(groups)
        low = low + groups.index(trace.get("offsetgroup", trace["index"])) * wide
        inner = 1 - page.layout.get("bargroupgap", 0)
        low, wide = low + wide * (1 - inner) / 2, wide * inner
    elif mode in ("stack", "relative") and "base" not in trace:
        base = _stacked(page, trace, at, long, apart=mode == "relative")
    elif mode not in ("stack", "relative", "overlay"):
        raise one_of("bars", ("group", "stack", "relative", "overlay"), mode)
    if "width" in trace:
        given = np.broadcast_to(numbers(trace["width"]), at.shape)
        low, wide = low + (wide - given) / 2, given
    if "offset" in trace:
        low = at + numbers(trace["offset"])
    return at, long, base, low, wide


def _along(page: Page, trace: Part) -> tuple[NDArray[Any], NDArray[Any]]:
    """The positions of bars and their lengths."""
    points = points_of(page.subplot(trace), trace)
    return (points[:, 1], points[:, 0]) if _flat(trace) else (points[:, 0], points[:, 1])


def _step(page: Page, trace: Part) -> float:
    """The room for bars at one position: the least distance of two."""
    places = np.unique(np.concatenate([_along(page, mate)[0] for mate in page.bars(trace)]))
    return float(np.diff(places).min()) if len(places) > 1 else 1.0


def _stacked(page: Page, trace: Part, at: NDArray[Any], long: NDArray[Any], apart: bool) -> NDArray[Any]:
    """Where bars begin that stand on those of earlier traces; `apart`, what is below zero has a stack of its own."""
    heights: dict[tuple[float, bool], float] = defaultdict(float)
    for mate in page.bars(trace):
        if mate is trace:
            break
        for place, length in zip(*_along(page, mate), strict=True):
            if "base" not in mate and np.isfinite(length):
                heights[place, apart and length < 0] += length
    return np.asarray([heights[place, apart and length < 0] for place, length in zip(at, long, strict=True)])


def _measure(sub: Subplot, flat: bool, at: NDArray[Any], step: float, outside: bool) -> None:
    """Let the axes reach half a step beyond the first and last bar, and above the highest, more for words `outside`."""
    if not len(at):
        return
    ends = np.asarray([np.nanmin(at) - step / 2, np.nanmax(at) + step / 2])
    sub.ax.update_datalim(np.stack([ends, ends], 1), updatex=not flat, updatey=flat)
    above = 0.1 if outside else max(0.05, sub.slack["x" if flat else "y"])
    sub.slack |= {"x": above, "y": 0.0} if flat else {"y": above}
    sub.ax.autoscale_view()


def _texts(
    sub: Subplot,
    trace: Part,
    font: Part,
    ends: NDArray[Any],
    long: NDArray[Any],
    wide: NDArray[Any],
    tints: NDArray[Any],
) -> None:
    """What stands at the ends of bars: inside, turned if need be, or outside where there is no room."""
    if trace.get("text") is None and trace.get("texttemplate") is None:
        return
    count, flat = len(long), _flat(trace)
    sides = zip(listed(trace.get("x"), count), listed(trace.get("y"), count), strict=True)
    words = texts(trace, count, [{"x": x, "y": y} for x, y in sides])
    places = listed(trace.get("textposition", "auto"), count)
    room = _pixels(sub, flat, ends, long, wide)
    size = trace.get("textfont", {}).get("size", font["size"])
    for i in (i for i in range(count) if words[i] and places[i] != "none" and np.isfinite(long[i])):
        needs = np.asarray([0.62 * size * max(map(len, words[i].split("<br>"))), 1.05 * size])  # across, up
        upright, turned = bool((needs <= room[i]).all()), bool((needs[::-1] <= room[i]).all())
        inside = places[i] == "inside" or (places[i] == "auto" and (upright or turned))
        own = {"color": ink_on(tuple(tints[i]))} if inside else {}
        own["size"] = size if inside or flat else size * min(1.0, max(0.7, room[i][0] / needs[0]))
        look = lettering({**font, **own, **trace.get("textfont", {})}, words[i])
        look["rotation"] = -90 if inside and turned and not upright and not flat else 0
        _bar_text(sub, plain(words[i]), ends[i], long[i], flat, inside, trace.get("insidetextanchor", "end"), look)


def _pixels(sub: Subplot, flat: bool, ends: NDArray[Any], long: NDArray[Any], wide: NDArray[Any]) -> NDArray[Any]:
    """The width and height (n, 2) of bars in pixels of the layout."""
    corners = [np.stack([ends[:, 0] + share * wide / 2, ends[:, 1] - (share < 0) * long], 1) for share in (-1, 1)]
    shown = [sub.ax.transData.transform(corner[:, ::-1] if flat else corner) for corner in corners]
    return np.abs(shown[1] - shown[0]) / SHARP


def _bar_text(
    sub: Subplot, words: str, end: NDArray[Any], long: float, flat: bool, inside: bool, anchor: str, look: Part
) -> None:
    """Words at the end of one bar; `anchor` is where inside of it."""
    anchor = anchor if inside else "end"
    back = {"end": 0.0, "middle": 0.5, "start": 1.0}[anchor] * long
    outward = (1 if long >= 0 else -1) * (-1 if inside else 1) * (-1 if anchor == "start" else 1)
    free = 0.0 if anchor == "middle" else 3 * POINT * outward
    spot = end[0], end[1] - back
    aside: Any = "center" if anchor == "middle" else "left" if outward > 0 else "right"
    above: Any = "center" if anchor == "middle" else "bottom" if outward > 0 else "top"
    if flat:
        where: Part = {"xy": spot[::-1], "xytext": (free, 0), "ha": aside, "va": "center"}
    else:
        where = {"xy": spot, "xytext": (0, free), "ha": "center", "va": above}
    sub.ax.annotate(words, textcoords="offset points", zorder=2.2, annotation_clip=False, **where, **look)
