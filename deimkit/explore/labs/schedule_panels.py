"""How the lab of the schedule looks: the learning rate over the stages, what images go through, and the average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from deimkit.data.augment import STAGES as DOES
from deimkit.data.augment import Augment
from deimkit.explore.curves import INK, STAGES, TRACKS
from deimkit.explore.labs.sheet import Drawing, Panel, Sheet
from deimkit.explore.plots import PALETTE
from deimkit.explore.style import FAINT

if TYPE_CHECKING:
    from deimkit.explore.labs.schedule_lab import Schedule

Spans = list[tuple[int, int]]
WRONG = PALETTE[5]


def panels(found: Schedule, rate: float, augment: Augment) -> Drawing:
    """The figure of what the lab found: always the same traces in the same order. rate: the recipe's learning rate."""
    sheet, rows, top = Sheet(), _rows(found, augment), 1.15 * rate
    across = {"range": [0, max(found.clock.total, *found.asked.values())], "showgrid": False}
    names = {"tickvals": [i + 0.5 for i in range(len(rows))], "ticktext": [row.name for row in rows], "ticks": ""}
    whole = (0.0, 1.0)
    rates = sheet.panel(
        f"<span style='color:{WRONG}'>Impossible as asked. Dashed: the recipe in proportion.</span>"
        if found.trouble
        else "Learning rate and stages",
        *(whole, (0.56, 1.0)),
        {"showticklabels": False, **across},
        {"title": "learning rate", "range": [0, top], "exponentformat": "e"},
    )
    images = sheet.panel(
        "What the images go through",
        *(whole, (0.27, 0.49)),
        {"showticklabels": False, **across},
        {"range": [len(rows), 0], "showgrid": False, **names},
    )
    average = sheet.panel(
        "Share of new weights that an update lets into the average (EMA)",
        *(whole, (0.0, 0.2)),
        {"title": "epoch", **across},
        {"type": "log", "title": "share", "exponentformat": "power"},
    )
    _draw_rates(rates, found, top)
    for i, row in enumerate(rows):
        _bands(images, [(start, end, i + 0.14, i + 0.86) for start, end in row.spans], row.name, row.tint, 0.85)
    blue = {"color": PALETTE[6], "width": 2.5}
    average.add("scatter", mode="lines", x=found.epochs, y=found.news, line=blue, name="new in the average")
    margin = {"l": 150, "r": 20, "t": 40, "b": 46}
    return sheet.drawing(660, width=1100, showlegend=False, margin=margin, shapes=_ends(found, top))


class _Row(NamedTuple):
    """Something that images go through: what it is, its colour, and when it is on, in epochs."""

    name: str
    tint: str
    spans: Spans


def _rows(found: Schedule, augment: Augment) -> list[_Row]:
    """What images go through, besides flip and resize."""
    dense = [(start, end) for name, start, end in found.stages if DOES[name].dense]
    strong = [(start, end) for name, start, end in found.stages if DOES[name].strong]
    varied = [(0, found.clock.multi_scale_end)] if augment.multi_scale is not None else []
    return [
        _Row(f"mosaic, odds {augment.mosaic:g}", STAGES["dense"], dense if augment.mosaic else []),
        _Row(f"MixUp, odds {augment.mixup:g}", TRACKS["MixUp"], dense if augment.mixup else []),
        _Row("colour, zoom, crop", STAGES["augment"], strong),
        _Row("size varies", TRACKS["multi-scale"], [span for span in varied if span[1]]),
    ]


def _draw_rates(panel: Panel, found: Schedule, top: float) -> None:
    """A band for each stage, the learning rate over them, and their names."""
    for name, tint in STAGES.items():
        spans = [(start, end, 0.0, top) for stage, start, end in found.stages if stage == name]
        _bands(panel, spans, name, tint, 0.35)
    line = {"color": FAINT if found.trouble else INK, "dash": "dash" if found.trouble else "solid", "width": 2.5}
    panel.add("scatter", mode="lines", x=found.epochs, y=found.rates, line=line, name="learning rate")
    end = max(found.clock.total, *found.asked.values())
    for name, start, stop in [] if found.wrong else found.stages:
        turn = -90 if stop - start < 0.013 * end * len(name) else 0
        font = {"size": 13, "color": INK}
        panel.say(name, (start + stop) / 2, 0.99 * top, yanchor="top", font=font, textangle=turn)
    for i, name in enumerate(found.wrong):
        epoch = found.asked[name]
        words = f"<b>{name}</b> ends at {epoch}" if name != "total" else f"the run ends at {epoch}"
        side = "right" if epoch > 0.85 * end else "left" if epoch < 0.15 * end else "center"
        font = {"size": 13, "color": WRONG}
        panel.say(words, epoch, top * (0.85 - 0.2 * i), xanchor=side, font=font, bgcolor="white")


def _ends(found: Schedule, top: float) -> list[dict[str, Any]]:
    """A line to be dragged at the end of each stage, and one at the end of the run; what contradicts is red."""
    shapes = []
    for name, epoch in found.asked.items():
        wrong = name in found.wrong
        line = {"color": WRONG if wrong else INK, "width": 4 if wrong else 1.5, "dash": "solid" if wrong else "dot"}
        place = {"x0": epoch, "x1": epoch, "y0": 0, "y1": top, "xref": "x", "yref": "y"}
        shapes.append({"type": "line", "line": line, "editable": name != "total", **place})
    return shapes


def _bands(
    panel: Panel, parts: Sequence[tuple[float, float, float, float]], name: str, tint: str, opacity: float
) -> None:
    """Filled rectangles (x0, x1, y0, y1) as one trace."""
    x: list[float | None] = []
    y: list[float | None] = []
    for x0, x1, y0, y1 in parts:
        x += [x0, x0, x1, x1, x0, None]
        y += [y0, y1, y1, y0, y0, None]
    red, green, blue = (int(tint[i : i + 2], 16) for i in (1, 3, 5))
    fill = {"fill": "toself", "fillcolor": f"rgba({red}, {green}, {blue}, {opacity})", "hoverinfo": "skip"}
    panel.add("scatter", mode="lines", x=x or [None], y=y or [None], line={"width": 0}, name=name, **fill)
