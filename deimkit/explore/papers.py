"""What the papers claim, table by table, as plain rows: the numbers that a measurement is put beside.

The tables are the files of `data/papers`; its README.md lists them. An installed package brings them along.
"""

from __future__ import annotations

import csv
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from deimkit.errors import DataError

# What every table of detection results has, whatever else it has.
COLUMNS = (
    *("paper", "table", "model", "epochs", "params_m", "gflops", "latency_ms"),
    *("ap", "ap50", "ap75", "aps", "apm", "apl", "backbone", "data", "group", "note"),
)

CHECKOUT = Path(__file__).resolve().parents[2] / "data" / "papers"
INSTALLED = Path(__file__).resolve().parent / "papers_data"

_WHOLE, _NUMBER = re.compile(r"-?\d+"), re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


def tables() -> list[str]:
    """The names of all tables, such as "deim_table11": by document, then by number.

    Raises `DataError` where the folder of the tables is missing.
    """
    return sorted((path.stem for path in _folder().glob("*_table*.csv")), key=_document_and_number)


def table(name: str) -> list[dict[str, Any]]:
    """The rows of one table, in the paper's order: a number is an int or a float, an empty cell is None.

    AP is in percent, params_m in millions, latency_ms in milliseconds; `note` says where the paper has a slip.
    Raises `DataError` for a name that is not in `tables()`.
    """
    names = tables()
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0)[0]
        raise DataError(f'There is no table "{name}"; the nearest is "{nearest}", and tables() lists all.')
    with (_folder() / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{column: _value(text) for column, text in row.items()} for row in csv.DictReader(file)]


def results() -> list[dict[str, Any]]:
    """Every detection result of every document, in the columns of `COLUMNS`.

    Not all are of the same benchmark (`data` names it), and the slides repeat rows of their paper.
    """
    rows = [row for name in tables() for row in table(name)]
    return [{column: row[column] for column in COLUMNS} for row in rows if row.keys() >= set(COLUMNS)]


def _folder() -> Path:
    """Where the tables lie: in the checkout, or else in the installed package."""
    for folder in (CHECKOUT, INSTALLED):
        if next(folder.glob("*_table*.csv"), None):
            return folder
    raise DataError(
        f"Expected the papers' tables in {CHECKOUT} or {INSTALLED} and found none; "
        "restore data/papers from the repository, or install deimkit again."
    )


def _document_and_number(name: str) -> tuple[str, int]:
    document, _, number = name.rpartition("_table")
    return document, int(number)


def _value(text: str) -> int | float | str | None:
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text or None
