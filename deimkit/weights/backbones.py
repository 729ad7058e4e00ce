"""The published ImageNet weights of the papers' backbones: which file is whose.

The authors of D-FINE and of RT-DETR converted them from PaddlePaddle's (PaddleClas, PaddleDetection).
"""

from __future__ import annotations

from dataclasses import replace

from deimkit.models.detector import Arch
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.resnet import ResNetVD
from deimkit.recipes.archs import hgnetv2, rtdetrv2_arch
from deimkit.weights.addresses import WebFile

_HGNETS = "https://github.com/Peterande/storage/releases/download/dfinev1.0"
_RESNETS = "https://github.com/lyuwenyu/storage/releases/download/v0.1"

# The publishers name no checksums. Those given here are what independent projects state (three alike for B0, one each
# for the others); for the three larger ResNets none was found.
FILES: dict[HGNetV2 | ResNetVD, WebFile] = {
    hgnetv2("B0"): WebFile(
        f"{_HGNETS}/PPHGNetV2_B0_stage1.pth",
        sha256="70a372e8cbc59b34c5da2943261ecb633faf304a58e7e05461a27bd8d8b7f3d1",
        size=7_555_621,
    ),
    hgnetv2("B1"): WebFile(
        f"{_HGNETS}/PPHGNetV2_B1_stage1.pth",
        sha256="3195a3fbd853af42c0c06eb121338077e96a5f7580daf503a4c05d4fc84b7fb9",
    ),
    hgnetv2("B2"): WebFile(
        f"{_HGNETS}/PPHGNetV2_B2_stage1.pth",
        sha256="41272985db6136ac11732b246c7ea794dcc203d0a8cbc463152c840b9d9f22d1",
        size=24_362_501,
    ),
    hgnetv2("B4"): WebFile(
        f"{_HGNETS}/PPHGNetV2_B4_stage1.pth",
        sha256="a72ad8d32902c90f5fa07f642034955d0ed9149c46d4d97f0e2ec36344d24bea",
        size=54_559_385,
    ),
    hgnetv2("B5"): WebFile(
        f"{_HGNETS}/PPHGNetV2_B5_stage1.pth",
        sha256="812d5cde50e415abfb1ea1dd27121fa4f861522a327e48033a3cea8d604b3545",
        size=133_945_533,
    ),
    rtdetrv2_arch("r18vd").backbone: WebFile(
        f"{_RESNETS}/ResNet18_vd_pretrained_from_paddle.pth",
        sha256="911a745b62e173c8f4b9af513c2ea295428cf23f1bbfe9048381500f140fd720",
        size=44_878_642,
    ),
    rtdetrv2_arch("r34vd").backbone: WebFile(f"{_RESNETS}/ResNet34_vd_pretrained_from_paddle.pth"),
    rtdetrv2_arch("r50vd").backbone: WebFile(f"{_RESNETS}/ResNet50_vd_ssld_v2_pretrained_from_paddle.pth"),
    rtdetrv2_arch("r101vd").backbone: WebFile(f"{_RESNETS}/ResNet101_vd_ssld_pretrained_from_paddle.pth"),
}


def imagenet(arch: Arch) -> WebFile | None:
    """The file for the backbone of an architecture, whichever of its stages are handed on or frozen; None without."""
    return FILES.get(replace(arch.backbone, levels=HGNetV2.levels, frozen=False))
