"""What this machine offers to a training: its device, its number formats, and its cores."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from deimkit.errors import DeimkitError


def pick_device(name: str, local: int | None = None) -> torch.device:
    """The device called `name`; "auto" is the best this machine has. Raises `DeimkitError` if it has no such device.

    local: which process of this machine asks, where several train together; each gets a GPU of its own.
    """
    there = devices()
    if name == "auto":
        name = next(kind for kind, count in there.items() if count)
    if name == "cuda" and local is not None:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeimkitError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:0', 'mps' ...; got {name!r}.") from error
    if not has_device(name):
        found = ", ".join(f"{count} {kind}" for kind, count in there.items() if count)
        raise DeimkitError(
            f"device={name!r}, but torch {torch.__version__} finds only {found} here. Use device='cpu' or 'auto'."
        )
    return device


def devices() -> dict[str, int]:
    """How many of each kind of device torch finds here, the best kind first."""
    return {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }


def has_device(name: str) -> bool:
    """Whether this machine has the device called `name`, such as "cuda:1"."""
    device = torch.device(name)
    return (device.index or 0) < devices().get(device.type, 0)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: "auto" is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise DeimkitError("precision='fp16' needs a GPU; on a CPU use 'fp32' or 'bf16'.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def peak_memory() -> int:
    """The most memory this process has had at once so far, in bytes."""
    import resource

    status = Path("/proc/self/status")  # Linux: its getrusage counts what the parent had when it started this process
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def default_workers() -> int:
    """Loader processes for this machine: all cores but one, at most 8; none where only two cores share the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(cores - 1, 8)


def versions() -> dict[str, str]:
    """What trained, for the record."""
    from deimkit import __version__

    return {"deimkit": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a training on `device` draws from."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators back into a `random_state`, as far as this device has them; other entries are left alone."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state.get("rng_cuda") is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], device)
