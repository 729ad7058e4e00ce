"""The papers' ablations: each row of a table is its parent with one thing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deimkit.losses import DDF, MAL, VFL
from deimkit.models.refine import FDR
from deimkit.recipes.deim import DEIM
from deimkit.recipes.dfine import DFINE, dfine_losses
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.rtdetrv2 import DEIM_RTDETRV2, rtdetr_losses

AP = ("ap", "ap50", "ap75", "aps", "apm", "apl")
DEIM_R50, DEIM_R101, DEIM_L, DFINE_L = DEIM_RTDETRV2["r50vd"], DEIM_RTDETRV2["r101vd"], DEIM["l"], DFINE["l"]


def lasting(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe for another length, counted as in its paper row: without the clean tail for D-FINE."""
    clock = recipe.timeline
    assert recipe.paper is not None and recipe.paper.epochs, "a published recipe says its epochs"
    total = round(epochs * clock.total / recipe.paper.epochs)
    return replace(recipe, timeline=clock.scaled_to(total, clock.steps_per_epoch))


def as_in_the_paper(size: str) -> Recipe:
    """D-FINE of a size with the clean stage of its paper: of 2 or 4 epochs, where the published files say 8 or 12."""
    recipe = DFINE[size]
    clock, clean = recipe.timeline, 2 if size in "lx" else 4
    claim = Paper("D-FINE Table 6", epochs=clock.augment)
    clock = replace(clock, total=clock.augment + clean)
    return replace(recipe, name=f"dfine_table6_{size}", timeline=clock, paper=claim)


def named(recipe: Recipe, name: str, table: str, *ap: float) -> Recipe:
    """The recipe under another name and with its row of a table: AP, and as far as given AP50, AP75, APs, APm, APl."""
    claims: dict[str, Any] = dict(zip(AP, ap, strict=False))
    return replace(recipe, name=name, paper=Paper(table, **claims))


def dense(recipe: Recipe, mosaic: float, mixup: float) -> Recipe:
    """The recipe with other probabilities of mosaic and MixUp."""
    return replace(recipe, augment=replace(recipe.augment, mosaic=mosaic, mixup=mixup))


def with_distributions(**fields: Any) -> Recipe:
    """D-FINE-L without GO-LSD and with other fields of its `FDR`."""
    assert isinstance(DFINE_L.arch.refine, FDR)
    arch = replace(DFINE_L.arch, refine=replace(DFINE_L.arch.refine, **fields))
    losses = tuple(loss for loss in dfine_losses(VFL(), arch) if not isinstance(loss, DDF))
    return replace(DFINE_L, arch=arch, losses=losses, share=False)


def with_temperature(T: float) -> Recipe:
    """D-FINE-L with another temperature of the distillation."""
    losses = tuple(replace(loss, T=T) if isinstance(loss, DDF) else loss for loss in DFINE_L.losses)
    return replace(DFINE_L, losses=losses)


# fmt: off
SHORTER = {  # 36 epochs
    "r50vd": (53.9, 71.7, 58.6, 36.7, 58.9, 70.9),
    "r101vd": (55.2, 73.3, 59.9, 37.8, 59.6, 72.8),
}
DENSE = {  # epochs, mosaic, MixUp: AP, AP50, AP75, APs, APm, APl
    (12, 0.0, 0.0): (49.6, 67.1, 53.6, 31.3, 54.2, 67.8),
    (12, 0.5, 0.0): (50.4, 68.4, 54.5, 32.7, 54.6, 68.1),
    (12, 0.0, 0.5): (50.1, 67.7, 54.0, 31.1, 54.5, 68.7),
    (12, 0.5, 0.5): (50.4, 68.1, 54.2, 32.7, 54.7, 68.2),
    (24, 0.0, 0.0): (51.7, 69.5, 55.8, 32.8, 56.4, 69.7),
    (24, 0.5, 0.0): (51.9, 70.1, 55.9, 34.9, 56.1, 69.3),
    (24, 0.0, 0.5): (51.5, 69.4, 55.5, 33.2, 56.3, 69.3),
    (24, 0.5, 0.5): (52.5, 70.6, 56.7, 34.9, 57.1, 70.1),
}
GAMMAS = {1.3: 52.2, 1.5: 52.4, 1.8: 52.1, 2.0: 51.9}
OBJECTS = {10: (0.0, 51.7, 69.5, 55.8), 25: (0.5, 52.5, 70.6, 56.7), 50: (1.0, 52.2, 70.1, 56.4)}  # both probabilities
BINS = {4: 53.3, 8: 53.4, 16: 53.5, 32: 53.7, 64: 53.6, 128: 53.6}
TEMPERATURES = {1.0: 53.2, 2.5: 53.7, 5.0: 54.0, 7.5: 53.8, 10.0: 53.7, 20.0: 53.5}
# fmt: on

_STUDIES = (
    named(lasting(DEIM_R50, 36), "deim_rtdetrv2_r50vd_36e", "DEIM Table 2", *SHORTER["r50vd"]),
    named(lasting(DEIM_R101, 36), "deim_rtdetrv2_r101vd_36e", "DEIM Table 2", *SHORTER["r101vd"]),
    *(
        named(dense(lasting(DEIM_R50, epochs), p, q), f"deim_table4_{epochs}e_mosaic{p}_mixup{q}", "DEIM Table 4", *ap)
        for (epochs, p, q), ap in DENSE.items()
    ),
    *(
        named(
            replace(lasting(DEIM_R50, 24), losses=rtdetr_losses(MAL(gamma=gamma))),
            f"deim_table5_gamma{gamma}",
            "DEIM Table 5",
            ap,
        )
        for gamma, ap in GAMMAS.items()
    ),
    named(
        replace(lasting(DEIM_R50, 36), losses=rtdetr_losses(VFL())),
        "deim_table6_r50vd_dense", "DEIM Table 6", 53.6, 71.9, 58.2,
    ),
    named(lasting(DEIM_R50, 36), "deim_table6_r50vd_dense_mal", "DEIM Table 6", 53.9, 71.7, 58.6),
    named(
        replace(lasting(DEIM_L, 36), losses=dfine_losses(VFL(), DEIM_L.arch)),
        "deim_table6_dfine_l_dense", "DEIM Table 6", 54.2, 72.1, 58.9,
    ),
    named(lasting(DEIM_L, 36), "deim_table6_dfine_l_dense_mal", "DEIM Table 6", 54.6, 72.2, 59.5),
    *(
        named(dense(lasting(DEIM_R50, 24), p, p), f"deim_table12_{objects}_objects", "DEIM Table 12", *ap)
        for objects, (p, *ap) in OBJECTS.items()
    ),
    named(with_distributions(up=0.5, scale=4.0), "dfine_table4_a0.5_c0.25", "D-FINE Table 4", 53.3),
    named(with_distributions(up=0.5, scale=0.01), "dfine_table4_a0.5_c100", "D-FINE Table 4", 53.0),
    *(named(with_distributions(bins=n), f"dfine_table4_bins{n}", "D-FINE Table 4", ap) for n, ap in BINS.items()),
    *(named(with_temperature(T), f"dfine_table4_T{T:g}", "D-FINE Table 4", ap) for T, ap in TEMPERATURES.items()),
    *(as_in_the_paper(size) for size in "smlx"),
)  # fmt: skip

STUDIES = {recipe.name: recipe for recipe in _STUDIES}
