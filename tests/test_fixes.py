"""The fix list: what it asks about, in which words, and that the doctor and a split take it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import deimkit as dk
from deimkit.data.doctor import Report
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.findings import Findings
from deimkit.explore.fixes import fix_list
from tests.findings_scene import results, scene


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    split = scene(tmp_path)
    return Findings(errors(split, results()), name="deim", threshold=0.5)


def test_annotations_are_listed_by_how_sure_the_detector_is(findings: Findings) -> None:
    report = fix_list(findings)
    doubtful = [p for p in report.problems if p.kind == "doubtful annotation"]
    assert [p.image for p in doubtful] == ["b", "e"]
    assert doubtful[0].detail == (
        "猫 at (10, 10, 100, 100) is seen as dog 0.95 at (10, 10, 100, 100), IoU 1.00; mistakenness 0.95"
    )
    assert doubtful[0].file.endswith("b.png") and "correct the class or the box" in doubtful[0].remedy
    assert [p.image for p in fix_list(findings, doubt=0.9).problems if p.kind == doubtful[0].kind] == ["b"]


def test_what_nobody_annotated_is_listed_from_a_score_on(findings: Findings) -> None:
    new = [p for p in fix_list(findings).problems if p.kind == "object without annotation"]
    assert [(p.image, p.detail) for p in new] == [
        ("d", "nothing is annotated where a detector sees 猫 0.60 at (20, 20, 40, 40)")
    ]
    assert len(fix_list(findings, sight=0.05).problems) == len(fix_list(findings).problems) + 1


def test_a_perfect_detector_asks_nothing(tmp_path: Path) -> None:
    split = scene(tmp_path)
    report = fix_list(Findings(errors(split, Results.concat([]))))
    assert report.problems == () and report.ok and "5 images of" in report.summary


@pytest.mark.parametrize("wrong", [{"doubt": 1.5}, {"sight": -0.1}])
def test_thresholds_are_checked(findings: Findings, wrong: dict[str, float]) -> None:
    with pytest.raises(DeimkitError, match=r"doubt and sight are in \[0, 1\]"):
        fix_list(findings, **wrong)


def test_it_goes_to_a_file_and_leaves_images_out(findings: Findings, tmp_path: Path) -> None:
    report = fix_list(findings)
    file = tmp_path / "fixes.json"
    file.write_text(report.to_json(), encoding="utf-8")
    assert Report.read(file) == report
    assert list(findings.split.without(report.problems).ids) == ["a", "c"]


def _report(**fields: object) -> str:
    one = {"severity": "error", "kind": "k", "file": "f", "detail": "d", "image": 1} | fields
    return json.dumps({"dataset": "", "summary": "", "problems": [one]})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"dataset": "x"}', _report(severity="bad"), _report(image=[1]), _report(more=1)]
)
def test_a_file_without_a_report_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fixes.json"
    file.write_text(text)
    with pytest.raises(DataError, match="fixes.json holds no report of the doctor"):
        Report.read(file)
    with pytest.raises(DataError, match="none.json holds no report"):
        Report.read(tmp_path / "none.json")


def test_the_doctor_goes_through_it(tmp_path: Path) -> None:
    """On a dataset from disk with numbers for ids; what is about an image that is gone is left out."""
    from deimkit.data.synthetic import Synthetic

    data = dk.Dataset.open(Synthetic(train=4, val=3, size=64).write(tmp_path / "scenes"))
    split = data.val
    assert split is not None
    box = split.boxes[:1].astype(float)
    wrong = Results(split.images_of_rows[:1], (split.labels[:1] + 1) % len(split.categories), box[:, 0] * 0 + 0.9, box)
    report = fix_list(Findings(errors(split, wrong)))
    assert len(report.problems) == 1
    file = tmp_path / "fixes.json"
    file.write_text(report.to_json())
    assert [p["image"] for p in json.loads(file.read_text())["problems"]] == [split.ids[0]]
    found = dk.doctor(data, fixes=file)
    assert found.ok and [p for p in found.problems if p.kind == "doubtful annotation"] == list(report.problems)
    mended = replace(data, val=split.take([1, 2]))
    rest = dk.doctor(mended, pixels=False, fixes=file).problems
    assert not [p for p in rest if p.kind == "doubtful annotation"]
    assert [p.detail for p in rest if p.kind == "fixes of other images"] == [
        "1 of 1 entries are about images that are not in this dataset"
    ]
