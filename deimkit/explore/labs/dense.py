"""Dense O2O in numbers: how many targets it makes an image teach, what it costs, and what the paper claims for it.

Source: DEIM 3.2 and Tables 4, 7 and 12. What is counted and timed is the loader itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deimkit.data.augment import Augment
from deimkit.data.loader import Always, Loader, Pictures
from deimkit.data.split import Split

Counts = NDArray[np.int64]
SIZE = (640, 640)  # the input size that an `Augment` is published for


def expected_targets(mean: float, mosaic: float, mixup: float, kept: float = 1.0, kept_in_mosaic: float = 1.0) -> float:
    """How many targets an image of a batch teaches on average: mean * (1 + 3 mosaic) * (1 + mixup), if all arrive.

    mean: boxes of a picture. mosaic, mixup: their odds. kept, kept_in_mosaic: the shares of boxes that arrive in an
    image that is no mosaic, and in one that is. A mosaic has four pictures, three of them drawn from all; MixUp brings
    the targets of another image of the batch, which on average has as many.
    """
    return mean * ((1 - mosaic) * kept + 4 * mosaic * kept_in_mosaic) * (1 + mixup)


def boxes_per_picture(split: Split) -> Counts:
    """How many boxes each picture has that training takes: no crowds, none without area; (n,)."""
    boxes = split.boxes
    taken = (boxes[:, 2:] > boxes[:, :2]).all(1) & ~split.crowd
    return np.bincount(split.images_of_rows[taken], minlength=len(split))


def targets_per_image(
    split: Split, augment: Augment, stage: str = "dense", size: int = 320, epochs: int = 1, seed: int = 0
) -> Counts:
    """How many targets each image of the batches of so many epochs teaches, as the loader makes them.

    augment: as published for 640 x 640; it is scaled to `size`. Batches are of two, so that MixUp is decided often.
    """
    augment = augment.scaled_to_size(SIZE, (size, size))
    loader = Loader(split, min(2, len(split)), size, augment, Always(stage), seed)
    batches = (batch for epoch in range(epochs) for batch in loader.epoch(epoch))
    return torch.cat([torch.bincount(batch.targets.image, minlength=len(batch)) for batch in batches]).numpy()


class Cost(NamedTuple):
    """What it takes to make one image of a batch. seconds: the median. ratio: to flip and resize, median of pairs."""

    name: str
    seconds: float
    ratio: float


def costs(
    split: Split, augment: Augment | None = None, size: int = 640, images: int = 8, repeats: int = 5
) -> list[Cost]:
    """Seconds per image of every transform on its own, of the stages, and of decoding, on this machine.

    Everything from decoded pictures (the last two rows: from files) to a finished batch on the CPU, with odds of 1 for
    the transform in question. All are timed in turn, `repeats` times, after one turn that does not count.
    """
    split = split.take(range(min(images, len(split))))
    augment = (augment or Augment()).scaled_to_size(SIZE, (size, size))
    loaders = {
        name: Loader(split, len(split), size, what, Always(stage), cache_bytes=cache)
        for name, what, stage, cache in _cases(augment)
    }
    taken: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(repeats + 1):
        for name, loader in loaders.items():
            start = time.perf_counter()
            for batch in loader.epoch(turn):
                batch.finish()
            taken[name].append((time.perf_counter() - start) / len(split))
    plain = next(iter(taken.values()))
    return [
        Cost(name, median(mine[1:]), median(a / b for a, b in zip(mine[1:], plain[1:], strict=True)))
        for name, mine in taken.items()
    ]


def _cases(augment: Augment) -> Iterator[tuple[str, Augment, str, int]]:
    """What is timed: a name, an augmentation, a stage, and the bytes of decoded pictures to keep."""
    bare = replace(augment, mosaic=0.0, mixup=0.0, photometric=0.0, zoom_out=0.0, iou_crop=0.0)
    keep = 1 << 30
    yield "flip and resize", bare, "clean", keep
    yield "colour", replace(bare, photometric=1.0), "augment", keep
    yield "zoom-out", replace(bare, zoom_out=1.0), "augment", keep
    yield "IoU crop", replace(bare, iou_crop=1.0), "augment", keep
    yield "MixUp", replace(bare, mixup=1.0), "dense", keep
    yield "mosaic", replace(bare, mosaic=1.0), "dense", keep
    yield "the augment stage", augment, "augment", keep
    yield "the dense stage", augment, "dense", keep
    yield "flip and resize, from the file", bare, "clean", 0
    yield "mosaic, from four files", replace(bare, mosaic=1.0), "dense", 0


class Cache(NamedTuple):
    """Decoded pictures in memory. limit, held, needed: bytes allowed, in use, and for all pictures. kept: how many."""

    limit: int
    held: int
    needed: int
    kept: int


def cache_of(pictures: Pictures) -> Cache:
    """How full the loader's memory of decoded pictures is: `cache_of(loader.assembler.pictures)`."""
    held = sum(image.nbytes for image in pictures.kept.values())
    return Cache(held + pictures.room, held, int(3 * pictures.sizes.prod(1).sum()), len(pictures.kept))


def shares(counts: Sequence[Counts], mean: float) -> tuple[float, float]:
    """The shares of boxes that arrived, for `expected_targets`, from counts without mosaic and with nothing else."""
    plain, mosaic = counts
    return float(plain.mean() / mean), float(mosaic.mean() / (4 * mean))
