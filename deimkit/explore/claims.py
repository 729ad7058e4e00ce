"""The papers' claims as interactive pictures, with one's own measurements among them (DEIM Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deimkit.errors import DataError
from deimkit.explore.papers import table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

SOURCES = ("deim_table1", "deim_table2", "deim_table11")

# Colour (Okabe and Ito's), marker and line: a detector and the same trained with DEIM share the colour, and no two
# families share the marker.
FAMILIES = {
    "DEIM-D-FINE": ("#D55E00", "circle", "solid"),
    "D-FINE": ("#D55E00", "circle-open", "dot"),
    "DEIM-RT-DETRv2": ("#0072B2", "square", "solid"),
    "RT-DETRv2": ("#0072B2", "square-open", "dot"),
    "YOLO11": ("#009E73", "diamond", "solid"),
    "YOLOv10": ("#CC79A7", "triangle-up", "solid"),
    "YOLOv9": ("#E69F00", "triangle-down", "solid"),
    "YOLOv8": ("#56B4E9", "cross", "solid"),
    "Gold-YOLO": ("#8A8A8A", "x", "solid"),
}
INK = "#111111"

Row = dict[str, Any]
GAP: Row = {"model": None, "epochs": None, "ap": None}  # where a line breaks off


def ap_against_epochs(measured: Sequence[Row] = ()) -> Figure:
    """Draw the claimed AP on COCO val2017 against the epochs of training, one colour per family (DEIM Fig. 1a).

    A line joins trainings of one model that differ in length. measured: own points to draw among them, with the
    keys of a table's row, of which "model", "epochs" and "ap" (percent) are needed. Raises `DataError` where one lacks.
    """
    figure = _figure("epochs", _line_per_size, measured)
    figure.update_xaxes(title="epochs of training", type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500])
    return figure


def ap_against_latency(measured: Sequence[Row] = ()) -> Figure:
    """Draw the claimed AP on COCO val2017 against the latency on a T4, one line per family (DEIM Fig. 1b).

    The paper gives RT-DETRv2 of ResNet50 and ResNet101 no latency, so they are not here. measured: own points to draw
    among them, with the keys of a table's row, of which "model", "latency_ms" and "ap" (percent) are needed. Raises
    `DataError` where one lacks.
    """
    figure = _figure("latency_ms", _line_by_latency, measured)
    figure.update_xaxes(title="latency, ms (T4, TensorRT FP16)", rangemode="tozero")
    return figure


def _figure(x: str, line: Callable[[list[Row]], list[Row]], measured: Sequence[Row]) -> Figure:
    """AP against the column `x`: every family as the `line` of its rows, and what was measured."""
    from plotly.graph_objects import Figure

    claimed = [row for name in SOURCES for row in table(name) if row[x] is not None]
    figure = Figure()
    for family, (colour, symbol, dash) in FAMILIES.items():
        points = _points(line([row for row in claimed if _is_of(family, row["model"])]), x, family)
        points.update(mode="lines+markers", line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 9})
        figure.add_trace(points)
    if measured:
        own = _points([_complete(row, x) for row in measured], x, "measured")
        own.update(mode="markers", marker={"symbol": "star", "size": 15, "color": INK})
        figure.add_trace(own)
    figure.update_layout(template="plotly_white", width=860, height=520, margin={"t": 24}, hovermode="closest")
    figure.update_yaxes(title="AP on COCO val2017, %")
    return figure


def _line_by_latency(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["latency_ms"])


def _line_per_size(rows: list[Row]) -> list[Row]:
    """The rows by size and epochs, with a gap between one size and the next."""
    line: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["params_m"], row["epochs"])):
        if line and line[-1]["params_m"] != row["params_m"]:
            line.append(GAP)
        line.append(row)
    return line


def _points(rows: Sequence[Row], x: str, name: str) -> Scatter:
    """One named trace of the rows, each of which says on hover what it is."""
    from plotly.graph_objects import Scatter

    return Scatter(
        x=[row[x] for row in rows],
        y=[row["ap"] for row in rows],
        name=name,
        text=[_hover(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )


def _is_of(family: str, model: str) -> bool:
    """Whether a model such as "YOLO11-X" is a size of the family."""
    return model == family or model.startswith(f"{family}-")


def _complete(row: Row, x: str) -> Row:
    lacking = [key for key in ("model", "ap", x) if row.get(key) is None]
    if lacking:
        raise DataError(f'A measured point needs "model", "ap" and "{x}"; {row} lacks {", ".join(lacking)}: add it.')
    return row


def _hover(row: Row) -> str:
    """What is known of a row, a line each: model, AP, epochs, size, cost, and the note of the table."""
    known = {
        "AP {} %": "ap",
        "{} epochs": "epochs",
        "{} ms": "latency_ms",
        "{} M parameters": "params_m",
        "{} GFLOPs": "gflops",
        "{}": "note",
    }
    title = " ".join(filter(None, (row["model"], row.get("backbone"))))
    facts = [words.format(row[key]) for words, key in known.items() if row.get(key) is not None]
    return "<br>".join([f"<b>{title}</b>", *facts])
