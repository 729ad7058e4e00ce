"""Plotly's lines, points and bars, drawn by matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from numpy.typing import NDArray

from deimkit.explore.still.axes import Subplot, Way
from deimkit.explore.still.page import Page
from deimkit.explore.still.values import (
    POINT,
    Part,
    colour,
    dashes,
    filled,
    knows_trace,
    lettering,
    listed,
    numbers,
    one_of,
    plain,
    shades,
)

MARKS: dict[str, Any] = {
    **{"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "star": "*", "pentagon": "p"},
    **{"triangle-up": "^", "triangle-down": "v", "triangle-left": "<", "triangle-right": ">", "hexagon": "h"},
    **{"line-ns": "|", "line-ew": "_", "x-thin": "x", "cross-thin": "+", "asterisk": (8, 2, 0)},
}
THIN = ("line-ns", "line-ew", "x-thin", "cross-thin", "asterisk")  # marks that are all rim
# A mark's width in plotly's pixels as a share of matplotlib's size, where the two do not mean the same.
WIDER = {
    "diamond": 0.93,
    "star": 1.4,
    "line-ns": 1.4,
    "line-ew": 1.4,
    "cross": 1.15,
    "x": 1.15,
    "pentagon": 1.1,
    "hexagon": 1.1,
}
LINE = {"color", "width", "dash", "shape", "simplify"}
COLOURS = {"color", "colorscale", "cmin", "cmax", "cmid", "cauto", "reversescale", "showscale", "colorbar"}
MARKER = COLOURS | {"size", "sizemode", "sizeref", "sizemin", "symbol", "opacity", "line"}
TEXT = {"text", "textposition", "textfont", "texttemplate"}
ERROR = {"type", "array", "arrayminus", "value", "valueminus", "symmetric", "color", "thickness", "width", "visible"}
SCATTER = {"x", "y", "mode", "line", "marker", "fill", "fillcolor", "connectgaps", "error_x", "error_y", *TEXT}
BAR = {"x", "y", "base", "width", "offset", "marker", "orientation", "error_x", "error_y", "insidetextanchor", *TEXT}


def scatter(page: Page, trace: Part) -> Artist:
    """Lines, marks and words through points; the returned line stands for them in the legend."""
    knows_trace(trace, SCATTER, line=LINE, marker=MARKER, error_x=ERROR, error_y=ERROR)
    sub = page.subplot(trace)
    points = points_of(sub, trace)
    mode = trace.get("mode") or ("lines+markers" if len(points) < 20 else "lines")
    line, marker = trace.get("line", {}), trace.get("marker", {})
    mark = Line2D([], [], linestyle="none")
    if trace.get("connectgaps"):
        points = points[np.isfinite(points).all(1)]
    one = marker.get("color") if isinstance(marker.get("color"), str) else trace["tint"]
    tint = colour(line.get("color", one), trace.get("opacity", 1.0))
    path = _stepped(points, line.get("shape", "linear"))
    if trace.get("fill", "none") != "none":
        _fill(sub, trace, path, tint, mark)
    if "lines" in mode:
        _line(sub, line, path, tint, mark)
    for way in ("x", "y"):
        errors(sub, way, points, trace.get(f"error_{way}", {}), tint)
    if "markers" in mode:
        _marks(page, sub, trace, points, mark)
    if "text" in mode:
        size = np.max(marker.get("size", 6)) if "markers" in mode else 0.0
        _texts(sub, trace, points, page.font, float(size))
    sub.last = path
    return mark


def points_of(sub: Subplot, trace: Part) -> NDArray[Any]:
    """The points (n, 2) of a trace; without x or y, they are counted."""
    given = trace.get("x"), trace.get("y")
    count = len(next((side for side in given if side is not None), ()))
    x, y = (
        np.arange(count, dtype=float) if side is None else axis.numbers(side)
        for side, axis in zip(given, (sub.x, sub.y), strict=True)
    )
    shared = min(len(x), len(y))
    return np.stack([x[:shared], y[:shared]], 1)


def _stepped(points: NDArray[Any], shape: str) -> NDArray[Any]:
    """The corners of a line through points, which may go in steps: "hv" first runs on, then up."""
    if shape == "linear" or len(points) < 2:
        return points
    here, there = points[:-1], points[1:]
    middle = (here + there) / 2
    turns = {
        "hv": [np.stack([there[:, 0], here[:, 1]], 1)],
        "vh": [np.stack([here[:, 0], there[:, 1]], 1)],
        "hvh": [np.stack([middle[:, 0], here[:, 1]], 1), np.stack([middle[:, 0], there[:, 1]], 1)],
        "vhv": [np.stack([here[:, 0], middle[:, 1]], 1), np.stack([there[:, 0], middle[:, 1]], 1)],
    }
    if shape not in turns:
        raise one_of("lines", ("linear", *turns), shape)
    steps = np.stack([here, *turns[shape]], 1).reshape(-1, 2)  # (n - 1, 2 or 3, 2) -> (k, 2)
    return np.concatenate([steps, points[-1:]])


def _line(sub: Subplot, line: Part, path: NDArray[Any], tint: Any, mark: Line2D) -> None:
    width = line.get("width", 2)
    style: Part = {"color": tint, "linewidth": width * POINT, "linestyle": dashes(line, width)}
    sub.ax.plot(*path.T, zorder=2, solid_joinstyle="round", **style)
    mark.set(**style)


def _fill(sub: Subplot, trace: Part, path: NDArray[Any], tint: Any, mark: Line2D) -> None:
    """Fill what lies between a line and zero, the line before it, or within it."""
    runs = np.split(path, np.flatnonzero(~np.isfinite(path).all(1)))
    runs = [run[np.isfinite(run).all(1)] for run in runs]
    face = colour(trace["fillcolor"]) if "fillcolor" in trace else (*tint[:3], 0.5)  # "opacity" is not for areas
    for run in (run for run in runs if len(run) > 1):
        patch = Polygon(_closed(sub, trace["fill"], run), facecolor=face, edgecolor="none", linewidth=0, zorder=1.9)
        sub.ax.add_patch(patch)
        if trace["fill"] == "tozeroy" and not sub.y.log:
            patch.sticky_edges.y.append(0)
    mark.set(marker="s", markersize=9, markerfacecolor=face, markeredgecolor="none")


def _closed(sub: Subplot, fill: str, run: NDArray[Any]) -> NDArray[Any]:
    """The outline of what is filled."""
    if fill in ("toself", "tonext") or (fill == "tonexty" and sub.last is None):
        return run
    if fill == "tonexty" and sub.last is not None:
        return np.concatenate([run, sub.last[np.isfinite(sub.last).all(1)][::-1]])
    if fill not in ("tozeroy", "tozerox"):
        raise one_of("lines that are filled", ("tozeroy", "tozerox", "tonexty", "toself"), fill)
    way = 1 if fill == "tozeroy" else 0
    feet = run[[-1, 0]].copy()
    feet[:, way] = run[:, way].min() if (sub.y if way else sub.x).log else 0  # which a log axis does not have
    return np.concatenate([run, feet])


def _marks(page: Page, sub: Subplot, trace: Part, points: NDArray[Any], mark: Line2D) -> None:
    marker = trace.get("marker", {})
    count = len(points)
    size = np.broadcast_to(numbers(marker.get("size", 6)), (count,))
    bubbles = bool(np.ndim(marker.get("size", 6)))
    if bubbles:
        scale = marker.get("sizeref", 1)
        size = 2 * np.sqrt(size / scale / 2) if marker.get("sizemode") == "area" else size / scale
    dull = trace.get("opacity", 1.0) * numbers(marker.get("opacity", 0.7 if bubbles else 1.0))
    tints, drawn = shades(marker, count, trace.get("line", {}).get("color", trace["tint"]))
    tints[:, 3] *= dull
    rim = marker.get("line", {})
    ground = page.layout.get("plot_bgcolor", "white")
    rims = [colour(tint) for tint in listed(rim.get("color", ground if bubbles else "#444"), count)]
    symbols = [str(symbol) for symbol in listed(marker.get("symbol", "circle"), count)]
    for symbol in dict.fromkeys(symbols):
        here = np.asarray([each == symbol for each in symbols])
        name = symbol.removesuffix("-open")
        if name not in MARKS:
            raise one_of("marks", MARKS, symbol)
        hollow = name in THIN or symbol.endswith("-open")
        width = POINT * (rim.get("width") or 1.5 if hollow else rim.get("width", 1 if bubbles else 0))
        shown = [tuple(tint) for tint in tints[here]]
        look: Part = {"facecolors": shown, "edgecolors": [rims[i] for i in np.flatnonzero(here)]}
        if hollow:
            look = {"facecolors": shown} if name in THIN else {"facecolors": "none", "edgecolors": shown}
        sub.ax.scatter(
            points[here, 0],
            points[here, 1],
            s=np.square(POINT * size[here] * WIDER.get(name, 1.0)),
            marker=MARKS[name],
            linewidths=width,
            zorder=2.1,
            **look,
        )
    if drawn is not None:
        page.scale(drawn, marker)
    name = symbols[0].removesuffix("-open") if symbols else "circle"
    tint = tuple(tints[0]) if count else colour(trace["tint"])
    hollow = bool(symbols) and (symbols[0].endswith("-open") or name in THIN)
    mark.set(marker=MARKS[name], markersize=POINT * float(np.clip(np.median(size) if count else 6, 4, 14)))
    mark.set(markerfacecolor="none" if hollow else tint, markeredgecolor=tint if hollow else "none")
    for way in sub.slack:
        sub.slack[way] = max(0.05, sub.slack[way])


def errors(sub: Subplot, way: Way, points: NDArray[Any], said: Part, tint: Any) -> None:
    """Bars from points (n, 2) to both sides along one axis, as long as "error_x" or "error_y" says."""
    if said.get("visible") is False or ("array" not in said and "value" not in said):
        return
    middle = points[:, 0 if way == "x" else 1]
    above = numbers(said.get("array", said.get("value", 10)))
    below = numbers(said.get("arrayminus", said.get("valueminus", above)))
    share = np.abs(middle) / 100 if said.get("type") == "percent" else np.ones(len(middle))
    reach = np.stack([np.broadcast_to(below, middle.shape) * share, np.broadcast_to(above, middle.shape) * share])
    shade = colour(said["color"]) if "color" in said else tint
    look: Part = {"ecolor": shade, "elinewidth": POINT * said.get("thickness", 2), "zorder": 2.05}
    look["capsize"] = POINT * said.get("width", 4)
    look[f"{way}err"] = np.nan_to_num(reach)
    sub.ax.errorbar(points[:, 0], points[:, 1], fmt="none", **look)


def texts(trace: Part, count: int, fields: list[Part]) -> list[str]:
    """What stands at each of so many points."""
    words = listed(trace.get("text", ""), count)
    template = trace.get("texttemplate")
    if template is None:
        return ["" if word is None else str(word) for word in words]
    return [filled(template, {**each, "text": word}) for each, word in zip(fields, words, strict=True)]


def _texts(sub: Subplot, trace: Part, points: NDArray[Any], font: Part, size: float) -> None:
    own = {**font, **trace.get("textfont", {})}
    tints = listed(own.get("color"), len(points))
    places = listed(trace.get("textposition", "middle center"), len(points))
    fields = [{"x": float(x), "y": float(y)} for x, y in points]
    for (x, y), words, tint, place in zip(points, texts(trace, len(points), fields), tints, places, strict=True):
        if not (words and np.isfinite(x + y)):
            continue
        above, aside = place.split(" ")
        free = POINT * (size / 2 + 2)
        shift = {"left": -free, "right": free}.get(aside, 0.0), {"top": free, "bottom": -free}.get(above, 0.0)
        sub.ax.annotate(
            plain(words),
            (x, y),
            shift,
            textcoords="offset points",
            ha={"left": "right", "right": "left"}.get(aside, "center"),
            va={"top": "bottom", "bottom": "top"}.get(above, "center"),
            zorder=2.2,
            annotation_clip=True,
            **lettering(own | ({"color": tint} if tint else {}), words),
        )
