"""Whether a training may begin: on this data, and shared by so many processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deimkit.data.dataset import Dataset, Split
from deimkit.data.problems import Id
from deimkit.errors import DataError, RecipeError


def usable(dataset: Dataset, on_problem: str) -> Dataset:
    """The dataset as it may be trained on; raises `DataError` if it may not.

    Images that have errors are left out with on_problem="skip", and are themselves the error with "refuse".
    """
    if dataset.train is None:
        raise DataError(f"{dataset!r} has no train split to learn from.")
    parts: dict[str, Any] = {}
    for split in (dataset.train, dataset.val):
        errors = [p for p in split.problems if p.severity == "error"] if split is not None else []
        if split is None or not errors:
            continue
        if on_problem == "refuse":
            raise DataError(
                f"The {split.name} split has {len(errors)} problem(s), the first: {errors[0]} "
                "`deimkit doctor` lists all with their remedy; on_problem='skip' trains without them."
            )
        parts[split.name] = split.without(errors)
    if not len(parts.get("train", dataset.train).boxes):
        raise DataError(
            f"The train split of {dataset!r} has no box to learn from; `deimkit doctor` looks at all of it."
        )
    empty = [name for name, split in parts.items() if not len(split)]
    if empty:
        raise DataError(f"All images of the {empty[0]} split have problems; `deimkit doctor` lists them.")
    return replace(dataset, **parts)


def culprit(split: Split, error: DataError) -> Id | None:
    """The id of the image of `split` that cannot be read: errors about a file begin with its path."""
    said = str(error)
    return next((id_ for id_, path in zip(split.ids, split.paths, strict=True) if said.startswith(f"{path} ")), None)


def expect_equal_shares(batch: int, images: int, processes: int, accumulate: int) -> None:
    """Raise `RecipeError` unless every one of several processes gets as many images of every batch and micro-batch."""
    shares = processes * accumulate
    if processes > 1 and (batch % shares or images < batch):
        fitting = max(min(batch, images) // shares, 1) * shares
        raise RecipeError(
            f"{processes} processes of {accumulate} micro-batch(es) share batches of a multiple of {shares} images, no "
            f"more than there are to learn from; got batch={batch} and {images} images. Give batch={fitting}, or "
            f"another multiple of {shares}."
        )
