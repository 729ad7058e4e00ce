"""How the loss lab looks: six panels around one star."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.loss_curves import PUBLISHED, P, Q
from deimkit.explore.labs.sheet import Drawing
from deimkit.explore.style import FAINT, LOOK

if TYPE_CHECKING:
    from torch import Tensor

    from deimkit.explore.labs.loss_lab import Found

Trace = dict[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
LOOKS = dict(zip(PUBLISHED, zip(LINES, DASHES, strict=False), strict=True))  # colour and dash of a loss as published
STAR = {"symbol": "star", "size": 18, "color": "#F0E442", "line": {"color": INK, "width": 1.2}}
DOT = {"size": 5, "color": "rgba(255, 255, 255, 0.75)", "line": {"color": INK, "width": 0.6}}
LEVELS = {"start": 0.0, "end": 4.0, "size": 0.25}  # of the maps, which have one scale
ACROSS, UP = ((0.0, 0.27), (0.365, 0.635), (0.73, 1.0)), ((0.58, 1.0), (0.0, 0.41))
TOP, STEEP = 4.8, 1.4  # the ends of the axes: BCE at a score of 0.01, and a little more than QFL's steepest
SCORE, IOU, NUMBER = "score p", "IoU q of the match", "number of pairs"


def panels(found: Found) -> Drawing:
    """The figure of what the lab found: always the same traces in the same order."""
    p, q = found.score, found.iou
    counted = {"line": {"color": FAINT, "dash": "dot", "width": 2}, "name": NUMBER, "showlegend": True}
    traces = [*_lines(1, P, found.cost, found.loss, named=True), _points(1, [p], [found.star[0]], "star", STAR)]
    traces += [*_lines(2, P, found.slope, found.loss), _points(2, [p], [found.star[1]], "star", STAR)]
    traces += [*_lines(3, Q, found.target, found.loss), _points(3, [q], [found.aim], "star", STAR)]
    for panel, costs in zip((4, 5), found.maps, strict=True):
        traces.append(_map(panel, costs))
        traces.append(_points(panel, found.scores.numpy(), found.ious.numpy(), "pairs", DOT))
        traces.append(_points(panel, [p], [q], "star", STAR))
    traces += [*_lines(6, Q, found.share, found.loss), _line(6, Q, found.counted) | counted]
    return {"data": traces, "layout": _layout(found)}


def _on(panel: int) -> Trace:
    return {"xaxis": f"x{panel}", "yaxis": f"y{panel}"} if panel > 1 else {}


def _line(panel: int, x: Tensor, y: Tensor) -> Trace:
    return {"type": "scatter", "mode": "lines", "x": x.numpy(), "y": y.numpy(), **_on(panel)}


def _lines(panel: int, x: Tensor, lines: dict[str, Tensor], tuned: str, named: bool = False) -> list[Trace]:
    """A line for each loss as published, on a broad one for the tuned loss."""
    traces = []
    for name, values in lines.items():
        colour, dash = LOOKS.get(name, (LOOKS[tuned][0], "solid"))
        line = {"color": colour, "dash": dash, "width": 2}
        if name not in LOOKS:
            red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            line, name = {"color": f"rgba({red}, {green}, {blue}, 0.35)", "width": 9}, f"{tuned} as set"
        traces.append(_line(panel, x, values) | {"name": name, "line": line, "showlegend": named})
    return traces


def _points(panel: int, x: Any, y: Any, name: str, marker: Trace) -> Trace:
    look = {"marker": marker, "showlegend": False, "cliponaxis": False}
    return {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, **look, **_on(panel)}


def _map(panel: int, costs: Tensor) -> Trace:
    bar = {"title": {"text": "loss"}, "x": ACROSS[0][1], "y": sum(UP[1]) / 2, "len": UP[1][1] + 0.03, "thickness": 12}
    scale = {"zmin": LEVELS["start"], "zmax": LEVELS["end"], "showscale": panel == 4, "colorbar": bar}
    numbers = {"x": P.numpy(), "y": Q.numpy(), "z": costs.numpy()}
    return {"type": "contour", "name": f"map {panel - 3}", **numbers, "contours": LEVELS, **scale, **_on(panel)}


def _layout(found: Found) -> dict[str, Any]:
    what = f"a match of IoU {found.iou:g}" if found.matched else "the background"
    pays = "the pairs of this batch" if len(found.ious) else f"every IoU, score {found.score:g}"
    shown = [
        (f"loss of {what}", SCORE, "loss", (0, 1), (0, TOP)),
        (f"its slope: {what}", SCORE, "d loss / d logit", (0, 1), (-STEEP, STEEP)),
        ("target of a match", IOU, "target of the score", (0, 1), (0, 1.02)),
        (f"loss of a match, {found.loss} as set", SCORE, IOU, (0, 1), (0, 1)),
        (f"loss of a match, {found.beside} as published", SCORE, "", (0, 1), (0, 1)),
        (f"who pays: {pays}", "up to this IoU", "share of the loss of all pairs", (0, 1), (0, 1.02)),
    ]
    layout: dict[str, Any] = {"template": LOOK, "width": 1040, "height": 790, "dragmode": False}
    layout["margin"] = {"l": 60, "r": 20, "t": 80, "b": 50}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom", "borderwidth": 0}
    layout["annotations"] = []
    for i, (title, x, y, across, up) in enumerate(shown):
        name, (column, row) = "" if i == 0 else str(i + 1), (ACROSS[i % 3], UP[i // 3])
        layout[f"xaxis{name}"] = {
            "title": {"text": x},
            "range": across,
            "dtick": 0.2,
            "domain": column,
            "anchor": f"y{name}",
        }
        layout[f"yaxis{name}"] = {"title": {"text": y}, "range": up, "domain": row, "anchor": f"x{name}"}
        at = {"x": column[0], "y": row[1], "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append({"text": f"<b>{title}</b>", "showarrow": False, "yshift": 4, **at})
    return layout
