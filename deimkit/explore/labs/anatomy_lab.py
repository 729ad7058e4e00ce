"""A lab for the gaze of one query: where each layer, level and head looks, how much it counts, and where it leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deimkit.boxes import cxcywh_to_xyxy
from deimkit.explore.labs.anatomy import Anatomy, dissect
from deimkit.explore.labs.anatomy_panels import panels
from deimkit.explore.labs.crops import address
from deimkit.explore.labs.edges import Floats
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing
from deimkit.models.detector import Detector

Ints = NDArray[np.int64]
ALL = "all"


@dataclass(frozen=True)
class Looked:
    """What `AnatomyLab` found of one query in one layer; places are in pixels of the picture.

    query: its index, and rank among the most confident, from 1. levels: the names of S levels. boxes: (layers + 1, 4)
    xyxy, first the one it starts with. cells: (Q, 2) the cells that became queries, and on which level (Q,) cell_level.
    points: (H, P, 2), weights: (H, P), point_level: (P,). shown: (H, P) whether level and head are chosen. shares:
    (layers, S) of the weight by level, of the chosen head or the mean of all; even: (S,) if all points counted alike.
    """

    query: int
    rank: int
    name: str
    score: float
    layers: tuple[str, ...]
    layer: int
    head: int | None
    levels: tuple[str, ...]
    boxes: Floats
    cells: Floats
    cell_level: Ints
    points: Floats
    weights: Floats
    point_level: Ints
    shown: NDArray[np.bool_]
    shares: Floats
    even: Floats
    source: str
    size: tuple[int, int]

    @property
    def inside(self) -> float:
        """How much of the shown points' weight lies in the box that the layer looks around."""
        low, high = self.boxes[self.layer, :2], self.boxes[self.layer, 2:]
        within = ((self.points >= low) & (self.points <= high)).all(-1)
        return float(self.weights[self.shown & within].sum() / max(self.weights[self.shown].sum(), 1e-12))

    @property
    def outside(self) -> int:
        """How many of the shown points lie outside the picture, where only zeros are read."""
        height, width = self.size
        off = ((self.points < 0) | (self.points > (width, height))).any(-1)
        return int((off & self.shown).sum())

    @property
    def moved(self) -> float:
        """How many pixels the centre of its box moved, from the first box to the last."""
        centres = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        return float(np.hypot(*(centres[-1] - centres[0])))


class AnatomyLab(Lab):
    """One query at work: its cell, its box, its sampling points by level and weight, and its way through the layers.

    model: any Detector. image: any picture that `predict` takes. Left the whole picture with the cells that became
    queries, right the part where this one looks. A click on a cell takes its query, one on a bar that layer, one on
    the map of weights that head. Source: Deformable-DETR Eq. 3 and Fig. 6.
    """

    title = "One query looks at the image"

    def __init__(self, model: Detector, image: Any) -> None:
        self.anatomy = anatomy = dissect(model, image)
        self.source = address(anatomy.picture)
        self.size = (anatomy.picture.shape[0], anatomy.picture.shape[1])
        self.layers = tuple(f"layer{i}" for i in range(len(anatomy.gazes)))
        self.levels = tuple(f"{h} x {w}" for h, w in anatomy.shapes)
        self.heads = tuple(str(i + 1) for i in range(anatomy.gazes[0].weights.shape[1]))
        self.order = anatomy.order.tolist()
        self.cells = anatomy.places.numpy() * self.size[::-1]
        self.boxes = cxcywh_to_xyxy(anatomy.boxes).double().numpy() * np.tile(self.size[::-1], 2)
        self.shares = shares(anatomy)
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        return (
            Slider("query", 1, len(self.order), 1, 1, "query, by confidence"),
            Choice("layer", self.layers, self.layers[-1], "layer"),
            Choice("level", (ALL, *self.levels), ALL, "level"),
            Choice("head", (ALL, *self.heads), ALL, "head"),
        )

    def compute(self, query: int, layer: str, level: str, head: str) -> Looked:
        """What the query of this rank does in a layer, and which of its points are shown."""
        anatomy, index, depth = self.anatomy, self.order[query - 1], self.layers.index(layer)
        gaze, of_level = anatomy.gazes[depth], anatomy.point_level.numpy()
        chosen = None if head == ALL else self.heads.index(head)
        shown = np.ones((len(self.heads), len(of_level)), bool)
        if chosen is not None:
            shown &= np.arange(len(self.heads))[:, None] == chosen
        if level != ALL:
            shown &= of_level == self.levels.index(level)
        part = self.shares[:, index] if chosen is None else self.shares[:, index, chosen : chosen + 1]
        return Looked(
            query=index,
            rank=query,
            name=anatomy.names[int(anatomy.logits[index].argmax())],
            score=float(anatomy.logits[index].max().sigmoid()),
            layers=self.layers,
            layer=depth,
            head=chosen,
            levels=self.levels,
            boxes=self.boxes[:, index],
            cells=self.cells,
            cell_level=anatomy.level.numpy(),
            points=gaze.locations[index].double().numpy() * self.size[::-1],
            weights=gaze.weights[index].double().numpy(),
            point_level=of_level,
            shown=shown,
            shares=part.mean(1),
            even=np.array(anatomy.points) / sum(anatomy.points),
            source=self.source,
            size=self.size,
        )

    def draw(self, found: Looked) -> Drawing:
        return panels(found)

    def words(self, found: Looked) -> str:
        """Whose gaze it is, how much of it lies in the box, which level counts most, and how far the box moved."""
        heads = f"all {len(self.heads)} heads read" if found.head is None else f"head {found.head + 1} reads"
        share, level = found.shares[found.layer], int(found.shares[found.layer].argmax())
        return (
            f"Query {found.rank} by confidence, number {found.query}: {found.name} {found.score:.2f}, from a cell of "
            f"the {found.levels[found.cell_level[found.query]]} level. In {found.layers[found.layer]} {heads} the "
            f"{int(found.shown.sum())} points that are shown, {found.outside} of them outside the image. "
            f"{found.inside:.0%} of their weight lies in the box that they are laid around. The {found.levels[level]} "
            f"level has the most weight, {share[level]:.0%}; {found.even[level]:.0%} if all points counted alike. Over "
            f"all layers the centre moves by {found.moved:.1f} px."
        )

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """The query of a cell, the layer of a bar, or the head of a row of weights."""
        if trace.startswith("cells"):
            query = int(np.square(self.cells - (x, y)).sum(1).argmin())
            return {"query": self.order.index(query) + 1}
        if trace in self.layers:
            return {"layer": trace}
        return {"head": str(y)} if trace == "weights" and str(y) in self.heads else {}


def shares(anatomy: Anatomy) -> Floats:
    """How much every head of every query looks at each level; adds up to 1 over levels. (layers, Q, H, S)."""
    weights = np.stack([gaze.weights.double().numpy() for gaze in anatomy.gazes])  # (layers, Q, H, P)
    starts = np.cumsum((0, *anatomy.points[:-1]))
    return np.add.reduceat(weights, starts, axis=-1)
