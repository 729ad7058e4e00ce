"""YOLO: one TXT file per image with a line "class cx cy w h" in fractions for each box, and names in a data.yaml."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deimkit.data.layout import folders_below, image_names, is_image, split_of, subfolders
from deimkit.data.problems import Id, Problem, problem
from deimkit.data.raw import Raw
from deimkit.errors import DataError

_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "predefined_classes.txt")


def read_yaml(root: Path) -> list[Raw] | None:
    """The splits of a folder with a data.yaml; None if it has no YAML file that names a train or val folder."""
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")], key=lambda f: (f.stem != "data", f.name)):
        if {"train", "val"} & _load(file).keys():
            return read_yaml_file(file)
    return None


def read_yaml_file(file: Path) -> list[Raw]:
    """The splits that a data.yaml describes; `DataError` if it has no names or a folder it gives does not exist."""
    spec = _load(file)
    names = _names(spec, file)
    base = file.parent / str(spec.get("path") or "")
    bases = [base if base.is_dir() else file.parent, file.parent]
    raws = []
    for key in ("train", "val", "test"):
        given = spec.get(key) or (spec.get("valid") if key == "val" else None)
        if given:
            images = [
                image
                for one in ([given] if isinstance(given, str) else given)
                for image in _images(str(one), bases, file)
            ]
            raws.append(_read(key, images, names, file, file.parent, pose="kpt_shape" in spec))
    return [raw for raw in raws if raw is not None]


def read_splits(root: Path) -> list[Raw] | None:
    """The splits of images/train + labels/train, train/images + train/labels, or train/ with both; None without any."""
    found: dict[str, list[Path]] = {}
    for folder in [*subfolders(root), *(subfolders(root / "images") if (root / "images").is_dir() else [])]:
        name = split_of(folder.name)
        images = _images_in(folder)
        if name and any(_has_label(image) for image in images):
            found[name] = images
    return _read_unnamed(found, root) if found else None


def read_single(root: Path) -> list[Raw] | None:
    """All images of images/ + labels/, or of one folder with both; None if no image has a TXT file."""
    images = _images_in(root)
    return _read_unnamed({"all": images}, root) if any(_has_label(image) for image in images) else None


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid YAML ({' '.join(str(error).split())}).") from None
    return content if isinstance(content, dict) else {}


def _names(spec: dict[str, Any], file: Path) -> dict[Id, str]:
    """Class names by class number, from a list or a dictionary, or made up from their count."""
    names = spec.get("names")
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        return {key: str(name) for key, name in sorted(names.items())}
    if isinstance(names, list):
        return {i: str(name) for i, name in enumerate(names)}
    if isinstance(spec.get("nc"), int):
        return {i: f"class {i}" for i in range(spec["nc"])}
    raise DataError(
        f"{file} must give names as a list or as number: name; got {names!r}. Add the names of the classes."
    )


def _images(given: str, bases: list[Path], file: Path) -> list[Path]:
    """The images in a folder, or listed in a text file, that a data.yaml gives relative to one of `bases`.

    Roboflow writes ../train/images for a folder that lies beside its data.yaml.
    """
    inner = given
    while inner.startswith("../"):
        inner = inner.removeprefix("../")
    for place in [base / name for name in (given, inner) for base in bases]:
        if place.is_dir():
            return _images_in(Path(os.path.normpath(place)))
        if place.is_file():
            lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
            return [Path(os.path.normpath(place.parent / line)) for line in lines if is_image(line)]
    raise DataError(
        f"{file} names {given!r}, which does not exist in {bases[0]}. Correct the path, or add path: to the file."
    )


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder and below it."""
    return [inner / name for inner in folders_below(folder) for name in image_names(inner)]


def _label_files(image: Path) -> list[Path]:
    """Where the boxes of an image may be: labels/ in place of the last images/, else labels/ nearby, else beside it."""
    parts = list(image.parts)
    places = [image.parent.parent / "labels", image.parent]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        places.insert(0, Path(*parts[:last], "labels", *parts[last + 1 : -1]))
    return [place / f"{image.stem}.txt" for place in places]


def _has_label(image: Path) -> bool:
    return any(file.is_file() for file in _label_files(image))


def _read_unnamed(found: dict[str, list[Path]], root: Path) -> list[Raw]:
    """Splits without a data.yaml: names from a text file if there is one, else numbers as far as they are used."""
    listing = next((f for folder in (root, root / "labels") for n in _NAME_FILES if (f := folder / n).is_file()), None)
    names: dict[Id, str] = {}
    if listing is not None:
        lines = listing.read_text(encoding="utf-8").splitlines()
        names = {i: line.strip() for i, line in enumerate(lines) if line.strip()}
    raws = [raw for name, images in found.items() if (raw := _read(name, images, names, root, root)) is not None]
    if not names:
        used = [c for raw in raws for c in raw.category if isinstance(c, int)]
        names = {i: f"class {i}" for i in range(max(used, default=0) + 1)}
        raws[0].notes.append(
            f"No file names the {len(names)} classes; they are called by their numbers. Add a data.yaml with names."
        )
        for raw in raws:
            raw.categories = names
    return raws


def _read(
    name: str, images: list[Path], names: dict[Id, str], source: Path, root: Path, pose: bool = False
) -> Raw | None:
    """The split of `images` with their label files; a test split may lack these and is then None."""
    if not images:
        raise DataError(f"{source} has no image for {name}; expected at least one. Correct the path or add images.")
    inside = Path(os.path.commonpath([root.absolute(), *(image.absolute().parent for image in images)]))
    problems: list[Problem] = []
    image, category, boxes, annotation_ids = [], [], [], []
    labelled = 0
    for i, path in enumerate(images):
        file = next((f for f in _label_files(path) if f.is_file()), None)
        if file is None:
            continue
        labelled += 1
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            row = _numbers(line, pose)
            if row is None:
                detail = f"line {number} is {line[:60]!r}; expected class cx cy w h, or class and a polygon"
                problems.append(problem("malformed entry", os.path.relpath(file, inside), detail, i + 1, name))
            elif row:
                image.append(i)
                category.append(int(row[0]))
                boxes.append(_corners(row[1:]))
                annotation_ids.append(f"{file.name}:{number}")
    if not labelled:
        if name == "test":
            return None
        where = _label_files(images[0])[0]
        raise DataError(
            f"None of the {len(images)} images of {name} has a label file; expected {where} for the first. "
            "Add the labels."
        )
    return Raw(
        name=name,
        source=source,
        root=inside,
        categories=names,
        ids=list(range(1, len(images) + 1)),
        paths=[str(path) for path in images],
        sizes=np.zeros((len(images), 2)),
        image=np.array(image, np.int64),
        category=list(category),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        crowd=np.zeros(len(boxes), bool),
        areas=np.full(len(boxes), math.nan),
        annotation_ids=list(annotation_ids),
        fractions=True,
        problems=problems,
    )


def _numbers(line: str, pose: bool) -> list[float] | None:
    """The numbers of a line: class and box, or class and polygon; empty for an empty line, None if it is neither.

    pose: key points follow the box and are left out.
    """
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        return None
    if pose:
        row = row[:5]
    is_box, is_polygon = len(row) == 5, len(row) >= 7 and len(row) % 2 == 1
    return row if not row or ((is_box or is_polygon) and row[0].is_integer()) else None


def _corners(values: Iterable[float]) -> list[float]:
    """xyxy of cx, cy, w, h, or of the box around a polygon x, y, x, y, ..."""
    values = list(values)
    if len(values) > 4:
        xs, ys = values[0::2], values[1::2]
        return [min(xs), min(ys), max(xs), max(ys)]
    cx, cy, w, h = values
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
