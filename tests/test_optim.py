"""Every published parameter in its published group, and an average that is the formula."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deimkit.errors import CheckpointError, RecipeError
from deimkit.recipes.training_tables import TRAINING
from deimkit.training.optim import EMA, KINDS, Group, Optim, parameter_kinds
from deimkit.training.timeline import Timeline

SIZES = ["dfine_n", "dfine_s", "dfine_m", "dfine_l", "dfine_x"]
RTDETRS = [f"rtdetrv2_{depth}" for depth in ("r18vd", "r34vd", "r50vd_m", "r50vd", "r101vd")]


def grow(names: Iterable[str]) -> nn.Module:
    """A model that owns exactly the parameters `names`; where a published name says norm or bn, the module is one."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                is_norm = part.startswith("norm") or part == "bn"
                module.add_module(part, nn.BatchNorm1d(1) if is_norm else nn.Module())
            module = dict(module.named_children())[part]
        if leaf not in dict(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.zeros(1)))
    return root


def published_groups(shared: Path, model: str) -> list[dict[str, Any]]:
    """The groups of a published DEIM run, those without a parameter left out."""
    optimizer = json.loads((shared / "golden/schedule" / f"{model}.json").read_text())["optimizer"]
    return [group for group in optimizer["param_groups"] if group["names"]]


def as_sets(groups: list[dict[str, Any]], key: str) -> list[tuple[float, float, set[str]]]:
    """(rate, weight decay, names) of groups."""
    return [(group["lr"], group["weight_decay"], set(group[key])) for group in groups]


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("model", SIZES)
def test_groups_of_deim_dfine_are_the_published_ones(shared: Path, model: str) -> None:
    """The same groups in the same order, with the same rate, decay and parameters."""
    golden = published_groups(shared, model)
    fake = grow(name for group in golden for name in group["names"])
    groups = TRAINING[f"deim_{model}"].optim().parameter_groups(fake)
    assert as_sets(groups, "param_names") == as_sets(golden, "names")
    built = TRAINING[f"deim_{model}"].optim().build(fake)
    assert [len(g["params"]) for g in built.param_groups] == [g["n_tensors"] for g in golden]
    assert [g["lr"] for g in built.param_groups] == [g["lr"] for g in golden]


@pytest.mark.parametrize("model", RTDETRS)
def test_parameters_of_deim_rtdetr_learn_as_published(shared: Path, model: str) -> None:
    golden = {n: (g["lr"], g["weight_decay"]) for g in published_groups(shared, model) for n in g["names"]}
    groups = TRAINING[f"deim_{model}"].optim().parameter_groups(grow(golden))
    assert {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]} == golden


#                     backbone           its norms         norms        biases            weights
LEARNS = {
    "dfine_n": [(4e-4, 1e-4), (4e-4, 1e-4), (8e-4, 0), (8e-4, 0), (8e-4, 1e-4)],
    "dfine_s": [(1e-4, 1e-4), (1e-4, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4)],
    "dfine_m": [(2e-5, 1e-4), (2e-5, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4)],
    "dfine_l": [(1.25e-5, 1.25e-4), None, (2.5e-4, 0), (2.5e-4, 1.25e-4), (2.5e-4, 1.25e-4)],
    "dfine_x": [(2.5e-6, 1.25e-4), None, (2.5e-4, 0), (2.5e-4, 1.25e-4), (2.5e-4, 1.25e-4)],
    "deim_dfine_n": [(4e-4, 1e-4), (4e-4, 1e-4), (8e-4, 0), (8e-4, 0), (8e-4, 1e-4)],
    "deim_dfine_s": [(2e-4, 1e-4), (4e-4, 0), (4e-4, 0), (4e-4, 1e-4), (4e-4, 1e-4)],
    "deim_dfine_m": [(4e-5, 1e-4), (4e-4, 0), (4e-4, 0), (4e-4, 1e-4), (4e-4, 1e-4)],
    "deim_dfine_l": [(2.5e-5, 1.25e-4), (2.5e-5, 1.25e-4), (5e-4, 0), (5e-4, 1.25e-4), (5e-4, 1.25e-4)],
    "deim_dfine_x": [(5e-6, 1.25e-4), (5e-6, 1.25e-4), (5e-4, 0), (5e-4, 1.25e-4), (5e-4, 1.25e-4)],
    "rtdetrv2_r18vd": [(1e-4, 1e-4), (1e-4, 0), (1e-4, 0), (1e-4, 1e-4), (1e-4, 1e-4)],
    "rtdetrv2_r34vd": [(5e-5, 1e-4), (5e-5, 0), (1e-4, 0), (1e-4, 0), (1e-4, 1e-4)],
    "rtdetrv2_r50vd_m": [(1e-5, 1e-4), None, (1e-4, 0), (1e-4, 1e-4), (1e-4, 1e-4)],
    "rtdetrv2_r50vd": [(1e-5, 1e-4), None, (1e-4, 0), (1e-4, 1e-4), (1e-4, 1e-4)],
    "rtdetrv2_r101vd": [(1e-6, 1e-4), None, (1e-4, 0), (1e-4, 1e-4), (1e-4, 1e-4)],
    "deim_rtdetrv2_r18vd": [(2e-4, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4), (2e-4, 1e-4)],
    "deim_rtdetrv2_r34vd": [(1e-4, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4), (2e-4, 1e-4)],
    "deim_rtdetrv2_r50vd_m": [(2e-5, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4), (2e-4, 1e-4)],
    "deim_rtdetrv2_r50vd": [(2e-5, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4), (2e-4, 1e-4)],
    "deim_rtdetrv2_r101vd": [(2e-6, 1e-4), (2e-4, 0), (2e-4, 0), (2e-4, 1e-4), (2e-4, 1e-4)],
}
ONE_OF_EACH = [
    "backbone.conv.weight",
    "backbone.bn.weight",
    "encoder.norm.bias",
    "decoder.out.bias",
    "decoder.out.weight",
]


@pytest.mark.parametrize("name", TRAINING)
def test_every_kind_learns_as_the_published_files_say(name: str) -> None:
    model = grow(ONE_OF_EACH)
    frozen = LEARNS[name][1] is None
    model.backbone.bn.requires_grad_(not frozen)  # type: ignore[operator, union-attr]
    groups = TRAINING[name].optim().parameter_groups(model)
    learns = {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}
    assert [learns.get(n) for n in ONE_OF_EACH] == LEARNS[name]


def test_tables_cover_the_same_recipes() -> None:
    assert LEARNS.keys() == TRAINING.keys()


@pytest.mark.parametrize("name", TRAINING)
def test_norms_of_the_backbone_as_they_were_meant(name: str) -> None:
    """At the backbone's rate, without decay, and nothing else changes."""
    model = grow(ONE_OF_EACH)
    optim = TRAINING[name].optim()
    before, after = (
        {n: (g["lr"], g["weight_decay"]) for g in o.parameter_groups(model) for n in g["param_names"]}
        for o in (optim, replace(optim, backbone_norms_as_published=False))
    )
    assert after == before | {n: (optim.backbone_lr, 0.0) for n in after if n.startswith("backbone.bn")}


def test_kinds_follow_types_and_not_names() -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    model.norm_of_something = nn.Linear(4, 4)
    model.head = nn.Sequential(nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Embedding(3, 4))
    kinds = dict(parameter_kinds(model))
    assert kinds == {
        "backbone.0.weight": "backbone",
        "backbone.0.bias": "backbone",
        "backbone.1.weight": "backbone_norm",
        "backbone.1.bias": "backbone_norm",
        "backbone.2.weight": "backbone_norm",
        "backbone.2.bias": "backbone_norm",
        "norm_of_something.weight": "weight",
        "norm_of_something.bias": "bias",
        "head.0.weight": "norm",
        "head.0.bias": "norm",
        "head.1.in_proj_weight": "weight",
        "head.1.in_proj_bias": "bias",
        "head.1.out_proj.weight": "weight",
        "head.1.out_proj.bias": "bias",
        "head.2.weight": "weight",
    }
    assert set(kinds.values()) == set(KINDS)


def test_shared_parameters_are_trained_once_and_frozen_ones_never() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    groups = Optim().parameter_groups(model)
    assert [g["param_names"] for g in groups] == [["0.weight", "1.bias"]]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing can be trained"):
        Optim().build(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"lr": -1.0}, "must be >= 0"),
        ({"clip": -0.1}, "must be >= 0"),
        ({"groups": (Group(("norm",)),)}, "exactly once; got norm"),
        ({"groups": (Group(KINDS), Group(("norm",)))}, "exactly once"),
    ],
)
def test_impossible_optimisers_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Optim(**fields)


def test_rates_follow_the_batch() -> None:
    doubled = TRAINING["deim_dfine_l"].optim().scaled_to_batch(32, 64)
    assert (doubled.lr, doubled.backbone_lr, doubled.weight_decay) == (1e-3, 5e-5, 1.25e-4)
    assert Optim().scaled_to_batch(32, 32) == Optim().scaled_to_batch(32, 4) == Optim()
    with pytest.raises(RecipeError, match="at least one image"):
        Optim().scaled_to_batch(32, 0)


def test_an_optimiser_is_rebuilt_by_its_repr() -> None:
    for row in TRAINING.values():
        assert eval(repr(row.optim())) == row.optim()


def test_one_step_by_hand() -> None:
    """AdamW's first step moves every weight by the rate against the sign of its gradient, after decaying it."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    optimizer = Optim(lr=0.1, weight_decay=0.5).build(model)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[1 - 0.1 * 0.5 - 0.1]]))


@pytest.mark.parametrize("model", SIZES)
def test_groups_of_our_detectors_are_the_published_ones(shared: Path, model: str) -> None:
    """The same for the real thing: every parameter of the detector, under its published name."""
    from deimkit.models.detector import Detector
    from deimkit.recipes.archs import dfine_arch
    from deimkit.weights.names import published_name

    golden = published_groups(shared, model)
    detector = Detector(dfine_arch(model[-1]), 80)
    groups = TRAINING[f"deim_{model}"].optim().parameter_groups(detector)
    ours = [g | {"names": [published_name(name) for name in g["param_names"]]} for g in groups]
    assert as_sets(ours, "names") == as_sets(golden, "names")


@pytest.mark.gpu
def test_fused_on_a_gpu() -> None:
    optimizer = Optim().build(nn.Linear(2, 2).cuda())
    assert optimizer.defaults["fused"]


# ------------------------------------------------------------------------------------------------------- EMA


def walked(dtype: torch.dtype, steps: int, decay: float, ramp: float) -> tuple[EMA, list[dict[str, torch.Tensor]]]:
    """An EMA after `steps` random moves of a model with batch norm, and the model's state before and after each."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).to(dtype)
    ema, history = EMA(model, decay, ramp), []
    for step in range(steps + 1):
        if step:
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor.add_(torch.randn_like(tensor.float()).to(tensor.dtype))
            ema.update(model)
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return ema, history


@pytest.mark.parametrize("ramp", [0, 3, 1000])
def test_ema_is_the_formula(ramp: float) -> None:
    ema, history = walked(torch.float64, 20, 0.9, ramp)
    for name, average in ema.model.state_dict().items():
        expected = history[0][name]
        if expected.is_floating_point():
            for t, state in enumerate(history[1:], 1):
                m = 0.9 * (1 - math.exp(-t / ramp)) if ramp else 0.9
                expected = m * expected + (1 - m) * state[name]
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
    assert ema.updates == 20
    assert int(ema.model[1].num_batches_tracked) == 0 != int(history[-1]["1.num_batches_tracked"])


def test_ema_of_a_half_precision_model_is_kept_in_float32() -> None:
    """Steps of 1e-4 vanish beside 1 in bfloat16; in float32 they add up."""
    model = nn.Linear(1, 1).bfloat16()
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.9999, ramp=0)
    nn.init.zeros_(model.weight)
    for _ in range(100):
        ema.update(model)
    assert {p.dtype for p in ema.model.parameters()} == {torch.float32}
    assert float(ema.model.weight) == pytest.approx(0.9999**100, abs=1e-5)


def test_ema_is_a_model_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    ema = EMA(model)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters()) and all(p.requires_grad for p in model.parameters())
    shadow, live = ({p.data_ptr() for p in m.parameters()} for m in (ema.model, model))
    assert not shadow & live


def test_ema_continues_where_it_stopped() -> None:
    model = nn.Linear(2, 2)
    first = EMA(model, 0.9, 5)
    first.update(model)
    second = EMA(nn.Linear(2, 2), 0.9, 5)
    second.load_state_dict(first.state_dict())
    nn.init.ones_(model.weight)
    for ema in (first, second):
        ema.update(model)
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)
    assert second.updates == 2
    with pytest.raises(CheckpointError, match="updates is missing"):
        second.load_state_dict({"shadow": model.state_dict()})


def test_ema_of_a_timeline() -> None:
    clock = Timeline().scaled_to(12, 100)
    ema = EMA.of(nn.Linear(1, 1), clock)
    assert (ema.decay, ema.ramp) == (clock.ema_decay, clock.ema_ramp)


def test_a_state_goes_on_as_is_right_for_the_device() -> None:
    """What a fused optimiser wrote, as on a GPU, is taken up by one that is not, and the other way round."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    plain, fused = Optim().build(a), Optim().build(b)
    for group in fused.param_groups:
        group["fused"] = True  # as `build` does where all is on a GPU
    fused.defaults["fused"] = True
    for model, optimizer in ((a, plain), (b, fused)):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    for source, target, own in ((plain, fused, True), (fused, plain, None)):
        target.load_state_dict(deepcopy(source.state_dict()))
        assert [group["fused"] for group in target.param_groups] == [own] * len(target.param_groups)
        target.step()
    steps = [float(state["step"]) for optimizer in (plain, fused) for state in optimizer.state.values()]
    assert steps == [3.0, 3.0, 2.0, 2.0], "each took up what the other had, and went on"
