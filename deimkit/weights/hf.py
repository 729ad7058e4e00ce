"""A detector as a Hugging Face folder, for `transformers` to load, and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from deimkit.errors import CheckpointError
from deimkit.models.detector import Detector
from deimkit.weights.config import differences, to_config
from deimkit.weights.files import read, replacing
from deimkit.weights.infer import detect_arch
from deimkit.weights.load import default_categories, load_weights
from deimkit.weights.names import to_hf
from deimkit.weights.published import published_state

# How images reach the detector: stretched to its size, divided by 255, nothing else.
PREPROCESSOR = {
    "image_processor_type": "RTDetrImageProcessor",
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
    "do_pad": False,
}


def save_hf(detector: Detector, folder: str | Path, allow_mismatch: bool = False) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for `transformers` to load.

    `transformers` then predicts the same boxes on square inputs. On others it lays position codes out row by row, which
    a detector does only with `Hybrid(row_major=True)`. Its prediction heads compute with ReLU and nothing else, so that
    a DEIM detector (SiLU) is a `CheckpointError` unless `allow_mismatch`, and is then for `load_hf` alone; so is
    anything else that its classes lack (`differences`). A mixture that neither of its families is, is always refused.
    """
    wrong = differences(detector.arch)
    if wrong and not allow_mismatch:
        raise CheckpointError(
            f"transformers would predict wrongly with the weights of this detector: it computes {'; '.join(wrong)}. "
            "Export it to ONNX, train a plain dfine_* or rtdetrv2_* recipe for transformers, or pass "
            "allow_mismatch=True if deimkit alone will read the folder."
        )
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = detector.size
    tensors = {  # copies, because safetensors refuses tensors that share memory, as tied heads do
        name: tensor.to(torch.float32 if tensor.ndim else tensor.dtype, copy=True)
        for name, tensor in to_hf(published_state(detector)).items()
    }
    with replacing(folder / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    for name, content in (
        ("config.json", to_config(detector.arch, detector.categories)),
        ("preprocessor_config.json", PREPROCESSOR | {"size": {"height": height, "width": width}}),
    ):
        with replacing(folder / name) as path:
            path.write_text(json.dumps(content, indent=2) + "\n")


def load_hf(folder: str | Path) -> Detector:
    """The detector of a Hugging Face folder of D-FINE or RT-DETRv2, with its classes and size.

    It computes what `transformers` does.

    Raises `CheckpointError` if the folder is incomplete or its config is none that deimkit builds.
    """
    state = read(folder)
    detector = Detector(detect_arch(state), default_categories(state))
    load_weights(detector, state)
    prepares = Path(folder) / "preprocessor_config.json"
    if prepares.is_file():
        size = json.loads(prepares.read_text()).get("size") or {}
        detector.size = (size.get("height", 640), size.get("width", 640))
    return detector
