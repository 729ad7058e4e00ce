"""Weights asked for by name or by address reach the right tensors, with what there is to say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filling import fill
from torch import Tensor

import deimkit as dk
from deimkit import recipes
from deimkit.__main__ import main
from deimkit.errors import CheckpointError
from deimkit.models.detector import Arch, Detector
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.resnet import ResNetVD
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.recipes.recipe import Recipe
from deimkit.weights import backbones, load_weights, save_published, sources
from deimkit.weights.addresses import WebFile
from deimkit.weights.hub import Repository
from tests.loopback import Site
from tests.micro import MICRO, scenes


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEIMKIT_CACHE", str(tmp_path / "cache"))


def published(spec: HGNetV2 | ResNetVD) -> dict[str, Tensor]:
    """Tensors as the published files of backbones hold them: without a prefix, and without the norms' counters."""
    state = fill(spec.build(), seed=5).state_dict()
    return {key: x for key, x in state.items() if not key.endswith(".num_batches_tracked")}


def frozen(recipe: Recipe) -> Recipe:
    """The same training with a frozen backbone."""
    return replace(recipe, arch=replace(recipe.arch, backbone=replace(recipe.arch.backbone, frozen=True)))


def filled(detector: Detector, state: dict[str, Tensor]) -> bool:
    """Whether the backbone has these tensors."""
    ours = detector.backbone.state_dict()
    return all(torch.equal(ours[key], x) for key, x in state.items())


RESNET = replace(MICRO, arch=rtdetrv2_arch("tiny"))


@pytest.fixture(params=[MICRO, RESNET], ids=["hgnet", "resnet"])
def served(request, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, dict[str, Tensor]]:
    """A recipe, and the tensors that are published for its backbone on a server of this machine."""
    recipe: Recipe = request.param
    state = published(recipe.arch.backbone)
    torch.save(state, tmp_path / "published.pth")
    site.files["/backbone.pth"] = (tmp_path / "published.pth").read_bytes()
    monkeypatch.setitem(backbones.FILES, recipe.arch.backbone, WebFile(site.url("/backbone.pth")))
    return recipe, state


# --------------------------------------------------------------------------------------------------------- loading


def test_imagenet_fills_the_backbone_of_a_recipe(served, site: Site, capsys) -> None:
    recipe, state = served
    for same in (recipe, frozen(recipe), replace(recipe, name="mine", batch=7)):
        assert filled(dk.load(same, weights="imagenet", categories=3), state)
    assert len(site.asked) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"micro: weights 'imagenet' from {site.url('/backbone.pth')} (Apache-2.0)"
    assert said[-1].startswith("kept in ") and Path(said[-1].removeprefix("kept in ")).is_file()
    dk.load(recipe, weights="imagenet", categories=3, progress=False)
    assert not capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no head that would say which classes.*categories="):
        dk.load(recipe, weights="imagenet")


def test_a_training_begins_with_imagenet_and_says_so(served, site: Site, tmp_path: Path) -> None:
    recipe, state = served
    data = scenes(tmp_path)
    (tmp_path / "imagenet").mkdir()  # a dataset of that name does not hide the weights
    run = dk.train(
        frozen(recipe), data, out=tmp_path / "x", weights="imagenet", epochs=1, batch=6, size=64, device="cpu",
        workers=0, progress=False,
    )  # fmt: skip
    weights = json.loads((run.folder / "run.json").read_text())["weights"]
    assert Path(weights).name == "backbone.pth" and Path(weights).is_relative_to(tmp_path / "cache")
    event = run.events()[0]
    assert run.finished and event["event"] == "weights" and event["report"]["source"] == weights
    stem = {key: x for key, x in state.items() if key.startswith(("stem.", "conv1."))}
    assert filled(dk.load(run), stem)  # which is frozen, so that it is what it was


def test_an_address_is_loaded_as_a_file_is(site: Site, tmp_path: Path, capsys) -> None:
    trained = fill(MICRO.build(80), seed=3)
    save_published(trained, tmp_path / "official.pth")
    site.files["/official.pth"] = (tmp_path / "official.pth").read_bytes()
    model = dk.load(MICRO, weights=site.url("/official.pth"))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), trained.parameters(), strict=True))
    assert capsys.readouterr().out.startswith(f"weights from {site.url('/official.pth')}\n")
    with pytest.raises(CheckpointError, match="answered 404 Not Found"):
        dk.load(MICRO, weights=site.url("/lost.pth"))
    with pytest.raises(CheckpointError, match="does not fit the detector"):
        dk.load("tiny", weights=site.url("/official.pth"))


def test_what_is_nowhere_published_is_said_with_what_is(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'coco' are known for deim_dfine_n. It has imagenet. 'coco' exists for "
    ):
        dk.load("deim_dfine_n", weights="coco")
    with pytest.raises(CheckpointError, match=r"for dfine_n. It has coco, imagenet. 'obj365' exists for dfine_s, .*by"):
        dk.load("dfine_n", weights="obj365")
    with pytest.raises(CheckpointError, match=r"known for tiny. 'imagenet' exists for dfine_n, .*deim_rtdetrv2_r101vd"):
        dk.load("tiny", weights="imagenet")
    monkeypatch.chdir(tmp_path)
    detector = fill(Detector(recipes.get("tiny").arch, 80))
    torch.save({"model": detector.state_dict()}, "coco")  # a file of that name is meant first
    assert dk.load("tiny", weights="coco").arch == detector.arch


# ------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", ["dfine_l", "deim_dfine_n", "rtdetrv2_r18vd", "rtdetrv2_r50vd"])
def test_files_of_the_published_layout_load(name: str, tmp_path: Path) -> None:
    arch = recipes.get(name).arch
    state = published(arch.backbone)
    torch.save(state, tmp_path / "stage1.pth")
    detector = Detector(arch, 3)
    report = load_weights(detector, tmp_path / "stage1.pth")
    assert filled(detector, state) and len(report.loaded) == len(state) and not report.skipped
    assert set(report.missing.values()) == {
        "ImageNet weights fill the backbone only",
        "batch norms were saved without their counters",
    }


@pytest.mark.parametrize("spec", backbones.FILES, ids=lambda spec: str(spec.blocks))
def test_a_file_is_as_long_as_its_backbone_needs(spec: HGNetV2 | ResNetVD) -> None:
    """Four bytes a number, and a few hundred bytes a tensor for its name and place."""
    file = backbones.FILES[spec]
    assert file.url.startswith("https://") and len(file.sha256 or "0" * 64) == 64
    with torch.device("meta"):
        tensors = [x for key, x in spec.build().state_dict().items() if not key.endswith(".num_batches_tracked")]
    numbers = sum(x.numel() for x in tensors)
    assert file.size is None or 300 * len(tensors) < file.size - 4 * numbers < 450 * len(tensors)
    if "ResNet18" in file.url:  # as counted in the published file by an independent project
        assert (len(tensors), numbers) == (115, 11_209_824)


@pytest.mark.parametrize(
    "name, file",
    [
        ("dfine_n", "PPHGNetV2_B0"),
        ("deim_dfine_s", "PPHGNetV2_B0"),
        ("dfine_m_crowdhuman", "PPHGNetV2_B2"),
        ("dfine_l", "PPHGNetV2_B4"),
        ("deim_dfine_x", "PPHGNetV2_B5"),
        ("deim_rtdetrv2_r18vd", "ResNet18_vd"),
        ("rtdetrv2_r34vd", "ResNet34_vd"),
        ("rtdetrv2_r50vd_m", "ResNet50_vd_ssld_v2"),
        ("rtdetrv2_r101vd", "ResNet101_vd_ssld"),
    ],
)
def test_each_recipe_has_the_weights_of_its_backbone(name: str, file: str) -> None:
    arch: Arch = recipes.get(name).arch
    found = backbones.imagenet(arch)
    assert found is not None and found.url.rpartition("/")[2].startswith(f"{file}_")


def test_every_source_is_of_a_recipe_and_unique() -> None:
    listed = sources.listed()
    assert all(source.recipe in recipes.names() and source.what in sources.NAMES for source in listed)
    assert len({(source.recipe, source.what) for source in listed}) == len(listed)
    repositories = [source.place for source in listed if isinstance(source.place, Repository)]
    assert len(set(repositories)) == len(repositories) == len(sources.DETECTORS)


def test_a_source_says_its_licence_and_what_is_claimed() -> None:
    assert str(sources.find(recipes.get("dfine_n"), "coco")) == (
        "dfine_n: weights 'coco' from huggingface.co/ustc-community/dfine-nano-coco "
        "(Apache-2.0; claimed AP 42.8 on COCO val2017, DEIM Table 11)"
    )
    assert str(sources.find(recipes.get("dfine_s"), "obj365")).endswith("(Apache-2.0)")  # no claim on COCO


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_line_lists_what_can_be_fetched(capsys) -> None:
    assert main(["weights", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "claimed AP" in printed[0] and "by hand" in printed[-2] and "address" in printed[-2]
    rows = json.loads(printed[-1])
    by_name = {(row["recipe"], row["weights"]): row for row in rows}
    assert len(rows) == len(printed) - 5 and by_name["dfine_x", "obj2coco"]["paper"]["ap"] == 59.3
    assert by_name["deim_dfine_n", "imagenet"]["from"].endswith("/PPHGNetV2_B0_stage1.pth")
    assert {row["licence"] for row in rows} == {"Apache-2.0"} and "paper" not in by_name["deim_dfine_n", "imagenet"]


def test_the_command_line_trains_from_imagenet(served, site: Site, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(recipes._ALL, "micro", served[0])
    quick = ["--epochs", "1", "--batch", "6", "--size", "64", "--device", "cpu", "--workers", "0"]
    command = ["train", "micro", "--data", scenes(tmp_path).source, "--out", str(tmp_path / "x"), *quick]
    assert main([*command, "--weights", "imagenet"]) == 0
    said = capsys.readouterr().out
    assert f"weights 'imagenet' from {site.url('/backbone.pth')} (Apache-2.0)" in said
    assert "missing, ImageNet weights fill the backbone only" in said
