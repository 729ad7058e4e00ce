"""Every notebook runs from top to bottom in an empty folder, and finds the numbers that its text promises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What is asked of a notebook once it has run: an expression whose value must be made of JSON's types.
PROBES = {
    "00_quickstart": """{
        "fast": FAST,
        "perfect": perfect["AP"],
        "before": before["AP"],
        "after": {k: v for k, v in after.items() if k in ("AP", "AP50", "AR100")},
        "epochs": [row["AP"] for row in run.rows("epoch")],
        "steps": len(run.rows("step")),
        "total": recipe.timeline.total,
        "classes": sorted(after["per_class"]),
        "same": same,
        "silent": silent,
        "state": run.state,
        "positives": [float(plain.mean()), float(dense.mean())],
        "written": sorted(str(path) for path in Path().iterdir()),
    }""",
    "04_dense_o2o": """{
        "data": data.name,
        "mean": MEAN,
        "checks": list(checks.values()),
        "pixels": float(same),
        "slivers": slivers,
        "empty": counts,
        "ways": {name: float(values.mean()) for name, values in ways.items()},
        "kept": list(kept),
        "measured": [[p, q, value, expected_targets(MEAN, p, q, *kept)] for (p, q), value in measured.items()],
        "prices": ratio,
        "held": [cache.held / needed for cache in caches.values()],
        "shorter": [shorter.warm, shorter.dense, shorter.augment, shorter.total],
        "refusal": refusal,
        "seen": seen,
        "per_stage": per_stage,
        "looks": seen_as,
        "written": sorted(str(path) for path in Path().iterdir()),
    }""",
    "08_train_coco": """{
        "data": data.name,
        "classes": len(data.categories),
        "stages": [pace.stage for pace in dry.paces],
        "losses": [loss for pace in dry.paces for loss in pace.loss],
        "step": [min(pace.step_s) for pace in dry.paces],
        "by_hand": seconds / 3600,
        "forecast": forecast.hours,
        "steps": [stage.steps for stage in present.stages],
        "range": [present.range[0], present.hours, present.range[1]],
        "plans": [plan.hours for plan in plans],
        "share": short.hours / forecast.hours,
        "checklist": list(checklist.values()),
        "state": run.state,
        "trained": len(places),
        "after": [list(after[0]), stopped_at["step"]] if after else None,
        "best": [float(best), again],
        "events": [row["event"] for row in run.events()],
        "job": "--nodes=2" in job and "--signal" in job,
        "written": sorted(str(path) for path in Path().iterdir()),
    }""",
}


def execute(path: Path, folder: Path, again: int = 1) -> list[dict[str, Any]]:
    """Run a notebook `again` times in `folder`, in its fast mode, and return what its probe said each time."""
    said = []
    for _ in range(again):
        book = nbformat.read(path, as_version=4)
        probe = f"import json as _json\nprint(_json.dumps({PROBES[path.stem]}))"
        book.cells.append(nbformat.v4.new_code_cell(probe))
        NotebookClient(
            book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
        said.append(json.loads(book.cells[-1].outputs[0].text))
    return said


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `dk.example()` is kept: one folder for all workers of this session, so that one of them trains it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel inherits these: the checkout's package, one thread, the fast mode, the example's place, no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "DEIMKIT_FAST": "1",
        "DEIMKIT_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)


def check_quickstart(said: dict[str, Any]) -> None:
    assert said["fast"] and said["state"] == "finished"
    assert said["perfect"] == pytest.approx(1)
    assert said["before"] < 0.01
    assert said["after"]["AP"] == pytest.approx(max(said["epochs"]), abs=1e-6)
    assert said["after"]["AR100"] > 0
    assert len(said["epochs"]) == said["total"] and said["steps"] > said["total"]
    assert len(said["classes"]) == 8 and "gear" in said["classes"]
    assert said["same"] == [True] * 4
    assert said["silent"] < 0.2
    plain, dense = said["positives"]
    assert dense > 1.3 * plain
    assert said["written"] == ["runs"], "all that it writes is in one folder"


def check_dense_o2o(said: dict[str, Any]) -> None:
    assert said["checks"] == [True] * 5 and said["pixels"] > 0.995 and said["slivers"] < 0.1
    assert said["empty"][0] == said["empty"][1] > 0
    ways, kept = said["ways"], said["kept"]
    assert ways["plain"] == pytest.approx(said["mean"], rel=0.1) and all(0.5 < share <= 1 for share in kept)
    assert ways["both"] == pytest.approx(2 * ways["mosaic"]), "MixUp counts every image twice"
    for _, _, value, expected in said["measured"]:
        assert value == pytest.approx(expected, rel=0.2)
    assert said["prices"]["mosaic"] > 1 and said["prices"]["flip and resize"] == 1 and len(said["prices"]) == 10
    nothing, third, all_of_it = said["held"]
    assert nothing == 0 and 0 < third <= 1 / 3 and all_of_it == pytest.approx(1)
    assert said["shorter"] == [2, 17, 29, 30] and "got total=24 before augment=58" in said["refusal"]
    assert said["seen"]["told"] == ["dense", "dense", "augment", "clean"] and said["seen"]["stale"] == ["dense"] * 4
    assert said["per_stage"]["dense"] > 1.6 * said["per_stage"]["clean"]
    (small, black), (large, clear) = said["looks"]["dense"], said["looks"]["clean"]
    assert small < large and clear < black
    assert said["written"] == ["runs"], "all that it writes is in one folder"


def check_train_coco(said: dict[str, Any]) -> None:
    assert said["stages"] == ["warm", "dense", "augment", "clean"] and len(said["losses"]) == 20
    assert all(0 < loss < 10_000 for loss in said["losses"]) and min(said["step"]) > 0
    assert said["steps"] == [924 * epochs for epochs in (4, 74, 70, 12)]
    assert said["by_hand"] == pytest.approx(said["forecast"]) and said["range"] == sorted(said["range"])
    one, eight, starved = said["plans"]
    assert eight == pytest.approx(one / 8, rel=0.01) and eight < starved
    assert said["share"] == pytest.approx(12 / 160, abs=0.02)
    assert said["checklist"][0] is True and len(said["checklist"]) == 5 and said["job"]
    assert said["state"] == "finished" and said["best"][0] == pytest.approx(said["best"][1], abs=1e-6)
    assert said["events"][:2] == ["launched", "started"] and said["written"] == ["runs"]
    if said["after"] is not None:  # it was stopped before it was over
        (_, step), stopped = said["after"]
        assert step in (stopped + 1, 0) and {"stopped", "resumed"} <= set(said["events"])


CHECKS = {
    "00_quickstart": check_quickstart,
    "04_dense_o2o": check_dense_o2o,
    "08_train_coco": check_train_coco,
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_finds_what_it_promises(path: Path, tmp_path: Path) -> None:
    """All of its own asserts hold, and so does what its probe says."""
    assert path.stem in PROBES.keys() & CHECKS.keys(), "say in PROBES and CHECKS which numbers it must find"
    CHECKS[path.stem](execute(path, tmp_path)[0])


@pytest.mark.slow
def test_a_training_on_coco_is_rehearsed_on_coco128(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEIMKIT_DATA", str(shared / "data" / "coco128"))
    said = execute(ROOT / "notebooks" / "08_train_coco.ipynb", tmp_path)[0]
    check_train_coco(said)
    assert (said["data"], said["classes"], said["trained"]) == ("coco128", 80, 4 * (128 // 8))


def test_every_notebook_is_shown_with_its_outputs() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in cells), f"{path.name} was saved without outputs: make notebooks"
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
            f"{path.name}: run it in order"
        )


@pytest.mark.slow
def test_quickstart_runs_a_second_time_in_the_same_folder(tmp_path: Path) -> None:
    first, second = execute(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path, again=2)
    assert first == second
