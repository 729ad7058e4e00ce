"""The contact sheet: the views of a detector's findings on one HTML page, for where FiftyOne's App cannot run.

The page is one file that needs nothing else: thumbnails are inside it, no script runs, nothing is fetched.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from deimkit.evaluation.page import percent, whole_page, write
from deimkit.explore.findings import Findings
from deimkit.explore.tiles import COLOURS, tile
from deimkit.explore.views import View, views_of

LOOK = """<style>
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.1rem .9rem }
.tiles figure { margin: 0; min-width: 0 }
.tiles svg { aspect-ratio: 4 / 3; background: #2a2e33; filter: none }
.tiles rect { fill: #0000; stroke-width: 1.5px; vector-effect: non-scaling-stroke }
.tiles .rim { stroke: #000; stroke-opacity: .5; stroke-width: 3px }
.tiles .thick rect { stroke-width: 3px } .tiles .thick .rim { stroke-width: 5.5px }
.tiles .truth rect:not(.rim) { stroke-dasharray: 6 4 } .tiles .start rect:not(.rim) { stroke-dasharray: 1.5 3 }
.tiles text { font-weight: 600; paint-order: stroke; stroke: #000c; stroke-width: .25em; stroke-linejoin: round;
  pointer-events: none }
.tiles figcaption { overflow-wrap: anywhere; line-height: 1.4 }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; font-size: .9rem }
.key i { display: inline-block; width: 1.3em; height: .8em; margin-right: .35em; border: 3px solid; background: #555 }
main { max-width: none } body { max-width: 80rem }
</style>"""


def contact_sheet_page(findings: Findings, path: str | Path, most: int = 12) -> Path:
    """Write the views of the findings as one HTML file, each with its first `most` images; returns its path.

    An image that cannot be read any more is blank under its boxes, and the page says so.
    """
    sections, unread = [], set()
    for view in views_of(findings):
        html, lacking = _section(findings, view, most)
        sections.append((view.name.capitalize(), html))
        unread |= lacking
    headline = _headline(findings) + _key() + _unread(sorted(unread)) + LOOK
    return write(Path(path), whole_page(findings.name, headline, sections))


def _section(findings: Findings, view: View, most: int) -> tuple[str, set[Path]]:
    """A view (HTML), and the files of it that cannot be read."""
    found = view.select(findings)
    if not found:
        return f"<p>{escape(view.words)} There are none.</p>", set()
    count = f"{len(found)} image{'s' * (len(found) != 1)}" + f", of which these are the first {most}" * (
        len(found) > most
    )
    tiles = [(shown.image, tile(findings, view, shown)) for shown in found[:most]]
    figures = "".join(f"<figure>{one.picture}<figcaption>{escape(one.words)}</figcaption></figure>" for _, one in tiles)
    lacking = {findings.split.paths[image] for image, one in tiles if not one.readable}
    return f'<p>{escape(view.words)} {count}.</p><div class="tiles">{figures}</div>', lacking


def _headline(findings: Findings) -> str:
    """What was looked at, and what came out in numbers."""
    split, table, coco = findings.split, findings.images, findings.errors.coco
    total = {name: int(table[name].sum()) for name in ("right", "wrong", "missed")}
    cards = {"AP": percent(coco["AP"]), "AP50": percent(coco["AP50"]), **total}
    html = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())
    before = f" Compared with {findings.before.name}." if findings.before is not None else ""
    words = (
        f"{len(split)} images of {split.name} with {int((~split.crowd).sum())} objects. A detection is sure, and "
        f"counts as right or wrong, from a score of {findings.least:.2f} on; it is right from an IoU of "
        f"{findings.errors.iou:.2f} on.{before}"
    )
    return f'<p>{escape(words)}</p><div class="cards">{html}</div>'


def _key() -> str:
    """What the colours and the lines mean."""
    chips = "".join(f'<li><i style="border-color:{colour}"></i>{name}</li>' for name, colour in COLOURS.items())
    return (
        f'<ul class="key">{chips}<li><i style="border:2px dashed #fff"></i>annotated</li>'
        '<li><i style="border:2px dotted #fff"></i>first box of the query</li></ul>'
        "<p>What an image is shown for is drawn thick, and so are missed objects in whole images. Point at a box to "
        "read what it is.</p>"
    )


def _unread(paths: list[Path]) -> str:
    """A warning that files are gone."""
    if not paths:
        return ""
    many = f"{len(paths)} images cannot be read" if len(paths) > 1 else "One image cannot be read"
    words = f"{many}, such as {paths[0]}. Were they moved? Open the dataset where it lies now."
    return f'<p class="state failed">{escape(words)}</p>'
