"""How the lab of errors looks: a matrix of what is taken for what, and two curves with a star at the threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.sheet import Drawing, Panel, Sheet
from deimkit.explore.style import FAINT

if TYPE_CHECKING:
    from deimkit.explore.labs.error_lab import Confused

MATRIX, CURVE = "matrix", "curve "  # names of traces; a curve's goes on with its number
WRITTEN = 12  # classes up to which the counts are written into the matrix
NAMED = 30  # names that fit along an axis


def panels(found: Confused) -> Drawing:
    """The figure of what the lab found."""
    sheet = Sheet()
    size = len(found.names)
    step = -(-size // NAMED)
    marks = {"tickvals": list(range(0, size, step)), "ticktext": found.names[::step], "showgrid": False}
    across = marks | {"title": "predicted", "range": [-0.5, size - 0.5]}
    up = marks | {"title": "annotated", "range": [size - 0.5, -0.5]}
    _matrix(sheet.panel("what is taken for what", (0.0, 0.5), (0.0, 1.0), across, up), found)
    axes = ({"title": "recall", "range": [0, 1.02]}, {"title": "precision", "range": [0, 1.05]})
    _curves(sheet.panel("precision and recall", (0.62, 1.0), (0.0, 1.0), *axes), found)
    legend = {"x": 0.62, "y": 0.02, "xanchor": "left", "yanchor": "bottom"}
    return sheet.drawing(460, showlegend=True, legend=legend, margin={"l": 90, "r": 20, "t": 50, "b": 80})


def _matrix(panel: Panel, found: Confused) -> None:
    """The counts, coloured by their share of what is annotated so, with a frame around the chosen cell."""
    matrix = found.matrix
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    look = {"zmin": 0.0, "zmax": 1.0, "colorscale": "Blues", "showscale": False}
    panel.add("heatmap", z=share, x=list(range(len(matrix))), y=list(range(len(matrix))), name=MATRIX, **look)
    row, column = found.cell
    corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    frame = {"type": "rect", **corners, "xref": panel.x, "yref": panel.y, "line": {"color": LINES[1], "width": 3}}
    panel.sheet.layout["shapes"] = [frame]
    if len(matrix) <= WRITTEN + 1:
        for (i, j), count in np.ndenumerate(matrix):
            panel.say(str(count), j, i, font={"color": "#ffffff" if share[i, j] > 0.6 else INK})


def _curves(panel: Panel, found: Confused) -> None:
    """All classes in grey, the chosen one in colour, a star where the threshold is."""
    looks = ({"color": FAINT, "width": 2, "dash": "dash"}, {"color": LINES[0], "width": 2.5})
    for number, (curve, line) in enumerate(zip(found.curves, looks, strict=True)):
        ends = _ends_of_runs(curve.recall)
        at = {"x": curve.recall[ends], "y": curve.precision[ends]}
        panel.add("scatter", **at, mode="lines", name=f"{CURVE}{number}", line=line, showlegend=False)
        panel.add("scatter", x=[None], y=[None], mode="lines", name=curve.name, line=line)
    star = {"symbol": "star", "size": 16, "color": "#F0E442", "line": {"color": INK, "width": 1.2}}
    recall, precision = found.curves[1].point
    name = f"score {found.threshold:.2f}"
    panel.add("scatter", x=[recall], y=[precision], mode="markers", name=name, marker=star, cliponaxis=False)


def _ends_of_runs(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """The first and the last of equal neighbours: a line through them looks as one through all, with far fewer points.

    For recall as x that is so as precision only falls from one detection that is right to the next.
    """
    change = np.flatnonzero(np.diff(values)) + 1
    return np.union1d(np.append(0, change), np.append(change, len(values)) - 1)[: len(values)]
