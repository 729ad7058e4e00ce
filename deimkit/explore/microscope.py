"""The matching microscope's rows as one sheet of small pictures: how many matches, how good, how steady."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from deimkit.explore.curves import FAINT, INK, LINES, thin, when
from deimkit.explore.plots import PAPER, Picture
from deimkit.training.microscope import IOU_BINS, POSITIVES

POINTS = 60  # of a curve, and columns of the heat map: a small panel shows no more
GAP = 0.1  # between two names at the ends of lines, in heights of a panel
MANY = LinearSegmentedColormap.from_list("many", [PAPER, LINES[0], INK])
Rows = Sequence[dict[str, Any]]


def draw_microscope(rows: Rows) -> Picture:
    """Draw what the matcher saw over a run: nine panels, each against epochs but the second.

    rows: those of `metrics.jsonl`, of which the kinds "matching" (`Microscope.row`, with epoch and step) and "probe"
    (`Probe.row`, with epoch) count. A long run is averaged down. Shares are in percent, a panel without rows is empty.
    """
    seen = [row for row in rows if row.get("kind") == "matching"]
    probed = [row for row in rows if row.get("kind") == "probe"]
    x, after = when(seen), np.array([row["epoch"] + 1 for row in probed], float)
    figure = Picture(figsize=(14, 9.2), dpi=100, facecolor=PAPER)
    figure.subplots_adjust(0.05, 0.06, 0.93, 0.95, wspace=0.62, hspace=0.42)
    panels = figure.subplots(3, 3).flatten().tolist()

    counts = {"targets": "targets_per_image", "own match": "positives", "shared": "positives_shared"}
    _lines(panels[0], "positives per image", x, {name: _column(seen, key) for name, key in counts.items()})
    _positives(panels[1], seen)
    _heat(panels[2], seen, x)
    _lines(panels[3], "matches of low quality", x, _columns(seen, "low"), percent=True)
    _lines(panels[4], "query changed from layer to layer", x, _columns(seen, "unstable"), percent=True)
    changed = {"targets": _column(probed, "changed")}
    _lines(panels[5], "query changed from epoch to epoch", after, changed, percent=True)
    _lines(panels[6], "correlation of score and IoU", x, _columns(seen, "alignment"), low=None)
    _lines(panels[7], "score", x, _columns(seen, "score"))
    _lines(panels[8], "entropy of edges, bits", x, _columns(seen, "entropy"), low=None)
    return figure


def _column(rows: Rows, *path: str) -> NDArray[np.float64]:
    """One number of every row, by its key or keys; NaN where there is none."""
    found: list[Any] = list(rows)
    for key in path:
        found = [value.get(key) if isinstance(value, dict) else None for value in found]
    return np.array([math.nan if value is None else value for value in found], float)


def _columns(rows: Rows, group: str) -> dict[str, NDArray[np.float64]]:
    """All numbers that the rows have in a group, such as one per layer."""
    names = dict.fromkeys(name for row in rows for name in row.get(group, {}))
    return {name: _column(rows, group, name) for name in names}


def _lines(
    ax: Axes,
    title: str,
    x: NDArray[np.float64],
    columns: dict[str, NDArray[np.float64]],
    percent: bool = False,
    low: float | None = 0,
) -> None:
    """A line per column with its name at its end. low: where the axis begins, or None for where the lines do."""
    ends = []
    for i, ((name, values), colour) in enumerate(zip(columns.items(), cycle(LINES), strict=False)):
        mx, my = thin(x, values, POINTS)
        if len(mx):
            dot = "o" if len(mx) == 1 else ""
            ax.plot(mx, my, color=colour, lw=1.6, ls="-" if i < len(LINES) else "--", marker=dot)
            ends.append((float(my[-1]), name, colour))
    ax.set_ylim(bottom=low)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_ylim(top=min(1.02, max(0.05, ax.get_ylim()[1])))
    ax.set_xlim(0, max(1.0, float(x.max()) if len(x) else 1.0))
    _dress(ax, title, "epoch", empty=not ends)
    _name(ax, sorted(ends))


def _name(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write the names of lines at their ends, lowest first, none over another and none above the panel."""
    bottom, top = ax.get_ylim()
    heights = [(value - bottom) / (top - bottom) for value, _, _ in ends]
    for i in range(1, len(ends)):
        heights[i] = max(heights[i], heights[i - 1] + GAP)
    for i in reversed(range(len(ends))):
        heights[i] = min(heights[i], 1.0 - GAP * (len(ends) - 1 - i))
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        said = name.replace("_", " ")
        ax.text(1.02, height, said, color=colour, transform=ax.transAxes, va="center", fontsize=9, fontweight="bold")


def _positives(ax: Axes, seen: Rows) -> None:
    """How many images have how many positives in the newest epoch, by the own match and by the shared one."""
    newest = [row for row in seen if row["epoch"] == seen[-1]["epoch"]]
    names = {"own match": ("positives_hist", LINES[1]), "shared": ("shared_hist", LINES[2])}
    place = np.arange(len(POSITIVES))
    for i, (name, (key, colour)) in enumerate(names.items() if newest else ()):
        ax.bar(place + 0.4 * i - 0.2, np.sum([row[key] for row in newest], axis=0), width=0.38, color=colour)
        height = 0.94 - GAP * i
        ax.text(0.98, height, name, color=colour, transform=ax.transAxes, ha="right", fontsize=9, fontweight="bold")
    ax.set_xlim(-0.7, len(POSITIVES) - 0.3)
    ax.set_ylim(bottom=0)
    _dress(ax, "images of the newest epoch", "with so many positives, or more", empty=not newest)
    ax.set_xticks(place, [str(begin) for begin in POSITIVES], fontsize=8.5)


def _heat(ax: Axes, seen: Rows, x: NDArray[np.float64]) -> None:
    """How the IoU of the final layer's pairs is spread, as a column per stretch of time."""
    counts = np.array([row["iou"].get("final", [0] * IOU_BINS) for row in seen], float).reshape(-1, IOU_BINS)
    if counts.sum():
        parts = np.array_split(np.arange(len(x)), min(POINTS, len(x)))
        columns = np.stack([counts[part].sum(0) for part in parts])  # (columns, bins)
        share = columns / columns.sum(1, keepdims=True).clip(1)
        end = x[-1] + (x[-1] - x[0]) / max(len(x) - 1, 1) if len(x) > 1 else x[-1] + 1
        edges = np.array([*(x[part[0]] for part in parts), end])
        image = ax.pcolormesh(edges, np.linspace(0, 1, IOU_BINS + 1), share.T, cmap=MANY, vmin=0, rasterized=True)
        side = ax.inset_axes((1.03, 0, 0.03, 1))
        bar = ax.figure.colorbar(image, cax=side, format=PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        side.tick_params(colors=INK, length=3)
    ax.set_ylim(0, 1)
    _dress(ax, "IoU of matches", "epoch", empty=not counts.sum())


def _dress(ax: Axes, title: str, x: str, empty: bool) -> None:
    """The quiet look that all panels share."""
    ax.set_title(title, loc="left", color=INK, fontsize=10.5)
    ax.set_xlabel(x, color=INK)
    ax.patch.set_alpha(0)
    ax.tick_params(colors=INK, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if empty:
        ax.text(0.5, 0.5, "nothing yet", transform=ax.transAxes, ha="center", va="center", color=FAINT)
