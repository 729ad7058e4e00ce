"""The pictures of deployed detectors: what is drawn is what was given, also where there is next to nothing to draw."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from PIL import Image

from deimkit.explore.deployed import (
    LEAST,
    draw_agreement,
    draw_gaps,
    draw_latencies,
    draw_nodes,
    draw_trade,
    draw_where,
)
from deimkit.explore.plots import Picture


def shown(drawn: Any) -> Picture:
    """The picture, once it is certain that a notebook can show it."""
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert isinstance(figure, Picture) and figure.png().startswith(b"\x89PNG")
    return figure


def points(line: Any) -> np.ndarray:
    """What a line goes through, (n, 2)."""
    return np.asarray(line.get_xydata(), float)


def test_nodes_stand_by_their_number_and_the_rest_together() -> None:
    ax = draw_nodes({"Relu": 2, "Conv": 7, "Pad": 1, "Pow": 1}, most=2)
    assert [bar.get_height() for bar in ax.patches] == [7, 2, 2]  # type: ignore[attr-defined]
    assert shown(ax).words() == "y: nodes, Conv, 7, Relu, 2, 2 other kinds, 2"


@pytest.mark.parametrize("counts, bars", [({}, 0), ({"Conv": 1}, 1), ({"Conv": 1, "Relu": 3}, 2)])
def test_few_kinds_of_nodes_have_no_rest(counts: dict[str, int], bars: int) -> None:
    assert len(draw_nodes(counts).patches) == bars and "other" not in shown(draw_nodes(counts)).words()


def test_gaps_fall_and_nothing_is_still_drawn() -> None:
    picture = draw_gaps({"FP32": ([0.0, 0.5, 1e-7], [1e-7, 2e-7]), "FP16": ([], [])}, "boxes differ")
    left, right = picture.axes
    rows, pairs = left.lines
    assert_allclose(points(rows), [[1, 0.5], [2, 1e-7], [3, LEAST]])
    assert_allclose(points(pairs), [[1, 2e-7], [2, 1e-7]])
    assert len(right.lines) == 2 and left.get_ylabel() == "boxes differ"
    assert "row by row, as pairs" in shown(picture).words()


def test_agreement_says_how_far_the_worst_pair_is() -> None:
    picture = draw_agreement({"FP32": ([0.5, 0.25], [0.5, 0.25]), "INT8": ([0.5], [0.375]), "none": ([], [])})
    titles = [ax.get_title() for ax in picture.axes]
    assert titles[0].endswith("2 pairs, at most 0.0e+00 apart") and titles[1].endswith("1 pairs, at most 1.2e-01 apart")
    assert points(picture.axes[1].lines[1]).tolist() == [[0.5, 0.375]]
    assert all(ax.get_xlim() == ax.get_ylim() == (0, pytest.approx(0.54)) for ax in picture.axes)
    shown(picture)


def test_maps_share_their_colours() -> None:
    border = np.zeros((4, 6))
    border[-1] = 0.5
    picture = draw_where({"wrong": border, "right": np.zeros((4, 6))}, "differs")
    images = [ax.images[0] for ax in picture.axes[:2]]
    assert [image.get_clim() for image in images] == [(0, 0.5), (0, 0.5)]
    assert_allclose(np.asarray(images[0].get_array()), border)
    assert "wrong at most 5.0e-01" in shown(picture).words()
    shown(draw_where({"nothing": np.zeros((2, 2))}, "differs"))


def test_latencies_have_every_call_their_percentiles_and_the_interval() -> None:
    calls = {"eager": [0.010, 0.020, 0.030], "fast": [0.004]}
    picture = draw_latencies(calls, {"eager": (1.0, 1.0, 1.0), "fast": (5.0, 4.0, 6.0)})
    left, right = picture.axes
    dots, median, ninety, last, *_ = map(points, left.lines)
    assert_allclose(sorted(dots[:, 0]), [10, 20, 30])
    assert len(set(dots[:, 1])) == 3 and abs(dots[:, 1]).max() < 0.32
    assert [stroke[0, 0] for stroke in (median, ninety, last)] == pytest.approx([20, 28, 29.8])
    assert points(right.lines[2]).tolist() == [[4, 1], [6, 1]]
    assert [text.get_text() for text in right.texts] == ["1.00", "5.00"]
    assert "eager, fast" in shown(picture).words()


def test_the_trade_names_its_machine_and_its_images() -> None:
    ax = draw_trade({"torch": (30.0, 21.0), "INT8": (8.0, 17.4)}, "a processor", "drawn scenes")
    assert {line.get_label(): points(line).tolist() for line in ax.lines} == {"torch": [[30, 21]], "INT8": [[8, 17.4]]}
    words = shown(ax).words()
    assert "a processor" in words and "drawn scenes" in words and words.index("INT8") < words.index("torch")
    low, high = shown(draw_trade({"torch": (30.0, 0.2)}, "here", "scenes")).axes[0].get_ylim()
    assert low == 0 and high > 0.2


def test_pictures_are_not_larger_than_a_notebook_bears() -> None:
    many = {name: np.random.default_rng(0).gamma(9, 1e-3, 500) for name in "abcd"}
    picture = draw_latencies(many, dict.fromkeys(many, (1.0, 0.9, 1.1)))
    assert len(picture.png()) < 200_000


def test_pictures_are_wide_enough_for_long_names() -> None:
    """A name to the left of the calls is not cut: the picture grows to what is drawn."""

    def width(name: str) -> int:
        drawn = draw_latencies({name: [0.01, 0.02]}, {name: (1.0, 1.0, 1.0)})
        return Image.open(io.BytesIO(drawn.png())).width

    assert width("PyTorch 2.15.0+cu132, deployed, compiled, CUDA graph, FP16, of a long name") > width("torch")
