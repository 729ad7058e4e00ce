"""Every recipe builds, is as large as its paper says, and trains: each of its parameters learns from its losses.

Those whose published files were read into reference tables say what these say, number by number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from deimkit import recipes
from deimkit.losses import DDF, FGL, L1, MAL, GIoU
from deimkit.matching import Hungarian
from deimkit.models.detector import Detector
from deimkit.models.refine import FDR
from deimkit.recipes.deim import DEIM
from deimkit.recipes.recipe import Recipe
from deimkit.recipes.roadmap import ROADMAP
from deimkit.recipes.rtdetrv2 import DEIM_RTDETRV2
from deimkit.structures import Targets
from tests.parity import flops

ALL = [recipes.get(name) for name in recipes.names()]


def distinct(found: Iterable[Recipe]) -> dict[str, Recipe]:
    """One recipe for each detector with its losses: what differs beyond that is the clock."""
    kinds: dict[str, Recipe] = {}
    for recipe in found:
        kinds.setdefault(repr((recipe.arch, recipe.losses, recipe.matcher, recipe.share)), recipe)
    return {recipe.name: recipe for recipe in kinds.values()}


KINDS = distinct(ALL)


def count(detector: Detector) -> int:
    return sum(p.numel() for p in detector.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_all_parameters_learn(name: str) -> None:
    """One step at a small size, with an image full of objects and one without any."""
    torch.manual_seed(0)
    recipe = KINDS[name]
    detector = recipe.build(80).train()
    boxes = torch.rand(7, 4) * 0.3 + torch.tensor([0.3, 0.3, 0.1, 0.1])
    targets = Targets(torch.zeros(7, dtype=torch.long), torch.arange(7), boxes)
    terms = recipe.criterion()(detector(torch.rand(2, 3, 96, 160), targets), targets)
    assert {term.split("/")[0] for term in terms} == {loss.name for loss in recipe.losses}
    sum(terms.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    frozen = {n.split(".")[0] for n, p in detector.named_parameters() if not p.requires_grad}
    assert frozen == ({"backbone"} if recipe.arch.backbone.frozen else set())


TABLES = [r.name for family in (DEIM, DEIM_RTDETRV2) for r in family.values()]


def said(shared: Path, name: str) -> dict[str, Any]:
    """What the published file of a recipe with DEIM says."""
    path = shared / "golden" / "schedule" / f"{name.removeprefix('deim_')}.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_losses_and_matcher_are_the_published_ones(shared: Path, name: str) -> None:
    recipe, theirs = recipes.get(name), said(shared, name)["criterion"]
    weights = {"mal": MAL, "bbox": L1, "giou": GIoU, "fgl": FGL, "ddf": DDF}
    names = {"mal": ["mal"], "boxes": ["bbox", "giou"], "local": ["fgl", "ddf"]}
    wanted = {weights[key]: theirs["weight_dict"][f"loss_{key}"] for loss in theirs["losses"] for key in names[loss]}
    assert {type(loss): loss.weight for loss in recipe.losses} == wanted
    assert recipe.losses[0] == MAL(gamma=theirs["gamma"]) and recipe.share == theirs["use_uni_set"]
    cost = theirs["matcher"]
    assert recipe.matcher == Hungarian(
        cost["cost_class"], cost["cost_bbox"], cost["cost_giou"], cost["alpha"], cost["gamma"]
    )


@pytest.mark.parametrize("name", TABLES)
def test_clock_and_augmentation_are_the_published_ones(shared: Path, name: str) -> None:
    recipe, theirs = recipes.get(name), said(shared, name)
    clock, data, schedule = recipe.timeline, theirs["data"], theirs["schedule"]
    assert (clock.warm, clock.dense, clock.augment) == tuple(data["policy_epochs"])
    assert (clock.total, recipe.batch) == (theirs["epochs"], theirs["total_batch_size"])
    assert (clock.lr.floor, clock.lr.warmup) == (schedule["lr_gamma"], schedule["warmup_iter"])
    assert clock.lr.tail_start(clock) == theirs["epochs"] - schedule["no_aug_epoch"]
    assert (clock.ema_decay, clock.ema_ramp) == (theirs["ema"]["decay"], theirs["ema"]["warmups"])
    assert (recipe.augment.mosaic, recipe.augment.mixup) == (data["mosaic_prob"], data["mixup_prob"])
    assert recipe.augment.multi_scale == data["base_size_repeat"] and recipe.optim.clip == theirs["clip_max_norm"]
    assert list(recipe.size) == theirs["eval_spatial_size"]


@pytest.mark.parametrize("name", TABLES)
def test_queries_and_decoder_are_the_published_ones(shared: Path, name: str) -> None:
    arch, theirs = recipes.get(name).arch, said(shared, name)
    (noise,), decoder, actual = arch.groups, arch.decoder, theirs["actual"]
    assert (noise.queries, noise.label_noise, noise.box_noise) == tuple(theirs["denoising"].values())
    assert (decoder.layers, arch.queries.count) == (actual["decoder_num_layers"], actual["num_queries"])
    asked = decoder.layers - 1 if decoder.asked is None else decoder.asked
    assert asked == actual["decoder_eval_idx"] and arch.activation == actual["act_modules"][0].lower()
    given = next(part for kind, part in theirs["architecture"].items() if "Transformer" in kind)
    assert (list(decoder.points), decoder.width) == (given["num_points"], given["hidden_dim"])
    if isinstance(arch.refine, FDR):
        assert (arch.refine.bins, arch.refine.scale) == (given["reg_max"], given["reg_scale"])


@pytest.mark.parametrize("recipe", [r for r in ALL if r.paper and r.paper.params_m], ids=lambda r: r.name)
def test_sizes_are_those_of_the_papers(recipe: Recipe) -> None:
    """The paper's millions lie between what is deployed and what is trained, rounded."""
    detector = recipe.build(80)
    assert round(count(detector.deploy()) / 1e6) <= recipe.paper.params_m <= round(count(detector) / 1e6)


def test_the_roadmap_leads_to_dfine_l() -> None:
    steps = list(ROADMAP.values())
    goal = recipes.dfine_l
    assert replace(steps[-1], name=goal.name, paper=goal.paper) == goal
    changed = [set(recipes.diff(a, b)) - {"name"} for a, b in pairwise(steps)]
    changed = [{field for field in fields if not field.startswith("paper")} for fields in changed]
    assert changed == [
        {"arch.decoder.projected"},
        {"arch.decoder.gated"},
        {"arch.encoder.fusion"},
        {"arch.encoder.fusion.hidden"},
        {"arch.decoder.points"},
        {"timeline.total", "return_to_best"},
        {"arch.refine", "losses"},
        {"losses", "share"},
    ]


@pytest.mark.parametrize("name", ["no_projections", "target_gating", "gelan", "half_gelan", "go_lsd"])
def test_operations_of_the_roadmap_are_the_papers(name: str) -> None:
    """Within one of the GFLOPs that the paper rounds to, deployed; its baseline is counted unfused (next test)."""
    recipe = ROADMAP[f"dfine_table3_{name}"]
    assert flops(recipe.build(80).eval().deploy())[1] / 1e9 == pytest.approx(recipe.paper.gflops, abs=0.75)


def test_operations_of_the_baseline_are_the_papers_before_deployment() -> None:
    recipe = ROADMAP["dfine_table3_baseline"]
    assert flops(recipe.build(80).eval())[1] / 1e9 == pytest.approx(recipe.paper.gflops, abs=1.0)
