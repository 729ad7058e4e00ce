"""What a run folder says right now, summed up in a `Snapshot`.

Nothing but the folder is read, so that any process can look, after a restart too, while another one trains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.errors import RecipeError
from deimkit.explore.story import last_words, state_of
from deimkit.explore.tail import Means, Sample, Tail, number
from deimkit.training.run import Plan, Run
from deimkit.training.timeline import Timeline

RECENT = 100  # steps that the pace, the memory and the time left are taken from
EVENTS = 50  # the newest that are kept
WATCHED = ("metrics.jsonl", "events.jsonl", "recipe.py", "run.json", "log.txt", "stop", "checkpoints/best.pt")


class Rows:
    """Everything worth keeping of the rows of `metrics.jsonl`: thinned curves, the newest steps, every epoch."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over, for a file that was rewritten."""
        self.count = 0
        self.longest = 0  # steps of the longest epoch
        self.curves = Means()
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.epochs: dict[int, dict[str, Any]] = {}
        self.matching, self.probes = Sample(), Sample()
        self.classes: frozenset[str] = frozenset()
        self._kinds: dict[str, str] = {}  # "mal/layer0" -> its column "terms/mal"

    def add(self, row: dict[str, Any]) -> None:
        """Count a row in; a row of an unknown kind counts for nothing."""
        match row:
            case {"kind": "step", "epoch": int(), "step": int(step)}:
                self._add_step(row, step)
            case {"kind": "epoch", "epoch": int(epoch)}:
                per_class = row.get("per_class")
                self.classes = frozenset(per_class) if isinstance(per_class, dict) else self.classes
                self.epochs[epoch] = {name: value for name, value in row.items() if name != "per_class"}
            case {"kind": "matching", "epoch": int(), "step": int()}:
                self.matching.add(row)
            case {"kind": "probe", "epoch": int()}:
                self.probes.add(row)

    def _add_step(self, row: dict[str, Any], step: int) -> None:
        terms = row.pop("terms", None)
        kinds: dict[str, float] = {}
        for name, value in terms.items() if isinstance(terms, dict) else ():
            kind = self._kinds.get(name) or self._kinds.setdefault(name, f"terms/{name.partition('/')[0]}")
            kinds[kind] = kinds.get(kind, 0.0) + (value if type(value) is float else number(value))
        self.count += 1
        self.longest = max(self.longest, step + 1)
        self.curves.add(row | kinds)
        self.recent.append(row)

    def losses(self) -> dict[str, NDArray[np.float64]]:
        """The curve of every kind of loss, weighted and summed over all outputs; the largest kind first."""
        kinds = {kind: self.curves.column(f"terms/{kind}") for kind in self.curves.names("terms/")}
        return dict(sorted(kinds.items(), key=lambda item: -float(np.nansum(item[1]))))


class Pace(NamedTuple):
    """How fast the newest steps were: seconds of a step, and the share of them spent waiting for images."""

    seconds: float
    waiting: float


def pace(recent: Sequence[Mapping[str, Any]], batch: float = math.nan) -> Pace:
    """The pace of step rows; those from before waiting was recorded give it by `batch` images at their images_per_s.

    Of more than ten steps the slowest is left out: it may have compiled the model or filled the loader.
    """
    timed = [(number(row.get("wait_s")), number(row.get("step_s"))) for row in recent]
    timed = sorted((pair for pair in timed if math.isfinite(sum(pair))), key=sum)
    timed = timed[:-1] if len(timed) > 10 else timed
    if timed:
        waited, total = sum(wait for wait, _ in timed), sum(map(sum, timed))
        return Pace(total / len(timed), waited / total if total else 0.0)
    speed = number(recent[-1].get("images_per_s")) if recent else math.nan
    return Pace(batch / speed if speed > 0 else math.nan, math.nan)


def seconds_left(timeline: Timeline, done: float, step: float, evaluation: float, every: int, evaluated: int) -> float:
    """Seconds to the end of a run that is `done` (in epochs), if it goes on as it did.

    step, evaluation: seconds of one. every: epochs between evaluations. evaluated: the epochs that need none any more.
    """
    steps = max(timeline.total - done, 0) * timeline.steps_per_epoch
    coming = range(min(evaluated, timeline.total), timeline.total)
    count = sum((epoch + 1) % every == 0 or epoch + 1 == timeline.total for epoch in coming)
    return steps * step + count * evaluation


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at one moment. What is not known is NaN, None or empty; times are in seconds, `done` and `x` in epochs.

    state: "not started", "starting", "training", "stopping", "stopped", "finished", "failed", "died" (its process is
    gone without a word) or "gone" (its folder is). x: (n,) when, of the thinned curves; losses: (n,) of every kind.
    epochs: the rows of evaluated epochs. claim: the AP in percent that the recipe's paper states, if the run has COCO's
    classes. waiting: share of a step. matching: rows for `draw_microscope`. version: changes when a curve has grown by
    half a percent. trouble: what could not be read.
    """

    name: str
    folder: Path
    state: str
    pid: int | None = None
    recipe: str = ""
    timeline: Timeline | None = None
    claim: float | None = None
    done: float = 0.0
    x: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    losses: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    step_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    wait_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    epochs: tuple[dict[str, Any], ...] = ()
    loss: float = math.nan
    lr: float = math.nan
    images_per_s: float = math.nan
    waiting: float = math.nan
    memory_mib: float = math.nan
    epoch_s: float = math.nan
    left_s: float = math.nan
    events: tuple[dict[str, Any], ...] = ()
    matching: tuple[dict[str, Any], ...] = ()
    words: str = ""
    trouble: str = ""
    version: tuple[int, int] = (0, 0)

    @property
    def alive(self) -> bool:
        """Whether a process trains the run now."""
        return self.pid is not None

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the epoch with the best AP."""
        rows = [row for row in self.epochs if math.isfinite(number(row.get("AP")))]
        return max(rows, key=lambda row: number(row["AP"]), default=None)

    @property
    def stage(self) -> str:
        """The augmentation stage that the run is in, or ""."""
        if self.timeline is None or not self.done:
            return ""
        return self.timeline.stage(min(int(self.done), self.timeline.total - 1))


class Reader:
    """Reads a run folder again and again, each time only what is new."""

    def __init__(self, run: Run, name: str | None = None) -> None:
        self.run = run
        self.name = name or run.folder.resolve().name
        self.rows = Rows()
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._rewritten = 0
        self._metrics = Tail(run.folder / "metrics.jsonl")
        self._happened = Tail(run.folder / "events.jsonl")
        self._parsed: tuple[Any, Any, str] = (None, None, "")  # the text of a recipe, the recipe, what was wrong
        self._last = Snapshot(self.name, run.folder, "not started")

    def stamp(self) -> tuple[Any, ...]:
        """What differs if the folder does: cheap to ask every other second."""
        try:
            return *(_stat(self.run.folder / name) for name in WATCHED), self.run.pid
        except (OSError, ValueError) as error:
            return (str(error),)

    def read(self) -> Snapshot:
        """The run as it is now; as it was, with a sentence of `trouble`, where that cannot be read."""
        try:
            self._last = self._read()
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._last = replace(self._last, trouble=f"The folder could not be read: {error or type(error).__name__}")
        return self._last

    def _read(self) -> Snapshot:
        folder = self.run.folder
        for row in self._metrics.rows(self._start_over):
            self.rows.add(row)
        self.events.extend(self._happened.rows(self.events.clear))
        recipe, trouble = self._recipe()
        pid, event = self.run.pid, str(self.events[-1].get("event", "")) if self.events else "new"
        state = state_of(event, pid is not None, (folder / "stop").exists()) if folder.is_dir() else "gone"
        return Snapshot(
            name=self.name,
            folder=folder,
            state=state,
            pid=pid,
            recipe=getattr(recipe, "name", ""),
            events=tuple(self.events),
            words=last_words(folder) if state in ("failed", "died") else "",
            trouble=trouble,
            **self._numbers(recipe, pid is not None),
        )

    def _start_over(self) -> None:
        self._rewritten += 1
        self.rows.forget()

    def _recipe(self) -> tuple[Any, str]:
        """The recipe of the run, parsed once, or None; and what is wrong with it."""
        from deimkit.recipes import parse

        path = self.run.folder / "recipe.py"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and text != self._parsed[0]:
            try:
                self._parsed = text, parse(text), ""
            except RecipeError as error:
                self._parsed = text, None, f"recipe.py cannot be read: {error}"
        return self._parsed[1:]

    def _numbers(self, recipe: Any, alive: bool) -> dict[str, Any]:
        """The fields of a snapshot that come from the rows."""
        rows, timeline = self.rows, recipe and recipe.timeline
        length = max(rows.longest, timeline.steps_per_epoch if timeline else 1)
        last: dict[str, Any] = rows.recent[-1] if rows.recent else {}
        evaluated = 1 + max(rows.epochs, default=-1)
        done = max((last["epoch"] + (last["step"] + 1) / length) if last else 0.0, float(evaluated))
        batch = float(recipe.batch) if recipe else math.nan
        step, waiting = pace(rows.recent, batch)
        epochs = tuple(rows.epochs[epoch] for epoch in sorted(rows.epochs))
        evaluation = _mean([number(row.get("evaluate_s")) for row in epochs[-3:]])
        epoch_s = number(epochs[-1].get("train_s")) + evaluation if epochs else math.nan
        left = math.nan
        if alive and timeline:
            every = Plan.read(self.run.folder).evaluate_every
            left = seconds_left(timeline, done, step, 0.0 if math.isnan(evaluation) else evaluation, every, evaluated)
        speed = batch / step if math.isfinite(waiting) else number(last.get("images_per_s"))
        return {
            "timeline": timeline,
            "claim": recipe.paper.ap if recipe and recipe.paper and _are_coco(rows.classes) else None,
            "done": done,
            "x": rows.curves.column("epoch") + rows.curves.column("step") / length,
            "total": rows.curves.column("loss"),
            "losses": rows.losses(),
            "step_s": rows.curves.column("step_s"),
            "wait_s": rows.curves.column("wait_s"),
            "epochs": epochs,
            "loss": number(last.get("loss")),
            "lr": number(last.get("lr")),
            "images_per_s": speed,
            "waiting": waiting,
            "memory_mib": _largest([number(row.get("memory_mib")) for row in rows.recent]),
            "epoch_s": epoch_s if math.isfinite(epoch_s) else step * length,
            "left_s": left,
            "matching": (*rows.matching.rows, *rows.probes.rows),
            "version": (self._rewritten, int(200 * math.log1p(rows.count))),
        }


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _mean(values: Sequence[float]) -> float:
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def _are_coco(classes: frozenset[str]) -> bool:
    from deimkit.weights.classes import COCO_NAMES

    return classes == frozenset(COCO_NAMES)


def _stat(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, or None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
