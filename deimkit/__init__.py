"""deimkit: a Jupyter-first workbench for real-time DETR detectors.

Understand how they learn, train them for real, see where they fail, and ship them. The public names below are
imported when first used, so that `import deimkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "structures",
    "CategoryMap": "data.dataset",
    "Dataset": "data.dataset",
    "DeimkitError": "errors",
    "Detections": "structures",
    "Detector": "models.detector",
    "Predictions": "structures",
    "Recipe": "recipes.recipe",
    "Run": "training.run",
    "Targets": "structures",
    "bench": "shipping",
    "build": "api",
    "doctor": "data.doctor",
    "evaluate": "api",
    "example": "examples",
    "export": "shipping",
    "load": "api",
    "prepare": "api",
    "profile": "api",
    "rehearse": "api",
    "replay": "api",
    "resume": "api",
    "train": "api",
}

__all__ = [*_HOME, "recipes"]

if TYPE_CHECKING:
    from deimkit import recipes as recipes
    from deimkit.api import build as build
    from deimkit.api import evaluate as evaluate
    from deimkit.api import load as load
    from deimkit.api import prepare as prepare
    from deimkit.api import profile as profile
    from deimkit.api import rehearse as rehearse
    from deimkit.api import replay as replay
    from deimkit.api import resume as resume
    from deimkit.api import train as train
    from deimkit.data.dataset import CategoryMap as CategoryMap
    from deimkit.data.dataset import Dataset as Dataset
    from deimkit.data.doctor import doctor as doctor
    from deimkit.errors import DeimkitError as DeimkitError
    from deimkit.examples import example as example
    from deimkit.models.detector import Detector as Detector
    from deimkit.recipes.recipe import Recipe as Recipe
    from deimkit.shipping import bench as bench
    from deimkit.shipping import export as export
    from deimkit.structures import Batch as Batch
    from deimkit.structures import Detections as Detections
    from deimkit.structures import Predictions as Predictions
    from deimkit.structures import Targets as Targets
    from deimkit.training.run import Run as Run


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name == "recipes":
        return importlib.import_module("deimkit.recipes")
    if name not in _HOME:
        raise AttributeError(f"deimkit has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"deimkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
