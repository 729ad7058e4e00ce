"""A step that was not finite: its batch is kept, and may be tried again to see what was wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.errors import CheckpointError, DeimkitError, NonFiniteError
from deimkit.structures import Batch, Targets
from deimkit.training import checkpoint
from deimkit.training.learner import Learner, micro_batches
from deimkit.training.machine import random_state, set_random_state

KEPT = 4  # runs of steps that were not finite, of which the files are kept, the newest
SHOWN = 6  # images at fault that a sentence names


@dataclass(frozen=True)
class Finding:
    """What a look at a batch found to be not finite, beyond its losses.

    module: the first part of the detector whose weights or output were not, or "". images: the names of images that are
    at fault by themselves, each with what is wrong; none if it takes several together.
    """

    module: str
    images: dict[str, str]

    def __str__(self) -> str:
        shown = [f"{name} ({what})" for name, what in list(self.images.items())[:SHOWN]]
        more = len(self.images) - len(shown)
        first = [f"First not finite: {self.module}."] if self.module else []
        fault = [f"At fault: {', '.join(shown)}{f' and {more} more' if more else ''}."] if shown else []
        return " ".join(first + fault)


@dataclass(frozen=True)
class Replay:
    """A batch tried again: what was noted when it was kept, and what is so `now`, "" if all is finite."""

    batch: Batch
    where: dict[str, Any]
    noted: str
    now: str
    finding: Finding
    device: str
    precision: str

    @property
    def reproduced(self) -> bool:
        """Whether it is not finite again."""
        return bool(self.now)

    def __str__(self) -> str:
        again = "the same" if self.now == self.noted else self.now or "everything is finite"
        return "\n".join(
            [
                f"{len(self.batch)} images with {len(self.batch.targets)} boxes, step {self.where['step']} of epoch "
                f"{self.where['epoch']}, tried again in {self.precision} on {self.device}",
                f"then: {self.noted}",
                f"now:  {again}",
                *([f"first not finite: {self.finding.module}"] if self.finding.module else []),
                *(f"at fault: {name}: {what}" for name, what in self.finding.images.items()),
            ]
        )


def keep(
    file: Path, learner: Learner, batch: Batch, drawn: dict[str, Tensor], facts: dict[str, Any], begins: bool
) -> None:
    """Keep a batch as the loader gave it, with all that a second try of its step needs.

    file: in a folder of its own for every run of such steps, between which no weight changes; those weights are written
    once, beside it, when such a run `begins`. drawn: the random state before the step. facts: plain values to find
    there again. Only the newest `KEPT` folders stay. Raises `CheckpointError`.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if begins and learner.ranks.main:
            _clear(file)
            weights = {"model": learner.model.state_dict(), "scaler": learner.scaler.state_dict()}
            checkpoint.save(file.parent / "weights.pt", weights)
    except OSError as error:
        raise CheckpointError(f"Could not keep a batch in {file.parent} ({error}). Mend that, then resume.") from error
    values = {field.name: getattr(batch, field.name) for field in fields(batch)} | {"targets": vars(batch.targets)}
    checkpoint.save(file, {"replay": values, "drawn": drawn, "accumulate": learner.accumulate, **facts})


def _clear(file: Path) -> None:
    """Take away what was kept of the same steps before the run was killed, and the oldest folders."""
    for stale in file.parent.glob("*.pt"):
        if not stale.name.startswith(file.stem.partition("_rank")[0]):  # other processes write theirs by that name
            stale.unlink()
    older = [folder for folder in file.parent.parent.iterdir() if folder.is_dir() and folder != file.parent]
    older.sort(key=lambda folder: folder.stat().st_mtime_ns)
    for folder in older[: max(len(older) + 1 - KEPT, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def read(file: Path) -> dict[str, Any]:
    """What `keep` has written, its weights under "model" and "scaler"; raises `CheckpointError`."""
    state = checkpoint.read(file)
    if not isinstance(state, dict) or "replay" not in state:
        raise CheckpointError(
            f"{file} holds no batch of a step that was not finite. Such files are in the folder replay of a run, and "
            "its events say which."
        )
    values = state.pop("replay")
    batch = Batch(**values | {"targets": Targets(**values["targets"])})
    return {**state, "batch": batch, **checkpoint.read(file.parent / "weights.pt")}


def try_again(learner: Learner, state: dict[str, Any]) -> Replay:
    """The step of `read(file)` once more, with a learner made for it: forward, losses and gradients, no update."""
    learner.model.load_state_dict(state["model"])
    learner.scaler.load_state_dict(state["scaler"])
    batch: Batch = state["batch"]
    set_random_state(state["drawn"], learner.device)
    now = ""
    try:
        learner.gradients(batch)
    except DeimkitError as error:
        now = str(error)
    finding = examine(learner, batch, state["drawn"]) if now else Finding("", {})
    precision = str(learner.precision).removeprefix("torch.")
    return Replay(batch, state["where"], state["why"], now, finding, str(learner.device), precision)


def examine(learner: Learner, batch: Batch, drawn: dict[str, Tensor]) -> Finding:
    """Look for what is not finite in a batch whose step failed, and leave the learner as it is.

    Pixels and boxes first; if they are fine, the whole batch goes through the detector once more, and every image
    alone, with the random state `drawn`. Of several processes each looks at its own pixels and boxes and no further,
    as a forward pass takes all of them.
    """
    images = unfit(batch)
    if images or learner.ranks.many:
        return Finding("", images)
    boxes = max(len(batch.targets), 1)
    batch = batch.to(learner.device).finish()
    uncompiled = torch.compiler.set_stance("force_eager")  # compiled parts would not tell what they put out
    with _left_as_it_is(learner), torch.no_grad(), uncompiled:
        set_random_state(drawn, learner.device)
        with _first_not_finite(learner) as found:
            for part in micro_batches(batch, learner.accumulate):
                _trial(learner, part, boxes)
        for part in micro_batches(batch, len(batch)):
            said = _trial(learner, part, boxes)
            if said:
                images[part.names[0]] = said
    return Finding(next(iter(found), ""), images)


def unfit(batch: Batch) -> dict[str, str]:
    """The names of the images whose own pixels or boxes are not finite, and which of the two."""
    images = {}
    for i, name in enumerate(batch.names):
        if not torch.isfinite(batch.images[i]).all():
            images[name] = "its pixels are not finite"
        elif not torch.isfinite(batch.targets.boxes[batch.targets.image == i]).all():
            images[name] = "a box of it is not finite"
    return images


def _trial(learner: Learner, batch: Batch, boxes: int) -> str:
    """What is not finite when this batch is seen, or ""."""
    try:
        terms = learner.losses(batch, boxes)
    except NonFiniteError as error:
        return str(error)
    bad = [name for name, value in terms.items() if not torch.isfinite(value)]
    return f"the loss is not finite: {', '.join(bad[:SHOWN])}" if bad else ""


@contextmanager
def _left_as_it_is(learner: Learner) -> Iterator[None]:
    """A block that leaves no trace in the random numbers and the batch statistics."""
    buffers = [(buffer, buffer.clone()) for buffer in learner.model.buffers()]
    drawn = random_state(learner.device)
    try:
        yield
    finally:
        set_random_state(drawn, learner.device)
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def _first_not_finite(learner: Learner) -> Iterator[list[str]]:
    """A block whose value names the parts of the detector whose weights, then whose outputs are not finite."""
    found = [
        f"the weights {name}" for name, weight in learner.model.named_parameters() if not torch.isfinite(weight).all()
    ]

    def look(name: str, output: Any) -> None:
        bad = [value for value in tensors(output) if not torch.isfinite(value).all()]
        if bad and len(found) < SHOWN:
            found.append(f"the output of {name} ({str(bad[0].dtype).removeprefix('torch.')})")

    handles = [
        module.register_forward_hook(lambda _, given, output, name=name: look(name, output))
        for name, module in learner.model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of floating numbers in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors(list(vars(value).values()))
