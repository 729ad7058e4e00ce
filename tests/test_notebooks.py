"""Every notebook runs from top to bottom in an empty folder, and finds the numbers that its text promises."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 2 << 20  # bytes of a notebook that a code-hosting site still shows

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
    "01_matching": """{
        "by_hand": float(worst),
        "tried": [len(tried), list(winner) == solved.tolist()],
        "odd": [nothing, crowded, len(twins), len(twins_many)],
        "refusal": refusal,
        "overlap": [won, greedy],
        "simota": [many == library, len(many)],
        "ap": [once, thrice, cleaned, careless],
        "takes": takes,
        "flips": flips,
        "rules": found,
        "means": [float(counts["targets"].mean()), float(o2o.mean()), float(o2m.mean())],
        "ratio": [float(ratio.min()), float(ratio.mean()), float(ratio.max())],
        "gain": float(gain),
        "quality": quality,
        "moved": [gone, new],
        "written": os.listdir(),
    }""",
    "02_losses": """{
        "equal": equal,
        "bad": [float(bad_vfl), float(bad_mal)],
        "slopes": slopes,
        "forms": list(forms.values()),
        "aim": wanted,
        "leak": leak,
        "below": below,
        "pull": pull,
        "ap": {name: table.tolist() for name, table in ap.items()},
        "runs": [run.finished for each in runs.values() for run in each],
        "written": sorted(str(path) for path in Path().iterdir()),
    }""",
    "03_box_distributions": """{
        "fast": FAST,
        "bin_17": 100 * W[17],
        "clamped": [fell.rebuilt, big.rebuilt],
        "slip": [near[0] / near[1], far[0] / far[1]],
        "half": [half, single],
        "sum": [float(parts.sum()), float(drawn)],
        "peaks": [float(peak) for peak in peaks],
        "bits": entropy,
        "fgl": [value.item(), float(by_hand)],
        "share": [int(m), int(u), float(share)],
        "with_t": twenty / ten,
        "taught": {name: grad is not None for name, grad in got.items()},
        "iou": fits,
        "lost": lost,
        "refusal": refusal,
        "written": sorted(os.listdir()),
    }""",
    "04_dense_o2o": """{
        "data": data.name,
        "mean": MEAN,
        "checks": [bool(passed) for passed in checks.values()],
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
    "05_anatomy": """{
        "step": [len(step.terms), step.total, loss.item()],
        "cells": [sorted(by_hand.tolist()) == sorted(anatomy.chosen.tolist()), int(anatomy.level.bincount().sum())],
        "gaze": [len(gaps), max(gaps)],
        "shares": share.sum(1).tolist(),
        "edge": [float(left), float(box[0] - box[2] / 2)],
        "l1": [l1, terms["l1/final"].item()],
        "gradient": [len(without), norm, step.norm],
        "cut": list(cut.values()),
        "taught": [table.of("proposals", "queries.score"), table.of("final", "refine.box.0")],
        "harm": harm,
        "signs": signs,
        "loud": loud,
        "written": os.listdir(),
    }""",
    "06_error_analysis": """{
        "fast": FAST,
        "images": len(val),
        "ap": [errors.coco["AP50"], errors.average_precision],
        "costs": costs,
        "by_hand": [same, len(by_hand)],
        "views": {name: len(view.select(findings)) for name, view in views.items()},
        "objects": [int(matrix[:-1].sum()), len(val.labels)],
        "missed": [near, bool(objects["missed"][missed]), last_iou, last_score],
        "twins": [detections["verdict"][r] for r in pair],
        "loose": float(detections["overlap"][loose]),
        "relation": relation,
        "changed": [int(lost), int(newly), type(plain.losses[0]).__name__],
        "planted": [caught, len(planted), len(report.problems)],
        "broken": [broken.coco["AP"], dear["class"], dear["location"], int(np.trace(table))],
        "written": sorted(str(path) for path in Path("runs/errors").iterdir()),
    }""",
    "07_deploy_and_benchmark": """{
        "fast": FAST,
        "norms": [norms, kinds["BatchNormalization"]],
        "apart": apart,
        "verdicts": {name: each.parity.verdict for name, each in done.items()},
        "rows": {name: float(gap.max()) for (name, _), gap in row_by_row.items()},
        "pairs": {name: [d.box_max, d.score_max, d.matched, d.moved] for (name, _), d in by_library.items()},
        "scores": far,
        "stem": [float(x) for x in (inside, untidied.max(), honest.max())],
        "naive": [len(seconds) for seconds in naive.values()],
        "rounds": [len(result.wall.rounds) for result in report.results],
        "ratios": list(ratios.values()),
        "paper": [claim, alone.results[0].paper.ratio, alone.results[0].paper.words],
        "checks": [check.name for check in checks],
        "refusal": refusal,
        "gpu": torch.cuda.is_available(),
        "trade": list(trade.values()),
        "runtimes": len(RUNTIMES),
        "files": sorted(path.name for path in FILES.iterdir()),
        "written": os.listdir(),
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
        "DEIMKIT_APP": "0",
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


def check_box_distributions(said: dict[str, Any]) -> None:
    assert said["fast"] and said["bin_17"] == pytest.approx(100 * (3 ** (2 / 30) - 1) / 4)
    assert said["clamped"] == pytest.approx([0.5, 0.6])
    nearly, far = said["slip"]
    assert nearly == pytest.approx(3.1, abs=0.2) and far == pytest.approx(0.25, abs=0.01)
    assert 0.05 < said["half"][0] < 0.7 and said["half"][1] < 1e-3
    assert said["sum"][0] == pytest.approx(said["sum"][1], abs=1e-3)
    assert said["peaks"] == pytest.approx([-0.3, 0.3], abs=0.03)
    assert said["bits"]["final"] < said["bits"]["layer0"] < 5.05
    assert said["fgl"][0] == pytest.approx(said["fgl"][1], rel=1e-4)
    matched, others, share = said["share"]
    assert 0 < matched < others and share > matched / (matched + others)
    assert said["with_t"] == pytest.approx(1, abs=0.1)
    assert said["taught"] == {"layer0": True, "layer1": True, "final": False}
    assert all(0 < iou < 1 for iou in said["iou"]) and said["lost"]["W(n)"] < 1e-6 < 3 < said["lost"]["linspace"]
    assert "LookForwardTwice" in said["refusal"] and said["written"] == []


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


def check_anatomy(said: dict[str, Any]) -> None:
    terms, total, again = said["step"]
    assert terms == 37 and again == pytest.approx(total, rel=1e-3)
    assert said["cells"] == [True, 100] and said["gaze"][0] == 100 and said["gaze"][1] < 1e-5
    assert said["shares"] == pytest.approx([1.0] * 3)
    for by_hand, library in (said["edge"], said["l1"]):
        assert by_hand == pytest.approx(library, abs=1e-5)
    none, norm, clipped = said["gradient"]
    assert none == 0 and norm > clipped == pytest.approx(0.1, rel=1e-3)
    assert said["cut"] == [0.0] * 7 and min(said["taught"]) > 0
    assert said["harm"]["0..255"]["AR100"] < said["harm"]["as it should be"]["AR100"]
    largest, strange, company = zip(*said["signs"].values(), strict=True)  # as it should be, 0..255, BGR, training mode
    assert largest[1] == pytest.approx(255) and strange[1] > 10 * strange[0] and company[3] > 100 * max(company[:3])
    assert "needs Targets" in said["loud"] and said["written"] == []


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


def check_matching(said: dict[str, Any]) -> None:
    assert said["by_hand"] < 1e-4 and said["tried"] == [840, True]
    assert said["odd"] == [[], [[1, 0], [3, 1]], 2, 1] and "must be finite" in said["refusal"]
    assert said["overlap"] == [[[0, 1], [1, 0]], [[0, 0]]]
    assert said["simota"][0] and said["simota"][1] >= 11
    once, thrice, cleaned, careless = said["ap"]
    assert once == pytest.approx(1) and thrice < 0.6 < careless < cleaned
    assert said["takes"] == {"Hungarian": "B", "PositionModulated": "A"}
    assert list(said["flips"]["Hungarian"]) == ["layer0", "layer1", "final"]
    assert (said["rules"]["Hungarian"], said["rules"]["Dense O2O"]) == (11, 53)
    targets, one, many = said["means"]
    assert one == targets == pytest.approx(14.6, abs=1) and many > one and said["gain"] > 1.8
    low, mean, high = said["ratio"]
    assert 0 < low <= mean <= high <= 10 and mean > 1
    assert said["quality"]["right"] == pytest.approx(1, abs=1e-3) and said["quality"]["mixed up"] < 0.5
    (lost, *_), (gained, *_) = said["moved"]
    assert lost[0] == gained[0] and lost[1] != gained[1] and said["written"] == []


def check_losses(said: dict[str, Any]) -> None:
    assert max(*said["equal"].values(), *said["slopes"].values(), *said["forms"]) < 1e-12
    assert said["bad"] == pytest.approx([0.05 * math.log(2), math.log(2)]) and said["aim"] == pytest.approx(0.25)
    assert min(said["leak"]) > 1.2 and max(said["leak"]) < 2.5
    assert said["below"]["VFL"] < min(said["below"]["MAL"], said["below"]["pairs"])
    assert said["pull"]["VFL"] < said["pull"]["MAL"]
    assert {name: (len(table), len(table[0])) for name, table in said["ap"].items()} == {"VFL": (1, 2), "MAL": (1, 2)}
    assert said["runs"] == [True, True] and said["written"] == ["runs"]


def check_error_analysis(said: dict[str, Any]) -> None:
    assert said["fast"] and said["images"] == 20 and said["ap"][0] == pytest.approx(said["ap"][1], abs=1e-12)
    assert len(said["costs"]) == 8 and all(0 <= cost <= 1 for cost in said["costs"].values())
    assert said["by_hand"] == [True, 20] and said["objects"][0] == said["objects"][1]
    assert said["views"]["worst images"] == 20 and said["views"]["missed small objects"] > 0
    near, is_missed, iou, score = said["missed"]
    assert near and is_missed and 0 <= iou <= 1 and 0 <= score <= 1
    assert said["twins"] == ["right", "duplicate"] and 0.5 <= said["loose"] < 0.65 and said["relation"] > 0
    assert min(said["changed"][:2]) >= 0 and said["changed"][2] == "VFL"
    caught, planted, questions = said["planted"]
    assert planted == 10 and 5 <= caught <= 10 and questions >= caught
    assert said["broken"] == [0, 1, 0, 0]
    assert {Path(path).name for path in said["written"]} == {"sheet.html", "errors.html", "fixes.json", "vfl"}


def check_deploy(said: dict[str, Any]) -> None:
    assert said["fast"] and said["norms"][0] > 0 == said["norms"][1]
    assert said["apart"][0] < 1e-3 and said["apart"][1] < 0.1
    assert said["verdicts"] == {"fp32": "verified", "fp16": "verified"}
    for box, score, matched, moved in said["pairs"].values():
        assert box < 1e-2 and score < 2e-2 and 5_000 < matched <= 6_000 and moved >= 0
    assert said["pairs"]["fp32"][0] < 1e-5 and said["rows"]["fp16"] > 10 * said["pairs"]["fp16"][0]
    assert said["scores"]["FP32, onnxruntime"] < 1e-5 and max(said["stem"]) < 1e-4
    assert said["naive"] == [20] * said["runtimes"] and said["rounds"] == [20] * (2 + said["runtimes"])
    assert said["ratios"][0] == [1, 1, 1] and all(low <= middle <= high for middle, low, high in said["ratios"])
    claim, ratio, words = said["paper"]
    assert claim == 2.12 and ratio is None and words.startswith("not compared with the paper's 2.12 ms")
    assert "a small graph" in said["checks"] and (said["gpu"] or "needs an NVIDIA GPU" in said["refusal"])
    assert len(said["trade"]) == 1 + 2 * said["runtimes"] and all(ms > 0 and ap > 1 for ms, ap in said["trade"])
    assert {"fp32.onnx", "fp32.onnx.parity.json", "fp16.onnx"} <= set(said["files"]) and said["written"] == ["runs"]


CHECKS = {
    "00_quickstart": check_quickstart,
    "01_matching": check_matching,
    "02_losses": check_losses,
    "03_box_distributions": check_box_distributions,
    "04_dense_o2o": check_dense_o2o,
    "05_anatomy": check_anatomy,
    "06_error_analysis": check_error_analysis,
    "07_deploy_and_benchmark": check_deploy,
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
        book = nbformat.read(path, as_version=4)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in cells), f"{path.name} was saved without outputs: make notebooks"
        assert path.stat().st_size < LARGEST and "widgets" not in book.metadata, f"{path.name}: save it without widgets"
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
            f"{path.name}: run it in order"
        )


@pytest.mark.slow
def test_quickstart_runs_a_second_time_in_the_same_folder(tmp_path: Path) -> None:
    first, second = execute(ROOT / "notebooks" / "00_quickstart.ipynb", tmp_path, again=2)
    assert first == second
