"""A lab for one object on its way through the decoder: its boxes, its edges as distributions, and their bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from deimkit.explore.curves import FAINT, INK, LINES
from deimkit.explore.labs.crops import address, crop, outline
from deimkit.explore.labs.edges import EDGES, Floats, look
from deimkit.explore.labs.lab import Choice, Control, Lab, Slider
from deimkit.explore.labs.sheet import Drawing, Sheet
from deimkit.explore.labs.strips import MARKS, TINTS, edge_and_bin, joined, place, places, strip
from deimkit.models.detector import Detector

FIRST, LAST, NOW = LINES[1], LINES[2], LINES[0]  # red, green, and blue for the layer that was chosen
STEPS = LinearSegmentedColormap.from_list("steps", [FIRST, "#E69F00", LAST])  # from the first box to the last
TOP = (0.6, 1.0)  # where the upper panels are
STRIPS = ("first layer", "chosen layer", "last layer")
UNWEIGHTED = ("unweighted: the probability of every bin", (0.3, 0.5), "", "probability")
WEIGHTED = (
    "weighted: probability × W(n); the parts add up to the edge's distance from the first box's",
    (0.0, 0.2),
    "bin n",
    "px outwards",
)


@dataclass(frozen=True)
class Refined:
    """What `RefinementLab` found of one object; all pixels are the picture's, offsets count outwards.

    boxes: (L + 1, 4) xyxy, first the anchor that all offsets are measured from. bits: (L, 4) entropies. chance:
    (L, 4, R + 1). target: (4, R + 1), NaN where nothing is annotated. offsets: (4, R + 1) of every bin.
    """

    name: str
    score: float
    layers: tuple[str, ...]
    layer: int
    edge: int
    bin: int
    boxes: Floats
    wanted: Floats
    bits: Floats
    chance: Floats
    target: Floats
    offsets: Floats

    @property
    def parts(self) -> Floats:
        """What every bin contributes to where its edge is, in pixels. (L, 4, R + 1)."""
        return self.chance * self.offsets

    @property
    def moved(self) -> Floats:
        """How far every edge is from the anchor's, in pixels: the sum of the contributions. (L, 4)."""
        return self.parts.sum(-1)


class RefinementLab(Lab):
    """One object through all decoder layers: boxes from red to green, four distributions, their entropy.

    model: a Detector with FDR. image: any picture that `predict` takes. truth: (m, 4) annotated boxes, xyxy pixels; for
    an object near one of them the distribution that FGL wants is drawn too. A click on an edge of the box shows its
    distribution, a click on a bin what that bin contributes, a click on an entropy that layer. Source: D-FINE Fig. 4.
    """

    title = "One object through the decoder"

    def __init__(self, model: Detector, image: Any, truth: Any = None, objects: int = 12) -> None:
        self.edges = look(model, image, truth, objects)
        self.objects = tuple(
            f"{i + 1}: {name} {score:.2f}"
            for i, (name, score) in enumerate(zip(self.edges.names, self.edges.scores, strict=True))
        )
        self.source = address(self.edges.picture)
        super().__init__()

    def controls(self) -> tuple[Control, ...]:
        """One of the objects, a layer, an edge and a bin."""
        edges = self.edges
        return (
            Choice("object", self.objects, self.objects[0], "object"),
            Choice("layer", edges.layers, edges.layers[0], "layer"),
            Choice("edge", EDGES, "left", "edge"),
            Slider("bin", 0, len(edges.W) - 1, 1, len(edges.W) // 2 + 1, "bin n"),
        )

    def compute(self, object: str, layer: str, edge: str, bin: int) -> Refined:
        """Pick the object and the layer out of what the model said once."""
        edges, i = self.edges, self.objects.index(object)
        return Refined(
            name=edges.names[i],
            score=float(edges.scores[i]),
            layers=edges.layers,
            layer=edges.layers.index(layer),
            edge=EDGES.index(edge),
            bin=bin,
            boxes=np.stack([edges.anchors[i], *edges.boxes[:, i]]),
            wanted=edges.wanted[i],
            bits=edges.bits[:, i],
            chance=edges.chance[:, i],
            target=edges.target[i],
            offsets=edges.offsets[i],
        )

    def draw(self, found: Refined) -> Drawing:
        """Draw the picture, the entropies, W(n), and the distributions without and with it."""
        sheet = Sheet()
        self._picture(sheet, found)
        _entropy(sheet, found)
        _weights(sheet, found)
        _strip(sheet, found, weighted=False)
        _strip(sheet, found, weighted=True)
        return sheet.drawing(860, legend={"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom"})

    def words(self, found: Refined) -> str:
        """Say what the chosen bin contributes, and how sure the layers are of the edge."""
        edge, layer = EDGES[found.edge], found.layers[found.layer]
        chance, offset = found.chance[found.layer, found.edge, found.bin], found.offsets[found.edge, found.bin]
        bits, moved = found.bits[:, found.edge], found.moved[found.layer, found.edge]
        return (
            f"{found.name} {found.score:.2f}, {edge} edge, {layer}: {moved:+.1f} px from the first box's. "
            f"Bin {found.bin} stands for {offset:+.2f} px and has a probability of {chance:.1%}, so it adds "
            f"{chance * offset:+.3f} px. Entropy of this edge: {bits[0]:.2f} bits after the first layer, "
            f"{bits[-1]:.2f} after the last; {np.log2(found.offsets.shape[1]):.2f} would be uniform."
        )

    def clicked(self, trace: str, x: Any, y: Any) -> dict[str, Any]:
        """Choose the edge, the bin or the layer that was clicked."""
        if trace in STRIPS:
            return edge_and_bin(x, len(self.edges.W))
        if trace == "edges":
            middles = _middles(self.found.boxes[1 + self.found.layer])
            return {"edge": EDGES[int(np.square(middles - (x, y)).sum(1).argmin())]}
        if trace in EDGES:
            return {"edge": trace, "layer": x}
        return {"bin": int(x)} if trace == "W(n)" else {}

    def _picture(self, sheet: Sheet, found: Refined) -> None:
        """The picture near the object with the box of every layer, and the edges of the chosen one to click on."""
        title, around = "boxes, from red to green; dotted: annotated", np.stack([*found.boxes, found.wanted])
        panel = crop(sheet, title, (0, 0.33), TOP, self.source, self.edges.picture.shape[:2], around)
        ends = {0: "first box", len(found.layers): "last box"}
        for k, (name, box) in enumerate(zip(("anchor", *found.layers), found.boxes, strict=True)):
            tint, dash = to_hex(STEPS(k / len(found.layers))), "solid" if k else "dash"
            line = {"color": tint, "dash": dash, "width": 4 if k == found.layer + 1 else 2}
            panel.add("scatter", **outline(box), name=ends.get(k, name), mode="lines", line=line, showlegend=k in ends)
        dots = {"color": "#FFFFFF", "width": 1.5, "dash": "dot"}
        panel.add("scatter", **outline(found.wanted), name="annotated", mode="lines", line=dots, showlegend=False)
        x, y = _middles(found.boxes[1 + found.layer]).T
        size, rim = [13 if k == found.edge else 9 for k in range(4)], {"color": "#FFFFFF", "width": 1.5}
        mark = {"size": size, "color": NOW, "symbol": "square", "line": rim}
        panel.add("scatter", x=x, y=y, name="edges", mode="markers", marker=mark, showlegend=False)


def _middles(box: Floats) -> Floats:
    """The middles of the edges of a box (4,) xyxy, left, top, right, bottom. (4, 2)."""
    x, y, right, bottom = box
    mx, my = (x + right) / 2, (y + bottom) / 2
    return np.array([[x, my], [mx, y], [right, my], [mx, bottom]])


def _entropy(sheet: Sheet, found: Refined) -> None:
    """The entropy of every edge after every layer."""
    most, last = float(np.log2(found.offsets.shape[1])), len(found.layers) - 1
    low = 0.95 * float(found.bits.min())
    x = {"type": "category", "range": [-0.3, last + 0.3]}
    y = {"title": "bits", "range": [low, most + 0.08 * (most - low)]}
    panel = sheet.panel(f"entropy of the edges ({most:.2f}: uniform)", (0.41, 0.66), TOP, x, y)
    for k, (edge, tint, mark) in enumerate(zip(EDGES, TINTS, MARKS, strict=True)):
        here = k == found.edge
        look = {"line": {"color": tint, "width": 3 if here else 1.5}, "mode": "lines+markers", "showlegend": False}
        marker = {"symbol": mark, "size": [13 if here and i == found.layer else 7 for i in range(last + 1)]}
        panel.add("scatter", x=found.layers, y=found.bits[:, k], name=edge, marker=marker, **look)
        panel.say(edge, k / 3 * last, low, font={"color": tint}, yanchor="bottom")


def _weights(sheet: Sheet, found: Refined) -> None:
    """W(n) of the chosen edge in pixels, and the chosen bin on it."""
    offsets, n = found.offsets[found.edge], found.bin
    title = f"W(n) of the {EDGES[found.edge]} edge"
    panel = sheet.panel(title, (0.74, 1.0), TOP, {"title": "bin n"}, {"title": "px outwards"})
    line = {"color": FAINT, "width": 1.5}
    bins = np.arange(len(offsets))
    panel.add(
        "scatter", x=bins, y=offsets, name="W(n)", mode="lines+markers", line=line, marker={"size": 5}, showlegend=False
    )
    ring = {"size": 13, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
    panel.add("scatter", x=[n], y=[offsets[n]], name="bin", mode="markers", marker=ring, showlegend=False)
    inwards = n > len(offsets) / 2
    panel.say(
        f"bin {n}: {offsets[n]:+.2f} px",
        n,
        offsets[n],
        xanchor="right" if inwards else "left",
        xshift=-12 if inwards else 12,
    )


def _strip(sheet: Sheet, found: Refined, weighted: bool) -> None:
    """The four edges' distributions side by side, after the first layer, the chosen one and the last."""
    values, target = (found.parts, found.target * found.offsets) if weighted else (found.chance, found.target)
    title, up, words, y = WEIGHTED if weighted else UNWEIGHTED
    shown, bins = values[[0, found.layer, -1]], values.shape[-1]
    high, low = 1.4 * max(shown.max(), 1e-9), 1.2 * shown.min()  # what FGL wants may stand out
    panel = strip(sheet, title, (0, 1), up, bins, words, {"title": y, "range": [low, high]})
    grey, own = {"color": "#c4c8cc"}, {"showlegend": not weighted}
    wanted = joined(target)
    some = np.flatnonzero(np.nan_to_num(wanted))  # of so many bars a browser would take its time
    panel.add("bar", x=places(bins)[some], y=wanted[some], name="FGL's two bins", width=0.9, marker=grey, **own)
    for name, rows, tint, dash in zip(STRIPS, shown, (FIRST, NOW, LAST), ("dot", "solid", "dash"), strict=True):
        mode = "lines+markers" if name == "chosen layer" else "lines"
        look: dict[str, Any] = {"mode": mode, "line": {"color": tint, "dash": dash, "width": 2}, **own}
        panel.add("scatter", x=places(bins), y=joined(rows), name=name, **look)
    ring = {"size": 13, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
    at = {"x": [place(found.edge, found.bin, bins)], "y": [values[found.layer, found.edge, found.bin]]}
    panel.add("scatter", **at, name="bin", mode="markers", marker=ring, showlegend=False)
    for k, edge in enumerate(EDGES):
        said = f"<b>{edge}</b>" + (f": {found.moved[found.layer, k]:+.2f} px" if weighted else "")
        panel.say(said, place(k, 0, bins), high, xanchor="left", yanchor="top", font={"color": TINTS[k]})
