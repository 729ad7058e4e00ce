"""Plotly's lines, points, bars and fields of numbers, drawn by matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from numpy.typing import NDArray

from deimkit.explore.still.axes import Axis, Panel, Way
from deimkit.explore.still.page import Page
from deimkit.explore.still.said import MARKS, Part, must
from deimkit.explore.still.values import (
    POINT,
    colour,
    colours,
    dashes,
    ink_on,
    lettering,
    listed,
    numbers,
    plain,
    scale,
)

Array = NDArray[Any]
THIN = ("line-ns", "line-ew")  # marks that are all rim
# A mark's width in plotly's pixels as a share of matplotlib's size, where the two do not mean the same.
WIDER = {"diamond": 0.93, "star": 1.4, "line-ns": 1.4, "line-ew": 1.4, "cross": 1.15, "x": 1.15}


# ------------------------------------------------------------------------------------------------ lines and points
def scatter(page: Page, trace: Part) -> Artist:
    """Lines, marks and words through points; the returned line stands for them in the legend."""
    panel = page.panel(trace)
    points = points_of(panel, trace)
    mode = trace.get("mode") or ("lines+markers" if len(points) < 20 else "lines")
    line, marker, mark = trace.get("line", {}), trace.get("marker", {}), Line2D([], [], linestyle="none")
    one = marker["color"] if isinstance(marker.get("color"), str) else trace["tint"]
    tint = colour(line.get("color", one), trace.get("opacity", 1.0))
    path = _stepped(points) if line.get("shape") == "hv" else points
    if trace.get("fill", "none") != "none":
        _fill(panel, trace, path, tint, mark)
    if "lines" in mode:
        width = line.get("width", 2)
        style: Part = {"color": tint, "linewidth": width * POINT, "linestyle": dashes(line, width)}
        panel.ax.plot(*path.T, zorder=2, solid_joinstyle="round", **style)
        mark.set(**style)
    if "markers" in mode:
        _marks(page, panel, trace, points, mark)
    if "text" in mode:
        size = float(np.max(marker.get("size", 6))) if "markers" in mode else 0.0
        _words(panel, trace, points, page.font, size)
    return mark


def points_of(panel: Panel, trace: Part) -> Array:
    """The points (n, 2) of a trace; without x or y, they are counted."""
    given = [trace.get("x"), trace.get("y")]
    count = len(next((side for side in given if side is not None), ()))
    sides = [np.arange(count) if side is None else side for side in given]
    x, y = (axis.numbers(side) for side, axis in zip(sides, (panel.x, panel.y), strict=True))
    shared = min(len(x), len(y))
    return np.stack([x[:shared], y[:shared]], 1)


def _stepped(points: Array) -> Array:
    """The corners of a line that first runs on, then up."""
    corners = points.repeat(2, 0)[:-1]  # (2 n - 1, 2)
    corners[1::2, 0] = points[1:, 0]
    return corners


def _fill(panel: Panel, trace: Part, path: Array, tint: Any, mark: Line2D) -> None:
    """Fill what lies within a line."""
    face = colour(trace["fillcolor"]) if "fillcolor" in trace else (*tint[:3], 0.5)  # "opacity" is not for areas
    broken = ~np.isfinite(path).all(1)
    for run in np.split(path, np.flatnonzero(broken)):
        whole = run[np.isfinite(run).all(1)]
        if len(whole) > 1:
            panel.ax.add_patch(Polygon(whole, facecolor=face, edgecolor="none", linewidth=0, zorder=1.9))
    mark.set(marker="s", markersize=9, markerfacecolor=face, markeredgecolor="none")


def _marks(page: Page, panel: Panel, trace: Part, points: Array, mark: Line2D) -> None:
    marker, count = trace.get("marker", {}), len(points)
    rim, symbol = marker.get("line", {}), str(marker.get("symbol", "circle"))
    bubbles, name = bool(np.ndim(marker.get("size", 6))), symbol.removesuffix("-open")
    hollow = name in THIN or symbol.endswith("-open")
    size = np.broadcast_to(numbers(marker.get("size", 6)), (count,))
    dull = trace.get("opacity", 1.0) * marker.get("opacity", 0.7 if bubbles else 1.0)
    own = trace.get("line", {}).get("color", trace["tint"])
    tints = [tuple(tint) for tint in colours(marker.get("color", own), count, dull)]
    ground = page.layout.get("plot_bgcolor", "white")
    look: Part = {"facecolors": tints}
    if not hollow:
        look["edgecolors"] = colours(rim.get("color", ground if bubbles else "#444"), count)
    elif name not in THIN:
        look = {"facecolors": "none", "edgecolors": tints}
    width = POINT * (rim.get("width") or 1.5 if hollow else rim.get("width", 1 if bubbles else 0))
    area = np.square(POINT * size * WIDER.get(name, 1.0))
    panel.ax.scatter(points[:, 0], points[:, 1], area, marker=MARKS[name], linewidths=width, zorder=2.1, **look)
    tint = tints[0] if count else colour(trace["tint"])
    mark.set(marker=MARKS[name], markersize=POINT * float(np.clip(np.median(size) if count else 6, 4, 14)))
    mark.set(markerfacecolor="none" if hollow else tint, markeredgecolor=tint if hollow else "none")
    panel.slack = {way: max(0.05, slack) for way, slack in panel.slack.items()}


def _words(panel: Panel, trace: Part, points: Array, font: Part, size: float) -> None:
    """Words at points, beside marks of this size."""
    own, count, free = {**font, **trace.get("textfont", {})}, len(points), POINT * (size / 2 + 2)
    above, aside = trace.get("textposition", "middle center").split(" ")
    shift = {"left": -free, "right": free}.get(aside, 0.0), {"top": free, "bottom": -free}.get(above, 0.0)
    side: Any = {"left": "right", "right": "left"}.get(aside, "center")
    end: Any = {"top": "bottom", "bottom": "top"}.get(above, "center")
    for spot, words in zip(points, listed(trace.get("text", ""), count), strict=True):
        if words and np.isfinite(spot).all():
            look = {"ha": side, "va": end, "zorder": 2.2, "annotation_clip": True, **lettering(own, words)}
            panel.ax.annotate(plain(words), tuple(spot), shift, textcoords="offset points", **look)


# ------------------------------------------------------------------------------------------------ bars
def bar(page: Page, trace: Part) -> Artist:
    """Bars, beside or before those of the other traces of their panel."""
    panel, flat = page.panel(trace), _flat(trace)
    at, long = _along(panel, trace)
    low, wide, step = _across(page, trace, at)
    marker, count = trace.get("marker", {}), len(at)
    tints = colours(marker.get("color", trace["tint"]), count, trace.get("opacity", 1.0))
    hatch, line = 2 * marker.get("pattern", {}).get("shape", "") or None, marker.get("line", {})
    rim: Part = {"linewidth": POINT * line.get("width", 0), "edgecolor": colour(line.get("color", "#444"))}
    if hatch:
        rim = {"linewidth": 0, "edgecolor": (0, 0, 0, 0.45)}  # in which it is hatched
    for i in np.flatnonzero(np.isfinite(long)):
        corner, sides = (low[i], 0.0), (wide[i], long[i])
        if flat:
            corner, sides = corner[::-1], sides[::-1]
        patch = Rectangle(corner, *sides, facecolor=tuple(tints[i]), hatch=hatch, zorder=1.5, **rim)
        (patch.sticky_edges.x if flat else patch.sticky_edges.y).append(0.0)
        panel.ax.add_patch(patch)
    if count:
        _reach(panel, flat, (np.nanmin(at) - step / 2, np.nanmax(at) + step / 2), "text" in trace)
    page.later.append(lambda: _ends(panel, trace, page.font, low + wide / 2, long, wide))
    along = panel.y if flat else panel.x
    along.said = {"showgrid": False, **along.said}
    return Patch(facecolor=tuple(tints[0]) if count else colour(trace["tint"]), hatch=hatch, **rim)


def _flat(trace: Part) -> bool:
    """Whether bars lie."""
    return bool(trace.get("orientation", "h" if trace.get("y") is None else "v") == "h")


def _along(panel: Panel, trace: Part) -> tuple[Array, Array]:
    """The positions of bars and their lengths."""
    points = points_of(panel, trace)
    return (points[:, 1], points[:, 0]) if _flat(trace) else (points[:, 0], points[:, 1])


def _across(page: Page, trace: Part, at: Array) -> tuple[Array, Array, float]:
    """The lower sides of bars and their widths, (n,) each; and the room for bars at one position."""
    panel = page.panel(trace)
    mates = [each for each in page.traces if each["type"] == "bar" and page.panel(each) is panel]
    places = np.unique(np.concatenate([_along(panel, mate)[0] for mate in mates]))
    step = float(np.diff(places).min()) if len(places) > 1 else 1.0
    wide = np.full(at.shape, step * (1 - page.layout.get("bargap", 0.2)))
    low = at - wide / 2
    if page.layout.get("barmode", "group") == "group":
        wide = wide / len(mates)
        low = low + [mate["index"] for mate in mates].index(trace["index"]) * wide
    if "width" in trace:
        given = np.broadcast_to(numbers(trace["width"]), at.shape)
        low, wide = low + (wide - given) / 2, given
    return low, wide, step


def _reach(panel: Panel, flat: bool, ends: tuple[float, float], words: bool) -> None:
    """Let the axes reach from end to end across the bars, and beyond the longest, more for words there."""
    panel.ax.update_datalim(np.stack([ends, ends], 1), updatex=not flat, updatey=flat)
    along: Way = "x" if flat else "y"
    beyond = 0.1 if words else max(0.05, panel.slack[along])
    panel.slack |= {"x": beyond, "y": 0.0} if flat else {"y": beyond}
    panel.ax.autoscale_view()


def _ends(panel: Panel, trace: Part, font: Part, middle: Array, long: Array, wide: Array) -> None:
    """The words at the ends of bars, smaller above narrow ones."""
    if trace.get("text") is None or trace.get("textposition") == "none":
        return
    must(trace.get("textposition") == "outside", 'words in bars (say textposition="outside")')
    flat, own = _flat(trace), trace.get("textfont", {})
    size = own.get("size", font["size"])
    room = wide * panel.pixels()[0] / abs(np.diff(panel.ends("x"))[0])  # pixels that a standing bar is wide
    for i, words in enumerate(listed(trace["text"], len(long))):
        if not words or not np.isfinite(long[i]):
            continue
        needs = 0.62 * size * max(map(len, str(words).split("<br>")))
        fits = size if flat else size * min(1.0, max(0.7, room[i] / needs))
        look: Part = lettering({**font, "size": fits, **own}, words) | {"zorder": 2.2, "annotation_clip": False}
        free = 3 * POINT * (1 if long[i] >= 0 else -1)
        if flat:
            look |= {"xy": (long[i], middle[i]), "xytext": (free, 0), "va": "center"}
            look["ha"] = "left" if free > 0 else "right"
        else:
            look |= {"xy": (middle[i], long[i]), "xytext": (0, free), "ha": "center"}
            look["va"] = "bottom" if free > 0 else "top"
        panel.ax.annotate(plain(words), textcoords="offset points", **look)


# ------------------------------------------------------------------------------------------------ fields
def heatmap(page: Page, trace: Part) -> None:
    """A field as coloured cells of one size, with words in them where the trace has some."""
    panel, z = page.panel(trace), numbers(trace["z"])
    if not z.size:
        return
    x, y = (_middles(axis, trace, count) for axis, count in zip((panel.x, panel.y), z.shape[::-1], strict=True))
    (norm, chart), cells, borders = scale(trace, z), np.ma.masked_invalid(z), []
    for places, axis in ((x, panel.x), (y, panel.y)):
        steps = np.diff(places) if len(places) > 1 else np.ones(1)
        must(bool(np.allclose(steps, steps[0], rtol=1e-3)) and not axis.log, "a heat map with cells of several sizes")
        borders += [places[0] - steps[0] / 2, places[-1] + steps[-1] / 2]
    look: Part = {"cmap": chart, "norm": norm, "alpha": trace.get("opacity", 1.0), "zorder": 1, "extent": borders}
    panel.ax.imshow(cells, origin="lower", aspect="auto", interpolation="nearest", **look)
    if "texttemplate" in trace and "text" in trace:
        grounds = chart(norm(cells))
        for row, column in zip(*np.nonzero(np.isfinite(z)), strict=True):
            words = trace["text"][row][column]
            own = {**page.font, "color": ink_on(tuple(grounds[row, column])), **trace.get("textfont", {})}
            look = lettering(own, words) | {"ha": "center", "va": "center", "zorder": 1.1, "clip_on": True}
            panel.ax.text(float(x[column]), float(y[row]), plain(words), **look)
    page.scale(trace, ScalarMappable(norm, chart))


def contour(page: Page, trace: Part) -> None:
    """A field as lines of equal height, from "start" to "end" by "size", filled between them."""
    steps, panel, z = trace.get("contours", {}), page.panel(trace), numbers(trace["z"])
    must("size" in steps, "contours without start, end and size")
    if not z.size:
        return
    x, y = (_middles(axis, trace, count) for axis, count in zip((panel.x, panel.y), z.shape[::-1], strict=True))
    levels = steps["start"] + steps["size"] * np.arange(int((steps["end"] - steps["start"]) / steps["size"] + 1e-6) + 1)
    norm, chart = scale({"zmin": float(levels[0]), "zmax": float(levels[-1]), **trace}, z)
    line, alpha = trace.get("line", {}), trace.get("opacity", 1.0)
    width, tint = line.get("width", 0.5), colour(line.get("color", "#444"))
    panel.ax.contourf(x, y, z, levels, cmap=chart, norm=norm, extend="both", alpha=alpha, zorder=1)
    look: Part = {"linewidths": POINT * width, "linestyles": [dashes(line, width)], "alpha": alpha, "zorder": 1.1}
    panel.ax.contour(x, y, z, levels, colors=[tint], **look)
    panel.slack |= {"x": 0.0, "y": 0.0}
    page.scale(trace, ScalarMappable(norm, chart))


def _middles(axis: Axis, trace: Part, count: int) -> Array:
    """Where the columns or rows of a field are."""
    given = trace.get(axis.way)
    places = np.arange(count, dtype=float) if given is None else axis.numbers(given)
    must(len(places) == count, f"a field of {count} cells with {len(places)} places")
    return places


# ------------------------------------------------------------------------------------------------ three dimensions
def surface(page: Page, trace: Part) -> None:
    """A field as a surface in a scene."""
    if numbers(trace["z"]).size:
        page.scale(trace, page.scene(trace.get("scene", "scene")).surface(trace))


def scatter3d(page: Page, trace: Part) -> Artist:
    """Points in a scene, in front of its surfaces."""
    return page.scene(trace.get("scene", "scene")).marks(trace)
