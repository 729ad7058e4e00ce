"""Checkpoints: written whole or not at all, they say themselves what they are, and loading one never runs code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from deimkit.errors import CheckpointError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path` so that `path` always holds a complete checkpoint.

    The bytes go to a neighbouring file, reach the disk, and then take the name in one atomic step. When the disk is
    full or the write fails, `CheckpointError` says so and the previous checkpoint is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        raise CheckpointError(
            f"Could not write {path} ({error}); {free:.0f} MiB are free there. The previous checkpoint is intact. "
            "Free some space or choose another folder, then resume."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong


def copy(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`, atomically; a hard link where the file system has them."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"Could not write {target} ({error}). Free some space, then resume.") from error


def load(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a deimkit checkpoint; raises `CheckpointError` if it is missing, damaged, unsafe or of another kind."""
    path = Path(path)
    state = read(path, device)
    if not isinstance(state, dict) or "format" not in state or "recipe" not in state:
        raise CheckpointError(
            f"{path} is not a deimkit checkpoint (no recipe inside). A published .pth is loaded with "
            "`deimkit.load(recipe_name, weights=path)`."
        )
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']}, this deimkit reads up to {FORMAT}. Upgrade deimkit."
        )
    return state


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """`torch.load` of tensors and plain values only, with errors that name the file and the remedy."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.pt*")) if path.parent.is_dir() else []
        raise CheckpointError(f"No checkpoint at {path}." + (f" There: {', '.join(near[:5])}." if near else ""))
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError, OSError) as error:
        if isinstance(error, pickle.UnpicklingError) and "invalid load key" not in str(error):
            raise CheckpointError(
                f"{path} was refused: it holds more than tensors and plain values, and loading it could run code. "
                "Ask its author for a plain state dict or a .safetensors file."
            ) from error
        why = (str(error).splitlines() or ["it is empty"])[0][:120]
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({why}). Copy or download it again.") from error


def sync_folder(folder: Path) -> None:
    """Let a rename survive a power cut: flush the folder's own entry, where the system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
