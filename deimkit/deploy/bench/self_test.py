"""What to run first on a machine that is to measure: whether its GPU, its clocks and its runtimes are as they seem."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deimkit.data.fetch import amount
from deimkit.deploy.bench.timing import Clock
from deimkit.deploy.clocks import FIELDS, processes, query
from deimkit.deploy.machine import Gpu, processor, smi_name

NAP = 0.05  # seconds
LATE = 0.01  # seconds that a nap may take longer
SEE_A_GPU = (
    "Does `nvidia-smi` list it? If not, install the driver. If so, install a torch that is built for a CUDA version "
    "that this driver supports, and look at CUDA_VISIBLE_DEVICES."
)
ROOM = 2 * 2**30  # bytes of a GPU's memory to build an engine in


@dataclass(frozen=True)
class Check:
    """One question and its answer. ok: None where it could not be asked. remedy: what to do about it, or ""."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILS", None: "not tried"}[self.ok]
        return f"{mark:9}  {self.name}: {self.detail}" + (f"  -> {self.remedy}" if self.remedy else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """What to find out. ask: returns whether it is as it should be, and what was seen; what it raises is a no.

    of_gpu: whether there is nothing to ask without one.
    """

    name: str
    ask: Callable[[], tuple[bool, str]]
    remedy: str
    of_gpu: bool = True

    def check(self) -> Check:
        """The answer, whatever happens."""
        try:
            ok, detail = self.ask()
        except Exception as error:  # a broken driver fails in its own ways, and the other checks are still wanted
            ok, detail = False, f"{type(error).__name__}: {error}"
        return Check(self.name, ok, detail, "" if ok else self.remedy)


def self_test(
    device: torch.device | str = "cuda", smoke: Callable[[], str] | None = None, clock: Clock | None = None
) -> list[Check]:
    """Ask all that a benchmark takes for granted on `device`; never raises.

    smoke: builds and runs something small in the runtime that is to be measured, and returns what it saw in words, or
    raises. Without a GPU what concerns one is not tried.
    """
    where, time = torch.device(device), clock or Clock()
    first, *rest = _about_gpu(where, time) if where.type == "cuda" else [_processor()]
    rest.append(_stopwatch(time))
    if smoke is not None:
        rest.append(_small_graph(smoke, of_gpu=where.type == "cuda"))
    there = first.check()
    unasked = "there is no GPU to ask"
    return [there] + [q.check() if there.ok or not q.of_gpu else Check(q.name, None, unasked) for q in rest]


def no_gpu() -> Check:
    """That nothing of a GPU was tried because torch finds none, and what to do if one should be there."""
    return Check("GPU", None, f"{_unseen()}: neither its clocks nor TensorRT were tried", SEE_A_GPU)


def passed(checks: Sequence[Check]) -> bool:
    """Whether all is well: nothing fails, and nothing was left untried."""
    return all(check.ok for check in checks)


def _about_gpu(device: torch.device, clock: Clock) -> list[Question]:
    return [_gpu(device), *_driver(device), *_work(device, clock), _tensorrt()]


def _processor() -> Question:
    return Question("processor", lambda: (True, f"{processor()}, {torch.get_num_threads()} threads"), "", of_gpu=False)


def _stopwatch(clock: Clock) -> Question:
    def ask() -> tuple[bool, str]:
        naps = []
        for _ in range(3):
            start = clock.now()
            clock.rest(NAP)
            naps.append(clock.now() - start)
        return NAP - 1e-4 <= min(naps) <= NAP + LATE, f"a nap of {1e3 * NAP:.0f} ms took {1e3 * min(naps):.1f} ms"

    return Question("stopwatch", ask, "The machine is too busy to be a measure: stop other work.", of_gpu=False)


def _small_graph(smoke: Callable[[], str], of_gpu: bool) -> Question:
    return Question("a small graph", lambda: (True, smoke()), "The message is the runtime's own: read it.", of_gpu)


def _gpu(device: torch.device) -> Question:
    def ask() -> tuple[bool, str]:
        return (True, str(Gpu.of(device))) if torch.cuda.is_available() else (False, _unseen())

    return Question("GPU", ask, SEE_A_GPU)


def _unseen() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"torch {torch.__version__}, {built}, sees none"


def _driver(device: torch.device) -> list[Question]:
    def clocks() -> tuple[bool, str]:
        cells = query(smi_name(device), FIELDS)
        seen = ", ".join(f"{name} {cell or 'unknown'}" for name, cell in zip(FIELDS, cells or (), strict=False))
        return bool(cells) and None not in (cells or ())[:2], seen or "nvidia-smi does not answer"

    def alone() -> tuple[bool, str]:
        torch.cuda.mem_get_info(device)  # so that this process is one of them, in a container by a number of the host
        numbers = processes(smi_name(device))
        if numbers is None:
            return False, "nvidia-smi does not tell"
        others = ", ".join(str(number) for number in numbers if number != os.getpid())
        seen = f"{len(numbers)} processes compute on it: {others}"
        return len(numbers) <= 1, seen if len(numbers) > 1 else "nobody else is seen"

    def room() -> tuple[bool, str]:
        free, total = torch.cuda.mem_get_info(device)
        return free >= ROOM, f"{amount(free)} of {amount(total)} are free"

    return [
        Question(
            "clocks",
            clocks,
            "Numbers can be measured, but nobody can tell whether the GPU was throttled: put nvidia-smi on the PATH, "
            "and in a container ask for the driver's utilities (NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
        ),
        Question("no one else on the GPU", alone, "Stop the others, or measure when they are done."),
        Question("free memory", room, "Stop what holds it; building an engine takes 2 GiB or more."),
    ]


def _work(device: torch.device, clock: Clock) -> list[Question]:
    return [
        Question(
            "CUDA events beside the wall clock",
            lambda: _events(device, clock),
            "Trust the wall clock only, and report the GPU, driver and torch to deimkit.",
        ),
        Question(
            "CUDA graph",
            lambda: _graph(device),
            "Measure without CUDA graphs (graph=False); a driver that matches torch's CUDA may mend it.",
        ),
    ]


def _tensorrt() -> Question:
    def ask() -> tuple[bool, str]:
        from deimkit.deploy.trt.library import tensorrt

        return True, f"TensorRT {tensorrt().__version__}"

    return Question("TensorRT", ask, "Install one for this driver's CUDA from NVIDIA; the message says which one fits.")


def _events(device: torch.device, clock: Clock) -> tuple[bool, str]:
    """Whether the two clocks agree on work that keeps the GPU busy for some milliseconds."""
    x = torch.ones(2048, 2048, device=device)

    def work() -> None:
        for _ in range(20):
            torch.mm(x, x)

    for _ in range(2):
        clock.time(work, device)
    wall, gpu = clock.time(work, device)
    agree = gpu is not None and 0.5 * wall - 1e-3 <= gpu <= 1.05 * wall + 1e-4
    return agree, f"{1e3 * wall:.2f} ms by the wall, {1e3 * (gpu or 0):.2f} ms by events"


def _graph(device: torch.device) -> tuple[bool, str]:
    """Whether work that was captured once gives the same when it is replayed on other numbers."""
    with torch.cuda.device(device):
        x, graph = torch.ones(64, 64, device=device), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x @ x  # libraries set themselves up outside of the graph
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            y = x @ x
        x.fill_(2.0)
        graph.replay()
        torch.cuda.synchronize()
        return bool((y == 256.0).all()), f"a replay gave {float(y[0, 0]):g}, expected 256"
