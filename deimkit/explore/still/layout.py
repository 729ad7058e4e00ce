"""What a plotly layout lays over or under its traces, drawn by matplotlib: shapes, images and words with arrows."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch, Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image

from deimkit.explore.still.page import OVER, UNDER, Page
from deimkit.explore.still.values import (
    ABOVE,
    ASIDE,
    POINT,
    Part,
    anchored,
    colour,
    dashes,
    knows,
    lettering,
    one_of,
    plain,
)

REFS = {"xref", "yref", "visible", "name", "templateitemname", "opacity"}
SHAPE = {*REFS, "type", "x0", "x1", "y0", "y1", "line", "fillcolor", "layer", "editable"}
IMAGE = {*REFS, "source", "x", "y", "sizex", "sizey", "xanchor", "yanchor", "sizing", "layer"}
PLACED = {"x", "y", "ax", "ay", "axref", "ayref", "xanchor", "yanchor", "xshift", "yshift", "standoff", "textangle"}
ARROW = {"showarrow", "arrowhead", "arrowsize", "arrowwidth", "arrowcolor", "arrowside", "startarrowhead"}
HOVER = {"captureevents", "hovertext", "hoverlabel", "clicktoshow"}
ANNOTATION = {*REFS, *PLACED, *ARROW, *HOVER, "text", "font", "align", "valign", "width", "height"}
ANNOTATION |= {"bgcolor", "bordercolor", "borderwidth", "borderpad"}
SHARES = {"left": 0.0, "center": 0.5, "right": 1.0, "bottom": 0.0, "middle": 0.5, "top": 1.0}


def refs(part: Part) -> tuple[str, str]:
    """What the positions of a part refer to: axes ("x2"), their domains ("y domain") or, as images do, "paper"."""
    usual = ("paper", "paper") if "source" in part else ("x", "y")
    return part.get("xref", usual[0]), part.get("yref", usual[1])


def measure(page: Page, part: Part) -> None:
    """Let the axes of a shape or of words reach as far as these do."""
    page.frame(*refs(part))  # so that its subplot is there
    for ref, names in zip(refs(part), (("x0", "x1", "x"), ("y0", "y1", "y")), strict=True):
        if ref == "paper" or ref.endswith("domain") or "source" in part:
            continue
        sub, axis = page.home(ref), page.axis(ref)
        ends = [axis.place(part[name], powers=name in "xy") for name in names if part.get(name) is not None]
        both = np.stack([ends, ends], 1)
        sub.ax.update_datalim(both, updatex=axis.way == "x", updatey=axis.way == "y")
        sub.ax.autoscale_view()


def shape(page: Page, part: Part) -> None:
    """A line, rectangle or circle."""
    knows("a shape", part, SHAPE)
    xref, yref = refs(part)
    x0, x1 = (_spot(page, xref, part[name]) for name in ("x0", "x1"))
    y0, y1 = (_spot(page, yref, part[name]) for name in ("y0", "y1"))
    line, kind = part.get("line", {}), part.get("type", "rect")
    dull, width = part.get("opacity", 1.0), line.get("width", 2)
    frame, rim = page.frame(xref, yref), colour(line.get("color", "#444"), dull)
    style: Part = {"linewidth": width * POINT, "linestyle": dashes(line, width), "transform": frame}
    style["zorder"] = OVER if part.get("layer", "above") == "above" else UNDER
    if kind == "line":
        drawn: Line2D | Patch = Line2D([x0, x1], [y0, y1], color=rim, **style)
    elif kind in ("rect", "circle"):
        style |= {"facecolor": colour(part.get("fillcolor", "rgba(0,0,0,0)"), dull), "edgecolor": rim}
        drawn = Rectangle((x0, y0), x1 - x0, y1 - y0, **style)
        if kind == "circle":
            drawn = Ellipse(((x0 + x1) / 2, (y0 + y1) / 2), abs(x1 - x0), abs(y1 - y0), **style)
    else:
        raise one_of("shapes", ("type line", "rect", "circle"), kind)
    page.picture.add_artist(drawn)
    _clip(page, drawn, xref, yref)


def image(page: Page, part: Part) -> None:
    """A picture in the layout; it stands upright, whichever way the axes run."""
    knows("an image", part, IMAGE)
    xref, yref = refs(part)
    pixels = _pixels(part["source"])
    x, y, wide, high = (part.get(name, 0) for name in ("x", "y", "sizex", "sizey"))
    corners = [
        [_spot(page, xref, x + share * wide, powers=True), _spot(page, yref, y + share * high, powers=True)]
        for share in (0, 1)
    ]
    # in pixels of the picture, where right and up are what they say
    (x, y), ends = page.frame(xref, yref).transform(corners)
    wide, high = abs(ends[0] - x), abs(ends[1] - y)
    aside, above = part.get("xanchor", "left"), part.get("yanchor", "top")
    left, bottom = x - SHARES[aside] * wide, y - SHARES[above] * high
    if part.get("sizing", "contain") == "contain":
        scale = min(wide / pixels.width, high / pixels.height)
        free = wide - scale * pixels.width, high - scale * pixels.height
        left, bottom = left + SHARES[aside] * free[0], bottom + SHARES[above] * free[1]
        wide, high = wide - free[0], high - free[1]
    elif part["sizing"] != "stretch":
        raise one_of("images", ("sizing contain", "stretch"), part["sizing"])
    place = Bbox.from_bounds(left, bottom, wide, high).transformed(page.whole.transAxes.inverted())
    drawn = BboxImage(TransformedBbox(place, page.whole.transAxes), interpolation="antialiased")
    drawn.set_data(np.asarray(pixels))
    drawn.set(alpha=part.get("opacity", 1.0), zorder=(OVER if part.get("layer", "above") == "above" else UNDER) - 0.5)
    page.picture.add_artist(drawn)
    _clip(page, drawn, xref, yref)


def annotation(page: Page, part: Part) -> None:
    """Words, which may have an arrow from them to what they are about."""
    knows("an annotation", part, ANNOTATION)
    xref, yref = refs(part)
    spot = _spot(page, xref, part.get("x", 0.5), powers=True), _spot(page, yref, part.get("y", 0.5), powers=True)
    shift = np.asarray([part.get("xshift", 0), part.get("yshift", 0)], float) * POINT
    arrow = part.get("showarrow", True)
    away: Any = tuple(shift)
    if arrow:
        away = POINT * part.get("ax", -10) + shift[0], -POINT * part.get("ay", -30) + shift[1]
    tail: Part = {"xytext": away, "textcoords": "offset points"}
    if arrow and part.get("axref", "pixel") != "pixel":
        ends = _spot(page, xref, part["ax"], powers=True), _spot(page, yref, part["ay"], powers=True)
        tail = {"xytext": ends, "textcoords": page.frame(xref, yref)}
    drawn = page.whole.annotate(
        plain(part.get("text", "")),
        spot,
        xycoords=page.frame(xref, yref),
        ha=_anchor(part.get("xanchor", "auto"), ASIDE, spot[0], xref == "paper" and not arrow),
        va=_anchor(part.get("yanchor", "auto"), ABOVE, spot[1], yref == "paper" and not arrow),
        rotation=-part.get("textangle", 0),
        multialignment=part.get("align", "center"),
        annotation_clip=False,
        arrowprops=_arrow(part) if arrow else None,
        **tail,
        **lettering({**page.font, **part.get("font", {})}, part.get("text", "")),
    )
    if "bgcolor" in part or "bordercolor" in part:
        drawn.set_bbox(
            {
                "facecolor": colour(part.get("bgcolor", "rgba(0,0,0,0)")),
                "edgecolor": colour(part.get("bordercolor", "rgba(0,0,0,0)")),
                "linewidth": POINT * part.get("borderwidth", 1),
                "pad": POINT * (1 + part.get("borderpad", 1)),
            }
        )
    drawn.set_alpha(part.get("opacity"))


def _arrow(part: Part) -> Part:
    width = part.get("arrowwidth", 1)
    look = "-" if part.get("arrowhead", 1) == 0 else "-|>"
    size = 3.2 * part.get("arrowsize", 1) * max(1.0, width)
    return {
        "arrowstyle": f"{look},head_length={0.09 * size:.2f},head_width={0.035 * size:.2f}" if look != "-" else look,
        "color": colour(part.get("arrowcolor", "#444"), part.get("opacity", 1.0)),
        "linewidth": POINT * width,
        "shrinkA": 1,
        "shrinkB": POINT * part.get("standoff", 0),
        "mutation_scale": 12,
    }


def _anchor(said: str, sides: tuple[str, str, str], spot: float, on_paper: bool) -> Any:
    """Which side of words is at their place; by itself the middle, unless they stand on paper without an arrow."""
    side = anchored(said, spot if on_paper else 0.5, sides)
    return "center" if side == "middle" else side


def _spot(page: Page, ref: str, value: Any, powers: bool = False) -> float:
    """A position in the units of what it refers to."""
    return float(value) if ref == "paper" or ref.endswith("domain") else page.axis(ref).place(value, powers)


def _clip(page: Page, drawn: Any, xref: str, yref: str) -> None:
    """Cut off what goes beyond the axes that a part refers to; paper and domains do not end."""
    sides = [0.0 if not (ref == "paper" or ref.endswith("domain")) else 99.0 for ref in (xref, yref)]
    if sides != [99.0, 99.0]:
        home = page.home(xref if sides[0] == 0 else yref)
        box = Bbox.from_extents(-sides[0], -sides[1], 1 + sides[0], 1 + sides[1])
        drawn.set_clip_box(TransformedBbox(box, home.ax.transAxes))


def _pixels(source: Any) -> Image.Image:
    if not str(source).startswith("data:image"):
        raise one_of("images", ("PIL", "data URI"), str(source)[:40])
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGBA")
