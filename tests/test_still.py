"""Still pictures show what their plotly figures do: the same numbers at the same places in the same colours."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from PIL import Image
from plotly.subplots import make_subplots

from deimkit.errors import DeimkitError
from deimkit.explore import still
from deimkit.explore.curves import INK, LINES
from deimkit.explore.plots import Picture
from deimkit.explore.still.axes import Axis, spoken, stride
from deimkit.explore.still.values import colour, ink_on, plain
from deimkit.explore.style import LOOK

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


class Shot:
    """A drawn picture: its matplotlib axes, and the colours at places in their units."""

    def __init__(self, figure: go.Figure) -> None:
        self.picture: Picture = still.picture(figure)
        canvas = FigureCanvasAgg(self.picture)
        canvas.draw()
        self.renderer = canvas.get_renderer()
        self.pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3]
        # the paper comes first, then the subplots in the order in which they are used
        self.paper, *self.axes = self.picture.axes

    def at(self, x: float, y: float, ax: Axes | None = None) -> tuple[int, ...]:
        """The colour at a place in the units of a subplot, by default the first."""
        column, row = (ax or self.axes[0]).transData.transform((x, y))
        return tuple(int(c) for c in self.pixels[self.pixels.shape[0] - 1 - int(row), int(column)])

    def box(self, artist: Any) -> NDArray[Any]:
        """Where an artist is, as the shares (left, bottom, right, top) of the picture."""
        box = artist.get_window_extent(self.renderer)
        height, width = self.pixels.shape[:2]
        return np.asarray([box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height])

    def words(self) -> list[str]:
        """All annotations and titles."""
        return [text.get_text() for text in self.paper.texts]


def bare(**layout: Any) -> go.Figure:
    """A figure of 400 by 300 pixels with axes from 0 to 10 and nothing beside them."""
    figure = go.Figure(layout={"width": 400, "height": 300, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}, **layout})
    figure.update_layout(template="none", xaxis_range=[0, 10], yaxis_range=[0, 10])
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def ours(figure: go.Figure, **layout: Any) -> go.Figure:
    """The figure in the look of this package."""
    return figure.update_layout(template=LOOK, **layout)


def labels(shot: Shot) -> list[str]:
    """What all ticks say, panel by panel, those of x before those of y."""
    return [text.get_text() for text in shot.picture.artists if isinstance(text, Text)]


# ---------------------------------------------------------------------------------------------------- the picture


def test_the_picture_has_the_size_of_the_layout_or_of_a_page() -> None:
    assert Shot(go.Figure()).pixels.shape == (675, 1650, 3)
    assert Shot(go.Figure(layout={"width": 400, "height": 300})).pixels.shape == (450, 600, 3)


def test_empty_figures_and_traces_are_drawn() -> None:
    assert (Shot(go.Figure()).pixels == 255).all()
    shot = Shot(bare(showlegend=False).add_scatter(x=[], y=[]).add_bar(x=[], y=[]))
    assert (shot.pixels == 255).all() and len(shot.axes) == 1
    fields = go.Figure(go.Heatmap(z=[])).add_contour(z=[], contours={"start": 0, "end": 1, "size": 1})
    fields.add_surface(z=[]).add_scatter3d(x=[], y=[], z=[], mode="markers")
    assert len(Shot(fields).axes) == 2


def test_flat_pictures_are_small_and_exact_and_photos_keep_their_colours() -> None:
    figure = bare().add_shape(x0=2, x1=4, y0=2, y1=4, fillcolor="rgb(213,94,1)", line_width=0)
    flat = Image.open(io.BytesIO(still.png(figure.add_scatter(x=[5], y=[5]))))
    assert flat.mode == "P" and flat.size == (600, 450)
    assert {WHITE, (213, 94, 1)} <= {flat.convert("RGB").getpixel((x, 300)) for x in range(600)}
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    figure.add_layout_image(source=Image.fromarray(noise), x=0, y=1, sizex=1, sizey=1)
    assert Image.open(io.BytesIO(still.png(figure))).mode == "RGB"


# ---------------------------------------------------------------------------------------------------- lines, points


def test_a_curve_has_the_given_points_and_breaks_off_at_none() -> None:
    x, y = np.linspace(0, 1, 30), np.linspace(0, 1, 30) ** 2
    figure = ours(go.Figure().add_scatter(x=x, y=y, line={"color": "red", "dash": "dash", "width": 3}))
    figure.add_scatter(x=[0, 1, 2], y=[1, None, 2], mode="lines")
    curve, broken = Shot(figure).axes[0].lines
    np.testing.assert_allclose(curve.get_xydata(), np.stack([x, y], 1))
    assert to_hex(curve.get_color()) == "#ff0000" and curve.get_linewidth() == pytest.approx(3 * 0.72)
    assert curve.get_linestyle() == "--" and broken.get_linestyle() == "-"
    np.testing.assert_array_equal(broken.get_ydata(), [1, np.nan, 2])
    assert to_hex(broken.get_color()) == LINES[1].lower()


def test_lines_go_in_steps_and_areas_are_filled_within() -> None:
    steps = Shot(go.Figure().add_scatter(x=[0, 2, 3], y=[1, 5, 4], line_shape="hv", mode="lines")).axes[0].lines[0]
    np.testing.assert_allclose(steps.get_xydata(), [(0, 1), (2, 1), (2, 5), (3, 5), (3, 4)])
    path = {"x": [7, 9, 9, None, 7, 8, 8], "y": [1, 1, 4, None, 6, 6, 8]}
    shot = Shot(bare().add_scatter(**path, fill="toself", line_color="red"))
    assert shot.at(8.7, 2) == shot.at(7.8, 6.8) == (255, 127, 127)  # half of its line's colour
    assert shot.at(7.5, 3) == WHITE


def test_few_points_have_marks_and_many_have_none() -> None:
    few, many = (Shot(go.Figure().add_scatter(y=np.zeros(count))).axes[0] for count in (19, 20))
    assert len(few.collections) == 1 and not many.collections
    np.testing.assert_array_equal(many.lines[0].get_xdata(), range(20))


def test_marks_have_their_sizes_colours_and_symbols() -> None:
    marker = {"size": [20, 40], "color": ["red", "blue"], "opacity": 1, "symbol": "square"}
    shot = Shot(bare().add_scatter(x=[2, 6], y=[5, 5], mode="markers", marker=marker))
    assert shot.at(2, 5) == RED and shot.at(6, 5) == BLUE
    # 10 units are 400 pixels: a square of 40 pixels reaches half a unit to each side
    assert shot.at(6.4, 5) == BLUE and shot.at(6.6, 5) == shot.at(2.4, 5) == WHITE
    hollow = Shot(bare().add_scatter(x=[5], y=[5], marker={"symbol": "circle-open", "size": 60, "color": "green"}))
    assert hollow.at(5, 5) == WHITE and GREEN in {hollow.at(5 + x, 5) for x in np.linspace(0.6, 0.9, 40)}


def test_words_stand_at_their_points() -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[3, 4], mode="markers+text", text=["a", "b<br>c"])
    ax = Shot(figure.update_traces(textposition="top center")).axes[0]
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("a", (0, 3)), ("b\nc", (1, 4))]
    assert ax.texts[0].get_va() == "bottom" and ax.texts[0].xyann[1] > 0


def test_traces_that_are_not_visible_are_left_out() -> None:
    figure = go.Figure().add_scatter(y=[1, 2], visible=False).add_scatter(y=[3, 4], visible="legendonly")
    ax = Shot(figure.add_scatter(y=[5, 6], mode="lines")).axes[0]
    assert len(ax.lines) == 1 and to_hex(ax.lines[0].get_color()) == "#00cc96"  # the third colour of plotly's template


# ---------------------------------------------------------------------------------------------------- bars


def bars(figure: go.Figure) -> NDArray[Any]:
    """The bars of a figure as (n, 4): left, bottom, width, height."""
    patches = [patch for patch in Shot(figure).axes[0].patches if isinstance(patch, Rectangle)]
    return np.asarray([(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in patches])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("group", [(-0.4, 0, 0.4, 3), (0.6, 0, 0.4, -1), (0, 0, 0.4, 2), (1, 0, 0.4, -2)]),
        ("overlay", [(-0.4, 0, 0.8, 3), (0.6, 0, 0.8, -1), (-0.4, 0, 0.8, 2), (0.6, 0, 0.8, -2)]),
    ],
)
def test_bars_stand_beside_or_before_one_another(mode: str, expected: list[tuple[float, ...]]) -> None:
    figure = go.Figure(layout_barmode=mode).add_bar(x=["a", "b"], y=[3, -1]).add_bar(x=["a", "b"], y=[2, -2])
    np.testing.assert_allclose(bars(figure), expected, atol=1e-12)


def test_bars_may_lie_with_widths_and_colours_of_their_own() -> None:
    figure = go.Figure().add_bar(x=[1, 2], y=["a", "b"], width=0.5, orientation="h")
    np.testing.assert_allclose(bars(figure), [(0, -0.25, 1, 0.5), (0, 0.75, 2, 0.5)])
    shot = Shot(figure.update_traces(marker_color=["red", "blue"]))
    assert shot.at(0.5, 0) == RED and shot.at(1.5, 1) == BLUE and labels(shot)[-2:] == ["a", "b"]
    low, high = shot.axes[0].get_xlim()
    assert low == 0 and 2 < high < 2.3  # bars begin at the axis


def test_words_stand_beyond_the_ends_of_bars_and_are_small_where_these_are_narrow() -> None:
    figure = go.Figure(layout_width=400).add_bar(y=[9] * 14, text=["123.4"] * 14, textposition="outside")
    narrow = Shot(figure).axes[0].texts
    wide = Shot(go.Figure().add_bar(y=[9, -1], text=["a", "b"], textposition="outside")).axes[0].texts
    assert [(text.get_text(), text.xy, text.get_va()) for text in wide] == [
        ("a", (0, 9), "bottom"),
        ("b", (1, -1), "top"),
    ]
    assert narrow[0].get_size() == pytest.approx(0.7 * wide[0].get_size())


# ---------------------------------------------------------------------------------------------------- fields


def test_the_cells_of_a_heat_map_have_the_colours_of_its_scale() -> None:
    z = [[0, 5], [10, None]]
    figure = go.Figure().add_heatmap(z=z, x=["a", "b"], y=[1, 2], colorscale=[[0, "red"], [1, "blue"]], showscale=False)
    shot = Shot(
        figure.update_traces(text=[["0.0", "5.0"], ["10.0", ""]], texttemplate="%{text}").update_layout(template="none")
    )
    assert shot.at(-0.4, 0.6) == RED and shot.at(-0.4, 1.6) == BLUE and shot.at(0.6, 1.6) == WHITE
    assert shot.at(0.6, 0.6) == pytest.approx((127, 0, 127), abs=1)
    ax = shot.axes[0]
    assert labels(shot)[:2] == ["a", "b"] and ax.get_xlim() == (-0.5, 1.5) and ax.get_ylim() == (0.5, 2.5)
    assert {text.get_text(): text.get_position() for text in ax.texts} == {"0.0": (0, 1), "5.0": (1, 1), "10.0": (0, 2)}


@pytest.mark.parametrize("name", ["RdBu", "Viridis", "Cividis", "RdBu_r", "Blues"])
def test_scales_by_name_are_those_of_plotly(name: str) -> None:
    figure = go.Figure().add_heatmap(z=[[0, 1]], colorscale=name, showscale=False)
    shot, pairs = Shot(figure), figure.data[0].colorscale
    ends = tuple(tuple(round(255 * c) for c in colour(pairs[end][1])[:3]) for end in (0, -1))
    assert (shot.at(0.1, 0.1), shot.at(1.1, 0.1)) == ends


def test_a_colour_bar_reaches_from_zmin_to_zmax_and_stands_beside_its_field() -> None:
    scale = {"colorscale": [[0, "white"], [1, "black"]], "reversescale": True, "zmin": 0, "zmax": 2}
    shot = Shot(go.Figure().add_heatmap(z=[[0, 1]], colorbar_title="cost", **scale))
    ax, bar = shot.axes
    assert shot.at(0, 0, ax) == (0, 0, 0) and shot.at(1, 0, ax)[0] == pytest.approx(127, abs=2)
    assert bar.get_ylim() == (0, 2) and bar.get_position().x0 > ax.get_position().x1 and shot.box(bar)[2] < 1
    assert bar.get_title("left") == "cost"


def test_contours_run_at_their_levels() -> None:
    x, contours = np.linspace(0, 4, 41), {"start": 1, "end": 3, "size": 1}
    look = {"colorscale": [[0, "red"], [1, "blue"]], "showscale": False}
    shot = Shot(go.Figure().add_contour(x=x, y=[0, 1], z=np.stack([x, x]), contours=contours, **look))
    lines = shot.axes[0].collections[-1]
    assert list(lines.levels) == [1, 2, 3]
    np.testing.assert_allclose([path.vertices[:, 0].mean() for path in lines.get_paths()], [1, 2, 3])
    assert shot.at(0.5, 0.5)[0] > 200 > 100 > shot.at(3.5, 0.5)[0]


# ---------------------------------------------------------------------------------------------------- scenes


def test_surfaces_stand_in_their_scenes_and_are_seen_by_the_same_camera() -> None:
    figure = make_subplots(1, 2, specs=[[{"type": "surface"}] * 2])
    x = np.linspace(-1, 1, 200)
    figure.add_surface(x=x, y=x, z=np.outer(x, x), showscale=False, row=1, col=1)
    figure.add_surface(z=np.eye(3), showscale=False, row=1, col=2)
    figure.add_scatter3d(x=[0, 2], y=[0, 2], z=[0, 1], mode="markers", row=1, col=2)
    figure.update_layout(scene_camera_eye={"x": 0, "y": -2, "z": 0}, scene_zaxis_title="loss")
    shot = Shot(figure)
    left, right = shot.axes
    for ax, name in ((left, "scene"), (right, "scene2")):
        domain = figure.layout[name].domain.x
        width = shot.paper.get_position().width
        start = shot.paper.get_position().x0
        got = (np.asarray([ax.get_position(original=True).x0, ax.get_position(original=True).x1]) - start) / width
        np.testing.assert_allclose(got, domain, atol=1e-9)
    assert (left.azim, left.elev) == (-90, 0) and right.azim == 45
    assert left.get_zlim() == (-1, 1) and left.get_zlabel() == "loss"
    mesh = next(each for each in left.collections if isinstance(each, Poly3DCollection))
    assert 2000 < len(mesh.get_facecolor()) <= 72**2
    assert len(right.collections) == 2
    inside = shot.pixels[:, : shot.pixels.shape[1] // 2]
    assert (inside.std(-1) > 20).mean() > 0.02  # something of many colours is there


# ---------------------------------------------------------------------------------------------------- axes


def test_subplots_stand_in_their_domains_with_their_titles_above() -> None:
    figure = make_subplots(2, 3, subplot_titles=list("abcdef"))
    for i in range(6):
        figure.add_scatter(y=[0, 1], row=i // 3 + 1, col=i % 3 + 1)
    shot = Shot(ours(figure, height=600))
    paper = shot.paper.get_position()
    for i, ax in enumerate(shot.axes):
        number = str(i + 1) if i else ""
        across, up = figure.layout[f"xaxis{number}"].domain, figure.layout[f"yaxis{number}"].domain
        box = ax.get_position()
        np.testing.assert_allclose([(end - paper.x0) / paper.width for end in (box.x0, box.x1)], across, atol=1e-9)
        np.testing.assert_allclose([(end - paper.y0) / paper.height for end in (box.y0, box.y1)], up, atol=1e-9)
        left, bottom, right, _ = shot.box(shot.paper.texts[i])
        assert (left + right) / 2 == pytest.approx((box.x0 + box.x1) / 2, abs=0.005) and bottom > box.y1 - 0.01
    assert shot.words() == list("abcdef")


def test_ranges_may_be_given_turned_logarithmic_or_half_open() -> None:
    figure = make_subplots(1, 3)
    for column in (1, 2, 3):
        figure.add_scatter(x=[1, 10, 100], y=[1, 2, 3], mode="lines", row=1, col=column)
    figure.update_layout(xaxis_range=[-5, 5], yaxis_autorange="reversed", xaxis2_type="log", yaxis2_range=[4, 0])
    figure.update_layout(xaxis3={"type": "log", "range": [0, 3]}, yaxis3_range=[None, 9], xaxis2_title="x<sup>2</sup>")
    one, two, three = Shot(figure).axes
    assert one.get_xlim() == (-5, 5) and one.get_ylim() == pytest.approx((3.1, 0.9))
    assert two.get_xscale() == "log" and two.get_xlim() == pytest.approx((1, 100)) and two.get_ylim() == (4, 0)
    assert three.get_xlim() == pytest.approx((1, 1000)) and three.get_ylim() == (pytest.approx(0.9), 9)
    assert two.get_xlabel() == "x²"


def test_ticks_stand_where_they_are_told_and_say_what_they_are_told() -> None:
    figure = go.Figure().add_scatter(x=[0, 10], y=[0, 1], mode="lines")
    figure.update_xaxes(tickvals=[0, 5], ticktext=["none", "<b>half</b>"])
    figure.update_yaxes(dtick=0.25)
    assert labels(Shot(figure)) == ["none", "half", "0", "0.25", "0.5", "0.75", "1"]


def test_pictures_keep_their_shape_by_a_smaller_panel() -> None:
    figure = go.Figure(layout={"width": 800, "height": 400}).add_scatter(x=[0], y=[0])
    figure.update_xaxes(range=[0, 100], constrain="domain", constraintoward="left")
    ax = Shot(figure.update_yaxes(range=[100, 0], scaleanchor="x", constrain="domain")).axes[0]
    wide, high = np.abs(ax.transData.transform((100, 100)) - ax.transData.transform((0, 0)))
    assert wide == pytest.approx(high) and ax.get_xlim() == (0, 100) and ax.get_position().x0 == pytest.approx(0.1)


def test_names_count_from_zero_in_the_order_they_came() -> None:
    axis = Axis("x", {}, {})
    np.testing.assert_array_equal(axis.numbers(["z", "b", None, "z", "a"]), [0, 1, np.nan, 0, 2])
    assert axis.names == ["z", "b", "a"] and axis.place("a") == 2


@pytest.mark.parametrize(("least", "step"), [(0.148, 0.2), (0.2, 0.5), (4.9, 5), (51, 100), (1, 2), (0.99, 1)])
def test_steps_of_ticks_are_round(least: float, step: float) -> None:
    assert stride(least) == pytest.approx(step)


@pytest.mark.parametrize(
    ("value", "largest", "how", "words"),
    [
        (0.25, 1, {}, "0.25"),
        (-1500, 3000, {}, "−1500"),
        (20000, 40000, {}, "20k"),
        (5000, 40000, {}, "5k"),
        (2e6, 4e6, {}, "2M"),
        (0.0002, 0.0004, {}, "200μ"),
        (1e-20, 2e-20, {}, "10×10⁻²¹"),
        (0, 40000, {}, "0"),
        (0.30000000000000004, 1, {}, "0.3"),
        (1e-5, 1, {"log": True}, "10μ"),
        (1, 1, {"log": True, "form": "power"}, "1"),
        (1e-5, 1, {"log": True, "form": "power"}, "10⁻⁵"),
        (0.5, 1, {"log": True, "form": "power"}, "5×10⁻¹"),
        (20000, 40000, {"form": "e"}, "2e+4"),
    ],
)
def test_ticks_speak_as_plotly_does(value: float, largest: float, how: dict[str, Any], words: str) -> None:
    assert spoken(value, largest, **how) == words


def test_long_names_make_room_for_themselves() -> None:
    figure = go.Figure(layout={"width": 500, "height": 350, "margin": {"l": 5, "b": 5, "t": 5, "r": 5}})
    figure.add_bar(x=["a very long name for a thing", "another one which is long", "short"], y=[1, 2, 3])
    figure.update_yaxes(tickvals=[1, 2], ticktext=["one is said at length", "two"], title="height of it")
    shot = Shot(figure)
    words = [text for text in shot.picture.artists if isinstance(text, Text)] + [shot.axes[0].yaxis.label]
    assert len(words) == 6 and all((shot.box(text)[:2] >= 0).all() for text in words)
    left, middle, *_ = (shot.box(text) for text in words[3:])
    assert shot.box(words[-1])[2] < min(left[0], middle[0]), "the title is beside the ticks' words"


# ---------------------------------------------------------------------------------------------------- what is laid over


def test_shapes_have_their_colours_where_they_are() -> None:
    figure = bare().add_scatter(x=[0, 10], y=[0, 0], mode="lines", line_width=1)
    figure.add_shape(type="rect", x0=1, x1=3, y0=1, y1=3, fillcolor="red", line_width=0)
    figure.add_shape(type="rect", x0=4, x1=6, y0=1, y1=3, line={"color": "blue", "width": 8})
    figure.add_shape(type="line", x0=1, x1=9, y0=5, y1=5, line={"color": "red", "width": 8})
    figure.add_shape(xref="paper", yref="paper", x0=0, x1=0.1, y0=0.9, y1=1, fillcolor="blue", line_width=0)
    figure.add_shape(xref="x domain", yref="y", x0=0.9, x1=1, y0=9, y1=10, fillcolor="red", line_width=0)
    shot = Shot(figure)
    assert shot.at(1.1, 1.1) == shot.at(2.9, 2.9) == RED and shot.at(0.9, 2) == shot.at(3.1, 2) == WHITE
    assert shot.at(4, 2) == shot.at(5, 3) == BLUE and shot.at(5, 2) == WHITE
    assert shot.at(5, 5) == RED
    assert shot.at(0.5, 9.5) == BLUE and shot.at(9.5, 9.5) == RED and shot.at(8.9, 9.5) == WHITE


def test_shapes_on_a_logarithmic_axis_end_at_the_panel() -> None:
    figure = go.Figure(layout={"width": 400, "height": 300, "template": "none"}).add_scatter(x=[1, 1000], y=[0, 0])
    figure.update_xaxes(type="log", range=[0, 3]).update_yaxes(range=[-1, 1])
    figure.add_shape(x0=10, x1=1e9, y0=-1, y1=0.9, fillcolor="red", line_width=0)
    shot = Shot(figure)
    assert shot.at(12, 0.4) == shot.at(900, 0.4) == RED and shot.at(8, 0.4) == WHITE
    assert shot.at(1100, 0.4) == WHITE


def test_lines_across_reach_into_the_range() -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[0, 1], mode="lines").add_hline(y=5).add_vrect(x0=3, x1=4)
    ax = Shot(figure).axes[0]
    assert ax.get_xlim() == (0, 4) and ax.get_ylim()[1] >= 5


@pytest.mark.parametrize("turned", [False, True])
def test_images_stand_upright_whichever_way_the_axis_runs(turned: bool) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:] = RED, GREEN, BLUE
    figure = bare().add_scatter(x=[0], y=[0], mode="none")
    figure.update_yaxes(range=[10, 0] if turned else [0, 10])
    top, down = (2, 1) if turned else (8, -1)
    image = {"source": Image.fromarray(pixels), "xref": "x", "yref": "y", "sizing": "stretch", "layer": "below"}
    shot = Shot(figure.add_layout_image(**image, x=1, y=top, sizex=4, sizey=4))
    assert shot.at(1.5, top + 0.5 * down) == RED and shot.at(4.5, top + 0.5 * down) == GREEN
    assert shot.at(1.5, top + 3.5 * down) == shot.at(4.5, top + 3.5 * down) == BLUE
    assert shot.at(0.8, top + 0.5 * down) == shot.at(1.5, top - 0.5 * down) == WHITE


def test_words_stand_where_they_point_to() -> None:
    figure = bare().add_scatter(x=[0], y=[0])
    figure.add_annotation(x=5, y=5, text="<b>here</b> &amp; <br>there", ax=40, ay=-60)
    figure.add_annotation(x=1, y=1, xref="paper", yref="paper", text="corner", showarrow=False)
    figure.add_annotation(x=0, y=0.5, xref="x domain", yref="y domain", text="side", showarrow=False, xanchor="left")
    shot = Shot(figure)
    assert shot.words() == ["here & \nthere", "corner", "side"]
    here, corner, side = (shot.box(text) for text in shot.paper.texts)
    arrow, right, left = shot.paper.texts
    assert arrow.xyann == pytest.approx((40 * 0.72, 60 * 0.72)) and arrow.arrow_patch is not None
    assert here[0] < 0.5 + 40 / 400 < here[2]
    assert right.get_ha() == "right" and corner[2] == pytest.approx(1, abs=0.01) == corner[3]
    assert left.arrow_patch is None and side[0] == pytest.approx(0, abs=0.01)


def test_words_on_a_logarithmic_axis_are_placed_by_the_exponent() -> None:
    figure = go.Figure().add_scatter(x=[1, 1000], y=[1, 2]).update_xaxes(type="log")
    shot = Shot(figure.add_annotation(x=2, y=1.5, text="hundred"))
    assert shot.paper.texts[0].xy == (100, 1.5)


# ---------------------------------------------------------------------------------------------------- legends


def legend(shot: Shot) -> Any:
    """The legend of a picture, or None."""
    return next((each for each in shot.paper.artists if type(each).__name__ == "Legend"), None)


def said(shot: Shot) -> list[str]:
    """The lines of the legend."""
    return [text.get_text() for text in legend(shot).get_texts()]


def test_a_legend_names_the_traces_that_want_it_and_stands_beside_them() -> None:
    figure = go.Figure().add_scatter(y=[1, 2], name="one").add_scatter(y=[1, 3], name="<i>two</i>")
    figure.add_scatter(y=[1, 4], name="three", showlegend=False).add_heatmap(z=[[1]], showscale=False)
    shot = Shot(figure.update_layout(margin_r=0))
    assert said(shot) == ["one", "two"]
    left, bottom, right, top = shot.box(legend(shot))
    box = shot.axes[0].get_position()
    assert box.x1 < left < right <= 1 and top == pytest.approx(box.y1, abs=0.02) and bottom > 0.5
    assert legend(Shot(figure.update_layout(showlegend=False))) is None
    assert legend(Shot(go.Figure().add_scatter(y=[1]))) is None
    assert said(Shot(go.Figure().add_scatter(y=[1], showlegend=True))) == ["trace 0"]


def test_a_legend_may_lie_above_in_rows_that_fit() -> None:
    figure = go.Figure(layout={"width": 500, "height": 400})
    for i in range(9):
        figure.add_scatter(y=[i], name=f"a rather long name {i}")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, margin={"t": 5})
    shot = Shot(figure)
    left, bottom, right, top = shot.box(legend(shot))
    assert 0 <= left < right <= 1 and shot.axes[0].get_position().y1 < bottom < top <= 1
    rows = [round(shot.box(text)[1], 2) for text in legend(shot).get_texts()]
    by_name = dict(zip(said(shot), rows, strict=True))
    assert by_name["a rather long name 0"] == by_name["a rather long name 1"] > by_name["a rather long name 8"]


# ---------------------------------------------------------------------------------------------------- the look


def test_a_figure_in_our_look_has_our_colours_live_and_still() -> None:
    figure = ours(go.Figure().add_scatter(y=[1, 2]).add_scatter(y=[2, 1]), title="What is seen", height=334)
    assert tuple(figure.layout.template.layout.colorway) == LINES
    shot = Shot(figure)
    assert [to_hex(line.get_color()) for line in shot.axes[0].lines] == [tint.lower() for tint in LINES[:2]]
    assert shot.words() == ["What is seen"] and tuple(shot.paper.texts[0].get_color())[:3] == to_rgb(INK)
    assert shot.pixels.shape == (501, 1650, 3) and tuple(shot.pixels[0, 0]) == WHITE


def test_plotlys_own_template_is_followed_as_well() -> None:
    shot = Shot(go.Figure().add_scatter(x=[0, 1], y=[0, 1], mode="lines"))
    assert shot.at(0.55, 0.13) == (0xE5, 0xEC, 0xF6)
    assert to_hex(shot.axes[0].lines[0].get_color()) == "#636efa"


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", (1, 0, 0, 1)),
        ("#00f", (0, 0, 1, 1)),
        ("rgb(255, 0, 51)", (1, 0, 0.2, 1)),
        ("rgba(255,255,255,.5)", (1, 1, 1, 0.5)),
    ],
)
def test_colours_are_read_as_the_web_writes_them(text: str, expected: tuple[float, ...]) -> None:
    assert colour(text) == pytest.approx(expected)
    assert colour(text, 0.5)[3] == pytest.approx(expected[3] / 2)


def test_letters_can_be_read_on_their_ground() -> None:
    assert ink_on((1, 1, 0, 1)) == ink_on((0, 0, 0, 0.1)) == "#111111" and ink_on((0, 0, 0.6, 1)) == "#FFFFFF"


def test_words_lose_their_markup_and_keep_their_meaning() -> None:
    assert plain("<b>a</b><br>10<sup>-3</sup> &lt; <span style='x'>b</span>") == "a\n10⁻³ < b"
    assert plain("a < b and 5 $") == r"a < b and 5 \$"


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("figure", "named"),
    [
        (go.Figure(go.Pie(values=[1])), "a pie trace"),
        (go.Figure(go.Scatter(y=[1], stackgroup="a")), "stackgroup of a scatter trace"),
        (go.Figure(go.Scatter(y=[1, 2], line_shape="spline")), "'spline' as shape of the line of a scatter trace"),
        (go.Figure(go.Scatter(y=[1, 2], line_dash="5px,2px")), "'5px,2px' as dash"),
        (go.Figure(go.Scatter(y=[1, 2], fill="tozeroy")), "'tozeroy' as fill"),
        (go.Figure(go.Scatter(y=[1], marker_symbol="hourglass")), "hourglass"),
        (go.Figure(go.Scatter(y=[1, 2], marker_symbol=["x", "star"])), "symbol of the marker"),
        (go.Figure(go.Scatter(y=[1], error_y_array=[1])), "error_y of a scatter trace"),
        (go.Figure(go.Scatter(x=["2020-01-01"], y=[1])), "dates such as .'2020-01-01'"),
        (go.Figure(go.Scatter(x=np.asarray(["2020-01-01"], "datetime64[D]"), y=[1])), "dates"),
        (go.Figure(go.Scatter(y=[1], line_color="hsl(120,100%,50%)")), "A colour is a name"),
        (go.Figure(go.Heatmap(z=[[1]], zsmooth="best")), "zsmooth of a heatmap trace"),
        (go.Figure(go.Heatmap(z=[[1, 2, 3]], x=[0, 1, 9])), "cells of several sizes"),
        (go.Figure(go.Heatmap(z=[[1]]), {"template": "none"}), "colours without a colorscale"),
        (go.Figure(go.Contour(z=np.eye(2))), "contours without start, end and size"),
        (go.Figure(go.Bar(y=[1], text="a")), "words in bars"),
        (go.Figure(go.Bar(y=[1]), {"barmode": "stack"}), "'stack' as barmode of a layout"),
        (go.Figure(go.Bar(y=[1]), {"sliders": [{}]}), "sliders of a layout"),
        (go.Figure(go.Scatter(y=[1]), {"yaxis": {"scaleanchor": "x"}}), "scaleanchor but without constrain"),
        (go.Figure(go.Scatter(y=[1])).add_scatter(y=[1], yaxis="y2"), r"share an axis \(x, y2\)"),
        (go.Figure(go.Scatter(y=[0, 1]), {"yaxis": {"tickformat": "~s"}}), "tickformat of the yaxis of a layout"),
        (go.Figure(layout={"shapes": [{"type": "path", "path": "M 0 0"}]}), "path"),
        (go.Figure(layout={"images": [{"source": "https://example.org/a.png", "sizing": "stretch"}]}), "example.org"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(figure: go.Figure, named: str) -> None:
    with pytest.raises(DeimkitError, match=named):
        Shot(figure)


def test_what_shows_only_under_a_mouse_is_no_reason_to_refuse() -> None:
    figure = go.Figure(layout={"hovermode": "x", "dragmode": "pan", "uirevision": 1})
    figure.add_scatter(y=[1], hovertemplate="%{y}", customdata=[1], uid="a", meta="b")
    assert len(Shot(figure).axes[0].collections) == 1


def test_a_figure_of_a_scene_alone_is_drawn() -> None:
    z = np.add.outer(np.arange(4.0), np.arange(5.0))
    shot = Shot(ours(go.Figure().add_surface(z=z, showscale=False), height=300))
    assert len(np.unique(shot.pixels.reshape(-1, 3), axis=0)) > 50


def test_a_notebook_keeps_the_legend_beside_the_panels() -> None:
    figure = ours(go.Figure().add_scatter(y=[1, 2], name="a long name").add_scatter(y=[2, 1], name="b"), height=300)
    beside = figure.update_layout(legend={"x": 1.02, "y": 1})
    kept = Image.open(io.BytesIO(still.picture(beside).png()))
    without = Image.open(io.BytesIO(still.picture(figure.update_layout(showlegend=False)).png()))
    ink = [np.asarray(image.convert("L"))[:, -kept.width // 8 :] < 128 for image in (kept, without)]
    assert ink[0].sum() > 100, "words at the right end"
