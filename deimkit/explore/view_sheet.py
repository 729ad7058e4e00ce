"""A view of a detector's findings as one picture, for a notebook that is read without a kernel."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from deimkit.explore.findings import Findings
from deimkit.explore.plots import INK, PAPER, Picture
from deimkit.explore.tiles import COLOURS, TRUTH, caption, part_of
from deimkit.explore.views import Shown, View
from deimkit.explore.ways import RIM

SIDE = 3.1  # inches of a tile
LETTERS = 44  # of a line under a tile


def draw_view(findings: Findings, view: View, most: int = 4, columns: int = 4) -> Picture:
    """Draw the first images of a view side by side, each cut out around what it is shown for, with a line of words.

    Annotations are dashed and white, sure detections have the colour of their verdict, and what an image is shown for
    is thick. most: images. columns: of them in a row. A view without images is a sentence.
    """
    found = view.select(findings, most)
    rows = -(-max(len(found), 1) // columns)
    figure = Picture(figsize=(SIDE * columns, (SIDE + 0.25) * rows + 0.3), dpi=90, facecolor=PAPER)
    head = 0.3 / figure.get_figheight()
    figure.text(0.005, 1 - head / 2, f"{view.name.capitalize()}: {view.words}", va="center", fontsize=11, color=INK)
    if not found:
        figure.text(0.01, 0.5, "There are none.", color=INK)
    for place, shown in enumerate(found):
        _tile(figure.add_subplot(rows, columns, place + 1), findings, view, shown)
    figure.tight_layout(pad=0.5, rect=(0, 0, 1, 1 - head))
    return figure


def _tile(ax: Axes, findings: Findings, view: View, shown: Shown) -> None:
    """One image of a view."""
    height, width = findings.split.sizes[shown.image].tolist()
    x, y, right, bottom = part_of(findings, view, shown)
    ax.imshow(findings.split.image(shown.image), extent=(0, width, height, 0))
    ax.set(xlim=(x, right), ylim=(bottom, y))
    ax.set_axis_off()
    ax.set_anchor("N")
    ax.set_title("\n".join(textwrap.wrap(caption(findings, view, shown), LETTERS)), fontsize=7.5, loc="left", color=INK)
    rows = findings.split.rows(shown.image)
    for row in range(rows.start, rows.stop):
        strong = view.of == "annotations" and row in shown.rows
        _outline(ax, findings.split.boxes[row], TRUTH, 2.4 if strong else 1.2, "--")
    table = findings.detections
    here = np.flatnonzero((table["image"] == shown.image) & table["sure"])
    for row in {*here.tolist(), *(shown.rows.tolist() if view.of == "detections" else [])}:
        strong = view.of == "detections" and row in shown.rows
        _outline(ax, findings.errors.results.boxes[row], COLOURS[table["verdict"][row]], 2.6 if strong else 1.2, "-")


def _outline(ax: Axes, box: NDArray[Any], colour: str, width: float, style: str) -> None:
    x, y, right, bottom = box.tolist()
    frame = Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor=colour, linewidth=width, linestyle=style)
    frame.set_path_effects([*RIM] if width > 2 else [])
    ax.add_patch(frame)
