"""Pictures about Dense O2O: what it makes images teach, what it costs, what the paper claims, and its Fig. 5 again.

Each function draws on the given matplotlib Axes, or on those of a new figure, and returns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from deimkit.explore.curves import FAINT, INK, LINES, STAGES, panel, quiet
from deimkit.explore.labs.dense import Cache, Cost, Counts, expected_targets
from deimkit.explore.papers import table
from deimkit.explore.plots import PAPER, Picture
from deimkit.training.timeline import Timeline

HATCHES = ("", "//", "..", "xx")
SETTINGS = ("neither", "mosaic", "MixUp", "both")  # of Table 4, in its order
FIGURE5 = {0: None, 4: 2e-4, 34: 2e-4, 58: 1e-4, 60: 1e-4}  # epoch: learning rate, where the paper's axes have ticks


def draw_counts(counts: Mapping[str, Counts], ax: Axes | None = None) -> Axes:
    """Draw how many images teach how many targets, a curve for every way of making images, with its mean."""
    ax = ax or panel(9, 3.2)
    top = max(int(values.max()) for values in counts.values())
    step = max(1, round(top / 24))
    edges = np.arange(0, top + step + 1, step)  # the last one above the most crowded image
    styles = ("-", "--", "-.", ":")
    for i, (name, values) in enumerate(counts.items()):
        height, _ = np.histogram(values, edges)
        label = f"{name}: {values.mean():.1f} on average"
        look: dict[str, Any] = {"color": LINES[i % len(LINES)], "lw": 2, "ls": styles[i % len(styles)]}
        ax.stairs(100 * height / len(values), edges, label=label, **look)
    ax.set_xlabel("targets that an image teaches", color=INK)
    ax.set_ylabel("images, %", color=INK)
    ax.set_xlim(0, edges[-1])
    ax.legend(frameon=False)
    quiet(ax)
    return ax


def draw_law(
    mean: float,
    measured: Mapping[tuple[float, float], float],
    kept: tuple[float, float] = (1.0, 1.0),
    claimed: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw targets per image against the odds of mosaic, for MixUp never, half of the time, and always.

    mean, kept: as `expected_targets` takes them; dashed is what arrives, pale is what is put in. measured: by (odds of
    mosaic, odds of MixUp). claimed: mark what DEIM's Table 12 says of COCO at odds of 0, 0.5 and 1 for both.
    """
    ax = ax or panel(9, 4, names=1.1)
    odds = np.linspace(0, 1, 21)
    for mixup, tint in zip((0.0, 0.5, 1.0), LINES, strict=False):
        put = [expected_targets(mean, p, mixup) for p in odds.tolist()]
        arrives = [expected_targets(mean, p, mixup, *kept) for p in odds.tolist()]
        ax.plot(odds, put, color=tint, lw=5, alpha=0.25, solid_capstyle="round")
        ax.plot(odds, arrives, color=tint, lw=1.8, ls="--")
        ax.annotate(f"MixUp {mixup:g}", (1, arrives[-1]), (8, 0), textcoords="offset points", color=tint, va="center")
        mine = [(p, value) for (p, q), value in measured.items() if q == mixup]
        if mine:
            ax.plot(*zip(*mine, strict=True), ls="", marker="o", ms=8, mfc=PAPER, mec=tint, mew=2, zorder=5)
    ax.plot([], [], color=FAINT, lw=5, alpha=0.4, label="put in")
    ax.plot([], [], color=FAINT, lw=1.8, ls="--", label="expected to arrive")
    ax.plot([], [], ls="", marker="o", ms=8, mfc=PAPER, mec=FAINT, mew=2, label="measured here")
    if claimed:
        objects = [row["objects"] for row in table("deim_table12")]
        ax.plot(
            (0, 0.5, 1), objects, ls="", marker="*", ms=15, color=INK, label="claimed for COCO (Table 12)", zorder=4
        )
    ax.set_xlabel("odds of mosaic", color=INK)
    ax.set_ylabel("targets per image", color=INK)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    quiet(ax)
    return ax


def draw_claims() -> Picture:
    """What DEIM claims: AP by what is mixed for two lengths (Table 4), and by targets per image (Table 12)."""
    picture = Picture(figsize=(11, 3.4), dpi=110, facecolor=PAPER)
    for ax, epochs in zip(picture.subplots(1, 3, width_ratios=(1, 1, 0.9)), (12, 24, None), strict=True):
        draw_table12(ax) if epochs is None else draw_table4(epochs, ax)
    picture.tight_layout(w_pad=2)
    return picture


def draw_table4(epochs: int, ax: Axes) -> Axes:
    """Draw the claimed AP of a training of so many epochs, 12 or 24, without mixing, with either, and with both."""
    ap = [row["ap"] for row in table("deim_table4") if row["epochs"] == epochs]
    drawn = ax.bar(range(4), ap, 0.66, color=[FAINT, *LINES[:3]])
    for bar, hatch in zip(drawn, HATCHES, strict=True):
        bar.set(hatch=hatch, edgecolor=PAPER)
    for i, value in enumerate(ap):
        gain = f"\n{value - ap[0]:+.1f}" if i else ""
        style: dict[str, Any] = {"ha": "center", "fontsize": 9, "bbox": {"fc": PAPER, "ec": "none", "pad": 0.5}}
        ax.annotate(f"{value:.1f}{gain}", (i, value), (0, 4), textcoords="offset points", **style)
    ax.axhline(ap[0], color=INK, lw=0.8, ls=(0, (2, 3)), zorder=0)
    ax.set(ylim=(min(ap) - 1, max(ap) + 0.8), ylabel="AP, % (axis is cut)", title=f"Table 4, {epochs} epochs")
    ax.set_xticks(range(4), SETTINGS)
    quiet(ax)
    return ax


def draw_table12(ax: Axes) -> Axes:
    """Draw the claimed AP against the mean number of targets per image."""
    rows = table("deim_table12")
    ax.plot([row["objects"] for row in rows], [row["ap"] for row in rows], color=LINES[0], marker="o", ms=8, lw=2)
    for row in rows:
        place = (row["objects"], row["ap"])
        ax.annotate(f"{row['ap']:.1f}", place, (8, 6), textcoords="offset points", fontsize=9)
    ax.set(xlim=(0, 62), ylim=(51.4, 52.8), xlabel="targets per image, about", title="Table 12, 24 epochs")
    quiet(ax)
    return ax


def draw_costs(costs: Sequence[Cost], ax: Axes | None = None) -> Axes:
    """Draw milliseconds per image as bars, with how many times that is of flip and resize."""
    ax = ax or panel(9, 0.8 + 0.36 * len(costs), names=1.2)
    place = ax.get_position()
    ax.set_position((0.3, place.y0, place.x1 - 0.3, place.height))
    drawn = ax.barh(range(len(costs)), [1e3 * cost.seconds for cost in costs], 0.66, color=LINES[0])
    for cost, bar in zip(costs, drawn, strict=True):
        bar.set(color=FAINT if "file" in cost.name else LINES[1] if "stage" in cost.name else LINES[0])
        words = f"{1e3 * cost.seconds:.1f} ms, x {cost.ratio:.2f}"
        y = bar.get_y() + bar.get_height() / 2
        ax.annotate(words, (bar.get_width(), y), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    ax.set_yticks(range(len(costs)), [cost.name for cost in costs])
    ax.set_xlabel("ms per image, one process", color=INK)
    ax.invert_yaxis()
    quiet(ax)
    return ax


def draw_caches(caches: Mapping[str, Cache], ax: Axes | None = None) -> Axes:
    """Draw how much memory decoded pictures take (full), may take (frame) and would take in all (line)."""
    ax = ax or panel(9, 1.6 + 0.4 * len(caches), names=1.4)
    end = 1.15 * max(cache.needed for cache in caches.values()) / 2**20
    for i, cache in enumerate(caches.values()):
        held, limit, needed = (size / 2**20 for size in (cache.held, cache.limit, cache.needed))
        ax.barh(i, held, 0.6, color=LINES[0])
        ax.barh(i, min(limit, 1.1 * needed), 0.6, color="none", edgecolor=INK, lw=1.2)
        ax.plot([needed, needed], [i - 0.42, i + 0.42], color=LINES[1], lw=2.5)
        words = f"{held:.0f} MiB, {cache.kept} pictures"
        ax.annotate(words, (end, i), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(caches)), list(caches))
    ax.set_xlabel("MiB of decoded pictures: held, allowed (frame), of all of them (orange)", color=INK)
    ax.set_xlim(0, end)
    ax.invert_yaxis()
    quiet(ax)
    return ax


def draw_figure5(timeline: Timeline, rate: float, ax: Axes | None = None) -> Axes:
    """Draw DEIM's Fig. 5 again from a timeline: the learning rate, over bands for the stages, in the paper's names.

    rate: the base learning rate. Crosses are where the paper's own figure has its corners, read off its axes.
    """
    ax = ax or panel(9, 3.4)
    steps = np.unique(np.linspace(0, timeline.steps - 1, 1600).astype(int))
    values = [rate * timeline.lr_factor(k) for k in steps.tolist()]
    names = {"warm": "DataAug warm-up", "dense": "Dense O2O", "augment": "Default DataAug", "clean": "Closed DataAug"}
    for event in timeline.events():
        if event.track == "stage":
            ax.axvspan(event.start, event.end, color=STAGES[event.name], alpha=0.45, lw=0, label=names[event.name])
    ax.plot(steps / timeline.steps_per_epoch, values, color=INK, lw=2.2, label="learning rate")
    corners = [(epoch, value) for epoch, value in FIGURE5.items() if value is not None]
    look: dict[str, Any] = {"marker": "x", "ms": 11, "mew": 2.5, "color": LINES[1]}
    ax.plot(*zip(*corners, strict=True), ls="", **look, clip_on=False, label="as claimed", zorder=5)
    ax.set_xticks(list(FIGURE5))
    ax.set_yticks([0, 1e-4, 2e-4], ["0", "0.0001", "0.0002"])
    ax.set(xlim=(0, timeline.total), ylim=(0, 1.1 * rate))
    ax.set_xlabel("epoch", color=INK)
    ax.legend(frameon=False, ncols=2, loc="lower center")
    quiet(ax)
    return ax
