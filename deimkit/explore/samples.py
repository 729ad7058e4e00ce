"""What the best checkpoint of a run sees in a few validation images, beside what is annotated there."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from deimkit.data.dataset import Dataset, Split
from deimkit.errors import DataError
from deimkit.evaluation.report import readable
from deimkit.explore.plots import Comparison, annotated, contact_sheet
from deimkit.models.predict import predict
from deimkit.training.run import Plan, Run


def validation(run: Run) -> Split:
    """The validation images of a run's data; `DataError` if it has none."""
    plan = Plan.read(run.folder)
    split = Dataset.open(plan.data).val
    if split is None or not len(split):
        raise DataError(f"{plan.data} has no val split to show predictions of.")
    return split


def samples(run: Run, split: Split, count: int = 4) -> bytes:
    """`count` images of a split, evenly spread over those with objects, as the bytes of a JPEG.

    Left what is annotated, right the best checkpoint's detections: as many of the most confident as there are objects.
    The detector stays on the CPU, out of the way of a training. Raises `CheckpointError` if there is no checkpoint yet.
    """
    from deimkit.api import load_detector

    detector = load_detector(run)
    filled = [i for i in range(len(split)) if split.starts[i] < split.starts[i + 1]] or list(range(len(split)))
    chosen = [filled[k] for k in np.unique(np.linspace(0, len(filled) - 1, count).astype(int))]
    pictures = readable(split, chosen)
    found: Any = predict(detector, list(pictures.values()), threshold=0.0, batch=1)
    items = []
    for i, seen in zip(pictures, found, strict=True):
        truth = annotated(split, i)
        least = float(seen.scores[: max(len(truth), 1)].min()) if len(seen) else 1.0
        items.append(Comparison(seen.above(least), truth))
    file = io.BytesIO()
    contact_sheet(items).savefig(file, format="jpeg", dpi=90, pil_kwargs={"quality": 85})
    return file.getvalue()
