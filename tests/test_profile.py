"""A profile is real steps taken apart, without another result of any; and every advice follows from its numbers."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import deimkit as dk
from deimkit import __main__ as command_line
from deimkit import recipes
from deimkit.data.dataset import Dataset
from deimkit.errors import DeimkitError, RecipeError
from deimkit.explore.parts import draw_profile
from deimkit.structures import Batch, Targets
from deimkit.training import advice, marks
from deimkit.training.compiled import compile_parts, expect_compiler, graphs
from deimkit.training.learner import Learner, micro_batches
from deimkit.training.marks import Stopwatch
from deimkit.training.profile import (
    PARTS,
    Compiled,
    Operator,
    Profile,
    StageTimes,
    covered,
    of_a_gpu,
    operators,
    waiting_lines,
)
from deimkit.training.run import plain
from tests import micro
from tests.asked import Asked, mark, tensors
from tests.micro import MICRO, equal

CPU = torch.device("cpu")
STEP = {
    "images": 0.08,
    "copy": 0.02,
    "backbone": 0.2,
    "matching": 0.05,
    "losses": 0.05,
    "backward": 0.5,
    "average": 0.1,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return micro.scenes(tmp_path_factory.mktemp("scenes"), train=5)


def made_up(**others: Any) -> Profile:
    """A step of a second on a GPU of 10 GB, of which 4 images take 2 and everything else 1."""
    stages = tuple(StageTimes(name, dict(STEP), boxes=7.0, loader_s=0.1) for name in ("dense", "augment"))
    facts: dict[str, Any] = {"device": "cuda", "gpu": "a GPU", "has_bf16": True, "precision": "bfloat16"}
    facts |= {"peak": 3 * 10**9, "total_memory": 4 * 10**9, "memory": {"images": 10**9, "backward": 3 * 10**9}}
    facts |= {"kernels": 9000.0, "busy_s": 0.85, "waits": {"matching.py:61": 1, "groups.py:73": 1}}
    facts |= {"workers": 1, "cores": 8, "threads": 8, "main": "augment", "stages": stages}
    facts |= {"operators": (Operator("aten::mm", 0.1, 50.0),), "recipe": "made_up", "size": (64, 64)}
    return Profile(**{"batch": 4, "accumulate": 1, **facts, **others})


def on_cpu(**others: Any) -> Profile:
    """The same on a CPU."""
    unknown = dict.fromkeys(("gpu", "total_memory", "memory", "kernels", "busy_s", "waits"))
    return made_up(**{"device": "cpu", "has_bf16": False, "precision": "float32", **unknown, **others})


def staged(stage: str, **seconds: float) -> tuple[StageTimes, ...]:
    """The made-up stages, of which one takes other times for some parts."""
    return tuple(
        replace(times, seconds=times.seconds | seconds) if times.stage == stage else times for times in made_up().stages
    )


# ---------------------------------------------------------------------------------------------------- the profile
def test_a_profile_takes_real_steps_apart(scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = dk.profile(MICRO, scenes, steps=9, batch=2, size=64, device="cpu", trace="traces/step.json")
    assert [stage.stage for stage in found.stages] == ["dense", "augment", "clean"] and found.main == "dense"
    for stage in found.stages:
        assert list(stage.seconds) == list(PARTS) and min(stage.seconds.values()) > 0
        assert sum(stage.share(part) for part in PARTS) == pytest.approx(1)
        assert stage.loader_s > 0 and 0 < stage.seconds["images"] < stage.step_s
    boxes = {stage.stage: stage.boxes for stage in found.stages}
    assert boxes["dense"] > boxes["clean"] > 0
    assert (found.batch, found.size, found.device, found.precision) == (2, (64, 64), "cpu", "float32")
    assert found.peak > 10**8 and found.waits is found.memory is found.idle is found.compiled is None
    names = [operator.name for operator in found.operators]
    assert len(set(names)) == 8 and not any(name.startswith(("deimkit", "Optimizer")) for name in names)
    assert {"aten::mm", "aten::convolution_backward"} & set(names)
    assert sorted((op.seconds for op in found.operators), reverse=True) == [op.seconds for op in found.operators]
    assert json.loads(json.dumps(plain(found.to_dict())))["stages"]["dense"]["images_per_s"] > 0
    trace = json.loads((tmp_path / "traces/step.json").read_text())
    labels = {event.get("name") for event in trace["traceEvents"]}
    assert {f"deimkit: {part}" for part in PARTS if part not in ("images", "copy", "notes")} <= labels
    assert [path.name for path in tmp_path.iterdir()] == ["traces"], "nothing else is left behind"


def test_the_report_shows_what_was_found() -> None:
    text = str(made_up(compiled=Compiled(0.9, 0.6, 2 / 3, 60.0, 8)))
    for said in (
        "made_up, 4 image(s) of 64 x 64 a step, cuda (a GPU), bfloat16, 1 loader process(es), 8 cores",
        "waiting for images      80 ms    8%",
        "backward               500 ms   50%   500 ms   50%      3.0 GB",
        "the GPU idles for 15% of a step, and runs 9000 kernels in it",
        "the host waits for it 2 times a step: matching.py:61, groups.py:73",
        "compiled: 600 ms instead of 900 ms, once 8 graphs were compiled in 60 s",
        "- compile=True saves 33% of a step",
    ):
        assert said in text, said
    assert (
        "memory: 3.0 GB of 4.0 GB" in text
        and str(made_up()).endswith("\n\n- Nothing stands out.")
        and "cpu with 8 thread(s)" in str(on_cpu())
    )


def test_a_profile_from_the_command_line(
    scenes: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "get", lambda name: MICRO)
    asked = ["profile", "micro", "--data", str(scenes.source), "--batch", "2", "--size", "64", "--device", "cpu"]
    assert command_line.main([*asked, "--steps", "6", "--json"]) == 0
    *report, last = capsys.readouterr().out.splitlines()
    assert report[0].startswith("micro, 2 image(s) of 64 x 64 a step")
    assert list(json.loads(last)["stages"]) == ["dense", "augment", "clean"]
    assert command_line.main([*asked, "--steps", "3"]) == 1
    assert "at least two steps for each of the 3 stages of micro; got steps=3" in capsys.readouterr().err


def test_what_cannot_be_profiled_is_said(scenes: Dataset) -> None:
    with pytest.raises(RecipeError, match="measures one device"):
        dk.profile(MICRO, scenes, devices=2)


def test_a_profile_is_drawn() -> None:
    ax = draw_profile(made_up())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dense", "augment"]
    assert max(patch.get_x() + patch.get_width() for patch in ax.patches) == pytest.approx(1000)
    assert [text.get_text() for text in ax.texts].count("500") == 2 and len(ax.get_legend().get_texts()) == len(STEP)
    assert any("4.0 images/s" in text.get_text() for text in ax.texts)


# ---------------------------------------------------------------------------------------------------- marks
def batch(boxes: tuple[int, ...] = (0, 0, 0, 1), side: int = 64) -> Batch:
    """Images with boxes: which image each is in."""
    draw = torch.Generator().manual_seed(1)
    image = torch.tensor(boxes, dtype=torch.long)
    corner = torch.rand(len(image), 4, generator=draw) * 0.3 + 0.2
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=draw)
    return Batch(images, Targets(image, torch.arange(len(image)) % 2, corner), [0, 1], ["a", "b"])


def learner(accumulate: int = 1) -> Learner:
    """Always with the same weights, and the same random numbers to come."""
    torch.manual_seed(0)
    return Learner(MICRO, MICRO.build(2), accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_marks_change_nothing_and_go_away(accumulate: int) -> None:
    plain_one, watched = learner(accumulate), learner(accumulate)
    seen: list[str] = []
    torch.manual_seed(1)
    expected = plain_one.learn(batch())
    torch.manual_seed(1)
    with marks.marks(watched, seen.append):
        assert watched.learn(batch()) == expected
    assert equal(plain_one.state_dict(), watched.state_dict())
    forward = ["queries", "backbone", "encoder", "decoder", "losses", "matching", "losses", "backward"]
    assert seen == [*forward * accumulate, "optimiser", "average"]
    watched.learn(batch())
    assert len(seen) == 8 * accumulate + 2 and vars(watched).keys() == vars(plain_one).keys()
    assert type(watched.criterion) is type(plain_one.criterion)


def test_marks_go_away_when_a_step_fails() -> None:
    watched = learner()
    with pytest.raises(DeimkitError, match="category|class"), marks.marks(watched, marks.ignore):
        watched.learn(replace(batch(), targets=Targets(torch.zeros(1).long(), torch.tensor([9]), torch.rand(1, 4) / 2)))
    assert vars(watched).keys() == vars(learner()).keys()


def test_a_stopwatch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 4.0, 8.0, 8.25, 10.0, 11.0])
    monkeypatch.setattr("deimkit.training.marks.time.perf_counter", lambda: next(now))
    watch = Stopwatch(CPU)
    for part in ("copy", "notes", "images", "copy", "losses", "copy", "images", "copy", "images"):
        watch.mark(part)
    assert watch.steps() == [{"images": 0.5, "copy": 0.5 + 0.25, "losses": 4.0}, {"images": 1.75, "copy": 1.0}]
    assert Stopwatch(CPU).steps() == []


# ---------------------------------------------------------------------------------------------------- what torch saw
@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0.0), ([(1, 2)], 1.0), ([(3, 4), (0, 2), (1, 2.5)], 3.5), ([(0, 9), (1, 2), (3, 4), (9, 10)], 10.0)],
)
def test_how_long_anything_was_under_way(spans: list[tuple[float, float]], seconds: float) -> None:
    assert covered(spans) == seconds


def test_operators_by_hand() -> None:
    def row(key: str, host: float, device: float, count: int, kind: Any = DeviceType.CPU) -> Any:
        times = {"self_cpu_time_total": host, "self_device_time_total": device}
        return SimpleNamespace(key=key, count=count, device_type=kind, is_user_annotation=":" in key, **times)

    rows = [row("a", 4e6, 1e6, 2), row("b", 2e6, 6e6, 4), row("a kernel", 0, 9e6, 1, DeviceType.CUDA)]
    rows += [row("deimkit: backward", 9e6, 9e6, 1)]
    assert operators(rows, on_gpu=False, steps=2) == (Operator("a", 2.0, 1.0), Operator("b", 1.0, 2.0))
    assert operators(rows, on_gpu=True, steps=1) == (Operator("b", 6.0, 4.0), Operator("a", 1.0, 2.0))
    assert len(operators([row(f"{i}", i, 0, 1) for i in range(20)], on_gpu=False, steps=1)) == 8
    kernel = row("a kernel", 0, 1, 1, DeviceType.CUDA)
    assert of_a_gpu(kernel) and not of_a_gpu(rows[0]) and not of_a_gpu(row("a: label", 0, 1, 1, DeviceType.CUDA))


def test_lines_that_wait_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waiting_lines() as lines:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", 0] and len(lines) == 2 and lines[0].startswith("test_profile.py:")


@contextmanager
def on_a_stand_in(monkeypatch: pytest.MonkeyPatch, learner: Learner) -> Iterator[Asked]:
    """A block whose steps run as if all that `finish` makes, and the weights, were on a GPU."""
    finish = Batch.finish

    def finished(self: Batch) -> Batch:
        there = finish(self)
        for tensor in tensors([there.images, *(x for x in vars(there.targets).values() if x is not None)]):
            mark(tensor)
        return there

    with monkeypatch.context() as patch, Asked(*learner.model.parameters(), *learner.model.buffers()) as asked:
        patch.setattr(Batch, "finish", finished)
        yield asked


@pytest.mark.parametrize(("accumulate", "times"), [(1, 6), (2, 11)])
@pytest.mark.parametrize("boxes", [(0, 0, 0, 1), (), (1,)])
def test_a_step_asks_a_gpu_for_six_things(
    monkeypatch: pytest.MonkeyPatch, boxes: tuple[int, ...], accumulate: int, times: int
) -> None:
    """Are the targets sound, how many noisy queries, the costs to match, are the losses finite, which, the gradient.

    With micro-batches the first four of each, and which targets are whose. Without targets nothing needs to be sound.
    """
    one = learner(accumulate)
    one.learn(batch(boxes))  # tables of this size are made once
    with on_a_stand_in(monkeypatch, one) as asked:
        one.learn(batch(boxes))
    without = [part for part in micro_batches(batch(boxes), accumulate) if not len(part.targets)]
    assert len(asked.lines) == times - len(without), asked.lines
    files = [line.partition(":")[0] for line in asked.lines]
    assert files.count("matching.py") == files.count("groups.py") == files.count("criterion.py") == accumulate
    assert files[-2:] == ["learner.py", "learner.py"], "the losses are read before the backward pass, then the norm"


# ---------------------------------------------------------------------------------------------------- compiled
@contextmanager
def captured_only() -> Iterator[Any]:
    """A block in which graphs are captured, and then run as they are: what a compiler would be handed."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield counters
    torch.compiler.reset()


BATCHES = [((0, 1), 64), ((0, 0, 1), 96), ((0, 0, 0, 0, 1), 128), ((), 64), ((1,), 160), ((0, 0, 1), 64)]


@pytest.mark.parametrize("count", [1, pytest.param(len(BATCHES), marks=pytest.mark.slow)])
def test_compiled_parts_are_whole_graphs_that_fit_every_batch(count: int) -> None:
    """No graph breaks; a second size is compiled once more, a second number of queries too, and any other fits."""
    eager, compiled = learner(), learner()
    names = list(compiled.model.state_dict())
    with captured_only() as counters:
        compile_parts(compiled.model)
        assert list(compiled.model.state_dict()) == names
        made = []
        for boxes, side in BATCHES[:count]:
            torch.manual_seed(2)
            expected = eager.learn(batch(boxes, side))
            torch.manual_seed(2)
            assert compiled.learn(batch(boxes, side)) == expected
            made.append(graphs())
        assert made == [4, 8, 8, 9, 9, 9][:count] and not counters["graph_break"]
        assert compiled.ema.model.backbone._compiled_call_impl is None, "the average is evaluated as it is"
    assert equal(eager.state_dict(), compiled.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dfine_l", "deim_dfine_n", "rtdetrv2_r18vd", "dfine_table3_baseline"])
def test_every_kind_of_detector_is_captured_whole(name: str) -> None:
    """Frozen norms, learnable affines, projected attention and discrete sampling too."""
    recipe = recipes.get(name)
    one = Learner(recipe, recipe.build(2))
    with captured_only() as counters:
        compile_parts(one.model)
        for boxes, side in BATCHES[:3]:
            one.learn(batch(boxes, side))
        assert graphs() == 8 and not counters["graph_break"]


@pytest.mark.slow
def test_compiled_steps_are_measured_beside_others(scenes: Dataset) -> None:
    with captured_only():
        found = dk.profile(MICRO, scenes, steps=6, batch=2, size=64, device="cpu", compile=True).compiled
    assert found is not None and found.graphs >= 4 and found.build_s > 0
    assert found.ratio == pytest.approx(found.compiled_s / found.eager_s, rel=1)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no g++\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(DeimkitError, match=r"compile=True needs a C\+\+ compiler .* here: no g\+\+. Install it"):
        expect_compiler(CPU)
    with pytest.raises(DeimkitError, match="needs a C"):
        Learner(MICRO, MICRO.build(2), compile=True)


# ---------------------------------------------------------------------------------------------------- advice
@pytest.mark.parametrize(
    ("rule", "profile", "says"),
    [
        (advice.images, made_up(), None),
        (advice.images, made_up(stages=staged("augment", images=0.23)), "the augment stage wait 20% of their time"),
        (advice.copying, made_up(workers=0, stages=staged("augment", copy=0.2)), "takes 17% of a step"),
        (advice.copying, made_up(workers=1, stages=staged("augment", copy=0.2)), None),
        (advice.copying, on_cpu(workers=0, stages=staged("augment", copy=0.2)), None),
        (advice.memory, made_up(), None),
        (advice.memory, on_cpu(), None),
        (advice.memory, made_up(total_memory=10**10), "A batch of 4 leaves 70% .* about 16 images would fit"),
        (advice.memory, made_up(total_memory=10**10, accumulate=2), "70% .*accumulate=2 is more than it takes"),
        (advice.memory, made_up(total_memory=31 * 10**8), "Only 3% of the GPU's memory is free.*accumulate=2"),
        (advice.precision, made_up(), None),
        (advice.precision, on_cpu(), None),
        (advice.precision, made_up(precision="float32"), "70% of a step .* precision='bf16'"),
        (advice.precision, made_up(precision="float32", has_bf16=False), None),
        (advice.compiled, made_up(), None),
        (advice.compiled, made_up(compiled=Compiled(0.8, 0.6, 0.75, 600.0, 8)), "saves 25% .* after 3,000 steps"),
        (advice.compiled, made_up(compiled=Compiled(0.8, 0.8, 0.99, 600.0, 8)), "Leave compile off.* takes 99%"),
        (advice.idle, made_up(), None),
        (advice.idle, on_cpu(), None),
        (advice.idle, made_up(busy_s=0.5), "idles for 50% of a step, .* 9000 kernels.*--compile"),
        (advice.idle, made_up(busy_s=0.7), None),
        (advice.waits, made_up(), None),
        (advice.waits, on_cpu(), None),
        (advice.waits, made_up(waits={"a.py:1": 9, "b.py:2": 1}), "waits .* 10 times a step, 9 of them at a.py:1"),
        (advice.waits, made_up(waits={"a.py:1": 9, "b.py:2": 1}, accumulate=2), None),
        (advice.dense, made_up(), None),
        (advice.dense, made_up(stages=made_up().stages[1:]), None),
        (advice.dense, made_up(stages=staged("dense", matching=0.5)), "1.5 times as long .*losses are 38%"),
        (advice.threads, on_cpu(), None),
        (advice.threads, made_up(threads=1), None),
        (advice.threads, on_cpu(threads=2, workers=1), "computes with 2 thread.* 7 cores are free: OMP_NUM_THREADS=7"),
    ],
)  # fmt: skip
def test_every_advice_follows_from_numbers(rule: Any, profile: Profile, says: str | None) -> None:
    said = rule(profile)
    assert said is None if says is None else said is not None and re.search(says, said), said


@pytest.mark.parametrize(
    ("waiting", "loader_s", "workers", "cores", "says"),
    [
        (0.01, 0.1, 1, 8, None),
        (0.9, 1.8, 1, 8, "wait 50% of their time for images: workers=2 instead of 1 would load them meanwhile"),
        (0.9, 1.8, 2, 8, "workers=4 instead of 2"),
        (0.9, 1.8, 0, 8, "workers=2 instead of 0"),
        (0.9, 0.9, 0, 1, "would take 1 loader process.* here are 1 cores"),
        (0.9, 1.8, 4, 8, "would take 8 loader process.* here are 8 cores"),
        (0.9, 0.4, 2, 8, "although the loader alone keeps up: its 2 process"),
    ],
)
def test_how_many_loaders_would_do(waiting: float, loader_s: float, workers: int, cores: int, says: str | None) -> None:
    """The rest of a step is 0.9 seconds, in which `workers` processes load so many batches of `loader_s` each."""
    rest = sum(STEP.values()) - STEP["images"]
    stages = (StageTimes("augment", STEP | {"images": waiting * rest / 0.9}, 7.0, loader_s * rest / 0.9),)
    said = advice.images(made_up(stages=stages, workers=workers, cores=cores))
    assert said is None if says is None else said is not None and re.search(says, said), said


def test_advice_is_all_that_the_rules_say() -> None:
    found = on_cpu(threads=1, workers=0, stages=staged("dense", matching=0.5, images=3.0))
    assert [sentence.split()[0] for sentence in found.advice] == ["Steps", "Steps", "Torch"]
    assert made_up(stages=staged("augment", images=0.01)[1:]).advice == []


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
def test_a_profile_of_a_gpu(scenes: Dataset) -> None:
    """What only a GPU tells, and that the parts make up the step that the host's clock sees."""
    found = dk.profile("tiny", scenes, steps=16, batch=4, size=128, device="cuda", workers=1)
    assert found.gpu and found.total_memory and found.memory and found.waits and found.kernels and found.busy_s
    assert found.memory["backward"] <= found.peak < found.total_memory and set(found.memory) <= set(PARTS)
    assert 0 < found.idle < 1 and found.kernels > 100
    assert sum(found.waits.values()) <= advice.WAITS, found.waits
    assert found.stage("clean").step_s < 5 and str(found)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["deim_dfine_n", "deim_rtdetrv2_r18vd"])
def test_compiled_steps_on_a_gpu_learn_the_same(name: str) -> None:
    """As much alike as rounding in another order leaves them."""
    torch.manual_seed(0)
    model = recipes.get(name).build(2).cuda()
    one = Learner(recipes.get(name), model, torch.bfloat16)
    torch.manual_seed(1)
    loss = sum(one.learn(batch(side=256)).values())
    torch.manual_seed(0)
    other = Learner(recipes.get(name), recipes.get(name).build(2).cuda(), torch.bfloat16, compile=True)
    torch.manual_seed(1)
    assert sum(other.learn(batch(side=256)).values()) == pytest.approx(loss, rel=0.02)
