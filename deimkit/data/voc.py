"""Pascal VOC: one XML file per image, classes by name, splits as lists of file stems in ImageSets/Main."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from deimkit.data.layout import SPLIT_NAMES, folders_below, image_names, split_of, subfolders
from deimkit.data.problems import Id, Problem, problem
from deimkit.data.raw import Raw
from deimkit.errors import DataError

_FOLDERS = ("Annotations", "annotations", "annotations/xmls", "")  # where the XML files may be, "" being the root


def read_splits(root: Path) -> list[Raw] | None:
    """The splits of a VOCdevkit year, or of folders named after splits that hold XML files; None if there are none."""
    files = _listed_files(root) or _files_by_folder(root)
    return _read(files, root) if files else None


def read_single(root: Path) -> list[Raw] | None:
    """All XML files of a folder without splits; None if there are none."""
    files = _xml_files(root)
    return _read({"all": files}, root) if files else None


def _xml_files(root: Path) -> list[Path]:
    """The XML files of a folder, in the first of the places where they may be."""
    return next((found for name in _FOLDERS if (found := sorted((root / name).glob("*.xml")))), [])


def _listed_files(root: Path) -> dict[str, list[Path]]:
    """Files by split as ImageSets/Main lists them; trainval stands for train where train is not listed."""
    files: dict[str, list[Path]] = {}
    for word in ("trainval", "train", "val", "test"):
        listing = root / "ImageSets" / "Main" / f"{word}.txt"
        if listing.is_file():
            stems = [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
            files[SPLIT_NAMES[word]] = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    return {name: listed for name, listed in files.items() if any(file.is_file() for file in listed)}


def _files_by_folder(root: Path) -> dict[str, list[Path]]:
    """Files by split from folders named train, valid, ..."""
    named = [(split_of(folder.name), _xml_files(folder)) for folder in subfolders(root)]
    return {name: files for name, files in named if name and files}


@dataclass
class _Parsed:
    """The content of the XML files of one split, in lists that grow together."""

    ids: list[Id] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    category: list[str] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    annotation_ids: list[Id] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _read(files: dict[str, list[Path]], root: Path) -> list[Raw]:
    """The splits of `files`; classes are numbered from 0 in the order of all their names."""
    parsed = {name: _parse(listed, root, name) for name, listed in files.items()}
    names = sorted({category for split in parsed.values() for category in split.category})
    if not names:
        count = sum(map(len, files.values()))
        raise DataError(f"None of the {count} XML files of {root} names an object; expected Pascal VOC annotations.")
    index = {name: i for i, name in enumerate(names)}
    return [
        Raw(
            name=name,
            source=files[name][0].parent,
            root=root,
            categories=dict(enumerate(names)),
            ids=split.ids,
            paths=split.paths,
            sizes=np.array(split.sizes).reshape(-1, 2),
            image=np.array(split.image, np.int64),
            category=[index[category] for category in split.category],
            boxes=np.array(split.boxes).reshape(-1, 4),
            crowd=np.array(split.difficult, bool),
            areas=np.full(len(split.boxes), math.nan),
            annotation_ids=split.annotation_ids,
            problems=split.problems,
            notes=_notes(name, split),
        )
        for name, split in parsed.items()
    ]


def _notes(name: str, split: _Parsed) -> list[str]:
    difficult = sum(split.difficult)
    return [f"{difficult} boxes of {name} marked difficult are neither learned nor counted."] if difficult else []


def _parse(files: list[Path], root: Path, split: str) -> _Parsed:
    """The content of the XML files; one that cannot be used becomes a problem."""
    out = _Parsed()
    folder = _image_folder(files, root)
    by_stem = {Path(name).stem: name for name in image_names(folder)}
    for number, file in enumerate(files, 1):
        try:
            tree = ElementTree.parse(file).getroot()
        except (OSError, ElementTree.ParseError) as error:
            detail = "is listed but does not exist" if not file.exists() else f"is not valid XML ({error})"
            out.problems.append(problem("malformed entry", file.name, detail, None, split))
            continue
        said = os.path.basename((tree.findtext("filename") or "").strip().replace("\\", "/"))
        name = said if said in by_stem.values() else by_stem.get(file.stem, said or f"{file.stem}.jpg")
        out.ids.append(number)
        out.paths.append(str(folder / name))
        out.sizes.append((_number(tree.findtext("size/height")) or 0.0, _number(tree.findtext("size/width")) or 0.0))
        for k, found in enumerate(tree.iter("object"), 1):
            _add_object(out, found, f"{file.name}:{k}", split)
    return out


def _add_object(out: _Parsed, found: ElementTree.Element, id_: str, split: str) -> None:
    """Append one object to the image that was appended last. VOC counts pixels from 1 and includes the last one."""
    name = (found.findtext("name") or "").strip()
    corners = [_number(found.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in corners:
        detail = f"object {id_!r} has the name {name!r} and the corners {corners}; expected a name and four numbers"
        out.problems.append(problem("malformed entry", out.paths[-1], detail, out.ids[-1], split))
        return
    x1, y1, x2, y2 = (float(v) for v in corners if v is not None)
    out.image.append(len(out.ids) - 1)
    out.category.append(name)
    out.boxes.append([x1 - 1, y1 - 1, x2, y2])
    out.difficult.append((found.findtext("difficult") or "0").strip() == "1")
    out.annotation_ids.append(id_)


def _number(text: str | None) -> float | None:
    """The number a text says, or None."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _image_folder(files: list[Path], root: Path) -> Path:
    """The folder with most images named like a sample of the XML files; one of the usual places if it has any."""
    here = files[0].parent
    usual = [here, here.parent / "JPEGImages", here.parent / "images", here.parent]
    sample = {file.stem for file in files[:: max(1, len(files) // 50)]}

    def hits(folder: Path) -> int:
        return len(sample & {Path(name).stem for name in image_names(folder)})

    best = max(usual, key=hits)
    return best if hits(best) else max(folders_below(root), key=hits)
