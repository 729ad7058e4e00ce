"""A recipe is a value: it prints as what rebuilds it, says what is misspelt, and fits itself to a dataset."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest

from deimkit import recipes
from deimkit.errors import RecipeError
from deimkit.recipes.recipe import Recipe, as_size

ALL = [recipes.get(name) for name in recipes.names()]


@pytest.mark.parametrize("recipe", ALL, ids=recipes.names())
def test_a_recipe_is_rebuilt_from_what_it_prints(recipe):
    assert recipes.parse(repr(recipe)) == recipe
    assert recipes.parse(recipes.to_python(recipe)) == recipe
    assert eval(repr(recipe), dict(recipes.parts())) == recipe


def test_the_names_of_the_papers_tables_are_there():
    wanted = {f"{prefix}dfine_{size}" for prefix in ("", "deim_") for size in "nsmlx"} | {"tiny"}
    sizes = ("r18vd", "r34vd", "r50vd_m", "r50vd", "r101vd")
    wanted |= {f"{prefix}rtdetrv2_{size}" for prefix in ("", "deim_") for size in sizes}
    assert wanted <= set(recipes.names())
    assert recipes.deim_dfine_n is recipes.get("deim_dfine_n")


@pytest.mark.parametrize("name", ["deim_dfin_n", "tny"])
def test_a_misspelt_recipe_has_a_neighbour(name):
    with pytest.raises(RecipeError, match="Did you mean"):
        recipes.get(name)
    with pytest.raises(AttributeError, match="Did you mean"):
        getattr(recipes, name)


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError):
        recipes.tiny.batch = 4
    with pytest.raises(TypeError, match="bach"):
        replace(recipes.tiny, bach=4)


@pytest.mark.parametrize(
    "before, after, says",
    [
        ("MAL(", "MALL(", "Unknown part 'MALL' in the recipe. Did you mean 'MAL'"),
        ("batch=4", "bacth=8", "Recipe has no field 'bacth'. Did you mean 'batch'"),
        ("queries=TopK(count=100)", "queries=TopK(cuont=100)", "TopK has no field 'cuont'. Did you mean 'count'"),
        ("batch=4", "batch=4 + 4", "only parts of deimkit and literals; got `4 \\+ 4` at line"),
        ("batch=4", "batch=__import__('os').system('false')", "only parts of deimkit and literals"),
        ("batch=4", "batch=open('ran', 'w')", "Unknown part 'open'"),
        ("batch=4", "batch=[print('ran') for _ in 'x']", "only parts of deimkit and literals"),
        ("batch=4", "**{'batch': 8}", "only parts of deimkit and literals|no field"),
        ("batch=4", "batch=0", "batch must be at least 1"),
        ("batch=4", "batch=", "must be one Python expression"),
        ("batch=4", "batch='eight'", "Recipe at line 1 of the recipe cannot be built"),
        ("Recipe(", "import os\nRecipe(", "must be one Python expression"),
        ("size=(192, 192)", "size=(190, 192)", "multiples of 32; got 190 x 192. Nearest: \\(192, 192\\)"),
    ],
)
def test_a_recipe_file_that_is_wrong_says_where(tmp_path, monkeypatch, capsys, before, after, says):
    monkeypatch.chdir(tmp_path)
    text = recipes.to_python(recipes.tiny)
    assert before in text
    with pytest.raises(RecipeError, match=says):
        recipes.parse(text.replace(before, after, 1))
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "TopK(3)", "8", "Recipe()", "Recipe(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)"])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(RecipeError):
        recipes.parse(text)


def test_the_difference_of_two_recipes_is_the_papers_list():
    changes = recipes.diff(recipes.dfine_l, recipes.deim_dfine_l)
    assert changes["name"] == ("dfine_l", "deim_dfine_l")
    assert changes["arch.activation"] == ("relu", "silu")
    assert changes["timeline.dense"] == (0, 29) and changes["optim.lr"] == (2.5e-4, 5e-4)
    assert changes["arch.backbone.frozen"] == (True, False)  # DEIM, "minor modifications": nothing is frozen
    assert {key for key in changes if key.startswith("arch.")} == {"arch.activation", "arch.backbone.frozen"}
    assert recipes.diff(recipes.tiny, recipes.tiny) == {}


@pytest.mark.parametrize("recipe", ALL, ids=recipes.names())
def test_a_recipe_fits_any_dataset(recipe):
    for images, epochs, batch in product([1, 5, 1000, 118287], [1, 2, 3, 8, 300], [1, 16, 512]):
        fitted = recipe.fit_to(images, epochs=epochs, batch=batch, size=320)
        clock = fitted.timeline
        assert clock.total == epochs and clock.steps_per_epoch == max(images // fitted.batch, 1)
        assert fitted.batch == min(batch, images) and fitted.size == (320, 320)
        assert clock.lr.warmup <= 0.1 * clock.steps
        assert all(0 <= clock.lr_factor(step) <= 1 for step in (0, clock.steps // 2, clock.steps - 1))
    assert recipes.parse(repr(fitted)) == fitted


@pytest.mark.parametrize("recipe", ALL, ids=recipes.names())
def test_its_own_dataset_changes_nothing(recipe):
    images = recipe.timeline.steps_per_epoch * recipe.batch
    assert recipe.fit_to(images) == recipe


def test_a_small_dataset_gets_a_small_batch():
    deim_n = recipes.get("deim_dfine_n")  # 128 images a step
    chosen = {images: deim_n.fit_to(images).batch for images in (1, 3, 40, 128, 205, 1000, 5000, 118287)}
    assert chosen == {1: 1, 3: 3, 40: 4, 128: 4, 205: 8, 1000: 32, 5000: 128, 118287: 128}
    assert deim_n.fit_to(205, batch=128).batch == 128  # whoever says it gets it
    assert recipes.tiny.fit_to(10).batch == recipes.tiny.batch == 4


def test_fine_tuning_from_objects365_starts_at_once():
    for name in ("dfine_l_obj2coco", "deim_dfine_x_obj2coco"):
        recipe = recipes.get(name)
        assert recipe.timeline.lr_factor(0) == recipe.timeline.lr_factor(10_000) == 1 and recipe.timeline.ema_ramp == 0
        assert recipe.arch.activation == "relu" and recipe.arch.backbone.frozen
    assert recipes.diff(recipes.dfine_x_obj2coco, recipes.deim_dfine_x_obj2coco)["timeline.dense"] == (0, 12)
    assert recipes.get("dfine_l_obj365").timeline.steps_per_epoch == 1_817_292 // 32
    assert recipes.get("dfine_l_crowdhuman").timeline.steps_per_epoch == 15_000 // 32


def test_a_study_changes_one_thing():
    """Beside the length of the run, which all rows of a table share."""
    parent = recipes.deim_rtdetrv2_r50vd
    for p, q in product((0.0, 0.5), repeat=2):
        study = recipes.get(f"deim_table4_24e_mosaic{p}_mixup{q}")
        assert (study.timeline.total, study.augment.mosaic, study.augment.mixup) == (24, p, q)
        assert replace(study, name=parent.name, paper=parent.paper, augment=parent.augment).timeline == study.timeline
    gamma = recipes.get("deim_table5_gamma1.8")
    same = recipes.get("deim_table5_gamma1.5")
    assert recipes.diff(same, gamma).keys() == {"name", "losses", "paper.ap"} and gamma.losses[0].gamma == 1.8
    bins = recipes.get("dfine_table4_bins8")
    assert bins.arch.refine.bins == 8 and not bins.share and [loss.name for loss in bins.losses][-1] == "fgl"
    assert recipes.get("dfine_table4_T5").losses == recipes.dfine_l.losses
    assert recipes.get("deim_table6_dfine_l_dense").timeline.augment == 36


def test_a_rate_that_is_given_is_the_base_rate():
    optim = recipes.get("deim_dfine_n").fit_to(205, lr=4e-4).optim
    assert (optim.lr, optim.backbone_lr) == (4e-4, 2e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch": 0}, {"batch": -3}, {"size": 100}, {"size": (320, 0)}, {"lr": 0.0}, {"lr": float("nan")}],
)
def test_an_impossible_fit_is_refused(wrong):
    with pytest.raises(RecipeError):
        recipes.tiny.fit_to(100, **wrong)
    with pytest.raises(RecipeError):
        recipes.tiny.fit_to(0)


def test_a_size_is_one_side_or_two():
    assert as_size(320) == as_size((320, 320)) == (320, 320)
    assert isinstance(recipes.tiny, Recipe) and recipes.tiny.build(3).size == (192, 192)
