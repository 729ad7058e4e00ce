"""Random ground truth and detections, made to meet every rule of COCO's evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.random import Generator

from deimkit.data.split import CategoryMap, Split
from deimkit.evaluation.coco import Results


def split_of(
    boxes: list[list[list[float]]],
    labels: list[list[int]],
    names: tuple[str, ...] = ("cat", "dog"),
    crowd: list[list[bool]] | None = None,
    ids: list[int | str] | None = None,
) -> Split:
    """A split from xyxy boxes and labels, one list per image."""
    flat = np.array([box for image in boxes for box in image], np.float32).reshape(-1, 4)
    counts = [len(image) for image in boxes]
    n, total = len(boxes), len(flat)
    wide = flat.astype(np.float64)
    return Split(
        name="test",
        categories=CategoryMap(ids=tuple(range(3, 3 + len(names))), names=names),
        ids=ids if ids is not None else list(range(n)),
        paths=[Path(f"{i}.jpg") for i in range(n)],
        sizes=np.full((n, 2), 640, np.int32),
        boxes=flat,
        labels=np.array([label for image in labels for label in image], np.int64),
        crowd=np.array([c for image in crowd for c in image] if crowd else np.zeros(total), bool),
        areas=(wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1]),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_ids=np.arange(total),
    )


def random_split(
    rng: Generator,
    images: int,
    classes: int,
    objects: int,
    crowded: float = 0.1,
    side: int = 640,
    grid: int = 0,
) -> Split:
    """About `objects` boxes per image of 4 to 400 pixels; areas as if from masks. grid: round to so many pixels."""
    counts = rng.integers(0, 2 * objects + 1, images)
    total = int(counts.sum())
    low, size = rng.uniform(0, side, (total, 2)), np.exp(rng.uniform(np.log(4), np.log(400), (total, 2)))
    boxes = np.concatenate([low, low + size], 1)
    boxes = (np.round(boxes / grid) * grid if grid else boxes).astype(np.float32)
    wide = boxes.astype(np.float64)
    return Split(
        name="random",
        categories=CategoryMap(ids=tuple(range(1, 2 * classes, 2)), names=tuple(f"class {k}" for k in range(classes))),
        ids=rng.permutation(3 * images)[:images].tolist(),  # gappy and in no order
        paths=[Path(f"{i}.jpg") for i in range(images)],
        sizes=np.full((images, 2), side, np.int32),
        boxes=boxes,
        labels=rng.integers(0, classes, total) // 2 * 2,  # some classes have no object
        crowd=rng.random(total) < crowded,
        areas=(wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1]) * rng.uniform(0.5, 1, total),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_ids=np.arange(total),
    )


def random_results(rng: Generator, split: Split, noise: int, ties: bool = False, grid: int = 0) -> Results:
    """Shifted copies of the objects, up to three of each, among `noise` random boxes per image, in no order."""
    near = np.repeat(np.arange(len(split.labels)), rng.integers(0, 4, len(split.labels)))
    size = split.boxes[near, 2:] - split.boxes[near, :2]
    shift = rng.normal(0, 0.12, (len(near), 4)) * np.tile(size, 2)
    copies = split.boxes[near] + (np.round(shift / grid) * grid if grid else shift)
    copies[:, 2:] = np.maximum(copies[:, 2:], copies[:, :2])
    classes, far = len(split.categories), len(split) * noise
    low, size = rng.uniform(-20, 640, (far, 2)), np.exp(rng.uniform(0, np.log(1200), (far, 2)))
    label = np.where(rng.random(len(near)) < 0.9, split.labels[near], rng.integers(0, classes, len(near)))
    order = rng.permutation(len(near) + far)
    score = rng.random(len(order))
    return Results(
        np.concatenate([split.images_of_rows[near], np.repeat(np.arange(len(split)), noise)])[order],
        np.concatenate([label, rng.integers(0, classes, far)])[order],
        np.round(score * 8) / 8 if ties else score,
        np.concatenate([copies, np.concatenate([low, low + size], 1)]).astype(np.float32)[order],
    )
