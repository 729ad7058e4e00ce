"""The recipes: one value per row of the papers' tables, and the way to find, print and rebuild one."""

from __future__ import annotations

import dataclasses
import importlib
from difflib import get_close_matches
from typing import Any

from deimkit.errors import RecipeError
from deimkit.recipes import recipe as _recipe
from deimkit.recipes.beyond_coco import BEYOND
from deimkit.recipes.deim import DEIM
from deimkit.recipes.dfine import DFINE
from deimkit.recipes.recipe import Paper, Recipe, diff
from deimkit.recipes.roadmap import ROADMAP
from deimkit.recipes.rtdetrv2 import DEIM_RTDETRV2, RTDETRV2
from deimkit.recipes.small import TINY
from deimkit.recipes.studies import STUDIES

__all__ = ["Paper", "Recipe", "diff", "get", "names", "parse", "parts", "to_python"]

_FAMILIES = (DFINE, DEIM, RTDETRV2, DEIM_RTDETRV2, TINY, BEYOND, STUDIES, ROADMAP)
_ALL: dict[str, Recipe] = {recipe.name: recipe for family in _FAMILIES for recipe in family.values()}

_PART_ROOMS = (
    "criterion", "data.augment", "losses", "matching", "models.decoder", "models.detector", "models.encoder",
    "models.groups", "models.hgnetv2", "models.queries", "models.refine", "models.resnet", "training.optim",
    "training.timeline",
)  # fmt: skip


def names() -> list[str]:
    """The names of all recipes."""
    return list(_ALL)


def get(name: str) -> Recipe:
    """The recipe called `name`; raises `RecipeError` with the nearest name if there is none."""
    if name not in _ALL:
        near = get_close_matches(name, _ALL, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`deimkit recipes` lists them."
        raise RecipeError(f"No recipe is called {name!r}. {hint}")
    return _ALL[name]


def parts() -> dict[str, type]:
    """Every part a recipe may be made of, by name: the frozen dataclasses of the rooms it draws on."""
    found: dict[str, type] = {"Recipe": Recipe, "Paper": Paper}
    for room in _PART_ROOMS:
        for name, value in vars(importlib.import_module(f"deimkit.{room}")).items():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                found[name] = value
    return found


def parse(text: str) -> Recipe:
    """Rebuild a recipe from the text of `to_python`; no code of the text runs. Raises `RecipeError`."""
    return _recipe.parse(text, parts())


def to_python(recipe: Recipe) -> str:
    """The recipe as readable Python, one field a line."""
    fields = [f"    {f.name}={getattr(recipe, f.name)!r}," for f in dataclasses.fields(recipe)]
    return "\n".join(["Recipe(", *fields, ")", ""])


def __getattr__(name: str) -> Any:
    """`recipes.deim_dfine_n` is `recipes.get("deim_dfine_n")`."""
    if name in _ALL:
        return _ALL[name]
    near = get_close_matches(name, _ALL, n=1)
    raise AttributeError(f"deimkit.recipes has no {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
