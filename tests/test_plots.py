"""Pictures of detections: what is drawn, where it stands, and that a notebook shows it."""

from __future__ import annotations

import base64
import io
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from deimkit.data.dataset import Dataset
from deimkit.errors import DataError
from deimkit.explore import plots
from deimkit.explore.plots import Comparison, Picture, annotated, colour, contact_sheet, draw_boxes, draw_detections
from deimkit.structures import Detections


def found(count: int, height: int = 300, width: int = 400, image: Any = None) -> Detections:
    """`count` boxes in a row of steps, of three classes, with falling scores."""
    low = torch.linspace(0, 0.7, count)[:, None] * torch.tensor([[width, height]])
    boxes = torch.cat([low, low + torch.tensor([[width * 0.3, height * 0.3]])], 1)
    labels = torch.arange(count) % 3
    names = [("dog", "cat", "a very long name of a class")[k] for k in labels.tolist()]
    return Detections(boxes, torch.linspace(0.95, 0.2, count), labels, names, (height, width), image)


def boxes_of(ax: Any) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_boxes_names_and_scores_are_drawn_in_pixels_of_the_image() -> None:
    image = np.full((300, 400, 3), 128, np.uint8)
    ax = draw_detections(found(4, image=image), threshold=0.4)
    drawn = boxes_of(ax)
    assert [text.get_text() for text in ax.texts] == ["dog 0.95", "cat 0.70", "a very long name of a class 0.45"]
    assert sorted(box.get_bbox().extents.round().tolist() for box in drawn) == found(4).boxes[:3].round().tolist()
    assert ax.get_xlim() == (0, 400) and ax.get_ylim() == (300, 0)


def test_the_most_confident_is_drawn_last() -> None:
    ax = draw_boxes(np.zeros((10, 10, 3), np.uint8), [[0, 0, 5, 5], [1, 1, 9, 9]], ["a", "b"], [0.9, 0.1])
    assert [box.get_width() for box in boxes_of(ax)] == [8, 5]


def test_a_class_keeps_its_colour_from_image_to_image() -> None:
    for labels in ([0, 1, 2], [2, 2, 1], [9]):
        names = [str(k) for k in labels]
        some = Detections(torch.rand(len(labels), 4), torch.ones(len(labels)), torch.tensor(labels), names, (9, 9))
        drawn = {to_hex(box.get_edgecolor()).upper() for box in boxes_of(draw_detections(some))}
        assert drawn == {colour(k) for k in labels}


def test_truth_is_dashed_and_underneath() -> None:
    ax = draw_boxes(np.zeros((10, 10, 3), np.uint8), [[0, 0, 5, 5]], ["a"], [0.9], truth=[[1, 1, 6, 6]])
    truth, box = boxes_of(ax)
    assert truth.get_x() == 1 and truth.get_linestyle() != "solid" and box.get_linestyle() == "solid"


@pytest.mark.parametrize("label", range(7))
def test_names_can_be_read_on_every_colour(label: int) -> None:
    """A contrast of 4.5 is what WCAG 2 asks of text."""

    def luminance(c: str) -> float:
        rgb = np.array(to_rgb(c))
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    high, low = sorted([luminance(colour(label)), luminance(plots._readable_on(colour(label)))], reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_names_stay_inside_the_image_and_apart() -> None:
    some = found(8)
    some.boxes[1:3] = some.boxes[0]  # three boxes of one place: their names go above, inside and below
    ax = draw_detections(some)
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    places = [text.get_window_extent() for text in ax.texts]
    assert all(ax.bbox.x0 - 1 <= p.x0 and p.x1 <= ax.bbox.x1 + 1 for p in places)
    assert all(ax.bbox.y0 - 1 <= p.y0 and p.y1 <= ax.bbox.y1 + 1 for p in places)
    assert not any(a.overlaps(b) for a, b in combinations(places, 2))


def test_many_boxes_are_all_drawn_but_not_all_named() -> None:
    ax = draw_detections(found(300))
    assert len(boxes_of(ax)) == 300 and len(ax.texts) == plots.NAMED


@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (12000, 30), (30, 12000), (3000, 6000)])
def test_extreme_shapes(height: int, width: int) -> None:
    ax = draw_detections(found(2, height, width, np.zeros((height, width, 3), np.uint8)))
    shown = ax.images[0].get_array()
    assert shown is not None and max(shown.shape) <= plots.SHOWN and ax.get_xlim() == (0, width)
    assert max(decoded(ax.picture.png()).shape) < 1200


@pytest.mark.parametrize("count", [0, 1])
def test_without_image_or_boxes(count: int) -> None:
    assert len(boxes_of(draw_detections(found(count)))) == count
    assert len(boxes_of(found(count).plot(threshold=0.99))) == 0
    nameless = Detections(torch.rand(count, 4), torch.ones(count), torch.ones(count).long())
    assert [text.get_text() for text in draw_detections(nameless).texts] == ["1 1.00"] * count


def test_a_notebook_shows_the_picture() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    image[:, 200:] = (255, 0, 0)
    ax = draw_detections(found(0, image=image))
    html = ax._repr_html_()
    tag = re.fullmatch(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)" style="max-width: 100%">', html)
    assert tag is not None
    data, alt = tag.groups()
    assert alt == "a picture without words"
    shown = decoded(base64.b64decode(data))
    assert shown.shape[1] / shown.shape[0] == pytest.approx(4 / 3, abs=0.03)
    assert shown[100, 100].tolist() == [0, 0, 0] and shown[100, -100].tolist() == [255, 0, 0]


def test_a_picture_says_what_is_written_in_it() -> None:
    sheet = contact_sheet([Comparison(found(1), found(1), "two <cats> & a dog")])
    name = sheet.axes[0].texts[0].get_text()
    said = [f"two <cats> & a dog: {name}", f"1 found, 1 annotated: {sheet.axes[1].texts[0].get_text()}"]
    assert sheet.words() == "; ".join(said)
    assert 'alt="two &lt;cats&gt; &amp; a dog: ' in sheet._repr_html_()
    curves = Picture()
    left, right = curves.subplots(1, 2)
    left.set(title="Loss", xlabel="epoch", ylabel="MAL\nper image")
    left.plot([0, 1], label="ours")
    left.legend()
    assert curves.words() == "Loss: x: epoch, y: MAL per image, ours", "an empty panel says nothing"


def test_pyplot_is_neither_needed_nor_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert draw_detections(found(3))._repr_html_() and contact_sheet([Comparison(found(2), found(3))])._repr_html_()


def test_given_axes_are_used() -> None:
    ax = Figure(figsize=(2, 2)).add_subplot()
    assert draw_detections(found(1), ax=ax) is ax and len(boxes_of(ax)) == 1
    small = boxes_of(ax)[0].get_linewidth()
    assert small < boxes_of(draw_detections(found(1)))[0].get_linewidth()  # thinner lines on a smaller picture


@pytest.mark.parametrize("count, columns, rows", [(1, 3, 1), (4, 2, 2), (5, 2, 3), (3, 1, 3)])
def test_contact_sheet(count: int, columns: int, rows: int) -> None:
    items = [Comparison(found(4), found(2), f"image {i}") for i in range(count)]
    sheet = contact_sheet(items, columns, threshold=0.4)
    pairs = [sheet.axes[i : i + 2] for i in range(0, 2 * count, 2)]
    assert [left.get_title("left") for left, _ in pairs] == [f"image {i}" for i in range(count)]
    assert {right.get_title("right") for _, right in pairs} == {"3 found, 2 annotated"}
    assert [(len(boxes_of(a)), len(boxes_of(b))) for a, b in pairs] == [(2, 3 + 2)] * count
    assert len({round(left.get_position().y0, 6) for left, _ in pairs}) == rows


def test_contact_sheet_of_nothing() -> None:
    assert contact_sheet([]).axes == [] and "a picture without words" in contact_sheet([])._repr_html_()


def test_boxes_and_names_must_pair() -> None:
    with pytest.raises(DataError, match="got 1 boxes and 2 names"):
        draw_boxes(np.zeros((9, 9, 3), np.uint8), [[0, 0, 1, 1]], ["a", "b"])


def test_annotations_of_a_dataset(shared: Path) -> None:
    split = Dataset.open(shared / "data/bccd").val
    assert split is not None
    truth = annotated(split, 0)
    assert len(truth) == split.starts[1] > 0 and set(truth.names) <= {"RBC", "WBC", "Platelets"}
    assert truth.size == split.image(0).shape[:2]
    sheet = contact_sheet([Comparison(truth.above(2.0), truth)])
    assert sheet.axes[0].get_title("left") == split.paths[0].name and len(boxes_of(sheet.axes[1])) == len(truth)
