"""The live part of a lab: its controls, its figure, and the sentence that says what is seen."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import numpy as np
import traitlets
from anywidget import AnyWidget
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from deimkit.errors import DeimkitError
from deimkit.explore.frame import STYLE
from deimkit.explore.labs.lab import Choice, Control, Lab
from deimkit.explore.labs.sheet import Drawing

if TYPE_CHECKING:
    pass


HERE = Path(__file__).parent


class Library(AnyWidget):
    """What draws charts: large, so it is brought to a page once for a kernel, and as a message, which no file keeps.

    coming: whether `bring` is about to send it; the page asks for it otherwise. Its question is heard when a cell, or
    all that are to run, are over.
    """

    _esm = HERE / "library.js"
    coming = traitlets.Bool().tag(sync=True)
    _of_kernel: Library | None = None

    def __init__(self) -> None:
        super().__init__()
        self.sent = False
        self.on_msg(self._answer)

    @classmethod
    def of_kernel(cls) -> Library:
        """The only one of this kernel."""
        if cls._of_kernel is None or cls._of_kernel.comm is None:
            cls._of_kernel = cls()
        return cls._of_kernel

    def bring(self) -> None:
        """Send it, unless it was sent."""
        if not self.sent:
            self._answer()
        self.coming = False  # a page that was not ready to hear it asks

    def _answer(self, *_: Any) -> None:
        self.send("plotly", [get_plotlyjs().encode()])
        self.sent = True


class Chart(AnyWidget):
    """A plotly figure in a page: plotly's own widget sends the whole library for every figure.

    figure: data, layout and config as JSON. shown: how often one was, for a page hears of what changes alone. words:
    what it shows. covers: the class of what to hide once it is drawn. library: what draws it. What a hand does to the
    figure comes back as messages: "clicked" with trace, x and y of the points, and "dragged" with all shapes.
    """

    _esm = HERE / "chart.js"
    figure = traitlets.Unicode().tag(sync=True)
    shown = traitlets.Int().tag(sync=True)
    words = traitlets.Unicode().tag(sync=True)
    covers = traitlets.Unicode().tag(sync=True)
    library = traitlets.Instance(Library).tag(sync=True, **w.widget_serialization)

    def show(self, drawing: Drawing, words: str) -> None:
        """Let the page show a figure; again, even if it is the same, for a hand may have moved its shapes."""
        movable = any(shape.get("editable") for shape in drawing["layout"].get("shapes", ()))
        layout = {name: value for name, value in drawing["layout"].items() if name != "width"}  # a page has its own
        config = {"displaylogo": False, "responsive": True, "edits": {"shapePosition": movable}}
        figure = {"data": drawing["data"], "layout": layout, "config": config}
        with self.hold_sync():
            self.words, self.figure = words, json.dumps(figure, cls=_Told)
            self.shown += 1


class Live:
    """The widget of a lab; what a reader moves goes to `Lab.set`, which brings it up to date by `update`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._quiet = False  # while it moves controls itself
        self.controls = {control.name: _widget(control, lab.values[control.name]) for control in lab.controls()}
        self.said, self.chart = w.HTML(), Chart(covers=lab.mark, library=Library.of_kernel())
        for name, widget in self.controls.items():
            widget.observe(lambda change, name=name: self._set(lambda: {name: change["new"]}), "value")
        self.chart.on_msg(self._heard)
        self.root = w.VBox(
            [
                w.HTML(f"{STYLE}<strong>{escape(lab.title)}</strong>"),
                w.HBox(list(self.controls.values()), layout=w.Layout(flex_flow="row wrap")),
                self.said,
                self.chart,
            ]
        )
        self._show()

    def update(self) -> None:
        """Show the lab as it is now."""
        self._quiet = True
        try:
            for name, widget in self.controls.items():
                widget.value = self.lab.values[name]
        finally:
            self._quiet = False
        self._show()

    def close(self) -> None:
        """Take all of it out of the notebook, and let go of the lab."""
        for widget in (*self.controls.values(), self.said, self.chart, *self.root.children, self.root):
            for part in (getattr(widget, "style", None), widget.layout, widget):
                if isinstance(part, w.Widget):
                    part.close()
        self._quiet = True
        del self.lab

    def _show(self) -> None:
        words = self.lab.words(self.lab.found)
        self.chart.show(self.lab.draw(self.lab.found), words)
        self._say(words)

    def _say(self, words: str) -> None:
        self.said.value = f'<p role="status" aria-live="polite">{escape(words)}</p>'

    def _heard(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Follow the hand of a reader."""
        for point in message.get("clicked", ()):
            self._set(partial(self.lab.clicked, point["trace"], point["x"], point["y"]))
        if "dragged" in message:
            self._set(lambda: self.lab.dragged([SimpleNamespace(**shape) for shape in message["dragged"]]))

    def _set(self, moved: Callable[[], dict[str, Any]]) -> None:
        """Move the controls that a reader's hand has moved."""
        if self._quiet:
            return
        try:
            values = moved()
            if values:
                self.lab.set(**values)
        except DeimkitError as error:  # all goes back to a reader's last good figure
            self.update()
            self._say(str(error))


class _Told(PlotlyJSONEncoder):
    """Drawings as plotly.js reads them, with null for what is not a number."""

    def default(self, values: Any) -> Any:
        """Numpy's numbers: fractions as their bytes, which is quicker than to spell them out."""
        if values.dtype.kind != "f" or values.ndim == 0:
            return values.tolist()
        told = {"dtype": "f8", "bdata": b64encode(np.ascontiguousarray(values, "<f8").tobytes()).decode()}
        return told | ({"shape": ", ".join(map(str, values.shape))} if values.ndim > 1 else {})


def _widget(control: Control, value: Any) -> Any:
    style = {"style": {"description_width": "initial"}, "layout": w.Layout(width="320px")}
    if isinstance(control, Choice):
        return w.Dropdown(options=control.options, value=value, description=control.words, **style)
    kind = w.IntSlider if control.whole else w.FloatSlider
    digits = {} if control.whole else {"readout_format": ".3g"}
    ends = {"min": control.low, "max": control.high, "step": control.step}
    return kind(value, **ends, description=control.words, **digits, **style)
