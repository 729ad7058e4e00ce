"""Tables, read both ways, say what each tensor is called in published files and in `transformers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deimkit.errors import CheckpointError
from deimkit.models.detector import PUBLISHED

# Published name, `transformers` name; `#` is a number, `*` anything, alike on both sides. The first row that fits wins.
DFINE_NAMES = (
    ("backbone.stem.*.conv.weight", "model.backbone.model.embedder.*.convolution.weight"),
    ("backbone.stem.*.bn.*", "model.backbone.model.embedder.*.normalization.*"),
    ("backbone.stem.*", "model.backbone.model.embedder.*"),
    ("backbone.stages.*.conv.weight", "model.backbone.model.encoder.stages.*.convolution.weight"),
    ("backbone.stages.*.bn.*", "model.backbone.model.encoder.stages.*.normalization.*"),
    ("backbone.stages.*", "model.backbone.model.encoder.stages.*"),
    ("encoder.fpn_blocks.#.cv1.*", "model.encoder.fpn_blocks.#.conv1.*"),
    ("encoder.fpn_blocks.#.cv2.0.*", "model.encoder.fpn_blocks.#.csp_rep1.*"),
    ("encoder.fpn_blocks.#.cv2.1.*", "model.encoder.fpn_blocks.#.conv2.*"),
    ("encoder.fpn_blocks.#.cv3.0.*", "model.encoder.fpn_blocks.#.csp_rep2.*"),
    ("encoder.fpn_blocks.#.cv3.1.*", "model.encoder.fpn_blocks.#.conv3.*"),
    ("encoder.fpn_blocks.#.cv4.*", "model.encoder.fpn_blocks.#.conv4.*"),
    ("encoder.pan_blocks.#.cv1.*", "model.encoder.pan_blocks.#.conv1.*"),
    ("encoder.pan_blocks.#.cv2.0.*", "model.encoder.pan_blocks.#.csp_rep1.*"),
    ("encoder.pan_blocks.#.cv2.1.*", "model.encoder.pan_blocks.#.conv2.*"),
    ("encoder.pan_blocks.#.cv3.0.*", "model.encoder.pan_blocks.#.csp_rep2.*"),
    ("encoder.pan_blocks.#.cv3.1.*", "model.encoder.pan_blocks.#.conv3.*"),
    ("encoder.pan_blocks.#.cv4.*", "model.encoder.pan_blocks.#.conv4.*"),
    ("encoder.downsample_convs.#.0.cv#.*", "model.encoder.downsample_convs.#.conv#.*"),
    ("encoder.encoder.#.layers.#.linear1.*", "model.encoder.aifi.#.layers.#.mlp.layers.0.*"),
    ("encoder.encoder.#.layers.#.linear2.*", "model.encoder.aifi.#.layers.#.mlp.layers.1.*"),
    ("decoder.decoder.layers.#.linear1.*", "model.decoder.layers.#.mlp.layers.0.*"),
    ("decoder.decoder.layers.#.linear2.*", "model.decoder.layers.#.mlp.layers.1.*"),
    ("decoder.decoder.lqe_layers.*", "model.decoder.lqe_layers.*"),
    ("decoder.pre_bbox_head.*", "model.decoder.pre_bbox_head.*"),
    ("decoder.decoder.up", "model.decoder.up"),
    ("decoder.decoder.reg_scale", "model.decoder.reg_scale"),
)
RESNET_NAMES = {  # convolutions and batch norms: published, transformers
    "backbone.conv1.conv1_1": "model.backbone.model.embedder.embedder.0",
    "backbone.conv1.conv1_2": "model.backbone.model.embedder.embedder.1",
    "backbone.conv1.conv1_3": "model.backbone.model.embedder.embedder.2",
    "backbone.res_layers.#.blocks.#.branch2a": "model.backbone.model.encoder.stages.#.layers.#.layer.0",
    "backbone.res_layers.#.blocks.#.branch2b": "model.backbone.model.encoder.stages.#.layers.#.layer.1",
    "backbone.res_layers.#.blocks.#.branch2c": "model.backbone.model.encoder.stages.#.layers.#.layer.2",
    "backbone.res_layers.#.blocks.#.short.conv": "model.backbone.model.encoder.stages.#.layers.#.shortcut.1",
    "backbone.res_layers.#.blocks.#.short": "model.backbone.model.encoder.stages.#.layers.#.shortcut",
}
RTDETR_NAMES = (
    *((f"{ours}.conv.weight", f"{theirs}.convolution.weight") for ours, theirs in RESNET_NAMES.items()),
    *((f"{ours}.norm.*", f"{theirs}.normalization.*") for ours, theirs in RESNET_NAMES.items()),
    ("encoder.encoder.#.layers.#.linear1.*", "model.encoder.aifi.#.layers.#.mlp.fc1.*"),
    ("encoder.encoder.#.layers.#.linear2.*", "model.encoder.aifi.#.layers.#.mlp.fc2.*"),
    ("decoder.decoder.layers.#.linear1.*", "model.decoder.layers.#.mlp.fc1.*"),
    ("decoder.decoder.layers.#.linear2.*", "model.decoder.layers.#.mlp.fc2.*"),
    ("decoder.decoder.layers.#.norm2.*", "model.decoder.layers.#.encoder_attn_layer_norm.*"),
    ("decoder.decoder.layers.#.cross_attn.num_points_scale", "model.decoder.layers.#.encoder_attn.n_points_scale"),
)
COMMON_NAMES = (
    ("encoder.input_proj.#.conv.*", "model.encoder_input_proj.#.0.*"),
    ("encoder.input_proj.#.norm.*", "model.encoder_input_proj.#.1.*"),
    ("encoder.encoder.#.layers.#.self_attn.out_proj.*", "model.encoder.aifi.#.layers.#.self_attn.o_proj.*"),
    ("encoder.encoder.#.layers.#.norm1.*", "model.encoder.aifi.#.layers.#.self_attn_layer_norm.*"),
    ("encoder.encoder.#.layers.#.norm2.*", "model.encoder.aifi.#.layers.#.final_layer_norm.*"),
    ("encoder.encoder.*", "model.encoder.aifi.*"),
    ("encoder.*", "model.encoder.*"),
    ("decoder.input_proj.#.conv.*", "model.decoder_input_proj.#.0.*"),
    ("decoder.input_proj.#.norm.*", "model.decoder_input_proj.#.1.*"),
    ("decoder.enc_output.proj.*", "model.enc_output.0.*"),
    ("decoder.enc_output.norm.*", "model.enc_output.1.*"),
    ("decoder.enc_score_head.*", "model.enc_score_head.*"),
    ("decoder.enc_bbox_head.*", "model.enc_bbox_head.*"),
    ("decoder.denoising_class_embed.*", "model.denoising_class_embed.*"),
    ("decoder.decoder.layers.#.self_attn.out_proj.*", "model.decoder.layers.#.self_attn.o_proj.*"),
    ("decoder.decoder.layers.#.norm1.*", "model.decoder.layers.#.self_attn_layer_norm.*"),
    ("decoder.decoder.layers.#.cross_attn.*", "model.decoder.layers.#.encoder_attn.*"),
    ("decoder.decoder.layers.#.norm3.*", "model.decoder.layers.#.final_layer_norm.*"),
    ("decoder.decoder.layers.*", "model.decoder.layers.*"),
    ("decoder.query_pos_head.*", "model.decoder.query_pos_head.*"),
    ("decoder.dec_score_head.*", "model.decoder.class_embed.*"),
    ("decoder.dec_bbox_head.*", "model.decoder.bbox_embed.*"),
)

# Tensors that a second name refers to: published files repeat two scalars, `transformers` repeats the heads.
PUBLISHED_COPIES = (("decoder.up", "decoder.decoder.up"), ("decoder.reg_scale", "decoder.decoder.reg_scale"))
HF_COPIES = (("class_embed.*", "model.decoder.class_embed.*"), ("bbox_embed.*", "model.decoder.bbox_embed.*"))

# The name inside a `transformers` file, the name of the same tensor inside a `transformers` 5 model.
COMMON_FILE = (
    ("model.encoder.encoder.#.layers.#.self_attn.out_proj.*", "model.encoder.aifi.#.layers.#.self_attn.o_proj.*"),
    ("model.encoder.encoder.*", "model.encoder.aifi.*"),
    ("model.decoder.layers.#.self_attn.out_proj.*", "model.decoder.layers.#.self_attn.o_proj.*"),
)
DFINE_FILE = (
    ("model.encoder.encoder.#.layers.#.fc1.*", "model.encoder.aifi.#.layers.#.mlp.layers.0.*"),
    ("model.encoder.encoder.#.layers.#.fc2.*", "model.encoder.aifi.#.layers.#.mlp.layers.1.*"),
    ("model.decoder.layers.#.fc1.*", "model.decoder.layers.#.mlp.layers.0.*"),
    ("model.decoder.layers.#.fc2.*", "model.decoder.layers.#.mlp.layers.1.*"),
)
RTDETR_FILE = (
    ("model.encoder.encoder.#.layers.#.fc#.*", "model.encoder.aifi.#.layers.#.mlp.fc#.*"),
    ("model.decoder.layers.#.fc#.*", "model.decoder.layers.#.mlp.fc#.*"),
)

# What published files keep although it follows from the architecture and the input size.
COMPUTED = ("decoder.anchors", "decoder.valid_mask")
PACKED = re.compile(r"(.+\.self_attn)\.in_proj_(weight|bias)")
QUERY = re.compile(r".+\.self_attn\.q_proj\.(weight|bias)")


class _Renames:
    """A table of name patterns, applied from one column to the other; a name that fits no row stays None."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self.rows = [
            (re.compile(re.escape(old).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")), re.sub("[#*]", "{}", new))
            for old, new in rows
        ]

    def __call__(self, name: str) -> str | None:
        for pattern, template in self.rows:
            if found := pattern.fullmatch(name):
                return template.format(*found.groups())
        return None


def _turned(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(right, left) for left, right in rows]


class Layout:
    """The names of one family: `published` -> `transformers` model -> `transformers` file, and all the way back."""

    def __init__(self, names: Iterable[tuple[str, str]], in_files: Iterable[tuple[str, str]]) -> None:
        names, in_files = [*names, *COMMON_NAMES], [*in_files, *COMMON_FILE]
        self.to_model, self.from_model = _Renames(names), _Renames(_turned(names))
        self.to_file, self.from_file = _Renames(_turned(in_files)), _Renames(in_files)


DFINE, RTDETR = Layout(DFINE_NAMES, DFINE_FILE), Layout(RTDETR_NAMES, RTDETR_FILE)
_copy_of, _original = _Renames(_turned(HF_COPIES)), _Renames(HF_COPIES)


def layout_of(names: Iterable[str]) -> Layout:
    """The family whose tensors have these names, published or of `transformers`: RT-DETR's layers project values."""
    return RTDETR if any(".value_proj." in name for name in names) else DFINE


def published_name(key: str) -> str:
    """What published files call the detector's own tensor `key`; a published name stays what it is."""
    for ours, theirs in PUBLISHED:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def hf_names(key: str, layout: Layout = DFINE) -> tuple[str, ...]:
    """What the published tensor `key` is called in a `transformers` 5 model: one name, or several, or none.

    Packed attention projections have three names (query, key, value rows), detection heads two (the second is tied to
    the first), anchors none because `transformers` computes them. Raises `CheckpointError` if `key` is not of `layout`.
    """
    if key in COMPUTED:
        return ()
    if packed := PACKED.fullmatch(key):
        return tuple(name for part in "qkv" for name in hf_names(f"{packed[1]}.{part}_proj.{packed[2]}", layout))
    name = layout.to_model(dict(PUBLISHED_COPIES).get(key, key))
    if name is None:
        raise CheckpointError(f"Expected a tensor name that transformers has a place for; got {key!r}.")
    copy = _copy_of(name)
    return (name,) if copy is None else (name, copy)


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that `transformers` files use; the inverse of `from_hf` up to computed ones."""
    layout = layout_of(state)
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = hf_names(key, layout)
        parts = tensor.chunk(3) if PACKED.fullmatch(key) else (tensor,) * len(names)  # (3D, ...) -> 3 x (D, ...)
        renamed |= {layout.to_file(name) or name: part for name, part in zip(names, parts, strict=True)}
    return renamed


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under their published names, attention projections packed.

    Takes the names that `transformers` gives in files and in models; one that it does not give these families is kept
    as it is, so that loading can report it.
    """
    layout = layout_of(state)
    state = {layout.from_file(name) or name: tensor for name, tensor in state.items()}
    repeated = {name for name in state if _original(name) in state}
    renamed = {
        layout.from_model(_original(name) or name) or name: tensor
        for name, tensor in state.items()
        if name not in repeated
    }
    for query in [key for key in renamed if QUERY.fullmatch(key)]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in parts):
            packed = torch.cat([renamed.pop(part) for part in parts])  # 3 x (D, ...) -> (3D, ...)
            renamed[query.replace(".q_proj.", ".in_proj_")] = packed
    return renamed | {copy: renamed[key] for copy, key in PUBLISHED_COPIES if key in renamed}
