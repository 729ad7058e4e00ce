"""A latency beside the one that a paper claims, if it was measured as theirs was; else why not, in words."""

from __future__ import annotations

from dataclasses import dataclass

from deimkit.deploy.card import Card

THEIR_GPU = "Tesla T4"
THEIR_CLASSES, THEIR_BOXES = 80, 300  # of COCO, and an image
THEIRS = f"TensorRT, fp16, on {THEIR_GPU}, one image of 640 x 640"


@dataclass(frozen=True)
class BesidePaper:
    """What a paper claims, in ms, and measured / claimed; the ratio is None where the two cannot be compared.

    words: the comparison as a sentence, or the reason why there is none.
    """

    claimed_ms: float
    ratio: float | None
    words: str


def beside_paper(
    claimed_ms: float | None,
    measured_ms: float,
    runtime: str,
    hardware: str,
    card: Card,
    batch: int,
    doubt: str = "",
    throttled: bool = False,
) -> BesidePaper | None:
    """Compare a latency with the paper's, of its detector on its hardware and terms alone; None if it claims nothing.

    measured_ms: the median of calls whose images lie on the GPU already, as in DEIM's benchmark, whose graph also ends
    in the choice of the best 300 boxes; it quotes means. runtime: what the session calls itself. hardware: what the
    device does. doubt: why the detector is not the paper's, or "". throttled: whether the GPU was held back meanwhile.
    """
    if claimed_ms is None:
        return None
    height, width = card.size
    ending = "" if card.postprocess else ", without post-processing"
    images = "one image" if batch == 1 else f"{batch} images"
    where = runtime if runtime.endswith(f" on {hardware}") else f"{runtime} ({hardware})"
    ours = f"{where}, {card.precision}, {images} of {height} x {width}{ending}"
    same = (
        runtime.startswith("TensorRT ")
        and hardware == THEIR_GPU
        and card.precision == "fp16"
        and batch == 1
        and card.size == (640, 640)
        and card.postprocess
    )
    reasons = [] if same else [f"that is {THEIRS}; this is {ours}"]
    reasons += [*([doubt] if doubt else []), *_other_detector(card)]
    if reasons:
        return BesidePaper(claimed_ms, None, f"not compared with the paper's {claimed_ms:g} ms: {'; '.join(reasons)}")
    ratio = measured_ms / claimed_ms
    return BesidePaper(
        claimed_ms,
        ratio,
        f"{measured_ms:.2f} ms beside the paper's {claimed_ms:g} ms ({ratio:.2f} times): both are {THEIRS}; two T4 "
        "machines of the authors differ by about 0.5 ms, and versions of TensorRT build different engines"
        + ("; this GPU was held back meanwhile" if throttled else ""),
    )


def _other_detector(card: Card) -> list[str]:
    """What a card says that a paper's detector is not: other classes, another number of boxes."""
    classes = f"the paper's has {THEIR_CLASSES} classes and this one {len(card.categories)}"
    boxes = f"the paper's ends in {THEIR_BOXES} boxes and this one in {card.top}"
    told = ((classes, len(card.categories) != THEIR_CLASSES), (boxes, card.postprocess and card.top != THEIR_BOXES))
    return [words for words, other in told if other]
