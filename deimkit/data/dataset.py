"""One `Dataset` value whatever the source: COCO json, VOC xml, YOLO txt, a folder of any of them, or "synthetic"."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from deimkit.data import coco, voc, yolo
from deimkit.data.layout import subfolders
from deimkit.data.problems import Id, Problem, problem
from deimkit.data.raw import Raw, pack
from deimkit.data.split import CategoryMap, Packed, Split
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DataError

__all__ = ["CategoryMap", "Dataset", "Packed", "Problem", "Split"]

VAL_SHARE = 0.1

# Asked in this order whether a folder is theirs: what states its splits comes before what does not.
_READERS: tuple[Callable[[Path], list[Raw] | None], ...] = (
    coco.read_splits,
    yolo.read_yaml,
    voc.read_splits,
    yolo.read_splits,
    coco.read_single,
    voc.read_single,
    yolo.read_single,
)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images with boxes, in parts to learn from and to measure on, and the categories they share.

    train, val, test: each a `Split` or None. source: what `Dataset.open` makes the same dataset of. root: its folder.
    notes: sentences on what was decided while opening, such as how it was split.
    """

    name: str
    source: str
    root: Path
    categories: CategoryMap
    train: Split | None = None
    val: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def open(path: str | Path, root: str | Path = "data") -> Dataset:
        """The dataset at `path`: a folder, a COCO .json, a YOLO .yaml, or "synthetic".

        The format is recognised by what lies there. A source that does not say what to measure on is split 90 : 10 by
        a hash of the file names, the same everywhere and for ever. What cannot be used is left out and listed in
        `problems`. "synthetic" is drawn into `root` the first time. Raises `DataError` if nothing can be made of it.
        """
        if str(path) == "synthetic":
            return replace(Dataset.open(Synthetic().write_once(Path(root))), name="synthetic")
        place = Path(path).expanduser()
        if not place.exists():
            raise DataError(f"{place} does not exist; expected a dataset.{_similar(place)}")
        place = place.absolute()  # so that a process that starts elsewhere finds the same images
        raws = _read_file(place) if place.is_file() else _read_folder(place)
        return _assemble(raws, place)

    @property
    def splits(self) -> list[Split]:
        """The splits there are: train, val, test."""
        return [split for split in (self.train, self.val, self.test) if split is not None]

    @property
    def problems(self) -> list[Problem]:
        """What was found while reading all splits."""
        return [problem for split in self.splits for problem in split.problems]

    def fingerprint(self) -> str:
        """What the dataset holds in a few words, which differ if an image, a box or a category does."""
        parts = [f"{s.name}: {len(s)} images, {s.fingerprint()}" for s in self.splits if s is not self.test]
        return f"{'; '.join(parts)}; {len(self.categories)} categories"

    def __repr__(self) -> str:
        parts = [f"{s.name} {len(s)} images with {len(s.labels)} boxes" for s in self.splits]
        return f"Dataset({self.name!r}, {len(self.categories)} categories: {', '.join(parts)})"


def _similar(place: Path) -> str:
    """A sentence naming what is called almost like `place`, or nothing."""
    folder = next((p for p in place.absolute().parents if p.is_dir()), None)
    wanted = place.absolute().relative_to(folder).parts[0] if folder else ""
    names = [p.name for p in folder.iterdir()] if folder else []
    close = difflib.get_close_matches(wanted, [*names, "synthetic"], n=3, cutoff=0.6)
    return (
        f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else f" The nearest folder is {folder}."
    )


def _read_file(file: Path) -> list[Raw]:
    """The splits that one file describes."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        return [coco.read_file(file)]
    if suffix in (".yaml", ".yml"):
        return yolo.read_yaml_file(file)
    raise DataError(f"{file} is no annotation file; expected a COCO .json, a YOLO .yaml, or a folder.")


def _read_folder(root: Path) -> list[Raw]:
    """The splits of the first layout that a folder has, or that the only dataset folder inside it has."""
    raws = _first_layout(root)
    if raws is not None:
        return raws
    inside = [found for folder in subfolders(root) if (found := _first_layout(folder)) is not None]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(raws[0].root.name for raws in inside)
        raise DataError(f"{root} holds {len(inside)} datasets: {names}. Open one of them.")
    raise DataError(
        f"{root} is no dataset: expected COCO .json, VOC .xml or YOLO .txt annotations with images; "
        f"got {_contents(root)}. Name the folder that holds the annotations."
    )


def _first_layout(root: Path) -> list[Raw] | None:
    return next((raws for read in _READERS if (raws := read(root))), None)


def _contents(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir())
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "an empty folder"


def _assemble(raws: list[Raw], place: Path) -> Dataset:
    """The dataset of the splits that a reader found."""
    by_name = {raw.name: raw for raw in raws}
    ordered = [by_name[name] for name in ("all", "train", "val", "test") if name in by_name]
    categories, packed = _pack_all(ordered)
    notes = [note for raw in ordered for note in raw.notes]
    for split in packed:
        if not len(split):
            first = f" The first problem: {split.problems[0]}" if split.problems else ""
            raise DataError(f"{place} has no usable image in {split.name}; expected at least one.{first}")
    splits = {split.name: split for split in packed}
    if "val" not in splits and {"train", "test"} <= splits.keys():
        splits["val"] = splits.pop("test").renamed("val")
        notes.append("The test split serves as val, because there is no val split.")
    whole = splits.pop("all", None) or (splits.pop("train") if set(splits) == {"train"} else None)
    if whole is not None:
        splits["train"], splits["val"] = _divide(whole)
        notes.append(
            f"There is no val split: {len(splits['val'])} of {len(whole)} images were set aside as val "
            "by a hash of their file names."
        )
    return Dataset(
        name=place.stem if place.is_file() else place.resolve().name,
        source=str(place),
        root=ordered[0].root,
        categories=categories,
        train=splits.get("train"),
        val=splits.get("val") or None,
        test=splits.get("test"),
        notes=tuple(notes),
    )


def _divide(split: Split) -> tuple[Split, Split]:
    """Train and val parts of a split, decided image by image, so that adding an image moves no other.

    Both have an image as soon as there are two. Problems of images that are in neither part stay with train.
    """
    rank = [_rank(path) for path in split.paths]
    order = sorted(range(len(split)), key=rank.__getitem__)
    count = min(max(sum(r < VAL_SHARE for r in rank), 1), len(split) - 1)
    train, val = split.take(sorted(order[count:])), split.take(sorted(order[:count]))
    in_val = set(val.ids)
    of_val = tuple(p for p in split.problems if p.image in in_val)
    of_train = tuple(p for p in split.problems if p.image not in in_val)
    return replace(train, problems=of_train).renamed("train"), replace(val, problems=of_val).renamed("val")


def _rank(path: Path) -> float:
    """A number in [0, 1) from the file name; copies that Roboflow makes of one photo (a.rf.1b2c.jpg) share theirs."""
    name = path.name.split(".rf.")[0]
    return int.from_bytes(hashlib.sha1(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _pack_all(raws: list[Raw]) -> tuple[CategoryMap, list[Split]]:
    """The categories of all splits together, and the splits with them; the first split decides on the numbering."""
    names = dict(raws[0].categories)
    renames = [_join(names, raw, raws[0]) for raw in raws]
    ids = sorted(names, key=lambda id_: (isinstance(id_, str), id_))
    categories = CategoryMap(ids=tuple(ids), names=tuple(names[id_] for id_ in ids))
    return categories, [pack(raw, categories, rename) for raw, rename in zip(raws, renames, strict=True)]


def _join(names: dict[Id, str], raw: Raw, first: Raw) -> dict[Id, Id]:
    """Add the categories of `raw` to `names`; returns the ids that stand for others there. Differences are reported.

    Where the same names have other numbers, names decide; an id that cannot be reconciled is a `DataError`.
    """
    if raw.categories == first.categories:
        return {}
    id_of = {name: id_ for id_, name in names.items()}
    rename = {id_: id_of[name] for id_, name in raw.categories.items() if names.get(id_) != name and name in id_of}
    lost = [id_ for id_, name in raw.categories.items() if names.get(id_, name) != name and id_ not in rename]
    if lost:
        raise DataError(
            f"Category {lost[0]!r} is {names[lost[0]]!r} in {first.source.name} and {raw.categories[lost[0]]!r} in "
            f"{raw.source.name}; expected one numbering. Give the two different ids."
        )
    here, there = set(raw.categories.values()), set(first.categories.values())
    says = [f"only {raw.source.name} has {_listed(here - there)}"] if here - there else []
    says += [f"only {first.source.name} has {_listed(there - here)}"] if there - here else []
    says += (
        [f"{_listed(raw.categories[id_] for id_ in rename)} have other ids there and are matched by name"]
        if rename
        else []
    )
    detail = f"its categories differ from those of {first.name}: {'; '.join(says)}"
    raw.problems.append(problem("categories differ", raw.source.name, detail, None, raw.name))
    names.update({id_: name for id_, name in raw.categories.items() if id_ not in rename})
    return rename


def _listed(names: Iterable[str]) -> str:
    """Names in order, the first few of many."""
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:5])) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
