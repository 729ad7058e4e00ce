"""Who answers for what: queries are assigned to targets, and the layers pool their answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.errors import NonFiniteError
from deimkit.structures import Match, Output, Targets

CELLS = 2**20  # costs worked out at once: bounds the memory that a crowded batch takes
ALONE = 2**20  # costs up to which one thread is done before several have come to terms

Floats = NDArray[np.floating[Any]]


class Matcher(Protocol):
    """Says which query answers for which target: one `Match` per output, on any device."""

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """Match all outputs that share this matcher, of any numbers of queries, in one go."""
        ...


class Costs(NamedTuple):
    """What it costs to give n targets to the T queries of their image, and why: tables of (n, T) without a graph.

    parts: by name, already weighted, so that they add up to `total`. iou: of every pair, in [0, 1].
    """

    parts: dict[str, Tensor]
    iou: Tensor

    @property
    def total(self) -> Tensor:
        """The cost that the assignment looks at."""
        return reduce(torch.add, self.parts.values())


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

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """One `Match` per output, on the CPU, where assignments are solved; sorted by image, then target.

        Raises `NonFiniteError` naming the output and the image whose cost is NaN or infinite.
        """
        return _match(outputs, targets, lambda rows: [self.cost(outputs, targets, rows)], linear_sum_assignment)

    def cost(self, outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Tensor:
        """What it costs to give some targets to the queries of their own image: the total of `costs`. -> (n, T)."""
        return self.costs(outputs, targets, rows).total

    @torch.no_grad()
    def costs(self, outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Costs:
        """The parts "class", "l1" and "giou" of what it costs to give some targets to the queries of their own image.

        rows: (n,) of `targets`. Tables are (n, T), T the queries of an image in all `outputs` together.
        """
        image = targets.image[rows]
        l1, iou, giou = compare(_boxes(outputs), widen(targets.boxes[rows]), image)
        score = self._score(_logits(outputs, targets, rows).sigmoid_(), giou, image, outputs)
        cls = self._class_cost(score).mul_(self.cls)
        return Costs({"class": cls, "l1": l1.mul_(self.l1), "giou": giou.mul_(-self.giou)}, iou)

    def _score(self, p: Tensor, giou: Tensor, image: Tensor, outputs: Sequence[Output]) -> Tensor:
        """What the class cost takes for the probability that a query shows a target. All tables (n, T), image (n,)."""
        return p

    def _class_cost(self, p: Tensor) -> Tensor:
        as_object = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log_()
        as_background = (1 - self.alpha) * p**self.gamma * -(1 - p).add_(1e-8).log_()
        return as_object.sub_(as_background)


@dataclass(frozen=True)
class PositionModulated(Hungarian):
    """As `Hungarian`, but a score counts only as far as the box fits, so that layers agree on who answers for what.

    The class cost takes p * ((GIoU + 1) / 2) ** power for p. rescale: these factors grow until the best pair of an
    image and output has 1, as in the released code, though not in the paper; `rows` must then hold all targets of an
    image. Every pair has a factor of its own (the released matcher keeps one per query and class). It modulates the
    matching alone, never a loss. Source: Stable-DINO, "position-modulated cost".
    """

    power: float = 0.5
    rescale: bool = True

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """One `Match` per output, as `Hungarian` gives it."""

        def look(rows: Tensor) -> list[Tensor]:
            return [self.cost(outputs, targets, rows)]

        return _match(outputs, targets, look, linear_sum_assignment, whole=self.rescale)

    def _score(self, p: Tensor, giou: Tensor, image: Tensor, outputs: Sequence[Output]) -> Tensor:
        fit = ((giou + 1) / 2) ** self.power
        if self.rescale:
            for part in fit.split([output.preds.boxes.shape[1] for output in outputs], 1):
                best = largest(part, image, len(outputs[0].preds.boxes))
                part.mul_((1 / (best + 1e-8)).clamp(min=1)[:, None])
        return p * fit


@dataclass(frozen=True)
class SimOTA:
    """As many queries per target as its best boxes add up to: one-to-many, with a number that grows with training.

    A target takes its k cheapest queries, k being the sum of its `candidates` largest IoUs, rounded down, but at least
    1. A query that several take goes to the cheapest target of all; so a target may end with none. Ties, as among
    targets of one class that a query does not touch, go to the lower row, and to the lower query. A pair costs
    cls * BCE over all classes - iou * log(IoU), and `outside` more if the query lies outside of the target's box.
    What differs from anchor points: a query lies where its box has its centre; it has no stride, so there is no centre
    region of 2.5 strides; it has no objectness, so its class score stands alone; and none is left out beforehand, as
    no grid of points grants every target one nearby. Losses are still divided by targets, not by matched queries.
    Source: YOLOX, "SimOTA", with the numbers of its released code.
    """

    candidates: int = 10
    cls: float = 1.0
    iou: float = 3.0
    outside: float = 1e5

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """One `Match` per output, on the CPU; sorted by image, then target, then query.

        Raises `NonFiniteError` naming the output and the image whose cost is NaN or infinite.
        """

        def look(rows: Tensor) -> list[Tensor]:
            costs = self.costs(outputs, targets, rows)
            return [costs.total, costs.iou]

        return _match(outputs, targets, look, self._assign)

    def cost(self, outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Tensor:
        """What it costs to give some targets to the queries of their own image: the total of `costs`. -> (n, T)."""
        return self.costs(outputs, targets, rows).total

    @torch.no_grad()
    def costs(self, outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Costs:
        """The parts "class", "iou" and "outside" of what it costs to give some targets to the queries of their image.

        rows: (n,) of `targets`. Tables are (n, T), T the queries of an image in all `outputs` together.
        """
        image, boxes, wanted = targets.image[rows], _boxes(outputs), widen(targets.boxes[rows])
        iou = compare(boxes, wanted, image)[1]
        no_class = torch.cat([F.softplus(widen(output.preds.logits)).sum(-1) for output in outputs], 1)  # (B, T)
        cls = no_class[image].sub_(_logits(outputs, targets, rows))  # BCE with the target's class: one logit less
        off = _columns(boxes[..., :2], image).sub_(wanted[:, :2].T[..., None]).abs_()  # (2, n, T)
        outside = (off >= wanted[:, 2:].T[..., None] / 2).any(0).to(iou.dtype)
        far = (iou + 1e-8).log_().mul_(-self.iou)
        return Costs({"class": cls.mul_(self.cls), "iou": far, "outside": outside.mul_(self.outside)}, iou)

    def _assign(self, cost: Floats, iou: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and queries of the pairs of one image and output, whose tables are (n, Q)."""
        k = np.sort(iou, 1)[:, -self.candidates :].sum(1).astype(int).clip(min=1)
        claims = np.zeros(cost.shape, bool)
        np.put_along_axis(claims, cost.argsort(1, kind="stable"), np.arange(cost.shape[1]) < k[:, None], 1)
        several = claims.sum(0) > 1
        claims[:, several] = np.arange(len(cost))[:, None] == cost[:, several].argmin(0)
        row, query = claims.nonzero()
        return row, query


def _logits(outputs: Sequence[Output], targets: Targets, rows: Tensor) -> Tensor:
    """How every query of their image scores the class of some targets, a fresh tensor. -> (n, T)."""
    image, labels = targets.image[rows], targets.labels[rows]
    return widen(torch.cat([output.preds.logits[image, :, labels] for output in outputs], 1))


def _boxes(outputs: Sequence[Output]) -> Tensor:
    """The boxes of all outputs side by side. -> (B, T, 4)."""
    return widen(torch.cat([output.preds.boxes for output in outputs], 1))


def compare(boxes: Tensor, wanted: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 distance, IoU and GIoU of every target with every query of its image.

    boxes (B, T, 4), wanted (n, 4), image (n,) -> (n, T) each. As `boxes.iou_giou`, but a pair of boxes without area has
    IoU 0 and GIoU -1; laid out coordinate first and worked out in place, several times as fast.
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
    iou = inter.div_(union.clamp_(min=tiny))
    return l1, iou, covered.add_(iou).sub_(1)


def _columns(boxes: Tensor, image: Tensor) -> Tensor:
    """The queries that each target may have, coordinate by coordinate. (B, T, d), (n,) -> (d, n, T)."""
    return boxes.movedim(-1, 0).contiguous().index_select(1, image)


def largest(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """For each row of some values >= 0, the largest of all rows of its group. (n, Q), (n,) in [0, groups) -> (n,)."""
    best = F.pad(values, (1, 0)).amax(1)  # a 0 more, as there may be no queries
    return values.new_zeros(groups).scatter_reduce_(0, group, best, "amax")[group]


@torch.no_grad()
def _match(
    outputs: Sequence[Output],
    targets: Targets,
    look: Callable[[Tensor], list[Tensor]],
    assign: Callable[..., tuple[Any, Any]],
    whole: bool = False,
) -> list[Match]:
    """Look at some targets after others, then assign image by image on the CPU.

    look: rows of `targets`, of one image after another, to the tables (n, T) that `assign` needs, cost first.
    assign: those of one image and output to rows and queries. whole: no image is looked at in parts.
    """
    order = targets.image.argsort(stable=True)
    queries = sum(output.preds.boxes.shape[1] for output in outputs)
    size: int | list[int] = max(CELLS // max(queries, 1), 1)
    if whole and len(order) * queries > CELLS:
        size = targets.image.bincount().tolist()
    chunks, widths = [], list[int]()
    for rows in order.split(size):
        seen = look(rows)
        known = torch.stack([targets.image[rows], rows], 1).to(seen[0].dtype)
        chunks.append(torch.cat([known, *seen], 1))
        widths = [table.shape[1] for table in (known, *seen)]
    table = torch.cat(chunks).cpu().numpy()  # side by side: one copy from the device
    first, *tables = np.split(table, list(accumulate(widths[:-1])), 1)
    return _solve(outputs, first.astype(np.int64), tables, assign)


def _solve(
    outputs: Sequence[Output], known: NDArray[np.int64], tables: list[Floats], assign: Callable[..., tuple[Any, Any]]
) -> list[Match]:
    """What `assign` says of every image.

    known (N, 2), by image: the image of a target and its row in `Targets`. tables: (N, T) each, the first the cost.
    """
    (image, target), cost = known.T, tables[0]
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
            row, query = assign(*(table[start:end, slice(*columns)] for table in tables))
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
