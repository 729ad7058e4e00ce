"""A run as curves: the clock it follows, the losses that fall and the AP that rises.

Each function draws on the given matplotlib Axes, or on those of a new figure, and returns them. Colours are Okabe and
Ito's, and every line also has its name at its end, so that none has to be told by its colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from deimkit.explore.plots import PAPER, Panel, Picture
from deimkit.training.timeline import Event, Timeline

INK, FAINT = "#222222", "#8a8a8a"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STAGES = {"warm": "#B8C4CE", "dense": "#E69F00", "augment": "#56B4E9", "clean": "#009E73"}
TRACKS = {"MixUp": "#CC79A7", "multi-scale": "#9A8FBF"}
POINTS = 400  # of a curve; a longer run is averaged down to as many


def draw_timeline(timeline: Timeline, ax: Axes | None = None, epoch: float | None = None) -> Axes:
    """Draw when everything happens: the learning rate, and under it the stages, MixUp and multi-scale.

    epoch: where the run is now, marked by a line.
    """
    ax = ax or panel(9, 3.2)
    steps = np.unique(np.linspace(0, timeline.steps - 1, 4 * POINTS).astype(int))
    ax.plot(steps / timeline.steps_per_epoch, [timeline.lr_factor(int(k)) for k in steps], color=LINES[0], lw=2)

    events = timeline.events()
    tracks = [name for name in ("stage", *TRACKS) if any(event.track == name for event in events)]
    for event in events:
        if event.track in tracks:
            _bar(ax, event, -0.26 * (1 + tracks.index(event.track)), timeline.total)
    rows = [-0.26 * (1 + i) + 0.09 for i in range(len(tracks))]
    ax.set_yticks([0, 0.5, 1, *rows], ["0", "½", "1", *tracks])
    ax.set_ylim(rows[-1] - 0.14, 1.22)
    ax.set_xlim(0, timeline.total)
    ax.axhline(0, color=FAINT, lw=0.6)
    _mark_stages(ax, timeline)
    if epoch is not None:
        early = epoch < 0.8 * timeline.total
        ax.axvline(epoch, color=INK, lw=1.4)
        ax.annotate(
            "you are here",
            (epoch, 1.07),
            (4 if early else -4, 0),
            textcoords="offset points",
            ha="left" if early else "right",
            color=INK,
        )
    _dress(ax, "epoch", "learning rate, × base")
    ax.yaxis.set_label_coords(-0.085, 0.72)
    return ax


def draw_losses(rows: Sequence[dict[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw every kind of loss, weighted and summed over all outputs, against epochs.

    rows: those of `metrics.jsonl`; of kind "step" they hold `terms` named "kind/output". A long run is averaged down.
    """
    steps = [row for row in rows if row.get("kind") == "step" and row.get("terms")]
    x = when(steps)
    return draw_curves({kind: (x, values) for kind, values in loss_kinds(steps).items()}, "loss, weighted", ax=ax)


def draw_curves(
    curves: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], label: str, along: str = "epoch", ax: Axes | None = None
) -> Axes:
    """Draw a line for every name, through its points x (n,) and y (n,), beside one another.

    label, along: what y and x are. A line of many points is averaged down; what is not finite is left out. A line that
    ends long before the others has its name there.
    """
    ax = ax or panel(9, 3.6)
    ends: list[tuple[float, str, str]] = []
    whole = np.concatenate([x for x, _ in curves.values()] or [np.zeros(0)])
    for i, (name, (x, y)) in enumerate(curves.items()):
        x, y = thin(x, y)
        colour, style = LINES[i % len(LINES)], ("-", "--", ":")[i // len(LINES) % 3]
        ax.plot(x, y, color=colour, lw=1.6, ls=style, marker="o", ms=3.5 if len(x) < 40 else 0, clip_on=False)
        if len(y) and x[-1] > 0.9 * whole.max():
            ends.append((float(y[-1]), name, colour))
        elif len(y):
            rim = [withStroke(linewidth=3, foreground=PAPER)]
            ax.annotate(
                name,
                (x[-1], y[-1]),
                (6, 6),
                textcoords="offset points",
                color=colour,
                fontweight="bold",
                path_effects=rim,
            )
    _dress(ax, along, label)
    _finish(ax, whole, ends)
    return ax


def draw_pace(x: NDArray[Any], step_s: NDArray[Any], wait_s: NDArray[Any], ax: Axes | None = None) -> Axes:
    """Draw what a step took at the times `x`: seconds of the step itself and, above, with waiting for images."""
    ax = ax or panel(9, 3.6)
    known = np.isfinite(step_s) & np.isfinite(wait_s)
    x, step_s, wait_s = x[known], step_s[known], wait_s[known]
    (x, step_s), wait_s = thin(x, step_s), thin(x, wait_s)[1]
    ax.fill_between(x, step_s, step_s + wait_s, color=LINES[1], alpha=0.25, lw=0)
    ax.plot(x, step_s, color=LINES[0], lw=1.6)
    ax.plot(x, step_s + wait_s, color=LINES[1], lw=1.2)
    _dress(ax, "epoch", "seconds a step")
    ends = [(step_s[-1], "step", LINES[0]), (step_s[-1] + wait_s[-1], "with waiting", LINES[1])] if len(x) else []
    _finish(ax, x, ends)
    return ax


def draw_ap(
    rows: Sequence[dict[str, Any]],
    ax: Axes | None = None,
    timeline: Timeline | None = None,
    paper: float | None = None,
) -> Axes:
    """Draw AP, AP50 and AP75 in percent after every evaluated epoch; the best AP is marked.

    rows: those of `metrics.jsonl`, of which kind "epoch" counts. timeline: marks where its stages change. paper: the AP
    that a paper claims, in percent, as a line to reach.
    """
    ax = ax or panel(9, 3.6)
    epochs = [row for row in rows if row.get("kind") == "epoch" and "AP" in row]
    x = np.array([row["epoch"] + 1 for row in epochs], float)
    ends: list[tuple[float, str, str]] = []
    for name, colour, width in (("AP50", LINES[2], 1.4), ("AP", LINES[0], 2.4), ("AP75", LINES[1], 1.4)):
        values = 100 * np.array([_number(row.get(name)) for row in epochs])
        ax.plot(x, values, color=colour, lw=width, marker="o", ms=3.5 if len(x) < 40 else 0, clip_on=False)
        if np.isfinite(values).any():
            ends.append((float(values[np.isfinite(values)][-1]), name, colour))
    ap = 100 * np.array([_number(row["AP"]) for row in epochs])
    if np.isfinite(ap).any():
        best = int(np.nanargmax(ap))
        ax.plot(x[best], ap[best], marker="o", ms=9, mfc="none", mec=LINES[0], mew=1.8, clip_on=False)
    if paper is not None and len(x):
        ax.axhline(paper, color=INK, lw=1.2, ls="--")
        ends.append((paper, f"paper {paper:.1f}", INK))
    _dress(ax, "after epoch", "AP, %")
    _finish(ax, x, ends)
    if timeline is not None:
        _mark_stages(ax, timeline)
    return ax


def when(steps: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """The time of every step row in epochs: 2.5 is the middle of the third epoch."""
    length = 1 + max((row["step"] for row in steps), default=0)
    return np.array([row["epoch"] + row["step"] / length for row in steps], float)


def loss_kinds(steps: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """The terms of step rows per kind of loss, "mal/final" plus "mal/layer0" being "mal"; the largest kind first."""
    kinds: dict[str, NDArray[np.float64]] = {}
    for i, row in enumerate(steps):
        for name, value in row["terms"].items():
            kinds.setdefault(name.partition("/")[0], np.zeros(len(steps)))[i] += _number(value)
    return dict(sorted(kinds.items(), key=lambda item: -float(np.nansum(item[1]))))


def thin(x: NDArray[Any], y: NDArray[Any], points: int = POINTS) -> tuple[NDArray[Any], NDArray[Any]]:
    """The curve as at most `points` means of consecutive points; values that are not finite are left out."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    part = np.arange(len(x)) * points // len(x)
    count = np.bincount(part)
    return np.bincount(part, x) / count, np.bincount(part, y) / count


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def panel(width: float, height: float, names: float = 0.72) -> Axes:
    """Axes of a new figure of so many inches that a notebook shows; `names` inches are left for names on the right."""
    figure = Picture(figsize=(width, height), dpi=110, facecolor=PAPER)
    ax = Panel(figure, (0.9 / width, 0.16, 1 - (0.9 + names) / width, 0.76))
    ax.picture = figure
    figure.add_axes(ax)
    return ax


def quiet(ax: Axes) -> None:
    """Leave no background, and of the frame the two axes alone."""
    ax.patch.set_alpha(0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _bar(ax: Axes, event: Event, y: float, total: int) -> None:
    """One stretch of time as a bar of height 0.18 at `y`, with its name if there is room."""
    colour = STAGES.get(event.name) or TRACKS[event.track]
    ax.broken_barh([(event.start, event.end - event.start)], (y, 0.18), facecolor=colour, edgecolor="none")
    if event.end - event.start > 0.013 * total * len(event.name):
        middle = (event.start + event.end) / 2
        ax.text(middle, y + 0.085, event.name, ha="center", va="center", fontsize=8.5, color="#000000")


def _mark_stages(ax: Axes, timeline: Timeline) -> None:
    for epoch in {timeline.warm, timeline.dense, timeline.augment} - {0, timeline.total}:
        ax.axvline(epoch, color=FAINT, lw=0.8, ls=(0, (2, 3)), zorder=0)


def _dress(ax: Axes, x: str, y: str) -> None:
    """The quiet look that all curves share."""
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.tick_params(colors=INK, length=3)
    quiet(ax)
    shown = ax.get_figure(root=True)
    assert shown is not None
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=round(1.35 * shown.get_figwidth())))


def _finish(ax: Axes, x: NDArray[Any], ends: list[tuple[float, str, str]]) -> None:
    """Start at zero, and write the name of every line at its end, none over another."""
    ax.set_ylim(bottom=0)
    if not len(x):
        ax.text(0.5, 0.5, "nothing yet", transform=ax.transAxes, ha="center", va="center", color=FAINT)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        return
    ax.set_xlim(min(0, float(x.min())), float(x.max()) if x.max() > 0 else 1)
    top = ax.get_ylim()[1]
    ends = sorted(ends)
    for height, (_, name, colour) in zip(_apart([end[0] / top for end in ends]), ends, strict=True):
        ax.annotate(
            name,
            (1, height),
            (7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
        )


def _apart(heights: list[float], gap: float = 0.07) -> list[float]:
    """Rising heights in [0, 1], moved so that neighbours are at least `gap` apart: up, and down again from the top."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], 1.0 if i == len(heights) - 1 else heights[i + 1] - gap)
    return heights
