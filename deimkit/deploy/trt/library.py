"""TensorRT itself, imported only where it can work."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch

from deimkit.errors import DeployError

OLDEST = (8, 6, 0)  # the first with native layer normalisation, without which half precision finds nothing


def tensorrt() -> ModuleType:
    """The module `tensorrt`, once it is certain that it can be used; `DeployError` with the remedy otherwise.

    The GPU comes first: without one, TensorRT 8.6 does not raise an error but ends the process.
    """
    if not torch.cuda.is_available():
        raise DeployError(
            f"TensorRT needs an NVIDIA GPU; torch {torch.__version__} finds none here. Use ONNX Runtime or OpenVINO on "
            "this machine, or build where the engine is to run: it fits no other GPU anyway."
        )
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: Windows, where a library of it is missing
        raise DeployError(f"TensorRT cannot be imported here ({error}). {remedy()}") from error
    if not hasattr(module, "Builder"):
        found = getattr(module, "__version__", "no version")
        raise DeployError(f"The package `tensorrt` that is installed ({found}) is an empty placeholder. {remedy()}")
    if version(module) < OLDEST:
        raise DeployError(f"Expected TensorRT 8.6 or newer; got {module.__version__}. {remedy()}")
    return module


def version(trt: ModuleType) -> tuple[int, int, int]:
    """(major, minor, patch) of TensorRT: "10.12.0.36" is (10, 12, 0)."""
    major, minor, patch, *_ = [*map(int, re.findall(r"\d+", trt.__version__)[:3]), 0, 0, 0]
    return major, minor, patch


def remedy() -> str:
    """Which package to install, for the CUDA that torch was built with."""
    cuda = (torch.version.cuda or "12").partition(".")[0]
    return (
        f"torch was built for CUDA {cuda}: install NVIDIA's `tensorrt-cu{cuda}`, version 10 or 11, in this "
        "environment; packages of other names or versions, such as nvidia-tensorrt 99, hold nothing."
    )
