"""What a plotly layout lays over or under its traces, drawn by matplotlib: shapes, images and words with arrows."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image

from deimkit.explore.still.page import OVER, UNDER, Page
from deimkit.explore.still.said import Part, must
from deimkit.explore.still.values import ABOVE, ASIDE, POINT, anchored, colour, dashes, lettering, plain


def measure(page: Page, part: Part) -> None:
    """Let the axes of a shape or of words reach as far as these do."""
    for ref, names in zip(_refs(part), (("x0", "x1", "x"), ("y0", "y1", "y")), strict=True):
        panel = page.home(ref)
        if panel is not None and not ref.endswith("domain") and "source" not in part:
            axis = page.axis(ref)
            ends = [axis.place(part[name], powers=name in "xy") for name in names if part.get(name) is not None]
            panel.ax.update_datalim(np.stack([ends, ends], 1), updatex=axis.way == "x", updatey=axis.way == "y")
            panel.ax.autoscale_view()


def shape(page: Page, part: Part) -> None:
    """A line or a rectangle."""
    xref, yref = _refs(part)
    x0, x1 = (_spot(page, xref, part[name]) for name in ("x0", "x1"))
    y0, y1 = (_spot(page, yref, part[name]) for name in ("y0", "y1"))
    line, dull = part.get("line", {}), part.get("opacity", 1.0)
    width, rim = line.get("width", 2), colour(line.get("color", "#444"), dull)
    style: Part = {"linewidth": width * POINT, "linestyle": dashes(line, width), "transform": page.frame(xref, yref)}
    style["zorder"] = OVER if part.get("layer", "above") == "above" else UNDER
    if part.get("type") == "line":
        drawn: Line2D | Patch = Line2D([x0, x1], [y0, y1], color=rim, **style)
    else:
        style |= {"facecolor": colour(part.get("fillcolor", "rgba(0,0,0,0)"), dull), "edgecolor": rim}
        drawn = Rectangle((x0, y0), x1 - x0, y1 - y0, **style)
    page.picture.add_artist(drawn)
    _clip(page, drawn, part)


def image(page: Page, part: Part) -> None:
    """A picture under the traces; it stands upright, whichever way the axes run."""
    xref, yref = _refs(part)
    must(str(part["source"]).startswith("data:image"), f"an image from {str(part['source'])[:40]}")
    pixels = Image.open(io.BytesIO(base64.b64decode(part["source"].partition(",")[2]))).convert("RGBA")
    x, y, wide, high = (part.get(name, 0) for name in ("x", "y", "sizex", "sizey"))
    ends = [(_spot(page, xref, x + share * wide, True), _spot(page, yref, y + share * high, True)) for share in (0, 1)]
    # in pixels of the picture, where right and up are what they say
    (x, y), (right, top) = page.frame(xref, yref).transform(ends)
    place = Bbox.from_bounds(x, y - abs(top - y), abs(right - x), abs(top - y))
    place = place.transformed(page.whole.transAxes.inverted())
    drawn = BboxImage(TransformedBbox(place, page.whole.transAxes), interpolation="antialiased")
    drawn.set_data(np.asarray(pixels))
    drawn.set_zorder(UNDER - 0.5)
    page.picture.add_artist(drawn)
    _clip(page, drawn, part)


def annotation(page: Page, part: Part) -> None:
    """Words, which may have an arrow from them to what they are about."""
    (xref, yref), arrow, text = _refs(part), part.get("showarrow", True), part.get("text", "")
    spot = _spot(page, xref, part.get("x", 0.5), True), _spot(page, yref, part.get("y", 0.5), True)
    away = (part.get("ax", -10), -part.get("ay", -30)) if arrow else (0, 0)
    shift = POINT * (part.get("xshift", 0) + away[0]), POINT * (part.get("yshift", 0) + away[1])
    # by itself the middle of words is at their place, unless they stand on paper without an arrow
    free = [place if ref == "paper" and not arrow else 0.5 for place, ref in zip(spot, (xref, yref), strict=True)]
    drawn = page.whole.annotate(
        plain(text),
        spot,
        shift,
        xycoords=page.frame(xref, yref),
        textcoords="offset points",
        ha=anchored(part.get("xanchor", "auto"), free[0], ASIDE),
        va=anchored(part.get("yanchor", "auto"), free[1], ABOVE),
        rotation=-part.get("textangle", 0),
        multialignment=part.get("align", "center"),
        annotation_clip=False,
        arrowprops=_arrow(part) if arrow else None,
        **lettering({**page.font, **part.get("font", {})}, text),
    )
    if "bgcolor" in part:
        drawn.set_bbox(
            {"facecolor": colour(part["bgcolor"]), "edgecolor": "none", "linewidth": POINT, "pad": 2 * POINT}
        )
    drawn.set_alpha(part.get("opacity"))


def _arrow(part: Part) -> Part:
    width = part.get("arrowwidth", 1)
    size = 3.2 * max(1.0, width)
    head = f"-|>,head_length={0.09 * size:.2f},head_width={0.035 * size:.2f}" if part.get("arrowhead", 1) else "-"
    look: Part = {"color": colour(part.get("arrowcolor", "#444"), part.get("opacity", 1.0)), "linewidth": POINT * width}
    return look | {"arrowstyle": head, "shrinkA": 1, "shrinkB": 0, "mutation_scale": 12}


def _refs(part: Part) -> tuple[str, str]:
    """What the positions of a part refer to: axes ("x2"), their domains ("y domain") or, as images do, "paper"."""
    usual = ("paper", "paper") if "source" in part else ("x", "y")
    return part.get("xref", usual[0]), part.get("yref", usual[1])


def _spot(page: Page, ref: str, value: Any, powers: bool = False) -> float:
    """A position in the units of what it refers to."""
    return float(value) if ref == "paper" or ref.endswith("domain") else page.axis(ref).place(value, powers)


def _clip(page: Page, drawn: Any, part: Part) -> None:
    """Cut off what goes beyond the axes that a part refers to; paper and domains do not end."""
    refs = _refs(part)
    bound = [ref != "paper" and not ref.endswith("domain") for ref in refs]
    if any(bound):
        home: Any = page.home(refs[0] if bound[0] else refs[1])
        beyond = [0.0 if each else 99.0 for each in bound]
        box = Bbox.from_extents(-beyond[0], -beyond[1], 1 + beyond[0], 1 + beyond[1])
        drawn.set_clip_box(TransformedBbox(box, home.ax.transAxes))
