"""Two figures of the D-FINE paper, drawn again from this package's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deimkit.distribution import weighting
from deimkit.errors import DeimkitError
from deimkit.explore.curves import LINES
from deimkit.explore.labs.crops import address, crop, outline
from deimkit.explore.labs.edges import Edges, Floats, look
from deimkit.explore.labs.sheet import Ends, Sheet
from deimkit.explore.labs.strips import joined, places, strip
from deimkit.models.detector import Detector

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FIRST, LAST = LINES[1], LINES[2]  # the paper's red and green
SHAPES = {  # name: a, c, colour, dash
    "a = 1/2, c = 1/4 (the paper's)": (0.5, 0.25, LINES[0], "solid"),
    "a = 1/2, c = 1/16": (0.5, 0.0625, LINES[1], "dash"),
    "a = 1/2, c = 4": (0.5, 4.0, LINES[2], "dot"),
    "a = 1/4, c = 1/4": (0.25, 0.25, LINES[3], "dashdot"),
}
MOST = 4  # pictures side by side
SURE = 6  # the most confident objects of a picture, among which one is shown


def weighting_function(bins: int = 32) -> Figure:
    """Draw W(n) for a few a and c, and how far it is from one bin to the next (D-FINE Fig. 2 and Eq. 3)."""
    sheet = Sheet()
    n, half = np.arange(bins + 1), np.arange(bins) + 0.5
    x, y = {"title": "bin n"}, {"title": "sides of the box"}
    curve = sheet.panel("W(n)", (0, 0.47), (0, 1), x, y)
    steps = sheet.panel("from one bin to the next (log)", (0.56, 1), (0, 1), x, y | {"type": "log"})
    for name, (a, c, tint, dash) in SHAPES.items():
        W = (weighting(bins, a, 1 / c) * c).numpy()
        look = {"name": name, "mode": "lines+markers", "marker": {"size": 4}}
        look |= {"line": {"color": tint, "dash": dash, "width": 2}}
        curve.add("scatter", x=n, y=W, **look)
        steps.add("scatter", x=half, y=np.diff(W), showlegend=False, **look)
    return sheet.figure(420, legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom"})


def refinement(model: Detector, images: Sequence[Any]) -> Figure:
    """Draw a box that was refined much in each of one to four pictures, and its edges' distributions (D-FINE Fig. 4).

    Red is after the first layer (the box: the one that it measures from), green after the last; the upper row of
    distributions is as it is, the lower one times W(n).
    """
    if not 1 <= len(images) <= MOST:
        raise DeimkitError(f"This figure shows 1 to {MOST} pictures; got {len(images)}.")
    sheet, width = Sheet(), 1 / len(images)
    for k, image in enumerate(images):
        _column(sheet, look(model, image, objects=SURE), (k * width, (k + 0.86) * width), named=k == 0)
    return sheet.figure(700, legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"})


def _column(sheet: Sheet, edges: Edges, across: Ends, named: bool) -> None:
    """One picture with the object whose edges moved most, and under it their distributions; named: in the legend."""
    parts = edges.chance * edges.offsets  # (L, n, 4, R + 1)
    i = int(np.abs(edges.boxes[-1] - edges.anchors).max(-1).argmax())
    boxes, source = np.stack([edges.anchors[i], edges.boxes[-1, i]]), address(edges.picture)
    title, names = f"{edges.names[i]} {edges.scores[i]:.2f}", ("first box", "last box")
    panel = crop(sheet, title, across, (0.52, 1.0), source, edges.picture.shape[:2], boxes)
    for name, box, tint in zip(names, boxes, (FIRST, LAST), strict=True):
        panel.add(
            "scatter", **outline(box), name=name, mode="lines", line={"color": tint, "width": 3}, showlegend=False
        )
    _row(sheet, edges.chance[[0, -1], i], across, (0.28, 0.44), "", "probability" if named else "", named)
    _row(
        sheet, parts[[0, -1], i], across, (0.0, 0.18), "left, top, right, bottom", "× W(n), px" if named else "", False
    )


def _row(sheet: Sheet, values: Floats, across: Ends, up: Ends, words: str, y: str, named: bool) -> None:
    """Distributions after the first and the last layer. values: (2, 4, R + 1)."""
    bins = values.shape[-1]
    panel = strip(sheet, "", across, up, bins, words, {"title": y})
    sheet.axis(panel.x).update(showticklabels=False, ticks="")
    looks = zip(("after the first layer", "after the last"), values, (FIRST, LAST), ("dot", "solid"), strict=True)
    for name, rows, tint, dash in looks:
        line = {"color": tint, "dash": dash, "width": 2}
        panel.add("scatter", x=places(bins), y=joined(rows), name=name, mode="lines", line=line, showlegend=named)
