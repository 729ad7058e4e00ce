"""What FiftyOne needs on this machine: what of it is there, what is missing, and the command that brings it.

FiftyOne keeps its data in a MongoDB server, `mongod`. It starts one of its own for all processes of a user, from a file
inside its package, or connects to the one that FIFTYONE_DATABASE_URI names. Nothing here imports or starts FiftyOne.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deimkit.explore.fiftyone.mongod import (
    PORT,
    DatabaseError,
    database_folder,
    how_to_get_fiftyone,
    how_to_get_mongod,
    how_to_mend_mongod,
    mongod_path,
    own_server,
    serving,
    setting,
    without_password,
)

OLDEST = (6, 0)  # the first MongoDB that this FiftyOne takes
SPACE = 512 * 2**20  # bytes; a new database takes 300 MB at once


@dataclass(frozen=True)
class Check:
    """One thing that FiftyOne needs: `found` says how it stands, `remedy` what to do if that is not `ok`."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Readiness:
    """Whether FiftyOne can open its database here, thing by thing."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is in the way."""
        return all(check.ok for check in self.checks)

    def demand(self) -> None:
        """Raise the first thing in the way as a `DatabaseError`."""
        for check in self.checks:
            if not check.ok:
                raise DatabaseError(f"{check.found} {check.remedy}")

    def table(self) -> str:
        """The checks as text of at most 120 columns."""
        lines = ["FiftyOne can be used here." if self.ok else "FiftyOne cannot be used here yet."]
        for check in self.checks:
            lines += _wrapped(f"{'ok' if check.ok else 'MISSING':9}{check.what:18}", check.found)
            lines += [] if check.ok else _wrapped(" " * 27, check.remedy)
        return "\n".join(lines)


def ready() -> Readiness:
    """Look at what FiftyOne needs on this machine; nothing is imported, started or written."""
    return Readiness(tuple(_checks()))


def fiftyone_report() -> tuple[str, bool, dict[str, Any]]:
    """What `deimkit doctor --fiftyone` says: as text, whether all is well, and as JSON types."""
    found = ready()
    return found.table(), found.ok, {"ok": found.ok, "checks": [asdict(check) for check in found.checks]}


def _checks() -> Iterator[Check]:
    """The checks in the order in which they make sense; what hangs on a missing thing is not looked at."""
    yield (package := _package())
    address = setting("database_uri")
    if address:
        yield _server(address)
    elif package.ok:
        yield (runs := _mongod(mongod_path()))
        if runs.ok:
            folder = database_folder()
            yield _folder(folder)
            yield _space(folder)
            yield _alone(folder)


# ---------------------------------------------------------------------------------------------------- the checks


def _package() -> Check:
    """Is FiftyOne installed?"""
    try:
        return Check("FiftyOne", True, f"FiftyOne {version('fiftyone')} is installed.")
    except PackageNotFoundError:
        return Check("FiftyOne", False, "FiftyOne is not installed.", how_to_get_fiftyone())


def _mongod(path: Path) -> Check:
    """Is there a mongod, does it run, and is it new enough?"""
    if not path.is_file():
        return Check("mongod", False, f"FiftyOne's database server is missing: no {path}.", how_to_get_mongod(path))
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("mongod", False, f"{path} does not run: {error}.", how_to_get_mongod(path))
    number = re.search(r"db version v(\d+)\.(\d+)\.\d+", told.stdout)
    if told.returncode or not number:
        said = (told.stderr or told.stdout).strip() or f"exit code {told.returncode}"
        words = said.splitlines()[-1].removeprefix(f"{path}: ")
        return Check("mongod", False, f"{path} does not run: {words}.", how_to_mend_mongod(path, words))
    found = f"{path} is MongoDB {number[0].removeprefix('db version v')}"
    if (int(number[1]), int(number[2])) < OLDEST:
        return Check("mongod", False, f"{found}, too old for FiftyOne.", how_to_get_mongod(path))
    return Check("mongod", True, f"{found}.")


def _server(address: str) -> Check:
    """Does a MongoDB answer at the address that was given?"""
    shown = without_password(address)
    port = re.search(r":(\d+)(?:[/?,]|$)", address.rpartition("@")[2])
    start = own_server(int(port[1]) if port else PORT)
    remedy = f"Start one: `{start}`; or `unset FIFTYONE_DATABASE_URI` to let FiftyOne start its own."
    try:
        from pymongo import MongoClient
        from pymongo.errors import ConnectionFailure, PyMongoError
    except ImportError:
        return Check("server", True, f"FIFTYONE_DATABASE_URI is {shown} (not tried: no pymongo).")
    try:
        client: MongoClient[dict[str, Any]] = MongoClient(address, serverSelectionTimeoutMS=3000)
        with client:
            number = str(client.server_info()["version"])
    except (PyMongoError, ValueError) as error:
        told = (
            str(error) if isinstance(error, ConnectionFailure) else "it is no address, or its password is not escaped"
        )
        reason = told.partition(" (configured timeouts")[0].partition(", Timeout:")[0]
        reason = reason.replace("No servers found yet", "something else listens there")
        return Check("server", False, f"No MongoDB answers at FIFTYONE_DATABASE_URI={shown}: {reason}.", remedy)
    if tuple(int(part) for part in number.split(".")[:2]) < OLDEST:
        return Check("server", False, f"The MongoDB at {shown} is {number}; FiftyOne needs 6.0 or newer.", remedy)
    return Check("server", True, f"MongoDB {number} answers at {shown}.")


def _folder(folder: Path) -> Check:
    """Can the database's folder be written to?"""
    remedy = "Make it writable, or name another one: `export FIFTYONE_DATABASE_DIR=/a/writable/folder`."
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            held = (
                [file.name for file in folder.iterdir() if not os.access(file, os.R_OK | os.W_OK)]
                if there == folder
                else []
            )
    except OSError as error:
        words = f"The database folder {folder} cannot be written to ({error.strerror})."
        return Check("database folder", False, words, remedy)
    if held:
        words = f"The database folder {folder} holds files of another user, such as {held[0]}."
        return Check("database folder", False, words, remedy)
    return Check("database folder", True, f"{folder} can be written to.")


def _space(folder: Path) -> Check:
    """Is there room for a database?"""
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{free / 2**30:.1f} GiB are free at {folder}"
    remedy = "Free some, or name another folder: `export FIFTYONE_DATABASE_DIR=/a/larger/disk`."
    least = SPACE // 8 if (folder / "WiredTiger").exists() else SPACE
    if free < least:
        return Check("space", False, f"{found}; its database needs {least / 2**30:.1f} GiB.", remedy)
    return Check("space", True, f"{found}.")


def _alone(folder: Path) -> Check:
    """Is the database that runs for this user, if any, the one that is asked for? FiftyOne takes it in any case."""
    running = serving()
    if running is None:
        return Check("running", True, "No database runs; FiftyOne starts one when it is needed.")
    pid, other = running
    if not _same(folder, other):
        found = f"FiftyOne runs a database in {other} already (process {pid}), and would use it in place of {folder}."
        remedy = f"Use it too: `export FIFTYONE_DATABASE_DIR={other}`; or start one beside it: `{own_server()}`."
        return Check("running", False, found, remedy)
    return Check("running", True, f"The database in {other} runs (process {pid}) and will be used.")


# --------------------------------------------------------------------------------------------------------- small


def _existing(folder: Path) -> Path:
    """The folder, or what exists above it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _wrapped(label: str, text: str) -> list[str]:
    """Text beside a label, in lines of at most 120 columns; commands and paths stay whole."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 120, initial_indent=label, subsequent_indent=" " * len(label), **options)
