"""Batches travel to a GPU beside the step before; where there is none, stand-ins write down who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deimkit.errors import DataError
from deimkit.structures import Batch, Targets
from deimkit.training.courier import Courier, tensors


def batch(name: str) -> Batch:
    targets = Targets(torch.zeros(2).long(), torch.ones(2).long(), torch.full((2, 4), 0.5))
    return Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), targets, names=[name], sizes=torch.ones(1, 2))


class Stream:
    """Records what is done on it, and what it waits for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.count = log, name, 0

    def record_event(self) -> str:
        self.count += 1
        self.log.append(f"event {self.count} on {self.name}")
        return f"event {self.count}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a courier to a GPU does, in order; the copies stay here."""
    said: list[str] = []
    streams = [Stream(said, "step")]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    def to(self: Batch, device: Any, non_blocking: bool = False) -> Batch:
        assert str(device) == "cuda:0" and non_blocking
        said.append(f"{self.names[0]} copied on {streams[-1].name}")
        return batch(f"{self.names[0]} there")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(said, "side"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: said.append(f"kept for {stream.name}"))
    return said


def learned(courier: Courier, batches: Iterator[Batch], log: list[str]) -> Iterator[str]:
    """Names of the batches that are learned in turn."""
    for given in courier.ahead(batches):
        there = courier.bring(given)
        log.append(f"learn {there.names[0]}")
        yield there.names[0]


def test_a_batch_travels_while_the_one_before_is_learned_and_is_waited_for_alone(log: list[str]) -> None:
    courier = Courier(torch.device("cuda:0"))
    names = list(learned(courier, iter([batch("a"), batch("b"), batch("c")]), log))
    assert names == ["a there", "b there", "c there"]
    kept = ["kept for step"] * 5  # images, sizes, and three columns of targets
    assert log == [
        "b copied on side", "event 1 on side", "a copied on step", "learn a there",
        "c copied on side", "event 2 on side", "step waits for event 1", *kept, "learn b there",
        "step waits for event 2", *kept, "learn c there",
    ]  # fmt: skip


def test_a_file_that_cannot_be_read_is_heard_of_in_its_turn(log: list[str]) -> None:
    def batches() -> Iterator[Batch]:
        yield batch("a")
        yield batch("b")
        raise DataError("c is broken")

    courier, names = Courier(torch.device("cuda:0")), []
    with pytest.raises(DataError, match="c is broken"):
        for name in learned(courier, batches(), log):
            names.append(name)
    assert names == ["a there", "b there"]
    assert list(learned(courier, iter([batch("d")]), log)) == ["d there"], "and goes on with the others"


def test_a_batch_without_room_is_copied_when_it_is_needed(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = Batch.to

    def full(self: Batch, device: Any, non_blocking: bool = False) -> Batch:
        if self.names == ["b"] and not any("learn a" in line for line in log):
            raise torch.OutOfMemoryError("no room")
        return there(self, device, non_blocking)

    monkeypatch.setattr(Batch, "to", full)
    courier = Courier(torch.device("cuda:0"))
    assert list(learned(courier, iter([batch("a"), batch("b"), batch("c")]), log)) == ["a there", "b there", "c there"]
    assert "b copied on step" in log and "c copied on side" in log


def test_a_batch_may_be_brought_twice_or_never(log: list[str]) -> None:
    courier = Courier(torch.device("cuda:0"))
    a, b, c = batch("a"), batch("b"), batch("c")
    turn = courier.ahead(iter([a, b, c]))
    assert [next(turn), next(turn)] == [a, b]
    assert courier.bring(b).names == courier.bring(b).names == ["b there"]
    assert log.count("b copied on side") == log.count("b copied on step") == 1
    assert next(turn) is c and list(turn) == []


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_batches_pass_as_they_are(device: str) -> None:
    batches = iter([batch("a")])
    assert Courier(torch.device(device)).ahead(batches) is batches


def test_on_a_cpu_nothing_is_copied() -> None:
    courier, one = Courier(torch.device("cpu")), batch("a")
    assert all(x is y for x, y in zip(tensors(courier.bring(one)), tensors(one), strict=True))


@pytest.mark.gpu
def test_what_arrives_is_what_was_sent() -> None:
    courier = Courier(torch.device("cuda"))

    def pinned() -> Iterator[Batch]:
        for i in range(20):
            images = torch.full((8, 3, 320, 320), i, dtype=torch.uint8).pin_memory()
            yield Batch(images, Targets(torch.zeros(1).long(), torch.tensor([i]), torch.rand(1, 4)))

    for i, given in enumerate(courier.ahead(pinned())):
        there = courier.bring(given).finish()
        assert there.images.is_cuda and torch.all(there.images == i / 255) and there.targets.labels.tolist() == [i]
