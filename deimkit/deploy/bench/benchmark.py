"""How long a detector takes, measured so that the number can be believed: warmed up, in turn, with all it depends on.

Runtimes disturb each other: threads that still spin, caches that are cold. So they are measured in turn, a block of
calls each, round after round, and before each block stand a pause and a call that nobody counts. What is then compared
is the ratio within a round, which a busy machine changes less than it changes the times.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor

from deimkit.deploy.bench.latency import Report, Result
from deimkit.deploy.bench.timing import USUAL, Clock, Method, Timing
from deimkit.deploy.clocks import Observer, verdict
from deimkit.deploy.machine import Machine, hardware, processor_seconds, smi_name
from deimkit.deploy.session import Session
from deimkit.errors import DeployError

WINDOW = 3  # calls whose median is compared with that of the next ones to see whether a session is warm
MOST_CALLS = 500  # of a block
FAILURES = (RuntimeError, DeployError)  # torch's own, such as no memory and no compiler, are RuntimeErrors
Span = tuple[float, float | None]  # seconds of a call by the wall clock, and by the GPU where it has a clock


def measure(session: Session, batch: int = 1, method: Method = USUAL, claimed_ms: float | None = None) -> Report:
    """How long one session takes for a batch; see `compare`. claimed_ms: what the paper says of this recipe."""
    return compare([session], (batch,), method, {session.card.recipe: claimed_ms})


def compare(
    sessions: Sequence[Session],
    batches: Sequence[int] = (1,),
    method: Method = USUAL,
    claimed_ms: Mapping[str, float | None] | None = None,
    sources: Sequence[str] | None = None,
    clock: Clock | None = None,
    doubts: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> Report:
    """Measure sessions in turn at each batch size, and what the machine was doing meanwhile.

    The first session of a source and input size is what its others are compared with: give the plain one first. One
    that takes other batches only, or fails (no memory, no compiler), is left out there, with a remark. claimed_ms:
    latencies that papers claim, by recipe name. sources: of which detector each session is, by default its recipe.
    doubts: why a source is not the detector of its recipe's paper. remarks: what the report should say besides.
    Raises `DeployError` if no session takes any of the sizes, or all of them fail.
    """
    clock, claims, doubts, said = clock or Clock(), claimed_ms or {}, doubts or {}, list(remarks)
    named = list(zip(sessions, sources or [s.card.recipe for s in sessions], strict=True))
    groups = {batch: [entry for entry in named if takes(entry[0], batch)] for batch in batches}
    if not any(groups.values()) or min(groups) < 1:
        sizes = ", ".join(f"{s.name}: {s.card.batch or 'any'}" for s in sessions) or "none"
        raise DeployError(
            f"Expected sessions that take {' or '.join(map(str, batches)) or 'some number of'} images at a time; got "
            f"{sizes}. Export with that batch, or with any (batch=None). {' '.join(said)}".rstrip()
        )
    devices = [session.device for session in sessions]
    gpu = next((device for device in devices if device.type == "cuda"), None)
    machine, started = Machine.of(devices), datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    results: list[Result] = []
    with Observer(None if gpu is None else smi_name(gpu)) as observer, _Others() as others:
        for batch, group in groups.items():
            running = _in_turn([_Contender(*entry, batch, method, clock) for entry in group], said)
            results += [contender.result(claims, doubts) for contender in running]
    if not results:
        raise DeployError(f"Expected at least one session that runs; got {' '.join(said)} Try a smaller batch or size.")
    if gpu is not None:
        held, _ = verdict(observer.samples)
        results = [replace(r, throttled=held) if r.gpu else r for r in results]
    said += [
        f"{session.name} takes {session.most} images at a time: not measured with {batch}."
        for batch in groups
        for session in sessions
        if not takes(session, batch)
    ]
    return Report(machine, method, tuple(results), started, tuple(observer.samples), others.share, tuple(said))


def takes(session: Session, batch: int) -> bool:
    """Whether a session runs so many images at a time."""
    return session.card.batch in (None, batch) and batch <= (session.most or batch)


def why(error: BaseException) -> str:
    """A failure in a line: ours in its own words, another by its name and how its message begins."""
    first = next(iter(str(error).strip().splitlines()), "")
    return str(error) if isinstance(error, DeployError) else f"{type(error).__name__}: {first}"


def _in_turn(contenders: list[_Contender], remarks: list[str]) -> list[_Contender]:
    """Run in turn, round after round, once all are warm; returns those that came through, and remarks on the others."""

    def works(contender: _Contender, work: Callable[[], None]) -> bool:
        try:
            work()
        except FAILURES as error:
            who = f"{contender.source}, {contender.session.name}, {contender.session.card.precision}"
            remarks.append(f"{who}, batch {contender.batch}: left out, {why(error)}")
            return False
        return True

    running = [contender for contender in contenders if works(contender, contender.warm_up)]
    for _ in range(contenders[0].method.rounds if contenders else 0):
        running = [contender for contender in running if works(contender, contender.round)]
    return running


class _Contender:
    """A session with a batch of its own to run, and all times so far."""

    def __init__(self, session: Session, source: str, batch: int, method: Method, clock: Clock) -> None:
        self.source = source
        self.session, self.batch, self.method, self.clock = session, batch, method, clock
        self.calls, self.first_s, self.warm = 1, 0.0, False
        self.spans: list[list[Span]] = []
        self.copied: list[list[Span]] = []

    def prepare(self) -> None:
        """Bring the images to where the session wants them."""
        height, width = self.session.card.size
        images = torch.rand(self.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        self.host = images.pin_memory() if self.session.device.type == "cuda" else images
        self.images = self.host.to(self.session.device)
        self.sizes = torch.tensor([[height, width]] * self.batch, device=self.session.device)

    def run(self) -> dict[str, Tensor]:
        """One inference on images that are where the session wants them."""
        return self.session.run(self.images, self.sizes)

    def run_with_copies(self) -> list[Tensor]:
        """One inference from the host's memory to the host's memory."""
        found = self.session.run(self.host.to(self.session.device, non_blocking=True), self.sizes)
        return [value.cpu() for value in found.values()]

    def time(self, work: Callable[[], Any]) -> Span:
        """Seconds of a call, by the wall and by the GPU."""
        return self.clock.time(work, self.session.device)

    def warm_up(self) -> None:
        """Call until two medians agree, and find how many calls fill a block."""
        self.prepare()
        self.first_s = self.time(self.run)[0]
        start, walls = self.clock.now(), [self.time(self.run)[0] for _ in range(WINDOW)]
        while not self.warm and self.clock.now() - start <= self.method.patience:
            walls += [self.time(self.run)[0] for _ in range(WINDOW)]
            before, last = median(walls[-2 * WINDOW : -WINDOW]), median(walls[-WINDOW:])
            steady = abs(last - before) <= self.method.agree * before
            self.warm = steady and self.clock.now() - start >= self.method.warmup
        block = self.method.seconds / self.method.rounds
        self.calls = min(max(round(block / max(median(walls[-WINDOW:]), 1e-6)), 1), MOST_CALLS)

    def round(self) -> None:
        """A block of calls, after a pause and calls that do not count; then one with copies, where there are any."""
        self.clock.rest(self.method.pause)
        self.spans.append(self._block(self.run))
        if self.session.device.type != "cpu":
            self.copied.append(self._block(self.run_with_copies))

    def _block(self, work: Callable[[], Any]) -> list[Span]:
        for _ in range(self.method.discard):
            self.time(work)
        with _no_garbage():
            return [self.time(work) for _ in range(self.calls)]

    def result(self, claims: Mapping[str, float | None], doubts: Mapping[str, str]) -> Result:
        """What was measured."""
        card = self.session.card
        return Result(
            name=self.session.name,
            source=self.source,
            card=card,
            hardware=hardware(self.session.device),
            batch=self.batch,
            wall=self._walls(self.spans),
            gpu=self._gpu(),
            copies=self._walls(self.copied) if self.copied else None,
            first_s=self.first_s,
            warm=self.warm,
            claimed_ms=claims.get(card.recipe),
            doubt=doubts.get(self.source, ""),
        )

    def _walls(self, blocks: list[list[Span]]) -> Timing:
        return Timing(tuple(tuple(wall for wall, _ in block) for block in blocks), self.batch)

    def _gpu(self) -> Timing | None:
        rounds = tuple(tuple(gpu for _, gpu in block if gpu is not None) for block in self.spans)
        return Timing(rounds, self.batch) if all(rounds) else None


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Python's collector does not tidy up meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Others:
    """What share of the processors others kept busy during a `with` block."""

    share: float | None = None

    def __enter__(self) -> Self:
        self.before = processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        after = processor_seconds()
        if self.before is not None and after is not None and after[0] > self.before[0]:
            total, busy, ours = (b - a for a, b in zip(self.before, after, strict=True))
            self.share = min(max((busy - ours) / total, 0.0), 1.0)
