"""Published datasets, from where they are published to a folder that `Dataset.open` reads.

What may be fetched is fetched; what asks for a registration or for consent to its terms is taken from a folder in which
you put it. Both end up unpacked, converted where they need it, and complete or not there.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deimkit.data.archives import extract, is_archive, is_extracted
from deimkit.data.convert import prepare_crowdhuman, prepare_objects365, shrink
from deimkit.data.fetch import Note, expect_room, fetch, quiet
from deimkit.errors import DataError

_RECEIPT = ".deimkit-download.json"  # says that a dataset is complete


@dataclass(frozen=True)
class Source:
    """One file of a dataset as it is published.

    name: of the file, or a pattern such as "train/patch*.tar.gz" for one or more below the folder where you put them.
    into: the folder it is unpacked into, relative to the dataset's. url: "" if it cannot be fetched without you.
    size: bytes. md5: as hexadecimal digits. Both are None where they are not known.
    """

    name: str
    into: str = ""
    url: str = ""
    size: int | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Published:
    """A dataset that others publish: under which terms, in which files, and how it becomes one that can be trained on.

    opens: what to open, relative to the dataset's folder. shrinks: whether large images are shrunk when unpacked.
    prepare: converts the annotations once everything is unpacked; given the folder and the files that are no archives.
    """

    title: str
    licence: str
    page: str
    sources: tuple[Source, ...]
    opens: str = ""
    shrinks: bool = False
    prepare: Callable[[Path, dict[str, Path], Note, Note], None] | None = None

    @property
    def size(self) -> int | None:
        """Bytes to fetch; None if that is not known."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size)

    @property
    def by_hand(self) -> tuple[str, ...]:
        """The files that you have to fetch yourself."""
        return tuple(source.name for source in self.sources if not source.url)


_COCO = "http://images.cocodataset.org"
_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC"

# The publishers name no checksums. Sizes and MD5 sums are those that independent projects state alike, so that what
# comes over plain http can still be trusted.
DATASETS = {
    "coco": Published(
        title="COCO 2017: 118,287 + 5,000 images, 80 classes",
        licence="annotations CC BY 4.0, images under Flickr's terms",
        page="https://cocodataset.org/#termsofuse",
        sources=(
            Source(
                "train2017.zip",
                url=f"{_COCO}/zips/train2017.zip",
                size=19_336_861_798,
                md5="cced6f7f71b7629ddf16f17bbcfab6b2",
            ),
            Source(
                "val2017.zip",
                url=f"{_COCO}/zips/val2017.zip",
                size=815_585_330,
                md5="442b8da7639aecaf257c1dceb8ba8c80",
            ),
            Source(
                "annotations_trainval2017.zip",
                url=f"{_COCO}/annotations/annotations_trainval2017.zip",
                size=252_907_541,
                md5="f4bbac642086de4f52a3fdda2de5fa2c",
            ),
        ),
    ),
    "crowdhuman": Published(
        title="CrowdHuman: 15,000 + 4,370 images of crowds, full boxes of persons",
        licence="non-commercial research and education",
        page="https://www.crowdhuman.org/download.html",
        sources=(
            Source("CrowdHuman_train01.zip", into="train"),
            Source("CrowdHuman_train02.zip", into="train"),
            Source("CrowdHuman_train03.zip", into="train"),
            Source("CrowdHuman_val.zip", into="val"),
            Source("annotation_train.odgt"),
            Source("annotation_val.odgt"),
        ),
        prepare=prepare_crowdhuman,
    ),
    "objects365": Published(
        title="Objects365 v2 (2020): 1.7 million + 80,000 images, 365 classes",
        licence="academic purposes; annotations CC BY 4.0, images under Flickr's terms",
        page="https://www.objects365.org/download.html",
        sources=(
            Source("train/**/patch*.tar.gz", into="train"),
            Source("val/**/patch*.tar.gz", into="val"),
            Source("zhiyuan_objv2_train.json"),
            Source("zhiyuan_objv2_val.json"),
        ),
        shrinks=True,
        prepare=prepare_objects365,
    ),
    "voc2007": Published(
        title="Pascal VOC 2007: 5,011 images to learn from, 4,952 to test on, 20 classes",
        licence="images under Flickr's terms",
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        sources=(
            Source(
                "VOCtrainval_06-Nov-2007.tar",
                url=f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
                size=460_032_000,
                md5="c52e279531787c972589f7e41ab4ae64",
            ),
            Source(
                "VOCtest_06-Nov-2007.tar",
                url=f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
                size=451_020_800,
                md5="b6e924de25625d8de591ea690078ad9f",
            ),
        ),
        opens="VOCdevkit",
    ),
    "voc2012": Published(
        title="Pascal VOC 2012: 11,540 images, 20 classes",
        licence="images under Flickr's terms",
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        sources=(
            Source(
                "VOCtrainval_11-May-2012.tar",
                url=f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
                size=1_999_639_040,
                md5="6cd6e144f989b92b3379bac3b3de84fd",
            ),
        ),
        opens="VOCdevkit",
    ),
}


def find(name: str) -> Published:
    """The published dataset of that name; `DataError` if there is none."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"No dataset is called {name!r}; expected one of {', '.join(DATASETS)}.{guess}")
    return DATASETS[name]


def is_complete(name: str, to: str | Path | None = None) -> bool:
    """True if that dataset was put into that folder, data/NAME by default, and is still there."""
    published, folder = find(name), _folder(name, to)
    unpacked = all(is_extracted(part.name, folder / part.into) for part in published.sources if part.url)
    return unpacked and (folder / _RECEIPT).is_file()


def download(
    name: str,
    to: str | Path | None = None,
    source: str | Path | None = None,
    note: Note = quiet,
    say: Note = quiet,
) -> Path:
    """Fetch, unpack and convert a published dataset into a folder; returns what `Dataset.open` takes.

    to: the folder, data/NAME by default. source: a folder in which files of the dataset already lie; they are left as
    they are. note: told how far it is; say: told what is worth keeping. What is done is not done again: a second call
    carries on where the first one stopped, or returns at once. Raises `DataError` if a file is missing or not as it
    should be, or the disk is too full.
    """
    published, folder = find(name), _folder(name, to)
    opens = folder / published.opens
    if source is None and is_complete(name, to):
        return opens
    found = _locate(name, published, None if source is None else Path(source), folder)
    expect_room(folder, _room(found, folder), f"Downloading and unpacking {name}")
    fresh = [_unpack(part, path, published, folder, note, say) for part, paths in found for path in paths]
    if published.prepare is not None and (any(fresh) or not is_complete(name, to)):
        plain = {path.name: path for _, paths in found for path in paths if not is_archive(path)}
        published.prepare(folder, plain, note, say)
    (folder / _RECEIPT).write_text(json.dumps({"name": name, "licence": published.licence, "page": published.page}))
    return opens


def _folder(name: str, to: str | Path | None) -> Path:
    return Path("data", name) if to is None else Path(to).expanduser()


def _downloads(folder: Path) -> Path:
    """Where archives lie until they are unpacked."""
    return folder / "downloads"


def _locate(name: str, published: Published, given: Path | None, folder: Path) -> list[tuple[Source, list[Path]]]:
    """Where each file of the dataset is, or will be once it is fetched; `DataError` naming those that are lacking."""
    if given is not None and not given.is_dir():
        raise DataError(f"{given} is no folder; expected the one in which the files of {name} lie.")
    found = []
    for source in published.sources:
        here = sorted(set(given.rglob(source.name))) if given else []
        found.append((source, here or ([_downloads(folder) / source.name] if source.url else [])))
    missing = [source.name for source, paths in found if not paths]
    if missing and given is None:
        raise DataError(
            f"{name} is not to be had without you: agree to its terms ({published.licence}) at {published.page}, fetch "
            f"{', '.join(published.by_hand)} into a folder, and run: deimkit download {name} --from FOLDER"
        )
    if missing:
        raise DataError(f"{given} holds no {', '.join(missing)}. Fetch what is missing from {published.page} into it.")
    return found


def _room(found: list[tuple[Source, list[Path]]], folder: Path) -> int:
    """Bytes still needed for what is to be fetched and unpacked, with the largest archive beside its content."""
    pending = [
        source.size or 0
        for source, paths in found
        if source.url and not is_extracted(paths[0].name, folder / source.into, source.size)
    ]
    here = sum(file.stat().st_size for file in _downloads(folder).glob("*"))
    return max(sum(pending) + max(pending, default=0) - here, 0)


def _unpack(source: Source, path: Path, published: Published, folder: Path, note: Note, say: Note) -> bool:
    """Fetch one file if it is not here and unpack it; True if there was anything to unpack."""
    if not is_archive(path):
        return False
    into = folder / source.into
    fetched = path.parent == _downloads(folder)
    if is_extracted(path.name, into, None if fetched else path.stat().st_size):
        return False
    if fetched:
        fetch(source.url, path, md5=source.md5, size=source.size, note=note)
        say(f"{path.name} is here")

    def finish(draft: Path) -> None:
        note(f"{path.name}: shrinking")
        for complaint in shrink(draft):
            say(complaint)

    extract(path, into, note, finish if published.shrinks else None)
    say(f"{path.name} is unpacked into {into}")
    if fetched:
        path.unlink()
        if not os.listdir(path.parent):
            path.parent.rmdir()
    return True
