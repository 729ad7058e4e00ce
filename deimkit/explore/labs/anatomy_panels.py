"""How the anatomy lab looks: the whole picture, the part where a query looks, and where its weight goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.crops import crop, outline
from deimkit.explore.labs.sheet import Drawing, Panel, Sheet
from deimkit.explore.plots import PALETTE, PAPER

if TYPE_CHECKING:
    from deimkit.explore.labs.anatomy_lab import Looked

TINTS = (PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3], PALETTE[4])  # of the levels, fine to coarse
MARKS = ("circle", "square", "diamond", "triangle-up", "cross")
BEFORE, AFTER = {"color": "#D55E00", "width": 2.5, "dash": "dot"}, {"color": "#F0E442", "width": 2.5}
LARGEST = 26  # pixels: the mark of a point that has all the weight of its head
UPPER, LOWER = (0.37, 1.0), (0.0, 0.25)
QUIET: dict[str, Any] = {"showlegend": False, "hoverinfo": "skip"}  # a click goes to what lies under it
GREYS = ("#d9dde1", "#b9bfc6")


def panels(found: Looked) -> Drawing:
    """The figure of what the lab found: always the same traces in the same order."""
    sheet = Sheet()
    _whole(sheet, found)
    _zoomed(sheet, found)
    _shares(sheet, found)
    _weights(sheet, found)
    legend = {"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom", "itemsizing": "constant"}
    return sheet.drawing(820, legend=legend, barmode="group", bargap=0.25)


def _whole(sheet: Sheet, found: Looked) -> None:
    """The whole picture with all cells that became queries, and where this query ends."""
    height, width = found.size
    middle = np.array([[width, height, width, height]]) / 2
    reach = 0.63 * np.array([-max(found.size), -max(found.size), max(found.size), max(found.size)]) / 2
    title = f"the {len(found.cells)} cells that became queries"
    panel = crop(sheet, title, (0, 0.48), UPPER, found.source, found.size, middle + reach)
    for level, name in enumerate(found.levels):
        x, y = found.cells[found.cell_level == level].T
        mark = {"size": 6, "line": {"color": INK, "width": 0.8}, **_look(level)}
        panel.add("scatter", x=x, y=y, name=f"cells {name}", mode="markers", marker=mark, showlegend=False)
    _boxes(panel, found, named=True)
    x, y = found.cells[found.query].tolist()
    ring = {"size": 14, "symbol": "circle-open", "color": AFTER["color"], "line": {"width": 3}}
    panel.add("scatter", x=[x], y=[y], name="its cell", mode="markers", marker=ring)


def _zoomed(sheet: Sheet, found: Looked) -> None:
    """Where the query looks: its points by level and weight, the box they are laid around, and the one that follows."""
    points = found.points[found.shown]
    seen = np.where(found.shown[..., None], found.points, np.nan)
    near = np.concatenate([found.boxes, np.quantile(points, [0.1, 0.9], axis=0).reshape(1, 4)])
    title = f"where it looks in {found.layers[found.layer]}: the larger, the more a point counts"
    panel = crop(sheet, title, (0.52, 1), UPPER, found.source, found.size, near)
    _boxes(panel, found, named=False)
    for level, name in enumerate(found.levels):
        mine = found.point_level == level
        (x, y), weight = seen[:, mine].reshape(-1, 2).T, found.weights[:, mine].ravel()
        mark = {"size": 4 + LARGEST * np.sqrt(weight), "opacity": 0.85, "line": {"color": INK, "width": 1}}
        mark |= _look(level)
        panel.add("scatter", x=x, y=y, name=f"points {name}", mode="markers", marker=mark)
    x, y = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).T
    size = [6] * (len(x) - 1) + [13]
    mark = {"size": size, "symbol": "star", "color": AFTER["color"], "line": {"color": INK, "width": 1}}
    line = {"color": AFTER["color"], "width": 2}
    panel.add("scatter", x=x, y=y, name="way of its centre", mode="lines+markers", marker=mark, line=line)


def _boxes(panel: Panel, found: Looked, named: bool) -> None:
    """The box that the layer looks around, and the one that it makes of it."""
    for name, box, line in (("box before", 0, BEFORE), ("box after", 1, AFTER)):
        corners = outline(found.boxes[found.layer + box])
        panel.add("scatter", **corners, name=name, mode="lines", line=line, showlegend=named, hoverinfo="skip")


def _shares(sheet: Sheet, found: Looked) -> None:
    """How the weight is shared by the levels, layer by layer."""
    whose = "all heads" if found.head is None else f"head {found.head + 1}"
    across = {"tickvals": list(range(len(found.levels))), "ticktext": list(found.levels), "showgrid": False}
    up = {"title": "weight, %", "range": [0, 108]}
    title = f"weight by level, {whose}; blue: {found.layers[found.layer]}, lines: all points alike"
    panel = sheet.panel(title, (0, 0.42), LOWER, across | {"title": "level"}, up)
    for i, (layer, share) in enumerate(zip(found.layers, found.shares, strict=True)):
        here = i == found.layer
        bar = {"color": LINES[0] if here else GREYS[i % 2]}
        words = [f"{value:.0%}" if here else "" for value in share]
        text = {"text": words, "textposition": "outside", "cliponaxis": False}
        panel.add("bar", x=list(range(len(share))), y=100 * share, name=layer, marker=bar, showlegend=False, **text)
    mark = {"symbol": "line-ew", "size": 60, "line": {"color": LINES[1], "width": 2}, "color": LINES[1]}
    look = {"name": "all points alike", "mode": "markers", "marker": mark, **QUIET}
    panel.add("scatter", x=list(range(len(found.even))), y=100 * found.even, **look)


def _weights(sheet: Sheet, found: Looked) -> None:
    """Every weight of the layer: a row per head, a column per point."""
    heads, points = found.weights.shape
    middles = [float(np.flatnonzero(found.point_level == level).mean()) for level in range(len(found.levels))]
    across = {"tickvals": middles, "ticktext": list(found.levels), "showgrid": False, "ticks": ""}
    up = {"title": "head", "tickvals": list(range(1, heads + 1)), "showgrid": False, "range": [heads + 0.5, 0.5]}
    panel = sheet.panel("weight of every point (columns), %", (0.52, 0.93), LOWER, across | {"title": "level"}, up)
    bar = {"thickness": 12, "x": 1.0, "y": sum(LOWER) / 2, "len": LOWER[1] - LOWER[0] + 0.04, "xanchor": "right"}
    sizes = {"x": list(range(points)), "y": list(range(1, heads + 1)), "z": 100 * found.weights, "zmin": 0}
    panel.add("heatmap", **sizes, name="weights", colorscale="Viridis", colorbar=bar)
    ends = np.flatnonzero(np.diff(found.point_level)) + 0.5
    x, y = np.tile(ends[:, None], 3).ravel(), np.tile([0.5, heads + 0.5, np.nan], len(ends))
    panel.add("scatter", x=x, y=y, name="levels", mode="lines", line={"color": PAPER, "width": 2}, **QUIET)
    row = (0.5, heads + 0.5) if found.head is None else (found.head + 0.5, found.head + 1.5)
    frame = outline(np.array([-0.5, row[0], points - 0.5, row[1]]))
    line = {"color": LINES[1], "width": 2.5}
    panel.add("scatter", **frame, name="chosen", mode="lines", line=line, **QUIET)


def _look(level: int) -> dict[str, Any]:
    return {"color": TINTS[level % len(TINTS)], "symbol": MARKS[level % len(MARKS)]}
