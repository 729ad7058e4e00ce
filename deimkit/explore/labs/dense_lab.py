"""The lab of Dense O2O: an image as a batch has it, and for every box of it, which picture it came from.

It is made by the loader's own code. Only the labels are replaced, by running numbers: they travel with the boxes, so
that every box that arrives says itself which one it is, and those that are missing did not arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.data.augment import STAGES, Augment, Sample, to_tile
from deimkit.data.dataset import Dataset
from deimkit.data.loader import Assembler, Pictures, Task
from deimkit.data.split import Split
from deimkit.errors import DataError
from deimkit.explore.labs.dense import SIZE, boxes_per_picture, expected_targets
from deimkit.explore.labs.dense_panels import panels
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing
from deimkit.structures import Batch, Targets

Array = NDArray[Any]
MEMORY = 1 << 28  # bytes of decoded pictures to keep


class Origin(NamedTuple):
    """A picture that went into an image. picture: its index. pixels: (h, w, 3). tiled: whether it is part of a mosaic.

    boxes: (k, 4) xyxy in pixels of the picture. labels: (k,) the classes that they really have. numbers: (k,) running
    numbers of its boxes. place: 0 to 3 in the mosaic. blended: whether it is part of the image that MixUp blends in.
    """

    picture: int
    pixels: NDArray[np.uint8]
    boxes: Array
    labels: Array
    numbers: Array
    tiled: bool
    place: int = 0
    blended: bool = False


class Numbered(Pictures):
    """A source whose labels are running numbers, and which remembers what it was asked for."""

    def __init__(self, split: Split, cache_bytes: int) -> None:
        super().__init__(split, cache_bytes)
        self.asked: list[Origin] = []

    def sample(self, index: int) -> Sample:
        """Picture `index` at its own size, with running numbers for labels."""
        return self._number(index, tiled=False)

    def tile(self, index: int, side: int) -> Sample:
        """Picture `index` as a mosaic tile, with running numbers for labels."""
        return to_tile(self._number(index, tiled=True), side)

    def _number(self, index: int, tiled: bool) -> Sample:
        image, boxes, labels = super().sample(index)
        start = sum(len(origin.numbers) for origin in self.asked)
        numbers = np.arange(start, start + len(labels))
        self.asked.append(Origin(index, image, boxes, labels, numbers, tiled))
        return Sample(image, boxes, numbers)


@dataclass(frozen=True, eq=False)
class Mixed:
    """An image of a batch, and where each of its boxes comes from.

    image: (S, S, 3) uint8. boxes: (n, 4) xyxy as fractions of it. numbers: (n,) the running numbers of its boxes, as
    `origins` count them. weight: MixUp's weight of the image itself, or None. alone: boxes of the picture as it is.
    mean: boxes of a picture of the data on average. mosaic, mixup: the odds.
    """

    image: NDArray[np.uint8]
    boxes: Array
    numbers: Array
    origins: tuple[Origin, ...]
    weight: float | None
    alone: int
    mean: float
    mosaic: float
    mixup: float

    @property
    def put_in(self) -> int:
        """Boxes of all source pictures together."""
        return sum(len(origin.numbers) for origin in self.origins)

    @property
    def labels(self) -> Array:
        """The classes of the boxes that arrived: (n,)."""
        return np.concatenate([origin.labels for origin in self.origins])[self.numbers]

    @property
    def lost(self) -> Array:
        """The numbers of the boxes that did not arrive: outside of the image, or less than a pixel wide or high."""
        return np.setdiff1d(np.arange(self.put_in), self.numbers)

    @property
    def at_border(self) -> int:
        """How many boxes end at the border of the image: nearly all of them were cut there."""
        return int(((self.boxes < 1e-6) | (self.boxes > 1 - 1e-6)).any(1).sum())

    @property
    def expected(self) -> float:
        """Boxes that these odds put into an image of the data on average, in the dense stage."""
        return expected_targets(self.mean, self.mosaic, self.mixup)

    def arrived(self, origin: Origin) -> Array:
        """Which of the boxes come from a source picture: (n,) bool."""
        return np.isin(self.numbers, origin.numbers)


class DenseLab(Lab):
    """Mosaic and MixUp on the reader's own pictures: every box in the colour of the picture that it came from."""

    title = "Dense O2O: where the targets of an image come from"

    def __init__(self, dataset: Dataset, augment: Augment | None = None, size: int = 384) -> None:
        """augment: as published for 640 x 640, by default DEIM's. size: the side of the images that it makes.

        Raises `DataError` for a dataset without pictures to train on.
        """
        if dataset.train is None or not len(dataset.train):
            raise DataError(f"The lab of Dense O2O mixes training pictures; {dataset!r} has none.")
        self.pictures = Numbered(dataset.train, MEMORY)
        self.augment = (augment or Augment()).scaled_to_size(SIZE, (size, size))
        self.size = size
        self.mean = float(boxes_per_picture(dataset.train).mean())
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        """Which picture, what chance decides, and how often."""
        return (
            Slider("picture", 0, len(self.pictures) - 1, 1, 0, "picture"),
            Slider("seed", 0, 99, 1, 0, "seed of all that is drawn"),
            Choice("stage", tuple(STAGES), "dense", "stage"),
            Slider("mosaic", 0.0, 1.0, 0.05, self.augment.mosaic, "odds of mosaic"),
            Slider("mixup", 0.0, 1.0, 0.05, self.augment.mixup, "odds of MixUp"),
            Slider("weight", 0.05, 0.95, 0.05, 0.5, "weight of the image in MixUp"),
        )

    def compute(self, picture: int, seed: int, stage: str, mosaic: float, mixup: float, weight: float) -> Mixed:
        """Make the image as the loader does, from numbered boxes, in a batch with one other image."""
        augment = replace(self.augment, mosaic=mosaic, mixup=mixup, mixup_weight=(weight, weight))
        chance, count = np.random.default_rng(seed), len(self.pictures)
        other = (picture + 1 + int(chance.integers(max(count - 1, 1)))) % count
        mix = augment.mixed(stage, chance) if count > 1 else None
        task = Task(0, stage, [picture] if mix is None else [picture, other], mix)
        self.pictures.asked.clear()
        parts: Any = Assembler(self.pictures, (self.size, self.size), augment, seed)[task]
        if isinstance(parts, DataError):
            raise parts
        batch = Batch(parts["images"], Targets(parts["image"], parts["labels"], parts["boxes"]), mix=mix).finish()
        mine = batch.targets.image == 0
        origins = tuple(_placed(self.pictures.asked))
        return Mixed(
            image=(255 * batch.images[0]).round().byte().permute(1, 2, 0).numpy(),
            boxes=cxcywh_to_xyxy(batch.targets.boxes[mine]).numpy(),
            numbers=batch.targets.labels[mine].numpy(),
            origins=origins,
            weight=mix,
            alone=len(origins[0].numbers),
            mean=self.mean,
            mosaic=mosaic if STAGES[stage].dense else 0.0,
            mixup=mixup if STAGES[stage].dense else 0.0,
        )

    def words(self, found: Mixed) -> str:
        """What went in and what arrived."""
        own, times = found.origins[0], found.expected / max(found.mean, 1e-9)
        kind, blend = "a mosaic of four" if own.tiled else "no mosaic", "nothing is blended in"
        if found.weight is not None:
            other = next(origin for origin in found.origins if origin.blended)
            also = " (a mosaic too)" if other.tiled else ""
            blend = f"picture {other.picture}{also} is blended in, {1 - found.weight:.0%} of it"
        return (
            f"Picture {own.picture} alone has {found.alone} boxes. Here it is {kind}, and {blend}: "
            f"of {found.put_in} boxes put in, {len(found.numbers)} arrived, and {found.at_border} of these end at the "
            "border. "
            f"On average these odds put {found.expected:.1f} boxes into an image, {times:.2f} times what a picture has."
        )

    def draw(self, found: Mixed) -> Drawing:
        """The source pictures, the image, how many boxes of each arrived, and what the odds bring on average."""
        return panels(found)


def _placed(asked: Sequence[Origin]) -> Iterator[Origin]:
    """What was asked for, with its place in the mosaic, and whether it belongs to the other image of the batch."""
    own = 4 if asked[0].tiled else 1
    for i, origin in enumerate(asked):
        yield origin._replace(place=i if i < own else i - own, blended=i >= own)
