"""Weights: names in both directions, every kind of file, every kind of misfit, and nothing half loaded."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filling import fill
from safetensors.torch import load_file, save_file
from torch import Tensor

from deimkit.data.dataset import CategoryMap
from deimkit.errors import CheckpointError
from deimkit.models.detector import Detector
from deimkit.models.refine import LookForwardTwice
from deimkit.recipes.archs import RTDETRS, dfine_arch, hgnetv2, rtdetrv2_arch
from deimkit.weights import (
    COCO_IDS,
    COCO_NAMES,
    State,
    default_categories,
    detect_arch,
    load_hf,
    load_weights,
    published_state,
    read,
    save_hf,
    save_published,
)
from deimkit.weights.classes import ALIASES, OBJECTS365_OF_COCO, class_rows
from deimkit.weights.config import categories_of, to_config
from deimkit.weights.names import COMPUTED, PACKED, PUBLISHED_COPIES, from_hf, hf_names, layout_of, to_hf

SIZES = ("n", "s", "m", "l", "x")
KEY_MAPS = [f"dfine_{size}_{variant}" for size in SIZES for variant in ("base", "deim")]
KEY_MAPS += [
    f"rtdetrv2_{size}_{variant}" for size in ("r18vd", "r34vd", "r50vd", "r101vd") for variant in ("base", "deim")
]
KEY_MAPS += ["rtdetrv2_r50vd_m_deim"]
EMBEDDING = "decoder.denoising_class_embed.weight"
SCORE = "decoder.dec_score_head.0.weight"


def golden(shared: Path, path: str) -> dict:
    return json.loads((shared / "golden" / path).read_text())


def detector(categories: int | list[str] = 80, size: str = "tiny", seed: int = 0) -> Detector:
    return fill(Detector(dfine_arch(size), categories), seed)


def same(a: Detector, b: Detector) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def trained() -> Detector:
    """A detector of COCO's 80 classes, as a published file has it: tiny, so that the tests are quick."""
    return detector(seed=1)


@pytest.fixture
def pth(trained: Detector, tmp_path: Path) -> Path:
    save_published(trained, tmp_path / "published.pth")
    return tmp_path / "published.pth"


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("model", KEY_MAPS)
def test_names_are_those_of_the_key_map(shared: Path, model: str) -> None:
    expected: dict[str, list[str]] = {}
    for published, theirs, _ in golden(shared, f"hf_keymap_{model}.json")["pairs"]:
        expected.setdefault(published, []).extend([theirs] if theirs else [])
    layout = layout_of(expected)
    assert {key: list(hf_names(key, layout)) for key in expected} == expected


@pytest.mark.parametrize("model", KEY_MAPS)
def test_names_come_back_bit_exactly(shared: Path, model: str) -> None:
    pairs = golden(shared, f"hf_keymap_{model}.json")["pairs"]
    state = {key: torch.randn(6 if PACKED.fullmatch(key) else 2, 3) for key, _, _ in pairs}
    state |= {copy: state[key] for copy, key in PUBLISHED_COPIES if key in state}
    in_file, layout = to_hf(state), layout_of(state)
    in_model = {
        name: x for key in state for name, x in zip(hf_names(key, layout), parts(key, state[key]), strict=False)
    }
    for renamed in (in_file, in_model):
        back = from_hf(renamed)
        assert back.keys() == state.keys() - set(COMPUTED)
        assert all(torch.equal(back[key], state[key]) for key in back)
        again = to_hf(back)
        assert again.keys() == in_file.keys() and all(torch.equal(again[name], in_file[name]) for name in again)


def parts(key: str, tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(3) if PACKED.fullmatch(key) else (tensor, tensor)


def test_names_are_unique_within_a_file(shared: Path) -> None:
    state = {key: torch.zeros(3) for key, *_ in golden(shared, "keys/dfine_x.json")["keys"]}
    packed = sum(PACKED.fullmatch(key) is not None for key in state)
    heads = sum(len(hf_names(key)) == 2 for key in state)
    assert len(to_hf(state)) == len(state) - len(COMPUTED) - len(PUBLISHED_COPIES) + 2 * packed + heads


def test_heads_without_their_tied_copies_and_copies_alone_are_read(trained: Detector) -> None:
    state = to_hf(published_state(trained))
    copies = {name for name in state if name.startswith(("class_embed.", "bbox_embed."))}
    originals = {f"model.decoder.{name}" for name in copies}
    whole = from_hf(state)
    for left_out in (copies, originals):
        some = from_hf({name: x for name, x in state.items() if name not in left_out})
        assert some.keys() == whole.keys() and all(torch.equal(some[key], whole[key]) for key in whole)


def test_a_name_that_is_not_of_dfine_is_refused_one_way_and_kept_the_other() -> None:
    with pytest.raises(CheckpointError, match="decoder.dn_tokens"):
        hf_names("decoder.dn_tokens")
    assert list(from_hf({"model.decoder.dn_tokens.q_proj": torch.zeros(1)})) == ["model.decoder.dn_tokens.q_proj"]


# ------------------------------------------------------------------ published files


@pytest.mark.parametrize("size", SIZES)
def test_published_state_has_the_published_names_shapes_and_types(shared: Path, size: str) -> None:
    state = published_state(Detector(dfine_arch(size), 80))
    expected = {name: (shape, dtype) for name, shape, dtype, _ in golden(shared, f"keys/dfine_{size}.json")["keys"]}
    assert {name: (list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in state.items()} == expected


def test_published_anchors_are_for_the_size_asked_for() -> None:
    state = published_state(Detector(dfine_arch("n"), 80), size=(256, 416))
    assert state["decoder.anchors"].shape == (1, 16 * 26 + 8 * 13, 4)
    assert torch.equal(state["decoder.reg_scale"], torch.tensor([4])) and state["decoder.up"].item() == 0.5
    share = state["decoder.decoder.layers.0.cross_attn.num_points_scale"]
    assert torch.allclose(share, torch.full((12,), 1 / 6))


def test_a_published_file_comes_back_as_it_was(trained: Detector, pth: Path) -> None:
    fresh = detector()
    report = load_weights(fresh, pth)
    assert same(fresh, trained)
    assert not (report.missing or report.mapped or report.reshaped or report.classes)
    assert set(report.skipped.values()) == {"computed, not learned"}
    assert {"decoder.anchors", "decoder.valid_mask", "decoder.up", "decoder.decoder.reg_scale"} <= set(report.skipped)
    assert len(report.loaded) == len(trained.state_dict())


def test_saving_twice_replaces_the_file_and_leaves_no_other(trained: Detector, pth: Path) -> None:
    save_published(trained, pth)
    assert [path.name for path in pth.parent.iterdir()] == [pth.name]
    assert list(torch.load(pth, weights_only=True)) == ["model"]


def wrapped(state: dict[str, Tensor], how: str) -> object:
    other = {key: x + 1 if x.is_floating_point() else x for key, x in state.items()}
    return {
        "model": {"model": state, "epoch": 3, "optimizer": {"state": {}}},
        "ema": {"model": other, "ema": {"module": state, "updates": 9}, "date": "2026-01-01"},
        "own": {"model": other, "ema": {"shadow": state, "updates": 9}},
        "bare": state,
        "ddp": {"model": {f"module.{key}": x for key, x in state.items()}},
        "compiled": {f"_orig_mod.{key}": x for key, x in state.items()},
        "both": {"model": {f"module._orig_mod.{key}": x for key, x in state.items()}},
        "both, other order": {"model": {f"_orig_mod.module.{key}": x for key, x in state.items()}},
        "compiled part": {key.replace("encoder.", "encoder._orig_mod.", 1): x for key, x in state.items()},
    }[how]


@pytest.mark.parametrize(
    "how", ["model", "ema", "own", "bare", "ddp", "compiled", "both", "both, other order", "compiled part"]
)
def test_wrappings_are_taken_off(how: str, trained: Detector, tmp_path: Path) -> None:
    torch.save(wrapped(published_state(trained), how), tmp_path / "w.pth")
    fresh = detector()
    assert load_weights(fresh, tmp_path / "w.pth").averaged is (how in ("ema", "own"))
    assert same(fresh, trained)


def test_safetensors_under_either_names(trained: Detector, tmp_path: Path) -> None:
    state = published_state(trained)
    theirs = {name: x.clone() for name, x in to_hf(state).items()}
    for name, tensors in (("published", state), ("transformers", theirs)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        fresh = detector()
        assert bool(load_weights(fresh, tmp_path / f"{name}.safetensors").reshaped) is (name == "transformers")
        assert same(fresh, trained)


def test_a_checkpoint_of_ours_brings_its_classes(tmp_path: Path) -> None:
    names = ["cat", "dog", "unicorn"]
    ours = detector(names, seed=3)
    categories = CategoryMap.of(names)
    torch.save(
        {"format": 1, "model": {}, "ema": {"shadow": ours.state_dict()}, "categories": categories.to_dict()},
        tmp_path / "own.pt",
    )
    assert default_categories(tmp_path / "own.pt") == categories
    fresh = detector(["unicorn", "cat"])
    report = load_weights(fresh, tmp_path / "own.pt")
    assert report.classes == (("unicorn", 2), ("cat", 0))
    assert torch.equal(published_state(fresh)[SCORE], published_state(ours)[SCORE][[2, 0]])


def test_imagenet_weights_fill_the_backbone_only(tmp_path: Path) -> None:
    source = fill(hgnetv2("tiny").build(), seed=5)
    torch.save(source.state_dict(), tmp_path / "PPHGNetV2_B9_stage1.pth")
    fresh, before = detector(3), detector(3)
    report = load_weights(fresh, tmp_path / "PPHGNetV2_B9_stage1.pth")
    assert all(torch.equal(fresh.backbone.state_dict()[key], x) for key, x in source.state_dict().items())
    rest = [key for key in before.state_dict() if not key.startswith("backbone.")]
    assert all(torch.equal(fresh.state_dict()[key], before.state_dict()[key]) for key in rest)
    assert set(report.missing.values()) == {"ImageNet weights fill the backbone only"} and len(report.missing) == len(
        rest
    )


def test_a_file_with_frozen_batch_norms_loads(trained: Detector, tmp_path: Path) -> None:
    state = published_state(trained)
    torch.save(
        {k: x for k, x in state.items() if not (k.startswith("backbone.") and k.endswith("num_batches_tracked"))},
        tmp_path / "l.pth",
    )
    fresh = detector()
    report = load_weights(fresh, tmp_path / "l.pth")
    assert set(report.missing.values()) == {"batch norms were saved without their counters"}
    assert torch.equal(fresh.backbone.stem.stem1.bn.running_var, trained.backbone.stem.stem1.bn.running_var)


def test_anchors_of_another_input_size_do_not_clash(trained: Detector, tmp_path: Path) -> None:
    save_published(trained, tmp_path / "wide.pth", size=(320, 1280))
    fresh = detector()
    load_weights(fresh, tmp_path / "wide.pth")
    assert same(fresh, trained)


# ------------------------------------------------------------------ what is refused, leaving the detector as it was


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder.reg_scale", torch.tensor([8])),
        ("decoder.decoder.up", torch.tensor([0.25])),
        ("decoder.decoder.layers.1.cross_attn.num_points_scale", torch.full((12,), 0.25)),
        ("decoder.decoder.layers.1.cross_attn.num_points_scale", torch.full((10,), 0.25)),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_constants_that_contradict_the_architecture(
    key: str, value: Tensor, strict: bool, trained: Detector, tmp_path: Path
) -> None:
    torch.save(published_state(trained) | {key: value}, tmp_path / "other.pth")
    fresh = detector()
    with pytest.raises(CheckpointError, match=key):
        load_weights(fresh, tmp_path / "other.pth", strict=strict)
    assert same(fresh, detector())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {k: x for k, x in state.items() if k != "encoder.pan_blocks.0.cv1.conv.weight"},
        lambda state: state | {"encoder.pan_blocks.0.cv1.conv.weight": torch.zeros(2, 2, 1, 1)},
        lambda state: state | {"encoder.surprise": torch.zeros(1)},
        lambda state: state | {SCORE: state[SCORE][:60]},
    ],
    ids=["missing", "shape", "unexpected", "one head differs"],
)
def test_misfits_are_an_error_unless_not_strict(change, trained: Detector, tmp_path: Path) -> None:
    torch.save(change(published_state(trained)), tmp_path / "odd.pth")
    fresh = detector()
    with pytest.raises(CheckpointError, match="1 of its tensors or settings differ") as error:
        load_weights(fresh, tmp_path / "odd.pth")
    assert "strict=False" in str(error.value) and "size tiny" in str(error.value)
    assert same(fresh, detector())
    report = load_weights(fresh, tmp_path / "odd.pth", strict=False)
    assert len(report.missing) + len([r for r in report.skipped.values() if r != "computed, not learned"]) == 1
    assert torch.equal(fresh.backbone.stem.stem1.conv.weight, trained.backbone.stem.stem1.conv.weight)


def test_weights_of_another_size_name_their_size(tmp_path: Path) -> None:
    save_published(Detector(dfine_arch("n"), 80), tmp_path / "n.pth")
    fresh = detector()
    with pytest.raises(CheckpointError, match="size n"):
        load_weights(fresh, tmp_path / "n.pth")
    assert same(fresh, detector())


def test_nothing_in_common_is_an_error_even_if_not_strict(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(detector(), tmp_path / "resnet.pth", strict=False)


class Trap:
    """What a hostile file holds: unpickling it would call os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(modern: bool, trained: Detector, tmp_path: Path) -> None:
    file, trap = tmp_path / "evil.pth", tmp_path / "sprung"
    torch.save({"model": published_state(trained), "x": Trap(trap)}, file, _use_new_zipfile_serialization=modern)
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused.*mkdir.*state dict"):
        read(file)
    assert not trap.exists()


def write_html(path: Path) -> None:
    path.write_text("<html>404</html>")


def write_half(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_half_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("absent.pth", lambda path: None, "nothing is there"),
        ("page.pth", write_html, "not a weight file"),
        ("empty.pth", Path.touch, "damaged"),
        ("half.pth", write_half, "damaged"),
        ("half.safetensors", write_half_safetensors, "damaged"),
        ("page.safetensors", write_html, "damaged"),
        ("options.pth", lambda path: torch.save({"args": argparse.Namespace(lr=1)}, path), "argparse.Namespace"),
        ("module.pth", lambda path: torch.save(torch.nn.Linear(1, 1), path), "Linear"),
        ("plain.pth", lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "plain.pth"),
        ("numbers.pth", lambda path: torch.save({"epoch": 1, "loss": 2.0}, path), "epoch, loss"),
        ("nothing.pth", lambda path: torch.save({}, path), "nothing"),
        ("list.pth", lambda path: torch.save([torch.zeros(1)], path), "list"),
    ],
)
def test_files_that_are_no_weights_say_so(name: str, write, words: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=words) as error:
        read(tmp_path / name)
    assert name in str(error.value)


def config_with(**changes: object) -> dict:
    return to_config(dfine_arch("n", "relu"), CategoryMap.of(2)) | changes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "config.json"),
        ("{", "config.json"),
        (json.dumps({"model_type": "detr"}), "'detr'"),
        (json.dumps(config_with()), "model.safetensors"),
    ],
)
def test_folders_that_are_no_dfine_say_so(config: str | None, words: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path)


# ------------------------------------------------------------------ classes


def test_coco_has_80_classes_with_gaps_in_their_ids_and_its_own_objects365_rows() -> None:
    assert len(set(COCO_NAMES)) == len(set(COCO_IDS)) == len(set(OBJECTS365_OF_COCO)) == 80
    assert (COCO_IDS[0], COCO_IDS[11], COCO_IDS[-1]) == (1, 13, 90)
    assert set(ALIASES.values()) <= set(COCO_NAMES)
    o365 = dict(zip(COCO_NAMES, OBJECTS365_OF_COCO, strict=True))
    assert (o365["person"], o365["car"], o365["cat"], o365["toothbrush"]) == (0, 5, 139, 226)


@pytest.mark.parametrize(
    ("rows", "names", "ours", "expected"),
    [
        (80, None, ["zebra", "Person"], (22, 0)),
        (80, None, ["zebra", "unicorn"], (22, None)),
        (80, None, list(COCO_NAMES), tuple(range(80))),
        (80, None, list(reversed(COCO_NAMES)), tuple(reversed(range(80)))),
        (80, None, [f"part {i}" for i in range(80)], tuple(range(80))),
        (80, None, 80, tuple(range(80))),
        (80, None, 3, None),
        (80, None, ["RBC", "WBC"], None),
        (366, None, ["person", "car", "cell"], (1, 6, None)),
        (365, None, ["person", "car", "cell"], (0, 5, None)),
        (366, None, list(COCO_NAMES), tuple(row + 1 for row in OBJECTS365_OF_COCO)),
        (366, None, 365, tuple(range(1, 366))),
        (365, None, 366, (None, *range(365))),
        (366, None, 366, tuple(range(366))),
        (5, None, 4, None),
        (5, None, ["person"], None),
        (3, ["Wild  Bird", "Luggage", "dog"], ["suitcase", "bird"], (1, 0)),
        (2, ["bird", "dog"], ["wild bird"], (0,)),
        (2, ["wild bird", "bird"], ["bird", "wild bird"], (1, 0)),
        (2, ["a", "b"], ["b", "a"], (1, 0)),
        (2, ["a", "b"], ["c", "d"], None),
        (2, ["a", "b"], 2, (0, 1)),
        (3, ["class 0", "class 1", "class 2"], 5, None),
        (3, ["class 0", "class 1", "class 2"], ["a", "b", "c"], (0, 1, 2)),
    ],
)
def test_rows_go_to_the_class_of_the_same_name(
    rows: int, names: list[str] | None, ours: int | list[str], expected: tuple | None
) -> None:
    assert class_rows(rows, names, CategoryMap.of(ours)) == expected


def test_names_must_be_as_many_as_rows() -> None:
    with pytest.raises(CheckpointError, match="2 classes; got 1"):
        class_rows(2, ["a"], CategoryMap.of(["a"]))


def test_other_classes_are_an_error_unless_the_head_is_replaced(pth: Path, trained: Detector) -> None:
    fresh = detector(["RBC", "WBC", "Platelets"], seed=2)
    with pytest.raises(CheckpointError, match=r"80 classes.*3 \(RBC, WBC, Platelets\).*replace_head=True"):
        load_weights(fresh, pth)
    assert same(fresh, detector(["RBC", "WBC", "Platelets"], seed=2))

    before = published_state(fresh)
    report = load_weights(fresh, pth, replace_head=True)
    after, file = published_state(fresh), published_state(trained)
    heads = [key for key in before if before[key].shape != file[key].shape]
    assert len(heads) == 2 + 2 * 3 + 1 and set(report.mapped) == set(heads)
    assert all(torch.equal(after[key], before[key]) for key in heads)
    assert all(torch.equal(after[key], file[key]) for key in file if key not in heads)
    assert "3 of 3 classes start fresh" in str(report) and set(report.mapped.values()) == {"starts fresh"}


def test_known_classes_keep_their_rows_everywhere_and_others_start_fresh(pth: Path, trained: Detector) -> None:
    fresh = detector(["zebra", "unicorn", "person"], seed=2)
    before = published_state(fresh)
    report = load_weights(fresh, pth)
    after, file = published_state(fresh), published_state(trained)
    heads = [
        f"decoder.{head}.{leaf}"
        for head in ("enc_score_head", *(f"dec_score_head.{i}" for i in range(3)))
        for leaf in ("weight", "bias")
    ]
    assert set(report.mapped) == {*heads, EMBEDDING}
    assert report.classes == (("zebra", 22), ("unicorn", None), ("person", 0))
    for key in (*heads, EMBEDDING):
        assert torch.equal(after[key][[0, 2]], file[key][[22, 0]])
        assert torch.equal(after[key][1], before[key][1])
    assert torch.equal(after[EMBEDDING][3], before[EMBEDDING][3])  # the padding row


@pytest.mark.parametrize("rows", [365, 366])
def test_objects365_weights_start_coco(rows: int, tmp_path: Path) -> None:
    source = detector(rows, seed=4)
    save_published(source, tmp_path / "o365.pth")
    fresh = detector(list(COCO_NAMES))
    load_weights(fresh, tmp_path / "o365.pth")
    theirs = [row + rows - 365 for row in OBJECTS365_OF_COCO]
    assert torch.equal(published_state(fresh)[SCORE], published_state(source)[SCORE][theirs])
    assert torch.equal(published_state(fresh)[EMBEDDING][:80], published_state(source)[EMBEDDING][theirs])


def test_the_callers_names_for_the_file_are_believed(tmp_path: Path) -> None:
    source = detector(80, seed=4)
    save_published(source, tmp_path / "mine.pth")
    names = CategoryMap.of([f"part {i}" for i in range(80)])
    fresh = detector(["part 7", "person"])
    report = load_weights(fresh, tmp_path / "mine.pth", classes=names)
    assert report.classes == (("part 7", 7), ("person", None))


def test_default_categories(pth: Path, tmp_path: Path) -> None:
    coco = default_categories(pth)
    folder = to_config(dfine_arch("n"), CategoryMap(ids=("x", 7), names=("a", "b")))
    assert categories_of(folder) == CategoryMap(ids=("x", 7), names=("a", "b"))
    assert categories_of(folder | {"id2label": {"0": "a", "1": "c"}}) == CategoryMap.of(["a", "c"])
    assert categories_of({"id2label": dict(enumerate(COCO_NAMES))}) == coco
    assert categories_of({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert coco.names == COCO_NAMES and coco.ids == COCO_IDS
    save_published(detector(5), tmp_path / "five.pth")
    assert default_categories(tmp_path / "five.pth") == CategoryMap.of(5)
    torch.save(hgnetv2("tiny").build().state_dict(), tmp_path / "stage1.pth")
    with pytest.raises(CheckpointError, match="categories="):
        default_categories(tmp_path / "stage1.pth")


# ------------------------------------------------------------------ the report


def test_the_report_reads_and_serialises(pth: Path) -> None:
    report = load_weights(detector(["zebra", "unicorn"]), pth)
    text, values = str(report), json.loads(json.dumps(report.to_dict()))
    assert "published.pth" in text and "rows copied by class" in text and "1 of 2 classes start fresh: unicorn" in text
    assert values["classes"] == [["zebra", 22], ["unicorn", None]]
    assert set(values) == {"source", "averaged", "loaded", "reshaped", "mapped", "skipped", "missing", "classes"}
    accounted = len(values["loaded"]) + len(values["mapped"]) + len(values["reshaped"]) + len(values["skipped"])
    assert accounted == len(read(pth).tensors)


# ------------------------------------------------------------------ Hugging Face folders and architectures


@pytest.mark.parametrize("size", SIZES)
def test_the_config_says_what_the_published_one_says(shared: Path, size: str) -> None:
    expected = golden(shared, f"hf_keymap_dfine_{size}_base.json")["summary"]["hf_config"]
    ours = to_config(dfine_arch(size, "relu"), CategoryMap.of(80))
    net = ours.pop("backbone_config")
    assert net == {key: expected["backbone_config"][key] for key in net}
    own = {"architectures", "deimkit", "dtype", "id2label", "label2id", "freeze_backbone_batch_norms"}
    rounded = {"hidden_expansion": 0.02, "depth_mult": 0.2}
    for key in ours.keys() - own - rounded.keys():
        assert ours[key] == expected[key], key
    assert all(abs(ours[key] - expected[key]) < error for key, error in rounded.items())
    arch = detect_arch(expected)
    assert arch.encoder.row_major and arch.activation == "relu"
    assert to_config(arch, CategoryMap.of(80)) | {"deimkit": 0} == ours | {"backbone_config": net, "deimkit": 0}


@pytest.mark.parametrize("size", ["r18vd", "r34vd", "r50vd", "r101vd"])
def test_the_config_of_rtdetrv2_says_what_the_published_one_says(shared: Path, size: str) -> None:
    expected = golden(shared, f"hf_keymap_rtdetrv2_{size}_base.json")["summary"]["hf_config"]
    ours = to_config(rtdetrv2_arch(size, "relu"), CategoryMap.of(80))
    net = ours.pop("backbone_config")
    assert net == {key: expected["backbone_config"][key] for key in net}
    own = {"architectures", "deimkit", "dtype", "id2label", "label2id", "freeze_backbone_batch_norms"}
    assert {key: ours[key] for key in ours.keys() - own} == {key: expected[key] for key in ours.keys() - own}
    built = detect_arch(expected)
    assert built.encoder.row_major and built.decoder == rtdetrv2_arch(size, "relu").decoder


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", RTDETRS)
def test_rtdetrv2_survives_its_config_and_shows_its_recipe(shared: Path, size: str, activation: str) -> None:
    arch = rtdetrv2_arch(size, activation)
    assert detect_arch(json.loads(json.dumps(to_config(arch, CategoryMap.of(3))))) == arch
    shapes = {k: torch.zeros(()).expand(x.shape) for k, x in published_state(Detector(arch, 3)).items()}
    assert detect_arch(State("published.pth", shapes)) == arch


def test_a_mixture_that_transformers_has_no_class_for_is_refused(tmp_path: Path) -> None:
    arch = replace(dfine_arch("tiny", "relu"), refine=LookForwardTwice())
    with pytest.raises(CheckpointError, match="no class for this mixture"):
        save_hf(Detector(arch, 2), tmp_path, allow_mismatch=True)
    many = rtdetrv2_arch("r18vd", "relu")
    many = replace(many, decoder=replace(many.decoder, points=(3, 6, 3)))
    with pytest.raises(CheckpointError, match="as many points on every level"):
        to_config(many, CategoryMap.of(2))
    with pytest.raises(CheckpointError, match="all 6 decoder layers, not only the first 3"):
        save_hf(Detector(rtdetrv2_arch("r50vd_m", "relu"), 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [*SIZES, "tiny"])
def test_an_architecture_survives_its_config(size: str, activation: str) -> None:
    arch = dfine_arch(size, activation)
    assert detect_arch(json.loads(json.dumps(to_config(arch, CategoryMap.of(3))))) == arch


def test_a_config_may_leave_out_what_transformers_has_by_default() -> None:
    assert detect_arch({"model_type": "d_fine"}).backbone == dfine_arch("l").backbone
    assert detect_arch({"decoder_n_points": 4}).decoder.points == (4, 4, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_activation_function": "silu"},
        {"deimkit": None, "decoder_activation_function": "silu"},
        {"encoder_layers": 2},
        {"layer_scale": 1.5},
        {"decoder_method": "discrete"},
        {"backbone_config": {"hidden_act": "gelu"}},
        {"backbone_config": {"stem_channels": []}},
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict) -> None:
    with pytest.raises(CheckpointError):
        detect_arch(config_with(**changes))


@pytest.mark.parametrize("size", SIZES)
def test_a_published_file_tells_its_size_but_not_its_activation(shared: Path, size: str) -> None:
    keys = golden(shared, f"keys/dfine_{size}.json")["keys"]
    state = State("published.pth", {name: torch.zeros(()).expand(shape) for name, shape, *_ in keys})
    assert detect_arch(state, "relu") == dfine_arch(size, "relu")
    with pytest.raises(CheckpointError, match=f"deim_dfine_{size}"):
        detect_arch(state)


def test_a_file_of_no_known_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no D-FINE"):
        detect_arch(State("nothing.pth", {}), "relu")


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    ours = fill(Detector(dfine_arch("tiny", "relu"), ["a", "b"]))
    save_hf(ours, tmp_path)
    again = load_hf(tmp_path)
    assert same(again, ours) and again.arch == ours.arch and again.categories.names == ("a", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]

    fresh = fill(Detector(ours.arch, ["b", "c"]))
    assert load_weights(fresh, tmp_path).classes == (("b", 1), ("c", None))

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same(load_hf(tmp_path), ours)


def test_a_folder_for_relu_does_not_silently_fill_a_silu_detector(tmp_path: Path) -> None:
    save_hf(fill(Detector(dfine_arch("tiny", "relu"), 2)), tmp_path)
    with pytest.raises(CheckpointError, match="'relu' in the config, 'silu' in the detector"):
        load_weights(detector(2), tmp_path)
    assert "decoder_activation_function" in load_weights(detector(2), tmp_path, strict=False).skipped
