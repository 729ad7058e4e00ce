"""Several processes that share every batch train as one does, and get over the loss of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from threading import Barrier, local

import pytest

import deimkit as dk
from deimkit import api
from deimkit.data.dataset import Dataset
from deimkit.data.loader import Loader
from deimkit.errors import DeimkitError, RecipeError
from deimkit.ranks import ALONE, Ranks
from deimkit.training.claim import PATIENCE
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
    steps, theirs = one.rows("step"), two.rows("step")
    assert len(steps) == len(theirs) == 4 * MICRO.timeline.total and recipe.batch == 4
    for mine, other in zip(steps, theirs, strict=True):
        assert other["terms"] == pytest.approx(mine["terms"], rel=1e-5, abs=1e-9) and other["boxes"] == mine["boxes"]
    assert [row["AP"] for row in two.rows("epoch")] == pytest.approx([row["AP"] for row in one.rows("epoch")])
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
    while len(run.rows("step")) < 6:
        assert run.pid is not None, (run.folder / "log.txt").read_text()[-2000:]
        time.sleep(0.05)
    os.kill(workers(run.pid)[1], signal.SIGKILL)
    run.wait(timeout=300)
    undisturbed = dk.train(recipe, data, tmp_path / "whole", **options).wait(timeout=300)
    assert run.finished and undisturbed.finished
    assert "resumed" in [row["event"] for row in run.events()]
    assert [row["AP"] for row in run.rows("epoch")] == [row["AP"] for row in undisturbed.rows("epoch")]
    assert same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc")
def test_several_machines_train_together_and_replace_a_lost_process(tmp_path: Path) -> None:
    """Two launchers stand for two machines, which see the same folder; a process of the second one is killed."""
    data = scenes(tmp_path, train=16, val=4)
    recipe = RECIPES["dfine"].fit_to(data, epochs=6, batch=4)
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"localhost:{free.getsockname()[1]}"
    run = dk.prepare(recipe, data, tmp_path / "run", device="cpu", workers=0, nodes=2, rdzv=place)
    machines = [Run(run.folder).start() for _ in range(2)]
    while len(run.rows("step")) < 6:
        assert machines[0]._launched.poll() is None, (run.folder / "log.txt").read_text()[-2000:]
        time.sleep(0.05)
    os.kill(workers(machines[1]._launched.pid)[0], signal.SIGKILL)
    for machine in machines:
        assert machine.wait(timeout=400).finished
    whole = dk.train(recipe, data, tmp_path / "whole", device="cpu", workers=0, devices=2, wait=False)
    assert same(run, whole.wait(timeout=300)) and "resumed" in [row["event"] for row in run.events()]


def test_both_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process writes it down, however long that takes, and the other has the same plan; both are threads."""
    began, other = (scenes(tmp_path / name, train=images) for name, images in (("began", 4), ("other", 8)))
    run = trainer(tmp_path / "run", began).run
    write, meeting, mine = Plan.write, Barrier(2, timeout=30), local()

    def slowly(plan: Plan, folder: Path) -> None:
        time.sleep(2 * PATIENCE)  # longer than a second claim would wait
        write(plan, folder)

    def agree(ranks: Ranks, failure: DeimkitError | None) -> None:
        meeting.wait()
        if failure is not None:
            raise failure

    class Fit(Trainer):
        def fit(self) -> Run:
            meeting.wait()
            self.run.note("goes on", rank=self.ranks.rank, data=self.plan.data, fingerprint=self.plan.fingerprint)
            return self.run

    def resume(rank: int) -> Run:
        mine.ranks = Ranks(rank, world=2)
        return dk.resume(run.folder, dataset=other, progress=False)

    monkeypatch.setattr(Plan, "write", slowly)
    monkeypatch.setattr(Ranks, "join", staticmethod(lambda: mine.ranks))
    monkeypatch.setattr(Ranks, "agree", agree)
    monkeypatch.setattr(api, "Trainer", Fit)
    with ThreadPoolExecutor(2) as both:
        list(both.map(resume, (0, 1)))
    plan = {"data": str(other.source), "fingerprint": other.fingerprint()}
    first, *rest = ({key: row.get(key) for key in ("event", "rank", *plan)} for row in run.events())
    assert first == {"event": "other data", "rank": None, **plan}
    assert sorted(rest, key=lambda row: row["rank"]) == [{"event": "goes on", "rank": k, **plan} for k in (0, 1)]


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
        Plan("synthetic", nodes=2).expect_meeting()
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
