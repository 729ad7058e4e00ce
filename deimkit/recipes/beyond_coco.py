"""D-FINE beyond COCO: pre-trained on Objects365 and fine-tuned from there, with and without DEIM, and on CrowdHuman."""

from __future__ import annotations

from dataclasses import replace

from deimkit.losses import MAL
from deimkit.recipes.deim import DEIM
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


def deim_dfine_l_crowdhuman() -> Recipe:
    """D-FINE-L trained with DEIM on CrowdHuman, as far as DEIM's Table 3 tells: no file of it was published.

    The length, the batch and the EMA are those of D-FINE-L there; Dense O2O and the rate's shape take their share of
    the run as in DEIM-D-FINE-L on COCO; and the rates are, as there, twice those of D-FINE-L.
    """
    plain, deim = elsewhere("l", "crowdhuman"), DEIM["l"]
    clock = plain.timeline
    shares = deim.timeline.scaled_to(clock.total, clock.steps_per_epoch)
    return replace(
        deim,
        name="deim_dfine_l_crowdhuman",
        timeline=replace(clock, warm=shares.warm, dense=shares.dense, lr=shares.lr),
        optim=plain.optim.times(2),
        batch=plain.batch,
        paper=Paper("DEIM Table 3", 57.5, 87.6, 62.9, 33.2, 48.7, 55.7, epochs=120),
    )


CLAIMED = {
    "dfine_x_obj2coco": Paper("DEIM Table 8", 59.3, 76.8, 64.6, epochs=32),
    "dfine_l_crowdhuman": Paper("DEIM Table 3", 56.0, 87.2, 59.4, 29.0, 46.1, 54.6, epochs=120),
}
_PLAIN = (elsewhere(size, place) for place in ("obj365", "obj2coco", "crowdhuman") for size in DFINE)
_RECIPES = (
    *(replace(recipe, paper=CLAIMED.get(recipe.name)) for recipe in _PLAIN),
    deim_dfine_x_obj2coco(),
    deim_dfine_l_crowdhuman(),
)
BEYOND = {recipe.name: recipe for recipe in _RECIPES}
