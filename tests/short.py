"""A device that runs out of memory as a test wishes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from deimkit.structures import Batch
from deimkit.training.learner import Learner


@dataclass
class Room:
    """Memory for so many `images` at once, None for any number.

    tried: the images of every micro-batch that was asked for. leaked: how often something of a step that failed was
    still held when the next micro-batch came.
    """

    images: int | None
    tried: list[int] = field(default_factory=list)
    leaked: int = 0
    held: list[weakref.ref[Tensor]] = field(default_factory=list)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, images: int | None) -> Room:
    """Let learners run out of memory where a micro-batch has more than `images`, after their forward pass."""
    room = Room(images)
    losses = Learner.losses

    def fails(self: Learner, batch: Batch, *rest: Any, **named: Any) -> dict[str, Tensor]:
        room.leaked += sum(tensor() is not None for tensor in room.held)
        room.tried.append(len(batch))
        terms = losses(self, batch, *rest, **named)
        if room.images is not None and len(batch) > room.images:
            room.held = [weakref.ref(term) for term in terms.values()]
            raise torch.OutOfMemoryError(f"{len(batch)} images do not fit.")
        return terms

    monkeypatch.setattr(Learner, "losses", fails)
    return room
