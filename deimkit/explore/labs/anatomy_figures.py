"""Pictures of a detector's inside: what its maps answer to, which cells it takes, where its boxes go, who teaches whom.

Nothing here computes but what has to be seen: the numbers are those of `dissect` and of `influence`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.explore.curves import FAINT, INK, panel
from deimkit.explore.labs.anatomy import Anatomy
from deimkit.explore.labs.anatomy_step import Influence
from deimkit.explore.plots import PALETTE, PAPER, Picture

MARKS = ("o", "s", "D", "^", "v")  # of the levels, fine to coarse
RIM = [withStroke(linewidth=2.6, foreground=INK)]


def draw_maps(anatomy: Anatomy) -> Picture:
    """Draw how strongly every place answers, in the backbone and after the encoder: the L2 norm over the channels."""
    rows = {"backbone": anatomy.backbone, "encoder": anatomy.encoder}
    columns = 1 + len(anatomy.encoder)
    picture = Picture(figsize=(2.5 * columns, 5.4), dpi=80, facecolor=PAPER)
    axes = picture.subplots(2, columns)
    for row, (name, maps) in zip(axes, rows.items(), strict=True):
        for ax, x in zip(row[1:], maps, strict=True):
            ax.imshow(x.float().norm(dim=0).numpy(), cmap="viridis")
            ax.set_title(f"{name} {tuple(x.shape)}", fontsize=9)
    axes[0, 0].imshow(anatomy.image.permute(1, 2, 0).float().numpy())
    axes[0, 0].set_title(f"image {tuple(anatomy.image.shape)}", fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    picture.tight_layout(pad=0.4)
    return picture


def draw_cells(anatomy: Anatomy) -> Picture:
    """Draw how sure every cell is that it holds an object, level by level, and ring those that became queries."""
    columns = len(anatomy.shapes)
    picture = Picture(figsize=(3.3 * columns, 3.5), dpi=80, facecolor=PAPER)
    places, levels = anatomy.places.numpy(), anatomy.level.numpy()
    top = float(anatomy.cells.amax().sigmoid())
    for level, ax in enumerate(np.atleast_1d(picture.subplots(1, columns))):
        (h, w), mine = anatomy.shapes[level], places[levels == level]
        ax.imshow(anatomy.confidence[level].float().numpy(), cmap="viridis", vmin=0, vmax=top)
        ring = {"s": min(60, 3e3 / h), "facecolors": "none", "edgecolors": "#FFFFFF", "linewidths": 1}
        ax.scatter(mine[:, 0] * w - 0.5, mine[:, 1] * h - 0.5, **ring)
        ax.set_title(f"{h} x {w}: {len(mine)} of {h * w} cells become queries", fontsize=9)
        ax.set_axis_off()
    picture.tight_layout(pad=0.4)
    return picture


def draw_trajectories(anatomy: Anatomy, queries: Any, ax: Axes | None = None) -> Axes:
    """Draw where some queries came from and went: the cell (its level's mark), the first box dotted, the last solid.

    queries: their indices, such as `anatomy.distinct(8)`.
    """
    height, width = anatomy.picture.shape[:2]
    ax = ax or panel(7.2, 7.2 * height / width, names=0.2)
    size = np.array([width, height])
    ax.imshow(anatomy.picture, extent=(0, width, height, 0))
    for i, query in enumerate(np.asarray(queries).tolist()):
        tint, boxes = PALETTE[i % len(PALETTE)], anatomy.boxes[:, query].float()
        corners = cxcywh_to_xyxy(boxes).numpy() * np.tile(size, 2)
        path = np.concatenate([anatomy.places[query].numpy()[None], boxes[:, :2].numpy()]) * size
        looks: list[dict[str, Any]] = [{"ls": ":", "lw": 1.4}, {"lw": 1.6, "path_effects": RIM}]
        for box, look in zip(corners[[0, -1]], looks, strict=True):
            ax.add_patch(Rectangle((box[0], box[1]), *(box[2:] - box[:2]), fill=False, ec=tint, **look))
        ax.plot(*path.T, color=tint, lw=1.6, path_effects=RIM)
        mark = MARKS[int(anatomy.level[query]) % len(MARKS)]
        ax.plot(*path[0], mark, color=tint, mec=INK, ms=7)
        ax.plot(*path[-1], "*", color=tint, mec=INK, ms=10)
        place, name = corners[-1, :2], anatomy.names[int(anatomy.logits[query].argmax())]
        label = f"{name} {float(anatomy.logits[query].max().sigmoid()):.2f}"
        ax.text(place[0], place[1] - 2, label, color=tint, fontsize=8, path_effects=RIM)
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    return ax


def draw_influence(found: Influence) -> Axes:
    """Draw which outputs (rows) teach which parts (columns), by the norm of the gradient; an empty field: nothing."""
    rows, columns = found.norms.shape
    ax = panel(2.2 + 0.47 * columns, 1.9 + 0.34 * rows, names=0.1)
    ax.set_position((0.14, 0.02, 0.85, 0.68))
    shown = np.ma.masked_equal(found.norms, 0)
    norm = LogNorm(max(float(shown.max()) * 1e-3, float(shown.min())), float(shown.max()))
    ax.imshow(shown, cmap="viridis", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(found.norms):
        if value:
            ink = PAPER if norm(value) < 0.55 else INK
            ax.text(column, row, _short(value), ha="center", va="center", fontsize=6.5, color=ink)
    ax.set_xticks(range(columns), found.parts, rotation=60, ha="left", fontsize=8)
    ax.set_yticks(range(rows), found.outputs, fontsize=8)
    ax.xaxis.tick_top()
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=FAINT, lw=0.3)
    ax.tick_params(length=0, which="both")
    return ax


def _short(value: float) -> str:
    return f"{value:.2f}".lstrip("0") if value >= 0.005 else "<.01"
