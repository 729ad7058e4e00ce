"""Plotly's fields of numbers, drawn by matplotlib: heat maps, contours and surfaces, and what lies in their scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from deimkit.explore.still.axes import Subplot
from deimkit.explore.still.page import Page
from deimkit.explore.still.traces import LINE, MARKER, MARKS
from deimkit.explore.still.values import (
    POINT,
    Part,
    cmap,
    colour,
    dashes,
    filled,
    ink_on,
    knows_trace,
    lettering,
    numbers,
    one_of,
    plain,
    shades,
    span,
)

SCALE = {"colorscale", "reversescale", "showscale", "colorbar", "autocolorscale"}
FIELD = {"x", "y", "z", "x0", "dx", "y0", "dy", "zmin", "zmax", "zmid", "zauto", *SCALE}
HEATMAP = {*FIELD, "text", "texttemplate", "textfont", "xgap", "ygap", "zsmooth"}
CONTOUR = {*FIELD, "contours", "ncontours", "autocontour", "line", "connectgaps"}
LEVELS = {"start", "end", "size", "coloring", "showlines", "showlabels", "labelfont"}
SURFACE = {"x", "y", "z", "text", "surfacecolor", "cmin", "cmax", "cmid", "cauto", "lighting", "lightposition", *SCALE}
SCATTER3D = {"x", "y", "z", "text", "mode", "line", "marker"}


def heatmap(page: Page, trace: Part) -> None:
    """A field as coloured cells, with words in them where the trace has some."""
    knows_trace(trace, HEATMAP)
    if trace.get("zsmooth"):
        raise one_of("heat maps", ("zsmooth=False",), trace["zsmooth"])
    sub, z = page.subplot(trace), numbers(trace["z"])
    if not z.size:
        return
    x, y = (_middles(sub, trace, way, count) for way, count in zip("xy", z.shape[::-1], strict=True))
    norm, chart = span(z, trace, "z"), cmap(trace)
    cells = np.ma.masked_invalid(z)
    look: Part = {"cmap": chart, "norm": norm, "alpha": trace.get("opacity", 1.0), "zorder": 1}
    across, up = edges(x, z.shape[1]), edges(y, z.shape[0])
    if _even(across) and _even(up) and not (sub.x.log or sub.y.log):
        ends = (across[0], across[-1], up[0], up[-1])
        sub.ax.imshow(cells, origin="lower", extent=ends, aspect="auto", interpolation="nearest", **look)
    else:
        sub.ax.pcolormesh(across, up, cells, **look)
    _gaps(sub, trace, across, up, page.layout.get("plot_bgcolor", "white"))
    if "texttemplate" in trace:
        _cell_texts(sub, trace, page.font, (across[1:] + across[:-1]) / 2, (up[1:] + up[:-1]) / 2, chart(norm(cells)))
    page.scale(ScalarMappable(norm, chart), {"showscale": True, **trace})


def _middles(sub: Subplot, trace: Part, way: Any, count: int) -> NDArray[Any]:
    """Where the columns or rows of a field are."""
    if trace.get(way) is None:
        return float(trace.get(f"{way}0", 0)) + float(trace.get(f"d{way}", 1)) * np.arange(count)
    return sub.axis(way).numbers(trace[way])


def edges(places: NDArray[Any], count: int) -> NDArray[Any]:
    """The borders (n + 1,) of so many cells, of which the middles or the borders are given."""
    if len(places) == count + 1:
        return places
    if count == 1:
        return np.asarray([places[0] - 0.5, places[0] + 0.5])
    inner = (places[1:] + places[:-1]) / 2
    return np.concatenate([[2 * places[0] - inner[0]], inner, [2 * places[-1] - inner[-1]]])


def _even(borders: NDArray[Any]) -> bool:
    steps = np.diff(borders)
    return bool(np.allclose(steps, steps[0], rtol=1e-3))


def _gaps(sub: Subplot, trace: Part, across: NDArray[Any], up: NDArray[Any], ground: Any) -> None:
    """Lines in the colour of the paper between cells, so many pixels wide."""
    for name, borders, draw in (("xgap", across, sub.ax.axvline), ("ygap", up, sub.ax.axhline)):
        for place in borders if trace.get(name) else ():
            draw(place, color=colour(ground), linewidth=POINT * trace[name], zorder=1.05)


def _cell_texts(sub: Subplot, trace: Part, font: Part, x: NDArray[Any], y: NDArray[Any], grounds: NDArray[Any]) -> None:
    z, words = numbers(trace["z"]), trace.get("text")
    for row, column in np.ndindex(*z.shape):
        fields = {"x": float(x[column]), "y": float(y[row]), "z": float(z[row, column])}
        if words is not None:
            fields["text"] = words[row][column]
        text = filled(trace["texttemplate"], fields)
        if not np.isfinite(z[row, column]) or text in ("", "None"):
            continue
        own = {"color": ink_on(tuple(grounds[row, column])), **trace.get("textfont", {})}
        look = lettering({**font, **own}, text)
        sub.ax.text(
            float(x[column]), float(y[row]), plain(text), ha="center", va="center", zorder=1.1, clip_on=True, **look
        )


def contour(page: Page, trace: Part) -> None:
    """A field as lines of equal height, filled between them or not."""
    knows_trace(trace, CONTOUR, contours=LEVELS, line=LINE | {"smoothing"})
    steps, line = trace.get("contours", {}), trace.get("line", {})
    sub, z = page.subplot(trace), numbers(trace["z"])
    if not z.size:
        return
    x, y = (_middles(sub, trace, way, count) for way, count in zip("xy", z.shape[::-1], strict=True))
    levels, norm, chart = _levels(trace, z), span(z, trace, "z"), cmap(trace)
    if "zmin" not in trace and "zmax" not in trace:
        norm.vmin, norm.vmax = float(levels[0]), float(levels[-1])
    coloring, alpha = steps.get("coloring", "fill"), trace.get("opacity", 1.0)
    if coloring not in ("fill", "heatmap", "lines", "none"):
        raise one_of("contours", ("fill", "heatmap", "lines", "none"), coloring)
    if coloring in ("fill", "heatmap"):
        between = levels if coloring == "fill" else np.linspace(levels[0], levels[-1], 100)
        sub.ax.contourf(x, y, z, between, cmap=chart, norm=norm, extend="both", alpha=alpha, zorder=1)
    if steps.get("showlines", True) or coloring == "lines":
        width = line.get("width", 0.5 if coloring in ("fill", "heatmap") else 1.5)
        tints: Part = {"cmap": chart, "norm": norm}
        if coloring != "lines":
            tints = {"colors": [colour(line.get("color", "#444"))]}
        tints["linestyles"] = [dashes(line, width)]
        drawn = sub.ax.contour(x, y, z, levels, linewidths=POINT * width, alpha=alpha, zorder=1.1, **tints)
        if steps.get("showlabels"):
            size = lettering({**page.font, **steps.get("labelfont", {})})["fontsize"]
            sub.ax.clabel(drawn, fontsize=size, fmt="%g")
    sub.slack = {"x": 0.0, "y": 0.0}
    page.scale(ScalarMappable(norm, chart), {"showscale": coloring != "none", **trace})


def _levels(trace: Part, z: NDArray[Any]) -> NDArray[Any]:
    """The heights at which contours run."""
    steps = trace.get("contours", {})
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    if "size" in steps:
        start, end = steps.get("start", low), steps.get("end", high)
        return start + steps["size"] * np.arange(int((end - start) / steps["size"] + 1e-6) + 1)
    places = MaxNLocator(trace.get("ncontours", 15), steps=[1, 2, 5, 10]).tick_values(
        trace.get("zmin", low), trace.get("zmax", high)
    )
    return np.asarray(places, float)


def surface(page: Page, trace: Part) -> None:
    """A field as a surface in a scene."""
    knows_trace(trace, SURFACE)
    scene, z = page.scene(trace.get("scene", "scene")), numbers(trace["z"])
    if not z.size:
        return
    x, y = (
        np.arange(count, dtype=float) if trace.get(way) is None else numbers(trace[way])
        for way, count in zip("xy", z.shape[::-1], strict=True)
    )
    if x.ndim == 1:
        x = np.broadcast_to(x[None, :], z.shape)
    if y.ndim == 1:
        y = np.broadcast_to(y[:, None], z.shape)
    heat = numbers(trace["surfacecolor"]) if "surfacecolor" in trace else z
    norm, chart = span(heat, trace, "c"), cmap(trace)
    tints = np.array(chart(norm(heat)))
    tints[..., 3] *= trace.get("opacity", 1.0)
    scene.surface(x, y, z, tints)
    page.scale(ScalarMappable(norm, chart), {"showscale": True, **trace})


def scatter3d(page: Page, trace: Part) -> Artist:
    """Lines and marks in a scene, in front of its surfaces."""
    knows_trace(trace, SCATTER3D, line=LINE, marker=MARKER)
    scene = page.scene(trace.get("scene", "scene"))
    points = np.stack([numbers(trace[way]) for way in "xyz"], 1)
    if not len(points):
        return Line2D([], [])
    mode, line, marker = trace.get("mode", "lines+markers"), trace.get("line", {}), trace.get("marker", {})
    tint = colour(line.get("color", trace["tint"]), trace.get("opacity", 1.0))
    style: Part = {"color": tint, "linewidth": POINT * line.get("width", 2) if "lines" in mode else 0}
    mark = scene.ax.plot(*points.T, zorder=3, linestyle=dashes(line, line.get("width", 2)), **style)[0]
    if "markers" in mode:
        symbol = str(marker.get("symbol", "circle"))
        if symbol not in MARKS:
            raise one_of("marks", MARKS, symbol)
        tints, drawn = shades(marker, len(points), line.get("color", trace["tint"]))
        tints[:, 3] *= trace.get("opacity", 1.0) * marker.get("opacity", 1.0)
        size = np.square(POINT * numbers(marker.get("size", 8)))
        look: Part = {"s": size, "c": tints, "marker": MARKS[symbol], "depthshade": False, "zorder": 3.1}
        scene.ax.scatter(*points.T, **look)
        mark.set(marker=MARKS[symbol], markersize=POINT * 8, markerfacecolor=tuple(tints[0]))
        if drawn is not None:
            page.scale(drawn, marker)
    scene.points.append(points)
    return mark
