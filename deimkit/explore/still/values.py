"""How plotly writes numbers, colours and words, read for matplotlib."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from html import unescape
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgba
from numpy.typing import NDArray
from PIL import ImageColor

from deimkit.errors import DeimkitError
from deimkit.explore.plots import INK, PAPER

Part = dict[str, Any]  # one of plotly's objects by its attributes: a trace, an axis, a shape
RGBA = tuple[float, float, float, float]

DPI = 100  # pixels of a plotly layout per inch
POINT = 72 / DPI  # points in a pixel
ASIDE, ABOVE = ("left", "center", "right"), ("bottom", "middle", "top")
# On and off in widths of the line, as plotly's browser side has them.
DASHES = {
    **{"dot": (1, 1), "dash": (3, 3), "longdash": (5, 5), "dashdot": (3, 1, 1, 1), "longdashdot": (5, 2, 1, 2)},
}
_RGB = re.compile(r"rgba?\(([^)]*)\)")
_FIELD = re.compile(r"%\{(\w+)(?::([^}]*))?\}")
RAISED = str.maketrans("0123456789+-n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ")
_LOWERED = str.maketrans("0123456789+-", "₀₁₂₃₄₅₆₇₈₉₊₋")


def unpacked(said: Any) -> Any:
    """The attributes with arrays instead of the bytes in which plotly sends them to the browser."""
    if isinstance(said, dict):
        if "bdata" in said:
            found = np.frombuffer(base64.b64decode(said["bdata"]), said["dtype"])
            return found.reshape([int(n) for n in said["shape"].split(",")]) if "shape" in said else found
        return {name: unpacked(value) for name, value in said.items()}
    if isinstance(said, (list, tuple)) and said and isinstance(said[0], dict):
        return [unpacked(part) for part in said]
    return said


def merged(under: Part, over: Part) -> Part:
    """Two sets of attributes as one; where both say something, `over` holds."""
    both = {name: value for name, value in over.items() if value is not None}
    for name, value in under.items():
        if isinstance(value, dict) and isinstance(both.get(name), dict):
            both[name] = merged(value, both[name])
        else:
            both.setdefault(name, value)
    return both


def knows(what: str, said: Iterable[str], known: Iterable[str]) -> None:
    """Raise `DeimkitError` unless all of the attributes that are said can be drawn."""
    unknown = sorted(set(said) - set(known))
    if unknown:
        raise DeimkitError(
            f"A still picture cannot draw {', '.join(unknown)} of {what}; leave it out, or add it to explore/still."
        )


def knows_trace(trace: Part, known: Iterable[str], **parts: Iterable[str]) -> None:
    """Raise `DeimkitError` unless all that a trace says itself can be drawn; parts: what is known of its "line", .."""
    knows(f"a {trace['type']} trace", trace["own"], known)
    for name, inner in parts.items():
        knows(f"the {name} of a {trace['type']} trace", trace["own"].get(name, {}), inner)


def one_of(what: str, known: Iterable[str], got: Any) -> DeimkitError:
    """The error for a value that cannot be drawn."""
    return DeimkitError(f"A still picture draws {what} of {', '.join(known)}; got {got!r}.")


def numbers(given: Any) -> NDArray[Any]:
    """Numbers as an array; None, where a line breaks off, is NaN."""
    return np.asarray(given, float)


def anchored(said: str, place: float, sides: tuple[str, str, str]) -> str:
    """Which side of a thing on paper is at its place; by itself that of the edge which is nearer."""
    if said != "auto":
        return said
    return sides[0] if place <= 1 / 3 else sides[2] if place >= 2 / 3 else sides[1]


def listed(given: Any, count: int) -> list[Any]:
    """One value for each of so many things, from such a list or from one value for all."""
    return [given] * count if given is None or np.ndim(given) == 0 else list(given)


def colour(text: Any, opacity: float = 1.0) -> RGBA:
    """A colour of the web as matplotlib takes it: a name, #rrggbb, rgb(1, 2, 3), rgba(1, 2, 3, 0.5) or hsl(..)."""
    word = str(text).strip().lower()
    try:
        if found := _RGB.fullmatch(word):
            red, green, blue, *alpha = (float(number) for number in found[1].split(","))
            rgba = (red / 255, green / 255, blue / 255, alpha[0] if alpha else 1.0)
        elif word.startswith("hs"):
            rgba = to_rgba("#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(word)))
        else:
            rgba = to_rgba(word)
    except ValueError as error:
        raise DeimkitError(f"A colour is a name, #rrggbb, rgb(..), rgba(..) or hsl(..); got {text!r}.") from error
    return (*rgba[:3], rgba[3] * opacity)


def cmap(said: Part) -> Colormap:
    """The colour scale of a trace or marker, pairs of place and colour, turned round by its "reversescale"."""
    pairs = [(float(place), colour(tint)) for place, tint in said["colorscale"]]
    scale = LinearSegmentedColormap.from_list("scale", pairs)
    return (scale.reversed() if said.get("reversescale") else scale).with_extremes(bad=(0, 0, 0, 0))


def shades(marker: Part, count: int, tint: Any) -> tuple[NDArray[Any], ScalarMappable | None]:
    """The colours (n, 4) of marks or bars, and where they come from numbers what a colour bar needs."""
    given = marker.get("color", tint)
    if isinstance(given, str):
        return np.tile(colour(given), (count, 1)), None
    if any(isinstance(value, str) for value in list(given)[:1]):
        return np.asarray([colour(value) for value in given]).reshape(-1, 4), None
    found = numbers(given)
    if not found.size:
        return np.empty((0, 4)), None
    norm = span(found, marker, "c")
    chart = cmap(marker)
    return np.asarray(chart(norm(found)), float).reshape(-1, 4), ScalarMappable(norm, chart)


def span(found: NDArray[Any], said: Part, letter: str) -> Normalize:
    """From what number to what a colour scale reaches: "zmin" and "zmax", or "zmid" in the middle, or all there are."""
    known = found[np.isfinite(found)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    middle = said.get(f"{letter}mid")
    if middle is not None:
        half = max(high - middle, middle - low)
        low, high = middle - half, middle + half
    low, high = (
        end if said.get(name) is None else said[name] for name, end in ((f"{letter}min", low), (f"{letter}max", high))
    )
    return Normalize(low, high)


def ink_on(ground: RGBA) -> str:
    """Dark or white letters, whichever can be read on this ground."""
    luma = float(np.dot(ground[:3], (0.299, 0.587, 0.114))) * ground[3] + 1 - ground[3]
    return INK if luma > 0.5 else PAPER


def dashes(said: Part, width: float) -> Any:
    """The linestyle for the "dash" of a line of so many pixels; short dashes of thin lines are 3 pixels long."""
    name = said.get("dash", "solid")
    if name == "solid":
        return "-"
    scale = max(1.0, 3 / max(width, 0.1))
    if name in DASHES:
        return 0, tuple(scale * length for length in DASHES[name])
    if re.fullmatch(r"[\d.]+(px)?([ ,]+[\d.]+(px)?)*", name):
        return 0, tuple(float(length) / width for length in re.findall(r"[\d.]+", name))
    raise one_of("lines", ("solid", *DASHES), name)


def plain(text: Any) -> str:
    """Words without plotly's markup; lines break at <br>, <sup> and <sub> raise and lower digits."""
    words = re.sub(r"<br\s*/?>", "\n", str(text))
    words = re.sub(r"<sup>(.*?)</sup>", lambda found: found[1].translate(RAISED), words)
    words = re.sub(r"<sub>(.*?)</sub>", lambda found: found[1].translate(_LOWERED), words)
    return unescape(re.sub(r"</?\w[^>]*>", "", words)).replace("$", r"\$")


def lettering(font: Part, text: Any = "") -> Part:
    """How matplotlib writes in a font of plotly: size, colour and weight; `text` can be bold by its markup."""
    bold = font.get("weight") in ("bold", 700) or re.fullmatch(r"\s*<b>.*</b>\s*", str(text), re.S)
    return {
        "fontsize": 0.93 * POINT * font.get("size", 12),  # DejaVu Sans is wider and taller than plotly's Open Sans
        "color": colour(font.get("color", INK)),
        "fontweight": "bold" if bold else "normal",
        "fontstyle": "italic" if font.get("style") == "italic" else "normal",
    }


def spoken(value: Any, form: str) -> str:
    """A number by a format of d3 such as ".2f", ".0%" or ",d"; those that Python has as well."""
    try:
        words = format(round(value) if form.endswith("d") else value, form)
        return words.replace("-", "\u2212" if re.search("[1-9]", words) else "")
    except (ValueError, TypeError) as error:
        raise DeimkitError(f"A still picture takes formats such as .2f, .1%, ,d and .3g; got {form!r}.") from error


def filled(template: str, fields: Part) -> str:
    """A text template such as "%{y:.1f} AP" with its fields filled in."""

    def field(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise one_of("texts with fields", fields, found[1])
        value = fields[found[1]]
        return spoken(value, found[2]) if found[2] else f"{value:g}" if isinstance(value, float) else str(value)

    return _FIELD.sub(field, template)
