"""Which lines would make the host wait if a batch were on a GPU: a stand-in for one, for machines without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

WAITS = {  # what needs a number, or a shape, that only the device knows
    *("__bool__", "__int__", "__float__", "__index__", "__len__", "item", "tolist", "numpy", "cpu", "is_nonzero"),
    *("nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "bincount", "equal", "allclose"),
}
FREE = {"__len__"}  # the host knows the shapes of what is there


class Asked(TorchFunctionMode):
    """Notes every line that asks a `there` tensor, or one made from such tensors, for its numbers.

    `cpu` hands out a copy that may be asked at will. What torch does inside its own functions is not seen.
    """

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.lines: list[str] = []
        for tensor in there:
            mark(tensor)

    def __torch_function__(self, f: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        on_device = any(map(is_there, given))
        name = (resolve_name(f) or getattr(f, "__name__", "")).rpartition(".")[2]
        if on_device and name not in FREE and (name in WAITS or by_mask(name, args)):
            self.lines.append(f"{place()} {name}")
        found = f(*args, **kwargs)
        if name == "cpu":
            return found.clone()
        if on_device:
            for tensor in tensors(found):
                mark(tensor)
        return found


def by_mask(name: str, args: Any) -> bool:
    """Whether values are picked by a mask, so that only the device knows how many."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype == torch.bool and is_there(i) for i in index)


def place() -> str:
    """The nearest line of the package that is being run: "criterion.py:95"."""
    frame = sys._getframe()
    while frame.f_back is not None and "/deimkit/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def mark(tensor: Tensor) -> None:
    """Let a tensor count as on the device."""
    tensor._there = True  # type: ignore[attr-defined]


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor counts as on the device."""
    return getattr(tensor, "_there", False)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
