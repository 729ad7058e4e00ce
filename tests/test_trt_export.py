"""`deimkit export --format tensorrt` from a detector to a report on the engine, in TensorRT's stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Machine
from filling import fill

from deimkit.deploy.card import Card
from deimkit.deploy.export import export_detector, parity_file
from deimkit.deploy.onnx_file import read_card, write_onnx
from deimkit.deploy.trt.cuda import Cuda
from deimkit.deploy.trt.library import tensorrt
from deimkit.deploy.trt.precision import written
from deimkit.errors import DeployError
from deimkit.models.detector import Detector
from tests.micro import ARCH

# TensorRT, what was asked for -> what torch writes into the ONNX file, and how the engine came to its precision
WAYS = {
    ("8.6.0", "fp16"): ("fp32", "FP16 flag, "),
    ("10.3.0", "fp16"): ("fp32", "FP16 flag, "),
    ("11.4.0", "fp16"): ("fp16", "typed ONNX (FP16)"),
    ("10.3.0", "fp32"): ("fp32", "FP32"),
    ("11.4.0", "fp32"): ("fp32", "FP32"),
}


@pytest.mark.parametrize(("asked", "way"), WAYS.items(), ids=lambda value: "-".join(value))
def test_an_engine_is_built_kept_and_held_against_torch(
    asked: tuple[str, str], way: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(ARCH, 3)
    fill(detector)
    detector.size = (64, 64)
    write_onnx(detector.eval(), tmp_path / "ready.onnx", precision=way[0])

    def wrote(
        _: Detector, path: Path, precision: str, **how: Any
    ) -> Card:  # torch exports nothing on a GPU that is not
        assert precision == way[0]
        return read_card(shutil.copy(tmp_path / "ready.onnx", path))

    monkeypatch.setattr("deimkit.deploy.export.write_onnx", wrote)
    machine = Machine()
    machine.install(monkeypatch, asked[0])
    assert written(tensorrt(), asked[1]) == way[0]
    for room in ("build", "engine"):  # the stand-in's GPU has its memory on the CPU
        monkeypatch.setattr(f"deimkit.deploy.trt.{room}.Cuda", lambda device: Cuda("cpu"))
    with pytest.raises(DeployError, match="TensorRT is used on cuda here; got device='cpu'"):
        export_detector(detector, tmp_path / "m.engine", "tensorrt", asked[1], device="cpu")
    done = export_detector(detector, tmp_path / "m.engine", "tensorrt", asked[1])
    assert not machine.violations
    kept = done.path.with_suffix(".onnx")
    assert read_card(kept).precision == way[0], "the file to build it from anew, on another GPU"
    assert {path.name for path in tmp_path.iterdir()} == {
        "ready.onnx",
        *(done.path.name + end for end in ("", ".json", ".parity.json")),
        kept.name,
    }
    assert done.card.precision == asked[1] and done.made.startswith(way[1]) and done.made in str(done)
    assert done.path.parent == tmp_path and done.path.name.startswith("m_tesla-t4_")
    assert parity_file(done.path).is_file() and done.parity.verdict == "compared"
    assert done.parity.contenders[0].runtime.startswith(f"TensorRT {asked[0]}")
