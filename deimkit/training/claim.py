"""Who trains a run: one process at a time, by a lock that ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from functools import cache
from pathlib import Path
from types import TracebackType

from deimkit.errors import DeimkitError

FILE = "pid"  # in the run folder: what is locked, and the number of the process that trains
HANDOVER = "DEIMKIT_CLAIM"  # environment variable: the file descriptor of a claim made for a child process
PATIENCE = 0.5  # seconds; those who only look (`holder`) lock for a moment too

_held: set[int] = set()


class Claim:
    """The right to train the run in `folder`, from here to `release`, the end of a `with` block, or of the process.

    A claim that the parent process has made for this one (`HANDOVER`) is taken over. A stop request from before is
    forgotten. Raises `DeimkitError` if another process has the claim.
    """

    def __init__(self, folder: Path) -> None:
        handed = _handed_over(folder)
        if handed is None:
            self.handle = _locked(folder)
            (folder / "stop").unlink(missing_ok=True)
        else:
            self.handle = handed
        _held.add(self.handle)
        _spare_children()
        self.name(os.getpid())

    def name(self, pid: int) -> None:
        """Write down which process trains."""
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, str(pid).encode(), 0)

    def release(self) -> None:
        """Give the claim up, as far as this process is concerned; a child that it was made for keeps it."""
        _held.discard(self.handle)
        os.close(self.handle)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def holder(folder: Path) -> int | None:
    """The process that trains the run in `folder` now, or None."""
    try:
        handle = os.open(folder / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(handle, 32, 0) or 0)
    finally:
        os.close(handle)
    return None


def _locked(folder: Path) -> int:
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            pid = os.pread(handle, 32, 0).decode()
            os.close(handle)
            raise DeimkitError(
                f"{folder} is already being trained by process {pid}. Stop it first: "
                f"`Run({str(folder)!r}).stop()`, or `kill {pid}`, which saves too."
            ) from None
        except OSError as error:
            os.close(handle)
            raise DeimkitError(
                f"{folder} is on a file system without locks ({error}), which keep two trainings apart. Put the run on "
                "another one, or mount this one with locks."
            ) from error


def _handed_over(folder: Path) -> int | None:
    """The descriptor of a claim on `folder` that the parent process made for this one."""
    handle = int(os.environ.get(HANDOVER, -1))
    path = folder / FILE
    if handle < 0 or not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        return None
    del os.environ[HANDOVER]
    os.set_inheritable(handle, False)
    return handle


@cache
def _spare_children() -> None:
    """A forked process, such as a loader's worker, must not keep alive the claim of the one it came from."""
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    while _held:
        os.close(_held.pop())
