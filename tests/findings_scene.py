"""Five images of two classes with a detection of every kind, and traces made up for them: what fronts have to show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from deimkit.data.split import Split
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.findings import Findings
from deimkit.explore.traces import Traces
from tests.scenes import split_of

BOXES: list[list[list[float]]] = [
    [[10, 10, 50, 50], [100, 100, 120, 120]],  # found twice; missed and small
    [[10, 10, 110, 110]],  # taken for the other class
    [[10, 10, 110, 110]],  # right, but loose
    [],  # something is seen where nothing is
    [[10, 10, 200, 200], [40, 40, 90, 90]],  # a crowd region, and an object badly placed
]
LABELS = [[0, 1], [0], [1], [], [0, 1]]
CROWD = [[False, False], [False], [False], [], [True, False]]
# image, label, score, box
ROWS: list[tuple[int, int, float, list[float]]] = [
    (0, 0, 0.9, [10, 10, 50, 50]),
    (0, 0, 0.8, [11, 11, 50, 50]),
    (1, 1, 0.95, [10, 10, 110, 110]),
    (2, 1, 0.7, [10, 10, 110, 70]),
    (2, 0, 0.1, [150, 150, 160, 160]),
    (3, 0, 0.6, [20, 20, 60, 60]),
    (4, 1, 0.85, [60, 40, 130, 90]),
]
VERDICTS = ["right", "duplicate", "class", "right", "background", "background", "location"]
NAMES = ("猫", "dog")


def scene(folder: Path, side: int = 224) -> Split:
    """The annotations, with images that lie in `folder`."""
    split = split_of(BOXES, LABELS, NAMES, CROWD, ids=["a", "b", "c", "d", "e"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in split.ids]
    for i, path in enumerate(paths):
        Image.new("RGB", (side, side), (40 * i, 90, 120)).save(path)
    return replace(split, paths=paths, sizes=np.full((len(split), 2), side, np.int32))


def results(rows: list[tuple[int, int, float, list[float]]] = ROWS) -> Results:
    """The detections."""
    image, label, score, boxes = zip(*rows, strict=True)
    return Results(np.array(image), np.array(label), np.array(score), np.array(boxes, np.float64))


def traces(split: Split, found: Results, layers: int = 3, seed: int = 0) -> Traces:
    """Made-up ways of these detections: their boxes drift into place, and the first annotation changes hands."""
    rng, n, m = np.random.default_rng(seed), len(found.score), len(split.labels)
    drift = np.arange(layers - 1, -1, -1)[None, :, None] * rng.uniform(0, 6, (n, 1, 4))
    matched = np.tile(np.arange(m, dtype=np.int32)[:, None], (1, layers))
    matched[split.crowd] = -1
    matched[:1, -1] = 99
    seen = np.where(matched < 0, np.nan, rng.random((m, layers))).astype(np.float32)
    return Traces(
        results=found,
        query=np.arange(n, dtype=np.int32),
        layers=("layer0", "layer1", "final")[-layers:],
        boxes=(found.boxes[:, None] + drift).astype(np.float32),
        scores=np.repeat(found.score[:, None], layers, 1).astype(np.float32),
        start=(found.boxes + 5).astype(np.float32),
        spread=rng.uniform(0, 3, (n, 4)).astype(np.float32),
        matched=matched,
        matched_iou=seen,
        matched_score=seen,
        truth=split.boxes,
        fingerprint=split.fingerprint(),
    )


def findings(
    folder: Path, traced: bool = True, name: str = "first", rows: list[tuple[int, int, float, list[float]]] = ROWS
) -> Findings:
    """All of it; 0.5 is the score from which on a detection is sure."""
    split = scene(folder)
    judged = errors(split, results(rows))
    return Findings(judged, traces(split, judged.results) if traced else None, name, threshold=0.5)
