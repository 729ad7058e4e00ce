"""Loading weights: either every tensor of a detector is accounted for, or nothing changes and the error says why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.data.dataset import CategoryMap
from deimkit.errors import CheckpointError
from deimkit.models.detector import Arch, Detector
from deimkit.weights.classes import COCO_NAMES, class_rows, named
from deimkit.weights.files import State, read
from deimkit.weights.infer import published_recipe
from deimkit.weights.names import COMPUTED, PACKED, published_name
from deimkit.weights.published import constants

# Rows are classes; the denoising embedding has one more row, for padding.
HEAD = re.compile(r"decoder\.((enc_score_head|dec_score_head\.\d+)\.(weight|bias)|denoising_class_embed\.weight)")

NOT_THERE = "not in the file"


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a weight file and of a detector, under the published names.

    loaded: taken as they are. reshaped: taken in another layout. mapped: head tensors whose rows were copied by class.
    skipped: in the file, not taken. missing: in the detector, not in the file, and so left as they were. Each with its
    reason. classes: for every class of the detector the row it has in the file's head, or None where it starts fresh;
    empty if row i is class i, or the file has no head.
    """

    source: str
    averaged: bool
    loaded: tuple[str, ...]
    reshaped: dict[str, str]
    mapped: dict[str, str]
    skipped: dict[str, str]
    missing: dict[str, str]
    classes: tuple[tuple[str, int | None], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return asdict(self) | {"loaded": list(self.loaded), "classes": [list(pair) for pair in self.classes]}

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded" + (" (averaged weights)" if self.averaged else "")]
        for what in ("reshaped", "mapped", "skipped", "missing"):
            by_reason: dict[str, list[str]] = {}
            for key, reason in getattr(self, what).items():
                by_reason.setdefault(reason, []).append(key)
            lines += [f"{len(keys)} {what}, {reason}: {_some(keys)}" for reason, keys in by_reason.items()]
        fresh = [name for name, row in self.classes if row is None]
        if fresh:
            lines.append(f"{len(fresh)} of {len(self.classes)} classes start fresh: {_some(fresh)}")
        return "\n  ".join(lines)


def load_weights(
    detector: Detector,
    source: str | Path | State,
    classes: Sequence[str] | CategoryMap | None = None,
    replace_head: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Fill `detector` with the weights of a file or folder (see `read`) and say what became of each tensor.

    classes: what the rows of the file's head are, where the file does not say; published heads of 80, 365 and 366 rows
    are recognised (`class_rows`). Rows go to the class of the same name; classes the file does not know start fresh. If
    it knows none of the detector's classes that is an error, unless `replace_head` lets the whole head start fresh.
    strict: every other tensor must be in the file with the detector's shape, the file may hold nothing else, and the
    config of a `transformers` folder must name the detector's activation; otherwise what does not fit is left out and
    reported. A file that contradicts the architecture (W(n), the sampling points) is always an error. ImageNet weights
    fill the backbone only. Anchors follow from the input and are not loaded.
    Raises `CheckpointError`; the detector is then as it was.
    """
    state = source if isinstance(source, State) else read(source)
    ours = {published_name(key): tensor for key, tensor in detector.state_dict().items()}
    skipped = _computed(state, detector.arch)
    rows = _moved_rows(state, detector.categories, classes, replace_head)

    filled: dict[str, Tensor] = {}
    misfits = _other_activation(state, detector.arch)
    for key in [key for key in state.tensors if key not in skipped]:
        fitted = _fit(key, state, ours, rows)
        if isinstance(fitted, Tensor):
            filled[key] = fitted
        else:
            misfits[key] = fitted
    missing = {key: _why_missing(key, state) for key in ours if key not in filled and key not in misfits}
    unexplained = misfits | {key: reason for key, reason in missing.items() if reason == NOT_THERE}
    if not filled or (strict and unexplained):
        raise CheckpointError(_refusal(state, unexplained))

    detector.load_state_dict({key: filled.get(published_name(key), old) for key, old in detector.state_dict().items()})
    mapped = [key for key in filled if rows and HEAD.fullmatch(key)]
    how = "rows copied by class" if any(row is not None for row in rows or ()) else "starts fresh"
    packed = [key for key in filled if state.format == "transformers" and PACKED.fullmatch(key)]
    return LoadReport(
        source=state.path,
        averaged=state.averaged,
        loaded=tuple(key for key in ours if key in filled and key not in mapped and key not in packed),
        reshaped=dict.fromkeys(packed, "query, key and value packed"),
        mapped=dict.fromkeys(mapped, how),
        skipped=skipped | misfits,
        missing=missing,
        classes=tuple(zip(map(str, detector.categories.names), rows, strict=True)) if rows else (),
    )


def default_categories(source: str | Path | State) -> CategoryMap:
    """The classes of a weight file's head: those it names, COCO's if there are 80, else as many without names."""
    state = source if isinstance(source, State) else read(source)
    if state.categories is not None:
        return state.categories
    if state.classes is None:
        raise CheckpointError(f"{state.path} has no head that would say which classes to detect. Pass categories=.")
    return named(COCO_NAMES) if state.classes == len(COCO_NAMES) else CategoryMap.of(state.classes)


def _computed(state: State, arch: Arch) -> dict[str, str]:
    """The tensors of a file that are not learned, with that reason; `CheckpointError` if they contradict `arch`."""
    expected = constants(arch)
    for key in expected.keys() & state.tensors.keys():
        said, built = state.tensors[key].double(), expected[key].double()
        if said.shape != built.shape or not torch.allclose(said, built):
            raise CheckpointError(
                f"{state.path} was made for another architecture: {key} is {said.tolist()} there and {built.tolist()} "
                f"in the detector. {_looks_like(state)}Build the recipe it was trained with."
            )
    return {key: "computed, not learned" for key in state.tensors if key in expected or key in COMPUTED}


def _other_activation(state: State, arch: Arch) -> dict[str, str]:
    """The one thing that a folder's config knows and no tensor shows, if the detector computes otherwise."""
    field = "decoder_activation_function"
    said = arch.activation if state.config is None else state.config.get(field, "relu")
    return {} if said == arch.activation else {field: f"{said!r} in the config, {arch.activation!r} in the detector"}


def _moved_rows(
    state: State, ours: CategoryMap, classes: Sequence[str] | CategoryMap | None, replace_head: bool
) -> tuple[int | None, ...] | None:
    """For each class of the detector its row in the file's head, or None; None as a whole if no row has to move."""
    if state.classes is None:
        return None
    theirs = state.categories if classes is None else classes
    names = theirs.names if isinstance(theirs, CategoryMap) else theirs
    rows = class_rows(state.classes, None if names is None else list(map(str, names)), ours)
    if rows is None and not replace_head:
        known = f" ({_some(map(str, names))})" if names else ""
        raise CheckpointError(
            f"{state.path} has a head for {state.classes} classes{known}, the detector has {len(ours)} "
            f"({_some(map(str, ours.names))}), and none is known to both. Pass replace_head=True to start with a fresh "
            "head; `deimkit.weights.load_weights` takes classes=, the names of the file's classes."
        )
    rows = rows or (None,) * len(ours)
    return None if rows == tuple(range(state.classes)) else rows


def _fit(key: str, state: State, ours: dict[str, Tensor], rows: Sequence[int | None] | None) -> Tensor | str:
    """What the detector's tensor becomes, or why the file's does not fit it."""
    theirs = state.tensors[key]
    if key not in ours:
        return "the detector has no such tensor"
    if rows and HEAD.fullmatch(key):
        if theirs.shape[1:] == ours[key].shape[1:] and theirs.shape[:1] >= (state.classes,):
            return _by_row(ours[key], theirs, rows)
    elif theirs.shape == ours[key].shape:
        return theirs
    return f"shape {tuple(theirs.shape)} in the file, {tuple(ours[key].shape)} in the detector"


def _by_row(ours: Tensor, theirs: Tensor, rows: Sequence[int | None]) -> Tensor:
    """`ours` (classes, ...) with the rows that `theirs` has for the same classes; further rows (padding) stay."""
    filled = ours.clone()
    for i, row in enumerate(rows):
        if row is not None:
            filled[i] = theirs[row]
    return filled


def _why_missing(key: str, state: State) -> str:
    if state.format == "backbone" and not key.startswith("backbone."):
        return "ImageNet weights fill the backbone only"
    return "batch norms were saved without their counters" if key.endswith(".num_batches_tracked") else NOT_THERE


def _refusal(state: State, misfits: dict[str, str]) -> str:
    shown = "; ".join(f"{key}: {reason}" for key, reason in list(misfits.items())[:3])
    return (
        f"{state.path} does not fit the detector: {len(misfits)} of its tensors or settings differ ({shown}). "
        f"{_looks_like(state)}Build the recipe it was trained with; `deimkit.weights.load_weights` with strict=False "
        "takes what fits."
    )


def _looks_like(state: State) -> str:
    name = published_recipe(state.tensors)
    if name is None:
        return ""
    dfine = name.startswith("dfine_")
    return f"The file looks like {f'D-FINE or DEIM of size {name[6:]}' if dfine else name}. "


def _some(names: Iterable[str], count: int = 4) -> str:
    shown = list(names)
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")
