"""The page that a plotly figure is drawn on: its margins, and where subplots, scenes, scales and the legend stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from deimkit.explore.still.axes import Axis, Subplot, Way, said_of, ticks
from deimkit.explore.still.scene import Scene
from deimkit.explore.still.values import ABOVE, ASIDE, DPI, POINT, Part, anchored, colour, lettering, one_of, plain

WIDTH, HEIGHT = 1100, 450  # pixels of a layout that does not say its size, as wide as the page of a notebook
SHARP = 1.5  # pixels of the picture for one of the layout
EDGE = 5  # pixels of the layout that stay free at the edge of the picture
GROUND, UNDER, OVER, WORDS = -3, -2, 5, 7  # the order in which things cover one another; subplots are at 0
WAYS: tuple[Way, Way] = ("x", "y")


@dataclass
class Entry:
    """A line of a legend."""

    words: str
    mark: Artist
    group: str
    rank: int
    asked: bool  # whether its trace says that it is to be shown


class Page:
    """A picture in the making; `whole` is the space inside the margins, which plotly calls paper."""

    def __init__(self, layout: Part, traces: list[Part]) -> None:
        self.layout, self.traces = layout, traces
        self.font: Part = {"size": 12, **layout.get("font", {})}
        self.width, self.height = layout.get("width") or WIDTH, layout.get("height") or HEIGHT
        size = (self.width / DPI, self.height / DPI)
        self.picture = Picture(figsize=size, dpi=SHARP * DPI, facecolor=colour(layout.get("paper_bgcolor", PAPER)))
        self.canvas = FigureCanvasAgg(self.picture)
        self.margin: dict[str, float] = {"l": 80, "r": 80, "t": 100, "b": 80} | layout.get("margin", {})
        self.placed: list[tuple[Axes, Sequence[float]]] = []
        self.whole = self._place((0, 1), (0, 1))
        self.whole.set_axis_off()
        self.whole.set(zorder=WORDS, xlim=(0, 1), ylim=(0, 1))
        self.axes: dict[str, Axis] = {}
        self.subplots: dict[tuple[str, str], Subplot] = {}
        self.scenes: dict[str, Scene] = {}
        self.scales: list[tuple[ScalarMappable, Part]] = []
        self.legends: dict[str, list[Entry]] = {}
        self.later: list[Callable[[], None]] = []  # what has to wait until all sizes are known

    # ------------------------------------------------------------------ places
    def axis(self, name: str) -> Axis:
        """An axis by its short name."""
        if name not in self.axes:
            self.axes[name] = Axis(name, said_of(name, self.layout), self.font)
        return self.axes[name]

    def subplot(self, part: Part) -> Subplot:
        """Where a trace belongs, by its "xaxis" and "yaxis"."""
        return self.at(part.get("xaxis") or "x", part.get("yaxis") or "y")

    def at(self, x: str, y: str) -> Subplot:
        """The subplot of two axes."""
        if (x, y) not in self.subplots:
            across, up = self.axis(x), self.axis(y)
            ax = self._place(across.said.get("domain", (0, 1)), up.said.get("domain", (0, 1)))
            ax.set(xscale="log" if across.log else "linear", yscale="log" if up.log else "linear")
            ax.patch.set_visible(False)
            ax.set_axisbelow(True)
            ground = colour(self.layout.get("plot_bgcolor", PAPER))
            if not up.said.get("overlaying"):
                self.picture.add_artist(Rectangle((0, 0), 1, 1, transform=ax.transAxes, color=ground, zorder=GROUND))
            self.subplots[x, y] = Subplot(ax, across, up, {"x": 0.0, "y": 0.05})
        return self.subplots[x, y]

    def home(self, ref: str) -> Subplot:
        """A subplot that has the axis of a reference such as "x2" or "y3 domain"."""
        name = ref.partition(" ")[0]
        found = next((sub for sub in self.subplots.values() if name in (sub.x.name, sub.y.name)), None)
        if found is not None:
            return found
        other = self.axis(name).said.get("anchor", ("y" if name[0] == "x" else "x") + name[1:])
        return self.at(name, other) if name[0] == "x" else self.at(other, name)

    def scene(self, name: str) -> Scene:
        """A scene of three dimensions: "scene", "scene2", .."""
        if name not in self.scenes:
            said = self.layout.get(name, {})
            domain = {"x": (0, 1), "y": (0, 1), **said.get("domain", {})}
            ax = self._place(domain["x"], domain["y"], projection="3d")
            self.scenes[name] = Scene(ax, said, self.font)
        return self.scenes[name]

    def frame(self, xref: str, yref: str) -> Transform:
        """What takes positions that refer to axes, to their domains or to the paper to the picture."""
        sides = [self._side(ref, other) for ref, other in ((xref, yref), (yref, xref))]
        return blended_transform_factory(*sides)

    def _side(self, ref: str, other: str) -> Transform:
        if ref in ("paper", "container"):
            return self.whole.transAxes if ref == "paper" else self.picture.transFigure
        pair = sorted((ref.partition(" ")[0], other.partition(" ")[0]))  # "x2" comes before "y"
        home = self.home(ref) if other in ("paper", "container") else self.at(pair[0], pair[1])
        return home.ax.transAxes if ref.endswith("domain") else home.ax.transData

    def _place(self, across: Sequence[float], up: Sequence[float], **kind: Any) -> Any:
        ax = self.picture.add_axes((0, 0, 1, 1), **kind)
        self.placed.append((ax, (across[0], up[0], across[1] - across[0], up[1] - up[0])))
        return ax

    def arrange(self) -> None:
        """Put everything where it belongs within the margins."""
        left, bottom = self.margin["l"] / self.width, self.margin["b"] / self.height
        wide = max(0.1, 1 - left - self.margin["r"] / self.width)
        high = max(0.1, 1 - bottom - self.margin["t"] / self.height)
        for ax, (x, y, w, h) in self.placed:
            ax.set_position((left + x * wide, bottom + y * high, w * wide, h * high))
        for sub in self.subplots.values():
            sub.constrain()

    # ------------------------------------------------------------------ what goes with traces
    def name(self, trace: Part, mark: Artist) -> None:
        """Enter a trace in its legend."""
        if trace.get("showlegend", True):
            words, group = trace.get("name", f"trace {trace['index']}"), trace.get("legendgroup", "")
            entry = Entry(words, mark, group, trace.get("legendrank", 1000), asked="showlegend" in trace)
            self.legends.setdefault(trace.get("legend", "legend"), []).append(entry)

    def scale(self, drawn: ScalarMappable, said: Part) -> None:
        """Show what the colours of a trace or marker mean, if it has a "showscale"."""
        if said.get("showscale"):
            self.scales.append((drawn, said.get("colorbar", {})))

    def bars(self, trace: Part) -> list[Part]:
        """The bar traces of the subplot that a trace belongs to."""
        sub = self.subplot(trace)
        return [each for each in self.traces if each["type"] == "bar" and self.subplot(each) is sub]

    # ------------------------------------------------------------------ the end
    def finish(self) -> Picture:
        """Dress all axes, and make the margins as wide as words and legends need."""
        self._ranges()
        self.arrange()
        for sub in self.subplots.values():
            for way in WAYS:
                sub.dress(way, self._shows(sub, way))
        for scene in self.scenes.values():
            scene.finish()
        bars = [self._bar(*scale) for scale in self.scales]
        self.arrange()
        legends = [made for name, entries in self.legends.items() for made in self._legend(name, entries)]
        self._title()
        self._make_room(bars, legends)
        self.arrange()
        for draw in self.later:
            draw()
        return self.picture

    def _ranges(self) -> None:
        """The same range for all subplots of an axis, and of those that match it."""
        groups: dict[str, list[tuple[Subplot, Way]]] = {}
        for sub in self.subplots.values():
            for way in WAYS:
                groups.setdefault(self._root(sub.axis(way)), []).append((sub, way))
        for name, members in groups.items():
            ends = [sub.ends(way) for sub, way in members if sub.ax.has_data() or len(members) == 1]
            whole = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=1.0)
            shown = self.axis(name).within(whole)
            for sub, way in members:
                sub.show(way, shown)

    def _root(self, axis: Axis) -> str:
        other = axis.said.get("matches")
        return axis.name if other is None else self._root(self.axis(other))

    def _shows(self, sub: Subplot, way: Way) -> bool:
        """Whether a subplot is the one that shows this axis: that of the anchor, or else the first."""
        axis, other = sub.axis(way), "y" if way == "x" else "x"
        homes = [each for each in self.subplots.values() if each.axis(way) is axis]
        anchored = [each for each in homes if each.axis(cast(Way, other)).name == axis.said.get("anchor", other)]
        return (anchored or homes)[0] is sub

    def _bar(self, drawn: ScalarMappable, said: Part) -> Axes:
        """A bar with the colours of a scale, beside what it belongs to."""
        if said.get("orientation", "v") != "v":
            raise one_of("colour bars", ("orientation v",), said["orientation"])
        margin = self.margin
        inside = self.width - margin["l"] - margin["r"], self.height - margin["t"] - margin["b"]
        thick = said.get("thickness", 30) / inside[0]
        long = said.get("len", 1) / (1 if said.get("lenmode") != "pixels" else inside[1])
        x, y = said.get("x", 1.02), said.get("y", 0.5)
        x -= thick * {"left": 0.0, "center": 0.5, "right": 1.0}[said.get("xanchor", "left")]
        y -= long * {"bottom": 0.0, "middle": 0.5, "top": 1.0}[said.get("yanchor", "middle")]
        title, pad = said.get("title", {}), 10 / inside[1]  # pixels that plotly leaves above and below
        above = 1.7 * self.font["size"] / inside[1] if title.get("text") and title.get("side", "top") == "top" else 0
        ax: Axes = self._place((x + 10 / inside[0], x + 10 / inside[0] + thick), (y + pad, y + long - pad - above))
        bar = self.picture.colorbar(drawn, cax=ax)
        bar.outline.set_visible(False)
        axis = Axis("y", said, {**self.font, **said.get("tickfont", {})})
        locator, formatter = ticks(axis, long * inside[1], ax.get_ylim())
        ax.yaxis.set_major_locator(locator)
        ax.yaxis.set_major_formatter(formatter)
        look = lettering(axis.font)
        ax.tick_params(length=0, labelsize=look["fontsize"], labelcolor=look["color"], pad=3 * POINT)
        if title.get("text"):
            style = lettering({**self.font, **title.get("font", {})}, title["text"])
            if title.get("side", "top") == "right":
                ax.set_ylabel(plain(title["text"]), **style)
            else:
                ax.set_title(plain(title["text"]), loc="left", pad=5 * POINT, **style)
        return ax

    def _legend(self, name: str, entries: list[Entry]) -> list[Legend]:
        said = self.layout.get(name, {})
        if not self.layout.get("showlegend", len(entries) > 1 or entries[0].asked) or not said.get("visible", True):
            return []
        entries = self._sorted(said, entries)
        flat = said.get("orientation") == "h"
        columns = len(entries) if flat else 1
        made = self._lines(said, entries, columns)
        inside = (self.width - self.margin["l"] - self.margin["r"]) * SHARP
        while columns > 1 and (wide := made.get_window_extent(self.canvas.get_renderer()).width) > inside:
            made.remove()
            columns = max(1, min(columns - 1, int(columns * inside / wide)))
            made = self._lines(said, entries, columns)
        return [made]

    def _sorted(self, said: Part, entries: list[Entry]) -> list[Entry]:
        """The lines of a legend in their order, which is plotly's: stacks and bands from top to bottom."""
        turned = self.layout.get("barmode") == "stack" and any(trace["type"] == "bar" for trace in self.traces)
        turned |= any(trace.get("fill") in ("tonextx", "tonexty") for trace in self.traces)
        order = said.get("traceorder", "grouped+reversed" if turned else "grouped")
        if "grouped" in order:
            first = {entry.group: i for i, entry in reversed(list(enumerate(entries)))}
            place = {id(entry): first[entry.group] if entry.group else i for i, entry in enumerate(entries)}
            entries = sorted(entries, key=lambda entry: place[id(entry)])
        entries = sorted(entries, key=lambda entry: entry.rank)
        return entries[::-1] if "reversed" in order else entries

    def _lines(self, said: Part, entries: list[Entry], columns: int) -> Legend:
        """A legend of so many columns, to be read line by line."""
        rows = [entries[i] for column in range(columns) for i in range(column, len(entries), columns)]
        flat = said.get("orientation") == "h"
        x, y = (said.get("x", 0), said.get("y", -0.1)) if flat else (said.get("x", 1.02), said.get("y", 1))
        above = anchored(said.get("yanchor", "top" if flat else "auto"), y, ABOVE)
        aside = anchored(said.get("xanchor", "left"), x, ASIDE)
        corner = {"top": "upper", "middle": "center", "bottom": "lower"}[above]
        look = lettering({**self.font, **said.get("font", {})})
        frame = self.frame(said.get("xref", "paper"), said.get("yref", "paper"))
        title = said.get("title", {}).get("text")
        made = Legend(
            self.whole,
            [entry.mark for entry in rows],
            [plain(entry.words) for entry in rows],
            loc=cast(Any, "center" if corner == aside == "center" else f"{corner} {aside}"),
            bbox_to_anchor=(x, y),
            bbox_transform=frame,
            ncols=columns,
            fontsize=look["fontsize"],
            labelcolor=look["color"],
            title=plain(title) if title else None,
            title_fontsize=look["fontsize"],
            alignment="left",
            frameon="bgcolor" in said or said.get("borderwidth", 0) > 0,
            facecolor=colour(said.get("bgcolor", PAPER)),
            edgecolor=colour(said.get("bordercolor", "#444")) if said.get("borderwidth") else "none",
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
        if not title.get("text"):
            return
        x, y = title.get("x", 0.5), title.get("y", "auto")
        aside: Any = anchored(title.get("xanchor", "auto"), x, ASIDE)
        above = {"top": "top", "bottom": "bottom"}.get(title.get("yanchor", "auto"), "center")
        look = lettering({**self.font, "size": 1.4 * self.font["size"], **title.get("font", {})}, title["text"])
        height = 1 - self.margin["t"] / 2 / self.height if y == "auto" else y
        frame = self.frame(title.get("xref", "container"), title.get("yref", "container"))
        self.whole.text(x, height, plain(title["text"]), ha=aside, va=above, transform=frame, **look)

    def _make_room(self, bars: list[Axes], legends: list[Legend]) -> None:
        """Widen the margins by what stands out of the picture."""
        renderer = self.canvas.get_renderer()
        found: list[Bbox | None] = [legend.get_window_extent(renderer) for legend in legends]
        found += [bar.get_tightbbox(renderer) for bar in bars]
        for sub in self.subplots.values():
            found += [axis.get_tightbbox(renderer) for axis in (sub.ax.xaxis, sub.ax.yaxis) if axis.get_visible()]
        seen = [box for box in found if box is not None and np.isfinite(box.extents).all()]  # no ticks, no extent
        if not seen:
            return
        whole = Bbox.union(seen)
        self.margin["l"] += max(0.0, EDGE - whole.x0 / SHARP)
        self.margin["b"] += max(0.0, EDGE - whole.y0 / SHARP)
        self.margin["r"] += max(0.0, EDGE + whole.x1 / SHARP - self.width)
        self.margin["t"] += max(0.0, EDGE + whole.y1 / SHARP - self.height)
