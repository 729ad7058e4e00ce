"""OpenVINO, on Intel's and other CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.deploy.card import Card
from deimkit.deploy.onnx_file import KEY, needed, read_card, written_whole
from deimkit.deploy.session import Session
from deimkit.errors import DeployError


class VinoSession(Session):
    """An ONNX file, or the .xml that `write_openvino` made of it, run by OpenVINO on the CPU.

    threads: of one run, by default what OpenVINO takes. A file for any number of images is compiled for each number
    that comes, as OpenVINO is surest with fixed shapes. Raises `DeployError`.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        openvino = needed("openvino")
        self.device, self._core = torch.device("cpu"), openvino.Core()
        self._model = _read(self._core, Path(path))
        self.card = read_card(path) if Path(path).suffix == ".onnx" else _card(self._model, Path(path))
        # it would compute in bfloat16 where the CPU can, and call that float32
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]} on CPU"
        self._requests: dict[int, Any] = {}

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As `Session.run`."""
        self.expect(images)
        if len(images) not in self._requests:
            self._requests[len(images)] = self._compiled(len(images))
        given = dict(zip(self.card.inputs, (images.contiguous(), sizes.contiguous()), strict=False))
        found = self._requests[len(images)].infer({name: x.numpy() for name, x in given.items()}, share_inputs=True)
        return {name: torch.from_numpy(found[name].copy()) for name in self.card.outputs}

    def _compiled(self, batch: int) -> Any:
        model = self._model.clone()
        shapes = {"images": [batch, 3, *self.card.size], "sizes": [batch, 2]}
        model.reshape({name: shapes[name] for name in self.card.inputs})
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()

    def close(self) -> None:
        """As `Session.close`."""
        self._requests, self._model, self._core = {}, None, None


def write_openvino(onnx: str | Path, path: str | Path) -> Card:
    """Write an exported ONNX file as OpenVINO's .xml, with its weights in a .bin beside it; the card travels along."""
    openvino, path = needed("openvino"), Path(path)
    card = read_card(onnx)
    model = _read(openvino.Core(), Path(onnx))
    model.set_rt_info(card.to_json(), KEY)
    with written_whole(path.with_suffix(".bin")) as weights:
        openvino.save_model(model, str(weights.with_suffix(".xml")), compress_to_fp16=False)
        weights.with_suffix(".xml").replace(path)
    return card


def _read(core: Any, path: Path) -> Any:
    if not path.is_file():
        raise DeployError(f"No model at {str(path)!r}; `deimkit export --format openvino` writes one.")
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        raise DeployError(f"OpenVINO does not read {str(path)!r}: {str(error).strip().splitlines()[-1]}") from error


def _card(model: Any, path: Path) -> Card:
    if not model.has_rt_info([KEY]):
        raise DeployError(f"{str(path)!r} was not written by `deimkit export`: it does not say its classes.")
    return Card.from_json(str(model.get_rt_info([KEY]).value))
