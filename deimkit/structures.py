"""The six values that travel from image to loss, flat so that nothing has to be zipped.

Letters used in every shape of this package: B images, Q queries, C classes, D channels, L tokens,
S levels, N boxes in the batch, M matched pairs, R bins of a box edge, H heads, P points, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deimkit.errors import DataError, NonFiniteError


class _Shapes:
    """Shared by the dataclasses below: a `repr` of shapes and a move to another device."""

    def __repr__(self) -> str:
        parts = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
            elif isinstance(value, Match):
                value = f"Match of {len(value.query)} pairs"
            elif isinstance(value, (list, tuple)) and len(value) > 4:
                value = f"{len(value)} values"
            if value is not None:
                parts.append(f"{f.name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """The same value with every tensor on `device`."""
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, (Tensor, Targets)):
                moved[f.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(repr=False)
class Targets(_Shapes):
    """Every annotated box of a batch in one flat table; an image without boxes simply has no row.

    image: (N,) int64, which image of the batch a box belongs to. labels: (N,) int64 class indices.
    boxes: (N, 4) cxcywh as fractions of the image, in [0, 1]. masks: (N, h, w) or None.
    """

    image: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def from_list(per_image: list[dict[str, Tensor]]) -> Targets:
        """Targets from the one-dict-per-image form of DETR (`labels`, `boxes` in cxcywh fractions)."""
        count = [len(t["labels"]) for t in per_image]
        return Targets(
            image=torch.repeat_interleave(torch.arange(len(per_image)), torch.tensor(count, dtype=torch.long)),
            labels=torch.cat([t["labels"].long() for t in per_image]) if per_image else torch.empty(0).long(),
            boxes=torch.cat([t["boxes"].reshape(-1, 4) for t in per_image]) if per_image else torch.empty(0, 4),
        )

    def check(self, images: int, classes: int, names: list[str] | None = None) -> Targets:
        """Return self if a detector of `classes` classes can learn from it.

        Raises `DataError` naming the box if not, `NonFiniteError` if that is because it is not finite.
        """
        n = len(self.labels)
        if self.boxes.shape != (n, 4) or self.image.shape != (n,):
            raise DataError(
                f"Targets must be image (N,), labels (N,), boxes (N, 4); got {tuple(self.image.shape)}, "
                f"{tuple(self.labels.shape)}, {tuple(self.boxes.shape)}."
            )
        if n == 0:
            return self

        out = (self.image < 0) | (self.image >= images)
        bad = (~torch.isfinite(self.boxes)).any(1)
        off = ((self.boxes < 0) | (self.boxes > 1)).any(1)
        wrong = (self.labels < 0) | (self.labels >= classes)
        if not (out | bad | off | wrong).any():  # all in one question, as each waits for a GPU
            return self

        def where(row: int) -> str:
            i = int(self.image[row])
            return f"box {row} of image {i}" + (f" ({names[i]!r})" if names and 0 <= i < len(names) else "")

        if out.any():
            row = int(out.nonzero()[0])
            raise DataError(f"Targets.image must be in [0, {images}); got {int(self.image[row])} at row {row}.")
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"Targets.boxes must be finite; got {self.boxes[row].tolist()} in {where(row)}. Run `deimkit doctor`."
            )
        if off.any():
            row = int(self.boxes.abs().amax(1).argmax()) if bool((self.boxes > 1).any()) else int(off.nonzero()[0])
            raise DataError(
                f"Targets.boxes must be cxcywh in [0, 1]; got {self.boxes[row].tolist()} in {where(row)}. "
                "Pixels? Divide by the image size."
            )
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"Targets.labels must be class indices in [0, {classes}); got {int(self.labels[row])} in {where(row)}. "
            "Dataset category ids become indices through the CategoryMap."
        )


@dataclass(repr=False)
class Batch(_Shapes):
    """Images as the loader ships them (uint8) or as the model takes them (float), with what they should show.

    images: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1]. ids: the dataset's image ids. names: file names.
    sizes: (B, 2) height and width of the original images in pixels. mix: MixUp's weight of the own image, or None.
    size: the (height, width) that `finish` resizes to, or None for no multi-scale.
    """

    images: Tensor
    targets: Targets
    ids: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: Tensor | None = None
    mix: float | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def finish(self) -> Batch:
        """Float images in [0, 1], MixUp blended and the multi-scale size applied, on the device they are on.

        The loader ships bytes and decisions, the device does the arithmetic. MixUp is λ·image + (1 − λ)·its
        predecessor in the batch (the targets of both are already here); multi-scale is nearest-neighbour, as published.
        """
        images = self.images.float().div_(255) if self.images.dtype == torch.uint8 else self.images
        if self.mix is not None:
            images = images * self.mix + images.roll(1, 0) * (1 - self.mix)
        if self.size is not None and tuple(images.shape[-2:]) != tuple(self.size):
            images = torch.nn.functional.interpolate(images, size=self.size)
        return replace(self, images=images, mix=None, size=None)


@dataclass(repr=False)
class Predictions(_Shapes):
    """What the queries answer.

    logits: (B, Q, C). boxes: (B, Q, 4) cxcywh fractions. edges: (B, Q, 4, R + 1) logits over the bins of the left,
    top, right and bottom edge, or None. anchors: (B, Q, 4) the boxes the edges are measured from, or None.
    """

    logits: Tensor
    boxes: Tensor
    edges: Tensor | None = None
    anchors: Tensor | None = None
    masks: Tensor | None = None


class Match(NamedTuple):
    """Who answers for what: M triples of image of the batch, query, and row of `Targets`."""

    image: Tensor
    query: Tensor
    target: Tensor


@dataclass(repr=False)
class Output(_Shapes):
    """One supervised set of predictions.

    name: "final", "layer0" ..., "pre", "proposals", and the same behind a group's name ("denoise.layer1").
    rule: a known `Match` (denoising), a matcher of its own (H-DETR's group), or None: the criterion's matcher.
    repeat: how often every target is supervised here, hence its normaliser. last: the final layer of the same
    queries (GO-LSD's teacher), or None. teacher: what the EMA teacher said for the same queries (OD-DETR).
    pooled: joins the union of the layers' matches.
    """

    name: str
    preds: Predictions
    rule: Any = None
    repeat: int = 1
    last: Predictions | None = None
    teacher: Predictions | None = None
    pooled: bool = True


@dataclass(repr=False)
class Detections(_Shapes):
    """The objects found in one image: what `predict` returns and what plots, COCO files and reports are made from.

    boxes: (n, 4) xyxy in pixels of the original image. scores: (n,) in [0, 1], descending. labels: (n,) class indices.
    names: the name of each detection's class. size: (height, width) of the image. image: what was predicted on
    (a path or an (H, W, 3) uint8 array), or None. ids: the dataset's category id of each detection.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    image: Any = None
    ids: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Those whose score is at least `threshold`."""
        keep = (self.scores >= threshold).nonzero()[:, 0]
        rows = keep.tolist()
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            names=[self.names[i] for i in rows] if self.names else [],
            ids=[self.ids[i] for i in rows] if self.ids else [],
        )

    def to_coco(self, image_id: Any = 0) -> list[dict[str, Any]]:
        """COCO result rows: `image_id`, `category_id`, `bbox` (xywh in pixels) and `score`."""
        boxes = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], 1).tolist()
        ids = self.ids or self.labels.tolist()
        return [
            {"image_id": image_id, "category_id": c, "bbox": b, "score": s}
            for c, b, s in zip(ids, boxes, self.scores.tolist(), strict=True)
        ]

    def plot(self, threshold: float = 0.0, ax: Any = None) -> Any:
        """Draw the image with its boxes, names and scores; returns the matplotlib Axes."""
        from deimkit.explore.plots import draw_detections

        return draw_detections(self, threshold=threshold, ax=ax)
