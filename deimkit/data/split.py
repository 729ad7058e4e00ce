"""A split is a list of images with one flat table of boxes, and a category is an index with its dataset's own id.

The arrays are packed so that the workers of a loader share their memory instead of copying it object by object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.data.images import Pixels, read_image
from deimkit.data.problems import Id, Problem
from deimkit.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CategoryMap:
    """The one place where a class index 0, 1, 2, ... meets the dataset's own category id and name.

    ids: the dataset's ids (int or str), of any numbering. names: one per id. The position is the class index.
    Raises `DataError` if the two do not pair or an id comes twice.
    """

    ids: tuple[Id, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise DataError(f"A CategoryMap pairs ids with names; got {len(self.ids)} ids and {len(self.names)} names.")
        twice = _first_repeated(self.ids)
        if twice is not None:
            raise DataError(f"Category ids must be unique; got {twice!r} twice. Rename one of the two.")

    @staticmethod
    def of(categories: int | Sequence[str] | CategoryMap) -> CategoryMap:
        """Categories from a count, from names, or as they are; ids are then 0, 1, 2, ..."""
        if isinstance(categories, CategoryMap):
            return categories
        if isinstance(categories, int):
            categories = [f"class {i}" for i in range(categories)]
        return CategoryMap(ids=tuple(range(len(categories))), names=tuple(categories))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _index(self) -> dict[Id, int]:
        return {id_: i for i, id_ in enumerate(self.ids)}

    def __contains__(self, id_: object) -> bool:
        return id_ in self._index

    def index(self, id_: Id) -> int:
        """The class index of a category id; `DataError` if there is no such category."""
        if id_ not in self._index:
            raise DataError(f"No category has id {id_!r}; the ids are {_some(self.ids)}.")
        return self._index[id_]

    def id(self, index: int) -> Id:
        """The dataset's own id of a class index."""
        return self.ids[index]

    def name(self, index: int) -> str:
        """The name of a class index."""
        return self.names[index]

    @property
    def distinct(self) -> tuple[str, ...]:
        """A name for every class that no other one has: where two have the same, their ids stand behind it."""
        pairs = zip(self.names, self.ids, strict=True)
        return tuple(f"{name} ({id_})" if self.names.count(name) > 1 else name for name, id_ in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, from which `from_dict` makes the same map; string and integer ids stay what they are."""
        return {"ids": list(self.ids), "names": list(self.names)}

    @staticmethod
    def from_dict(state: dict[str, Any]) -> CategoryMap:
        """The map that `to_dict` wrote."""
        return CategoryMap(ids=tuple(state["ids"]), names=tuple(state["names"]))


class Packed(Sequence[Any]):
    """A list of strings or numbers kept as one array of bytes, which processes share without copying.

    wrap: makes what is handed out of what was stored, such as `Path` of a string.
    """

    def __init__(self, values: Iterable[Any], wrap: Callable[[Any], Any] | None = None) -> None:
        texts = [json.dumps(v).encode() + b"," for v in values]
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        self._wrap = wrap

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a list of {len(self)}")
        row = index % len(self)
        value = json.loads(self._bytes[self._ends[row] : self._ends[row + 1] - 1].tobytes())
        return self._wrap(value) if self._wrap else value

    def __iter__(self) -> Iterator[Any]:
        values = json.loads(b"[" + self._bytes[:-1].tobytes() + b"]")
        return map(self._wrap, values) if self._wrap else iter(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self[:4]}".replace("]", f", ... {len(self)} in all]") if len(self) > 4 else f"{self[:]}"

    def take(self, indices: Iterable[int]) -> Packed:
        """The values at `indices`."""
        chosen = np.fromiter(indices, np.int64)
        out = Packed([], self._wrap)
        starts, lengths = self._ends[chosen], np.diff(self._ends)[chosen]
        out._ends = np.concatenate([[0], np.cumsum(lengths)])
        out._bytes = self._bytes[_ranges(starts, lengths)]
        return out


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The images of one part of a dataset and all their boxes, image after image.

    ids, paths: one per image; ids are the dataset's own. sizes: (n, 2) int32 height and width in pixels.
    boxes: (N, 4) float32 xyxy in pixels, inside the image. labels: (N,) int64 class indices. crowd: (N,) bool: rows
    that training leaves out and evaluation neither rewards nor punishes. areas: (N,) float64 px^2, the annotation's own
    where it has one. annotation_ids: one per box. starts: (n + 1,) int64; image i has the rows starts[i]:starts[i+1].
    problems: what was found while reading; images and boxes that cannot be used are listed there and left out here.
    """

    name: str
    categories: CategoryMap
    ids: Sequence[Id]
    paths: Sequence[Path]
    sizes: NDArray[np.int32]
    boxes: NDArray[np.float32]
    labels: Ints
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    starts: Ints
    annotation_ids: Ints | Packed
    problems: tuple[Problem, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} images, {len(self.labels)} boxes, {len(self.categories)} categories)"

    def rows(self, i: int) -> slice:
        """Where the boxes of image `i` stand in the packed arrays."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def image(self, i: int) -> Pixels:
        """Image `i` as (H, W, 3) uint8 RGB, upright; `DataError` naming the file if it cannot be read."""
        return read_image(self.paths[i])

    @property
    def images_of_rows(self) -> Ints:
        """The image index of every box: (N,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any image id, size, box or label, but not when the files are moved."""
        digest = hashlib.sha256(json.dumps(list(self.ids)).encode())
        for values in (self.sizes, self.starts, self.boxes, self.labels, self.crowd):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:12]

    def renamed(self, name: str) -> Split:
        """The same split under another name, by which its problems now call it, too."""
        return replace(self, name=name, problems=tuple(replace(p, split=name) for p in self.problems))

    def take(self, indices: Iterable[int]) -> Split:
        """The same split with only the images at `indices`, in that order; problems stay with their images."""
        chosen = np.fromiter(indices, np.int64)
        counts = np.diff(self.starts)[chosen]
        rows = _ranges(self.starts[chosen], counts)
        ids = _take(self.ids, chosen)
        kept = set(ids)
        return replace(
            self,
            ids=ids,
            paths=_take(self.paths, chosen),
            sizes=self.sizes[chosen],
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            starts=np.concatenate([[0], np.cumsum(counts)]),
            annotation_ids=_take(self.annotation_ids, rows),
            problems=tuple(p for p in self.problems if p.image is None or p.image in kept),
        )

    def without(self, bad: Iterable[Problem | Id]) -> Split:
        """The split without the images that `bad` names (problems, or image ids), and without these problems.

        Problems of other splits are no concern of this one.
        """
        bad = list(bad)
        mine = [p for p in bad if isinstance(p, Problem) and p.split in ("", self.name)]
        ids = {p.image for p in mine} | {id_ for id_ in bad if not isinstance(id_, Problem)}
        solved = set(mine)
        left = self.take(i for i, id_ in enumerate(self.ids) if id_ not in ids)
        return replace(left, problems=tuple(p for p in left.problems if p not in solved))

    def to_coco(self) -> dict[str, Any]:
        """The split as a COCO dictionary under the dataset's own image and category ids, as pycocotools takes it.

        Annotations are numbered from 1, because pycocotools takes a match with annotation 0 for no match.
        """
        xywh = self.boxes.astype(np.float64)
        xywh[:, 2:] -= xywh[:, :2]
        ids = list(self.ids)
        of_rows = self.images_of_rows
        return {
            "info": {"description": self.name},
            "images": [
                {"id": id_, "file_name": path.name, "height": int(h), "width": int(w)}
                for id_, path, (h, w) in zip(ids, self.paths, self.sizes, strict=True)
            ],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": ids[image],
                    "category_id": self.categories.ids[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for row, (image, label, box, area, crowd) in enumerate(
                    zip(of_rows, self.labels, xywh.tolist(), self.areas.tolist(), self.crowd, strict=True)
                )
            ],
            "categories": [
                {"id": id_, "name": name} for id_, name in zip(self.categories.ids, self.categories.names, strict=True)
            ],
        }


def pack_ids(values: Sequence[Id]) -> Ints | Packed:
    """Annotation ids as an array if they are numbers that fit one, else as packed values."""
    try:
        if all(type(v) is int for v in values):
            return np.array(values, np.int64)
    except OverflowError:
        pass
    return Packed(values)


def _take(values: Any, indices: Ints) -> Any:
    """The values at `indices` of an array, of packed values or of a list."""
    if isinstance(values, Packed):
        return values.take(indices)
    return values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """The concatenation of start, start + 1, ... of every range: (sum of counts,)."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _first_repeated(values: Iterable[Id]) -> Id | None:
    """The first value that was there before, or None."""
    seen: set[Id] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _some(values: Iterator[Any] | Sequence[Any], count: int = 8) -> str:
    """The first few of many values as text."""
    listed = [repr(v) for v in list(values)]
    return ", ".join(listed[:count]) + (f", ... ({len(listed)} in all)" if len(listed) > count else "")
