"""The contact sheet: what stands on it, that it stands alone, and that moved images are spoken of."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.contact_page import contact_sheet_page
from deimkit.explore.findings import Findings
from deimkit.explore.tiles import _part, tile
from deimkit.explore.views import VIEWS, Shown, View, changed, views_of
from tests import findings_scene, scenes


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return findings_scene.findings(tmp_path / "images")


def view(name: str) -> View:
    return next(view for view in VIEWS if view.name == name)


def boxes(picture: str, style: str) -> int:
    """How many boxes of a style a picture has."""
    return len(re.findall(f'<g class="{style}">', picture))


def test_page_has_every_view_and_needs_nothing_else(found: Findings, tmp_path: Path) -> None:
    page = contact_sheet_page(found, tmp_path / "out" / "sheet.html")
    html = page.read_text(encoding="utf-8")
    for shown in views_of(found):
        assert f">{shown.name.capitalize()}</h2>" in html and shown.words.replace("'", "&#x27;") in html
    counts = [len(shown.select(found)) for shown in views_of(found)]
    assert html.count("<figure>") == sum(counts) and html.count("There are none.") == counts.count(0)
    assert not re.search(r'<script|<link|(?:href|src)="(?!data:|#)', html) and "猫" in html


def test_first_images_of_many(found: Findings, tmp_path: Path) -> None:
    html = contact_sheet_page(found, tmp_path / "sheet.html", most=1).read_text(encoding="utf-8")
    assert "3 images, of which these are the first 1." in html and "1 image." in html


def test_whole_image_has_all_annotations_and_sure_detections(found: Findings) -> None:
    made = tile(found, view("worst images"), Shown(0, np.array([0])))
    assert (
        'viewBox="0.0 0.0 224.0 224.0"' in made.picture and made.words == "a.png: AP 0.50, 1 right, 1 wrong, 1 missed"
    )
    assert boxes(made.picture, "truth thick") == 1 and boxes(made.picture, "truth") == 1  # the missed one is thick
    assert "猫 0.90, right, IoU 1.00" in made.picture and "猫 0.80, duplicate" in made.picture
    unsure = tile(found, view("worst images"), Shown(2, np.array([2])))
    assert "0.10" not in unsure.picture


def test_detection_is_cut_out_with_its_target_and_its_first_box(found: Findings) -> None:
    made = tile(found, view("confident false positives"), Shown(4, np.array([6])))
    ET.fromstring(made.picture)  # well-formed
    x, y, width, height = (float(v) for v in re.findall(r'viewBox="([^"]*)"', made.picture)[0].split())
    assert height < 224 and x <= 40 and y <= 40 and x + width >= 130 and y + height >= 90
    assert boxes(made.picture, "thick") == 1 and boxes(made.picture, "start") == 1
    assert "dog 0.85, location, IoU 0.33 with dog; layer by layer" in made.words and made.words.count("→") == 2
    assert "layer" not in tile(replace(found, traces=None), view("duplicates"), Shown(0, np.array([1]))).words


def test_annotation_says_who_was_matched(found: Findings) -> None:
    made = tile(found, view("missed small objects"), Shown(0, np.array([1])))
    assert "dog, missed, 400 px²; matched query 1 → 1 → 1" in made.words and boxes(made.picture, "truth thick") == 1


def test_thumbnails_are_the_part_that_is_shown(found: Findings) -> None:
    made = tile(found, view("missed small objects"), Shown(0, np.array([1])))
    data = re.findall(r"base64,([^\"]*)", made.picture)[0]
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert small.size == (120, 90)


@pytest.mark.parametrize(
    "about, size, part",
    [
        (None, (80, 100), (0, 0, 100, 80)),
        ([300, 300, 310, 310], (640, 640), (245, 260, 365, 350)),  # at least so much of the image
        ([0, 0, 10, 10], (640, 640), (0, 0, 120, 90)),  # moved inside
        ([600, 600, 640, 640], (640, 640), (480, 520, 640, 640)),
        ([10, 10, 90, 70], (80, 100), (0, 0, 100, 80)),  # never more than the image
        ([-50, -50, 10, 10], (640, 640), (0, 0, 240, 180)),
    ],
)
def test_part_of_an_image(about: list[float] | None, size: tuple[int, int], part: tuple[float, ...]) -> None:
    assert _part(None if about is None else np.array(about), np.array(size)) == part


def test_moved_images_are_blank_and_spoken_of(found: Findings, tmp_path: Path) -> None:
    found.split.paths[0].unlink()
    html = contact_sheet_page(found, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert f"One image cannot be read, such as {found.split.paths[0]}" in html
    assert not tile(found, view("duplicates"), Shown(0, np.array([1]))).readable


def test_comparison_names_the_other(found: Findings, tmp_path: Path) -> None:
    second = changed(found, findings_scene.findings(tmp_path, name="second", rows=findings_scene.ROWS[2:]))
    html = contact_sheet_page(second, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "Compared with first." in html and "AP differs by 0.50" in html and ">Lost objects</h2>" in html


def test_page_of_nothing(tmp_path: Path) -> None:
    empty = Findings(errors(scenes.split_of([], []), Results.concat([])), name="<none>")
    html = contact_sheet_page(empty, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "&lt;none&gt;" in html and html.count("There are none.") == len(VIEWS)
