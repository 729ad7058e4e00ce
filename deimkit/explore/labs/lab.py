"""A lab: controls beside a figure that follows them, and a picture of it that stays where nothing is live.

A lab computes and draws apart: `compute` turns the values of the controls into numbers, which can be tested and asked
for (`lab.found`), and `draw` turns those numbers into what plotly draws.
"""

from __future__ import annotations

import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from deimkit.errors import DeimkitError
from deimkit.explore.frame import STYLE, VIEW, framed
from deimkit.explore.labs.sheet import Drawing
from deimkit.explore.still import png

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from deimkit.explore.labs.lab_live import Live


@dataclass(frozen=True)
class Slider:
    """A number from `low` to `high` in steps, moved by mouse or by arrow keys; whole if all of its numbers are.

    words: what it is, for the reader.
    """

    name: str
    low: float
    high: float
    step: float
    value: float
    words: str

    @property
    def whole(self) -> bool:
        """Whether it takes whole numbers alone."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step))

    def checked(self, value: Any) -> float | int:
        """The value as this control can have it; `DeimkitError` says what it takes otherwise."""
        right = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)  # numpy's too
        if not right or not self.low <= value <= self.high:
            kind = "whole number" if self.whole else "number"
            raise DeimkitError(f"{self.name} is a {kind} from {self.low} to {self.high}; got {value!r}.")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choice:
    """One of a few options, by name. words: what is chosen, for the reader."""

    name: str
    options: tuple[str, ...]
    value: str
    words: str

    def checked(self, value: Any) -> str:
        """The value as this control can have it; `DeimkitError` says what it takes otherwise."""
        if value not in self.options:
            raise DeimkitError(f"{self.name} is one of {', '.join(self.options)}; got {value!r}.")
        return str(value)


Control = Slider | Choice


class Lab(ABC):
    """Controls and a figure for what is understood best by moving it; the value of a notebook's cell shows it.

    A kind of lab says in `controls` what can be moved, in `compute` what follows from it, in `draw` how that looks, and
    in `words` what is to be seen. `set` moves a control from code, `values` says where all are, `found` what they lead
    to. In a notebook it is a widget, and beside it the same as a plain picture, hidden once the widget is drawn: it is
    seen at once, and in a saved notebook without a kernel.
    """

    title: str = ""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {control.name: control.value for control in self.controls()}
        self.mark = _mark()
        self._found: Any = None
        self._fresh = self._shown = False
        self._live: Live | None = None

    # ------------------------------------------------------------------ what a kind of lab says
    @abstractmethod
    def controls(self) -> tuple[Control, ...]:
        """What can be moved."""

    @abstractmethod
    def compute(self, *args: Any, **values: Any) -> Any:
        """What follows from the values of the controls: plain numbers, and nothing of how they look."""

    @abstractmethod
    def draw(self, found: Any) -> Drawing:
        """The figure for what `compute` found, in plain values: always the same traces, by type and order."""

    @abstractmethod
    def words(self, found: Any) -> str:
        """What is to be seen in one or two sentences, for those too who do not see it."""

    def dragged(self, shapes: Sequence[Any]) -> dict[str, Any]:
        """New values of controls after one of the figure's editable shapes was dragged; by default none."""
        return {}

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """New values of controls after a point of the trace of that name was clicked; by default none."""
        return {}

    # ------------------------------------------------------------------ from code
    @property
    def found(self) -> Any:
        """What follows from the present values."""
        if not self._fresh:
            self._found, self._fresh = self.compute(**self.values), True
        return self._found

    def set(self, **values: Any) -> Lab:
        """Move controls; raises `DeimkitError` for one that is not there, or a value that it cannot have.

        Where that or anything else goes wrong, all stays as it was.
        """
        known = {control.name: control for control in self.controls()}
        for name, value in values.items():
            if name not in known:
                raise DeimkitError(f"{type(self).__name__} has the controls {', '.join(known)}; got {name!r}.")
            values[name] = known[name].checked(value)
        found = self.compute(**{**self.values, **values})
        self.values, self._found, self._fresh = {**self.values, **values}, found, True
        if self._live is not None:
            self._live.update()
        return self

    def figure(self) -> Figure:
        """The figure as it is now, to be kept or changed freely."""
        from plotly.graph_objects import Figure

        return Figure(self.draw(self.found))

    # ------------------------------------------------------------------ in a notebook
    @property
    def live(self) -> Live | None:
        """The widget; None where ipywidgets or anywidget is not installed."""
        if self._live is None:
            with suppress(ImportError):
                from deimkit.explore.labs.lab_live import Live

                self._live = Live(self)
        return self._live

    def close(self) -> None:
        """Take the widget away; the picture stays."""
        if self._live is not None:
            self._live.close()
            self._live, self.mark = None, _mark()

    def still(self) -> dict[str, Any]:
        """The lab as a notebook keeps it: HTML with its picture inside, and text, by MIME type."""
        words = self.words(self.found)
        said = "; ".join(f"{control.words}: {_number(self.values[control.name])}" for control in self.controls())
        picture = framed(self.title, png(self.figure()), words, "dk-large")
        note = f"<p><small>{escape(said)}. Run this cell to move them.</small></p>"
        html = f'{STYLE}<div class="dk-board {self.mark}">{picture}<p>{escape(words)}</p>{note}</div>'
        return {"text/html": html, "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"

    def _repr_html_(self) -> str:
        return str(self.still()["text/html"])

    def _ipython_display_(self) -> None:
        """Show the widget, and beside it the picture: front ends do not fall back from one to the other.

        A lab moves where it was shown last; where it was shown before, the picture of that moment stays.
        """
        from IPython.display import display

        if self._shown:
            self.close()
        self._shown = True

        if "google.colab" in sys.modules:  # which shows other people's widgets only if it is asked to
            sys.modules["google.colab"].output.enable_custom_widget_manager()
        if (live := self.live) is not None:
            live.chart.library.coming = not live.chart.library.sent
            display({VIEW: live.root.get_view_spec(), "text/plain": repr(self)}, raw=True)
        try:
            display(self.still(), raw=True)
        finally:
            if live is not None:
                live.chart.library.bring()  # after the picture, which would have to wait for it


def _mark() -> str:
    return f"dk-still-{uuid.uuid4().hex[:8]}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
