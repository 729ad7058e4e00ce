"""HGNetV2: the convolutional backbone of D-FINE; every block keeps all of its layers and squeezes them into one map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from deimkit.models.layers import LARGEST_HALF, Backbone


@dataclass(frozen=True)
class HGNetV2:
    """The numbers of one HGNetV2: four stages at strides 4, 8, 16 and 32.

    stem: (middle, output) channels of the stem. mid, out, blocks: per stage, the channels inside a block and after it,
    and how many blocks. layers: convolutions per block. lab: a learnable scale and bias after every activation.
    levels: which stages (0-3) are handed on. frozen: the stem and all batch norms keep their weights and statistics, as
    plain D-FINE-L and X train from ImageNet weights (DEIM freezes nothing). Source: PaddleClas PP-HGNetV2; D-FINE,
    appendix.
    """

    stem: tuple[int, int]
    mid: tuple[int, int, int, int]
    out: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    layers: int
    lab: bool = False
    levels: tuple[int, ...] = (1, 2, 3)
    frozen: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map handed on."""
        return tuple(self.out[i] for i in self.levels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map handed on."""
        return tuple(4 << i for i in self.levels)

    def build(self) -> HGNet:
        """The module, with fresh weights."""
        return HGNet(self)


class HGNet(Backbone):
    """Images (B, 3, H, W) to one map (B, channels, H / stride, W / stride) per level."""

    def __init__(self, spec: HGNetV2) -> None:
        super().__init__(spec.levels)
        self.stem = Stem(*spec.stem, lab=spec.lab)
        inputs = (spec.stem[1], *spec.out)
        self.stages = nn.ModuleList(
            Stage(
                inputs[i], spec.mid[i], spec.out[i], spec.blocks[i], spec.layers,
                light=i >= 2, shrink=i > 0, lab=spec.lab,
            )
            for i in range(4)
        )  # fmt: skip
        if spec.frozen:
            self.freeze(self.stem)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.handed_on(self.stem(images), self.stages)


class Stem(nn.Module):
    """Pixels to a quarter of their resolution, along a pooled and a convolved branch."""

    def __init__(self, mid: int, outputs: int, lab: bool) -> None:
        super().__init__()
        self.stem1 = ConvBNAct(3, mid, 3, stride=2, lab=lab)
        self.stem2a = ConvBNAct(mid, mid // 2, 2, lab=lab)
        self.stem2b = ConvBNAct(mid // 2, mid, 2, lab=lab)
        self.stem3 = ConvBNAct(2 * mid, mid, 3, stride=2, lab=lab)
        self.stem4 = ConvBNAct(mid, outputs, 1, lab=lab)
        self.pool = nn.MaxPool2d(2, stride=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem1(images)  # (B, mid, H / 2, W / 2)
        padded = pad(x)
        convolved = self.stem2b(pad(self.stem2a(padded)))
        pooled = pool_and_raise(x) if torch.onnx.is_in_onnx_export() else self.pool(padded)
        return self.stem4(self.stem3(torch.cat([pooled, convolved], 1)))


def pad(x: Tensor, value: float = 0.0) -> Tensor:
    """One row of zeros below and one column on the right, which a 2x2 convolution takes away again."""
    return F.pad(x, (0, 1, 0, 1), value=value)


def pool_and_raise(x: Tensor) -> Tensor:
    """2x2 max pooling of a map (B, D, h, w) padded by zeros, in a form that survives those who simplify graphs.

    ONNX Runtime and onnxsim fold any padding into the pooling after it, whose own padding is below every number: of a
    map with negative numbers (`lab` makes some) they then get the last row and column wrong.
    """
    h, w = int(x.shape[2]), int(x.shape[3])
    border = pad(torch.full((h - 1, w - 1), -LARGEST_HALF, dtype=x.dtype, device=x.device))  # (h, w), zero at its end
    return torch.maximum(F.max_pool2d(pad(x, -LARGEST_HALF), 2, stride=1), border)


class Stage(nn.Module):
    """Blocks at one resolution, after a depthwise stride-2 convolution where the stage begins by shrinking."""

    def __init__(
        self, inputs: int, mid: int, outputs: int, blocks: int, layers: int, light: bool, shrink: bool, lab: bool
    ) -> None:
        super().__init__()
        self.downsample = ConvBNAct(inputs, inputs, 3, stride=2, groups=inputs, act=False) if shrink else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(outputs if i else inputs, mid, outputs, layers, light, residual=i > 0, lab=lab)
                for i in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Block(nn.Module):
    """A chain of layers whose input and every output are concatenated, squeezed to half and expanded to `outputs`."""

    def __init__(
        self, inputs: int, mid: int, outputs: int, layers: int, light: bool, residual: bool, lab: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        widths = [inputs] + [mid] * (layers - 1)
        self.layers = nn.ModuleList(
            LightConv(width, mid, 5, lab) if light else ConvBNAct(width, mid, 3, lab=lab) for width in widths
        )
        self.aggregation = nn.Sequential(
            ConvBNAct(inputs + layers * mid, outputs // 2, 1, lab=lab), ConvBNAct(outputs // 2, outputs, 1, lab=lab)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        out = self.aggregation(torch.cat(maps, 1))
        return out + x if self.residual else out


class LightConv(nn.Module):
    """A pointwise convolution, then a depthwise one with the activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, lab: bool) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(inputs, outputs, 1, act=False)
        self.conv2 = ConvBNAct(outputs, outputs, kernel, groups=outputs, lab=lab)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class ConvBNAct(nn.Module):
    """Convolution without bias, batch norm and, if it is activated, ReLU and the learnable affine block."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        lab: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()
        self.lab = Affine() if act and lab else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.lab(self.act(self.bn(self.conv(x))))

    def fused(self) -> nn.Sequential:
        """The same map with the batch norm folded into the convolution, in evaluation."""
        return nn.Sequential(fuse_conv_bn_eval(self.conv, self.bn), self.act, self.lab)


class Affine(nn.Module):
    """One learnable scale and one bias for a whole map (the "learnable affine block" of HGNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x.dtype), x, self.scale.to(x.dtype))  # stays in half precision under autocast
