"""Reading a weight file, whoever wrote it, into tensors under their published names; reading one never runs code."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from deimkit.data.dataset import CategoryMap
from deimkit.errors import CheckpointError
from deimkit.weights.config import KINDS, categories_of
from deimkit.weights.names import from_hf, published_name

SUFFIXES = (".pth", ".pt", ".safetensors")
SCORES = ("decoder.enc_score_head.weight", "decoder.dec_score_head.0.weight")


@dataclass(frozen=True)
class State:
    """The tensors of a weight file under their published names, and what the file says about them.

    format: "published", "transformers" or "backbone" (ImageNet weights without a detector). categories: the classes of
    the head, or None if the file does not say. config: of a `transformers` folder. averaged: these are EMA weights.
    """

    path: str
    tensors: dict[str, Tensor] = field(repr=False)
    format: str = "published"
    categories: CategoryMap | None = None
    config: dict[str, Any] | None = field(default=None, repr=False)
    averaged: bool = False

    @property
    def classes(self) -> int | None:
        """How many classes the head tells apart, or None without a head."""
        return next((len(self.tensors[key]) for key in SCORES if key in self.tensors), None)


def read(path: str | Path) -> State:
    """The weights in a .pth, .pt or .safetensors file or a `transformers` D-FINE folder.

    Files: published D-FINE, DEIM and HGNetV2 weights and deimkit's own checkpoints; averaged (EMA) weights are
    preferred where a file has both. Raises `CheckpointError` if it is missing, damaged, unsafe or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"Expected a weight file or a Hugging Face folder at {path}; nothing is there.{_near(path)}"
        )
    if path.suffix == ".safetensors":
        return _state(path, _safetensors(path))
    content = _torch_file(path)
    averaged, tensors = _find_tensors(path, content)
    said = content.get("categories")
    categories = CategoryMap.from_dict(said) if isinstance(said, dict) and {"ids", "names"} <= said.keys() else None
    return _state(path, tensors, categories=categories, averaged=averaged)


def _state(path: Path, tensors: Mapping[str, Tensor], **facts: Any) -> State:
    """Recognise by their names whose tensors these are, and give them their published names."""
    tensors = {key.replace("_orig_mod.", "").removeprefix("module."): tensor for key, tensor in tensors.items()}
    if any(key.startswith("model.backbone.") for key in tensors):
        return State(str(path), from_hf(tensors), format="transformers", **facts)
    if tensors and all(key.startswith(("stem.", "stages.", "conv1.", "res_layers.")) for key in tensors):
        return State(str(path), {f"backbone.{key}": x for key, x in tensors.items()}, format="backbone", **facts)
    return State(str(path), {published_name(key): x for key, x in tensors.items()}, **facts)


def _find_tensors(path: Path, content: Any) -> tuple[bool, dict[str, Tensor]]:
    """Whether they are averaged, and the tensors: under ema, under model, or the file itself."""
    outer = content if isinstance(content, dict) else {}
    ema = outer["ema"] if isinstance(outer.get("ema"), dict) else {}
    for found in (ema.get("module"), ema.get("shadow"), outer.get("model"), outer):
        if isinstance(found, dict) and found and all(isinstance(x, Tensor) for x in found.values()):
            return any(found is x for x in ema.values()), found
    inside = ", ".join(map(str, list(outer)[:5])) or ("nothing" if outer is content else type(content).__name__)
    raise CheckpointError(f"Expected a state dict in {path}, alone or under `model` or `ema`; got {inside}.")


def _read_folder(folder: Path) -> State:
    config = _read_config(folder)
    return _state(folder, _folder_tensors(folder), categories=categories_of(config), config=config)


def _read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a `transformers` folder of D-FINE or RT-DETRv2."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected a Hugging Face folder at {folder}; it has no readable config.json.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        expected = " or ".join(map(repr, KINDS))
        raise CheckpointError(f"Expected model_type {expected} in {path}; got {kind!r}, which deimkit does not build.")
    return config


def _folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: one file, or the shards that an index lists."""
    for name, load in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch_file)):
        if (folder / name).is_file():
            return load(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: x for shard in _shards(index) for key, x in load(folder / shard).items()}
    raise CheckpointError(
        f"Expected model.safetensors or pytorch_model.bin in {folder}; found neither. Download it again."
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} does not list the shards of the weights. Download it again.") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"Expected a part of the weights at {path}; it is missing. Download it again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}). Download it again.") from error


def _torch_file(path: Path) -> Any:
    """Tensors and plain values from a torch file; anything that would have to be called is refused by name."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called:
            raise CheckpointError(
                f"{path} was refused: besides tensors it holds {called[1]}, and loading that could run code. "
                "Where you trust its source, save only its state dict (best as .safetensors) and load that."
            ) from error
        raise CheckpointError(f"{path} is damaged or not a weight file that torch wrote. Download it again.") from error
    except (RuntimeError, EOFError, BadZipFile, ValueError, KeyError, OSError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0][:120]
        raise CheckpointError(f"{path} is damaged or not a weight file ({reason}). Download it again.") from error


def _near(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES) if path.parent.is_dir() else []
    return f" There: {', '.join(names[:5])}." if names else ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what was written takes the name `path` at the end, whole, or not at all if writing failed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
