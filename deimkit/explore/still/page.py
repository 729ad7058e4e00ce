"""The page that a plotly figure is drawn on: its margins, and where panels, scenes, colour bars and legend stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox, Transform, blended_transform_factory

from deimkit.explore.plots import PAPER, Picture
from deimkit.explore.still.axes import WAYS, Axis, Panel
from deimkit.explore.still.said import Part, must
from deimkit.explore.still.scene import Scene
from deimkit.explore.still.values import ABOVE, ASIDE, DPI, POINT, SHARP, anchored, colour, lettering, plain

WIDTH, HEIGHT = 1100, 450  # pixels of a layout that does not say its size, as wide as the page of a notebook
EDGE = 5  # pixels of the layout that stay free at the edge of the picture
GROUND, UNDER, OVER, WORDS = -3, -2, 5, 7  # the order in which things cover one another; panels are at 0


class Page:
    """A picture in the making; `whole` is the space inside the margins, which plotly calls paper."""

    def __init__(self, layout: Part, traces: list[Part]) -> None:
        self.layout, self.traces = layout, traces
        self.font: Part = {"size": 12, **layout.get("font", {})}
        self.width, self.height = layout.get("width") or WIDTH, layout.get("height") or HEIGHT
        size = (self.width / DPI, self.height / DPI)
        self.picture = Picture(figsize=size, dpi=SHARP * DPI, facecolor=colour(layout.get("paper_bgcolor", PAPER)))
        self.canvas = FigureCanvasAgg(self.picture)
        self.renderer = self.canvas.get_renderer()
        self.margin: dict[str, float] = {"l": 80, "r": 80, "t": 100, "b": 80} | layout.get("margin", {})
        self.placed: list[tuple[Axes, Sequence[float]]] = []
        self.whole = self._place((0, 1), (0, 1))
        self.whole.set_axis_off()
        self.whole.set(zorder=WORDS, xlim=(0, 1), ylim=(0, 1))
        self.axes: dict[str, Axis] = {}
        self.panels: dict[str, Panel] = {}  # by the names of both axes
        self.scenes: dict[str, Scene] = {}
        self.bars: list[Axes] = []
        self.entries: list[tuple[str, Artist]] = []  # of the legend
        self.asked = False  # whether a trace says that it is to be in the legend
        self.later: list[Callable[[], None]] = []  # what has to wait until all sizes are known

    # ------------------------------------------------------------------ places
    def axis(self, name: str) -> Axis:
        """An axis by its short name."""
        if name not in self.axes:
            self.axes[name] = Axis(name, self.layout, self.font)
        return self.axes[name]

    def panel(self, part: Part) -> Panel:
        """Where a trace belongs, by its "xaxis" and "yaxis"."""
        return self.at(part.get("xaxis") or "x", part.get("yaxis") or "y")

    def at(self, x: str, y: str) -> Panel:
        """The panel of two axes; no other can have either."""
        if x not in self.panels and y not in self.panels:
            across, up = self.axis(x), self.axis(y)
            ax = self._place(across.said.get("domain", (0, 1)), up.said.get("domain", (0, 1)))
            ax.set(xscale="log" if across.log else "linear", yscale="log" if up.log else "linear")
            ax.patch.set_visible(False)
            ground = colour(self.layout.get("plot_bgcolor", PAPER))
            self.picture.add_artist(Rectangle((0, 0), 1, 1, transform=ax.transAxes, color=ground, zorder=GROUND))
            self.panels[x] = self.panels[y] = Panel(ax, across, up)
        found = self.panels.get(x)
        must(found is not None and found is self.panels.get(y), f"panels that share an axis ({x}, {y})")
        return cast(Panel, found)

    def home(self, ref: str) -> Panel | None:
        """The panel of a reference such as "x2" or "y3 domain"; paper has none."""
        name = ref.partition(" ")[0]
        if name == "paper" or name in self.panels:
            return self.panels.get(name)
        other = self.axis(name).said.get("anchor") or ("y" if name[0] == "x" else "x") + name[1:]
        return self.at(*sorted((name, other)))

    def frame(self, *refs: str) -> Transform:
        """What takes positions that refer to an axis, its domain or the paper to the picture, across and up."""
        sides = []
        for ref in refs:
            home = self.home(ref)
            ax = self.whole if home is None else home.ax
            sides.append(ax.transAxes if home is None or ref.endswith("domain") else ax.transData)
        return blended_transform_factory(*sides)

    def scene(self, name: str) -> Scene:
        """A scene of three dimensions: "scene", "scene2", .."""
        if name not in self.scenes:
            said = self.layout.get(name, {})
            domain = {"x": (0, 1), "y": (0, 1), **said.get("domain", {})}
            self.scenes[name] = Scene(self._place(domain["x"], domain["y"], projection="3d"), said, self.font)
        return self.scenes[name]

    def _place(self, across: Sequence[float], up: Sequence[float], **kind: Any) -> Any:
        ax = self.picture.add_axes((0, 0, 1, 1), **kind)
        self.placed.append((ax, (across[0], up[0], across[1] - across[0], up[1] - up[0])))
        return ax

    def _inside(self) -> tuple[float, float]:
        """The width and height inside the margins, in pixels of the layout."""
        margin = self.margin
        return self.width - margin["l"] - margin["r"], self.height - margin["t"] - margin["b"]

    def arrange(self) -> None:
        """Put everything where it belongs within the margins."""
        left, bottom = self.margin["l"] / self.width, self.margin["b"] / self.height
        wide = max(0.1, 1 - left - self.margin["r"] / self.width)
        high = max(0.1, 1 - bottom - self.margin["t"] / self.height)
        for ax, (x, y, w, h) in self.placed:
            ax.set_position((left + x * wide, bottom + y * high, w * wide, h * high))
        for panel in self.panels.values():
            panel.constrain()

    # ------------------------------------------------------------------ what goes with traces
    def name(self, trace: Part, mark: Artist) -> None:
        """Enter a trace in the legend."""
        if trace.get("showlegend", True):
            self.entries.append((plain(trace.get("name", f"trace {trace['index']}")), mark))
            self.asked |= "showlegend" in trace

    def scale(self, trace: Part, drawn: ScalarMappable) -> None:
        """Show what the colours of a field mean, by a bar beside it, unless its "showscale" says otherwise."""
        if not trace.get("showscale", True):
            return
        said, inside = trace.get("colorbar", {}), self._inside()
        thick, long, pad = said.get("thickness", 30) / inside[0], said.get("len", 1), 10 / inside[1]
        x = said.get("x", 1.02) - thick * {"left": 0.0, "center": 0.5, "right": 1.0}[said.get("xanchor", "left")]
        x, y, title = x + 10 / inside[0], said.get("y", 0.5) - long / 2, said.get("title", {})
        above = 1.7 * self.font["size"] / inside[1] if title.get("text") else 0
        ax: Axes = self._place((x, x + thick), (y + pad, y + long - pad - above))
        self.picture.colorbar(drawn, cax=ax).outline.set_visible(False)
        ax.yaxis.set_ticks(*Axis("y", {}, self.font).ticks(long * inside[1], ax.get_ylim()))
        look = lettering(self.font)
        ax.tick_params(length=0, labelsize=look["fontsize"], labelcolor=look["color"], pad=3 * POINT)
        look = lettering({**self.font, **title.get("font", {})}, title.get("text"))
        ax.set_title(plain(title.get("text") or ""), loc="left", pad=5 * POINT, **look)
        self.bars.append(ax)

    # ------------------------------------------------------------------ the end
    def finish(self) -> None:
        """Dress all axes, and make the margins as wide as words and legends need."""
        panels = list(dict.fromkeys(self.panels.values()))
        for panel in panels:
            panel.fit()
        self.arrange()
        seen = [box for panel in panels for way in WAYS for box in panel.dress(way, self.renderer)]
        for scene in self.scenes.values():
            scene.finish()
        seen += [box for bar in self.bars if (box := bar.get_tightbbox(self.renderer)) is not None]
        self._title()
        seen += self._legend()
        self._make_room(seen)
        self.arrange()
        for draw in self.later:
            draw()

    def _legend(self) -> list[Bbox]:
        """Draw the legend in as few rows as fit; where it is."""
        said = self.layout.get("legend", {})
        if not self.entries or not self.layout.get("showlegend", len(self.entries) > 1 or self.asked):
            return []
        columns = len(self.entries) if said.get("orientation") == "h" else 1
        made, inside = self._lines(said, columns), self._inside()[0] * SHARP
        while (wide := made.get_window_extent(self.renderer).width) > inside and columns > 1:
            made.remove()
            columns = max(1, min(columns - 1, int(columns * inside / wide)))
            made = self._lines(said, columns)
        return [made.get_window_extent(self.renderer)]

    def _lines(self, said: Part, columns: int) -> Legend:
        """A legend of so many columns, to be read line by line."""
        rows = [self.entries[i] for column in range(columns) for i in range(column, len(self.entries), columns)]
        flat = said.get("orientation") == "h"
        x, y = (said.get("x", 0), said.get("y", -0.1)) if flat else (said.get("x", 1.02), said.get("y", 1))
        above = anchored(said.get("yanchor", "top" if flat else "auto"), y, ABOVE)
        aside = anchored(said.get("xanchor", "left"), x, ASIDE)
        corner = {"top": "upper", "center": "center", "bottom": "lower"}[above]
        look = lettering({**self.font, **said.get("font", {})})
        made = Legend(
            self.whole,
            [mark for _, mark in rows],
            [words for words, _ in rows],
            loc=cast(Any, "center" if corner == aside == "center" else f"{corner} {aside}"),
            bbox_to_anchor=(x, y),
            bbox_transform=self.whole.transAxes,
            ncols=columns,
            fontsize=look["fontsize"],
            labelcolor=look["color"],
            alignment="left",
            frameon="bgcolor" in said,
            facecolor=colour(said.get("bgcolor", PAPER)),
            edgecolor="none",
            framealpha=None,
            fancybox=False,
            borderaxespad=0,
            borderpad=0.35,
            handlelength=2.2,
            columnspacing=1.4,
        )
        self.whole.add_artist(made)
        made.set_clip_on(False)  # a notebook cuts a picture out by what is not clipped
        return made

    def _title(self) -> None:
        title = self.layout.get("title", {})
        if title.get("text"):
            x, y = title.get("x", 0.5), 1 - self.margin["t"] / 2 / self.height
            look = lettering({**self.font, "size": 1.4 * self.font["size"], **title.get("font", {})}, title["text"])
            look |= {"ha": anchored(title.get("xanchor", "auto"), x, ASIDE), "va": "center"}
            self.whole.text(x, y, plain(title["text"]), transform=self.picture.transFigure, **look)

    def _make_room(self, seen: list[Bbox]) -> None:
        """Widen the margins by what stands out of the picture."""
        seen = [box for box in seen if np.isfinite(box.extents).all()]  # no ticks, no extent
        if seen:
            whole = Bbox.union(seen)
            self.margin["l"] += max(0.0, EDGE - whole.x0 / SHARP)
            self.margin["b"] += max(0.0, EDGE - whole.y0 / SHARP)
            self.margin["r"] += max(0.0, EDGE + whole.x1 / SHARP - self.width)
            self.margin["t"] += max(0.0, EDGE + whole.y1 / SHARP - self.height)
