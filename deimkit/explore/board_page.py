"""The page of a board: what snapshots say, as pictures that are drawn anew only when they change, and as HTML.

The HTML stands alone: pictures are inside it, with what they show in words; no script runs and nothing is fetched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deimkit.explore.curves import draw_ap, draw_curves, draw_pace, draw_timeline, panel
from deimkit.explore.frame import STYLE, framed, packed, png
from deimkit.explore.plots import PAPER
from deimkit.explore.snapshot import Snapshot
from deimkit.explore.story import in_words
from deimkit.explore.tail import number
from deimkit.training.progress import clock
from deimkit.training.rehearsal import in_words as hours_in_words

WIDTH, HEIGHT = 6.4, 3.1  # inches of a picture
NEWEST = 6  # events that are told
LONGEST = 22  # letters of a name at the end of a line

MARKS = {
    "not started": "○", "starting": "◔", "training": "▶", "stopping": "◼", "stopped": "◼", "finished": "✔",
    "failed": "✖", "died": "✖", "gone": "✖",
}  # fmt: skip
EXPLAINED = {
    "died": "Its process is gone and left no word: killed, or the machine went down. Resume goes on from the last "
    "checkpoint.",
    "gone": "Its folder is no longer there; this is what it said last.",
}


class Sketch(NamedTuple):
    """A picture yet to be drawn: `key` differs if it would look different, `words` say what it shows."""

    title: str
    key: Hashable
    words: str
    draw: Callable[[], Axes | Figure]


@dataclass
class Page:
    """A page about one run, or about several beside one another: `show` brings it up to date.

    head, story: HTML of what stands above and below the pictures. pictures: their HTML by title. sheet: the HTML of the
    matching microscope, if it was asked for.
    """

    head: str = ""
    pictures: dict[str, str] = field(default_factory=dict)
    sheet: str = ""
    story: str = ""
    _drawn: dict[str, tuple[Hashable, bytes]] = field(default_factory=dict)

    def show(self, snapshots: Sequence[Snapshot], matching: Snapshot | None = None) -> None:
        """Say what these snapshots say; only pictures that would look different are drawn.

        matching: the run whose matching is shown too.
        """
        sketches = _of_one(snapshots[0]) if len(snapshots) == 1 else _of_many(snapshots)
        sheets = [_matching(matching)] if matching is not None else []
        drawn = {sketch.title: self._draw(sketch) for sketch in [*sketches, *sheets]}
        self.pictures = {s.title: framed(s.title, drawn[s.title][1], s.words) for s in sketches}
        self.sheet = "".join(framed(s.title, drawn[s.title][1], s.words, "dk-large") for s in sheets)
        self._drawn = drawn
        self.head = _card(snapshots[0]) if len(snapshots) == 1 else _table(snapshots)
        self.story = "".join(_story(s, NEWEST if len(snapshots) == 1 else NEWEST // 2) for s in snapshots)

    def _draw(self, sketch: Sketch) -> tuple[Hashable, bytes]:
        known = self._drawn.get(sketch.title)
        if known is not None and known[0] == sketch.key:
            return known
        return sketch.key, png(sketch.draw())

    def html(self, mark: str = "", note: str = "") -> str:
        """The whole page as one piece of HTML. mark: a class of its own. note: what to say at its end."""
        pictures = f'<div class="dk-pictures">{"".join(self.pictures.values())}</div>'
        told = f"<p><small>{escape(note)}</small></p>" if note else ""
        return f'{STYLE}<div class="dk-board {mark}">{self.head}{pictures}{self.sheet}{self.story}{told}</div>'

    def png(self) -> bytes:
        """All pictures in one, two in a row, but for the microscope's sheet."""
        images = [Image.open(io.BytesIO(self._drawn[title][1])) for title in self.pictures]
        width, height = (max(image.size[i] for image in images) for i in (0, 1))
        rows = -(-len(images) // 2)
        sheet = Image.new("RGB", (width * min(len(images), 2), height * rows), PAPER)
        for i, image in enumerate(images):
            sheet.paste(image, (width * (i % 2), height * (i // 2)))
        return packed(sheet)


# ------------------------------------------------------------------------------------------------ pictures


def _of_one(s: Snapshot) -> list[Sketch]:
    """The pictures of a single run."""
    newest = {kind: float(y[np.isfinite(y)][-1]) for kind, y in s.losses.items() if np.isfinite(y).any()}
    losses = ", ".join(f"{kind} {value:.3g}" for kind, value in newest.items())
    curves = {kind: (s.x, y) for kind, y in s.losses.items()}
    sketches = [
        Sketch(
            "Losses",
            s.version,
            f"Weighted losses by kind against epochs; now {losses}." if losses else "No step was trained yet.",
            lambda: draw_curves(curves, "loss, weighted", ax=panel(WIDTH, HEIGHT)),
        ),
        Sketch(
            "Accuracy",
            (*((row["epoch"], row.get("AP")) for row in s.epochs), s.claim),
            _ap_words(s),
            lambda: draw_ap(s.epochs, panel(WIDTH, HEIGHT, names=1.0), s.timeline, s.claim),
        ),
    ]
    if s.timeline is not None:
        clock_, here = s.timeline, s.done if 0 < s.done < s.timeline.total else None
        words = (
            f"Learning rate, stages, MixUp, multi-scale against epochs; the run is at {s.done:.1f} of {clock_.total}."
        )
        key = clock_, here and round(400 * here / clock_.total)
        sketches.append(Sketch("Timeline", key, words, lambda: draw_timeline(clock_, panel(WIDTH, HEIGHT), here)))
    if np.isfinite(s.wait_s).any():
        words = f"Seconds a step takes, and waits for images; {_share(s.waiting)} of the newest steps was waiting."
        draw = partial(draw_pace, s.x, s.step_s, s.wait_s)
        sketches.append(Sketch("Pace", s.version, words, lambda: draw(panel(WIDTH, HEIGHT, names=1.15))))
    return sketches


def _of_many(snapshots: Sequence[Snapshot]) -> list[Sketch]:
    """The pictures that lay several runs over one another."""
    names = {s.name: s.name if len(s.name) <= LONGEST else s.name[: LONGEST - 1] + "…" for s in snapshots}
    room = 0.25 + 0.088 * max(map(len, names.values()))
    losses = {names[s.name]: (s.x, s.total) for s in snapshots}
    aps = {names[s.name]: _aps(s) for s in snapshots}
    return [
        Sketch(
            "Loss",
            tuple(s.version for s in snapshots),
            f"Total loss against epochs; now {', '.join(f'{s.name} {s.loss:.3g}' for s in snapshots)}.",
            lambda: draw_curves(losses, "loss, total", ax=panel(WIDTH, HEIGHT, room)),
        ),
        Sketch(
            "Accuracy",
            tuple(tuple((row["epoch"], row.get("AP")) for row in s.epochs) for s in snapshots),
            " ".join(f"{s.name}: {_ap_words(s)}" for s in snapshots),
            lambda: draw_curves(aps, "AP, %", "after epoch", panel(WIDTH, HEIGHT, room)),
        ),
    ]


def _matching(s: Snapshot) -> Sketch:
    """The matching microscope's sheet of a run, drawn anew when there is a tenth more of it to see."""
    from deimkit.explore.microscope import draw_microscope

    words = (
        f"What the matcher of {s.name} saw over its epochs: positives per image, matched IoU, matches of low quality, "
        "targets that change their query from layer to layer and from epoch to epoch, score against IoU, and the "
        "entropy of the edges' distributions."
    )
    key = s.name, s.version[0], s.version[1] // 20
    return Sketch(f"Matching of {s.name}", key, words, lambda: draw_microscope(s.matching))


def _aps(s: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """When a run was evaluated, and its AP in percent."""
    return (
        np.array([row["epoch"] + 1 for row in s.epochs], float),
        100 * np.array([number(row.get("AP")) for row in s.epochs]),
    )


# ------------------------------------------------------------------------------------------------ numbers in words


def facts(s: Snapshot) -> dict[str, str]:
    """The numbers of a run, ready to be read; what is not known is a dash."""
    best, total = s.best, s.timeline.total if s.timeline else None
    at = f"{min(int(s.done) + 1, total or math.inf):.0f}" if s.done else "–"
    return {
        "epoch": (f"{at} of {total}" if total else at) + (f", {s.stage}" if s.stage else ""),
        "best AP": f"{100 * best['AP']:.1f} % (epoch {best['epoch'] + 1})" if best else "–",
        **({"paper's AP": f"{s.claim:.1f} %"} if s.claim is not None else {}),
        "loss": _plain(s.loss, "{:.3g}"),
        "learning rate": _plain(s.lr, "{:.2e}"),
        "images/s": _plain(s.images_per_s, "{:.1f}"),
        "waiting for images": _share(s.waiting),
        "memory": _plain(s.memory_mib / 1024, "{:.1f} GiB"),
        "time of an epoch": _duration(s.epoch_s),
        **({"time left": _duration(s.left_s)} if s.alive else {}),
    }


def _ap_words(s: Snapshot) -> str:
    if s.best is None:
        return "No epoch was evaluated yet."
    claim = f" The paper claims {s.claim:.1f} % on COCO." if s.claim is not None else ""
    newest = number(s.epochs[-1].get("AP"))
    return (
        f"AP after every epoch; best {100 * s.best['AP']:.1f} % after epoch {s.best['epoch'] + 1}, "
        f"newest {_plain(100 * newest, '{:.1f} %')}.{claim}"
    )


def _plain(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "–"


def _share(value: float) -> str:
    return _plain(100 * value, "{:.0f} %")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    return clock(seconds) + " min" * (seconds < 3600) if seconds < 5400 else hours_in_words(seconds / 3600)


# ------------------------------------------------------------------------------------------------ HTML


def _card(s: Snapshot) -> str:
    """The head of a single run: its state, and its numbers."""
    process = f"process {s.pid}" if s.pid else ""
    about = ", ".join(filter(None, [s.recipe, process]))
    numbers = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts(s).items()
    )
    return (
        f'<div class="dk-title"><strong>{escape(s.name)}</strong> {_state(s)} <span>{escape(about)}</span></div>'
        f'{_alerts(s)}<div class="dk-numbers">{numbers}</div>'
    )


def _table(snapshots: Sequence[Snapshot]) -> str:
    """The head of several runs: a row for each."""
    found: list[Mapping[str, str]] = [facts(s) for s in snapshots]
    columns = list(dict.fromkeys(name for row in found for name in row))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["run", "state", *columns])
    rows = "".join(
        f'<tr><th scope="row">{escape(s.name)}</th><td>{_state(s)}</td>'
        + "".join(f"<td>{escape(row.get(name, '–'))}</td>" for name in columns)
        + "</tr>"
        for s, row in zip(snapshots, found, strict=True)
    )
    alerts = "".join(map(_alerts, snapshots))
    return f'<div class="dk-wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{alerts}'


def _state(s: Snapshot) -> str:
    return f'<span class="dk-state dk-{s.state.replace(" ", "-")}">{MARKS[s.state]} {s.state}</span>'


def _alerts(s: Snapshot) -> str:
    """What someone should know about a run that does not go on, or cannot be read."""
    failed = in_words(s.events[-1]) if s.state == "failed" else ""
    return "".join(
        f'<p class="dk-alert" role="status">{escape(s.name)}: {escape(words)}</p>'
        for words in (failed, EXPLAINED.get(s.state, ""), s.trouble)
        if words
    )


def _story(s: Snapshot, count: int) -> str:
    """The newest events of a run, the newest first, and the last words of one that failed."""
    items = "".join(
        f"<li><time>{escape(str(event.get('time', ''))[5:16].replace('T', ' '))}</time> {escape(in_words(event))}</li>"
        for event in list(s.events)[: -count - 1 : -1]
    )
    told = (
        f'<div class="dk-title"><strong>{escape(s.name)}</strong>: newest events</div><ul>{items}</ul>' if items else ""
    )
    words = f"<details open><summary>Last words of its log</summary><pre>{escape(s.words)}</pre></details>"
    return told + (words if s.words else "")
