"""How wrong is it: each loss is one small class that turns matched pairs into one number per output.

To add a loss, write a frozen dataclass: its `name`, its `weight`, whether it follows the pooled match (`union`), which
outputs it speaks about (`applies`), and the formula, from `Pairs` to (K,). Put it into `Criterion.losses`; that is all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy, iou_giou
from deimkit.distribution import encode, weighting
from deimkit.matching import compare, largest, widen
from deimkit.ranks import ALONE
from deimkit.structures import Match, Output, Targets


@dataclass
class Pairs:
    """What a loss sees: the matched pairs of K outputs in one flat table of M rows, output after output.

    outputs, matches: K of each; outputs may differ in their numbers of queries. labels: (M,). boxes, wanted: (M, 4),
    the predicted box and its target. iou, giou: (M,), worked out once for all losses; a pair of boxes without area has
    IoU 0, GIoU -1 and no gradient. count: (K,), what a sum over pairs is divided by. portion: how much of the whole
    batch this call stands for. normal: how many of the normal queries are matched, and how many there are. everywhere:
    sums a tensor over the processes that share the batch. Numbers are float32 (float64 if the predictions are).
    """

    outputs: list[Output]
    matches: list[Match]
    labels: Tensor
    boxes: Tensor
    wanted: Tensor
    iou: Tensor
    giou: Tensor
    count: Tensor
    portion: float
    normal: tuple[int, int]
    everywhere: Callable[[Tensor], Tensor] = ALONE.sum

    @staticmethod
    def of(
        outputs: list[Output],
        matches: list[Match],
        targets: Targets,
        count: list[float],
        portion: float = 1.0,
        normal: tuple[int, int] = (0, 0),
        everywhere: Callable[[Tensor], Tensor] = ALONE.sum,
    ) -> Pairs:
        """The pairs that `matches` make of `outputs` and `targets`, all three lists of length K."""
        target = torch.cat([match.target for match in matches])
        boxes, wanted = _gather(outputs, matches, "boxes"), widen(targets.boxes[target])
        iou, giou = _overlap(boxes, wanted)
        divisor = torch.tensor(count, dtype=boxes.dtype).to(boxes.device, non_blocking=True)
        labels = targets.labels[target]
        return Pairs(outputs, matches, labels, boxes, wanted, iou, giou, divisor, portion, normal, everywhere)

    def only(self, chosen: Sequence[int]) -> Pairs:
        """The pairs of some of the outputs."""
        if list(chosen) == list(range(len(self.outputs))):
            return self
        lengths = [len(match.query) for match in self.matches]

        def pick(values: Tensor) -> Tensor:
            parts = values.split(lengths)
            return torch.cat([parts[k] for k in chosen])

        return replace(
            self,
            outputs=[self.outputs[k] for k in chosen],
            matches=[self.matches[k] for k in chosen],
            labels=pick(self.labels),
            boxes=pick(self.boxes),
            wanted=pick(self.wanted),
            iou=pick(self.iou),
            giou=pick(self.giou),
            count=torch.stack([self.count[k] for k in chosen]),
        )

    def gather(self, field: str) -> Tensor:
        """A field of the predictions at every pair: "edges" -> (M, 4, R + 1)."""
        return _gather(self.outputs, self.matches, field)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over each output's pairs. (M,) -> (K,)."""
        runs = [(m, len(list(run))) for m, run in groupby(len(match.query) for match in self.matches)]
        parts = values.split([m * k for m, k in runs])
        return torch.cat([part.reshape(k, m).sum(1) for (m, k), part in zip(runs, parts, strict=True)])

    def runs(self, key: Callable[[Output], object]) -> Iterator[Pairs]:
        """The pairs of neighbouring outputs that agree in `key`, and so can be stacked."""
        start = 0
        for _, run in groupby(self.outputs, key):
            end = start + len(list(run))
            yield self.only(range(start, end))
            start = end

    def stack(self, field: str) -> Tensor:
        """A field of all predictions, a fresh tensor: "logits" -> (K, B, Q, C)."""
        return widen(torch.stack([getattr(output.preds, field) for output in self.outputs]))

    def places(self) -> Tensor:
        """Where in a stack the pairs are: output, image and query as one number. (M,) in [0, K * B * Q)."""
        images, queries, _ = self.outputs[0].preds.boxes.shape
        return torch.cat([(k * images + match.image) * queries + match.query for k, match in enumerate(self.matches)])


def _gather(outputs: Iterable[Output], matches: Iterable[Match], field: str) -> Tensor:
    rows = []
    for output, match in zip(outputs, matches, strict=True):
        values = getattr(output.preds, field)  # (B, Q, ...)
        rows.append(values.flatten(0, 1).index_select(0, match.image * values.shape[1] + match.query))
    return widen(torch.cat(rows))


def _overlap(boxes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (M,) of pairs of boxes (M, 4); where neither has an area, 0 and -1 without gradient."""

    def area(of: Tensor) -> Tensor:
        corners = cxcywh_to_xyxy(of.detach())
        return (corners[:, 2:] - corners[:, :2]).prod(-1)

    hollow = area(boxes) + area(wanted) == 0
    iou, giou = iou_giou(boxes, torch.where(hollow[:, None], 1.0, wanted))
    return iou.masked_fill(hollow, 0.0), giou.masked_fill(hollow, -1.0)


@dataclass(frozen=True)
class Loss(ABC):
    """What all losses are: a name for the log, a weight, and a formula.

    union: whether the normal queries answer for the pooled match (GO-LSD) instead of their own layer's.
    """

    weight: float = 1.0
    name: ClassVar[str]
    union: ClassVar[bool] = True

    def applies(self, output: Output) -> bool:
        """Whether this loss has something to say about an output; the others get no term."""
        return True

    @abstractmethod
    def __call__(self, pairs: Pairs) -> Tensor:
        """One unweighted value per output. -> (K,)."""


@dataclass(frozen=True)
class ClassLoss(Loss):
    """A class loss is two expressions: how likely a class should be, and how much that matters.

    Every query has a score for every class. `one` is 1 where a query is matched to a target of that class, and 0
    elsewhere; `q` is their `quality` there, the IoU, and 0 elsewhere. Each entry costs weight * BCE(p, target).
    Almost everywhere `one` and `q` are 0: that background is summed over whole outputs at once, and only the M matched
    entries are set right one by one. (A match that gives a query two targets of one class counts its entry twice.)
    """

    union: ClassVar[bool] = False

    @abstractmethod
    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        """The two expressions; the target must be 0 where `one` and `q` are. Detach p to pass no gradient."""

    def quality(self, pairs: Pairs) -> Tensor:
        """How good every pair is, of outputs that can be stacked; passes no gradient. -> (M,)."""
        return pairs.iou.detach()

    def __call__(self, pairs: Pairs) -> Tensor:
        """The weighted cross-entropy of all queries and classes. -> (K,)."""
        values = []
        for part in pairs.runs(lambda output: output.preds.logits.shape):
            z = part.stack("logits")  # (k, B, Q, C)
            background = self.entries(z, 0.0, 0.0).flatten(1).sum(1)
            z = z.flatten().index_select(0, part.places() * z.shape[-1] + part.labels)  # (M,)
            matched = self.entries(z, 1.0, self.quality(part)) - self.entries(z, 0.0, 0.0)
            values.append((background + part.sum(matched)) / part.count)
        return torch.cat(values)

    def entries(self, z: Tensor, one: float, q: Tensor | float) -> Tensor:
        """What entries of logits z cost, all of them matched (`one` 1) with quality q, or all background (0, 0)."""
        target, weight = self.target_and_weight(z.sigmoid(), one, q)
        cost = F.softplus(z)  # BCE with target 0
        return weight * (cost - target * z if one else cost)


@dataclass(frozen=True)
class Focal(ClassLoss):
    """Easy entries count little, and so does the huge background. Source: Lin et al., "Focal Loss", Eq. 5."""

    alpha: float = 0.25
    gamma: float = 2.0
    name: ClassVar[str] = "focal"

    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return one, self.alpha * one * (1 - p) ** self.gamma + (1 - self.alpha) * (1 - one) * p**self.gamma


@dataclass(frozen=True)
class VFL(ClassLoss):
    """A score should tell how well the box fits, and good boxes count most. Source: VarifocalNet Eq. 2."""

    alpha: float = 0.75
    gamma: float = 2.0
    name: ClassVar[str] = "vfl"

    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return q, self.alpha * (1 - one) * p.detach() ** self.gamma + q


@dataclass(frozen=True)
class MAL(ClassLoss):
    """As VFL, but a badly placed box counts in full too. alpha: weight of the background. Source: DEIM Eq. 4."""

    alpha: float = 1.0
    gamma: float = 1.5
    name: ClassVar[str] = "mal"

    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return q**self.gamma, self.alpha * (1 - one) * p.detach() ** self.gamma + one


@dataclass(frozen=True)
class QFL(ClassLoss):
    """Quality focal loss: a score should tell how well the box fits, and counts by how far it is off, object or not.

    The weight passes gradient too, as Focal's does. gamma: the paper's beta. Source: Li et al., "Generalized Focal
    Loss", Eq. 2.
    """

    gamma: float = 2.0
    name: ClassVar[str] = "qfl"

    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return q, (q - p).abs() ** self.gamma


@dataclass(frozen=True)
class PSL(ClassLoss):
    """Position-supervised loss: as QFL, but a score should tell how well the box fits beside the best of its image.

    The target is the squared IoU, rescaled image by image and output by output, so that the best pair aims at the
    largest IoU that any query has with any target that is matched (the paper's choice for 900 queries), or, with
    `to_one`, at 1 (the paper's for 300, and what the released code always does); never scaled down. alpha: weight of
    the matched entries, as in the released code; those of the background have 1 - alpha. The weight passes gradient.
    Source: Stable-DINO, "position-supervised loss".
    """

    weight: float = 6.0
    alpha: float = 0.25
    gamma: float = 2.0
    to_one: bool = False
    name: ClassVar[str] = "psl"

    def target_and_weight(self, p: Tensor, one: float, q: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        return q, (self.alpha * one + (1 - self.alpha) * (1 - one)) * (q - p).abs() ** self.gamma

    def quality(self, pairs: Pairs) -> Tensor:
        """The squared IoU of every pair, rescaled. -> (M,)."""
        images, queries, _ = pairs.outputs[0].preds.boxes.shape
        group, groups = pairs.places() // queries, len(pairs.outputs) * images  # output and image as one number
        fit = pairs.iou.detach() ** 2
        aim: Tensor | float = 1.0
        if not self.to_one:
            boxes = pairs.stack("boxes").detach().flatten(0, 1)  # (K * B, Q, 4)
            aim = largest(compare(boxes, pairs.wanted, group)[1], group, groups)
        return fit * (aim / (largest(fit[:, None], group, groups) + 1e-8)).clamp(min=1)


@dataclass(frozen=True)
class L1(Loss):
    """How far centre, width and height are off, in fractions of the image. Source: DETR Eq. 2."""

    weight: float = 5.0
    name: ClassVar[str] = "l1"

    def __call__(self, pairs: Pairs) -> Tensor:
        return pairs.sum((pairs.boxes - pairs.wanted).abs().sum(-1)) / pairs.count


@dataclass(frozen=True)
class GIoU(Loss):
    """How little the boxes overlap, or how far apart they are. Source: Rezatofighi et al., Algorithm 1."""

    weight: float = 2.0
    name: ClassVar[str] = "giou"

    def __call__(self, pairs: Pairs) -> Tensor:
        return pairs.sum(1 - pairs.giou) / pairs.count


@dataclass(frozen=True)
class FGL(Loss):
    """Fine-grained localisation: an edge's probability should lie on the two bins beside the true edge.

    Each pair counts by its IoU. up, scale: of W(n), the detector's. Source: D-FINE 4.1.
    """

    weight: float = 0.15
    up: float = 0.5
    scale: float = 4.0
    name: ClassVar[str] = "fgl"

    def applies(self, output: Output) -> bool:
        return output.preds.edges is not None

    def __call__(self, pairs: Pairs) -> Tensor:
        edges, anchors = pairs.gather("edges"), pairs.gather("anchors").detach()  # (M, 4, R + 1), (M, 4)
        W = weighting(edges.shape[-1] - 1, self.up, self.scale, edges.dtype).to(edges.device, non_blocking=True)
        left, right = encode(anchors, pairs.wanted, W, self.scale)
        logp = edges.log_softmax(-1).gather(-1, torch.stack([left, left + 1], -1))  # (M, 4, 2)
        nll = -torch.lerp(logp[..., 0], logp[..., 1], right).sum(-1)  # (M,)
        return pairs.sum(nll * pairs.iou.detach()) / pairs.count


@dataclass(frozen=True)
class DDF(Loss):
    """Decoupled distillation focal loss: every layer learns the final one's distributions, so that boxes improve early.

    A matched query counts by its IoU, any other by the teacher's confidence. The means over the two kinds are blended
    by the square roots of how many normal queries are of either kind. T: temperature. Where a layer equals its teacher
    (as all do before the first step) the value is 0 and the term is still there. Source: D-FINE 4.2.
    """

    weight: float = 1.5
    T: float = 5.0
    name: ClassVar[str] = "ddf"

    def applies(self, output: Output) -> bool:
        return output.preds.edges is not None and output.last is not None

    def __call__(self, pairs: Pairs) -> Tensor:
        matched, queries = pairs.normal
        blend = matched**0.5 / max(matched**0.5 + (queries - matched) ** 0.5, 1.0)
        values = []
        for part in pairs.runs(lambda output: id(output.last)):
            teacher, k, place = part.outputs[0].last, len(part.outputs), part.places()
            assert teacher is not None and teacher.edges is not None, "a layer with edges has a final layer with edges"
            confidence = widen(teacher.logits.detach()).amax(-1).sigmoid().flatten()  # (B * Q,)
            trust = confidence.repeat(k).index_put_((place,), part.iou.detach()).view(k, -1)
            hit = torch.zeros_like(trust).view(-1).index_fill_(0, place, 1.0).view(k, -1)
            hits, all_queries = pairs.everywhere(torch.stack([hit.sum(1), torch.ones_like(hit).sum(1)]))[..., None]
            share = blend * hit / hits.clamp(min=1) + (1 - blend) * (1 - hit) / (all_queries - hits).clamp(min=1)
            divergence = self.divergence(part.stack("edges"), widen(teacher.edges.detach()))  # (k, B, Q)
            values.append((divergence.flatten(1) * trust * share).sum(1))
        return torch.cat(values) * pairs.portion

    def divergence(self, students: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || student), softened by T, as a mean over the four edges. (k, B, Q, 4, R + 1) -> (k, B, Q).

        Takes over `students`: it is overwritten.
        """
        said, taught = students.div_(self.T).log_softmax(-1), (teacher / self.T).log_softmax(-1)
        minus_kl = (said - taught).mul_(taught.exp()).sum(-1)  # exactly 0 where the two agree
        return minus_kl.mean(-1) * -(self.T**2)
