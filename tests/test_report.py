"""The report of a run stands alone, survives whatever is missing, and says in words what it shows."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from deimkit.data.dataset import CategoryMap
from deimkit.data.split import Split
from deimkit.evaluation import report
from deimkit.evaluation.report import best_and_worst, quality, write_report
from deimkit.explore.curves import draw_ap, draw_losses, draw_timeline, loss_kinds, thin, when
from deimkit.structures import Detections
from deimkit.training.timeline import StepDecay, Timeline

CLOCK = Timeline().scaled_to(10, 20)
SECTIONS = ["Accuracy", "Learning", "Timeline", "Classes", "Images", "What happened", "Environment", "Recipe"]


# ---------------------------------------------------------------------------------------------------- a run


def step_rows(epochs: int, steps: int = 20) -> list[dict[str, Any]]:
    """Rows as the trainer writes them after every step: two kinds of loss on two outputs, falling from 4 to 0."""
    rows = []
    for k in range(epochs * steps):
        left = 1 - k / (epochs * steps)
        terms = {"mal/final": 2 * left, "mal/layer0": 1 * left, "l1/final": 0.5 * left, "l1/layer0": 0.5 * left}
        row = {"epoch": k // steps, "step": k % steps, "loss": 4 * left, "images_per_s": 10.0, "memory_mib": 512.0}
        rows.append({"kind": "step", **row, "terms": terms})
    return rows


def epoch_rows(aps: list[float]) -> list[dict[str, Any]]:
    """Rows as the trainer writes them after every evaluated epoch; no small object is in the data."""
    names = dict.fromkeys(report.NUMBERS, 0.5) | {"APs": math.nan, "ARs": -1.0}
    classes = {"cell": {"AP": 0.25, "AP50": 0.5, "count": 9}, "<b>&": {"AP": math.nan, "AP50": math.nan, "count": 0}}
    return [
        {"kind": "epoch", "epoch": epoch, **names, "AP": ap, "AP50": ap + 0.1, "per_class": classes}
        for epoch, ap in enumerate(aps)
    ]


EVENTS = [
    {
        "event": "started",
        "time": "2025-01-02T03:04:05",
        "device": "cpu",
        "precision": "float32",
        "machine": "x86_64, 2 cores",
        "versions": {"torch": "2.15.0"},
        "images": 205,
        "skipped": [],
    },
    {"event": "skipped", "why": "<script>alert(1)</script>", "images": [f"{i}.jpg" for i in range(9)]},
    {"event": "finished", "epoch": 10, "AP": 0.6},
]


def write_run(folder: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]], recipe: str = "") -> Path:
    """A run folder with those files that have something in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if recipe:
        (folder / "recipe.py").write_text(recipe)
    return folder


def png() -> bytes:
    """A small picture file."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    return file.getvalue()


class Page(HTMLParser):
    """What a reader, a screen reader and a browser find in a page."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> Page:
    """The page, which must be well-formed and need nothing from elsewhere."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open, f"never closed: {page.open}"
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id names two things"
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in page.all("svg"))
    return page


# ----------------------------------------------------------------------------------------------------- the page


def test_a_whole_run(tmp_path: Path) -> None:
    rows = step_rows(10) + epoch_rows([0.1 * k for k in range(1, 7)] + [0.5] * 4)
    folder = write_run(tmp_path / "cells", rows, EVENTS, recipe="Recipe(name='<tiny>')")
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    path = write_report(folder, [("best: <a>.png", png()), ("worst: b.png", figure)], CLOCK)
    assert path == folder / "report.html" and not list(folder.glob(".*"))
    page = read(path)
    text = " ".join(page.text)
    headings = [page.text[i] for i in range(len(page.text)) if page.text[i] in SECTIONS]
    assert list(dict.fromkeys(headings)) == SECTIONS
    assert "finished" in text and "10 epochs, 200 steps. Best AP 60.0 % after epoch 6." in text
    for words in ("best (epoch 6)", "last (epoch 10)", "cell", "25.0", "x86_64, 2 cores", "Recipe(name='<tiny>')"):
        assert words in text
    assert "<script>alert(1)</script>" in text and "<b>&" in text  # shown, not obeyed
    assert "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg and 3 more" in text
    assert [image["src"][:16] for image in page.all("img")] == ["data:image/png;b", "data:image/webp;"]  # type: ignore[index]
    assert len(page.all("svg")) == 3


PARTS: dict[str, dict[str, Any]] = {
    "steps": {"rows": step_rows(3)},
    "epochs": {"rows": epoch_rows([0.1, 0.2])},
    "events": {"events": EVENTS},
    "recipe": {"recipe": "Recipe()"},
    "timeline": {"timeline": CLOCK},
}


@pytest.mark.parametrize("present", [c for n in range(6) for c in itertools.combinations(PARTS, n)], ids="+".join)
def test_whatever_is_missing_is_left_out(tmp_path: Path, present: tuple[str, ...]) -> None:
    given: dict[str, Any] = {"rows": [], "events": [], "recipe": "", "timeline": None}
    for name in present:
        for key, value in PARTS[name].items():
            given[key] = given[key] + value if key == "rows" else value
    folder = write_run(tmp_path, given["rows"], given["events"], given["recipe"])
    page = read(write_report(folder, timeline=given["timeline"]))
    expected = {
        "Accuracy": "epochs" in present,
        "Learning": "steps" in present or "epochs" in present,
        "Timeline": "timeline" in present,
        "Classes": "epochs" in present,
        "Images": False,
        "What happened": "events" in present,
        "Environment": "events" in present or "steps" in present,
        "Recipe": "recipe" in present,
    }
    assert {title: title in page.text for title in SECTIONS} == expected


@pytest.mark.parametrize(
    "events, rows, state",
    [
        ([], [], "not started"),
        ([{"event": "started"}], step_rows(1), "under way"),
        ([{"event": "started"}, {"event": "stopped"}], step_rows(1), "stopped"),
        ([{"event": "stopped"}, {"event": "resumed"}, {"event": "finished"}], step_rows(1), "finished"),
        ([{"event": "early_stop"}], [], "finished early"),
        ([{"event": "started"}, {"event": "failed", "why": "The disk is full."}], [], "failed"),
    ],
)
def test_the_headline_says_how_it_went(
    tmp_path: Path, events: list[dict[str, Any]], rows: list[dict[str, Any]], state: str
) -> None:
    text = read(write_report(write_run(tmp_path, rows, events))).text
    assert state in text
    assert any("The disk is full." in part for part in text) == (state == "failed")


def test_a_line_cut_short_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    rows = step_rows(2)
    rows[3] |= {"loss": math.nan, "terms": {}}
    rows[4]["terms"]["mal/final"] = math.inf
    folder = write_run(tmp_path, rows + epoch_rows([math.nan]), EVENTS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "epo')
    assert "–" in read(write_report(folder)).text


def test_a_report_is_written_anew(tmp_path: Path) -> None:
    folder = write_run(tmp_path, epoch_rows([0.1]), [])
    first = write_report(folder).read_text()
    assert write_report(folder).read_text() == first
    write_run(tmp_path, epoch_rows([0.1, 0.7]), [])
    assert "70.0" in write_report(folder).read_text()


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, step_rows(50, steps=400), [])
    assert write_report(folder, timeline=CLOCK).stat().st_size < 200_000


# ---------------------------------------------------------------------------------------------------- the images


def detections(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Detections:
    """Detections in an image of 10 x 10 pixels."""
    n = len(labels)
    return Detections(
        torch.tensor(boxes).reshape(n, 4),
        torch.tensor(scores or [0.9] * n),
        torch.tensor(labels, dtype=torch.long),
        [f"class {label}" for label in labels],
        (10, 10),
        np.zeros((10, 10, 3), np.uint8),
        labels,
    )


A, B, HALF_A = [0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 9.0, 9.0], [0.0, 0.0, 4.0, 3.0]


@pytest.mark.parametrize(
    "found, truth, expected",
    [
        (([A, B], [0, 1]), ([A, B], [0, 1]), 1.0),
        (([B, A], [1, 0]), ([A, B], [0, 1]), 1.0),
        (([A, B], [1, 1]), ([A, B], [0, 1]), 0.5),  # one of the wrong class
        (([HALF_A, B], [0, 1]), ([A, B], [0, 1]), 0.875),  # IoU 0.75 and 1
        (([A, A, B], [0, 0, 1]), ([A, B], [0, 1]), 0.5),  # a duplicate pushes the second object out of the first two
        (([B], [0]), ([A], [0]), 0.0),
        (([], []), ([A], [0]), 0.0),
        (([A], [0]), ([], []), 1.0),
        (([], []), ([], []), 1.0),
    ],
)
def test_quality_by_hand(found: Any, truth: Any, expected: float) -> None:
    truth = detections(*truth)
    assert quality(detections(*found), truth.boxes, truth.labels) == pytest.approx(expected)


def some_split(folder: Path, images: int) -> Split:
    """A split of black images with one object each, but the last without any and the one before with a crowd only."""
    paths = [folder / f"{i}.png" for i in range(images)]
    for path in paths:
        Image.new("RGB", (10, 10)).save(path)
    starts = np.minimum(np.arange(images + 1), images - 1)
    rows = images - 1
    return Split(
        name="val",
        categories=CategoryMap.of(["cell"]),
        ids=list(range(images)),
        paths=paths,
        sizes=np.full((images, 2), 10, np.int32),
        boxes=np.tile(np.array([A], np.float32), (rows, 1)),
        labels=np.zeros(rows, np.int64),
        crowd=np.arange(rows) == rows - 1,
        areas=np.full(rows, 16.0),
        starts=starts.astype(np.int64),
        annotation_ids=np.arange(rows),
    )


def test_best_and_worst_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images with an object; what is found in image k covers it the worse the larger k is."""
    split = some_split(tmp_path, 8)
    seen: list[Any] = []

    def predict(detector: Any, pictures: list[Any], threshold: float, batch: int) -> list[Detections]:
        first = len(seen)
        seen.extend(pictures)
        return [detections([[0, 0, 4, 4 - 0.2 * (first + k)], B], [0, 0], [0.9, 0.1]) for k in range(len(pictures))]

    monkeypatch.setattr("deimkit.models.predict.predict", predict)
    shown = best_and_worst(None, split, count=2, batch=4)  # type: ignore[arg-type]
    assert len(seen) == 6
    assert [title for title, _ in shown] == [
        "best: 0.png, 100 % covered",
        "best: 1.png, 95 % covered",
        "worst: 4.png, 80 % covered",
        "worst: 5.png, 75 % covered",
    ]
    assert "data:image/webp" in write_report(tmp_path, shown).read_text()
    assert best_and_worst(None, split.take([6, 7])) == []  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the curves


def test_kinds_of_loss_add_up() -> None:
    rows = step_rows(2)
    kinds = loss_kinds(rows)
    assert list(kinds) == ["mal", "l1"]
    np.testing.assert_allclose(sum(kinds.values()), [row["loss"] for row in rows])
    assert loss_kinds([]) == {}


def test_time_in_epochs() -> None:
    np.testing.assert_allclose(when(step_rows(2, steps=4)), np.arange(8) / 4)
    assert len(when([])) == 0


def test_thinning_keeps_the_mean() -> None:
    x, y = np.arange(1000.0), np.arange(1000.0) ** 2
    mx, my = thin(x, y, points=10)
    assert len(mx) == 10
    assert (mx.mean(), my.mean()) == (pytest.approx(x.mean()), pytest.approx(y.mean()))
    short = thin(x[:3], np.array([1.0, math.nan, 2.0]))
    np.testing.assert_array_equal(short, [[0, 2], [1, 2]])


def test_curves_draw_what_they_are_given() -> None:
    ax = draw_losses(step_rows(2))
    np.testing.assert_allclose(ax.lines[0].get_ydata()[0], 3.0)
    assert [text.get_text() for text in ax.texts] == ["l1", "mal"]
    ap = draw_ap(epoch_rows([0.1, 0.4, 0.3]), timeline=CLOCK)
    np.testing.assert_allclose(ap.lines[1].get_ydata(), [10, 40, 30])
    np.testing.assert_allclose(ap.lines[3].get_xydata(), [[2, 40]])  # the ring
    for empty in (draw_losses([]), draw_ap([])):
        assert [text.get_text() for text in empty.texts] == ["nothing yet"]


@pytest.mark.parametrize(
    "clock",
    [
        Timeline(),
        replace(Timeline(), multi_scale_until=0),
        Timeline(0, 0, 72, 80, lr=StepDecay()),
        Timeline(0, 0, 12, 12, lr=StepDecay(0, (11,))),
        Timeline().scaled_to(1, 1),
    ],
)
def test_timeline_is_drawn(clock: Timeline) -> None:
    ax = draw_timeline(clock, epoch=clock.total / 2)
    x, y = ax.lines[0].get_data()
    assert (x[0], y[0]) == (0, clock.lr_factor(0))
    assert y[-1] == clock.lr_factor(clock.steps - 1)
    tracks = {event.track for event in clock.events()} - {"learning rate"}
    assert {label.get_text() for label in ax.get_yticklabels()} == {"0", "½", "1"} | tracks
    assert any(text.get_text() == "you are here" for text in ax.texts)


def test_curves_go_where_they_are_told() -> None:
    axes = Figure().subplots(3)
    assert draw_timeline(CLOCK, axes[0]) is axes[0]
    assert draw_losses(step_rows(1), axes[1]) is axes[1]
    assert draw_ap(epoch_rows([0.1]), axes[2]) is axes[2]
