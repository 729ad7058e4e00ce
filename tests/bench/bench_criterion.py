"""Matching and losses, forward and backward, at D-FINE-L's shapes: ours beside the D-FINE loss of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.losses import DDF, FGL, L1, VFL, GIoU
from deimkit.structures import Match, Output, Predictions, Targets
from tests.bench.paired import Row, paired, seconds

B, Q, C, R, LAYERS = 8, 300, 80, 32, 6
PER_IMAGE, GROUPS = 20, 5  # 20 targets per image are denoised in 5 groups: 100 positive and 100 negative queries
TRAINED = ("logits", "boxes", "edges")
OURS = Criterion((VFL(), L1(), GIoU(), FGL(), DDF()))


class Step:
    """What a training forward hands to the criterion, with random numbers: layers agree roughly, as a decoder's do."""

    def __init__(self, per_image: int = PER_IMAGE, groups: int = GROUPS, device: str = "cpu") -> None:
        draw = torch.Generator().manual_seed(0)
        self.groups, self.per_image, self.device = groups, per_image, device

        def boxes(n: int) -> Tensor:
            return torch.rand(B, n, 4, generator=draw) * 0.5 + 0.2

        def near(base: Tensor, spread: float) -> Tensor:
            return (base + spread * torch.randn(base.shape, generator=draw)).to(device).requires_grad_()

        def answers(n: int, first: int) -> list[Predictions]:
            """`first` plain answers of the same queries, then those of all layers with edges."""
            logits, edges = (torch.randn(B, n, *shape, generator=draw) for shape in ((C,), (4, R + 1)))
            base = boxes(n)
            made = [Predictions(near(logits - 3, 0.3), near(base, 0.01)) for _ in range(first + LAYERS)]
            for preds in made[first:]:
                preds.edges, preds.anchors = near(edges, 0.3), base.to(device)
            return made

        self.proposals, self.pre, *self.normal = answers(Q, 2)
        self.denoise_pre, *self.denoise = answers(2 * groups * per_image, 1)  # positive and negative copies
        self.labels = torch.randint(C, (B, per_image), generator=draw).to(device)
        self.boxes = boxes(per_image).to(device)

    def ours(self, pre: bool = True) -> tuple[list[Output], Targets]:
        """Outputs and targets; without `pre`, only those outputs that transformers supervises too."""
        image = torch.arange(B, device=self.device).repeat_interleave(self.per_image)
        slot = torch.arange(self.per_image, device=self.device)
        start = 2 * self.per_image * torch.arange(self.groups, device=self.device)[:, None]
        target = torch.arange(len(image), device=self.device).repeat(self.groups)
        match = Match(image.repeat(self.groups), (start + slot.repeat(B)).flatten(), target)
        group = {"rule": match, "repeat": self.groups, "pooled": False}

        outputs = [Output("proposals", self.proposals)]
        parts = ((self.normal, self.pre, "", {}), (self.denoise, self.denoise_pre, "denoise.", group))
        for (*others, last), first, prefix, how in parts:
            outputs += [Output(f"{prefix}layer{i}", preds, last=last, **how) for i, preds in enumerate(others)]
            outputs += [Output(f"{prefix}final", last, **how)]
            outputs += [Output(f"{prefix}pre", first, **how)] if pre else []
        return outputs, Targets(image, self.labels.flatten(), self.boxes.flatten(0, 1))

    def theirs(self) -> dict[str, Any]:
        """The same numbers as arguments of the loss of transformers: (B, layers, denoising + normal queries, ...)."""
        from transformers import DFineConfig

        def stacked(field: str) -> Tensor:
            halves = [torch.stack([getattr(p, field) for p in layers], 1) for layers in (self.denoise, self.normal)]
            return torch.cat(halves, 2).detach().requires_grad_(field != "anchors")

        logits, boxes = stacked("logits"), stacked("boxes")
        slot = torch.arange(self.per_image, device=self.device)
        positive = torch.cat([slot + 2 * self.per_image * g for g in range(self.groups)])
        return {
            "logits": logits[:, -1],
            "pred_boxes": boxes[:, -1],
            "labels": [{"class_labels": c, "boxes": b} for c, b in zip(self.labels, self.boxes, strict=True)],
            "device": torch.device(self.device),
            "config": DFineConfig(num_labels=C, decoder_layers=LAYERS, auxiliary_loss=True),
            "outputs_class": logits,
            "outputs_coord": boxes,
            "predicted_corners": stacked("edges").flatten(3).detach().requires_grad_(),
            "initial_reference_points": stacked("anchors"),
            "enc_topk_logits": self.proposals.logits,
            "enc_topk_bboxes": self.proposals.boxes,
            "denoising_meta_values": {
                "dn_positive_idx": [positive] * B,
                "dn_num_group": self.groups,
                "dn_num_split": [2 * self.groups * self.per_image, Q],
            },
        }


def rows() -> Iterator[Row]:
    """Ours beside transformers on the outputs it supervises, then ours alone with all of D-FINE's, and in a crowd."""
    from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss

    def run(outputs: list[Output], targets: Targets) -> None:
        _backward(sum(OURS(outputs, targets).values()), [getattr(o.preds, k) for o in outputs for k in TRAINED])

    def peer(arguments: dict[str, Any]) -> None:
        _backward(DFineForObjectDetectionLoss(**arguments)[0], list(arguments.values()))

    step = Step()
    mine, theirs = step.ours(pre=False), step.theirs()
    ours, others, ratio = paired(lambda: run(*mine), lambda: peer(theirs))
    yield Row(
        "criterion, D-FINE-L, B=8, 20 targets", ours, others, "s", ratio, "forward + backward; peer: transformers"
    )

    whole = step.ours()
    yield Row(
        "the same and both pre heads", _median(lambda: run(*whole)), None, "s", None, "all that D-FINE supervises"
    )
    crowd = Step(per_image=500, groups=1).ours()
    yield Row("500 targets in every image", _median(lambda: run(*crowd)), None, "s", None, "and 1000 denoising queries")


def _backward(loss: Any, inputs: list[Any]) -> None:
    torch.autograd.grad(loss, [x for x in inputs if isinstance(x, Tensor) and x.requires_grad], allow_unused=True)


def _median(f: Callable[[], None], runs: int = 5) -> float:
    f()
    return median(seconds(f) for _ in range(runs))
