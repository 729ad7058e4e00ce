"""A dry run measures real steps of every stage, and a forecast is arithmetic on them."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import deimkit as dk
from deimkit import recipes
from deimkit.__main__ import main
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.data.loader import Loader
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DeimkitError, RecipeError
from deimkit.explore.costs import draw_forecasts
from deimkit.models.detector import Detector
from deimkit.recipes.recipe import Recipe
from deimkit.structures import Batch
from deimkit.training.learner import Learner
from deimkit.training.memory import Fit, heaviest, largest_fit
from deimkit.training.rehearsal import Pace, Rehearsal, in_words, lengths, one_epoch_each
from deimkit.training.run import Plan
from tests.micro import MICRO
from tests.short import short_of_memory


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


def test_the_largest_share_is_found_and_rehearsed(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for 5 images trains the 12 of the recipe in 3 parts of 4."""
    room = short_of_memory(monkeypatch, images=5)
    recipe = replace(MICRO, batch=12)
    before = torch.get_rng_state()
    found = dk.rehearse(recipe, scenes, steps=6, batch="largest", device="cpu")
    assert found.fit == Fit(batch=12, devices=1, images=4, accumulate=3) and found.batch == 4
    assert room.tried[:4] == [12, 6, 4, 4] and set(room.tried) <= {12, 6, 4}
    assert str(found).endswith("4 image(s) fit at once; 12 a step are trained with accumulate=3")
    assert torch.equal(torch.get_rng_state(), before), "no random number is missed"
    assert found.forecast(24, 20, batch=12).recipe.batch == 12
    whole = dk.rehearse(replace(recipe, batch=2), scenes, steps=6, batch="largest", device="cpu")
    assert whole.fit == Fit(2, 1, 2, 1) and str(whole).endswith(
        "2 image(s) fit at once; 2 a step are trained as they are"
    )


def test_what_does_not_fit_at_all_is_said(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    room = short_of_memory(monkeypatch, images=0)
    with pytest.raises(DeimkitError, match="Not even one image of 64 x 64 at a time fits into the memory of cpu"):
        dk.rehearse(replace(MICRO, batch=6), scenes, steps=6, batch="largest", device="cpu")
    assert room.tried == [6, 3, 2, 1]
    with pytest.raises(RecipeError, match="a number of images or 'largest'; got 'large'"):
        dk.rehearse("tiny", scenes, batch="large")  # type: ignore[arg-type]


def test_several_devices_share_what_fits(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, images=2)
    recipe = replace(MICRO, batch=16)
    found = largest_fit(recipe, Plan(data="", device="cpu"), scenes, devices=4)
    assert found == Fit(batch=16, devices=4, images=2, accumulate=2)
    assert str(found) == "2 image(s) fit at once; 16 a step on 4 devices are trained with accumulate=2"


def test_memory_is_given_back_between_the_tries(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the detectors of all tries none is left, neither after an error nor without one."""
    built: list[weakref.ref[Detector]] = []
    alive_at: list[int] = []
    build = Recipe.build

    def noted(self: Recipe, categories: CategoryMap) -> Detector:
        alive_at.append(sum(detector() is not None for detector in built))
        detector = build(self, categories)
        built.append(weakref.ref(detector))
        return detector

    monkeypatch.setattr(Recipe, "build", noted)
    short_of_memory(monkeypatch, images=2)
    assert largest_fit(replace(MICRO, batch=8), Plan(data="", device="cpu"), scenes).images == 2
    assert alive_at == [0, 0, 0] and all(detector() is None for detector in built)


@pytest.mark.parametrize("name", ["dfine_n", "deim_dfine_l", "deim_rtdetrv2_tiny", "tiny"])
def test_the_heaviest_batch(name: str, scenes: Dataset) -> None:
    """The most crowded images, mosaicked and blended where the recipe does so, at the largest size that it draws."""
    recipe = recipes.get(name)
    assert scenes.train is not None
    batch = heaviest(recipe, 4, scenes.train)
    boxes = np.diff(scenes.train.starts)
    crowded = [scenes.train.ids[i] for i in np.argsort(-boxes, kind="stable")[:4]]
    assert sorted(batch.ids) == sorted(crowded)
    if name.startswith("deim_dfine"):
        assert batch.mix is not None and len(batch.targets) > 4 * max(boxes)
    sizes = {task.size for epoch in range(2) for task in plan_of(recipe, scenes.train).plan(epoch)} - {None}
    assert batch.size == max(sizes, default=recipe.size)
    assert len(heaviest(recipe, 30, scenes.train)) == 30, "too few images are taken again"


def plan_of(recipe: Recipe, learned: Split) -> Loader:
    """A loader with so many steps that every size is drawn."""
    many = learned.take(i % len(learned) for i in range(400))
    return Loader(many, 2, recipe.size, recipe.augment, recipe.timeline)


def test_a_second_step_is_tried(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the first step leaves the second without: that of the optimiser."""
    steps = []

    def learn(self: Learner, batch: Batch, watch: object = None) -> dict[str, float]:
        steps.append(self.accumulate)
        if steps[-2:] == [1, 1]:
            raise torch.OutOfMemoryError("one too many")
        return {}

    monkeypatch.setattr(Learner, "learn", learn)
    assert largest_fit(MICRO, Plan(data="", device="cpu"), scenes).accumulate == 2 and steps == [1, 1, 2, 2]


def test_what_is_tried_is_what_will_train(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic steps take more memory, so it is them that are tried."""
    modes = []

    def learn(self: Learner, batch: Batch, watch: object = None) -> dict[str, float]:
        modes.append((torch.are_deterministic_algorithms_enabled(), self.precision))
        return {}

    monkeypatch.setattr(Learner, "learn", learn)
    largest_fit(MICRO, Plan(data="", device="cpu", deterministic=True, precision="bf16"), scenes)
    assert modes == [(True, torch.bfloat16)] * 2 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_a_gpu_that_is_short_of_memory(scenes: Dataset) -> None:
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        recipe = replace(recipes.tiny, batch=256)
        found = largest_fit(recipe, Plan(data="", device="cuda"), scenes)
        assert found.accumulate > 1 and found.images * found.accumulate == 256
        assert torch.cuda.memory_reserved() < 200 * 2**20, "the tries gave their memory back"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_command_line_finds_the_largest_share(
    scenes: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short_of_memory(monkeypatch, images=3)
    asked = ["rehearse", "tiny", "--data", str(scenes.source), "--rehearsed", "largest", "--size", "64"]
    assert main([*asked, "--steps", "8", "--device", "cpu", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    batch = recipes.tiny.batch
    assert json.loads(last)["fit"] == {"batch": batch, "devices": 1, "images": 2, "accumulate": batch // 2}
    assert any(f"accumulate={batch // 2}" in line for line in text)
    with pytest.raises(SystemExit):
        main(["rehearse", "tiny", "--data", "synthetic", "--rehearsed", "small"])
    assert "invalid share value: 'small'" in capsys.readouterr().err
