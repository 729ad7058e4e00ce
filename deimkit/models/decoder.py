"""The decoder: one layer, and one loop in which queries look at each other, at the image, and improve their boxes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deimkit.models.attention import DeformableAttention, Memory, ProjectedAttention, remember
from deimkit.models.layers import LARGEST_HALF, MLP, ConvNorm, activation
from deimkit.models.refine import DeltaHeads, FDRHeads
from deimkit.structures import Predictions


@dataclass(frozen=True)
class Decoder:
    """The numbers of one decoder: its layers, their width D, the feed-forward width, points per level, and heads.

    projected: every layer projects what it reads, as in RT-DETRv2; D-FINE's read the memory as it is. gated: what a
    layer sees comes in through a gate (D-FINE); False adds it (RT-DETRv2). position: hidden widths, in multiples of D,
    of the MLP that turns a box into its position code. discrete: see `DeformableAttention`. asked: the layer whose
    answer counts in evaluation, the last one it then computes; None is the last there is.
    """

    layers: int
    width: int
    ffn: int
    points: tuple[int, ...]
    heads: int = 8
    projected: bool = False
    gated: bool = True
    position: tuple[int, ...] = (2,)
    discrete: bool = False
    asked: int | None = None

    def build(self, inputs: int, act: str) -> TransformerDecoder:
        """The module for one encoder map of `inputs` channels per entry of `points`, with fresh weights."""
        return TransformerDecoder(self, inputs, act)


class TransformerDecoder(nn.Module):
    """Layers that start as copies of one another, as published."""

    def __init__(self, spec: Decoder, inputs: int, act: str) -> None:
        super().__init__()
        self.heads, self.gated = None if spec.projected else spec.heads, spec.gated
        self.asked = spec.layers - 1 if spec.asked is None else spec.asked
        self.input_proj = nn.ModuleList(projection(inputs, spec.width, always=spec.projected) for _ in spec.points)
        self.position = MLP(4, *(times * spec.width for times in spec.position), spec.width, act=act)
        for linear in self.position.layers[:2]:
            nn.init.xavier_uniform_(linear.weight)  # type: ignore[arg-type]
        layer = DecoderLayer(spec, act)
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(spec.layers))

    def remember(self, maps: list[Tensor]) -> Memory:
        """The encoder's maps, fine to coarse, as every layer will read them."""
        projected = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        return remember(projected, self.heads)

    def forward(
        self, hidden: Tensor, boxes: Tensor, memory: Memory, blocked: Tensor | None, refine: FDRHeads | DeltaHeads
    ) -> tuple[list[Predictions], Predictions | None]:
        """What each layer predicts for queries of content (B, Q, D) and reference boxes (B, Q, 4) cxcywh in [0, 1].

        blocked: (Q, Q) True where a query (row) may not look at another (column). In evaluation only one layer is
        asked, and none after it is computed. The second value is what was predicted before any refinement, where
        `refine` predicts that.
        """
        answers: list[Predictions] = []
        state: Any = None  # the refinement's own
        for i, layer in enumerate(self.layers if self.training else self.layers[: self.asked + 1]):
            position = self.position(boxes.to(hidden.dtype))
            position = position.clamp(-10, 10) if self.gated else position
            hidden = layer(hidden, position, boxes, memory, blocked)
            preds, boxes, state = refine(i, hidden, boxes, state, answer=self.training or i == self.asked)
            if preds is not None:
                answers.append(preds)
        return answers, state and state.pre

    def deploy(self) -> None:
        """Drop the layers that come after the one that is asked."""
        self.layers = self.layers[: self.asked + 1]


def projection(inputs: int, width: int, always: bool) -> nn.Module:
    """A map to the decoder's width, where it does not have it already, or `always`."""
    if inputs == width and not always:
        return nn.Identity()
    project = ConvNorm(inputs, width, 1)
    nn.init.xavier_uniform_(project.conv.weight)
    return project


class DecoderLayer(nn.Module):
    """Self attention, deformable attention, feed-forward; post-norm (RT-DETR; D-FINE where it is gated)."""

    def __init__(self, spec: Decoder, act: str) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(spec.width, spec.heads, batch_first=True)
        self.norm1 = nn.LayerNorm(spec.width)
        attention = ProjectedAttention if spec.projected else DeformableAttention
        self.cross_attn = attention(spec.width, spec.heads, spec.points, spec.discrete)
        self.gated = spec.gated
        if spec.gated:
            self.gateway = Gate(spec.width)
        else:
            self.norm2 = nn.LayerNorm(spec.width)
        self.linear1 = nn.Linear(spec.width, spec.ffn)
        self.act = activation(act)
        self.linear2 = nn.Linear(spec.ffn, spec.width)
        self.norm3 = nn.LayerNorm(spec.width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, hidden: Tensor, position: Tensor, boxes: Tensor, memory: Memory, blocked: Tensor | None
    ) -> Tensor:
        """hidden and its position code (B, Q, D), reference boxes (B, Q, 4) -> hidden (B, Q, D)."""
        query = hidden + position
        seen, _ = self.self_attn(query, query, hidden, attn_mask=blocked, need_weights=False)
        hidden = self.norm1(hidden + seen)
        seen = self.cross_attn(hidden + position, boxes, memory)
        hidden = self.gateway(hidden, seen) if self.gated else self.norm2(hidden + seen)
        hidden = hidden + self.linear2(self.act(self.linear1(hidden)))
        return self.norm3(hidden.clamp(-LARGEST_HALF, LARGEST_HALF))


class Gate(nn.Module):
    """Mixes what a query knew with what it has just seen, each channel in its own two proportions (target gating)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, known: Tensor, seen: Tensor) -> Tensor:
        keep, take = self.gate(torch.cat([known, seen], -1)).sigmoid().chunk(2, -1)
        return self.norm(keep * known + take * seen)
