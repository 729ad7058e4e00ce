"""A plotly figure as a plain picture, for wherever no kernel and no script runs: drawn again, by matplotlib.

It draws what the figures of this package are made of (`said.TRACES`, `said.LAYOUT`) and refuses the rest, so that no
picture lacks a curve.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from PIL import Image

from deimkit.explore.plots import Picture
from deimkit.explore.still.overlay import annotation, image, measure, shape
from deimkit.explore.still.page import Page
from deimkit.explore.still.said import Part, read
from deimkit.explore.still.traces import bar, contour, heatmap, scatter, scatter3d, surface

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# How each of plotly's types of trace is drawn; what comes back stands for it in the legend.
DRAWN: dict[str, Callable[[Page, Part], Artist | None]] = {
    "scatter": scatter,
    "bar": bar,
    "heatmap": heatmap,
    "contour": contour,
    "surface": surface,
    "scatter3d": scatter3d,
}
LAID: dict[str, Callable[[Page, Part], None]] = {"images": image, "shapes": shape, "annotations": annotation}
FLAT = 0.95  # the share of a picture's pixels from which 256 colours do for it


def picture(figure: Figure) -> Picture:
    """The figure as a matplotlib one of the same size; raises `DeimkitError` for a part that it cannot draw."""
    layout, traces = read(figure)
    page = Page(layout, [trace for trace in traces if trace.get("visible", True) is True])
    for trace in page.traces:
        mark = DRAWN[trace["type"]](page, trace)
        if mark is not None:
            page.name(trace, mark)
    for name in LAID:
        for part in layout[name]:
            measure(page, part)
    page.finish()
    for name, draw in LAID.items():
        for part in layout[name]:
            draw(page, part)
    return page.picture


def png(figure: Figure) -> bytes:
    """The figure as a small PNG file."""
    canvas = cast(FigureCanvasAgg, picture(figure).canvas)  # which knows the sizes of all words already
    canvas.draw()
    file = io.BytesIO()
    drawn = _packed(np.asarray(canvas.buffer_rgba()))
    drawn.save(file, "PNG", compress_type=zlib.Z_RLE if drawn.mode == "RGB" else zlib.Z_DEFAULT_STRATEGY)
    return file.getvalue()


def _packed(drawn: NDArray[np.uint8]) -> Image.Image:
    """A picture (H, W, 4) in the 256 colours that it has most of, if these are almost all; photos keep theirs."""
    codes = (drawn.reshape(-1, 4) @ np.asarray([1 << 16, 1 << 8, 1, 0], np.int32)).astype(np.int32)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))  # pixels that are not like the one before
    long = np.diff(starts, append=codes.size)
    tints, which = np.unique(codes[starts], return_inverse=True)
    counts = np.bincount(which, long)
    order = np.lexsort((tints, counts))[:-257:-1]  # the most frequent first
    if counts[order].sum() < FLAT * codes.size:
        return Image.fromarray(drawn).convert("RGB")
    colours = np.stack([tints >> 16, tints >> 8 & 255, tints & 255], 1).astype(np.float32)
    kept = colours[order]
    nearest = ((kept**2).sum(1) - 2 * colours @ kept.T).argmin(1).astype(np.uint8)
    packed = Image.fromarray(nearest[which].repeat(long).reshape(drawn.shape[:2]))
    packed.putpalette(kept.astype(np.uint8).tobytes())
    return packed
