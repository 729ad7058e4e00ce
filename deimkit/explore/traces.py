"""How each detection came to be, layer by layer, and which query the matcher gives to each annotation on the way."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deimkit.data.loader import Loader
from deimkit.data.split import Split
from deimkit.errors import DataError, DeimkitError
from deimkit.evaluation.coco import Results
from deimkit.evaluation.measure import common_classes
from deimkit.evaluation.overlaps import rank_in
from deimkit.explore.answers import columns, said_of_detections, said_of_targets, unanswered
from deimkit.explore.layers import all_layers
from deimkit.matching import Hungarian, Matcher
from deimkit.models.detector import Detector
from deimkit.structures import Batch, Targets

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False, repr=False)
class Traces:
    """The way of n detections through the L layers of a decoder, and of the N annotations of their split.

    results: the detections as evaluation gets them, image by image, best first. query: (n,) who said it.
    layers: names, "layer0", ..., "final"; the last one is the layer that evaluation asks. boxes: (n, L, 4) xyxy pixels
    and scores: (n, L), for the detection's own class, of that query after each layer. start: (n, 4) xyxy pixels, the
    query's first box, as the encoder proposed it. spread: (n, 4) pixels, the standard deviation of the last layer's
    edge distributions (left, top, right, bottom), NaN where boxes have none.

    matched: (N, L) the query that the matcher gives to an annotation at each layer, -1 for none (crowds; classes that
    the detector does not know); where several answer for one, the one that overlaps it most. matched_iou and
    matched_score: (N, L) IoU and score of that query for the annotation's box and class, NaN without one.
    truth: (N, 4) the split's boxes. fingerprint: of the split.
    """

    results: Results
    query: Ints
    layers: tuple[str, ...]
    boxes: Floats
    scores: Floats
    start: Floats
    spread: Floats
    matched: Ints
    matched_iou: Floats
    matched_score: Floats
    truth: Floats
    fingerprint: str

    def __repr__(self) -> str:
        return f"Traces({len(self)} detections and {len(self.truth)} annotations, {len(self.layers)} layers)"

    def __len__(self) -> int:
        return len(self.query)

    def iou(self, target: NDArray[Any]) -> Floats:
        """The IoU of each detection's box after each layer with an annotation, NaN without one. -> (n, L).

        target: (n,) rows of the split's boxes, or -1.
        """
        wanted = np.full((len(self), 4), np.nan, np.float32)
        wanted[target >= 0] = self.truth[target[target >= 0]]
        return iou_of(self.boxes, wanted[:, None])

    def of_class(self, most: int) -> Traces:
        """The same traces with no more than so many detections of each image and class, the best."""
        classes = self.results.label.max(initial=0) + 1
        kept = rank_in(self.results.image * classes + self.results.label) < most
        rows = {name: getattr(self, name)[kept] for name in ("query", "boxes", "scores", "start", "spread")}
        return replace(self, results=Results(*(column[kept] for column in self.results)), **rows)

    def save(self, path: str | Path) -> Path:
        """Write all of it to an .npz file, which `load` reads and numpy too. Returns the path."""
        path = Path(path)
        plain = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self) if f.name != "results"}
        rows = {f"results.{name}": column for name, column in self.results._asdict().items()}
        draft = path.with_name(path.name + ".part")
        try:
            with draft.open("wb") as file:
                np.savez(file, **(plain | rows))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)  # there only if something went wrong
        return path

    @staticmethod
    def load(path: str | Path) -> Traces:
        """The traces that `save` wrote; `DataError` if the file holds none."""
        if not zipfile.is_zipfile(path):
            what = "holds no traces" if Path(path).exists() else "does not exist"
            raise DataError(f"{path} {what}; expected a file that Traces.save wrote.")
        try:
            with np.load(path, allow_pickle=False) as file:
                plain = {f.name: file[f.name] for f in fields(Traces) if f.name != "results"}
                results = Results(*(file[f"results.{name}"] for name in Results._fields))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no traces: {error}. Write it again with Traces.save.") from error
        plain |= {"layers": tuple(plain["layers"].tolist()), "fingerprint": str(plain["fingerprint"])}
        return Traces(results=results, **plain)


def trace(
    model: Detector,
    split: Split,
    matcher: Matcher | None = None,
    top: int = 100,
    threshold: float = 0.0,
    batch: int = 8,
    size: int | tuple[int, int] | None = None,
    progress: Callable[[str], None] | None = None,
    workers: int = 0,
) -> Traces:
    """Detect as evaluation does, and keep what every layer said of each detection and annotation.

    matcher: who answers for what, such as `recipe.matcher`; by default `Hungarian()`. top: detections of an image at
    most, the best of the 300 that evaluation takes; threshold: their least score. batch, size, workers: as in
    `measure`. progress: called with a remark such as "tracing 40/100". The model stays in the mode it is in.
    Raises `DataError` naming an image that cannot be read, `NonFiniteError`, and `DeimkitError` for a deployed model.
    """
    if top < 1 or not 0 <= threshold <= 1:
        raise DeimkitError(f"Expected top >= 1 and a threshold in [0, 1]; got top={top} and threshold={threshold}.")
    layers, matcher = decoder_layers(model), matcher or Hungarian()
    classes = common_classes(model.categories, split.categories)
    classes = torch.arange(len(model.categories)) if classes is None else classes
    found, ways = [Results.concat([])], [np.empty((0, 5 * len(layers) + 9), np.float32)]
    answers = unanswered(len(split.labels), len(layers))
    for images, shown in _batches(split, batch, size or model.size, workers, next(model.parameters()).device):
        assert shown.sizes is not None
        images_like_weights = shown.images.to(next(model.parameters()).dtype)
        said = {output.name: output for output in all_layers(model, images_like_weights)}
        outputs, start = [said[name] for name in layers], said["proposals"].preds
        results, rows = said_of_detections(model, outputs, start, shown.sizes, classes, top, threshold)
        found.append(results._replace(image=np.array(images)[results.image]))
        ways.append(rows)
        known, targets = _targets(split, shown.targets, classes)
        answers[known] = said_of_targets(matcher, outputs, targets)
        if progress is not None:
            progress(f"tracing {images[-1] + 1}/{len(split)}")
    return Traces(
        Results.concat(found),
        layers=layers,
        **columns(np.concatenate(ways), len(layers)),
        matched=answers[..., 0].astype(np.int32),
        matched_iou=answers[..., 1].copy(),
        matched_score=answers[..., 2].copy(),
        truth=split.boxes.astype(np.float32),
        fingerprint=split.fingerprint(),
    )


def decoder_layers(model: Detector) -> tuple[str, ...]:
    """The layers up to the one that evaluation asks, the last one as a rule, as `all_layers` calls them."""
    decoder = model.decoder
    return (*(f"layer{i}" for i in range(len(decoder.layers) - 1)), "final")[: decoder.asked + 1]


def _batches(
    split: Split, batch: int, size: int | tuple[int, int], workers: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """The images of a split as evaluation shows them, and their indices; the labels of the targets are row numbers."""
    if not len(split):
        return
    numbered = replace(split, labels=np.arange(len(split.labels)))  # so it is the loader who says which rows count
    loader = Loader(numbered, batch, size, workers=workers, shuffle=False, drop_last=False)
    try:
        for task, shown in zip(loader.plan(0), loader.epoch(0), strict=True):
            yield task.indices, shown.to(device).finish()
    finally:
        loader.close()


def _targets(split: Split, numbered: Targets, classes: Tensor) -> tuple[NDArray[np.int64], Targets]:
    """The targets of a batch whose class the detector knows, with its classes for labels, and their rows in the split.

    numbered: targets whose labels are rows of the split. classes: (C,) the split's class of each of the model's, or -1.
    """
    known = torch.full((len(split.categories),), -1)
    known[classes[classes >= 0]] = (classes >= 0).nonzero()[:, 0]
    rows = numbered.labels.cpu()
    labels = known[torch.from_numpy(split.labels)[rows]]
    keep = labels >= 0
    on_device = keep.to(numbered.labels.device)
    own = labels[keep].to(numbered.labels.device)
    return rows[keep].numpy(), Targets(numbered.image[on_device], own, numbered.boxes[on_device])


def iou_of(a: Floats, b: Floats) -> Floats:
    """The IoU of broadcastable xyxy boxes, 0 where both have no area. (..., 4), (..., 4) -> (...)."""
    both = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    union = sum((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)) - both
    return both / np.maximum(union, np.finfo(np.float32).tiny)
