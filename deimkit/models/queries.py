"""Where queries start: the most promising cells of the memory become the first boxes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deimkit.models.attention import Shapes
from deimkit.models.layers import box_head, full, per_shape, score_head
from deimkit.structures import Predictions


class Start(NamedTuple):
    """What the decoder starts from: content (B, Q, D) and boxes (B, Q, 4) in logits, and what the encoder proposed."""

    content: Tensor
    boxes: Tensor
    proposals: Predictions


@dataclass(frozen=True)
class TopK:
    """The `count` cells with the most confident class start as queries (two-stage DETR; RT-DETR)."""

    count: int = 300

    def build(self, width: int, classes: int, act: str) -> TopKQueries:
        """The module for memory of `width` channels, with fresh weights."""
        return TopKQueries(self.count, width, classes, act)


class TopKQueries(nn.Module):
    """Scores every cell, refines the anchors of the best and hands on their features, detached."""

    def __init__(self, count: int, width: int, classes: int, act: str) -> None:
        super().__init__()
        self.count = count
        self.memory = nn.Sequential(OrderedDict(proj=nn.Linear(width, width), norm=nn.LayerNorm(width)))
        self.score = score_head(width, classes)
        self.box = box_head(width, 4, act)
        nn.init.xavier_uniform_(self.memory.get_parameter("proj.weight"))

    def forward(self, tokens: Tensor, shapes: Shapes) -> Start:
        """tokens (B, L, D) of maps of `shapes` -> Start; an input of fewer than `count` cells makes as many queries."""
        anchors, valid = cell_anchors(shapes, tokens.device, torch.promote_types(tokens.dtype, torch.float32))
        features = self.memory(tokens * valid)  # (B, L, D)
        logits = self.score(features)  # (B, L, C)
        best = self.best(logits)[..., None]  # (B, Q, 1)
        content = take(features, best)
        boxes = full(self.box(content)) + anchors[best[..., 0]]
        return Start(content.detach(), boxes.detach(), Predictions(take(logits, best), boxes.sigmoid()))

    def best(self, logits: Tensor) -> Tensor:
        """Which cells of logits (B, L, C) become queries, (B, Q), the most confident first."""
        return logits.amax(-1).topk(min(self.count, logits.shape[1]), 1).indices


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, Q, 1) of x (B, L, n) -> (B, Q, n)."""
    return x.gather(1, rows.expand(-1, -1, x.shape[2]))


@per_shape
def cell_anchors(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A box around every cell, in logits (L, 4), and which of them may be used (L, 1).

    A cell of level l has a box of 0.05 * 2**l of the image around its centre; one that reaches within 0.01 of the
    border of (0, 1) is not used: its anchor is infinite, which is the box (1, 1, 1, 1). Source: Deformable-DETR A.4.
    """
    boxes = []
    for level, (h, w) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        size = torch.full_like(x, 0.05 * 2**level)
        boxes.append(torch.stack([x / w, y / h, size, size], -1).flatten(0, 1))
    anchors = torch.cat(boxes).double()
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(1, keepdim=True)
    anchors = torch.where(valid, (anchors / (1 - anchors)).log(), torch.inf)
    return anchors.to(device, dtype), valid.to(device)
