"""Pictures of single findings: the part of an image that matters, small, with the boxes drawn over it as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deimkit.data.split import Split
from deimkit.errors import DataError
from deimkit.explore.findings import Findings
from deimkit.explore.plots import PALETTE
from deimkit.explore.views import Shown, View

Array = NDArray[Any]
Part = tuple[float, float, float, float]  # xyxy in pixels of an image

# What is right is green, and every way to be wrong has a colour of its own.
COLOURS = {
    "right": PALETTE[2],
    "class": PALETTE[3],
    "location": PALETTE[1],
    "both": PALETTE[5],
    "duplicate": PALETTE[0],
    "background": PALETTE[4],
    "ignored": "#BBBBBB",
}
TRUTH = "#FFFFFF"
SIDE = 400  # pixels of a tile's longer side
ROOM = 3.0  # a tile shows so many times what it is about, each way
LEAST = 120.0  # and at least so many pixels of the image, so that one sees where it is
WIDE = 4 / 3  # width over height of a tile
NAMED = 3  # so many boxes of a tile carry their name; more names hide the picture


class Tile(NamedTuple):
    """A picture (HTML) and its caption (plain text), and whether the image could be read."""

    picture: str
    words: str
    readable: bool


def tile(findings: Findings, view: View, shown: Shown) -> Tile:
    """An image as a view shows it: with what it is shown for drawn thick, and cut out around the first of that.

    Annotations are dashed and white, sure detections have the colour of their verdict. Where there are traces, the
    first box of the query that said the worst of them is dotted. An image that cannot be read is blank under its boxes.
    """
    split, index = findings.split, shown.image
    part = part_of(findings, view, shown)
    picture = _picture(split, index, part)
    ink = "".join([*_annotations(findings, view, shown, part), *_detections(findings, view, shown, part)])
    words = caption(findings, view, shown)
    x, y, right, bottom = part
    svg = (
        f'<svg viewBox="{x:.1f} {y:.1f} {right - x:.1f} {bottom - y:.1f}" role="img" aria-label="{escape(words)}">'
        f"{picture}{ink}</svg>"
    )
    return Tile(svg, words, bool(picture))


def part_of(findings: Findings, view: View, shown: Shown) -> Part:
    """The part of an image that a view shows: around the first row it is shown for, or all of it."""
    return _part(_about(findings, view, shown), findings.split.sizes[shown.image])


def _about(findings: Findings, view: View, shown: Shown) -> Array | None:
    """The xyxy that holds the first row and what it is about; None for the whole image."""
    row, truth = int(shown.rows[0]), findings.split.boxes
    if view.of == "images":
        return None
    if view.of == "annotations":
        return truth[row]
    target = int(findings.errors.target[row])
    boxes = [findings.errors.results.boxes[row], *([truth[target]] if target >= 0 else [])]
    return np.concatenate([np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]])


def _part(about: Array | None, size: Array) -> Part:
    """The part of an image of that (height, width) to show around a box."""
    height, width = (float(x) for x in size)
    if about is None:
        return 0.0, 0.0, width, height
    x, y, right, bottom = (float(v) for v in about)
    tall = max(ROOM * (bottom - y), ROOM * (right - x) / WIDE, LEAST / WIDE)
    w, h = min(tall * WIDE, width), min(tall, height)
    left = min(max((x + right - w) / 2, 0.0), width - w)
    top = min(max((y + bottom - h) / 2, 0.0), height - h)
    return left, top, left + w, top + h


def _picture(split: Split, index: int, part: Part) -> str:
    """The part of an image as an SVG image; empty if the file cannot be read."""
    try:
        pixels = split.image(index)
    except DataError:
        return ""
    x, y, right, bottom = (round(v) for v in part)
    cut = Image.fromarray(pixels[y : max(bottom, y + 1), x : max(right, x + 1)])
    width, height = cut.size
    cut.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    cut.save(file, "WEBP", quality=80)
    address = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" href="{address}"/>'


def _annotations(findings: Findings, view: View, shown: Shown, part: Part) -> Iterator[str]:
    """The annotations of the image, thick if they are what it is shown for; of a whole image those that are missed."""
    table, rows = findings.annotations, findings.split.rows(shown.image)
    worst = shown.rows.tolist() if view.of == "annotations" else []
    for row in range(rows.start, rows.stop):
        missed = bool(table["missed"][row])
        words = f"{table['label'][row]}, annotated" + ", missed" * missed + ", crowd" * bool(table["crowd"][row])
        strong = row in worst or (view.of == "images" and missed)
        named = words if row in worst[:NAMED] else ""
        yield _box(findings.split.boxes[row], TRUTH, part, words, named, "truth thick" if strong else "truth")


def _detections(findings: Findings, view: View, shown: Shown, part: Part) -> Iterator[str]:
    """The sure detections of the image, and thick those it is shown for, the first few of them with their names."""
    table, boxes = findings.detections, findings.errors.results.boxes
    first, last = np.searchsorted(table["image"], [shown.image, shown.image + 1])
    worst = shown.rows.tolist() if view.of == "detections" else []
    thick, with_name = set(worst), set(worst[:NAMED])
    for row in range(last - 1, first - 1, -1):  # the best one on top
        if not (table["sure"][row] or row in thick):
            continue
        colour = COLOURS[table["verdict"][row]]
        named = f"{table['label'][row]} {table['score'][row]:.2f}"
        words = f"{named}, {table['verdict'][row]}, IoU {table['overlap'][row]:.2f}"
        if worst[:1] == [row] and "start" in table:
            yield _box(table["start"][row], colour, part, f"first box of query {table['query'][row]}", "", "start")
        style = "thick" if row in thick else ""
        yield _box(boxes[row], colour, part, words, named if row in with_name else "", style)


def _box(box: Array, colour: str, part: Part, words: str, named: str, style: str) -> str:
    """A box with its words for the pointer, and its name above it; nothing if it is out of sight."""
    x, y, right, bottom = (float(v) for v in box)
    if right < part[0] or bottom < part[1] or x > part[2] or y > part[3]:
        return ""
    frame = f'x="{x:.1f}" y="{y:.1f}" width="{max(right - x, 0):.1f}" height="{max(bottom - y, 0):.1f}"'
    mark = (
        f'<g class="{style}"><title>{escape(words)}</title><rect class="rim" {frame}/>'
        f'<rect {frame} stroke="{colour}"/></g>'
    )
    if not named:
        return mark
    letter = (part[2] - part[0]) / 26
    low = y - 0.35 * letter if y - 1.3 * letter > part[1] else min(bottom + 1.1 * letter, part[3] - 0.3 * letter)
    left = min(max(x, part[0] + 0.2 * letter), max(part[2] - 0.62 * letter * len(named), part[0]))
    return f'{mark}<text x="{left:.1f}" y="{low:.1f}" font-size="{letter:.1f}" fill="{colour}">{escape(named)}</text>'


def caption(findings: Findings, view: View, shown: Shown) -> str:
    """The file, and what there is to say of the first row that it is shown for."""
    row = int(shown.rows[0])
    said = {"images": _of_image, "annotations": _of_annotation, "detections": _of_detection}[view.of]
    more = f"; {len(shown.rows) - 1} more" if len(shown.rows) > 1 else ""
    return f"{findings.split.paths[shown.image].name}: {said(findings, row)}{more}"


def _of_image(findings: Findings, row: int) -> str:
    table = findings.images
    words = f"AP {table['ap'][row]:.2f}, {table['right'][row]} right, {table['wrong'][row]} wrong, "
    change = f", AP differs by {table['change'][row]:.2f}" if "change" in table else ""
    return f"{words}{table['missed'][row]} missed{change}"


def _of_annotation(findings: Findings, row: int) -> str:
    table = findings.annotations
    state = "missed" if table["missed"][row] else "found"
    words = f"{table['label'][row]}, {state}, {table['area'][row]:.0f} px²"
    words += f", mistakenness {table['mistakenness'][row]:.2f}" if table["mistakenness"][row] > 0 else ""
    if "layer_query" not in table:
        return words
    return f"{words}; matched query {_way(table['layer_query'][row], 'd')}, IoU {_way(table['layer_iou'][row])}"


def _of_detection(findings: Findings, row: int) -> str:
    table = findings.detections
    target, words = table["target"][row], f"{table['label'][row]} {table['score'][row]:.2f}, {table['verdict'][row]}"
    if target < 0:
        return words
    words += f", IoU {table['overlap'][row]:.2f} with {findings.annotations['label'][target]}"
    return f"{words}; layer by layer {_way(table['layer_iou'][row])}" if "layer_iou" in table else words


def _way(values: Array, form: str = ".2f") -> str:
    """Values of one layer after the other."""
    return " → ".join("–" if np.isnan(v) or v < 0 else format(v, form) for v in values.tolist())
