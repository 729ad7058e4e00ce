"""The lab of the schedule draws what the timeline says, and says why an impossible one is none."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deimkit import recipes
from deimkit.errors import DeimkitError, RecipeError
from deimkit.explore.labs.lab import Choice
from deimkit.explore.labs.schedule_lab import FOLLOWS, STAYS, Schedule, ScheduleLab
from deimkit.training.timeline import momentum

R50 = recipes.get("deim_rtdetrv2_r50vd")  # of which DEIM's Fig. 5 is: 60 epochs, changes at 4, 34 and 58


@pytest.fixture
def lab() -> ScheduleLab:
    return ScheduleLab(R50)


def told(lab: ScheduleLab, **values: Any) -> Schedule:
    lab.set(**values)
    found: Schedule = lab.found
    return found


@pytest.mark.parametrize("name", ["deim_dfine_n", "dfine_l", "tiny", "deim_rtdetrv2_r50vd"])
def test_sliders_reach_what_they_begin_with(name: str) -> None:
    """A browser would move a slider from a value that its steps leave out."""
    for control in ScheduleLab(recipes.get(name)).controls():
        if not isinstance(control, Choice):
            steps = (control.value - control.low) / control.step
            assert steps == pytest.approx(round(steps)), control.name


def test_it_begins_as_figure_5(lab: ScheduleLab) -> None:
    found = told(lab)
    assert found.clock == R50.timeline and found.trouble is None and found.wrong == []
    assert found.stages == [("warm", 0, 4), ("dense", 4, 34), ("augment", 34, 58), ("clean", 58, 60)]
    assert found.rates.max() == 2e-4 and found.rates[-1] == 1e-4
    assert np.interp([20, 46, 59], found.epochs, found.rates) == pytest.approx([2e-4, 1.5e-4, 1e-4], rel=1e-3)


def test_rates_and_average_are_the_librarys(lab: ScheduleLab) -> None:
    found = told(lab, epochs=13, steps=200, floor=0.1)
    clock = replace(R50.timeline, lr=replace(R50.timeline.lr, floor=0.1)).scaled_to(13, 200)
    assert found.clock == clock
    steps = np.round(found.epochs * 200).astype(int).tolist()
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == clock.steps - 1
    np.testing.assert_array_equal(found.rates, [2e-4 * clock.lr_factor(k) for k in steps])
    kept = [momentum(k + 1, clock.ema_decay, clock.ema_ramp) for k in steps]
    np.testing.assert_allclose(found.news, 1 - np.array(kept))


def test_in_proportion_everything_moves(lab: ScheduleLab) -> None:
    found = told(lab, epochs=30, dense=40)
    assert found.asked == {"warm": 2, "dense": 20, "augment": 29, "total": 30}
    assert found.clock.lr.warmup == 1000, "half as many steps, half of the warm-up"


@pytest.mark.parametrize(
    "values, wrong",
    [
        ({"rest": STAYS, "epochs": 24}, ["augment", "total"]),
        ({"rest": STAYS, "epochs": 60, "warm": 40}, ["warm", "dense"]),
        ({"dense": 59}, ["dense", "augment"]),
        ({"augment": 61}, ["augment", "total"]),
        ({"rest": STAYS, "epochs": 2, "dense": 3, "augment": 3, "warm": 5}, ["warm", "dense", "augment", "total"]),
        ({"rest": STAYS, "epochs": 2, "warm": 0, "dense": 1, "augment": 2, "steps": 176, "warmup": 400}, []),
    ],
)
def test_an_impossible_schedule_is_explained_in_the_librarys_words(
    lab: ScheduleLab, values: dict[str, Any], wrong: list[str]
) -> None:
    found = told(lab, **values)
    with pytest.raises(RecipeError) as refused:
        asked = {name: lab.values[name] for name in ("warm", "dense", "augment")}
        total = lab.values["epochs"] if lab.values["rest"] == STAYS else 60
        steps = lab.values["steps"] if lab.values["rest"] == STAYS else 7392
        lr = replace(R50.timeline.lr, warmup=lab.values["warmup"])
        replace(R50.timeline, total=total, steps_per_epoch=steps, lr=lr, **asked)
    assert found.trouble == str(refused.value) and found.wrong == wrong
    assert found.clock == R50.timeline.scaled_to(lab.values["epochs"], lab.values["steps"])
    assert lab.words(found).startswith(f"Impossible: {refused.value}")
    figure = lab.figure()
    red = [shape.x0 for shape in figure.layout.shapes if shape.line.color == "#D55E00"]
    assert red == [found.asked[name] for name in wrong]
    said = " ".join(note.text for note in figure.layout.annotations)
    assert "Impossible as asked" in said and all(name in said for name in wrong if name != "total")
    assert next(trace for trace in figure.data if trace.name == "learning rate").line.dash == "dash"


def test_mixing_to_the_very_end_is_possible_and_never_lowers_the_rate(lab: ScheduleLab) -> None:
    """The silent failure: no error, no cosine, no clean stage."""
    found = told(lab, dense=60, augment=60)
    assert found.trouble is None and [name for name, *_ in found.stages] == ["warm", "dense"]
    assert found.rates[-1] == found.rates.max() == 2e-4
    assert "clean" not in lab.words(found) and "cosine" not in lab.words(found)


def test_the_figure_shows_what_was_computed(lab: ScheduleLab) -> None:
    found = told(lab, epochs=20)
    figure = lab.figure()
    traces = {(trace.name, trace.yaxis): trace for trace in figure.data}
    np.testing.assert_array_equal(traces["learning rate", "y"].y, found.rates)
    np.testing.assert_array_equal(traces["new in the average", "y3"].y, found.news)
    for name, start, end in found.stages:
        assert (min(traces[name, "y"].x[:5]), max(traces[name, "y"].x[:5])) == (start, end)
    mosaic = traces["mosaic, odds 0.5", "y2"].x
    assert (mosaic[0], mosaic[2]) == (found.clock.warm, found.clock.dense)
    assert traces["size varies", "y2"].x[2] == found.clock.augment
    assert list(figure.layout.xaxis.range) == [0, 20]
    assert [shape.x0 for shape in figure.layout.shapes] == list(found.asked.values())
    assert [shape.editable for shape in figure.layout.shapes] == [True, True, True, False]


@pytest.mark.parametrize(
    "values, moved, ends, expected",
    [
        ({}, 1, (20.3, 20.3), {"warm": 4, "dense": 20, "augment": 58}),
        ({}, 2, (58, 51.8), {"warm": 4, "dense": 34, "augment": 52}),  # one end of the line alone
        ({"epochs": 30}, 1, (10.0, 10.0), {"warm": 4, "dense": 20, "augment": 58}),  # 10 of 30 is 20 of 60
        ({"rest": STAYS, "epochs": 70}, 2, (66.2, 66.2), {"warm": 4, "dense": 34, "augment": 66}),
        ({}, 0, (-3.0, -3.0), {"warm": 0, "dense": 34, "augment": 58}),
        ({}, 2, (999.0, 999.0), {"warm": 4, "dense": 34, "augment": 150}),
        ({"epochs": 30, "warm": 50}, 0, (10.0, 10.0), {"warm": 20, "dense": 34, "augment": 58}),  # impossible before
    ],
)
def test_ends_can_be_dragged(
    lab: ScheduleLab, values: dict[str, Any], moved: int, ends: tuple[float, float], expected: dict[str, int]
) -> None:
    told(lab, **values)
    shapes = [SimpleNamespace(x0=shape.x0, x1=shape.x1) for shape in lab.figure().layout.shapes]
    shapes[moved] = SimpleNamespace(x0=ends[0], x1=ends[1])
    assert lab.dragged(shapes) == expected
    lab.set(**lab.dragged(shapes))


@pytest.mark.parametrize("name", ["deim_dfine_n", "dfine_l", "rtdetrv2_r50vd", "deim_rtdetrv2_r18vd", "tiny"])
def test_every_control_at_both_ends_draws_the_same_traces_without_a_warning(name: str) -> None:
    lab = ScheduleLab(recipes.get(name))
    kinds = [(trace.type, trace.name) for trace in lab.figure().data]
    assert len(kinds) == 10
    for control in lab.controls():
        for end in control.options if isinstance(control, Choice) else (control.low, control.high):
            for rest in (FOLLOWS, STAYS):
                start = {one.name: one.value for one in lab.controls()} | {"rest": rest}
                lab.set(**start | {control.name: end})
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    figure = lab.figure()
                assert [(trace.type, trace.name) for trace in figure.data] == kinds
                assert np.isfinite(lab.found.rates).all() and (lab.found.news > 0).all()
                assert np.isfinite(lab.found.news).all() and lab.words(lab.found)


def test_plain_recipes_have_no_floor_and_no_dense_stage() -> None:
    lab = ScheduleLab(recipes.get("dfine_l"))
    assert "floor" not in lab.values and [name for name, *_ in lab.found.stages] == ["augment", "clean"]
    with pytest.raises(DeimkitError, match="has the controls epochs, steps"):
        lab.set(floor=0.5)


def test_the_still_picture_and_its_words(lab: ScheduleLab) -> None:
    html = lab.still()["text/html"]
    assert "data:image/png;base64," in html
    assert "60 epochs of 7392 steps. Stages: warm 0 to 4, dense 4 to 34, augment 34 to 58, clean 58 to 60." in html
    assert "flat until 34, cosine until 58, floor until 60; it ends at 0.0001." in html
    refused = lab.set(dense=59).still()["text/html"]
    assert re.search("Impossible: Timeline needs 0 &lt;= warm", refused)
