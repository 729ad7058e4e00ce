"""How boxes improve from layer to layer: by four numbers, or by D-FINE's fine-grained distribution refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deimkit.distribution import decode, weighting
from deimkit.models.layers import MLP, box_head, full, inverse_sigmoid, score_head, zero_
from deimkit.structures import Predictions


@dataclass(frozen=True)
class FDR:
    """Fine-grained distribution refinement: every edge of a box is a distribution over `bins` + 1 offsets.

    bins: R. up, scale: a and 1 / c of the weighting function W(n). top, hidden: how many probabilities of each edge the
    quality head reads, and its width. Source: D-FINE Eq. 1-3.
    """

    bins: int = 32
    up: float = 0.5
    scale: float = 4.0
    top: int = 4
    hidden: int = 64

    def build(self, layers: int, width: int, classes: int, act: str) -> FDRHeads:
        """The heads of a decoder of `layers` layers, with fresh weights."""
        return FDRHeads(self, layers, width, classes, act)


class State(NamedTuple):
    """What the layers hand on: boxes that all offsets are measured from, summed edge logits, the last hidden state."""

    pre: Predictions | None
    anchors: Tensor
    edges: Tensor
    hidden: Tensor


class FDRHeads(nn.Module):
    """One box head, score head and quality head per layer, and a plain box head that fixes the first boxes."""

    W: Tensor

    def __init__(self, spec: FDR, layers: int, width: int, classes: int, act: str) -> None:
        super().__init__()
        self.scale = spec.scale
        self.register_buffer("W", weighting(spec.bins, spec.up, spec.scale), persistent=False)  # (R + 1,)
        self.first = box_head(width, 4, act)
        self.box = nn.ModuleList(box_head(width, 4 * (spec.bins + 1), act) for _ in range(layers))
        self.score = nn.ModuleList(score_head(width, classes) for _ in range(layers))
        self.quality = nn.ModuleList(Quality(spec, act) for _ in range(layers))

    def begin(self, hidden: Tensor, boxes: Tensor) -> State:
        """The first boxes, from the first layer's `hidden` (B, Q, D) and reference `boxes` (B, Q, 4)."""
        first = (full(self.first(hidden)) + inverse_sigmoid(boxes)).sigmoid()
        pre = Predictions(self.score[0](hidden), first) if self.training else None
        return State(pre, first.detach(), torch.zeros_like(first[..., None]), torch.zeros_like(hidden))

    def forward(
        self, layer: int, hidden: Tensor, boxes: Tensor, state: State | None, answer: bool
    ) -> tuple[Predictions | None, Tensor, State]:
        """What a layer predicts, if asked to `answer`; its boxes as the next layer's reference; and the next state.

        Edge logits add up over the layers with their gradients; references, anchors and hidden states pass without.
        """
        state = state or self.begin(hidden, boxes)
        edges = self.box[layer](hidden + state.hidden)
        edges = edges.reshape(*state.edges.shape[:3], len(self.W))  # (B, Q, 4 (R + 1)) -> (B, Q, 4, R + 1)
        edges = edges + state.edges
        chance = edges.softmax(-1)
        boxes = decode(state.anchors, (chance * full(self.W)).sum(-1), self.scale)
        preds = None
        if answer:
            logits = self.score[layer](hidden) + self.quality[layer](chance.to(hidden.dtype))
            preds = Predictions(logits, boxes, edges, state.anchors)
        return preds, boxes.detach(), state._replace(edges=edges, hidden=hidden.detach())

    def deploy(self, asked: int) -> None:
        """Drop what only training needs: what comes after layer `asked`, and the score and quality heads before it."""
        self.box, self.score, self.quality = (x[: asked + 1] for x in (self.box, self.score, self.quality))
        for i in range(asked):
            self.score[i] = self.quality[i] = nn.Identity()


@dataclass(frozen=True)
class LookForwardTwice:
    """Every layer moves the boxes by four numbers, and learns from how the next layer's box turns out as well.

    Source: DINO 3.5; RT-DETR trains so, and RT-DETRv2.
    """

    def build(self, layers: int, width: int, classes: int, act: str) -> DeltaHeads:
        """The heads of a decoder of `layers` layers, with fresh weights."""
        return DeltaHeads(layers, width, classes, act)


class Previous(NamedTuple):
    """What a layer hands on: its boxes with their gradient. Nothing is predicted before the first layer."""

    boxes: Tensor
    pre: None = None


class DeltaHeads(nn.Module):
    """One box head and one score head per layer."""

    def __init__(self, layers: int, width: int, classes: int, act: str) -> None:
        super().__init__()
        self.box = nn.ModuleList(box_head(width, 4, act) for _ in range(layers))
        self.score = nn.ModuleList(score_head(width, classes) for _ in range(layers))

    def forward(
        self, layer: int, hidden: Tensor, boxes: Tensor, state: Previous | None, answer: bool
    ) -> tuple[Predictions | None, Tensor, Previous]:
        """What a layer predicts, if asked to `answer`; its boxes as the next layer's reference; and the next state.

        The predicted boxes are those same boxes, but measured from the previous layer's with their gradient.
        """
        delta = full(self.box[layer](hidden))  # (B, Q, 4)
        moved = (delta + inverse_sigmoid(boxes)).sigmoid()
        preds = None
        if answer:
            twice = moved if state is None else (delta + inverse_sigmoid(state.boxes)).sigmoid()
            preds = Predictions(self.score[layer](hidden), twice)
        return preds, moved.detach(), Previous(moved)

    def deploy(self, asked: int) -> None:
        """Drop the heads that come after layer `asked`; those before it stay, as published."""
        self.box, self.score = self.box[: asked + 1], self.score[: asked + 1]


class Quality(nn.Module):
    """Turns how sharp the four edges' distributions are into a correction of the class logits (as GFLv2 does)."""

    def __init__(self, spec: FDR, act: str) -> None:
        super().__init__()
        self.top = spec.top
        self.reg_conf = MLP(4 * (spec.top + 1), spec.hidden, 1, act=act)
        zero_(self.reg_conf.layers[-1])

    def forward(self, chance: Tensor) -> Tensor:
        """chance (B, Q, 4, R + 1) -> (B, Q, 1)."""
        best = chance.topk(self.top, -1).values
        return self.reg_conf(torch.cat([best, best.mean(-1, keepdim=True)], -1).flatten(2))
