"""COCO: one JSON file per split with three flat lists: images, annotations, categories."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deimkit.data.layout import SPLIT_NAMES, locate, split_of, split_word
from deimkit.data.problems import Id, Problem, problem
from deimkit.data.raw import Raw
from deimkit.errors import DataError

_NUMBER = (int, float)

# Other annotations that COCO keeps in the same folder.
_OTHER_TASKS = ("captions", "person_keypoints", "keypoints", "panoptic", "stuff", "image_info")


def read_splits(root: Path) -> list[Raw] | None:
    """The splits of a folder with a JSON file for each (COCO's own layout, or Roboflow's); None if it has none."""
    files: dict[str, list[Path]] = {}
    for file in _json_files(root):
        name = split_of(file.stem) or (split_of(file.parent.name) if file.parent != root else None)
        if name:
            files.setdefault(name, []).append(file)
    if not files:
        return None
    return [_read_preferred(root, name, sorted(found, key=_preference)) for name, found in files.items()]


def read_single(root: Path) -> list[Raw] | None:
    """The one JSON file of a folder whose name says nothing of a split; None if there is none or there are several."""
    files = _json_files(root)
    if len(files) > 1:
        files = [f for f in files if any(word in f.stem.lower() for word in ("coco", "annotations", "instances"))]
    return [read_file(files[0], root)] if len(files) == 1 else None


def read_file(file: Path, root: Path | None = None, name: str | None = None) -> Raw:
    """One COCO file; its images lie beside it, in a folder named after the split, or elsewhere below `root`.

    name: of the split; by default what the file's name says, else "all". Raises `DataError` if it is no COCO file or
    none of its images can be found.
    """
    root = root or (file.parent.parent if file.parent.name.lower() in ("annotations", "labels") else file.parent)
    name = name or split_of(file.stem) or "all"
    content = _load(file)
    categories = _categories(content["categories"], file)
    problems: list[Problem] = []
    images = list(_images(content["images"], file, name, problems))
    if not images:
        raise DataError(f"{file} lists no images; expected at least one. Add images or remove the file.")
    paths, notes = _paths([image["file_name"] for image in images], file, root, name)
    return Raw(
        name=name,
        source=file,
        root=root,
        categories=categories,
        ids=[image["id"] for image in images],
        paths=paths,
        sizes=np.array([[_length(image.get("height")), _length(image.get("width"))] for image in images]),
        **_boxes(content["annotations"], images, file, name, problems),
        problems=problems,
        notes=notes,
    )


def _json_files(root: Path) -> list[Path]:
    """The JSON files of a folder and of the folders in it that may hold the boxes of objects, by name."""
    found = [*root.glob("*.json"), *root.glob("*/*.json")]
    return sorted(f for f in found if not f.stem.startswith(_OTHER_TASKS) and not f.parent.name.startswith("."))


def _preference(file: Path) -> tuple[bool, int, int]:
    """Among several files for a split: COCO's instances first, then the plainest name, then the latest year."""
    year = (split_word(file.stem) or "").lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return not file.stem.startswith("instances"), len(file.stem), -int(year or 0)


def _read_preferred(root: Path, name: str, files: list[Path]) -> Raw:
    raw = read_file(files[0], root, name)
    if len(files) > 1:
        others = ", ".join(f.name for f in files[1:])
        raw.notes.append(f"{name} is {files[0].relative_to(root)}; open a file by its path to use {others} instead.")
    return raw


def _load(file: Path) -> dict[str, Any]:
    """The content of a COCO file, with its three lists known to be there."""
    try:
        content = json.loads(file.read_bytes(), object_hook=_without_outline)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid JSON ({error}). Was it copied completely?") from None
    expected = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{file} is not a COCO file: expected an object with {', '.join(expected)}; got a {kind}.")
    missing = [key for key in expected if not isinstance(content.get(key), list)]
    if missing:
        got = ", ".join(list(content)[:8]) or "nothing"
        raise DataError(f"{file} is not a COCO file: expected the lists {', '.join(expected)}; got {got}.")
    return content


def _without_outline(row: dict[str, Any]) -> dict[str, Any]:
    """Forget an outline as soon as it is read: boxes do not need it, and in COCO it is most of the file."""
    row.pop("segmentation", None)
    return row


def _images(rows: list[Any], file: Path, split: str, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The images that have an id and a file name."""
    for i, row in enumerate(rows):
        if isinstance(row, dict) and isinstance(row.get("id"), (int, str)) and isinstance(row.get("file_name"), str):
            yield row
        else:
            detail = f"entry {i} of images is {_short(row)}; expected an object with an id and a file_name"
            problems.append(problem("malformed entry", file.name, detail, None, split))


def _categories(rows: list[Any], file: Path) -> dict[Id, str]:
    """Names by id, in the order of the ids."""
    names: dict[Id, str] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), (int, str)):
            raise DataError(f"{file} has the category {_short(row)}; expected an object with an id and a name.")
        name = str(row.get("name", row["id"]))
        if names.setdefault(row["id"], name) != name:
            raise DataError(
                f"{file} gives category {row['id']!r} two names, {names[row['id']]!r} and {name!r}. Renumber one."
            )
    if not names:
        raise DataError(f"{file} has no categories; expected at least one object with an id and a name.")
    return {id_: names[id_] for id_ in sorted(names, key=lambda v: (isinstance(v, str), v))}


def _length(value: Any) -> float:
    """A width or height in pixels; 0 if the file does not say it sensibly."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value >= 1 else 0.0


def _paths(names: list[str], file: Path, root: Path, split: str) -> tuple[list[str], list[str]]:
    """Where the images called `names` are, and a note if they are not where the file says."""
    names = [name.replace("\\", "/") for name in names]
    words = [split_word(file.stem) or split, *(word for word, of in SPLIT_NAMES.items() if of == split)]
    folders = [base / word for base in (root, root / "images") for word in words]
    place = locate(names, [file.parent, *folders, root, root / "images"], root)
    if place is None:
        raise DataError(
            f"None of the {len(names)} images of {file} was found, the first being {names[0]!r}; expected it beside "
            f"the file or in a folder below {root}. Move the images there."
        )
    folder, short = place
    if not short:
        return [os.path.normpath(os.path.join(folder, name)) for name in names], []
    note = f"The images of {file.name} were found by their names in {folder}, not at the paths that the file gives."
    return [os.path.join(folder, os.path.basename(name)) for name in names], [note]


def _boxes(
    rows: list[Any], images: list[dict[str, Any]], file: Path, split: str, problems: list[Problem]
) -> dict[str, Any]:
    """The fields of `Raw` that have a row for each box."""
    index = {image["id"]: i for i, image in reversed(list(enumerate(images)))}  # of equal ids the first
    image, boxes, areas, category, crowd, ids = [], [], [], [], [], []
    seen: set[Id] = set()
    for number, row in enumerate(rows):
        complaint = _complaint(row, index)
        if complaint:
            detail = f"entry {number} of annotations {complaint}"
            where = row.get("image_id") if isinstance(row, dict) else None
            owner = where if isinstance(where, (int, str)) and where in index else None
            problems.append(problem("malformed entry", file.name, detail, owner, split))
            continue
        id_ = row.get("id", number)
        if id_ in seen:
            detail = f"annotation id {id_!r} is used again"
            problems.append(problem("duplicate annotation id", file.name, detail, row["image_id"], split))
        seen.add(id_)
        area = row.get("area")
        image.append(index[row["image_id"]])
        boxes.append(row["bbox"])
        areas.append(area if isinstance(area, (int, float)) else math.nan)
        category.append(row.get("category_id"))
        crowd.append(bool(row.get("iscrowd", 0)))
        ids.append(id_)
    xyxy = np.array(boxes, np.float64).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    return {
        "image": np.array(image, np.int64),
        "category": category,
        "boxes": xyxy,
        "crowd": np.array(crowd, bool),
        "areas": np.array(areas, np.float64),
        "annotation_ids": ids,
    }


def _complaint(row: Any, index: dict[Id, int]) -> str | None:
    """What makes an annotation unreadable, or None."""
    if not isinstance(row, dict):
        return f"is {_short(row)}; expected an object"
    try:
        if row.get("image_id") not in index:
            return (
                f"(id {row.get('id')!r}) belongs to image {row.get('image_id')!r}, which is not in the list of images"
            )
        hash(row.get("category_id")), hash(row.get("id"))
        x, y, w, h = row["bbox"]
        if not (
            isinstance(x, _NUMBER) and isinstance(y, _NUMBER) and isinstance(w, _NUMBER) and isinstance(h, _NUMBER)
        ):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        return f"is {_short(row)}; expected ids and a bbox of four numbers x, y, width, height"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
