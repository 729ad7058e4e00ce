"""Archives unpacked without trusting them: nothing lands outside, nothing fills the disk, nothing is left half done.

Everything goes into a draft folder first and is moved to its place when all of it is there. Only plain files and
folders are accepted; every other kind of member, and every name that leads elsewhere, is refused by name.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from deimkit.data.fetch import Note, amount, expect_room, quiet
from deimkit.errors import DataError

# JSON shrinks to a tenth, photos not at all; what grows more than this is made to fill a disk.
RATIO = 200
HARMLESS = 10 * 2**20  # bytes that may grow by any ratio
MEMBERS = 1_000_000  # files and folders in one archive; Objects365's largest has some 40,000

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_CHUNK = 1 << 20
_LONGEST_HEADER = 16 * 2**20  # bytes that tarfile may ask for at once; a header that claims more is a bomb
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError)
_ZIP_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Member:
    """One entry of an archive: its name there, "file" or "folder" or what else it is, its size and its content.

    size: bytes unpacked, as declared; what is read is never more. packed: bytes in the archive that it comes from.
    """

    name: str
    kind: str
    size: int
    packed: int
    open: Callable[[], IO[bytes]]


def is_archive(path: str | Path) -> bool:
    """True if the name ends like that of an archive that `extract` unpacks."""
    return str(path).lower().endswith(SUFFIXES)


def is_extracted(name: str, folder: Path, size: int | None = None) -> bool:
    """True if the archive called `name` (of `size` bytes) was unpacked into `folder` and is still there."""
    try:
        said = json.loads(_receipt(name, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return size in (None, said["bytes"]) and all((folder / inside).exists() for inside in said["names"])


def extract(
    archive: str | Path,
    folder: str | Path,
    note: Note = quiet,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Unpack a .zip, .tar or .tar.gz into `folder`, all of it or nothing; at once if that was done before.

    finish: called with the folder of what was unpacked, before it is moved to its place. Raises `DataError` naming the
    member if the archive is damaged or encrypted, holds a link, a device, a path that leads elsewhere, or a bomb.
    """
    archive, folder = Path(archive), Path(folder)
    size = archive.stat().st_size
    if is_extracted(archive.name, folder, size):
        return folder
    expect_room(folder, size, f"Unpacking {archive.name}")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{archive.name}.unpacking"
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir()
    try:
        _unpack(archive, draft, note)
        if finish is not None:
            finish(draft)
        names = sorted(os.listdir(draft))
        _merge(draft, folder)
        _receipt(archive.name, folder).write_text(json.dumps({"bytes": size, "names": names}), encoding="utf-8")
    except _DAMAGE as error:
        raise DataError(f"{archive} is damaged: {error}. Delete it and fetch it again.") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"{archive} did not fit: the disk of {folder} is full. What was unpacked is removed again; free some room "
            "and run again."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _receipt(name: str, folder: Path) -> Path:
    """The file that says that an archive was unpacked, and what was in it."""
    return folder / f".{name}.done"


def _unpack(archive: Path, draft: Path, note: Note) -> None:
    """Write every member below `draft`, or raise `DataError` at the first that is not harmless."""
    total, limit = 0, max(HARMLESS, RATIO * archive.stat().st_size)
    with _members(archive) as members:
        for count, member in enumerate(members, 1):
            place = _place(member, archive)
            total += member.size
            if member.size > max(HARMLESS, RATIO * member.packed) or total > limit:
                raise DataError(
                    f"{archive} unpacks {member.name!r} to {amount(total)}, more than {RATIO} times its own size: a "
                    "bomb made to fill the disk. Delete the archive, and fetch it from its publisher."
                )
            if count > MEMBERS:
                raise DataError(
                    f"{archive} holds more than {MEMBERS} members, {member.name!r} being the next. Delete it."
                )
            expect_room(draft, member.size, f"{member.name!r} of {archive}")
            _write(member, draft / place, archive)
            if count % 100 == 0:
                note(f"{archive.name}: {count} files unpacked, {amount(total)}")


def _place(member: Member, archive: Path) -> Path:
    """Where a member goes within the folder; `DataError` if that is elsewhere or it is neither file nor folder."""
    parts = [part for part in re.split(r"[/\\]", member.name) if part not in ("", ".")]
    wrong = None
    if member.name.startswith(("/", "\\")):
        wrong = "an absolute path"
    elif re.match(r"[A-Za-z]:", member.name):
        wrong = "a path that begins with a drive"
    elif ".." in parts:
        wrong = "a path that leads out of the folder"
    elif "\0" in member.name or (member.kind == "file" and not parts):
        wrong = "no usable name"
    elif member.kind not in ("file", "folder"):
        wrong = member.kind
    if wrong:
        raise DataError(
            f"{archive} is not unpacked, because its member {member.name!r} is {wrong}; expected files and folders "
            "within it. Delete the archive, and fetch it from its publisher."
        )
    return Path(*parts)


def _write(member: Member, place: Path, archive: Path) -> None:
    try:
        if member.kind == "folder":
            place.mkdir(parents=True, exist_ok=True)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(place, "wb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{archive} holds {member.name!r} both as a file and as a folder. Delete it.") from error


def _merge(draft: Path, folder: Path) -> None:
    """Move what is in `draft` into `folder`; folders that are there already are filled up."""
    for entry in sorted(draft.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        else:
            os.replace(entry, place)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The members of an open archive, one after the other."""
    name = archive.name.lower()
    if not is_archive(name):
        raise DataError(f"{archive} is no archive that deimkit unpacks; expected one of {', '.join(SUFFIXES)}.")
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as bundle:
            yield _zip_members(bundle)
        return
    with (
        _Careful(archive) if name.endswith("gz") else open(archive, "rb") as file,
        tarfile.open(fileobj=file, mode="r:") as bundle,
    ):
        yield _tar_members(bundle, archive.stat().st_size)


class _Careful(gzip.GzipFile):
    """A compressed tar whose headers may not be longer than they are in honest archives: tarfile reads one at once."""

    def read(self, size: int | None = -1) -> bytes:
        """As usual, unless much is asked for at once."""
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise DataError(f"{self.name} claims a header of {size} bytes: a bomb made to fill the memory. Delete it.")
        return super().read(size)


def _zip_members(bundle: zipfile.ZipFile) -> Iterator[Member]:
    for info in bundle.infolist():
        plain = "folder" if info.orig_filename.endswith(("/", "\\")) else "file"
        kind = "encrypted" if info.flag_bits & 0x1 else _ZIP_KINDS.get(stat.S_IFMT(info.external_attr >> 16), plain)
        yield Member(info.orig_filename, kind, info.file_size, info.compress_size, partial(bundle.open, info))


def _tar_members(bundle: tarfile.TarFile, packed: int) -> Iterator[Member]:
    for info in bundle:
        yield Member(info.name, _tar_kind(info), info.size, packed, partial(_content, bundle, info))


def _content(bundle: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    content = bundle.extractfile(info)
    if content is None:
        raise tarfile.ReadError(f"{info.name!r} has no content")
    return content


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issym():
        return "a symbolic link"
    if info.islnk():
        return "a hard link"
    if info.isfifo():
        return "a pipe"
    if info.ischr() or info.isblk():
        return "a device"
    if info.isdir():
        return "folder"
    return "file" if info.isreg() else f"of the unknown kind {info.type!r}"
