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

from deimkit.errors import DeimkitError, NonFiniteError
from deimkit.losses import Pairs
from deimkit.models.detector import Detector
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Batch, Targets
from deimkit.training.compiled import compile_parts, expect_compiler
from deimkit.training.courier import Courier
from deimkit.training.machine import random_state, set_random_state
from deimkit.training.optim import EMA

Watch = Callable[[Pairs, Pairs], None]


class Learner:
    """A detector that learns as its recipe says: with its criterion, optimiser, gradient scaler and moving average.

    model: on its device, and trained in place. precision: of the forward pass. accumulate: micro-batches per step.
    ranks: the processes that share every batch. compile: whether the detector is (`compile_parts`), or `DeimkitError`
    is raised if this machine cannot. `learn` is one step.
    """

    def __init__(
        self,
        recipe: Any,
        model: Detector,
        precision: torch.dtype = torch.float32,
        accumulate: int = 1,
        ranks: Ranks = ALONE,
        compile: bool = False,
    ) -> None:
        self.model, self.precision, self.accumulate, self.ranks = model, precision, accumulate, ranks
        self.device = next(model.parameters()).device
        self.largest = recipe.optim.clip or math.inf  # norm of all gradients together
        self.criterion = recipe.criterion()
        self.courier = Courier(self.device)
        self.model.to(memory_format=torch.channels_last).train()
        self.trained: nn.Module = model
        if ranks.many:  # norms, noisy queries and gradients are those of the batches of all processes
            model.train_with(ranks)
            self.trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = recipe.optim.build(model)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = self._fresh_scaler({})
        self.ema = EMA.of(model, recipe.timeline)
        if compile:
            expect_compiler(self.device)
            compile_parts(model, ranks)

    @property
    def lr(self) -> float:
        """The highest rate of any group of parameters."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def set_rates(self, factor: float) -> None:
        """Let every group of parameters learn at `factor` times its base rate."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def learn(self, batch: Batch, watch: Watch | None = None) -> dict[str, float]:
        """One optimiser step on a batch as the loader gives it; returns every weighted term of the loss.

        watch: shown the matches, as by the criterion. Raises `NonFiniteError` in all processes if a box, a loss or a
        gradient of one is not finite; but for the random numbers drawn, all is then as if the step had never been.
        Raises `torch.OutOfMemoryError` if the gradients do not fit into memory, which in more parts they may, and the
        random numbers too are as before; and `DeimkitError` if the optimiser's own memory does not.
        """
        buffers = list(self.model.buffers())
        before, drawn = clones(buffers), random_state(self.device)
        try:
            terms = self.gradients(batch, watch)
        except (NonFiniteError, torch.OutOfMemoryError) as error:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
            self.scaler = self._fresh_scaler(self.scaler.state_dict())  # the old one may have unscaled already
            if isinstance(error, torch.OutOfMemoryError):
                set_random_state(drawn, self.device)
            raise
        try:
            self._apply()
        except torch.OutOfMemoryError as error:
            raise DeimkitError(
                f"{self.device} has no memory for the optimiser and the average of this model, however small its "
                "batches are. Train a smaller recipe."
            ) from error
        return terms

    def _fresh_scaler(self, state: dict[str, Any]) -> torch.amp.GradScaler:
        """A gradient scaler between two steps; `state` is that of another, or {}."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        if state:
            scaler.load_state_dict(state)
        return scaler

    def gradients(self, batch: Batch, watch: Watch | None = None) -> dict[str, float]:
        """The first half of `learn`: add up the clipped gradients of all micro-batches, and change no weight."""
        boxes = self._agreed_boxes(batch)
        batch = self.courier.bring(batch).finish()
        total: dict[str, Tensor] = {}
        values: dict[str, float] = {}
        *others, last = micro_batches(batch, self.accumulate)
        for part in [*others, last]:
            with nullcontext() if part is last else self._gradients_stay_here():
                terms = self._agreed_losses(part, boxes, watch)
                for name, value in terms.items():
                    total[name] = total.get(name, 0) + value.detach()
                if part is last:
                    values = self._finite(total)  # now, as later it would wait for the backward pass of a GPU
                loss = torch.stack(list(terms.values())).sum() * self.ranks.world  # gradients are averaged over ranks
                self.scaler.scale(loss).backward()
        self._clip()
        return values

    def _finite(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The terms of all processes as numbers; `NonFiniteError` names those that are not finite."""
        values = self.ranks.sum(torch.stack(list(terms.values()))).tolist()
        bad = [name for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(f"The loss is not finite: {', '.join(bad[:6])}.")
        return dict(zip(terms, values, strict=True))

    def _agreed_boxes(self, batch: Batch) -> int:
        """How many boxes all processes have to learn; raises in all if one of them cannot be learned."""
        failure = None
        try:
            batch.targets.check(len(batch), len(self.model.categories), batch.names)
        except DeimkitError as error:
            failure = error
        boxes, failures = self.ranks.sum(torch.tensor([len(batch.targets), int(failure is not None)])).tolist()
        if failures:
            self.ranks.agree(failure)
        return max(boxes, 1)

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

    def _clip(self) -> None:
        """Clip the gradients; `NonFiniteError` unless they are finite, or just scaled too much for fp16."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.largest)
        if not torch.isfinite(norm) and self.scaler.get_scale() <= 1:  # 1 too where nothing is scaled
            grads = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
            bad = [name for name, grad in grads if not torch.isfinite(grad).all()]
            raise NonFiniteError(f"The gradient is not finite in {', '.join(bad[:6])}.")

    def _apply(self) -> None:
        """Step, and let the average follow."""
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
    t, device = batch.targets, batch.targets.image.device
    shares = [len(rows) for rows in np.array_split(np.arange(len(batch)), min(count, len(batch)))]
    place = torch.from_numpy(np.repeat(np.arange(len(shares)), shares)).to(device, non_blocking=True)  # (B,)
    part = place[t.image]  # (N,)
    sizes = (part == torch.arange(len(shares), device=device)[:, None]).sum(1).tolist()  # all that a GPU is asked
    parts, first = [], 0
    for share, mine in zip(shares, part.argsort(stable=True).split(sizes), strict=True):
        end = first + share
        targets = Targets(t.image[mine] - first, t.labels[mine], t.boxes[mine])
        parts.append(Batch(batch.images[first:end], targets, batch.ids[first:end], batch.names[first:end]))
        first = end
    return parts


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each of many small tensors; those of a dtype in one go, for a GPU would rather do that than wait."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_copy_([x for x in copies if x.dtype == dtype], [x for x in tensors if x.dtype == dtype])
    return copies
