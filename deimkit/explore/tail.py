"""Rows of a file that grows, read as they come and kept in little memory, however many there will be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.explore.curves import POINTS

MARK = 64  # bytes before the place that was read to, by which a rewritten file is known
STEP = b'{"kind": "step"'  # how the many rows begin, of which some may be passed over


class Tail:
    """The rows of a JSONL file as they come: what was read once is not read again.

    A last line that is still being written waits until it is whole. A file that got shorter, or that holds something
    else before the place that was read to, has been rewritten and is read from its beginning. When there is very much
    to catch up with, only every so-many-th row of a step is looked at.
    """

    CHUNK = 1 << 20  # bytes at a time, so that a file of any size takes little memory
    MUCH = 16 << 20  # bytes of rows that are looked at one by one

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._mark = b""

    def rows(self, rewritten: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
        """The rows that came since the last time; `rewritten` is called before all of them come again."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(max(self.offset - len(self._mark), 0))
            if file.read(len(self._mark)) != self._mark:
                self.offset, self._mark = 0, b""
                file.seek(0)
                rewritten()
            every = 1 + max(os.fstat(file.fileno()).st_size - self.offset, 0) // self.MUCH
            rest = b""
            while chunk := file.read(self.CHUNK):
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                self.offset += len(whole) + len(newline)
                self._mark = (self._mark + whole + newline)[-MARK:]
                lines = whole.split(b"\n")
                if every > 1:
                    lines = [line for i, line in enumerate(lines) if i % every == 0 or not line.startswith(STEP)]
                yield from filter(None, map(_row, lines))


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if a crash has cut it short."""
    try:
        row = json.loads(line) if line else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class Means:
    """A growing table in little memory: at most 2 * `points` rows, each the mean of as many consecutive ones.

    Columns appear with the first value of their name; what is not a finite number counts for nothing.
    """

    def __init__(self, points: int = POINTS) -> None:
        self.points = points
        self.per, self.length, self._filled = 1, 0, 0  # rows in each mean, means so far, rows in the last of them
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a row."""
        if not self.length or self._filled == self.per:
            self._grow()
        self._filled += 1
        for name, value in values.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if name not in self._sums:
                self._sums[name], self._counts[name] = np.zeros(2 * self.points), np.zeros(2 * self.points, np.int64)
            self._sums[name][self.length - 1] += value
            self._counts[name][self.length - 1] += 1

    def _grow(self) -> None:
        """Make room for one more mean; a full table is first halved."""
        if self.length == 2 * self.points:
            for table in (self._sums, self._counts):
                for column in table.values():
                    column[: self.points] = column.reshape(-1, 2).sum(1)
                    column[self.points :] = 0
            self.per, self.length = 2 * self.per, self.points
        self.length, self._filled = self.length + 1, 0

    def column(self, name: str) -> NDArray[np.float64]:
        """The means of a column (length,), NaN where nothing was counted."""
        if name not in self._sums:
            return np.full(self.length, math.nan)
        sums, counts = self._sums[name][: self.length], self._counts[name][: self.length]
        return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)

    def names(self, prefix: str) -> list[str]:
        """The names of the columns that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self._sums if name.startswith(prefix)]


class Sample:
    """At most `most` of the rows that come, evenly spread over all of them; the first is always among them."""

    def __init__(self, most: int = POINTS) -> None:
        self.most = most
        self.rows: list[dict[str, Any]] = []
        self._seen, self._every = 0, 1

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, or pass it over."""
        if self._seen % self._every == 0:
            if len(self.rows) == self.most:
                self.rows, self._every = self.rows[::2], 2 * self._every
            if self._seen % self._every == 0:
                self.rows.append(row)
        self._seen += 1


def number(value: Any) -> float:
    """A number of a row; NaN for what is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan
