"""A small detector through the runtime that is to be measured: does it run at all, and is what it says right?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from deimkit.deploy.bench.lineup import Lineup
from deimkit.deploy.parity import prove
from deimkit.errors import DeployError
from deimkit.models.detector import Detector


def smoke(detector: Detector, device: torch.device) -> str:
    """Export, build and run `detector` in all that this machine has, FP16 too on a GPU; what was seen, in a sentence.

    On a GPU TensorRT has to be among it. Raises `DeployError` where something is missing or says something else.
    """
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        own = Lineup(detector, Path(folder), "smoke", device)
        sessions = own.sessions(("fp32", "fp16") if device.type == "cuda" else ("fp32",), remark=missing.append)
        try:
            found = prove(detector, sessions)
        finally:
            for session in sessions:
                session.close()
    if device.type == "cuda" and not any(session.name.startswith("TensorRT") for session in sessions):
        raise DeployError(f"TensorRT was not tried. {' '.join(missing)}")
    if found.verdict == "differs":
        raise DeployError(str(found))
    return f"{len(sessions)} ways of running it agree with torch: {', '.join(s.name for s in sessions)}"
