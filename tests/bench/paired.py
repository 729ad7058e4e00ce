"""Time two functions fairly on a noisy machine: in turn, after a warm-up, and quote the median ratio."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measured line. ours, peer (or None): in `unit`. ratio: how many times better ours is."""

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    note: str = ""


def seconds(f: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def paired(
    ours: Callable[[], Any], peer: Callable[[], Any], runs: int = 5, warmup: int = 1
) -> tuple[float, float, float]:
    """Median seconds of `ours` and of `peer`, and the median of the pairwise ratios peer / ours."""
    for _ in range(warmup):
        ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs)
