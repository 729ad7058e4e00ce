"""A training step as a picture of boxes and arrows, with the shapes that it really had."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from deimkit.explore.curves import FAINT, INK
from deimkit.explore.labs.anatomy_step import Shape, Step
from deimkit.explore.plots import PAPER, Picture

WIDE, LINE = 1.62, 0.155  # inches: the width of a box, and the height of a line in it
STRIDE = 1.93  # inches from one box to the next
TINTS = {"forward": "#d6eaf8", "training": "#fdebc8", "loss": "#f9d9c9", "backward": "#cdeee3"}
LEFT = 0.4  # inches left of the boxes, for the way back
# Where every box stands: column and row (rows count downwards; one box is beside two of them), and what kind it is.
SPOTS: dict[str, tuple[int, float, str]] = {
    "image": (0, 0, "forward"),
    "backbone": (1, 0, "forward"),
    "encoder": (2, 0, "forward"),
    "memory": (3, 0, "forward"),
    "queries": (4, 0, "forward"),
    "decoder": (5, 0, "forward"),
    "outputs": (6, 0.5, "forward"),
    "targets": (0, 1, "training"),
    "extra queries": (4, 1, "training"),
    "matches": (6, 2, "loss"),
    "pairs": (5, 2, "loss"),
    "losses": (4, 2, "loss"),
    "total": (3, 2, "loss"),
    "gradients": (2, 2, "backward"),
    "step": (1, 2, "backward"),
    "weights": (0, 2, "backward"),
}
ARROWS = ["image>backbone", "backbone>encoder", "encoder>memory", "memory>queries", "queries>decoder"]
ARROWS += ["decoder>outputs", "targets>extra queries", "extra queries>decoder", "outputs>matches", "matches>pairs"]
ARROWS += ["pairs>losses", "losses>total", "total>gradients", "gradients>step", "step>weights"]
NOTE: dict[str, Any] = {"fontsize": 7.5, "color": FAINT, "va": "center"}


@dataclass(frozen=True)
class Box:
    """A box of the picture: its title, its lines, and the inches that it covers."""

    title: str
    lines: tuple[str, ...]
    x: float
    y: float

    @property
    def height(self) -> float:
        return LINE * (len(self.lines) + 1.6)

    def edge(self, dx: float, dy: float) -> tuple[float, float]:
        """The middle of the side that lies in a direction."""
        return self.x + dx * WIDE / 2, self.y + dy * self.height / 2


def flow(step: Step) -> dict[str, tuple[str, ...]]:
    """What stands in every box: shapes and numbers, as the step had them."""
    shared = [f"{step.pairs[1]} rows shared (GO-LSD)"] if step.pairs[1] else []
    extra = [f"{name} {shape}\neach target × {repeat}" for name, (shape, repeat) in step.groups.items()]
    lines = {
        "image": [str(step.images)],
        "backbone": map(str, step.backbone),
        "encoder": map(str, step.encoder),
        "memory": ["tokens of all levels", str(step.memory)],
        "queries": ["best cells", str(step.queries)],
        "decoder": [f"{layers}\n{shape}" for layers, shape in _runs("layer", step.layers)],
        "outputs": _alike(step.outputs),
        "targets": [f"{step.targets} boxes, labels", f"({step.targets}, 4), ({step.targets},)"],
        "extra queries": extra or ["none"],
        "matches": [f"{pairs} pairs each\n{_few(names)}" for pairs, names in _by_value(step.matches).items()],
        "pairs": [f"{step.pairs[0]} rows", "box, target, IoU", *shared],
        "losses": [f"{len(step.terms)} terms", *(f"{kind} {value:.3f}" for kind, value in _kinds(step.terms).items())],
        "total": [f"loss {step.total:.3f}", "the sum of all terms"],
        "gradients": [f"of {step.tensors[0]} tensors", f"out of {step.tensors[1]}", f"norm {step.norm:.3f}, clipped"],
        "step": [step.optimizer, f"lr {step.lr:g}", f"moved by {step.moved:.3f}"],
        "weights": ["of the detector", "and their average"],
    }
    return {name: tuple(part for line in texts for part in line.split("\n")) for name, texts in lines.items()}


def draw_step(step: Step) -> Picture:
    """Draw the whole step: above the image becomes outputs, below they become a loss, gradients and new weights."""
    boxes = _placed({name: Box(name, lines, 0, 0) for name, lines in flow(step).items()})
    width, height = LEFT + 6 * STRIDE + WIDE + 0.1, max(box.y + box.height / 2 for box in boxes.values()) + 0.1
    picture = Picture(figsize=(width, height), dpi=100, facecolor=PAPER)
    ax = picture.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    for name, box in boxes.items():
        _box(ax, box, TINTS[SPOTS[name][2]])
    for arrow in ARROWS:
        start, _, end = arrow.partition(">")
        _arrow(ax, boxes[start], boxes[end], "-" if step.passes or start != "queries" else ":")
    if not step.passes:
        x, y = boxes["queries"].edge(0, 1)
        ax.text(x, y + LINE, "dotted: no gradient comes back", ha="center", **NOTE)
    _detours(ax, boxes)
    return picture


def _placed(boxes: dict[str, Box]) -> dict[str, Box]:
    """The boxes in their columns, and in rows as high as the highest in them."""
    high = [max(box.height for name, box in boxes.items() if SPOTS[name][1] == row) for row in range(3)]
    upper = max(high[0] + 0.3 + high[1], boxes["outputs"].height)  # two rows, or the one box beside them
    rows = {0: 0.1 + high[0] / 2, 0.5: 0.1 + upper / 2, 1: 0.1 + upper - high[1] / 2, 2: 0.6 + upper + high[2] / 2}
    return {
        name: replace(box, x=LEFT + SPOTS[name][0] * STRIDE + WIDE / 2, y=rows[SPOTS[name][1]])
        for name, box in boxes.items()
    }


def _box(ax: Axes, box: Box, tint: str) -> None:
    left, top = box.x - WIDE / 2, box.y - box.height / 2
    style = "round,pad=0,rounding_size=0.07"
    ax.add_patch(FancyBboxPatch((left, top), WIDE, box.height, boxstyle=style, fc=tint, ec=INK, lw=0.8))
    ax.text(box.x, top + 0.8 * LINE, box.title, ha="center", va="center", fontsize=8.5, fontweight="bold", color=INK)
    for i, line in enumerate(box.lines):
        ax.text(box.x, top + (i + 1.9) * LINE, line, ha="center", va="center", fontsize=7.2, color=INK)


def _arrow(ax: Axes, start: Box, end: Box, dash: str) -> None:
    """From the side of one box to that of another: across, down, or, where it stands higher, up to its lower side."""
    dx, dy = (0, 1) if start.x == end.x else (1 if end.x > start.x else -1, 0)
    beside = abs(start.y - end.y) < end.height / 2
    goal = end.edge(-dx, -dy) if dy else (end.edge(-dx, 0)[0], start.y) if beside else end.edge(0, 1)
    _line(ax, start.edge(dx, dy), goal, ls=dash)


def _line(ax: Axes, start: tuple[float, float], end: tuple[float, float], **look: object) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0} | look
    ax.annotate("", end, start, arrowprops=style)


def _detours(ax: Axes, boxes: dict[str, Box]) -> None:
    """The two ways around: targets to the matches, and the new weights back to where the next image begins."""
    image, targets, matches, weights = (boxes[name] for name in ("image", "targets", "matches", "weights"))
    x, goal, y = targets.x, matches.x - WIDE / 4, max(boxes[k].edge(0, 1)[1] for k in ("outputs", "targets")) + 0.2
    ax.plot([x, x, goal], [targets.edge(0, 1)[1], y, y], color=INK, lw=1.2)
    _line(ax, (goal, y), (goal, matches.edge(0, -1)[1]))
    left, start, end = LEFT / 3, weights.edge(-1, 0), image.edge(-1, 0)
    ax.plot([start[0], left, left], [start[1], start[1], end[1]], color=FAINT, lw=1.2, ls="--")
    _line(ax, (left, end[1]), end, color=FAINT)
    ax.text(left + 0.06, targets.y, "next batch", rotation=90, **NOTE)


def _alike(outputs: dict[str, dict[str, Shape]]) -> list[str]:
    """Outputs of the same shapes together, and these shapes."""
    groups: dict[str, list[str]] = {}
    for name, fields in outputs.items():
        groups.setdefault("\n".join(f"{field} {shape}" for field, shape in fields.items()), []).append(name)
    return [f"{_few(names)}\n{fields}" for fields, names in groups.items()]


def _by_value(counts: dict[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, count in counts.items():
        found.setdefault(count, []).append(name)
    return found


def _few(names: list[str]) -> str:
    """Some names, what they all begin with said once, and those in the middle left out where there are many."""
    group = names[0].rpartition(".")[0]
    if group and all(name.startswith(group) for name in names):
        return f"{group}: " + _few([name.removeprefix(f"{group}.") for name in names])
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]} ({len(names)})"


def _runs(word: str, shapes: list[Shape]) -> list[tuple[str, Shape]]:
    """Neighbours of the same shape as one: [s, s, t] -> [("layers 0-1", s), ("layer 2", t)]."""
    found: list[tuple[int, int, Shape]] = []
    for i, shape in enumerate(shapes):
        if found and found[-1][2] == shape:
            found[-1] = (found[-1][0], i, shape)
        else:
            found.append((i, i, shape))
    return [(f"{word} {a}" if a == b else f"{word}s {a}-{b}", shape) for a, b, shape in found]


def _kinds(terms: dict[str, float]) -> dict[str, float]:
    """The terms of a kind added up: "mal/final" and "mal/layer0" are "mal"."""
    found: dict[str, float] = {}
    for name, value in terms.items():
        kind = name.partition("/")[0]
        found[kind] = found.get(kind, 0.0) + value
    return found
