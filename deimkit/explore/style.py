"""The look that the plotly figures of this package share, live and as still pictures."""

from __future__ import annotations

from typing import Any

from deimkit.explore.curves import INK, LINES
from deimkit.explore.plots import PAPER

SCALE = "Viridis"
FAINT, GRID = "#8a8a8a", "#e6e8eb"
_AXIS = {"gridcolor": GRID, "zeroline": False, "showline": True, "linecolor": FAINT, "automargin": True}
_AXIS |= {"ticks": "outside", "tickcolor": FAINT, "ticklen": 4, "title": {"standoff": 8}}
_SIDE = {"showbackground": False, "gridcolor": GRID, "linecolor": FAINT, "zeroline": False}
# A template of plotly: what every figure starts from, and can say otherwise.
LOOK: dict[str, Any] = {
    "layout": {
        "autotypenumbers": "strict",
        "colorway": LINES,
        "font": {"color": INK, "size": 13},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 50, "r": 20, "t": 36, "b": 40},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "scene": {"xaxis": _SIDE, "yaxis": _SIDE, "zaxis": _SIDE},
        "legend": {"traceorder": "normal"},
        "annotationdefaults": {"arrowcolor": INK, "arrowhead": 2, "arrowwidth": 1},
        "shapedefaults": {"line": {"color": INK}},
        "hovermode": "closest",
    },
    "data": {kind: [{"colorscale": SCALE}] for kind in ("heatmap", "contour", "surface")},
}
