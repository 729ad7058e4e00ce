"""A split and what a detector makes of it as a FiftyOne dataset, in one call.

dataset = to_fiftyone(data, "runs/bccd")
to_fiftyone(data, "runs/baseline", field="baseline")   # a second run beside the first
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deimkit.data.dataset import Dataset, Split
from deimkit.errors import DataError
from deimkit.explore.fiftyone.database import connect, guarded, quiet
from deimkit.explore.fiftyone.documents import TRUTH, documents, names_of, schema
from deimkit.explore.fiftyone.saved_views import dress, save_views
from deimkit.explore.findings import Findings, find

MARK = "deimkit"  # in the `info` of every dataset that is ours
AT_ONCE = 64  # images whose documents are in memory at a time


def to_fiftyone(
    dataset: Dataset | Split,
    what: Any,
    name: str | None = None,
    field: str = "predictions",
    overwrite: bool = False,
    split: str = "val",
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Any:
    """Put images, annotations and what a detector makes of them into a FiftyOne dataset, and return that.

    dataset: of a `Dataset` the part called `split` is taken. what: a run, a detector, whatever `deimkit.load` takes, or
    `Findings`; `options` are those of `find`. name: of the FiftyOne dataset, by default the dataset's; it is made, or
    brought up to date: an image that is there already, by its path or by its id and file name, is never there twice.
    field: where the predictions go; another run goes into another field, beside the first. overwrite: begin with an
    empty dataset. progress: called with a remark such as "writing 64/100".

    Every image has its AP and what is right, wrong and missed (`<field>_ap`, ...). Annotations are in `ground_truth`,
    predictions in `field`, the first boxes of their queries in `<field>_start`; the columns of `Findings` are their
    attributes. The `views_of` the findings are saved as "<field>: worst images" and so on; "<field>: all images" has
    every image, with the sure detections alone. Labels have the colour of their verdict.

    Raises `DataError` if images are not where the split says, if the field is taken, or if a FiftyOne dataset of that
    name is not deimkit's or has other classes; `DatabaseError` if the database cannot be opened or goes away.
    """
    part = _part(dataset, split)
    _expect_images(part)
    connect()
    _expect_name(field)
    with guarded("the FiftyOne dataset was written"), quiet():
        place = name or _default_name(dataset)
        _expect_ours(place, part, field, overwrite)
        findings = what if isinstance(what, Findings) else find(what, part, progress=progress, **options)
        if findings.split.fingerprint() != part.fingerprint():
            raise DataError(f"Expected findings of {part!r}; got {findings!r}. Find them on this split.")
        ours = _opened(place, part, overwrite)
        _note(ours, findings, field)
        _declare(ours, schema(findings, field))
        for done in _written(ours, findings, field, _ids(ours, part)):
            if progress is not None:
                progress(f"writing {done}/{len(part)}")
        runs = list(ours.info[MARK]["runs"])
        save_views(ours, findings, field, others=[run for run in runs if run != field])
        dress(ours, runs)
    return ours


def _part(dataset: Dataset | Split, split: str) -> Split:
    """The split that is meant."""
    part = dataset if isinstance(dataset, Split) else getattr(dataset, split, None)
    if not isinstance(part, Split):
        names = [s.name for s in dataset.splits] if isinstance(dataset, Dataset) else []
        raise DataError(f"{dataset!r} has no split {split!r}; it has {', '.join(names) or 'none'}.")
    return part


def _default_name(dataset: Dataset | Split) -> str:
    if isinstance(dataset, Dataset):
        return dataset.name
    return f"{dataset.name} {dataset.fingerprint()}"


def _expect_images(split: Split) -> None:
    """Raise `DataError` unless all images are where they should be."""
    gone = [path for path in split.paths if not Path(path).is_file()]
    if gone:
        raise DataError(
            f"{len(gone)} of the {len(split)} images of {split.name} are gone, such as {gone[0]}. Were they moved? "
            "Open the dataset where it lies now; samples that are in FiftyOne already are led to the new place."
        )


def _expect_name(field: str) -> None:
    """Raise `DataError` unless predictions can have that name."""
    from fiftyone.core.sample import get_default_sample_fields

    taken = {TRUTH, "image_id", *get_default_sample_fields()}
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", field) or field in taken:
        raise DataError(
            "field must be a word of letters, digits and _ that begins with a letter, and none of "
            f"{', '.join(sorted(taken))}; got {field!r}."
        )


def _expect_ours(name: str, split: Split, field: str, overwrite: bool) -> None:
    """Raise `DataError` if the FiftyOne dataset of that name is not one that this split and field can go into."""
    import fiftyone as fo

    if not fo.dataset_exists(name):
        return
    there = fo.load_dataset(name)
    mark = there.info.get(MARK)
    if mark is None:
        raise DataError(
            f"There is a FiftyOne dataset {name!r} that deimkit did not make, and it stays as it is. "
            "Choose another name=."
        )
    if overwrite:
        return
    if mark["classes"] != list(split.categories.names):
        raise DataError(
            f"The FiftyOne dataset {name!r} has the classes {_few(mark['classes'])}, and this split "
            f"{_few(split.categories.names)}. Choose another name=, or overwrite=True to begin anew."
        )
    taken = sorted(names_of(field) & set(there.get_field_schema()))
    if taken and field not in mark["runs"]:
        raise DataError(
            f"The FiftyOne dataset {name!r} has a field {taken[0]!r} already, which is no run of deimkit's "
            f"({_few(mark['runs'])}). Choose another field=."
        )


def _opened(name: str, split: Split, overwrite: bool) -> Any:
    """The dataset of that name, made if it is not there, with our mark on it."""
    import fiftyone as fo

    if overwrite and fo.dataset_exists(name):
        fo.delete_dataset(name)
    if fo.dataset_exists(name):
        there = fo.load_dataset(name)
        _recount(there)
        return there
    try:
        made = fo.Dataset(name)
    except ValueError as error:  # FiftyOne keeps a second, simpler form of every name, and that must be unique too
        raise DataError(f"FiftyOne does not take {name!r} for a dataset: {error}. Choose another name=.") from error
    made.info[MARK] = {"classes": list(split.categories.names), "runs": {}}
    made.default_classes = list(split.categories.names)
    made.persistent = True  # only now: what is left of a death before this is FiftyOne's to sweep up
    made.save()
    return made


def _recount(dataset: Any) -> None:
    """Let a database that was killed count its samples again: they are all there, and it says it has none."""
    samples = dataset._sample_collection
    if samples.estimated_document_count() != samples.count_documents({}):
        samples.database.command("validate", samples.name)


def _note(dataset: Any, findings: Findings, field: str) -> None:
    """Write down in the dataset what is in a field."""
    runs = dataset.info[MARK]["runs"]
    said = {"name": findings.name, "threshold": findings.least, "iou": findings.errors.iou}
    said |= {"before": findings.before.name if findings.before is not None else None}
    said |= {"splits": sorted({findings.split.name, *runs.get(field, {}).get("splits", [])})}
    runs[field] = said
    dataset.save()


def _declare(dataset: Any, paths: dict[str, str]) -> None:
    """Tell the dataset of fields that it does not have yet, so that the App offers them."""
    import fiftyone as fo

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "float": (fo.FloatField, {}),
        "int": (fo.IntField, {}),
        "str": (fo.StringField, {}),
        "bool": (fo.BooleanField, {}),
        "floats": (fo.ListField, {"subfield": fo.FloatField}),
        "ints": (fo.ListField, {"subfield": fo.IntField}),
        "labels": (fo.EmbeddedDocumentField, {"embedded_doc_type": fo.Detections}),
    }
    there = dataset.get_field_schema(flat=True)
    for path, kind in paths.items():
        if path not in there:
            type_, more = kinds[kind]
            dataset.add_sample_field(path, type_, **more)


def _ids(dataset: Any, split: Split) -> list[Any]:
    """The id of the sample of every image; those that are not there are added, those that were moved follow."""
    import fiftyone as fo

    columns = dataset.values(["_id", "filepath", "image_id", "tags"])
    by_path = {path: id_ for id_, path, _, _ in zip(*columns, strict=True)}
    by_name = {
        (image, tag, Path(path).name): id_ for id_, path, image, tags in zip(*columns, strict=True) for tag in tags
    }
    paths = [str(Path(path).absolute()) for path in split.paths]
    found = [
        by_path.get(path) or by_name.get((str(image), split.name, Path(path).name))
        for path, image in zip(paths, split.ids, strict=True)
    ]
    new = [fo.Sample(filepath=path, tags=[split.name]) for path, id_ in zip(paths, found, strict=True) if id_ is None]
    added = iter(dataset.add_samples(new, progress=False) if new else [])
    from bson import ObjectId

    return [ObjectId(next(added)) if id_ is None else id_ for id_ in found]


def _written(dataset: Any, findings: Findings, field: str, ids: list[Any]) -> Iterator[int]:
    """Write the values of all images, a few at a time, and say how many are done.

    Through pymongo: FiftyOne's own way would make an object of every label, which takes fifty times as long.
    """
    from pymongo import UpdateOne

    split, labels = findings.split, f"{TRUTH}.detections"
    for first in range(0, len(split), AT_ONCE):
        some = ids[first : first + AT_ONCE]
        there = dataset._sample_collection.find({"_id": {"$in": some}}, {labels: 1})
        kept = {row["_id"]: (row.get(TRUTH) or {}).get("detections", []) for row in there}
        writes = []
        rows = documents(findings, field, first, [kept[id_] for id_ in some])
        for i, (id_, values) in enumerate(zip(some, rows, strict=True), first):
            height, width = (int(x) for x in split.sizes[i])
            values |= {"image_id": str(split.ids[i]), "filepath": str(Path(split.paths[i]).absolute())}
            values |= {"metadata": {"_cls": "ImageMetadata", "width": width, "height": height}}
            values |= {"last_modified_at": datetime.now(UTC)}
            writes.append(UpdateOne({"_id": id_}, {"$set": values, "$addToSet": {"tags": split.name}}))
        dataset._bulk_write(writes, ids=some)
        yield first + len(some)


def _few(names: Any) -> str:
    """The first few of some names."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:4]) + (f", ... ({len(listed)})" if len(listed) > 4 else "") if listed else "none"
