"""The papers' tables are complete, plausible, and agree with one another and with the recipes; so do their pictures."""

from __future__ import annotations

import re
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from deimkit import recipes
from deimkit.errors import DataError
from deimkit.explore import claims, papers
from deimkit.recipes.roadmap import ROADMAP
from deimkit.recipes.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
AP = ("ap", "ap50", "ap75", "aps", "apm", "apl")
ROWS = {
    **{f"deim_table{i}": n for i, n in enumerate((15, 22, 2, 8, 4, 6, 4, 2, 36, 45, 24, 3, 2), 1)},
    **{f"deim_slides_table{i}": n for i, n in enumerate((15, 6), 1)},
    **{f"dfine_table{i}": n for i, n in enumerate((9, 10, 9, 18, 6, 116, 7), 1)},
    **{f"od_detr_table{i}": n for i, n in enumerate((19, 5, 4, 4, 6, 3, 2, 4, 2, 6, 9), 1)},
    **{f"stable_dino_table{i}": n for i, n in enumerate((4, 26, 7, 3, 6, 8, 10, 6, 8, 16), 1)},
}
EVERY_ROW = [row for name in ROWS for row in papers.table(name)]


def find(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a table that have these values."""
    return [row for row in papers.table(name) if all(row[key] == value for key, value in wanted.items())]


def numbers(name: str, **wanted: Any) -> list[Any]:
    """The six AP of the one row that has these values."""
    (row,) = find(name, **wanted)
    return [row.get(key) for key in AP]


def is_slip(row: dict[str, Any]) -> bool:
    return "slip:" in (row["note"] or "")


# ------------------------------------------------------------------------------------------------- the files


def test_every_table_is_there() -> None:
    assert papers.tables() == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_table_has_its_rows_and_says_whose_they_are(name: str) -> None:
    rows = papers.table(name)
    document, _, number = name.rpartition("_table")
    titles = {"deim": "DEIM", "deim_slides": "DEIM slides", "dfine": "D-FINE", "od_detr": "OD-DETR"}
    assert len(rows) == ROWS[name]
    assert {(row["paper"], row["table"]) for row in rows} == {(titles.get(document, "Stable-DINO"), int(number))}
    assert len({tuple(row.items()) for row in rows}) == len(rows) - (
        name == "dfine_table4"
    )  # two lost settings, one AP


@pytest.mark.parametrize("name", ROWS)
def test_file_is_tidy(name: str) -> None:
    raw = (ROOT / "data" / "papers" / f"{name}.csv").read_bytes()
    text = raw.decode("utf-8")
    lines = [line for line in text.splitlines() if '"' not in line]
    assert b"\r" not in raw and text.endswith("\n") and not text.startswith("\ufeff")
    assert {line.count(",") for line in lines} == {len(papers.table(name)[0]) - 1}
    assert not re.search(r" ,|, ,|[✓⋆∗$]|\(\+", text)  # marks of the print, and gains in brackets


def test_readme_lists_every_table_with_its_rows() -> None:
    text = (ROOT / "data" / "papers" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)\.csv` \| .* \| (\d+) \|$", text, re.M)
    assert {name: int(rows) for name, rows in listed} == ROWS and len(listed) == len(ROWS)


# ------------------------------------------------------------------------------------------------ the loader


def test_cells_are_numbers_words_or_none() -> None:
    (gold,) = find("deim_table1", model="Gold-YOLO-L")
    assert gold["epochs"] == 300 and isinstance(gold["epochs"], int)
    assert gold["ap"] == 53.3 and isinstance(gold["ap"], float)
    assert gold["ap75"] is None and gold["note"] is None
    (rate,) = find("deim_table9", model="DEIM-D-FINE-X", field="backbone learning rate")
    assert rate["value"] == 5e-6


def test_unknown_table_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match='no table "deim_table111"; the nearest is "deim_table11"'):
        papers.table("deim_table111")
    with pytest.raises(DataError, match="nearest"):
        papers.table("../papers/deim_table1")


def test_installed_package_finds_its_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(papers, "INSTALLED", papers.CHECKOUT)
    monkeypatch.setattr(papers, "CHECKOUT", tmp_path / "data" / "papers")
    assert papers.tables() == list(ROWS)


def test_missing_folder_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(papers, "CHECKOUT", tmp_path)
    monkeypatch.setattr(papers, "INSTALLED", tmp_path / "papers_data")
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*none; restore data/papers"):
        papers.tables()


def test_wheel_and_sdist_bring_the_tables_along() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert "data/papers" in targets["sdist"]["include"] and "data/papers" in targets["wheel"]["only-include"]
    assert targets["wheel"]["sources"] == {"data/papers": papers.INSTALLED.relative_to(ROOT).as_posix()}


def test_results_are_all_detections_in_the_common_columns() -> None:
    rows = papers.results()
    whole = ("deim_table1", "deim_table2", "deim_table3", "deim_table8", "deim_table11", "deim_slides_table1")
    whole += ("dfine_table1", "dfine_table2", "dfine_table7")
    whole += ("stable_dino_table2", "stable_dino_table3", "stable_dino_table5", "stable_dino_table10")
    whole += ("od_detr_table1", "od_detr_table7", "od_detr_table10", "od_detr_table11")
    assert len(rows) == sum(ROWS[name] for name in whole)
    assert all(tuple(row) == papers.COLUMNS for row in rows)
    assert {row["data"] for row in rows} == {"COCO val2017", "COCO test-dev", "CrowdHuman"}
    assert all(row["model"] and row["ap"] for row in rows)


# ------------------------------------------------------------------------------------------------ the values


def test_ap_is_plausible() -> None:
    for row in EVERY_ROW:
        values = {k: v for k, v in row.items() if re.fullmatch(r"(mask_|box_)?ap(50|75|s|m|l|_train|_val)?", k) and v}
        assert all(isinstance(value, float) and 0 < value < 100 for value in values.values()), row
        for kind in ("", "mask_"):
            ap, ap50, ap75, small, medium, large = (values.get(kind + key) for key in AP)
            assert ap is None or ap50 is None or ap < ap50, row
            assert ap50 is None or ap75 is None or ap75 < ap50, row
            assert ap is None or ap75 is None or ap < ap75, row
            assert small is None or small < medium < large, row
            if small is not None and row.get("data") != "CrowdHuman" and not is_slip(row):
                assert small < ap < large, row


def test_models_are_plausible() -> None:
    for row in EVERY_ROW:
        assert row.get("epochs") is None or row["epochs"] in range(1, 501), row
        assert row.get("params_m") is None or 4 <= row["params_m"] <= 76 or row["table"] in (8, 10), row
        assert row.get("gflops") is None or 7 <= row["gflops"] <= 289, row
        assert row.get("latency_ms") is None or 2 <= row["latency_ms"] <= 21, row


def test_rows_that_repeat_another_model_are_noted_as_slips() -> None:
    key = ("ap75", "aps", "apm", "apl")
    rows = [row for row in papers.results() if row["aps"] is not None and row["paper"] != "DEIM slides"]
    copies = [
        (a, b)
        for a, b in combinations(rows, 2)
        if a["paper"] == b["paper"] and [a[k] for k in key] == [b[k] for k in key] and a["model"] != b["model"]
    ]
    assert len(copies) == 4  # YOLOv9-S, YOLOv9-M, RT-DETRv2-S, Co-DETR
    assert all(is_slip(a) or is_slip(b) for a, b in copies)


SLIPS = {
    *(("deim_table11", model) for model in ("YOLOv9-S", "YOLOv9-M", "RT-DETRv2-S", "RT-DETRv2-M")),
    *(("od_detr_table8", model) for model in ("Def-DETR", "OD-DETR")),
    ("od_detr_table11", "Co-DETR"),
}


def test_slips_are_these() -> None:
    assert {(name, row["model"]) for name in ROWS for row in papers.table(name) if is_slip(row)} == SLIPS


FULL = [
    ("deim_table1", {"model": "YOLOv9-E"}, [55.6, 72.8, 60.6, 40.2, 61.0, 71.4]),
    ("deim_table1", {"model": "YOLO11-X"}, [54.1, 70.8, 58.9, 37.0, 59.2, 69.7]),
    ("deim_table1", {"model": "RT-DETR-HG-L"}, [53.0, 71.7, 57.3, 34.6, 57.4, 71.2]),
    ("deim_table1", {"model": "DEIM-D-FINE-L"}, [54.7, 72.4, 59.4, 36.9, 59.6, 71.8]),
    ("deim_table1", {"model": "DEIM-D-FINE-X"}, [56.5, 74.0, 61.5, 38.8, 61.4, 74.2]),
    ("deim_table2", {"model": "Efficient-DETR", "backbone": "ResNet50"}, [45.1, 63.1, 49.1, 28.3, 48.4, 59.0]),
    ("deim_table2", {"model": "SMCA-DETR", "backbone": "ResNet101"}, [46.3, 66.6, 50.2, 27.2, 50.5, 63.2]),
    ("deim_table2", {"ap": 53.9}, [53.9, 71.7, 58.6, 36.7, 58.9, 70.9]),
    ("deim_table2", {"ap": 55.2}, [55.2, 73.3, 59.9, 37.8, 59.6, 72.8]),
    ("deim_table3", {"model": "DEIM-D-FINE-L"}, [57.5, 87.6, 62.9, 33.2, 48.7, 55.7]),
    ("deim_table4", {"epochs": 12, "mosaic": 0.0, "mixup": 0.5}, [50.1, 67.7, 54.0, 31.1, 54.5, 68.7]),
    ("deim_table4", {"epochs": 24, "mosaic": 0.5, "mixup": 0.5}, [52.5, 70.6, 56.7, 34.9, 57.1, 70.1]),
    ("deim_table8", {"epochs": 24}, [59.5, 76.4, 65.2, None, None, None]),
    ("deim_table11", {"model": "YOLOv10-M"}, [51.1, 68.1, 55.8, 33.8, 56.5, 67.0]),
    ("deim_table11", {"model": "RT-DETR-R18"}, [46.5, 63.8, 50.4, 28.4, 49.8, 63.0]),
    ("deim_table11", {"model": "DEIM-RT-DETRv2-M*"}, [53.2, 71.2, 57.8, 35.3, 57.6, 70.2]),
    ("deim_table11", {"model": "DEIM-D-FINE-Nano"}, [43.0, 60.4, 46.2, 24.5, 47.1, 62.1]),
    ("deim_table11", {"model": "DEIM-D-FINE-M"}, [52.7, 70.0, 57.3, 35.3, 56.7, 69.5]),
    ("deim_table12", {"objects": 50}, [52.2, 70.1, 56.4, None, None, None]),
    ("stable_dino_table2", {"model": "SAM-DETR"}, [39.8, 61.8, 41.6, 20.5, 43.4, 59.6]),
    ("stable_dino_table2", {"model": "Dynamic-DETR"}, [42.9, 61.0, 46.3, 24.6, 44.9, 54.4]),
    ("stable_dino_table2", {"model": "Stable-DINO-4scale", "epochs": 24}, [51.5, 68.5, 56.3, 35.2, 54.7, 66.5]),
    ("stable_dino_table3", {"model": "DINO-4scale", "epochs": 36}, [58.0, 77.1, 66.3, 41.3, 62.1, 73.6]),
    ("stable_dino_table3", {"model": "Stable-DINO-4scale", "epochs": 24}, [58.6, 76.7, 64.1, 41.8, 63.0, 74.7]),
    ("stable_dino_table5", {"model": "Stable-H-DETR"}, [49.2, None, None, 32.7, 52.8, 64.9]),
    ("stable_dino_table6", {"id": 7}, [49.4, 67.3, 54.1, None, None, None]),
    ("stable_dino_table7", {"f1": "s * p"}, [26.4, 32.5, 28.8, None, None, None]),
    ("stable_dino_table7", {"f1": "s**2"}, [49.6, 66.8, 54.5, None, None, None]),
    ("stable_dino_table8", {"class_weight": 6.0}, [50.2, 66.7, 55.0, None, None, None]),
    ("stable_dino_table9", {"f2": "s**0.5", "cost_weight": 8.0}, [48.8, 67.1, 52.7, None, None, None]),
    ("stable_dino_table10", {"model": "Stable-DINO-SwinL", "data": "COCO test-dev"}, [63.8, *[None] * 5]),
    ("dfine_table1", {"model": "D-FINE-X", "group": None}, [55.8, *[None] * 5]),
    ("dfine_table2", {"model": "DAB-DETR + FDR & GO-LSD"}, [49.5, 67.2, 54.1, 31.8, 53.2, 63.3]),
    ("dfine_table2", {"model": "DINO + FDR & GO-LSD", "epochs": 24}, [52.4, 69.5, 56.9, 34.6, 55.7, 66.2]),
    ("dfine_table4", {"parameter": "N", "value": 32}, [53.7, *[None] * 5]),
    ("dfine_table4", {"parameter": "T", "value": 5}, [54.0, *[None] * 5]),
    ("dfine_table7", {"model": "D-FINE-S", "group": "Objects365 pre-training"}, [50.7, *[None] * 5]),
    ("od_detr_table1", {"model": "OD-DETR"}, [47.7, 65.2, 51.4, 29.8, 51.5, 63.0]),
    ("od_detr_table1", {"model": "Group-DETR-DINO-4scale"}, [51.3, None, None, 34.7, 54.5, 65.3]),
    ("od_detr_table1", {"model": "OD-DINO-5scale"}, [52.0, 68.8, 56.9, 35.4, 54.8, 66.8]),
    ("od_detr_table2", {"id": 4}, [47.7, 65.2, 51.4, None, None, None]),
    ("od_detr_table3", {"method": "QFL w/o MD"}, [45.8, 63.6, 49.8, None, None, None]),
    ("od_detr_table4", {"id": 3}, [46.8, 64.6, 50.7, None, None, None]),
    ("od_detr_table5", {"method": "Naive Distillation"}, [44.2, 62.6, 47.7, None, None, None]),
    ("od_detr_table6", {"method": "Re-Matching"}, [47.0, 64.5, 50.9, None, None, None]),
    ("od_detr_table7", {"model": "OD-DINO-EMA"}, [52.0, 69.4, 56.8, None, None, None]),
    ("od_detr_table8", {"model": "OD-DETR", "shared_decoder": 0}, [47.2, 65.5, 51.0, None, None, None]),
    ("od_detr_table9", {"shared_decoder": 1}, [49.9, 67.1, 54.7, None, None, None]),
    ("od_detr_table10", {"backbone": "Swin-L"}, [57.8, 76.0, 63.2, None, None, None]),
    ("od_detr_table11", {"model": "OD-DINO-4scale", "epochs": 24}, [58.8, 77.0, 64.4, 42.4, 63.1, 75.1]),
]


@pytest.mark.parametrize("name, wanted, expected", FULL)
def test_spot_rows_are_as_printed(name: str, wanted: dict[str, Any], expected: list[float | None]) -> None:
    assert numbers(name, **wanted) == expected


SPOTS = [
    ("deim_table1", {"model": "YOLOv10-L"}, {"epochs": 500, "params_m": 24, "gflops": 120, "latency_ms": 7.66}),
    ("deim_table1", {"model": "DEIM-D-FINE-X"}, {"epochs": 50, "params_m": 62, "gflops": 202, "latency_ms": 12.89}),
    ("deim_table2", {"ap": 54.3, "model": "DEIM-RT-DETRv2"}, {"epochs": 60, "params_m": 42, "gflops": 136}),
    ("deim_table2", {"ap": 45.7}, {"model": "Efficient-DETR", "epochs": 36, "params_m": 54, "gflops": 289}),
    ("deim_table5", {"gamma": 1.5}, {"ap": 52.4, "epochs": 24}),
    ("deim_table7", {"model": "DEIM-RT-DETRv2-R50", "epochs": 1}, {"gpu_hours": 1.183, "ap": None}),
    ("deim_table7", {"model": "DEIM-RT-DETRv2-R50", "epochs": 60}, {"gpu_hours": 71, "ap": 54.3}),
    ("deim_table9", {"model": "DEIM-D-FINE-M", "field": "epochs"}, {"value": 90}),
    ("deim_table9", {"model": "DEIM-D-FINE-S", "field": "least backbone learning rate"}, {"value": 1e-4}),
    ("deim_table9", {"model": "DEIM-D-FINE-L", "field": "base learning rate"}, {"value": 5e-4}),
    ("deim_table10", {"model": "DEIM-RT-DETRv2-M*", "field": "backbone learning rate"}, {"value": 2e-5}),
    ("deim_table10", {"model": "DEIM-RT-DETRv2-M", "field": "backbone learning rate"}, {"value": 1e-4}),
    ("deim_table10", {"model": "DEIM-RT-DETRv2-S", "field": "decoder activation"}, {"value": "SiLU"}),
    ("deim_table11", {"model": "RT-DETRv2-M"}, {"epochs": 120, "params_m": 31, "gflops": 92, "latency_ms": 6.40}),
    ("deim_table13", {"model": "DEIM-RT-DETRv2-R50"}, {"ap_train": 64.8, "ap_val": 54.3}),
    ("dfine_table3", {"step": "target gating layer"}, {"ap": 52.8, "params_m": 33, "latency_ms": 8.15, "gflops": 98}),
    ("dfine_table3", {"step": "GO-LSD"}, {"ap": 54.0, "params_m": 31, "latency_ms": 8.07, "gflops": 91}),
    ("dfine_table5", {"method": "GO-LSD"}, {"ap": 54.5, "minutes_per_epoch": 31, "memory_mb": 8734}),
    ("dfine_table6", {"model": "D-FINE-X", "field": "c"}, {"value": 0.125}),
    ("dfine_table6", {"model": "D-FINE-L", "field": "backbone learning rate"}, {"value": 1.25e-5}),
    ("dfine_table6", {"model": "D-FINE-M", "field": "decoder layers"}, {"value": 4}),
    ("dfine_table6", {"model": "D-FINE-S", "field": "backbone"}, {"value": "HGNetv2-B0"}),
    ("dfine_table6", {"model": "D-FINE-S", "field": "epochs of fine-tuning"}, {"value": 58}),
    ("stable_dino_table1", {"matching": "stable", "matched": "B"}, {"effect_on_b": "none"}),
    ("stable_dino_table4", {"queries": 100}, {"mask_ap": 38.7, "box_ap": None, "mask_apl": 59.8}),
    ("stable_dino_table4", {"model": "Stable-MaskDINO"}, {"mask_ap": 42.1, "box_ap": 47.0, "mask_ap75": 45.7}),
    ("stable_dino_table10", {"model": "SwinV2-G", "data": "COCO val2017"}, {"params_m": 3000, "ap": 62.5, "mask": 1}),
]


@pytest.mark.parametrize("name, wanted, expected", SPOTS)
def test_spot_cells_are_as_printed(name: str, wanted: dict[str, Any], expected: dict[str, Any]) -> None:
    (row,) = find(name, **wanted)
    assert {key: row[key] for key in expected} == expected


def test_slides_repeat_the_paper() -> None:
    for slide, original in (("deim_slides_table1", "deim_table1"), ("deim_slides_table2", "deim_table6")):
        other = {"paper", "table", "note"}
        plain = [[{k: v for k, v in r.items() if k not in other} for r in papers.table(t)] for t in (slide, original)]
        assert plain[0] == plain[1] and len(plain[0]) == ROWS[slide]


@pytest.mark.parametrize(
    "name, model, other",
    [
        ("od_detr_table1", "Stable-DINO", "stable_dino_table2"),
        ("od_detr_table1", "DINO-", "stable_dino_table2"),
        ("od_detr_table11", "Stable-DINO", "stable_dino_table3"),
        ("od_detr_table11", "DINO-", "stable_dino_table3"),
        ("od_detr_table11", "H-DETR", "stable_dino_table3"),
    ],
)
def test_papers_quote_one_another_alike(name: str, model: str, other: str) -> None:
    quoted = [row for row in papers.table(name) if row["model"].startswith(model)]
    assert len(quoted) >= 2
    for row in quoted:
        assert numbers(other, model=row["model"], epochs=row["epochs"]) == [row[key] for key in AP]


@pytest.mark.parametrize(
    "name, mark, gains",
    [
        ("dfine_table2", "+ FDR & GO-LSD", [3.4, 5.3, 3.7, 2.6, 2.0]),
        ("stable_dino_table5", "Stable-", [1.3, 1.0, 0.6]),
    ],
)
def test_printed_gains_follow_from_neighbouring_rows(name: str, mark: str, gains: list[float]) -> None:
    rows = papers.table(name)
    assert [round(b["ap"] - a["ap"], 1) for a, b in zip(rows[::2], rows[1::2], strict=True)] == gains
    assert all(mark in row["model"] for row in rows[1::2])


@pytest.mark.parametrize(
    "name, model, base, gain",
    [
        ("stable_dino_table2", ("Stable-DINO-4scale", 12), ("DINO-4scale", 12), 1.4),
        ("stable_dino_table2", ("Stable-DINO-5scale", 12), ("DINO-5scale", 12), 1.1),
        ("stable_dino_table2", ("Stable-DINO-4scale", 24), ("DINO-4scale", 24), 1.1),
        ("stable_dino_table3", ("Stable-DINO-4scale", 12), ("DINO-4scale", 12), 0.9),
        ("stable_dino_table3", ("Stable-DINO-4scale", 24), ("DINO-4scale", 36), 0.6),
        ("od_detr_table1", ("OD-DETR", 24), ("Def-DETR+", 50), 2.3),
        ("od_detr_table1", ("OD-DAB-DETR", 24), ("DAB-Def-DETR*", 50), 1.6),
        ("od_detr_table1", ("OD-DINO-4scale", 24), ("DINO-4scale", 24), 1.4),
        ("od_detr_table1", ("OD-DINO-5scale", 12), ("DINO-5scale", 12), 2.6),
        ("od_detr_table11", ("OD-DINO-4scale", 12), ("DINO-4scale", 12), 0.9),
        ("od_detr_table11", ("OD-DINO-4scale", 24), ("DINO-4scale", 36), 0.8),
        ("od_detr_table7", ("OD-DINO-EMA", 24), ("DINO-EMA", 24), 1.3),
    ],
)
def test_printed_gains_follow_from_the_rows(
    name: str, model: tuple[str, int], base: tuple[str, int], gain: float
) -> None:
    better, worse = (numbers(name, model=m, epochs=epochs)[0] for m, epochs in (model, base))
    assert round(better - worse, 1) == gain


SCHEDULES = [name for name in STUDIES if "table6" in name and name.startswith("dfine")]  # they claim no AP


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in SCHEDULES])
def test_studies_claim_what_their_tables_say(name: str) -> None:
    claim = recipes.get(name).paper
    assert claim is not None
    document, _, number = claim.table.partition(" Table ")
    given = {key: getattr(claim, key) for key in AP if getattr(claim, key) is not None}
    rows = papers.table(f"{document.lower().replace('-', '')}_table{number}")
    assert given and any(given.items() <= row.items() for row in rows)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_dfines_table_6(name: str) -> None:
    recipe = recipes.get(name)
    model = f"D-FINE-{name[-1].upper()}"
    said = {row["field"]: row["value"] for row in papers.table("dfine_table6") if row["model"] == model}
    clock, decoder = recipe.timeline, recipe.arch.decoder
    assert clock.augment == float(said["epochs with advanced augmentation"])
    assert clock.total - clock.augment == float(said["epochs without advanced augmentation"])
    assert (recipe.optim.lr, recipe.optim.backbone_lr, recipe.optim.weight_decay) == tuple(
        float(said[field]) for field in ("base learning rate", "backbone learning rate", "weight decay")
    )
    assert (recipe.batch, clock.ema_decay) == (float(said["batch size"]), float(said["EMA decay"]))
    assert decoder.points == tuple(float(said[f"sampling points {size}"]) for size in ("small", "medium", "large"))
    assert (decoder.layers, recipe.arch.queries.count) == (float(said["decoder layers"]), float(said["queries"]))
    assert (recipe.arch.refine.bins, recipe.arch.refine.up) == (float(said["bins N"]), float(said["a"]))
    assert 1 / recipe.arch.refine.scale == float(said["c"])
    weights = {"vfl": "VFL", "l1": "L1", "giou": "GIoU", "fgl": "FGL", "ddf": "DDF"}
    assert {loss.name: loss.weight for loss in recipe.losses} == {
        ours: float(said[f"{theirs} weight"]) for ours, theirs in weights.items()
    }


def test_the_roadmap_is_dfines_table_3() -> None:
    keys = ("ap", "params_m", "gflops", "latency_ms")
    rows = papers.table("dfine_table3")
    claims = [recipe.paper for recipe in ROADMAP.values()]
    assert [[row[key] for key in keys] for row in rows] == [[getattr(claim, key) for key in keys] for claim in claims]


@pytest.mark.parametrize(
    "name", [name for name in recipes.names() if recipes.get(name).paper and name not in {**STUDIES, **ROADMAP}]
)
def test_recipes_claim_what_the_tables_say(name: str) -> None:
    claim = recipes.get(name).paper
    assert claim is not None
    keys = (*AP, "epochs", "params_m", "gflops", "latency_ms")
    rows = [
        row
        for row in papers.results()
        if f"{row['paper']} Table {row['table']}" == claim.table and all(row[k] == getattr(claim, k) for k in keys)
    ]
    assert len(rows) == 1
    family = {
        "deim_dfine": "DEIM-D-FINE",
        "dfine": "D-FINE",
        "deim_rtdetrv2": "DEIM-RT-DETRv2",
        "rtdetrv2": "RT-DETRv2",
    }
    assert rows[0]["model"].startswith(next(title for prefix, title in family.items() if name.startswith(prefix)))


def test_some_recipes_have_a_claim() -> None:
    assert len([name for name in recipes.names() if recipes.get(name).paper]) >= 20


# ---------------------------------------------------------------------------------------------- the pictures


def drawn(figure: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of every trace, without the gaps between lines."""
    return {t.name: [(x, y) for x, y in zip(t.x, t.y, strict=True) if x is not None] for t in figure.data}


@pytest.mark.parametrize(
    "figure, column", [(claims.ap_against_epochs, "epochs"), (claims.ap_against_latency, "latency_ms")]
)
def test_figure_shows_the_points_of_the_tables(figure: Any, column: str) -> None:
    rows = [row for i in (1, 2, 11) for row in papers.table(f"deim_table{i}") if row[column] is not None]
    families = {  # the name without its last part, which is the size; those of Table 2 have none
        name: sorted(
            (row[column], row["ap"]) for row in rows if name in (row["model"], row["model"].rpartition("-")[0])
        )
        for name in claims.FAMILIES
    }
    points = drawn(figure())
    assert {name: sorted(found) for name, found in points.items()} == families
    assert all(len(found) >= 3 for found in points.values())


def test_figures_show_the_claims_of_deim() -> None:
    fine = [(2.12, 43.0), (3.49, 49.0), (5.55, 52.7), (8.07, 54.7), (12.89, 56.5)]
    rt = [(120, 49.0), (120, 50.9), (60, 53.2), (36, 53.9), (60, 54.3), (36, 55.2), (60, 55.5)]
    assert drawn(claims.ap_against_latency())["DEIM-D-FINE"] == fine
    assert drawn(claims.ap_against_epochs())["DEIM-RT-DETRv2"] == rt


def test_lines_over_epochs_join_trainings_of_one_model_only() -> None:
    trace = next(t for t in claims.ap_against_epochs().data if t.name == "DEIM-RT-DETRv2")
    assert list(trace.x) == [120, None, 120, None, 60, None, 36, 60, None, 36, 60]


def test_hover_names_the_model_and_its_cost() -> None:
    traces = {t.name: t for t in claims.ap_against_latency().data}
    facts = traces["D-FINE"].text[3].split("<br>")
    assert facts == ["<b>D-FINE-L</b>", "AP 54.0 %", "72 epochs", "8.07 ms", "31 M parameters", "91 GFLOPs"]
    sizes = [t for t in claims.ap_against_epochs().data if t.name == "RT-DETRv2"][0].text
    assert sum("<b>RT-DETRv2 ResNet101</b>" in text for text in sizes) == 1


@pytest.mark.parametrize(
    "figure, column", [(claims.ap_against_epochs, "epochs"), (claims.ap_against_latency, "latency_ms")]
)
def test_measured_points_are_drawn_apart(figure: Any, column: str) -> None:
    own = [{"model": "mine", "ap": 41.5, column: 12, "gflops": 7}, {"model": "again", "ap": 42.0, column: 24}]
    with_own = figure(own)
    trace = with_own.data[-1]
    others = {t.marker.symbol for t in with_own.data[:-1]}
    assert len(with_own.data) == len(figure().data) + 1 and len(others) == len(with_own.data) - 1
    assert trace.name == "measured" and drawn(with_own)["measured"] == [(12, 41.5), (24, 42.0)]
    assert trace.mode == "markers" and trace.marker.symbol not in others
    assert "mine" in trace.text[0] and "7 GFLOPs" in trace.text[0] and "GFLOPs" not in trace.text[1]


def test_incomplete_measurement_is_refused() -> None:
    with pytest.raises(DataError, match='needs "model", "ap" and "latency_ms".* lacks latency_ms: add it'):
        claims.ap_against_latency([{"model": "mine", "ap": 41.5, "epochs": 12}])
