"""A dry run measures real steps of every stage, and a forecast is arithmetic on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import deimkit as dk
from deimkit import recipes
from deimkit.data.dataset import Dataset
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DeimkitError, RecipeError
from deimkit.explore.costs import draw_forecasts
from deimkit.training.rehearsal import Pace, Rehearsal, in_words, lengths, one_epoch_each


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(Synthetic(train=24, val=20, size=96).write_once(tmp_path_factory.mktemp("scenes")))


def made_up(name: str = "deim_dfine_l") -> Rehearsal:
    """A dry run whose steps of 4 images took a second, and whose images took 10 ms to load."""
    recipe = recipes.get(name)
    stages = [stage for stage, length in lengths(recipe.timeline).items() if length]
    paces = tuple(Pace(stage, (1.0, 1.0, 1.0), (0.04, 0.04, 0.04), 7.0, (40.0,) * 4) for stage in stages)
    return Rehearsal(recipe, 4, "cpu", "float32", paces, evaluate_s=0.05, memory=10**9, checkpoint=10**8)


def test_a_dry_run_takes_steps_of_every_stage(scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = dk.rehearse("tiny", scenes, steps=12, size=96, device="cpu")
    assert [pace.stage for pace in found.paces] == ["warm", "dense", "augment", "clean"]
    for pace in found.paces:
        assert len(pace.step_s) == len(pace.load_s) == 2 and len(pace.loss) == 3  # the first one warms up
        assert min(pace.step_s) > 0 and min(pace.load_s) > 0 and min(pace.loss) > 0
    boxes = {pace.stage: pace.boxes for pace in found.paces}
    assert boxes["dense"] > boxes["clean"]
    assert found.batch == 2 and found.evaluate_s > 0 and found.memory > 10**8 and found.checkpoint > 10**6
    assert found.recipe == recipes.tiny.fit_to(400, size=96) and "dense" in str(found)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_forecast_by_hand() -> None:
    """DEIM-D-FINE-L: 58 epochs of 3,696 steps of 32 images, of which one image costs a quarter of a second."""
    alone = made_up().forecast(118_287, 5_000, workers=0)
    assert [stage.steps for stage in alone.stages] == [3696 * epochs for epochs in (4, 25, 21, 8)]
    assert alone.stages[0].step == pytest.approx(8 + 32 * 0.01)
    hours = 58 * (3696 * 8.32 + 5000 * 0.05) / 3600
    assert alone.range == (alone.hours, alone.hours) and alone.device_hours == alone.hours == pytest.approx(hours)
    assert alone.disk == 4 * 10**8 and "deim_dfine_l on 1 x cpu" in str(alone)
    eight = made_up().forecast(118_287, 5_000, devices=8, workers=16)
    assert eight.stages[0].step == pytest.approx(1.0), "16 processes load 32 images in 20 ms, meanwhile"
    assert eight.device_hours == pytest.approx(8 * eight.hours)
    starved = made_up().forecast(118_287, 5_000, devices=32, workers=1)
    assert starved.stages[0].step == starved.stages[0].load == pytest.approx(0.32)
    shorter = made_up().forecast(118_287, 5_000, epochs=12, batch=64, workers=0)
    assert shorter.recipe.timeline.total == 12 and shorter.stages[0].compute == pytest.approx(16)


def test_the_spread_of_the_steps_is_the_range() -> None:
    measured = made_up("dfine_l")
    uneven = replace(measured, paces=tuple(replace(pace, step_s=(0.5, 1.0, 1.5)) for pace in measured.paces))
    found = uneven.forecast(118_287, 0, workers=0)
    low, high = found.range
    assert high - found.hours == pytest.approx(found.hours - low)
    assert high - found.hours == pytest.approx(80 * 3696 * 8 * 2 * 0.5 / 3**0.5 / 3600)


@pytest.mark.parametrize("name", recipes.names())
def test_every_stage_of_every_recipe_is_rehearsed_once(name: str) -> None:
    clock = recipes.get(name).timeline
    short = one_epoch_each(clock)
    assert [short.stage(epoch) for epoch in range(short.total)] == [s for s, length in lengths(clock).items() if length]
    assert sum(lengths(clock).values()) == clock.total and bool(short.multi_scale_end) == bool(clock.multi_scale_end)
    assert all(short.lr_factor(step, 5) <= 0.05 for step in range(5 * short.total))


def test_what_cannot_be_rehearsed_is_said(scenes: Dataset) -> None:
    with pytest.raises(RecipeError, match="at least two steps for each of the 4 stages of tiny; got steps=4"):
        dk.rehearse("tiny", scenes, steps=4, size=96)
    with pytest.raises(DeimkitError, match="no field 'worker'|worker"):
        dk.rehearse("tiny", scenes, worker=3)
    for devices in (0, 3):
        with pytest.raises(RecipeError, match="devices >= 1 that divide the batch"):
            made_up().forecast(100_000, 10, devices=devices)
    with pytest.raises(RecipeError, match="measures one device"):
        dk.rehearse("tiny", scenes, devices=2)


def test_few_images_are_taken_again(tmp_path: Path) -> None:
    one = Dataset.open(Synthetic(train=1, val=1, size=64).write(tmp_path / "one"))
    found = dk.rehearse("tiny", one, steps=8, size=64, batch=3, device="cpu")
    assert found.batch == 3 and [len(pace.loss) for pace in found.paces] == [2] * 4
    assert "boxes/image" in str(found)


def test_a_forecast_is_drawn() -> None:
    ax = draw_forecasts([made_up(name).forecast(118_287, 5_000, workers=3) for name in ("deim_dfine_l", "dfine_l")])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["deim_dfine_l, 1 x cpu, 3 loaders", "dfine_l, 1 x cpu, 3 loaders"]
    widest = max(patch.get_x() + patch.get_width() for patch in ax.patches)
    assert widest == pytest.approx(
        max(made_up(n).forecast(118_287, 5_000, workers=3).hours for n in ("deim_dfine_l", "dfine_l"))
    )


def test_hours_in_words() -> None:
    assert [in_words(hours) for hours in (0.2, 1.6, 71.0, 100.0)] == ["12 min", "1.6 h", "71.0 h", "4.2 days"]
