"""The ways of a few detections through the decoder, beside the annotation they are about: how a failure came to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from deimkit.errors import DeimkitError
from deimkit.explore.curves import INK, LINES, quiet
from deimkit.explore.findings import Findings
from deimkit.explore.plots import PAPER, Picture
from deimkit.explore.traces import Traces, iou_of

Floats = NDArray[np.float32]
ROOM = 0.7  # what is shown around the boxes, in longer sides of what they cover
RIM = [withStroke(linewidth=3.2, foreground="#000000A0")]


def draw_ways(findings: Findings, detections: Sequence[int], annotation: int = -1) -> Picture:
    """Draw how some detections of an image came to be: their boxes, and after every layer their IoU and score.

    detections: rows of `findings.detections`, of one image, at most six. annotation: the row of the split's boxes that
    they are about, -1 for none; then no IoU is drawn. Of every detection the query's first box is dotted and its last
    one solid, those between are thin; the annotation is dashed. Raises `DeimkitError` without traces, or for
    detections of several images.
    """
    traces, rows = findings.traces, list(detections)
    if traces is None:
        raise DeimkitError("Findings without traces do not know how a detection came to be; `find` keeps them.")
    images = set(traces.results.image[rows].tolist())
    if annotation >= 0:
        images.add(int(findings.split.images_of_rows[annotation]))
    if len(images) != 1 or len(rows) > len(LINES):
        raise DeimkitError(f"Expected up to {len(LINES)} detections of one image; got {len(rows)} of {len(images)}.")
    figure = Picture(figsize=(12, 3.9), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        1, 3, left=0.01, right=0.94, bottom=0.15, top=0.9, wspace=0.28, width_ratios=(1.25, 1, 1)
    )
    picture, overlap, score = (figure.add_subplot(grid[0, i]) for i in range(3))
    truth = findings.split.boxes[annotation] if annotation >= 0 else None
    _boxes(picture, findings, images.pop(), rows, truth)
    names = [f"{findings.detections['label'][row]}, query {traces.query[row]}" for row in rows]
    start = np.concatenate([traces.start[rows][:, None], traces.boxes[rows]], 1)  # (k, 1 + L, 4)
    iou = np.full(start.shape[:2], np.nan) if truth is None else iou_of(start, truth)
    _lines(overlap, "IoU with the annotation", iou, ["first", *traces.layers], names)
    _lines(score, "score for its class", traces.scores[rows], list(traces.layers), names)
    return figure


def about(findings: Findings, annotation: int, most: int = 3) -> list[int]:
    """The detections that have most to do with an annotation: by their verdict, or because the matcher chose them.

    Rows of `findings.detections`, at most so many: first that of the query that the matcher gives it at the last
    layer, then those that are about it, the surest first.
    """
    rows = findings.detections
    on_it = np.flatnonzero(rows["target"] == annotation)
    chosen = _of_query(findings.traces, int(findings.split.images_of_rows[annotation]), annotation)
    found = [*chosen, *on_it[np.argsort(-rows["score"][on_it], kind="stable")].tolist()]
    return list(dict.fromkeys(found))[:most]


def _of_query(traces: Traces | None, image: int, annotation: int) -> list[int]:
    """The best detection of the query that the matcher gives an annotation at the last layer, if there is one."""
    if traces is None:
        return []
    same = (traces.results.image == image) & (traces.query == traces.matched[annotation, -1])
    return np.flatnonzero(same)[:1].tolist()


def _boxes(ax: Axes, findings: Findings, image: int, rows: list[int], truth: Floats | None) -> None:
    """The part of the image where all of this is, with the boxes."""
    traces = findings.traces
    assert traces is not None
    ax.imshow(
        findings.split.image(image), extent=(0, findings.split.sizes[image][1], findings.split.sizes[image][0], 0)
    )
    shown = [*([] if truth is None else [truth]), *traces.start[rows], *traces.boxes[rows].reshape(-1, 4)]
    low, high = np.min(shown, 0)[:2], np.max(shown, 0)[2:]
    half = ROOM * max(*(high - low), 1.0)
    middle = (low + high) / 2
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half))
    ax.set_title(findings.split.paths[image].name, loc="left", fontsize=10, color=INK)
    ax.set_axis_off()
    for row, colour in zip(rows, LINES, strict=False):
        for box in traces.boxes[row, :-1]:
            _outline(ax, box, colour, 0.9, "-")
        _outline(ax, traces.start[row], colour, 1.6, (0, (1, 1)))
        _outline(ax, traces.boxes[row, -1], colour, 2.4, "-", RIM)
    if truth is not None:
        _outline(ax, truth, "#FFFFFF", 1.6, (0, (4, 3)), RIM)


def _outline(
    ax: Axes, box: Floats, colour: str, width: float, style: Any, rim: Sequence[AbstractPathEffect] = ()
) -> None:
    x, y, right, bottom = box.tolist()
    frame = Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor=colour, linewidth=width, linestyle=style)
    frame.set_path_effects(list(rim))
    ax.add_patch(frame)


def _lines(ax: Axes, title: str, values: Floats, stages: list[str], names: list[str]) -> None:
    """A line for every detection, (k, stages)."""
    for line, name, colour in zip(values, names, LINES, strict=False):
        ax.plot(line, "o-", color=colour, lw=2, ms=5, label=name)
    ax.set_xticks(range(len(stages)), stages)
    ax.set(ylim=(-0.02, 1.02), xlim=(-0.2, len(stages) - 0.8))
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.tick_params(colors=INK, length=3)
    if np.isfinite(values).any():
        ax.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    quiet(ax)
