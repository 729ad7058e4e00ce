"""Which row of a trained head is which class, so that what a file knows about a class reaches the same class here."""

from __future__ import annotations

from collections.abc import Sequence

from deimkit.data.dataset import CategoryMap
from deimkit.errors import CheckpointError

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))

# The Objects365 class, counted from 0, that stands for each of COCO's.
OBJECTS365_OF_COCO = (
    0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96, 144, 295, 178, 180, 38, 39, 13,
    43, 120, 219, 148, 173, 165, 154, 137, 113, 145, 146, 204, 8, 35, 10, 88, 84, 93, 26, 112, 82, 265, 104, 141, 152,
    234, 143, 150, 97, 2, 50, 25, 75, 98, 153, 37, 73, 115, 132, 106, 61, 163, 134, 277, 81, 133, 18, 94, 30, 169, 70,
    328, 226,
)  # fmt: skip
# Other words for COCO's classes: those of Objects365 (misspelt as there), and of PASCAL VOC, which some lists keep.
ALIASES = {
    "wild bird": "bird",
    "handbag/satchel": "handbag",
    "luggage": "suitcase",
    "skating and skiing shoes": "skis",
    "baseball": "sports ball",
    "bowl/basin": "bowl",
    "orange/tangerine": "orange",
    "dinning table": "dining table",
    "monitor/tv": "tv",
    "moniter/tv": "tv",
    "stuffed toy": "teddy bear",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def published_names(rows: int) -> tuple[str | None, ...] | None:
    """The classes that a published head of so many rows tells apart: COCO's 80, Objects365's 365 or 366, else None.

    Objects365 heads have 366 rows because the raw category ids 1..365 served as labels: row 0 was never trained. Of
    their classes those that COCO has as well are named (as COCO does); the others are None.
    """
    if rows == len(COCO_NAMES):
        return COCO_NAMES
    if rows not in (365, 366):
        return None
    coco = {row + rows - 365: name for row, name in zip(OBJECTS365_OF_COCO, COCO_NAMES, strict=True)}
    return tuple(coco.get(row) for row in range(rows))


def class_rows(rows: int, names: Sequence[str | None] | None, categories: CategoryMap) -> tuple[int | None, ...] | None:
    """For each class of a detector the row of a file's head that knows it, or None; None for all if no class is known.

    rows: of the file's head. names: their classes, if the file (or the caller) says. Where it does not, 80, 365 or 366
    rows are taken for the published COCO and Objects365 heads, unless the detector has as many classes with other
    names: then, and where the detector's classes have no names of their own, row i is class i. Names are compared
    without regard to case, and other words for COCO's classes (`ALIASES`) count as COCO's.
    """
    count = len(categories)
    if names is not None and len(names) != rows:
        raise CheckpointError(f"Expected a name for each of the file's {rows} classes; got {len(names)} names.")
    if names is not None and _unnamed(names):
        names = None
    if {rows, count} == {365, 366} and names is None:
        return tuple(row if 0 <= row < rows else None for row in range(rows - count, rows - count + count))
    known = _rows_by_name(names or published_names(rows) or ())
    words = [_plain(str(name)) for name in categories.names]
    found = tuple(known.get(word, known.get(ALIASES.get(word, word))) for word in words)
    if rows == count and (_unnamed(categories.names) or (names is None and None in found)):
        return tuple(range(rows))
    return found if not _unnamed(categories.names) and any(row is not None for row in found) else None


def named(names: Sequence[str]) -> CategoryMap:
    """The categories of these names, with COCO's own ids if they are COCO's."""
    return CategoryMap(ids=COCO_IDS, names=COCO_NAMES) if tuple(names) == COCO_NAMES else CategoryMap.of(names)


def _unnamed(names: Sequence[str | None]) -> bool:
    """Whether classes were only ever counted: such names say nothing about what a class is."""
    return tuple(names) == CategoryMap.of(len(names)).names


def _rows_by_name(names: Sequence[str | None]) -> dict[str, int]:
    """Row of each class by its own name and, where no other class is called so, by COCO's word for it."""
    own = {_plain(name): row for row, name in enumerate(names) if name is not None}
    return {ALIASES.get(word, word): row for word, row in own.items()} | own


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
