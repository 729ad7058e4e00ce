"""Weights that no trained model has but every comparison needs: random, of sane scale, nowhere zero."""

from __future__ import annotations

import torch
from torch import nn


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every floating tensor of the state dict random values; variances stay positive. Returns the model."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            leaf = name.rpartition(".")[2]
            if not tensor.is_floating_point() or leaf in ("up", "reg_scale", "num_points_scale", "n_points_scale"):
                continue
            z = torch.randn(tensor.shape, generator=random)
            if leaf == "running_var":
                z = 1 + 0.1 * z.abs()
            elif tensor.ndim > 1:
                z = z * ((1.2 if tensor.ndim == 4 else 1.0) / tensor[0].numel()) ** 0.5
            else:
                z = 0.1 * z + (leaf in ("weight", "scale"))
            tensor.copy_(z)
    return model
