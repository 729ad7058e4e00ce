"""What a class loss asks of one score: its cost, its slope and its target, for a match of any quality."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.explore.layers import expect_classes
from deimkit.losses import MAL, PSL, QFL, VFL, ClassLoss, Focal, Pairs
from deimkit.models.detector import Detector
from deimkit.models.predict import predicting
from deimkit.structures import Batch, Match, Output, Predictions, Targets

P = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)  # the scores of a curve
Q = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)  # the IoUs of a curve
# With the numbers that their papers, or the code released with them, train with.
PUBLISHED: dict[str, ClassLoss] = {"MAL": MAL(), "VFL": VFL(), "QFL": QFL(), "Focal": Focal(), "PSL": PSL()}


def tuned(loss: ClassLoss, **numbers: float) -> ClassLoss:
    """The loss with other numbers (gamma, alpha), as far as it has them."""
    return replace(loss, **{name: value for name, value in numbers.items() if hasattr(loss, name)})


def entry(loss: ClassLoss, z: Tensor, quality: Tensor | float = 0.0, one: float = 1.0) -> tuple[Tensor, Tensor]:
    """What an entry of the table of scores costs, and how the cost changes with its logit z; both float64.

    quality: of the match (`quality_of`), of z's shape. one: 1 for a matched entry, 0 for the background, whose quality
    is 0.
    """
    z = z.detach().double().requires_grad_()
    value = loss.entries(z, one, quality)
    (slope,) = torch.autograd.grad(value.sum(), z)
    # |q - p|^gamma with gamma below 1 has its cusp, and its least value, at p = q: autograd finds no slope there
    return value.detach(), slope.nan_to_num(0.0)


def target_of(loss: ClassLoss, quality: Tensor) -> Tensor:
    """The score that a loss wants of matches of this quality."""
    target = loss.target_and_weight(torch.full_like(quality, 0.5), 1.0, quality)[0]
    return torch.as_tensor(target).to(quality).expand_as(quality)


def quality_of(loss: ClassLoss, iou: Tensor) -> Tensor:
    """The quality that a loss sees in matches of these IoUs, (M,), in an image that has a perfect match too."""
    return loss.quality(made_up(torch.cat([iou.double(), torch.ones(1).double()])))[:-1]


def made_up(iou: Tensor) -> Pairs:
    """Matched pairs with just these IoUs, (M,), one image's: every box is its target's, but narrower."""
    wide = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=iou.dtype)
    boxes = wide.repeat(len(iou), 1)  # (M, 4)
    boxes[:, 2] *= iou
    rows = torch.arange(len(iou))
    targets = Targets(torch.zeros_like(rows), torch.zeros_like(rows), wide.repeat(len(iou), 1))
    preds = Predictions(torch.zeros(1, len(iou), 1, dtype=iou.dtype), boxes[None])
    return Pairs.of([Output("final", preds)], [Match(targets.image, rows, rows)], targets, [float(max(len(iou), 1))])


def matched(detector: Detector, batch: Batch) -> Pairs:
    """The pairs, on the CPU, that the matcher makes of what a detector on any device says in the end about a batch.

    Labels are the detector's (`evaluation.measure.in_classes_of`); raises `DeimkitError` for others.
    """
    expect_classes(detector, batch.targets)
    weight = next(detector.parameters())
    with predicting(detector):
        preds = detector(batch.finish().images.to(weight.device, weight.dtype)).to("cpu")
        return Criterion(()).pairs([Output("final", preds)], batch.targets.to("cpu"))[0]


def logits_of(pairs: Pairs) -> Tensor:
    """The logit of every pair for the class of its target. (M,)."""
    z = pairs.stack("logits")  # (1, B, Q, C)
    return z.flatten()[pairs.places() * z.shape[-1] + pairs.labels]


def costs_of(loss: ClassLoss, pairs: Pairs) -> Tensor:
    """What every matched pair costs, not counting the background. (M,)."""
    return entry(loss, logits_of(pairs), loss.quality(pairs).double())[0]


def share_below(iou: Tensor, costs: Tensor, edges: Tensor) -> Tensor:
    """The share of the costs of all pairs that falls on pairs with an IoU of at most each of `edges`; 0 of nothing."""
    below = (costs * (iou <= edges[:, None])).sum(1)
    return below / costs.sum().clamp(min=1e-12)
