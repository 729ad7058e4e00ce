"""How many queries of an image have a target, over a dataset and under several rules: DEIM's Fig. 3 and Fig. 6.

Counted and drawn apart. What it takes to compare layers, Stable-DINO's unstable score, is here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from deimkit.data.augment import Augment
from deimkit.data.loader import Always, Loader
from deimkit.data.split import Split
from deimkit.errors import DeimkitError
from deimkit.evaluation.measure import in_classes_of
from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.sheet import Sheet
from deimkit.explore.layers import all_layers
from deimkit.matching import Hungarian, Matcher, SimOTA
from deimkit.models.detector import Detector
from deimkit.models.predict import predicting
from deimkit.structures import Batch, Output
from deimkit.training.microscope import in_order, moved, tables

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Counts = NDArray[np.int64]
RULES: dict[str, Matcher] = {"Hungarian": Hungarian(), "SimOTA": SimOTA()}


def positives_per_image(
    model: Detector,
    split: Split,
    rules: Mapping[str, Matcher] = RULES,
    augment: Augment | None = None,
    stage: str = "dense",
    seed: int = 0,
    batch: int = 8,
) -> dict[str, Counts]:
    """How many queries of the last layer have a target, image by image: "targets", and then by each of the rules.

    Images come as in evaluation, or, with `augment` (such as a recipe's), as an epoch of that `stage` of training shows
    them; both in one order, though training leaves out an incomplete last batch. Source of the count: DEIM Fig. 3.
    Raises `DataError` for objects of classes that the model does not know.
    """
    split = in_classes_of(model.categories, split)
    clock = None if augment is None else Always(stage, varied=False)
    loader = Loader(split, min(batch, len(split)), model.size, augment, clock, seed, shuffle=False)
    found: dict[str, list[torch.Tensor]] = {"targets": [], **{name: [] for name in rules}}
    for shown in _shown(model, loader):
        with predicting(model):
            output = Output("final", model(shown.images)).to("cpu")
        targets = shown.targets.to("cpu")
        found["targets"].append(torch.bincount(targets.image, minlength=len(shown)))
        for name, matcher in rules.items():
            match = matcher([output], targets)[0]
            found[name].append(torch.bincount(match.image, minlength=len(shown)))
    return {name: torch.cat(counts).numpy() for name, counts in found.items()}


def unstable(model: Detector, split: Split, matcher: Matcher, batch: int = 8) -> dict[str, float]:
    """The share of targets, in [0, 1], that another query answers for than in the layer before, by layer.

    The first is compared with the proposals. Sums over all images. matcher: one to one. Source: Stable-DINO 2.4.3,
    "unstable score". Raises `DeimkitError` for a matcher that gives a target several queries, or a split without boxes,
    and `DataError` for objects of classes that the model does not know.
    """
    split = in_classes_of(model.categories, split)
    if split.crowd.all():
        raise DeimkitError(f"Who answers for a target can only change where there is one; {split.name} has no objects.")
    changed: dict[str, list[NDArray[np.float64]]] = {}
    for shown in _shown(model, Loader(split, batch, model.size)):
        outputs = {output.name: output.to("cpu") for output in all_layers(model, shown.images)}
        names = in_order(list(outputs))
        matches = matcher([outputs[name] for name in names], shown.targets.to("cpu"))
        if any(len(match.target.unique()) < len(match.target) for match in matches):
            raise DeimkitError(f"Expected a matcher that gives every target one query at most; got {matcher}.")
        for name, (before, now) in zip(names[1:], pairwise(matches), strict=True):
            pair = tables(*((match.target.numpy(), match.query.numpy()) for match in (before, now)))
            changed.setdefault(name, []).append(moved(*pair))
    return {name: float(np.concatenate(parts).mean()) for name, parts in changed.items()}


def ratios(many: Counts, one: Counts) -> NDArray[np.float64]:
    """How many times as many positives images have by one rule as by another; those that have none are left out."""
    some = one > 0
    return many[some] / one[some]


def draw_distribution(counts: Mapping[str, Counts], width: int = 5) -> Figure:
    """Draw how many images have how many positives, in bins of `width`: DEIM Fig. 3a, or Fig. 6."""
    top = max(int(values.max(initial=0)) for values in counts.values())
    edges = np.arange(0, top + width + 1, width)
    shares = {name: np.histogram(values, edges)[0] for name, values in counts.items()}
    most = max(int(share.max(initial=1)) for share in shares.values())
    sheet = Sheet()
    x = {"title": "positives of an image", "range": [0, float(edges[-1])]}
    y = {"title": "images", "range": [0, 1.35 * most]}  # room for the legend
    panel = sheet.panel("how many images have how many positives", (0, 1), (0, 1), x, y)
    looks = zip(cycle(LINES), cycle(("solid", "dash", "dot", "dashdot")), strict=False)
    for (name, values), (tint, dash) in zip(counts.items(), looks, strict=False):
        line = {"color": tint, "dash": dash, "width": 2.5, "shape": "hv"}
        at = {"x": edges, "y": np.append(shares[name], shares[name][-1])}
        panel.add("scatter", **at, name=f"{name}: {values.mean():.1f} on average", mode="lines", line=line)
    return sheet.figure(380, width=900, showlegend=True, legend=_LEGEND | {"x": 0.99, "xanchor": "right"})


def draw_ratios(values: NDArray[np.float64], claim: float | None = None, bins: int = 20) -> Figure:
    """Draw how many images have which ratio of positives: DEIM Fig. 3b. claim: a paper's, as a line."""
    top = max(float(values.max(initial=1)), claim or 0) * 1.05
    counts, edges = np.histogram(values, bins, (0, top))
    sheet = Sheet()
    x, y = {"title": "positives of SimOTA / positives of Hungarian", "range": [0, top]}, {"title": "images"}
    panel = sheet.panel(
        "how many times as many positives", (0, 1), (0, 1), x, y | {"range": [0, 1.5 * counts.max() + 1]}
    )
    middles = (edges[1:] + edges[:-1]) / 2
    panel.add("bar", x=middles, y=counts, marker={"color": LINES[0]}, name="images", showlegend=False)
    average = float(values.mean()) if len(values) else math.nan
    lines = [("as many", 1.0, "dot"), (f"on average {average:.1f}", average, "dash")]
    lines += [(f"the paper's extreme cases: about {claim:g}", claim, "solid")] if claim is not None else []
    for (words, at, dash), tint in zip(lines, (INK, LINES[1], LINES[2]), strict=False):
        line = {"color": tint, "dash": dash, "width": 2.5}
        panel.add("scatter", x=[at, at], y=[0, 1.4 * counts.max() + 1], name=words, mode="lines", line=line)
    return sheet.figure(380, width=900, bargap=0.05, showlegend=True, legend=_LEGEND | {"x": 0.6, "xanchor": "center"})


_LEGEND: dict[str, Any] = {"yanchor": "top", "y": 1}


def _shown(model: Detector, loader: Loader) -> Iterator[Batch]:
    """The batches of a loader, ready for the detector and where it is."""
    device = next(model.parameters()).device
    return (batch.to(device).finish() for batch in loader.epoch())
