"""The picture of how a failure came to be: what is plotted is what the traces say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from deimkit.errors import DeimkitError
from deimkit.evaluation.errors import errors
from deimkit.explore.curves import LINES
from deimkit.explore.findings import Findings
from deimkit.explore.ways import about, draw_ways
from tests.findings_scene import results, scene, traces


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    split = scene(tmp_path)
    return Findings(errors(split, results()), traces(split, results()), threshold=0.5)


def test_the_lines_are_the_traces(findings: Findings) -> None:
    assert findings.traces is not None
    picture, overlap, score = draw_ways(findings, [0, 1], annotation=0).axes
    for k, (iou, said) in enumerate(zip(overlap.lines, score.lines, strict=True)):
        assert np.allclose(np.asarray(iou.get_ydata())[1:], findings.detections["layer_iou"][k])
        assert np.allclose(said.get_ydata(), findings.traces.scores[k])
    layers = list(findings.traces.layers)
    assert [text.get_text() for text in overlap.get_xticklabels()] == ["first", *layers]
    assert [text.get_text() for text in score.get_xticklabels()] == layers
    assert picture.get_title("left") == "a.png"


def test_the_boxes_are_first_dotted_last_solid_and_the_annotation_dashed(findings: Findings) -> None:
    assert findings.traces is not None
    picture = draw_ways(findings, [0], annotation=0).axes[0]
    *between, first, last, truth = picture.patches
    assert [to_hex(p.get_edgecolor()) for p in (first, last, truth)] == [LINES[0].lower()] * 2 + ["#ffffff"]
    for patch, box in (
        (first, findings.traces.start[0]),
        (last, findings.traces.boxes[0, -1]),
        (truth, findings.split.boxes[0]),
    ):
        assert np.allclose(patch.get_bbox().extents, box, atol=1e-4)
    assert len(between) == len(findings.traces.layers) - 1
    left, right = picture.get_xlim()
    assert left < findings.split.boxes[0][0] and right > findings.split.boxes[0][2]


def test_without_an_annotation_there_is_no_iou(findings: Findings) -> None:
    overlap = draw_ways(findings, [5]).axes[1]
    assert np.isnan(np.asarray(overlap.lines[0].get_ydata(), float)).all() and overlap.get_legend() is None


def test_what_is_about_an_annotation(findings: Findings) -> None:
    """The query that the matcher chose comes first, then the surest; none is there twice."""
    rows = about(findings, 0)
    assert set(rows) == {0, 1} and len(rows) == len(set(rows))
    assert about(findings, 0, most=1) == rows[:1]
    assert about(Findings(findings.errors), 0) == [0, 1], "without traces only the verdicts know"


@pytest.mark.parametrize("rows, annotation", [([0, 2], -1), ([0], 2), ([], -1), ([0] * 7, 0)])
def test_one_image_and_not_too_many(findings: Findings, rows: list[int], annotation: int) -> None:
    with pytest.raises(DeimkitError, match="Expected up to 6 detections of one image"):
        draw_ways(findings, rows, annotation)


def test_traces_are_needed(findings: Findings) -> None:
    with pytest.raises(DeimkitError, match="Findings without traces"):
        draw_ways(Findings(findings.errors), [0])
