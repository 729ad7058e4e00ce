"""One live line that tells how a run is doing, in a terminal, in a notebook cell, or as one line per epoch in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO


class Progress:
    """Shows a run on `stream`; a stream that is neither a terminal nor a notebook gets whole lines only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() or (stream is None and "ipykernel" in sys.modules)
        self.started = time.monotonic()
        self.shown = 0.0
        self.width = 0

    def step(self, row: dict[str, Any], steps: int, epochs: int, remaining: float) -> None:
        """Redraw the live line after a step; at most five times a second."""
        now = time.monotonic()
        if not self.live or now - self.shown < 0.2:
            return
        self.shown = now
        parts = [
            f"epoch {row['epoch'] + 1}/{epochs}",
            f"{bar((row['step'] + 1) / steps)} {row['step'] + 1}/{steps}",
            f"loss {row['loss']:.2f}",
            f"lr {row['lr']:.1e}",
            f"{row['images_per_s']:.1f} img/s",
            f"left {clock(remaining)}",
        ]
        self._draw("  ".join(parts))

    def note(self, text: str) -> None:
        """Draw a passing remark (such as "evaluating 40/100") on the live line."""
        if self.live:
            self._draw(text)

    def line(self, text: str) -> None:
        """Write a line that stays."""
        blank = "\r" + " " * self.width + "\r" if self.width else ""
        self.width = 0
        self.stream.write(f"{blank}{text}\n")
        self.stream.flush()

    def _draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size((100, 24)).columns - 1]
        self.stream.write("\r" + text.ljust(self.width))
        self.stream.flush()
        self.width = len(text)


class Silent(Progress):
    """Shows nothing."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.live = False

    def line(self, text: str) -> None:
        """Say nothing."""


def bar(share: float, cells: int = 12) -> str:
    """A text bar `cells` wide filled to `share` in [0, 1]."""
    full = round(min(max(share, 0.0), 1.0) * cells)
    return "━" * full + "╌" * (cells - full)


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, s = divmod(round(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
