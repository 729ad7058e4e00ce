"""Compiled steps: what of a detector `torch.compile` turns into graphs, and whether this machine can."""

from __future__ import annotations

import torch

from deimkit.errors import DeimkitError
from deimkit.models.detector import Detector
from deimkit.ranks import ALONE, Ranks


def compile_parts(model: Detector, ranks: Ranks = ALONE) -> None:
    """Let the parts of a detector that do its arithmetic be compiled when they are next called, each as one graph.

    No name in the state dict changes, and a copy of the model is not compiled. The first step takes minutes; another
    size of images or number of queries takes as long once more, and every further one nothing. Noisy queries, matching
    and losses stay as they are: their shapes follow from numbers. ranks: with several, the parts with batch norms stay
    too, as those hear from the other processes.
    """
    parts = [model.queries, model.decoder]
    for part in parts if ranks.many else [model.backbone, model.encoder, *parts]:
        part.compile()


def expect_compiler(device: torch.device) -> None:
    """Raise `DeimkitError` unless something small can be compiled for `device`."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:200]
        needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise DeimkitError(
            f"compile=True needs {needed} that torch {torch.__version__} can use for {device}; here: {why}. Install "
            "it, or train without."
        ) from error


def graphs() -> int:
    """How many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters  # not at the top: it takes a second to import

    return int(counters["stats"]["unique_graphs"])
