"""A detector is a value, `Arch`, and the module built from it: images to queries to predictions."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deimkit.data.split import CategoryMap
from deimkit.errors import DataError
from deimkit.models.decoder import Decoder, TransformerDecoder
from deimkit.models.encoder import Hybrid
from deimkit.models.groups import Denoise, QueryGroup, blocked
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.layers import fuse
from deimkit.models.norms import share_norms
from deimkit.models.postprocess import select
from deimkit.models.predict import predict, predicting
from deimkit.models.queries import TopK
from deimkit.models.refine import FDR, LookForwardTwice
from deimkit.models.resnet import ResNetVD
from deimkit.ranks import Ranks
from deimkit.structures import Detections, Output, Predictions, Targets

# How our names begin, and how the published weight files call the same: the first prefix that fits is exchanged.
PUBLISHED = (
    ("encoder.aifi.", "encoder.encoder.0.layers.0."),
    ("decoder.layers.", "decoder.decoder.layers."),
    ("decoder.position.", "decoder.query_pos_head."),
    ("queries.memory.", "decoder.enc_output."),
    ("queries.score.", "decoder.enc_score_head."),
    ("queries.box.", "decoder.enc_bbox_head."),
    ("groups.0.embed.", "decoder.denoising_class_embed."),
    ("refine.first.", "decoder.pre_bbox_head."),
    ("refine.box.", "decoder.dec_bbox_head."),
    ("refine.score.", "decoder.dec_score_head."),
    ("refine.quality.", "decoder.decoder.lqe_layers."),
)


@dataclass(frozen=True)
class Arch:
    """What a detector is made of; its `repr` is Python that rebuilds it.

    backbone: images to maps. encoder: maps to maps of one width. decoder: the layers. queries: where queries start.
    groups: which queries train along. refine: how boxes improve. activation: "silu" (DEIM) or "relu" (plain D-FINE and
    RT-DETRv2) in the decoder and all prediction heads.
    """

    backbone: HGNetV2 | ResNetVD
    encoder: Hybrid
    decoder: Decoder
    queries: TopK = TopK(300)
    groups: tuple[Denoise, ...] = (Denoise(100),)
    refine: FDR | LookForwardTwice = FDR()
    activation: str = "silu"


class Detector(nn.Module):
    """A detector with fresh weights for some categories (a count, names, or a CategoryMap).

    In training `detector(images, targets)` returns one `Output` per supervised set of predictions; in evaluation
    `detector(images)` returns the `Predictions` of the layer that is asked, the last one as a rule.
    """

    def __init__(self, arch: Arch, categories: CategoryMap | int | list[str]) -> None:
        super().__init__()
        self.arch = arch
        self.categories = CategoryMap.of(categories)
        self.size = (640, 640)  # (height, width) that `predict` brings pictures to; no weight depends on it
        width, classes, act = arch.decoder.width, len(self.categories), arch.activation
        self.backbone = arch.backbone.build()
        self.encoder = arch.encoder.build(arch.backbone.channels)
        self.decoder: TransformerDecoder = arch.decoder.build(arch.encoder.width, act)
        self.queries = arch.queries.build(width, classes, act)
        self.groups = nn.ModuleList(group.build(width, classes) for group in arch.groups)
        self.refine = arch.refine.build(arch.decoder.layers, width, classes, act)
        self.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs as on GPUs

    def train_with(self, ranks: Ranks) -> None:
        """Learn from batches of which each of `ranks` has a share: norms see all of it, noisy queries are as of one."""
        share_norms(self, ranks)
        for group in self.groups:
            group.ranks = ranks  # type: ignore[assignment]

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        """images (B, 3, H, W) in [0, 1], H and W multiples of 32 -> Predictions; in training, list[Output]."""
        check_images(images)
        groups = self.extra_queries(targets, len(images)) if self.training else []
        memory = self.decoder.remember(self.encoder(self.backbone(images)))
        start = self.queries(memory.tokens, memory.shapes)
        content = torch.cat([start.content, *(group.content for group in groups)], 1)  # (B, Q, D)
        boxes = torch.cat([start.boxes, *(group.boxes for group in groups)], 1).sigmoid()  # (B, Q, 4)
        own = start.content.shape[1]
        layers, pre = self.decoder(content, boxes, memory, blocked(own, groups) if groups else None, self.refine)
        if not self.training:
            return layers[-1]
        return training_outputs(layers, pre, start.proposals, own, groups)

    def extra_queries(self, targets: Targets | None, images: int) -> list[QueryGroup]:
        """The queries that train along, for the targets of a batch of `images`."""
        if targets is None:
            raise DataError("A detector in training mode needs Targets; got None. Call `.eval()` to predict.")
        targets.check(images, len(self.categories))
        return [group(targets, images) for group in self.groups]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """The objects in images (B, 3, H, W), bytes or floats in [0, 1]; see `deimkit.models.postprocess.select`.

        sizes: (B, 2) height and width of the original images in pixels. Every module is left in the mode it was in.
        """
        weight = next(self.parameters())
        shown = images.to(weight.device).to(weight.dtype)
        with predicting(self):
            preds = self(shown if images.is_floating_point() else shown.div_(255))
        return select(preds, sizes, self.categories)

    def predict(
        self, source: Any, threshold: float = 0.5, batch: int = 8, size: int | tuple[int, int] | None = None
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """The objects in a picture, in many, or in every frame of a video: see `deimkit.models.predict.predict`."""
        return predict(self, source, threshold=threshold, batch=batch, size=size)

    def deploy(self, fold_all: bool = False) -> Detector:
        """A copy that only predicts, and faster: batch norms folded, twin convolutions merged, unused heads gone.

        As published, the backbone and the input projections keep their batch norms unless `fold_all`.
        """
        model = deepcopy(self).eval()
        for part in [model] if fold_all else model.encoder.fusion_parts():
            fuse(part)
        model.decoder.deploy()
        model.refine.deploy(model.decoder.asked)
        return model.to(memory_format=torch.channels_last)


def check_images(images: Tensor) -> None:
    """Raise `DataError` unless the images are a float (B, 3, H, W) whose sides are multiples of 32."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            f"Images must be float (B, 3, height, width) in [0, 1]; got {tuple(images.shape)} {images.dtype}. "
            "Bytes? `Batch.finish()` makes them floats."
        )
    h, w = images.shape[2:]
    if h % 32 or w % 32 or not h * w:
        raise DataError(f"Image height and width must be multiples of 32; got {h} x {w}. Resize or pad the images.")


def training_outputs(
    layers: list[Predictions], pre: Predictions | None, proposals: Predictions, own: int, groups: list[QueryGroup]
) -> list[Output]:
    """All that is supervised: the `own` queries after each layer and before any, proposals, groups."""
    answers = {"final": layers[-1]} | {f"layer{i}": preds for i, preds in enumerate(layers[:-1])}
    if pre is not None:
        answers["pre"] = pre
    mine, *theirs = split(answers, [own, *(len(group.part) for group in groups)])
    outputs = [*supervised(mine), Output("proposals", proposals)]
    for group, preds in zip(groups, theirs, strict=True):
        outputs += supervised(preds, group.name + ".", rule=group.rule, repeat=group.repeat, pooled=group.pooled)
    return outputs


def split(answers: dict[str, Predictions], sizes: list[int]) -> list[dict[str, Predictions]]:
    """The predictions of all queries, (B, sum(sizes), ...), as those of each run of `sizes` queries."""
    parts: list[dict[str, Predictions]] = [{} for _ in sizes]
    for name, preds in answers.items():
        fields = [preds.logits, preds.boxes, preds.edges, preds.anchors]
        split_fields = [[None] * len(sizes) if x is None else x.split(sizes, 1) for x in fields]
        for part, values in zip(parts, zip(*split_fields, strict=True), strict=True):
            part[name] = Predictions(*values)
    return parts


def supervised(answers: dict[str, Predictions], prefix: str = "", **how: Any) -> list[Output]:
    """One Output per layer of the same queries; every layer before the final one knows the final one."""
    final = answers["final"]
    return [
        Output(prefix + name, preds, last=final if name.startswith("layer") else None, **how)
        for name, preds in answers.items()
    ]
