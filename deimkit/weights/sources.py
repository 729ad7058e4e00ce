"""The weights that can be fetched by name: for which recipe, from where, under which licence, and what is claimed."""

from __future__ import annotations

from dataclasses import dataclass

from deimkit.errors import CheckpointError
from deimkit.recipes.beyond_coco import BEYOND
from deimkit.recipes.deim import DEIM
from deimkit.recipes.dfine import DFINE
from deimkit.recipes.recipe import Paper, Recipe
from deimkit.recipes.rtdetrv2 import DEIM_RTDETRV2, RTDETRV2
from deimkit.weights.addresses import WebFile
from deimkit.weights.backbones import imagenet
from deimkit.weights.hub import Repository

BY_HAND = "DEIM's authors give theirs out by hand: pass such a file, or the address of one, as weights=."
Place = Repository | WebFile


@dataclass(frozen=True)
class Source:
    """A set of weights that can be fetched.

    recipe, what: how it is asked for, `load(recipe, weights=what)`. licence: as stated where the weights or their code
    are published. paper: what a paper claims for them on COCO val2017, if it does.
    """

    recipe: str
    what: str
    place: Place
    licence: str = "Apache-2.0"
    paper: Paper | None = None

    def __str__(self) -> str:
        claim = f"; claimed AP {self.paper.ap} on COCO val2017, {self.paper.table}" if self.paper else ""
        return f"{self.recipe}: weights {self.what!r} from {self.place} ({self.licence}{claim})"


_DFINE = {"n": "nano", "s": "small", "m": "medium", "l": "large", "x": "xlarge"}
_OBJ2COCO = {"s": "small-obj2coco", "m": "medium-obj2coco", "l": "large-obj2coco-e25", "x": "xlarge-obj2coco"}
DETECTORS = (
    *(
        Source(f"dfine_{size}", "coco", Repository(f"ustc-community/dfine-{word}-coco"), paper=DFINE[size].paper)
        for size, word in _DFINE.items()
    ),
    *(Source(f"dfine_{size}", "obj365", Repository(f"ustc-community/dfine-{_DFINE[size]}-obj365")) for size in "smlx"),
    *(
        Source(
            f"dfine_{size}",
            "obj2coco",
            Repository(f"ustc-community/dfine-{words}"),
            paper=BEYOND[f"dfine_{size}_obj2coco"].paper,
        )
        for size, words in _OBJ2COCO.items()
    ),
    *(
        Source(f"rtdetrv2_{size}", "coco", Repository(f"PekingU/rtdetr_v2_{size}"), paper=RTDETRV2[size].paper)
        for size in ("r18vd", "r34vd", "r50vd", "r101vd")
    ),
)
NAMES = (*dict.fromkeys(source.what for source in DETECTORS), "imagenet")


def of(recipe: Recipe) -> list[Source]:
    """All that can be fetched for a recipe: detectors published under its name, and its backbone."""
    backbone = imagenet(recipe.arch)
    found = [source for source in DETECTORS if source.recipe == recipe.name]
    return found if backbone is None else [*found, Source(recipe.name, "imagenet", backbone)]


def listed() -> list[Source]:
    """All that can be fetched for the models of the papers; variants of them have the same backbones."""
    models = (*DFINE.values(), *DEIM.values(), *RTDETRV2.values(), *DEIM_RTDETRV2.values())
    return [source for recipe in models for source in of(recipe)]


def find(recipe: Recipe, what: str) -> Source:
    """The weights of that name for a recipe; `CheckpointError` says for which recipes there are some."""
    there = {source.what: source for source in of(recipe)}
    if what not in there:
        own = f"It has {', '.join(there)}. " if there else ""
        others = ", ".join(source.recipe for source in listed() if source.what == what)
        raise CheckpointError(
            f"No published weights {what!r} are known for {recipe.name}. {own}{what!r} exists for {others}. {BY_HAND}"
        )
    return there[what]
