"""Which architecture a weight file is of, as far as the file says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deimkit.errors import CheckpointError
from deimkit.models.detector import Arch
from deimkit.recipes.archs import DFINES, HGNETS, RTDETRS, dfine_arch, rtdetrv2_arch
from deimkit.weights.config import arch_of
from deimkit.weights.files import State


def detect_arch(source: State | Mapping[str, Any], activation: str | None = None) -> Arch:
    """The architecture of a weight file, or of a `transformers` config.

    A published file shows its size by its shapes. One of RT-DETRv2 also shows whether it was trained with DEIM; one of
    D-FINE does not, so that its activation must be given: "silu" for weights trained with DEIM, "relu" for D-FINE's
    own. A config says everything. Raises `CheckpointError`.
    """
    if not isinstance(source, State):
        return arch_of(source)
    if source.config is not None:
        return arch_of(source.config)
    name = published_recipe(source.tensors)
    if name is None:
        raise CheckpointError(
            f"{source.path} has the shapes of no D-FINE ({', '.join(DFINES)}) and of no RT-DETRv2 "
            f"({', '.join(RTDETRS)}). Name its recipe."
        )
    deim, _, size = name.rpartition("rtdetrv2_")
    if size != name:
        return rtdetrv2_arch(size, "silu" if deim else "relu")
    size = name.removeprefix("dfine_")
    if activation is None:
        raise CheckpointError(
            f"{source.path} looks like D-FINE of size {size}, but a published file does not say whether it was trained "
            f"with ReLU or SiLU. Name its recipe: 'dfine_{size}' (ReLU) or 'deim_dfine_{size}' (SiLU)."
        )
    return dfine_arch(size, activation)


def published_recipe(tensors: Mapping[str, Tensor]) -> str | None:
    """The recipe whose shapes these tensors have ("dfine_n", "deim_rtdetrv2_r18vd", ...), or None.

    D-FINE has the same shapes with and without DEIM, and goes by its plain name here.
    """
    if "encoder.input_proj.0.conv.weight" not in tensors:
        return None
    if "backbone.conv1.conv1_1.conv.weight" in tensors:
        return _rtdetrv2(tensors)
    return _dfine(tensors) if "backbone.stem.stem4.conv.weight" in tensors else None


def _dfine(tensors: Mapping[str, Tensor]) -> str | None:
    found = (
        len(tensors["backbone.stem.stem4.conv.weight"]),
        _count("encoder.input_proj.", tensors),
        len(tensors["encoder.input_proj.0.conv.weight"]),
        _count("decoder.dec_score_head.", tensors),
    )
    for size in DFINES:
        arch = dfine_arch(size)
        if found == (HGNETS[DFINES[size][0]][0][1], len(arch.backbone.levels), arch.encoder.width, arch.decoder.layers):
            return f"dfine_{size}"
    return None


def _rtdetrv2(tensors: Mapping[str, Tensor]) -> str | None:
    project = tensors["encoder.input_proj.0.conv.weight"]
    fuse = tensors.get("encoder.fpn_blocks.0.conv1.conv.weight", project)
    prefix, activation = ("", "relu")
    if _count("decoder.query_pos_head.layers.", tensors) == 3:  # DEIM's has a layer more
        prefix, activation = ("deim_", "silu")
    blocks = tuple(_count(f"backbone.res_layers.{stage}.blocks.", tensors) for stage in range(4))
    found = (blocks, project.shape[1], len(project), len(fuse), _count("decoder.dec_score_head.", tensors))
    for size in RTDETRS:
        arch = rtdetrv2_arch(size, activation)
        encoder, net = arch.encoder, arch.backbone
        if found == (net.blocks, net.channels[0], encoder.width, encoder.fusion.hidden, arch.decoder.layers):
            return f"{prefix}rtdetrv2_{size}"
    return None


def _count(place: str, tensors: Mapping[str, Tensor]) -> int:
    """How many different numbers follow `place` in the names."""
    return len({key.removeprefix(place).split(".")[0] for key in tensors if key.startswith(place)})
