"""A lab for the matcher: who answers for what, what every pair costs, and what changes when one box moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.data.split import Split
from deimkit.evaluation.measure import in_classes_of
from deimkit.explore.labs import match_panels
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.match_scene import Floats, Scene, alone, in_mosaic
from deimkit.explore.labs.sheet import Drawing, Sheet
from deimkit.matching import Hungarian, PositionModulated, SimOTA
from deimkit.models.detector import Detector
from deimkit.structures import Match, Output

DENSE = "Dense O2O"
RULES = ("Hungarian", "SimOTA", "position-modulated", DENSE)
SHOWN = 40  # queries in the heat map, unless more have a target


@dataclass(frozen=True, eq=False)
class Matched:
    """What `MatchLab` found; all pixels are those of the picture that the detector sees.

    boxes: (Q, 4) xyxy. scores: (Q,) the best of all classes. query: the one that may be moved. before: (4,) its box
    where the detector put it. pairs: (M, 2) target and query. unmoved: (M', 2) the same with the box at `before`.
    cost: (N, Q), and far: (N, Q), where SimOTA adds its penalty for lying outside. columns: the queries to show.
    positives: of every rule, how many queries have a target now.
    """

    rule: str
    layer: str
    scene: Scene
    boxes: Floats
    scores: Floats
    query: int
    before: Floats
    pairs: NDArray[np.int64]
    unmoved: NDArray[np.int64]
    cost: Floats
    far: NDArray[np.bool_]
    columns: NDArray[np.int64]
    positives: dict[str, int]

    @property
    def moved(self) -> Floats:
        """How far the box was moved right and down, in pixels. (2,)."""
        return (self.boxes[self.query] - self.before)[:2]

    @property
    def gained(self) -> NDArray[np.int64]:
        """The pairs that are there because the box was moved. (G, 2)."""
        return _without(self.pairs, self.unmoved)

    @property
    def lost(self) -> NDArray[np.int64]:
        """The pairs that are no more because the box was moved. (L, 2)."""
        return _without(self.unmoved, self.pairs)


class MatchLab(Lab):
    """One image, all queries of a layer, and four rules that say which query answers for which target.

    model: a whole Detector. split: of the reader's data, such as `dataset.val`; image: which of its pictures. Drag the
    pink box, or move it by the sliders; a click on a query's dot or column takes that query instead. Whatever is shown,
    all queries of the layer are matched. Dense O2O is the Hungarian rule on the mosaic of this picture and the three
    after it. Sources: DETR Eq. 1, YOLOX (SimOTA), Stable-DINO (position-modulated cost), DEIM Fig. 2.
    """

    title = "Who answers for what"

    def __init__(self, model: Detector, split: Split, image: int = 0) -> None:
        """Raises `DataError` for an image that the split does not have, or objects whose class the model does not."""
        split = in_classes_of(model.categories, split)
        self.alone, self.mosaic = alone(model, split, image), in_mosaic(model, split, image)
        self.layers = tuple(self.alone.outputs)
        first = _pairs(Hungarian()([self.alone.outputs["final"]], self.alone.targets)[0])
        self.first = int(first[0, 1]) if len(first) else 0
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        """The rule and the layer, what the costs weigh, and the box to move."""
        height, width = self.alone.picture.shape[:2]
        count = self.alone.outputs["final"].preds.boxes.shape[1]
        return (
            Choice("rule", RULES, RULES[0], "rule"),
            Choice("layer", self.layers, "final", "layer"),
            Slider("query", 0, count - 1, 1, self.first, "query to move"),
            Slider("right", -width, width, 1, 0, "move it right, px"),
            Slider("down", -height, height, 1, 0, "move it down, px"),
            Slider("cls", 0.0, 10.0, 0.5, 2.0, "class weight (not SimOTA)"),
            Slider("l1", 0.0, 10.0, 0.5, 5.0, "L1 weight (not SimOTA)"),
            Slider("giou", 0.0, 10.0, 0.5, 2.0, "GIoU weight (not SimOTA)"),
            Slider("candidates", 1, 20, 1, 10, "candidates (SimOTA)"),
            Slider("iou", 0.0, 10.0, 0.5, 3.0, "IoU weight (SimOTA)"),
        )

    def compute(
        self,
        rule: str,
        layer: str,
        query: int,
        right: int,
        down: int,
        cls: float,
        l1: float,
        giou: float,
        candidates: int,
        iou: float,
    ) -> Matched:
        """Match all queries of the layer with the box where it is now, and where it was."""
        hungarian, simota = Hungarian(cls, l1, giou), SimOTA(candidates=candidates, iou=iou)
        rules: tuple[Hungarian | SimOTA, ...] = (hungarian, simota, PositionModulated(cls, l1, giou), hungarian)
        matchers = dict(zip(RULES, rules, strict=True))
        scenes = {name: self.mosaic if name == DENSE else self.alone for name in RULES}
        outputs = {name: scene.shifted(layer, query, right, down) for name, scene in scenes.items()}
        found = {name: _pairs(matchers[name]([outputs[name]], scenes[name].targets)[0]) for name in RULES}
        scene, output = scenes[rule], outputs[rule]
        costs = matchers[rule].costs([output], scene.targets, torch.arange(len(scene.targets)))
        cost = costs.total.double().numpy()
        boxes, before = (_boxes(scene, said) for said in (output, scene.outputs[layer]))
        return Matched(
            rule=rule,
            layer=layer,
            scene=scene,
            boxes=boxes,
            scores=output.preds.logits[0].sigmoid().amax(-1).double().numpy(),
            query=query,
            before=before[query],
            pairs=found[rule],
            unmoved=_pairs(matchers[rule]([scene.outputs[layer]], scene.targets)[0]),
            cost=cost,
            far=costs.parts["outside"].numpy() > 0 if "outside" in costs.parts else np.zeros(cost.shape, bool),
            columns=_worth_showing(cost, found[rule], query),
            positives={name: len(pairs) for name, pairs in found.items()},
        )

    def draw(self, found: Matched) -> Drawing:
        """The picture with its pairs, the cost matrix, and how many positives each rule gives."""
        sheet = Sheet()
        match_panels.picture(sheet, found)
        match_panels.matrix(sheet, found)
        match_panels.counts(sheet, found)
        own = {"legend": match_panels.LEGEND, "shapes": [match_panels.movable(found)], "bargap": 0.35}
        return sheet.drawing(660, margin={"l": 20, "r": 20, "t": 50, "b": 80}, **own)

    def words(self, found: Matched) -> str:
        """How many answer, whom the movable box answers for, and what its move changed."""
        targets, queries = len(found.scene.targets), len(found.boxes)
        answering = len(np.unique(found.pairs[:, 1]))
        served = len(np.unique(found.pairs[:, 0]))
        each = f", {answering / served:.1f} each" if served else ""
        left = f"; {targets - served} go without" if served < targets else ""
        return (
            f"{found.rule}, {found.layer}: {answering} of {queries} queries answer for {served} of {targets} "
            f"targets{each}{left}. {_of_the_moved(found)} {_what_changed(found)}"
        )

    def dragged(self, shapes: Sequence[Any]) -> dict[str, Any]:
        """The sliders that follow the centre of the dragged box, as far as they go."""
        shape = shapes[0]
        centre = np.array([shape.x0 + shape.x1, shape.y0 + shape.y1]) / 2
        low, high = self.found.before[:2], self.found.before[2:]
        height, width = self.alone.picture.shape[:2]
        right, down = np.clip(np.round(centre - (low + high) / 2), (-width, -height), (width, height))
        return {"right": int(right), "down": int(down)}

    def set(self, **values: Any) -> Lab:
        """Move controls; another query begins at its own place."""
        if values.get("query", self.values["query"]) != self.values["query"]:
            values = {"right": 0, "down": 0} | values
        return super().set(**values)

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """The query of a dot or of a column of the heat map, at its own place."""
        found = self.found
        if trace == match_panels.DOTS:
            centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
            query = np.square(centres - (x, y)).sum(1).argmin()
        elif trace in (match_panels.CELLS, match_panels.MARKS):
            query = found.columns[round(x)]
        else:
            return {}
        return {"query": int(query), "right": 0, "down": 0}


def _pairs(match: Match) -> NDArray[np.int64]:
    """Target and query of every pair of one image. (M, 2)."""
    return torch.stack([match.target, match.query], 1).numpy()


def _boxes(scene: Scene, output: Output) -> Floats:
    return scene.in_pixels(cxcywh_to_xyxy(output.preds.boxes[0]))


def _without(pairs: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pairs that are not among the others."""
    known = set(map(tuple, others.tolist()))
    return np.array([pair for pair in pairs.tolist() if tuple(pair) not in known], np.int64).reshape(-1, 2)


def _worth_showing(cost: Floats, pairs: NDArray[np.int64], query: int) -> NDArray[np.int64]:
    """Queries by the target they answer for, then the cheapest rivals target by target, and the one to move."""
    rivals = cost.argsort(1, kind="stable").T.ravel().tolist()  # everybody's cheapest, then everybody's second, ...
    own = pairs[:, 1].tolist()
    ranked = [*dict.fromkeys([*own, query, *rivals])]
    return np.array(ranked[: max(SHOWN, len(own) + 1)] or [query], np.int64)


def _of_the_moved(found: Matched) -> str:
    """Whom the query that can be moved answers for."""
    right, down = np.round(found.moved).astype(int).tolist()
    where = f"Query {found.query}"
    if right or down:
        where += f", moved {abs(right)} px {'right' if right >= 0 else 'left'}"
        where += f" and {abs(down)} px {'down' if down >= 0 else 'up'},"
    mine = found.pairs[found.pairs[:, 1] == found.query, 0]
    if not len(mine):
        return f"{where} answers for nothing."
    target = int(mine[0])
    name, cost = found.scene.names[target], found.cost[target, found.query]
    return f"{where} answers for target {target + 1} ({name}) at a cost of {cost:.2f}."


def _what_changed(found: Matched) -> str:
    """Which targets have other queries than with the box at its place."""
    if not found.moved.any():
        return "Drag it, or move it by the sliders."
    changed = np.unique(np.concatenate([found.gained, found.lost])[:, 0]).tolist()
    if not changed:
        return "Nothing changed by the move."
    told = [
        f"target {target + 1} goes from {_queries(found.unmoved, target)} to {_queries(found.pairs, target)}"
        for target in changed[:3]
    ]
    more = f", and {len(changed) - 3} more targets change" if len(changed) > 3 else ""
    return f"The move changed this: {', '.join(told)}{more}."


def _queries(pairs: NDArray[np.int64], target: int) -> str:
    """The queries of a target in words."""
    mine = pairs[pairs[:, 0] == target, 1].tolist()
    return f"quer{'y' if len(mine) == 1 else 'ies'} {', '.join(map(str, mine))}" if mine else "nobody"
