"""ResNet-vd, the backbone of RT-DETR: a stem of three convolutions, and shortcuts that average before they shrink."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from deimkit.models.layers import Backbone, ConvNorm


@dataclass(frozen=True)
class ResNetVD:
    """The numbers of one ResNet-vd: four stages at strides 4, 8, 16 and 32.

    blocks: per stage. bottleneck: blocks of three convolutions that put out four times as many channels (depth 50 and
    more), instead of two. levels: which stages (0-3) are handed on. frozen: the stem and all batch norms keep their
    weights and statistics, as plain RT-DETRv2-M*, L and X train from ImageNet weights (DEIM freezes nothing). stem,
    widths: channels of the stem, and inside the blocks of each stage.
    Source: He et al., "Bag of Tricks", Fig. 2 (ResNet-D); RT-DETR.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    levels: tuple[int, ...] = (1, 2, 3)
    frozen: bool = False
    stem: int = 64
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map handed on."""
        return tuple(self.widths[i] * (4 if self.bottleneck else 1) for i in self.levels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map handed on."""
        return tuple(4 << i for i in self.levels)

    def build(self) -> ResNet:
        """The module, with fresh weights."""
        return ResNet(self)


class ResNet(Backbone):
    """Images (B, 3, H, W) to one map (B, channels, H / stride, W / stride) per level."""

    def __init__(self, spec: ResNetVD) -> None:
        super().__init__(spec.levels)
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNorm(3, spec.stem // 2, 3, stride=2, act="relu"),
                conv1_2=ConvNorm(spec.stem // 2, spec.stem // 2, 3, act="relu"),
                conv1_3=ConvNorm(spec.stem // 2, spec.stem, 3, act="relu"),
            )
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        block = Bottleneck if spec.bottleneck else Basic
        outputs = [width * block.expansion for width in spec.widths]
        self.res_layers = nn.ModuleList(
            Stage(block, inputs, width, count, stride=1 if i == 0 else 2)
            for i, (inputs, width, count) in enumerate(
                zip([spec.stem, *outputs[:-1]], spec.widths, spec.blocks, strict=True)
            )
        )
        if spec.frozen:
            self.freeze(self.conv1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.handed_on(self.pool(self.conv1(images)), self.res_layers)


class Stage(nn.Module):
    """Blocks at one resolution, of which the first may shrink and changes the channels."""

    def __init__(self, block: type[Basic] | type[Bottleneck], inputs: int, width: int, count: int, stride: int) -> None:
        super().__init__()
        outputs = width * block.expansion
        first = block(inputs, width, stride, shortcut(inputs, outputs, stride))
        self.blocks = nn.Sequential(first, *(block(outputs, width, 1, nn.Identity()) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What the input of a stage passes to be added to its first block's output: where it shrinks, an average first."""
    if stride == 1:
        return ConvNorm(inputs, outputs, 1)
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2, 2, ceil_mode=True), conv=ConvNorm(inputs, outputs, 1)))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, short: nn.Module) -> None:
        super().__init__()
        self.branch2a = ConvNorm(inputs, width, 3, stride=stride, act="relu")
        self.branch2b = ConvNorm(width, width, 3)
        self.short = short

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2b(self.branch2a(x)) + self.short(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two pointwise ones, beside a shortcut (ResNet-50 and 101)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, short: nn.Module) -> None:
        super().__init__()
        self.branch2a = ConvNorm(inputs, width, 1, act="relu")
        self.branch2b = ConvNorm(width, width, 3, stride=stride, act="relu")
        self.branch2c = ConvNorm(width, 4 * width, 1)
        self.short = short

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2c(self.branch2b(self.branch2a(x))) + self.short(x), inplace=True)
