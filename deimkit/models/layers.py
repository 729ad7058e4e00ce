"""The small layers that every part of a detector is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from math import log
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from deimkit.errors import RecipeError

LARGEST_HALF = 65504.0  # float16 ends here
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "none": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """The activation called `name`: relu, silu, gelu or none."""
    if name not in ACTIVATIONS:
        raise RecipeError(f"An activation is one of {', '.join(ACTIVATIONS)}; got {name!r}.")
    return ACTIVATIONS[name]()


def full(x: Tensor) -> Tensor:
    """`x` in at least float32: boxes and distributions need the digits that half precision does not have."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of a fraction, finite at 0 and 1: both x and 1 - x count as at least `eps`."""
    x = full(x).clamp(0, 1)
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


def per_shape(build: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the last few results of a function of shapes, device and dtype: tables are built once per input size."""
    kept = lru_cache(maxsize=32)(torch.inference_mode(False)(build))  # what inference builds must serve training too

    @wraps(build)
    def call(*key: Any) -> Any:
        return build(*key) if torch.compiler.is_compiling() else kept(*key)  # a traced table stays in its trace

    return call


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation; the padding keeps the size at stride 1."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: str = "none"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fused(self) -> nn.Sequential:
        """The same map with the batch norm folded into the convolution, in evaluation."""
        return nn.Sequential(fuse_conv_bn_eval(self.conv, self.norm), self.act)


class Backbone(nn.Module):
    """What backbones share: the stages they hand on, and a stem and batch norms that may stay as they are."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        self.fixed: list[nn.Module] = []  # batch norms that keep their statistics

    def freeze(self, stem: nn.Module) -> None:
        """Let the stem and all batch norms keep their weights, and the batch norms their statistics too."""
        self.fixed = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in [stem, *self.fixed]:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen batch norms stay as in evaluation."""
        super().train(mode)
        for norm in self.fixed:
            norm.eval()
        return self

    def handed_on(self, x: Tensor, stages: Iterable[nn.Module]) -> list[Tensor]:
        """The maps after those stages that are handed on, from what the stem makes of the images."""
        maps = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in self.levels:
                maps.append(x)
        return maps


@runtime_checkable
class Fusable(Protocol):
    """A part that knows a cheaper module for evaluation."""

    def fused(self) -> nn.Module:
        """The same map, cheaper, in evaluation."""


def fuse(module: nn.Module) -> None:
    """Replace, inside `module`, every part that knows a cheaper form of itself."""
    for name, child in module.named_children():
        if isinstance(child, Fusable):
            setattr(module, name, child.fused())
        else:
            fuse(child)


class MLP(nn.Module):
    """Linear layers with an activation between them and none after the last."""

    def __init__(self, *widths: int, act: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def zero_(layer: nn.Module) -> None:
    """Start a linear layer at zero, so that what it adds begins as nothing."""
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def score_head(width: int, classes: int) -> nn.Linear:
    """A linear classifier that starts by giving every class the probability 0.01 (RetinaNet's prior)."""
    head = nn.Linear(width, classes)
    nn.init.constant_(head.bias, -log(99))
    return head


def box_head(width: int, outputs: int, act: str) -> MLP:
    """A three-layer MLP whose last layer starts at zero: the first boxes are the reference boxes themselves."""
    head = MLP(width, width, width, outputs, act=act)
    zero_(head.layers[-1])
    return head
