"""A part of a picture as a panel of a sheet, to draw boxes on in the picture's own pixels."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deimkit.explore.labs.edges import Floats
from deimkit.explore.labs.sheet import Ends, Panel, Sheet

SHOWN = 640  # pixels; longer pictures are reduced before they are drawn
ROOM = 0.8  # half of what is shown, in longer sides of what it is about


def address(picture: NDArray[np.uint8], longest: int = SHOWN) -> str:
    """A picture (H, W, 3) as the address that a browser shows it from, of at most `longest` pixels a side."""
    file = io.BytesIO()
    small = Image.fromarray(picture).reduce(-(-max(picture.shape) // longest))
    small.save(file, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def crop(sheet: Sheet, title: str, across: Ends, up: Ends, source: str, size: tuple[int, int], around: Floats) -> Panel:
    """A panel with the part of a picture where some boxes are.

    source: its `address`. size: its height and width. around: (n, 4) xyxy, of which NaN are left out.
    """
    low, high = np.nanmin(around, 0)[:2], np.nanmax(around, 0)[2:]
    half = ROOM * max(*(high - low), 1.0)
    (left, top), (right, bottom) = ((low + high) / 2 - half).tolist(), ((low + high) / 2 + half).tolist()
    hidden = {"visible": False, "constrain": "domain"}
    panel = sheet.panel(title, across, up, hidden | {"range": [left, right]}, hidden | {"range": [bottom, top]})
    sheet.axis(panel.y).update(scaleanchor=panel.x, scaleratio=1)
    place = {"x": 0, "y": 0, "sizex": size[1], "sizey": size[0], "xref": panel.x, "yref": panel.y, "layer": "below"}
    sheet.layout["images"].append({"source": source, "sizing": "stretch", **place})
    return panel


def outline(box: Floats) -> dict[str, list[float]]:
    """The corners of a box (4,) xyxy as a closed line."""
    x, y, right, bottom = box.tolist()
    return {"x": [x, right, right, x, x], "y": [y, y, bottom, bottom, y]}


def outlines(boxes: Floats) -> tuple[Floats, Floats]:
    """A line around every box, broken off between them. (n, 4) xyxy -> (6 n,), (6 n,)."""
    x0, y0, x1, y1 = boxes.T
    gap = np.full(len(boxes), np.nan)
    return np.stack([x0, x1, x1, x0, x0, gap], 1).ravel(), np.stack([y0, y0, y1, y1, y0, gap], 1).ravel()
