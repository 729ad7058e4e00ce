"""How plotly writes numbers, colours and words, read for matplotlib."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgba
from numpy.typing import NDArray

from deimkit.errors import DeimkitError
from deimkit.explore.plots import INK, PAPER
from deimkit.explore.still.said import DASHES, Part, must

RGBA = tuple[float, float, float, float]
DPI = 100  # pixels of a plotly layout per inch
POINT = 72 / DPI  # points in a pixel
SHARP = 1.5  # pixels of the picture for one of the layout
ASIDE, ABOVE = ("left", "center", "right"), ("bottom", "center", "top")
RAISED = str.maketrans("0123456789+-n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ")
_RGB = re.compile(r"rgba?\(([^)]*)\)")


def numbers(given: Any) -> NDArray[Any]:
    """Numbers as an array; None, where a line breaks off, is NaN."""
    return np.asarray(given, float)


def listed(given: Any, count: int) -> list[Any]:
    """One value for each of so many things, from such a list or from one value for all."""
    return [given] * count if given is None or np.ndim(given) == 0 else list(given)


def anchored(said: str, place: float, sides: tuple[str, str, str]) -> Any:
    """Which side of a thing on paper is at its place; by itself that of the edge which is nearer."""
    if said != "auto":
        return "center" if said == "middle" else said
    return sides[0] if place <= 1 / 3 else sides[2] if place >= 2 / 3 else sides[1]


def colour(text: Any, opacity: float = 1.0) -> RGBA:
    """A colour of the web as matplotlib takes it: a name, #rrggbb, rgb(1, 2, 3) or rgba(1, 2, 3, 0.5)."""
    word = str(text).strip().lower()
    try:
        if found := _RGB.fullmatch(word):
            red, green, blue, *alpha = (float(number) for number in found[1].split(","))
            rgba = (red / 255, green / 255, blue / 255, alpha[0] if alpha else 1.0)
        else:
            rgba = to_rgba(word)
    except ValueError as error:
        raise DeimkitError(f"A colour is a name, #rrggbb, rgb(..) or rgba(..); got {text!r}.") from error
    return (*rgba[:3], rgba[3] * opacity)


def colours(given: Any, count: int, opacity: float = 1.0) -> NDArray[Any]:
    """The colours of so many things, (n, 4), from one for all or one for each."""
    return np.asarray([colour(tint, opacity) for tint in listed(given, count)]).reshape(-1, 4)


def scale(trace: Part, values: NDArray[Any], letter: str = "z") -> tuple[Normalize, Colormap]:
    """The colour scale of a trace, and the numbers at its ends: "zmin" and "zmax", or those of all values."""
    known = values[np.isfinite(values)]
    ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    low, high = (trace.get(f"{letter}{name}", end) for name, end in zip(("min", "max"), ends, strict=True))
    must("colorscale" in trace, "colours without a colorscale")
    pairs = [(float(place), colour(tint)) for place, tint in trace["colorscale"]]
    chart = LinearSegmentedColormap.from_list("scale", pairs)
    chart = chart.reversed() if trace.get("reversescale") else chart
    return Normalize(low, high), chart.with_extremes(bad=(0, 0, 0, 0))


def ink_on(ground: RGBA) -> str:
    """Dark or white letters, whichever can be read on this ground."""
    luma = float(np.dot(ground[:3], (0.299, 0.587, 0.114))) * ground[3] + 1 - ground[3]
    return INK if luma > 0.5 else PAPER


def dashes(said: Part, width: float) -> Any:
    """The linestyle for the "dash" of a line of so many pixels; short dashes of thin lines are 3 pixels long."""
    name = said.get("dash", "solid")
    stretch = max(1.0, 3 / max(width, 0.1))
    return "-" if name == "solid" else (0, tuple(stretch * length for length in DASHES[name]))


def plain(text: Any) -> str:
    """Words without plotly's markup; lines break at <br>, and <sup> raises digits."""
    words = re.sub(r"<br\s*/?>", "\n", str(text))
    words = re.sub(r"<sup>(.*?)</sup>", lambda found: found[1].translate(RAISED), words)
    return unescape(re.sub(r"</?\w[^>]*>", "", words)).replace("$", r"\$")


def lettering(font: Part, text: Any = "") -> Part:
    """How matplotlib writes in a font of plotly: size, colour and weight; `text` can be bold by its markup."""
    return {
        "fontsize": 0.93 * POINT * font.get("size", 12),  # DejaVu Sans is wider and taller than plotly's Open Sans
        "color": colour(font.get("color", INK)),
        "fontweight": "bold" if re.fullmatch(r"\s*<b>.*</b>\s*", str(text), re.S) else "normal",
    }
