"""D-FINE beyond COCO: pre-trained on Objects365 and fine-tuned from there, with and without DEIM, and on CrowdHuman."""

from __future__ import annotations

from dataclasses import replace

from deimkit.losses import MAL
from deimkit.recipes.dfine import DFINE, dfine_losses
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.training_tables import TRAINING_ELSEWHERE


def elsewhere(size: str, place: str) -> Recipe:
    """D-FINE of a size as trained on "obj365", "obj2coco" (starting from weights of the former) or "crowdhuman"."""
    name = f"dfine_{size}_{place}"
    training = TRAINING_ELSEWHERE[name]
    return replace(
        DFINE[size],
        name=name,
        timeline=training.timeline(),
        optim=training.optim(),
        augment=replace(DFINE[size].augment, multi_scale=training.repeat),
        batch=training.batch,
        paper=None,
    )


def deim_dfine_x_obj2coco() -> Recipe:
    """D-FINE-X fine-tuned with DEIM for 24 epochs; unlike DEIM's other recipes it keeps ReLU and a frozen backbone."""
    training, plain = TRAINING_ELSEWHERE["deim_dfine_x_obj2coco"], elsewhere("x", "obj2coco")
    return replace(
        plain,
        name="deim_dfine_x_obj2coco",
        losses=dfine_losses(MAL(), plain.arch),
        timeline=training.timeline(),
        optim=training.optim(),
        paper=Paper("DEIM Table 8", 59.5, 76.4, 65.2, epochs=24),
    )


BEYOND = {
    recipe.name: recipe
    for recipe in (
        *(elsewhere(size, place) for place in ("obj365", "obj2coco", "crowdhuman") for size in DFINE),
        deim_dfine_x_obj2coco(),
    )
}
BEYOND["dfine_x_obj2coco"] = replace(
    BEYOND["dfine_x_obj2coco"], paper=Paper("DEIM Table 8", 59.3, 76.8, 64.6, epochs=32)
)
