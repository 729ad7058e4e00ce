"""A detector and a split become detections, and those COCO's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from deimkit.data.dataset import CategoryMap, Split
from deimkit.data.loader import Loader
from deimkit.errors import DataError
from deimkit.evaluation.coco import Evaluator, Results, curves
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Detections


class Finder(Protocol):
    """Whatever finds objects in a batch of images: a `Detector`, or what `deimkit.load` makes of a deployed file."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its input in pixels."""

    @property
    def categories(self) -> CategoryMap:
        """The classes it finds."""

    @property
    def device(self) -> torch.device:
        """Where it wants its images."""

    def detect(self, images: torch.Tensor, sizes: torch.Tensor) -> list[Detections]:
        """The objects in images (B, 3, H, W) in [0, 1] of original `sizes` (B, 2), height and width in pixels."""


def measure(
    detector: Finder,
    split: Split,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    workers: int = 0,
    backend: str = "fast",
    note: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """COCO's twelve numbers of `detector` on `split`, and per class; see `deimkit.evaluation.coco.evaluate`.

    The other arguments are those of `detect`.
    """
    found = detect(detector, split, size, batch, device, workers, note, ranks)
    return curves(split, found, backend).summary()


def detect(
    detector: Finder,
    split: Split,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    workers: int = 0,
    note: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> Results:
    """All that `detector` finds in the images of `split`, with the classes of the split, image by image.

    size: (height, width) that images are resized to, by default the detector's. batch: images at a time.
    note: called with a remark such as "evaluating 40/100". Classes are matched by name (`common_classes`).
    Every module of the detector is left in the mode it was in. ranks: which processes share the work; each of them gets
    the detections of the whole, and `DataError` if one of them raises it.
    """
    device = torch.device(device) if device is not None else detector.device
    classes = common_classes(detector.categories, split.categories)
    loader = Loader(
        split,
        batch=batch * ranks.world,
        size=size or detector.size,
        workers=workers,
        shuffle=False,
        drop_last=False,
        rank=ranks.rank,
        world=ranks.world,
    )
    evaluator = Evaluator(split)
    failure: DataError | None = None
    try:
        for shown, task in zip(loader.epoch(0), loader.plan(0), strict=True):
            if not task.indices:
                continue
            shown = shown.to(device).finish()
            found = detector.detect(shown.images, shown.sizes)
            for i, detections in zip(task.indices, found, strict=True):
                evaluator.add(i, detections if classes is None else relabelled(detections, classes))
            if note is not None:
                note(f"evaluating {min(len(split), task.indices[-1] + 1)}/{len(split)}")
    except DataError as error:
        failure = error
    finally:
        loader.close()
    ranks.agree(failure)
    return Results.concat(ranks.gather(evaluator.packed())).by_image()


def common_classes(ours: CategoryMap, theirs: CategoryMap) -> torch.Tensor | None:
    """For each class of a detector (C,) its index in a split, -1 where the split has none; None if all are in place.

    Names decide; classes that were only counted ("class 0", "class 1", ...) are taken to be in the split's order.
    Raises `DataError` if the two have nothing in common.
    """
    counted = CategoryMap.of(len(ours)).names
    if ours.names == theirs.names or (len(ours) == len(theirs) and counted in (ours.names, theirs.names)):
        return None
    index = {name: i for i, name in enumerate(theirs.names)}
    classes = torch.tensor([index.get(name, -1) for name in ours.names])
    if (classes < 0).all():
        raise DataError(
            f"The detector knows {len(ours)} classes ({', '.join(ours.names[:4])}, ...), the split has {len(theirs)} "
            f"({', '.join(theirs.names[:4])}, ...), and none is in both. Measure it on a dataset of its own classes, "
            "or train it on this one with weights=."
        )
    return classes


def in_classes_of(ours: CategoryMap, split: Split) -> Split:
    """The split with its annotations in a detector's classes, found as in `common_classes`.

    Raises `DataError` for annotations of a class that the detector does not have: it could never answer for them.
    """
    classes = common_classes(ours, split.categories)
    if classes is None:
        return split
    own = np.full(len(split.categories), -1)
    own[classes[classes >= 0].numpy()] = torch.nonzero(classes >= 0)[:, 0].numpy()
    labels = own[split.labels]
    if (labels < 0).any():
        lacking = [split.categories.name(int(k)) for k in np.unique(split.labels[labels < 0])]
        raise DataError(
            f"{split.name} has objects whose class the detector does not know: {', '.join(lacking[:4])}"
            f"{', ...' if len(lacking) > 4 else ''}. Take images without them, or train it on this one with weights=."
        )
    return replace(split, labels=labels, categories=ours)


def relabelled(detections: Detections, classes: torch.Tensor) -> Detections:
    """The detections with the labels that `classes` (C,) has for theirs, without those for which it has -1."""
    labels = classes[detections.labels]
    known = labels >= 0
    return replace(
        detections,
        boxes=detections.boxes[known],
        scores=detections.scores[known],
        labels=labels[known],
        names=[],
        ids=[],
    )
