"""A deployed file with the face of a detector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deimkit.data.split import CategoryMap
from deimkit.deploy.session import Session
from deimkit.models.postprocess import detections, select
from deimkit.models.predict import predict
from deimkit.structures import Detections, Predictions


class Served:
    """What `deimkit.load` returns for a deployed file: `predict`, and all that is measured, as of a `Detector`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def categories(self) -> CategoryMap:
        """The classes it detects, with their dataset's ids."""
        return self.session.card.categories

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its input in pixels."""
        return self.session.card.size

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.session.device

    def predict(
        self, source: Any, threshold: float = 0.5, batch: int | None = None
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """The objects in a picture, in many, or in every frame of a video: see `deimkit.models.predict.predict`.

        batch: images at a time, by default those of the file. Its input size is fixed.
        """
        own = self.session.card.batch or 8
        return predict(self, source, threshold=threshold, batch=own if batch is None else batch)

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """The objects in images (B, 3, H, W), bytes or floats in [0, 1], with sizes (B, 2); as `Detector.detect`.

        Where the file has a batch of its own, images are shown to it so many at a time, the last ones with gray beside.
        """
        step = self.session.card.batch or self.session.most or max(len(images), 1)
        found: list[Detections] = []
        for start in range(0, len(images), step):
            found += self._detect(images[start : start + step], sizes[start : start + step])
        return found

    def _detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """The objects in at most as many images as the session takes."""
        card, device = self.session.card, self.session.device
        shown = images.to(device)
        shown = shown.float() if images.is_floating_point() else shown.float().div_(1 / card.scale)
        missing = (card.batch or len(shown)) - len(shown)
        if missing:
            shown = torch.cat([shown, shown.new_full((missing, *shown.shape[1:]), 0.5)])
        given = torch.cat([sizes, sizes.new_ones(missing, 2)]).to(device, torch.int64)
        said = {name: x[: len(images)] for name, x in self.session.run(shown, given).items()}
        if card.postprocess:
            return detections(said["boxes"], said["scores"], said["labels"], sizes, card.categories)
        return select(Predictions(said["logits"], said["boxes"]), sizes.to(device), card.categories, card.top)

    def close(self) -> None:
        """Let go of the runtime's memory."""
        self.session.close()

    def __repr__(self) -> str:
        card = self.session.card
        what, size = card.recipe or "a detector", f"{self.size[0]} x {self.size[1]}"
        return f"Served({what} in {card.precision}, {size}, {self.session.batches}, by {self.session.name})"
