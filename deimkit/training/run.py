"""A run is a folder: what was asked, what happened, and what came out; `Run` is only a handle on it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from deimkit.errors import CheckpointError, DeimkitError, RecipeError
from deimkit.ranks import ALONE, NEW_STORE, Ranks
from deimkit.training.claim import HANDOVER, Claim, holder
from deimkit.training.metrics import INDEX, frame, known_kind
from deimkit.training.slurm import job_script

if TYPE_CHECKING:
    from pandas import DataFrame

    from deimkit.explore.board import Board

KIND = re.compile(r'\{"kind": "(\w+)"')  # how rows begin that are of several kinds


@dataclass(frozen=True)
class Plan:
    """What a run needs to know beside its recipe; saved as `run.json`.

    data: path of the dataset or "synthetic". fingerprint: what it held when the run began (`Dataset.fingerprint`), or
    "" if nobody looked. device: "auto", "cpu", "cuda", "mps". precision: "auto" (bf16 on a GPU that has it, else fp32),
    "bf16", "fp16", "fp32". workers: loader processes, or None for what suits the machine. accumulate: micro-batches per
    step, or "auto": one, and twice as many whenever a step runs out of memory. on_problem: "refuse" to train on a
    dataset with errors, or "skip" the images that have them. patience: epochs without a better AP before stopping, or
    None. evaluate_every: epochs between evaluations. save_every: steps between checkpoints within an epoch, or None.
    weights: a file to start from, or None. devices: processes on this machine that share every batch, one for each GPU.
    nodes: machines that do, and rdzv: the host:port of one of them, at which they meet (each `resume`s the run, whose
    folder all see). restarts: how often all processes start again from the last checkpoint when one of them is lost.
    deterministic: the same bits every time on a GPU too, for more time and memory; a CPU gives them anyhow. compile:
    let torch compile the detector, which takes minutes and may pay in long runs on a GPU (`deimkit profile --compile`).
    loggers: tools that show the run as well, "tensorboard", "wandb", "mlflow", each by its own library.
    """

    data: str
    fingerprint: str = ""
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    workers: int | None = None
    accumulate: int | Literal["auto"] = 1
    on_problem: str = "refuse"
    patience: int | None = None
    evaluate_every: int = 1
    save_every: int | None = None
    weights: str | None = None
    devices: int = 1
    nodes: int = 1
    rdzv: str | None = None
    restarts: int = 3
    deterministic: bool = False
    compile: bool = False
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "loggers", tuple(self.loggers))  # JSON has lists
        for name, known in {"precision": ("auto", "bf16", "fp16", "fp32"), "on_problem": ("refuse", "skip")}.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        for name in ("evaluate_every", "patience", "save_every", "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1; got {value}.")
        if self.accumulate != "auto" and (isinstance(self.accumulate, str) or self.accumulate < 1):
            raise RecipeError(f"accumulate must be at least 1, or 'auto'; got {self.accumulate!r}.")
        if self.compile and self.deterministic:
            raise RecipeError(
                "compile and deterministic cannot both be True: what torch compiles may sum in any order."
            )
        if self.accumulate == "auto" and self.processes > 1:
            raise RecipeError(
                "accumulate='auto' is for a single process; several need to agree: `rehearse(..., batch='largest')` "
                "says which number fits."
            )

    @property
    def parts(self) -> int:
        """Micro-batches of the first step."""
        return 1 if self.accumulate == "auto" else self.accumulate

    @property
    def processes(self) -> int:
        """How many share every batch."""
        return self.devices * self.nodes

    def expect_meeting(self) -> None:
        """Raise `RecipeError` if several machines have no place to meet; a job of Slurm finds one itself."""
        if self.nodes > 1 and not self.rdzv:
            raise RecipeError(
                f"{self.nodes} nodes need rdzv='HOST:PORT' to meet at, or a job of Slurm: `prepare` the run, then "
                f"`Run.sbatch`; got rdzv={self.rdzv!r}."
            )

    @staticmethod
    def read(folder: Path) -> Plan:
        """The plan of a run folder."""
        values = json.loads((folder / "run.json").read_text())
        return Plan(**{f.name: values[f.name] for f in fields(Plan) if f.name in values})

    def write(self, folder: Path) -> None:
        """Save the plan into a run folder."""
        (folder / "run.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


class Run:
    """A handle on a run folder; it may be attached to at any time, from any process.

    The folder holds recipe.py, run.json, metrics.jsonl, events.jsonl, checkpoints/last.pt and best.pt, report.html.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._launched: subprocess.Popen[bytes] | None = None  # by this handle
        if not (self.folder / "run.json").is_file():
            raise CheckpointError(
                f"No run in {self.folder} (no run.json). "
                f"`deimkit train RECIPE --data DATA --out {self.folder}` starts one."
            )

    @classmethod
    def attach(cls, folder: Path | str) -> Run:
        """The run that lives in `folder`."""
        return cls(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.state})"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best AP, or the newest one where none was evaluated yet."""
        best = self.folder / "checkpoints" / "best.pt"
        return best if best.is_file() else self.last

    @property
    def report(self) -> Path:
        """The page that sums the run up."""
        return self.folder / "report.html"

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What was measured so far as it lies in `metrics.jsonl`: the rows of one kind (see `metrics`), or all."""
        return list(each_row(self.folder / "metrics.jsonl", *([] if kind is None else [known_kind(kind)])))

    def metrics(self, kind: str = "epoch") -> DataFrame:
        """What was measured so far as a pandas DataFrame, in which a number that was not finite is NaN.

        kind: "epoch" has a row for every evaluated epoch, the first being 0: seconds, AP to ARl in [0, 1], and for each
        class "AP/cat", "AP50/cat", ... "step" has one for every step of the run: its epoch, loss, rate, seconds, and
        every weighted term, such as "mal/final". "matching" has what the matcher saw at every tenth step
        (`Microscope.row`), on the same index, and "probe" how the matches changed with each epoch (`Probe.row`).
        Raises `DeimkitError` for another kind, and if pandas is not installed. `rows` has the same as plain values.
        """
        whole = INDEX[known_kind(kind)]  # of which there is a row for every step, even where `kind` has fewer
        return frame(each_row(self.folder / "metrics.jsonl", kind, whole), kind)

    def events(self) -> list[dict[str, Any]]:
        """What happened: started, resumed, skipped, rolled back, dropped, stopped, finished, failed."""
        return read_rows(self.folder / "events.jsonl")

    @property
    def state(self) -> str:
        """The latest event, or "new"."""
        return str(next((row["event"] for row in reversed(self.events())), "new"))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train: the timeline is over, or the AP did not get better any more."""
        return self.state in ("finished", "early_stop")

    @property
    def pid(self) -> int | None:
        """The process that trains this run now, or None."""
        return holder(self.folder)

    def note(self, event: str, **facts: Any) -> None:
        """Write down that something happened."""
        append(self.folder / "events.jsonl", {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **facts})

    @contextmanager
    def training(self, ranks: Ranks = ALONE) -> Iterator[None]:
        """A block that trains this run: no other process may meanwhile, and what ends it early is noted as "failed".

        ranks: those that train it together; the claim is the first one's, or that of whoever launched them all.
        """
        launched = ranks.many and HANDOVER in os.environ
        with Claim(self.folder) if ranks.main and not launched else nullcontext():
            try:
                yield
            except BaseException as error:
                where = {"rank": ranks.rank} if ranks.many else {}
                with suppress(CheckpointError):  # on a full disk nothing can be noted either
                    self.note("failed", why=str(error) or type(error).__name__, **where)
                raise

    def tail(self, lines: int = 20) -> str:
        """The last lines that its process printed, when it trains in one of its own."""
        log = self.folder / "log.txt"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""

    def board(self, *others: Run | Path | str) -> Board:
        """This run, and `others` beside it, as a page that keeps itself up to date in a notebook."""
        from deimkit.explore.board import Board

        return Board(self, *others)

    def resume(self, wait: bool = True, progress: bool = True) -> Run:
        """Continue this run from its last checkpoint, exactly as if it had never stopped; a finished one is left as is.

        wait: return when it has ended, rather than train it in a process of its own. progress: say how far it is.
        Raises `DataError` if its data is not what it was; `deimkit.resume(run, dataset=...)` goes on with other data.
        """
        from deimkit.api import resume

        return resume(self, wait=wait, progress=progress)

    def stop(self) -> None:
        """Ask the training process to save a checkpoint and leave after its current step."""
        (self.folder / "stop").touch()

    def wait(self, timeout: float | None = None) -> Run:
        """Return when the training process has ended; raises `DeimkitError` with its last words if it failed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.pid is not None or (self._launched is not None and self._launched.poll() is None):
            if deadline is not None and time.monotonic() > deadline:
                raise DeimkitError(
                    f"{self.folder} is still training after {timeout:.0f} s; wait longer or call stop()."
                )
            time.sleep(0.2)
        if not self.finished and self.state != "stopped":
            raise DeimkitError(f"The run in {self.folder} failed: {self._last_words()}")
        return self

    def start(self) -> Run:
        """Train this run (from its last checkpoint, if it has one) in a process of its own that outlives this one.

        Where several are to share it, that process is torchrun, which starts and watches the others.
        """
        command = [sys.executable, *self.launcher(), "-m", "deimkit", "train", "--resume", str(self.folder), "--wait"]
        if Plan.read(self.folder).nodes > 1:  # all machines launch it, and the first process claims it
            self._launched = self._launch(command, {NEW_STORE: "1"})
        else:
            with Claim(self.folder) as claim:
                self._launched = self._launch(command, {HANDOVER: str(claim.handle)}, pass_fds=[claim.handle])
                claim.name(self._launched.pid)
        Thread(target=self._launched.wait, daemon=True).start()  # so that it leaves no zombie here
        return self

    def _launch(self, command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        """A process that has nothing to do with this one, and whose words go into the folder."""
        self.note("launched")
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **environment},
                **options,
            )

    def launcher(self) -> list[str]:
        """The arguments of Python that make torchrun start this run's processes; none for a single one."""
        plan = Plan.read(self.folder)
        plan.expect_meeting()
        if plan.processes == 1:
            return []
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={plan.rdzv}", f"--rdzv-id={self.folder.name}"]
        return [
            *("-m", "torch.distributed.run", f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.devices}"),
            f"--max-restarts={plan.restarts}",
            *(meet if plan.rdzv else ["--standalone"]),
        ]

    def sbatch(
        self,
        time: str = "24:00:00",
        partition: str | None = None,
        account: str | None = None,
        cpus: int | None = None,
        notice: int = 300,
        lines: Sequence[str] = (),
    ) -> Path:
        """Write `job.sh` into the folder: the job for Slurm that trains this run, as often as it takes to finish it.

        `sbatch` that file, on a cluster whose nodes see the folder, the data and this Python at the same paths. Nodes
        and GPUs are those of the plan. time: "[DAYS-]HOURS:MINUTES:SECONDS"; `notice` seconds before it is over the run
        saves and leaves, and the job waits in the queue again, as it does when it is preempted or loses a node; not
        when it failed, or after `stop()`. partition, account: as the cluster has them. cpus: cores of each node, by
        default one for each process and its loaders. lines: further options of sbatch, such as "--mem=200G".

        From elsewhere `state`, `rows`, `board` and `stop` work as ever. `pid` and `wait` need a file system that shares
        its locks (flock) between machines; Slurm itself sees to it that a run has one job at a time. Returns the file.
        Raises `RecipeError`.
        """
        script = job_script(
            self.folder, Plan.read(self.folder), time, partition, account, cpus=cpus, notice=notice, lines=lines
        )
        job = self.folder / "job.sh"
        job.write_text(script, encoding="utf-8")
        return job

    def _last_words(self) -> str:
        """Why the run ended before it should have."""
        row = self.events()[-1:] or [{}]
        if row[0].get("event") == "failed":
            return str(row[0]["why"])
        log = self.folder / "log.txt"
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        words = next((line for line in reversed(lines) if line.strip()), "its process left no word")
        return f"{words} (killed? `resume` continues from the last checkpoint)"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSONL file; a number that is not finite is written as null. Raises `CheckpointError`."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row), allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"Could not write {path} ({error}). Free some space, then resume.") from error


def plain(value: Any) -> Any:
    """`value` in JSON's types: paths as text, and null for a number that is not finite."""
    match value:
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bool() | int() | str() | None:
            return value
        case Path():
            return str(value)
    number = float(value)
    return number if math.isfinite(number) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a line that a crash cut short is left out."""
    return list(each_row(path))


def each_row(path: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file one by one, of these kinds or of all; a line that a crash cut short is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            begins = KIND.match(line) if kinds else None
            if begins and begins[1] not in kinds:
                continue  # without parsing it, which is what takes time
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                if not kinds or row.get("kind") in kinds:
                    yield row


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the `wanted` rows of a JSONL file, and no line that a crash cut short."""
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if wanted(row)), encoding="utf-8")
        os.replace(partial, path)


def as_run(what: Any) -> Run | None:
    """The run that is meant, if one is: itself, or its folder."""
    if isinstance(what, (str, Path)) and (Path(what) / "run.json").is_file():
        return Run(what)
    return what if isinstance(what, Run) else None
