"""Eight-bit integers for the convolutions of an exported detector, written into the ONNX file itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.data.split import Split
from deimkit.deploy.card import Card
from deimkit.deploy.onnx_file import needed, read_card, write_card, written_whole
from deimkit.deploy.parity import spread
from deimkit.errors import DeployError
from deimkit.models.predict import prepare

CALIBRATION = 64  # images whose activations say how large the numbers get


def write_int8(onnx: str | Path, path: str | Path, split: Split, images: int = CALIBRATION) -> Card:
    """Write an FP32 ONNX file anew with its convolutions in INT8, between nodes that quantise and dequantise.

    Every runtime reads such a file, TensorRT too, which wants zero points of zero, as here. split: where the images
    come from that are shown to the detector, to see how large its numbers get. Returns the card of the new file.
    Raises `DeployError` for a file that is not FP32.
    """
    card, path = read_card(onnx), Path(path)
    if card.precision != "fp32":
        raise DeployError(f"INT8 is made of an FP32 file; {str(onnx)!r} is {card.precision}. Export it in fp32.")
    model = needed("onnx")
    needed("onnxruntime")
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, written_whole(path) as file:
        ready = Path(folder) / "ready.onnx"
        quantization.quant_pre_process(str(onnx), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(ready),
            str(file),
            _Shown(card, spread(split, images)),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        written = model.load(str(file))
        card = replace(card, precision="int8")
        write_card(written, card)
        model.save(written, str(file))
    return card


class _Shown:
    """Images of a split as onnxruntime's calibration asks for them, one batch at a time."""

    def __init__(self, card: Card, split: Split) -> None:
        self._batches = self._inputs(card, split)

    def _inputs(self, card: Card, split: Split) -> Iterator[dict[str, Any]]:
        batch = card.batch or 1
        for start in range(0, len(split), batch):
            rows = [(start + i) % len(split) for i in range(batch)]
            shown = torch.stack([prepare(split.image(i), card.size) for i in rows]).float().div_(1 / card.scale)
            sizes: Tensor = torch.tensor([card.size] * batch)
            given = {"images": shown.numpy(), "sizes": sizes.numpy()}
            yield {name: given[name] for name in card.inputs}

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last; the name is onnxruntime's."""
        return next(self._batches, None)
