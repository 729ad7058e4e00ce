"""A clock that stands still unless told otherwise, and sessions whose calls take the time that a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deimkit.data.split import CategoryMap
from deimkit.deploy.bench.timing import Clock
from deimkit.deploy.card import Card
from deimkit.deploy.session import Session


def card(recipe: str = "tiny", batch: int | None = None, **changes: Any) -> Card:
    """The card of a small detector."""
    given: dict[str, Any] = {"size": (32, 64), **changes}
    return Card(recipe=recipe, categories=CategoryMap.of(2), batch=batch, **given)


class StillClock(Clock):
    """Time passes only as a rest, or as a call spends it with `pass_by`. gpu_share: of a call that a GPU is at work."""

    def __init__(self, gpu_share: float | None = None) -> None:
        self.seconds, self.gpu_share = 0.0, gpu_share
        self.rests: list[float] = []
        self.ran: list[str] = []  # which session each call was of, and "rest"

    def now(self) -> float:
        return self.seconds

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.ran.append("rest")
        self.pass_by(seconds)

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds

    def time(self, work: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
        start = self.now()
        work()
        wall = self.now() - start
        return wall, None if self.gpu_share is None else self.gpu_share * wall


class Paced(Session):
    """A session whose n-th call takes `pace(n)` seconds, and `strange` more right after a call of another session."""

    def __init__(
        self,
        name: str,
        clock: StillClock,
        pace: Callable[[int], float] | float | Sequence[float],
        strange: float = 0.0,
        device: str = "cpu",
        **of_card: Any,
    ) -> None:
        self.name, self.clock, self.strange = name, clock, strange
        self.card, self.device = card(**of_card), torch.device(device)
        self.pace = pace if callable(pace) else (lambda n: pace) if isinstance(pace, float) else pace.__getitem__
        self.calls, self.closed = 0, False

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        self.expect(images, sizes)
        assert images.device == sizes.device == self.device and sizes.dtype == torch.int64
        others = [name for name in self.clock.ran if name != "rest"]
        stranger = bool(others) and others[-1] != self.name
        self.clock.ran.append(self.name)
        self.clock.pass_by(self.pace(self.calls) + self.strange * stranger)
        self.calls += 1
        b = len(images)
        return {"boxes": torch.zeros(b, 3, 4), "scores": torch.zeros(b, 3), "labels": torch.zeros(b, 3).long()}

    def close(self) -> None:
        self.closed = True
