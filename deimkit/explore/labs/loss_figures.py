"""The class losses as the DEIM paper draws them (Fig. 2e, 2f, 4a, 4b), and as a reader's batch and runs meet them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deimkit.explore.curves import INK
from deimkit.explore.labs.loss_curves import PUBLISHED, P, Q, costs_of, entry, quality_of
from deimkit.explore.labs.loss_panels import LOOKS, TOP
from deimkit.explore.style import FAINT, LOOK
from deimkit.losses import ClassLoss, Pairs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAIR: dict[str, ClassLoss] = {name: PUBLISHED[name] for name in ("VFL", "MAL")}
# A low IoU stands in front, a high score on the right.
SCENE: dict[str, Any] = {"camera": {"eye": {"x": 1.35, "y": -1.75, "z": 0.9}}, "zaxis": {"title": {"text": "loss"}}}
SCENE |= {"xaxis": {"title": {"text": "score p"}}, "yaxis": {"title": {"text": "IoU q"}}}
LOW, HIGH = 0.05, 0.95  # the IoUs of DEIM Fig. 4a and 4b
SIDES = ((0.0, 0.47), (0.53, 1.0))
PATTERNS = ("", "/", "x", ".")  # of bars, for those who cannot tell their colours


def cost_at(loss: ClassLoss, p: float | Tensor, iou: float) -> Tensor:
    """What matches of one IoU cost at scores `p`; of p's shape, float64."""
    z = torch.as_tensor(p, dtype=torch.float64).logit()
    quality = quality_of(loss, torch.tensor([iou], dtype=torch.float64))[0]
    return entry(loss, z, quality.expand_as(z))[0]


def draw_paper(score: float = 0.5, iou: float = LOW) -> Figure:
    """VFL and MAL of matched entries, as surfaces over score and IoU with one match marked, and at two IoUs.

    After DEIM Fig. 2e and 2f, above, and 4a and 4b. The star of the paper's surfaces is at a match of low quality
    (Fig. 2d) for which it gives no numbers; the mark here is where the caller says.
    """
    from plotly.graph_objects import Figure

    layout: dict[str, Any] = {"template": LOOK, "width": 1000, "height": 820, "annotations": []}
    layout |= {"margin": {"l": 55, "r": 20, "t": 30, "b": 50}, "legend": {"x": 0.03, "y": 0.33, "yanchor": "top"}}
    traces: list[dict[str, Any]] = []
    for i, name in enumerate(PAIR):
        height = float(cost_at(PAIR[name], score, iou))
        traces += _surface(name, f"scene{i + 1}" if i else "scene", score, iou, height)
        layout[f"scene{i + 1}" if i else "scene"] = SCENE | {"domain": {"x": SIDES[i], "y": (0.45, 0.98)}}
        title = f"<b>{name}</b> of a match (Fig. 2{'ef'[i]}); at the mark {height:.3f}"
        layout["annotations"].append(_title(title, SIDES[i][0], 0.98))
    for i, (quality, words) in enumerate(((LOW, "low quality"), (HIGH, "high quality"))):
        n = f"{i + 1}" if i else ""
        for name, loss in PAIR.items():
            colour, dash = LOOKS[name]
            line = {"line": {"color": colour, "dash": dash, "width": 2.5}, "mode": "lines", "showlegend": not i}
            costs = {"x": P.numpy(), "y": cost_at(loss, P, quality).numpy(), "xaxis": f"x{n}", "yaxis": f"y{n}"}
            traces.append({"type": "scatter", "name": name, **costs, **line})
        layout[f"xaxis{n}"] = {"title": {"text": "score p"}, "range": (0, 1), "domain": SIDES[i], "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = {"title": {"text": "loss"}, "range": (0, TOP), "domain": (0, 0.34), "anchor": f"x{n}"}
        layout["annotations"].append(_title(f"<b>{words}</b>, IoU {quality} (Fig. 4{'ab'[i]})", SIDES[i][0], 0.34))
    return Figure(data=traces, layout=layout)


def _surface(name: str, scene: str, score: float, iou: float, height: float) -> list[dict[str, Any]]:
    """The costs of matches by a loss, and the mark at one of them."""
    z = np.stack([cost_at(PAIR[name], P, float(q)).numpy() for q in Q])
    numbers = {"x": P.numpy(), "y": Q.numpy(), "z": z, "cmin": 0.0, "cmax": 4.0, "showscale": False}
    marker = {"symbol": "diamond", "size": 8, "color": "#D55E00", "line": {"color": INK, "width": 1}}
    mark = {"x": [score], "y": [iou], "z": [height + 0.1], "mode": "markers", "marker": marker, "showlegend": False}
    return [
        {"type": "surface", "name": name, "scene": scene, **numbers},
        {"type": "scatter3d", "name": "mark", "scene": scene, **mark},
    ]


def shares(losses: Mapping[str, ClassLoss], pairs: Pairs, edges: Sequence[float]) -> dict[str, Tensor]:
    """How the matched pairs' loss is shared out among bins of IoU, for each loss, and for "pairs" how they are.

    edges: of the bins, rising; a pair at an edge belongs to the bin above it, IoU 1 to the last. Shares add up to 1,
    and are 0 where there are no pairs.
    """
    bins = torch.bucketize(pairs.iou.detach().double(), torch.tensor(edges[1:-1], dtype=torch.float64), right=True)
    costs = {"pairs": torch.ones(len(bins)).double()} | {name: costs_of(loss, pairs) for name, loss in losses.items()}
    return {
        name: torch.zeros(len(edges) - 1).double().index_add_(0, bins, each) / each.sum().clamp(min=1e-12)
        for name, each in costs.items()
    }


def draw_shares(losses: Mapping[str, ClassLoss], pairs: Pairs, bins: int = 5) -> Figure:
    """Who pays: of every bin of IoU, its share of the pairs, and of what each loss takes from all pairs together.

    losses: by names of `PUBLISHED`, which have their colours.
    """
    from plotly.graph_objects import Figure

    edges = np.linspace(0, 1, bins + 1).tolist()
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    bars: list[dict[str, Any]] = []
    highest = 1.0
    for name, found in shares(losses, pairs, edges).items():
        words, colour = (name, LOOKS[name][0]) if name in LOOKS else ("number of pairs", FAINT)
        percent = (100 * found).numpy()
        look = {"color": colour, "pattern": {"shape": PATTERNS[len(bars) % len(PATTERNS)]}}
        bars.append({"type": "bar", "x": names, "y": percent, "name": words, "marker": look})
        highest = max(highest, float(percent.max()))
    layout: dict[str, Any] = {"template": LOOK, "width": 900, "height": 340, "barmode": "group", "bargap": 0.25}
    layout["legend"] = {"orientation": "h", "x": 0.02, "y": 0.99, "yanchor": "top"}
    layout["xaxis"] = {"title": {"text": "IoU of the pair"}}
    layout["yaxis"] = {"title": {"text": "share of all, %"}, "range": (0, 1.2 * highest)}
    return Figure(data=bars, layout=layout)


def draw_seeds(found: Mapping[str, Sequence[Sequence[float]]], title: str, unit: str) -> Figure:
    """One number per epoch, a list for each seed, by the name of the loss: every run thin, the means broad."""
    from plotly.graph_objects import Figure

    traces: list[dict[str, Any]] = []
    for name, runs in found.items():
        (colour, dash), table = LOOKS[name], np.asarray(runs, float)  # (seeds, epochs)
        epochs = np.arange(1, table.shape[1] + 1)
        for seed, row in enumerate(table):
            line = {"color": colour, "width": 1, "dash": dash}
            traces.append({"x": epochs, "y": row, "line": line, "name": f"{name}, seed {seed}", "showlegend": False})
        broad = {"color": colour, "width": 4, "dash": dash}
        traces.append({"x": epochs, "y": table.mean(0), "line": broad, "name": f"{name}, mean"})
    layout = {"template": LOOK, "width": 620, "height": 360, "legend": {"x": 0.02, "y": 0.98}}
    axes = {
        "xaxis": {"title": {"text": "epoch"}, "dtick": 1},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
    }
    traces = [{"type": "scatter", "mode": "lines+markers", **trace} for trace in traces]
    return Figure(data=traces, layout=layout | axes | {"title": {"text": title}, "margin": {"t": 45}})


def _title(text: str, x: float, y: float) -> dict[str, Any]:
    at = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": text, "showarrow": False, **at}
