"""A box edge as a distribution over R + 1 offsets from an anchor box.

Edges are ordered left, top, right, bottom. An offset is counted in units of (anchor side / `scale`): offset 0 puts the
edge on the anchor's own edge, a positive one moves it outwards. Source: D-FINE 4.1 (its W(n) times `scale`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy


def weighting(bins: int = 32, up: float = 0.5, scale: float = 4.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """D-FINE's W(n): R + 1 = `bins` + 1 offsets, dense around zero, symmetric, from -2 * up * scale to 2 * up * scale.

    The inner ones grow geometrically up to up * scale; the two ends stand twice as far out, for what no bin reaches.
    Returns (R + 1,) in rising order.
    """
    bound = abs(up * scale)
    step = (bound + 1) ** (2 / (bins - 2))
    inner = step ** torch.arange(1, bins // 2, dtype=torch.float64) - 1
    positive = torch.cat([inner, inner.new_tensor([2 * bound])])
    return torch.cat([-positive.flip(0), inner.new_zeros(1), positive]).to(dtype)


def expectation(edges: Tensor, W: Tensor) -> Tensor:
    """The mean offset that bin logits stand for. (..., 4, R + 1) and (R + 1,) -> (..., 4), never below float32."""
    p = edges.softmax(-1, dtype=torch.promote_types(edges.dtype, torch.float32))
    return (p * W).sum(-1)


def decode(anchors: Tensor, offsets: Tensor, scale: float = 4.0) -> Tensor:
    """The boxes whose edges lie `offsets` away from those of `anchors`. (..., 4) cxcywh, (..., 4) -> (..., 4) cxcywh.

    Nothing is clamped: a box may leave the image, and offsets far inwards give a negative size.
    """
    left_top, right_bottom = offsets[..., :2] / scale, offsets[..., 2:] / scale
    centre, size = anchors[..., :2], anchors[..., 2:]
    return torch.cat([centre + (right_bottom - left_top) * size / 2, size * (1 + left_top + right_bottom)], -1)


def encode(anchors: Tensor, boxes: Tensor, W: Tensor, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Between which two bins every edge of `boxes` lies, seen from `anchors`: the inverse of `decode`.

    anchors, boxes: (..., 4) cxcywh. Returns the left bin (..., 4) int64 in [0, R - 1] and the fraction of the way to
    the bin right of it (..., 4) in [0, 1]. An edge beyond the outermost offset belongs wholly to that end bin.
    """
    corners = cxcywh_to_xyxy(boxes)
    unit = (anchors[..., 2:] / scale).clamp(min=1e-16)
    outwards = torch.cat(
        [(anchors[..., :2] - corners[..., :2]) / unit, (corners[..., 2:] - anchors[..., :2]) / unit], -1
    )  # (..., 4) from the anchor's centre
    offset = outwards - scale / 2
    left = (torch.bucketize(offset, W, right=True) - 1).clamp(0, len(W) - 2)
    return left, ((offset - W[left]) / (W[left + 1] - W[left])).clamp(0, 1)
