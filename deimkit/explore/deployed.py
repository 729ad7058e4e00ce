"""What there is to see of deployed detectors: their graphs, how far two answers lie apart, and how long calls take.

Plain numbers become pictures here; `deimkit.deploy` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from deimkit.explore.curves import FAINT, INK, LINES, panel, quiet
from deimkit.explore.plots import PAPER, Picture

LEAST = 1e-9  # what is drawn for a difference of nothing, on an axis that has no zero
COMPARED = (("row by row", LINES[1], 6), ("as pairs", LINES[0], 3))  # words, colour, points of a dot
MARKS = (("*", 14), ("D", 8))  # of points, and their size; the second when the colours are used up
SPREAD = 0.32  # of a row's height, over which its calls are scattered so that they can be seen

Floats = NDArray[np.float64]


def draw_nodes(counts: Mapping[str, int], most: int = 16) -> Axes:
    """Draw how often a graph has each kind of node, the most frequent first; those after `most` are one last bar."""
    ranked = sorted(counts.items(), key=lambda entry: -entry[1])
    rest = sum(count for _, count in ranked[most:])
    bars = ranked[:most] + ([(f"{len(ranked) - most} other kinds", rest)] if rest else [])
    ax = panel(9, 3.4, names=0.1)
    ax.bar(range(len(bars)), [count for _, count in bars], color=[LINES[0]] * min(most, len(ranked)) + [FAINT])
    near: dict[str, Any] = {"textcoords": "offset points", "color": INK}
    for x, (name, count) in enumerate(bars):  # words in the picture, unlike those of an axis, are read out with it
        ax.annotate(name, (x, 0), (4, -5), rotation=40, ha="right", va="top", rotation_mode="anchor", **near)
        ax.annotate(str(count), (x, count), (0, 2), ha="center", fontsize=8, **near)
    ax.set_xticks([])
    ax.set_ylabel("nodes", color=INK)
    quiet(ax)
    return ax


def draw_gaps(gaps: Mapping[str, tuple[Any, Any]], label: str) -> Picture:
    """Draw how far two answers lie apart, compared row by row and as pairs: a panel for each of `gaps`.

    gaps: by name the differences (n,) of row k with row k, and those (m,) of detections with their partners. label:
    what the difference is of. Both are drawn from the largest to the smallest, on logarithmic axes.
    """
    figure, axes = _panels(len(gaps), 3.9, alike=True)
    for ax, (name, drawn) in zip(axes, gaps.items(), strict=True):
        for values, (how, colour, size) in zip(drawn, COMPARED, strict=True):
            shown = np.sort(np.maximum(np.asarray(values, np.float64), LEAST))[::-1]
            ax.plot(np.arange(1, len(shown) + 1), shown, "o", color=colour, ms=size, label=how, mew=0)
        ax.set(xscale="log", yscale="log")
        ax.set_title(name, fontsize=10, color=INK)
        ax.set_xlabel("detection, that with the largest first", color=INK)
        quiet(ax)
    axes[0].set_ylabel(label, color=INK)
    axes[-1].legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    return figure


def draw_agreement(scores: Mapping[str, tuple[Any, Any]], ours: str = "score in torch") -> Picture:
    """Draw the score of a detection beside that of its partner, a panel for each of `scores`.

    scores: by name the scores (n,) of one side and of the other; equal ones lie on the line. ours: whose the first are.
    """
    figure, axes = _panels(len(scores), 11.5 / max(len(scores), 3), alike=True)
    top = (
        1.08 * max((float(np.max(side, initial=0.0)) for pair in scores.values() for side in pair), default=0.0) or 1.0
    )
    for ax, (name, (mine, others)) in zip(axes, scores.items(), strict=True):
        mine, others = np.asarray(mine, np.float64), np.asarray(others, np.float64)
        ax.plot([0, top], [0, top], color=FAINT, lw=0.8, zorder=0)
        ax.plot(mine, others, "o", color=LINES[0], ms=3, alpha=0.5, mew=0)
        worst = np.abs(mine - others).max(initial=0.0)
        ax.set_title(f"{name}\n{len(mine)} pairs, at most {worst:.1e} apart", fontsize=9, color=INK)
        ax.set(xlim=(0, top), ylim=(0, top), aspect="equal")
        ax.set_xlabel(ours, color=INK)
        quiet(ax)
    axes[0].set_ylabel("score in the runtime", color=INK)
    return figure


def draw_where(maps: Mapping[str, Any], label: str) -> Picture:
    """Draw where two maps differ: a panel for each of `maps`, with the same colours for the same differences.

    maps: by name the differences (h, w), 0 or more. label: what they are of.
    """
    figure, axes = _panels(len(maps), 3.9)
    top = max((float(np.max(drawn)) for drawn in maps.values()), default=0.0)
    for ax, (name, drawn) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(np.asarray(drawn), cmap="viridis", vmin=0, vmax=top or 1.0, interpolation="nearest")
        ax.set_title(f"{name}\nat most {np.max(drawn):.1e}", fontsize=9, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02).set_label(label, color=INK)
    return figure


def draw_latencies(calls: Mapping[str, Any], ratios: Mapping[str, tuple[float, float, float]]) -> Picture:
    """Draw every call of every runtime, and beside them how many times faster than the first each is.

    calls: by name the seconds of each call. ratios: by the same names (median, low, high), where low to high is the
    interval. Of the calls the median, and what 90 and 99 percent stay below, are marked.
    """
    height = 0.9 + 0.62 * len(calls)
    figure = Picture(figsize=(11.5, height), dpi=100, facecolor=PAPER)
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1.7, 1), left=0.24, right=0.98, wspace=0.08, bottom=0.52 / height, top=1 - 0.34 / height
    )
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    for y, (name, seconds) in enumerate(calls.items()):
        colour = LINES[y % len(LINES)]
        _calls(left, y, 1e3 * np.asarray(seconds, np.float64), colour)
        median, low, high = ratios[name]
        right.plot([low, high], [y, y], color=colour, lw=2.5, solid_capstyle="butt")
        right.plot(median, y, "o", color=colour, ms=7)
        near: dict[str, Any] = {"textcoords": "offset points", "color": INK}
        left.annotate(name, (0, y), (-8, 0), xycoords=("axes fraction", "data"), ha="right", va="center", **near)
        right.annotate(f"{median:.2f}", (median, y), (0, 9), ha="center", fontsize=9, **near)
    left.set_yticks([])
    left.set_ylim(len(calls) - 0.5, -0.65)
    left.set_xlim(left=0)
    left.set_xlabel("ms a call; | median, : 90 % and 99 %", color=INK)
    right.axvline(1, color=FAINT, lw=0.8, zorder=0)
    right.set_xlim(left=0)
    right.set_xlabel("times faster than the first, 95 % interval", color=INK)
    quiet(left)
    quiet(right)
    right.spines["left"].set_visible(False)
    return figure


def draw_trade(measured: Mapping[str, tuple[float, float]], where: str, what: str) -> Axes:
    """Draw AP against latency, as measured on one machine: a named point for each way to run one detector.

    measured: by name (milliseconds, AP in percent). where: the machine, of which no other's numbers belong beside
    these. what: the images that AP was measured on.
    """
    ax = panel(9, 3.9, names=0.3)
    for k, (name, (ms, ap)) in enumerate(sorted(measured.items(), key=lambda entry: entry[1])):
        marker, size = MARKS[k // len(LINES) % len(MARKS)]
        ax.plot(ms, ap, marker, color=LINES[k % len(LINES)], ms=size, mew=0, label=name)
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    aps = [ap for _, ap in measured.values()]
    room = max(0.15 * (max(aps) - min(aps)), 0.5)
    ax.set_ylim(max(0.0, min(aps) - room), max(aps) + room)
    ax.set_xlim(0, 1.25 * max(ms for ms, _ in measured.values()))
    ax.set_xlabel(f"median latency, ms ({where})", color=INK)
    ax.set_ylabel(f"AP on {what}, %", color=INK)
    quiet(ax)
    return ax


def _panels(count: int, side: float, alike: bool = False) -> tuple[Picture, list[Axes]]:
    """A picture of so many panels in a row, each `side` inches wide; `alike`: with one y axis for all."""
    figure = Picture(figsize=(side * count + 1, side + 0.4), dpi=100, facecolor=PAPER, layout="constrained")
    return figure, list(np.ravel(figure.subplots(1, count, sharey=alike)))


def _calls(ax: Axes, y: int, ms: Floats, colour: str) -> None:
    """The calls of one runtime as dots about a line, the surest numbers of them as strokes."""
    scattered = y + SPREAD * (np.arange(len(ms)) * 0.618 % 1 - 0.5)  # golden ratio: neighbours lie apart, no two alike
    ax.plot(ms, scattered, "o", color=colour, ms=3, alpha=0.5, mew=0)
    for percent, style in ((50, "-"), (90, ":"), (99, ":")):
        value = float(np.percentile(ms, percent))
        ax.plot([value, value], [y - 0.32, y + 0.32], color=INK, lw=1.8 if percent == 50 else 1.2, ls=style)
