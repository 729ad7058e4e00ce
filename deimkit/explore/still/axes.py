"""The axes of a plotly figure: what places, names and ranges mean, and how matplotlib shows them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox, offset_copy
from numpy.typing import NDArray

from deimkit.explore.still.said import Part, must
from deimkit.explore.still.values import DPI, POINT, RAISED, colour, lettering, numbers, plain

Way = Literal["x", "y"]
WAYS: tuple[Way, Way] = ("x", "y")
BELOW = -1  # the place of grids in the order in which things cover one another: over images, under panels
SPARSE = {"x": 80, "y": 40}  # pixels from one tick to the next, about
PREFIXES = {-12: "p", -9: "n", -6: "μ", -3: "m", 0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
_DATE = re.compile(r"\d{4}-\d\d(-\d\d.*)?")


class Axis:
    """An axis by its short name ("x", "y2"), with what the layout says of it."""

    def __init__(self, name: str, layout: Part, font: Part) -> None:
        self.name, self.font = name, font
        self.said: Part = layout.get(f"{name[0]}axis{name[1:]}", {})
        self.way: Way = "x" if name[0] == "x" else "y"
        self.log = self.said.get("type") == "log"
        self.names: list[str] = []
        tied = "scaleanchor" in self.said
        must(not tied or "constrain" in self.said, 'an axis with scaleanchor but without constrain="domain"')

    def numbers(self, given: Any) -> NDArray[Any]:
        """Where things stand on the axis; names stand at 0, 1, 2, in the order in which they came."""
        words = list(given)
        must(np.asarray(given).dtype.kind != "M", "dates")
        if self.said.get("type") != "category" and not any(isinstance(word, str) for word in words):
            return numbers(given)
        self.names += dict.fromkeys(str(word) for word in words if word is not None and str(word) not in self.names)
        must(not self.names or not all(map(_DATE.fullmatch, self.names)), f"dates such as {self.names[:1]}")
        places = {name: place for place, name in enumerate(self.names)}
        return np.asarray([math.nan if word is None else places[str(word)] for word in words], float)

    def place(self, value: Any, powers: bool = False) -> float:
        """Where a part of the layout stands; of a log axis, words and images (`powers`) give the exponent of 10."""
        if isinstance(value, str):
            return float(self.numbers([value])[0])
        return float(10.0**value if powers and self.log else value)

    def within(self, low: float, high: float) -> tuple[float, float]:
        """The range that is shown, in the order of the axis, of what is drawn between two ends."""
        if self.said.get("rangemode") == "tozero":
            low, high = min(low, 0), max(high, 0)
        ends = self.said.get("range") or (None, None)
        first, last = (None if end is None else self.place(end, powers=True) for end in ends)
        if self.said.get("autorange") == "reversed":
            return high, low
        return (low if first is None else first), (high if last is None else last)

    def ticks(self, long: float, ends: tuple[float, float]) -> tuple[NDArray[Any], list[str]]:
        """Where the ticks of so many pixels between two ends are, and what they say."""
        low, high = sorted(ends)
        if self.said.get("tickvals") is not None:
            places = self.numbers(self.said["tickvals"])
        elif self.names:  # at least 12 pixels for each
            places = np.arange(0, len(self.names), math.ceil(len(self.names) * 12 / long), dtype=float)
        else:
            places = self._marked(low, high, min(max(long / SPARSE[self.way], 4), 9) + 1)
        margin = 1e-10 * (high - low)
        inside = (low - margin <= places) & (places <= high + margin)
        words = self.said.get("ticktext")
        if words is None:
            words = [self.names[round(place)] for place in places] if self.names else self._spoken(places)
        return places[inside], [plain(word) for word, shown in zip(words, inside, strict=False) if shown]

    def _marked(self, low: float, high: float, count: float) -> NDArray[Any]:
        """About so many round numbers, or powers of ten."""
        if not self.log:
            step = self.said.get("dtick") or stride((high - low) / count)
            return step * np.arange(math.ceil(low / step) - 1, math.floor(high / step) + 2)
        first, last = math.log10(low), math.log10(high)
        decades = (last - first) / count
        every = math.ceil(decades)
        powers = np.arange(math.floor(first / every) * every, last + 1, every)
        return np.outer(10.0**powers, (1.0, 2.0, 5.0) if decades < 0.7 else (1.0,)).ravel()

    def _spoken(self, places: NDArray[Any]) -> list[str]:
        largest = float(np.abs(places).max(initial=0))
        return [spoken(float(place), largest, self.log, self.said.get("exponentformat", "B")) for place in places]


def stride(least: float) -> float:
    """The round number, 2, 5 or 10 times a power of ten, that is the next above this."""
    base = 10.0 ** math.floor(math.log10(least) + 1e-9)
    return next(factor for factor in (2, 5, 10, 20) if factor * base > least * (1 + 1e-9)) * base


def spoken(value: float, largest: float, log: bool = False, form: str = "B") -> str:
    """A number at a tick, short: 0.25, 1500, 20k, or by its "exponentformat" 2e+4 or 2×10⁴; `largest`: of all ticks."""
    if value == 0 or largest == 0:
        return "0"
    size = abs(value) if log else largest
    own = math.floor(math.log10(abs(value)) + 1e-9)
    power = 0 if 1e-3 <= size < 1e4 else own if form != "B" else 3 * math.floor(math.log10(size) / 3 + 1e-9)
    if log and form == "power" and size not in (1, 10):
        power = own
    scaled = f"{round(value / 10.0**power, 9):.6g}".replace("-", "\u2212")
    if not power:
        return scaled
    if form == "B" and power in PREFIXES:
        return f"{scaled}{PREFIXES[power]}"
    raised = f"10{str(power).translate(RAISED)}"
    return f"{scaled}e{power:+d}" if form == "e" else raised if scaled == "1" else f"{scaled}×{raised}"


@dataclass(eq=False)
class Panel:
    """The matplotlib axes for a pair of plotly's; `slack` is the share of the range that is left free at its ends."""

    ax: Axes
    x: Axis
    y: Axis
    slack: dict[Way, float] = field(default_factory=lambda: {"x": 0.0, "y": 0.05})

    @property
    def picture(self) -> Figure:
        """The whole picture, which its grid, ticks and their words are part of: panels keep what traces say."""
        shown = self.ax.get_figure(root=True)
        assert shown is not None
        return shown

    def axis(self, way: Way) -> Axis:
        """The x or the y axis."""
        return self.x if way == "x" else self.y

    def ends(self, way: Way) -> tuple[float, float]:
        """From where to where an axis runs."""
        return self.ax.get_xlim() if way == "x" else self.ax.get_ylim()

    def fit(self) -> None:
        """Show all that is drawn, with some slack, or what the layout says."""
        self.ax.margins(x=self.slack["x"], y=self.slack["y"])
        across, up = (self.axis(way).within(*sorted(self.ends(way))) for way in WAYS)
        self.ax.set(xlim=across, ylim=up)

    def pixels(self) -> tuple[float, float]:
        """Its width and height in pixels of the layout."""
        box, (width, height) = self.ax.get_position(original=True), self.picture.get_size_inches() * DPI
        return box.width * width, box.height * height

    def constrain(self) -> None:
        """Make a unit of one axis as long as that of the other, where the layout says so, by a smaller panel."""
        if not any("scaleanchor" in axis.said for axis in (self.x, self.y)):
            return
        across, up = (long / abs(np.diff(self.ends(way))[0]) for way, long in zip(WAYS, self.pixels(), strict=True))
        box, share = self.ax.get_position(original=True), min(across, up) / max(across, up)
        toward = {"left": 0.0, "bottom": 0.0, "right": 1.0, "top": 1.0}
        axis = self.x if across > up else self.y  # which has room to spare
        free = (1 - share) * toward.get(axis.said.get("constraintoward", "middle"), 0.5)
        if axis is self.x:
            self.ax.set_position((box.x0 + free * box.width, box.y0, share * box.width, box.height))
        else:
            self.ax.set_position((box.x0, box.y0 + free * box.height, box.width, share * box.height))

    def dress(self, way: Way, renderer: Any) -> list[Bbox]:
        """Show an axis by its line, grid, ticks and words; the places of these, in pixels of the picture.

        Matplotlib's own ticks are five artists each, and measured anew whenever they are asked for.
        """
        said, shown = self.axis(way).said, self.ax.xaxis if way == "x" else self.ax.yaxis
        shown.set_major_locator(NullLocator())
        shown.set_minor_locator(NullLocator())
        visible = said.get("visible", True)
        for side in ("bottom", "top") if way == "x" else ("left", "right"):
            spine = self.ax.spines[side]
            spine.set_visible(bool(visible and said.get("showline") and side in ("bottom", "left")))
            spine.set(color=colour(said.get("linecolor", "#444")), linewidth=POINT)
        shown.set_visible(visible)
        if not visible:
            return []
        places, words = self.axis(way).ticks(self.pixels()[way == "y"], self.ends(way))
        self._rule(way, places)
        labels = self._label(way, places, words) if said.get("showticklabels", True) else []
        boxes = [label.get_window_extent(renderer) for label in labels]
        if said.get("title", {}).get("text"):
            boxes.append(self._name(way, boxes, self._long(way) if len(places) else 0.0, renderer))
        return boxes

    def _rule(self, way: Way, places: NDArray[Any]) -> None:
        """The grid, the line at zero and the marks of the ticks."""
        said, axis = self.axis(way).said, self.axis(way)
        across = self.ax.get_xaxis_transform if way == "x" else self.ax.get_yaxis_transform
        low, high = sorted(self.ends(way))
        if said.get("showgrid", True):
            runs, ends = np.repeat(places, 3), np.tile((0, 1, np.nan), len(places))
            look: Part = {"color": colour(said.get("gridcolor", "#eee")), "linewidth": POINT, "zorder": BELOW}
            grid = Line2D(*((runs, ends) if way == "x" else (ends, runs)), transform=across("grid"), **look)
            self.picture.add_artist(grid).set_clip_path(self.ax.patch)
        if said.get("zeroline", not axis.names) and low < 0 < high and not axis.log:
            look = {"color": colour(said.get("zerolinecolor", "#444")), "zorder": 0.6}
            look["linewidth"] = said.get("zerolinewidth", 1) * POINT
            (self.ax.axvline if way == "x" else self.ax.axhline)(0, **look)
        if said.get("ticks"):
            at = np.zeros(len(places))
            look = {"markersize": self._long(way), "markeredgewidth": POINT, "linestyle": "none", "zorder": BELOW}
            look |= {"color": colour(said.get("tickcolor", "#444")), "marker": 3 if way == "x" else 0}
            marks = Line2D(*((places, at) if way == "x" else (at, places)), transform=across("tick1"), **look)
            self.picture.add_artist(marks)

    def _long(self, way: Way) -> float:
        """How long ticks are, in points."""
        said = self.axis(way).said
        return POINT * said.get("ticklen", 5) if said.get("ticks") else 0.0

    def _label(self, way: Way, places: NDArray[Any], words: list[str]) -> list[Text]:
        """The words at the ticks."""
        axis, pad = self.axis(way), self._long(way) + 3 * POINT
        across = self.ax.get_xaxis_text1_transform if way == "x" else self.ax.get_yaxis_text1_transform
        frame, above, aside = across(pad)
        look: Part = lettering({**axis.font, **axis.said.get("tickfont", {})}) | {"va": above, "ha": aside}
        if turn := axis.said.get("tickangle", self._turn(way)):
            side = "center" if way == "y" or abs(turn) == 90 else "right" if turn < 0 else "left"
            look |= {"rotation": -turn, "rotation_mode": "anchor", "ha": side if way == "x" else aside}
        labels = []
        for place, word in zip(places, words, strict=True):
            x, y = (place, 0) if way == "x" else (0, place)
            labels.append(Text(x, y, word, transform=frame, **look))
            self.picture.add_artist(labels[-1])
        return labels

    def _turn(self, way: Way) -> float:
        """How far names under an axis are turned so that they do not run into one another."""
        axis = self.axis(way)
        words = [plain(word) for word in axis.said.get("ticktext", axis.names)]
        widest = max((len(line) for word in words for line in word.split("\n")), default=0)
        size = axis.said.get("tickfont", {}).get("size", axis.font.get("size", 12))
        crowded = way == "x" and widest * 0.56 * size * max(1, len(words)) > self.pixels()[0]
        return -35.0 if crowded else 0.0

    def _name(self, way: Way, boxes: list[Bbox], least: float, renderer: Any) -> Bbox:
        """Write the title of an axis beside its ticks' words, at `least` so many points away; where it is."""
        axis, title, panel = self.axis(way), self.axis(way).said["title"], self.ax.get_window_extent(renderer)
        font = {**axis.font, "size": 1.2 * axis.font.get("size", 12)} | title.get("font", {})
        name = self.ax.set_xlabel if way == "x" else self.ax.set_ylabel
        label = name(plain(title["text"]), **lettering(font, title["text"]))
        pixels = renderer.points_to_pixels(1)
        words = [panel.y0 - box.y0 if way == "x" else panel.x0 - box.x0 for box in boxes]
        out = max([least * pixels, *words]) / pixels + POINT * title.get("standoff", 8)  # points
        (x, y), (right, up) = ((0.5, 0), (0.0, -out)) if way == "x" else ((0, 0.5), (-out, 0.0))
        frame = offset_copy(self.ax.transAxes, self.picture, right, up, units="points")
        (self.ax.xaxis if way == "x" else self.ax.yaxis).set_label_coords(x, y, frame)
        return label.get_window_extent(renderer)
