"""COCO evaluation of 5,000 images with 80 classes and 100 detections per image, ours beside pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deimkit.evaluation.coco import Results, evaluate
from tests.bench.paired import Row, seconds
from tests.scenes import random_results, random_split

IMAGES, CLASSES, OBJECTS, DETECTIONS = 5000, 80, 7, 100


def pycocotools(truth: dict[str, Any], found: list[dict[str, Any]]) -> float:
    """AP as everybody computes it, from the two dictionaries on."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        run = COCOeval(gt, gt.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


def best(found: Results) -> Results:
    """The 100 most confident detections of each image."""
    order = np.lexsort((-found.score, found.image))
    image = found.image[order]
    rank = np.arange(len(image)) - np.searchsorted(image, image)
    return Results(*(x[order[rank < DETECTIONS]] for x in found))


def rows() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    split = random_split(rng, IMAGES, CLASSES, OBJECTS)
    split = replace(split, labels=rng.integers(0, CLASSES, len(split.labels)))
    found = best(random_results(rng, split, DETECTIONS))
    xywh = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).tolist()
    ids, categories = list(split.ids), split.categories.ids
    listed = [
        {"image_id": ids[i], "category_id": categories[k], "score": s, "bbox": b}
        for i, k, s, b in zip(found.image, found.label, found.score.tolist(), xywh, strict=True)
    ]
    packed = median(seconds(lambda: evaluate(split, found)) for _ in range(3))
    from_rows = median(seconds(lambda: evaluate(split, listed)) for _ in range(3))
    truth = split.to_coco()
    theirs: list[float] = []
    peer = seconds(lambda: theirs.append(pycocotools(truth, listed)))  # once: it takes a minute or two
    difference = abs(theirs[0] - evaluate(split, found)["AP"])
    size = f"{IMAGES} images, {len(split.labels)} objects, {len(listed)} detections; AP differs by {difference:.1e}"
    yield Row("evaluate, packed arrays", packed, peer, "s", peer / packed, size)
    yield Row("evaluate, COCO result rows", from_rows, peer, "s", peer / from_rows)
