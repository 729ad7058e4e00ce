"""A run is written without being started, and trained by a job of Slurm that goes on until it is finished.

Slurm is played by three small programs: they start what they are given here, on one node, and note what they are asked.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import deimkit as dk
from deimkit import recipes
from deimkit.__main__ import main
from deimkit.data.dataset import Dataset
from deimkit.errors import DataError, DeimkitError, RecipeError
from deimkit.training.run import Plan, Run
from deimkit.training.slurm import seconds
from tests.micro import MICRO, same, scenes

SRUN = """#!/bin/bash
while [[ $1 = -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}" ;;
    *) echo "$@" >>"$ASKED" ;;
esac
"""
SQUEUE = """#!/bin/bash
echo "${STATE:-RUNNING}"
"""
# What a job starts in place of Python, to train in no time: the folder of the run is its last argument but one.
PYTHON = """#!/bin/bash
run=${@: -2:1}
word() { echo "{\\"event\\": \\"$1\\"}" >>"$run/events.jsonl"; }
save() { mkdir -p "$run/checkpoints"; echo $$ >"$run/new"; mv "$run/new" "$run/checkpoints/last.pt"; }
word started
if [ "$(grep -c started "$run/events.jsonl")" -le "${LOST:-0}" ]; then kill -9 $$; fi
until [ -z "$WAITS" ] || [ -e "$run/stop" ]; do sleep 0.05; done
[ -z "$HANGS" ] || { save; sleep 30; }
[ -z "$SAVES" ] || save
word "$ENDS"
exit "${EXIT:-0}"
"""


class Cluster:
    """Where jobs run: `bin` comes first on their PATH, `asked` is what they asked of Slurm, `log` what they said."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.asked, self.log = folder / "bin", folder / "asked", folder / "log"
        self.bin.mkdir(parents=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "python": PYTHON}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, job: Path, **environment: object) -> subprocess.Popen[bytes]:
        """Start a job, as the first of its starts unless SLURM_RESTART_COUNT says otherwise."""
        slurm = {"SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "n[1]", "SLURM_NNODES": 1, "SLURM_CPUS_PER_TASK": 2}
        given = {**slurm, "ASKED": self.asked, "OMP_NUM_THREADS": 1, **environment}
        path = f"{self.bin}:{os.environ['PATH']}"
        with open(self.log, "w") as log:
            return subprocess.Popen(
                ["bash", job],
                env={**os.environ, "PATH": path, **{name: str(value) for name, value in given.items()}},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, job: subprocess.Popen[bytes]) -> None:
        """End whatever is left of a job, as Slurm does."""
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()

    def queued_again(self) -> bool:
        """Whether a job was; forgets it."""
        asked = self.asked.read_text() if self.asked.exists() else ""
        self.asked.unlink(missing_ok=True)
        assert set(asked.splitlines()) <= {"requeue 4711"}
        return bool(asked)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("data"), train=8)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that nobody has started yet, in a folder with a name that is hard on shells."""
    return planned(tmp_path / "my 'first' \"rün\" $x %j")


def planned(folder: Path, **plan: object) -> Run:
    folder.mkdir()
    Plan("synthetic", **plan).write(folder)
    return Run(folder)


def options(job: Path) -> list[str]:
    """What the job asks of Slurm."""
    lines = [line.removeprefix("#SBATCH ") for line in job.read_text().splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------- prepare


def test_a_prepared_run_trains_as_one_that_was_started(tmp_path: Path, data: Dataset) -> None:
    asked = {"epochs": 1, "batch": 2, "device": "cpu", "workers": 0, "seed": 3, "progress": False}
    run = dk.prepare(MICRO, data.source, tmp_path / "prepared", **asked)
    assert sorted(path.name for path in run.folder.iterdir()) == ["recipe.py", "run.json"]
    assert run.state == "new" and run.pid is None
    dk.resume(run, progress=False)
    started = dk.train(MICRO, data.source, tmp_path / "started", **asked)
    assert (started.folder / "recipe.py").read_text() == (run.folder / "recipe.py").read_text()
    assert Plan.read(started.folder) == Plan.read(run.folder)
    losses = [[(row["loss"], row["terms"]) for row in each.rows("step")] for each in (run, started)]
    assert len(losses[0]) == 4 and losses[0] == losses[1] and same(run, started)
    with pytest.raises(DeimkitError, match="already holds a run"):
        dk.prepare(MICRO, data.source, run.folder, **asked)


@pytest.mark.parametrize("lacking", [{"device": "cuda:99"}, {"nodes": 2}])
def test_what_this_machine_lacks_is_no_matter(tmp_path: Path, data: Dataset, lacking: dict[str, object]) -> None:
    asked = {"epochs": 1, "batch": 2, "device": "cpu", "progress": False} | lacking
    with pytest.raises(DeimkitError, match="finds only|HOST:PORT"):
        dk.train(MICRO, data, tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()
    run = dk.prepare(MICRO, data, tmp_path / "run", **asked)
    with pytest.raises(DeimkitError, match="finds only|HOST:PORT.* sbatch|sbatch"):
        dk.resume(run, progress=False)


def test_what_cannot_be_trained_is_not_written(tmp_path: Path, data: Dataset) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match="Give batch=4"):
        dk.prepare(MICRO, data, out, batch=5, devices=2, nodes=2)
    with pytest.raises(RecipeError, match="devices"):
        dk.prepare(MICRO, data, out, device="cpu", device_s=2)
    with pytest.raises(DataError, match="was made for a dataset"):
        dk.prepare(MICRO, dk.Dataset.open(data.source).__class__(**{**vars(data), "val": None}), out)
    assert not out.exists()


def test_the_command_line_prepares_and_writes_the_job(tmp_path, data, capsys, monkeypatch) -> None:
    monkeypatch.setitem(recipes._ALL, "micro", MICRO)
    out = str(tmp_path / "run")
    command = ["train", "micro", "--data", data.source, "--batch", "2", "--nodes", "2", "--device", "cpu"]
    assert main([*command, "--out", out, "--prepare"]) == 0
    assert f"ready to train in {out}" in capsys.readouterr().out and Run(out).state == "new"
    assert (
        main(["sbatch", out, "--time", "2-00:00:00", "--partition", "gpu", "--line=--mem=64G", "--line=--qos=x"]) == 0
    )
    assert f"sbatch {out}/job.sh" in capsys.readouterr().out
    asked = options(tmp_path / "run" / "job.sh")
    assert {"--nodes=2", "--time=2-00:00:00", "--partition=gpu"} < set(asked) and asked[-2:] == ["--mem=64G", "--qos=x"]
    assert main([*command, "--resume", out, "--prepare"]) == 1 and "only one" in capsys.readouterr().err
    assert main(["sbatch", out, "--time", "24:00"]) == 1 and "24:00:00" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the script


def test_a_job_asks_for_what_the_plan_says(tmp_path: Path) -> None:
    gpus = options(planned(tmp_path / "gpus", devices=4, nodes=2, workers=11).sbatch(notice=120, account="deer"))
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=48"} < set(gpus)
    assert {"--time=24:00:00", "--signal=B:USR1@120", "--requeue", "--account=deer"} < set(gpus)
    assert not any(option.startswith("--partition") for option in gpus)
    cpu = options(planned(tmp_path / "cpu", device="cpu").sbatch())
    assert {"--nodes=1", "--cpus-per-task=8"} < set(cpu) and not any("gpu" in option for option in cpu)
    assert "--cpus-per-task=3" in options(Run(tmp_path / "cpu").sbatch(cpus=3))


def test_two_jobs_of_one_run_wait_for_each_other_and_no_others_do(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    jobs = [planned(folder / "x y").sbatch() for folder in (tmp_path, tmp_path / "other")]
    names = [next(word for word in options(job) if word.startswith("--job-name=x-y-")) for job in jobs]
    assert len(set(names)) == 2 and all("--dependency=singleton" in options(job) for job in jobs)
    assert names[0] in options(Run(tmp_path / "x y").sbatch(time="1:00:00"))


def test_odd_names_reach_slurm_and_the_shell(run: Run, cluster: Cluster) -> None:
    job = run.sbatch()
    assert f"--output={run.folder}/log.txt".replace("%", "%%") in options(job)
    subprocess.run(["bash", "-n", job], check=True)
    said = subprocess.run(
        ["bash", "-c", 'eval "$(grep -E "^(run|python)=" "$1")"; printf "%s\\n" "$run" "$python"', "-", job],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == [str(run.folder), sys.executable]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"time": "24:00"}, r"time must be \[DAYS-\]HOURS:MINUTES:SECONDS"),
        ({"time": "1:60:00"}, "got '1:60:00'"),
        ({"time": "a day"}, "got 'a day'"),
        ({"time": "0:05:00"}, "less than the job's time, 300 s; got 300"),
        ({"notice": 60}, "notice must be more than 60 s"),
        ({"cpus": 0}, "cpus must be at least 1; got 0"),
        ({"lines": ["qos=long"]}, "options of sbatch such as '--qos=long'; got 'qos=long'"),
        ({"lines": ["--qos=long\nrm -rf /"]}, "got '--qos=long"),
        ({"partition": "gpu\n"}, "partition must be one word; got 'gpu"),
        ({"account": ""}, "account must be one word; got ''"),
    ],
)
def test_what_slurm_would_misread_is_refused(run: Run, options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        run.sbatch(**options)
    assert not (run.folder / "job.sh").exists()


def test_plans_and_folders_that_no_job_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="device='cuda', not 'cuda:1'"):
        planned(tmp_path / "second", device="cuda:1").sbatch()
    with pytest.raises(RecipeError, match="Rename it"):
        planned(tmp_path / "two\nlines").sbatch()
    with pytest.raises(RecipeError, match="nodes must be at least 1; got 0"):
        dk.prepare(MICRO, "synthetic", tmp_path / "none", nodes=0)


def test_times_are_read_as_slurm_reads_them() -> None:
    assert [seconds(time) for time in ("0:00:01", "24:00:00", "2-12:30:00", "1-0:0:0")] == [1, 86400, 217800, 86400]


# ------------------------------------------------------------------------------------------------- a job and its end


@pytest.fixture
def job(run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose run is trained by a stand-in, and queued again one second after it was told to leave."""
    monkeypatch.setattr(sys, "executable", str(cluster.bin / "python"))
    return run.sbatch(notice=61)


@pytest.mark.parametrize(
    "acts, status, again",
    [
        ({"ENDS": "finished", "SAVES": 1}, 0, False),
        ({"ENDS": "early_stop", "SAVES": 1, "PREEMPTED": "2026-01-01T01:00:00"}, 0, False),
        ({"ENDS": "failed", "SAVES": 1, "EXIT": 3}, 3, False),
        ({"ENDS": "stopped", "SAVES": 1}, 0, False),  # by a signal that is not Slurm's
        ({"ENDS": "stopped", "SAVES": 1, "PREEMPTED": "2026-01-01T01:00:00"}, 0, True),
        ({"ENDS": "failed", "SAVES": 1, "PREEMPTED": "2026-01-01T01:00:00", "EXIT": 3}, 0, True),
        ({"ENDS": "stopped", "PREEMPTED": "2026-01-01T01:00:00"}, 1, False),
        ({"ENDS": "stopped", "SAVES": 1, "PREEMPTED": "2026-01-01T01:00:00", "STATE": "COMPLETING"}, 1, False),
    ],
)
def test_a_job_is_queued_again_only_if_slurm_ended_it(cluster, job, acts, status, again) -> None:
    done = cluster.start(job, **acts)
    assert done.wait(20) == status and cluster.queued_again() == again
    assert "job 4711 on n[1], started again 0 times" in cluster.log.read_text()


def test_a_job_starts_all_again_as_often_as_the_plan_says(cluster: Cluster, job: Path, run: Run) -> None:
    assert cluster.start(job, LOST=2, ENDS="finished", SAVES=1).wait(20) == 0
    assert [row["event"] for row in run.events()] == ["started"] * 3 + ["finished"]
    (run.folder / "events.jsonl").unlink()
    assert cluster.start(job, LOST=9).wait(20) == 137 and len(run.events()) == 1 + Plan.read(run.folder).restarts


def test_a_job_that_is_told_to_leave_saves_and_is_queued_again(cluster: Cluster, job: Path, run: Run) -> None:
    done = cluster.start(job, ENDS="stopped", SAVES=1, WAITS=1)
    until(lambda: run.state == "started")
    os.kill(done.pid, signal.SIGUSR1)
    assert done.wait(20) == 0 and run.state == "stopped"
    assert cluster.queued_again() and not (run.folder / "stop").exists()


def test_a_job_that_does_not_get_away_in_time_goes_on_from_its_checkpoint(
    cluster: Cluster, job: Path, run: Run
) -> None:
    done = cluster.start(job, WAITS=1, HANGS=1)
    until(lambda: run.state == "started")
    os.kill(done.pid, signal.SIGUSR1)
    until(cluster.asked.exists)
    assert done.poll() is None and cluster.queued_again()
    cluster.kill(done)


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(cluster: Cluster, job: Path, run: Run) -> None:
    done = cluster.start(job, ENDS="stopped", WAITS=1)
    until(lambda: run.state == "started")
    os.kill(done.pid, signal.SIGUSR1)
    assert done.wait(20) == 1 and not cluster.queued_again()
    assert "needs a longer --time" in cluster.log.read_text()


def test_who_stops_a_run_stops_its_job(cluster: Cluster, job: Path, run: Run) -> None:
    done = cluster.start(job, ENDS="stopped", SAVES=1, WAITS=1)
    until(lambda: run.state == "started")
    run.stop()
    os.kill(done.pid, signal.SIGUSR1)  # Slurm's word comes too late to matter
    assert done.wait(20) == 0 and not cluster.queued_again()
    slow = cluster.start(job, WAITS=1, HANGS=1)
    until(lambda: run.state == "started")
    run.stop()
    os.kill(slow.pid, signal.SIGUSR1)
    time.sleep(1.5)  # longer than Slurm's patience
    assert slow.poll() is None and not cluster.queued_again()
    cluster.kill(slow)
    waiting = cluster.start(job, ENDS="finished", SAVES=1, SLURM_RESTART_COUNT=1)
    assert waiting.wait(20) == 0 and run.state == "started"
    assert "while it was waiting" in cluster.log.read_text()
    assert cluster.start(job, ENDS="finished", SAVES=1).wait(20) == 0 and run.finished  # a new job is a new wish


@pytest.mark.slow
def test_a_job_trains_in_several_starts_as_in_one(tmp_path: Path, cluster: Cluster, data: Dataset) -> None:
    """Two processes under torchrun: told to leave by Slurm, then stopped by the user, then left alone."""
    asked = {"epochs": 12, "batch": 4, "device": "cpu", "workers": 0, "devices": 2, "progress": False}
    run = dk.prepare(MICRO, data.source, tmp_path / "run", **asked)
    job = run.sbatch()
    (cluster.bin / "python").unlink()

    def start_and(end: Callable[[subprocess.Popen[bytes]], object]) -> None:
        before, done = len(run.rows("step")), cluster.start(job)
        until(lambda: len(run.rows("step")) > before + 3 or done.poll() is not None, 200)
        end(done)
        assert done.wait(200) == 0, cluster.log.read_text()[-3000:]
        cluster.kill(done)

    start_and(lambda done: os.kill(done.pid, signal.SIGUSR1))
    assert run.state == "stopped" and cluster.queued_again()
    start_and(lambda done: run.stop())
    assert run.state == "stopped" and not cluster.queued_again()
    start_and(lambda done: None)
    assert run.finished and not cluster.queued_again()
    assert [row["event"] for row in run.events()].count("resumed") == 2
    whole = dk.train(MICRO, data.source, tmp_path / "whole", **asked)
    assert [row["terms"] for row in run.rows("step")] == [row["terms"] for row in whole.rows("step")]
    assert same(run, whole)
