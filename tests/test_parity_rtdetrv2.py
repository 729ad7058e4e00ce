"""RT-DETRv2 beside the published code's numbers: names, counts, forwards, training steps, GFLOPs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deimkit import recipes
from deimkit.models.attention import sample
from deimkit.models.detector import Detector
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.recipes.rtdetrv2 import RTDETRV2
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

NOT_STORED = ("anchors", "valid_mask", "num_points_scale")  # tables, not weights


def filled(size: str, ref: dict[str, Any], **changes: Any) -> Detector:
    return filled_detector(replace(rtdetrv2_arch(size), **changes), int(ref["salt"]))


@pytest.mark.parametrize("size", RTDETRV2)
def test_names_and_shapes_are_the_published_ones(shared: Path, size: str) -> None:
    theirs = json.loads((shared / "golden" / "keys" / f"rtdetrv2_{size}.json").read_text())
    expected = {k: tuple(s) for k, s, _, _ in theirs["keys"] if k.rsplit(".", 1)[-1] not in NOT_STORED}
    model = Detector(rtdetrv2_arch(size), 80)
    assert {published_name(k): tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == theirs["params_total_train_form"]
    assert sum(p.numel() for p in model.deploy().parameters()) == theirs["params_deploy"]


@pytest.mark.parametrize("size", ["r18vd", pytest.param("r50vd", marks=pytest.mark.slow)])
def test_eval_forward(shared: Path, size: str) -> None:
    ref = golden(shared, f"rtdetrv2_{size}")
    eval_forward(filled(size, ref), ref)


@pytest.mark.parametrize("name", ["train", "train_zero1"])
def test_training_step(shared: Path, name: str) -> None:
    """Outputs, the loss, and the norm of each parameter's gradient: every detach, and looking forward twice."""
    ref = golden(shared, f"rtdetrv2_r18vd_{name}")
    targets = golden_targets(ref)
    model = filled("r18vd", ref, groups=(given(ref, targets),))
    outputs = training_outputs(model, targets)
    layers = model.arch.decoder.layers
    assert len(outputs) == 2 * layers + 1
    for ours in outputs.values():
        theirs = their_name(ours.name, layers)
        close(ours.preds.logits, ref[theirs + "pred_logits"])
        close(ours.preds.boxes, ref[theirs + "pred_boxes"])
    terms = recipes.get("deim_rtdetrv2_r18vd").criterion()(list(outputs.values()), targets)
    assert len(terms) == 3 * (2 * layers + 1)
    loss = sum(terms.values())
    assert loss.item() == pytest.approx(float(ref["loss_total"]), rel=1e-6)
    loss.backward()
    norms = {published_name(k): p.grad.norm().item() for k, p in model.named_parameters()}
    theirs = dict(zip(ref["grad/names"].tolist(), np.nan_to_num(ref["grad/norm"]).tolist(), strict=True))
    assert norms == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "size, gflops, papers",
    [
        ("r18vd", 60, (20, 60)),
        ("r34vd", 92, (31, 92)),
        ("r50vd_m", 100, (33, 100)),
        ("r50vd", 133, (42, 136)),
        ("r101vd", 251, (76, 259)),
    ],
)
def test_gflops_are_the_published_codes(shared: Path, size: str, gflops: int, papers: tuple[int, int]) -> None:
    """Deployed, at 640 x 640. The papers' numbers for the two large ones are nearer to the unfused model's.

    The published code predicts a box for each of the 8,400 cells, and ours for the 300 that it takes.
    """
    spared = 2 * (8400 - 300) * (256 * 256 + 256 * 256 + 256 * 4)
    theirs = json.loads((shared / "golden" / "keys" / f"rtdetrv2_{size}.json").read_text())
    model = Detector(rtdetrv2_arch(size), 80)
    _, whole = flops(model.deploy())
    assert whole + spared == pytest.approx(theirs["calflops_deploy"]["flops"], rel=3e-3)
    assert (whole + spared) / 1e9 == pytest.approx(gflops, abs=0.6)
    paper = recipes.get(f"rtdetrv2_{size}").paper
    assert (paper.params_m, paper.gflops) == papers
    assert int(sum(p.numel() for p in model.parameters()) / 1e6) == papers[0]


def test_the_plain_form_asks_the_layer_that_it_was_published_to() -> None:
    """r50vd_m is built with six layers; only the third answers in evaluation, and it is the one before `final`."""
    arch = rtdetrv2_arch("r50vd_m", "relu")
    assert (arch.decoder.layers, arch.decoder.asked, arch.backbone.frozen) == (6, 2, True)
    small = replace(arch, backbone=rtdetrv2_arch("r18vd").backbone, groups=())
    model = Detector(small, 3)
    torch.nn.init.normal_(model.refine.box[2].layers[-1].weight)
    x = torch.rand(1, 3, 64, 64)
    before = model.eval()(x).boxes
    torch.nn.init.normal_(model.refine.box[5].layers[-1].weight)
    torch.testing.assert_close(model(x).boxes, before)
    torch.nn.init.normal_(model.refine.box[2].layers[-1].weight)
    assert not torch.equal(model(x).boxes, before)


def test_discrete_sampling_reads_one_cell() -> None:
    """By hand: the cell is trunc(location * size + 0.5), the last one beyond the border."""
    value = torch.arange(12.0).reshape(1, 1, 3, 4)  # one head, 3 x 4 cells
    at = torch.tensor([[0.0, 0.0], [0.2, 0.1], [0.5, 0.5], [0.9, 0.2], [1.3, -0.4]])
    expected = [0.0, 0 * 4 + 1.0, 2 * 4 + 2.0, 1 * 4 + 3.0, 0 * 4 + 3.0]
    found = sample([value], at[None, :, None, None], torch.ones(1, 5, 1, 1), (1,), discrete=True)
    assert found[0, :, 0].tolist() == expected


def test_discrete_points_do_not_learn() -> None:
    arch = rtdetrv2_arch("r18vd")
    model = Detector(replace(arch, decoder=replace(arch.decoder, discrete=True)), 2)
    assert not any(layer.cross_attn.sampling_offsets.weight.requires_grad for layer in model.decoder.layers)
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 64, 96)).boxes).all()
