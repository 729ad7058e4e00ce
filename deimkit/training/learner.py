"""One step of training: a batch becomes outputs, outputs become losses, and losses a step of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deimkit.errors import NonFiniteError
from deimkit.losses import Pairs
from deimkit.models.detector import Detector
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Batch, Targets
from deimkit.training.optim import EMA

Watch = Callable[[Pairs, Pairs], None]


class Learner:
    """A detector that learns as its recipe says: with its criterion, optimiser, gradient scaler and moving average.

    model: on its device, and trained in place. precision: of the forward pass. accumulate: micro-batches per step.
    ranks: the processes that share every batch. `learn` is one step.
    """

    def __init__(
        self,
        recipe: Any,
        model: Detector,
        precision: torch.dtype = torch.float32,
        accumulate: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.precision, self.accumulate, self.ranks = model, precision, accumulate, ranks
        self.device = next(model.parameters()).device
        self.clip = recipe.optim.clip or math.inf
        self.criterion = recipe.criterion()
        self.model.to(memory_format=torch.channels_last).train()
        self.trained: nn.Module = model
        if ranks.many:  # norms, noisy queries and gradients are those of the batches of all processes
            model.train_with(ranks)
            self.trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = recipe.optim.build(model)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.ema = EMA.of(model, recipe.timeline)

    @property
    def lr(self) -> float:
        """The highest rate of any group of parameters."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def set_rates(self, factor: float) -> None:
        """Let every group of parameters learn at `factor` times its base rate."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def learn(self, batch: Batch, watch: Watch | None = None) -> dict[str, float]:
        """One optimiser step on a finished batch on the device; returns every weighted term of the loss.

        watch: shown the matches, as by the criterion. Raises `NonFiniteError` in all processes if a loss or a gradient
        of one is not finite; but for the random numbers drawn, all is then as if the step had never been.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            terms = self.backward(batch, watch)
            self._apply()
        except NonFiniteError:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)
            raise
        return terms

    def backward(self, batch: Batch, watch: Watch | None = None) -> dict[str, float]:
        """Add up the gradients of all micro-batches; returns the terms of the whole batch."""
        total: dict[str, Tensor] = {}
        boxes = max(int(self.ranks.sum(torch.tensor(len(batch.targets)))), 1)
        parts = micro_batches(batch, self.accumulate)
        for i, part in enumerate(parts):
            with self._gradients_stay_here() if i + 1 < len(parts) else nullcontext():
                terms = self._agreed_losses(part, boxes, watch)
                loss = torch.stack(list(terms.values())).sum() * self.ranks.world  # gradients are averaged over ranks
                self.scaler.scale(loss).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value.detach()
        values = self.ranks.sum(torch.stack(list(total.values()))).tolist()
        bad = [name for name, value in zip(total, values, strict=True) if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(f"The loss is not finite: {', '.join(bad[:6])}.")
        return dict(zip(total, values, strict=True))

    def _gradients_stay_here(self) -> Any:
        """A block whose gradients are not yet sent to the other processes."""
        return self.trained.no_sync() if isinstance(self.trained, DistributedDataParallel) else nullcontext()

    def _agreed_losses(self, batch: Batch, boxes: int, watch: Watch | None) -> dict[str, Tensor]:
        """The losses of a micro-batch; `NonFiniteError` in every process if they are not finite in one."""
        terms: dict[str, Tensor] = {}
        failure = None
        try:
            terms = self.losses(batch, boxes, watch)
        except NonFiniteError as error:
            failure = error
        self.ranks.agree(failure)
        return terms

    def losses(self, batch: Batch, boxes: int, watch: Watch | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss of a micro-batch; boxes: targets of the whole batch, in all processes."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        mixed = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision) if mixed else nullcontext():
            outputs = self.trained(images, batch.targets)
        return self.criterion(outputs, batch.targets, boxes=boxes, watch=watch, ranks=self.ranks)

    def _apply(self) -> None:
        """Clip the gradients, step, and let the average follow."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            grads = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
            bad = [name for name, grad in grads if not torch.isfinite(grad).all()]
            raise NonFiniteError(f"The gradient is not finite in {', '.join(bad[:6])}.")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        """The weights, their average, and what the optimiser and the scaler remember."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of such a learner; other entries of `state` are left alone."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """`batch` cut into at most `count` consecutive parts, images and targets together.

    Their gradients add up to those of the whole batch, exactly for what is normalised by the number of targets. Two
    things are approximations: batch norms see the statistics of a part, and the size of the union of the layers'
    matches, which normalises the box losses, is taken from the part in proportion to its targets.
    """
    if count == 1:
        return [batch]
    parts, t = [], batch.targets
    for rows in np.array_split(np.arange(len(batch)), min(count, len(batch))):
        first, end = int(rows[0]), int(rows[-1]) + 1
        mine = (t.image >= first) & (t.image < end)
        targets = Targets(t.image[mine] - first, t.labels[mine], t.boxes[mine])
        parts.append(Batch(batch.images[first:end], targets, batch.ids[first:end], batch.names[first:end]))
    return parts
