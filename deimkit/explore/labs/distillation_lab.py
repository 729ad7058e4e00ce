"""A lab for GO-LSD: what the last layer teaches the others about the edges of one query, and how much that counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.errors import DeimkitError
from deimkit.explore.curves import INK, LINES
from deimkit.explore.labs.edges import EDGES, Floats, edged
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing, Sheet, powers
from deimkit.explore.labs.strips import TINTS, edge_and_bin, joined, place, places, strip
from deimkit.explore.layers import expect_classes
from deimkit.losses import DDF, Pairs
from deimkit.matching import Hungarian, Matcher
from deimkit.models.detector import Detector
from deimkit.structures import Batch

STUDENT, TEACHER, MATCHED, OTHER = LINES[0], LINES[2], LINES[1], "#8a8a8a"
WHO = ("teacher (last layer)", "student")
COLDEST, HOTTEST = 0.5, 20.0
TEMPERATURES = tuple(np.geomspace(COLDEST, HOTTEST, 13).tolist())
LOW = (0.0, 0.48)  # where the lower panels are
WIDE = 1e6  # the heaviest query by the lightest that is shown
LEAST = 1e-12  # what a logarithmic axis shows of 0


@dataclass(frozen=True)
class Distilled:
    """What `DistillationLab` found of one query.

    image, query: which it is. meant: the class of the target it is matched with, or "" (unmatched). taught: (4, R + 1),
    learned: (K, 4, R + 1), teacher's and students' distributions, softened by T. kl: (K, 4), T² KL of every edge.
    weights: (K, B * Q), what DDF multiplies the mean over a query's edges by, heaviest query first. matched: (B * Q,).
    loss: (K,), DDF's own values. slope: (temperatures,), the norm of the gradient that T² KL has at the chosen layer's
    logits.
    """

    image: int
    query: int
    meant: str
    rank: int
    layer: int
    edge: int
    T: float
    layers: tuple[str, ...]
    taught: Floats
    learned: Floats
    kl: Floats
    weights: Floats
    matched: Floats
    loss: Floats
    slope: Floats


class DistillationLab(Lab):
    """Teacher and student distributions of any query, their KL by layer and edge, and what they weigh in DDF.

    model: a Detector with FDR and at least two decoder layers. batch: images with targets, as a `Loader` yields them.
    matcher: that of the recipe, by default `Hungarian()`. Queries are ranked by their weight. A click on the map shows
    a layer and an edge, a click on a weight that query. Source: D-FINE 4.2.
    """

    title = "Distillation from the last layer (GO-LSD)"

    def __init__(self, model: Detector, batch: Batch, matcher: Matcher | None = None) -> None:
        expect_classes(model, batch.targets)
        shown = batch.to(next(model.parameters()).device).finish()
        outputs = edged(model, shown.images)
        students = [k for k, output in enumerate(outputs) if output.last is not None]
        if not students:
            raise DeimkitError("A last layer teaches those before it; got a decoder of one layer. Give it two or more.")
        _, shared = Criterion((), matcher or Hungarian()).pairs(outputs, shown.targets)
        self.pairs = shared.only(students)
        self.layers = tuple(outputs[k].name for k in students)
        self.student = self.pairs.stack("edges").cpu()  # (K, B, Q, 4, R + 1)
        self.teacher = outputs[-1].preds.edges.float().cpu()  # type: ignore[union-attr]
        self.weights = weights(self.pairs).cpu()  # (K, B * Q)
        match, queries = self.pairs.matches[0], self.teacher.shape[1]
        classes = [model.categories.name(label) for label in shown.targets.labels[match.target].tolist()]
        at = zip(match.image.tolist(), match.query.tolist(), strict=True)
        self.meant = dict(zip(at, classes, strict=True))  # by image and query
        place = (match.image * queries + match.query).cpu()
        self.matched = torch.zeros(self.weights.shape[1]).index_fill_(0, place, 1.0)
        self.order = self.weights.mean(0).argsort(descending=True)
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        return (
            Slider("rank", 0, len(self.order) - 1, 1, 0, "query, heaviest first"),
            Choice("layer", self.layers, self.layers[0], "student"),
            Choice("edge", EDGES, "left", "edge"),
            Slider("T", COLDEST, HOTTEST, 0.5, 5.0, "temperature T"),
        )

    def compute(self, rank: int, layer: str, edge: str, T: float) -> Distilled:
        """Soften the distributions by T and compare them, as DDF does."""
        image, query = divmod(int(self.order[rank]), self.teacher.shape[1])
        k, kl = self.layers.index(layer), per_edge(self.student, self.teacher, T)
        taught, student = self.teacher[image, query], self.student[:, image, query]
        return Distilled(
            image=image,
            query=query,
            meant=self.meant.get((image, query), ""),
            rank=rank,
            layer=k,
            edge=EDGES.index(edge),
            T=T,
            layers=self.layers,
            taught=(taught / T).softmax(-1).double().numpy(),
            learned=(student / T).softmax(-1).double().numpy(),
            kl=kl[:, image, query].double().numpy(),
            weights=self.weights[:, self.order].double().numpy(),
            matched=self.matched[self.order].double().numpy(),
            loss=DDF(T=T)(self.pairs).cpu().double().numpy(),
            slope=np.array([slope(student[k], taught, T) for T in TEMPERATURES]),
        )

    def draw(self, found: Distilled) -> Drawing:
        """Draw the distributions, and under them their KL, the weights, and what T does to gradients."""
        sheet = Sheet()
        _distributions(sheet, found)
        _map(sheet, found)
        _weights(sheet, found)
        _slopes(sheet, found)
        return sheet.drawing(740, legend={"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"})

    def words(self, found: Distilled) -> str:
        """Say who the query is, and what it adds to the loss."""
        layer, weight = found.layers[found.layer], found.weights[found.layer]
        who = f"matched with {found.meant!r}" if found.meant else "not matched"
        mean, own = found.kl[found.layer].mean(), weight[found.rank]
        share = (weight * found.matched).sum() / max(weight.sum(), LEAST)
        return (
            f"Query {found.query} of image {found.image} is {who}. After {layer}, T² KL is {mean:.3g} as a mean of its "
            f"edges and weighs {own:.2g}, so it adds {mean * own:.2g} to the DDF of {found.loss[found.layer]:.3g}. "
            f"{int(found.matched.sum())} of {len(weight)} queries are matched, and have {share:.0%} of the weight."
        )

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """Choose the query, the edge or the layer that was clicked."""
        if trace in WHO:
            return {k: v for k, v in edge_and_bin(x, self.teacher.shape[-1]).items() if k == "edge"}
        if trace in ("matched", "unmatched"):
            return {"rank": int(x)}
        return {"edge": x, "layer": y} if trace == "KL" else {}


@dataclass(frozen=True)
class _Probed(DDF):
    """DDF with divergences that remember what they are multiplied by, as their gradient."""

    asked: list[Tensor] = field(default_factory=list)

    def divergence(self, students: Tensor, teacher: Tensor) -> Tensor:
        self.asked.append(students.new_ones(students.shape[:3]).requires_grad_())
        return self.asked[-1]


def weights(pairs: Pairs) -> Tensor:
    """What DDF multiplies the divergence of every query by. -> (K, B * Q)."""
    probe = _Probed()
    with torch.enable_grad():
        probe(pairs).sum().backward()
    return torch.cat([asked.grad.flatten(1) for asked in probe.asked])  # type: ignore[union-attr]


def per_edge(students: Tensor, teacher: Tensor, T: float) -> Tensor:
    """DDF's divergence of every edge by itself. (K, B, Q, 4, R + 1), (B, Q, 4, R + 1) -> (K, B, Q, 4)."""
    alone = DDF(T=T).divergence(students.flatten(2, 3).unsqueeze(3).clone(), teacher.flatten(1, 2).unsqueeze(2))
    return alone.unflatten(2, (-1, 4))


def slope(student: Tensor, teacher: Tensor, T: float) -> float:
    """The norm of the gradient of DDF's divergence at a student's logits. (4, R + 1) each."""
    with torch.enable_grad():
        leaf = student.clone().requires_grad_()
        DDF(T=T).divergence(leaf.clone()[None, None, None], teacher[None, None]).sum().backward()
    assert leaf.grad is not None
    return float(leaf.grad.norm())


def _distributions(sheet: Sheet, found: Distilled) -> None:
    """What the teacher says of the four edges, and what the student does."""
    student, layer, bins = found.learned[found.layer], found.layers[found.layer], found.taught.shape[-1]
    high = 1.3 * max(found.taught.max(), student.max())
    title = f"softened by T = {found.T:g}: the teacher's distributions, and the student's after {layer}; T² KL"
    panel = strip(sheet, title, (0, 1), (0.68, 1.0), bins, "bin n", {"title": "probability", "range": [0, high]})
    for name, rows, tint, dash in zip(WHO, (found.taught, student), (TEACHER, STUDENT), ("dash", "solid"), strict=True):
        line, mark = {"color": tint, "dash": dash, "width": 2}, {"size": 4}
        panel.add("scatter", x=places(bins), y=joined(rows), name=name, mode="lines+markers", line=line, marker=mark)
    for k, edge in enumerate(EDGES):
        said = f"{'<b>' * (k == found.edge)}{edge}: {found.kl[found.layer, k]:.2g}{'</b>' * (k == found.edge)}"
        panel.say(said, place(k, 0, bins), high, xanchor="left", yanchor="top", font={"color": TINTS[k]})


def _map(sheet: Sheet, found: Distilled) -> None:
    """T² KL of the query by layer and edge."""
    x = {"type": "category", "range": [-0.5, 3.5], "showgrid": False}
    y = {"type": "category", "range": [len(found.layers) - 0.5, -0.5], "showgrid": False}
    panel = sheet.panel("T² KL by layer and edge", (0.0, 0.27), LOW, x, y)
    look = {"colorscale": [[0, "#ffffff"], [1, STUDENT]], "zmin": 0, "zmax": max(found.kl.max(), LEAST)}
    text = [[f"{value:.2g}" for value in row] for row in found.kl]
    panel.add(
        "heatmap",
        x=EDGES,
        y=found.layers,
        z=found.kl,
        text=text,
        texttemplate="%{text}",
        name="KL",
        showscale=False,
        **look,
    )
    ring = {"size": 50, "symbol": "square-open", "color": INK, "line": {"width": 2}}
    at = {"x": [EDGES[found.edge]], "y": [found.layers[found.layer]]}
    panel.add("scatter", **at, name="chosen", mode="markers", marker=ring, showlegend=False, hoverinfo="skip")


def _weights(sheet: Sheet, found: Distilled) -> None:
    """What every query's divergence is multiplied by, heaviest first, and the chosen one."""
    weight, rank = np.maximum(found.weights[found.layer], LEAST), np.arange(found.weights.shape[1])
    y = {"title": "weight", **powers(max(weight.min(), weight.max() / WIDE) / 2, weight.max() * 2)}
    panel = sheet.panel("how much each query counts (log)", (0.36, 0.66), LOW, {"title": "query, heaviest first"}, y)
    for name, chosen, tint, mark in (("matched", 1, MATCHED, "circle"), ("unmatched", 0, OTHER, "circle-open")):
        rows, marker = found.matched == chosen, {"color": tint, "symbol": mark, "size": 6}
        panel.add("scatter", x=rank[rows], y=weight[rows], name=name, mode="markers", marker=marker)
    ring = {"size": 14, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
    at = {"x": [found.rank], "y": [weight[found.rank]]}
    panel.add("scatter", **at, name="this query", mode="markers", marker=ring, showlegend=False)


def _slopes(sheet: Sheet, found: Distilled) -> None:
    """How strongly the query learns at every temperature, with the factor T² and without."""
    warm = np.array(TEMPERATURES)
    kinds = {"with T²": found.slope, "without": found.slope / warm**2}
    values = np.maximum(np.concatenate(list(kinds.values())), LEAST)
    low, high = values.min() / 1.6, values.max() * 3
    x = {"type": "log", "title": "temperature T", "tickvals": [0.5, 1, 2, 5, 10, 20]}
    y = {"title": "norm of the gradient", **powers(low, high)}
    panel = sheet.panel("what T² is for (log)", (0.74, 1.0), LOW, x, y)
    for (name, slopes), tint, dash in zip(kinds.items(), (STUDENT, MATCHED), ("solid", "dash"), strict=True):
        line = {"color": tint, "dash": dash, "width": 2}
        panel.add("scatter", x=warm, y=np.maximum(slopes, LEAST), name=name, mode="lines", line=line, showlegend=False)
        at = np.log10(warm[6]), np.log10(max(slopes[6], LEAST))
        panel.say(name, *at, yanchor="bottom", xanchor="left", xshift=4, font={"color": tint})
    line = {"color": INK, "width": 1}
    panel.add("scatter", x=[found.T] * 2, y=[low, high], name="T", mode="lines", line=line, showlegend=False)
