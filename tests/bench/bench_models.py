"""The detector's forward and backward: ours beside D-FINE of transformers, from the same architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deimkit.data.split import CategoryMap
from deimkit.models.detector import Detector
from deimkit.recipes.archs import dfine_arch
from deimkit.structures import Targets
from deimkit.weights.config import to_config
from tests.bench.paired import Row, paired


def peer(size: str) -> Any:
    """D-FINE of that size as transformers builds it, its weights random."""
    from transformers import DFineConfig, DFineForObjectDetection

    return DFineForObjectDetection(DFineConfig(**to_config(dfine_arch(size, "relu"), CategoryMap.of(80))))


def predict(size: str, pixels: int, deployed: bool) -> Row:
    """One image at a time, as trained or `deployed`."""
    ours, theirs = Detector(dfine_arch(size, "relu"), 80).eval(), peer(size).eval()
    ours = ours.deploy(fold_all=True) if deployed else ours
    images = torch.rand(1, 3, pixels, pixels)
    with torch.inference_mode():
        mine, other, ratio = paired(lambda: ours(images), lambda: theirs(pixel_values=images), runs=9)
    name = f"predict with D-FINE-{size.upper()}{', deployed' if deployed else ''}, {pixels} px, one image"
    return Row(name, mine * 1e3, other * 1e3, "ms", ratio)


def train(size: str, pixels: int, batch: int) -> Row:
    """Forward and backward without denoising and criterion, which bench_criterion measures."""
    ours, theirs = Detector(replace(dfine_arch(size, "relu"), groups=()), 80).train(), peer(size).train()
    images = torch.rand(batch, 3, pixels, pixels)
    nothing = Targets.from_list([{"labels": torch.empty(0), "boxes": torch.empty(0, 4)}] * batch)

    def total(logits: list[Tensor], boxes: list[Tensor]) -> None:
        (sum(x.float().square().mean() for x in logits) + sum(x.mean() for x in boxes)).backward()

    def mine() -> None:
        preds = [output.preds for output in ours(images, nothing)]
        total([p.logits for p in preds], [p.boxes for p in preds])

    def other() -> None:
        out = theirs(pixel_values=images)
        total([*out.intermediate_logits.unbind(1), out.enc_topk_logits], [*out.intermediate_reference_points.unbind(1)])

    a, b, ratio = paired(mine, other, runs=5)
    name = f"train D-FINE-{size.upper()} without criterion, {pixels} px, {batch} images"
    return Row(name, a * 1e3, b * 1e3, "ms", ratio)


def rows() -> Iterator[Row]:
    """Small sizes at sizes a laptop trains at."""
    yield predict("n", 640, deployed=False)
    yield predict("n", 640, deployed=True)
    yield predict("s", 640, deployed=False)
    yield train("n", 320, 4)
