"""The architectures of D-FINE and RT-DETRv2, with and without DEIM: a table each of what differs between sizes."""

from __future__ import annotations

from typing import Any

from deimkit.errors import RecipeError
from deimkit.models.decoder import Decoder
from deimkit.models.detector import Arch
from deimkit.models.encoder import GELAN, CSPRep, Hybrid
from deimkit.models.groups import Denoise
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.queries import TopK
from deimkit.models.refine import FDR, LookForwardTwice
from deimkit.models.resnet import ResNetVD

# fmt: off
HGNETS = {  # stem (middle, output); per stage: channels inside a block, after it, blocks; convolutions a block; affine
    "tiny": ((16, 16), (16, 24, 48, 96),     (32, 96, 192, 384),     (1, 1, 1, 1), 3, True),
    "B0":   ((16, 16), (16, 32, 64, 128),    (64, 256, 512, 1024),   (1, 1, 2, 1), 3, True),
    "B1":   ((24, 32), (32, 48, 96, 192),    (64, 256, 512, 1024),   (1, 1, 2, 1), 3, True),
    "B2":   ((24, 32), (32, 64, 128, 256),   (96, 384, 768, 1536),   (1, 1, 3, 1), 4, True),
    "B4":   ((32, 48), (48, 96, 192, 384),   (128, 512, 1024, 2048), (1, 1, 3, 1), 6, False),
    "B5":   ((32, 64), (64, 128, 256, 512),  (128, 512, 1024, 2048), (1, 2, 5, 2), 6, False),
}
DFINES = {
    #        backbone, stages   encoder width, FFN, fusion   decoder layers, width, FFN, points   queries, noisy  W(n)
    "tiny": ("tiny", (1, 2, 3), 64,  192,  GELAN(32, 1),     3, 64,  192,  (2, 4, 2),             100, 50,        4.0),
    "n":    ("B0",   (2, 3),    128, 512,  GELAN(21, 2),     3, 128, 512,  (6, 6),                300, 100,       4.0),
    "s":    ("B0",   (1, 2, 3), 256, 1024, GELAN(64, 1),     3, 256, 1024, (3, 6, 3),             300, 100,       4.0),
    "m":    ("B2",   (1, 2, 3), 256, 1024, GELAN(128, 2),    4, 256, 1024, (3, 6, 3),             300, 100,       4.0),
    "l":    ("B4",   (1, 2, 3), 256, 1024, GELAN(128, 3),    6, 256, 1024, (3, 6, 3),             300, 100,       4.0),
    "x":    ("B5",   (1, 2, 3), 384, 2048, GELAN(192, 3),    6, 256, 1024, (3, 6, 3),             300, 100,       8.0),
}
RESNETS = {  # blocks per stage; bottlenecks; stem and widths inside the blocks
    "tiny": ((1, 1, 1, 1),  False, 32, (16, 32, 64, 128)),
    "r18":  ((2, 2, 2, 2),  False, 64, (64, 128, 256, 512)),
    "r34":  ((3, 4, 6, 3),  False, 64, (64, 128, 256, 512)),
    "r50":  ((3, 4, 6, 3),  True,  64, (64, 128, 256, 512)),
    "r101": ((3, 4, 23, 3), True,  64, (64, 128, 256, 512)),
}
RTDETRS = {
    # backbone, frozen if plain; encoder width, FFN, fusion; decoder layers plain, with DEIM, and the one asked, its
    # width, FFN; queries, noisy ones
    "tiny":    ("tiny", False, 64,  192,  CSPRep(32, 1),  3, 3, None, 64,  192,  100, 50),
    "r18vd":   ("r18",  False, 256, 1024, CSPRep(128, 3), 3, 3, None, 256, 1024, 300, 100),
    "r34vd":   ("r34",  False, 256, 1024, CSPRep(128, 3), 4, 4, None, 256, 1024, 300, 100),
    "r50vd_m": ("r50",  True,  256, 1024, CSPRep(128, 3), 6, 3, 2,    256, 1024, 300, 100),
    "r50vd":   ("r50",  True,  256, 1024, CSPRep(256, 3), 6, 6, None, 256, 1024, 300, 100),
    "r101vd":  ("r101", True,  384, 2048, CSPRep(384, 3), 6, 6, None, 256, 1024, 300, 100),
}
# fmt: on


def hgnetv2(name: str, **changes: Any) -> HGNetV2:
    """The backbone called `name`: B0, B1, B2, B4, B5 or tiny; keyword arguments change its fields."""
    stem, mid, out, blocks, layers, lab = HGNETS[name]
    return HGNetV2(**{"stem": stem, "mid": mid, "out": out, "blocks": blocks, "layers": layers, "lab": lab, **changes})


def dfine_arch(size: str, activation: str = "silu", frozen: bool = False) -> Arch:
    """D-FINE of size n, s, m, l, x, or tiny; "silu" as trained with DEIM, "relu" as published by D-FINE itself.

    frozen: see `HGNetV2`.
    """
    if size not in DFINES:
        raise RecipeError(f"D-FINE comes in the sizes {', '.join(DFINES)}; got {size!r}.")
    net, levels, width, ffn, fusion, layers, inner, inner_ffn, points, queries, denoise, scale = DFINES[size]
    return Arch(
        backbone=hgnetv2(net, levels=levels, frozen=frozen),
        encoder=Hybrid(width, ffn, fusion),
        decoder=Decoder(layers, inner, inner_ffn, points),
        queries=TopK(queries),
        groups=(Denoise(denoise),),
        refine=FDR(scale=scale),
        activation=activation,
    )


def rtdetrv2_arch(size: str, activation: str = "silu") -> Arch:
    """RT-DETRv2 of size r18vd, r34vd, r50vd_m, r50vd or r101vd, or tiny.

    "silu" as trained with DEIM, "relu" as it was before. DEIM changes more than the activation: the position code has
    one layer more, r50vd_m is built without the three decoder layers that it never asks, and the three large backbones
    are not frozen.
    """
    if size not in RTDETRS:
        raise RecipeError(f"RT-DETRv2 comes in the sizes {', '.join(RTDETRS)}; got {size!r}.")
    net, frozen, width, ffn, fusion, plain, with_deim, asked, inner, inner_ffn, queries, denoise = RTDETRS[size]
    deim = activation == "silu"
    blocks, bottleneck, stem, widths = RESNETS[net]
    return Arch(
        backbone=ResNetVD(blocks, bottleneck, frozen=frozen and not deim, stem=stem, widths=widths),
        encoder=Hybrid(width, ffn, fusion),
        decoder=Decoder(
            layers=with_deim if deim else plain,
            width=inner,
            ffn=inner_ffn,
            points=(4, 4, 4),
            projected=True,
            gated=False,
            position=(1, 1) if deim else (2,),
            asked=asked,
        ),
        queries=TopK(queries),
        groups=(Denoise(denoise),),
        refine=LookForwardTwice(),
        activation=activation,
    )
