"""A plotly figure as a plain picture, for wherever no kernel and no script runs: drawn again, by matplotlib.

It knows what the figures of this package are made of (`DRAWN`) and refuses the rest, so that no picture lacks a curve.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from deimkit.explore.curves import LINES
from deimkit.explore.plots import Picture
from deimkit.explore.still.bars import bar
from deimkit.explore.still.fields import contour, heatmap, scatter3d, surface
from deimkit.explore.still.layout import annotation, image, measure, shape
from deimkit.explore.still.page import Page
from deimkit.explore.still.traces import scatter
from deimkit.explore.still.values import Part, knows, merged, one_of, unpacked

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# How each of plotly's types of trace is drawn; what comes back stands for it in the legend.
DRAWN: dict[str, Callable[[Page, Part], Artist | None]] = {
    "scatter": scatter,
    "scattergl": scatter,
    "bar": bar,
    "heatmap": heatmap,
    "contour": contour,
    "surface": surface,
    "scatter3d": scatter3d,
}
LAID: dict[str, Callable[[Page, Part], None]] = {"images": image, "shapes": shape, "annotations": annotation}
FLAT = 0.95  # the share of a picture's pixels from which 256 colours do for it
# What every trace can have and the pages draw, or what shows only under a mouse.
COMMON = {"type", "name", "visible", "showlegend", "legend", "legendgroup", "legendrank", "xaxis", "yaxis", "scene"}
COMMON |= {"opacity", "index", "tint", "own", "offsetgroup", "alignmentgroup", "cliponaxis", "legendgrouptitle"}
UNSEEN = {"hoverinfo", "hovertemplate", "hovertext", "hoverlabel", "hoveron", "hoverongaps", "customdata", "ids", "uid"}
UNSEEN |= {"uirevision", "meta", "selected", "unselected", "selectedpoints", "xhoverformat", "yhoverformat"}
UNSEEN |= {"zhoverformat", "stream", "hovertemplatefallback"}
LAYOUT = {"template", "title", "font", "margin", "width", "height", "shapes", "images", "annotations", "showlegend"}
LAYOUT |= {"barmode", "bargap", "bargroupgap", "colorway", "plot_bgcolor", "paper_bgcolor", "colorscale", "autosize"}
LAYOUT |= {"autotypenumbers", "hovermode", "hoverdistance", "spikedistance", "dragmode", "clickmode", "modebar"}
LAYOUT |= {"uirevision", "datarevision", "editrevision", "selectionrevision", "transition", "newshape", "activeshape"}
LAYOUT |= {"meta", "hoverlabel", "uniformtext", "selectdirection", "newselection", "activeselection", "hidesources"}
NUMBERED = re.compile(r"([xy]axis|scene|legend)\d*")


def picture(figure: Figure) -> Picture:
    """The figure as a matplotlib one of the same size; raises `DeimkitError` for a part that it cannot draw."""
    said = unpacked(figure.to_plotly_json())
    layout = _layout(said["layout"])
    traces = _traces(said["data"], said["layout"].get("template", {}).get("data", {}), layout)
    page = Page(layout, [trace for trace in traces if trace.get("visible", True) is True])
    for trace in page.traces:
        mark = DRAWN[trace["type"]](page, trace)
        if mark is not None:
            page.name(trace, mark)
    parts = [(name, part) for name in LAID for part in layout[name] if part.get("visible", True)]
    for _, part in parts:
        measure(page, part)
    page.finish()
    for name, part in parts:
        LAID[name](page, part)
    return page.picture


def png(figure: Figure) -> bytes:
    """The figure as a small PNG file."""
    canvas = FigureCanvasAgg(picture(figure))
    canvas.draw()
    file = io.BytesIO()
    _packed(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")).save(file, "PNG")
    return file.getvalue()


def _packed(drawn: Image.Image) -> Image.Image:
    """A picture in the 256 colours that it has most of, if these are almost all; photos and surfaces keep theirs."""
    counts = sorted(drawn.getcolors(drawn.width * drawn.height) or [], reverse=True)
    if sum(count for count, _ in counts[:256]) < FLAT * drawn.width * drawn.height:
        return drawn
    tints = np.asarray([tint for _, tint in counts], np.float32)  # (n, 3)
    kept = tints[:256]
    nearest = ((kept**2).sum(1) - 2 * tints @ kept.T).argmin(1)
    codes = np.asarray([1 << 16, 1 << 8, 1], np.int32)
    table = np.zeros(1 << 24, np.uint8)
    table[tints.astype(np.int32) @ codes] = nearest
    packed = Image.fromarray(table[np.asarray(drawn, np.int32) @ codes])
    packed.putpalette(kept.astype(np.uint8).tobytes())
    return packed


def _layout(said: Part) -> Part:
    """The layout with what its template says."""
    unknown = [name for name in said if name not in LAYOUT and not NUMBERED.fullmatch(name)]
    knows("a layout", unknown, ())
    template = said.get("template", {}).get("layout", {})
    layout = merged({name: value for name, value in template.items() if not NUMBERED.fullmatch(name)}, said)
    for name in {*said, "xaxis", "yaxis", "scene", "legend"}:
        if found := NUMBERED.fullmatch(name):
            layout[name] = merged(template.get(found[1], {}), said.get(name, {}))
    for name in ("shape", "annotation", "image"):
        layout[f"{name}s"] = [merged(template.get(f"{name}defaults", {}), part) for part in said.get(f"{name}s") or ()]
    return layout


def _traces(data: list[Part], template: Part, layout: Part) -> list[Part]:
    """The traces with what their template says, numbered ("index"), and each with its colour ("tint")."""
    found, counts = [], dict.fromkeys(DRAWN, 0)
    colorway = layout.get("colorway") or LINES
    for index, said in enumerate(data):
        kind = said["type"]
        if kind not in DRAWN:
            raise one_of("traces", DRAWN, kind)
        looks = template.get(kind) or [{}]
        own = {
            "index": index,
            "tint": colorway[index % len(colorway)],
            "own": {name: said[name] for name in set(said) - COMMON - UNSEEN},
        }
        if "colorbar" in said.get("marker", {}):
            said = {**said, "marker": {"showscale": True, **said["marker"]}}
        found.append(merged(looks[counts[kind] % len(looks)], said) | own)
        counts[kind] += 1
    return found
