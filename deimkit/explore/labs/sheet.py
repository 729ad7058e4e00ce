"""A plotly figure of several panels, put together as plain values: some ten times faster than by a call for every part.

So a lab can draw all of it anew for every move of a control.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deimkit.explore.style import LOOK

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Ends = tuple[float, float]
Drawing = dict[str, Any]  # "data" and "layout", of which plotly makes a Figure
MARGIN = {"l": 60, "r": 20, "t": 70, "b": 50}  # pixels


@dataclass
class Panel:
    """One pair of axes of a `Sheet`, of which `x` and `y` are the short names."""

    sheet: Sheet
    x: str
    y: str

    def add(self, kind: str, **trace: Any) -> None:
        """Draw a trace of plotly's, such as "scatter", with its attributes."""
        self.sheet.traces.append({"type": kind, "xaxis": self.x, "yaxis": self.y, **trace})

    def say(self, text: str, x: float, y: float, **how: Any) -> None:
        """Write a word at a place of the axes."""
        place = {"text": text, "x": x, "y": y, "xref": self.x, "yref": self.y, "showarrow": False}
        self.sheet.layout["annotations"].append(place | how)


@dataclass
class Sheet:
    """The traces and the layout of a figure in the making."""

    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=lambda: {"annotations": [], "images": []})

    def panel(self, title: str, across: Ends, up: Ends, x: dict[str, Any], y: dict[str, Any]) -> Panel:
        """A new panel with its title above it; where it is, in [0, 1] of the figure, and what plotly's axes say."""
        count = sum(name.startswith("xaxis") for name in self.layout)
        number = str(count + 1) if count else ""
        self.layout[f"xaxis{number}"] = {"domain": list(across), "anchor": f"y{number}", **_titled(x)}
        self.layout[f"yaxis{number}"] = {"domain": list(up), "anchor": f"x{number}", **_titled(y)}
        place = {"x": across[0], "y": up[1], "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        self.layout["annotations"].append({"text": f"<b>{title}</b>", "showarrow": False, "yshift": 2, **place})
        return Panel(self, f"x{number}", f"y{number}")

    def axis(self, name: str) -> dict[str, Any]:
        """What the layout says of an axis by its short name."""
        found: dict[str, Any] = self.layout[f"{name[0]}axis{name[1:]}"]
        return found

    def drawing(self, height: int, **layout: Any) -> Drawing:
        """All of it, in the look of this package; `height` in pixels, and as wide as the page."""
        # labs are clicked and moved by controls: a drag that zooms would only be in the way
        own = {"template": LOOK, "autosize": True, "height": height, "dragmode": False, "margin": MARGIN}
        return {"data": self.traces, "layout": self.layout | own | layout}

    def figure(self, height: int, **layout: Any) -> Figure:
        """The drawing as a Figure of plotly's, which checks all of it."""
        from plotly.graph_objects import Figure

        return Figure(self.drawing(height, **layout))


def powers(low: float, high: float, step: int = 1) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high` with the powers of ten marked, or every so many of them."""
    marked = range(math.ceil(math.log10(low) / step) * step, math.floor(math.log10(high)) + 1, step)
    words = [f"10<sup>{power}</sup>" for power in marked]
    ends = [math.log10(low), math.log10(high)]
    return {"type": "log", "range": ends, "tickvals": [10.0**power for power in marked], "ticktext": words}


def _titled(axis: dict[str, Any]) -> dict[str, Any]:
    """An axis whose "title" may be given as words."""
    title = axis.get("title")
    return axis | {"title": {"text": title, "standoff": 6}} if isinstance(title, str) else axis
