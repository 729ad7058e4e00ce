"""A training goes on as if nothing had happened, whatever happens to it."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deimkit as dk
from deimkit.data.dataset import Dataset
from deimkit.errors import CheckpointError, DataError, DeimkitError, NonFiniteError
from deimkit.training import checkpoint, claim
from deimkit.training import trainer as module
from deimkit.training.learner import Learner, micro_batches
from deimkit.training.machine import peak_memory, pick_device, pick_precision
from deimkit.training.progress import Progress
from deimkit.training.run import Plan, Run, append, keep_rows, plain, read_rows
from tests.micro import CLOCK, MICRO, equal, same, scenes, tensors, trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> Run:
    """Three epochs of three steps, from beginning to end."""
    return trainer(tmp_path_factory.mktemp("runs") / "undisturbed", data).fit()


def events(run: Run, kind: str) -> list[dict]:
    return [row for row in run.events() if row["event"] == kind]


def steps(run: Run) -> list[tuple[int, int]]:
    return [(row["epoch"], row["step"]) for row in run.rows("step")]


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.rows("step")]


def annotated(folder: Path, boxes: list[list[list[float]]], classes: int = 1, splits=("train", "val")) -> Dataset:
    """A COCO dataset of grey 64 px images that have these boxes (xywh), of classes 0, 1, 2, ... in turn."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / split).mkdir()
        images, rows = [], []
        for i, found in enumerate(boxes):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
            for box in found:
                rows.append(
                    {
                        "id": len(rows) + 1,
                        "image_id": i,
                        "category_id": len(rows) % classes,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        content = {
            "images": images,
            "annotations": rows,
            "categories": [{"id": i, "name": f"thing {i}"} for i in range(classes)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return Dataset.open(folder)


# ------------------------------------------------------------------------------------------------ stop and resume


def test_a_run_writes_what_it_did(undisturbed):
    assert steps(undisturbed) == [(e, s) for e in range(3) for s in range(3)]
    assert [row["epoch"] for row in undisturbed.rows("epoch")] == [0, 1, 2]
    assert all(row["loss"] == sum(row["terms"].values()) > 0 for row in undisturbed.rows("step"))
    assert undisturbed.finished and undisturbed.pid is None


@pytest.mark.parametrize("after", [1, 3, 4, 9])
def test_stopped_and_resumed_is_the_same_run(tmp_path, data, undisturbed, after):
    """Within an epoch, after its last step, and after the very last one."""
    folder = tmp_path / "run"
    at = divmod(after - 1, 3)
    stopping = trainer(folder, data, seen=lambda row: (row["epoch"], row["step"]) == at and Run(folder).stop())
    run = stopping.fit()
    assert run.state == "stopped" and len(steps(run)) == after and not run.finished
    (folder / "stop").unlink()
    again = trainer(folder, data).fit()
    assert again.finished and same(again, undisturbed)
    assert steps(again) == steps(undisturbed) and losses(again) == losses(undisturbed)
    assert [r["AP"] for r in again.rows("epoch")] == [r["AP"] for r in undisturbed.rows("epoch")]


def test_workers_change_nothing(tmp_path, data, undisturbed):
    """Neither of a whole run nor of one that is stopped while they are at work."""
    first = trainer(tmp_path, data, workers=2, seen=lambda row: row["step"] == 1 and Run(tmp_path).stop()).fit()
    (tmp_path / "stop").unlink()
    assert first.state == "stopped"
    assert same(trainer(tmp_path, data, workers=1).fit(), undisturbed)


def test_a_signal_saves_then_leaves(tmp_path, data, undisturbed):
    before = signal.getsignal(signal.SIGTERM)
    first = trainer(tmp_path, data, seen=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 1 else None)
    assert first.fit().state == "stopped" and len(steps(first.run)) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert same(trainer(tmp_path, data).fit(), undisturbed)


def test_a_crash_between_steps_costs_only_what_came_after_the_checkpoint(tmp_path, data, undisturbed):
    """With checkpoints every two steps; rows after the checkpoint are written anew, not twice."""

    def crash(row):
        if (row["epoch"], row["step"]) == (1, 2):
            raise MemoryError("crash")

    with pytest.raises(MemoryError):
        trainer(tmp_path, data, seen=crash, save_every=2).fit()
    run = Run(tmp_path)
    assert checkpoint.load(run.last)["global_step"] == 4 and len(steps(run)) == 6
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "epo')  # cut short by the crash
    run = trainer(tmp_path, data, save_every=2).fit()
    assert same(run, undisturbed) and steps(run) == steps(undisturbed) and losses(run) == losses(undisturbed)


def start_cli(folder: Path) -> subprocess.Popen:
    """`deimkit train --resume` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deimkit", "train", "--resume", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_after(folder: Path, rows: int, pause: float) -> None:
    """Train until that many rows are written and `pause` seconds have passed; then kill -9."""
    process = start_cli(folder)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0) < rows:
        time.sleep(0.005)
    time.sleep(pause)
    process.kill()
    process.wait()


def killed_at_random(folder: Path, data: Dataset, undisturbed: Run, moments: list[tuple[int, float]]) -> None:
    trainer(folder, data, save_every=2)  # writes the run's plan
    run = Run(folder)
    for rows, pause in moments:
        kill_after(folder, rows, pause)
        assert run.pid is None
        if run.last.exists():
            checkpoint.load(run.last)
    if not run.finished:
        trainer(folder, data, save_every=2).fit()
    assert same(run, undisturbed)
    assert steps(run) == steps(undisturbed) and losses(run) == losses(undisturbed)


def test_killed_at_any_moment(tmp_path, data, undisturbed):
    rng = random.Random()
    killed_at_random(tmp_path, data, undisturbed, [(n, rng.random() * 0.1) for n in (0, 3, 8)])


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path, data, undisturbed):
    rng = random.Random()
    for i in range(10):
        moments = sorted((rng.randrange(13), rng.random() * 0.3) for _ in range(3))
        killed_at_random(tmp_path / str(i), data, undisturbed, moments)


DIES = """
import io, os, signal, sys
import torch
from deimkit import __main__
from deimkit.training import checkpoint
folder, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = []

def dies(owner, name):
    whole = getattr(owner, name)
    def last(*args, **options):
        calls.append(name)
        if len(calls) == number:
            if name == "save":  # half of a checkpoint
                half = io.BytesIO()
                whole(args[0], half)
                args[1].write(half.getvalue()[: half.tell() // 2])
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **options)
    setattr(owner, name, last)

dies({"save": torch, "fsync": os, "replace": os, "sync_folder": checkpoint}[place], place)
__main__.main(["train", "--resume", folder])
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["save", "fsync", "replace", "sync_folder"])
def test_killed_while_a_checkpoint_is_written(tmp_path, data, undisturbed, place):
    """After half of it, before it is on the disk, before it has its name, and before its name is on the disk."""
    trainer(tmp_path, data, save_every=2)
    for number in (1, 3, 4):
        died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path), place, str(number)], capture_output=True)
        assert died.returncode == -signal.SIGKILL
        left = {path.name for path in (tmp_path / "checkpoints").iterdir()} - {"last.pt", "best.pt", "stage1.pt"}
        named = place == "sync_folder" or (place == "fsync" and number == 4)  # the folder's own, after the file's
        assert bool(left) == (not named), "what was being written lies beside what was there"
        if Run(tmp_path).last.exists():
            checkpoint.load(Run(tmp_path).last)
    assert same(trainer(tmp_path, data, save_every=2).fit(), undisturbed)
    assert losses(Run(tmp_path)) == losses(undisturbed)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} <= {"last.pt", "best.pt", "stage1.pt"}


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(tmp_path, data, undisturbed, monkeypatch):
    def full(row):
        if row["epoch"] == 1:
            monkeypatch.setattr(os, "fsync", no_space)

    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device.*previous checkpoint is intact"):
        trainer(tmp_path, data, seen=full).fit()
    monkeypatch.undo()
    assert checkpoint.load(Run(tmp_path).last)["epoch"] == 1
    assert same(trainer(tmp_path, data).fit(), undisturbed)


def test_a_file_system_without_locks_is_named(tmp_path, data, monkeypatch):
    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    run = trainer(tmp_path, data).run
    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    with pytest.raises(DeimkitError, match="without locks .*No locks available.*another one"), run.training():
        pass


def test_a_full_disk_is_told_before_the_first_epoch(tmp_path, data, monkeypatch):
    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer(tmp_path, data).fit()
    assert not steps(Run(tmp_path))


def test_another_recipe_or_other_classes_are_not_resumed(tmp_path, data):
    def stop(row):
        Run(tmp_path / "run").stop()

    trainer(tmp_path / "run", data, seen=stop).fit()
    with pytest.raises(DeimkitError, match="another recipe"):
        trainer(tmp_path / "run", data, replace(MICRO, share=False)).fit()
    with pytest.raises(DataError, match="trained for 8 classes, and .* now has 1"):
        trainer(tmp_path / "run", annotated(tmp_path / "other", [[[8, 8, 16, 16]]] * 6)).fit()


# ------------------------------------------------------------------------------------------------------ surroundings


def test_the_caller_keeps_its_random_numbers(tmp_path, data):
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainer(tmp_path, data, replace(MICRO, timeline=CLOCK.scaled_to(1, 3))).fit()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_the_seed_decides(tmp_path, data, undisturbed):
    short = replace(MICRO, timeline=CLOCK.scaled_to(1, 3))
    first = losses(trainer(tmp_path / "a", data, short, seed=1).fit())
    assert first == losses(trainer(tmp_path / "b", data, short, seed=1).fit())
    assert first != losses(trainer(tmp_path / "c", data, short, seed=2).fit())


class Terminal:
    """A terminal that remembers what was written to it."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_live_line_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    progress = Progress(terminal)
    row = {"epoch": 71, "step": 3695, "loss": 123456.789, "lr": 1.25e-5, "images_per_s": 12345.6}
    progress.step(row, 3696, 132, 3.6e6)
    progress.note("evaluating 5000/5000")
    progress.line("done")
    drawn = [part for line in terminal.text.split("\n") for part in line.split("\r")]
    assert max(map(len, drawn)) < columns
    assert terminal.text.endswith("\rdone\n")


def test_a_skipped_step_can_be_shown(monkeypatch):
    terminal = Terminal()
    row = {"epoch": 0, "step": 0, "loss": math.nan, "lr": 0.0, "images_per_s": 1.0}
    Progress(terminal).step(row, 1, 1, 0.0)
    assert "loss nan" in terminal.text


def test_devices_that_are_not_there_are_named():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(DeimkitError, match="finds only"):
        pick_device("cuda:99")
    with pytest.raises(DeimkitError, match="device must be"):
        pick_device("graphics card")
    with pytest.raises(DeimkitError, match="needs a GPU"):
        pick_precision("fp16", torch.device("cpu"))


def test_a_folder_is_trained_by_one_at_a_time(tmp_path):
    assert claim.holder(tmp_path) is None
    with claim.Claim(tmp_path):
        assert claim.holder(tmp_path) == os.getpid()
        with pytest.raises(DeimkitError, match=f"already being trained by process {os.getpid()}"):
            claim.Claim(tmp_path)
    assert claim.holder(tmp_path) is None
    (tmp_path / "pid").write_text("1")  # of a process that is alive, but trains nothing
    assert claim.holder(tmp_path) is None


def test_a_forked_worker_does_not_hold_its_parents_claim(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from deimkit.training.claim import Claim\n"
        f"held = Claim(Path({str(tmp_path)!r}))\n"
        "if not os.fork(): print(os.getpid(), flush=True)\n"  # by then the child has let go of the lock
        "time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert claim.holder(tmp_path) == process.pid
    process.kill()
    process.wait()
    try:
        assert claim.holder(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_peak_memory_is_that_of_this_process_alone():
    """Not of the process that started it, which may be a notebook that holds a dataset."""
    size = "from deimkit.training.machine import peak_memory; print(peak_memory())"
    block = np.ones(2**29, np.uint8)
    assert block.nbytes < peak_memory()
    child = subprocess.run([sys.executable, "-c", size], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < peak_memory()


def test_rows_are_strict_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"a": math.nan, "b": np.float32(0.5), "c": [math.inf, 1, True, None, "x"], "d": Path("e")})
    assert path.read_text() == '{"a": null, "b": 0.5, "c": [null, 1, true, null, "x"], "d": "e"}\n'
    with open(path, "a") as file:
        file.write('{"cut": ')
    append(path, {"lost": 1})
    append(path, {"kept": 1})
    assert [list(row) for row in read_rows(path)] == [["a", "b", "c", "d"], ["kept"]]
    keep_rows(path, lambda row: "kept" in row)
    assert path.read_text() == '{"kept": 1}\n'
    assert read_rows(tmp_path / "absent.jsonl") == [] and plain(torch.tensor(2.0)) == 2.0


# -------------------------------------------------------------------------------------------------------- non-finite


def poison(monkeypatch, bad: set[int] | range) -> None:
    """Let the learner get NaN pixels in the steps whose numbers are in `bad`, as they are tried."""
    whole, steps = Learner.gradients, count()

    def gradients(self, batch, watch=None):
        if next(steps) in bad:
            batch.images = batch.images.float() * math.nan
        return whole(self, batch, watch)

    monkeypatch.setattr(Learner, "gradients", gradients)


def test_an_evaluation_that_does_not_fit_takes_fewer_images_at_a_time(tmp_path, data, monkeypatch):
    from deimkit.evaluation import measure as evaluation

    tried, measure = [], evaluation.measure

    def small(*args, batch, **options):
        tried.append(batch)
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(*args, batch=batch, **options)

    monkeypatch.setattr(evaluation, "measure", small)
    assert trainer(tmp_path, data, replace(MICRO, timeline=CLOCK.scaled_to(2, 3))).fit().finished
    assert tried == [4, 2, 1] * 2


def test_a_skipped_step_leaves_no_trace_but_a_record(tmp_path, data, monkeypatch):
    poison(monkeypatch, {1})
    states = []
    one = trainer(tmp_path, data, replace(MICRO, timeline=CLOCK.scaled_to(1, 3)))
    one.progress.seen = lambda row: states.append({k: v.clone() for k, v in one.learner.model.state_dict().items()})
    run = one.fit()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert all(torch.isfinite(x).all() for x in tensors(checkpoint.load(run.last)).values() if x.is_floating_point())

    (skipped,) = events(run, "skipped")
    assert (skipped["epoch"], skipped["step"]) == (0, 1) and "finite" in skipped["why"]
    names = {Path(path).name for path in data.train.paths}
    assert len(skipped["images"]) == 2 and set(skipped["images"]) <= names
    assert [row["loss"] is None for row in run.rows("step")] == [False, True, False]
    assert (
        "skipped step 1" in one.progress.lines[0]
        and skipped["images"] == torch.load(skipped["batch"])["replay"]["names"]
    )


def test_non_finite_steps_roll_back_then_stop(tmp_path, data, monkeypatch):
    poison(monkeypatch, range(3, 100))
    clock = replace(CLOCK.scaled_to(9, 3), lr=CLOCK.lr)
    broken = trainer(tmp_path, data, replace(MICRO, timeline=clock, return_to_best=False), evaluate_every=100)
    with pytest.raises(NonFiniteError, match="5 steps in a row were not finite, 3 times.*precision='fp32'"):
        broken.fit()
    run = Run(tmp_path)
    assert len(events(run, "skipped")) == module.SKIPS * (module.ROLLBACKS + 1)
    assert len(events(run, "rolled_back")) == module.ROLLBACKS
    assert all(Path(row["batch"]).is_file() for row in events(run, "skipped"))
    state = checkpoint.load(run.last)
    assert all(torch.isfinite(x).all() for x in state["model"].values() if x.is_floating_point())

    monkeypatch.undo()
    assert (
        trainer(tmp_path, data, replace(MICRO, timeline=clock, return_to_best=False), evaluate_every=100).fit().finished
    )


def test_a_non_finite_gradient_is_caught(tmp_path, data, monkeypatch):
    """The loss is finite, its gradient is not."""
    whole, tried = Learner.losses, []

    def losses(self, batch, boxes, watch=None):
        terms = whole(self, batch, boxes, watch)
        tried.append(1)
        if len(tried) == 1:
            weight = next(self.model.parameters())
            terms["bad"] = (weight.flatten()[0] * 0).sqrt()
        return terms

    monkeypatch.setattr(Learner, "losses", losses)
    run = trainer(tmp_path, data, replace(MICRO, timeline=CLOCK.scaled_to(1, 3))).fit()
    assert [row["step"] for row in events(run, "skipped")] == [0]
    assert "gradient is not finite in backbone" in events(run, "skipped")[0]["why"]


# ------------------------------------------------------------------------------------------------------------- plan


def test_micro_batches_add_up(data, tmp_path):
    """The class term's gradients of two halves are those of the whole, batch norms in evaluation mode."""
    one = trainer(tmp_path, data)
    one._prepare()
    model = one.learner.model.eval()
    model.groups = torch.nn.ModuleList()
    batch = next(one.loader.epoch(1)).finish()
    batch = replace(batch, mix=None)

    def gradient(parts: int) -> torch.Tensor:
        model.zero_grad()
        for module_ in model.modules():
            module_.training = not isinstance(module_, torch.nn.modules.batchnorm._BatchNorm)
        for part in micro_batches(batch, parts):
            terms = one.learner.losses(part, boxes=len(batch.targets))
            sum(value for name, value in terms.items() if name.startswith("mal/")).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, halves = gradient(1), gradient(2)
    assert len(micro_batches(batch, 2)) == 2 and whole.norm() > 0
    assert torch.allclose(whole, halves, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("accumulate", [2, 7])
def test_a_run_may_accumulate(tmp_path, data, accumulate):
    run = trainer(tmp_path, data, replace(MICRO, timeline=CLOCK.scaled_to(1, 3)), accumulate=accumulate).fit()
    assert run.finished and all(math.isfinite(loss) for loss in losses(run))


def test_bf16_trains_on_a_cpu(tmp_path, data):
    run = trainer(tmp_path, data, precision="bf16").fit()
    assert run.finished and events(run, "started")[0]["precision"] == "bfloat16"
    assert all(math.isfinite(loss) for loss in losses(run))
    assert all(x.dtype == torch.float32 for x in tensors(checkpoint.load(run.last)).values() if x.is_floating_point())


def test_evaluations_and_checkpoints_come_when_they_should(tmp_path, data, monkeypatch):
    saved = []
    whole = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: (saved.append((path.stem, state["global_step"])), whole(path, state))
    )
    run = trainer(tmp_path, data, evaluate_every=2, save_every=2).fit()
    assert [row["epoch"] for row in run.rows("epoch")] == [1, 2]  # every second, and the last
    assert [at for name, at in saved if name == "last"] == [0, 2, 3, 4, 6, 6, 8, 9]


def scripted(monkeypatch, aps: list[float]) -> None:
    """Let the evaluations find these APs, the last one for ever after."""
    script = iter(aps)
    numbers = {"AP50": 0.0, "AP75": 0.0, "per_class": {}}
    monkeypatch.setattr(module.Trainer, "_measure", lambda self: {"AP": next(script, aps[-1]), **numbers})


@pytest.mark.parametrize(
    "every, patience, aps, epochs",
    [
        (1, 2, [0.1, 0.2, 0.1, 0.1], 4),  # best in epoch 1; two epochs later there is no better
        (1, 1, [0.1, 0.1], 2),
        (2, 1, [0.1, 0.0], 4),  # never before the second evaluation
        (3, 2, [0.1, 0.0], 6),
        (1, 3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 7),
    ],
)
def test_patience_ends_a_run(tmp_path, data, monkeypatch, every, patience, aps, epochs):
    scripted(monkeypatch, aps)
    recipe = replace(MICRO, timeline=replace(CLOCK, augment=7, total=7))
    run = trainer(tmp_path, data, recipe, patience=patience, evaluate_every=every).fit()
    assert checkpoint.load(run.last)["epoch"] == epochs and run.finished
    assert run.state == ("finished" if epochs == 7 else "early_stop")


def test_the_clean_stage_returns_to_the_best(tmp_path, data, monkeypatch):
    """Epoch 0 is the best before the clean one (2), which starts from it and, being no better, returns to it."""
    scripted(monkeypatch, [0.5, 0.4, 0.3])
    run = trainer(tmp_path, data).fit()
    assert [row["epoch"] for row in events(run, "returned_to_best")] == [2, 2]
    last, best = checkpoint.load(run.last), checkpoint.load(run.best)
    stage1 = checkpoint.load(tmp_path / "checkpoints" / "stage1.pt")
    assert best["epoch"] == stage1["epoch"] == 1 and last["epoch"] == 3 and last["global_step"] == 9
    assert all(equal(last[what], stage1[what]) for what in ("model", "ema", "optimizer"))


def test_the_best_is_what_a_run_hands_out(tmp_path, data, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.2])
    run = trainer(tmp_path, data, replace(MICRO, return_to_best=False)).fit()
    shadow = checkpoint.load(run.best)["ema"]["shadow"]
    assert checkpoint.load(run.best)["epoch"] == 2
    assert all(torch.equal(x, shadow[name]) for name, x in dk.load(run).state_dict().items())


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    "boxes, classes",
    [
        ([[[8, 8, 16, 16]]] + [[]] * 5, 1),  # most batches are empty
        ([[[8, 8, 16, 16], [30, 30, 20, 20]]] * 6, 300),
        ([[[i % 50, i // 50 * 5, 8, 8] for i in range(500)]] * 2, 5),  # more boxes than queries
        ([[[10, 10, 20, 20]]], 1),  # one image, a batch of two
    ],
    ids=["empty batches", "300 classes", "500 boxes", "one image"],
)
def test_odd_datasets_train(tmp_path, boxes, classes):
    data = annotated(tmp_path / "data", boxes, classes)
    recipe = MICRO.fit_to(data, epochs=1)
    run = trainer(tmp_path / "run", data, recipe).fit()
    assert run.finished and len(losses(run)) == max(len(boxes) // 2, 1)
    assert all(math.isfinite(loss) for loss in losses(run)) and run.best.name == "best.pt"


def test_nothing_to_learn_is_refused(tmp_path):
    data = annotated(tmp_path / "data", [[]] * 6, 1)
    with pytest.raises(DataError, match="has no box to learn from"):
        trainer(tmp_path / "run", data)


def test_no_val_split_is_no_problem(tmp_path, data):
    run = trainer(tmp_path, replace(data, val=None)).fit()
    assert run.finished and not run.rows("epoch") and run.best == run.last


def test_no_train_split_is_one(tmp_path, data):
    with pytest.raises(DataError, match="no train split"):
        trainer(tmp_path, replace(data, train=None))


def test_what_the_annotations_get_wrong_is_refused_or_skipped(tmp_path):
    boxes = [[[8, 8, 16, 16]] for _ in range(6)]
    boxes[2] = [[200, 200, 16, 16]]  # far outside
    data = annotated(tmp_path / "data", boxes)
    with pytest.raises(DataError, match=r"train split has 1 problem.*2\.png.*on_problem='skip'"):
        trainer(tmp_path / "refused", data)
    run = trainer(tmp_path / "run", data, on_problem="skip").fit()
    assert run.finished and events(run, "started")[0]["images"] == {"train": 5, "val": 5}


def damaged(folder: Path, split: str, index: int) -> tuple[Dataset, Path, bytes]:
    """A dataset one of whose images breaks off; its path and its whole content."""
    scenes(folder)
    path = folder / "scenes" / split / f"{index:05d}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return Dataset.open(folder / "scenes"), path, whole


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named_and_once_mended_the_run_goes_on(tmp_path, undisturbed, split):
    data, path, whole = damaged(tmp_path, split, 1)
    with pytest.raises(DataError, match=rf"{path} cannot be read.*Then resume the run"):
        trainer(tmp_path / "run", data).fit()
    path.write_bytes(whole)
    assert same(trainer(tmp_path / "run", data).fit(), undisturbed)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_skipped_the_same_way_every_time(tmp_path, split):
    data, path, _ = damaged(tmp_path, split, 1)
    one = trainer(tmp_path / "one", data, on_problem="skip").fit()
    (dropped,) = events(one, "dropped")
    assert one.finished and dropped["image"] == 2 and dropped["split"] == split and str(path) in dropped["why"]

    folder = tmp_path / "two"
    at = (dropped["epoch"], min(dropped["step"], 2))
    stopping = trainer(
        folder, data, on_problem="skip", seen=lambda row: (row["epoch"], row["step"]) == at and Run(folder).stop()
    )
    assert stopping.fit().state == "stopped"
    (folder / "stop").unlink()
    assert same(trainer(folder, data, on_problem="skip").fit(), one)


def test_other_weights_are_mapped_by_class_and_reported(tmp_path, data, undisturbed):
    """From eight classes to three, of which two have the same name."""
    names = data.categories.names
    other = annotated(tmp_path / "data", [[[8, 8, 16, 16], [30, 30, 20, 20], [0, 0, 9, 9]]] * 6, classes=3)
    new = dk.CategoryMap(ids=other.categories.ids, names=(names[2], "something new", names[0]))
    data3 = replace(
        other, categories=new, train=replace(other.train, categories=new), val=replace(other.val, categories=new)
    )
    tuning = trainer(tmp_path / "run", data3, weights=str(undisturbed.best))
    tuning._prepare()
    theirs = checkpoint.load(undisturbed.best)["ema"]["shadow"]
    ours = tuning.learner.model.state_dict()
    head = next(name for name in ours if name.startswith("refine.score.") and name.endswith("0.weight"))
    assert torch.equal(ours[head][0], theirs[head][2]) and torch.equal(ours[head][2], theirs[head][0])
    assert not torch.equal(ours[head][1], theirs[head][1])
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items() if name.startswith("backbone."))
    report = events(tuning.run, "weights")[0]["report"]
    assert report["classes"] == [[names[2], 2], ["something new", None], [names[0], 0]]
    assert trainer(tmp_path / "run", data3, weights=str(undisturbed.best)).fit().finished
    assert len(events(tuning.run, "weights")) == 1  # a resumed run has its own


# ------------------------------------------------------------------------------------------------------------ a plan


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "int8"}, {"on_problem": "ignore"}, {"accumulate": 0}, {"evaluate_every": 0}, {"patience": 0}],
)
def test_an_impossible_plan_is_refused(wrong):
    with pytest.raises(DeimkitError, match=next(iter(wrong))):
        Plan(data="synthetic", **wrong)


def test_a_plan_comes_back(tmp_path):
    plan = Plan(data="d", patience=3, weights="w.pt")
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
