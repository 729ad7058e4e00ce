"""The clock: published schedules to the last digit, and a legal one for every run anybody may ask for."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from deimkit.errors import RecipeError
from deimkit.recipes.training_tables import COCO_TRAIN, TRAINING
from deimkit.training.timeline import BestTracker, FlatCosine, StepDecay, Timeline, Verdict, momentum

SIZES = ["dfine_n", "dfine_s", "dfine_m", "dfine_l", "dfine_x"]
RTDETRS = [f"rtdetrv2_{depth}" for depth in ("r18vd", "r34vd", "r50vd_m", "r50vd", "r101vd")]
DEIM = {f"deim_{name}": name for name in SIZES + RTDETRS}


# ------------------------------------------------------------------------------------------------ as published


@pytest.mark.parametrize("name", DEIM)
@pytest.mark.parametrize("run", ["bs_config", "bs32"])
def test_rates_are_the_published_ones(shared: Path, name: str, run: str) -> None:
    """Every sampled iteration of the published curve, for every parameter group, and the loop's delay of one step."""
    golden = np.load(shared / "golden/schedule" / f"{DEIM[name]}_lr.npz")
    clock = TRAINING[name].timeline()
    steps, base = int(golden[f"{run}/iter_per_epoch"]), golden["base_lr"]
    shape = clock.lr
    assert isinstance(shape, FlatCosine)
    for k, rates in zip(golden[f"{run}/iters"].tolist(), golden[f"{run}/lr"], strict=True):
        np.testing.assert_allclose(base * shape.curve(k, clock, steps), rates, rtol=4e-16, atol=0)
        assert clock.lr_factor(k + 1, steps) == shape.curve(k, clock, steps)
    assert clock.total * steps == golden[f"{run}/total_iters"]


@pytest.mark.parametrize("name", DEIM)
def test_stages_are_the_published_ones(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden/schedule" / f"{DEIM[name]}.json").read_text())
    data, clock, row = golden["data"], TRAINING[name].timeline(), TRAINING[name]
    assert [clock.warm, clock.dense, clock.augment, clock.total] == [*data["policy_epochs"], golden["epochs"]]
    mixed = [epoch for epoch in range(clock.total) if clock.mixup(epoch)]
    assert [mixed[0], mixed[-1] + 1] == data["mixup_epochs"]
    varied = sum(clock.multi_scale(epoch) for epoch in range(clock.total))
    assert varied == (data["collate_stop_epoch"] if data["base_size_repeat"] else 0)
    assert row.repeat == data["base_size_repeat"]
    assert row.batch == golden["total_batch_size"]
    assert [clock.ema_decay, clock.ema_ramp, row.restart] == [
        golden["ema"][key] for key in ("decay", "warmups", "restart_decay")
    ]
    shape = clock.lr
    assert isinstance(shape, FlatCosine)
    schedule = golden["schedule"]
    assert shape.first == 1 / schedule["linear_warmup_duration_first_step_only"]
    assert (shape.warmup, shape.floor) == (schedule["warmup_iter"], schedule["lr_gamma"])
    assert clock.total - shape.tail_start(clock) == schedule["no_aug_epoch"]
    assert shape.flat_end(clock) == (schedule["flat_epoch"] if name != "deim_dfine_n" else 78)


def test_operations_by_epoch_are_the_published_ones(shared: Path) -> None:
    """Which strong operations run in which epoch, against a record of the published pipeline."""
    record = json.loads((shared / "golden/data/policy_ops_by_epoch.json").read_text())
    warm, dense, augment = record["example_policy"]
    clock = Timeline(warm, dense, augment, augment + 8)
    stages = {(False, False): {"warm", "clean"}, (True, True): {"dense"}, (False, True): {"augment"}}
    assert record["ran"]
    for epoch, ran in record["ran"].items():
        ops = {op for way in ran for op in way["ops"]}
        assert clock.stage(int(epoch.removeprefix("epoch "))) in stages["Mosaic" in ops, "RandomIoUCrop" in ops]


def test_stage_boundaries() -> None:
    clock = Timeline(warm=4, dense=29, augment=50, total=58)
    stages = [clock.stage(epoch) for epoch in range(58)]
    assert [(name, len(list(run))) for name, run in itertools.groupby(stages)] == [
        ("warm", 4),
        ("dense", 25),
        ("augment", 21),
        ("clean", 8),
    ]
    plain = TRAINING["dfine_l"].timeline()
    assert [(name, len(list(run))) for name, run in itertools.groupby(map(plain.stage, range(80)))] == [
        ("augment", 72),
        ("clean", 8),
    ]
    assert not any(map(plain.mixup, range(80)))
    assert plain.multi_scale(71) and not plain.multi_scale(72)


def test_first_steps_as_published_and_corrected() -> None:
    clock = Timeline()
    assert [clock.lr_factor(k) for k in (0, 1, 2, 2001, 2002)] == [1 / 500, 0.0, (1 / 2000) ** 2, 1.0, 1.0]
    corrected = replace(clock, lr=FlatCosine(one_step_late=False))
    assert [corrected.lr_factor(k) for k in (0, 1, 1999, 2000)] == [(1 / 2000) ** 2, (2 / 2000) ** 2, 1.0, 1.0]
    assert all(corrected.lr_factor(k) == clock.lr_factor(k + 2) for k in range(1, clock.steps, 997))


@pytest.mark.parametrize("late", [True, False])
def test_without_warm_up_the_first_step_has_the_base_rate(late: bool) -> None:
    clock = Timeline(2, 12, 20, 24, lr=FlatCosine(warmup=0, floor=1.0, one_step_late=late))
    assert [clock.lr_factor(k) for k in range(3)] == [1.0, 1.0, 1.0]
    assert [Timeline(lr=StepDecay(warmup=0)).lr_factor(k) for k in range(2)] == [1.0, 1.0]


def test_cosine_by_hand() -> None:
    """Flat until 2, tail of 2, 8 epochs of 10 steps: half-way down at step 40, a quarter of the way at 30."""
    clock = Timeline(0, 2, 6, 8, lr=FlatCosine(warmup=4, floor=0.2), steps_per_epoch=10)
    shape = clock.lr
    assert isinstance(shape, FlatCosine)
    expected = {0: 0, 2: 0.25, 4: 1, 20: 1, 30: 0.2 + 0.8 * (0.5 + math.sqrt(0.125)), 40: 0.6, 60: 0.2, 79: 0.2}
    assert {k: pytest.approx(shape.curve(k, clock, 10)) for k in expected} == expected


def test_step_decay_by_hand() -> None:
    clock = Timeline(0, 0, 12, 12, lr=StepDecay(warmup=4, drops=(8, 11)), steps_per_epoch=10)
    factors = [clock.lr_factor(k) for k in (0, 1, 3, 4, 79, 80, 109, 110)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 1, 0.1, 0.1, 0.01])
    plain = TRAINING["dfine_s"].timeline()
    assert [plain.lr_factor(k) for k in (0, 249, 499, 500, 10**5)] == [1 / 500, 0.5, 1.0, 1.0, 1.0]


def test_ema_momentum_by_hand() -> None:
    assert momentum(1, 0.99, 10) == pytest.approx(0.99 * (1 - math.exp(-0.1)))
    assert momentum(10**6, 0.99, 10) == pytest.approx(0.99)
    assert momentum(1, 0.9, ramp=0) == 0.9


def test_ema_restart_is_inert_unless_asked_for() -> None:
    assert {Timeline().ema_decay_at(epoch, refreshes=3) for epoch in range(58)} == {0.9999}
    clock = Timeline(ema_restart=0.9998)
    assert [clock.ema_decay_at(49), clock.ema_decay_at(50), clock.ema_decay_at(51, 2)] == [0.9999, 0.9998, 0.9996]


# ------------------------------------------------------------------------------------------------- impossible


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"warm": 30}, "dense=29 before warm=30"),
        ({"dense": 51}, "augment=50 before dense=51"),
        ({"augment": 59}, "total=58 before augment=59"),
        ({"warm": -1}, "warm=-1 before 0"),
        ({"warm": 0, "dense": 0, "augment": 0, "total": 0}, "at least one epoch"),
        ({"steps_per_epoch": 0}, "at least one epoch"),
        ({"steps_per_epoch": 34}, "warm-up of 2000 steps is longer than the run of 1972"),
        ({"multi_scale_until": 59}, "multi_scale_until"),
        ({"ema_decay": 1.0}, "EMA"),
        ({"ema_ramp": -1}, "EMA"),
        ({"lr": FlatCosine(flat=51)}, "flat until epoch 51 but its tail starts at epoch 50"),
        ({"lr": FlatCosine(tail=30)}, "flat until epoch 29 but its tail starts at epoch 28"),
        ({"lr": StepDecay(drops=(58,))}, "drops at epoch 58"),
    ],
)
def test_impossible_timelines_are_refused_with_the_reason(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Timeline(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: FlatCosine(warmup=-1), "warmup must be >= 0"),
        (lambda: FlatCosine(floor=1.5), "floor"),
        (lambda: FlatCosine(flat=-1), "flat and tail"),
        (lambda: StepDecay(drops=(11, 8)), "increasing"),
        (lambda: StepDecay(drops=(0,)), "increasing"),
        (lambda: Timeline().scaled_to(0, 10), "epochs >= 1"),
    ],
)
def test_impossible_shapes_are_refused(build: object, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        build()  # type: ignore[operator]


def test_a_timeline_is_rebuilt_by_its_repr() -> None:
    for row in TRAINING.values():
        assert eval(repr(row.timeline())) == row.timeline()


# ---------------------------------------------------------------------------------------------- any other run


@pytest.mark.parametrize("name", TRAINING)
def test_scaled_to_the_published_run_changes_nothing(name: str) -> None:
    clock = TRAINING[name].timeline()
    assert clock.scaled_to(clock.total, COCO_TRAIN // TRAINING[name].batch) == clock


def test_doubling_the_batch_is_the_authors_advice() -> None:
    """EMA decay 1 - 2 (1 - d), half the ramp, half the warm-up."""
    clock = Timeline().scaled_to(58, 3696 // 2)
    assert clock.ema_decay == pytest.approx(0.9998)
    assert (clock.ema_ramp, clock.lr.warmup) == (500, 1000)
    assert replace(clock, ema_decay=0.9999, ema_ramp=1000, lr=FlatCosine(), steps_per_epoch=3696) == Timeline()


@pytest.mark.parametrize(
    "epochs, steps, stages, warmup",
    [
        (12, 100, (1, 6, 10, 12), 120),  # a tenth of 1200 steps
        (72, 1000, (4, 36, 62, 72), 672),  # 2000 x 72000 / 214368
        (1, 1, (0, 1, 1, 1), 0),
        (2, 3, (0, 1, 2, 2), 0),
        (8, 40, (1, 4, 7, 8), 32),
        (580, 3696, (4, 290, 500, 580), 2000),
    ],
)
def test_scaled_runs_by_hand(epochs: int, steps: int, stages: tuple[int, ...], warmup: int) -> None:
    clock = Timeline().scaled_to(epochs, steps)
    assert ((clock.warm, clock.dense, clock.augment, clock.total), clock.lr.warmup) == (stages, warmup)


SHAPES = [
    *(row.timeline() for row in TRAINING.values()),
    replace(Timeline(), lr=FlatCosine(flat=35, tail=12), multi_scale_until=20, ema_restart=0.9998),
    Timeline(0, 0, 12, 12, lr=StepDecay(warmup=0, drops=(8, 11)), steps_per_epoch=7392),
    Timeline(1, 1, 1, 1, steps_per_epoch=2000),
]


@pytest.mark.parametrize("clock", SHAPES, ids=range(len(SHAPES)))
def test_every_run_has_a_legal_and_monotone_timeline(clock: Timeline) -> None:
    """1 to 1000 epochs at a few lengths, and 1 to 10000 steps for a few epochs; building a timeline checks it."""
    for steps in (1, 3, 97, 924, 10000):
        for a, b in itertools.pairwise(clock.scaled_to(epochs, steps) for epochs in range(1, 1001)):
            assert a.warm <= b.warm and a.dense <= b.dense and a.augment <= b.augment <= b.total == a.total + 1
            assert b.total - b.augment >= a.total - a.augment
            assert a.lr.warmup <= b.lr.warmup <= min(clock.lr.warmup, Timeline.WARMUP_SHARE * b.steps)
            assert a.ema_decay <= b.ema_decay <= clock.ema_decay and a.ema_ramp <= b.ema_ramp <= clock.ema_ramp
            assert b.augment < b.total or b.total < 8 or clock.augment == clock.total
    for epochs in (1, 8, 58, 1000):
        for a, b in itertools.pairwise(clock.scaled_to(epochs, steps) for steps in range(1, 10001, 27)):
            assert a.lr.warmup <= b.lr.warmup and a.ema_decay <= b.ema_decay
            assert (a.warm, a.dense, a.augment, a.total) == (b.warm, b.dense, b.augment, b.total)


def test_rates_of_any_run_stay_between_zero_and_the_base_and_end_at_the_floor() -> None:
    for epochs, steps in itertools.product((1, 2, 3, 5, 8, 13, 40), (1, 2, 7, 31)):
        clock = Timeline().scaled_to(epochs, steps)
        factors = [clock.lr_factor(step) for step in range(clock.steps)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert clock.total < 8 or steps < 3 or factors[-1] == 0.5
        after = [f for step, f in enumerate(factors) if step > clock.lr.warmup + 1]
        assert after == sorted(after, reverse=True)


def test_events_cover_the_run() -> None:
    for row in TRAINING.values():
        clock = row.timeline()
        events = clock.events()
        for track in ("stage", "learning rate"):
            parts = [e for e in events if e.track == track]
            assert parts[0].start == 0 and parts[-1].end == clock.total
            assert all(a.end == b.start for a, b in itertools.pairwise(parts))
        assert any(e.track == "MixUp" for e in events) == (clock.dense > 0)
        assert any(e.track == "multi-scale" for e in events) == (row.repeat is not None)
    drops = Timeline(0, 0, 12, 12, lr=StepDecay(0, (8, 11))).events()
    assert [(e.start, e.end) for e in drops if e.track == "learning rate"] == [(0, 8), (8, 11), (11, 12)]


# ------------------------------------------------------------------------------------------ best and reload


def published_solver(aps: list[float], stop: int) -> list[tuple[str | None, bool, bool]]:
    """The published rules, told literally, per epoch: (what is saved, reload after it, reload before it)."""
    story: list[tuple[str | None, bool, bool]] = []
    running: float | None = None  # the record that an epoch must beat so as not to be thrown away
    overall: float | None = None  # the best of both stages
    for epoch, ap in enumerate(aps):
        back_before = epoch == stop and epoch > 0
        beats_running = running is None or ap > running
        beats_overall = overall is None or ap > overall
        saved, back_after = None, False
        if epoch < stop:
            if beats_overall:
                saved = "stage1"
        else:
            if beats_overall:
                saved = "stage2"
            if not beats_running:
                back_after = True
        if beats_overall:
            overall = ap
        if beats_running:
            running = ap
        elif epoch >= stop:
            running = None
        story.append((saved, back_after, back_before))
    return story


def tracked(aps: list[float], stop: int) -> list[tuple[str | None, bool, bool]]:
    """The same by `BestTracker`, written down and read again after every epoch as a resumed run does."""
    tracker, story = BestTracker(stop), []
    for epoch, ap in enumerate(aps):
        tracker = BestTracker(**json.loads(json.dumps(asdict(tracker))))
        before = tracker.starts(epoch)
        verdict = tracker.ends(epoch, ap)
        story.append((verdict.save, verdict.reload, before))
    return story


def test_best_and_reload_for_every_short_run() -> None:
    """Every order of three AP values, ties included, over six epochs and every stop epoch."""
    for stop in range(1, 7):
        for aps in itertools.product((0.0, 0.1, 0.2), repeat=6):
            assert tracked(list(aps), stop) == published_solver(list(aps), stop)


def test_best_and_reload_for_long_random_runs() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        aps = [round(draw.random(), 1) for _ in range(draw.randint(1, 40))]
        stop = draw.randint(1, 40)
        assert tracked(aps, stop) == published_solver(aps, stop)


def test_reload_by_hand() -> None:
    """Stage 1 ends at 0.3; 0.3 ties and returns; 0.2 sets a new running record; 0.1 returns; 0.2 again does not."""
    tracker = BestTracker(stop=2)
    assert [tracker.ends(0, 0.1), tracker.ends(1, 0.3)] == [Verdict("stage1", False)] * 2
    assert tracker.starts(2) and not tracker.starts(3)
    aps = [0.3, 0.2, 0.1, 0.2, 0.4]
    stage2 = [tracker.ends(2 + i, ap) for i, ap in enumerate(aps)]
    assert [v.reload for v in stage2] == [True, False, True, False, False]
    assert [v.save for v in stage2] == [None, None, None, None, "stage2"]
    assert (tracker.refreshes, tracker.best) == (2, 0.4)


def test_without_reloads_only_the_best_is_kept() -> None:
    tracker = BestTracker(stop=1, reloads=False)
    assert [tracker.ends(e, ap) for e, ap in enumerate([0.2, 0.1, 0.3])] == [
        Verdict("stage1", False),
        Verdict(None, False),
        Verdict("stage2", False),
    ]
    assert not tracker.starts(1)


def test_nothing_to_reload_when_the_run_begins_clean() -> None:
    tracker = BestTracker(stop=0)
    assert not tracker.starts(0)
    assert [tracker.ends(e, ap) for e, ap in enumerate([0.2, 0.1])] == [Verdict("stage2", False), Verdict(None, False)]
