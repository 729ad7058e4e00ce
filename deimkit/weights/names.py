"""One table, read both ways, says what each tensor of D-FINE is called in published files and in `transformers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deimkit.errors import CheckpointError
from deimkit.models.detector import PUBLISHED

# Published name, `transformers` name; `#` is a number, `*` anything, alike on both sides. The first row that fits wins.
NAMES = (
    ("backbone.stem.*.conv.weight", "model.backbone.model.embedder.*.convolution.weight"),
    ("backbone.stem.*.bn.*", "model.backbone.model.embedder.*.normalization.*"),
    ("backbone.stem.*", "model.backbone.model.embedder.*"),
    ("backbone.stages.*.conv.weight", "model.backbone.model.encoder.stages.*.convolution.weight"),
    ("backbone.stages.*.bn.*", "model.backbone.model.encoder.stages.*.normalization.*"),
    ("backbone.stages.*", "model.backbone.model.encoder.stages.*"),
    ("encoder.input_proj.#.conv.*", "model.encoder_input_proj.#.0.*"),
    ("encoder.input_proj.#.norm.*", "model.encoder_input_proj.#.1.*"),
    ("encoder.encoder.#.layers.#.self_attn.out_proj.*", "model.encoder.aifi.#.layers.#.self_attn.o_proj.*"),
    ("encoder.encoder.#.layers.#.linear1.*", "model.encoder.aifi.#.layers.#.mlp.layers.0.*"),
    ("encoder.encoder.#.layers.#.linear2.*", "model.encoder.aifi.#.layers.#.mlp.layers.1.*"),
    ("encoder.encoder.#.layers.#.norm1.*", "model.encoder.aifi.#.layers.#.self_attn_layer_norm.*"),
    ("encoder.encoder.#.layers.#.norm2.*", "model.encoder.aifi.#.layers.#.final_layer_norm.*"),
    ("encoder.encoder.*", "model.encoder.aifi.*"),
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
    ("decoder.decoder.layers.#.linear1.*", "model.decoder.layers.#.mlp.layers.0.*"),
    ("decoder.decoder.layers.#.linear2.*", "model.decoder.layers.#.mlp.layers.1.*"),
    ("decoder.decoder.layers.#.norm3.*", "model.decoder.layers.#.final_layer_norm.*"),
    ("decoder.decoder.layers.*", "model.decoder.layers.*"),
    ("decoder.decoder.lqe_layers.*", "model.decoder.lqe_layers.*"),
    ("decoder.query_pos_head.*", "model.decoder.query_pos_head.*"),
    ("decoder.pre_bbox_head.*", "model.decoder.pre_bbox_head.*"),
    ("decoder.dec_score_head.*", "model.decoder.class_embed.*"),
    ("decoder.dec_bbox_head.*", "model.decoder.bbox_embed.*"),
    ("decoder.decoder.up", "model.decoder.up"),
    ("decoder.decoder.reg_scale", "model.decoder.reg_scale"),
)

# Tensors that a second name refers to: published files repeat two scalars, `transformers` repeats the heads.
PUBLISHED_COPIES = (("decoder.up", "decoder.decoder.up"), ("decoder.reg_scale", "decoder.decoder.reg_scale"))
HF_COPIES = (("class_embed.*", "model.decoder.class_embed.*"), ("bbox_embed.*", "model.decoder.bbox_embed.*"))

# The name inside a `transformers` file, the name of the same tensor inside a `transformers` 5 model.
HF_FILE = (
    ("model.encoder.encoder.#.layers.#.fc1.*", "model.encoder.aifi.#.layers.#.mlp.layers.0.*"),
    ("model.encoder.encoder.#.layers.#.fc2.*", "model.encoder.aifi.#.layers.#.mlp.layers.1.*"),
    ("model.encoder.encoder.#.layers.#.self_attn.out_proj.*", "model.encoder.aifi.#.layers.#.self_attn.o_proj.*"),
    ("model.encoder.encoder.*", "model.encoder.aifi.*"),
    ("model.decoder.layers.#.fc1.*", "model.decoder.layers.#.mlp.layers.0.*"),
    ("model.decoder.layers.#.fc2.*", "model.decoder.layers.#.mlp.layers.1.*"),
    ("model.decoder.layers.#.self_attn.out_proj.*", "model.decoder.layers.#.self_attn.o_proj.*"),
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


_to_model, _from_model = _Renames(NAMES), _Renames(_turned(NAMES))
_to_file, _from_file = _Renames(_turned(HF_FILE)), _Renames(HF_FILE)
_copy_of, _original = _Renames(_turned(HF_COPIES)), _Renames(HF_COPIES)


def published_name(key: str) -> str:
    """What published files call the detector's own tensor `key`; a published name stays what it is."""
    for ours, theirs in PUBLISHED:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def hf_names(key: str) -> tuple[str, ...]:
    """What the published tensor `key` is called in a `transformers` 5 model: one name, or several, or none.

    Packed attention projections have three names (query, key, value rows), detection heads two (the second is tied to
    the first), anchors none because `transformers` computes them. Raises `CheckpointError` if `key` is not D-FINE's.
    """
    if key in COMPUTED:
        return ()
    if packed := PACKED.fullmatch(key):
        return tuple(name for part in "qkv" for name in hf_names(f"{packed[1]}.{part}_proj.{packed[2]}"))
    name = _to_model(dict(PUBLISHED_COPIES).get(key, key))
    if name is None:
        raise CheckpointError(f"Expected a tensor name of D-FINE; got {key!r}, which transformers has no place for.")
    copy = _copy_of(name)
    return (name,) if copy is None else (name, copy)


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that `transformers` files use; the inverse of `from_hf` up to computed ones."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = hf_names(key)
        parts = tensor.chunk(3) if PACKED.fullmatch(key) else (tensor,) * len(names)  # (3D, ...) -> 3 x (D, ...)
        renamed |= {_to_file(name) or name: part for name, part in zip(names, parts, strict=True)}
    return renamed


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under their published names, attention projections packed.

    Takes the names that `transformers` gives in files and in models; one that it does not give D-FINE is kept as it
    is, so that loading can report it.
    """
    state = {_from_file(name) or name: tensor for name, tensor in state.items()}
    repeated = {name for name in state if _original(name) in state}
    renamed = {
        _from_model(_original(name) or name) or name: tensor for name, tensor in state.items() if name not in repeated
    }
    for query in [key for key in renamed if QUERY.fullmatch(key)]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in parts):
            packed = torch.cat([renamed.pop(part) for part in parts])  # 3 x (D, ...) -> (3D, ...)
            renamed[query.replace(".q_proj.", ".in_proj_")] = packed
    return renamed | {copy: renamed[key] for copy, key in PUBLISHED_COPIES if key in renamed}
