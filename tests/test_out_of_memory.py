"""A step that runs out of memory is as if it had never been; with accumulate="auto" it is taken in smaller parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deimkit.arguments import build_parser
from deimkit.data.dataset import Dataset
from deimkit.errors import DeimkitError, RecipeError
from deimkit.structures import Batch, Targets
from deimkit.training.learner import Learner
from deimkit.training.run import Plan
from tests import micro
from tests.micro import MICRO, equal, same, trainer
from tests.short import short_of_memory


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return micro.scenes(tmp_path_factory.mktemp("scenes"))


def batch() -> Batch:
    """Four images, two of them without any box, in which order micro-batches differ."""
    draw = torch.Generator().manual_seed(1)
    targets = Targets(torch.tensor([0, 0, 0, 3]), torch.arange(4) % 2, torch.rand(4, 4, generator=draw) * 0.3 + 0.2)
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=draw)
    return Batch(images, targets, [0, 1, 2, 3], ["a", "b", "c", "d"])


def learner(accumulate: int = 1, precision: torch.dtype = torch.float32) -> Learner:
    """Always with the same weights, and the same random numbers to come."""
    torch.manual_seed(0)
    return Learner(MICRO, MICRO.build(2), precision, accumulate)


def runs_out_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let the next call of a function, and no later one, run out of memory when it has done its work."""
    real: Callable[..., Any] = getattr(owner, name)
    calls: list[None] = []

    def once(*args: Any, **named: Any) -> Any:
        found = real(*args, **named)
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(name)
        return found

    monkeypatch.setattr(owner, name, once)


# ---------------------------------------------------------------------- the learner
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_did_not_fit_has_never_been(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, statistics, gradients, random numbers: taken again in smaller parts, it is as if it had begun so."""
    wanted, direct = learner(4), []
    for _ in range(2):
        direct.append(wanted.learn(batch()))
    after = torch.get_rng_state()

    ours = learner(accumulate)
    before = {name: x.clone() for name, x in ours.model.state_dict().items()}
    drawn = torch.get_rng_state()
    room = short_of_memory(monkeypatch, images=1)
    with pytest.raises(torch.OutOfMemoryError):
        ours.learn(batch())
    assert torch.equal(torch.get_rng_state(), drawn) and equal(ours.model.state_dict(), before)
    assert all(p.grad is None for p in ours.model.parameters()) and not ours.optimizer.state
    ours.accumulate = 4
    assert [ours.learn(batch()) for _ in range(2)] == direct
    assert equal(ours.state_dict(), wanted.state_dict()) and torch.equal(torch.get_rng_state(), after)
    assert room.tried == [4 // accumulate, *[1] * 8]


def test_gradients_of_the_parts_before_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two parts has left its gradients when the second does not fit."""
    wanted = learner(2)
    direct = wanted.learn(batch())
    ours = learner(2)
    losses, seen = Learner.losses, []

    def second_fails(self: Learner, part: Batch, *rest: Any) -> Any:
        seen.append(any(p.grad is not None for p in self.model.parameters()))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("the second part")
        return losses(self, part, *rest)

    monkeypatch.setattr(Learner, "losses", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        ours.learn(batch())
    assert seen == [False, True] and all(p.grad is None for p in ours.model.parameters())
    assert ours.learn(batch()) == direct and equal(ours.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_gradients_are_scaled_back_once(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out after the gradients have been scaled back, which fp16's scaler allows once in a step."""
    wanted = learner(precision=precision)
    direct = [wanted.learn(batch()) for _ in range(2)]
    ours = learner(precision=precision)
    runs_out_in(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    with pytest.raises(torch.OutOfMemoryError):
        ours.learn(batch())
    assert [ours.learn(batch()) for _ in range(2)] == direct
    assert equal(ours.state_dict(), wanted.state_dict()) and ours.scaler.state_dict() == wanted.scaler.state_dict()


def test_no_room_for_the_optimiser_is_another_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No smaller part would help, and the step is half done: it is not to be taken again."""
    ours = learner()
    runs_out_in(monkeypatch, torch.optim.AdamW, "step")
    with pytest.raises(DeimkitError, match="cpu has no memory for the optimiser and the average"):
        ours.learn(batch())


# ---------------------------------------------------------------------- the trainer
def test_a_run_goes_on_in_smaller_parts(scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the run that had them from the start, with one event, and nothing seen twice by the microscope."""
    wanted = trainer(tmp_path / "two", scenes, accumulate=2).fit()
    room = short_of_memory(monkeypatch, images=1)
    ours = trainer(tmp_path / "auto", scenes, accumulate="auto")
    run = ours.fit()
    assert same(run, wanted) and room.tried == [2, *[1] * 18] and not room.leaked

    def said(of: Any) -> list[Any]:
        return [{k: v for k, v in row.items() if k in ("terms", "images", "iou")} for row in of.rows()]

    assert said(run) == said(wanted)
    events = [event for event in run.events() if event["event"] == "out_of_memory"]
    assert [(event["accumulate"], event["epoch"], event["step"]) for event in events] == [(2, 0, 0)]
    assert any("does not fit into the memory of cpu; goes on with accumulate=2" in line for line in ours.progress.lines)


def test_memory_may_run_out_later_and_a_resumed_run_remembers(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fourth step on only one image fits; stopped and resumed, the run does not try two again."""
    room = short_of_memory(monkeypatch, images=None)

    def short_from_the_fourth(row: dict[str, Any]) -> None:
        if (row["epoch"], row["step"]) == (0, 2):
            room.images = 1
        if (row["epoch"], row["step"]) == (1, 0):
            (tmp_path / "run" / "stop").touch()

    trainer(tmp_path / "run", scenes, seen=short_from_the_fourth, accumulate="auto").fit()
    assert room.tried == [2, 2, 2, 2, 1, 1]
    (tmp_path / "run" / "stop").unlink(missing_ok=True)
    run = trainer(tmp_path / "run", scenes, accumulate="auto").fit()
    assert run.finished and room.tried == [2, 2, 2, 2, *[1] * 12]
    assert sum(event["event"] == "out_of_memory" for event in run.events()) == 1


def test_without_auto_the_remedy_is_said(scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = short_of_memory(monkeypatch, images=1)
    with pytest.raises(DeimkitError, match=r"2 images of 64 x 64 in 1 part.* accumulate=2 or 'auto'"):
        trainer(tmp_path / "run", scenes).fit()
    assert room.tried == [2]
    run = trainer(tmp_path / "run", scenes, accumulate=2).fit()
    assert run.finished, "what was saved before can be gone on from"


def test_one_image_at_a_time_is_the_end_of_it(scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = short_of_memory(monkeypatch, images=0)
    with pytest.raises(DeimkitError, match="in 2 part"):
        trainer(tmp_path / "run", scenes, accumulate="auto").fit()
    assert room.tried == [2, 1]


# ---------------------------------------------------------------------- how it is asked for
def test_what_a_plan_takes() -> None:
    assert Plan("data", accumulate="auto").parts == 1 and Plan("data", accumulate=3).parts == 3
    for wrong in (0, "atuo"):
        with pytest.raises(RecipeError, match=f"accumulate must be at least 1, or 'auto'; got {wrong!r}"):
            Plan("data", accumulate=wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="accumulate='auto' is for a single process.*batch='largest'"):
        Plan("data", accumulate="auto", devices=2)


def test_a_plan_is_read_back(tmp_path: Path) -> None:
    Plan("data", accumulate="auto").write(tmp_path)
    assert Plan.read(tmp_path).accumulate == "auto"


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("4", 4)])
def test_the_command_line_takes_it(text: str, value: int | str) -> None:
    args = build_parser().parse_args(["train", "tiny", "--data", "synthetic", "--accumulate", text])
    assert args.accumulate == value
