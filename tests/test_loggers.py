"""Loggers show every row once, under names that all tools take, and a training neither waits for them nor fails."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from deimkit.errors import RecipeError
from deimkit.training import loggers
from deimkit.training.loggers import Loggers, Point, Shown, expect_loggers, last_steps, open_loggers, scalars, settings
from deimkit.training.run import Plan, append, keep_rows

# ------------------------------------------------------------------------------------------------------------ rows


def step_row(step: int, loss: float = 1.0) -> dict[str, Any]:
    """A row as the trainer writes it."""
    terms = {"mal/final": loss, "mal/denoise.layer0": 0.5}
    row = {"kind": "step", "epoch": 3, "step": step - 1, "global_step": step, "loss": loss, "lr": 1e-4, "boxes": 7}
    return row | {"images_per_s": 8.0, "wait_s": 0.1, "step_s": 0.4, "memory_mib": 900.5, "terms": terms}


def epoch_row(step: int, ap: float = 0.5) -> dict[str, Any]:
    """The row of an epoch that ended with this step."""
    classes = {"cat": {"AP": 0.4, "AP50": 0.6, "count": 3}, "dog": {"AP": None, "AP50": None, "count": 0}}
    row = {"kind": "epoch", "epoch": 3, "global_step": step, "train_s": 25.0, "evaluate_s": 2.0, "per_class": classes}
    return row | {"AP": ap, "AP50": 0.7, "APl": math.nan}


MATCHING = {
    "kind": "matching",
    "epoch": 3,
    "step": 4,
    "global_step": 5,
    "images": 8,
    "positives_hist": [1, 2, 3],
    "iou": {"final": [0, 1], "layer0": [1, 0]},
    "low": {"final": 0.25, "layer0": None},
}


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            step_row(5),
            {
                "progress/epoch": 3,
                "loss/total": 1,
                "loss/mal/final": 1,
                "loss/mal/denoise/layer0": 0.5,
                "rate/lr": 1e-4,
                "batch/boxes": 7,
                "speed/images_per_s": 8,
                "speed/wait_s": 0.1,
                "speed/step_s": 0.4,
                "memory/mib": 900.5,
            },
        ),
        (
            epoch_row(5),
            {"speed/train_s": 25, "speed/evaluate_s": 2, "val/AP": 0.5, "val/AP50": 0.7, "val_AP/cat": 0.4},
        ),
        (MATCHING, {"matching/images": 8, "matching/low/final": 0.25}),
        ({"kind": "probe", "epoch": 1, "global_step": 9, "changed": 0.5, "instability": None}, {"probe/changed": 0.5}),
        ({"kind": "weather", "epoch": 1, "global_step": 9, "wind": 3, "rain": True}, {"weather/wind": 3}),
    ],
    ids=lambda value: value.get("kind", "") if isinstance(value, dict) else "",
)
def test_scalars_of_every_kind_of_row(row: dict[str, Any], expected: dict[str, float]) -> None:
    found = scalars(row)
    assert found == expected and all(type(value) is float for value in found.values())


def test_numbers_that_are_not_finite_are_left_out() -> None:
    row = step_row(1, loss=math.nan) | {"lr": math.inf, "terms": {}}
    assert {"loss/total", "loss/mal/final", "rate/lr"}.isdisjoint(scalars(row)) and "memory/mib" in scalars(row)


def test_class_names_become_names_that_every_tool_takes() -> None:
    names = ["c+", "c-", "c_", "traffic light", "", "..", "a/b", "猫", "x" * 300]
    row = epoch_row(1) | {"per_class": {name: {"AP": i / 10} for i, name in enumerate(names)}}
    tags = {tag: value for tag, value in scalars(row).items() if tag.startswith("val_AP/")}
    assert list(tags.values()) == [i / 10 for i in range(len(names))]  # none hides another
    assert all(re.fullmatch(r"val_AP/\w{1,110}", tag) for tag in tags) and "val_AP/traffic_light" in tags


def test_settings_are_the_fields_of_nested_dataclasses() -> None:
    @dataclass(frozen=True)
    class Inner:
        lr: float = 0.1
        top: float = math.inf

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        parts: tuple[Inner, ...] = (Inner(),)
        name: str = "n"
        none: None = None
        yes: bool = True

    found = settings(Outer(), "recipe")
    assert found.pop("recipe/parts").startswith("(") and found == {
        "recipe/inner/lr": 0.1,
        "recipe/inner/top": "inf",
        "recipe/name": "n",
        "recipe/none": "None",
        "recipe/yes": True,
    }
    assert json.dumps(settings(Plan(data="x"), "plan"), allow_nan=False)


def test_last_steps(tmp_path: Path) -> None:
    assert last_steps(tmp_path / "metrics.jsonl") == {}
    for row in (step_row(1), step_row(2), epoch_row(2), {"kind": "probe", "epoch": 0}):  # the last is from an old run
        append(tmp_path / "metrics.jsonl", row)
    assert last_steps(tmp_path / "metrics.jsonl") == {"step": 2, "epoch": 2, "probe": 0}


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name, hint", [("wadnb", "Did you mean 'wandb'?"), ("x", "tensorboard, wandb, mlflow")])
def test_an_unknown_name_is_refused(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(hint)):
        expect_loggers([name])


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "nolib", Recorder)
    with pytest.raises(RecipeError, match="pip install nolib"):
        expect_loggers(["nolib"])
    (tmp_path / "nolib").mkdir()  # as wandb leaves a folder "wandb" where it ran
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="pip install nolib"):
        open_loggers(["nolib"], tmp_path, None, None, 0, unexpected)
    assert not (tmp_path / "loggers.json").exists()


def test_a_run_without_loggers_writes_nothing(tmp_path: Path) -> None:
    none = open_loggers([], tmp_path, None, None, 0, unexpected)
    none.log(step_row(1))
    none.close("finished")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- stand-in


def unexpected(name: str, why: str) -> None:
    """No logger is to be lost."""
    raise AssertionError(f"{name}: {why}")


class Recorder:
    """A logger that keeps what it is given, under the name of a library that Python has."""

    made: list[Recorder]
    trouble = ""  # the method that raises
    tells: int | None = None  # `last` of those that are opened
    blocked: Event  # `log` waits for it

    def __init__(self, run: Shown) -> None:
        self.shown, self.id, self.last = run, run.id or f"id{len(self.made)}", self.tells
        self.points: list[Point] = []
        self.state: str | None = None

    @classmethod
    def open(cls, run: Shown) -> Recorder:
        if cls.trouble == "open":
            raise ConnectionError("no route")
        cls.made.append(cls(run))
        return cls.made[-1]

    def log(self, points: Sequence[Point]) -> None:
        self.blocked.wait(20)
        if self.trouble == "log":
            raise ConnectionError("no route")
        self.points += points

    def close(self, state: str) -> None:
        if self.trouble == "close":
            raise ConnectionError("no route")
        self.state = state

    def steps(self, kind: str = "step") -> list[int]:
        return [point.step for point in self.points if point.kind == kind]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[type[Recorder]]:
    """Two stand-ins, called "json" and "csv"."""
    kinds = []
    for name in ("json", "csv"):
        blocked = Event()
        blocked.set()
        kinds.append(type("Recorder", (Recorder,), {"made": [], "blocked": blocked}))
        monkeypatch.setitem(loggers.LOGGERS, name, kinds[-1])
    monkeypatch.setattr(loggers, "PAUSE", 0.01)
    return kinds


def start(folder: Path, names: Sequence[str] = ("json",), step: int = 0, lost: Any = unexpected) -> Loggers:
    """Loggers as the trainer opens them, which then takes out the rows that come again."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.py").write_text("Recipe(batch=3)\n")
    opened = open_loggers(names, folder, Plan(data="r"), Plan(data="p"), step, lost)
    keep_rows(folder / "metrics.jsonl", lambda row: row["global_step"] <= step)
    return opened


def train(folder: Path, to: Loggers, *rows: dict[str, Any]) -> None:
    """Write rows as the trainer does."""
    for row in rows:
        append(folder / "metrics.jsonl", row)
        to.log(row)


def test_rows_arrive_in_order_and_the_state_at_the_end(tmp_path: Path, recorders: list[type[Recorder]]) -> None:
    before = time.time()
    shown = start(tmp_path, ("json", "csv", "json"))
    train(tmp_path, shown, step_row(1), step_row(2), epoch_row(2))
    shown.close("early_stop")
    shown.close("failed")  # as when something fails once all is over
    shown.log(step_row(3))
    for kind in recorders:
        (one,) = kind.made
        assert one.steps() == [1, 2] and one.steps("epoch") == [2] and one.state == "early_stop"
        assert one.points[0].scalars == scalars(step_row(1)) and before <= one.points[0].time <= time.time()
        assert one.shown.recipe == "Recipe(batch=3)\n" and one.shown.folder == tmp_path
        assert {"recipe/data": "r", "plan/data": "p", "plan/seed": 0}.items() <= one.shown.settings.items()


@pytest.mark.parametrize("trouble", ["log", "close"])
def test_a_logger_that_fails_is_told_of_once_and_left_out(
    tmp_path: Path, recorders: list[type[Recorder]], trouble: str
) -> None:
    bad, good = recorders
    bad.trouble = trouble
    told: list[tuple[str, str]] = []
    shown = start(tmp_path, ("json", "csv"), lost=lambda *what: told.append(what))
    for step in range(1, 6):
        train(tmp_path, shown, step_row(step))
        time.sleep(0.05)
    if trouble == "log":
        assert told and list(shown.channels) == ["csv"]
    shown.close("finished")
    assert told == [("json", "ConnectionError: no route")]
    assert good.made[0].steps() == [1, 2, 3, 4, 5] and good.made[0].state == "finished"


def test_a_logger_that_hangs_keeps_nothing_waiting(
    tmp_path: Path, recorders: list[type[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders[0].blocked.clear()
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    told: list[tuple[str, str]] = []
    shown = start(tmp_path, ("json", "csv"), lost=lambda *what: told.append(what))
    began = time.monotonic()
    train(tmp_path, shown, *(step_row(step) for step in range(1, 11)))
    shown.close("finished")
    assert time.monotonic() - began < 5 and "did not end" in told[0][1] and len(told) == 1
    assert recorders[1].made[0].steps() == list(range(1, 11))
    recorders[0].blocked.set()


def test_rows_do_not_pile_up_without_end(
    tmp_path: Path, recorders: list[type[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders[0].blocked.clear()
    monkeypatch.setattr(loggers, "BACKLOG", 3)
    told: list[tuple[str, str]] = []
    shown = start(tmp_path, lost=lambda *what: told.append(what))
    for step in range(1, 20):
        train(tmp_path, shown, step_row(step))
    assert len(told) == 1 and "too slow" in told[0][1] and not shown.channels
    recorders[0].blocked.set()


def test_one_that_cannot_be_opened_is_refused_before_the_first_step(
    tmp_path: Path, recorders: list[type[Recorder]]
) -> None:
    recorders[1].trouble = "open"
    with pytest.raises(RecipeError, match="'csv' cannot be opened: no route"):
        start(tmp_path, ("json", "csv"))
    assert recorders[0].made[0].state == "failed" and not (tmp_path / "loggers.json").exists()


def test_one_that_cannot_be_opened_later_ends_no_training(tmp_path: Path, recorders: list[type[Recorder]]) -> None:
    start(tmp_path, ("json", "csv")).close("stopped")
    recorders[1].trouble = "open"
    told: list[tuple[str, str]] = []
    shown = start(tmp_path, ("json", "csv"), step=5, lost=lambda *what: told.append(what))
    train(tmp_path, shown, step_row(6))
    shown.close("stopped")
    assert told == [("csv", "ConnectionError: no route")] and recorders[0].made[1].steps() == [6]
    recorders[1].trouble = ""
    start(tmp_path, ("csv",), step=6).close("finished")
    assert [one.shown.id for one in recorders[1].made] == [None, "id0"]  # it is still the same run


# --------------------------------------------------------------------------------------------------------- resuming


def test_steps_that_are_trained_again_are_told_once(tmp_path: Path, recorders: list[type[Recorder]]) -> None:
    """Killed at 6 with a checkpoint at 3, killed at 5 with one at 4, and then to the end."""
    (kind, _) = recorders
    first = start(tmp_path)
    train(tmp_path, first, *(step_row(step) for step in range(1, 4)), epoch_row(3), *map(step_row, (4, 5, 6)))
    first.close("failed")
    second = start(tmp_path, step=3)
    train(tmp_path, second, epoch_row(3), *map(step_row, (4, 5)))
    second.close("failed")
    third = start(tmp_path, step=4)
    train(tmp_path, third, *map(step_row, (5, 6, 7)), epoch_row(7))
    third.close("finished")

    assert [one.shown.id for one in kind.made] == [None, "id0", "id0"]
    assert [one.shown.step for one in kind.made] == [0, 3, 4]
    assert [one.steps() for one in kind.made] == [[1, 2, 3, 4, 5, 6], [], [7]]
    assert [one.steps("epoch") for one in kind.made] == [[3], [], [7]]


def test_what_never_reached_the_tool_is_told_again(tmp_path: Path, recorders: list[type[Recorder]]) -> None:
    first = start(tmp_path)
    train(tmp_path, first, *map(step_row, range(1, 7)))
    first.close("failed")
    recorders[0].tells = 4  # of the six
    second = start(tmp_path, step=3)
    train(tmp_path, second, *map(step_row, range(4, 8)))
    second.close("finished")
    assert recorders[0].made[1].steps() == [5, 6, 7]


def test_a_logger_may_join_a_resumed_run(tmp_path: Path, recorders: list[type[Recorder]]) -> None:
    first = start(tmp_path)
    train(tmp_path, first, *map(step_row, range(1, 7)))
    first.close("failed")
    second = start(tmp_path, ("json", "csv"), step=3)
    train(tmp_path, second, *map(step_row, range(4, 8)))
    second.close("finished")
    assert recorders[0].made[1].steps() == [7] and recorders[1].made[0].steps() == [4, 5, 6, 7]
    assert set(json.loads((tmp_path / "loggers.json").read_text())) == {"json", "csv"}


# ----------------------------------------------------------------------------------------------- the real libraries


def twice(folder: Path, name: str) -> None:
    """Train to step 6, and once more from a checkpoint at 3 to step 8; the loss is 100 higher the second time."""
    first = start(folder, (name,))
    train(folder, first, *(step_row(step, loss=step) for step in range(1, 4)), epoch_row(3, ap=0.3))
    train(folder, first, step_row(4, loss=4), MATCHING, step_row(5, loss=5), step_row(6, loss=6), epoch_row(6, ap=0.6))
    first.close("failed")
    second = start(folder, (name,), step=3)
    train(folder, second, *(step_row(step, loss=100 + step) for step in range(4, 7)), epoch_row(6, ap=0.7))
    train(folder, second, *(step_row(step, loss=100 + step) for step in range(7, 9)))
    second.close("finished")


def test_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read by the reader of TensorBoard itself, which purges by the start events only."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    caplog.set_level(logging.ERROR)
    twice(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), tensor_size_guidance={"scalars": 0})
    events.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(e.step, round(float(make_ndarray(e.tensor_proto)), 4)) for e in events.Tensors(tag)]

    assert curve("loss/total") == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106), (7, 107), (8, 108)]
    assert curve("val/AP") == [(3, 0.3), (6, 0.7)]
    texts = {
        tag: str(make_ndarray(events.Tensors(f"{tag}/text_summary")[-1].tensor_proto)) for tag in ("recipe", "state")
    }
    assert "Recipe(batch=3)" in texts["recipe"] and "finished" in texts["state"]
    assert [event.step for event in events.Tensors("recipe/text_summary")] == [0]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB that hold pieces of records.

    A piece has 4 bytes of checksum, 2 of length and 1 that says whether it is a whole record (1) or its end (4).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        record += data[at + 7 : at + 7 + size]
        if data[at + 6] in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
        at += 7 + size


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of one run, which `wandb sync` puts together; no step is in both, and none lies behind another."""
    wandb = pytest.importorskip("wandb")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    twice(tmp_path / "run", "wandb")
    wandb.teardown()  # as the end of a process does, and the files are complete

    rows, ids, config, states = [], set(), {}, []
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            elif record.HasField("run"):
                ids.add((record.run.run_id, record.run.project))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("summary"):
                states += [json.loads(i.value_json) for i in record.summary.update if "state" in (i.key, *i.nested_key)]

    (kept,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
    assert ids == {(kept["id"], "deimkit")} and states[0] == "failed" and states[-1] == "finished"
    assert [row["_step"] for row in rows] == [row["global_step"] for row in rows] == list(range(1, 9))
    assert [row["loss/total"] for row in rows] == [1, 2, 3, 4, 5, 6, 107, 108]
    assert [(row["_step"], row["val/AP"]) for row in rows if "val/AP" in row] == [(3, 0.3), (6, 0.6)]
    assert config["recipe"] == "Recipe(batch=3)\n" and config["plan/seed"] == 0


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("TRACKING_URI", "EXPERIMENT_NAME"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    twice(tmp_path / "run", "mlflow")

    client = mlflow.MlflowClient(loggers.local(tmp_path / "run"))
    (run,) = client.search_runs([client.get_experiment_by_name("deimkit").experiment_id])

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, tag)]

    assert curve("loss/total") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 107), (8, 108)]
    assert curve("val/AP") == [(3, 0.3), (6, 0.6)] and curve("matching/low/final") == [(5, 0.25)]
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["plan/seed"] == "0" and run.data.tags["deimkit.state"] == "finished"
    assert "Recipe(batch=3)" in run.data.tags["mlflow.note.content"]
    assert not (tmp_path / "mlruns").exists()


def test_mlflow_takes_long_values_and_many_of_them() -> None:
    """A stand-in for its client, with the limits of its oldest servers."""
    pytest.importorskip("mlflow")
    sent: list[list[Any]] = []

    class Client:
        def log_batch(self, id: str, metrics: Sequence[Any] = ()) -> None:
            sent.append(list(metrics))

    points = [Point("step", step, 1.5, {f"t{i}": float(i) for i in range(300)}) for step in (1, 2, 3, 4)]
    loggers.MLflow(Client(), "id", 0).log(points)
    assert [len(part) for part in sent] == [1000, 201]
    assert (sent[0][0].key, sent[0][0].step, sent[0][0].timestamp) == ("t0", 1, 1500)
    assert (sent[1][-1].key, sent[1][-1].value) == ("global_step", 4)


def test_ids_that_a_crash_cut_short_are_none(tmp_path: Path) -> None:
    (tmp_path / "loggers.json").write_text("")
    assert loggers.read_kept(tmp_path) == {} == loggers.read_kept(tmp_path / "absent")
