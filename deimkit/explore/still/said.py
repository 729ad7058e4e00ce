"""What a plotly figure says, as plain values with its template filled in, and all of it that a still picture draws."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deimkit.errors import DeimkitError
from deimkit.explore.curves import LINES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Part = dict[str, Any]  # one of plotly's objects by its attributes: a trace, an axis, a shape

# On and off in widths of the line, as plotly's browser side has them.
DASHES = {"dot": (1, 1), "dash": (3, 3), "longdash": (5, 5), "dashdot": (3, 1, 1, 1), "longdashdot": (5, 2, 1, 2)}
MARKS = {
    **{"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "star": "*"},
    **{"triangle-up": "^", "triangle-down": "v", "line-ns": "|", "line-ew": "_"},
}


# ------------------------------------------------------------------------------------------------ what is drawn
# By attribute: `...` for any value, the values that are drawn, or what is drawn of such a part. Plotly checks the rest.
def _any(names: str) -> Part:
    return dict.fromkeys(names.split(), ...)


FONT = _any("color size family")
TITLE = _any("text standoff x xanchor") | {"font": FONT}
LINE = _any("color width") | {"dash": ("solid", *DASHES), "shape": ("linear", "hv")}
SYMBOLS = (*MARKS, *(f"{name}-open" for name in MARKS))
MARKER = _any("color size opacity") | {"symbol": SYMBOLS, "line": _any("color width")}
SCALE = _any("colorscale reversescale showscale")
SCALE |= {"colorbar": _any("x xanchor y len thickness") | {"title": {"text": ..., "font": FONT}}}
WORDS = _any("text textposition") | {"textfont": FONT}
TRACE = _any("type name visible showlegend opacity cliponaxis")
FIELD = TRACE | SCALE | _any("x y z xaxis yaxis zmin zmax")
TRACES: Part = {
    "scatter": TRACE | WORDS | _any("x y xaxis yaxis mode fillcolor"),
    "bar": TRACE | WORDS | _any("x y xaxis yaxis width") | {"orientation": ("v", "h")},
    "heatmap": FIELD | {"text": ..., "texttemplate": ("%{text}",), "textfont": FONT},
    "contour": FIELD | {"contours": _any("start end size"), "line": LINE},
    "surface": TRACE | SCALE | _any("x y z scene cmin cmax"),
    "scatter3d": TRACE | _any("x y z scene") | {"mode": ("markers",), "marker": MARKER | {"symbol": tuple(MARKS)}},
}
TRACES["scatter"] |= {"line": LINE, "marker": MARKER, "fill": ("none", "toself")}
TRACES["bar"] |= {"marker": {"color": ..., "line": _any("color width"), "pattern": {"shape": ("", "/", "x", ".")}}}
TRACES["bar"] |= {"textposition": ("outside", "none")}

AXIS = _any("anchor domain range dtick tickvals ticktext tickangle tickcolor ticklen showticklabels visible automargin")
AXIS |= _any("showgrid gridcolor showline linecolor zeroline zerolinecolor zerolinewidth constraintoward scaleanchor")
AXIS |= {"title": TITLE, "tickfont": FONT, "type": ("-", "linear", "log", "category"), "ticks": ("", "outside")}
AXIS |= {"rangemode": ("normal", "tozero"), "autorange": (True, False, "reversed"), "constrain": ("domain",)}
AXIS |= {"exponentformat": ("B", "e", "power"), "scaleratio": (1,)}
SIDE = _any("showbackground backgroundcolor gridcolor linecolor zeroline") | {"title": TITLE, "tickfont": FONT}
SCENE: Part = {f"{way}axis": SIDE for way in "xyz"} | {"domain": ..., "camera": {"eye": ...}}
PLACE = _any("x y xref yref visible name")
SHAPE = _any("x0 x1 y0 y1 xref yref visible name opacity fillcolor editable")
ANNOTATION = PLACE | _any("text showarrow arrowcolor arrowwidth arrowhead ax ay xanchor yanchor xshift yshift")
LEGEND = _any("x y xanchor yanchor bgcolor borderwidth itemsizing") | {"font": FONT, "traceorder": ("normal",)}
IMAGE = PLACE | _any("source sizex sizey") | {"sizing": ("stretch",), "layer": ("below",)}
LAYOUT = _any("template width height autosize margin showlegend bargap colorway paper_bgcolor plot_bgcolor dragmode")
LAYOUT |= {"title": TITLE, "font": FONT, "barmode": ("group", "overlay"), "newshape": ..., "autotypenumbers": ...}
LAYOUT |= {"xaxis": AXIS, "yaxis": AXIS, "scene": SCENE, "legend": LEGEND | {"orientation": ("v", "h")}}
LAYOUT |= {
    "shapes": [SHAPE | {"type": ("line", "rect"), "line": LINE, "layer": ("above", "below")}],
    "images": [IMAGE | {"xanchor": ("left",), "yanchor": ("top",)}],
    "annotations": [ANNOTATION | _any("textangle align bgcolor opacity") | {"font": FONT}],
}
UNSEEN = re.compile("hover.*|customdata|ids|uid|uirevision|meta")  # what shows only under a mouse, or not at all


# ------------------------------------------------------------------------------------------------ what is said
def read(figure: Figure) -> tuple[Part, list[Part]]:
    """The layout and the traces of a figure, filled in from its template.

    A trace has its number ("index") and its colour ("tint") besides. Raises `DeimkitError` for what is not drawn.
    """
    said = _unpacked(figure.to_plotly_json())
    _check("a layout", said["layout"], LAYOUT)
    template = said["layout"].get("template", {})
    layout = _layout(said["layout"], template.get("layout", {}))
    return layout, [_trace(i, trace, template, layout) for i, trace in enumerate(said["data"])]


def must(drawn: bool, what: str) -> None:
    """Raise `DeimkitError` for what is not drawn."""
    if not drawn:
        raise DeimkitError(f"A still picture cannot draw {what}; leave it out, or add it to explore/still.")


def _unpacked(said: Any) -> Any:
    """The attributes with arrays instead of the bytes in which plotly sends them to the browser."""
    if isinstance(said, dict):
        if "bdata" in said:
            found = np.frombuffer(base64.b64decode(said["bdata"]), said["dtype"])
            return found.reshape([int(n) for n in said["shape"].split(",")]) if "shape" in said else found
        return {name: _unpacked(value) for name, value in said.items()}
    if isinstance(said, (list, tuple)) and said and isinstance(said[0], dict):
        return [_unpacked(part) for part in said]
    return said


def _check(what: str, said: Part, drawn: Part) -> None:
    """Raise `DeimkitError` unless all that is said, part by part, is drawn."""
    for name, value in said.items():
        if value is None or UNSEEN.fullmatch(name):
            continue
        known: Any = drawn.get(name) or drawn.get(name.rstrip("0123456789"))  # "xaxis2" is one of "xaxis"
        must(known is not None, f"{name} of {what}")
        if isinstance(known, list):
            for part in value:
                _check(f"the {name} of {what}", part, known[0])
        elif isinstance(known, Mapping):
            _check(f"the {name} of {what}", value, dict(known))
        elif known is not ...:
            must(isinstance(value, (str, int, float)) and value in known, f"{value!r} as {name} of {what}")


def _merged(under: Part, over: Part) -> Part:
    """Two sets of attributes as one; where both say something, `over` holds."""
    both = {name: value for name, value in over.items() if value is not None}
    for name, value in under.items():
        if isinstance(value, dict) and isinstance(both.get(name), dict):
            both[name] = _merged(value, both[name])
        else:
            both.setdefault(name, value)
    return both


def _layout(said: Part, template: Part) -> Part:
    layout = _merged(template, said)
    for name in said:
        if name[-1].isdigit():
            layout[name] = _merged(template.get(name.rstrip("0123456789"), {}), said[name])
    for name in ("shape", "annotation", "image"):
        parts = [_merged(template.get(f"{name}defaults", {}), part) for part in said.get(f"{name}s") or ()]
        layout[f"{name}s"] = [part for part in parts if part.get("visible", True)]
    return layout


def _trace(index: int, said: Part, template: Part, layout: Part) -> Part:
    kind, colours = said["type"], layout.get("colorway") or LINES
    must(kind in TRACES, f"a {kind} trace")
    _check(f"a {kind} trace", said, TRACES[kind])
    looks = template.get("data", {}).get(kind) or [{}]
    return _merged(looks[0], said) | {"index": index, "tint": colours[index % len(colours)]}
