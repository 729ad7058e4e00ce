"""Queries that only train: they sit behind the detector's own, and one rule says who may look at whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deimkit.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from deimkit.models.layers import inverse_sigmoid
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Match, Targets


@dataclass
class QueryGroup:
    """Extra queries and how they are supervised.

    name: the prefix of their outputs. content: (B, G, D). boxes: (B, G, 4) in logits. part: (G,) the sub-group of each
    query; sub-groups never see each other. looks: they see the detector's own queries, which never see them.
    rule, repeat, pooled: as in `Output`.
    """

    name: str
    content: Tensor
    boxes: Tensor
    part: Tensor
    looks: bool
    rule: Any = None
    repeat: int = 1
    pooled: bool = True


def blocked(own: int, groups: Sequence[QueryGroup]) -> Tensor:
    """Which query (row) may not look at which (column), (Q, Q) bool, for `own` queries and the groups behind them."""
    part = [groups[0].part.new_zeros(own)]
    looks = [torch.zeros_like(part[0], dtype=torch.bool)]
    for group in groups:
        part.append(group.part + 1 + sum(len(p) for p in part))  # no two groups share a number
        looks.append(torch.full_like(group.part, group.looks, dtype=torch.bool))
    who = torch.cat(part)
    return (who[:, None] != who) & ~(torch.cat(looks)[:, None] & (who == 0))


@dataclass(frozen=True)
class Denoise:
    """Contrastive denoising: noisy copies of the targets, to be restored or (the noisier half) rejected.

    queries: about how many positive copies an image gets. label_noise: a copy's label is redrawn with half this
    probability. box_noise: how far its edges may move, in halves of its size: up to one for the positive copies, from
    one to two for the negative. Source: DINO 3.3, as published for RT-DETR and D-FINE.
    """

    queries: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0

    def build(self, width: int, classes: int) -> Denoising:
        """The module, with fresh embeddings."""
        return Denoising(self, width, classes)

    def draw(self, targets: Targets, images: int, classes: int, ranks: Ranks = ALONE) -> Noised:
        """Noisy copies of the targets of a batch of `images`, drawn from torch's generator in the published order.

        Copies are laid out in sub-groups of 2 * M slots, M the most boxes in one image: M positive, then M negative.
        ranks: who have the other images of the batch, as many each; all draw for all, and so draw what one alone would.
        """
        every = torch.arange(images, device=targets.image.device)
        count = (targets.image == every[:, None]).sum(1)  # (B,), without `bincount`, which waits for a GPU
        most = ranks.most(int(count.max()) if images else 0)
        groups = max(1, self.queries // max(most, 1))
        rank = rank_in_image(targets.image, count)
        labels = torch.full((images, most), classes, device=rank.device)
        labels[targets.image, rank] = targets.labels
        boxes = targets.boxes.new_zeros(images, most, 4)
        boxes[targets.image, rank] = targets.boxes

        part = torch.arange(2 * groups, device=rank.device).repeat_interleave(most)  # (G,)
        labels = self.noisy_labels(labels.repeat(1, 2 * groups), classes, ranks)  # (B, G)
        boxes = self.noisy_boxes(boxes.repeat(1, 2 * groups, 1), part % 2, ranks)  # (B, G, 4)

        slot = rank + 2 * most * torch.arange(groups, device=rank.device)[:, None]  # (groups, N), positive ones
        row = torch.arange(len(rank), device=rank.device)
        match = Match(targets.image.repeat(groups), slot.flatten(), row.repeat(groups))
        return Noised(labels, inverse_sigmoid(boxes), part // 2, match, groups)

    def noisy_labels(self, labels: Tensor, classes: int, ranks: Ranks = ALONE) -> Tensor:
        """Labels (B, G), some of them redrawn; padding (= `classes`) stays."""
        everyones = labels.repeat(ranks.world, 1)
        flip = ranks.mine(torch.rand(everyones.shape, device=labels.device)) < self.label_noise / 2
        drawn = ranks.mine(torch.randint_like(everyones, classes))
        return torch.where(flip & (labels != classes), drawn, labels)

    def noisy_boxes(self, boxes: Tensor, negative: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """Boxes (B, G, 4) cxcywh with every edge moved, then clipped; `negative` (G,) adds one to how far."""
        everyones = boxes.repeat(ranks.world, 1, 1)
        sign = ranks.mine(torch.randint_like(everyones, 2)) * 2 - 1
        reach = ranks.mine(torch.rand_like(everyones)) + negative[:, None]
        half = boxes[..., 2:].repeat(1, 1, 2) / 2
        corners = cxcywh_to_xyxy(boxes) + sign * reach * half * self.box_noise
        return xyxy_to_cxcywh(corners.clamp(0, 1)).abs()  # edges that crossed make a box all the same


def rank_in_image(image: Tensor, count: Tensor) -> Tensor:
    """How many earlier rows belong to the same image: image (N,) and rows per image (B,) -> (N,)."""
    order = image.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=image.device) - (count.cumsum(0) - count)[image[order]]
    return rank


class Noised(NamedTuple):
    """Noisy copies of the targets, G slots an image.

    labels: (B, G). boxes: (B, G, 4) in logits. part: (G,) the sub-group of a slot. match: which slot restores which
    target. groups: how many sub-groups there are, hence positive copies of every target.
    """

    labels: Tensor
    boxes: Tensor
    part: Tensor
    match: Match
    groups: int


class Denoising(nn.Module):
    """Embeds the labels of the noisy copies; a batch without any box makes zero queries and the same graph.

    ranks: which processes have the rest of the batch; who trains with others sets it.
    """

    def __init__(self, spec: Denoise, width: int, classes: int) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes
        self.ranks = ALONE
        self.embed = nn.Embedding(classes + 1, width, padding_idx=classes)

    def forward(self, targets: Targets, images: int) -> QueryGroup:
        noised = self.spec.draw(targets, images, self.classes, self.ranks)
        return QueryGroup(
            "denoise", self.embed(noised.labels), noised.boxes, noised.part, looks=True,
            rule=noised.match, repeat=noised.groups, pooled=False,
        )  # fmt: skip
