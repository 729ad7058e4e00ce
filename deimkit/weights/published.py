"""A detector as the published code would have saved it: its names, and the constants it keeps beside the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deimkit.models.detector import Arch, Detector
from deimkit.models.queries import cell_anchors
from deimkit.models.refine import FDR
from deimkit.weights.files import replacing
from deimkit.weights.names import published_name


def constants(arch: Arch) -> dict[str, Tensor]:
    """What published files store although the architecture says it: W(n)'s parameters, 1 / the points of each level."""
    share = torch.tensor([1 / points for points in arch.decoder.points for _ in range(points)])
    layers = [f"decoder.decoder.layers.{i}.cross_attn.num_points_scale" for i in range(arch.decoder.layers)]
    found = dict.fromkeys(layers, share)
    if isinstance(arch.refine, FDR):
        up, scale = torch.tensor([arch.refine.up]), torch.tensor([arch.refine.scale])
        scale = scale.long() if arch.refine.scale == int(arch.refine.scale) else scale  # the configs say 4, not 4.0
        found |= {f"{place}.up": up for place in ("decoder", "decoder.decoder")}
        found |= {f"{place}.reg_scale": scale for place in ("decoder", "decoder.decoder")}
    return found


def published_state(detector: Detector, size: tuple[int, int] = (640, 640)) -> dict[str, Tensor]:
    """The detector's weights under exactly the names, and with the shapes, of the published state dict.

    size: the (height, width) that the stored anchors are for. Copies on the CPU.
    """
    shapes = tuple((size[0] // stride, size[1] // stride) for stride in detector.arch.backbone.strides)
    anchors, valid = cell_anchors(shapes, torch.device("cpu"), torch.float32)  # (L, 4), (L, 1)
    learned = {published_name(key): tensor for key, tensor in detector.state_dict().items()}
    computed = constants(detector.arch) | {"decoder.anchors": anchors[None], "decoder.valid_mask": valid[None]}
    return {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in (learned | computed).items()
    }


def save_published(detector: Detector, path: str | Path, size: tuple[int, int] = (640, 640)) -> None:
    """Write a .pth that the published code loads: `{"model": state dict}`, the form it resumes, tunes and exports from.

    There is no `ema` entry: `published_state` is what the detector is now, and readers that look for `ema` first find
    `model` next. Raises OSError if the file cannot be written; a file that was there before is then untouched.
    """
    with replacing(Path(path)) as partial:
        torch.save({"model": published_state(detector, size)}, partial)
