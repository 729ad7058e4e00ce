"""The detector and `transformers`' own D-FINE compute the same from the same weights, whoever wrote the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filling import fill
from safetensors.torch import load_file

from deimkit.errors import CheckpointError
from deimkit.models.detector import Detector
from deimkit.recipes.archs import dfine_arch, rtdetrv2_arch
from deimkit.weights import load_hf, save_hf

transformers = pytest.importorskip("transformers")

slow = pytest.mark.slow
SIZES = ["n", "s", "m", pytest.param("l", marks=slow), pytest.param("x", marks=slow)]
NAMES = ["red cell", "white cell", "platelet", "Person"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def images(height: int = 320, width: int = 320) -> torch.Tensor:
    return torch.rand(1, 3, height, width, dtype=torch.float64)


@torch.inference_mode()
def differences(detector: Detector, theirs: torch.nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Largest difference of logits and of boxes, in float64."""
    ours, theirs = detector.double().eval()(x), theirs.double().eval()(pixel_values=x)
    return (ours.logits - theirs.logits).abs().max().item(), (ours.boxes - theirs.pred_boxes).abs().max().item()


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_of_ours_predicts_the_same_in_transformers(size: str, tmp_path: Path) -> None:
    detector = fill(Detector(dfine_arch(size, "relu"), NAMES))
    save_hf(detector, tmp_path)
    theirs, info = transformers.DFineForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert max(differences(detector, theirs, images())) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_of_transformers_predicts_the_same_here(size: str, tmp_path: Path) -> None:
    save_hf(Detector(dfine_arch(size, "relu"), NAMES), tmp_path / "ours")
    config = transformers.DFineConfig.from_pretrained(tmp_path / "ours")
    config.freeze_backbone_batch_norms = size in "lx"  # as published for these two
    theirs = fill(transformers.DFineForObjectDetection(config))
    theirs.save_pretrained(tmp_path / "theirs")
    detector = load_hf(tmp_path / "theirs")
    assert detector.categories.names == tuple(NAMES)
    assert max(differences(detector, theirs, images())) < 1e-5


RESNETS = ["r18vd", pytest.param("r34vd", marks=slow), "r50vd", pytest.param("r101vd", marks=slow)]


@pytest.mark.parametrize("size", RESNETS)
def test_rtdetrv2_predicts_the_same_both_ways(size: str, tmp_path: Path) -> None:
    detector = fill(Detector(rtdetrv2_arch(size, "relu"), NAMES))
    save_hf(detector, tmp_path / "ours")
    theirs, info = transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert max(differences(detector, theirs, images(128, 128))) < 1e-5
    fill(theirs.float(), seed=1).save_pretrained(tmp_path / "theirs")
    again = load_hf(tmp_path / "theirs")
    assert again.arch.decoder == detector.arch.decoder and again.categories.names == tuple(NAMES)
    assert max(differences(again, theirs, images(128, 128))) < 1e-5


def test_discrete_sampling_is_that_of_transformers(tmp_path: Path) -> None:
    arch = rtdetrv2_arch("r18vd", "relu")
    detector = fill(Detector(replace(arch, decoder=replace(arch.decoder, discrete=True)), NAMES))
    save_hf(detector, tmp_path)
    theirs = transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path)
    assert theirs.config.decoder_method == "discrete" and load_hf(tmp_path).arch.decoder.discrete
    assert max(differences(detector, theirs, images(128, 128))) < 1e-5


@pytest.mark.parametrize("row_major", [True, False])
def test_only_position_codes_by_row_agree_on_non_square_images(row_major: bool, tmp_path: Path) -> None:
    arch = dfine_arch("n", "relu")
    detector = fill(Detector(replace(arch, encoder=replace(arch.encoder, row_major=row_major)), NAMES))
    save_hf(detector, tmp_path)
    theirs = transformers.DFineForObjectDetection.from_pretrained(tmp_path)
    assert (max(differences(detector, theirs, images(256, 416))) < 1e-5) is row_major
    assert load_hf(tmp_path).arch == detector.arch


def test_a_foreign_folder_is_read_with_position_codes_by_row(tmp_path: Path) -> None:
    save_hf(Detector(dfine_arch("n", "relu"), NAMES), tmp_path / "ours")
    config = transformers.DFineConfig.from_pretrained(tmp_path / "ours")
    del config.deimkit
    theirs = fill(transformers.DFineForObjectDetection(config))
    theirs.save_pretrained(tmp_path / "theirs")
    detector = load_hf(tmp_path / "theirs")
    assert detector.arch.encoder.row_major
    assert max(differences(detector, theirs, images(256, 416))) < 1e-5


def test_files_of_ours_hold_what_theirs_hold(tmp_path: Path) -> None:
    save_hf(Detector(dfine_arch("n", "relu"), NAMES), tmp_path / "ours")
    transformers.DFineForObjectDetection.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert theirs.keys() <= ours.keys()
    assert all(name.startswith(("class_embed.", "bbox_embed.")) for name in ours.keys() - theirs.keys())  # tied copies
    assert all(torch.equal(ours[name], x) and ours[name].dtype == x.dtype for name, x in theirs.items())


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    detector = fill(Detector(dfine_arch("n", "relu"), NAMES))
    save_hf(detector, tmp_path / "one")
    theirs = transformers.DFineForObjectDetection.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="4MB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again = load_hf(tmp_path / "many").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in detector.state_dict().items())
    next((tmp_path / "many").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="2-of"):
        load_hf(tmp_path / "many")


def test_deim_is_refused_because_transformers_would_predict_something_else(tmp_path: Path) -> None:
    detector = fill(Detector(dfine_arch("n", "silu"), NAMES))
    with pytest.raises(CheckpointError, match="allow_mismatch"):
        save_hf(detector, tmp_path)
    assert not list(tmp_path.iterdir())
    save_hf(detector, tmp_path, allow_mismatch=True)
    theirs = transformers.DFineForObjectDetection.from_pretrained(tmp_path)
    assert max(differences(detector, theirs, images())) > 1e-3
    assert load_hf(tmp_path).arch == detector.arch


def test_the_image_processor_prepares_images_as_deimkit_does(tmp_path: Path) -> None:
    detector = Detector(dfine_arch("n", "relu"), NAMES)
    detector.size = (256, 416)
    save_hf(detector, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(256, (256, 416, 3), dtype=torch.uint8)
    seen = processor(image.numpy(), return_tensors="pt")["pixel_values"]
    assert load_hf(tmp_path).size == (256, 416)
    assert torch.allclose(seen[0], image.permute(2, 0, 1) / 255, atol=1e-6)
