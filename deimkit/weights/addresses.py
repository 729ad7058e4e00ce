"""A weight file from the web: fetched once, looked at, and kept for the next time."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deimkit.data.fetch import Note, fetch, quiet
from deimkit.errors import CheckpointError, DataError
from deimkit.weights.files import SUFFIXES, read


def is_address(source: object) -> bool:
    """Whether weights are asked for by where they lie on the web."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where fetched weight files are kept: in DEIMKIT_CACHE, or else with what else the user's programs keep."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DEIMKIT_CACHE") or f"{shared}/deimkit").expanduser().absolute() / "weights"


@dataclass(frozen=True)
class WebFile:
    """A weight file at an address.

    sha256 (hexadecimal), size (bytes): what it must have, where that is known.
    """

    url: str
    sha256: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        return self.url

    def fetch(self, note: Note = quiet) -> Path:
        """The file in the cache, which holds only what was found good; without a network if it is there already.

        What has arrived outlives a dropped connection and the process. note: told now and then how far it is. Raises
        `CheckpointError`.
        """
        address = urlsplit(self.url)
        name = address.path.rpartition("/")[2]
        if not name.lower().endswith(SUFFIXES):
            raise CheckpointError(
                f"Expected the address of a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file; got {self.url}. Fetch "
                "it with a browser and pass weights=FILE."
            )
        folder = cache_folder() / f"{address.hostname}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        path = folder / name
        try:
            if not path.exists():
                (folder / "arriving").mkdir(parents=True, exist_ok=True)
                with _alone(folder):
                    self._bring(path, note)
        except DataError as error:
            raise CheckpointError(f"{error} Or bring the file here by other means and pass weights=FILE.") from error
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot hold {name} ({error}). Set DEIMKIT_CACHE to a folder that can."
            ) from error
        return path

    def _bring(self, path: Path, note: Note) -> None:
        """Put the file at `path`, unless someone else just has."""
        if path.exists():
            return
        arrived = fetch(self.url, path.parent / "arriving" / path.name, size=self.size, note=note)
        try:
            self._look_at(arrived)
        except CheckpointError as error:
            arrived.unlink()
            raise CheckpointError(f"What came from {self.url} was deleted. {error}") from error
        os.replace(arrived, path)

    def _look_at(self, path: Path) -> None:
        """Raise `CheckpointError` unless the file is the one expected, and one of weights."""
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 not in (None, found):
            raise CheckpointError(f"{path.name} was damaged: expected SHA-256 {self.sha256}, got {found}. Try again.")
        read(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block that one process is in at a time: two that append to the same part would spoil it."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
