"""A benchmark that can be believed, held against a clock that stands still and sessions of known speed."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median

import pytest
import torch

from deimkit.data.split import CategoryMap
from deimkit.deploy.bench import benchmark
from deimkit.deploy.bench.benchmark import compare, measure
from deimkit.deploy.bench.latency import Report
from deimkit.deploy.bench.paper import beside_paper
from deimkit.deploy.bench.timing import Clock, Method, Ratio, Timing
from deimkit.deploy.clocks import Sample
from deimkit.deploy.machine import Gpu
from deimkit.errors import DeployError
from tests.still_clock import Paced, StillClock, card

SHORT = Method(rounds=4, seconds=0.4, discard=1, pause=0.1, warmup=0.0, patience=1.0)

# --------------------------------------------------------------------------------------------------------- timing


def test_figures_of_a_timing_by_hand() -> None:
    timing = Timing(((0.010, 0.020, 0.030), (0.040, 0.050)), images=8)
    assert timing.median == 0.030 and timing.min == 0.010 and timing.mean == pytest.approx(0.030)
    assert timing.medians == [0.020, pytest.approx(0.045)]
    assert timing.std == pytest.approx(0.0158114, rel=1e-5)  # sqrt(1000 / 4) ms
    assert timing.percentile(90) == pytest.approx(0.046) and timing.percentile(99) == pytest.approx(0.0496)
    assert timing.images_per_s == pytest.approx(8 / 0.030)


def test_a_timing_of_one_call() -> None:
    told = Timing(((0.2,),)).to_dict()
    assert {told[f"{name}_ms"] for name in ("mean", "median", "min", "p50")} == {200.0}
    assert {told[f"{name}_ms"] for name in ("p90", "p95", "p99")} == {None}
    assert told["std_ms"] == 0.0 and told["n"] == 1 and told["seconds"] == ((0.2,),)


@pytest.mark.parametrize("calls, known", [(19, {50}), (20, {50, 90}), (40, {50, 90, 95}), (100, {50, 90, 95, 99})])
def test_a_percentile_needs_calls_beyond_it(calls: int, known: set[int]) -> None:
    timing = Timing((tuple(0.001 * n for n in range(calls)),))
    assert {percent for percent in (50, 90, 95, 99) if timing.tail(percent) is not None} == known
    assert {percent for percent in (50, 90, 95, 99) if timing.to_dict()[f"p{percent}_ms"] is not None} == known
    assert timing.tail(50) == pytest.approx(0.0005 * (calls - 1))


def rounds_of(*medians: float) -> Timing:
    return Timing(tuple((value,) for value in medians))


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    above, below = rounds_of(2.0, 40.0, 3.0), rounds_of(1.0, 10.0, 1.0)  # the second round was on a busy machine
    assert Ratio.of(above, below) == Ratio(3.0, 2.0, 4.0)


@pytest.mark.parametrize(
    "n, low, high", [(1, 0, 0), (5, 0, 4), (6, 0, 5), (8, 0, 7), (10, 1, 8), (20, 5, 14), (100, 39, 60)]
)
def test_the_interval_of_a_ratio_has_its_confidence(n: int, low: int, high: int) -> None:
    """Between the order statistics `low` and `high` of n values lies their median with the binomial's probability."""
    from scipy.stats import binom

    ratio = Ratio.of(rounds_of(*range(1, n + 1)), rounds_of(*[1.0] * n))
    assert (ratio.low, ratio.high) == (low + 1, high + 1)
    inside = binom.cdf(high, n, 0.5) - binom.cdf(low, n, 0.5)
    assert n < 6 or inside >= 0.95


def test_the_clock_waits_for_the_work() -> None:
    wall, gpu = Clock().time(lambda: Clock().rest(0.01), torch.device("cpu"))
    assert wall >= 0.01 and gpu is None


# ------------------------------------------------------------------------------------------------------ measuring


def test_a_steady_session_is_measured_exactly() -> None:
    clock = StillClock()
    report = compare([Paced("A", clock, 0.02)], method=SHORT, clock=clock)
    (result,) = report.results
    assert [len(block) for block in result.wall.rounds] == [5] * 4  # 0.4 s in 4 rounds of calls of 0.02 s
    assert result.wall.seconds == pytest.approx([0.02] * 20)
    assert result.gpu is None and result.copies is None and result.warm
    assert result.wall.images_per_s == pytest.approx(50)


def test_sessions_run_in_turn_and_rest_before_each_block() -> None:
    clock = StillClock()
    sessions = [Paced("A", clock, 0.1), Paced("B", clock, 0.1), Paced("C", clock, 0.05)]
    compare(sessions, method=SHORT, clock=clock)
    turns = [(name, len(list(calls))) for name, calls in groupby(clock.ran)]
    warm_up, rounds = turns[: turns.index(("rest", 1))], turns[turns.index(("rest", 1)) :]
    assert [name for name, _ in warm_up] == ["A", "B", "C"]
    # a block of 0.1 s, and one call before it that does not count
    assert rounds == [("rest", 1), ("A", 2), ("rest", 1), ("B", 2), ("rest", 1), ("C", 3)] * 4
    assert clock.rests == [0.1] * 12


def test_the_first_call_after_another_runtime_does_not_count() -> None:
    """What misled an earlier benchmark: a runtime's first call after another's is slow."""
    clock = StillClock()
    sessions = [Paced("A", clock, 0.05, strange=0.4), Paced("B", clock, 0.05, strange=0.1)]
    report = compare(sessions, method=SHORT, clock=clock)
    assert report.results[0].wall.seconds == pytest.approx([0.05] * len(report.results[0].wall.seconds))
    assert report.speedup(report.results[1]).median == pytest.approx(1.0)
    misled = compare(sessions, method=replace(SHORT, discard=0), clock=clock)
    assert max(misled.results[0].wall.seconds) == pytest.approx(0.45)


def test_a_busy_machine_changes_the_times_and_not_the_ratio() -> None:
    """Rounds get slower and slower, for all alike; B is twice as fast throughout."""
    clock = StillClock()

    def slower(share: float) -> Paced:
        return Paced("A" if share == 1 else "B", clock, lambda n: share * (0.1 if n < 10 else 0.1 * (n - 8)))

    method = Method(rounds=6, seconds=0.0, warmup=0.0)
    report = compare([slower(1.0), slower(0.5)], method=method, clock=clock)
    a, b = report.results
    assert max(a.wall.seconds) > 2 * min(a.wall.seconds)
    assert report.speedup(b) == Ratio(*[pytest.approx(2.0)] * 3)
    assert report.speedup(a) == Ratio(1.0, 1.0, 1.0)


def test_a_session_is_warm_once_two_medians_agree() -> None:
    clock = StillClock()
    warming = [5.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1] + [0.101] * 50
    session = Paced("A", clock, warming)
    report = compare([session], method=Method(rounds=2, seconds=0.2, warmup=0.0), clock=clock)
    assert report.results[0].first_s == 5.0 and report.results[0].warm
    assert clock.ran.index("rest") == 13  # the first call, and windows of three until 0.1 is followed by 0.101
    assert report.results[0].wall.seconds == pytest.approx([0.101, 0.101])


def test_a_warm_up_lasts_as_long_as_asked() -> None:
    clock = StillClock()
    compare([Paced("A", clock, 0.1)], method=replace(SHORT, warmup=2.0, patience=9.0), clock=clock)
    assert 0.1 * (clock.ran.index("rest") - 1) == pytest.approx(2.1)


def test_a_session_that_never_settles_is_measured_and_told() -> None:
    clock = StillClock()
    restless = Paced("A", clock, lambda n: 0.01 * 1.2 ** (n % 40))
    report = compare([restless], method=replace(SHORT, patience=0.5), clock=clock)
    assert not report.results[0].warm
    assert "A, fp32, batch 1: still not steady when the warm-up ended." in str(report)


def test_copies_and_gpu_times_where_there_is_a_device() -> None:
    """ "meta" stands in for a GPU: it is not the host, so images must be brought to it."""
    clock = StillClock(gpu_share=0.75)
    report = compare([Paced("A", clock, 0.02, device="meta")], method=SHORT, clock=clock)
    (result,) = report.results
    assert result.gpu is not None and result.copies is not None
    assert result.gpu.seconds == pytest.approx([0.015] * 20)
    assert [len(block) for block in result.copies.rounds] == [5] * 4
    assert len(clock.rests) == 4  # the blocks with copies follow those without


def test_batch_sizes_are_measured_apart() -> None:
    clock = StillClock()
    eager, fixed = Paced("eager", clock, 0.02), Paced("fixed", clock, 0.01, batch=8)
    report = compare([eager, fixed], batches=(1, 8), method=SHORT, clock=clock)
    assert [(r.name, r.batch) for r in report.results] == [("eager", 1), ("eager", 8), ("fixed", 8)]
    assert report.speedup(report.results[2]).median == pytest.approx(2.0)
    assert report.results[2].wall.images_per_s == pytest.approx(800)
    assert "fixed takes 8 images at a time: not measured with 1." in report.notes


def test_each_recipe_has_a_baseline_of_its_own() -> None:
    clock = StillClock()
    made = [("eager", 0.02, "n"), ("eager", 0.08, "l"), ("fast", 0.01, "n"), ("fast", 0.02, "l")]
    report = compare([Paced(name, clock, t, recipe=r) for name, t, r in made], method=SHORT, clock=clock)
    assert [report.speedup(r).median for r in report.results] == pytest.approx([1, 1, 2, 4])


def failing(error: Exception, after: int = 0, batch: int = 1) -> type[Paced]:
    """Sessions that raise `error` after so many calls with so many images."""

    class Failing(Paced):
        def run(self, images: torch.Tensor, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
            if len(images) == batch and self.calls >= after:
                raise error
            return super().run(images, sizes)

    return Failing


BACKEND = torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)


@pytest.mark.parametrize("after", [0, 15], ids=["at once", "once warm"])
@pytest.mark.parametrize(
    "error, words",
    [
        (BACKEND, "BackendCompilerFailed: "),
        (torch.OutOfMemoryError("CUDA out of memory.\nsee the manual"), "OutOfMemoryError: CUDA out of memory."),
        (DeployError("TensorRT did not run."), "left out, TensorRT did not run."),
    ],
    ids=["compiler", "memory", "ours"],
)
def test_a_way_that_fails_is_a_remark_and_the_others_are_measured(error: Exception, words: str, after: int) -> None:
    clock = StillClock()
    sessions = [Paced("A", clock, 0.1), failing(error, after)("B", clock, 0.1), Paced("C", clock, 0.05)]
    report = compare(sessions, method=replace(SHORT, rounds=8), clock=clock)
    assert [result.name for result in report.results] == ["A", "C"]
    assert report.speedup(report.results[1]).median == pytest.approx(2.0)
    (remark,) = report.remarks
    assert remark.startswith("tiny, B, fp32, batch 1: left out, ") and words in remark and "\n" not in remark
    assert remark in report.notes and json.loads(report.to_json())["remarks"] == [remark]


def test_a_batch_too_large_leaves_the_smaller_one_measured() -> None:
    clock = StillClock()
    session = failing(torch.OutOfMemoryError("out of memory"), batch=8)("A", clock, 0.1)
    report = compare([session], (1, 8), SHORT, clock=clock)
    assert [result.batch for result in report.results] == [1]
    assert report.remarks == ("tiny, A, fp32, batch 8: left out, OutOfMemoryError: out of memory",)


def test_where_all_fail_there_is_no_report() -> None:
    clock = StillClock()
    session = failing(torch.OutOfMemoryError("out of memory"))("A", clock, 0.1)
    with pytest.raises(DeployError, match="batch 1: left out, OutOfMemoryError: out of memory.*smaller batch"):
        compare([session], method=SHORT, clock=clock)
    with pytest.raises(DeployError, match="got none.*OpenVINO is not installed"):
        compare([], method=SHORT, clock=clock, remarks=["OpenVINO is not installed."])


def test_remarks_of_the_caller_stand_in_the_report() -> None:
    clock = StillClock()
    report = compare([Paced("A", clock, 0.1)], method=SHORT, clock=clock, remarks=["OpenVINO is not installed."])
    assert report.remarks == ("OpenVINO is not installed.",) and "- OpenVINO is not installed." in str(report)


# ------------------------------------------------------------------------------------------------------ baselines


def of_sources(*made: tuple[str, str, float, dict[str, object]]) -> Report:
    """Sessions as (source, name, seconds, changes of the card), measured."""
    clock = StillClock()
    sessions = [Paced(name, clock, seconds, **of_card) for _, name, seconds, of_card in made]
    return compare(sessions, method=SHORT, clock=clock, sources=[source for source, *_ in made])


EAGER = ("mine", "PyTorch 2.15, eager on CPU", 0.2, {})


def test_a_file_is_compared_with_torch_of_the_same_detector() -> None:
    report = of_sources(("m.onnx", "ONNX Runtime", 0.1, {}), EAGER, ("n.onnx", "OpenVINO", 0.05, {"precision": "fp16"}))
    assert [report.baseline(result).source for result in report.results] == ["mine"] * 3
    assert [report.speedup(result).median for result in report.results] == pytest.approx([2, 1, 4])


@pytest.mark.parametrize(
    "changed", [{"recipe": "small"}, {"recipe": ""}, {"size": (64, 64)}, {"postprocess": False}], ids=str
)
def test_a_file_of_another_detector_is_its_own_baseline(changed: dict[str, object]) -> None:
    report = of_sources(EAGER, ("m.onnx", "ONNX Runtime", 0.1, changed))
    assert all(report.baseline(result) is result for result in report.results)


def test_two_files_are_not_compared_with_each_other() -> None:
    report = of_sources(("m.onnx", "ONNX Runtime", 0.1, {}), ("n.onnx", "ONNX Runtime", 0.05, {}))
    assert all(report.baseline(result) is result for result in report.results)


def test_two_runs_of_one_recipe_keep_their_own_baselines() -> None:
    report = of_sources(EAGER, ("yours", "PyTorch 2.15, eager on CPU", 0.4, {}), ("yours", "OpenVINO", 0.1, {}))
    assert [report.baseline(result).source for result in report.results] == ["mine", "yours", "yours"]


def test_raw_outputs_are_compared_with_raw_ones() -> None:
    raw = {"postprocess": False}
    torch_raw, file = ("mine", "PyTorch 2.15, eager on CPU", 0.1, raw), ("m.onnx", "ONNX Runtime", 0.05, raw)
    report = of_sources(EAGER, torch_raw, file)
    assert [report.speedup(result).median for result in report.results] == pytest.approx([1, 1, 2])


@pytest.mark.parametrize(
    "sessions, batches",
    [([], (1,)), (["fixed"], (1, 2)), (["any"], ()), (["any"], (0,))],
    ids=["no session", "another batch", "no batch", "batch 0"],
)
def test_nothing_to_measure_is_refused(sessions: list[str], batches: tuple[int, ...]) -> None:
    clock = StillClock()
    made = {"fixed": Paced("fixed", clock, 0.1, batch=8), "any": Paced("any", clock, 0.1)}
    with pytest.raises(DeployError, match="images at a time"):
        compare([made[name] for name in sessions], batches, SHORT, clock=clock)
    assert clock.ran == []


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"discard": -1}, {"pause": -1.0}, {"seconds": -1}, {"agree": 0.0}])
def test_a_method_without_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DeployError, match="Expected"):
        Method(**wrong)  # type: ignore[arg-type]


def test_the_collector_rests_while_calls_are_timed() -> None:
    clock, seen = StillClock(), []

    def pace(n: int) -> float:
        seen.append(gc.isenabled())
        return 0.1

    compare([Paced("A", clock, pace)], method=SHORT, clock=clock)
    assert seen[-1] is False and gc.isenabled()


def test_the_collector_is_back_after_a_failure() -> None:
    clock = StillClock()
    with pytest.raises(IndexError):
        compare([Paced("A", clock, [0.1] * 12)], method=SHORT, clock=clock)
    assert gc.isenabled()


def test_measure_is_a_comparison_of_one() -> None:
    """With the real clock: numbers are there, whatever they are."""
    method = Method(rounds=2, seconds=0.0, pause=0.0, warmup=0.0, patience=0.0)
    report = measure(Paced("A", StillClock(), 0.0), 2, method, claimed_ms=2.12)
    (result,) = report.results
    assert result.batch == 2 and result.wall.min > 0 and len(result.wall.rounds) == 2
    assert result.claimed_ms == 2.12 and result.hardware == report.machine.processor


def test_work_of_others_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([(100.0, 50.0, 10.0), (200.0, 100.0, 20.0)])  # 100 s of cores, 50 s busy, 10 s of them ours
    monkeypatch.setattr(benchmark, "processor_seconds", lambda: next(told))
    clock = StillClock()
    report = compare([Paced("A", clock, 0.1)], method=SHORT, clock=clock)
    assert report.others == pytest.approx(0.4)
    assert any("40% of the processors" in note for note in report.notes)


# --------------------------------------------------------------------------------------------------------- papers

T4 = {"runtime": "TensorRT 10.4.0 on Tesla T4", "hardware": "Tesla T4", "batch": 1}
THEIR_CARD = replace(card("dfine_n", precision="fp16", size=(640, 640)), categories=CategoryMap.of(80))


def test_a_latency_measured_as_theirs_is_compared() -> None:
    beside = beside_paper(2.12, 2.4, card=THEIR_CARD, **T4)
    assert beside is not None and beside.ratio == pytest.approx(2.4 / 2.12)
    assert "2.40 ms beside the paper's 2.12 ms (1.13 times)" in beside.words


@pytest.mark.parametrize(
    "changed, of_card",
    [
        ({"hardware": "NVIDIA T4G"}, {}),
        ({"hardware": "Tesla T40"}, {}),
        ({"hardware": "NVIDIA H200", "runtime": "TensorRT 10.4.0 on Tesla T4"}, {}),  # a name is no proof
        ({"runtime": "PyTorch 2.15.0 on Tesla T4"}, {}),
        ({"runtime": "ONNX Runtime 1.31.1, TensorRT 10.4, on Tesla T4"}, {}),
        ({"batch": 8}, {}),
        ({}, {"precision": "fp32"}),
        ({}, {"precision": "int8"}),
        ({}, {"size": (320, 320)}),
        ({}, {"size": (480, 800)}),
        ({}, {"postprocess": False}),
    ],
)
def test_any_other_latency_is_not(changed: dict[str, object], of_card: dict[str, object]) -> None:
    beside = beside_paper(2.12, 2.4, card=replace(THEIR_CARD, **of_card), **{**T4, **changed})  # type: ignore[arg-type]
    assert beside is not None and beside.ratio is None
    assert beside.words.startswith("not compared with the paper's 2.12 ms: that is TensorRT, fp16, on Tesla T4")
    for said in [*changed.values(), *(value for value in of_card.values() if isinstance(value, str))]:
        assert str(said) in beside.words


@pytest.mark.parametrize(
    "of_card, doubt, words",
    [
        ({"categories": CategoryMap.of(3)}, "", "the paper's has 80 classes and this one 3"),
        ({"top": 100}, "", "the paper's ends in 300 boxes and this one in 100"),
        ({}, "its architecture is another", "its architecture is another"),
    ],
)
def test_another_detector_of_that_name_is_not_compared(of_card: dict[str, object], doubt: str, words: str) -> None:
    beside = beside_paper(2.12, 2.4, card=replace(THEIR_CARD, **of_card), doubt=doubt, **T4)  # type: ignore[arg-type]
    assert beside is not None and beside.ratio is None
    assert beside.words == f"not compared with the paper's 2.12 ms: {words}"


def test_a_gpu_that_was_held_back_is_told_beside_the_paper() -> None:
    cool, held = (beside_paper(2.12, 2.4, card=THEIR_CARD, throttled=slow, **T4) for slow in (False, True))
    assert cool is not None and held is not None and held.ratio == cool.ratio
    assert held.words == f"{cool.words}; this GPU was held back meanwhile"


def test_doubts_of_a_source_keep_its_paper_away() -> None:
    clock = StillClock()
    sessions, doubts = [Paced("A", clock, 0.1, recipe="dfine_n")], {"mine": "its architecture is another"}
    report = compare(sessions, (1,), SHORT, {"dfine_n": 2.12}, ["mine"], clock, doubts)
    assert "; its architecture is another" in report.results[0].paper.words  # type: ignore[union-attr]


def test_no_claim_no_comparison() -> None:
    assert beside_paper(None, 2.4, card=THEIR_CARD, **T4) is None


def test_a_result_is_named_by_its_device_and_not_by_its_session() -> None:
    clock = StillClock()
    session = Paced("TensorRT 10.4.0 on Tesla T4", clock, 0.002, recipe="dfine_n", precision="fp16", size=(64, 64))
    report = compare([session], method=SHORT, claimed_ms={"dfine_n": 2.12, "dfine_l": None}, clock=clock)
    result = report.results[0]
    assert result.hardware == report.machine.processor and "T4" not in result.hardware
    assert result.paper is not None and result.paper.ratio is None
    assert f"Tesla T4 ({result.hardware}), fp16, one image of 64 x 64" in str(report)


def test_a_report_says_once_why_a_recipe_is_not_compared() -> None:
    clock = StillClock()
    sessions = [Paced(name, clock, 0.1, recipe="dfine_n") for name in "ABC"]
    report = compare(sessions, method=SHORT, claimed_ms={"dfine_n": 2.12}, clock=clock)
    assert sum("not compared" in note for note in report.notes) == 1
    assert all(told["paper"]["ratio"] is None for told in report.to_dict()["results"])


# --------------------------------------------------------------------------------------------------------- report


def in_pairs() -> Report:
    """A whole and a raw session of one runtime, and another without its raw one."""
    clock = StillClock()
    sessions = [
        Paced("A", clock, 0.100, postprocess=False),
        Paced("A", clock, 0.102),
        Paced("B", clock, 0.050, precision="fp16"),
    ]
    return compare(sessions, method=SHORT, clock=clock)


def test_post_processing_costs_what_a_pair_differs_by() -> None:
    report = in_pairs()
    ((whole, ratio),) = report.postprocessing
    assert whole.card.postprocess and whole.name == "A" and ratio.median == pytest.approx(1.02)
    assert "tiny 32 x 64, A, fp32, batch 1: post-processing costs 2.0 % of a forward (2.0 to 2.0 %)." in str(report)


def test_a_report_as_json_holds_every_call(tmp_path: Path) -> None:
    report = in_pairs()
    path = report.write(tmp_path / "bench" / "latency.json")
    told = json.loads(path.read_text())
    assert [path.name for path in path.parent.iterdir()] == ["latency.json"]
    assert told["machine"]["processor"] == report.machine.processor and told["method"]["rounds"] == 4
    assert told["throttled"] is None and told["samples"] == [] and told["notes"] == report.notes
    for kept, result in zip(told["results"], report.results, strict=True):
        calls = [call for block in kept["wall"]["seconds"] for call in block]
        assert calls == result.wall.seconds and kept["wall"]["median_ms"] == pytest.approx(1e3 * median(calls))
        assert kept["card"]["precision"] == result.card.precision
    assert told["results"][2]["speedup"]["median"] == pytest.approx(2.04)
    assert told["results"][2]["baseline"] == "tiny 32 x 64, A, fp32" and told["remarks"] == []


def test_a_report_as_a_table() -> None:
    lines = str(in_pairs()).splitlines()
    start = lines.index("") + 1
    head, raw, whole, other = lines[start : start + 4]
    assert len({len(line) for line in (head, raw, whole, other)}) == 1
    assert head.split()[:3] == ["batch", "calls", "median"]
    figures = ["1", "4", "100.00", "100.00", "–", "–", "–", "–", "10.0", "baseline"]
    assert raw.split() == ["tiny", "32", "x", "64,", "A,", "fp32,", "raw", "outputs", *figures]
    assert whole.endswith("baseline") and other.endswith("20.0  2.04 (2.04 to 2.04)")


def test_a_report_as_html_escapes_names() -> None:
    clock = StillClock()
    report = compare([Paced("<A>", clock, 0.1)], method=SHORT, claimed_ms={"tiny": 2.12}, clock=clock)
    html = report._repr_html_()
    assert "<A>" in report.notes[-1] and "&lt;A&gt;" in html and "<A>" not in html and html.count("<table>") == 1


def sample(moment: str, *limits: str) -> Sample:
    return Sample(moment, 1500.0, 5000.0, 70.0, 69.0, 90.0, limits)


@pytest.mark.parametrize(
    "samples, throttled, words",
    [
        ([], None, "cannot tell"),
        ([sample("before", "power cap"), sample("during"), sample("after", "power cap")], False, "no slowdown in 1"),
        ([sample("during"), sample("during", "power cap")], True, "power cap in 1 of 2 samples"),
        ([sample("during", "application clocks")], False, "no slowdown"),
    ],
)
def test_throttling_of_a_gpu_is_told(samples: list[Sample], throttled: bool | None, words: str) -> None:
    gpu = Gpu("Tesla T4", "7.5", 16 * 10**9, 40, "13.0", "580.1", 70.0, 1590.0)
    report = in_pairs()
    report = replace(report, machine=replace(report.machine, gpu=gpu), samples=tuple(samples))
    assert report.throttled is throttled and words in report.notes[0]
    assert ("held back" in report.notes[0]) is (throttled is True)
    assert "Latency on Tesla T4" in report._repr_html_()


@pytest.mark.gpu
def test_a_gpu_is_measured_by_both_clocks() -> None:
    class Squaring(Paced):
        def run(self, images: torch.Tensor, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
            x = torch.ones(2048, 2048, device=images.device)
            return {"boxes": x @ x @ x}

    session = Squaring("PyTorch", StillClock(), 0.0, device="cuda")
    report = measure(session, method=Method(rounds=5, seconds=1.0))
    (result,) = report.results
    assert result.gpu is not None and result.copies is not None and report.machine.gpu is not None
    assert 0 < result.gpu.median <= result.wall.median * 1.05 <= result.copies.median * 1.2
    assert result.hardware == torch.cuda.get_device_name()
