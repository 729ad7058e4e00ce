"""Which architecture a weight file is of, as far as the file says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deimkit.errors import CheckpointError
from deimkit.models.detector import Arch
from deimkit.recipes.archs import DFINES, dfine_arch
from deimkit.weights.config import arch_of
from deimkit.weights.files import State


def detect_arch(source: State | Mapping[str, Any], activation: str | None = None) -> Arch:
    """The architecture of a weight file, or of a `transformers` config.

    A published file shows its size (n, s, m, l, x) by its shapes, but not its activation, which must be given: "silu"
    for weights trained with DEIM, "relu" for D-FINE's own. A config says everything. Raises `CheckpointError`.
    """
    if not isinstance(source, State):
        return arch_of(source)
    if source.config is not None:
        return arch_of(source.config)
    size = published_size(source.tensors)
    if size is None:
        raise CheckpointError(f"{source.path} has the shapes of no D-FINE ({', '.join(DFINES)}). Name its recipe.")
    if activation is None:
        raise CheckpointError(
            f"{source.path} looks like D-FINE of size {size}, but a published file does not say whether it was trained "
            f"with ReLU or SiLU. Name its recipe: 'dfine_{size}' (ReLU) or 'deim_dfine_{size}' (SiLU)."
        )
    return dfine_arch(size, activation)


def published_size(tensors: Mapping[str, Tensor]) -> str | None:
    """The size of D-FINE that has the stem, levels, width and decoder layers of these tensors; None if none has."""
    stem, first = (tensors.get(f"{part}.conv.weight") for part in ("backbone.stem.stem4", "encoder.input_proj.0"))
    levels = sum(re.fullmatch(r"encoder\.input_proj\.\d+\.conv\.weight", key) is not None for key in tensors)
    layers = sum(re.fullmatch(r"decoder\.dec_score_head\.\d+\.weight", key) is not None for key in tensors)
    for size in DFINES:
        arch = dfine_arch(size)
        shape = (arch.backbone.stem[1], len(arch.backbone.levels), arch.encoder.width, arch.decoder.layers)
        if stem is not None and first is not None and shape == (len(stem), levels, len(first), layers):
            return size
    return None
