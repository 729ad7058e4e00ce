"""The panels of the matcher's lab: the picture with its pairs, the cost matrix, and the rules' counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.labs.crops import address, outlines
from deimkit.explore.labs.match_scene import Floats
from deimkit.explore.labs.sheet import Panel, Sheet
from deimkit.explore.plots import INK, PALETTE, PAPER
from deimkit.explore.style import FAINT

if TYPE_CHECKING:
    from deimkit.explore.labs.match_lab import Matched

DOTS, CELLS, MARKS = "all queries", "cost", "pairs"  # what can be clicked
TARGET, MATCHED, MOVED, CHANGED = PALETTE[1], PALETTE[0], PALETTE[3], PALETTE[5]
SHADE = "rgba(0, 0, 0, 0.65)"
RIVALS = 8  # boxes of queries without a target that are shown
LEGEND = {"orientation": "h", "x": 0, "y": -0.06, "yanchor": "top", "font": {"size": 12}}
HIDDEN = {"visible": False, "constrain": "domain"}
LEFT, RIGHT = (0, 0.49), (0.61, 0.94)  # where the panels are
_HOVER = {"hoverinfo": "text", "showlegend": False}
WORDS = 26  # rows of the heat map up to which targets are named


def picture(sheet: Sheet, found: Matched) -> None:
    """The picture, its targets, the boxes that answer for them, and a line from a target's number to each of these."""
    height, width = found.scene.picture.shape[:2]
    across = HIDDEN | {"range": [0, width], "constraintoward": "left"}
    up = HIDDEN | {"range": [height, 0], "scaleanchor": "x", "scaleratio": 1, "constraintoward": "top"}
    panel = sheet.panel("orange: targets; blue: who answers; white: all other queries", LEFT, (0, 1), across, up)
    place = {"x": 0, "y": 0, "sizex": width, "sizey": height, "xref": panel.x, "yref": panel.y, "layer": "below"}
    sheet.layout["images"].append({"source": address(found.scene.picture), "sizing": "stretch", **place})
    wanted, boxes = found.scene.wanted, found.boxes
    rivals = np.setdiff1d(found.columns, found.pairs[:, 1], assume_unique=True)[:RIVALS]
    line = {"color": "#FFFFFF", "width": 1, "dash": "dot"}
    _lines(panel, "rivals", outlines(boxes[rivals]), line, showlegend=False)
    _lines(panel, "rim", outlines(wanted), {"color": SHADE, "width": 4}, showlegend=False)
    _lines(panel, "targets", outlines(wanted), {"color": TARGET, "width": 2.2})
    _lines(panel, "who answers", outlines(boxes[found.pairs[:, 1]]), {"color": MATCHED, "width": 1.4, "dash": "dash"})
    _lines(panel, "shade", _links(found, found.pairs), {"color": SHADE, "width": 3.4}, showlegend=False)
    _lines(panel, "for which target", _links(found, found.pairs), {"color": MATCHED, "width": 1.8})
    _lines(panel, "new by the move", _links(found, found.gained), {"color": CHANGED, "width": 3})
    _lines(panel, "gone by the move", _links(found, found.lost), {"color": CHANGED, "width": 2, "dash": "dot"})
    busy = np.isin(np.arange(len(boxes)), found.pairs[:, 1])
    order = busy.argsort(kind="stable")  # those that answer on top
    x, y = _centres(boxes)[order].T
    size, tint = np.where(busy, 8, 5)[order], np.where(busy, MATCHED, PAPER)[order]
    dots = {"size": size, "color": tint, "line": {"color": INK, "width": 0.8}}
    hover = [f"query {q}, score {found.scores[q]:.2f}" for q in order.tolist()]
    panel.add("scatter", x=x, y=y, name=DOTS, mode="markers", marker=dots, hovertext=hover, **_HOVER)
    corner = _tags(found)
    ground = {"symbol": "square", "size": 13, "color": TARGET}
    text = {"text": [str(n + 1) for n in range(len(wanted))], "textposition": "middle center"}
    panel.add(
        "scatter",
        **{"x": corner[:, 0], "y": corner[:, 1], "name": "numbers", "mode": "markers+text", "marker": ground, **text},
        textfont={"size": 9, "color": INK},
        hovertext=found.scene.names,
        **_HOVER,
    )


def movable(found: Matched) -> dict[str, Any]:
    """The box that can be dragged."""
    x0, y0, x1, y1 = found.boxes[found.query].tolist()
    line = {"color": MOVED, "width": 3}
    return {"type": "rect", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "xref": "x", "yref": "y", "line": line} | {
        "editable": True,
        "fillcolor": "rgba(204, 121, 167, 0.2)",
    }


def matrix(sheet: Sheet, found: Matched) -> None:
    """What every target would pay for the most relevant queries, with the pairs marked and the moved query framed."""
    count, columns = len(found.cost), found.columns
    few = count <= WORDS
    rows = [f"{n + 1} {name}" if few else str(n + 1) for n, name in enumerate(found.scene.names)]
    every = 1 if few else 5
    last = len(columns) - 1
    step = -(-len(columns) // 45)
    x = {"title": "query", "range": [-0.5, last + 0.5], "showgrid": False, "tickangle": -90, "tickfont": {"size": 9}}
    x |= {"tickvals": list(range(0, len(columns), step)), "ticktext": [str(q) for q in columns[::step]]}
    y = {"range": [max(count, 1) - 0.5, -0.5], "showgrid": False, "tickfont": {"size": 10}}
    y |= {"tickvals": list(range(0, count, every)), "ticktext": rows[::every]}
    panel = sheet.panel("what each pair would cost (dots: the pairs)", RIGHT, (0.36, 1), x, y)
    cost, shown = found.cost[:, columns], ~found.far[:, columns]
    ends = np.percentile(cost[shown], (0, 95)) if shown.any() else np.zeros(2)
    panel.add(
        "heatmap",
        x=list(range(len(columns))),
        y=list(range(max(count, 1))),
        z=_without_nan(cost.round(3), shown) or [[None] * len(columns)],
        name=CELLS,
        zmin=float(ends[0]),
        zmax=float(ends[1]),
        reversescale=True,
        colorbar={"title": {"text": "cost"}, "x": RIGHT[1], "len": 0.6, "y": 0.7, "thickness": 12},
        hovertemplate="target row %{y}, column %{x}: %{z:.2f}<extra></extra>",
    )
    where = {query: place for place, query in enumerate(columns.tolist())}
    at = [(where[query], target) for target, query in found.pairs.tolist()]
    x_at, y_at = np.array(at, float).reshape(-1, 2).T
    dot = {"size": 7 if few else 4, "color": PAPER, "line": {"color": INK, "width": 1.2}}
    panel.add("scatter", x=x_at, y=y_at, name=MARKS, mode="markers", marker=dot, showlegend=False, hoverinfo="skip")
    mine = where[found.query]
    frame = outlines(np.array([[mine - 0.5, -0.5, mine + 0.5, max(count, 1) - 0.5]]))
    _lines(panel, "the box that moves", frame, {"color": MOVED, "width": 2.5})
    if found.far.any():
        panel.say("blank: lies outside, 100,000 more", 1, 0, xref="x2 domain", yref="y2 domain", **_BELOW)


_BELOW = {"xanchor": "right", "yanchor": "top", "yshift": -40, "font": {"size": 11, "color": FAINT}}


def counts(sheet: Sheet, found: Matched) -> None:
    """How many queries have a target by each of the rules: O2O, O2M and Dense O2O side by side."""
    names, values = list(found.positives), list(found.positives.values())
    most = max(*values, 1)
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False, "tickfont": {"size": 11}}
    up = {"range": [len(names) - 0.4, -0.6], **ticks}
    panel = sheet.panel("queries with a target, by rule", RIGHT, (0.02, 0.19), {"range": [0, 1.15 * most]}, up)
    tints = [MATCHED if name == found.rule else "#c4c8cc" for name in names]
    words = {"text": [str(value) for value in values], "textposition": "outside", "cliponaxis": False}
    bars = {"orientation": "h", "marker": {"color": tints}, "showlegend": False, "hoverinfo": "skip"}
    panel.add("bar", x=values, y=list(range(len(names))), name="positives", **bars, **words)


def _lines(panel: Panel, name: str, at: tuple[Floats, Floats], line: dict[str, Any], **how: Any) -> None:
    """One trace for many lines."""
    panel.add("scatter", x=at[0], y=at[1], name=name, mode="lines", line=line, hoverinfo="skip", **how)


def _tags(found: Matched) -> Floats:
    """Where the numbers of targets are: at the upper left corner, but within the picture. (N, 2)."""
    height, width = found.scene.picture.shape[:2]
    return np.clip(found.scene.wanted[:, :2], (0.015 * width, 0.015 * height), None)


def _links(found: Matched, pairs: Any) -> tuple[Floats, Floats]:
    """A line from the number of every target to the centre of its query's box. (M, 2) -> (3 M,), (3 M,)."""
    ends = _tags(found)[pairs[:, 0]], _centres(found.boxes[pairs[:, 1]])
    x, y = np.stack([*ends, np.full((len(pairs), 2), np.nan)], 1).reshape(-1, 2).T
    return x, y


def _centres(boxes: Floats) -> Floats:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _without_nan(values: Floats, shown: NDArray[np.bool_]) -> list[list[float | None]]:
    """A table as JSON can have it, with None for what is not to be shown."""
    return [
        [x if kept else None for x, kept in zip(*row, strict=True)]
        for row in zip(values.tolist(), shown.tolist(), strict=True)
    ]
