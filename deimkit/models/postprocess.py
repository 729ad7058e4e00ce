"""From what the queries answer to the objects of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.errors import NonFiniteError
from deimkit.structures import Detections, Predictions

if TYPE_CHECKING:
    from deimkit.data.split import CategoryMap


def best(preds: Predictions, sizes: Tensor, top: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """The `top` most confident (query, class) pairs of each image; a query may win with several classes.

    preds: logits (B, Q, C) and boxes (B, Q, 4). sizes: (B, 2) height and width to scale the boxes to.
    Returns boxes (B, K, 4) xyxy in the pixels of `sizes`, scores (B, K) descending, labels (B, K), where
    K = min(top, Q·C). As published there is no suppression of duplicates and no clipping to the image.
    """
    queries, classes = preds.logits.shape[1:]
    logits = preds.logits.float() if preds.logits.dtype in (torch.half, torch.bfloat16) else preds.logits
    logits, index = logits.flatten(1).topk(min(top, queries * classes))  # (B, Q·C) -> (B, K); sigmoid keeps the order
    query = index.div(classes, rounding_mode="trunc")  # unlike // it is one node of an exported graph
    boxes = preds.boxes.to(logits.dtype).gather(1, query[..., None].expand(-1, -1, 4))  # (B, K, 4)
    scale = sizes.to(boxes).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): width, height, width, height
    return cxcywh_to_xyxy(boxes) * scale, logits.sigmoid(), index - query * classes


def select(preds: Predictions, sizes: Tensor, categories: CategoryMap, top: int = 300) -> list[Detections]:
    """The objects of each image as `Detections` on the host, most confident first; see `best`.

    sizes: (B, 2) height and width of the original images in pixels. Raises `NonFiniteError` if a prediction is not
    finite: it would otherwise pass for a very confident one.
    """
    return detections(*best(preds, sizes, top), sizes, categories)


def detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, sizes: Tensor, categories: CategoryMap
) -> list[Detections]:
    """The objects that `best`, or a deployed graph, found in images of `sizes`; raises as `select` does."""
    found = torch.cat([boxes, scores[..., None], labels[..., None].to(boxes)], 2)  # (B, K, 6)
    host = found.cpu()  # the one copy for the batch
    if not torch.isfinite(host).all():
        image = int((~torch.isfinite(host)).any(2).any(1).nonzero()[0])
        raise NonFiniteError(
            f"Expected finite predictions; got NaN or infinity in image {image} of the batch. "
            "Weights that diverged in training, or half precision where it overflows?"
        )
    return [
        _of_one(rows, (int(height), int(width)), categories)
        for rows, (height, width) in zip(host, sizes.tolist(), strict=True)
    ]


def _of_one(rows: Tensor, size: tuple[int, int], categories: CategoryMap) -> Detections:
    """One image's (K, 6) rows of xyxy, score, label as `Detections`."""
    labels = rows[:, 5].long()
    index = labels.tolist()
    return Detections(
        boxes=rows[:, :4],
        scores=rows[:, 4],
        labels=labels,
        names=[categories.names[i] for i in index],
        size=size,
        ids=[categories.ids[i] for i in index],
    )
