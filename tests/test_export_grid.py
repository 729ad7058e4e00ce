"""Every published detector, exported in both ways at three sizes: ONNX Runtime says what torch says, at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deimkit import recipes
from deimkit.deploy.onnx_file import read_card, write_onnx
from deimkit.deploy.ort import OrtSession
from deimkit.deploy.parity import prove
from deimkit.models.detector import Detector
from tests.filling import fill

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

DFINE = [f"dfine_{size}" for size in "nsmlx"]
RTDETRV2 = [f"rtdetrv2_{backbone}" for backbone in ("r18vd", "r34vd", "r50vd_m", "r50vd", "r101vd")]
SIZES = [(320, 320), (640, 640), (480, 800)]
TRIED = [(name, size, opset) for name in (*DFINE, *RTDETRV2) for size in SIZES for opset in (17, 18)]
QUICK = {("dfine_n", (320, 320), 17)}  # the others take half a minute to some minutes each


@pytest.fixture(scope="module")
def filled() -> Iterator[dict[str, Detector]]:
    """The detector that was asked for last, with weights that leave no two queries alike."""
    yield {}


@pytest.mark.parametrize(
    ("name", "size", "opset"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in TRIED],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_onnx_runtime_says_what_torch_says(
    name: str, size: tuple[int, int], opset: int, tmp_path: Path, filled: dict[str, Detector]
) -> None:
    if name not in filled:
        filled.clear()
        detector = recipes.get(name).build()
        fill(detector)
        filled[name] = detector.eval()
    path = tmp_path / "model.onnx"
    card = write_onnx(filled[name], path, recipe=name, size=size, batch=None, opset=opset)
    assert (card.opset, card.exporter) == (opset, "torchscript" if opset == 17 else "dynamo") and read_card(
        path
    ) == card
    with OrtSession(path, threads=torch.get_num_threads()) as session:
        found = prove(filled[name], [session]).contenders[0]
    print(f"{name} {size[0]}x{size[1]} {card.exporter}: {found.every}")
    assert found.batches == (1, 2, 8) and found.every.matched == found.every.detections / 2 > 0
    assert found.every.box_max < 1e-3 and found.every.score_max < 1e-4 and not found.faults
