"""Several processes that share every batch train as one does, and get over the loss of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deimkit as dk
from deimkit.data.dataset import Dataset
from deimkit.data.loader import Loader
from deimkit.errors import RecipeError
from deimkit.ranks import ALONE, Ranks
from deimkit.training.run import Plan, Run
from deimkit.training.trainer import Trainer
from tests.micro import MICRO, same, scenes, trainer
from tests.together import RECIPES, train

ROOT = Path(__file__).resolve().parents[1]


def together(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `tests.together` in two processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.together",
    ]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*launch, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=500, env=given
    )


def half_empty(folder: Path) -> Dataset:
    """Scenes, of which every second image has lost its annotations."""
    source = Path(str(scenes(folder, train=16, val=4).source))
    for file in source.glob("annotations/*train*.json"):
        content = json.loads(file.read_text())
        kept = {image["id"] for image in content["images"][::2]}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
        file.write_text(json.dumps(content))
    return Dataset.open(source)


@pytest.mark.parametrize("name", ["dfine", pytest.param("rtdetrv2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path: Path, name: str) -> None:
    """Every term of every step, though one of the two often has no box; and what is measured after each epoch."""
    data = half_empty(tmp_path)
    recipe = RECIPES[name].fit_to(data, epochs=2, batch=4)
    train(RECIPES[name], data, tmp_path / "one", ALONE)
    done = together(name, data.source, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    steps, theirs = one.metrics("step"), two.metrics("step")
    assert len(steps) == len(theirs) == 4 * MICRO.timeline.total and recipe.batch == 4
    for mine, other in zip(steps, theirs, strict=True):
        assert other["terms"] == pytest.approx(mine["terms"], rel=1e-5, abs=1e-9) and other["boxes"] == mine["boxes"]
    assert [row["AP"] for row in two.metrics("epoch")] == pytest.approx([row["AP"] for row in one.metrics("epoch")])
    loader = Loader(data.train, 4, 64, RECIPES[name].augment, MICRO.timeline, rank=1, world=2)
    empty = [len(batch.targets) == 0 for epoch in range(MICRO.timeline.total) for batch in loader.epoch(epoch)]
    assert any(empty) and not all(empty)


def workers(agent: int) -> list[int]:
    """The processes that a process has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc")
def test_a_lost_process_is_replaced(tmp_path: Path) -> None:
    """Both start again from the last checkpoint, and end where a training that nothing befell ends."""
    data = scenes(tmp_path, train=16, val=4)
    recipe = RECIPES["dfine"].fit_to(data, epochs=6, batch=4)
    options = {"device": "cpu", "workers": 0, "devices": 2, "wait": False}
    run = dk.train(recipe, data, tmp_path / "lost", **options)
    while len(run.metrics("step")) < 6:
        assert run.pid is not None, (run.folder / "log.txt").read_text()[-2000:]
        time.sleep(0.05)
    os.kill(workers(run.pid)[1], signal.SIGKILL)
    run.wait(timeout=300)
    undisturbed = dk.train(recipe, data, tmp_path / "whole", **options).wait(timeout=300)
    assert run.finished and undisturbed.finished
    assert "resumed" in [row["event"] for row in run.events()]
    assert [row["AP"] for row in run.metrics("epoch")] == [row["AP"] for row in undisturbed.metrics("epoch")]
    assert same(run, undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    data = scenes(tmp_path, train=16, val=4)
    done = together("dfine", data.source, tmp_path / "run", TOGETHER_HANGS="1", DEIMKIT_TIMEOUT="20")
    assert done.returncode != 0
    assert "Process 0 of 2 lost the others: process 1 was last heard of" in done.stderr
    assert "at step 2 of epoch 0" in done.stderr


def test_shares_must_be_equal(tmp_path: Path) -> None:
    data = scenes(tmp_path, train=6)
    run = tmp_path / "run"
    trainer(run, data)
    for batch, world, said in ((5, 2, "Give batch=4"), (8, 2, "Give batch=6")):
        recipe = RECIPES["dfine"].fit_to(100, batch=batch)
        with pytest.raises(RecipeError, match=said):
            Trainer(recipe, Plan.read(run), data, run, None, Ranks(0, world))
    with pytest.raises(RecipeError, match="3 processes"):
        dk.train(MICRO, data, tmp_path / "never", batch=4, devices=3, device="cpu")
    assert not (tmp_path / "never").exists()


def test_several_machines_need_a_place_to_meet() -> None:
    with pytest.raises(RecipeError, match="HOST:PORT"):
        Plan("synthetic", nodes=2)
    with pytest.raises(RecipeError, match="devices must be at least 1"):
        Plan("synthetic", devices=0)


def test_torchrun_is_told_where_to_meet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Plan("synthetic").write(folder)
    assert Run(folder).launcher() == []
    Plan("synthetic", devices=8, nodes=2, rdzv="node1:29400").write(folder)
    said = Run(folder).launcher()
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node1:29400", "--max-restarts=3"} <= set(said)
