"""ONNX Runtime, on CPUs and on CUDA GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.deploy.eager import described
from deimkit.deploy.onnx_file import needed, read_card
from deimkit.deploy.session import Session, as_device
from deimkit.errors import DeployError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
KINDS = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64, "logits": torch.float32}


class OrtSession(Session):
    """An ONNX file that `deimkit export` wrote, run by ONNX Runtime.

    device: "cpu", "cuda" or "cuda:1"; on a GPU nothing is copied from or to the host. threads: of one run on a CPU, by
    default one for every core. Raises `DeployError`, also where ONNX Runtime would fall back to the CPU in silence.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", threads: int | None = None) -> None:
        runtime = needed("onnxruntime")
        self.card, self.device = read_card(path), as_device("onnxruntime", device)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors: it warns of every copy that a graph makes
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session: Any = _opened(runtime, Path(path), options, self.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        half = self.card.precision == "fp16" and self.device.type == "cpu"
        kept = ", FP16 weights" if half else ""  # CPUs compute in FP32
        self.name = f"ONNX Runtime {runtime.__version__}{kept} on {described(self.device)}"

    def run(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """As `Session.run`."""
        self.expect(images, sizes)
        given = {"images": images.contiguous(), "sizes": sizes.contiguous()}
        given = {name: given[name] for name in self.card.inputs}
        if self.device.type == "cpu":
            with self._telling():
                found = self._session.run(list(self.card.outputs), {name: x.numpy() for name, x in given.items()})
            return {name: torch.from_numpy(x) for name, x in zip(self.card.outputs, found, strict=True)}
        return self._bound(given)

    def _bound(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on a GPU, from torch's memory into torch's memory."""
        torch.cuda.current_stream(self.device).synchronize()  # what was asked of the inputs has to be there
        binding = self._session.io_binding()
        found = {}
        for output in self._session.get_outputs():
            shape = (len(given["images"]), *output.shape[1:])
            found[output.name] = torch.empty(shape, dtype=KINDS[output.name], device=self.device)
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, found)):
            for name, x in tensors.items():
                kind = str(x.dtype).removeprefix("torch.")  # numpy has the same names
                bind(name, "cuda", self.device.index, kind, tuple(x.shape), x.data_ptr())
        with self._telling():
            self._session.run_with_iobinding(binding)  # returns when all is written
        return {name: found[name] for name in self.card.outputs}

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what ONNX Runtime raises, such as for no memory, into `DeployError`."""
        try:
            yield
        except Exception as error:  # its own types share no parent but this
            raise DeployError(f"{self.name} could not run: {error}") from error

    def close(self) -> None:
        """As `Session.close`."""
        self.closed = True
        self._session = None


def _opened(runtime: Any, path: Path, options: Any, device: torch.device) -> Any:
    """The session of ONNX Runtime on the device that was asked for, and on no other."""
    provider = PROVIDERS[device.type]
    if provider not in runtime.get_available_providers():
        raise DeployError(
            f"This onnxruntime {runtime.__version__} has no {provider}. "
            "Install onnxruntime-gpu in place of onnxruntime, or ask for device='cpu'."
        )
    where = (provider, {"device_id": device.index or 0, "use_tf32": 0}) if device.type == "cuda" else provider
    try:
        session = runtime.InferenceSession(str(path), options, providers=[where])
    except Exception as error:  # its own types share no parent but this
        raise DeployError(f"ONNX Runtime {runtime.__version__} does not open {str(path)!r}: {error}") from error
    if session.get_providers()[0] != provider:
        raise DeployError(
            f"Asked ONNX Runtime for {provider}, and it fell back to {session.get_providers()[0]}: its CUDA or cuDNN "
            "libraries are not those of this machine. Ask for device='cpu', or install what it was built for."
        )
    return session
