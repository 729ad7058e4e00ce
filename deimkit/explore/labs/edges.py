"""What a detector says of the four edges of its best boxes, layer by layer, as plain numbers in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from deimkit.boxes import cxcywh_to_xyxy, iou_giou, xyxy_to_cxcywh
from deimkit.distribution import encode
from deimkit.errors import DeimkitError
from deimkit.explore.layers import all_layers
from deimkit.models.detector import Detector
from deimkit.models.predict import pixels, prepare
from deimkit.models.refine import FDRHeads
from deimkit.structures import Output, Predictions

EDGES = ("left", "top", "right", "bottom")
SAME = 0.7  # IoU from which on two queries are about one object
MEANT = 0.3  # IoU from which on an annotated box is what a query is about

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Edges:
    """The edges of n objects in one picture after each of L layers.

    layers: L names. names, scores: (n,) the class and confidence of the final layer. anchors: (n, 4), boxes:
    (L, n, 4) and wanted: (n, 4), the annotated box or NaN, all xyxy pixels of the picture. chance: (L, n, 4, R + 1),
    the distributions. target: (n, 4, R + 1), the one that FGL wants, NaN without an annotated box. W: (R + 1,) offsets
    in units of side / scale. picture: (H, W, 3) uint8.
    """

    picture: NDArray[np.uint8]
    layers: tuple[str, ...]
    names: tuple[str, ...]
    scores: Floats
    anchors: Floats
    boxes: Floats
    wanted: Floats
    chance: Floats
    target: Floats
    W: Floats
    scale: float

    @property
    def bits(self) -> Floats:
        """The entropy of every distribution; 0 for a single bin, log2(R + 1) for a uniform one. (L, n, 4)."""
        chance = torch.from_numpy(self.chance)
        return (torch.special.entr(chance).sum(-1) / np.log(2)).numpy()

    @property
    def offsets(self) -> Floats:
        """Where every bin of every edge would put it, in pixels outwards from the anchor's own. (n, 4, R + 1)."""
        side = self.anchors[:, 2:] - self.anchors[:, :2]  # (n, 2)
        return np.tile(side, 2)[..., None] * self.W / self.scale


def edged(model: Detector, images: Tensor) -> list[Output]:
    """What `all_layers` says, the last layer last; raises `DeimkitError` for a detector whose boxes have no edges."""
    outputs = all_layers(model, images)
    if outputs[-1].preds.edges is None:
        raise DeimkitError(
            f"This needs boxes whose edges are distributions (FDR), as D-FINE's; got a detector that refines by "
            f"{type(model.arch.refine).__name__}. Give one of the recipes with dfine in their name, or tiny."
        )
    return outputs


def look(model: Detector, image: Any, truth: Any = None, objects: int = 12) -> Edges:
    """The edges of the most confident boxes of a picture, no two of which overlap by more than an IoU of 0.7.

    image: any picture that `predict` takes. truth: (m, 4) annotated boxes, xyxy pixels of the picture. objects: how
    many boxes at most, one or more. Raises `DeimkitError` for other numbers, and for a truth of another shape.
    """
    if objects < 1:
        raise DeimkitError(f"objects is how many boxes to look at, 1 or more; got {objects}.")
    picture = pixels(image)
    weight = next(model.parameters())
    shown = prepare(picture, model.size).to(weight.device, weight.dtype).div(255)[None]
    outputs = [output for output in edged(model, shown) if output.preds.edges is not None]
    refine, final = model.refine, outputs[-1].preds
    assert isinstance(refine, FDRHeads) and final.anchors is not None
    best, labels = final.logits[0].sigmoid().max(-1)  # (Q,)
    chosen = nms(cxcywh_to_xyxy(final.boxes[0]).float(), best.float(), SAME)[:objects]

    def of(preds: Predictions, field: str) -> Tensor:
        return getattr(preds, field)[0, chosen].cpu().double()

    anchors, W = of(final, "anchors"), refine.W.cpu().double()
    size = torch.tensor(picture.shape[1::-1]).double().repeat(2)  # width, height, width, height
    wanted = _meant(of(final, "boxes"), _given(truth) / size)
    return Edges(
        picture=picture,
        layers=tuple(output.name for output in outputs),
        names=tuple(model.categories.name(int(label)) for label in labels[chosen]),
        scores=best[chosen].cpu().double().numpy(),
        anchors=(cxcywh_to_xyxy(anchors) * size).numpy(),
        boxes=torch.stack([cxcywh_to_xyxy(of(output.preds, "boxes")) * size for output in outputs]).numpy(),
        wanted=(wanted * size).numpy(),
        chance=torch.stack([of(output.preds, "edges").softmax(-1) for output in outputs]).numpy(),
        target=_target(anchors, wanted, W, refine.scale).numpy(),
        W=W.numpy(),
        scale=refine.scale,
    )


def shares(left: Tensor, right: Tensor, bins: int) -> Tensor:
    """The distribution that FGL wants: all on two bins. left, right: (..., 4) as of `encode` -> (..., 4, bins)."""
    wanted = right.new_zeros(*left.shape, bins).scatter_(-1, left[..., None], 1 - right[..., None])
    return wanted.scatter_(-1, left[..., None] + 1, right[..., None])


def _given(truth: Any) -> Tensor:
    boxes = np.asarray([] if truth is None else truth, np.float64)
    if boxes.size and boxes.shape[1:] != (4,):
        raise DeimkitError(f"truth is annotated boxes, (m, 4) xyxy in pixels; got {boxes.shape}.")
    return torch.from_numpy(boxes.reshape(-1, 4))


def _meant(boxes: Tensor, truth: Tensor) -> Tensor:
    """Which annotated box every box (n, 4) cxcywh is about, NaN for none. truth: (m, 4) xyxy -> (n, 4) xyxy."""
    nothing = torch.full_like(boxes, torch.nan)
    if not len(truth):
        return nothing
    fit, which = iou_giou(boxes[:, None], xyxy_to_cxcywh(truth)[None])[0].max(1)
    return torch.where((fit >= MEANT)[:, None], truth[which], nothing)


def _target(anchors: Tensor, wanted: Tensor, W: Tensor, scale: float) -> Tensor:
    """What FGL wants of every edge (n, 4, R + 1), NaN where nothing is wanted."""
    known = ~wanted.isnan().any(-1)
    target = torch.full((*wanted.shape, len(W)), torch.nan, dtype=W.dtype)
    target[known] = shares(*encode(anchors[known], xyxy_to_cxcywh(wanted[known]), W, scale), len(W))
    return target
