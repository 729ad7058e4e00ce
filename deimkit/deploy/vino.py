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

KEPT = 4  # batch sizes that a session stays compiled for; each takes as much memory as the first


class VinoSession(Session):
    """An ONNX file, or the .xml that `write_openvino` made of it, run by OpenVINO on the CPU.

    threads: of one run, by default what OpenVINO takes. A file for any number of images is compiled for each number
    that comes, as OpenVINO is surest with fixed shapes. Raises `DeployError`.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        openvino = needed("openvino")
        self.device, self._core = torch.device("cpu"), openvino.Core()
        self._model = _read(self._core, Path(path))
        self.card = read_card(path) if Path(path).suffix.lower() == ".onnx" else _card(self._model, Path(path))
        # it would compute in bfloat16 where the CPU can, and call that float32
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        kept = ", FP16 weights" if self.card.precision == "fp16" else ""  # computed in FP32, as asked for above
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}{kept} on CPU"
        self._requests: dict[int, Any] = {}  # by batch, the one used last at the end

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As `Session.run`."""
        self.expect(images, sizes)
        request = self._requests.pop(len(images), None) or self._compiled(len(images))
        self._requests[len(images)] = request
        if len(self._requests) > KEPT:
            del self._requests[next(iter(self._requests))]
        given = dict(zip(self.card.inputs, (images.contiguous(), sizes.contiguous()), strict=False))
        found = request.infer({name: x.numpy() for name, x in given.items()}, share_inputs=True)
        return {name: torch.from_numpy(found[name].copy()) for name in self.card.outputs}

    def _compiled(self, batch: int) -> Any:
        model = self._model.clone()
        shapes = {"images": [batch, 3, *self.card.size], "sizes": [batch, 2]}
        model.reshape({name: shapes[name] for name in self.card.inputs})
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()

    def close(self) -> None:
        """As `Session.close`."""
        self.closed = True
        self._requests, self._model, self._core = {}, None, None


def write_openvino(onnx: str | Path, path: str | Path) -> Card:
    """Write an exported ONNX file as OpenVINO's .xml, with its weights in a .bin beside it; the card travels along."""
    openvino, path = needed("openvino"), Path(path)
    card = read_card(onnx)
    model = _read(openvino.Core(), Path(onnx))
    model.set_rt_info(card.to_json(), KEY)
    with written_whole(path) as file, written_whole(path.with_suffix(".bin")) as weights:  # weights arrive first
        openvino.save_model(model, str(file), compress_to_fp16=False)
        file.with_suffix(".bin").replace(weights)
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
