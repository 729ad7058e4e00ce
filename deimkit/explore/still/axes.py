"""The axes of a plotly figure: what places, names and ranges mean, and how matplotlib shows them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    Formatter,
    FuncFormatter,
    Locator,
    LogLocator,
    MultipleLocator,
    NullLocator,
)
from numpy.typing import NDArray

from deimkit.errors import DeimkitError
from deimkit.explore.still.values import (
    DPI,
    POINT,
    RAISED,
    Part,
    colour,
    dashes,
    lettering,
    numbers,
    one_of,
    plain,
    spoken,
)

Way = Literal["x", "y"]
SPARSE = {"x": 80, "y": 40}  # pixels from one tick to the next, about
SIDES: dict[Way, tuple[Any, Any]] = {"x": ("bottom", "top"), "y": ("left", "right")}
PREFIXES = {-12: "p", -9: "n", -6: "μ", -3: "m", 0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
_DATE = re.compile(r"\d{4}-\d\d(-\d\d.*)?")


class Axis:
    """An axis by its short name ("x", "y2"), with what the layout says of it."""

    def __init__(self, name: str, said: Part, font: Part) -> None:
        self.name, self.said, self.font = name, said, font
        self.way: Way = "x" if name[0] == "x" else "y"
        self.log = said.get("type") == "log"
        self.names: list[str] = [str(word) for word in said.get("categoryarray", ())]
        if said.get("type") in ("date", "multicategory"):
            raise one_of("axes", ("linear", "log", "category"), said["type"])

    def numbers(self, given: Any) -> NDArray[Any]:
        """Where things stand on the axis; names stand at 0, 1, 2, in the order in which they came."""
        if np.asarray(given).dtype.kind in "iufb" and self.said.get("type") != "category":
            return numbers(given)
        words = [None if value is None else value for value in list(given)]
        if self.said.get("type") != "category" and not any(isinstance(word, str) for word in words):
            if np.asarray(given).dtype.kind == "M":
                raise one_of("axes", ("linear", "log", "category"), "date")
            return numbers(words)
        self.names += dict.fromkeys(str(word) for word in words if word is not None and str(word) not in self.names)
        if self.said.get("type") != "category" and all(_DATE.fullmatch(name) for name in self.names):
            raise one_of("axes", ("linear", "log", "category"), f"dates like {self.names[0]}")
        places = {name: place for place, name in enumerate(self.names)}
        return np.asarray([math.nan if word is None else places[str(word)] for word in words], float)

    def place(self, value: Any, powers: bool = False) -> float:
        """Where a part of the layout stands; of a log axis, words and images (`powers`) give the exponent of 10."""
        if isinstance(value, str):
            return float(self.numbers([value])[0])
        return float(10.0**value if powers and self.log else value)

    def within(self, ends: tuple[float, float]) -> tuple[float, float]:
        """The range that is shown, in the order of the axis, of what is drawn between two ends."""
        low, high = ends
        mode, said = self.said.get("rangemode", "normal"), self.said.get("autorange")
        if mode == "tozero":
            low, high = min(low, 0), max(high, 0)
        elif mode == "nonnegative":
            low = max(low, 0)
        first, last = (None, None) if said is True else self.said.get("range") or (None, None)
        if first is None and last is None and said in ("reversed", "max reversed", "min reversed"):
            return high, low
        raised = [None if end is None else self.place(end, powers=True) for end in (first, last)]
        return (low if raised[0] is None else raised[0]), (high if raised[1] is None else raised[1])


@dataclass(eq=False)
class Subplot:
    """The matplotlib axes for a pair of plotly's; `slack` is the share of the range that is left free at its ends."""

    ax: Axes
    x: Axis
    y: Axis
    slack: dict[Way, float]
    last: NDArray[Any] | None = None  # (n, 2) points of the scatter trace drawn last
    shown: dict[Way, tuple[float, float]] = field(default_factory=dict)

    def axis(self, way: Way) -> Axis:
        """The x or the y axis."""
        return self.x if way == "x" else self.y

    def ends(self, way: Way) -> tuple[float, float]:
        """From where to where everything drawn reaches, with some slack."""
        slack = self.slack[way]
        self.ax.margins(x=slack if way == "x" else None, y=slack if way == "y" else None)
        low, high = self.ax.get_xlim() if way == "x" else self.ax.get_ylim()
        return (low, high) if low < high else (high, low)

    def show(self, way: Way, ends: tuple[float, float]) -> None:
        """Show what is between two ends."""
        self.shown[way] = ends
        (self.ax.set_xlim if way == "x" else self.ax.set_ylim)(*ends)

    def pixels(self) -> tuple[float, float]:
        """Its width and height in pixels of the layout."""
        shown = self.ax.get_figure(root=True)
        assert shown is not None
        box, (width, height) = self.ax.get_position(original=True), shown.get_size_inches() * DPI
        return box.width * width, box.height * height

    def constrain(self) -> None:
        """Make a unit of one axis as long as that of the other, where the layout says so ("scaleanchor")."""
        tied = next((axis for axis in (self.x, self.y) if "scaleanchor" in axis.said), None)
        if tied is None or tied.said["scaleanchor"] not in (self.x.name, self.y.name):
            return
        for way, ends in list(self.shown.items()):
            self.show(way, ends)
        wide, high = self.pixels()
        spans = [abs(ends[1] - ends[0]) for ends in (self.ax.get_xlim(), self.ax.get_ylim())]
        ratio = tied.said.get("scaleratio", 1)
        scales = [wide / spans[0], high / spans[1]]  # pixels per unit
        scales[1 if tied is self.y else 0] /= ratio
        way = "x" if scales[0] > scales[1] else "y"  # the axis that has room to spare
        share = min(scales) / max(scales)
        if self.axis(way).said.get("constrain", "range") == "domain":
            self._narrow(way, share)
        else:
            self._widen(way, share)

    def _narrow(self, way: Way, share: float) -> None:
        box = self.ax.get_position(original=True)
        toward = {"left": 0.0, "bottom": 0.0, "right": 1.0, "top": 1.0}
        free = (1 - share) * toward.get(self.axis(way).said.get("constraintoward", "middle"), 0.5)
        if way == "x":
            place = box.x0 + free * box.width, box.y0, share * box.width, box.height
        else:
            place = box.x0, box.y0 + free * box.height, box.width, share * box.height
        self.ax.set_position(place)

    def _widen(self, way: Way, share: float) -> None:
        low, high = self.ax.get_xlim() if way == "x" else self.ax.get_ylim()
        middle, half = (low + high) / 2, (high - low) / 2 / share
        (self.ax.set_xlim if way == "x" else self.ax.set_ylim)(middle - half, middle + half)

    def dress(self, way: Way, mine: bool) -> None:
        """Show an axis by its line, ticks, words and grid; not `mine` if another pair of axes shows it already."""
        axis, shown = self.axis(way), self.ax.xaxis if way == "x" else self.ax.yaxis
        said, mine = axis.said, mine and axis.said.get("visible", True)
        sides, here = SIDES[way], said.get("side", SIDES[way][0])
        line = {"color": colour(said.get("linecolor", "#444")), "linewidth": said.get("linewidth", 1) * POINT}
        for side in sides:
            self.ax.spines[side].set_visible(
                bool(mine and said.get("showline") and (side == here or said.get("mirror")))
            )
            self.ax.spines[side].set(**line)
        shown.set_visible(mine)
        if not mine:
            return
        shown.set_ticks_position(here)
        shown.set_label_position(here)
        self._label(way, said.get("title", {}), axis.font)
        self._ticks(way, here)
        grid = said.get("showgrid", True)
        look = {"color": colour(said.get("gridcolor", "#eee")), "linewidth": said.get("gridwidth", 1) * POINT}
        style = dashes({"dash": said.get("griddash", "solid")}, said.get("gridwidth", 1))
        self.ax.grid(bool(grid), axis=way, **(look | {"linestyle": style} if grid else {}))
        self._zero(way)

    def _label(self, way: Way, title: Part, font: Part) -> None:
        if title.get("text"):
            look = lettering({**font, "size": 1.2 * font.get("size", 12)} | title.get("font", {}), title["text"])
            pad = POINT * title.get("standoff", 8)
            (self.ax.set_xlabel if way == "x" else self.ax.set_ylabel)(plain(title["text"]), labelpad=pad, **look)

    def _zero(self, way: Way) -> None:
        """The line at zero, which plotly draws if it is within the axis."""
        axis = self.axis(way)
        low, high = sorted(self.ax.get_xlim() if way == "x" else self.ax.get_ylim())
        if axis.said.get("zeroline", not axis.names) and low < 0 < high and not axis.log:
            look: Part = {"color": colour(axis.said.get("zerolinecolor", "#444")), "zorder": 0.6}
            look["linewidth"] = axis.said.get("zerolinewidth", 1) * POINT
            (self.ax.axvline if way == "x" else self.ax.axhline)(0, **look)

    def _ticks(self, way: Way, side: str) -> None:
        axis, shown = self.axis(way), self.ax.xaxis if way == "x" else self.ax.yaxis
        long = self.pixels()[0 if way == "x" else 1]
        locator, formatter = ticks(axis, long, self.ax.get_xlim() if way == "x" else self.ax.get_ylim())
        shown.set_major_locator(locator)
        shown.set_major_formatter(formatter)
        shown.set_minor_locator(NullLocator())
        look = lettering({**axis.font, **axis.said.get("tickfont", {})})
        out = {"outside": "out", "inside": "in"}.get(axis.said.get("ticks", ""))
        self.ax.tick_params(
            axis=way,
            direction=out or "out",
            length=POINT * axis.said.get("ticklen", 5) if out else 0,
            width=POINT * axis.said.get("tickwidth", 1),
            color=colour(axis.said.get("tickcolor", "#444")),
            labelsize=look["fontsize"],
            labelcolor=look["color"],
            pad=3 * POINT,
        )
        for each in SIDES[way]:
            there = each == side and axis.said.get("showticklabels", True)
            self.ax.tick_params(axis=way, **{f"label{each}": there})
        turn = axis.said.get("tickangle", self._turn(way, long))
        if turn and turn != "auto":
            aside = {"rotation": -turn, "rotation_mode": "anchor"}
            if way == "x":
                aside["ha"] = "center" if abs(turn) == 90 else "right" if (turn < 0) == (side == "bottom") else "left"
            shown.set_tick_params(labelrotation=-turn)
            for label in shown.get_ticklabels():
                label.set(**aside)

    def _turn(self, way: Way, long: float) -> float:
        """How far names under an axis are turned so that they do not run into one another."""
        axis = self.axis(way)
        words = [plain(word) for word in axis.said.get("ticktext", axis.names)]
        widest = max((len(line) for word in words for line in word.split("\n")), default=0)
        size = axis.said.get("tickfont", {}).get("size", axis.font.get("size", 12))
        crowded = way == "x" and widest * 0.56 * size * max(1, len(words)) > long
        return -35.0 if crowded else 0.0


def ticks(axis: Axis, long: float, ends: tuple[float, float]) -> tuple[Locator, Formatter]:
    """Where the ticks of an axis of so many pixels between two ends are, and what they say."""
    said = axis.said
    if said.get("tickvals") is not None:
        places = [float(place) for place in axis.numbers(said["tickvals"])]
        words = said.get("ticktext")
        if words is None:
            return FixedLocator(places), Numbers(said)
        return FixedLocator(places), FixedFormatter([plain(word) for word in words])
    if axis.names:
        every = math.ceil(len(axis.names) * 12 / long)  # at least 12 pixels for each name
        return FixedLocator(range(0, len(axis.names), every)), FuncFormatter(
            lambda place, _: plain(axis.names[round(place)]) if 0 <= round(place) < len(axis.names) else ""
        )
    count = said.get("nticks") or min(max(long / SPARSE[axis.way], 4), 9) + 1
    if axis.log:
        decades = abs(math.log10(ends[1] / ends[0])) / count
        if decades < 0.7:
            return LogLocator(subs=(1.0, 2.0, 5.0)), Numbers(said)
        low, high = sorted(math.log10(end) for end in ends)
        every = math.ceil(decades)
        first = math.ceil(low / every - 1e-9) * every
        return FixedLocator([10.0**power for power in range(first, math.floor(high + 1e-9) + 1, every)]), Numbers(said)
    step = said["dtick"] if isinstance(said.get("dtick"), (int, float)) else stride(abs(ends[1] - ends[0]) / count)
    return MultipleLocator(step, said.get("tick0", 0)), Numbers(said)


def stride(least: float) -> float:
    """The round number, 2, 5 or 10 times a power of ten, that is the next above this."""
    base = 10.0 ** math.floor(math.log10(least) + 1e-9)
    return next(factor for factor in (2, 5, 10, 20) if factor * base > least * (1 + 1e-9)) * base


class Numbers(Formatter):
    """Numbers at the ticks: as the axis says ("tickformat", "exponentformat"), or else short: 0.25, 1500, 20k."""

    def __init__(self, said: Part) -> None:
        self.said = said
        self.places: list[float] = []

    def set_locs(self, locs: Any) -> None:
        """Take note of all ticks, so that they are said alike."""
        self.places = [abs(float(place)) for place in locs]

    def __call__(self, value: float, position: int | None = None) -> str:
        words = spoken(value, self.said["tickformat"]) if self.said.get("tickformat") else self._short(value)
        return f"{self.said.get('tickprefix', '')}{words}{self.said.get('ticksuffix', '')}"

    def _short(self, value: float) -> str:
        largest = max(self.places, default=abs(value))
        if value == 0 or largest == 0:
            return "0"
        form = self.said.get("exponentformat", "B")
        logarithmic = self.said.get("type") == "log"
        size = abs(value) if logarithmic else largest
        if logarithmic and form == "power":
            return f"10{str(round(math.log10(value))).translate(RAISED)}" if size not in (1, 10) else f"{value:g}"
        power = 0 if form == "none" or 1e-3 <= size < 1e4 else 3 * math.floor(math.log10(size) / 3 + 1e-9)
        if power and form in ("power", "e", "E"):
            power = math.floor(math.log10(abs(value)) + 1e-9)
        if power not in PREFIXES and form not in ("power", "e", "E"):
            form = "power"
        scaled = f"{round(value / 10.0**power, 9):.6g}".replace("-", "\u2212")
        if not power:
            return scaled
        if form == "power":
            raised = str(power).translate(RAISED)
            return f"10{raised}" if scaled == "1" else f"{scaled}×10{raised}"
        return f"{scaled}{form}{power:+d}" if form in ("e", "E") else f"{scaled}{PREFIXES[power]}"


def said_of(name: str, layout: Part) -> Part:
    """What a layout says of an axis by its short name: "x2" is "xaxis2"; one over another shares its place."""
    if not re.fullmatch(r"[xy]\d*", name):
        raise DeimkitError(f"An axis has a name such as x, y2 or 'x domain'; got {name!r}.")
    said: Part = layout.get(f"{name[0]}axis{name[1:]}", {})
    under = said.get("overlaying", "free")
    return said if under == "free" else {"domain": said_of(under, layout).get("domain", (0, 1))} | said
