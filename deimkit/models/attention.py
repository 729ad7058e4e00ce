"""Multi-scale deformable attention: every query looks at a few points around its box, on every level."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deimkit.models.layers import full

Shapes = tuple[tuple[int, int], ...]  # (height, width) of every level, fine to coarse


class Memory(NamedTuple):
    """What the encoder saw, as the decoder reads it.

    tokens: (B, L, D), the cells of all levels row by row. shapes: each level's (height, width). values: per level
    (B * H, D / H, h, w), the same numbers split by head, once for all layers; or nothing where every layer projects
    the tokens for itself.
    """

    tokens: Tensor
    shapes: Shapes
    values: list[Tensor]


def remember(maps: list[Tensor], heads: int | None) -> Memory:
    """The memory made of maps (B, D, h, w), fine to coarse, with values for so many heads, or without any."""
    tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
    shapes = tuple((x.shape[2], x.shape[3]) for x in maps)
    return Memory(tokens, shapes, [] if heads is None else split_heads(maps, heads))


def split_heads(maps: list[Tensor], heads: int) -> list[Tensor]:
    """Maps (B, D, h, w) as values (B * H, D / H, h, w), at least float32; head k owns the k-th slice of D."""
    return [full(x).reshape(x.shape[0] * heads, x.shape[1] // heads, *x.shape[2:]) for x in maps]


def sample(
    values: list[Tensor], locations: Tensor, weights: Tensor, points: tuple[int, ...], discrete: bool = False
) -> Tensor:
    """The weighted sum of what lies at the sampled points, (B, Q, D).

    values: per level (B * H, D / H, h, w). locations: (B, Q, H, P, 2) x and y as fractions of the image, the points of
    the finest level first. weights: (B, Q, H, P). points: points per level, summing to P. Bilinear, zero outside; or
    `discrete`: one cell each, chosen as in `cells`. Source: Deformable-DETR Eq. 3; RT-DETRv2.
    """
    b, q, h, p = weights.shape
    grid = (2 * locations - 1).permute(0, 2, 3, 1, 4).reshape(b * h, p, q, 2)  # in [-1, 1]
    share = weights.permute(0, 2, 3, 1).reshape(b * h, 1, p, q)
    seen = []
    for value, at, s in zip(values, grid.split(points, 1), share.split(points, 2), strict=True):
        found = look(value, cells(at, *value.shape[2:]) if discrete else at, "nearest" if discrete else "bilinear")
        seen.append((found * s).sum(2))  # points before queries: on CPUs twice as fast as the other way round
    return torch.stack(seen).sum(0).reshape(b, h * values[0].shape[1], q).transpose(1, 2)


def look(value: Tensor, grid: Tensor, mode: str) -> Tensor:
    """What lies at the points (N, P, Q, 2) of maps (N, D, h, w), zero outside: `grid_sample`, (N, D, P, Q).

    On a GPU its gradient is added up in any order, and torch refuses to take it where it is asked for deterministic
    algorithms; there the corners around a point are read one by one, for the same numbers up to rounding.
    """
    if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled():
        return corner_by_corner(value, grid, mode)
    return F.grid_sample(value, grid, mode=mode, align_corners=False)


def corner_by_corner(value: Tensor, grid: Tensor, mode: str) -> Tensor:
    """`grid_sample`, bilinear or nearest, by `index_select`, whose gradient torch adds up in order if it is asked to.

    Takes several times as long, and the memory of four times what it returns.
    """
    n, d, h, w = value.shape
    x, y = (((grid + 1) * grid.new_tensor([w, h]) - 1) / 2).unbind(-1)  # (N, P, Q); whole numbers are centres of cells
    rows = value.flatten(2).transpose(1, 2).reshape(n * h * w, d)
    first = torch.arange(n, device=value.device)[:, None, None] * (h * w)  # of each map's rows
    found = value.new_zeros(*x.shape, d)
    for column, across in beside(x, mode):
        for row, along in beside(y, mode):
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            cell = first + torch.where(inside, row * w + column, 0).long()
            corner = rows.index_select(0, cell.flatten()).view_as(found)
            found = found + corner * torch.where(inside, across * along, 0)[..., None]
    return found.permute(0, 3, 1, 2)


def beside(x: Tensor, mode: str) -> list[tuple[Tensor, Tensor]]:
    """The whole numbers that `x` lies between, or the "nearest" one, each with how much it counts."""
    if mode == "nearest":
        return [(x.round(), torch.ones_like(x))]
    low = x.floor()
    return [(low, low + 1 - x), (low + 1, x - low)]


def cells(grid: Tensor, height: int, width: int) -> Tensor:
    """The centres of the cells that RT-DETRv2's discrete sampling reads for points (..., 2) in [-1, 1].

    The cell is the one half a cell further right and down than the nearest, as published; beyond the border it is the
    last one. No gradient passes.
    """
    size = grid.new_tensor([width, height])
    index = ((grid + 1) / 2 * size + 0.5).trunc().clamp(min=0).minimum(size - 1)
    return (2 * index + 1) / size - 1


class DeformableAttention(nn.Module):
    """Queries choose where to look and how much each place counts; the values are the memory itself, unprojected.

    width: D. heads: H. points: sampling points per level. discrete: they are whole cells, and stay where they start
    (`cells`). Source: Deformable-DETR; RT-DETRv2 (points per level); D-FINE drops the value and output projections.
    """

    share: Tensor

    def __init__(self, width: int, heads: int, points: tuple[int, ...], discrete: bool = False) -> None:
        super().__init__()
        self.heads, self.points, self.discrete = heads, points, discrete
        self.sampling_offsets = nn.Linear(width, heads * sum(points) * 2)
        self.attention_weights = nn.Linear(width, heads * sum(points))
        share = torch.tensor([1 / n for n in points for _ in range(n)])
        self.register_buffer("share", share[:, None], persistent=False)  # (P, 1): one over the points of the level
        self.reset()
        self.sampling_offsets.requires_grad_(not discrete)

    def reset(self) -> None:
        """Start with head k looking in the k-th of H directions, point n of a level n steps away, and equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)  # (H, 2)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.cat([torch.arange(1, n + 1) for n in self.points])
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())  # (H, P, 2)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def forward(self, query: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        """query (B, Q, D) and its boxes (B, Q, 4) cxcywh as fractions of the image -> what it sees, (B, Q, D)."""
        locations, weights = self.aim(query, boxes)
        return sample(self.values(memory), locations, weights, self.points, self.discrete).to(query.dtype)

    def aim(self, query: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Where every head of every query looks, (B, Q, H, P, 2) as in `sample`, and how much it counts, (B, Q, H, P).

        The weights of a head add up to one over the points of all levels together.
        """
        b, q, heads, points = *query.shape[:2], self.heads, sum(self.points)
        offsets = self.sampling_offsets(query).reshape(b, q, heads, points, 2)
        weights = full(self.attention_weights(query)).reshape(b, q, heads, points).softmax(-1)
        boxes = boxes[:, :, None, None]  # (B, Q, 1, 1, 4)
        return boxes[..., :2] + full(offsets) * self.share * boxes[..., 2:] * 0.5, weights

    def values(self, memory: Memory) -> list[Tensor]:
        """What is read, per level (B * H, D / H, h, w)."""
        return memory.values


class ProjectedAttention(DeformableAttention):
    """Deformable attention whose layers each project what they read, and what they found (Deformable-DETR)."""

    def __init__(self, width: int, heads: int, points: tuple[int, ...], discrete: bool = False) -> None:
        super().__init__(width, heads, points, discrete)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        """As `DeformableAttention`, with the output projected."""
        return self.output_proj(super().forward(query, boxes, memory))

    def values(self, memory: Memory) -> list[Tensor]:
        """This layer's own projection of the tokens, per level (B * H, D / H, h, w)."""
        tokens = self.value_proj(memory.tokens).transpose(1, 2)  # (B, D, L)
        levels = zip(tokens.split([h * w for h, w in memory.shapes], 2), memory.shapes, strict=True)
        return split_heads([level.reshape(-1, level.shape[1], *shape) for level, shape in levels], self.heads)
