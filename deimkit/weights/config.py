"""The same architecture written as an `Arch` and as a `transformers` config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deimkit.data.dataset import CategoryMap
from deimkit.errors import CheckpointError
from deimkit.models.decoder import Decoder
from deimkit.models.detector import Arch
from deimkit.models.encoder import GELAN, CSPRep, Hybrid
from deimkit.models.groups import Denoise
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.queries import TopK
from deimkit.models.refine import FDR, LookForwardTwice
from deimkit.models.resnet import ResNetVD
from deimkit.recipes.archs import dfine_arch, rtdetrv2_arch
from deimkit.weights.classes import named

OURS = "deimkit"  # our entry in a config: what transformers has no field for
KINDS = {"d_fine": "DFineForObjectDetection", "rt_detr_v2": "RTDetrV2ForObjectDetection"}  # model_type, and its class
# Fields that transformers rounds to channels and blocks, so that several values mean the same, and some it never reads.
ROUNDED = ("hidden_expansion", "depth_mult", "embedding_size", "depths", "hidden_sizes")


def kind_of(arch: Arch) -> str:
    """The model type that `transformers` has for an architecture; `CheckpointError` if it has none."""
    parts, decoder = (arch.backbone, arch.encoder.fusion, arch.refine), arch.decoder
    kind = tuple(map(type, parts)), decoder.projected, decoder.gated
    if kind == ((HGNetV2, GELAN, FDR), False, True):
        return "d_fine"
    if kind == ((ResNetVD, CSPRep, LookForwardTwice), True, False):
        return "rt_detr_v2"
    raise CheckpointError(
        "transformers has D-FINE and RT-DETRv2, but no class for this mixture of their parts. Keep it as a checkpoint "
        "of deimkit, or export it to ONNX."
    )


def differences(arch: Arch) -> list[str]:
    """What `transformers` would compute otherwise, in words, for an architecture of these kinds."""
    found = [] if arch.activation == "relu" else [f"the prediction heads with ReLU, not {arch.activation!r}"]
    if kind_of(arch) == "rt_detr_v2":
        decoder = arch.decoder
        if decoder.position != (2,):
            found.append("the position code with one hidden layer, not as DEIM's")
        if decoder.asked not in (None, decoder.layers - 1):
            found.append(f"all {decoder.layers} decoder layers, not only the first {decoder.asked + 1}")
        if isinstance(arch.encoder.fusion, CSPRep) and arch.encoder.fusion.blocks != 3:
            found.append("three blocks in every fusion stage")
    return found


def to_config(arch: Arch, categories: CategoryMap) -> dict[str, Any]:
    """What the config class of `transformers` takes for a detector of `arch` and `categories`."""
    names, kind = [str(name) for name in categories.names], kind_of(arch)
    return _structure(arch) | {
        "architectures": [KINDS[kind]],
        "model_type": kind,
        "dtype": "float32",
        "freeze_backbone_batch_norms": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        OURS: {
            "activation": arch.activation,
            "row_major": arch.encoder.row_major,
            "position": list(arch.decoder.position),
            "asked": arch.decoder.asked,
            "blocks": arch.encoder.fusion.blocks,
            "frozen": arch.backbone.frozen,
            "categories": categories.to_dict(),
        },
    }


def categories_of(config: Mapping[str, Any]) -> CategoryMap | None:
    """The classes that a `transformers` config names, with their ids if we wrote it; None if it only counts them."""
    labels = config.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    ours = (config.get(OURS) or {}).get("categories")
    if ours and tuple(ours["names"]) == names:
        return CategoryMap.from_dict(ours)
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else named(names)


def arch_of(config: Mapping[str, Any]) -> Arch:
    """The architecture of a `transformers` D-FINE or RT-DETRv2 config; `CheckpointError` if deimkit cannot build it.

    Fields that the config leaves out have `transformers`' defaults. Position codes are row by row, as `transformers`
    makes them, unless the config is one of ours and says otherwise; only non-square inputs tell the difference.
    Activations are ReLU: `transformers` builds its prediction heads with nothing else, so that a config with SiLU in
    the decoder layers alone is refused unless it is one of ours, where it means SiLU everywhere (DEIM).
    """
    dfine = config.get("model_type", "d_fine") == "d_fine"
    defaults = _structure(dfine_arch("l", "relu") if dfine else rtdetrv2_arch("r50vd", "relu"))
    try:
        net = {**defaults["backbone_config"], **(config.get("backbone_config") or {})}
        c = {**defaults, **config, "backbone_config": net}
        if dfine:
            c["decoder_n_points"] = _each(c["decoder_n_points"], len(net["out_features"]))
        arch = (_dfine if dfine else _rtdetr)(c, net, config.get(OURS) or {})
        built = _structure(arch)
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"Expected a D-FINE or RT-DETRv2 config of transformers; got one that makes no sense: {error}."
        ) from error
    _check(c, built)
    return arch


def _dfine(c: dict[str, Any], net: dict[str, Any], own: dict[str, Any]) -> Arch:
    """The `Arch` of a complete D-FINE config `c`, its backbone's config `net`, and what we noted in it."""
    width = c["encoder_hidden_dim"]
    return Arch(
        backbone=HGNetV2(
            stem=tuple(net["stem_channels"][1:]),
            mid=tuple(net["stage_mid_channels"]),
            out=tuple(net["stage_out_channels"]),
            blocks=tuple(net["stage_num_blocks"]),
            layers=net["stage_numb_of_layers"][0],
            lab=net["use_learnable_affine_block"],
            levels=_levels(net),
            frozen=own.get("frozen", False),
        ),
        encoder=_hybrid(c, own, GELAN(round(c["hidden_expansion"] * width // 2), round(3 * c["depth_mult"]))),
        decoder=_decoder(c, tuple(c["decoder_n_points"])),
        queries=TopK(c["num_queries"]),
        groups=_groups(c),
        refine=FDR(c["max_num_bins"], c["up"], c["reg_scale"], c["top_prob_values"], c["lqe_hidden_dim"]),
        activation=own.get("activation", "relu"),
    )


def _rtdetr(c: dict[str, Any], net: dict[str, Any], own: dict[str, Any]) -> Arch:
    """The `Arch` of a complete RT-DETRv2 config `c`, its backbone's config `net`, and what we noted in it."""
    hidden, bottleneck = int(c["encoder_hidden_dim"] * c["hidden_expansion"]), net["layer_type"] == "bottleneck"
    kind = {"projected": True, "gated": False, "discrete": c["decoder_method"] == "discrete"}
    ours = {"position": tuple(own.get("position", (2,))), "asked": own.get("asked")}
    return Arch(
        backbone=ResNetVD(
            blocks=tuple(net["depths"]),
            bottleneck=bottleneck,
            levels=_levels(net),
            frozen=own.get("frozen", False),
            stem=net["embedding_size"],
            widths=tuple(channels // (4 if bottleneck else 1) for channels in net["hidden_sizes"]),
        ),
        encoder=_hybrid(c, own, CSPRep(hidden, own.get("blocks", 3))),
        decoder=_decoder(c, (c["decoder_n_points"],) * len(net["out_features"]), **kind, **ours),
        queries=TopK(c["num_queries"]),
        groups=_groups(c),
        refine=LookForwardTwice(),
        activation=own.get("activation", "relu"),
    )


def _levels(net: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(name.removeprefix("stage")) - 1 for name in net["out_features"])


def _hybrid(c: dict[str, Any], own: dict[str, Any], fusion: GELAN | CSPRep) -> Hybrid:
    return Hybrid(
        width=c["encoder_hidden_dim"],
        ffn=c["encoder_ffn_dim"],
        fusion=fusion,
        heads=c["encoder_attention_heads"],
        row_major=own.get("row_major", True),
    )


def _decoder(c: dict[str, Any], points: tuple[int, ...], **others: Any) -> Decoder:
    return Decoder(
        layers=c["decoder_layers"],
        width=c["d_model"],
        ffn=c["decoder_ffn_dim"],
        points=points,
        heads=c["decoder_attention_heads"],
        **others,
    )


def _groups(c: dict[str, Any]) -> tuple[Denoise, ...]:
    denoise = Denoise(c["num_denoising"], c["label_noise_ratio"], c["box_noise_scale"])
    return (denoise,) if denoise.queries else ()


def _each(points: int | list[int], levels: int) -> list[int]:
    return [points] * levels if isinstance(points, int) else points


def _check(config: Mapping[str, Any], built: dict[str, Any]) -> None:
    """Raise `CheckpointError` for the first field where a config differs from what its own `Arch` says."""
    for key, ours in built.items():
        if isinstance(ours, dict):
            _check(config[key], ours)
        elif key not in ROUNDED and config[key] != ours:
            raise CheckpointError(
                f"Expected a config with {key} = {ours!r}; got {config[key]!r}, which deimkit does not build "
                "from a config. If the weights fit a recipe, name it: load(RECIPE, weights=FOLDER)."
            )


def _structure(arch: Arch) -> dict[str, Any]:
    """The fields of a `transformers` config that say what is built and how it computes."""
    kind_of(arch)
    encoder, decoder, levels = arch.encoder, arch.decoder, len(arch.backbone.levels)
    denoise = arch.groups[0] if arch.groups else Denoise(0)
    common = {
        "layer_norm_eps": 1e-5,
        "batch_norm_eps": 1e-5,
        "encoder_hidden_dim": encoder.width,
        "encoder_in_channels": list(arch.backbone.channels),
        "feat_strides": list(arch.backbone.strides),
        "encoder_layers": 1,
        "encoder_ffn_dim": encoder.ffn,
        "encoder_attention_heads": encoder.heads,
        "encode_proj_layers": [levels - 1],
        "positional_encoding_temperature": 10000,
        "encoder_activation_function": "gelu",
        "activation_function": "silu",
        "normalize_before": False,
        "d_model": decoder.width,
        "decoder_in_channels": [encoder.width] * levels,
        "decoder_ffn_dim": decoder.ffn,
        "num_feature_levels": levels,
        "decoder_layers": decoder.layers,
        "decoder_attention_heads": decoder.heads,
        "decoder_activation_function": arch.activation,
        "decoder_offset_scale": 0.5,
        "num_queries": arch.queries.count,
        "learn_initial_query": False,
        "num_denoising": denoise.queries,
        "label_noise_ratio": denoise.label_noise,
        "box_noise_scale": denoise.box_noise,
    }
    return common | (_dfine_structure(arch) if decoder.gated else _rtdetr_structure(arch))


def _dfine_structure(arch: Arch) -> dict[str, Any]:
    net, encoder, refine = arch.backbone, arch.encoder, arch.refine
    assert isinstance(net, HGNetV2) and isinstance(refine, FDR), "kind_of has looked"
    return {
        "backbone_config": {
            "model_type": "hgnet_v2",
            "num_channels": 3,
            "embedding_size": net.stem[1],
            "depths": list(net.blocks),
            "hidden_sizes": list(net.out),
            "hidden_act": "relu",
            "stem_channels": [3, *net.stem],
            "stem_strides": [2, 1, 1, 2, 1],
            "stage_in_channels": [net.stem[1], *net.out[:-1]],
            "stage_mid_channels": list(net.mid),
            "stage_out_channels": list(net.out),
            "stage_num_blocks": list(net.blocks),
            "stage_downsample": [False, True, True, True],
            "stage_downsample_strides": [2, 2, 2, 2],
            "stage_light_block": [False, False, True, True],
            "stage_kernel_size": [3, 3, 5, 5],
            "stage_numb_of_layers": [net.layers] * 4,
            "use_learnable_affine_block": net.lab,
            **_handed_on(net.levels),
        },
        "hidden_expansion": 2 * encoder.fusion.hidden / encoder.width,
        "depth_mult": encoder.fusion.blocks / 3,
        "decoder_n_points": list(arch.decoder.points),
        "decoder_method": "default",
        "eval_idx": -1,
        "layer_scale": 1.0,
        "max_num_bins": refine.bins,
        "up": refine.up,
        "reg_scale": refine.scale,
        "top_prob_values": refine.top,
        "lqe_hidden_dim": refine.hidden,
        "lqe_layers": 2,
    }


def _rtdetr_structure(arch: Arch) -> dict[str, Any]:
    net, encoder, decoder = arch.backbone, arch.encoder, arch.decoder
    assert isinstance(net, ResNetVD), "kind_of has looked"
    if len(set(decoder.points)) != 1:
        raise CheckpointError(
            f"transformers' RT-DETRv2 samples as many points on every level; the detector has {decoder.points}. "
            "Keep it as a checkpoint of deimkit, or export it to ONNX."
        )
    return {
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "num_channels": 3,
            "embedding_size": net.stem,
            "depths": list(net.blocks),
            "hidden_sizes": [width * (4 if net.bottleneck else 1) for width in net.widths],
            "layer_type": "bottleneck" if net.bottleneck else "basic",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            **_handed_on(net.levels),
        },
        "hidden_expansion": encoder.fusion.hidden / encoder.width,
        "decoder_n_levels": len(decoder.points),
        "decoder_n_points": decoder.points[0],
        "decoder_method": "discrete" if decoder.discrete else "default",
        "with_box_refine": True,
    }


def _handed_on(levels: tuple[int, ...]) -> dict[str, Any]:
    return {
        "out_features": [f"stage{level + 1}" for level in levels],
        "out_indices": [level + 1 for level in levels],
    }
