"""The hybrid encoder: attention where the map is small, convolutions to mix the scales (RT-DETR, D-FINE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from deimkit.models.layers import ConvNorm, activation, per_shape


@dataclass(frozen=True)
class GELAN:
    """D-FINE's way to fuse two maps: a GELAN block, laterals and downsampling without activation.

    hidden: channels of the inner convolutions. blocks: RepVGG pairs in each of the two inner CSP stages.
    """

    hidden: int
    blocks: int

    def lateral(self, width: int) -> nn.Module:
        """What a map passes before it is handed down."""
        return ConvNorm(width, width, 1)

    def merge(self, width: int) -> nn.Module:
        """Two concatenated maps (2 * width channels) to one."""
        return GELANBlock(2 * width, width, self.hidden, self.blocks)

    def down(self, width: int) -> nn.Module:
        """A map to half its resolution: pointwise, then depthwise at stride 2."""
        return nn.Sequential(SCDown(width))


@dataclass(frozen=True)
class CSPRep:
    """RT-DETR's way to fuse two maps: one CSP stage of RepVGG pairs; laterals and downsampling with activation.

    hidden: channels of the inner convolutions. blocks: RepVGG pairs in the stage.
    """

    hidden: int
    blocks: int

    def lateral(self, width: int) -> nn.Module:
        """What a map passes before it is handed down."""
        return ConvNorm(width, width, 1, act="silu")

    def merge(self, width: int) -> nn.Module:
        """Two concatenated maps (2 * width channels) to one."""
        return CSP(2 * width, self.hidden, self.blocks, width)

    def down(self, width: int) -> nn.Module:
        """A map to half its resolution."""
        return ConvNorm(width, width, 3, stride=2, act="silu")


@dataclass(frozen=True)
class Hybrid:
    """The numbers of one hybrid encoder.

    width: channels of every output map. ffn: width of the feed-forward layer of the one attention layer, which sees the
    coarsest map only. fusion: how two maps become one. row_major: whether position codes follow the tokens; the
    published code (False) lays them out column by column: the same on square inputs, scrambled on others.
    """

    width: int
    ffn: int
    fusion: GELAN | CSPRep
    heads: int = 8
    row_major: bool = False

    def build(self, channels: tuple[int, ...]) -> HybridEncoder:
        """The module for backbone maps of `channels`, fine to coarse, with fresh weights."""
        return HybridEncoder(self, channels)


class HybridEncoder(nn.Module):
    """Backbone maps (B, channels, h, w), fine to coarse, to as many maps (B, width, h, w)."""

    def __init__(self, spec: Hybrid, channels: tuple[int, ...]) -> None:
        super().__init__()
        steps = len(channels) - 1
        self.input_proj = nn.ModuleList(ConvNorm(c, spec.width, 1) for c in channels)
        self.aifi = AIFI(spec)
        self.lateral_convs = nn.ModuleList(spec.fusion.lateral(spec.width) for _ in range(steps))
        self.fpn_blocks = nn.ModuleList(spec.fusion.merge(spec.width) for _ in range(steps))
        self.downsample_convs = nn.ModuleList(spec.fusion.down(spec.width) for _ in range(steps))
        self.pan_blocks = nn.ModuleList(spec.fusion.merge(spec.width) for _ in range(steps))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        *finer, top = (project(x) for project, x in zip(self.input_proj, maps, strict=True))
        top = self.aifi(top)

        handed = []  # coarse to fine: what the way up will meet again
        for lateral, merge, fine in zip(self.lateral_convs, self.fpn_blocks, reversed(finer), strict=True):
            handed.append(lateral(top))
            top = merge(torch.cat([F.interpolate(handed[-1], scale_factor=2.0), fine], 1))

        out = [top]
        for down, merge, coarse in zip(self.downsample_convs, self.pan_blocks, reversed(handed), strict=True):
            out.append(merge(torch.cat([down(out[-1]), coarse], 1)))
        return out

    def fusion_parts(self) -> list[nn.Module]:
        """What is folded in deployment: all but the input projections and the attention."""
        return [self.lateral_convs, self.fpn_blocks, self.downsample_convs, self.pan_blocks]


class AIFI(nn.Module):
    """Attention-based intra-scale feature interaction: one post-norm transformer layer over the cells of a map."""

    def __init__(self, spec: Hybrid) -> None:
        super().__init__()
        self.row_major = spec.row_major
        self.self_attn = nn.MultiheadAttention(spec.width, spec.heads, batch_first=True)
        self.linear1 = nn.Linear(spec.width, spec.ffn)
        self.linear2 = nn.Linear(spec.ffn, spec.width)
        self.norm1 = nn.LayerNorm(spec.width)
        self.norm2 = nn.LayerNorm(spec.width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        _, d, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, D)
        query = tokens + position_code(h, w, d, self.row_major, x.device, x.dtype)
        tokens = self.norm1(tokens + self.self_attn(query, query, tokens, need_weights=False)[0])
        tokens = self.norm2(tokens + self.linear2(self.act(self.linear1(tokens))))
        return tokens.transpose(1, 2).reshape(-1, d, h, w)


@per_shape
def position_code(h: int, w: int, width: int, row_major: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of every cell's row and column, (h * w, width).

    The published table (`row_major=False`) is laid out column by column, w outermost, though tokens run row by row.
    """
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    outer, inner = (h, w) if row_major else (w, h)
    angles = [x.reshape(-1, 1) * rate for x in torch.meshgrid(torch.arange(outer), torch.arange(inner), indexing="ij")]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).to(device, dtype)


class GELANBlock(nn.Module):
    """Split in two, pass one half through two CSP stages, and gather all four maps (YOLOv9's GELAN)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(inputs, inputs, 1, act="silu")
        self.cv2 = nn.Sequential(CSP(inputs // 2, hidden, blocks, hidden), ConvNorm(hidden, hidden, 3, act="silu"))
        self.cv3 = nn.Sequential(CSP(hidden, hidden, blocks, hidden), ConvNorm(hidden, hidden, 3, act="silu"))
        self.cv4 = ConvNorm(inputs + 2 * hidden, outputs, 1, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        second = self.cv2(x.chunk(2, 1)[1])
        return self.cv4(torch.cat([x, second, self.cv3(second)], 1))


class CSP(nn.Module):
    """Two pointwise branches, one of them through RepVGG pairs, added, and widened where `outputs` asks for it."""

    def __init__(self, inputs: int, hidden: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, hidden, 1, act="silu")
        self.conv2 = ConvNorm(inputs, hidden, 1, act="silu")
        self.bottlenecks = nn.Sequential(*(RepVGG(hidden) for _ in range(blocks)))
        self.conv3 = nn.Identity() if hidden == outputs else ConvNorm(hidden, outputs, 1, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class RepVGG(nn.Module):
    """A 3x3 and a 1x1 convolution, added and then activated; in deployment one 3x3 does the work of both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width, 3)
        self.conv2 = ConvNorm(width, width, 1)
        self.act = activation("silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    def fused(self) -> nn.Sequential:
        """The same map as one 3x3 convolution: a 1x1 kernel is a 3x3 kernel with zeros around it."""
        conv = fuse_conv_bn_eval(self.conv1.conv, self.conv1.norm)
        point = fuse_conv_bn_eval(self.conv2.conv, self.conv2.norm)
        conv.weight.data += F.pad(point.weight, (1, 1, 1, 1))
        conv.get_parameter("bias").data += point.get_parameter("bias")
        return nn.Sequential(conv, self.act)


class SCDown(nn.Module):
    """Half the resolution: a pointwise convolution for the channels, a depthwise one for the space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(width, width, 1)
        self.cv2 = ConvNorm(width, width, 3, stride=2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))
