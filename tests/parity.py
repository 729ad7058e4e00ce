"""What comparing with the published code's numbers takes: its weights, its images, its targets, its names."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deimkit.models.detector import Arch, Detector
from deimkit.models.groups import Denoise, Noised
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Match, Output, Predictions, Targets
from deimkit.weights.names import published_name


def filled(key: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """The weight that the reference numbers were made with: a normal sample seeded by its name, scaled by its kind."""
    last = key.rsplit(".", 1)[-1]
    z = np.random.Generator(np.random.PCG64(zlib.crc32(f"{key}#{salt}".encode()))).standard_normal(shape)
    if last == "running_mean":
        z = 0.1 * z
    elif last == "running_var":
        z = 1 + 0.1 * abs(z)
    elif len(shape) > 1:
        z = z * np.sqrt((1.2 if len(shape) > 3 else 1.0) / np.prod(shape[1:]))
    elif last in ("weight", "scale"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


def filled_detector(arch: Arch, salt: int) -> Detector:
    """A detector of COCO's classes with those weights, in float64."""
    model = Detector(arch, 80)
    state = {
        name: filled(published_name(name), tuple(value.shape), salt) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.double().eval()


def images(h: int, w: int) -> Tensor:
    """The two images that the reference numbers were made with."""
    rng = np.random.Generator(np.random.PCG64(0))
    coarse, fine = rng.random((2, 3, h // 32, w // 32)), rng.random((2, 3, h, w))
    return torch.from_numpy((0.7 * coarse.repeat(32, 2).repeat(32, 3) + 0.3 * fine).astype(np.float32)).double()


def golden(shared: Path, name: str) -> dict[str, Any]:
    """Reference numbers by name."""
    path = shared / "golden" / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no reference forward {name}")
    return dict(np.load(path))


def close(ours: Tensor, theirs: np.ndarray, tol: float = 1e-5) -> None:
    """Assert that no entry differs by `tol`."""
    assert tuple(ours.shape) == theirs.shape
    difference = (ours.detach() - torch.from_numpy(theirs)).abs().max().item() if ours.numel() else 0.0
    assert difference < tol


def golden_targets(ref: dict[str, Any], prefix: str = "") -> Targets:
    """The targets that the reference numbers were made with."""
    per_image = []
    while f"{prefix}target.{len(per_image)}.boxes" in ref:
        key = f"{prefix}target.{len(per_image)}."
        per_image.append({k: torch.from_numpy(ref[key + k]) for k in ("boxes", "labels")})
    return Targets.from_list(per_image)


@dataclass(frozen=True)
class Given(Denoise):
    """Denoising queries as they were drawn for the reference."""

    noised: Any = None

    def draw(self, targets: Targets, images: int, classes: int, ranks: Ranks = ALONE) -> Noised:
        return self.noised


def given(ref: dict[str, Any], targets: Targets) -> Given:
    """The denoising queries of a reference step."""
    groups, count = int(ref["dn.num_group"]), torch.bincount(targets.image, minlength=2)
    query = [torch.from_numpy(ref[f"dn.positive_idx.{i}"]) for i in range(2)]
    target = [(targets.image == i).nonzero()[:, 0].repeat(groups) for i in range(2)]
    image = torch.arange(2).repeat_interleave(count * groups)
    part = torch.arange(groups).repeat_interleave(2 * int(count.max()))
    labels, boxes = torch.from_numpy(ref["dn.class_ids"]), torch.from_numpy(ref["dn.bbox_unact"])
    return Given(noised=Noised(labels, boxes, part, Match(image, torch.cat(query), torch.cat(target)), groups))


def training_outputs(model: Detector, targets: Targets) -> dict[str, Output]:
    """Outputs in training mode with batch norms that use, and keep, their running statistics (as the reference)."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return {output.name: output for output in model(images(320, 320), targets)}


THEIRS = {"final": "", "pre": "pre_outputs.", "proposals": "enc_aux_outputs.0.", "denoise.pre": "dn_pre_outputs."}


def their_name(name: str, layers: int) -> str:
    """Where the reference numbers of one of our outputs stand."""
    if name.startswith("layer"):
        return f"aux_outputs.{name.removeprefix('layer')}."
    if name.startswith("denoise.") and name != "denoise.pre":
        return f"dn_outputs.{layers - 1 if name == 'denoise.final' else name[-1]}."
    return THEIRS[name]


def one_each(types: tuple[type, ...], model: Detector, x: Tensor) -> int:
    """How many numbers the modules of these types put out for `x`."""
    count = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: count.append(out.numel()))
        for m in model.modules()
        if isinstance(m, types)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return sum(count)


def flops(model: Detector) -> tuple[float, float]:
    """Floating-point operations of one image of 640 x 640: of the products, and as the published counter sums them up.

    Both count a multiply-add as two; that counter leaves out the two products inside self attention, and adds two per
    batch norm and one per activation.
    """
    x = torch.zeros(1, 3, 640, 640)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        rest = 2 * one_each((nn.BatchNorm2d,), model, x) + one_each((nn.ReLU, nn.SiLU, nn.GELU), model, x)
    return products, products + rest


def eval_forward(model: Detector, ref: dict[str, Any]) -> Predictions:
    """What a detector predicts for the reference images, after comparing it and all on the way to it, deployed too."""
    x = images(*ref["image_hw"].tolist())
    with torch.no_grad():
        maps = model.backbone(x)
        encoded = model.encoder(maps)
        memory = model.decoder.remember(encoded)
        start = model.queries(memory.tokens, memory.shapes)
        preds, deployed = model(x), model.deploy()(x)
    for i, (m, e) in enumerate(zip(maps, encoded, strict=True)):
        close(m[:, :8, :6, :6], ref[f"backbone.{i}/slice"])
        close(e[:, :8, :6, :6], ref[f"encoder.{i}/slice"])
    close(start.boxes, ref["dec_in_ref_unact"])
    close(preds.logits, ref["pred_logits"])
    close(preds.boxes, ref["pred_boxes"])
    assert (deployed.logits - preds.logits).abs().max() < 1e-10
    assert (deployed.boxes - preds.boxes).abs().max() < 1e-10
    return preds
