"""What an engine belongs to: a GPU, a version of TensorRT, an ONNX file and a plan."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from deimkit.deploy.card import Card
from deimkit.deploy.machine import Gpu
from deimkit.deploy.trt.logger import log
from deimkit.deploy.trt.plan import Plan
from deimkit.deploy.trt.precision import route
from deimkit.errors import DeployError


@dataclass(frozen=True)
class Key:
    """Everything that makes one engine another. digest: of the ONNX file and the plan. batch: "1", or "1-8".

    capability: the GPU's compute capability. driver: of the GPU, or "" if unknown. route: how the precision is reached.
    """

    gpu: str
    capability: str
    tensorrt: str
    driver: str
    route: str
    batch: str
    digest: str

    def path(self, onnx: Path) -> Path:
        """Where the engine made of an ONNX file lies: beside it, so that no two of different keys share a name."""
        machine = [self.gpu, f"sm{self.capability}", f"trt{self.tensorrt}", f"driver{self.driver or '0'}"]
        words = [re.sub(r"[^a-z0-9.-]+", "-", word.lower()) for word in [*machine, self.route, f"b{self.batch}"]]
        return onnx.with_name("_".join([onnx.stem, *words, self.digest]) + ".engine")

    def expect(self, trt: ModuleType, gpu: Gpu, name: str) -> None:
        """Raise `DeployError` unless the engine of this key runs on this GPU with this TensorRT.

        Another driver alone is no reason: the kernels in an engine run with it, and give the same. But they were
        chosen for being fast with the old one, so it is logged.
        """
        here = (gpu.name, gpu.capability, trt.__version__)
        if here != (self.gpu, self.capability, self.tensorrt):
            raise DeployError(
                f"{name} was built for {self.gpu} (compute {self.capability}) and TensorRT {self.tensorrt}; here are "
                f"{gpu.name} (compute {gpu.capability}) and TensorRT {trt.__version__}. An engine runs where it was "
                "built: build it again here, from its ONNX file."
            )
        if gpu.driver and self.driver and gpu.driver != self.driver:
            log.warning(
                "%s was tuned with driver %s; here is %s. Build it again to time it.", name, self.driver, gpu.driver
            )


def key_of(trt: ModuleType, gpu: Gpu, onnx: Path, card: Card, plan: Plan) -> Key:
    """The key of the engine that `build` would make here of an ONNX file."""
    told = (plan.workspace, plan.level, plan.keep, plan.ends, plan.batches)
    return Key(
        gpu=gpu.name,
        capability=gpu.capability,
        tensorrt=trt.__version__,
        driver=gpu.driver or "",
        route=route(trt, plan, card).name,
        batch=f"{plan.batches[0]}-{plan.batches[2]}" if card.batch is None else str(card.batch),
        digest=hashlib.sha256(onnx.read_bytes() + repr(told).encode()).hexdigest()[:12],
    )


def sidecar(engine: Path) -> Path:
    """The file beside an engine that says what it is."""
    return engine.with_name(f"{engine.name}.json")


def describe(card: Card, key: Key, recipe: str, seconds: float) -> str:
    """What stands in that file: the card, with the key, the way to the precision and the build time as "engine"."""
    engine = asdict(key) | {"recipe": recipe, "seconds": round(seconds, 1)}
    return json.dumps(card.to_dict() | {"engine": engine}, indent=1)


def read(engine: Path) -> tuple[Card, Key, str]:
    """(card, key, the way to its precision) of an engine; `DeployError` if the file that says so is missing."""
    path = sidecar(engine)
    if not engine.is_file() or not path.is_file():
        missing = path if engine.is_file() else engine
        raise DeployError(
            f"{missing} does not exist. An engine needs the file beside it that says what it is: build it with "
            "`deimkit export ... --format tensorrt`, and move the two together."
        )
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        engine_told = told.pop("engine")
        key = Key(**{field.name: engine_told[field.name] for field in fields(Key)})
        return Card.from_dict(told), key, engine_told["recipe"]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DeployError(f"{path} does not say what its engine is ({error}). Build the engine again.") from error
