"""A run's handle: what was measured as rows and as tables, and going on from where it stopped."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deimkit.errors import DataError, DeimkitError
from deimkit.training import metrics
from deimkit.training.run import Plan, Run, append, read_rows
from tests.micro import CLOCK, MICRO, same, scenes, trainer


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has not begun."""
    Plan("synthetic").write(tmp_path)
    return Run(tmp_path)


def write(run: Run, *rows: dict[str, Any]) -> None:
    for row in rows:
        append(run.folder / "metrics.jsonl", row)


def step(epoch: int, k: int, loss: float, terms: dict[str, float] | None = None) -> dict[str, Any]:
    return {"kind": "step", "epoch": epoch, "step": k, "loss": loss, "boxes": 3, "terms": terms or {}}


def seen(epoch: int, k: int, **more: Any) -> dict[str, Any]:
    return {"kind": "matching", "epoch": epoch, "step": k, "positives_hist": [0, 2], "low": {"final": 0.5}} | more


def evaluated(epoch: int, ap: float, **classes: float) -> dict[str, Any]:
    per_class = {name: {"AP": value, "AP50": 2 * value, "count": 4} for name, value in classes.items()}
    return {"kind": "epoch", "epoch": epoch, "train_s": 9.5, "AP": ap, "ARl": 0.5, "per_class": per_class}


# ----------------------------------------------------------------------------------------------------- metrics


def test_epochs_are_a_table(run: Run) -> None:
    write(run, evaluated(1, 0.25, cat=0.125, dog=math.nan), step(2, 0, 1.0), evaluated(3, math.nan, cat=0.5, dog=0.25))
    table = run.metrics()
    names = ["train_s", "AP", "ARl", "AP/cat", "AP/dog", "AP50/cat", "AP50/dog", "count/cat", "count/dog"]
    assert list(table.columns) == names and (table.index.name, list(table.index)) == ("epoch", [1, 3])
    assert table["AP/cat"].to_list() == [0.125, 0.5] and table.loc[3, "AP50/dog"] == 0.5
    assert table.isna().sum().loc[lambda holes: holes > 0].to_dict() == {"AP": 1, "AP/dog": 1, "AP50/dog": 1}
    assert {str(kind) for kind in table.dtypes} == {"float64", "int64"} and table["AP"].idxmax() == 1


def test_steps_are_counted_through(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs may be of different lengths; a term may begin later, and a skipped step has none."""
    monkeypatch.setattr(metrics, "AT_ONCE", 2)
    write(run, seen(0, 0), step(0, 0, 4.0, {"mal/final": 1.0}), step(0, 1, math.nan), step(0, 2, 3.0, {"l1/pre": 2.0}))
    write(run, evaluated(0, 0.1), step(1, 0, 2.0, {"mal/final": 0.5}), seen(1, 1), step(1, 1, 1.0), step(2, 0, 0.5))
    table = run.metrics("step")
    assert list(table.columns) == ["epoch", "loss", "boxes", "mal/final", "l1/pre"]
    assert (table.index.name, list(table.index)) == ("step", [0, 1, 2, 3, 4, 5])
    assert table["epoch"].to_list() == [0, 0, 0, 1, 1, 2]
    assert table["loss"].fillna(-1).to_list() == [4, -1, 3, 2, 1, 0.5]
    assert table["mal/final"].fillna(-1).to_list() == [1, -1, -1, 0.5, -1, -1] and table["l1/pre"].count() == 1
    both = table.join(run.metrics("matching").drop(columns="epoch"))
    assert both["low/final"].dropna().to_dict() == {0: 0.5, 4: 0.5} and both["epoch"].to_list() == [0, 0, 0, 1, 1, 2]


def test_what_the_matcher_saw_is_a_table(run: Run) -> None:
    write(run, seen(0, 0, low={"final": None}), step(0, 0, 1.0), {"kind": "probe", "epoch": 0, "changed": None})
    write(run, step(0, 1, 1.0), seen(1, 0), step(1, 0, 1.0), {"kind": "probe", "epoch": 1, "changed": 0.5})
    table = run.metrics("matching")
    assert list(table.columns) == ["epoch", "positives_hist", "low/final"] and list(table.index) == [0, 2]
    assert table["positives_hist"].to_list() == [[0, 2], [0, 2]]
    assert table["low/final"].isna().to_list() == [True, False]
    probe = run.metrics("probe")
    assert (probe.index.name, list(probe.columns)) == ("epoch", ["changed"])
    assert probe["changed"].isna().to_list() == [True, False] and probe["changed"].dtype == float


@pytest.mark.parametrize("kind", ["epoch", "step", "matching", "probe"])
def test_a_run_without_rows_is_an_empty_table(run: Run, kind: str) -> None:
    for _ in range(2):
        table = run.metrics(kind)
        assert table.empty and len(table) == 0 and table.index.name in ("epoch", "step") and run.rows(kind) == []
        (run.folder / "metrics.jsonl").touch()


def test_rows_are_as_they_were_written(run: Run) -> None:
    """Whatever comes first in a line, and though a crash has cut another short."""
    rows = [step(0, 0, 1.0), {"epoch": 0, "kind": "epoch", "AP": 0.5}, evaluated(1, 0.25)]
    write(run, *rows)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('\n{"kind": "epoch", "epo')
    assert run.rows() == rows == read_rows(run.folder / "metrics.jsonl")
    assert run.rows("epoch") == rows[1:] and run.rows("step") == rows[:1]
    assert run.metrics()["AP"].to_list() == [0.5, 0.25]


def test_an_unknown_kind_is_refused(run: Run) -> None:
    for ask in (run.rows, run.metrics):
        with pytest.raises(DeimkitError, match="epoch, step, matching, probe; got 'steps'. Did you mean 'step'?"):
            ask("steps")


def test_a_table_needs_pandas(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DeimkitError, match="pip install pandas"):
        run.metrics()
    assert run.rows() == []


def test_epochs_are_found_among_many_steps(run: Run) -> None:
    """Steps are passed over unread where nobody asks for them."""
    row = step(0, 0, 1.0, {f"mal/layer{k}": k / 7 for k in range(60)})
    (run.folder / "metrics.jsonl").write_text(20_000 * (json.dumps(row) + "\n"))
    write(run, evaluated(0, 0.5))
    seconds, lengths = [], []
    for kind in ("epoch", "step"):
        began = time.process_time()
        lengths.append(len(run.metrics(kind)))
        seconds.append(time.process_time() - began)
    assert lengths == [1, 20_000] and seconds[0] < 0.3 * seconds[1]


# ------------------------------------------------------------------------------------------------------ resume


def test_a_run_resumes_itself(tmp_path: Path) -> None:
    """As `deimkit.resume` does: from its last checkpoint, to where it would have come undisturbed."""
    data, short = scenes(tmp_path), replace(MICRO, timeline=CLOCK.scaled_to(1, 3))
    whole = trainer(tmp_path / "whole", data, short).fit()
    run = trainer(tmp_path / "run", data, short, lambda row: row["step"] == 1 and Run(tmp_path / "run").stop()).fit()
    assert run.state == "stopped" and len(run.metrics("step")) == 2
    assert run.resume(progress=False) is run and run.finished and same(run, whole)
    assert run.metrics()["AP"].equals(whole.metrics()["AP"]) and len(run.metrics("step")) == 3
    written = run.last.stat().st_mtime_ns
    assert run.resume(progress=False) is run and run.last.stat().st_mtime_ns == written


def test_a_run_resumes_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run", scenes(tmp_path)).run
    monkeypatch.setattr(Run, "start", lambda self: Run(self.folder))
    started = run.resume(wait=False)
    assert started is not run and started.folder == run.folder


def test_a_run_resumes_with_its_own_data_only(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", scenes(tmp_path), fingerprint="another").run
    with pytest.raises(DataError, match="dataset=..."):
        run.resume(progress=False)
