"""The matching microscope: what the matcher saw while a run trained, at next to no cost.

`Microscope` looks at the matches of every tenth training step; `Probe` matches the same few images after every epoch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deimkit.data.loader import Loader
from deimkit.data.split import Split
from deimkit.errors import DataError, NonFiniteError, RecipeError
from deimkit.losses import Pairs
from deimkit.matching import Matcher, widen
from deimkit.models.detector import Detector
from deimkit.models.predict import predicting
from deimkit.structures import Batch, Output
from deimkit.training.run import plain

POSITIVES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # where each bin of positives per image begins; the last has no end
IOU_BINS = 10  # of equal width, from 0 to 1
LEAST = 3  # pairs that a correlation takes: with two it is always 1 or -1
SHOWN = ("proposals", "layer0", "final")  # whose IoU is told: before the decoder, after its first layer, after its last
NOBODY = -1.0  # the best score among no queries at all

Floats = NDArray[np.floating[Any]]


@dataclass
class Microscope:
    """What the matcher saw at every `every`-th step, as a row of plain JSON numbers.

    Give `watch_for(step)` to each call of the criterion, and ask for the `row` when the step is done; micro-batches of
    a step become one row, and each of several processes sees its own images. Nothing is drawn from any generator and
    nothing of the graph is kept. low: the IoU below which a match counts as one of low quality.
    """

    every: int = 10
    low: float = 0.5
    step: int | None = field(default=None, init=False)
    looks: list[Look] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"A microscope looks at every step (1), every second (2), ...; got every={self.every}.")

    def watch_for(self, step: int) -> Callable[[Pairs, Pairs], None] | None:
        """What to hand to the criterion as `watch` at a step: None for most. Looks at other steps are forgotten."""
        if step != self.step:
            self.step, self.looks = step, []
        return None if step % self.every else self.look

    def look(self, own: Pairs, shared: Pairs) -> None:
        """Note the pairs that each output's own match makes, and those of the shared one; waits for no device."""
        self.looks.append(Look.at(own, shared))

    def row(self) -> dict[str, Any] | None:
        """What was seen since the last row, or None; cheapest once the losses have been read, as it waits for a device.

        images, targets: how many (of an image with more targets than queries, all only if there is denoising).
        targets_per_image, positives, positives_shared: means over images; a positive is a query with a target, by the
        final layer's own match and by the shared one (GO-LSD). positives_hist, shared_hist: images per bin of
        `POSITIVES` (DEIM Fig. 3 and 6). iou: pairs per tenth of IoU, low: share of pairs below `low`, for `SHOWN`.
        unstable: per layer, the share of targets (of those that either has matched) with another query than in the
        layer before, which for the first is the proposals (Stable-DINO 2.4.3). alignment: Pearson's and Spearman's
        correlation of score and IoU of the final layer's pairs. score: the mean of their scores for the target's class,
        and the mean over images of the best score, of any class, of a query without a target. entropy: per layer, the
        mean of the edges' distributions of matched queries in bits; uniform over R + 1 bins is log2(R + 1).
        A mean of nothing, or with a number in it that is not finite, is None.
        """
        looks, self.looks = self.looks, []
        if not looks:
            return None
        parts = [look.findings() for look in looks]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return plain(summary(found, self.low))


class Look(NamedTuple):
    """What one call of the criterion saw: `images`, and named vectors end to end in one tensor on the device."""

    images: int
    layers: list[str]
    sizes: dict[str, int]
    numbers: Tensor

    @staticmethod
    @torch.no_grad()
    def at(own: Pairs, shared: Pairs) -> Look:
        """Gather all that a row is made from."""
        place = {output.name: k for k, output in enumerate(own.outputs)}
        layers = in_order(place)
        fullest = max(own.matches, key=lambda match: len(match.target))  # the denoising one, which has every target
        vectors = {"known/image": fullest.image, "known/target": fullest.target}
        ious = own.iou.split([len(match.query) for match in own.matches])
        for name in layers:
            match = own.matches[place[name]]
            vectors |= {f"query/{name}": match.query, f"target/{name}": match.target, f"iou/{name}": ious[place[name]]}
        if "final" in place:
            vectors |= of_final(own.only([place["final"]]))
            vectors["image/shared"] = shared.matches[place["final"]].image
        edged = [name for name in layers if own.outputs[place[name]].preds.edges is not None]
        if edged:
            vectors |= of_edges(own.only([place[name] for name in edged]))
        sizes = {name: len(vector) for name, vector in vectors.items()}
        return Look(own.outputs[0].preds.boxes.shape[0], layers, sizes, torch.cat(list(vectors.values())))

    def findings(self) -> dict[str, Floats]:
        """Vectors over images, pairs or targets, which those of other calls may be appended to."""
        ends = np.cumsum(list(self.sizes.values()))
        seen = dict(zip(self.sizes, np.split(self.numbers.cpu().numpy(), ends[:-1]), strict=True))
        _, first = np.unique(seen["known/target"], return_index=True)
        found = {"targets": self._per_image(seen["known/image"][first])}
        found |= {name: seen[name] for name in seen if name.startswith(("iou/", "entropy/"))}
        for before, now in pairwise(self.layers):
            old, new = ((seen[f"target/{name}"], seen[f"query/{name}"]) for name in (before, now))
            found[f"moved/{now}"] = moved(*tables(old, new))
        if "final" in self.layers:
            found |= {name: self._per_image(seen[f"image/{name}"]) for name in ("positives", "shared")}
            found |= {"score": seen["score"], "rival": seen["rival"][seen["rival"] != NOBODY]}
        return found

    def _per_image(self, image: Floats) -> Floats:
        return np.bincount(image.astype(np.int64), minlength=self.images).astype(np.float64)


def in_order(names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Those of `names` that are stages of the same queries, in that order: proposals, layer0, layer1, ..., final."""
    numbered = [(int(found[1]), name) for name in names if (found := re.fullmatch(r"layer(\d+)", name))]
    ordered = ["proposals", *(name for _, name in sorted(numbered)), "final"]
    return [name for name in ordered if name in names]


def of_final(final: Pairs) -> dict[str, Tensor]:
    """Of the final layer alone: the image and score of every pair, and of every image its best unmatched score."""
    match, logits = final.matches[0], final.outputs[0].preds.logits  # (M,), (B, Q, C)
    best = widen(logits.amax(-1)).sigmoid()  # (B, Q)
    best[match.image, match.query] = NOBODY
    nobody = best.new_full((len(best), 1), NOBODY)
    return {
        "image/positives": match.image,
        "score": widen(logits[match.image, match.query, final.labels]).sigmoid(),
        "rival": torch.cat([best, nobody], 1).amax(1),
    }


def of_edges(layers: Pairs) -> dict[str, Tensor]:
    """The entropy of every pair's edge distributions, in bits and as the mean of the four, layer by layer."""
    chance = layers.gather("edges").softmax(-1)  # (M, 4, R + 1)
    bits = torch.special.entr(chance).sum(-1).mean(-1) / math.log(2)
    parts = bits.split([len(match.query) for match in layers.matches])
    return {f"entropy/{output.name}": part for output, part in zip(layers.outputs, parts, strict=True)}


def summary(found: dict[str, Floats], low: float) -> dict[str, Any]:
    """The row of `Microscope.row`, of which numbers may still be NaN, from the findings of a step."""
    nothing = np.empty(0)
    positives, shared = (found.get(name, nothing) for name in ("positives", "shared"))
    score, iou = found.get("score", nothing), found.get("iou/final", nothing)
    shown = {name: found[f"iou/{name}"] for name in SHOWN if f"iou/{name}" in found}
    return {
        "images": len(found["targets"]),
        "targets": int(found["targets"].sum()),
        "targets_per_image": mean(found["targets"]),
        "positives": mean(positives),
        "positives_shared": mean(shared),
        "positives_hist": positives_histogram(positives),
        "shared_hist": positives_histogram(shared),
        "iou": {name: iou_histogram(values) for name, values in shown.items()},
        "low": {name: mean(np.where(np.isnan(values), np.nan, values < low)) for name, values in shown.items()},
        "unstable": {name: mean(values) for name, values in under("moved/", found)},
        "alignment": {"pearson": pearson(score, iou), "spearman": pearson(ranks(score), ranks(iou))},
        "score": {"matched": mean(score), "best_unmatched": mean(found.get("rival", nothing))},
        "entropy": {name: mean(values) for name, values in under("entropy/", found)},
    }


def under(prefix: str, found: dict[str, Floats]) -> Iterator[tuple[str, Floats]]:
    """The findings whose name begins with `prefix`, by the rest of their name."""
    return ((name.removeprefix(prefix), values) for name, values in found.items() if name.startswith(prefix))


def mean(values: Floats) -> float:
    """The mean, NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def positives_histogram(counts: Floats) -> list[int]:
    """How many images have as many positives as each bin of `POSITIVES` stands for."""
    place = np.searchsorted(POSITIVES, counts, side="right") - 1
    return np.bincount(place, minlength=len(POSITIVES)).tolist()


def iou_histogram(iou: Floats) -> list[int]:
    """How many pairs have an IoU in each tenth of [0, 1]; one that is not finite is left out."""
    place = (iou[np.isfinite(iou)] * IOU_BINS).astype(np.int64).clip(0, IOU_BINS - 1)
    return np.bincount(place, minlength=IOU_BINS).tolist()


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's correlation; NaN for fewer than `LEAST` pairs, or where one of the two never changes."""
    if len(x) < LEAST:
        return math.nan
    x, y = (values.astype(np.float64) - values.mean() for values in (x, y))
    spread = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread > 0 else math.nan


def ranks(values: Floats) -> Floats:
    """The rank of every value, those that tie sharing their mean rank; NaN throughout if any is NaN."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def tables(*matches: tuple[Floats, Floats]) -> list[NDArray[np.int64]]:
    """Each pair of (target, query) vectors as the query of every target, -1 for none; all of one length."""
    targets = 1 + max((int(target.max()) for target, _ in matches if len(target)), default=-1)
    found = [np.full(targets, -1, np.int64) for _ in matches]
    for table, (target, query) in zip(found, matches, strict=True):
        table[target.astype(np.int64)] = query.astype(np.int64)
    return found


def moved(before: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 for every target whose query is another than before, 0 for the others; those that never had one left out."""
    known = (before >= 0) | (now >= 0)
    return (before != now)[known].astype(np.float64)


class Probe:
    """The same few images after every epoch, to see for how many of their targets another query answers now.

    split, images, seed: what to draw the images from, how many, and which. size: (height, width) they are shown at.
    matcher: the recipe's. An image that cannot be read is left out.

    A two-stage detector numbers its queries anew in every forward, so a query is told by the encoder's cell that it
    started from. The images are read once, at the first `row`; `state_dict` lets a resumed run compare with the epoch
    before it.
    """

    def __init__(self, split: Split, size: tuple[int, int], matcher: Matcher, images: int = 16, seed: int = 0) -> None:
        self.split, self.size, self.matcher = split, size, matcher
        self.indices = sorted(np.random.default_rng(seed).permutation(len(split))[:images].tolist())
        self.batches: list[Batch] | None = None
        self.ids: list[Any] = []  # of the images in `cells`
        self.cells = torch.empty(0, dtype=torch.long)  # of every target after the last epoch, -1 for none

    def row(self, detector: Detector) -> dict[str, Any]:
        """How the matches of an evaluating `detector` differ from those at the last call, as plain JSON numbers.

        images, targets: how many. changed: the share of targets, of those that were matched at either call, that
        another cell answers for. instability: DN-DETR's IS, how many queries of an image answer for another target than
        before, or for one more or less; a target that goes to an idle query counts twice. Both None at the first call,
        for other images than before, and for predictions that are not finite.
        """
        if self.batches is None:
            self.batches = list(self._read())
        ids = [batch.ids[0] for batch in self.batches]
        image = np.repeat(np.arange(len(ids)), [len(batch.targets) for batch in self.batches])
        before = self.cells.numpy() if self.ids == ids and len(self.cells) == len(image) else None
        row: dict[str, Any] = {"images": len(ids), "targets": len(image), "changed": None, "instability": None}
        try:
            self.cells = torch.cat([self.cells[:0], *(self._match(detector, batch) for batch in self.batches)])
        except NonFiniteError:
            self.ids, self.cells = [], self.cells[:0]
            return row
        self.ids = ids
        if before is not None and ids:
            now = self.cells.numpy()
            row |= {"changed": mean(moved(before, now)), "instability": switched(image, before, now) / len(ids)}
        return plain(row)

    def _read(self) -> Iterator[Batch]:
        for index in self.indices:
            with suppress(DataError):
                yield from Loader(self.split.take([index]), batch=1, size=self.size).epoch()

    def _match(self, detector: Detector, batch: Batch) -> Tensor:
        """The cell of every target of one image, -1 for none. -> (N,), on the CPU."""
        shown = batch.to(next(detector.parameters()).device).finish()
        with predicting(detector), starting_cells(detector) as cells:
            match = self.matcher([Output("final", detector(shown.images))], shown.targets)[0]
        found = torch.full((len(batch.targets),), -1)
        found[match.target.cpu()] = cells[0].cpu()[0, match.query.cpu()]
        return found

    def state_dict(self) -> dict[str, Any]:
        """The last epoch's matches."""
        return {"ids": self.ids, "cells": self.cells}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the matches that `state_dict` gave."""
        self.ids, self.cells = list(state["ids"]), state["cells"].cpu()


@contextmanager
def starting_cells(detector: Detector) -> Iterator[list[Tensor]]:
    """A block in which every forward appends the cells that its queries start from, (B, Q) indices of encoder tokens.

    `TopKQueries` does not say which it chose, so its choice is repeated on the very scores it was made from.
    """
    queries, found = detector.queries, []

    def choose(module: Any, inputs: Any, logits: Tensor) -> None:
        found.append(logits.amax(-1).topk(min(queries.count, logits.shape[1]), 1).indices)

    handle = queries.score.register_forward_hook(choose)
    try:
        yield found
    finally:
        handle.remove()


def switched(image: NDArray[np.int64], before: NDArray[np.int64], now: NDArray[np.int64]) -> int:
    """How many queries answer for another target than before, by the query of every target (-1 for none)."""
    other = before != now
    pairs = {*zip(image[other], before[other], strict=True), *zip(image[other], now[other], strict=True)}
    return sum(query >= 0 for _, query in pairs)
