"""A run on one page: numbers, curves, the clock, the best and the worst images, and how it was made.

The page is one file that needs nothing else (`deimkit.evaluation.page`), and every picture says in words what it shows.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deimkit.boxes import iou_giou, xyxy_to_cxcywh
from deimkit.errors import DataError
from deimkit.evaluation.page import figure, finite, inline_svg, meter, percent, table, whole_page, write
from deimkit.structures import Detections
from deimkit.training.machine import pick_device
from deimkit.training.run import Plan, Run, read_rows
from deimkit.training.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deimkit.data.dataset import Dataset
    from deimkit.data.split import Split
    from deimkit.models.detector import Detector

# COCO's twelve numbers and what each of them is.
NUMBERS = {
    "AP": "average precision, mean over IoU .50 to .95",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "small objects, below 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, above 96² pixels",
    "AR1": "average recall with 1 detection per image",
    "AR10": "with 10 detections",
    "AR100": "with 100 detections",
    "ARs": "small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
}
STATES = {"finished": "finished", "early_stop": "finished early", "stopped": "stopped", "failed": "failed"}


def report_run(run: Run, dataset: Dataset, images: int = 200) -> Path:
    """Write the report of a run, with the best and worst of at most `images` validation images; returns its path."""
    from deimkit.api import load_detector
    from deimkit.recipes import parse

    recipe = run.folder / "recipe.py"
    timeline = parse(recipe.read_text(encoding="utf-8")).timeline if recipe.is_file() else None
    shown: Sequence[tuple[str, bytes | Figure]] = []
    if dataset.val and run.best.is_file():
        detector = load_detector(run).to(pick_device(Plan.read(run.folder).device))
        shown = best_and_worst(detector, dataset.val, images=images)
    return write_report(run.folder, shown, timeline)


def write_report(
    folder: Path | str,
    examples: Sequence[tuple[str, bytes | Figure]] = (),
    timeline: Timeline | None = None,
) -> Path:
    """Write `folder`/report.html from what the run has written so far, and return its path.

    Whatever is missing (no epoch evaluated, no events, no recipe) is left out. examples: (title, picture) of images
    with boxes, a picture being the bytes of a PNG, JPEG or WebP file or a matplotlib figure. timeline: the clock of the
    run.
    """
    folder = Path(folder)
    rows, events = read_rows(folder / "metrics.jsonl"), read_rows(folder / "events.jsonl")
    steps = [row for row in rows if row.get("kind") == "step"]
    epochs = [row for row in rows if row.get("kind") == "epoch" and "AP" in row]
    sections = [
        ("Accuracy", _numbers(epochs)),
        ("Learning", _curves(steps, epochs, timeline)),
        ("Timeline", _timeline(timeline, steps, epochs)),
        ("Classes", _classes(epochs)),
        ("Images", _examples(examples)),
        ("What happened", _events(events)),
        ("Environment", _environment(events, steps)),
        ("Recipe", _recipe(folder / "recipe.py")),
    ]
    return write(folder / "report.html", whole_page(folder.resolve().name, _headline(events, epochs, steps), sections))


# -------------------------------------------------------------------------------------------------- the images


def best_and_worst(
    detector: Detector, split: Split, count: int = 3, images: int = 200, batch: int = 8
) -> list[tuple[str, Figure]]:
    """The `count` images of a split that a detector reads best and as many that it reads worst, as (title, picture).

    At most `images` images with objects, evenly spread over the split, are looked at; see `quality`. One that cannot be
    read is passed over: the run went on without it, and the doctor names it.
    """
    from deimkit.explore.plots import Comparison, annotated, contact_sheet
    from deimkit.models.predict import predict

    filled = [i for i in range(len(split)) if not split.crowd[split.rows(i)].all()]
    chosen = [filled[k] for k in np.unique(np.linspace(0, len(filled) - 1, images).astype(int))] if filled else []
    scored: list[tuple[float, int, Detections]] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        pictures = readable(split, some)
        answers: Any = predict(detector, list(pictures.values()), threshold=0.0, batch=batch) if pictures else []
        for i, found in zip(pictures, answers, strict=True):
            found = replace(found, image=split.paths[i])  # the file, so that not all pixels stay in memory
            objects = ~split.crowd[split.rows(i)]
            boxes, labels = (torch.from_numpy(x[split.rows(i)][objects]) for x in (split.boxes, split.labels))
            scored.append((quality(found, boxes, labels), i, _first(found, len(labels))))
    scored.sort(key=lambda item: (-item[0], item[1]))
    count = min(count, len(scored) // 2)
    shown = [("best", *item) for item in scored[:count]] + [("worst", *item) for item in scored[len(scored) - count :]]
    titles = [f"{word}: {Path(str(split.paths[i])).name}, {100 * q:.0f} % covered" for word, q, i, _ in shown]
    sheets = [contact_sheet([Comparison(found, annotated(split, i))], columns=1) for _, _, i, found in shown]
    return list(zip(titles, sheets, strict=True))


def readable(split: Split, indices: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
    """The pixels of those images that can be read, by index."""
    pictures = {}
    for i in indices:
        with suppress(DataError):
            pictures[i] = split.image(i)
    return pictures


def quality(found: Detections, boxes: Tensor, labels: Tensor) -> float:
    """How well the n most confident detections cover the n objects of an image, in [0, 1].

    boxes: (n, 4) xyxy in pixels. labels: (n,). The mean over the objects of the IoU with their detection of the same
    class, given out one to one from the most confident detection on; an IoU below 0.5 counts as 0. No threshold on the
    score is involved. An image without objects has 1.
    """
    n = len(labels)
    if not n or not len(found):
        return float(n == 0)
    tops = _first(found, n)
    iou, _ = iou_giou(xyxy_to_cxcywh(tops.boxes.cpu().float())[:, None], xyxy_to_cxcywh(boxes.float())[None])
    iou = torch.where((tops.labels.cpu()[:, None] == labels[None]) & (iou >= 0.5), iou, 0.0)  # (min(Q, n), n)
    covered = 0.0
    for row in iou:
        best = int(row.argmax())
        covered += float(row[best])
        iou[:, best] = 0
    return covered / n


def _first(found: Detections, n: int) -> Detections:
    """The n most confident detections."""
    return replace(
        found,
        boxes=found.boxes[:n],
        scores=found.scores[:n],
        labels=found.labels[:n],
        names=found.names[:n],
        ids=found.ids[:n],
    )


# ------------------------------------------------------------------------------------------------ the sections


def _headline(events: list[dict[str, Any]], epochs: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """The state of the run and its story in a sentence."""
    names = [event.get("event") for event in events]
    state = next((STATES[name] for name in reversed(names) if name in STATES), "under way" if steps else "not started")
    last = max((row["epoch"] + 1 for row in [*steps, *epochs]), default=0)
    words = [f"{last} epoch{'s' * (last != 1)}, {len(steps)} steps."]
    if epochs:
        best = _best(epochs)
        words.append(f"Best AP {percent(best['AP'])} % after epoch {best['epoch'] + 1}.")
    else:
        words.append("No epoch was evaluated.")
    why = next((event.get("why") for event in reversed(events) if event.get("event") == "failed"), None)
    if state == "failed" and why:
        words.append(str(why))
    return f'<p><span class="state {state.split()[0]}">{state}</span> {escape(" ".join(words))}</p>'


def _numbers(epochs: list[dict[str, Any]]) -> str:
    """COCO's twelve numbers of the best epoch, beside those of the last one."""
    if not epochs:
        return ""
    best, last = _best(epochs), epochs[-1]
    cards = "".join(
        f'<div class="card"><b>{percent(best.get(name))}</b><span>{name}</span></div>'
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    )
    columns = {f"best (epoch {best['epoch'] + 1})": best} | {f"last (epoch {last['epoch'] + 1})": last}
    if last is best:
        columns = {f"best and last (epoch {best['epoch'] + 1})": best}
    rows = [[name, *(percent(row.get(name)) for row in columns.values()), what] for name, what in NUMBERS.items()]
    twelve = table("COCO's twelve numbers, in percent", ["", *columns, "what it is"], rows)
    return f'<div class="cards">{cards}</div><details><summary>All twelve numbers</summary>{twelve}</details>'


def _curves(steps: list[dict[str, Any]], epochs: list[dict[str, Any]], timeline: Timeline | None) -> str:
    """The losses of every step and the AP of every epoch."""
    from deimkit.explore.curves import draw_ap, draw_losses

    pictures = []
    if any(row.get("terms") for row in steps):
        totals = [row["loss"] for row in steps if finite(row.get("loss"))]
        tenth = max(len(totals) // 10, 1)
        start, end = (sum(part) / len(part) if part else math.nan for part in (totals[:tenth], totals[-tenth:]))
        words = f"Losses by kind. Their sum was {start:.3g} in the first tenth of the steps and {end:.3g} in the last."
        pictures.append(figure(inline_svg(draw_losses(steps), words), words))
    if epochs:
        best = _best(epochs)
        words = (
            f"AP on the validation images after every epoch, of the averaged (EMA) weights; the ring marks the best, "
            f"{percent(best['AP'])} % after epoch {best['epoch'] + 1}."
        )
        pictures.append(figure(inline_svg(draw_ap(epochs, timeline=timeline), words), words))
    return "".join(pictures)


def _timeline(timeline: Timeline | None, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> str:
    """The clock of the run, and where it stands if it has not come to the end."""
    from deimkit.explore.curves import draw_timeline, when

    if timeline is None:
        return ""
    done = max([*when(steps).tolist(), *(row["epoch"] + 1 for row in epochs)], default=0.0)
    here = done if 0 < done < timeline.total - 0.5 else None
    parts = [event for event in timeline.events() if event.track == "stage"]
    stages = ", ".join(f"{part.name} from {part.start} to {part.end} ({part.what})" for part in parts)
    words = f"The clock of the run, in epochs. Stages: {stages}."
    return figure(inline_svg(draw_timeline(timeline, epoch=here), words), words)


def _classes(epochs: list[dict[str, Any]]) -> str:
    """AP per class at the best epoch, the strongest class first."""
    classes: dict[str, dict[str, Any]] = _best(epochs).get("per_class") or {} if epochs else {}
    if not classes:
        return ""
    ranked = sorted(classes.items(), key=lambda item: -item[1]["AP"] if finite(item[1].get("AP")) else 1)
    rows = [[name, meter(c.get("AP")), percent(c.get("AP50")), c.get("count", "–")] for name, c in ranked]
    return table("Classes at the best epoch, in percent", ["class", "AP", "AP50", "objects"], rows)


def _examples(examples: Sequence[tuple[str, bytes | Figure]]) -> str:
    """The pictures handed in, each with its title."""
    pictures = []
    for title, picture in examples:
        data = picture if isinstance(picture, bytes) else _webp(picture)
        alt = f"{title}: annotated boxes and detected boxes"
        address = f"data:{_kind(data)};base64,{base64.b64encode(data).decode()}"
        pictures.append(figure(f'<img src="{address}" alt="{escape(alt)}" loading="lazy">', title))
    if not pictures:
        return ""
    note = "Left what is annotated, right the detections: as many of the most confident ones as there are objects."
    return f"<p>{note}</p>" + "".join(pictures)


def _events(events: list[dict[str, Any]]) -> str:
    """What happened, in order."""
    rows = []
    for event in events:
        facts = {name: value for name, value in event.items() if name not in ("event", "time") and value != []}
        words = "; ".join(f"{name}: {_plain(value)}" for name, value in facts.items())
        rows.append([_words(event.get("time", "")), _words(event.get("event", "")), words])
    return table("Events, with epochs counted from 0", ["time", "event", "facts"], rows) if rows else ""


def _environment(events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """The machine, the versions, and how fast the run was on them."""
    start: dict[str, Any] = next((e for e in reversed(events) if e.get("event") in ("started", "resumed")), {})
    facts: dict[str, Any] = {
        name: start[name] for name in ("machine", "device", "precision", "images") if name in start
    }
    facts |= start.get("versions", {})
    speed = [row["images_per_s"] for row in steps if finite(row.get("images_per_s"))]
    memory = [row["memory_mib"] for row in steps if finite(row.get("memory_mib"))]
    facts |= {"images per second, median": f"{sorted(speed)[len(speed) // 2]:.1f}"} if speed else {}
    facts |= {"peak memory": f"{max(memory):.0f} MiB"} if memory else {}
    return table("Where it ran", ["", ""], [[name, _plain(value)] for name, value in facts.items()]) if facts else ""


def _recipe(path: Path) -> str:
    """The recipe as Python that rebuilds it."""
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>recipe.py</summary><pre><code>{text}</code></pre></details>"


# -------------------------------------------------------------------------------------------------- the pieces


def _best(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    return max(epochs, key=lambda row: row["AP"] if finite(row["AP"]) else -1.0)


def _words(value: Any) -> str:
    return re.sub(r"(?<=\d)T(?=\d)|_", " ", str(value))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 6} more" if len(value) > 6 else ""
        return ", ".join(map(_plain, value[:6])) + more
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _webp(picture: Figure) -> bytes:
    file = io.BytesIO()
    picture.savefig(file, format="webp", bbox_inches="tight", pad_inches=0.05, pil_kwargs={"quality": 85})
    return file.getvalue()


def _kind(data: bytes) -> str:
    """The media type of a picture, told by its first bytes."""
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    return "image/webp" if data.startswith(b"RIFF") else "image/png"
