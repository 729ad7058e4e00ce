"""What a run measured, as a pandas table: a row for each step or epoch, a column for each number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

from deimkit.errors import DeimkitError

if TYPE_CHECKING:
    from pandas import DataFrame

INDEX = {"epoch": "epoch", "step": "step", "matching": "step", "probe": "epoch"}  # what a row of each kind is about
AT_ONCE = 4096  # rows turned into columns together; as dicts they take many times the memory


def known_kind(kind: str) -> str:
    """The `kind` itself; `DeimkitError` if there are no rows of that kind."""
    if kind not in INDEX:
        near = get_close_matches(kind, INDEX, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DeimkitError(f"A run keeps rows of the kinds {', '.join(INDEX)}; got {kind!r}.{hint}")
    return kind


def frame(rows: Iterable[dict[str, Any]], kind: str) -> DataFrame:
    """The rows of one kind as a table, indexed by epoch or by step of the whole run, both counted from 0.

    rows: of that kind and others, as the trainer writes them. The steps of all tell how long each epoch was, and with
    that which step of the run the first of the next one is. Raises `DeimkitError` if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DeimkitError(
            "Run.metrics needs pandas, which is not installed: `pip install pandas`. Run.rows does without."
        ) from error
    index = INDEX[kind]
    lengths: dict[int, int] = {}

    def wanted() -> Iterator[dict[str, Any]]:
        for row in rows:
            if "step" in row:
                lengths[row["epoch"]] = max(lengths.get(row["epoch"], 0), row["step"] + 1)
            if row.get("kind") == kind:
                yield flat(row)

    flats = wanted()
    parts = [pandas.DataFrame(part) for part in iter(lambda: list(islice(flats, AT_ONCE)), [])]
    nothing = pandas.DataFrame({"epoch": [], index: []}, dtype="int64")
    table = pandas.concat(parts, ignore_index=True) if parts else nothing
    if index == "step":
        length = pandas.Series(lengths, dtype="int64").sort_index()
        table["step"] += table["epoch"].map(length.cumsum() - length).astype("int64")
    return table.set_index(index)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with nothing nested: a loss is "mal/final", a class's AP "AP/cat", a layer's share "unstable/layer0".

    null becomes NaN; a histogram stays a list.
    """
    columns: dict[str, Any] = {}
    for name, value in row.items():
        match name, value:
            case "global_step", _:
                pass  # for loggers; the index says as much
            case "terms", dict():
                columns |= value
            case "per_class", dict():
                numbers = dict.fromkeys(number for found in value.values() for number in found)
                columns |= {f"{number}/{label}": value[label].get(number) for number in numbers for label in value}
            case _, dict():
                columns |= {f"{name}/{part}": number for part, number in value.items()}
            case _:
                columns[name] = value
    return {name: math.nan if value is None else value for name, value in columns.items() if name != "kind"}
