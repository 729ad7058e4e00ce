"""What goes on inside a detector while it looks at one image: its maps, its cells, its points, its boxes."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import nms

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.errors import DeimkitError
from deimkit.explore.labs.edges import SAME
from deimkit.models.attention import DeformableAttention, Shapes, cells
from deimkit.models.detector import Detector
from deimkit.models.predict import pixels, prepare

Heard = dict[nn.Module, tuple[tuple[Any, ...], Any]]


@dataclass(frozen=True)
class Gaze:
    """How the queries of one decoder layer look at the image.

    around: (Q, 4) boxes cxcywh, and locations: (Q, H, P, 2) x and y of what they read around these, both as fractions
    of the image, points of the finest level first; of discrete sampling the centres of the cells. weights: (Q, H, P).
    values: per level (H, D / H, h, w), what is read. seen: (Q, D), what comes of it.
    """

    around: Tensor
    locations: Tensor
    weights: Tensor
    values: list[Tensor]
    seen: Tensor


@dataclass(frozen=True)
class Anatomy:
    """One image on its way through a detector, in evaluation; all tensors are on the CPU.

    picture: (H, W, 3) uint8. image: (3, h, w) in [0, 1], what the detector was shown. backbone: maps (channels, h, w).
    encoder: maps (D, h, w). cells: (L, C) logits of all cells, fine to coarse. chosen: (Q,) which of them are queries.
    points: sampling points per level, P together. gazes: one per layer. boxes: (layers + 1, Q, 4) cxcywh fractions, the
    first boxes and those after every layer. logits: (Q, C) after the last. names: the classes.
    """

    picture: NDArray[np.uint8]
    image: Tensor
    backbone: list[Tensor]
    encoder: list[Tensor]
    cells: Tensor
    chosen: Tensor
    points: tuple[int, ...]
    gazes: list[Gaze]
    boxes: Tensor
    logits: Tensor
    names: tuple[str, ...]

    @property
    def shapes(self) -> Shapes:
        """(height, width) of every level that is read, fine to coarse."""
        return tuple((x.shape[1], x.shape[2]) for x in self.encoder)

    @property
    def confidence(self) -> list[Tensor]:
        """How sure every cell is of its best class, per level (h, w)."""
        best = self.cells.amax(1).sigmoid()
        levels = best.split([h * w for h, w in self.shapes])
        return [level.reshape(shape) for level, shape in zip(levels, self.shapes, strict=True)]

    @property
    def level(self) -> Tensor:
        """On which level the cell of every query is. (Q,)."""
        ends = torch.tensor([h * w for h, w in self.shapes]).cumsum(0)
        return torch.bucketize(self.chosen, ends, right=True)

    @property
    def places(self) -> Tensor:
        """The centre of every query's cell, x and y as fractions of the image. (Q, 2)."""
        height, width = torch.tensor(self.shapes).T
        first = torch.cat([torch.zeros(1, dtype=torch.long), (height * width).cumsum(0)[:-1]])
        cell, wide, high = (self.chosen - first[self.level]), width[self.level], height[self.level]
        return torch.stack([(cell % wide + 0.5) / wide, (cell // wide + 0.5) / high], 1)

    @property
    def point_level(self) -> Tensor:
        """Of which level every sampling point is. (P,)."""
        return torch.arange(len(self.points)).repeat_interleave(torch.tensor(self.points))

    @property
    def order(self) -> Tensor:
        """The queries, the most confident first. (Q,)."""
        return self.logits.amax(1).argsort(descending=True, stable=True)

    def distinct(self, count: int) -> Tensor:
        """The most confident queries of which no two have boxes that overlap by more than an IoU of 0.7. (n <= count,).

        For pictures alone: a detector itself leaves all queries as they are.
        """
        corners = cxcywh_to_xyxy(self.boxes[-1]).float()
        return nms(corners, self.logits.amax(1).float(), SAME)[:count]


def dissect(model: Detector, image: Any) -> Anatomy:
    """Let a detector look at a picture, and keep what its parts said on the way to what `predict` would answer.

    image: any picture that `predict` takes. It is a copy of the detector that looks, so that of the detector itself
    nothing changes; it may be compiled, deployed, or in training. Raises `DeimkitError` for what is no Detector.
    """
    if not isinstance(model, Detector):
        raise DeimkitError(f"Only a Detector has this anatomy; got {type(model).__name__}. `load` gives one.")
    picture, model = pixels(image), deepcopy(model).eval()
    weight = next(model.parameters())
    shown = prepare(picture, model.size).to(weight.device, weight.dtype).div(255)[None]
    layers: list[Any] = [layer.cross_attn for layer in model.decoder.layers][: model.decoder.asked + 1]
    heard = listen([model.backbone, model.encoder, model.queries.score, *layers])
    with torch.no_grad():
        preds = model(shown)
        gazes = [_gaze(layer, *heard[layer]) for layer in layers]
    logits = heard[model.queries.score][1]
    return Anatomy(
        picture=picture,
        image=shown[0].cpu(),
        backbone=[x[0].cpu() for x in heard[model.backbone][1]],
        encoder=[x[0].cpu() for x in heard[model.encoder][1]],
        cells=logits[0].cpu(),
        chosen=model.queries.best(logits)[0].cpu(),
        points=layers[0].points,
        gazes=gazes,
        boxes=torch.stack([*(gaze.around for gaze in gazes), preds.boxes[0].cpu()]),
        logits=preds.logits[0].cpu(),
        names=model.categories.names,
    )


def listen(modules: Iterable[nn.Module]) -> Heard:
    """What each of some modules is given and gives back, (arguments, result), as soon as it is called."""
    heard: Heard = {}

    def hear(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        heard[module] = (given, result)

    for module in modules:
        module.register_forward_hook(hear)
    return heard


def _gaze(attention: DeformableAttention, given: tuple[Any, ...], seen: Tensor) -> Gaze:
    """What the attention of a layer did with one image, from what it was given and gave back."""
    query, boxes, memory = given
    locations, weights = attention.aim(query, boxes)
    if attention.discrete:
        parts = zip(locations.split(attention.points, -2), memory.shapes, strict=True)
        locations = torch.cat([(cells(2 * part - 1, *shape) + 1) / 2 for part, shape in parts], -2)
    values = [x.cpu() for x in attention.values(memory)]
    return Gaze(boxes[0].cpu(), locations[0].cpu(), weights[0].cpu(), values, seen[0].cpu())
