"""From a path to a session: which runtime opens which file."""

from __future__ import annotations

from pathlib import Path

from deimkit.deploy.session import Session, as_device
from deimkit.errors import DeployError

# Which runtimes open a file, by its suffix; the first one does unless another is asked for.
RUNTIMES = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".engine": ("tensorrt",)}


def open_session(
    path: str | Path,
    runtime: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    graph: bool = False,
) -> Session:
    """Open a deployed file: .onnx in "onnxruntime" or "openvino", .xml in "openvino", .engine in "tensorrt".

    device: "cpu", "cuda" or "cuda:1", by default where the runtime is at home: the CPU, and a GPU for TensorRT.
    threads: of one run on a CPU. graph: replay a CUDA graph (TensorRT). Raises `DeployError`.
    """
    file = Path(path)
    known = RUNTIMES.get(file.suffix.lower(), ())
    if not known:
        raise DeployError(f"Expected a file that ends in {', '.join(RUNTIMES)}; got {str(path)!r}.")
    chosen = runtime or known[0]
    if chosen not in known:
        raise DeployError(f"{file.suffix} files are opened by {' or '.join(known)}; got runtime={runtime!r}.")
    if not file.is_file():
        raise DeployError(f"No file at {str(path)!r}; `deimkit export` writes one.")
    if graph and chosen != "tensorrt":
        raise DeployError(f"A CUDA graph is for TensorRT engines and for torch; got graph=True for {chosen}.")
    where = as_device(chosen, device)
    if chosen == "tensorrt":
        from deimkit.deploy.trt.engine import TrtSession

        return TrtSession(file, where, graph)
    if chosen == "openvino":
        from deimkit.deploy.vino import VinoSession

        return VinoSession(file, threads)
    from deimkit.deploy.ort import OrtSession

    return OrtSession(file, where, threads)
