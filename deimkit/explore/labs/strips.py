"""The distributions of a box's four edges side by side in one panel, each over its own bins."""

from __future__ import annotations

from typing import Any

import numpy as np

from deimkit.explore.curves import LINES
from deimkit.explore.labs.edges import EDGES, Floats
from deimkit.explore.labs.sheet import Ends, Panel, Sheet

TINTS = (LINES[0], LINES[3], LINES[4], LINES[5])  # of the edges; red and green are for first and last
MARKS = ("circle", "square", "diamond", "x")
GAP = 3  # bins left free between two edges


def strip(sheet: Sheet, title: str, across: Ends, up: Ends, bins: int, words: str, y: dict[str, Any]) -> Panel:
    """A panel for the `bins` of each edge; words: under all four."""
    ticks = [(place(edge, n, bins), n) for edge in range(4) for n in (0, bins // 2, bins - 1)]
    x = {"tickvals": [at for at, _ in ticks], "ticktext": [str(n) for _, n in ticks], "showgrid": False}
    x |= {"range": [-2, place(4, 0, bins) - GAP + 1], "title": words}
    return sheet.panel(title, across, up, x, y)


def places(bins: int) -> Floats:
    """Where `joined` values are drawn."""
    return np.arange(4.0 * (bins + GAP))


def joined(values: Floats) -> Floats:
    """Four rows of bins (4, R + 1) as one, with a gap after each where lines break off. (4 * (R + 1 + GAP),)."""
    return np.pad(values, ((0, 0), (0, GAP)), constant_values=np.nan).ravel()


def place(edge: int, n: int, bins: int) -> int:
    """Where bin n of an edge is drawn."""
    return edge * (bins + GAP) + n


def edge_and_bin(x: float, bins: int) -> dict[str, Any]:
    """The edge and the bin that are drawn at a place, by name and number; nothing between two edges."""
    edge, n = divmod(int(x), bins + GAP)
    return {"edge": EDGES[edge], "bin": n} if n < bins else {}
