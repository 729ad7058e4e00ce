"""Pictures of detections: boxes one can tell apart, names one can read, and sheets to compare many images at a glance.

Nothing here touches pyplot: a figure belongs to whoever asked for it, and a notebook shows it because it is the value
of the cell.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from deimkit.errors import DataError
from deimkit.models.predict import pixels
from deimkit.structures import Detections

if TYPE_CHECKING:
    from deimkit.data.split import Split

# Okabe and Ito's colours, which colour-blind readers can tell apart as well; those that stand out in photos first.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
INK, PAPER = "#111111", "#FFFFFF"
NAMED = 60  # so many of the most confident boxes carry their name; more names hide the image
SHOWN = 1600  # pixels; longer images are reduced before they are drawn


class Picture(Figure):
    """A figure that a notebook shows without pyplot, and that says what is written in it to those who do not see it."""

    def png(self) -> bytes:
        """The figure as the bytes of a PNG, cut to what is drawn."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=self.dpi, bbox_inches="tight", pad_inches=0.05)
        return file.getvalue()

    def words(self) -> str:
        """All that is written in it, panel by panel: title, axes, and the names of boxes and lines."""
        said = [*(text.get_text() for text in self.texts), *map(_written, self.axes)]
        return "; ".join(filter(None, said)) or "a picture without words"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{escape(self.words())}" style="max-width: 100%">'


class Panel(Axes):
    """Axes that a notebook shows as the figure they are part of."""

    picture: Picture

    def _repr_html_(self) -> str:
        return self.picture._repr_html_()


class Comparison(NamedTuple):
    """One image of a `contact_sheet`: what was found, what is annotated, and a few words about it."""

    found: Detections
    truth: Detections
    caption: str = ""


def colour(label: int) -> str:
    """The colour of a class index; after seven classes the colours repeat."""
    return PALETTE[label % len(PALETTE)]


def draw_detections(detections: Detections, threshold: float = 0.0, ax: Axes | None = None) -> Axes:
    """Draw an image with the objects found in it: boxes, names and scores of at least `threshold`.

    Without an image to draw on, the boxes stand on blank paper of the image's size. Returns the matplotlib Axes.
    """
    found = detections.above(threshold)
    return draw_boxes(
        _canvas(detections),
        found.boxes,
        found.names or [str(label) for label in found.labels.tolist()],
        found.scores,
        colours=[colour(label) for label in found.labels.tolist()],
        ax=ax,
    )


def draw_boxes(
    image: Any,
    boxes: Any,
    names: Sequence[str],
    scores: Any = None,
    truth: Any = None,
    colours: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw named boxes on an image, the most confident on top.

    image: any picture that `predict` takes. boxes: (n, 4) xyxy in its pixels. scores: (n,), or None for annotations.
    truth: (m, 4) annotated boxes to draw dashed underneath. colours: one per box, by default one per name.
    Returns the matplotlib Axes: `ax`, or that of a new figure of the image's shape.
    """
    picture = pixels(image)
    boxes, truth = (np.asarray([] if x is None else x, np.float64).reshape(-1, 4) for x in (boxes, truth))
    scores = None if scores is None else np.asarray(scores, np.float64)
    if not len(boxes) == len(names) == len(boxes if scores is None else scores):
        raise DataError(f"Every box needs a name and a score; got {len(boxes)} boxes and {len(names)} names.")
    if colours is None:
        order = {name: i for i, name in enumerate(sorted(set(names)))}
        colours = [colour(order[name]) for name in names]
    ax = ax or _new_panel(*picture.shape[:2])
    scale = _show(ax, picture)

    width = float(np.clip(scale * max(picture.shape[:2]) / 320, 0.7, 1.5))  # points: thin on a small panel
    for box in truth:
        _outline(ax, box, PAPER, 0.7 * width, linestyle=(0, (4, 2.5)))
    ranked = np.arange(len(boxes)) if scores is None else np.argsort(-scores, kind="stable")
    for i in ranked[::-1]:
        _outline(ax, boxes[i], colours[i], width)
    taken: list[NDArray[Any]] = []
    for i in ranked[:NAMED]:
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}"
        taken.append(_name(ax, boxes[i], text, colours[i], scale, picture.shape[:2], taken))
    return ax


def contact_sheet(items: Sequence[Comparison], columns: int = 2, threshold: float = 0.0) -> Figure:
    """Many images at a glance: of each the annotations, and beside them what was found with at least `threshold`.

    What was annotated is dashed in the right picture, so that a miss is an empty dashed box. columns: pairs per row.
    """
    columns = max(1, min(columns, len(items)))
    rows = [items[i : i + columns] for i in range(0, len(items), columns)]
    side, title = 13 / (2.06 * columns), 0.3  # inches: the width of one image, the height of the words above it
    heights = [title + side * max(_aspect(item.truth) for item in row) for row in rows]
    figure = Picture(figsize=(13, sum(heights, 0.1)), dpi=110, facecolor=PAPER)
    grid = figure.add_gridspec(
        len(rows) or 1, columns, height_ratios=heights or [1], left=0.005, right=0.995, wspace=0.03
    )
    grid.update(bottom=0, top=1 - title / figure.get_figheight(), hspace=title * len(rows) / sum(heights, 1e-9))
    for i, row in enumerate(rows):
        for j, item in enumerate(row):
            _compare(figure, grid[i, j].subgridspec(1, 2, wspace=0.015), item, threshold)
    return figure


def _compare(figure: Figure, halves: Any, item: Comparison, threshold: float) -> None:
    """Fill the two halves of a cell of the contact sheet."""
    left, right = (figure.add_subplot(half, anchor="N") for half in halves)
    image, truth, found = pixels(_canvas(item.truth)), item.truth, item.found.above(threshold)
    draw_boxes(image, truth.boxes, truth.names, colours=_colours(truth), ax=left)
    draw_boxes(image, found.boxes, found.names, found.scores, truth.boxes, _colours(found), right)
    left.set_title(item.caption or _title(truth), fontsize=8, loc="left", color=INK, pad=4)
    counts = f"{len(found)} found, {len(truth)} annotated"
    right.set_title(counts, fontsize=7, loc="right", color="#666666", pad=4)


def annotated(split: Split, index: int) -> Detections:
    """What is annotated in image `index` of a split, as `Detections` of score 1, to draw beside what was found."""
    rows = split.rows(index)
    labels = split.labels[rows].tolist()
    crowd = split.crowd[rows].tolist()
    height, width = (int(x) for x in split.sizes[index])
    return Detections(
        boxes=torch.from_numpy(np.array(split.boxes[rows])),
        scores=torch.ones(len(labels)),
        labels=torch.tensor(labels, dtype=torch.long),
        names=[split.categories.names[k] + " (crowd)" * c for k, c in zip(labels, crowd, strict=True)],
        size=(height, width),
        image=split.paths[index],
        ids=[split.categories.ids[k] for k in labels],
    )


def _written(ax: Axes) -> str:
    """What is written in and around one panel."""
    title = " ".join(filter(None, (ax.get_title(loc) for loc in ("left", "center", "right"))))
    axes = [f"{letter}: {label}" for letter, label in (("x", ax.get_xlabel()), ("y", ax.get_ylabel())) if label]
    legend = ax.get_legend()
    names = [text.get_text() for text in (*(legend.get_texts() if legend else ()), *ax.texts)]
    said = ", ".join([*axes, *filter(None, names)])
    return " ".join(f"{title}: {said}".strip(": ").split())


def _colours(detections: Detections) -> list[str]:
    return [colour(label) for label in detections.labels.tolist()]


def _aspect(detections: Detections) -> float:
    """Height over width, as far as a row of the contact sheet follows it: portraits get narrower instead."""
    height, width = detections.size
    return min(height / max(1, width), 1.1)


def _title(detections: Detections) -> str:
    return Path(detections.image).name if isinstance(detections.image, (str, Path)) else ""


def _canvas(detections: Detections) -> Any:
    """The image that was predicted on, or blank paper."""
    if detections.image is not None:
        return detections.image
    height, width = (max(1, side) for side in detections.size)
    return np.full((height, width, 3), 245, np.uint8)


def _new_panel(height: int, width: int) -> Axes:
    """Axes that fill a new figure of the shape of the image, 8 inches at its longer side."""
    longer = max(height, width)
    figure = Picture(figsize=(max(1.0, 8 * width / longer), max(1.0, 8 * height / longer)), dpi=110, facecolor=PAPER)
    panel = Panel(figure, (0, 0, 1, 1))
    panel.picture = figure
    figure.add_axes(panel)
    return panel


def _show(ax: Axes, picture: NDArray[np.uint8]) -> float:
    """Put the image on the axes in its own pixel coordinates; returns points of the figure per pixel of the image."""
    height, width = picture.shape[:2]
    small = Image.fromarray(picture).reduce(-(-max(height, width) // SHOWN))
    ax.imshow(np.asarray(small), extent=(0, width, height, 0), aspect="equal")
    ax.set_axis_off()
    figure = ax.get_figure(root=True)
    assert figure is not None
    return 72 / figure.dpi * min(ax.bbox.width / width, ax.bbox.height / height)


def _outline(ax: Axes, box: NDArray[Any], colour: str, width: float, **style: Any) -> None:
    """One box, with a dark rim that sets it off from light ground."""
    x, y, right, bottom = box
    rim = withStroke(linewidth=width + 0.8, foreground="#00000070")
    frame = Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor=colour, linewidth=width, **style)
    frame.set_path_effects([rim])
    ax.add_patch(frame)


def _name(
    ax: Axes,
    box: NDArray[Any],
    text: str,
    colour: str,
    scale: float,
    size: tuple[int, int],
    taken: Sequence[NDArray[Any]],
) -> NDArray[Any]:
    """Write a name at a corner of its box where no other name stands; returns the xyxy it covers."""
    points = float(np.clip(scale * max(size) / 60, 5, 8))
    width, height = points * (0.58 * len(text) + 0.5) / scale, points * 1.4 / scale  # pixels of the image, about
    x = float(np.clip(box[0], 0, max(0, size[1] - width)))
    ys = np.array([box[1] - height, box[1], box[3], box[3] - height])  # above, inside, below, inside at the bottom
    ys = np.clip(ys, 0, max(0, size[0] - height))
    spots = np.stack([np.full(4, x), ys, np.full(4, x + width), ys + height], 1)
    spot = next((s for s in spots if not any(_touch(s, other) for other in taken)), spots[0])
    ax.text(
        x + 0.2 * points / scale,
        spot[1] + height / 2,
        text,
        fontsize=points,
        color=_readable_on(colour),
        va="center_baseline",
        bbox={"boxstyle": "round,pad=0.2,rounding_size=0.15", "facecolor": colour, "edgecolor": "none", "alpha": 0.92},
        clip_on=True,
    )
    return spot


def _touch(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())


def _readable_on(colour: str) -> str:
    """Dark or white ink, whichever contrasts more with `colour` (relative luminance of WCAG 2)."""
    rgb = np.array(to_rgb(colour))
    luminance = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    white, ink = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.0556  # contrast ratios
    return PAPER if white > ink else INK
