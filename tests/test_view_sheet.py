"""A view as one picture: the same images, boxes and words as on the contact sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from deimkit.explore.tiles import COLOURS, caption
from deimkit.explore.view_sheet import draw_view
from deimkit.explore.views import Condition, View, views_of
from tests.findings_scene import findings


@pytest.mark.parametrize("number", range(8))
def test_it_shows_the_images_of_the_view(tmp_path: Path, number: int) -> None:
    found = findings(tmp_path)
    view = views_of(found)[number]
    chosen = view.select(found, 2)
    figure = draw_view(found, view, most=2)
    captions = [caption(found, view, shown).split() for shown in chosen]
    assert [ax.get_title("left").split() for ax in figure.axes] == captions
    assert view.words in figure.words()


def _view(found: object, name: str) -> View:
    return next(view for view in views_of(found) if view.name == name)  # type: ignore[arg-type]


def test_colours_are_verdicts_and_what_it_is_about_is_thick(tmp_path: Path) -> None:
    found = findings(tmp_path)
    (ax,) = draw_view(found, _view(found, "duplicates")).axes
    looks = {(to_hex(p.get_edgecolor()), p.get_linewidth() > 2) for p in ax.patches}
    assert looks == {("#ffffff", False), (COLOURS["right"].lower(), False), (COLOURS["duplicate"].lower(), True)}


def test_a_view_without_images_says_so(tmp_path: Path) -> None:
    found = findings(tmp_path)
    empty = View("none", "Nothing at all.", "images", (Condition("ap", "<", (-1,)),), "ap")
    assert "There are none." in draw_view(found, empty).words()
