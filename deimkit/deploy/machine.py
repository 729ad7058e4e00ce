"""The machine that a number was measured on, for without it the number means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deimkit.data.fetch import amount
from deimkit.deploy.clocks import query

PACKAGES = (
    *("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes. capability: compute capability, "7.5" for a T4. cuda: version that torch was built for.

    driver, watts_limit, sm_mhz_limit: what `nvidia-smi` says of it, or None where that does not answer.
    """

    name: str
    capability: str
    memory: int
    multiprocessors: int
    cuda: str | None
    driver: str | None
    watts_limit: float | None
    sm_mhz_limit: float | None

    @staticmethod
    def of(device: torch.device) -> Gpu:
        """The GPU that torch calls `device`."""
        properties = torch.cuda.get_device_properties(device)
        told = query(smi_name(device), ("driver_version", "power.limit", "clocks.max.sm")) or [None] * 3
        return Gpu(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            memory=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            driver=told[0],
            watts_limit=None if told[1] is None else float(told[1]),
            sm_mhz_limit=None if told[2] is None else float(told[2]),
        )

    def __str__(self) -> str:
        driver = f"driver {self.driver}" if self.driver else "driver unknown: nvidia-smi does not answer"
        return f"{self.name} (compute {self.capability}, {amount(self.memory)}, {driver}, CUDA {self.cuda})"


@dataclass(frozen=True)
class Machine:
    """What was measured on.

    cores: that this process may use. threads: of torch. threads_asked: OMP_NUM_THREADS, or "". memory: bytes, 0 on
    Windows. versions: of packages. gpu: None where nothing ran on one.
    """

    processor: str
    cores: int
    threads: int
    threads_asked: str
    memory: int
    system: str
    python: str
    versions: dict[str, str]
    gpu: Gpu | None = None

    @staticmethod
    def of(devices: Sequence[torch.device] = ()) -> Machine:
        """This machine, with the first GPU among `devices`."""
        gpu = next((device for device in devices if device.type == "cuda"), None)
        return Machine(
            processor=processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            threads_asked=os.environ.get("OMP_NUM_THREADS", ""),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            versions=versions(),
            gpu=None if gpu is None else Gpu.of(gpu),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        host = f"{self.processor}, {self.cores} cores, {amount(self.memory)}, {self.system}, Python {self.python}"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*([str(self.gpu)] if self.gpu else []), host, packages])


def hardware(device: torch.device) -> str:
    """What the device calls itself: a GPU by its own name, a CPU by its model. No one else names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """What the processor calls itself, or its architecture where the system does not say."""
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """The versions of deimkit and of what it can measure, as installed; nothing is imported for it."""
    from deimkit import __version__

    found = {"deimkit": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def smi_name(device: torch.device) -> str:
    """What `nvidia-smi` calls a GPU of torch: by its UUID, since CUDA_VISIBLE_DEVICES changes torch's numbers only."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def processor_seconds() -> tuple[float, float, float] | None:
    """Seconds the cores of this machine have existed, have worked, and have worked for this process; Linux only.

    What the host of a virtual machine took away counts as work for others. None elsewhere.
    """
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    ticks = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # idle, and idle while a disk works
    per_second, own = os.sysconf("SC_CLK_TCK"), os.times()
    ours = own.user + own.system + own.children_user + own.children_system
    return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, ours
