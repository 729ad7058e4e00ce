"""Every recipe builds, is as large as its paper says, and trains: each of its parameters learns from its losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from deimkit import recipes
from deimkit.models.detector import Detector
from deimkit.recipes.recipe import Recipe
from deimkit.recipes.roadmap import ROADMAP
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
