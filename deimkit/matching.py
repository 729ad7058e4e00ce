"""Who answers for what: queries are assigned to targets, and the layers pool their answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.errors import NonFiniteError
from deimkit.structures import Match, Output, Targets

CELLS = 2**20  # costs worked out at once: bounds the memory that a crowded batch takes
ALONE = 2**20  # costs up to which one thread is done before several have come to terms


class Matcher(Protocol):
    """Says which query answers for which target: one `Match` per output, on any device."""

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """Match all outputs that share this matcher, of any numbers of queries, in one go."""
        ...


@dataclass(frozen=True)
class Hungarian:
    """One query per target at the least total cost; where an image has more targets than queries, some go without.

    cls, l1, giou weigh the three parts of a pair's cost; alpha, gamma shape the focal class cost.
    Source: DETR Eq. 1 with the class cost of Deformable-DETR; the weights are RT-DETR's and D-FINE's.
    """

    cls: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """One `Match` per output, on the CPU, where assignments are solved; sorted by image, then target.

        Raises `NonFiniteError` naming the output and the image whose cost is NaN or infinite.
        """
        order = targets.image.argsort(stable=True)
        queries = sum(output.preds.boxes.shape[1] for output in outputs)
        tables = [torch.empty(0, 2 + queries, device=order.device)]
        for rows in order.split(max(CELLS // max(queries, 1), 1)):
            cost = self.cost(outputs, targets, rows)
            known = torch.stack([targets.image[rows], rows], 1).to(cost.dtype)
            tables.append(torch.cat([known, cost], 1))
        return _solve(outputs, torch.cat(tables).cpu().numpy())  # side by side: one copy from the device

    def cost(self, outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Tensor:
        """What it costs to give some targets to the queries of their own image.

        rows: (n,) of `targets`. Returns (n, T), T the queries of an image in all `outputs` together.
        """
        image, labels = targets.image[rows], targets.labels[rows]
        logits = torch.cat([output.preds.logits[image, :, labels] for output in outputs], 1)  # (n, T)
        boxes = torch.cat([output.preds.boxes for output in outputs], 1)  # (B, T, 4)
        l1, giou = _compare(widen(boxes), widen(targets.boxes[rows]), image)
        return self.cls * self._class_cost(widen(logits).sigmoid_()) + l1.mul_(self.l1) - giou.mul_(self.giou)

    def _class_cost(self, p: Tensor) -> Tensor:
        as_object = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log_()
        as_background = (1 - self.alpha) * p**self.gamma * -(1 - p).add_(1e-8).log_()
        return as_object.sub_(as_background)


def _compare(boxes: Tensor, wanted: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and GIoU of every target with every query of its image.

    boxes (B, T, 4), wanted (n, 4), image (n,) -> (n, T) each. The GIoU of `boxes.iou_giou`, but for a pair of boxes
    without area, which gets -1; laid out coordinate first and worked out in place, several times as fast.
    """
    l1 = _columns(boxes, image).sub_(wanted.T[..., None]).abs_().sum(0)
    low, high = _columns(cxcywh_to_xyxy(boxes), image).chunk(2)  # 2 x (2, n, T): x, then y
    u, v = cxcywh_to_xyxy(wanted).T[..., None].chunk(2)  # 2 x (2, n, 1)
    tiny = torch.finfo(boxes.dtype).tiny
    both = torch.mul(*(high - low)).add_(torch.mul(*(v - u)))
    inter = torch.mul(*torch.minimum(high, v).sub_(torch.maximum(low, u)).clamp_(min=0))
    hull = torch.mul(*torch.maximum(high, v).sub_(torch.minimum(low, u))).clamp_(min=tiny)
    union = both.sub_(inter)
    covered = union / hull
    return l1, inter.div_(union.clamp_(min=tiny)).add_(covered).sub_(1)


def _columns(boxes: Tensor, image: Tensor) -> Tensor:
    """The queries that each target may have, coordinate by coordinate. (B, T, 4), (n,) -> (4, n, T)."""
    return boxes.movedim(-1, 0).contiguous().index_select(1, image)


def _solve(outputs: Sequence[Output], table: NDArray[np.float32]) -> list[Match]:
    """The cheapest assignment in every image.

    table (N, 2 + T), by image: the image of a target, its row in `Targets`, then what it costs each query.
    """
    image, target, cost = *table[:, :2].T.astype(np.int64), table[:, 2:]
    images = list(pairwise([*np.flatnonzero(np.diff(image, prepend=-1)), len(image)]))  # first and last row of each
    queries = list(pairwise(accumulate([output.preds.boxes.shape[1] for output in outputs], initial=0)))
    finite = np.isfinite(cost)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        name = next(output.name for output, (_, end) in zip(outputs, queries, strict=True) if column < end)
        raise NonFiniteError(
            f"Predictions to match must be finite; those of output {name!r} are not in image {image[row]} of the "
            "batch. Skip the batch, or go back to the last good checkpoint."
        )

    def solve(columns: tuple[int, int]) -> Match:
        pairs = [np.empty((2, 0), np.int64)]
        for start, end in images:
            row, query = linear_sum_assignment(cost[start:end, slice(*columns)])
            pairs.append(np.stack([row + start, query]))
        row, query = np.concatenate(pairs, 1)
        return Match(*map(torch.from_numpy, (image[row], query, target[row])))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # scipy lets go of the interpreter lock
        return list(pool.map(solve, queries) if cost.size > ALONE else map(solve, queries))


def union(matches: Iterable[Match]) -> Match:
    """GO-LSD's pooled match: what any layer matched, a query that is claimed twice going to its most frequent target.

    A target may keep several queries. Ties go to the lower row of `Targets`, so the result does not depend on the order
    of the layers. Sorted by image, then query. Source: D-FINE 4.2.
    """
    image, query, target = torch.cat([torch.stack(match) for match in matches] or [torch.empty(3, 0).long()], 1)
    queries, targets = (int(x.amax()) + 1 if len(x) else 1 for x in (query, target))
    pair, votes = ((image * queries + query) * targets + target).unique(return_counts=True)  # rising
    pair = pair[votes.argsort(descending=True, stable=True)]
    claim, order = (pair // targets).sort(stable=True)  # of the same query: most votes first, then the lowest target
    first = torch.ones_like(claim, dtype=torch.bool)
    first[1:] = claim[1:] != claim[:-1]
    claim, target = claim[first], pair[order][first] % targets
    return Match(claim // queries, claim % queries, target)


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 if it was narrower: costs and losses are float32 islands; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
