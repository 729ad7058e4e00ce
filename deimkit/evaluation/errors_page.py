"""The errors of a detector on one page: what they cost, class by class, what is mistaken for what, where it happens."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deimkit.evaluation.page import figure, finite, meter, percent, shaded, table, whole_page, write

if TYPE_CHECKING:
    from deimkit.evaluation.coco import Array
    from deimkit.evaluation.errors import Errors

CURVES, WIDEST, LONGEST = 12, 12, 20  # classes with a plot, classes in a square table, rows of a long one
NOTHING = "nothing"


def write_page(errors: Errors, path: Path, threshold: float | None = None) -> Path:
    """Write the page to `path` and return it; counts are of scores from `threshold` on, by default the best."""
    facts = errors.summary(threshold)
    sections = [
        ("Accuracy", _cards(facts)),
        ("What errors cost", _costs(facts)),
        ("Classes", _classes(facts) + _curves(errors, facts)),
        ("Confusion", _confusion(errors, facts)),
        ("Objects", _objects(facts)),
        ("Images", _images(errors, facts)),
        ("How it is counted", _method(facts)),
    ]
    return write(path, whole_page(f"Errors on {errors.split.name}", _headline(errors, facts), sections))


def _headline(errors: Errors, facts: dict[str, Any]) -> str:
    """The page in a sentence or two."""
    words = f"{len(errors.verdict):,} detections in {facts['images']:,} images with {facts['objects']:,} objects."
    costs = {kind: cost for kind, cost in facts["costs"].items() if kind in EXPLAINED and finite(cost)}
    worst = max(costs, key=costs.__getitem__, default=None)
    if worst and costs[worst] > 0:
        words += f" Dearest are errors of the kind “{worst}”: they cost {percent(costs[worst])} points of AP."
    return f"<p>{escape(words)}</p>"


def _cards(facts: dict[str, Any]) -> str:
    """The numbers that say how good it is, and how many of each kind there are."""
    verdicts = facts["verdicts"]
    wrong = sum(verdicts[kind] for kind in EXPLAINED if kind in verdicts)
    cards = {
        "AP": percent(facts["AP"]),
        f"AP at IoU {facts['iou']:g}": percent(facts["AP_at_iou"]),
        f"right, from score {facts['threshold']:.2f} on": f"{verdicts['right']:,}",
        "wrong": f"{wrong:,}",
        "objects not found": f"{facts['missed']:,}",
    }
    shown = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())
    note = (
        f"Counts on this page are of detections with a score of at least {facts['threshold']:.3f}, where F1 of all "
        "classes together is largest unless another threshold was asked for."
    )
    return f'<div class="cards">{shown}</div><p>{note}</p>'


def _costs(facts: dict[str, Any]) -> str:
    """The kinds of error, the dearest first, and the two sums."""
    costs, counts = facts["costs"], facts["verdicts"] | {"missed": facts["overlooked"]}
    dearest = max((cost for cost in costs.values() if finite(cost)), default=0.0) or 1.0
    kinds = sorted(EXPLAINED, key=lambda kind: -costs[kind] if finite(costs[kind]) else 0.0)
    rows: list[list[Any]] = [[kind, meter(costs[kind], dearest), counts[kind], EXPLAINED[kind]] for kind in kinds]
    rows += [[kind, meter(costs[kind], dearest), "–", what] for kind, what in SUMS.items()]
    caption = (
        f"Points of AP at IoU {facts['iou']:g} that each repair alone would gain, at all scores; they do not add up"
    )
    return table(caption, ["kind", "cost", "count", "what it is"], rows)


def _classes(facts: dict[str, Any]) -> str:
    """Every class, the strongest first, with the threshold that suits it best."""
    there = [row for row in facts["classes"] if row["count"]]
    absent = [row["name"] for row in facts["classes"] if not row["count"]]
    cells = [
        [
            row["name"],
            meter(row["AP"]),
            percent(row["AP50"]),
            row["count"],
            f"{row['threshold']:.3f}" if finite(row["threshold"]) else "–",
            *(percent(row[name]) for name in ("precision", "recall", "F1")),
        ]
        for row in sorted(there, key=lambda row: -row["AP"])
    ]
    head = ["class", "AP", "AP50", "objects", "best threshold", "precision", "recall", "F1"]
    note = f"<p>Without an object in these images: {escape(', '.join(absent))}.</p>" if absent else ""
    return table("In percent; precision, recall and F1 at the threshold where F1 is largest", head, cells) + note


def _curves(errors: Errors, facts: dict[str, Any]) -> str:
    """Precision against recall of the classes with the most objects, and where F1 is largest."""
    common = sorted(enumerate(facts["classes"]), key=lambda item: -item[1]["count"])[:CURVES]
    plots = []
    for label, row in common:
        recall, precision, _ = errors.precision_recall(label)
        if row["count"] and len(recall):
            words = f"{row['name']}: precision against recall at IoU {facts['iou']:g}"
            words += f", the dot where F1 is largest, at score {row['threshold']:.2f}" if row["F1"] else ""
            plots.append(figure(_plot(recall, precision, (row["recall"], row["precision"]), words), row["name"]))
    some = f"the {len(plots)} classes with most objects" if len(plots) < len(facts["classes"]) else "each class"
    note = f"Precision (up) against recall (right) of {some}, both from 0 to 1; the dot is where F1 is largest."
    return f'<p class="aside">{note}</p><div class="plots">{"".join(plots)}</div>' if plots else ""


def _plot(x: Array, y: Array, mark: tuple[float, float], words: str) -> str:
    """A line through the points x, y (n,), all in [0, 1], and a dot at `mark` if that is a number."""
    corners = np.round(200 * np.stack([x, 1 - y], 1)) / 2  # (n, 2), as fine as the eye can tell
    corners = corners[np.diff(corners, axis=0, prepend=-1).any(1)]
    line = " ".join(f"{a:g},{b:g}" for a, b in corners.tolist())
    dot = f'<circle cx="{100 * mark[0]:.1f}" cy="{100 - 100 * mark[1]:.1f}" r="2.4" fill="currentColor"/>'
    return (
        f'<svg viewBox="-2 -3 106 106" role="img" aria-label="{escape(words)}" fill="none" stroke-linejoin="round">'
        '<path d="M0 0V100H100" stroke="currentColor" stroke-width=".6"/>'
        '<path d="M0 50H100M50 0V100" stroke="currentColor" stroke-width=".3" opacity=".35"/>'
        f'<polyline points="{line}" stroke="var(--accent)" stroke-width="1.4"/>{dot if finite(mark[1]) else ""}</svg>'
    )


def _confusion(errors: Errors, facts: dict[str, Any]) -> str:
    """What is taken for what: as a square where it fits, else the most frequent mistakes."""
    names, counts = [row["name"] for row in facts["classes"]], np.array(facts["confusion"])
    if len(names) > WIDEST:
        return _frequent(names, counts)
    most = np.maximum(counts.sum(1), 1)
    rows = [
        [name, *(shaded(f"{count:,}" if count else "·", count / most[i]) for count in counts[i])]
        for i, name in enumerate([*names, NOTHING])
    ]
    caption = "A row for each annotated class, a column for each predicted one; shaded by the share of the row"
    return table(caption, ["annotated", *names, NOTHING], rows)


def _frequent(names: list[str], counts: Any) -> str:
    """The pairs of classes most often mistaken for one another."""
    pairs = [(int(counts[i, k]), i, k) for i, k in zip(*np.nonzero(counts[:-1, :-1]), strict=True) if i != k]
    rows = [[names[i], names[k], n, int(counts[i].sum())] for n, i, k in sorted(pairs, key=lambda p: (-p[0], p[1:]))]
    if not rows:
        return "<p>No object was taken for one of another class.</p>"
    return table("The most frequent mistakes", ["annotated as", "taken for", "times", "of"], rows[:LONGEST])


def _objects(facts: dict[str, Any]) -> str:
    """Which objects are found: by size, and by how they crowd."""
    sizes = [
        [row["bucket"], row["annotated"], row["found"], meter(row["recall"]), percent(row["AP"])]
        for row in facts["sizes"]
    ]
    crowds = [[row["bucket"], row["annotated"], row["found"], meter(row["recall"])] for row in facts["crowding"]]
    head = ["", "annotated", "found", "recall"]
    return table("By size: small is up to 32² pixels, large from 96² on", [*head, "AP"], sizes) + table(
        "By the largest IoU with another object of the image", head, crowds
    )


def _images(errors: Errors, facts: dict[str, Any]) -> str:
    """The images that are read worst."""
    numbers = errors.per_image(facts["threshold"])
    order = np.lexsort((-(numbers["wrong"] + numbers["missed"]), numbers["AP"]))
    worst = [int(i) for i in order[:LONGEST] if numbers["AP"][i] < 1]
    rows = [
        [
            Path(str(errors.split.paths[i])).name,
            meter(float(numbers["AP"][i])),
            *(int(numbers[kind][i]) for kind in ("right", "wrong", "missed")),
        ]
        for i in worst
    ]
    caption = f"The images of lowest AP at IoU {facts['iou']:g}, in percent"
    return table(caption, ["image", "AP", "right", "wrong", "missed"], rows) if rows else ""


def _method(facts: dict[str, Any]) -> str:
    """The rules behind the numbers."""
    return (
        f"<p>By descending score each detection takes the free object of its class with the largest IoU, if that is at "
        f"least {facts['iou']:g}, as in COCO's evaluation; of each image and class the best {facts['max_dets']} count. "
        f"An IoU below {facts['background']:g} is no overlap. Detections in crowd regions are left out. "
        "The kinds of error and their repairs are after Bolya et al., TIDE (2020).</p>"
    )


EXPLAINED = {
    "class": "covers an object of another class",
    "location": "overlaps an object of its class, but not enough",
    "both": "overlaps an object of another class, but not enough",
    "duplicate": "covers an object that a better detection has found",
    "background": "there is nothing where it is",
    "missed": "an object that nobody found, nor would with the right class or place",
}
SUMS = {
    "false positives": "all wrong detections, taken out",
    "false negatives": "all objects that nobody found, no longer asked for",
}
