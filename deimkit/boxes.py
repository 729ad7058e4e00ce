"""Boxes: two ways to write one, and how much two of them overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners of centre-size boxes; a negative width or height counts as 0. (..., 4) -> (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre and size of corner boxes. (..., 4) -> (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def iou_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of broadcastable cxcywh boxes: of pairs if both are (M, 4), of all pairs if (Q, 1, 4) and (1, N, 4).

    Two boxes without area and without hull have IoU and GIoU NaN, as the formula says: callers keep such boxes out.
    Source: Rezatofighi et al., "Generalized Intersection over Union".
    """
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - inter
    iou = inter / union
    return iou, iou - (hull - union) / hull
