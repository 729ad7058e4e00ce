"""The embedded dataset: the same everywhere, written whole or not at all, its boxes where its objects are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from deimkit.data.dataset import Dataset
from deimkit.data.doctor import doctor
from deimkit.data.images import read_image
from deimkit.data.scenes import SHAPES, Thing, _Canvas, _Dice, _plain
from deimkit.data.synthetic import CLASSES, VERSION, Synthetic
from deimkit.errors import DataError


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_pixels_are_pinned() -> None:
    """If this changes, VERSION must count up: stored datasets and published numbers belong to these pixels."""
    scene = Synthetic().scene("train", 0)
    assert VERSION == 2
    assert sha(scene.image) == "1f50e1355c591b7a1b3f7db1e75970e1ff2f0d4fd29fa072cd543c0270d16504"
    assert scene.boxes[0].tolist() == [95, 131, 141, 177] and len(scene.boxes) == 9


def test_scenes_depend_on_seed_split_and_index_only() -> None:
    small = Synthetic(train=1, val=1, size=64)
    scenes = [small.scene("train", 0), small.scene("train", 1), small.scene("val", 0)]
    scenes.append(Synthetic(size=64, seed=1).scene("train", 0))
    assert len({sha(scene.image) for scene in scenes}) == 4
    assert sha(Synthetic(train=9, val=9, size=64).scene("train", 1).image) == sha(scenes[1].image)


def test_dice_are_uniform() -> None:
    dice = _Dice(1, 2, 3)
    values = np.array([dice.uniform(2, 4) for _ in range(4000)])
    assert values.min() >= 2 and values.max() < 4 and abs(values.mean() - 3) < 0.05
    field = dice.field(100, 40)
    assert field.dtype == np.float32 and field.min() >= 0 and field.max() < 1 and abs(field.mean() - 0.5) < 0.02
    assert {dice.below(5) for _ in range(200)} == set(range(5))


# Area of each shape in units of its radius squared.
AREAS = {
    "disc": np.pi,
    "ring": np.pi * 0.7,
    "triangle": 1.299,
    "square": 2.0,
    "star": 1.123,
    "cross": 1.92,
    "gear": None,
    "crescent": None,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_lie_in_their_circle(name: str) -> None:
    axis = ((np.arange(500) + 0.5) / 250 - 1).astype(np.float32) * np.float32(1.2)
    x, y = np.meshgrid(axis, axis)
    inside = SHAPES[name](x, y)
    assert not (inside & (x * x + y * y > 1.05**2)).any()  # the patch that a thing is painted in
    area = float(inside.mean()) * 2.4**2
    assert area == pytest.approx(AREAS[name], rel=0.02) if AREAS[name] else 0.8 < area < 2.5


def test_objects_are_varied() -> None:
    scenes = [Synthetic().scene("train", i) for i in range(40)]
    counts = np.array([len(scene.boxes) for scene in scenes])
    boxes = np.concatenate([scene.boxes for scene in scenes])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    assert counts.min() == 0 and 20 <= counts.max() <= 25  # the emptiest shows nothing at all
    assert sides.min() < 10 and sides.max() > 55 and (sides < 32).mean() > 0.4
    assert set(np.concatenate([scene.labels for scene in scenes]).tolist()) == set(range(len(CLASSES)))
    for scene in scenes:
        assert scene.image.shape == (192, 192, 3) and scene.image.dtype == np.uint8
        assert (scene.boxes >= 0).all() and (scene.boxes <= 192).all()
        assert ((scene.boxes[:, 2:] - scene.boxes[:, :2]) >= 4).all()
        assert (scene.areas <= (scene.boxes[:, 2:] - scene.boxes[:, :2]).prod(1)).all()


def test_boxes_are_tight_around_what_shows() -> None:
    """Painted alone on a black ground, an object is exactly what its box says, also where the image cuts it off."""
    for x, y in ((30.0, 30.0), (2.0, 25.0), (58.5, 59.5)):
        canvas = _Canvas(np.zeros((60, 60, 3), np.float32), light=(0.0, 0.0))
        white = np.ones(3, np.float32)
        thing = Thing(SHAPES["gear"], 7, x, y, 12.0, 0.1, 0.9, (white, white), _plain, 1.0)
        whole = canvas.paint(thing, 0, _Dice(0))
        rows, cols = np.nonzero(canvas.pixels.max(2) >= 0.5)
        boxes, labels, areas = canvas.objects([thing], [whole])
        if len(rows) < 0.25 * whole:
            assert boxes == []
        else:
            assert boxes == [[cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]]
            assert labels == [7] and areas[0] <= len(rows) and whole >= areas[0]


def test_hidden_objects_have_no_box() -> None:
    white = np.ones(3, np.float32)
    canvas = _Canvas(np.zeros((60, 60, 3), np.float32), light=(0.0, 0.0))
    small, large = (Thing(SHAPES["disc"], 0, 30, 30, r, 0, 1, (white, white), _plain, 1.0) for r in (8.0, 20.0))
    areas = [canvas.paint(thing, k, _Dice(0)) for k, thing in enumerate((small, large))]
    assert canvas.objects([small, large], areas)[0] == [[10, 10, 50, 50]]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"classes": ("disc", "cube")}, "some of disc, .*; got cube"),
        ({"classes": ()}, "got none"),
        ({"train": 0}, "train >= 1"),
        ({"size": 16}, "size >= 32"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_impossible_wishes(options: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Synthetic(**options)  # type: ignore[arg-type]


def test_written_dataset_is_what_was_drawn(tmp_path: Path) -> None:
    wish = Synthetic(train=6, val=3, size=96, seed=4, classes=("star", "ring"))
    folder = wish.write(tmp_path / "deep" / "set")
    data = Dataset.open(folder)
    assert data.categories.ids == (1, 2) and data.categories.names == ("star", "ring")
    assert data.train is not None and data.val is not None and (len(data.train), len(data.val)) == (6, 3)
    for i in range(6):
        scene = wish.scene("train", i)
        assert np.array_equal(read_image(data.train.paths[i]), scene.image)
        assert np.array_equal(data.train.boxes[data.train.rows(i)], scene.boxes)
        assert np.array_equal(data.train.labels[data.train.rows(i)], scene.labels)
        assert np.array_equal(data.train.areas[data.train.rows(i)], scene.areas)
    assert doctor(data).ok and data.notes == () and data.problems == []


def test_writing_again_keeps_and_another_is_refused(tmp_path: Path) -> None:
    folder = Synthetic(train=1, val=1, size=32).write(tmp_path / "set")
    stamp = (folder / "train" / "00000.png").stat().st_mtime_ns
    Synthetic(train=1, val=1, size=32).write(folder)
    assert (folder / "train" / "00000.png").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"must be free or hold Synthetic\(train=2.*it holds Synthetic\(train=1"):
        Synthetic(train=2, val=1, size=32).write(folder)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="something else"):
        Synthetic(train=2, val=1, size=32).write(tmp_path / "mine")


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        Synthetic(train=1, val=1, size=32).write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the folder taken, and keeps what is there."""
    wish, rename = Synthetic(train=1, val=1, size=32), os.rename

    def late(draft: Path, folder: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        wish.write(folder)
        rename(draft, folder)

    monkeypatch.setattr(os, "rename", late)
    assert len(Dataset.open(wish.write(tmp_path / "set")).splits) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_open_synthetic_draws_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Synthetic(train=2, val=1, size=32)
    monkeypatch.setattr("deimkit.data.dataset.Synthetic", lambda: small)
    first, again = (Dataset.open("synthetic", root=tmp_path / "data") for _ in range(2))
    assert first.name == again.name == "synthetic" and first.train is not None and len(first.train) == 2
    assert first.root == tmp_path / "data" / f"synthetic-{VERSION}"
    assert again.train is not None and again.train.paths == first.train.paths
    assert len(Dataset.open(first.source).splits) == 2
