"""What is wrong with a dataset, named file by file, before a GPU is touched.

Opening a dataset already lists what its annotations get wrong; the doctor adds what only the pixels tell and what only
the whole shows: damaged and mislabelled images, copies in train and val, classes that cannot be learned or measured.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deimkit.data.dataset import Dataset
from deimkit.data.images import is_rotated, read_image
from deimkit.data.problems import SEVERITIES, Problem, problem
from deimkit.data.raw import SLACK, reason
from deimkit.data.split import Split
from deimkit.errors import DataError

FEW_BOXES = 10  # a class with fewer in train is hardly learned
QUERIES = 300  # what the published detectors can find in one image
TINY_SIDE = 32  # px; the coarsest feature map has one cell for as much
HUGE = 24_000_000  # pixels; decoding takes longer than a training step
SMALL, LARGE = 32**2, 96**2  # px^2, where COCO's small and medium objects end


@dataclass(frozen=True, repr=False)
class Report:
    """What the doctor found; `ok` if training may start.

    dataset: its name. summary: what was examined. problems: every finding, errors first.
    """

    dataset: str
    summary: str
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True if no problem is an error."""
        return not self.of("error")

    def of(self, severity: str) -> list[Problem]:
        """The problems of one severity: "error", "warning" or "info"."""
        return [p for p in self.problems if p.severity == severity]

    def table(self, limit: int | None = 10) -> str:
        """The report as text of at most 120 columns, with up to `limit` problems of each kind (None: all)."""
        counts = ", ".join(_count(len(self.of(s)), s) for s in ("error", "warning"))
        lines = textwrap.wrap(f"{self.dataset}: {self.summary} {counts}.", 120)
        for (severity, kind), group in groupby(self.problems, lambda p: (p.severity, p.kind)):
            found = list(group)
            lines += ["", f"{severity}: {kind} ({len(found)})"]
            for p in found[:limit]:
                lines += textwrap.wrap(
                    f"{p.file}: {p.detail}" if p.file else p.detail, 118, initial_indent="  ", subsequent_indent="    "
                )
            if limit is not None and len(found) > limit:
                lines.append(f"  ... and {len(found) - limit} more")
            for remedy in dict.fromkeys(p.remedy for p in found if p.remedy):
                lines += textwrap.wrap(remedy, 118, initial_indent="  -> ", subsequent_indent="     ")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON: dataset, summary, ok, and a list of problems with their fields."""
        problems = [asdict(p) for p in self.problems]
        return json.dumps({"dataset": self.dataset, "summary": self.summary, "ok": self.ok, "problems": problems})

    @staticmethod
    def read(path: str | Path) -> Report:
        """The report that `to_json` wrote to a file; `DataError` if there is none in it."""
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8"))
            problems = tuple(Problem(**p) for p in said["problems"])
            for found in problems:
                if found.severity not in SEVERITIES or not isinstance(found.image, int | str | None):
                    raise ValueError(f"no problem: {found}")
            return Report(said["dataset"], said["summary"], problems)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no report of the doctor ({error}); `Report.to_json` writes one.") from error

    def __repr__(self) -> str:
        return self.table()


def doctor(source: str | Path | Dataset, pixels: bool = True, fixes: Report | str | Path | None = None) -> Report:
    """Examine a dataset and list every problem with its file and remedy, errors first.

    source: a dataset, or what `Dataset.open` takes; one that cannot be opened is a report with one error. pixels:
    also decode every image, in threads, which takes about a minute for ten thousand photographs on one core.
    fixes: a list of what was found elsewhere, such as `fix_list`'s or a file of it; what is about images that the
    dataset does not have is counted and left out. Raises `DataError` if that file holds no report.
    """
    listed = fixes if isinstance(fixes, Report) else Report("", "", ()) if fixes is None else Report.read(fixes)
    try:
        data = source if isinstance(source, Dataset) else Dataset.open(source)
    except DataError as error:
        found = problem("cannot be opened", "", str(error).rstrip("."))
        return Report(str(source), "It could not be opened.", (found,))
    problems = [*data.problems, *_whole(data)]
    for split in data.splits:
        problems += [*_boxes(split), *_statistics(split)]
    if pixels:
        problems += _pixels(data)
    problems += _known(listed.problems, data)
    images = sum(len(split) for split in data.splits)
    boxes = sum(len(split.labels) for split in data.splits)
    classes = _count(len(data.categories), "class", "classes")
    summary = f"{_count(images, 'image')}, {_count(boxes, 'box', 'boxes')}, {classes}."
    return Report(data.name, summary, tuple(sorted(problems, key=lambda p: (SEVERITIES.index(p.severity), p.kind))))


def _known(listed: Sequence[Problem], data: Dataset) -> Iterator[Problem]:
    """What is listed about images that the dataset has, by split, id and file, and how much is about others."""
    pairs = ((split.name, zip(split.ids, split.paths, strict=True)) for split in data.splits)
    there = {(name, id_, short(path)) for name, images in pairs for id_, path in images}
    known = [p for p in listed if p.image is None or (p.split, p.image, p.file) in there]
    yield from known
    if len(known) < len(listed):
        detail = f"{len(listed) - len(known)} of {len(listed)} entries are about images that are not in this dataset"
        yield problem("fixes of other images", "", detail)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# ------------------------------------------------------------------------------------------------- annotations


def _whole(data: Dataset) -> Iterator[Problem]:
    """What the counts of each class in train and val tell."""
    counts = {s.name: np.bincount(s.labels[~s.crowd], minlength=len(data.categories)) for s in data.splits}
    train, val = counts.get("train"), counts.get("val")
    if train is not None and not train.any():
        yield problem("no boxes", "", "train has no box to learn from")
    for i, name in enumerate(data.categories.names):
        shares = [f"{c[i]:,} in {split} ({c[i] / max(1, c.sum()):.1%})" for split, c in counts.items()]
        yield problem("class", "", f"{name}: boxes {', '.join(shares)}")
        if train is None:
            continue
        if train[i] == 0:
            yield problem("class without boxes", "", f"{name} has no box in train")
        elif train[i] < FEW_BOXES:
            yield problem("rare class", "", f"{name} has {_count(int(train[i]), 'box', 'boxes')} in train")
        if val is not None and val[i] == 0 and train[i] > 0:
            yield problem("class not in val", "", f"{name} has no box in val")


def _boxes(split: Split) -> Iterator[Problem]:
    """Boxes that are there twice, and images with more boxes than a detector has queries."""
    keys = np.column_stack([split.images_of_rows, split.labels, split.boxes])
    _, first = np.unique(keys, axis=0, return_index=True)
    for row in np.setdiff1d(np.arange(len(keys)), first).tolist():
        box = ", ".join(f"{v:.1f}" for v in split.boxes[row])
        name = split.categories.name(split.labels[row])
        detail = f"annotation {split.annotation_ids[row]!r} repeats the {name} at [{box}]"
        yield _of_image(split, int(keys[row, 0]), "duplicate box", detail)
    counts = np.diff(split.starts)
    for i in np.flatnonzero(counts > QUERIES).tolist():
        detail = f"has {counts[i]} boxes, more than the {QUERIES} queries of a detector can find"
        yield _of_image(split, i, "too many boxes", detail)


def _statistics(split: Split) -> Iterator[Problem]:
    """Numbers of boxes in an image, and sizes of boxes."""
    counts = np.diff(split.starts)
    empty = int((counts == 0).sum())
    share = f"{empty} of {len(split)} images without ({empty / len(split):.1%})"
    said = f"{split.name}: {counts.mean():.1f} boxes an image, at most {counts.max()}; {share}"
    yield problem("boxes per image", "", said, split=split.name)
    if not len(split.labels):
        return
    small, large = float((split.areas < SMALL).mean()), float((split.areas >= LARGE).mean())
    sides = (split.boxes[:, 2:] - split.boxes[:, :2]) / split.sizes[split.images_of_rows][:, ::-1] * 640
    side = np.sqrt(sides.prod(1))
    said = (
        f"{split.name}: {small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large by COCO's areas; "
        f"at 640 px input the median side is {np.median(side):.0f} px, and {(side < 8).mean():.1%} are below 8 px"
    )
    yield problem("box sizes", "", said, split=split.name)


def _of_image(split: Split, i: int, kind: str, detail: str) -> Problem:
    return problem(kind, short(split.paths[i]), detail, split.ids[i], split.name)


def short(path: Path) -> str:
    """A path by its last folder and its name."""
    return f"{path.parent.name}/{path.name}"


# ------------------------------------------------------------------------------------------------------ pixels


class _Look(NamedTuple):
    """What one image file shows; `error` says why it shows nothing."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    rotated: bool = False
    error: str = ""


def _look(path: Path) -> _Look:
    """Read and decode an image file."""
    try:
        data = path.read_bytes()
        pixels = read_image(path, data)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return _Look(digest, (pixels.shape[0], pixels.shape[1]), is_rotated(path, data))
    except OSError as error:
        return _Look(error=f"cannot be read: {error.strerror or error}")
    except DataError as error:
        return _Look(error=reason(error, path))


def _pixels(data: Dataset) -> Iterator[Problem]:
    """What every image file shows against what is said about it."""
    seen: dict[bytes, tuple[str, Path]] = {}
    for split in data.splits:
        rotated = 0
        with ThreadPoolExecutor() as pool:
            for i, look in enumerate(pool.map(_look, split.paths)):
                if look.error:
                    yield _of_image(split, i, "unreadable image", look.error)
                    continue
                rotated += look.rotated
                yield from _size(split, i, look)
                yield from _copy(split, i, *seen.setdefault(look.digest, (split.name, split.paths[i])))
        if rotated:
            said = f"{split.name}: {_count(rotated, 'image')} with an EXIF orientation, applied before anything else"
            yield problem("rotated by EXIF", "", said, split=split.name)


def _copy(split: Split, i: int, where: str, path: Path) -> Iterator[Problem]:
    """A file whose content was first met in the split `where` at `path`."""
    if where != split.name:
        yield _of_image(split, i, "same image in two splits", f"is the same image as {short(path)} of {where}")
    elif path != split.paths[i]:
        yield _of_image(split, i, "duplicate image", f"is a copy of {short(path)}")


def _size(split: Split, i: int, look: _Look) -> Iterator[Problem]:
    """An image of another size than its annotation says, or of a size that does not suit a detector."""
    height, width = look.size
    said_height, said_width = split.sizes[i].tolist()
    if look.size != (said_height, said_width):
        far = split.boxes[split.rows(i)][:, 2:].max(0, initial=0)  # the corner that the boxes reach
        kind = "boxes beyond the image" if (far > np.array([width, height]) + SLACK).any() else "size differs"
        turned = " once its EXIF orientation is applied" if look.rotated else ""
        detail = f"is {width} x {height} px{turned}; its annotation says {said_width} x {said_height}"
        yield _of_image(split, i, kind, detail)
    if min(look.size) < TINY_SIDE:
        yield _of_image(split, i, "tiny image", f"is {width} x {height} px")
    if height * width > HUGE:
        yield _of_image(split, i, "huge image", f"is {width} x {height} px")
