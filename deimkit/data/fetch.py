"""A file from the web, whole and unharmed or not at all, however often the connection drops.

What has arrived stays in `NAME.part`, and `NAME.part.json` says which version of the file it is a part of. So a second
call carries on where the first one stopped, and never joins the halves of two versions.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deimkit.data.web import (
    NO_SUCH_PIECE,
    PARTIAL,
    Announced,
    Dropped,
    ask,
    chunks,
    expect_no_page,
    expect_web_address,
)
from deimkit.errors import DataError

Note = Callable[[str], None]

MARGIN = 256 * 2**20  # bytes that a download leaves free on the disk
LONGEST_PAUSE = 30.0  # seconds between two attempts


def quiet(text: str) -> None:
    """Say nothing: what hears the progress of a download that nobody watches."""


def fetch(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    note: Note = quiet,
    retries: int = 5,
    pause: float = 1.0,
) -> Path:
    """The file at `url`, put at `path` once it is complete; one that is there already is left as it is.

    url: http or https. sha256, md5: hexadecimal digests it must have. size: bytes it must have. note: told now and then
    how far it is. retries: attempts in a row that may bring nothing new; those that do are not counted. pause: seconds
    between two attempts, doubled with each failure. What has arrived outlives an error, an interrupt and the process.
    Raises `DataError` if the file cannot be had, is not what was expected, or does not fit on the disk.
    """
    path = Path(path)
    expect_web_address(url)
    if path.exists():
        _expect_size(path, size)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer = _Transfer(url, path, size, sha256 is not None or md5 is not None, note)
    furthest, failures = transfer.have, 0
    while not transfer.complete:
        try:
            transfer.attempt()
        except Dropped as drop:
            failures = 0 if transfer.have > furthest else failures + 1
            furthest = max(furthest, transfer.have)
            if failures > retries:
                raise DataError(
                    f"{url} could not be fetched: {drop} {failures} times in a row, with {transfer.share} here. "
                    f"Run again to carry on from there; it is kept in {transfer.part}."
                ) from drop
            seconds = min(pause * 2**failures, LONGEST_PAUSE)
            note(f"{path.name}: {drop} with {transfer.share} here; trying again in {seconds:.0f} s")
            time.sleep(seconds)
    _expect_digest(transfer, sha256, md5, note)
    os.replace(transfer.part, path)
    transfer.seal_file.unlink(missing_ok=True)
    return path


def expect_room(folder: Path, needed: int, purpose: str) -> None:
    """Raise `DataError` unless the disk of `folder` has `needed` bytes free, and a margin."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + MARGIN:
        raise DataError(
            f"{purpose} needs {amount(needed + MARGIN)} on the disk of {existing}; {amount(free)} are free. "
            "Free some, or choose a folder on another disk."
        )


def amount(count: float) -> str:
    """Bytes as people say them: 815585330 -> "815.6 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 372 -> "6 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Seal:
    """Which version of which file the part on the disk belongs to.

    validator: the server's ETag or date of the file, "" if it gives none. total: bytes, None if it does not say.
    """

    url: str
    validator: str
    total: int | None


class _Transfer:
    """The state of one download: the part on the disk, its seal, and how fast it grows."""

    def __init__(self, url: str, path: Path, size: int | None, digest: bool, note: Note) -> None:
        self.url, self.name, self.size, self.digest, self.note = url, path.name, size, digest, note
        self.part = path.with_name(f"{path.name}.part")
        self.seal_file = path.with_name(f"{path.name}.part.json")
        self.seal = self._read_seal()
        self.complete = False
        self.began, self.arrived, self.noted = time.monotonic(), 0, 0.0
        if self.seal is None:
            self._start_over()
        elif self.have == self.seal.total:
            self.complete = True

    @property
    def have(self) -> int:
        """How many bytes are on the disk."""
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def share(self) -> str:
        """How much is here, of how much."""
        total = self.seal.total if self.seal else self.size
        return f"{amount(self.have)} of {amount(total)}" if total else amount(self.have)

    def attempt(self) -> None:
        """Ask for what is missing and append it; `Dropped` if the connection does not hold until the end."""
        with ask(self.url, self._headers()) as response:
            self._receive(response)

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": "deimkit"}
        if self.have:
            headers["Range"] = f"bytes={self.have}-"
            if self.seal and self.seal.validator:
                headers["If-Range"] = self.seal.validator  # if the file has changed, the server sends it from its start
        return headers

    def _receive(self, response: Any) -> None:
        """Append the body of an answer that is the file or the rest of it."""
        announced = Announced.of(response.status, response.headers)
        if response.status == NO_SUCH_PIECE:
            self._settle(announced.total)
            return
        expect_no_page(self.url, response.headers)
        if self.size is not None and announced.total not in (None, self.size):
            raise DataError(
                f"{self.url} announces {announced.total} bytes; expected {self.size}. The file has changed, or the "
                "server sends something else: look at it with a browser."
            )
        if response.status == PARTIAL and not self._continues(announced):
            self._start_over()
            raise Dropped("the server sent a piece of another version")
        if announced.total is None and not announced.delimited and self.size is None and not self.digest:
            raise DataError(
                f"{self.url} does not say how long it is, so that nobody could tell whether all of it came. "
                "Fetch it with a browser."
            )
        body = chunks(response)
        first = next(body, b"")
        if announced.start == 0:
            expect_no_page(self.url, response.headers, first)
            self._start_over()
            self._write_seal(_Seal(self.url, announced.validator, announced.total))
        total = announced.total if announced.total is not None else self.size
        expect_room(self.part.parent, (total or self.have) - self.have, self.name)
        self._append(itertools.chain([first] if first else [], body), total)

    def _continues(self, announced: Announced) -> bool:
        """Whether a partial answer carries on where the part on the disk ends, in the same version of the file."""
        seal = self.seal
        same = seal is not None and announced.total == seal.total and announced.validator in ("", seal.validator)
        return same and announced.start == self.have

    def _settle(self, total: int | None) -> None:
        """What it means that nothing comes after the part on the disk, of `total` bytes as the server now says."""
        promised = self.seal.total if self.seal else None
        if self.have and total == self.have and promised in (None, total):
            self.complete = True
            return
        self._start_over()
        if promised is not None and total is not None and total < promised:
            raise DataError(f"{self.url} promised {promised} bytes and now has {total}. Run again to fetch it anew.")
        raise Dropped("the server has no such piece")

    def _append(self, body: Iterable[bytes], total: int | None) -> None:
        """Write the body as it comes, so that what came is never lost, and see that it is as long as was said."""
        have = self.have
        with open(self.part, "ab", buffering=0) as file:
            for chunk in body:
                have += len(chunk)
                if total is not None and have > total:
                    self._start_over()
                    raise DataError(
                        f"{self.url} sends more than the {total} bytes that it should have. The server is wrong about "
                        "its length or sends something else: look at it with a browser."
                    )
                self._write(file, chunk)
                self._tell(have, len(chunk), total)
        if total is not None and have < total:
            raise Dropped("the connection dropped")
        self.complete = True

    def _write(self, file: Any, chunk: bytes) -> None:
        try:
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise DataError(
                f"{self.part} cannot grow beyond {amount(self.have)}: {why}. Free some room and run again; what is "
                "here is kept."
            ) from error

    def _tell(self, have: int, new: int, total: int | None) -> None:
        """Note how far it is; at most five times a second."""
        self.arrived += new
        now = time.monotonic()
        if now - self.noted < 0.2 and have != total:
            return
        self.noted = now
        speed = self.arrived / max(now - self.began, 1e-3)
        parts = [f"{self.name} {amount(have)}" + (f" of {amount(total)}" if total else ""), f"{amount(speed)}/s"]
        self.note(", ".join([*parts, f"{duration((total - have) / speed)} left"] if total else parts))

    def _start_over(self) -> None:
        self.part.unlink(missing_ok=True)
        self.seal_file.unlink(missing_ok=True)
        self.seal = None

    def _read_seal(self) -> _Seal | None:
        """The seal of the part on the disk; None if there is none that fits the address."""
        try:
            seal = _Seal(**json.loads(self.seal_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        fits = seal.url == self.url and (self.size is None or seal.total in (None, self.size))
        return seal if fits and self.part.exists() and self.have <= (seal.total or self.have) else None

    def _write_seal(self, seal: _Seal) -> None:
        self.seal = seal
        self.seal_file.write_text(json.dumps(asdict(seal)), encoding="utf-8")


def _expect_size(path: Path, size: int | None) -> None:
    got = path.stat().st_size
    if size is not None and got != size:
        raise DataError(f"{path} is there already with {got} bytes; expected {size}. Delete it and run again.")


def _expect_digest(transfer: _Transfer, sha256: str | None, md5: str | None, note: Note) -> None:
    """Raise `DataError` unless the complete part has the digests; one that has not is put aside."""
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        note(f"{transfer.name}: checking")
        with open(transfer.part, "rb") as file:
            got = hashlib.file_digest(file, kind).hexdigest()
        if got != expected.lower():
            aside = transfer.part.with_name(f"{transfer.name}.damaged")
            os.replace(transfer.part, aside)
            transfer.seal_file.unlink(missing_ok=True)
            raise DataError(
                f"{transfer.url} came with the {kind} {got}; expected {expected}. It was put aside as {aside}. "
                "Delete that, and run again to fetch it anew."
            )
