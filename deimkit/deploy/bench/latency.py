"""A latency and all that belongs to it: every call, the machine, how it was measured, and what the papers claim."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from deimkit.deploy.bench.paper import BesidePaper, beside_paper
from deimkit.deploy.bench.timing import Method, Ratio, Timing
from deimkit.deploy.card import Card
from deimkit.deploy.clocks import Sample, verdict
from deimkit.deploy.machine import Machine
from deimkit.errors import DeployError
from deimkit.evaluation.page import table, write

HEAD = (
    *("", "batch", "calls", "median ms", "min", "p90", "p99"),
    *("GPU ms", "with copies", "images/s", "times faster (95 %)"),
)
BUSY = 0.1  # the share of the processors from which on other work is mentioned


def place_for(path: str | Path) -> Path:
    """The path of a file to come, if it can be written: asked before minutes are spent on what goes there.

    Makes its folder. Raises `DeployError` if the path is a folder, or its folder takes no files.
    """
    place = Path(path)
    if place.is_dir():
        raise DeployError(
            f"Expected a file to write to; {str(path)!r} is a folder. Name one in it, such as bench.json."
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place.parent):
            return place
    except OSError as error:
        raise DeployError(f"Expected a file that can be written; got {str(path)!r}: {error}. Name another.") from error


@dataclass(frozen=True)
class Result:
    """One session at one batch size. name: runtime, version, device. source: of which detector it is, in a word.

    hardware: what the device calls itself.

    wall: from the call until the device is done, images on the device already. gpu: the same calls by CUDA events, or
    None without CUDA. copies: images copied from the host's pinned memory and results back; None where host and device
    are one. first_s: of the very first call, which may compile. warm: whether the warm-up ended because times agreed.
    claimed_ms: what the paper claims for this recipe. doubt: why this is not the paper's detector, or "". throttled:
    whether the GPU was held back meanwhile, or None if nobody can tell.
    """

    name: str
    card: Card
    hardware: str
    batch: int
    wall: Timing
    gpu: Timing | None
    copies: Timing | None
    first_s: float
    warm: bool
    claimed_ms: float | None = None
    source: str = ""
    doubt: str = ""
    throttled: bool | None = None

    @property
    def label(self) -> str:
        """What it is in a table."""
        size = f"{self.card.size[0]} x {self.card.size[1]}"
        known = [
            f"{self.source} {size}".strip(),
            self.name,
            self.card.precision,
            "" if self.card.postprocess else "raw outputs",
        ]
        return ", ".join(filter(None, known))

    @property
    def paper(self) -> BesidePaper | None:
        """Beside the paper's claim, or why it cannot stand there."""
        return beside_paper(
            self.claimed_ms,
            1e3 * self.wall.median,
            self.name,
            self.hardware,
            self.card,
            self.batch,
            self.doubt,
            bool(self.throttled),
        )

    @property
    def by_torch(self) -> bool:
        """Whether torch itself ran it."""
        return self.name.startswith("PyTorch ")

    def rivals(self, other: Result) -> bool:
        """Whether the two can be compared: of one source, with the same input size, batch and ending."""
        ours, theirs = ((r.source, r.card.size, r.batch, r.card.postprocess) for r in (self, other))
        return ours == theirs

    def is_like(self, other: Result) -> bool:
        """Whether their cards say that both are the same detector, run on as much and with the same ending."""
        a, b = self.card, other.card
        same = (a.recipe, a.categories, a.size, a.postprocess) == (b.recipe, b.categories, b.size, b.postprocess)
        return same and bool(a.recipe) and self.batch == other.batch

    def is_raw_of(self, other: Result) -> bool:
        """Whether this is the other one without post-processing."""
        ours, theirs = ((r.name, r.batch, r.source, r.card.size, r.card.precision) for r in (self, other))
        return ours == theirs and other.card.postprocess and not self.card.postprocess

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, every call included."""
        return {
            "name": self.name,
            "source": self.source,
            "card": self.card.to_dict(),
            "hardware": self.hardware,
            "batch": self.batch,
            "wall": self.wall.to_dict(),
            "gpu": self.gpu and self.gpu.to_dict(),
            "copies": self.copies and self.copies.to_dict(),
            "first_s": self.first_s,
            "warm": self.warm,
            "paper": self.paper and asdict(self.paper),
        }


@dataclass(frozen=True)
class Report:
    """Sessions side by side, on one machine, in one run; the first of each source, size and batch is the baseline.

    Of an exported file, which is a source of its own, it is torch with the detector that its card names, if that was
    measured too. Raw outputs are compared with raw ones.

    started: local time, ISO 8601. samples: how the GPU was doing. others: the share of the processors that was busy
    with something else, in [0, 1], or None where nobody tells. remarks: what else should be known.
    """

    machine: Machine
    method: Method
    results: tuple[Result, ...]
    started: str
    samples: tuple[Sample, ...] = ()
    others: float | None = None
    remarks: tuple[str, ...] = ()

    def baseline(self, result: Result) -> Result:
        """What a result is compared with: the first of its source; torch with the same detector, for a file."""
        own = next(other for other in self.results if other.rivals(result))
        by_torch = (other for other in self.results if other.by_torch and other.is_like(result))
        return own if own.by_torch else next(by_torch, own)

    def speedup(self, result: Result) -> Ratio:
        """How many times faster than its baseline a result is, copies left out; 1 for the baseline itself."""
        return Ratio.of(self.baseline(result).wall, result.wall)

    @property
    def postprocessing(self) -> list[tuple[Result, Ratio]]:
        """Each result of which the raw outputs were measured too, and how many times longer it takes than those."""
        pairs = [(whole, raw) for whole in self.results for raw in self.results if raw.is_raw_of(whole)]
        return [(whole, Ratio.of(whole.wall, raw.wall)) for whole, raw in pairs]

    @property
    def throttled(self) -> bool | None:
        """Whether the GPU was held back; None if nobody can tell, or nothing ran on one."""
        return verdict(self.samples)[0] if self.machine.gpu else None

    @property
    def notes(self) -> list[str]:
        """All that a reader of the numbers should know, in sentences."""
        said = [f"The GPU: {verdict(self.samples)[1]}."] if self.machine.gpu else []
        if self.throttled:
            said[0] += " It was held back: cool it, or fix its clocks lower (nvidia-smi -lgc), and measure again."
        if self.others is not None and self.others >= BUSY:
            said.append(
                f"Other work took {self.others:.0%} of the processors meanwhile: tails say nothing of the detector, "
                "ratios no more than their interval."
            )
        for result in self.results:
            if not result.warm:
                said.append(f"{result.label}, batch {result.batch}: still not steady when the warm-up ended.")
        for whole, ratio in self.postprocessing:
            cost = [f"{100 * (value - 1):.1f}" for value in (ratio.median, ratio.low, ratio.high)]
            said.append(
                f"{whole.label}, batch {whole.batch}: post-processing costs {cost[0]} % of a forward "
                f"({cost[1]} to {cost[2]} %)."
            )
        return said + self._papers() + list(self.remarks)

    def _papers(self) -> list[str]:
        """What can be said beside each paper's claim: all comparisons of a recipe, or why there is none."""
        said: dict[str, list[BesidePaper]] = {}
        for result in self.results:
            if result.paper is not None:
                said.setdefault(result.card.recipe, []).append(result.paper)
        return [
            f"{recipe}: {paper.words}."
            for recipe, papers in said.items()
            for paper in [p for p in papers if p.ratio is not None] or papers[:1]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, every call and every sample included."""
        return {
            "machine": self.machine.to_dict(),
            "method": asdict(self.method),
            "started": self.started,
            "results": [
                {**r.to_dict(), "baseline": self.baseline(r).label, "speedup": asdict(self.speedup(r))}
                for r in self.results
            ],
            "samples": [sample.to_dict() for sample in self.samples],
            "throttled": self.throttled,
            "others": self.others,
            "remarks": list(self.remarks),
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def write(self, path: str | Path) -> Path:
        """Write the JSON to a file, whole or not at all; returns its path."""
        return write(Path(path), self.to_json() + "\n")

    def __str__(self) -> str:
        rows = [HEAD, *map(self._row, self.results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *numbers in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([f"{name:{widths[0]}}", *cells]))
        return "\n".join([str(self.machine), "", *lines, "", *(f"- {note}" for note in self.notes)]).rstrip()

    def _row(self, result: Result) -> tuple[str, ...]:
        def ms(seconds: float | None) -> str:
            return "–" if seconds is None else f"{1e3 * seconds:.2f}"

        wall, gpu, copies = result.wall, result.gpu, result.copies
        return (
            result.label,
            str(result.batch),
            str(len(wall.seconds)),
            ms(wall.median),
            ms(wall.min),
            ms(wall.tail(90)),
            ms(wall.tail(99)),
            ms(gpu.median if gpu else None),
            ms(copies.median if copies else None),
            f"{wall.images_per_s:.1f}",
            "baseline" if result is self.baseline(result) else str(self.speedup(result)),
        )

    def _repr_html_(self) -> str:
        caption = f"Latency on {self.machine.gpu.name if self.machine.gpu else self.machine.processor}"
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        machine = escape(str(self.machine)).replace("\n", "<br>")
        return f"{table(caption, HEAD, map(self._row, self.results))}<ul>{notes}</ul><p>{machine}</p>"
