"""D-FINE beside the published code's numbers: names, counts, forwards, denoising, training outputs, GFLOPs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deimkit import recipes
from deimkit.models.detector import Detector
from deimkit.models.groups import Denoise, blocked
from deimkit.recipes.archs import dfine_arch
from deimkit.weights.names import published_name
from tests.parity import (
    close,
    eval_forward,
    filled_detector,
    flops,
    given,
    golden,
    golden_targets,
    their_name,
    training_outputs,
)

SIZES = "nsmlx"
NOT_STORED = ("anchors", "valid_mask", "up", "reg_scale", "num_points_scale")  # tables, not weights
SCALARS = 2  # `up` and `reg_scale` count as parameters there


def filled(size: str, ref: dict[str, Any], **changes: Any) -> Detector:
    return filled_detector(replace(dfine_arch(size), **changes), int(ref["salt"]))


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_published_ones(shared: Path, size: str) -> None:
    theirs = json.loads((shared / "golden" / "keys" / f"dfine_{size}.json").read_text())
    expected = {k: tuple(s) for k, s, _, _ in theirs["keys"] if k.rsplit(".", 1)[-1] not in NOT_STORED}
    model = Detector(dfine_arch(size), 80)
    ours = {published_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    assert ours == expected
    assert sum(p.numel() for p in model.parameters()) + SCALARS == theirs["params_total_train_form"]
    assert sum(p.numel() for p in model.deploy().parameters()) + SCALARS == theirs["params_deploy"]


@pytest.mark.parametrize(
    "name", ["n", pytest.param("s", marks=pytest.mark.slow), pytest.param("l", marks=pytest.mark.slow)]
)
def test_eval_forward(shared: Path, name: str) -> None:
    ref = golden(shared, f"dfine_{name}")
    preds = eval_forward(filled(name[0], ref), ref)
    close(preds.anchors, ref["eval_ref_points_initial"])
    close(preds.edges.flatten(2)[:, :16], ref["eval_pred_corners/slice"])


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


@pytest.mark.parametrize(
    "name", ["n_train", "n_train_zero1", "s_train", pytest.param("l_train", marks=pytest.mark.slow)]
)
def test_training_forward(shared: Path, name: str) -> None:
    ref = golden(shared, f"dfine_{name}")
    targets = golden_targets(ref)
    model = filled(name[0], ref, groups=(given(ref, targets),))
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
    model = filled(name[0], ref, groups=(given(ref, targets),) if len(targets) else (Denoise(),))
    outputs = list(training_outputs(model, targets).values())
    loss = sum(recipes.get(f"deim_dfine_{name[0]}").criterion()(outputs, targets).values())
    assert loss.item() == pytest.approx(float(ref["loss_total"]), rel=1e-6)
    loss.backward()
    norms = {published_name(k): p.grad.norm().item() for k, p in model.named_parameters()}
    theirs = dict(zip(ref["grad/names"].tolist(), np.nan_to_num(ref["grad/norm"]).tolist(), strict=True))
    assert norms == pytest.approx(theirs, rel=1e-4, abs=1e-6)  # bin targets are float32 there


def test_training_forward_with_the_published_seed(shared: Path) -> None:
    ref = golden(shared, "dfine_n_train")
    model = filled("n", ref)
    torch.manual_seed(0)
    outputs = training_outputs(model, golden_targets(ref))
    close(outputs["denoise.final"].preds.boxes, ref["dn_outputs.2.pred_boxes"])


def test_training_forward_without_any_target(shared: Path) -> None:
    ref = golden(shared, "dfine_n_train_zeroall")
    model = filled("n", ref)
    outputs = training_outputs(model, golden_targets(ref))
    for name, ours in outputs.items():
        if name.startswith("denoise."):
            assert ours.preds.boxes.shape == (2, 0, 4)
        else:
            close(ours.preds.boxes, ref[their_name(name, 3) + "pred_boxes"])
    sum(output.preds.logits.sum() for output in outputs.values()).backward()
    assert model.groups[0].embed.weight.grad.abs().sum() == 0  # in the graph, so that DDP waits for nobody


@pytest.mark.parametrize("size, gflops", [("n", 7), ("s", 25), ("m", 57), ("l", 91), ("x", 202)])
def test_gflops_are_the_papers(shared: Path, size: str, gflops: int) -> None:
    """(The published counter's share of layer norms and biases is the 0.3 %.)"""
    theirs = json.loads((shared / "golden" / "keys" / f"dfine_{size}.json").read_text())["calflops_deploy"]["flops"]
    products, whole = flops(Detector(dfine_arch(size), 80).deploy())
    assert round(products / 1e9) == gflops
    assert whole == pytest.approx(theirs, rel=3e-3)
