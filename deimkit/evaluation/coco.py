"""COCO's average precision, with forty matchings carried as the bits of one integer.

A detection is matched at 10 IoU thresholds and for 4 ranges of object size, which COCO's own code does in 40 separate
walks over every image and class. Here one uint64 holds the 40 answers of a detection, and one step of the walk is
taken in all images and classes at once. The rules, ties included, are those of pycocotools 2.0, which is kept as the
other backend; both give the same numbers.

Letters as in COCO's code: T IoU thresholds, R recall points, K classes, A size ranges, M limits of detections per
image and class; n detections, N ground-truth boxes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.data.split import Split
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.overlaps import overlapping, rank_in, xywh_of
from deimkit.structures import Detections

Array = NDArray[Any]

IOUS = np.linspace(0.5, 0.95, 10)  # (T,)
RECALLS = np.linspace(0, 1, 101)  # (R,)
SIZES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # px², both ends in

_T, _A = len(IOUS), len(SIZES)
_ALL = np.uint64(2 ** (_T * _A) - 1)  # bit t·A + a stands for threshold t and size range a
_RANGE = np.array([sum(1 << (t * _A + a) for t in range(_T)) for a in range(_A)], dtype=np.uint64)
_PASSED = np.array([(1 << (t * _A)) - 1 for t in range(_T + 1)], dtype=np.uint64)  # the first t thresholds, all sizes


class Results(NamedTuple):
    """Detections of many images in flat arrays, the form in which they are quick to score and to send between ranks.

    image: (n,) index of the image in its split. label: (n,) class index. score: (n,). boxes: (n, 4) xyxy in pixels.
    """

    image: Array
    label: Array
    score: Array
    boxes: Array

    @staticmethod
    def concat(parts: Iterable[Results]) -> Results:
        """The rows of all `parts`, in their order."""
        empty = Results(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty((0, 4)))
        return Results(*map(np.concatenate, zip(empty, *parts, strict=True)))

    def by_image(self) -> Results:
        """The same rows, image by image; within one in the order they have."""
        order = self.image.argsort(kind="stable")
        return Results(*(column[order] for column in (self.image, self.label, self.score, self.boxes)))

    @staticmethod
    def of(image: int, detections: Detections) -> Results:
        """The rows of one image, whose index in the split is `image`."""
        label, score, boxes = (
            x.detach().cpu().double().numpy() for x in (detections.labels, detections.scores, detections.boxes)
        )
        return Results(np.full(len(label), image), label.astype(np.int64), score, boxes)


@dataclass(frozen=True)
class Curves:
    """What COCO's numbers are means of: the precision at 101 recalls and the recall reached.

    precision: (T, R, K, A) at IoU `IOUS`, recall `RECALLS`, class, and size range in the order of `SIZES`, from the
    best `max_dets[-1]` detections. recall: (T, K, A, M) for each limit of `max_dets`. objects: (K, A) how many there
    were to find. Precision and recall are NaN where there was no object to find.
    """

    precision: Array
    recall: Array
    objects: Array
    names: tuple[str, ...]
    max_dets: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """COCO's twelve numbers, in [0, 1], and `per_class`; a number without any object to find is NaN."""
        fifty, seventy_five = 0, 5  # positions of .50 and .75 in IOUS
        return {
            "AP": _mean(self.precision[..., 0]),
            "AP50": _mean(self.precision[fifty, ..., 0]),
            "AP75": _mean(self.precision[seventy_five, ..., 0]),
            **{f"AP{size}": _mean(self.precision[..., a]) for a, size in enumerate("sml", 1)},
            **{f"AR{limit}": _mean(self.recall[..., 0, m]) for m, limit in enumerate(self.max_dets)},
            **{f"AR{size}": _mean(self.recall[..., a, -1]) for a, size in enumerate("sml", 1)},
            "per_class": {
                name: {
                    "AP": _mean(self.precision[:, :, k, 0]),
                    "AP50": _mean(self.precision[fifty, :, k, 0]),
                    **{f"AP{size}": _mean(self.precision[:, :, k, a]) for a, size in enumerate("sml", 1)},
                    "count": int(self.objects[k, 0]),
                }
                for k, name in enumerate(self.names)
            },
        }


def evaluate(
    split: Split,
    detections: Results | Sequence[Detections] | Sequence[dict[str, Any]],
    backend: str = "fast",
    max_dets: Sequence[int] = (1, 10, 100),
) -> dict[str, Any]:
    """How well `detections` find the objects of `split`, in COCO's twelve numbers and class by class.

    detections: packed `Results`, or one `Detections` per image of the split, or COCO result rows with the dataset's
    own image and category ids. backend: "fast" or "pycocotools"; both give the same numbers. max_dets: the best so
    many detections of each image and class count; AP and the sizes' AR take the largest.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "per_class"},
    `per_class` being {name: {"AP", "AP50", "APs", "APm", "APl", "count"}}. Crowd regions are never counted as objects
    and excuse the detections inside them. A number without any object to find is NaN, never -1.
    Raises `DataError` if a detection belongs to no image or class of the split or is not finite.
    """
    return curves(split, detections, backend, max_dets).summary()


def curves(
    split: Split,
    detections: Results | Sequence[Detections] | Sequence[dict[str, Any]],
    backend: str = "fast",
    max_dets: Sequence[int] = (1, 10, 100),
) -> Curves:
    """The precision and recall arrays behind `evaluate`, for those who plot them; same arguments."""
    backends = {"fast": _fast, "pycocotools": _pycocotools}
    if backend not in backends:
        raise DeimkitError(f"backend must be one of {sorted(backends)}; got {backend!r}.")
    if not max_dets or min(max_dets) < 1:
        raise DeimkitError(f"max_dets must be positive counts such as (1, 10, 100); got {tuple(max_dets)}.")
    truth, found, limits = _truth(split), _found(split, detections), tuple(sorted(max_dets))
    objects = np.zeros((len(split.categories), _A), np.int64)
    np.add.at(objects, truth.label, truth.counts)
    precision, recall = backends[backend](truth, found, objects, len(split), limits)
    return Curves(precision, recall, objects, split.categories.distinct, limits)


class Evaluator:
    """Collects the detections of a split image by image and scores them once, at the end.

        evaluator = Evaluator(data.val)
        for i, path in enumerate(data.val.paths):
            evaluator.add(i, model.predict(path, threshold=0))
        evaluator.result()["AP"]

    Images that were never added count as images in which nothing was found.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._found: dict[int, Results] = {}

    def add(self, image_index: int, detections: Detections) -> None:
        """Take the detections of one image, given by its index in the split; each image once."""
        if not 0 <= image_index < len(self.split):
            raise DataError(f"image_index must be in [0, {len(self.split)}); got {image_index}.")
        if image_index in self._found:
            raise DataError(f"Each image is evaluated once; image {image_index} was added before.")
        self._found[image_index] = Results.of(image_index, detections)

    def packed(self) -> Results:
        """Everything added so far in flat arrays; ranks of one job exchange these and `Results.concat` them."""
        return Results.concat(self._found.values())

    def curves(self, backend: str = "fast") -> Curves:
        """Precision and recall arrays of what was added."""
        return curves(self.split, self.packed(), backend)

    def result(self, backend: str = "fast") -> dict[str, Any]:
        """The same dictionary as `evaluate` returns."""
        return self.curves(backend).summary()


def ground_truth_as_predictions(split: Split) -> Results:
    """The annotations of `split` as perfect detections: they score AP 1, or the ids, boxes or classes are mixed up.

    Crowd regions are left out. Of more than 100 objects of one class in one image COCO counts 100 detections only,
    so such a split stays below 1.
    """
    rows = ~split.crowd
    return Results(split.images_of_rows[rows], split.labels[rows], np.ones(rows.sum()), split.boxes[rows])


class _Truth(NamedTuple):
    """Ground truth as the backends take it. counts: (N, A) bool, an object to find in that size range (not a crowd)."""

    image: Array
    label: Array
    xywh: Array
    area: Array
    crowd: Array
    counts: Array


class _Found(NamedTuple):
    """Detections as the backends take them; `image` is numbered in the order of the sorted image ids."""

    image: Array
    label: Array
    score: Array
    xywh: Array

    def take(self, rows: Array) -> _Found:
        return _Found(*(x[rows] for x in self))


def _truth(split: Split) -> _Truth:
    image = turn(split.ids)[split.images_of_rows]
    counts = in_range(split.areas) & ~split.crowd[:, None]
    return _Truth(image, split.labels, xywh_of(split.boxes), split.areas, split.crowd, counts)


def packed(split: Split, detections: Results | Sequence[Detections] | Sequence[dict[str, Any]]) -> Results:
    """Detections of any form that `evaluate` takes as `Results`, in the order given; the same `DataError`s."""
    found = _found(split, detections)
    boxes = found.xywh.copy()
    boxes[:, 2:] += boxes[:, :2]
    if isinstance(detections, Results):
        boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
    return Results(np.argsort(turn(split.ids))[found.image], found.label, found.score, boxes)


def _found(split: Split, detections: Any) -> _Found:
    if isinstance(detections, Results):
        image, label, score = (np.asarray(x) for x in detections[:3])
        xywh = xywh_of(detections.boxes)
    elif len(detections) and isinstance(detections[0], Detections):
        if len(detections) != len(split):
            raise DataError(f"Expected one Detections per image of the split, {len(split)}; got {len(detections)}.")
        return _found(split, Results.concat(Results.of(i, d) for i, d in enumerate(detections)))
    else:
        image, label, score, xywh = _columns(split, detections)
    if not image.shape == label.shape == score.shape == xywh.shape[:1]:
        raise DataError(
            "Results must be image (n,), label (n,), score (n,), boxes (n, 4); "
            f"got {image.shape}, {label.shape}, {score.shape} and {len(xywh)} boxes."
        )
    for what, index, count in (("image", image, len(split)), ("label", label, len(split.categories))):
        if len(index) and not 0 <= index.min() <= index.max() < count:
            raise DataError(f"Results.{what} must be indices in [0, {count}); got {index.min()} to {index.max()}.")
    bad = ~(np.isfinite(score) & np.isfinite(xywh).all(1))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"Scores and boxes must be finite; got score {score[row]} and xywh {xywh[row]} in row {row}.")
    return _Found(turn(split.ids)[image], label.astype(np.int64), score.astype(np.float64), xywh)


def _columns(split: Split, rows: Sequence[dict[str, Any]]) -> tuple[Array, Array, Array, Array]:
    """COCO result rows as image index, label, score and xywh."""
    image, label = ({id_: i for i, id_ in enumerate(ids)} for ids in (split.ids, split.categories.ids))
    try:
        return (
            np.array([image[row["image_id"]] for row in rows], np.int64),
            np.array([label[row["category_id"]] for row in rows], np.int64),
            np.array([row["score"] for row in rows], np.float64),
            np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        )
    except KeyError as error:
        raise DataError(
            "A result row needs image_id, category_id, bbox and score, with ids of the dataset such as image "
            f"{next(iter(image), None)!r} and category {next(iter(label), None)!r}; nothing fits {error.args[0]!r}."
        ) from None


def turn(ids: Sequence[Any]) -> Array:
    """When each image has its turn: in the order of sorted ids, which decides between equal scores of two images."""
    try:
        order = sorted(range(len(ids)), key=list(ids).__getitem__)
    except TypeError:  # numbers and strings together have no order; COCO's code cannot read such a file either
        order = list(range(len(ids)))
    turn = np.empty(len(ids), np.int64)
    turn[order] = np.arange(len(ids))
    return turn


def in_range(area: Array) -> Array:
    """(n,) -> (n, A): which size ranges an area in px² belongs to."""
    low, high = np.array(list(SIZES.values())).T
    return (area[:, None] >= low) & (area[:, None] <= high)


def _bits(ranges: Array) -> Array:
    """(n, A) bool -> (n,) uint64: those size ranges at every threshold."""
    return (ranges * _RANGE).sum(1, dtype=np.uint64)


def _mean(x: Array) -> float:
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else float("nan")


def _fast(truth: _Truth, found: _Found, objects: Array, images: int, limits: tuple[int, ...]) -> tuple[Array, Array]:
    """Precision (T, R, K, A) and recall (T, K, A, M)."""
    found = found.take(np.lexsort((found.image, -found.score, found.label)))  # stable: equal rows stay as given
    rank = rank_in(found.label * images + found.image)
    found, rank = found.take(rank < limits[-1]), rank[rank < limits[-1]]
    matched, ignored = _match(truth, found, rank, images)

    precision = np.full((_T, len(RECALLS), len(objects), _A), np.nan)
    recall = np.full((_T, len(objects), _A, len(limits)), np.nan)
    ends = np.searchsorted(found.label, np.arange(len(objects) + 1))
    for k in np.flatnonzero(objects[:, 0]):
        rows = slice(ends[k], ends[k + 1])
        hit, counted = _unpack(matched[rows] & ~ignored[rows]), _unpack(~ignored[rows])
        precision[:, :, k] = _precision(hit, counted, objects[k])
        for m, limit in enumerate(limits):
            hits = hit[rank[rows] < limit].sum(0).reshape(_T, _A)
            recall[:, k, :, m] = np.divide(hits, objects[k], out=np.full((_T, _A), np.nan), where=objects[k] > 0)
    return precision, recall


def _match(truth: _Truth, found: _Found, rank: Array, images: int) -> tuple[Array, Array]:
    """Who found an object and who does not count, as 40 bits for each detection: two (n,) uint64.

    COCO lets the detections of one image and class choose by descending score, among the objects that are still free,
    the one of largest IoU; objects outside the size range and crowds only if nothing better is left. So the choice is
    a walk over (detection, object) pairs in a fixed order, once for objects that count and once for the others, in
    which every pair is taken in those of the 40 settings where both are still free.
    """
    own, other = found.label * images + found.image, truth.label * images + truth.image
    det, obj, iou = overlapping(own, found.xywh, other, truth.xywh, truth.crowd, IOUS[0])
    passed, live = _PASSED[np.searchsorted(IOUS, iou, side="right")], _bits(truth.counts)[obj]
    excused = np.repeat(np.array([0, _ALL], np.uint64), len(det))  # the second half of the pairs: objects not counted
    allowed = np.concatenate([passed & live, passed & ~live])
    det, obj, iou = np.tile(det, 2), np.tile(obj, 2), np.tile(iou, 2)

    group = own[det]
    walk = np.lexsort((-obj, -iou, excused, rank[det], group))  # of equal IoUs COCO takes the last object
    walk = walk[allowed[walk] > 0]
    step = rank_in(group[walk])
    walk = walk[np.argsort(step, kind="stable")]  # all first steps, all second steps, ...
    det, obj, allowed, excused = det[walk], obj[walk], allowed[walk], excused[walk]

    once = np.where(truth.crowd, np.uint64(0), _ALL)  # a crowd may be found again and again
    taken = np.zeros(len(once), np.uint64)
    matched, ignored = np.zeros(len(found.label), np.uint64), np.zeros(len(found.label), np.uint64)
    stop = np.cumsum(np.bincount(step)).tolist()
    for begin, end in zip([0, *stop], stop, strict=False):
        now = slice(begin, end)  # pairs of different groups: no detection and no object occurs twice
        d, o = det[now], obj[now]
        take = allowed[now] & ~matched[d] & ~taken[o]
        matched[d] |= take
        ignored[d] |= take & excused[now]
        taken[o] |= take & once[o]
    outside = _bits(~in_range(found.xywh[:, 2] * found.xywh[:, 3]))
    return matched, ignored | (outside & ~matched)


def _unpack(bits: Array) -> Array:
    """(n,) uint64 -> (n, T·A) of 0 and 1."""
    as_bytes = bits.astype("<u8").view(np.uint8).reshape(len(bits), 8)
    return np.unpackbits(as_bytes, axis=1, bitorder="little")[:, : _T * _A]


def _precision(hit: Array, counted: Array, objects: Array) -> Array:
    """Interpolated precision (T, R, A) of one class from its (n, T·A) hits, ordered by score.

    Precision only rises at a hit, so the best precision at or beyond the j-th hit is all that has to be known.
    """
    hits, seen = np.cumsum(hit, axis=0, dtype=np.int32), np.cumsum(counted, axis=0, dtype=np.int32)
    at = np.nonzero(hit)
    best = np.zeros((_T * _A, objects.max() + 1))  # column j: precision at the j-th hit, 0 if there are fewer
    best[at[1], hits[at]] = hits[at] / (seen[at] + np.spacing(1))
    best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1].reshape(_T, _A, -1)
    curve = np.full((_T, len(RECALLS), _A), np.nan)
    for a in np.flatnonzero(objects):
        needed = np.searchsorted(np.arange(1, objects[a] + 1) / objects[a], RECALLS) + 1  # hits to reach each recall
        curve[:, :, a] = best[:, a, needed]
    return curve


def _pycocotools(
    truth: _Truth, found: _Found, objects: Array, images: int, limits: tuple[int, ...]
) -> tuple[Array, Array]:
    """The same two arrays from COCO's own code."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def table(rows: _Truth | _Found, area: Array, crowd: Array, **columns: Array) -> Any:
        fields = {"image_id": rows.image, "category_id": rows.label, "bbox": rows.xywh, "area": area, "iscrowd": crowd}
        values = zip(*(x.tolist() for x in (fields | columns).values()), strict=True)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(images)],
            "categories": [{"id": k} for k in range(len(objects))],
            # ids from 1 on: COCO's code takes an object of id 0 for "no match"
            "annotations": [dict(zip((fields | columns), v, strict=True), id=i) for i, v in enumerate(values, 1)],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        none = np.zeros(len(found.label), np.int64)
        run = COCOeval(
            table(truth, truth.area, truth.crowd.astype(np.int64)),
            table(found, found.xywh[:, 2] * found.xywh[:, 3], none, score=found.score),
            "bbox",
        )
        run.params.maxDets = list(limits)
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"][..., -1], run.eval["recall"]
    return np.where(precision < 0, np.nan, precision), np.where(recall < 0, np.nan, recall)
