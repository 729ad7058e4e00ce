"""Whether a GPU ran at full speed: its clocks, temperature and power, through `nvidia-smi`, while it is measured."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from threading import Thread
from types import TracebackType
from typing import Any, Self

EVERY_MS = 500  # between two looks while it works; a look costs a GPU about nothing, but starting nvidia-smi does
PATIENCE = 20.0  # seconds for an answer; the first one after a long idle time can take some

FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")
LIMITS = ("clocks_throttle_reasons.active", "clocks_event_reasons.active")  # renamed with driver 535
# NVML's bits of what keeps clocks from rising: those that say that it is slower than it could be, and the others.
SLOW = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
}
SETTINGS = {0x01: "idle", 0x02: "application clocks", 0x10: "sync boost", 0x100: "display clocks"}


@dataclass(frozen=True)
class Sample:
    """How a GPU was doing. moment: "before", "during" or "after" measuring. busy: percent of the time since the last.

    limits: what keeps the clocks down (`SLOW`, `SETTINGS`), or None where the driver does not tell, as for any number.
    """

    moment: str
    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    busy: float | None
    limits: tuple[str, ...] | None

    @staticmethod
    def of(moment: str, cells: Sequence[str | None]) -> Sample:
        """The sample of a line of `nvidia-smi`: `FIELDS`, and a bit mask in hexadecimal."""
        *numbers, mask = cells
        sm, memory, celsius, watts, busy = (None if cell is None else float(cell) for cell in numbers)
        names = {**SLOW, **SETTINGS}
        limits = None if mask is None else tuple(name for bit, name in names.items() if int(mask, 16) & bit)
        return Sample(moment, sm, memory, celsius, watts, busy, limits)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def query(gpu: str, fields: Iterable[str]) -> list[str | None] | None:
    """What `nvidia-smi` says of the GPU with this UUID, field by field; None where it is missing or does not know."""
    answer = _ask(*_question(gpu, fields))
    return _cells(answer.splitlines()[0]) if answer else None


def processes(gpu: str) -> list[int] | None:
    """The numbers of the processes that compute on a GPU; None where nvidia-smi does not answer."""
    answer = _ask("--query-compute-apps=pid", "--format=csv,noheader,nounits", "-i", gpu)
    return None if answer is None else [int(line) for line in answer.splitlines() if line.strip().isdigit()]


class Observer:
    """Looks at a GPU before, during and after a `with` block; `samples` is what it saw, nothing if `gpu` is None.

    gpu: its UUID, as `nvidia-smi` calls it. During the block one process of `nvidia-smi` reports every half second.
    """

    def __init__(self, gpu: str | None) -> None:
        self.gpu = gpu
        self.samples: list[Sample] = []
        self._fields: tuple[str, ...] = ()
        self._process: subprocess.Popen[str] | None = None
        self._reader: Thread | None = None

    def __enter__(self) -> Self:
        if self.gpu is not None:
            self._fields = next((f for f in ((*FIELDS, name) for name in LIMITS) if query(self.gpu, f)), ())
        if self._fields:
            self._look("before")
            self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
            self._look("after")

    def _look(self, moment: str) -> None:
        cells = query(self.gpu or "", self._fields)
        if cells:
            self.samples.append(Sample.of(moment, cells))

    def _watch(self) -> None:
        """Start the process that reports, and a thread that reads what it says."""
        command = ["nvidia-smi", *_question(self.gpu or "", self._fields), "-lms", str(EVERY_MS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._reader = Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.endswith("\n") and line.count(",") == len(self._fields) - 1:  # else cut off by its end
                    self.samples.append(Sample.of("during", _cells(line)))


def verdict(samples: Sequence[Sample]) -> tuple[bool | None, str]:
    """Whether a GPU was held back while it was measured, and why; None if nobody can tell."""
    seen = [sample for sample in samples if sample.moment == "during"]
    told = [sample for sample in seen if sample.limits is not None]
    if not told:
        return None, "cannot tell: nvidia-smi reported no limits of the clocks while it worked"
    counts = {name: sum(name in (sample.limits or ()) for sample in told) for name in SLOW.values()}
    slow = ", ".join(f"{name} in {count} of {len(told)} samples" for name, count in counts.items() if count)
    ranges = [_range("SM clock", [s.sm_mhz for s in seen], "MHz"), _range("", [s.celsius for s in seen], "°C")]
    ranges.append(_range("", [s.watts for s in seen], "W"))
    what = "; ".join(filter(None, [slow or f"no slowdown in {len(told)} samples", *ranges]))
    return bool(slow), what


def _range(name: str, values: Iterable[float | None], unit: str) -> str:
    known = [value for value in values if value is not None]
    return f"{name} {min(known):.0f} to {max(known):.0f} {unit}".strip() if known else ""


def _question(gpu: str, fields: Iterable[str]) -> list[str]:
    return [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", gpu]


def _ask(*arguments: str) -> str | None:
    """The answer of `nvidia-smi`, or None."""
    try:
        asked = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _cells(line: str) -> list[str | None]:
    """The cells of a line; None for what stands in brackets: [N/A], [Not Supported], [Unknown Error]."""
    cells = [cell.strip() for cell in line.split(",")]
    return [None if cell.startswith("[") or cell in ("", "N/A") else cell for cell in cells]
