"""A detector and what follows it as one function of tensors: what is exported, and what torch runs beside it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from deimkit.models.detector import Detector
from deimkit.models.layers import full
from deimkit.models.postprocess import best


class Graph(nn.Module):
    """Images to boxes, scores and labels; or, without `postprocess`, to the logits and boxes of all queries.

    detector: left as it is; the graph has a copy, in evaluation and, if `deployed`, with everything folded that can be.
    top: how many boxes are given. dtype: of the weights; half precision keeps float32 where boxes and distributions
    need its digits, as in training, and what comes in and goes out is float32 as ever.
    """

    def __init__(
        self,
        detector: Detector,
        postprocess: bool = True,
        top: int = 300,
        dtype: torch.dtype = torch.float32,
        deployed: bool = True,
    ) -> None:
        super().__init__()
        self.detector = (detector.deploy(fold_all=True) if deployed else deepcopy(detector)).to(dtype)
        self.postprocess, self.top, self.dtype = postprocess, top, dtype
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) float32 in [0, 1], sizes (B, 2) height and width -> what `Card.outputs` names."""
        preds = self.detector(images.to(self.dtype))
        if sizes is None or not self.postprocess:
            return full(preds.logits), full(preds.boxes)
        return best(preds, sizes, self.top)
