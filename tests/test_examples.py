"""The example: trained once however often it is asked for, finished if interrupted, and made anew when it changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

import deimkit as dk
from deimkit import api, examples
from deimkit.data.synthetic import Synthetic
from deimkit.examples import FAST, FULL, Lesson
from deimkit.explore.plots import annotated
from deimkit.training.progress import Progress
from deimkit.training.run import Plan
from tests.micro import MICRO

ROOT = Path(__file__).resolve().parents[1]
SCENES = Synthetic(train=6, val=2, size=64)
LONG = Lesson(MICRO.fit_to(6, epochs=2), SCENES, "a moment")
SHORT = Lesson(MICRO.fit_to(6, epochs=1), SCENES, "half a moment")
ASK = """
import deimkit as dk
from deimkit import examples
from tests.test_examples import LONG
examples.FULL = LONG
print(dk.example())
"""


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lessons that take a moment, and a cache that is empty."""
    monkeypatch.setattr(examples, "FULL", LONG)
    monkeypatch.setattr(examples, "FAST", SHORT)
    monkeypatch.setenv("DEIMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEIMKIT_FAST", raising=False)


def happened(run: dk.Run) -> list[str]:
    """When it was trained, from its beginning to its end."""
    told = ("started", "stopped", "resumed", "finished")
    return [row["event"] for row in run.events() if row["event"] in told]


def test_it_is_trained_once_and_then_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = dk.example()
    said = capsys.readouterr().out
    assert "about a moment on two CPU cores" in said and str(first.folder) in said
    assert first.finished and first.folder.is_relative_to(tmp_path / "cache" / "examples")

    for verb in ("train", "resume"):
        monkeypatch.setattr(api, verb, lambda *_, **__: pytest.fail("it was there already"))
    second = dk.example()
    assert second.folder == first.folder and happened(second) == ["started", "finished"]
    assert not capsys.readouterr().out


def test_what_it_learned_lies_beside_it() -> None:
    run = dk.example(progress=False)
    data = dk.Dataset.open(run.folder / "scenes")
    assert data.fingerprint() == Plan.read(run.folder).fingerprint and (len(data.train), len(data.val)) == (6, 2)
    found = dk.load(run).predict(data.val.paths[0], threshold=0)
    assert len(found) and set(found.names) <= set(data.categories.names)
    assert dk.evaluate(run, data.val)["AP"] == pytest.approx(max(row["AP"] for row in run.rows("epoch")))


@pytest.mark.parametrize(
    "variable, asked, lesson",
    [
        (None, None, LONG),
        ("", None, LONG),
        ("0", None, LONG),
        ("1", None, SHORT),
        ("1", False, LONG),
        ("0", True, SHORT),
    ],
)
def test_which_of_the_two(
    variable: str | None, asked: bool | None, lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("DEIMKIT_FAST", variable)
    chosen: list[Lesson] = []
    monkeypatch.setattr(examples, "_learn", lambda lesson, folder, *_: chosen.append(lesson) or _pretend(folder))
    assert dk.example(fast=asked).folder == lesson.folder and chosen == [lesson]


def _pretend(folder: Path) -> None:
    Plan("synthetic").write(folder)


def test_whatever_is_taught_differently_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        LONG,
        SHORT,
        replace(LONG, recipe=replace(MICRO, batch=3)),
        replace(LONG, recipe=LONG.recipe.fit_to(6, lr=1e-3)),
        replace(LONG, scenes=replace(SCENES, seed=1)),
    ]
    folders = [lesson.folder for lesson in others]
    assert replace(LONG).folder == LONG.folder and len(set(folders)) == len(others)
    monkeypatch.setattr(examples.synthetic, "VERSION", 3)
    assert LONG.folder not in folders


@pytest.mark.slow
def test_two_processes_train_it_once() -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", ASK], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(f"Run({str(LONG.folder)!r}, finished)" in words for words in said)
    assert sum("about a moment" in words for words in said) == 1
    assert happened(dk.Run(LONG.folder)) == ["started", "finished"]


def test_the_second_says_that_it_waits(capsys: pytest.CaptureFixture[str]) -> None:
    said, runs = "", []
    with examples._alone(LONG.folder, Progress()):
        asks = Thread(target=lambda: runs.append(dk.example()))
        asks.start()
        deadline = time.monotonic() + 30
        while "waiting until it is in" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert asks.is_alive() and "waiting until it is in" in said and "about a moment" not in said
    asks.join()
    assert runs[0].finished, "the first gave up, so the second trained it"


def test_an_interrupted_one_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Progress, row: dict[str, Any], *_: Any) -> None:
        (LONG.folder / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop)
        with pytest.raises(dk.DeimkitError, match="stopped before its end. Ask again"):
            dk.example()
    run = dk.example(progress=False)
    assert happened(run) == ["started", "stopped", "resumed", "finished"]
    assert [row["global_step"] for row in run.rows("step")] == list(range(1, 2 * 3 + 1))


def test_one_that_was_killed_before_its_first_step_is_trained() -> None:
    data = dk.Dataset.open(SCENES.write(LONG.folder / "scenes"))
    dk.prepare(LONG.recipe, data, out=LONG.folder, device="cpu", progress=False)
    assert happened(dk.example(progress=False)) == ["started", "finished"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEIMKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(dk.DeimkitError, match="Set DEIMKIT_CACHE to a folder that can"):
        dk.example(progress=False)


@pytest.mark.parametrize("lesson", [FULL, FAST], ids=["full", "fast"])
def test_the_real_lessons_are_of_tiny_on_synthetic_scenes(lesson: Lesson) -> None:
    assert lesson.recipe.name == "tiny" and lesson.recipe.arch == dk.recipes.tiny.arch
    assert lesson.recipe.fit_to(lesson.scenes.train) == lesson.recipe, "so that `train` takes it as it is"
    assert replace(lesson.scenes, train=400, val=100) == Synthetic(), 'the first scenes of what "synthetic" opens'


@pytest.mark.slow
def test_the_fast_one_sees_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "FAST", FAST)
    run = dk.example(fast=True, progress=False)
    data = dk.Dataset.open(run.folder / "scenes")
    torch.manual_seed(0)
    fresh, detector = dk.build(FAST.recipe, data.categories).eval(), dk.load(run)
    assert _covered(detector, data) > 2 * _covered(fresh, data) and _covered(detector, data) > 0.1


def _covered(detector: dk.Detector, data: dk.Dataset) -> float:
    """The share of objects that one of as many most confident boxes as there are objects meets with an IoU above .5."""
    best = []
    for i, path in enumerate(data.val.paths):
        truth = annotated(data.val, i)
        if len(truth):
            boxes = detector.predict(path, threshold=0).boxes[: len(truth)]
            best.append(box_iou(truth.boxes, boxes).amax(1))
    return float((torch.cat(best) > 0.5).float().mean())
