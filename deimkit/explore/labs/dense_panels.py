"""How the lab of Dense O2O looks: the source pictures, the image made of them, and two counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.curves import INK
from deimkit.explore.labs.crops import SHOWN, address, outlines
from deimkit.explore.labs.dense import expected_targets
from deimkit.explore.labs.sheet import Drawing, Panel, Sheet
from deimkit.explore.plots import PALETTE, PAPER
from deimkit.explore.style import FAINT

if TYPE_CHECKING:
    from deimkit.explore.labs.dense_lab import Mixed, Origin

Array = NDArray[Any]
LETTERS = "abcdefgh"  # the source pictures: four of the image itself, four of the one that is blended in
COLOURS = [PALETTE[i % 4] for i in range(8)]  # by place in the mosaic
DASHES = ["solid"] * 4 + ["dot"] * 4  # of the image itself, and of what is blended in
SHADE = "rgba(0, 0, 0, 0.6)"
THUMB = 220  # pixels of the longer side of a source picture
ROW = 1.1  # the height of a cell for a source picture, in widths of one
HEIGHT = 620  # pixels; 1080 x 540 are left for the panels
HIDDEN = {"visible": False, "showgrid": False}


def panels(found: Mixed) -> Drawing:
    """The figure of what the lab found: always the same traces in the same order."""
    sheet = Sheet()
    blend = "" if found.weight is None else f": {found.weight:.0%} itself, {1 - found.weight:.0%} its neighbour"
    sources = sheet.panel(
        "Source pictures (a number on white: that box did not arrive)",
        (0, 480 / 1080),
        (1 - 240 * ROW / 540, 1),
        {"range": [0, 4], **HIDDEN},
        {"range": [2 * ROW, 0], **HIDDEN},
    )
    image = sheet.panel(
        f"The image that the detector sees{blend}",
        *((0.5, 1), (0, 1)),
        {"range": [0, 1], **HIDDEN},
        {"range": [1, 0], **HIDDEN},
    )
    counts = sheet.panel(
        "Boxes put in (pale), arrived",
        *((0.035, 0.2), (0, 0.38)),
        {"title": "source picture", "showgrid": False},
        {"rangemode": "tozero"},
    )
    law = sheet.panel(
        f"Put in on average: {found.expected:.1f}",
        *((0.265, 0.44), (0, 0.38)),
        {"title": "odds of mosaic", "range": [0, 1], "showgrid": False},
        {"rangemode": "tozero"},
    )
    _draw_sources(sources, found)
    _draw_image(image, found)
    _draw_counts(counts, found)
    _draw_law(law, found)
    return sheet.drawing(
        HEIGHT, width=1100, showlegend=False, barmode="overlay", margin={"l": 10, "r": 10, "t": 34, "b": 46}
    )


def letter(origin: Origin) -> str:
    """What a source picture is called in the figure."""
    return LETTERS[origin.place + 4 * origin.blended]


def _draw_sources(panel: Panel, found: Mixed) -> None:
    boxes, corners, lost = {}, [], set(found.lost.tolist())
    for origin in found.origins:
        left, top, wide, high = _cell(origin)
        panel.sheet.layout["images"].append(_image(panel, (left, top, wide, high), origin.pixels, THUMB))
        _say(panel, f"<b>{letter(origin)}</b>  picture {origin.picture}", left, top - 0.03, yanchor="bottom")
        height, width = origin.pixels.shape[:2]
        mine = origin.boxes * np.array([wide / width, high / height] * 2) + np.array([left, top] * 2)
        boxes[letter(origin)] = mine
        tints = [PAPER if number in lost else COLOURS[origin.place] for number in origin.numbers.tolist()]
        corners += list(zip(*mine[:, :2].T, origin.numbers, tints, strict=True))
    if found.weight is None:
        _say(panel, "No MixUp this time: nothing is blended in.", 0.02, 1.5 * ROW)
    _outline(panel, boxes, 1.4)
    _number(panel, corners, 9)


def _draw_image(panel: Panel, found: Mixed) -> None:
    panel.sheet.layout["images"].append(_image(panel, (0, 0, 1, 1), found.image, SHOWN))
    boxes, corners = {}, []
    for origin in found.origins:
        mine = found.arrived(origin)
        boxes[letter(origin)] = found.boxes[mine]
        inside = np.clip(found.boxes[mine, :2], 0.014, 0.986)  # so that no number is cut at the border
        tints = [COLOURS[origin.place]] * len(inside)
        corners += list(zip(*inside.T, found.numbers[mine], tints, strict=True))
    _outline(panel, boxes, 2.2)
    _number(panel, corners, 11)


def _draw_counts(panel: Panel, found: Mixed) -> None:
    """How many boxes of each source picture were put in, and how many arrived."""
    put, got = dict.fromkeys(LETTERS, 0), dict.fromkeys(LETTERS, 0)
    for origin in found.origins:
        put[letter(origin)] += len(origin.numbers)
        got[letter(origin)] += int(found.arrived(origin).sum())
    for name, counts, opacity in (("put in", put, 0.35), ("arrived", got, 1.0)):
        look = {"marker": {"color": COLOURS}, "opacity": opacity, "name": name}
        panel.add("bar", x=list(counts), y=list(counts.values()), **look)


def _draw_law(panel: Panel, found: Mixed) -> None:
    """Boxes put into an image on average, against the odds of mosaic, for MixUp never, always, and as it is now."""
    odds = np.linspace(0, 1, 11)
    cases = (("never", 0.0, "dash", FAINT), ("always", 1.0, "dot", FAINT), ("now", found.mixup, "solid", INK))
    for name, mixup, dash, tint in cases:
        y = [expected_targets(found.mean, p, mixup) for p in odds.tolist()]
        line = {"dash": dash, "color": tint, "width": 2}
        panel.add("scatter", mode="lines", x=odds, y=y, line=line, name=f"MixUp {name}")
        if name != "now":
            _say(panel, f"MixUp<br>{name}", 1.04, y[-1], align="left", xref=f"{panel.x} domain")
    dot = {"size": 11, "color": PALETTE[5]}
    here = {"x": [found.mosaic], "y": [found.expected], "cliponaxis": False}
    panel.add("scatter", mode="markers", marker=dot, name="these odds", **here)


# ------------------------------------------------------------------------------------------------------- parts


def _cell(origin: Origin) -> tuple[float, float, float, float]:
    """Left, top, width and height of a source picture on its panel."""
    height, width = origin.pixels.shape[:2]
    scale = min(0.96 / width, 0.84 / height)
    return origin.place + 0.02, ROW * origin.blended + 0.22, width * scale, height * scale


def _image(panel: Panel, place: tuple[float, float, float, float], picture: Array, longest: int) -> dict[str, Any]:
    """A picture at left, top, width and height, of at most `longest` pixels a side."""
    where = dict(zip(("x", "y", "sizex", "sizey"), place, strict=True)) | {"xref": panel.x, "yref": panel.y}
    how = {"sizing": "stretch", "layer": "below", "xanchor": "left", "yanchor": "top"}
    return where | how | {"source": address(picture, longest)}


def _outline(panel: Panel, boxes: dict[str, Array], width: float) -> None:
    """A line round the boxes of each source picture, over a dark one that sets all of them off from the ground."""
    everything = np.concatenate([np.zeros((0, 4)), *boxes.values()])
    lines = [("rim", everything, {"color": SHADE, "width": width + 1.6})]
    for name, tint, dash in zip(LETTERS, COLOURS, DASHES, strict=True):
        mine = boxes.get(name, np.zeros((0, 4)))
        lines.append((name, mine, {"color": tint, "width": width, "dash": dash}))
    for name, mine, line in lines:
        x, y = outlines(mine)
        panel.add("scatter", mode="lines", x=x, y=y, line=line, name=name, hoverinfo="skip")


def _number(panel: Panel, corners: Sequence[tuple[float, float, int, str]], size: int) -> None:
    """The number of every box, from 1, on a small ground of its colour."""
    x, y, numbers, tints = (list(column) for column in zip(*corners, strict=True)) if corners else ([], [], [], [])
    panel.add(
        "scatter",
        **{"mode": "markers+text", "x": x, "y": y, "hoverinfo": "skip", "name": "numbers"},
        text=[str(number + 1) for number in numbers],
        textposition="middle center",
        textfont={"size": size, "color": INK},
        marker={"symbol": "square", "size": 1.45 * size, "color": tints, "line": {"width": 0}},
    )


def _say(panel: Panel, text: str, x: float, y: float, **how: Any) -> None:
    panel.say(text, x, y, xanchor="left", font={"size": 11, "color": INK}, **how)
