"""D-FINE's boxes to look into: W(n), the way through the decoder, and what the last layer teaches the others."""

from __future__ import annotations

from deimkit.explore.dfine_figures import refinement, weighting_function
from deimkit.explore.distillation_lab import DistillationLab
from deimkit.explore.refinement_lab import RefinementLab
from deimkit.explore.weighting_lab import WeightingLab

__all__ = ["DistillationLab", "RefinementLab", "WeightingLab", "refinement", "weighting_function"]
