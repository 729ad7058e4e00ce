"""What one training step is made of: the shape of everything on its way, and which gradients arrive where."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deimkit.criterion import Criterion
from deimkit.errors import DeimkitError
from deimkit.explore.labs.anatomy import listen
from deimkit.losses import Pairs
from deimkit.models.detector import Detector
from deimkit.structures import Batch, Output
from deimkit.training.learner import Learner
from deimkit.training.machine import random_state, set_random_state

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One training step, from the image to the changed weights, as the tensors that it really had.

    images, memory, queries: their shapes, queries being those that stay after training. targets: boxes in the batch.
    backbone, encoder, layers: the shapes of their maps, and of the hidden states after each decoder layer. passes:
    whether gradients go back through where the queries start. groups: per group of extra queries their shape and how
    often they repeat every target. outputs: per output the shapes of its fields. matches: pairs of every output by its
    own match; pairs: all of them, and those that share a match. terms: the weighted losses. gradients: per part of the
    detector the L2 norm of what arrives, clipped; tensors: how many parameters got one, of how many. lr: the highest
    rate. moved: L2 norm of what the step changed.
    """

    images: Shape
    targets: int
    backbone: list[Shape]
    encoder: list[Shape]
    memory: Shape
    queries: Shape
    passes: bool
    layers: list[Shape]
    groups: dict[str, tuple[Shape, int]]
    outputs: dict[str, dict[str, Shape]]
    matches: dict[str, int]
    pairs: tuple[int, int]
    terms: dict[str, float]
    gradients: dict[str, float]
    tensors: tuple[int, int]
    optimizer: str
    lr: float
    moved: float

    @property
    def total(self) -> float:
        """The loss: all terms added up."""
        return sum(self.terms.values())

    @property
    def norm(self) -> float:
        """The L2 norm of the whole gradient, clipped."""
        return math.hypot(*self.gradients.values())


def take_step(recipe: Any, model: Detector, batch: Batch) -> Step:
    """Take one step of training on a batch as the loader gives it, and tell what there was on the way.

    recipe: says how the model learns. It is a copy of the model that learns, by `Learner`, and the random numbers that
    it draws are put back: nothing has changed afterwards. Raises as `Learner.learn` does.
    """
    _expect(model)
    learner = Learner(recipe, deepcopy(model))
    learned, watched, found = learner.model, Watched(), Arrived()
    before = [p.detach().clone() for p in learned.parameters()]
    layers = list(learned.decoder.layers)
    heard = listen([learned.backbone, learned.encoder, learned.queries, *learned.groups, *layers])
    learner.optimizer.register_step_pre_hook(lambda *_: found.read(learned))
    drawn = random_state(learner.device)
    try:
        terms = learner.learn(batch, watch=watched)
    finally:
        set_random_state(drawn, learner.device)
    start, groups = heard[learned.queries][1], [heard[group][1] for group in learned.groups]
    moved = torch.stack([(p.detach() - old).norm() for p, old in zip(learned.parameters(), before, strict=True)])
    return Step(
        images=tuple(heard[learned.backbone][0][0].shape),
        targets=len(batch.targets),
        backbone=[tuple(x.shape) for x in heard[learned.backbone][1]],
        encoder=[tuple(x.shape) for x in heard[learned.encoder][1]],
        memory=tuple(heard[learned.queries][0][0].shape),
        queries=tuple(start.content.shape),
        passes=start.content.requires_grad or start.boxes.requires_grad,
        layers=[tuple(heard[layer][1].shape) for layer in layers],
        groups={group.name: (tuple(group.content.shape), group.repeat) for group in groups},
        outputs={output.name: _fields(output) for output in watched.own.outputs},
        matches={o.name: len(m.query) for o, m in zip(watched.own.outputs, watched.own.matches, strict=True)},
        pairs=(len(watched.own.labels), watched.sharing),
        terms=terms,
        gradients=found.norms,
        tensors=found.tensors,
        optimizer=type(learner.optimizer).__name__,
        lr=learner.lr,
        moved=float(moved.norm()),
    )


class Watched:
    """Keeps the pairs that a criterion shows."""

    own: Pairs
    shared: Pairs

    def __call__(self, own: Pairs, shared: Pairs) -> None:
        self.own, self.shared = own, shared

    @property
    def sharing(self) -> int:
        """How many pairs the shared match makes, over all outputs that follow it."""
        both = zip(self.shared.matches, self.own.matches, strict=True)
        return sum(len(match.query) for match, own in both if match is not own)


class Arrived:
    """Keeps how much gradient every part of a model has."""

    norms: dict[str, float]
    tensors: tuple[int, int]

    def read(self, model: nn.Module) -> None:
        """Look at the gradients that a model has now."""
        named = list(model.named_parameters())
        self.norms = {part: float(norm) for part, norm in norms_by_part([(n, p.grad) for n, p in named]).items()}
        self.tensors = (sum(p.grad is not None for _, p in named), len(named))


@dataclass(frozen=True)
class Influence:
    """Which outputs teach which parts: the L2 norm of the gradient of every output's terms. norms: (outputs, parts).

    An exact 0 is an arrow that is cut: nothing arrives there.
    """

    outputs: tuple[str, ...]
    parts: tuple[str, ...]
    norms: NDArray[np.float64]

    def of(self, output: str, part: str) -> float:
        """What an output teaches a part."""
        return float(self.norms[self.outputs.index(output), self.parts.index(part)])


def influence(model: Detector, criterion: Criterion, batch: Batch) -> Influence:
    """How strongly the terms of every output pull at every part of a detector in training.

    batch: as the loader gives it. A copy of the model is asked, and the random numbers that it draws are put back.
    """
    _expect(model)
    asked = deepcopy(model).train()
    device = next(asked.parameters()).device
    batch, drawn = batch.to(device).finish(), random_state(device)
    try:
        outputs: list[Output] = asked(batch.images, batch.targets)
    finally:
        set_random_state(drawn, device)
    terms = criterion(outputs, batch.targets)
    named = [(name, p) for name, p in asked.named_parameters() if p.requires_grad]
    rows = []
    for output in outputs:
        loss = torch.stack([value for name, value in terms.items() if name.endswith(f"/{output.name}")]).sum()
        grads = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        rows.append(norms_by_part([(name, g) for (name, _), g in zip(named, grads, strict=True)]))
    norms = np.array([[float(norm) for norm in row.values()] for row in rows])
    return Influence(tuple(output.name for output in outputs), tuple(rows[0]), norms)


def norms_by_part(grads: list[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """The L2 norm of all gradients of every part, 0 where none arrived, in the order of the parts."""
    found: dict[str, list[Tensor]] = {}
    for name, grad in grads:
        found.setdefault(part_of(name), []).append(torch.zeros(()) if grad is None else grad.detach().norm().cpu())
    return {part: torch.stack(norms).norm() for part, norms in found.items()}


def part_of(name: str) -> str:
    """The part of a detector that a parameter belongs to: "refine.box.1.layers.0.bias" -> "refine.box.1"."""
    known = re.match(r"backbone|encoder|decoder\.layers\.\d+|refine\.(box|score|quality)\.\d+|groups\.\d+", name)
    return known.group() if known else ".".join(name.split(".")[:2])


def _fields(output: Output) -> dict[str, Shape]:
    """The shapes of what an output predicts."""
    preds = {name: getattr(output.preds, name) for name in ("logits", "boxes", "edges")}
    return {name: tuple(x.shape) for name, x in preds.items() if x is not None}


def _expect(model: Any) -> None:
    """Raise `DeimkitError` unless something is a detector that can still learn."""
    deployed = isinstance(model, Detector) and any(isinstance(part, nn.Identity) for part in model.refine.score)
    if not isinstance(model, Detector) or deployed or not any(p.requires_grad for p in model.parameters()):
        what = "one that was deployed or frozen" if isinstance(model, Detector) else type(model).__name__
        raise DeimkitError(f"Only a whole Detector can take a training step; got {what}. Take it as `load` gives it.")
