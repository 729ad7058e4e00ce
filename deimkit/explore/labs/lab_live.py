"""The live part of a lab: its controls, its figure, and the sentence that says what is seen."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w
from plotly.graph_objects import FigureWidget

from deimkit.errors import DeimkitError
from deimkit.explore.frame import STYLE
from deimkit.explore.labs.lab import Choice, Control, Lab

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# What a figure need not have, and so has to be taken away where a new one lacks it.
OPTIONAL: dict[str, Any] = {"shapes": (), "annotations": (), "images": ()}


class Live:
    """The widget of a lab; what a reader moves goes to `Lab.set`, which brings it up to date by `update`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._quiet = False  # while it moves controls itself
        hide = f"<style>.{lab.mark} {{ display: none }}</style>"
        self.controls = {control.name: _widget(control, lab.values[control.name]) for control in lab.controls()}
        self.said = w.HTML()
        self.figure = FigureWidget(lab.figure())
        movable = any(shape.editable for shape in self.figure.layout.shapes)
        self.figure._config = {"displaylogo": False, "edits": {"shapePosition": movable}}
        for name, widget in self.controls.items():
            widget.observe(lambda change, name=name: self._set(lambda: {name: change["new"]}), "value")
        self.figure.layout.on_change(lambda _, shapes: self._set(lambda: self.lab.dragged(shapes)), "shapes")
        for trace in self.figure.data:
            trace.on_click(self._clicked)
        self.root = w.VBox(
            [
                w.HTML(f"{STYLE}{hide}<strong>{escape(lab.title)}</strong>"),
                w.HBox(list(self.controls.values()), layout=w.Layout(flex_flow="row wrap")),
                self.said,
                self.figure,
            ]
        )
        self._say(lab.words(lab.found))

    def update(self) -> None:
        """Show the lab as it is now."""
        self._quiet = True
        try:
            for name, widget in self.controls.items():
                widget.value = self.lab.values[name]
            _bring_up_to_date(self.figure, self.lab.figure())
        finally:
            self._quiet = False
        self._say(self.lab.words(self.lab.found))

    def close(self) -> None:
        """Take all of it out of the notebook, and let go of the lab: plotly never lets go of a figure widget."""
        for widget in (*self.controls.values(), self.said, self.figure, *self.root.children, self.root):
            for part in (getattr(widget, "style", None), widget.layout, widget):
                if isinstance(part, w.Widget):
                    part.close()
        self._quiet = True
        del self.lab

    def _say(self, words: str) -> None:
        self.said.value = f'<p role="status" aria-live="polite">{escape(words)}</p>'

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        if points.point_inds:  # every trace of a panel is told, those too of which no point was clicked
            self._set(lambda: self.lab.clicked(trace.name, points.xs[0], points.ys[0]))

    def _set(self, moved: Callable[[], dict[str, Any]]) -> None:
        """Move the controls that a reader's hand has moved."""
        if self._quiet:
            return
        try:
            values = moved()
            if values:
                self.lab.set(**values)
        except DeimkitError as error:  # a reader's last good figure stays
            self._say(str(error))


def _widget(control: Control, value: Any) -> Any:
    style = {"style": {"description_width": "initial"}, "layout": w.Layout(width="320px")}
    if isinstance(control, Choice):
        return w.Dropdown(options=control.options, value=value, description=control.words, **style)
    kind = w.IntSlider if control.whole else w.FloatSlider
    digits = {} if control.whole else {"readout_format": ".3g"}
    ends = {"min": control.low, "max": control.high, "step": control.step}
    return kind(value, **ends, description=control.words, **digits, **style)


def _bring_up_to_date(shown: Any, drawn: Figure) -> None:
    """Let a figure widget show what another figure does, in one message to the browser."""
    with shown.batch_update():
        for old, new in zip(shown.data, drawn.data, strict=True):
            old.update({key: new[key] for key in new.to_plotly_json()}, overwrite=True)
        layout = drawn.layout.to_plotly_json()
        shown.layout.update(OPTIONAL | {key: drawn.layout[key] for key in layout}, overwrite=True)
