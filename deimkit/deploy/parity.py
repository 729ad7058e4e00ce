"""Proof that a deployed detector is the one that was trained: its boxes, its scores and its AP, beside PyTorch's.

Boxes and scores that agree on a few pictures say that the graph is right. Only AP on annotated images says that what
difference is left does no harm, so only a report that has both, within its tolerances, says "verified".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from deimkit.data.images import Pixels
from deimkit.data.split import Split
from deimkit.data.synthetic import Synthetic
from deimkit.deploy.difference import MOST, Difference, compare
from deimkit.deploy.eager import TorchSession, exact
from deimkit.deploy.served import Served
from deimkit.deploy.session import Session
from deimkit.errors import DeployError, NonFiniteError
from deimkit.evaluation.measure import measure
from deimkit.evaluation.page import Html, table
from deimkit.models.detector import Detector
from deimkit.models.postprocess import best
from deimkit.models.predict import predicting, prepare
from deimkit.structures import Predictions

PICTURES = 8  # images whose boxes and scores are compared
ENOUGH = 20  # images for an AP that counts: a fault in one of seven would have shown with a probability of 95 %
ALIKE = 4e-6  # between neighbouring scores: rounding moves each of the two by up to 2e-6, and so decides their order
LEAST_AP = 0.01  # of PyTorch; a detector that finds nothing cannot lose anything


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime of some precision may be from PyTorch, and still be the same detector.

    boxes: of a box's edge, as a fraction of the image's longer side. scores: of a score, in [0, 1]. Both are of
    detections that score `above` or more, of which the share `unmatched` may lack a partner: rounding lets other
    queries pass the encoder's choice of the best. None: only AP is asked. ap: in points, of 100.
    """

    boxes: float | None = 1e-3
    scores: float | None = 1e-4
    unmatched: float = 1e-3
    above: float = 0.0
    ap: float = 0.1

    @staticmethod
    def of(precision: str) -> Tolerance:
        """What a graph of "fp32", "fp16" or "int8" numbers is held to; `DeployError` for any other."""
        if precision not in TOLERANCES:
            raise DeployError(f"Parity is judged at {', '.join(TOLERANCES)}; got precision={precision!r}.")
        return TOLERANCES[precision]

    def __str__(self) -> str:
        if self.boxes is None or self.scores is None:
            return f"AP within {self.ap:.1f} points"
        whose = f" of detections that score {self.above:g} or more" if self.above else ""
        return (
            f"boxes within {self.boxes:g} of the image's longer side and scores within {self.scores:g}{whose}, "
            f"{100 * (1 - self.unmatched):g} % of which have a partner, and AP within {self.ap:.1f} points"
        )


# FP32 runtimes add up in another order, and stay within 2e-6 where the graph is right. FP16 moved the boxes of a small
# trained detector by up to 1e-3, its scores by up to 1e-2, as more or less of it stayed in FP32, and its AP on 100
# images by 0.03 points; larger detectors round more often. INT8 moves single detections at will, a trade of AP for
# speed, so that AP alone is judged, by what is a fair price.
TOLERANCES = {
    "fp32": Tolerance(),
    "fp16": Tolerance(boxes=1e-2, scores=2e-2, unmatched=1e-2, above=0.05, ap=1.0),
    "int8": Tolerance(boxes=None, scores=None, above=0.05, ap=3.0),
}


@dataclass(frozen=True)
class Accuracy:
    """AP of PyTorch and of a runtime on the same annotated images.

    images: how many. torch, runtime: in [0, 1]; None where there is nothing to find, or the answer was not finite.
    """

    images: int
    torch: float | None
    runtime: float | None

    @property
    def points(self) -> float | None:
        """How many points of AP the runtime has more."""
        return None if self.torch is None or self.runtime is None else 100 * (self.runtime - self.torch)


@dataclass(frozen=True)
class Contender:
    """One runtime beside PyTorch.

    runtime: its name. size: (height, width) of the input. batches: images at a time, each of which was tried. every:
    the difference of all detections. held: of those that `tolerance` is about. accuracy: None if it was not measured.
    postprocess: as of its `Card`. alike: whether rounding decides the order of PyTorch's scores, so that nothing can be
    compared.
    """

    runtime: str
    precision: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    every: Difference
    held: Difference
    tolerance: Tolerance
    accuracy: Accuracy | None = None
    postprocess: bool = True
    alike: bool = False

    @property
    def name(self) -> str:
        """The runtime, and whether its boxes are selected outside the graph."""
        return self.runtime if self.postprocess else f"{self.runtime}, raw outputs"

    @property
    def faults(self) -> list[str]:
        """What differs more than it may, in sentences."""
        return [*self._broken(), *self._apart(), *self._worse()]

    @property
    def missing(self) -> list[str]:
        """What there is no proof of yet, in sentences."""
        return [] if self.faults else [*self._nothing_seen(), *self._nothing_measured()]

    @property
    def verdict(self) -> str:
        """ "differs", or "compared" if something is missing, or "agrees"."""
        return "differs" if self.faults else "compared" if self.missing else "agrees"

    def _broken(self) -> Iterator[str]:
        images, remedy = self.every.images, "Keep the layers that overflow in FP32, or export in FP32."
        if self.every.nonfinite:
            yield f"NaN or infinity in {self.every.nonfinite} of {images} images. {remedy}"
        elif self.accuracy is not None and self.accuracy.torch is not None and self.accuracy.runtime is None:
            yield f"NaN or infinity while AP was measured. {remedy}"
        if self.every.silent:
            yield (
                f"No detection in {self.every.silent} of {images} images where PyTorch has some. FP16 engines of "
                "graphs below opset 17 lose all of them: export with opset=17 or higher."
            )

    def _apart(self) -> Iterator[str]:
        held, allowed = self.held, self.tolerance
        if self.every.unsorted:
            yield f"Scores do not descend in {self.every.unsorted} of {self.every.images} images."
        if allowed.boxes is None or allowed.scores is None or self.alike:
            return
        if held.unmatched > allowed.unmatched * held.detections:
            yield (
                f"{held.lost} detections are lost, {held.extra} are new, and {held.relabelled} have another class; "
                f"{held.matched} have a partner."
            )
        if held.box_max > allowed.boxes:
            yield f"Boxes differ by up to {held.box_max:.1e} of the image's longer side; {allowed.boxes:g} is allowed."
        if held.score_max > allowed.scores:
            yield f"Scores differ by up to {held.score_max:.1e}; {allowed.scores:g} is allowed."

    def _worse(self) -> Iterator[str]:
        points = None if self.accuracy is None else self.accuracy.points
        if points is not None and abs(points) > self.tolerance.ap:
            yield f"AP differs by {points:+.2f} points; {self.tolerance.ap:.1f} is allowed."

    def _nothing_seen(self) -> Iterator[str]:
        if self.alike:
            yield "PyTorch's own scores are all alike, as of an untrained detector: there is no order to compare."
        elif not self.held.matched:
            least = f" that scores {self.tolerance.above:g} or more" if self.tolerance.above else ""
            yield f"There was no detection{least} to compare: give pictures of what the detector knows."

    def _nothing_measured(self) -> Iterator[str]:
        match self.accuracy:
            case None:
                yield "AP was not measured: give data=."
            case Accuracy(torch=None):
                yield "AP was not measured: there is nothing to find in the images of data=."
            case Accuracy(torch=float(ap)) if ap < LEAST_AP:
                yield f"PyTorch's own AP is {100 * ap:.1f}, so another's says nothing: give a trained detector."
            case Accuracy(images=images) if images < ENOUGH:
                yield f"AP was measured on {images} images: give data= with {ENOUGH} or more."


HEAD = ("runtime", "verdict", "precision", "PyTorch's AP", "AP", "boxes", "scores", "unmatched", "input", "batches")


@dataclass(frozen=True)
class Parity:
    """The report that every export ends with: each runtime beside PyTorch, and whether that proves them equal.

    reference: the runtime that the others are compared with.
    """

    reference: str
    contenders: tuple[Contender, ...] = field(default=())

    @property
    def verified(self) -> bool:
        """Whether boxes, scores and AP of every runtime were measured and agree."""
        return self.verdict == "verified"

    @property
    def verdict(self) -> str:
        """ "differs" if a runtime does, "compared" if there is proof missing, and else "verified"."""
        verdicts = {contender.verdict for contender in self.contenders}
        return "differs" if "differs" in verdicts else "verified" if verdicts == {"agrees"} else "compared"

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, under `HEAD`: a row for each runtime."""
        return [
            (
                c.name,
                c.verdict,
                c.precision,
                _percent(c.accuracy.torch if c.accuracy else None),
                _percent(c.accuracy.runtime if c.accuracy else None),
                f"{c.held.box_max:.1e}" if c.held.matched else "–",
                f"{c.held.score_max:.1e}" if c.held.matched else "–",
                f"{c.held.unmatched} of {c.held.detections}",
                f"{c.size[0]}x{c.size[1]}",
                ", ".join(map(str, c.batches)),
            )
            for c in self.contenders
        ]

    def remarks(self) -> list[str]:
        """What each precision was held to, and of each runtime what differs or is missing."""
        asked = {c.precision: c.tolerance for c in self.contenders}
        found = [(c, " ".join([*c.faults, *c.missing])) for c in self.contenders]
        return [
            *(f"Asked of {precision}: {tolerance}." for precision, tolerance in asked.items()),
            *(f"{c.name}, {c.precision}: {words}" for c, words in found if words),
        ]

    @property
    def headline(self) -> str:
        """What was done and how it ended, in one line."""
        measured = {c.accuracy.images for c in self.contenders if c.accuracy is not None}
        images = f", AP on {min(measured)} images" if measured else ""
        return f"{self.verdict}: {len(self.contenders)} runtime(s) beside {self.reference}{images}"

    def __str__(self) -> str:
        rows = [HEAD, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.headline, *lines, *self.remarks()])

    def html(self) -> str:
        """The report as a section of a page (`deimkit.evaluation.page`)."""
        kind = {"verified": " finished", "differs": " failed"}.get(self.verdict, "")
        rows = [(row[0], *map(_on_one_line, row[1:])) for row in self.rows()]
        caption = "Largest differences of boxes, in sides of the image, and of scores; AP in percent"
        return (
            f'<p><span class="state{kind}">{self.verdict}</span> {escape(self.headline.partition(": ")[2])}</p>'
            f"{table(caption, HEAD, rows)}{''.join(f'<p>{escape(remark)}</p>' for remark in self.remarks())}"
        )

    def _repr_html_(self) -> str:
        return self.html()

    def to_dict(self) -> dict[str, Any]:
        """The report in plain JSON types, verdicts and reasons included."""
        said = [{"verdict": c.verdict, "faults": c.faults, "missing": c.missing} for c in self.contenders]
        rows = [asdict(c) | words for c, words in zip(self.contenders, said, strict=True)]
        for row in rows:
            row |= {"size": list(row["size"]), "batches": list(row["batches"])}
        return {"reference": self.reference, "verdict": self.verdict, "contenders": rows}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Parity:
        """The report that `to_dict` told; what it concludes is concluded anew."""
        return Parity(told["reference"], tuple(map(_contender, told["contenders"])))


def _contender(told: dict[str, Any]) -> Contender:
    """One row of `Parity.to_dict`."""
    accuracy = told["accuracy"]
    return Contender(
        runtime=told["runtime"],
        precision=told["precision"],
        size=(told["size"][0], told["size"][1]),
        batches=tuple(told["batches"]),
        every=Difference(**told["every"]),
        held=Difference(**told["held"]),
        tolerance=Tolerance(**told["tolerance"]),
        accuracy=None if accuracy is None else Accuracy(**accuracy),
        postprocess=told["postprocess"],
        alike=told["alike"],
    )


def _on_one_line(text: str) -> Html:
    return Html(f'<span style="white-space: nowrap">{escape(text)}</span>')


def _percent(ap: float | None) -> str:
    return "–" if ap is None else f"{100 * ap:.2f}"


def pictures(count: int, size: tuple[int, int]) -> list[Pixels]:
    """Drawn scenes of (height, width), the same ones at every call: `count` arrays (H, W, 3) uint8."""
    scenes = Synthetic(size=max(*size, 32))
    return [scenes.scene("val", i).image[: size[0], : size[1]] for i in range(count)]


def spread(split: Split, count: int) -> Split:
    """At most `count` images, evenly from the whole split, as one that is sorted by class needs."""
    count = min(count, len(split))
    return split.take(i * len(split) // count for i in range(count))


def prove(
    detector: Detector,
    sessions: Sequence[Session],
    split: Split | None = None,
    *,
    images: Sequence[Pixels] | None = None,
    batches: Sequence[int] = (1, 2, 8),
    count: int = 100,
    note: Callable[[str], None] | None = None,
) -> Parity:
    """Hold every session against the detector that it was made from, as it runs in PyTorch.

    split: annotated images, `count` of which AP is measured on. images: arrays (H, W, 3) uint8 whose boxes and scores
    are compared; by default some of the split's, or drawn ones. batches: images at a time, for sessions that take any
    number. note: called with a remark such as "ONNX Runtime, batch 8". Raises `DeployError` if a session is of other
    classes, and `NonFiniteError` if the detector's own answers are not finite.
    """
    subset = None if split is None or not len(split) else spread(split, count)
    if not images and subset is not None:
        few = spread(subset, PICTURES)
        images = [few.image(i) for i in range(len(few))]
    reference = Reference(detector, images, subset)
    tell = note or (lambda _: None)
    contenders = tuple(reference.beside(session, batches, tell) for session in sessions)
    return Parity(f"PyTorch {torch.__version__} on {detector.device}", contenders)


class Reference:
    """What PyTorch says of some pictures and some annotated images; asked once for each size and number of boxes.

    images: arrays (H, W, 3) uint8; without any, scenes are drawn. subset: annotated images, or None.
    """

    def __init__(self, detector: Detector, images: Sequence[Pixels] | None, subset: Split | None) -> None:
        self.detector, self.images, self.subset = detector, images, subset
        self._ap: dict[tuple[tuple[int, int], int], float | None] = {}
        self._answers: dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor, dict[str, Tensor]]] = {}

    def beside(self, session: Session, batches: Sequence[int], tell: Callable[[str], None]) -> Contender:
        """The session's answers beside those of PyTorch."""
        card, tolerance = session.card, Tolerance.of(session.card.precision)
        if card.categories != self.detector.categories:
            raise DeployError(
                f"Expected an export of the detector with {len(self.detector.categories)} classes; {session.name} has "
                f"{len(card.categories)} classes, or others. Compare it with the detector it was made from."
            )
        tried = tuple(batches) if card.batch is None else (card.batch,)
        every, held = Difference(), Difference()
        for batch in tried:
            tell(f"{session.name}, batch {batch}")
            for ours, theirs, sizes in self._both(session, batch):
                slack = tolerance.scores or 0.0
                every += compare(ours, theirs, sizes, slack)
                held += compare(ours, theirs, sizes, slack, tolerance.above)
        accuracy = self._accuracy(session, tell)
        return Contender(
            runtime=session.name,
            precision=card.precision,
            size=card.size,
            batches=tried,
            every=every,
            held=held,
            tolerance=tolerance,
            accuracy=accuracy,
            postprocess=card.postprocess,
            alike=self._alike(card.size),
        )

    def _alike(self, size: tuple[int, int]) -> bool:
        """Whether PyTorch's own scores lie so close that rounding decides their order, and who is among the best.

        The typical gap of neighbours says so, however many boxes a file gives: fresh weights leave 2e-6 or less, a few
        steps of training 5e-6, a training to the end 1e-4 and more. Their range would not: fresh weights reach 0.03.
        """
        scores = self._answer(size, MOST)[2]["scores"]
        return bool((scores[:, :-1] - scores[:, 1:]).median() < ALIKE)

    def _both(self, session: Session, batch: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
        """The two answers to all pictures, `batch` at a time, with the pictures' sizes; the last batch is filled up."""
        shown, sizes, answer = self._answer(session.card.size, session.card.top)
        for start in range(0, len(shown), batch):
            rows = torch.arange(start, start + batch) % len(shown)
            theirs = session.run(shown[rows].to(session.device), sizes[rows].to(session.device))
            yield {name: x[rows] for name, x in answer.items()}, theirs, sizes[rows]

    def _answer(self, size: tuple[int, int], top: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The pictures (n, 3, *size) in [0, 1], their own sizes (n, 2), and the best `top` detections in each."""
        if (size, top) not in self._answers:
            images = self.images or pictures(PICTURES, (size[0] * 3 // 2, size[1] * 5 // 4))  # of another shape
            shown = torch.stack([prepare(image, size) for image in images]).float().div_(255)
            sizes = torch.tensor([image.shape[:2] for image in images])
            weight = next(self.detector.parameters())
            with predicting(self.detector), exact():
                parts = [self.detector(part.to(weight)) for part in shown.split(PICTURES)]
            preds = Predictions(torch.cat([p.logits for p in parts]).cpu(), torch.cat([p.boxes for p in parts]).cpu())
            found = dict(zip(("boxes", "scores", "labels"), best(preds, sizes, top), strict=True))
            self._answers[size, top] = shown, sizes, found
        return self._answers[size, top]

    def _accuracy(self, session: Session, tell: Callable[[str], None]) -> Accuracy | None:
        """AP of both on the subset; None without one."""
        if self.subset is None:
            return None
        size, top = session.card.size, session.card.top
        if (size, top) not in self._ap:
            tell(f"PyTorch, AP on {len(self.subset)} images")
            where = self.detector.device
            with TorchSession(self.detector, size=size, device=where, deployed=False, top=top) as eager:
                self._ap[size, top] = _number(measure(Served(eager), self.subset, size)["AP"])
        tell(f"{session.name}, AP on {len(self.subset)} images")
        try:
            theirs = _number(measure(Served(session), self.subset, size)["AP"])
        except NonFiniteError:
            theirs = None
        return Accuracy(len(self.subset), self._ap[size, top], theirs)


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
