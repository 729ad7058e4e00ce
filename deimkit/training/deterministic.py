"""The same seed, the same bits: how a training on a GPU is made to repeat itself exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deimkit.errors import DeimkitError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPRODUCIBLE = (":4096:8", ":16:8")  # the sizes of its workspaces with which cuBLAS says that it repeats itself


@contextmanager
def deterministic() -> Iterator[None]:
    """A block in which the same computation gives the same bits every time, on the same GPU and software.

    Torch sums in a fixed order, and raises where it cannot; cuDNN tries no algorithms out; attention is the matrix
    products that its formula names rather than a fused kernel. All of it holds for the whole process, and is as it was
    after the block. Raises `DeimkitError` where cuBLAS has begun in another way. Source: torch, "Reproducibility".
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with _reproducible_cublas(), sdpa_kernel(SDPBackend.MATH):
        try:
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])


@contextmanager
def _reproducible_cublas() -> Iterator[None]:
    """A block in which cuBLAS repeats itself; once it has begun so it goes on so, and the setting stays to say it."""
    before = os.environ.get(WORKSPACE)
    if before not in REPRODUCIBLE:
        if _gpu_is_used():
            raise DeimkitError(
                f"To repeat itself exactly, cuBLAS needs {WORKSPACE}={REPRODUCIBLE[0]} in the environment before this "
                f"process computes anything on a GPU, which it has; got {before!r}. Set it before Python starts, or "
                "train in a process of its own (wait=False)."
            )
        os.environ[WORKSPACE] = REPRODUCIBLE[0]
    try:
        yield
    finally:
        if not _gpu_is_used():
            _restore(before)


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(WORKSPACE, None)
    else:
        os.environ[WORKSPACE] = value


def _gpu_is_used() -> bool:
    """Whether this process has had memory on a GPU; cuBLAS has not begun before, for its workspace lies there."""
    return any(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
