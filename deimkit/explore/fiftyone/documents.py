"""Findings as the documents that FiftyOne's database holds: which fields there are, and what stands in them.

They are made as plain dictionaries, because making 100,000 labels as objects of FiftyOne's takes minutes. Labels that
are about one object (its annotation, the detections that aim at it, their first boxes) share an `instance`, so that the
App lights them up together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.findings import Findings, Table

Array = NDArray[Any]
Document = dict[str, Any]

TRUTH = "ground_truth"
# Columns of findings and the type of their field. Those of an image and an annotation stand behind the run's field.
IMAGE = {"ap": "float", "right": "int", "wrong": "int", "missed": "int", "change": "float"}
OF_ANNOTATION = {"crowd": "bool", "area": "float", "size": "str"}  # whoever looks at it
ANNOTATION = {
    "missed": "bool",
    "mistakenness": "float",
    "lost": "bool",
    "found": "bool",
    "switches": "int",
    "layer_query": "ints",
    "layer_iou": "floats",
    "layer_score": "floats",
}
START = {"sure": "bool", "verdict": "str", "overlap": "float", "drop": "float", "query": "int"}
DETECTION = START | {
    "size": "str",
    "mistakenness": "float",
    "layer_iou": "floats",
    "layer_score": "floats",
    "spread": "floats",
}
OWN_NAMES = {"score": "confidence", "crowd": "iscrowd"}  # what FiftyOne calls a column


def schema(findings: Findings, field: str) -> dict[str, str]:
    """The path of every field that a run needs and its type: "labels", or one of those above."""
    images, annotations, detections = findings.images, findings.annotations, findings.detections
    paths = {"image_id": "str", TRUTH: "labels", field: "labels", f"{TRUTH}.detections.annotation": "str"}
    paths |= {f"{TRUTH}.detections.{OWN_NAMES.get(c, c)}": kind for c, kind in OF_ANNOTATION.items()}
    paths |= {f"{TRUTH}.detections.{field}_{c}": kind for c, kind in ANNOTATION.items() if c in annotations}
    paths |= {f"{field}.detections.{c}": kind for c, kind in DETECTION.items() if c in detections}
    paths |= {f"{field}.detections.target": "str"}
    paths |= {f"{field}_{c}": kind for c, kind in IMAGE.items() if c in images}
    if "start" in detections:
        paths |= {start_of(field): "labels"}
        paths |= {f"{start_of(field)}.detections.{c}": kind for c, kind in START.items()}
    return paths


def names_of(field: str) -> set[str]:
    """The fields of an image that a run may have."""
    return {field, start_of(field), *(f"{field}_{name}" for name in IMAGE)}


def start_of(field: str) -> str:
    """The field of the first boxes of the queries that said what is in `field`."""
    return f"{field}_start"


def documents(findings: Findings, field: str, first: int, kept: list[list[Document]]) -> Iterator[Document]:
    """For some images, the values of all fields of theirs.

    first: the index of the first image. kept: for each of the images the annotations that the database has of it, which
    are brought to what the split says and keep what else was written into them, tags above all. Annotations that
    somebody added by hand stay as they are.
    """
    last = first + len(kept)
    annotations, detections = findings.annotations, findings.detections
    rows = slice(int(findings.split.starts[first]), int(findings.split.starts[last]))
    found = slice(*(int(k) for k in np.searchsorted(detections["image"], [first, last])))
    truth = _truth(findings, field, first, rows, kept)
    said = list(_said(findings, found, dict(zip(range(rows.start, rows.stop), truth, strict=True))))
    starts = list(_starts(findings, found, said)) if "start" in detections else None
    images = list(_rows(findings.images, list(IMAGE), slice(first, last)))

    mine = _grouped(truth, annotations["image"][rows], first, last)
    ours = _grouped(said, detections["image"][found], first, last)
    begun = _grouped(starts, detections["image"][found], first, last) if starts is not None else None
    for i, (numbers, before) in enumerate(zip(images, kept, strict=True)):
        by_hand = [label for label in before if "annotation" not in label]
        values = {TRUTH: _labels(mine[i] + by_hand), field: _labels(ours[i])}
        if begun is not None:
            values[start_of(field)] = _labels(begun[i])
        yield values | {f"{field}_{name}": value for name, value in numbers.items()}


def relative(boxes: Array, sizes: Array) -> list[list[float]]:
    """Boxes (n, 4) xyxy in pixels as FiftyOne has them: left, top, width, height in fractions of the image.

    sizes: (n, 2) height and width of the image of each.
    """
    scale = np.asarray(sizes, np.float64)[:, ::-1]
    low, high = (np.asarray(boxes, np.float64)[:, k : k + 2] / scale for k in (0, 2))
    return np.concatenate([low, high - low], 1).tolist()


def _truth(findings: Findings, field: str, first: int, rows: slice, kept: list[list[Document]]) -> list[Document]:
    """The annotations in `rows` of the split, each as an update of what is kept of it, if that is the same object."""
    split, table = findings.split, findings.annotations
    image = table["image"][rows]
    boxes = relative(split.boxes[rows], split.sizes[image])
    own = _rows(table, list(OF_ANNOTATION), rows)
    run = _rows(table, [name for name in ANNOTATION if name in table], rows)
    known = [[label for label in labels if "annotation" in label] for labels in kept]
    old = {f"{field}_{name}" for name in ANNOTATION}
    made = []
    names, ids = table["label"][rows].tolist(), [str(split.annotation_ids[k]) for k in range(rows.start, rows.stop)]
    for i, name, id_, box, of_all, of_run in zip(image.tolist(), names, ids, boxes, own, run, strict=True):
        label = {"label": name, "bounding_box": box, "annotation": id_}
        before = _same(known[i - first], label) or _new_label(_instance())
        before = {key: value for key, value in before.items() if key not in old}
        label |= {OWN_NAMES.get(key, key): value for key, value in of_all.items()}
        made.append(before | label | {f"{field}_{key}": value for key, value in of_run.items()})
    return made


def _said(findings: Findings, rows: slice, truth: dict[int, Document]) -> Iterator[Document]:
    """The detections in `rows`. truth: the annotations of these images by their row of the split."""
    table, results = findings.detections, findings.errors.results
    boxes = relative(results.boxes[rows], findings.split.sizes[table["image"][rows]])
    columns = (table["label"][rows].tolist(), table["score"][rows].tolist(), table["target"][rows].tolist())
    values = _rows(table, [name for name in DETECTION if name in table], rows)
    for name, score, target, box, rest in zip(*columns, boxes, values, strict=True):
        aim = truth.get(target)
        label = _new_label(_instance() if aim is None else aim["instance"])
        label |= {"label": name, "bounding_box": box, "confidence": score, **rest}
        yield label if aim is None else label | {"target": str(aim["_id"])}


def _starts(findings: Findings, rows: slice, said: list[Document]) -> Iterator[Document]:
    """The first boxes of the queries that made the detections `said`."""
    table = findings.detections
    boxes = relative(table["start"][rows], findings.split.sizes[table["image"][rows]])
    for box, of in zip(boxes, said, strict=True):
        rest = {name: of[name] for name in ("label", "confidence", *START) if name in of}
        yield _new_label(of["instance"]) | {"bounding_box": box, **rest}


def _new_label(instance: Document) -> Document:
    from bson import ObjectId

    return {"_id": ObjectId(), "_cls": "Detection", "attributes": {}, "tags": [], "instance": instance}


def _instance() -> Document:
    from bson import ObjectId

    return {"_id": ObjectId(), "_cls": "Instance"}


def _labels(labels: list[Document]) -> Document:
    return {"_cls": "Detections", "detections": labels}


def _same(kept: list[Document], label: Document) -> Document | None:
    """Which of the kept annotations is that of the split, if one is; it is taken out of them.

    It has the same id, and the same box or the same class: either may have been corrected, but where both differ an
    annotation of that number has taken the place of another one.
    """
    mine = [other for other in kept if other["annotation"] == label["annotation"]]
    marks = ("label", "bounding_box")
    likest = max(mine, key=lambda other: sum(other[mark] == label[mark] for mark in marks), default=None)
    if likest is None or all(likest[mark] != label[mark] for mark in marks):
        return None
    kept.remove(likest)
    return likest


def _grouped(values: list[Any], image: Array, first: int, last: int) -> list[list[Any]]:
    """Values that stand image by image as a list for each image."""
    ends = np.searchsorted(image, np.arange(first, last + 1)).tolist()
    return [values[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def _rows(table: Table, names: list[str], rows: slice) -> Iterator[Document]:
    """The rows of a table as plain values of these columns, without those that are NaN."""
    names = [name for name in names if name in table]
    columns = [_plain(table[name][rows]) for name in names]
    if not names:
        return
    for values in zip(*columns, strict=True):
        yield {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _plain(column: Array) -> list[Any]:
    """A column as Python values, None for what is NaN; of lists, which are to be read, with four decimals."""
    if column.dtype.kind != "f":
        return column.tolist()
    wide, unknown = column.astype(np.float64), np.isnan(column)
    values = (wide if column.ndim == 1 else wide.round(4)).astype(object)
    values[unknown] = None
    gone = unknown if column.ndim == 1 else np.all(unknown, axis=1)
    return [None if nothing else value for nothing, value in zip(gone.tolist(), values.tolist(), strict=True)]
