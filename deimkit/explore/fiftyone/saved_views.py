"""The views of a detector's findings as saved views of a FiftyOne dataset, and the colours that labels have there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import and_, or_
from typing import Any

from deimkit.data.split import Split
from deimkit.explore.fiftyone.documents import ANNOTATION, OWN_NAMES, TRUTH, names_of, start_of
from deimkit.explore.findings import Findings
from deimkit.explore.plots import PALETTE
from deimkit.explore.tiles import COLOURS
from deimkit.explore.views import CHANGES, TESTS, Condition, View, views_of

MOST = 50  # images of a view


def save_views(dataset: Any, findings: Findings, field: str, others: Sequence[str] = (), most: int = MOST) -> None:
    """Save the views of a run as "<field>: worst images" and so on, each with at most so many images.

    A view shows the sure detections of this run and no other; those on what has changed also the ones of `others`, the
    fields of other runs. Of what a view is about, detections or annotations, it shows only what it asks for.
    """
    _save(
        dataset, f"{field}: all images", "Every image, with the sure detections.", _alone(_sure(dataset, field), field)
    )
    for view in views_of(findings):
        shown = as_view(dataset, view, field).limit(most)
        beside = others if view in CHANGES else ()
        for other in beside:
            shown = _sure(shown, other)
        _save(dataset, f"{field}: {view.name}", view.words, _alone(shown, field, *beside))


def as_view(dataset: Any, view: View, field: str) -> Any:
    """The FiftyOne view of the images that `view.select` finds, in the same order."""
    shown = {"images": _of_images, "annotations": _of_annotations, "detections": _of_detections}[view.of]
    return shown(dataset, view, field)


def _save(dataset: Any, name: str, words: str, shown: Any) -> None:
    dataset.save_view(name, shown, description=words, overwrite=True)


def _alone(shown: Any, *fields: str) -> Any:
    """The same without the fields of other runs."""
    kept = set().union(*(names_of(field) for field in fields)) & set(shown.get_field_schema())
    return shown.select_fields(["image_id", TRUTH, *sorted(kept)])


def view_of(dataset: Any, split: Split, images: Iterable[int]) -> Any:
    """The FiftyOne view of some images of a split, by their indices and in that order: those of a lab's cell, say."""
    shown = dataset.match_tags(split.name)
    samples = dict(zip(*shown.values(["image_id", "id"]), strict=True))
    chosen = [str(split.ids[i]) for i in images]
    return dataset.select([samples[id_] for id_ in chosen if id_ in samples], ordered=True)


def _of_images(dataset: Any, view: View, field: str) -> Any:
    from fiftyone import ViewField as F

    path = f"{field}_{view.by}"
    asked = [F(path).exists(), *(_condition(c, f"{field}_{c.column}") for c in view.where)]
    return _ranked(_sure(dataset.match(reduce(and_, asked)), field), F(path), view)


def _of_annotations(dataset: Any, view: View, field: str) -> Any:
    from fiftyone import ViewField as F

    names = {name: f"{field}_{name}" for name in ANNOTATION}
    kept = dataset.filter_labels(TRUTH, _conditions(view, names))
    return _ranked(_sure(kept, field), F(f"{TRUTH}.detections.{names.get(view.by, view.by)}"), view)


def _of_detections(dataset: Any, view: View, field: str) -> Any:
    from fiftyone import ViewField as F

    asked = _conditions(view, {})
    kept = dataset.filter_labels(field, asked)
    if dataset.has_field(start_of(field)):
        kept = kept.filter_labels(start_of(field), asked, only_matches=False)
    return _ranked(kept, F(f"{field}.detections.{OWN_NAMES.get(view.by, view.by)}"), view)


def _ranked(shown: Any, value: Any, view: View) -> Any:
    """The images by the largest or the smallest of their values; equal ones as they stand in the dataset."""
    if view.of != "images":
        value = value.max() if view.descending else value.min()
    return shown.sort_by([(value, -1 if view.descending else 1), ("_id", 1)])


def _sure(shown: Any, field: str) -> Any:
    """The same images with only the sure ones of a run's detections."""
    from fiftyone import ViewField as F

    for path in (field, start_of(field)):
        if shown.has_field(path):
            shown = shown.filter_labels(path, F("sure") == True, only_matches=False)  # noqa: E712
    return shown


def _conditions(view: View, names: dict[str, str]) -> Any:
    """All that a view asks of a label. names: of columns that FiftyOne has under another one."""
    names = OWN_NAMES | names
    return reduce(and_, [_condition(c, names.get(c.column, c.column)) for c in view.where])


def _condition(condition: Condition, path: str) -> Any:
    from fiftyone import ViewField as F

    return reduce(or_, [TESTS[condition.test](F(path), value) for value in condition.values])


def dress(dataset: Any, fields: list[str]) -> None:
    """Give the labels in the App the colour of their verdict, and show annotations and predictions to begin with."""
    import fiftyone as fo

    colours = [{"value": verdict, "color": colour} for verdict, colour in COLOURS.items()]
    paths = [path for field in fields for path in (field, start_of(field)) if dataset.has_field(path)]
    by_verdict = [{"path": path, "colorByAttribute": "verdict", "valueColors": colours} for path in paths]
    crowds = [{"value": "False", "color": PALETTE[6]}, {"value": "True", "color": "#777777"}]
    truth = {"path": TRUTH, "colorByAttribute": "iscrowd", "valueColors": crowds}
    dataset.app_config.color_scheme = fo.ColorScheme(color_by="value", fields=[truth, *by_verdict])
    dataset.app_config.active_fields = fo.ActiveFields(exclude=False, paths=[TRUTH, *fields])
    dataset.save()
