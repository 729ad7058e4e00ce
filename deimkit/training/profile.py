"""Where the time of a training step goes: real steps, taken apart, and what the numbers advise to change."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from deimkit.data.dataset import Dataset
from deimkit.data.fetch import amount
from deimkit.errors import DeimkitError
from deimkit.structures import Batch
from deimkit.training.advice import advice
from deimkit.training.compiled import compile_parts, expect_compiler, graphs
from deimkit.training.machine import peak_memory
from deimkit.training.marks import Labels, Mark, Peaks, Stopwatch, ignore, marks
from deimkit.training.rehearsal import Short, lengths
from deimkit.training.run import Plan

PARTS = {
    "images": "waiting for images",
    "copy": "to the device",
    "queries": "noisy queries",
    "backbone": "backbone",
    "encoder": "encoder",
    "decoder": "decoder",
    "matching": "matching",
    "losses": "losses",
    "backward": "backward",
    "optimiser": "clip, optimiser",
    "average": "moving average",
    "notes": "log",
}
"""The parts of a step in their order, and what they are called. "to the device" is also what is done there before the
forward pass: bytes become floats, MixUp and multi-scale. Micro-batches of a step are added up."""

LOOKED_AT = 2  # steps under torch's profiler, which makes them slower
PAIRS = 6  # steps with and without compilation
SHOWN = 8  # operators that a report names


@dataclass(frozen=True)
class StageTimes:
    """Where the steps of one stage spent their time.

    seconds: of a step by part (`PARTS`), means over the steps but the first, which warms up. boxes: per image, on
    average. loader_s: seconds that the loader takes for a batch when nothing else is done meanwhile.
    """

    stage: str
    seconds: dict[str, float]
    boxes: float
    loader_s: float

    @property
    def step_s(self) -> float:
        """Seconds from one step to the next."""
        return sum(self.seconds.values())

    def share(self, *parts: str) -> float:
        """How much of a step these parts are, in [0, 1]."""
        return sum(self.seconds.get(part, 0.0) for part in parts) / self.step_s


@dataclass(frozen=True)
class Compiled:
    """Steps with and without `torch.compile`, in turn on the same batches, without waiting for images.

    eager_s, compiled_s: median seconds. ratio: compiled / eager, the median of the pairs. build_s: what compiling took.
    """

    eager_s: float
    compiled_s: float
    ratio: float
    build_s: float
    graphs: int


@dataclass(frozen=True)
class Operator:
    """What torch's profiler says of an operator: seconds and calls per step, those of operators it calls left out."""

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a training step goes, and the memory; `advice` says what to change.

    batch: images per step, in `accumulate` parts, of size (height, width). device, gpu: where, and what that GPU is
    called. has_bf16: whether it computes in bfloat16. main: the stage that lasts longest in the whole training, from
    whose steps all is that is not told by stage: compiled, if that was asked for; operators, those that take most
    first; and of a GPU alone (else None): kernels, how many it runs in a step; busy_s, seconds of a step in which it
    runs any; waits, how often the host waits for it in a step, by line; memory, the peak of bytes by part; and
    total_memory, what it has. On a CPU peak is the most that this process has had so far.
    """

    recipe: str
    batch: int
    accumulate: int
    size: tuple[int, int]
    device: str
    gpu: str | None
    precision: str
    has_bf16: bool
    workers: int
    cores: int
    threads: int
    main: str
    stages: tuple[StageTimes, ...]
    operators: tuple[Operator, ...]
    peak: int
    compiled: Compiled | None = None
    kernels: float | None = None
    busy_s: float | None = None
    waits: dict[str, int] | None = None
    memory: dict[str, int] | None = None
    total_memory: int | None = None

    def stage(self, name: str) -> StageTimes:
        """The times of a stage."""
        return next(stage for stage in self.stages if stage.stage == name)

    @property
    def idle(self) -> float | None:
        """The share of a step in which the GPU has nothing to do."""
        return None if self.busy_s is None else max(1 - self.busy_s / self.stage(self.main).step_s, 0.0)

    @property
    def advice(self) -> list[str]:
        """What to change, in sentences, each with the number that it follows from."""
        return advice(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, with what follows from them."""
        stages = {
            stage.stage: {
                **vars(stage),
                "step_s": stage.step_s,
                "images_per_s": self.batch / stage.step_s,
                "loader_images_per_s": self.batch / stage.loader_s,
            }
            for stage in self.stages
        }
        return {
            **vars(self),
            "size": list(self.size),
            "stages": stages,
            "operators": [vars(operator) for operator in self.operators],
            "compiled": self.compiled and vars(self.compiled),
            "idle": self.idle,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        return "\n\n".join([self._head(), self._times(), self._findings(), self._advised()])

    def _head(self) -> str:
        parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
        where = f"{self.device} ({self.gpu})" if self.gpu else f"{self.device} with {self.threads} thread(s)"
        return (
            f"{self.recipe}, {self.batch} image(s) of {self.size[0]} x {self.size[1]} a step{parts}, {where}, "
            f"{self.precision}, {self.workers} loader process(es), {self.cores} cores"
        )

    def _times(self) -> str:
        peaks, stages = self.memory or {}, self.stages
        head = f"{'':20}" + "".join(f"{stage.stage:>15}" for stage in stages)
        lines = [head + (f"{'memory':>12}" if peaks else "")]
        for part, called in PARTS.items():
            if any(part in stage.seconds for stage in stages):
                cells = (f"{1e3 * stage.seconds.get(part, 0.0):6.0f} ms  {stage.share(part):4.0%}" for stage in stages)
                peak = f"{amount(peaks[part]):>12}" if part in peaks else ""
                lines.append(f"{called:20}" + "".join(f"{cell:>15}" for cell in cells) + peak)
        for called, values in (
            ("a step, ms", [1e3 * stage.step_s for stage in stages]),
            ("images/s", [self.batch / stage.step_s for stage in stages]),
            ("loader alone, imgs/s", [self.batch / stage.loader_s for stage in stages]),
            ("boxes/image", [stage.boxes for stage in stages]),
        ):
            lines.append(f"{called:20}" + "".join(f"{value:9.1f}{'':6}" for value in values).rstrip())
        return "\n".join(lines)

    def _findings(self) -> str:
        of_all = f" of {amount(self.total_memory)}" if self.total_memory else ""
        lines = [f"memory: {amount(self.peak)}{of_all}"]
        if self.idle is not None:
            lines.append(f"the GPU idles for {self.idle:.0%} of a step, and runs {self.kernels:.0f} kernels in it")
        if self.waits is not None:
            where = ", ".join(f"{place} ({n})" if n > 1 else place for place, n in self.waits.items())
            lines.append(f"the host waits for it {sum(self.waits.values())} times a step: {where}")
        if self.compiled is not None:
            c = self.compiled
            lines.append(
                f"compiled: {1e3 * c.compiled_s:.0f} ms instead of {1e3 * c.eager_s:.0f} ms, once {c.graphs} graphs "
                f"were compiled in {c.build_s:.0f} s"
            )
        lines.append("operators:")
        lines += [f"  {1e3 * op.seconds:7.1f} ms  {op.calls:6.0f} x  {op.name}" for op in self.operators]
        return "\n".join(lines)

    def _advised(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self.advice or ["Nothing stands out."])


def profile_steps(
    recipe: Any,
    batch: int,
    plan: Plan,
    dataset: Dataset,
    folder: Path,
    steps: int,
    compile: bool = False,
    trace: Path | None = None,
) -> Profile:
    """Train `steps` steps of `batch` images in all stages of `recipe` together, in an empty `folder`, and profile them.

    plan: of the training; its device, precision, workers and seed count. compile: measure compiled steps too. trace:
    where to write what torch's profiler saw, for chrome://tracing or Perfetto. Raises what a training raises, and
    `DeimkitError` where nothing can be compiled.
    """
    trainer = Watched.of(recipe, batch, plan, replace(dataset, val=None), folder, steps)
    trainer.compiling, trainer.trace = compile, trace
    spans = lengths(recipe.timeline)
    trainer.main = max(trainer.stages, key=lambda name: spans[name])
    trainer.fit()
    device, on_gpu = trainer.device, trainer.device.type == "cuda"
    of_gpu = torch.cuda.get_device_properties(device) if on_gpu else None
    return Profile(
        recipe=recipe.name,
        batch=batch,
        accumulate=trainer.learner.accumulate,
        size=recipe.size,
        device=str(device),
        gpu=of_gpu.name if of_gpu else None,
        precision=str(trainer.precision).removeprefix("torch."),
        has_bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        workers=trainer.loader.workers,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        main=trainer.main,
        stages=tuple(trainer.times),
        peak=trainer.peak,
        total_memory=of_gpu.total_memory if of_gpu else None,
        **trainer.found,
    )


class Watched(Short):
    """A short training whose steps are taken apart, first by the clock alone, then with whatever disturbs it."""

    compiling = False
    trace: Path | None = None
    main: str

    def _prepare(self) -> None:
        super()._prepare()
        self.times: list[StageTimes] = []
        self.found: dict[str, Any] = {}
        self.mark: Mark = ignore
        self.boxes = 0

    @property
    def stages(self) -> list[str]:
        """The stages of its epochs."""
        return [self.timeline.stage(epoch) for epoch in range(self.timeline.total)]

    def _epochs(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        super()._epochs()
        if self.interrupted:
            raise KeyboardInterrupt
        self.peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory()
        self.epoch, self.step_in_epoch = self.stages.index(self.main), 0
        self.global_step |= 1  # the microscope looks at even ones only
        self.found["operators"] = self._look()
        if self.device.type == "cuda":
            self.found |= {"memory": self._memory_by_part(), "waits": self._waits()}
        if self.compiling:
            self.found["compiled"] = self._compiled()

    def _epoch(self) -> bool:
        """The steps of a stage by the clock."""
        watch = Stopwatch(self.device)
        self.boxes, before = 0, self.global_step
        with self._marked(watch.mark):
            go_on = super()._epoch()
        if not go_on:
            return False
        boxes = self.boxes / ((self.global_step - before) * self.recipe.batch)
        steps = watch.steps()
        parts = {part: mean(step.get(part, 0.0) for step in steps) for part in PARTS if any(part in s for s in steps)}
        self.times.append(StageTimes(self.timeline.stage(self.epoch), parts, boxes, self._loader_alone()))
        return True

    # ------------------------------------------------------------------ the marks of the loop
    @contextmanager
    def _marked(self, mark: Mark) -> Iterator[None]:
        """A block in which every part of a step says `mark(part)` when it begins."""
        self.mark = mark
        with marks(self.learner, mark):
            yield
        self.mark = ignore

    def _together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in super()._together(batches):
            self.mark("copy")
            self.boxes += len(batch.targets)
            yield batch

    def _tell(self, *facts: Any) -> None:
        self.mark("notes")
        super()._tell(*facts)
        self.mark("images")

    # ------------------------------------------------------------------ what else there is to know
    def _loader_alone(self) -> float:
        """Seconds that the loader takes for a batch of this stage, with all cores for its processes."""

        def endless() -> Iterator[Batch]:
            while True:
                yield from self.loader.epoch(self.epoch)

        batches, workers = endless(), self.loader.workers
        for _ in range(1 + 2 * workers):  # what is loaded ahead
            next(batches)
        count = max(3, 2 * workers)
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        return (time.perf_counter() - started) / count

    def _some(self, count: int) -> Iterator[Batch]:
        """So many batches of the main stage."""
        self.each = count
        return self._batches()

    def _look(self) -> tuple[Operator, ...]:
        """The operators of a few steps in the eyes of torch's profiler, which also knows how busy a GPU is."""
        on_gpu = self.device.type == "cuda"
        seen = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        batches = list(self._some(1 + LOOKED_AT))
        self._step(batches[0])
        with torch.profiler.profile(activities=seen, acc_events=True) as profiler:
            with Labels() as labels, self._marked(labels.mark):
                for batch in batches[1:]:
                    self._step(batch)
            if on_gpu:
                torch.cuda.synchronize(self.device)
        if self.trace is not None:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.trace))
        if on_gpu:
            events = profiler.events() or []
            spans = [(e.time_range.start, e.time_range.end) for e in events if of_a_gpu(e)]
            self.found |= {"kernels": len(spans) / LOOKED_AT, "busy_s": covered(spans) / 1e6 / LOOKED_AT}
        return operators(profiler.key_averages(), on_gpu, LOOKED_AT)

    def _memory_by_part(self) -> dict[str, int]:
        """The most bytes that a GPU held during each part of a step."""
        peaks = Peaks(self.device)
        with self._marked(peaks.mark):
            for batch in self._some(2):
                self._step(batch)
                peaks.mark("images")
        return peaks.bytes

    def _waits(self) -> dict[str, int]:
        """Where the host waits for a GPU, and how often in a step."""
        *_, batch = self._some(1)
        with waiting_lines() as lines:
            self._step(batch)
        return dict(Counter(lines).most_common())

    def _compiled(self) -> Compiled:
        """Compiled steps beside those that are not; what a step compiles does not count."""
        expect_compiler(self.device)
        compile_parts(self.learner.model)
        eager, compiled, building, before = [], [], 0.0, graphs()
        for batch in self._some(3 * PAIRS):
            known = graphs()
            with torch.compiler.set_stance("force_eager"):
                eager.append(self._seconds(batch))
            took = self._seconds(batch)
            if graphs() > known:
                building += took - eager.pop()
            else:
                compiled.append(took)
            if len(compiled) == PAIRS:
                break
        if not compiled:
            raise DeimkitError(f"Each of {3 * PAIRS} steps had to be compiled anew; train without compile=True.")
        ratio = median(c / e for c, e in zip(compiled, eager, strict=True))
        return Compiled(median(eager), median(compiled), ratio, building, graphs() - before)

    def _seconds(self, batch: Batch) -> float:
        """Seconds of one step on its own."""
        started = time.perf_counter()
        self._step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def of_a_gpu(event: Any) -> bool:
    """Whether an event is work of a GPU, and not a label that spans some."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (start, end) was under way."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, last), 0.0)
        last = max(last, end)
    return total


def operators(averages: Iterable[Any], on_gpu: bool, steps: int) -> tuple[Operator, ...]:
    """Those that take most of the device's time, from the `key_averages` of a profile of so many steps."""
    found = []
    for row in averages:
        spent = row.self_device_time_total if on_gpu else row.self_cpu_time_total  # microseconds
        if row.device_type == DeviceType.CPU and not row.is_user_annotation:
            found.append(Operator(row.key, spent / 1e6 / steps, row.count / steps))
    return tuple(sorted(found, key=lambda operator: -operator.seconds)[:SHOWN])


@contextmanager
def waiting_lines() -> Iterator[list[str]]:
    """A block whose value is, once it is left, every line in it that made the host wait for a GPU, once per wait."""
    lines: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said = [warning for warning in seen if "synchronizing CUDA operation" in str(warning.message)]
    lines += [f"{Path(warning.filename).name}:{warning.lineno}" for warning in said]
