"""What the layers of a decoder said in a batch: of each detection, and of each annotation by the matcher's choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy, iou_giou
from deimkit.evaluation.coco import Results
from deimkit.matching import Matcher, widen
from deimkit.models.detector import Detector
from deimkit.models.postprocess import select
from deimkit.models.refine import FDRHeads
from deimkit.structures import Output, Predictions, Targets

Floats = NDArray[np.float32]


def said_of_detections(
    model: Detector,
    outputs: list[Output],
    start: Predictions,
    sizes: Tensor,
    classes: Tensor,
    top: int,
    threshold: float,
) -> tuple[Results, Floats]:
    """The detections in B images, as evaluation gets them, and what `columns` takes apart for each of them.

    outputs: of L layers, the one that evaluation asks last. start: the encoder's proposals. sizes: (B, 2) height and
    width in pixels. classes: (C,) the split's class of each of the model's, -1 for none. top, threshold: as of `trace`.
    """
    last = outputs[-1].preds
    found = select(last, sizes, model.categories)
    boxes, scores, labels = (torch.stack([getattr(d, name) for d in found]) for name in ("boxes", "scores", "labels"))
    pairs = widen(last.logits).flatten(1).topk(scores.shape[1]).indices.cpu()  # (B, K), in the order of `found`
    keep = (classes[labels] >= 0) & (scores >= threshold)
    keep &= keep.cumsum(1) <= top
    image, label, score = keep.nonzero()[:, 0], labels[keep], scores[keep]
    results = Results(*(x.numpy() for x in (image, classes[label], score.double(), boxes[keep].double())))

    at, query = image.to(sizes.device), (pairs[keep] // last.logits.shape[2]).to(sizes.device)
    scale = sizes.flip(1).repeat(1, 2)[at]  # (n, 4): width, height, width, height
    own = label.to(sizes.device)[:, None]  # (n, 1)
    rows = [
        query[:, None],
        *(cxcywh_to_xyxy(widen(output.preds.boxes[at, query])) * scale for output in outputs),
        *(widen(output.preds.logits[at, query]).gather(1, own).sigmoid() for output in outputs[:-1]),
        score[:, None].to(sizes.device),
        cxcywh_to_xyxy(widen(start.boxes[at, query])) * scale,
        edge_spread(model, last, at, query) * scale,
    ]
    return results, torch.cat([x.float() for x in rows], 1).cpu().numpy()  # one copy from the device


def columns(rows: Floats, layers: int) -> dict[str, NDArray[Any]]:
    """The rows (n, 5 L + 9) of `said_of_detections` by name: query, boxes, scores, start, spread."""
    query, boxes, scores, start, spread = np.split(rows, np.cumsum([1, 4 * layers, layers, 4]), 1)
    return {
        "query": query[:, 0].astype(np.int32),
        "boxes": boxes.reshape(-1, layers, 4),  # (n, L * 4) -> (n, L, 4)
        "scores": scores.copy(),
        "start": start.copy(),
        "spread": spread.copy(),
    }


def edge_spread(model: Detector, preds: Predictions, image: Tensor, query: Tensor) -> Tensor:
    """The standard deviation of four edges (left, top, right, bottom) as fractions of the image's width or height.

    image, query: (n,), whose edges. Returns (n, 4), NaN where boxes have no distributions. Source: D-FINE's W(n).
    """
    if preds.edges is None or preds.anchors is None:
        return torch.full_like(preds.boxes[image, query], torch.nan)
    assert isinstance(model.refine, FDRHeads)
    W = model.refine.W
    chance = widen(preds.edges[image, query]).softmax(-1)  # (n, 4, R + 1)
    mean = (chance * W).sum(-1, keepdim=True)
    offsets = (chance * (W - mean).square()).sum(-1).sqrt()  # (n, 4) in units of side / scale
    return offsets * widen(preds.anchors[image, query])[:, 2:].repeat(1, 2) / model.refine.scale


def said_of_targets(matcher: Matcher, outputs: list[Output], targets: Targets) -> Floats:
    """Who answers for each target at each layer, with IoU and score: (N, L, 3), (-1, NaN, NaN) where nobody does.

    score: of the target's class. Of several queries that answer for one target it is the one that overlaps it most.
    """
    said = unanswered(len(targets), len(outputs))
    for layer, (output, match) in enumerate(zip(outputs, matcher(outputs, targets), strict=True)):
        image, query, target = (x.to(targets.boxes.device) for x in match)
        iou = iou_giou(widen(output.preds.boxes[image, query]), targets.boxes[target])[0]
        score = widen(output.preds.logits[image, query, targets.labels[target]]).sigmoid()
        rising = iou.argsort(descending=True, stable=True).flip(0)
        rows = torch.stack([target.to(iou), query.to(iou), iou, score], 1)[rising].cpu().numpy()
        said[rows[:, 0].astype(int), layer] = rows[:, 1:]  # what is written last stays
    return said


def unanswered(targets: int, layers: int) -> Floats:
    """Of each target at each layer: no query, hence neither IoU nor score. -> (N, L, 3)."""
    return np.tile(np.array([-1, np.nan, np.nan], np.float32), (targets, layers, 1))
