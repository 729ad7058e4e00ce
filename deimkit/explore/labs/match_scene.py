"""A picture as the detector sees it, alone or as part of a mosaic, with all that the detector says about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.data.augment import Sample, mosaic, resize, to_fractions
from deimkit.data.loader import Pictures
from deimkit.data.split import Split
from deimkit.errors import DataError
from deimkit.explore.layers import all_layers
from deimkit.models.detector import Detector
from deimkit.structures import Output, Targets

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scene:
    """What matching is about: the targets of one image, and every layer's predictions for it.

    picture: (H, W, 3) uint8, at the size that the detector takes; all pixels below are its. names: one per target.
    """

    picture: NDArray[np.uint8]
    targets: Targets
    outputs: dict[str, Output]
    names: tuple[str, ...]

    @property
    def wanted(self) -> Floats:
        """The targets' boxes, xyxy pixels. (N, 4)."""
        return self.in_pixels(cxcywh_to_xyxy(self.targets.boxes))

    def in_pixels(self, fractions: torch.Tensor) -> Floats:
        """Boxes or shifts, as fractions of the image, in its pixels. (..., 4) -> (..., 4)."""
        height, width = self.picture.shape[:2]
        return fractions.double().numpy() * np.array([width, height] * 2)

    def shifted(self, layer: str, query: int, right: float, down: float) -> Output:
        """What a layer says, were one query's box so many pixels further right and down."""
        output = self.outputs[layer]
        height, width = self.picture.shape[:2]
        boxes = output.preds.boxes.clone()
        boxes[0, query, :2] += torch.tensor([right / width, down / height])
        return replace(output, preds=replace(output.preds, boxes=boxes))


def alone(model: Detector, split: Split, image: int) -> Scene:
    """Picture `image` of a split, as evaluation shows it."""
    return _seen(model, split, Pictures(split, 0).sample(_known(split, image)))


def in_mosaic(model: Detector, split: Split, image: int) -> Scene:
    """Picture `image` and the three after it in a square of four, the plainest Dense O2O: neither turned nor cut.

    A split of fewer pictures repeats them; of one alone, it is DEIM's Fig. 2c.
    """
    pictures, side = Pictures(split, 0), max(1, min(model.size) // 2)
    four = [pictures.tile((_known(split, image) + k) % len(split), side) for k in range(4)]
    return _seen(model, split, mosaic(four))


def _known(split: Split, image: int) -> int:
    if not 0 <= image < len(split):
        raise DataError(f"{split.name} has the images 0 to {len(split) - 1}; got {image}.")
    return image


def _seen(model: Detector, split: Split, sample: Sample) -> Scene:
    """Show a sample to the detector, resized to what it takes."""
    height, width = sample.image.shape[:2]
    picture = resize(sample.image, model.size)
    weight = next(model.parameters())
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(weight.device, weight.dtype) / 255
    return Scene(
        picture=picture,
        targets=Targets(
            image=torch.zeros(len(sample.labels), dtype=torch.long),
            labels=torch.from_numpy(sample.labels),
            boxes=torch.from_numpy(to_fractions(sample.boxes, height, width)),
        ),
        outputs={output.name: output.to("cpu") for output in all_layers(model, images)},
        names=tuple(split.categories.name(label) for label in sample.labels.tolist()),
    )
