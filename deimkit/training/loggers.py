"""Loggers show a run in TensorBoard, Weights & Biases or MLflow while it trains, each through its own library.

metrics.jsonl remains what a run is read from; a logger is a window on it. Once it is open it may fail, hang or be slow:
the training neither waits for it nor ends with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol

from deimkit.errors import RecipeError
from deimkit.training.run import each_row, plain

PAUSE = 2.0  # seconds from one look for new rows to the next; as much of the curves is lost if a run is killed
PATIENCE = 60.0  # seconds that the loggers get to end
BACKLOG = 100_000  # rows that may wait for a logger, some hours of a training

APART = {"kind", "epoch", "step", "global_step", "per_class"}  # where a row belongs, and what gets tags of its own
TAGS = {
    "step": {
        "epoch": "progress/epoch",
        "loss": "loss/total",
        "terms": "loss",
        "lr": "rate/lr",
        "boxes": "batch/boxes",
        "images_per_s": "speed/images_per_s",
        "wait_s": "speed/wait_s",
        "step_s": "speed/step_s",
        "memory_mib": "memory/mib",
    },
    "epoch": {"train_s": "speed/train_s", "evaluate_s": "speed/evaluate_s"},
}
GROUPS = {"epoch": "val"}  # the group of what TAGS does not name; for other kinds of rows, the kind

STEP = "global_step"  # how many steps a run has trained, the x axis of everything
PARAM_CHARS, NOTE_CHARS = 500, 5000  # that every MLflow server takes, of a parameter and of a run's description
PARAMS, METRICS = 100, 1000  # that MLflow takes at once


# ------------------------------------------------------------------------------------------------------------ rows


class Point(NamedTuple):
    """The scalars of a row by their tags, where `step` steps were trained, at `time` in seconds since 1970."""

    kind: str
    step: int
    time: float
    scalars: dict[str, float]


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl by tags such as "loss/mal/final", "val/AP50" and "val_AP/person".

    All tools make one group of the tags with the same beginning. A tag has letters, digits, "_" and "/" only, which all
    of them take. Of the classes only the AP is told; lists (histograms) are left out.
    """
    row = plain(row)
    tags, group = TAGS.get(row["kind"], {}), GROUPS.get(row["kind"], row["kind"])
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in tags or name not in APART:
            found |= leaves(tags.get(name, f"{group}/{name}"), value)
    for name, scores in row.get("per_class", {}).items():
        tag = "val_AP/" + (re.sub(r"\W", "_", name)[:100] or "_")
        while tag in found:  # "c+" and "c-" are two classes
            tag += "_"
        found |= leaves(tag, scores["AP"])
    return found


def leaves(tag: str, value: Any) -> dict[str, float]:
    """The numbers in nested dicts, by their path."""
    match value:
        case dict():
            inner = [leaves(f"{tag}/{name.replace('.', '/')}", item) for name, item in value.items()]
            return {path: number for numbers in inner for path, number in numbers.items()}
        case bool():
            return {}
        case int() | float():
            return {tag: float(value)}
    return {}


def settings(value: Any, path: str) -> dict[str, Any]:
    """The fields of nested dataclasses by their path: as they are, or as text where they are no plain JSON value."""
    if is_dataclass(value):
        inner = [settings(getattr(value, f.name), f"{path}/{f.name}") for f in fields(value)]
        return {name: item for items in inner for name, item in items.items()}
    simple = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return {path: value if simple else repr(value)}


def last_steps(metrics: Path) -> dict[str, int]:
    """The highest step that metrics.jsonl holds of every kind of row."""
    last: dict[str, int] = {}
    for row in each_row(metrics):
        last[row["kind"]] = max(last.get(row["kind"], 0), row.get(STEP, 0))
    return last


def highest(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """The higher step of every kind."""
    return {kind: max(a.get(kind, 0), b.get(kind, 0)) for kind in {**a, **b}}


# --------------------------------------------------------------------------------------------------------- loggers


@dataclass(frozen=True)
class Shown:
    """The run that a logger is to show.

    step: how many steps it has trained. recipe: its text. settings: what it is trained with, by name. id: what the tool
    called it before, or None.
    """

    folder: Path
    step: int
    recipe: str
    settings: dict[str, Any]
    id: str | None


class Logger(Protocol):
    """What shows a run in a tool.

    id: what the tool calls this run. last: the last step that the tool had of it when opened, or None if it cannot
    say. Any method may raise anything.
    """

    id: str
    last: int | None

    @classmethod
    def open(cls, run: Shown) -> Logger:
        """A logger that begins to show `run`, or goes on with it."""

    def log(self, points: Sequence[Point]) -> None:
        """Show points, whose steps do not fall."""

    def close(self, state: str) -> None:
        """Show how the run ended ("finished", "early_stop", "stopped" or "failed"), and end."""


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir` the folder above all runs shows them side by side."""

    id = "tensorboard"

    def __init__(self, writer: Any, step: int) -> None:
        self.writer, self.step = writer, step
        self.last: int | None = step  # whatever came after it was taken back

    @classmethod
    def open(cls, run: Shown) -> TensorBoard:
        """Raises `ImportError` if tensorboard is broken."""
        from torch.utils.tensorboard import SummaryWriter

        # The first start that TensorBoard reads takes nothing back, so even a fresh run has to write one.
        writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        if run.id is None:
            rows = [f"| {name} | `{value}` |" for name, value in run.settings.items()]
            writer.add_text("recipe", fenced(run.recipe), 0)
            writer.add_text("settings", "\n".join(["| | |", "|-|-|", *rows]), 0)
        return cls(writer, run.step)

    def log(self, points: Sequence[Point]) -> None:
        """Write scalars with their step and time."""
        for point in points:
            self.step = point.step
            for tag, value in point.scalars.items():
                self.writer.add_scalar(tag, value, point.step, point.time)
        self.writer.flush()

    def close(self, state: str) -> None:
        """Write the state as a text."""
        self.writer.add_text("state", state, self.step)
        self.writer.close()


class WandB:
    """A run of Weights & Biases, with its files in RUN/wandb; WANDB_MODE, WANDB_PROJECT and the like are obeyed."""

    def __init__(self, run: Any) -> None:
        self.run, self.id = run, str(run.id)
        self.step = run.step  # the lowest that may still be logged
        self.last: int | None = None if run.offline else self.step - 1

    @classmethod
    def open(cls, run: Shown) -> WandB:
        """Raises what `wandb.init` does: nobody is logged in, no network."""
        wandb = import_module("wandb")
        shown = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "deimkit"),
            name=os.environ.get("WANDB_NAME", run.folder.name) if run.id is None else None,
            dir=str(run.folder),
            id=run.id,
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
            config={"recipe": run.recipe, **run.settings},
            allow_val_change=True,
        )
        shown.define_metric(STEP)
        shown.define_metric("*", step_metric=STEP)
        return cls(shown)

    def log(self, points: Sequence[Point]) -> None:
        """Log rows at their own step, which a resumed run counts on where it was offline.

        wandb drops a row whose step lies behind, as an epoch's may after a kill; it is told at the next one then, and
        the metric that all charts are drawn over says where it belongs.
        """
        for point in points:
            self.step = max(self.step, point.step)
            self.run.log({**point.scalars, STEP: point.step}, step=self.step)

    def close(self, state: str) -> None:
        """Put the state into the summary and end the run, which waits for what is still to be sent."""
        self.run.summary["state"] = state
        self.run.finish(exit_code=int(state == "failed"))


class MLflow:
    """A run of MLflow, in RUN/mlflow unless MLFLOW_TRACKING_URI says where; its experiment is "deimkit" by default."""

    def __init__(self, client: Any, id: str, last: int) -> None:
        self.client, self.id = client, id
        self.last: int | None = last

    @classmethod
    def open(cls, run: Shown) -> MLflow:
        """Raises what MLflow does: no such run any more, no answer from the server."""
        mlflow = import_module("mlflow")
        tracked = mlflow.is_tracking_uri_set()
        client = mlflow.MlflowClient(mlflow.get_tracking_uri() if tracked else local(run.folder))
        if run.id is not None:
            client.update_run(run.id, status="RUNNING")
            return cls(client, run.id, int(client.get_run(run.id).data.metrics.get(STEP, 0)))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "deimkit")
        found = client.get_experiment_by_name(name)
        files = None if tracked else (run.folder / "mlflow" / "artifacts").as_uri()  # for those who add some
        experiment = client.create_experiment(name, files) if found is None else found.experiment_id
        note = {"mlflow.note.content": fenced(run.recipe)[:NOTE_CHARS], "mlflow.source.name": "deimkit"}
        made = client.create_run(experiment, run_name=run.folder.name, tags=note)
        params = [mlflow.entities.Param(name, str(value)[:PARAM_CHARS]) for name, value in run.settings.items()]
        for part in parts(params, PARAMS):
            client.log_batch(made.info.run_id, params=part)
        return cls(client, made.info.run_id, 0)

    def log(self, points: Sequence[Point]) -> None:
        """Log all numbers in as few requests as MLflow takes."""
        metric = import_module("mlflow").entities.Metric
        metrics = [
            metric(tag, value, round(1000 * point.time), point.step)
            for point in points
            for tag, value in point.scalars.items()
        ]
        end = points[-1]
        metrics.append(metric(STEP, end.step, round(1000 * end.time), end.step))  # what `open` asks for
        for part in parts(metrics, METRICS):
            self.client.log_batch(self.id, metrics=part)

    def close(self, state: str) -> None:
        """End the run as finished, killed or failed, with the state as a tag."""
        self.client.set_tag(self.id, "deimkit.state", state)
        status = {"stopped": "KILLED", "failed": "FAILED"}.get(state, "FINISHED")
        self.client.set_terminated(self.id, status=status)


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}  # as pip calls them


def fenced(code: str) -> str:
    """Python as markdown."""
    return f"```python\n{code.strip()}\n```"


def local(folder: Path) -> str:
    """The address of the MLflow store within a run folder."""
    (folder / "mlflow").mkdir(parents=True, exist_ok=True)
    path = str(folder / "mlflow" / "mlflow.db")
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")  # all that MLflow would take for something else


def parts(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """`items` in lists of at most `size`."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


# ------------------------------------------------------------------------------------------------------- a run's all


class Channel:
    """A logger in a thread of its own; rows told before, up to the step `told` of their kind, do not reach it."""

    def __init__(self, logger: Logger, told: dict[str, float]) -> None:
        self.logger, self.told = logger, told
        self.waiting: SimpleQueue[Point] = SimpleQueue()
        self.ended = Event()
        self.state = ""
        self.failure: str | None = None
        self.thread = Thread(target=self._work, daemon=True)  # one that hangs does not keep the process alive

    def take(self, point: Point) -> None:
        """Have a point shown soon."""
        if point.step > self.told.get(point.kind, -1):
            self.waiting.put(point)
        if self.waiting.qsize() > BACKLOG:
            self.failure = self.failure or f"{BACKLOG} rows wait for it, it hangs or is too slow"

    def end(self, state: str) -> None:
        """Have what waits shown, and how the run ended."""
        self.state = state
        self.ended.set()

    def _work(self) -> None:
        try:
            while not self.ended.wait(PAUSE):
                self._pass_on()
            self._pass_on()
            self.logger.close(self.state)
        except Exception as error:  # whatever libraries, disks and networks come up with, the training goes on
            self.failure = f"{type(error).__name__}: {error}"
            with suppress(Exception):  # it has failed already; what it still holds is to be let go
                self.logger.close("failed")

    def _pass_on(self) -> None:
        points: list[Point] = []
        try:
            while True:
                points.append(self.waiting.get_nowait())
        except Empty:
            if points:
                self.logger.log(points)


class Loggers:
    """All loggers of a run. One that fails is told of by `lost(name, why)`, once, and gets nothing any more."""

    def __init__(self, lost: Callable[[str, str], None]) -> None:
        self.channels: dict[str, Channel] = {}
        self.lost = lost

    def add(self, name: str, logger: Logger, told: dict[str, float]) -> None:
        """Show what comes from now on through `logger` as well."""
        self.channels[name] = Channel(logger, told)
        self.channels[name].thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl; its "global_step" counts the steps that were trained, its own included."""
        if self.channels:
            point = Point(row["kind"], row[STEP], time.time(), scalars(row))
            for channel in self.channels.values():
                channel.take(point)
            self._drop_failed()

    def close(self, state: str) -> None:
        """Show how the run ended, and wait for all loggers to end, for a minute at most."""
        for channel in self.channels.values():
            channel.end(state)
        deadline = time.monotonic() + PATIENCE
        for channel in self.channels.values():
            channel.thread.join(max(deadline - time.monotonic(), 0))
            if channel.thread.is_alive():
                channel.failure = channel.failure or f"it did not end within {PATIENCE:.0f} s"
        self._drop_failed()
        self.channels.clear()

    def _drop_failed(self) -> None:
        failures = {name: channel.failure for name, channel in self.channels.items() if channel.failure is not None}
        for name, why in failures.items():
            del self.channels[name]
            self.lost(name, why)


def expect_loggers(names: Sequence[str]) -> None:
    """Raise `RecipeError` unless every name is that of a logger, and its library is installed."""
    for name in names:
        if name not in LOGGERS:
            near = get_close_matches(name, LOGGERS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(LOGGERS)}."
            raise RecipeError(f"No logger is called {name!r}. {hint}")
        spec = find_spec(name)
        if (
            spec is None or spec.origin is None
        ):  # a mere folder of that name, such as wandb leaves behind, is no library
            raise RecipeError(f"The logger {name!r} needs a library that is not installed: `pip install {name}`.")


def open_loggers(
    names: Sequence[str], folder: Path, recipe: Any, plan: Any, step: int, lost: Callable[[str, str], None]
) -> Loggers:
    """The loggers called `names` for the run in `folder`, which has trained `step` steps and goes on from there.

    recipe, plan: dataclasses whose fields are shown beside the text of recipe.py. lost: called with the name of a
    logger and why, once, when it can no longer be used. A resumed run goes on as the same run in every tool, by the ids
    in loggers.json. Steps that were trained after its last checkpoint, and so are trained again, are shown once:
    TensorBoard takes the first time back, the others, which cannot, leave out the second. Call it before those rows
    are taken out of metrics.jsonl, which says what an offline tool has. Raises `RecipeError` for a name or a library
    that is not there, and for a logger that cannot be opened before the first step; later, such a one is `lost`.
    """
    expect_loggers(names)
    loggers = Loggers(lost)
    if not names:
        return loggers
    folder = folder.resolve()
    kept = read_kept(folder)
    seen = last_steps(folder / "metrics.jsonl")
    text = (folder / "recipe.py").read_text(encoding="utf-8")
    shown = {**settings(recipe, "recipe"), **settings(plan, "plan")}
    for name in dict.fromkeys(names):
        known = kept.get(name)
        try:
            logger = LOGGERS[name].open(Shown(folder, step, text, shown, known and known["id"]))
        except Exception as error:  # libraries raise what they like, and a run must not end for want of a window on it
            if step == 0:
                loggers.close("failed")
                raise RecipeError(f"The logger {name!r} cannot be opened: {error} Mend it, or leave it out.") from error
            lost(name, f"{type(error).__name__}: {error}")
            continue
        told = highest(known["told"], seen) if known else {}
        kept[name] = {"id": logger.id, "told": told}
        has = math.inf if logger.last is None else logger.last
        loggers.add(name, logger, {kind: min(last, has) for kind, last in told.items()})
    try:
        write_kept(folder, kept)
    except OSError as error:
        lost("loggers.json", f"{error}; after an interruption the tools will show another run")
    return loggers


def read_kept(folder: Path) -> dict[str, Any]:
    """What loggers.json holds of every logger that was ever opened: its id, and the last step told of each kind."""
    kept: dict[str, Any] = {}
    with suppress(OSError, json.JSONDecodeError):  # not there yet, or cut short: the tools begin new runs
        kept = json.loads((folder / "loggers.json").read_text())
    return kept


def write_kept(folder: Path, kept: dict[str, Any]) -> None:
    """Replace loggers.json, all at once."""
    partial = folder / "loggers.partial"
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(partial, folder / "loggers.json")
