"""From RT-DETR to D-FINE: the nine steps of D-FINE's Table 3, each the one before it with one thing changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deimkit.losses import DDF, VFL
from deimkit.models.encoder import GELAN, CSPRep
from deimkit.models.refine import LookForwardTwice
from deimkit.recipes.dfine import DFINE
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.rtdetrv2 import rtdetr_losses

GOAL = DFINE["l"]


def with_arch(recipe: Recipe, **parts: Any) -> Recipe:
    """The recipe with other parts of its detector."""
    return replace(recipe, arch=replace(recipe.arch, **parts))


def with_decoder(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other numbers of its decoder."""
    return with_arch(recipe, decoder=replace(recipe.arch.decoder, **fields))


def with_fusion(recipe: Recipe, fusion: GELAN | CSPRep) -> Recipe:
    """The recipe with another way to fuse the encoder's maps."""
    return with_arch(recipe, encoder=replace(recipe.arch.encoder, fusion=fusion))


def without_clean_stage(recipe: Recipe) -> Recipe:
    """The recipe with strong augmentation, and several scales, until its last epoch, and without a clean tail."""
    clock = recipe.timeline
    return replace(recipe, timeline=replace(clock, total=clock.augment), return_to_best=False)


def baseline() -> Recipe:
    """RT-DETR-HGNetv2-L: D-FINE-L's backbone and width under RT-DETR's encoder, decoder, boxes and training."""
    plain = replace(without_clean_stage(GOAL), losses=rtdetr_losses(VFL()), share=False)
    plain = with_arch(with_fusion(plain, CSPRep(256, 3)), refine=LookForwardTwice())
    return with_decoder(plain, points=(4, 4, 4), projected=True, gated=False)


def with_fdr(recipe: Recipe) -> Recipe:
    """The recipe with D-FINE's distributions for boxes, but nothing distilled."""
    losses = tuple(loss for loss in GOAL.losses if not isinstance(loss, DDF))
    return replace(with_arch(recipe, refine=GOAL.arch.refine), losses=losses)


STEPS = {  # what it is called: what it changes; AP, parameters (M), GFLOPs, latency (ms)
    "baseline": (lambda _: baseline(), 53.0, 32, 110, 9.25),
    "no_projections": (lambda step: with_decoder(step, projected=False), 52.4, 32, 97, 8.02),
    "target_gating": (lambda step: with_decoder(step, gated=True), 52.8, 33, 98, 8.15),
    "gelan": (lambda step: with_fusion(step, GELAN(256, 3)), 53.5, 46, 167, 10.69),
    "half_gelan": (lambda step: with_fusion(step, GELAN(128, 3)), 52.8, 31, 91, 8.01),
    "uneven_points": (lambda step: with_decoder(step, points=(3, 6, 3)), 52.9, 31, 91, 7.90),
    "clean_stage": (lambda step: replace(step, timeline=GOAL.timeline, return_to_best=True), 53.0, 31, 91, 7.90),
    "fdr": (with_fdr, 53.5, 31, 91, 8.07),
    "go_lsd": (lambda step: replace(step, losses=GOAL.losses, share=True), 54.0, 31, 91, 8.07),
}


def roadmap() -> Iterator[Recipe]:
    """The recipes of the nine steps."""
    recipe = GOAL
    for name, (change, ap, params, gflops, latency) in STEPS.items():
        claim = Paper("D-FINE Table 3", ap, params_m=params, gflops=gflops, latency_ms=latency)
        recipe = replace(change(recipe), name=f"dfine_table3_{name}", paper=claim)
        yield recipe


ROADMAP = {recipe.name: recipe for recipe in roadmap()}
