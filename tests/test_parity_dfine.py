"""D-FINE beside the published code's numbers: names, counts, forwards, denoising, training outputs, GFLOPs."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deimkit import recipes
from deimkit.models.detector import PUBLISHED, Detector
from deimkit.models.groups import Denoise, Noised, blocked
from deimkit.recipes.archs import dfine_arch
from deimkit.structures import Match, Output, Targets

SIZES = "nsmlx"
NOT_STORED = ("anchors", "valid_mask", "up", "reg_scale", "num_points_scale")  # tables, not weights
SCALARS = 2  # `up` and `reg_scale` count as parameters there


def published(name: str) -> str:
    return next((theirs + name.removeprefix(ours) for ours, theirs in PUBLISHED if name.startswith(ours)), name)


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


def filled_detector(size: str, salt: int, **changes: Any) -> Detector:
    model = Detector(replace(dfine_arch(size), **changes), 80)
    state = {
        name: filled(published(name), tuple(value.shape), salt) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.double().eval()


def images(h: int, w: int) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(0))
    coarse, fine = rng.random((2, 3, h // 32, w // 32)), rng.random((2, 3, h, w))
    return torch.from_numpy((0.7 * coarse.repeat(32, 2).repeat(32, 3) + 0.3 * fine).astype(np.float32)).double()


def golden(shared: Path, name: str) -> dict[str, Any]:
    path = shared / "golden" / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no reference forward {name}")
    return dict(np.load(path))


def close(ours: Tensor, theirs: np.ndarray, tol: float = 1e-5) -> None:
    assert tuple(ours.shape) == theirs.shape
    difference = (ours.detach() - torch.from_numpy(theirs)).abs().max().item() if ours.numel() else 0.0
    assert difference < tol


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_published_ones(shared: Path, size: str) -> None:
    theirs = json.loads((shared / "golden" / "keys" / f"dfine_{size}.json").read_text())
    expected = {k: tuple(s) for k, s, _, _ in theirs["keys"] if k.rsplit(".", 1)[-1] not in NOT_STORED}
    model = Detector(dfine_arch(size), 80)
    ours = {published(k): tuple(v.shape) for k, v in model.state_dict().items()}
    assert ours == expected
    assert sum(p.numel() for p in model.parameters()) + SCALARS == theirs["params_total_train_form"]
    assert sum(p.numel() for p in model.deploy().parameters()) + SCALARS == theirs["params_deploy"]


@pytest.mark.parametrize(
    "name", ["n", pytest.param("s", marks=pytest.mark.slow), pytest.param("l", marks=pytest.mark.slow)]
)
def test_eval_forward(shared: Path, name: str) -> None:
    ref = golden(shared, f"dfine_{name}")
    model = filled_detector(name[0], int(ref["salt"]))
    x = images(*ref["image_hw"].tolist())
    with torch.no_grad():
        maps = model.backbone(x)
        encoded = model.encoder(maps)
        memory = model.decoder.remember(encoded)
        start = model.queries(memory.tokens, memory.shapes)
        preds = model(x)
        deployed = model.deploy()(x)
    for i, (m, e) in enumerate(zip(maps, encoded, strict=True)):
        close(m[:, :8, :6, :6], ref[f"backbone.{i}/slice"])
        close(e[:, :8, :6, :6], ref[f"encoder.{i}/slice"])
    close(start.boxes, ref["dec_in_ref_unact"])
    close(preds.anchors, ref["eval_ref_points_initial"])
    close(preds.edges.flatten(2)[:, :16], ref["eval_pred_corners/slice"])
    close(preds.logits, ref["pred_logits"])
    close(preds.boxes, ref["pred_boxes"])
    assert (deployed.logits - preds.logits).abs().max() < 1e-10
    assert (deployed.boxes - preds.boxes).abs().max() < 1e-10


def golden_targets(ref: dict[str, Any], prefix: str = "") -> Targets:
    per_image = []
    while f"{prefix}target.{len(per_image)}.boxes" in ref:
        key = f"{prefix}target.{len(per_image)}."
        per_image.append({k: torch.from_numpy(ref[key + k]) for k in ("boxes", "labels")})
    return Targets.from_list(per_image)


@pytest.mark.parametrize("case", "abcd")
def test_denoising_draws_what_the_published_code_draws(shared: Path, case: str) -> None:
    everything = np.load(shared / "golden" / "losses" / "denoising.npz")
    ref = {k.removeprefix(case + "/"): everything[k] for k in everything if k.startswith(case + "/")}
    targets, (length, own) = golden_targets(ref), ref["num_split"].tolist()
    own -= length * (own == ref["attn_mask"].shape[0])
    torch.manual_seed(0)
    noised = Denoise(100).draw(targets, len(ref["class_ids"]), 80)
    assert noised.groups == int(ref["num_group"])
    assert torch.equal(noised.labels, torch.from_numpy(ref["class_ids"]).long())
    close(noised.boxes, ref["bbox_unact"])

    for image in range(len(ref["class_ids"])):
        mine = noised.match.image == image
        assert noised.match.query[mine].tolist() == ref[f"positive_idx.{image}"].tolist()
        rows = (targets.image == image).nonzero()[:, 0]
        assert noised.match.target[mine].tolist() == rows.repeat(noised.groups).tolist()

    group = Detector(dfine_arch("tiny"), 80).groups[0](targets, len(ref["class_ids"]))
    group.part = noised.part
    mask = blocked(own, [group])  # ours stand before the group's queries, theirs behind
    assert torch.equal(mask.roll((length, length), (0, 1)), torch.from_numpy(ref["attn_mask"]))


@dataclass(frozen=True)
class Given(Denoise):
    """Denoising queries as they were drawn for the reference."""

    noised: Any = None

    def draw(self, targets: Targets, images: int, classes: int) -> Noised:
        return self.noised


def given(ref: dict[str, Any], targets: Targets) -> Given:
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
    if name.startswith("layer"):
        return f"aux_outputs.{name.removeprefix('layer')}."
    if name.startswith("denoise.") and name != "denoise.pre":
        return f"dn_outputs.{layers - 1 if name == 'denoise.final' else name[-1]}."
    return THEIRS[name]


@pytest.mark.parametrize(
    "name", ["n_train", "n_train_zero1", "s_train", pytest.param("l_train", marks=pytest.mark.slow)]
)
def test_training_forward(shared: Path, name: str) -> None:
    ref = golden(shared, f"dfine_{name}")
    targets = golden_targets(ref)
    model = filled_detector(name[0], int(ref["salt"]), groups=(given(ref, targets),))
    outputs = training_outputs(model, targets)
    layers = model.arch.decoder.layers
    assert len(outputs) == 2 * layers + 3
    for ours in outputs.values():
        theirs = their_name(ours.name, layers)
        close(ours.preds.logits, ref[theirs + "pred_logits"])
        close(ours.preds.boxes, ref[theirs + "pred_boxes"])
        if ours.preds.edges is not None:
            close(ours.preds.edges.flatten(2), ref[theirs + "pred_corners"])
            close(ours.preds.anchors, ref[theirs + "ref_points"])
        assert (ours.last is not None) == ("layer" in ours.name)
        assert ours.pooled == (ours.rule is None) == (not ours.name.startswith("denoise."))


@pytest.mark.parametrize(
    "name", ["n_train", "n_train_zero1", "n_train_zeroall", "s_train", pytest.param("l_train", marks=pytest.mark.slow)]
)
def test_training_step_gives_the_published_loss_and_gradients(shared: Path, name: str) -> None:
    """The whole of a step, every detach included: the norm of each parameter's gradient."""
    ref = golden(shared, f"dfine_{name}")
    targets = golden_targets(ref)
    model = filled_detector(name[0], int(ref["salt"]), groups=(given(ref, targets),) if len(targets) else (Denoise(),))
    outputs = list(training_outputs(model, targets).values())
    loss = sum(recipes.get(f"deim_dfine_{name[0]}").criterion()(outputs, targets).values())
    assert loss.item() == pytest.approx(float(ref["loss_total"]), rel=1e-6)
    loss.backward()
    norms = {published(k): p.grad.norm().item() for k, p in model.named_parameters()}
    theirs = dict(zip(ref["grad/names"].tolist(), np.nan_to_num(ref["grad/norm"]).tolist(), strict=True))
    assert norms == pytest.approx(theirs, rel=1e-4, abs=1e-6)  # bin targets are float32 there


def test_training_forward_with_the_published_seed(shared: Path) -> None:
    ref = golden(shared, "dfine_n_train")
    model = filled_detector("n", int(ref["salt"]))
    torch.manual_seed(0)
    outputs = training_outputs(model, golden_targets(ref))
    close(outputs["denoise.final"].preds.boxes, ref["dn_outputs.2.pred_boxes"])


def test_training_forward_without_any_target(shared: Path) -> None:
    ref = golden(shared, "dfine_n_train_zeroall")
    model = filled_detector("n", int(ref["salt"]))
    outputs = training_outputs(model, golden_targets(ref))
    for name, ours in outputs.items():
        if name.startswith("denoise."):
            assert ours.preds.boxes.shape == (2, 0, 4)
        else:
            close(ours.preds.boxes, ref[their_name(name, 3) + "pred_boxes"])
    sum(output.preds.logits.sum() for output in outputs.values()).backward()
    assert model.groups[0].embed.weight.grad.abs().sum() == 0  # in the graph, so that DDP waits for nobody


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


@pytest.mark.parametrize("size, gflops", [("n", 7), ("s", 25), ("m", 57), ("l", 91), ("x", 202)])
def test_gflops_are_the_papers(shared: Path, size: str, gflops: int) -> None:
    """At 640 x 640. Both count a multiply-add as two; the published counter leaves out the two products inside self
    attention, and adds two per batch norm and one per activation (and some for layer norms and biases: the 0.3 %).
    """
    theirs = json.loads((shared / "golden" / "keys" / f"dfine_{size}.json").read_text())["calflops_deploy"]["flops"]
    model, x = Detector(dfine_arch(size), 80).deploy(), torch.zeros(1, 3, 640, 640)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        rest = 2 * one_each((nn.BatchNorm2d,), model, x) + one_each((nn.ReLU, nn.SiLU, nn.GELU), model, x)
    assert round(products / 1e9) == gflops
    assert products + rest == pytest.approx(theirs, rel=3e-3)
