"""Datasets with a form of their own become COCO files: CrowdHuman's odgt and Objects365's JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from deimkit.data.fetch import Note, quiet
from deimkit.data.images import image_size, read_image
from deimkit.data.layout import is_image
from deimkit.errors import DataError

LONGEST = 640  # pixels: the longer side of Objects365's images, as D-FINE trained on them
QUALITY = 90  # of the shrunk JPEGs; our choice, D-FINE does not say
HELD_OUT = 5000  # images of Objects365's val that D-FINE measures on; it trains on the others too

Coco = dict[str, Any]


def crowdhuman_to_coco(odgt: str | Path, images: str | Path) -> Coco:
    """The full boxes of a CrowdHuman .odgt as COCO content with the one category "person".

    odgt: a file with one JSON object per image. images: the folder in which ID.jpg lie. Boxes are clipped to the image;
    those that lie outside it are left out. What is to be ignored (masks, and persons marked so) becomes a crowd. Images
    that are missing or unreadable are left out; `info.left_out` names them. Raises `DataError` for a malformed line.
    """
    images = Path(images)
    rows = list(_odgt_rows(Path(odgt)))
    sizes = _sizes(images / name for name, _ in rows)
    coco = _empty([{"id": 1, "name": "person"}])
    for (name, boxes), size in zip(rows, sizes, strict=True):
        if isinstance(size, str):
            coco["info"]["left_out"].append(f"{name}: {size}")
            continue
        image = _add_image(coco, len(coco["images"]) + 1, f"{images.name}/{name}", size)
        for ignored, xywh in boxes:
            _add_box(coco, image, 1, xywh, crowd=ignored)
    return coco


def objects365_to_coco(content: Coco, root: str | Path, folders: Iterable[str] = ("train", "val")) -> Coco:
    """Objects365's annotations, for the images that are there and as large as they are now.

    content: one of its JSON files. root: the dataset's folder; images are looked for by their names in `folders` below
    it, wherever a patch was unpacked. Boxes and areas are scaled to the size of the image on the disk and clipped.
    Images that are missing, unreadable or of other proportions than was said are left out; `info.left_out` names them.
    """
    places = _by_name(Path(root), folders)
    return _objects365(content, content["images"], Path(root), places)


def shrink(folder: str | Path, longest: int = LONGEST) -> list[str]:
    """Shrink the images below `folder` whose longer side is above `longest` pixels, keeping their proportions.

    They are resampled with Lanczos's filter as D-FINE's were, and stored upright. Images that cannot be read are
    deleted. Returns a sentence for each of those.
    """
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names if is_image(name)]
    with ThreadPoolExecutor() as pool:
        return [complaint for complaint in pool.map(lambda path: _shrink_one(path, longest), paths) if complaint]


def prepare_crowdhuman(folder: Path, files: dict[str, Path], note: Note = quiet, say: Note = quiet) -> None:
    """Write COCO files for the images unpacked into train/Images and val/Images."""
    for split in ("train", "val"):
        note(f"converting annotation_{split}.odgt")
        coco = crowdhuman_to_coco(files[f"annotation_{split}.odgt"], folder / split / "Images")
        _save(coco, folder, split, say)


def prepare_objects365(folder: Path, files: dict[str, Path], note: Note = quiet, say: Note = quiet) -> None:
    """Write COCO files for the patches unpacked into train and val, divided as D-FINE did.

    The first `HELD_OUT` images of val are measured on; the others join train.
    """
    note("reading zhiyuan_objv2_val.json")
    val = json.loads(files["zhiyuan_objv2_val.json"].read_bytes())
    places = _by_name(folder, ("train", "val"))
    _save(_objects365(val, val["images"][:HELD_OUT], folder, places), folder, "val", say)
    coco = _objects365(val, val["images"][HELD_OUT:], folder, places)
    note("reading zhiyuan_objv2_train.json")
    train = json.loads(files["zhiyuan_objv2_train.json"].read_bytes())
    _save(_objects365(train, train["images"], folder, places, coco), folder, "train", say)


def _odgt_rows(odgt: Path) -> Iterator[tuple[str, list[tuple[bool, list[float]]]]]:
    """The images of an .odgt file: the name of each, and its boxes as (whether to ignore it, xywh)."""
    with open(odgt, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                boxes = [
                    (found["tag"] != "person" or _ignored(found), _four(found["fbox"])) for found in row["gtboxes"]
                ]
                yield _file_name(row["ID"]), boxes
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"Line {number} of {odgt} is no image of CrowdHuman ({error!r}); expected an ID and gtboxes with a "
                    "tag and an fbox of four numbers. Was it copied completely?"
                ) from error


def _ignored(found: dict[str, Any]) -> bool:
    return found.get("extra", {}).get("ignore", 0) == 1


def _four(box: list[Any]) -> list[float]:
    """The four numbers of a box."""
    x, y, w, h = box
    if not all(isinstance(v, (int, float)) for v in (x, y, w, h)):
        raise ValueError(f"the box {box!r}")
    return [x, y, w, h]


def _file_name(id_: str) -> str:
    """The image of an ID, which is no path."""
    if "/" in id_ or "\\" in id_:
        raise ValueError(f"the ID {id_!r}")
    return f"{id_}.jpg"


def _objects365(content: Coco, rows: list[Any], root: Path, places: dict[str, str], into: Coco | None = None) -> Coco:
    """The images `rows` of `content` with their boxes, appended to `into` if given."""
    coco = _empty(content["categories"]) if into is None else into
    wanted = {row["id"]: row for row in rows}
    found = [(row, places.get(_base(row["file_name"]))) for row in rows]
    sizes = _sizes(root / place if place else None for _, place in found)
    scales: dict[Any, tuple[float, float]] = {}
    images: dict[Any, dict[str, Any]] = {}
    for (row, place), size in zip(found, sizes, strict=True):
        why = size if isinstance(size, str) else _other_proportions(row, size)
        if isinstance(size, str) or place is None or why:
            coco["info"]["left_out"].append(f"{row['file_name']}: {why}")
            continue
        height, width = size
        images[row["id"]] = _add_image(coco, row["id"], place, size)
        scales[row["id"]] = width / row["width"], height / row["height"]
    for box in content["annotations"]:
        owner = box["image_id"]
        if owner in wanted and owner in images:
            sx, sy = scales[owner]
            x, y, w, h = box["bbox"]
            scaled = [x * sx, y * sy, w * sx, h * sy]
            _add_box(coco, images[owner], box["category_id"], scaled, crowd=bool(box.get("iscrowd", 0)))
    return coco


def _other_proportions(row: dict[str, Any], size: tuple[int, int]) -> str:
    """What is wrong with an image of `size` (h, w) that should be a shrunk copy of `row`'s; "" if nothing."""
    height, width = size
    scale = max(height, width) / max(row["height"], row["width"])
    off = max(abs(row["height"] * scale - height), abs(row["width"] * scale - width))
    return f"is {width} x {height} px, said to be {row['width']} x {row['height']}" if off > 1 or scale > 1 else ""


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _by_name(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """Where the images in `folders` are, relative to `root`, by their names."""
    walks = (walk for folder in folders for walk in os.walk(root / folder))
    return {name: Path(place, name).relative_to(root).as_posix() for place, _, names in walks for name in names}


def _sizes(paths: Iterable[Path | None]) -> list[tuple[int, int] | str]:
    """Height and width of each image, or what is wrong with it."""

    def measure(path: Path | None) -> tuple[int, int] | str:
        try:
            return image_size(path) if path else "is missing"
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(measure, paths))


def _shrink_one(path: Path, longest: int) -> str:
    try:
        pixels = read_image(path)  # (H, W, 3)
    except DataError as error:
        path.unlink()
        return str(error)
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(path, quality=QUALITY)
    return ""


def _empty(categories: list[dict[str, Any]]) -> Coco:
    return {"info": {"left_out": []}, "images": [], "annotations": [], "categories": categories}


def _add_image(coco: Coco, id_: Any, name: str, size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    image = {"id": id_, "file_name": name, "height": height, "width": width}
    coco["images"].append(image)
    return image


def _add_box(coco: Coco, image: dict[str, Any], category: Any, xywh: list[float], crowd: bool) -> None:
    """Append a box in pixels, clipped to its image; one that nothing is left of is dropped."""
    x, y, w, h = xywh
    x1, x2 = (min(max(v, 0), image["width"]) for v in (x, x + w))
    y1, y2 = (min(max(v, 0), image["height"]) for v in (y, y + h))
    if x2 > x1 and y2 > y1:
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(crowd),
            }
        )


def _save(coco: Coco, folder: Path, split: str, say: Note) -> None:
    """Write annotations/instances_SPLIT.json, whole or not at all, and say what it holds."""
    left_out = coco["info"]["left_out"]
    if not coco["images"]:
        raise DataError(f"None of the {len(left_out)} images of {split} is there; the first: {left_out[:1]}.")
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(coco), encoding="utf-8")
    os.replace(draft, file)
    say(f"{file}: {len(coco['images'])} images, {len(coco['annotations'])} boxes")
    if left_out:
        say(f"{len(left_out)} images of {split} are left out; the first: {left_out[0]}")
