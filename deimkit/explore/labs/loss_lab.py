"""The loss lab: what every class loss makes of a score and an IoU, and who pays in a reader's own batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.loss_curves import (
    PUBLISHED,
    P,
    Q,
    entry,
    logits_of,
    quality_of,
    share_below,
    target_of,
    tuned,
)
from deimkit.explore.labs.loss_panels import panels
from deimkit.explore.labs.sheet import Drawing
from deimkit.losses import MAL, ClassLoss, Pairs

TUNED = "the chosen one, as set"  # its line has the numbers of the sliders
SAYS = {
    "MAL": "gamma bends the target, q^gamma, and quiets the easy background, which counts alpha times",
    "VFL": "gamma and alpha act on the background alone: gamma quiets what is easy, alpha weighs it all",
    "QFL": "gamma (the paper's beta) quiets entries near their target, and there is no alpha",
    "Focal": "gamma quiets easy entries; matched ones count alpha times, the background 1 - alpha times",
    "PSL": "gamma quiets entries near their target; matched ones count alpha times, the background 1 - alpha times",
}


@dataclass(frozen=True)
class Found:
    """What the losses say; lines are by the name of a loss as published, or `TUNED`.

    loss, beside, iou, score: where the controls are; matched: whether curves are of a match or of the background.
    cost, slope: of an entry, over `P`. target: of a match, over `Q`. share: of the loss of all pairs, on those of at
    most the IoUs `Q`; counted: their share in number. star: cost and slope of the tuned loss at the star; aim: what it
    wants of a match of that IoU; other: the cost there of the loss beside it. maps: (|Q|, |P|) costs of matches, of the
    tuned loss and of the one beside it. scores, ious: (M,) of the reader's pairs.
    """

    loss: str
    beside: str
    iou: float
    score: float
    matched: bool
    cost: dict[str, Tensor]
    slope: dict[str, Tensor]
    target: dict[str, Tensor]
    share: dict[str, Tensor]
    counted: Tensor
    star: tuple[float, float]
    aim: float
    other: float
    maps: tuple[Tensor, Tensor]
    scores: Tensor
    ious: Tensor


class LossLab(Lab):
    """MAL, VFL, QFL, Focal and PSL against score and IoU, with the numbers of one of them in the reader's hands.

    pairs: of one output of a detector (`loss_curves.matched`); they stand as dots on the maps, and the last panel says
    who of them pays. Without, that panel is of one pair of every IoU, all with the score of the star. Choosing a loss
    brings the numbers that it was published with. The losses' own weights are left out (PSL's is 6, the others' 1).
    """

    title = "Class losses: what a score costs, which way it is pulled, and who pays"

    def __init__(self, pairs: Pairs | None = None) -> None:
        super().__init__()
        self.pairs = pairs
        self._z, self._iou = torch.empty(0).double(), torch.empty(0).double()
        if pairs is not None:
            self._z, self._iou = logits_of(pairs).detach().double().cpu(), pairs.iou.detach().double().cpu()

    def controls(self) -> tuple[Control, ...]:
        """Which loss with which numbers, beside which other, for which entry."""
        names, own = tuple(PUBLISHED), MAL()
        return (
            Choice("loss", names, "MAL", "loss to tune"),
            Slider("gamma", 0.0, 4.0, 0.1, own.gamma, "its gamma"),
            Slider("alpha", 0.0, 1.0, 0.05, own.alpha, "its alpha"),
            Choice("beside", names, "VFL", "beside it"),
            Slider("iou", 0.0, 1.0, 0.01, 0.05, "IoU of the match, q"),
            Slider("score", 0.01, 0.99, 0.01, 0.5, "score, p"),
            Choice("entry", ("matched", "background"), "matched", "curves of an entry that is"),
        )

    def set(self, **values: Any) -> Lab:
        """Move controls, as in every lab; a new loss brings its own gamma and alpha where none are given."""
        chosen = PUBLISHED.get(values.get("loss", ""))
        if chosen is not None and values["loss"] != self.values["loss"]:
            values = {name: getattr(chosen, name) for name in ("gamma", "alpha") if hasattr(chosen, name)} | values
        return super().set(**values)

    def compute(
        self, loss: str, gamma: float, alpha: float, beside: str, iou: float, score: float, entry: str
    ) -> Found:
        """All curves and maps, from the library's own losses."""
        losses = {TUNED: tuned(PUBLISHED[loss], gamma=gamma, alpha=alpha), **PUBLISHED}
        ious = torch.cat([torch.tensor([iou], dtype=Q.dtype), Q])
        quality = {name: quality_of(each, ious) for name, each in losses.items()}  # of the star and of all of Q
        target = {name: target_of(each, quality[name]) for name, each in losses.items()}
        matched, z = entry == "matched", torch.cat([torch.tensor([score], dtype=P.dtype), P]).logit()
        lines = {name: _along(each, z, quality[name][0], matched) for name, each in losses.items()}
        share, counted = self._shares(losses, {name: q[1:] for name, q in quality.items()}, score)
        return Found(
            loss=loss,
            beside=beside,
            iou=iou,
            score=score,
            matched=matched,
            cost={name: cost[1:] for name, (cost, _) in lines.items()},
            slope={name: slope[1:] for name, (_, slope) in lines.items()},
            target={name: values[1:] for name, values in target.items()},
            share=share,
            counted=counted,
            star=(float(lines[TUNED][0][0]), float(lines[TUNED][1][0])),
            aim=float(target[TUNED][0]),
            other=float(lines[beside][0][0]),
            maps=(_map(losses[TUNED], quality[TUNED][1:]), _map(losses[beside], quality[beside][1:])),
            scores=self._z.sigmoid(),
            ious=self._iou,
        )

    def _shares(
        self, losses: dict[str, ClassLoss], spread: dict[str, Tensor], score: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Who pays: the reader's pairs, or one of every IoU of `Q`, with the qualities `spread` and one score."""
        z, ious, pairs = self._z, self._iou, self.pairs
        if pairs is None:
            z, ious = torch.full_like(Q, score).logit(), Q
            costs = {name: entry(each, z, spread[name])[0] for name, each in losses.items()}
        else:
            costs = {name: entry(each, z, each.quality(pairs).cpu().double())[0] for name, each in losses.items()}
        share = {name: share_below(ious, values, Q) for name, values in costs.items()}
        return share, share_below(ious, torch.ones_like(ious), Q)

    def draw(self, found: Found) -> Drawing:
        """Six panels: cost and slope against the score, target against the IoU, two maps, and who pays."""
        return panels(found)

    def words(self, found: Found) -> str:
        """The costs at the star, and what the two numbers do."""
        cost, slope = found.star
        what, aim = (f"a match of IoU {found.iou:g}", found.aim) if found.matched else ("a background entry", 0.0)
        way = "down" if slope > 0 else "up"
        pull = f"pulls the logit {way} by {abs(slope):.3f}" if abs(slope) >= 5e-4 else "does not pull it"
        silent = cost == slope == 0 and found.score != aim  # as VFL is about a match of IoU 0
        wants = "asks nothing of it" if silent else f"wants a score of {aim:.2f} and {pull}"
        return (
            f"At a score of {found.score:g}, {what} costs {cost:.3f} with {found.loss} as set and {found.other:.3f} "
            f"with {found.beside} as published; {found.loss} {wants}. "
            f"In {found.loss}, {SAYS[found.loss]}."
        )

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """A click on a map puts the star there."""
        if not trace.startswith("map"):
            return {}
        return {"score": min(max(round(float(x), 2), 0.01), 0.99), "iou": min(max(round(float(y), 2), 0.0), 1.0)}


def _along(loss: ClassLoss, z: Tensor, quality: Tensor, matched: bool) -> tuple[Tensor, Tensor]:
    """Cost and slope at logits (n,) of a match of one quality, or of the background."""
    return entry(loss, z, quality.expand_as(z)) if matched else entry(loss, z, one=0.0)


def _map(loss: ClassLoss, quality: Tensor) -> Tensor:
    """Costs of matches over `P` and `Q`. (|Q|,) -> (|Q|, |P|)."""
    z = P.logit().expand(len(Q), -1)
    return entry(loss, z, quality[:, None].expand_as(z))[0]
