"""What every lab can do: controls that check their values, numbers apart from pictures, a widget and its picture."""

from __future__ import annotations

import base64
import gc
import json
import re
import sys
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deimkit.errors import DeimkitError
from deimkit.explore import labs
from deimkit.explore.frame import VIEW
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing


class Wave(Lab):
    """A wave of so many hills, with a window that can be dragged."""

    title = "Wave <1>"

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def controls(self) -> tuple[Control, ...]:
        return (
            Slider("height", 0.0, 2.0, 0.1, 1.0, "height"),
            Slider("hills", 1, 9, 1, 3, "hills"),
            Choice("kind", ("sin", "cos"), "sin", "function"),
        )

    def compute(self, height: float, hills: int, kind: str) -> dict[str, Any]:
        self.computed += 1
        x = np.linspace(0, 2 * np.pi, 41)
        return {"x": x, "y": height * getattr(np, kind)(hills * x), "height": height, "kind": kind}

    def draw(self, found: Any) -> Drawing:
        top = found["height"]
        layout = {"shapes": [{"type": "rect", "x0": 0, "x1": 1, "y0": -top, "y1": top, "editable": True}]}
        if found["kind"] == "cos":
            layout["annotations"] = [{"x": 0, "y": top, "text": "top"}]
        return {"data": [{"type": "scatter", "x": found["x"], "y": found["y"], "name": "wave"}], "layout": layout}

    def words(self, found: Any) -> str:
        return f"The wave is {found['height']:g} high & {found['kind']}."

    def dragged(self, shapes: Sequence[Any]) -> dict[str, Any]:
        return {"height": float(shapes[0].y1)}

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        return {"kind": "cos"} if trace == "wave" and x > 1 else {}


def test_set_moves_controls_and_found_follows() -> None:
    lab = Wave()
    assert lab.values == {"height": 1.0, "hills": 3, "kind": "sin"} and lab.computed == 0, "not before it is asked"
    assert lab.set(height=0.5, kind="cos") is lab
    np.testing.assert_allclose(lab.found["y"], 0.5 * np.cos(3 * np.linspace(0, 2 * np.pi, 41)))
    assert lab.found is lab.found and lab.computed == 1
    assert repr(lab) == "Wave(height=0.5, hills=3, kind='cos')"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"height": 3.0}, "height is a number from 0.0 to 2.0; got 3.0."),
        ({"height": float("nan")}, "height is a number from 0.0 to 2.0; got nan."),
        ({"height": "tall"}, "height is a number from 0.0 to 2.0; got 'tall'."),
        ({"hills": 2.5}, "hills is a whole number from 1 to 9; got 2.5."),
        ({"hills": True}, "hills is a whole number from 1 to 9; got True."),
        ({"kind": "tan"}, "kind is one of sin, cos; got 'tan'."),
        ({"depth": 1}, "Wave has the controls height, hills, kind; got 'depth'."),
        ({"height": 0.1, "kind": "tan"}, "kind is one of sin, cos; got 'tan'."),
    ],
)
def test_values_that_a_control_cannot_have_change_nothing(values: dict[str, Any], said: str) -> None:
    lab = Wave()
    with pytest.raises(DeimkitError, match=re.escape(said)):
        lab.set(**values)
    assert lab.values == {"height": 1.0, "hills": 3, "kind": "sin"}


def test_numbers_of_numpy_are_taken_as_pythons() -> None:
    lab = Wave().set(hills=np.int64(4), height=np.float32(0.5))
    assert lab.values["hills"] == 4 and type(lab.values["hills"]) is int and type(lab.values["height"]) is float


def test_what_cannot_be_computed_leaves_all_as_it_was() -> None:
    class Shy(Wave):
        def compute(self, *args: Any, **values: Any) -> Any:
            if values["hills"] == 7:
                raise DeimkitError("7 is too many.")
            return super().compute(**values)

    lab = Shy()
    live, before = lab.live, lab.found
    assert live is not None
    with pytest.raises(DeimkitError, match="7 is too many"):
        lab.set(hills=7)
    live.controls["hills"].value = 7
    assert "7 is too many" in live.said.value
    assert lab.values["hills"] == 3 and lab.found is before


def test_a_closed_lab_is_let_go() -> None:
    lab = Wave()
    assert lab.live is not None
    gone = weakref.ref(lab)
    lab.close()
    del lab
    gc.collect()
    assert gone() is None


def test_the_picture_says_in_words_what_it_shows() -> None:
    lab = Wave().set(height=0.25)
    html = lab._repr_html_()
    assert html == lab.still()["text/html"] and "<script" not in html and "http" not in html
    assert 'alt="The wave is 0.25 high &amp; sin."' in html and "Wave &lt;1&gt;" in html
    assert "height: 0.25; hills: 3; function: sin" in html and lab.mark in html
    assert "data:image/png;base64," in html


def shown(lab: Lab) -> dict[str, Any]:
    """What the page is told to show: data, layout and config."""
    assert lab.live is not None
    told: dict[str, Any] = json.loads(lab.live.chart.figure)
    return told


def line(lab: Lab) -> NDArray[np.float64]:
    """The wave that the page shows."""
    packed = shown(lab)["data"][0]["y"]  # as plotly packs arrays
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


def test_the_widget_follows_set_and_set_follows_the_widget() -> None:
    lab = Wave()
    live = lab.live
    assert live is not None and lab.live is live
    lab.set(hills=2)
    assert live.controls["hills"].value == 2
    np.testing.assert_array_equal(line(lab), lab.found["y"])
    live.controls["height"].value = 0.3
    assert lab.values["height"] == 0.3 and line(lab).max() == pytest.approx(0.3, rel=0.01)
    assert "The wave is 0.3 high &amp; sin." in live.said.value and 'aria-live="polite"' in live.said.value
    assert live.chart.words == "The wave is 0.3 high & sin."
    before = lab.computed
    live.controls["kind"].value = "cos"
    assert lab.computed == before + 1, "computed once for each move"
    assert len(shown(lab)["layout"]["annotations"]) == 1
    assert "annotations" not in shown(lab.set(kind="sin"))["layout"]


def test_a_dragged_shape_and_a_clicked_point_move_controls() -> None:
    lab = Wave()
    live = lab.live
    assert live is not None and shown(lab)["config"]["edits"] == {"shapePosition": True}
    live._heard(live.chart, {"dragged": [{"x0": 0, "y1": 1.5}]}, [])
    assert lab.values["height"] == 1.5 and live.controls["height"].value == 1.5
    live._heard(
        live.chart, {"clicked": [{"trace": "other", "x": 3.1, "y": 0}, {"trace": "wave", "x": 0.5, "y": 0}]}, []
    )
    assert lab.values["kind"] == "sin"
    live._heard(live.chart, {"clicked": [{"trace": "wave", "x": 3.1, "y": 0}]}, [])
    assert lab.values["kind"] == "cos"


def test_a_shape_that_was_dragged_to_no_effect_goes_back() -> None:
    lab = Wave()
    assert lab.live is not None
    chart = lab.live.chart
    before = chart.figure, chart.shown
    lab.live._heard(chart, {"dragged": [{"y1": 1.0}]}, [])
    assert (chart.figure, chart.shown) == (before[0], before[1] + 1), "a page hears only of what is another value"


def test_a_drag_too_far_is_explained_and_the_last_good_figure_stays() -> None:
    lab = Wave()
    live = lab.live
    assert live is not None
    live._heard(live.chart, {"dragged": [{"y1": 7}]}, [])
    assert lab.values["height"] == 1.0 and "height is a number from 0.0 to 2.0; got 7." in live.said.value
    live.controls["kind"].options = ("sin", "tan")  # one that the lab refuses
    live.controls["kind"].value = "tan"
    assert "got &#x27;tan&#x27;" in live.said.value and live.controls["kind"].value == "sin" and live.chart.shown == 3


def test_a_lab_that_is_shown_again_moves_there_and_stays_as_it_was_here(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    lab = Wave()
    lab._ipython_display_()
    first = lab.live
    assert first is not None
    lab.set(height=2.0)._ipython_display_()
    again = lab.live
    assert again is not None and again is not first and first.chart.comm is None
    assert first.chart.covers != again.chart.covers == lab.mark, "the picture of before is no longer covered"
    assert first.chart.covers in shown[1]["text/html"] and "height: 1;" in shown[1]["text/html"]
    assert lab.mark in shown[3]["text/html"] and "height: 2;" in shown[3]["text/html"]


def test_the_widget_hides_the_picture_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    lab = Wave()
    lab._ipython_display_()
    assert [list(data) for data in shown] == [[VIEW, "text/plain"], ["text/html", "text/plain"]]
    assert lab.live is not None
    assert lab.live.chart.covers == lab.mark and lab.mark in shown[1]["text/html"]
    lab.close()
    assert lab._live is None


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library of a new kernel, and in `told` what it told the page."""
    from deimkit.explore.labs.lab_live import Library

    monkeypatch.setattr(Library, "_of_kernel", None)
    library, told = Library.of_kernel(), []

    def send(content: str, buffers: list[bytes]) -> None:
        told.append((content, b"plotly.js v" in buffers[0][:200]))

    monkeypatch.setattr(library, "send", send)
    return SimpleNamespace(widget=library, told=told)


def test_the_first_lab_of_a_kernel_brings_the_library_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    told: list[bool] = []
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: told.append(library.widget.coming))
    for _ in range(2):
        lab = Wave()
        lab._ipython_display_()
        assert lab.live is not None and lab.live.chart.library is library.widget
    assert told == [True, True, False, False], "a page learns with the widget whether it is to ask"
    assert library.told == [("plotly", True)]


def test_a_page_that_asks_is_sent_the_library(library: Any) -> None:
    library.widget._handle_custom_msg("plotly", [])
    library.widget._handle_custom_msg("plotly", [])
    assert library.told == [("plotly", True)] * 2, "as often as it asks, for it may have been loaded again"
    library.widget.bring()
    assert len(library.told) == 2


def test_the_library_comes_even_if_the_picture_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr("IPython.display.display", lambda data, raw: None)
    lab = Wave()
    monkeypatch.setattr(lab, "still", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab._ipython_display_()
    assert library.told and not library.widget.coming


def test_a_page_can_be_prepared_before_its_first_lab(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    assert labs.prepare() == "they move" and not library.widget.coming and not library.told, "the page asks"
    library.widget.close()
    assert labs.prepare() == "they move" and library.widget.of_kernel() is not library.widget
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "deimkit.explore.labs.lab_live")
    assert labs.prepare() == "pictures only; `pip install anywidget` lets them move"


def test_without_widgets_the_picture_is_shown_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "deimkit.explore.labs.lab_live", raising=False)
    lab = Wave()
    lab._ipython_display_()
    assert [list(data) for data in shown] == [["text/html", "text/plain"]] and lab.live is None


def test_colab_is_asked_to_show_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    output = type("output", (), {"enable_custom_widget_manager": staticmethod(lambda: asked.append(True))})
    monkeypatch.setitem(sys.modules, "google.colab", type("colab", (), {"output": output}))  # type: ignore[arg-type]
    monkeypatch.setattr("IPython.display.display", lambda data, raw: None)
    Wave()._ipython_display_()
    assert asked == [True]


def test_what_is_not_a_number_is_null_in_the_page() -> None:
    pytest.importorskip("ipywidgets")
    from deimkit.explore.labs.lab_live import Chart, Library

    chart = Chart(library=Library.of_kernel())
    trace = {"type": "scatter", "x": [0.0, float("nan"), np.float64("nan")], "y": np.array([[1.0, np.nan]])}
    chart.show({"data": [trace], "layout": {"annotations": [{"text": "NaN"}], "width": 1100}}, "a gap")
    told = json.loads(chart.figure, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "width" not in told["layout"], "a page is as wide as it is"
    assert told["data"][0]["x"] == [0.0, None, None] and told["layout"]["annotations"][0]["text"] == "NaN"
    held = np.frombuffer(base64.b64decode(told["data"][0]["y"]["bdata"]), "<f8")
    assert told["data"][0]["y"]["shape"] == "1, 2" and held[0] == 1 and np.isnan(held[1])
