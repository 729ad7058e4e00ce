"""D-FINE's boxes to look into: W(n), the way through the decoder, and what the last layer teaches the others."""

from __future__ import annotations

from deimkit.explore.labs.dfine_figures import refinement, weighting_function
from deimkit.explore.labs.distillation_lab import DistillationLab
from deimkit.explore.labs.refinement_lab import RefinementLab
from deimkit.explore.labs.weighting_lab import WeightingLab

__all__ = ["DistillationLab", "RefinementLab", "WeightingLab", "refinement", "weighting_function"]
