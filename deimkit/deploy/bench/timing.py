"""How to time a call, and what may be said of durations: percentiles, and ratios of what was measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from statistics import median, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from deimkit.errors import DeployError

CALLS_FOR = {50: 1, 90: 20, 95: 40, 99: 100}  # percentiles, and of how many calls they are more than the maximum


@dataclass(frozen=True)
class Method:
    """How to measure. seconds: about how long each session is timed, in `rounds` blocks of calls, one call at a time.

    discard: calls before each block that do not count, after a pause (seconds). warmup: seconds of calls at least, and
    until two medians of three calls differ by less than `agree`, but not beyond `patience` seconds.
    """

    rounds: int = 20
    seconds: float = 10.0
    discard: int = 1
    pause: float = 0.1
    warmup: float = 1.0
    patience: float = 20.0
    agree: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.discard < 0 or not self.agree > 0:
            raise DeployError(f"Expected rounds >= 1, discard >= 0 and agree > 0; got {self}.")
        if min(self.seconds, self.pause, self.warmup, self.patience) < 0:
            raise DeployError(f"Expected seconds, pause, warmup and patience of 0 or more; got {self}.")


USUAL = Method()


@dataclass(frozen=True)
class Timing:
    """How long calls took, every one of them. rounds: seconds, those of one block of calls together. images: a call."""

    rounds: tuple[tuple[float, ...], ...]
    images: int = 1

    @property
    def seconds(self) -> list[float]:
        """All calls in their order."""
        return list(chain.from_iterable(self.rounds))

    @property
    def medians(self) -> list[float]:
        """The median seconds of every round."""
        return [median(block) for block in self.rounds]

    @property
    def median(self) -> float:
        """Seconds that half of the calls stayed below."""
        return median(self.seconds)

    @property
    def mean(self) -> float:
        """Seconds, outliers included."""
        return sum(self.seconds) / len(self.seconds)

    @property
    def min(self) -> float:
        """Seconds of the fastest call."""
        return min(self.seconds)

    @property
    def std(self) -> float:
        """Standard deviation in seconds; 0 of a single call."""
        return stdev(self.seconds) if len(self.seconds) > 1 else 0.0

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the calls stayed below, between two calls in proportion."""
        return float(np.percentile(self.seconds, percent))

    def tail(self, percent: int) -> float | None:
        """A percentile of `CALLS_FOR` in seconds, or None where too few calls were timed for it."""
        return self.percentile(percent) if len(self.seconds) >= CALLS_FOR[percent] else None

    @property
    def images_per_s(self) -> float:
        """Images a second, one call at a time, by the median."""
        return self.images / self.median

    def to_dict(self) -> dict[str, Any]:
        """The figures in milliseconds, None for percentiles of too few calls, and every call in seconds."""
        figures: dict[str, float | None] = {"mean": self.mean, "median": self.median, "min": self.min, "std": self.std}
        figures |= {f"p{percent}": self.tail(percent) for percent in CALLS_FOR}
        told: dict[str, Any] = {f"{name}_ms": None if x is None else 1e3 * x for name, x in figures.items()}
        return {"n": len(self.seconds), **told, "images_per_s": self.images_per_s, "seconds": self.rounds}


@dataclass(frozen=True)
class Ratio:
    """How many times longer one thing takes than another, round by round: what both suffered together cancels out.

    median: of the rounds' ratios. low, high: where that median lies with 95 % confidence, by order statistics, which
    asks nothing of the noise but that rounds are alike; below six rounds they are the extremes, and say less.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(above: Timing, below: Timing) -> Ratio:
        """The ratio of two timings whose rounds were measured in turn."""
        ratios = sorted(a / b for a, b in zip(above.medians, below.medians, strict=True))
        left = max(int(binom.ppf(0.025, len(ratios), 0.5)), 1) - 1  # ratios on either side of the interval
        return Ratio(median(ratios), ratios[left], ratios[-1 - left])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Clock:
    """Time as a benchmark sees it: what o'clock it is, a rest, and a call timed until its device is done with it."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def rest(self, seconds: float) -> None:
        """Let that much time pass."""
        time.sleep(seconds)

    def time(self, work: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
        """Seconds of one call by the wall clock, and by CUDA events around what it queued; None without CUDA.

        The device is idle before, and done afterwards: no call overlaps with the next. Events lie on torch's current
        stream: of a runtime that waits for a stream of its own they see what the wall clock sees.
        """
        if device.type == "cuda":
            with torch.cuda.device(device):
                return self._time_on_gpu(work)
        done = torch.get_device_module(device).synchronize
        done()
        start = self.now()
        work()
        done()
        return self.now() - start, None

    def _time_on_gpu(self, work: Callable[[], Any]) -> tuple[float, float]:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = self.now()
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        return self.now() - start, 1e-3 * before.elapsed_time(after)
