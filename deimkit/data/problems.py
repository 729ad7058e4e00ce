"""Everything that can be wrong with a dataset, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

Id = int | str

SEVERITIES = ("error", "warning", "info")

# kind: severity, remedy. An error is what training refuses: something that somebody meant otherwise than it stands.
_KINDS = {
    "cannot be opened": ("error", ""),
    "malformed entry": ("error", "Correct or delete it"),
    "missing file": ("error", "Restore the file or delete its entry"),
    "path outside the folder": ("error", "Move the image into the folder of the dataset"),
    "unreadable image": ("error", "Copy the file again or delete its entry"),
    "duplicate image id": ("error", "Give each image its own id"),
    "unknown category": ("error", "Correct the category or add it to the list"),
    "box not finite": ("error", "Correct or delete the annotation"),
    "box outside the image": ("error", "Scale the boxes if they are meant for another size of the image"),
    "boxes beyond the image": (
        "error",
        "Scale or turn the boxes to fit the upright image, and correct width and height",
    ),
    "no boxes": ("error", "Check that the labels are where they should be"),
    "size differs": ("warning", "Correct width and height, and make sure that the boxes fit the upright image"),
    "box sticks out": ("warning", "It is clipped; correct the annotation"),
    "box without area": ("warning", "It is left out; delete the annotation"),
    "duplicate box": ("warning", "Delete one of the two"),
    "duplicate annotation id": ("warning", "Number the annotations anew"),
    "duplicate file": ("warning", "Merge the two entries"),
    "duplicate image": ("warning", "Keep one of the two"),
    "same image in two splits": ("warning", "Take it out of one: what was seen in training measures nothing"),
    "categories differ": ("warning", "Give all splits the same list of categories"),
    "class without boxes": ("warning", "It cannot be learned; annotate some or drop the class"),
    "rare class": ("warning", "Annotate more; so few are hardly learned"),
    "class not in val": ("warning", "Its AP cannot be measured; add images of it to val"),
    "too many boxes": ("warning", "Raise the number of queries, or cut the image into tiles"),
    "tiny image": ("warning", "Leave it out, unless it is meant to be that small"),
    "huge image": ("warning", "Shrink it or cut it into tiles: decoding will hold up training"),
    "doubtful annotation": ("warning", "Look at it: correct the class or the box, or keep it if the detector is wrong"),
    "object without annotation": ("warning", "Look at it: annotate it, if it is one"),
    "marked for repair": ("warning", "Correct the annotation, and take the mark away"),
    "fixes of other images": ("info", ""),
    "class": ("info", ""),
    "boxes per image": ("info", ""),
    "box sizes": ("info", ""),
    "rotated by EXIF": ("info", ""),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset: where, what, and what to do about it.

    severity: "error" (training refuses), "warning" or "info". kind: a few words that group problems of the same sort.
    file: the image or annotation file. image: the id of the image, if it is about one. split: "train", "val", ...
    """

    severity: str
    kind: str
    file: str
    detail: str
    remedy: str = ""
    image: Id | None = None
    split: str = ""

    def __str__(self) -> str:
        what = f"{self.file}: {self.detail}." if self.file else f"{self.detail}."
        return f"{what} {self.remedy}." if self.remedy else what


def problem(kind: str, file: str, detail: str, image: Id | None = None, split: str = "") -> Problem:
    """The problem of a known kind, with its severity and remedy."""
    severity, remedy = _KINDS[kind]
    return Problem(severity, kind, file, detail, remedy, image, split)
