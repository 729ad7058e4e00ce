"""The same on a real GPU with a real TensorRT, where there is one: `pytest -m gpu tests/test_trt_gpu.py`."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from fake_tensorrt import write_mini

from deimkit.deploy.trt.build import build
from deimkit.deploy.trt.engine import TrtSession
from deimkit.deploy.trt.plan import Plan

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("tensorrt")


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("batches", [(1, 1, 1), (3, 3, 1, 3)], ids=["one size", "several"])
def test_a_real_engine_finds_what_onnx_runtime_finds(batches: tuple[int, ...], graph: bool, tmp_path: Path) -> None:
    card = write_mini(tmp_path / "m.onnx", batch=1 if set(batches) == {1} else None)
    runtime = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    built = build(tmp_path / "m.onnx", card, Plan(timing_cache=tmp_path / "timings"))
    with TrtSession(built.path, graph=graph) as session:
        for batch in batches:
            images, sizes = torch.rand(batch, 3, 8, 8), torch.randint(8, 99, (batch, 2))
            found = session.run(images.cuda(), sizes.cuda())
            expected = runtime.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
            for name, answer in zip(card.outputs, expected, strict=True):
                torch.testing.assert_close(found[name].cpu(), torch.from_numpy(answer), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_built_and_near(precision: str, tmp_path: Path) -> None:
    card = write_mini(tmp_path / "m.onnx", precision)
    runtime = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    built = build(tmp_path / "m.onnx", card, Plan(precision))
    images, sizes = torch.rand(1, 3, 8, 8), torch.full((1, 2), 8)
    with TrtSession(built.path) as session:
        found = session.run(images.cuda(), sizes.cuda())
    scores = runtime.run(["scores"], {"images": images.numpy(), "sizes": sizes.numpy()})[0]
    torch.testing.assert_close(found["scores"].cpu(), torch.from_numpy(scores), atol=0.02, rtol=0.02)
