"""From an ONNX file to an engine: the file is parsed, precisions are settled, and kernels chosen by timing them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from deimkit.deploy.card import Card
from deimkit.deploy.onnx_file import written_whole
from deimkit.deploy.trt.cuda import Cuda
from deimkit.deploy.trt.key import Key, describe, key_of, sidecar
from deimkit.deploy.trt.library import tensorrt
from deimkit.deploy.trt.logger import complaint, listener, log
from deimkit.deploy.trt.plan import Plan
from deimkit.deploy.trt.precision import Route, pin, route
from deimkit.errors import DeployError


@dataclass(frozen=True)
class Built:
    """An engine on the disk. recipe: how its precision was reached. seconds: how long the build took."""

    path: Path
    card: Card
    key: Key
    recipe: str
    seconds: float


def build(onnx: Path, card: Card, plan: Plan, out: Path | None = None, device: str = "cuda") -> Built:
    """Build the engine of an ONNX file for the GPU `device`, and write it with what it is, as JSON, beside it.

    card: of the ONNX file. out: where to; by default beside the ONNX file, under the name of its `Key`. Takes
    minutes. Raises `DeployError` with what TensorRT complained of if it cannot.
    """
    trt = tensorrt()
    cuda = Cuda(device)
    way, key = route(trt, plan, card), key_of(trt, cuda.gpu(), onnx, card, plan)
    complaint(trt)  # what came before is not this build's
    started = time.perf_counter()
    with cuda.current():
        engine, kept = serialize(trt, onnx, card, plan, way)
    seconds = time.perf_counter() - started
    card = replace(card, precision=plan.precision, versions={**card.versions, "tensorrt": trt.__version__})
    built = Built(out or key.path(onnx), card, key, way.recipe(kept), seconds)
    with written_whole(built.path) as file:
        file.write_bytes(engine)
    with written_whole(sidecar(built.path)) as file:
        file.write_text(describe(card, key, built.recipe, seconds), encoding="utf-8")
    return built


def serialize(trt: ModuleType, onnx: Path, card: Card, plan: Plan, way: Route) -> tuple[bytes, int]:
    """The engine as bytes, and how many layers were kept in FP32."""
    builder = trt.Builder(listener(trt))
    network = builder.create_network(bits(trt.NetworkDefinitionCreationFlag, way.network))
    parser = trt.OnnxParser(network, listener(trt))  # lives as long as the network: its weights are the parser's
    parse(trt, parser, onnx)
    kept = pin(trt, network, plan) if way.pins else 0
    config = configure(trt, builder, plan, way)
    if card.batch is None:
        add_profile(trt, builder, config, card, plan)
    with timings(config, plan.timing_cache):
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DeployError(
            f"TensorRT {trt.__version__} could not build {onnx.name} ({way.recipe(kept)}): {complaint(trt)}. If it "
            "lacks memory, free the GPU, or export a smaller size or batch; if a layer has no kernel, export another "
            "precision."
        )
    return bytes(engine), kept


def bits(flags: Any, names: tuple[str, ...]) -> int:
    """Flags as one number with a bit for each; which bit is whose changes between versions."""
    return sum(1 << int(getattr(flags, name)) for name in names)


def parse(trt: ModuleType, parser: Any, onnx: Path) -> None:
    """Read an ONNX file into the parser's network; `DeployError` with all that it does not understand."""
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, 5))]  # the first tell most
    told = "; ".join(f"node {error.node()}: {error.desc()}" for error in errors) or complaint(trt)
    raise DeployError(
        f"TensorRT {trt.__version__} does not understand {onnx.name}: {told}. Export it with another opset (17 is best "
        "supported) or exporter, or use a newer TensorRT."
    )


def configure(trt: ModuleType, builder: Any, plan: Plan, way: Route) -> Any:
    """The builder's configuration: flags, memory, and how long it may search."""
    config = builder.create_builder_config()
    for name in way.on:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in way.off:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if plan.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)
    if plan.level is not None:
        config.builder_optimization_level = plan.level
    return config


def add_profile(trt: ModuleType, builder: Any, config: Any, card: Card, plan: Plan) -> None:
    """Say how many images at a time there will be."""
    rest = {"images": (3, *card.size), "sizes": (2,)}
    profile = builder.create_optimization_profile()
    for name in card.inputs:
        profile.set_shape(name, *((batch, *rest[name]) for batch in plan.batches))
    if config.add_optimization_profile(profile) < 0:
        raise DeployError(
            f"TensorRT takes no batches of {plan.batches[0]} to {plan.batches[2]} images: {complaint(trt)}. "
            "Export with batch= the number that is to be."
        )


@contextmanager
def timings(config: Any, path: Path | None) -> Iterator[None]:
    """In here a build uses what earlier ones measured, and what it measured is kept for the next; nothing if no path.

    A file that is damaged, or of another GPU or TensorRT, is not used, and replaced.
    """
    if path is None:
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # False: strictly this GPU's
        log.warning("%s holds no timings for this GPU and TensorRT; a new one is begun.", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield  # `cache` has to live until the engine is built
    with written_whole(path) as file:
        file.write_bytes(bytes(config.get_timing_cache().serialize()))
