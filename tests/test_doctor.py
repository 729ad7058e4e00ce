"""The doctor names every problem of a dataset, its file and its remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deimkit.data import doctor as doctor_module
from deimkit.data.dataset import Dataset
from deimkit.data.doctor import Report, doctor
from deimkit.data.problems import _KINDS, SEVERITIES, Problem, problem

SIDE = 64


def noise(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE), **options: Any) -> Path:
    """An image like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def annotate(root: Path, split: str, boxes: list[tuple[int, int, list[float]]], images: int = 3) -> dict[str, Any]:
    """A COCO file for images 1, 2, ... with boxes as (image, category, xywh)."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(1, images + 1)],
        "annotations": [{"id": k, "image_id": i, "category_id": c, "bbox": b} for k, (i, c, b) in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return content


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """A folder with which nothing is wrong: three images in each split, twelve boxes of each class in each."""
    for k, split in enumerate(("train", "val")):
        for i in (1, 2, 3):
            noise(tmp_path / split / f"{i}.png", 10 * k + i)
        boxes = [(1 + j % 3, c, [j * 4.0, c * 8.0, 10.0, 12.0]) for j in range(12) for c in (1, 2)]
        annotate(tmp_path, split, boxes)
    return tmp_path


def found(report: Report) -> list[tuple[str, str, str]]:
    """Severity, kind and file of all but the statistics."""
    return [(p.severity, p.kind, p.file) for p in report.problems if p.severity != "info"]


def test_healthy_dataset(healthy: Path) -> None:
    report = doctor(healthy)
    assert report.ok and found(report) == []
    assert report.summary == "6 images, 48 boxes, 2 classes."
    infos = {p.kind: p.detail for p in report.of("info") if "val" not in p.detail or p.kind == "class"}
    assert infos["class"] == "dog: boxes 12 in train (50.0%), 12 in val (50.0%)"
    assert infos["boxes per image"] == "train: 8.0 boxes an image, at most 8; 0 of 3 images without (0.0%)"
    # 10 x 12 px of 64 are 100 x 120 of 640: sqrt(12000) = 109.5
    assert "train: 100% small, 0% medium, 0% large" in infos["box sizes"] and "is 110 px" in infos["box sizes"]


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(path, 99, (SIDE, SIDE // 2), exif=exif)


# What is done to the image train/1.png, and what the doctor must say about which file.
DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:900]), "error", "unreadable image", "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "error", "unreadable image", "is empty"),
    "text": (lambda p: p.write_text("hello"), "error", "unreadable image", "is not an image"),
    "gone": (lambda p: p.unlink(), "error", "missing file", "does not exist"),
    "larger": (
        lambda p: noise(p, 9, (80, 70)),
        "warning",
        "size differs",
        "is 80 x 70 px; its annotation says 64 x 64",
    ),
    "smaller": (lambda p: noise(p, 9, (40, 40)), "error", "boxes beyond the image", "is 40 x 40 px"),
    "turned": (rotated, "error", "boxes beyond the image", "is 32 x 64 px once its EXIF orientation is applied"),
    "tiny": (lambda p: noise(p, 9, (64, 31)), "warning", "tiny image", "is 64 x 31 px"),
    "in both": (
        lambda p: shutil.copy(p.parent.parent / "val/1.png", p),
        "warning",
        "same image in two splits",
        "of train",
    ),
    "copy": (lambda p: shutil.copy(p, p.parent / "2.png"), "warning", "duplicate image", "is a copy of train/1.png"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_images(case: str, healthy: Path) -> None:
    damage, severity, kind, says = DAMAGE[case]
    damage(healthy / "train" / "1.png")
    report = doctor(healthy)
    (hit,) = [p for p in report.problems if p.kind == kind]
    assert hit.severity == severity and says in hit.detail and hit.remedy
    assert hit.file.endswith(".png") and report.ok == (severity != "error")
    assert hit.file in report.table() and hit.remedy in report.table()


def test_every_problem_is_listed_at_once(healthy: Path) -> None:
    noise(healthy / "train" / "1.png", 9, (70, 70))
    (healthy / "train" / "2.png").write_bytes(b"torn")
    (healthy / "val" / "3.png").unlink()
    boxes = [(3, 1, [1, 1, 5, 5])] * 2 + [(3, 1, [60, 60, 10, 10]), (3, 1, [1, 1, 0, 0]), (3, 7, [1, 1, 5, 5])]
    boxes += [(1, 1, [float("nan"), 1, 5, 5]), (1, 1, [90, 90, 5, 5])]
    annotate(healthy, "train", boxes)
    report = doctor(healthy)
    assert found(report) == [
        ("error", "box not finite", "train/1.png"),
        ("error", "box outside the image", "train/1.png"),
        ("error", "missing file", "val/3.png"),
        ("error", "unknown category", "train/3.png"),
        ("error", "unreadable image", "train/2.png"),
        ("warning", "box sticks out", "train/3.png"),
        ("warning", "box without area", "train/3.png"),
        ("warning", "class without boxes", ""),
        ("warning", "duplicate box", "train/3.png"),
        ("warning", "rare class", ""),
        ("warning", "size differs", "train/1.png"),
    ]
    without = doctor(healthy, pixels=False)
    assert {p.kind for p in report.problems} - {p.kind for p in without.problems} == {
        "unreadable image",
        "size differs",
    }


def test_what_the_doctor_finds_can_be_left_out(healthy: Path) -> None:
    (healthy / "train" / "2.png").write_bytes((healthy / "train" / "2.png").read_bytes()[:500])
    data = Dataset.open(healthy)
    errors = doctor(data).of("error")
    assert data.train is not None and data.val is not None
    assert list(data.train.without(errors).ids) == [1, 3]
    assert list(data.val.without(errors).ids) == [1, 2, 3]  # image 2 of val is another one


def test_train_without_boxes_is_an_error(healthy: Path) -> None:
    annotate(healthy, "train", [])
    report = doctor(healthy)
    assert [p.kind for p in report.of("error")] == ["no boxes"]
    assert [p.detail for p in report.problems if p.kind == "class without boxes"] == [
        "cat has no box in train",
        "dog has no box in train",
    ]


def test_class_not_in_val(healthy: Path) -> None:
    annotate(healthy, "val", [(1, 1, [1, 1, 5, 5])])
    assert [p.detail for p in doctor(healthy).of("warning")] == ["dog has no box in val"]


def test_too_many_boxes_and_huge_images(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [(1, 1 + k % 2, [k % 50 + 0.0, k % 40 + 0.0, 5 + k % 7, 6.0]) for k in range(500)]
    annotate(healthy, "train", boxes)
    monkeypatch.setattr(doctor_module, "HUGE", SIDE * SIDE - 1)
    report = doctor(healthy)
    assert "has 500 boxes, more than the 300 queries" in next(
        p.detail for p in report.problems if p.kind == "too many boxes"
    )
    assert sum(p.kind == "huge image" for p in report.problems) == 6


def test_what_cannot_be_opened_is_a_report(tmp_path: Path) -> None:
    report = doctor(tmp_path / "nothing")
    assert not report.ok and len(report.problems) == 1
    assert "nothing does not exist; expected a dataset" in report.table()


def test_table_fits_and_counts(healthy: Path) -> None:
    boxes = [(1, 9, [1.0, 1.0, 5.0, 5.0])] * 25
    annotate(healthy, "train", boxes)
    report = doctor(healthy)
    short, long = report.table(), report.table(limit=None)
    assert max(map(len, long.splitlines())) <= 120
    assert "error: unknown category (25)" in short and "... and 15 more" in short
    assert len(long.splitlines()) == len(short.splitlines()) + 14 and "more" not in long
    assert repr(report) == short


def test_json(healthy: Path) -> None:
    content = json.loads(doctor(healthy).to_json())
    assert content["ok"] is True and content["summary"].startswith("6 images")
    assert set(content["problems"][0]) == {"severity", "kind", "file", "detail", "remedy", "image", "split"}


@pytest.mark.parametrize("kind", _KINDS)
def test_kinds_are_well_formed(kind: str) -> None:
    made = problem(kind, "a.png", "is so")
    assert made.severity in SEVERITIES and not made.remedy.endswith(".")
    assert (made.severity == "info") <= (made.remedy == "")
    assert str(made).startswith("a.png: is so.")


def test_problem_reads_as_sentences() -> None:
    assert str(Problem("error", "k", "a.png", "is torn", "Copy it again")) == "a.png: is torn. Copy it again."
    assert str(Problem("info", "k", "", "all is well")) == "all is well."


def test_real_datasets_are_healthy(shared: Path) -> None:
    report = doctor(shared / "data" / "bccd")
    assert report.ok and found(report) == []
    assert report.summary == "364 images, 4,886 boxes, 3 classes."
