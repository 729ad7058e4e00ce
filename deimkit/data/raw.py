"""What a reader found in files becomes a split that can be trained on, and a list of what could not.

Every format ends here, so every format is checked alike: a reader says what stands in the files (`Raw`), `pack` checks
images and boxes, leaves out what cannot be used, and names each omission.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deimkit.data.images import image_size
from deimkit.data.layout import Listings
from deimkit.data.problems import Id, Problem, problem
from deimkit.data.split import CategoryMap, Ints, Packed, Split, pack_ids
from deimkit.errors import DataError

# A box may stick out by less than this before it is worth a word: annotation tools round to whole pixels.
SLACK = 1.0


@dataclass
class Raw:
    """One split as it stands in its files, before anything is checked.

    name: "train", "val", "test", or "all" if the source has no splits. source: the annotation file or folder.
    root: the folder that images may not lie outside of. categories: name of each id, in the order of the classes.
    ids, paths: one per image. sizes: (n, 2) height and width; 0 where the files do not say. image: (N,) index of each
    box's image. category: N ids. boxes: (N, 4) xyxy in pixels, or in fractions of the image if `fractions`. crowd:
    (N,). areas: (N,) or NaN where the files do not say. annotation_ids: N ids. notes: sentences for `Dataset.notes`.
    """

    name: str
    source: Path
    root: Path
    categories: dict[Id, str]
    ids: list[Id]
    paths: list[str]
    sizes: NDArray[np.float64]
    image: Ints
    category: list[Id]
    boxes: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    annotation_ids: list[Id]
    fractions: bool = False
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Findings:
    """Collects the problems of one split, given images and boxes by their index."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.problems = list(raw.problems)

    def image(self, kind: str, i: int, detail: str) -> None:
        """A problem of image `i`."""
        file = _relative(self.raw.paths[i], self.raw.root)
        self.problems.append(problem(kind, file, detail, self.raw.ids[i], self.raw.name))

    def box(self, kind: str, row: int, detail: str) -> None:
        """A problem of box `row`."""
        self.image(kind, int(self.raw.image[row]), f"annotation {self.raw.annotation_ids[row]!r} {detail}")


def pack(raw: Raw, categories: CategoryMap, rename: Mapping[Id, Id] | None = None) -> Split:
    """The split that `raw` describes, with `categories`; what cannot be used is in its `problems` instead.

    rename: category ids of `raw` that `categories` knows under another id.
    """
    found = _Findings(raw)
    usable = _usable_images(raw, found)
    index = {id_: categories.index((rename or {}).get(id_, id_)) for id_ in raw.categories}
    labels = np.fromiter((index.get(c, -1) for c in raw.category), np.int64, len(raw.category))
    boxes, keep = _usable_boxes(raw, labels, usable[raw.image] if len(raw.image) else np.zeros(0, bool), found)

    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(raw.image[rows], kind="stable")]
    counts = np.bincount(raw.image[rows], minlength=len(raw.ids))[usable]
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    areas = np.where(raw.areas > 0, raw.areas, box_areas)  # NaN compares as False
    images = np.flatnonzero(usable).tolist()
    return Split(
        name=raw.name,
        categories=categories,
        ids=Packed(raw.ids[i] for i in images),
        paths=Packed((raw.paths[i] for i in images), Path),
        sizes=raw.sizes[usable].astype(np.int32),
        boxes=boxes[rows].astype(np.float32),
        labels=labels[rows],
        crowd=raw.crowd[rows],
        areas=areas[rows],
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_ids=pack_ids([raw.annotation_ids[row] for row in rows.tolist()]),
        problems=tuple(found.problems),
    )


def _usable_images(raw: Raw, found: _Findings) -> NDArray[np.bool_]:
    """Which images exist, lie inside the folder, have an id of their own and a size: (n,). Fills in missing sizes."""
    usable = np.ones(len(raw.ids), bool)
    seen_ids: set[Id] = set()
    seen_paths: dict[str, Id] = {}
    files = Listings()
    inside = os.path.join(os.path.abspath(raw.root), "")
    for i, (id_, path) in enumerate(zip(raw.ids, raw.paths, strict=True)):
        if id_ in seen_ids:
            usable[i] = False
            found.image("duplicate image id", i, f"has the id {id_!r} of an earlier image")
        elif not os.path.abspath(path).startswith(inside):
            usable[i] = False
            found.image("path outside the folder", i, f"lies outside {raw.root}")
        elif path not in files:
            usable[i] = False
            found.image("missing file", i, "is listed but does not exist")
        elif path in seen_paths:
            found.image("duplicate file", i, f"is listed as image {seen_paths[path]!r} and again as {id_!r}")
        seen_ids.add(id_)
        seen_paths.setdefault(path, id_)
    _fill_sizes(raw, usable, found)
    return usable


def _fill_sizes(raw: Raw, usable: NDArray[np.bool_], found: _Findings) -> None:
    """Read the size of the images whose files do not say it from their headers; one that has none is not usable."""
    unknown = np.flatnonzero(usable & ~(raw.sizes >= 1).all(1)).tolist()

    def measure(i: int) -> tuple[int, int] | DataError:
        try:
            return image_size(raw.paths[i])
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for i, size in zip(unknown, pool.map(measure, unknown), strict=True):
            if isinstance(size, DataError):
                usable[i] = False
                found.image("unreadable image", i, reason(size, raw.paths[i]))
            else:
                raw.sizes[i] = size


def reason(error: DataError, path: str | Path) -> str:
    """The first sentence of an error about a file, without the file's name and without its full stop."""
    return str(error).removeprefix(str(path)).strip().split(". ")[0].rstrip(".")


def _usable_boxes(
    raw: Raw, labels: Ints, usable: NDArray[np.bool_], found: _Findings
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes clipped to their images (N, 4) xyxy, and which of them (N,) can be used."""
    limits = raw.sizes[raw.image][:, ::-1] if len(raw.image) else np.zeros((0, 2))  # width, height
    boxes = raw.boxes * np.tile(limits, 2) if raw.fractions else raw.boxes
    low, high = np.zeros_like(limits), limits
    clipped = np.concatenate([np.clip(boxes[:, :2], low, high), np.clip(boxes[:, 2:], low, high)], 1)

    finite = np.isfinite(boxes.sum(1))
    flat = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    gone = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])
    out = np.abs(clipped - boxes).max(1) >= SLACK
    unknown = labels < 0

    for row in np.flatnonzero(usable & (~finite | unknown | flat | gone | out)).tolist():
        said = f"has the box {_xyxy(boxes[row])}"
        height, width = raw.sizes[raw.image[row]]
        where = f"outside the image of {width:.0f} x {height:.0f} px"
        if not finite[row]:
            found.box("box not finite", row, said)
        elif unknown[row]:
            detail = f"has the category {raw.category[row]!r}, which is none of the {len(raw.categories)} categories"
            found.box("unknown category", row, detail)
        elif flat[row]:
            found.box("box without area", row, said)
        elif gone[row]:
            hint = "; YOLO counts in fractions of the image" if raw.fractions else ""
            found.box("box outside the image", row, f"{said}, wholly {where}{hint}")
        else:
            found.box("box sticks out", row, f"{said}, partly {where}")
    return np.nan_to_num(clipped), usable & finite & ~unknown & ~flat & ~gone


def _xyxy(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{v:.6g}" for v in box) + "]"


def _relative(path: str, root: Path) -> str:
    """The path as seen from the dataset's folder, where it lies in it."""
    relative = os.path.relpath(path, root)
    return path if relative.startswith("..") else relative
