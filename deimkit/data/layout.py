"""How people arrange a dataset in folders: what they call its parts, and where the images lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from deimkit.data.images import IMAGE_SUFFIXES

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])\d*", re.I)
_DEPTH = 3  # folders below the root in which images are looked for
_SAMPLE = 20  # file names by which a folder of images is recognised


def split_of(name: str) -> str | None:
    """Which split a file or folder name speaks of: "instances_val2017" -> "val", "photos" -> None."""
    found = _SPLIT.search(name)
    return SPLIT_NAMES[found[1].lower()] if found else None


def split_word(name: str) -> str | None:
    """The word by which `split_of` knew it: "instances_val2017" -> "val2017"."""
    found = _SPLIT.search(name)
    return found[0] if found else None


def subfolders(root: Path) -> list[Path]:
    """The visible folders directly in `root`, by name."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def folders_below(root: Path) -> Iterator[Path]:
    """`root` and the visible folders below it, down to a sensible depth."""
    for folder, inner, _ in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        inner[:] = sorted(d for d in inner if not d.startswith(".")) if depth < _DEPTH else []
        yield Path(folder)


def is_image(name: str | Path) -> bool:
    """True if the name ends like an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_names(folder: Path) -> list[str]:
    """The names of the images directly in `folder`, sorted; none if there is no such folder."""
    return sorted(name for name in os.listdir(folder) if is_image(name)) if folder.is_dir() else []


class Listings:
    """Which files exist, asking the file system once per folder instead of once per file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self._names[folder]


def locate(names: Sequence[str], likely: Iterable[Path], root: Path) -> tuple[Path, bool] | None:
    """The folder that holds the images called `names`, and whether only their last part is to be looked for there.

    A likely folder wins over the other ones below `root`, then the one with most of a sample of the names, or of all
    names if no folder has any of the sample, then the first. None if no folder has any at all.
    """
    files = Listings()
    likely = list(dict.fromkeys(likely))
    others = [folder for folder in folders_below(root) if folder not in likely]
    short_names = [os.path.basename(name) for name in names]
    step = max(1, len(names) // _SAMPLE)
    for wanted, short in ((names[::step], False), (short_names[::step], True), (names, False), (short_names, True)):
        for folders in (likely, others):
            hits = {folder: sum(os.path.join(folder, name) in files for name in wanted) for folder in folders}
            best = max(folders, key=hits.__getitem__, default=None)
            if best is not None and hits[best]:
                return best, short
    return None
