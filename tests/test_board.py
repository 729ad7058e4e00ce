"""The board says what the folder says, reads only what is new, and never leaves an error unheard."""

from __future__ import annotations

import gc
import io
import json
import math
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deimkit as dk
from deimkit.data.dataset import Dataset
from deimkit.data.synthetic import Synthetic
from deimkit.errors import CheckpointError, DataError, DeimkitError
from deimkit.explore import board_live, board_page, samples, tail
from deimkit.explore.board import Board, names
from deimkit.explore.board_live import Live, Watch
from deimkit.explore.board_page import Page, facts
from deimkit.explore.frame import VIEW
from deimkit.explore.snapshot import Reader, pace, seconds_left
from deimkit.explore.story import in_words, last_words, state_of
from deimkit.explore.tail import Means, Sample, Tail
from deimkit.training import checkpoint
from deimkit.training.claim import Claim
from deimkit.training.optim import EMA
from deimkit.training.run import Plan, Run, append, keep_rows
from deimkit.training.timeline import Timeline
from deimkit.weights.classes import COCO_NAMES

RECIPE = dk.recipes.get("tiny").fit_to(40, epochs=10, batch=4)  # 10 epochs of 10 steps
CLAIMED = dk.recipes.get("deim_dfine_n").fit_to(320, epochs=10, batch=32)


# ---------------------------------------------------------------------------------------------------- a run


def step(epoch: int, k: int, loss: float = 3.0, **more: Any) -> dict[str, Any]:
    """A row as the trainer writes it after a step: two kinds of loss on two outputs."""
    terms = {"mal/final": loss / 2, "mal/layer0": loss / 4, "l1/final": loss / 8, "l1/layer0": loss / 8}
    times = {"images_per_s": 4.0, "wait_s": 0.25, "step_s": 0.75, "memory_mib": 512.0}
    return {"kind": "step", "epoch": epoch, "step": k, "loss": loss, "lr": 1e-3} | times | {"terms": terms} | more


def evaluated(epoch: int, ap: float | None, classes: tuple[str, ...] = ("cell", "dog")) -> dict[str, Any]:
    """A row as the trainer writes it after an evaluation."""
    per_class = {name: {"AP": ap, "AP50": ap, "count": 3} for name in classes}
    numbers = {"AP": ap, "AP50": ap, "AP75": ap, "per_class": per_class}
    return {"kind": "epoch", "epoch": epoch, "train_s": 10.0, "evaluate_s": 2.0} | numbers


def write(path: Path, *rows: dict[str, Any]) -> None:
    for row in rows:
        append(path, row)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was launched and has not begun."""
    return make(tmp_path / "demo")


def make(folder: Path, recipe: Any = RECIPE, **plan: Any) -> Path:
    folder.mkdir()
    (folder / "recipe.py").write_text(dk.recipes.to_python(recipe))
    Plan(**({"data": "synthetic"} | plan)).write(folder)
    return folder


def train(folder: Path, epochs: int, ap: float = 0.2) -> None:
    """Write the rows of so many whole epochs; the AP grows by `ap` with each."""
    for epoch in range(epochs):
        write(folder / "metrics.jsonl", *(step(epoch, k, 3 - epoch) for k in range(10)), evaluated(epoch, ap * epoch))


def event(folder: Path, name: str, **facts: Any) -> None:
    write(folder / "events.jsonl", {"event": name, "time": "2026-01-02T03:04:05", **facts})


# ---------------------------------------------------------------------------------------------- reading rows


def test_rows_come_once_and_a_half_written_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    log = Tail(path)
    assert list(log.rows()) == []  # no file yet
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(log.rows()) == [{"a": 1}, {"a": 2}]
    assert list(log.rows()) == []
    with open(path, "a") as file:
        file.write(': 3}\n\n[4]\n{"a": bad}\n{"a": 5}\n')  # and what is no row is passed over
    assert list(log.rows()) == [{"a": 3}, {"a": 5}]
    assert log.offset == path.stat().st_size


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 1000)
    parsed: list[bytes] = []
    monkeypatch.setattr(tail, "_row", lambda line: parsed.append(line))
    log = Tail(path)
    monkeypatch.setattr(Tail, "CHUNK", 100)  # lines that lie across two chunks
    list(log.rows())
    assert parsed.count(b'{"a": 1}') == 1000
    parsed.clear()
    write(path, {"a": 2})
    list(log.rows())
    assert parsed == [b'{"a": 2}']


@pytest.mark.parametrize(
    "after",
    [
        [{"a": 0}],  # cut off
        [{"a": 0}, {"a": 1}, {"a": 7}],  # as long as before
        [{"a": 0}, {"a": 7}, {"a": 8}, {"a": 9}],  # cut off, and longer again before anyone looked
        [],
    ],
)
def test_a_file_that_was_rewritten_is_read_again(tmp_path: Path, after: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, *({"a": k} for k in range(3)))
    log, calls = Tail(path), []
    assert len(list(log.rows(lambda: calls.append("again")))) == 3 and not calls
    path.write_text("".join(json.dumps(row) + "\n" for row in after))
    assert list(log.rows(lambda: calls.append("again"))) == after and calls == ["again"]


def test_a_file_that_vanishes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, {"a": 0}, {"a": 1})
    log, calls = Tail(path), []
    list(log.rows())
    path.unlink()
    assert list(log.rows(lambda: calls.append("again"))) == [] and not calls
    write(path, {"a": 2})
    assert list(log.rows(lambda: calls.append("again"))) == [{"a": 2}] and calls


def test_of_very_many_rows_some_steps_are_passed_over_but_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    for epoch in range(10):
        write(path, *(step(epoch, k) for k in range(30)), evaluated(epoch, 0.5))
    monkeypatch.setattr(Tail, "MUCH", path.stat().st_size // 5)
    log = Tail(path)
    kinds = [row["kind"] for row in log.rows()]
    assert kinds.count("epoch") == 10 and 40 <= kinds.count("step") <= 60
    write(path, step(10, 0), step(10, 1))
    assert len(list(log.rows())) == 2  # what comes after is looked at row by row


def test_means_by_hand() -> None:
    table = Means(points=2)
    for value in (1, 3, 5, 7, 9):  # the fifth row halves the table: (1, 3), (5, 7), (9)
        table.add({"a": value, "b": None if value == 1 else value, "name": "x"})
    assert table.per == 2 and table.length == 3
    assert table.column("a").tolist() == [2, 6, 9]
    assert table.column("b").tolist() == [3, 6, 9]
    table.add({"terms/late": 4.0})
    assert np.array_equal(table.column("terms/late"), [math.nan, math.nan, 4.0], equal_nan=True)
    assert table.names("terms/") == ["late"] and np.isnan(table.column("nothing")).all()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000])
def test_means_are_those_of_equal_parts(count: int) -> None:
    table, values = Means(points=4), np.random.default_rng(count).normal(size=count)
    for value in values:
        table.add({"a": float(value)})
    whole = [values[i : i + table.per].mean() for i in range(0, count, table.per)]
    assert table.column("a") == pytest.approx(np.array(whole)) and table.length <= 8


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 100])
def test_a_sample_is_evenly_spread(count: int) -> None:
    sample = Sample(most=4)
    for k in range(count):
        sample.add({"k": k})
    kept = [row["k"] for row in sample.rows]
    assert len(kept) == min(count, len(kept)) <= 4 and kept[:1] == [0][:count]
    assert len(set(np.diff(kept).tolist())) <= 1 and (count <= 4) == (len(kept) == count)
    assert count - (kept[-1] if kept else 0) <= max(count / 2, 1)


# ---------------------------------------------------------------------------------------------- pace and time


@pytest.mark.parametrize(
    "rows, seconds, waiting",
    [
        ([], math.nan, math.nan),
        ([{"wait_s": 1.0, "step_s": 3.0}], 4.0, 0.25),
        ([{"wait_s": 1.0, "step_s": 3.0}, {"wait_s": 0.0, "step_s": 2.0}], 3.0, 1 / 6),
        ([{"wait_s": 0.0, "step_s": 1.0}] * 10 + [{"wait_s": 0.0, "step_s": 99.0}], 1.0, 0.0),  # it compiled
        ([{"images_per_s": 8.0}], 0.5, math.nan),  # from before waiting was recorded; batches of 4
        ([{"images_per_s": None}], math.nan, math.nan),
        ([{"wait_s": None, "step_s": 1.0, "images_per_s": 4.0}], 1.0, math.nan),
    ],
)
def test_pace(rows: list[dict[str, Any]], seconds: float, waiting: float) -> None:
    assert pace(rows, batch=4.0) == pytest.approx((seconds, waiting), nan_ok=True)


@pytest.mark.parametrize(
    "done, every, evaluated_, seconds",
    [
        (0.0, 1, 0, 100 * 2 + 10 * 7),
        (2.5, 1, 2, 75 * 2 + 8 * 7),
        (3.0, 1, 3, 70 * 2 + 7 * 7),
        (3.0, 1, 2, 70 * 2 + 8 * 7),  # the third evaluation is under way
        (0.0, 4, 0, 100 * 2 + 3 * 7),  # after epochs 4, 8 and the last
        (10.0, 1, 10, 0),
        (11.0, 1, 11, 0),
    ],
)
def test_seconds_left(done: float, every: int, evaluated_: int, seconds: float) -> None:
    assert seconds_left(Timeline().scaled_to(10, 10), done, 2.0, 7.0, every, evaluated_) == pytest.approx(seconds)


# ---------------------------------------------------------------------------------------------- the story


@pytest.mark.parametrize(
    "event, alive, asked, state",
    [
        ("new", False, False, "not started"),
        ("new", True, False, "starting"),
        ("launched", True, False, "starting"),
        ("started", True, False, "training"),
        ("resumed", True, False, "training"),
        ("skipped", True, False, "training"),
        ("something new", True, False, "training"),
        ("started", True, True, "stopping"),
        ("started", False, False, "died"),
        ("launched", False, True, "died"),
        ("stopped", False, False, "stopped"),
        ("stopped", True, False, "starting"),  # resumed in this very moment
        ("failed", False, False, "failed"),
        ("finished", True, False, "finished"),  # its report is being written
        ("early_stop", False, False, "finished"),
    ],
)
def test_state(event: str, alive: bool, asked: bool, state: str) -> None:
    assert state_of(event, alive, asked) == state and state in board_page.MARKS


@pytest.mark.parametrize(
    "row, words",
    [
        ({"event": "started", "device": "cuda", "precision": "bfloat16", "images": {"train": 205}}, "205 images"),
        ({"event": "started"}, "Training began on ?"),
        ({"event": "stopped", "epoch": 2, "step": 7}, "epoch 3, after 7 of its steps; resume"),
        ({"event": "finished", "AP": 0.456, "best_epoch": 8}, "Best AP 45.6 % after epoch 9."),
        ({"event": "finished", "AP": None, "best_epoch": -1}, "Finished."),
        ({"event": "failed", "why": "no space", "rank": 3}, "Failed in process 3: no space"),
        ({"event": "skipped", "epoch": 0, "step": 4, "why": "inf"}, "Skipped step 4 of epoch 1: inf"),
        ({"event": "worker_lost", "time": "now", "rank": 1}, "Worker lost: rank 1."),
        ({}, "Something."),
    ],
)
def test_events_in_words(row: dict[str, Any], words: str) -> None:
    assert words in in_words(row)


TRACE = "Traceback (most recent call last):\n  File x\nValueError: bad"


@pytest.mark.parametrize(
    "logs, words",
    [
        ({}, ""),
        ({"log.txt": "one\ntwo\n"}, "one\ntwo"),
        ({"log.txt": "\x1b[31mred\x1b[0m\nstep 1\rstep 2\rstep 3\r\n"}, "red\nstep 3"),
        ({"log.txt": f"before\n{TRACE}\n"}, TRACE),
        ({"log.txt": "lost a worker", "ranks/0.log": "fine", "ranks/1/out.log": TRACE}, f"ranks/1/out.log:\n{TRACE}"),
        ({"ranks/0.log": "fine", "log.txt": TRACE}, TRACE),
        ({"log.txt": "\n".join(map(str, range(100)))}, "\n".join(map(str, range(60, 100)))),
        ({"log.txt": "x" * 100_000 + "\nend"}, "x" * (32_768 - 4) + "\nend"),
    ],
)
def test_last_words(tmp_path: Path, logs: dict[str, str], words: str) -> None:
    for name, text in logs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert last_words(tmp_path) == words


# ---------------------------------------------------------------------------------------------- snapshots


def test_numbers_of_a_run_by_hand(folder: Path) -> None:
    event(folder, "started", epoch=0, step=0)
    train(folder, 2)
    write(folder / "metrics.jsonl", step(2, 0, 1.0), step(2, 1, 0.5, lr=5e-4, memory_mib=700.0))
    with Claim(folder):
        s = Reader(Run(folder)).read()
    assert (s.name, s.recipe, s.state, s.stage) == ("demo", "tiny", "training", RECIPE.timeline.stage(2))
    assert s.pid is not None and s.done == pytest.approx(2.2) and s.loss == 0.5 and s.lr == 5e-4
    assert s.images_per_s == pytest.approx(4.0) and s.waiting == pytest.approx(0.25) and s.memory_mib == 700.0
    assert s.epoch_s == 12.0 and s.left_s == pytest.approx(78 * 1.0 + 8 * 2.0)  # steps, evaluations
    assert s.best is not None and s.best["epoch"] == 1 and [row["AP"] for row in s.epochs] == [0.0, 0.2]
    assert list(s.losses) == ["mal", "l1"]  # the larger first
    assert s.losses["mal"].tolist() == pytest.approx([0.75 * 3] * 10 + [0.75 * 2] * 10 + [0.75, 0.375])
    assert s.total[-2:].tolist() == [1.0, 0.5] and s.x[[0, 10, 21]].tolist() == pytest.approx([0, 1, 2.1])
    assert facts(s)["epoch"].startswith("3 of 10") and facts(s)["best AP"] == "20.0 % (epoch 2)"
    assert facts(s)["waiting for images"] == "25 %" and facts(s)["time left"] == "1:34 min"


def test_a_run_that_has_not_begun(folder: Path) -> None:
    s = Reader(Run(folder)).read()
    assert (s.state, s.done, s.stage, s.epochs, s.best, s.pid) == ("not started", 0.0, "", (), None, None)
    assert not len(s.x) and not s.losses and math.isnan(s.left_s) and not s.trouble
    assert set(facts(s).values()) == {"– of 10", "–"}


@pytest.mark.parametrize("classes, claim", [(COCO_NAMES, CLAIMED.paper.ap), (("cell", "dog"), None)])
def test_the_papers_claim_stands_beside_runs_on_cocos_classes(
    tmp_path: Path, classes: tuple[str, ...], claim: float | None
) -> None:
    run = make(tmp_path / "coco", CLAIMED)
    write(run / "metrics.jsonl", step(0, 0), evaluated(0, 0.3, classes))
    s = Reader(Run(run)).read()
    page = Page()
    page.show([s])
    assert s.claim == claim and ("paper" in page.head) == (claim is not None) and claim != 0
    assert ("The paper claims" in page.pictures["Accuracy"]) == (claim is not None)


def test_old_rows_without_waiting_times(folder: Path) -> None:
    row = {name: value for name, value in step(0, 0).items() if name not in ("wait_s", "step_s")}
    write(folder / "metrics.jsonl", row)
    s = Reader(Run(folder)).read()
    page = Page()
    page.show([s])
    assert s.images_per_s == 4.0 and math.isnan(s.waiting) and "Pace" not in page.pictures


def test_a_skipped_step_and_an_evaluation_that_found_nothing(folder: Path) -> None:
    write(folder / "metrics.jsonl", step(0, 0, 2.0), step(0, 1, loss=math.nan) | {"terms": {}}, evaluated(0, None))
    s = Reader(Run(folder)).read()
    assert s.losses["mal"].tolist()[0] == 1.5 and math.isnan(s.loss) and s.best is None and len(s.epochs) == 1
    assert facts(s)["best AP"] == facts(s)["loss"] == "–"
    Page().show([s])


def test_rows_of_other_kinds_are_passed_over(folder: Path) -> None:
    write(folder / "metrics.jsonl", {"kind": "matching", "epoch": 0, "step": 0}, {"kind": "step"}, {}, step(0, 3))
    s = Reader(Run(folder)).read()
    assert len(s.x) == 1 and s.done == pytest.approx(0.4)


def test_a_resumed_run_whose_rows_were_cut_off(folder: Path) -> None:
    train(folder, 3)
    reader = Reader(Run(folder))
    first = reader.read()
    keep_rows(folder / "metrics.jsonl", lambda row: row["epoch"] < 1)
    s = reader.read()
    assert (first.done, s.done, len(s.epochs), len(s.x)) == (3.0, 1.0, 1, 10) and s.version != first.version


def test_failed_died_and_gone(folder: Path) -> None:
    reader = Reader(Run(folder))
    event(folder, "started")
    (folder / "log.txt").write_text(f"hello\n{TRACE}\n")
    assert (reader.read().state, reader.read().words) == ("died", TRACE)
    event(folder, "failed", why="the disk is full")
    train(folder, 1)
    s = reader.read()
    page = Page()
    page.show([s])
    assert s.state == "failed" and "the disk is full" in page.head and "ValueError: bad" in page.story
    folder.rename(folder.with_name("elsewhere"))
    s = reader.read()
    assert s.state == "gone" and s.done == 1.0  # what it said last
    folder.with_name("elsewhere").rename(folder)
    assert reader.read().state == "failed"


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    train(folder, 1)
    (folder / "recipe.py").write_text("Recipe(nme=3)")
    reader = Reader(Run(folder))
    s = reader.read()
    assert "recipe.py cannot be read" in s.trouble and s.timeline is None and s.done == pytest.approx(1.0)
    (folder / "recipe.py").write_text(dk.recipes.to_python(RECIPE))
    assert not reader.read().trouble and reader.read().recipe == "tiny"
    with Claim(folder):
        (folder / "run.json").write_text("{")
        s = reader.read()
    assert "could not be read" in s.trouble and s.recipe == "tiny"


def test_memory_is_bounded(folder: Path) -> None:
    reader = Reader(Run(folder))
    for k in range(5000):
        reader.rows.add(step(k // 10, k % 10))
    s = reader.read()
    assert len(s.x) <= 800 and len(reader.rows.recent) == 100 and s.x[-1] == pytest.approx(499.6, abs=0.5)


# ---------------------------------------------------------------------------------------------- the page


class Tags(HTMLParser):
    """Checks that every tag is closed in order, and collects images and headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.rows: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        else:
            self.open.append(tag)
        if dict(attrs).get("scope") == "row":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        if self.rows and not self.rows[-1] and self.open[-1:] == ["th"]:
            self.rows[-1] = data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_what_it_shows(folder: Path) -> None:
    event(folder, "failed", why="<script>alert(1)</script>")
    train(folder, 3)
    page = Page()
    page.show([Reader(Run(folder), "<b>&").read()])
    html = page.html("some-mark")
    images = Tags(html).images
    assert len(images) == 4 and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert "best 40.0 % after epoch 3" in images[1]["alt"] and "mal 0.75, l1 0.25" in images[0]["alt"]
    assert "<script" not in html and "&lt;b&gt;&amp;" in html and "//" not in re.sub('base64,[^"]*', "", html)
    assert Image.open(io.BytesIO(page.png())).size[0] == 2 * int(images[0]["width"])


def test_only_what_changed_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name in ("draw_curves", "draw_ap", "draw_timeline", "draw_pace"):
        original = getattr(board_page, name)
        monkeypatch.setattr(
            board_page, name, lambda *a, original=original, name=name, **k: drawn.append(name) or original(*a, **k)
        )
    train(folder, 1)
    reader, page = Reader(Run(folder)), Page()
    page.show([reader.read()])
    assert sorted(drawn) == ["draw_ap", "draw_curves", "draw_pace", "draw_timeline"]
    drawn.clear()
    event(folder, "stopped", epoch=1, step=0)
    page.show([reader.read()])
    assert drawn == [] and "stopped" in page.head
    write(folder / "metrics.jsonl", step(1, 0))
    page.show([reader.read()])
    assert sorted(drawn) == ["draw_curves", "draw_pace", "draw_timeline"]


SEEN = {
    "kind": "matching", "images": 4, "targets": 8, "targets_per_image": 2.0, "positives": 2.0, "positives_shared": 3.0,
    "positives_hist": [1, 1, 2, 0, 0, 0, 0, 0, 0, 0], "shared_hist": [0, 2, 2, 0, 0, 0, 0, 0, 0, 0],
    "iou": {"final": [0, 0, 1, 1, 2, 2, 1, 1, 0, 0]}, "low": {"final": 0.5}, "unstable": {"layer0": 0.25},
    "alignment": {"pearson": 0.5}, "score": {"matched": 0.4}, "entropy": {"layer0": 4.0},
}  # fmt: skip


def test_the_matching_is_shown_when_asked_for(folder: Path) -> None:
    write(folder / "metrics.jsonl", *(SEEN | {"epoch": e, "step": k} for e in range(50) for k in range(20)))
    write(folder / "metrics.jsonl", step(49, 0), {"kind": "probe", "epoch": 0, "changed": 0.5})
    board = Board(folder)
    board.refresh()
    (s,) = board.snapshots
    assert board.page.sheet == "" and 200 < len(s.matching) <= 401 and s.matching[-1]["kind"] == "probe"
    live(board).matching.value = True
    live(board).look()
    (image,) = Tags(live(board).sheet.value).images
    assert "positives per image" in image["alt"] and int(image["width"]) > 1000
    assert live(board).sheet.value in board._repr_html_() and len(Tags(board._repr_html_()).images) == 5
    live(board).matching.value = False
    live(board).look()
    assert live(board).sheet.value == ""
    board.close()


def test_several_runs_lie_over_one_another(tmp_path: Path) -> None:
    long = "a name that is much too long for the end of a line"
    for name, epochs in (("one", 2), (long, 3), ("none", 0)):
        train(make(tmp_path / name), epochs)
    board = Board(*(tmp_path / name for name in ("one", long, "none")))
    board.refresh()
    page = Tags(board.page.html())
    assert page.rows == ["one", long, "none"] and len(page.images) == 2
    assert "one: AP after every epoch; best 20.0 % after epoch 2" in page.images[1]["alt"]
    assert "none: No epoch was evaluated yet." in page.images[1]["alt"]


# ---------------------------------------------------------------------------------------------- the board


def test_nothing_happens_before_it_is_asked_for(folder: Path) -> None:
    threads = threading.active_count()
    board = Board(folder, every=0.01)
    assert board.snapshots == [] and threading.active_count() == threads and repr(board) == "Board(not looked yet)"
    assert board.refresh() and repr(board) == "Board(demo: not started)"
    assert not board.refresh()  # nothing is new
    event(folder, "stopped")
    assert board.refresh() and board.snapshots[0].state == "stopped"


def test_what_a_board_cannot_be_made_of(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeimkitError, match="at least one run"):
        Board()
    with pytest.raises(DeimkitError, match="every > 0"):
        Board(folder, every=0)
    with pytest.raises(CheckpointError, match="No run in"):
        Board(folder, tmp_path / "nothing")


def test_runs_are_called_as_briefly_as_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a/seed0", "a/seed1", "b/seed0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
    runs = [Run(tmp_path / name) for name in ("a/seed0", "a/seed1", "b/seed0")]
    assert names(runs[:2]) == ["seed0", "seed1"]
    assert names(runs) == ["a/seed0", "a/seed1", "b/seed0"]
    assert names([runs[0], runs[0]]) == ["seed0", "seed0 (2)"]


def test_a_notebook_gets_the_widget_and_a_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **how: shown.append((data, how)))
    board = Board(folder)
    bundle = board._repr_mimebundle_()
    assert {VIEW, "text/html", "image/png", "text/plain"} == set(bundle)
    board._ipython_display_()
    (live, _), (still, how) = shown
    assert live[VIEW] == bundle[VIEW] and set(still) == {"text/html", "image/png", "text/plain"}
    # the widget hides the picture: both are seen only where one of them is not shown
    assert how["display_id"] == board.mark in still["text/html"] and board.live is not None
    assert f".{board.mark} {{ display: none }}" in board.live.head.value
    board.close()


def test_without_ipywidgets_there_is_a_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **how: shown.append(data))
    board = Board(folder)
    board._ipython_display_()
    assert board.live is None and len(shown) == 1 and VIEW not in shown[0] | board._repr_mimebundle_()
    assert Tags(board._repr_html_()).images


# ---------------------------------------------------------------------------------------------- the widget


def settle() -> None:
    """Wait for what the buttons have begun."""
    for thread in threading.enumerate():
        if thread.name.startswith("deimkit board:"):
            thread.join(120)


def until(true: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(true())


@pytest.fixture
def board(folder: Path) -> Iterator[Board]:
    found = Board(folder, every=0.02)
    found.refresh()
    yield found
    settle()
    found.close()


def live(board: Board) -> Live:
    assert board.live is not None
    return board.live


def test_stop_asks_the_process_that_trains(board: Board, folder: Path) -> None:
    live(board).stop.click()
    settle()
    assert "No process trains demo" in live(board).message.value and not (folder / "stop").exists()
    event(folder, "started")
    with Claim(folder):
        live(board).look()
        assert not live(board).stop.disabled and live(board).resume.disabled
        live(board).stop.click()
        settle()
        assert (folder / "stop").exists() and "was asked to stop" in live(board).message.value
        assert "stopping" in live(board).head.value
    event(folder, "stopped")
    live(board).look()
    assert live(board).stop.disabled and not live(board).resume.disabled and live(board).message.value == ""


def test_resume_launches_a_process(board: Board, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("deimkit.api.resume", lambda run, **how: calls.append((run.folder, how)))
    live(board).resume.click()
    settle()
    assert calls == [(folder, {"wait": False, "progress": False})] and "goes on" in live(board).message.value
    event(folder, "finished")
    live(board).resume.click()
    settle()
    assert len(calls) == 1 and "nothing is left to train" in live(board).message.value


def test_an_error_of_a_button_is_a_sentence_on_the_board(
    board: Board, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(run: Run, **how: Any) -> None:
        raise DataError("The dataset has <changed>.")

    monkeypatch.setattr("deimkit.api.resume", refuse)
    live(board).resume.click()
    settle()
    assert "Could not resume the run: The dataset has &lt;changed&gt;." in live(board).message.value
    assert capfd.readouterr() == ("", "")


def test_of_several_runs_one_is_chosen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / name)
    board = Board(tmp_path / "one", tmp_path / "two")
    board.refresh()
    assert [label for label, _ in live(board).pick.options] == ["one", "two"]
    live(board).pick.value = 1
    with Claim(tmp_path / "two"):
        live(board).stop.click()
        settle()
    assert (tmp_path / "two" / "stop").exists() and not (tmp_path / "one" / "stop").exists()
    board.close()


def test_it_follows_the_folder_by_itself(board: Board, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    live(board).start()
    assert "not started" in live(board).head.value and "No step was trained" in live(board).pictures["Losses"].value
    train(folder, 1)
    event(folder, "stopped", epoch=1, step=0)
    assert until(lambda: "stopped" in live(board).head.value and "Pace" in live(board).pictures)
    assert until(lambda: len(live(board).gallery.children) == 4) and "Stopped as asked" in live(board).story.value
    assert capfd.readouterr() == ("", "")


def test_a_refresh_that_fails_is_told_and_tried_again(
    board: Board, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Page, "show", lambda *_: 1 / 0)
        event(folder, "stopped")
        live(board).start()
        assert until(lambda: "The board could not be refreshed: division by zero" in live(board).message.value)
    assert until(lambda: "stopped" in live(board).head.value and live(board).message.value == "")
    assert capfd.readouterr() == ("", "")


def test_it_ends_with_the_widget(board: Board) -> None:
    shown = live(board)
    shown.start()
    watch = shown.watch
    assert watch is not None and watch.is_alive()
    shown.root.close()  # as ipywidgets' own Widget.close_all does
    assert until(lambda: not watch.is_alive())
    board.close()
    assert shown.head.comm is shown.stop.comm is None


def test_it_rests_while_nobody_sees_it(board: Board) -> None:
    shown = live(board)
    shown.start()
    first = shown.watch
    assert first is not None
    shown.root._view_count = 1
    assert first.is_alive()
    shown.root._view_count = 0  # the cell was run again, and its old output is gone
    assert until(lambda: not first.is_alive())
    shown.root._view_count = 1
    assert shown.watch is not None and shown.watch is not first and shown.watch.is_alive()


def test_it_ends_when_its_owner_is_gone() -> None:
    class Owner:
        def look(self) -> bool:
            return True

    owner: Any = Owner()
    watch, seen = Watch(owner, 0.01), weakref.ref(owner)
    watch.start()
    assert watch.is_alive()
    del owner
    assert until(lambda: gc.collect() >= 0 and seen() is None and not watch.is_alive())


def test_a_kept_picture_follows_the_states(board: Board, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[str, Any]] = []

    class Handle:
        def update(self, data: dict[str, Any], raw: bool) -> None:
            kept.append(data)

    live(board).kept = Handle()
    write(folder / "metrics.jsonl", step(0, 0))
    live(board).look()
    assert kept == []  # nothing but a step
    event(folder, "stopped")
    live(board).look()
    assert len(kept) == 1 and "stopped" in kept[0]["text/html"]
    monkeypatch.setattr(board_live, "KEEP_S", 0.0)
    write(folder / "metrics.jsonl", step(0, 1))
    live(board).look()
    assert len(kept) == 2


# ---------------------------------------------------------------------------------------------- predictions


def test_predictions_of_the_newest_checkpoint(board: Board, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 4)).save(picture, "JPEG")
    drawn: list[str] = []
    monkeypatch.setattr(samples, "validation", lambda run: drawn.append("opened"))
    monkeypatch.setattr(samples, "samples", lambda run, split: drawn.append("drawn") or picture.getvalue())
    shown = live(board)
    shown.predict.value = True
    shown.look()
    settle()
    assert drawn == ["opened", "drawn"] and "data:image/jpeg" in shown.seen.value and shown.message.value == ""
    shown.look()
    settle()
    assert len(drawn) == 2  # the same checkpoint is not looked at again
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.pt").write_bytes(b"new")
    shown.look()
    settle()
    assert drawn == ["opened", "drawn", "drawn"]
    shown.predict.value = False
    assert shown.seen.value == ""


def test_predictions_that_fail_say_why_once(board: Board) -> None:
    live(board).predict.value = True
    live(board).look()
    settle()
    assert "Could not show predictions: " in live(board).message.value


def test_sample_predictions_are_a_picture(tmp_path: Path) -> None:
    scenes = Dataset.open(Synthetic(train=2, val=6, size=96).write(tmp_path / "scenes"))
    assert scenes.val is not None
    run = make(tmp_path / "run")
    detector = RECIPE.build(scenes.categories)
    (run / "checkpoints").mkdir()
    state = {"recipe": repr(RECIPE), "categories": scenes.categories.to_dict()}
    checkpoint.save(run / "checkpoints/best.pt", state | {"ema": EMA.of(detector, RECIPE.timeline).state_dict()})
    picture = Image.open(io.BytesIO(samples.samples(Run(run), scenes.val)))
    assert picture.format == "JPEG" and picture.width > 1000 and np.asarray(picture).std() > 10


def test_a_run_has_a_board_and_last_lines(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Plan("synthetic").write(folder)
    run = Run(folder)
    assert run.tail() == ""
    (folder / "log.txt").write_text("one\ntwo\nthree\n")
    assert run.tail(2) == "two\nthree"
    assert [shown.folder for shown in run.board(folder).runs] == [folder, folder]
