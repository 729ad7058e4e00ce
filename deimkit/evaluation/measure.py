"""A detector and a split become COCO's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deimkit.data.dataset import Split
from deimkit.data.loader import Loader
from deimkit.evaluation.coco import Evaluator
from deimkit.models.detector import Detector
from deimkit.models.postprocess import select


@torch.inference_mode()
def measure(
    detector: Detector,
    split: Split,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    workers: int = 0,
    backend: str = "fast",
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """COCO's twelve numbers of `detector` on `split`, and per class; see `deimkit.evaluation.coco.evaluate`.

    size: (height, width) that images are resized to, by default the detector's. batch: images at a time.
    note: called with a remark such as "evaluating 40/100". The detector is left in the mode it was in.
    """
    device = torch.device(device) if device is not None else next(detector.parameters()).device
    loader = Loader(split, batch=batch, size=size or detector.size, workers=workers, shuffle=False, drop_last=False)
    evaluator = Evaluator(split)
    training = detector.training
    detector.eval()
    try:
        seen = 0
        for shown in loader.epoch(0):
            shown = shown.to(device).finish()
            found = select(detector(shown.images), shown.sizes, detector.categories)
            for detections in found:
                evaluator.add(seen, detections)
                seen += 1
            if note is not None:
                note(f"evaluating {seen}/{len(split)}")
    finally:
        detector.train(training)
        loader.close()
    return evaluator.result(backend)
