"""A stand-in for TensorRT and for the GPU under it: strict about what the real ones are strict about.

It has the names of one version and no others, takes the arguments that one takes, parses real ONNX files, and computes
with ONNX Runtime what an engine would compute on the GPU. What would crash the process, or be silently wrong or slow,
is noted in `Machine.violations`.
"""

from __future__ import annotations

import enum
import inspect
import io
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_tensorrt_names import NAMES, TABLE, exists, numbers

import deimkit.deploy.machine
from deimkit.data.split import CategoryMap
from deimkit.deploy.card import Card
from deimkit.deploy.trt.cuda import Cuda

MAGIC, TIMINGS = b"FAKE ENGINE\n", b"FAKE TIMINGS\n"

# ------------------------------------------------------------------------------------------------------- the GPU


class Stream:
    """A stream that knows how far it is behind others. queued: work so far. seen: of each stream, up to where."""

    def __init__(self, machine: Machine, handle: int) -> None:
        self.machine, self.cuda_stream = machine, handle
        self.queued, self.seen = 0, {}

    def wait_stream(self, other: Stream) -> None:
        self.seen[other] = other.queued

    def synchronize(self) -> None:
        self.machine.calls.append("synchronize")


class Graph:
    """A CUDA graph: what was queued while it was recorded."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.work:
            work()


class Buffer(torch.Tensor):
    """Memory of the GPU; whoever writes to it does so on a stream."""

    machine: Machine

    def copy_(self, source: torch.Tensor, *args: Any) -> torch.Tensor:
        self.machine.writes("copies to a buffer")
        return super().copy_(source, *args)


class Machine:
    """A GPU that may not exist. violations: what would crash, or be wrong or slow, on a real one."""

    def __init__(self, gpu: str = "Tesla T4", driver: str = "550.54") -> None:
        self.gpu, self.driver = gpu, driver
        self.buffer = type("Buffer", (Buffer,), {"machine": self})
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.memory: dict[int, weakref.ref[torch.Tensor]] = {}
        self.caller, self.streams = Stream(self, 0), []
        self.current, self.recording = self.caller, None
        self.measured = 0
        self.plans: list[dict[str, Any]] = []

    def crime(self, what: str) -> None:
        self.violations.append(what)

    def stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self, 7001 + len(self.streams)))
        return self.streams[-1]

    def writes(self, what: str) -> None:
        """Work on the current stream that reads what the caller queued."""
        if self.current is self.caller:
            self.crime(f"{what} on the caller's stream")
        elif self.current.seen.get(self.caller, -1) < self.caller.queued:
            self.crime(f"{what} before the caller's work is done")
        self.current.queued += 1

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.full(shape, -7, dtype=dtype).as_subclass(self.buffer)
        self.memory[tensor.data_ptr()] = weakref.ref(tensor)
        return tensor

    def at(self, address: int) -> torch.Tensor | None:
        found = self.memory.get(address)
        return None if found is None else found()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def record(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream is not self.caller and self.recording is None
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def settled(self) -> bool:
        """Whether whatever the caller queues from now on begins after all that others have queued."""
        return all(self.caller.seen.get(stream, 0) >= stream.queued for stream in self.streams)

    def install(self, monkeypatch: Any, version: str) -> Any:
        """Take the place of the GPU that torch sees, with a TensorRT for it, which is returned."""
        properties = SimpleNamespace(
            name=self.gpu, major=7, minor=5, total_memory=2**34, multi_processor_count=40, uuid="0"
        )
        stand_ins = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "Stream": self.stream,
            "current_stream": lambda device: self.current,
            "stream": self.on,
            "device": lambda device: self.on(self.current),
            "CUDAGraph": Graph,
            "graph": self.record,
            "get_device_properties": lambda device: properties,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(deimkit.deploy.machine, "query", lambda *_: [self.driver, None, None])
        monkeypatch.setattr(Cuda, "empty", lambda _, shape, dtype: self.allocate(shape, dtype))
        trt = tensorrt(version, self)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt


# ------------------------------------------------------------------------------------------------ strict classes


class Dims(tuple):
    """A shape."""


TAKES = {"int": int, "str": str, "bool": bool, "buffer": (bytes, bytearray, memoryview), "Dims": (tuple, list)}


def strict(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with a TypeError for an argument that the real one would not take."""
    kinds = {name: kind for name, kind in method.__annotations__.items() if name != "return" and kind != "Any"}

    @wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in inspect.signature(method).bind(*args, **kwargs).arguments.items():
            kind = kinds.get(name)
            fits = kind is None or (
                isinstance(value, TAKES[kind])
                if kind in TAKES
                else kind in [base.__name__ for base in type(value).__mro__]
            )
            if not fits or (kind == "int" and isinstance(value, enum.Enum)):
                raise TypeError(f"{method.__qualname__}: {name} must be {kind}; got {value!r}")
        return method(*args, **kwargs)

    return checked


class Thing:
    """What all classes of the stand-in share: the module they are of, and no attributes but the known ones."""

    trt: Any
    machine: Machine

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            if inspect.isfunction(member) and not name.startswith("_"):
                setattr(cls, name, strict(member))
            elif isinstance(member, property) and member.fset:
                setattr(cls, name, member.setter(strict(member.fset)))

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            held = inspect.getattr_static(type(self), name, None)
            if held is None or isinstance(held, Absent):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)

    def _error(self, message: str) -> None:
        self.trt._logger.log(self.trt.ILogger.Severity.ERROR, message)


class Absent:
    """A name that this version does not have."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, thing: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}")


def named(module: Any, cls: type) -> type:
    """The class as it is in the module's version."""
    lacking = [name.split(".")[1] for name in NAMES if name.split(".")[0] == cls.__name__]
    absent = {name: Absent() for name in lacking if not exists(f"{cls.__name__}.{name}", module.__version__)}
    return type(cls.__name__, (cls,), {"trt": module, "machine": module._machine, **absent})


def members(name: str, version: str) -> type[enum.Enum]:
    """An enumeration as pybind makes it: `int()` works, arithmetic does not."""
    present = [member.split(".")[1] for member in NAMES if member.startswith(f"{name}.") and exists(member, version)]
    return enum.Enum(name, {member: i for i, member in enumerate(present)}, type=Number)


class Number:
    """Lets `int()` be taken."""

    def __int__(self) -> int:
        return self.value


# ------------------------------------------------------------------------------------------------------- logging


class ILogger(Thing):
    """The base of loggers; `__init__` must be called by those that derive from it."""

    def __init__(self) -> None:
        self._made = True

    __setattr__ = object.__setattr__  # what derives from it in Python may hold anything

    def log(self, severity: Severity, msg: str) -> None:  # noqa: F821
        raise NotImplementedError


def take(trt: Any, logger: Any) -> None:
    """Use a logger, as builders and runtimes do."""
    if not isinstance(logger, trt.ILogger) or not getattr(logger, "_made", False):
        raise TypeError("incompatible constructor arguments: ILogger, initialised, is asked for")
    if trt._logger not in (None, logger):
        trt._machine.crime("a second logger: TensorRT goes on with the first")
    trt._logger = trt._logger or logger


# ------------------------------------------------------------------------------------------------------ networks

LAYERS = {
    "ACTIVATION": "Relu Sigmoid Clip HardSigmoid Gelu Tanh Softplus",
    "CAST": "Cast",
    "CONCATENATION": "Concat",
    "CONSTANT": "Constant ConstantOfShape",
    "CONVOLUTION": "Conv",
    "DEQUANTIZE": "DequantizeLinear",
    "ELEMENTWISE": "Add Sub Mul Div Min Max Pow And Or Equal Less Greater Mod",
    "FILL": "Range",
    "GATHER": "Gather GatherElements GatherND",
    "GRID_SAMPLE": "GridSample",
    "IDENTITY": "Identity",
    "MATRIX_MULTIPLY": "MatMul Gemm",
    "NORMALIZATION": "LayerNormalization",
    "POOLING": "MaxPool AveragePool GlobalAveragePool",
    "QUANTIZE": "QuantizeLinear",
    "REDUCE": "ReduceSum ReduceMean ReduceMax",
    "RESIZE": "Resize",
    "SELECT": "Where",
    "SHAPE": "Shape",
    "SHUFFLE": "Reshape Transpose Squeeze Unsqueeze Flatten",
    "SLICE": "Slice Split Expand Tile Pad",
    "SOFTMAX": "Softmax",
    "TOPK": "TopK",
    "UNARY": "Erf Exp Log Sqrt Abs Neg Reciprocal Floor Ceil Round Sign Sin Cos Not",
}
KINDS = {operator: kind for kind, operators in LAYERS.items() for operator in operators.split()}
TYPES = {1: "FLOAT", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}  # of ONNX


class ITensor(Thing):
    """A tensor of a network."""

    def __init__(self, name: str, dtype: Any) -> None:
        self._name, self._dtype = name, dtype

    name = property(lambda self: self._name)
    dtype = property(lambda self: self._dtype)
    is_shape_tensor = property(lambda self: False)


class ILayer(Thing):
    """A layer of a network, one for each node of the ONNX graph."""

    def __init__(self, network: Any, name: str, kind: Any, inputs: list[Any], outputs: list[Any]) -> None:
        self._network, self._name, self._kind, self._inputs, self._outputs = network, name, kind, inputs, outputs
        self._precision = None
        self._set: set[int] = set()

    name = property(lambda self: self._name)
    type = property(lambda self: self._kind)
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def _choose(self, what: str, dtype: Any) -> None:
        """Someone sets this layer's precision, or the type of an output of it."""
        if self._network._typed:
            self._network._errors.append(f"{self.name}: no {what} may be set in a strongly typed network")
        if dtype != self.trt.float32:
            self.machine.crime(f"{self.name}: {what} set to {dtype}")

    @property
    def precision(self) -> Any:
        return self._precision

    @precision.setter
    def precision(self, dtype: DataType) -> None:  # noqa: F821
        self._choose("precision", dtype)
        if self._outputs[0].dtype not in (self.trt.float32, self.trt.float16):
            self.machine.crime(f"{self.name}: precision of a layer that computes {self._outputs[0].dtype.name}")
        self._precision = dtype

    def set_output_type(self, index: int, dtype: DataType) -> None:  # noqa: F821
        self._choose("output type", dtype)
        if self._kind.name in ("CAST", "CONSTANT", "QUANTIZE", "DEQUANTIZE", "SHAPE"):
            self._network._errors.append(f"{self.name}: a {self._kind.name} layer's type is what it is")
        if self._outputs[index].dtype != dtype:
            self._network._errors.append(f"{self.name}: output {index} is {self._outputs[index].dtype.name}")
        self._set.add(index)


class INetworkDefinition(Thing):
    """A network. _errors: why it cannot be built."""

    def __init__(self, flags: int) -> None:
        present = self.trt.NetworkDefinitionCreationFlag.__members__
        self._flags = {name for name, member in present.items() if flags >> int(member) & 1}
        if flags >> len(present):
            raise TypeError(f"create_network: no flag has such a bit: {flags}")
        self._typed = self.trt._major >= 11 or "STRONGLY_TYPED" in self._flags
        self._layers, self._inputs, self._outputs, self._errors = [], [], [], []
        self._onnx = b""

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class ParserError(Thing):
    """What the parser did not understand."""

    def __init__(self, node: int, desc: str) -> None:
        self._node, self._desc = node, desc

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._node


class OnnxParser(Thing):
    """Turns an ONNX file into layers."""

    def __init__(self, network: Any, logger: Any) -> None:
        take(self.trt, logger)
        if not isinstance(network, self.trt.INetworkDefinition):
            raise TypeError("OnnxParser: a network is asked for")
        self._network = network
        network._parser = weakref.ref(self)
        self._errors: list[Any] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        import onnx

        network = self._network
        if self.trt._major < 10 and "EXPLICIT_BATCH" not in network._flags:
            self._errors.append(self.trt.ParserError(-1, "the network has no explicit batch"))
            return False
        read = onnx.shape_inference.infer_shapes(onnx.load(model), strict_mode=True, data_prop=True)
        graph, network._onnx = read.graph, read.SerializeToString()
        values = [*graph.input, *graph.output, *graph.value_info]
        dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
        dtypes |= {constant.name: constant.data_type for constant in graph.initializer}
        tensors: dict[str, Any] = {"": None}
        for name, dtype in dtypes.items():
            kind = TYPES.get(dtype, "FLOAT")
            kind = "INT32" if kind == "INT64" and self.trt._major < 10 else kind
            tensors[name] = self.trt.ITensor(name, getattr(self.trt.DataType, kind))
        for index, node in enumerate(graph.node):
            if node.op_type not in KINDS or node.domain not in ("", "ai.onnx"):
                self._errors.append(self.trt.ParserError(index, f"no importer for {node.op_type}"))
                continue
            kind = getattr(self.trt.LayerType, KINDS[node.op_type])
            inputs, outputs = ([tensors[name] for name in side] for side in (node.input, node.output))
            network._layers.append(self.trt.ILayer(network, node.name or f"{index}", kind, inputs, outputs))
        network._inputs = [tensors[value.name] for value in graph.input]
        network._outputs = [tensors[value.name] for value in graph.output]
        shape = {v.name: [d.dim_value or -1 for d in v.type.tensor_type.shape.dim] for v in values}
        network._shapes = {tensor.name: shape[tensor.name] for tensor in (*network._inputs, *network._outputs)}
        return not self._errors


# ------------------------------------------------------------------------------------------------------ building


class IOptimizationProfile(Thing):
    """What shapes inputs may have."""

    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(shape) for shape in self._shapes[input]]


class ITimingCache(Thing):
    """What was measured. _made_for: (version, GPU)."""

    def __init__(self, made_for: list[str], known: list[str]) -> None:
        self._made_for, self._known = made_for, set(known)

    def serialize(self) -> Any:
        told = json.dumps([self._made_for, sorted(self._known)]).encode()
        return self.trt.IHostMemory(TIMINGS + told)


class IHostMemory(bytes):
    """Bytes of the library's."""

    trt: Any
    machine: Machine
    nbytes = property(len)


class IBuilderConfig(Thing):
    """How to build."""

    def __init__(self) -> None:
        self._flags, self._profiles, self._pools = {"TF32"}, [], {}
        self._level, self._cache, self._built = 3, lambda: None, False

    def _change(self, what: str) -> None:
        if self._built:
            self.machine.crime(f"{what} after the build")

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._change("level")
        self._level = level

    def set_flag(self, flag: BuilderFlag) -> None:  # noqa: F821
        self._change("flag")
        self._flags.add(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:  # noqa: F821
        self._change("flag")
        self._flags.discard(flag.name)

    def get_flag(self, flag: BuilderFlag) -> bool:  # noqa: F821
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:  # noqa: F821
        self._change("pool")
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:  # noqa: F821
        return self._pools.get(pool.name, 2**34)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._change("profile")
        if not all(a <= b <= c for shapes in profile._shapes.values() for a, b, c in zip(*shapes, strict=True)):
            self._error("the profile's shapes do not rise")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: buffer) -> Any:  # noqa: F821
        here = [self.trt.__version__, self.machine.gpu]
        if not serialized_timing_cache:
            return self.trt.ITimingCache(here, [])
        try:
            assert bytes(serialized_timing_cache).startswith(TIMINGS)
            return self.trt.ITimingCache(*json.loads(bytes(serialized_timing_cache)[len(TIMINGS) :]))
        except (AssertionError, ValueError):
            self._error("the timing cache is damaged")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._change("timing cache")
        if ignore_mismatch:
            self.machine.crime("timings of another GPU are allowed")
        if cache._made_for != [self.trt.__version__, self.machine.gpu]:
            self._error("the timing cache is of another machine")
            return False
        self._cache = weakref.ref(cache)
        return True

    def get_timing_cache(self) -> Any:
        return self._cache()


class Builder(Thing):
    """Where everything begins."""

    def __init__(self, logger: Any) -> None:
        take(self.trt, logger)

    def create_network(self, flags: int = 0) -> Any:
        return self.trt.INetworkDefinition(flags)

    def create_builder_config(self) -> Any:
        return self.trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self.trt.IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        config._built = True
        if network._onnx and network._parser() is None:
            self.machine.crime("the parser, whose weights the network uses, is gone")
        problem = next(iter(problems(network, config)), None)
        if problem:
            self._error(problem)
            return None
        self._measure(network, config)
        kept = sorted(layer.name for layer in network._layers if layer._precision is not None)
        io = [tensor.name for tensor in (*network._inputs, *network._outputs)]
        plan = {
            "made_for": [self.trt.__version__, self.machine.gpu],
            "flags": sorted(config._flags),
            "network": sorted(network._flags),
            "kept": kept,
            "level": config._level,
            "pools": config._pools,
            "inputs": len(network._inputs),
            "dtypes": {tensor.name: tensor.dtype.name for tensor in (*network._inputs, *network._outputs)},
            "shapes": {name: network._shapes[name] for name in io},
            "profile": config._profiles[0]._shapes if config._profiles else None,
        }
        self.machine.plans.append(plan)
        return self.trt.IHostMemory(MAGIC + json.dumps(plan).encode() + b"\n" + network._onnx)

    def _measure(self, network: Any, config: Any) -> None:
        """Time the layers that the timing cache does not know."""
        cache = config._cache()
        if cache is None and config._cache.__class__ is weakref.ref:
            self.machine.crime("the timing cache is gone before the build")
        known = cache._known if cache is not None else set()
        fresh = {f"{layer.name}: {layer.type.name}" for layer in network._layers} - known
        self.machine.measured = len(fresh)
        known |= fresh


def problems(network: Any, config: Any) -> Iterator[str]:
    """Why a network cannot be built like this."""
    yield from network._errors
    flags, kinds = config._flags, {layer.type.name for layer in network._layers}
    halves = any(t is not None and t.dtype.name == "HALF" for layer in network._layers for t in layer._outputs)
    pinned = any(layer._precision is not None for layer in network._layers)
    if not network._layers:
        yield "the network is empty"
    if network._typed and flags & {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}:
        yield "precision flags are set for a strongly typed network"
    if not network._typed and halves and "FP16" not in flags:
        yield "half precision is in the network, but not allowed"
    if not network._typed and "QUANTIZE" in kinds and "INT8" not in flags:
        yield "the network has Q/DQ layers, but INT8 is not allowed"
    if pinned and "OBEY_PRECISION_CONSTRAINTS" not in flags:
        config.machine.crime("precisions are set, and will be ignored")
    for tensor in network._inputs:
        shape = network._shapes[tensor.name]
        profile = config._profiles[0]._shapes if config._profiles else {}
        if -1 in shape and tensor.name not in profile:
            yield f"{tensor.name} has no profile"
        if tensor.name in profile and len(profile[tensor.name][0]) != len(shape):
            yield f"the profile of {tensor.name} does not fit {shape}"


# ------------------------------------------------------------------------------------------------------- running


class Runtime(Thing):
    """Opens engines."""

    def __init__(self, logger: Any) -> None:
        take(self.trt, logger)
        self._living: weakref.WeakSet[Any] = weakref.WeakSet()

    def deserialize_cuda_engine(self, serialized_engine: buffer) -> Any:  # noqa: F821
        content = bytes(serialized_engine)
        told, _, onnx = content.removeprefix(MAGIC).partition(b"\n")
        plan = json.loads(told) if content.startswith(MAGIC) else {}
        if plan.get("made_for") != [self.trt.__version__, self.machine.gpu]:
            self._error("the plan is damaged, or of another version or GPU")
            return None
        engine = self.trt.ICudaEngine(plan, onnx)
        self._living.add(engine)
        return engine

    def __del__(self) -> None:
        if len(getattr(self, "_living", ())):
            self.machine.crime("the runtime is gone before its engine")


class ICudaEngine(Thing):
    """An engine."""

    def __init__(self, plan: dict[str, Any], onnx: bytes) -> None:
        self._plan, self._onnx, self._session = plan, onnx, None
        self._living: weakref.WeakSet[Any] = weakref.WeakSet()

    num_io_tensors = property(lambda self: len(self._plan["shapes"]))

    def get_tensor_name(self, index: int) -> str:
        return list(self._plan["dtypes"])[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, self._plan["dtypes"][name])

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._plan["shapes"][name])

    def get_tensor_mode(self, name: str) -> Any:
        raise NotImplementedError

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        static = [self._plan["shapes"][name]] * 3
        return [Dims(shape) for shape in (self._plan["profile"] or {name: static})[name]]

    def create_execution_context(self) -> Any:
        context = self.trt.IExecutionContext(weakref.ref(self))
        self._living.add(context)
        return context

    def _compute(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import onnxruntime

        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(self._onnx, options, providers=["CPUExecutionProvider"])
        wanted = {value.name: value.type for value in self._session.get_inputs()}
        cast = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(float)": np.float32}
        answers = self._session.run(None, {name: feeds[name].astype(cast[kind]) for name, kind in wanted.items()})
        return dict(zip([value.name for value in self._session.get_outputs()], answers, strict=True))

    def __del__(self) -> None:
        if len(getattr(self, "_living", ())):
            self.machine.crime("the engine is gone before its context")


class IExecutionContext(Thing):
    """Runs an engine. _shapes: of the inputs, so far. _warm: it ran with these shapes."""

    def __init__(self, engine: weakref.ref[Any]) -> None:
        self._engine = engine
        static = {name: shape for name, shape in engine()._plan["shapes"].items() if -1 not in shape}
        names = list(engine()._plan["shapes"])
        self._inputs, self._outputs = names[: engine()._plan["inputs"]], names[engine()._plan["inputs"] :]
        self._shapes = {name: tuple(static[name]) for name in self._inputs if name in static}
        self._addresses: dict[str, int] = {}
        self._warm = False

    def _alive(self) -> Any:
        engine = self._engine()
        assert engine is not None, "SEGMENTATION FAULT: the engine of this context is gone"
        return engine

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        engine = self._alive()
        self.machine.calls.append(f"set_input_shape {name} {tuple(shape)}")
        least, _, most = engine.get_tensor_profile_shape(name, 0)
        if len(least) != len(shape) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            self._error(f"{tuple(shape)} is not within {least} to {most}")
            return False
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name], self._warm = tuple(shape), False
            self._addresses.clear()  # stricter than TensorRT, which would go on with memory of the old size
        return True

    def infer_shapes(self) -> list[str]:
        self._alive()
        return [name for name in self._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        shape = list(self._alive()._plan["shapes"][name])
        if name in self._shapes:
            return Dims(self._shapes[name])
        known = [self._shapes[first][0] for first in self._inputs if first in self._shapes]
        return Dims([known[0] if side == -1 and len(known) == len(self._inputs) else side for side in shape])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        engine = self._alive()
        tensor = self.machine.at(memory)
        self.machine.calls.append(f"set_tensor_address {name}")
        if name not in engine._plan["shapes"]:
            self._error(f"there is no tensor {name}")
            return False
        if tensor is None:
            self.machine.crime(f"{name}: no memory of the GPU lies there")
        elif tuple(tensor.shape) != tuple(self.get_tensor_shape(name)) or not tensor.is_contiguous():
            self.machine.crime(f"{name}: memory for {tuple(tensor.shape)}, not {self.get_tensor_shape(name)}")
        elif engine._plan["dtypes"][name] != DTYPE_NAMES[tensor.dtype]:
            self.machine.crime(f"{name}: memory of {tensor.dtype}, not {engine._plan['dtypes'][name]}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._alive()
        self.machine.calls.append("execute")
        if stream_handle == 0:
            self.machine.crime("runs on the default stream")
        elif stream_handle != self.machine.current.cuda_stream:
            self.machine.crime("runs on another stream than its inputs are copied on")
        lacking = [name for name in (*self._inputs, *self._outputs) if name not in self._addresses]
        if lacking or self.infer_shapes():
            self._error(f"no address or shape is set for {lacking or self.infer_shapes()}")
            return False
        shapes = dict(self._shapes)

        def work() -> None:
            if shapes != self._shapes:
                self.machine.crime("a graph runs that was recorded for other shapes")
            self._work()

        if self.machine.recording is None:
            work()
            self._warm = True
        elif not self._warm:
            self._error("a graph is recorded before the first run with these shapes")
            return False
        else:
            self.machine.recording.work.append(work)
        return True

    def _work(self) -> None:
        """What the GPU does: read memory, compute, write memory."""
        tensors = {name: self.machine.at(address) for name, address in self._addresses.items()}
        gone = [name for name, tensor in tensors.items() if tensor is None]
        if gone:
            self.machine.crime(f"the memory of {gone} was freed while TensorRT has its address")
            return
        self.machine.writes("runs")
        answers = self._alive()._compute({name: plain(tensors[name]).numpy() for name in self._inputs})
        for name in self._outputs:
            plain(tensors[name]).copy_(torch.from_numpy(answers[name]))


DTYPE_NAMES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.int32: "INT32", torch.int64: "INT64"}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without being watched."""
    return tensor.as_subclass(torch.Tensor)


# ---------------------------------------------------------------------------------------------------- the module

CLASSES = [Builder, IBuilderConfig, IOptimizationProfile, ITimingCache, INetworkDefinition, ILayer, ITensor]
CLASSES += [OnnxParser, ParserError, Runtime, ICudaEngine, IExecutionContext, IHostMemory, ILogger]


def tensorrt(version: str, machine: Machine) -> Any:
    """The module `tensorrt` of a version, on a machine."""
    module: Any = ModuleType("tensorrt")
    module.__version__, module._machine, module._major, module._logger = version, machine, numbers(version)[0], None
    for cls in CLASSES:
        setattr(module, cls.__name__, named(module, cls))
    for name in TABLE:
        if name not in {cls.__name__ for cls in CLASSES} | {"Severity"}:
            setattr(module, name, members(name, version))
    module.ILogger.Severity = members("Severity", version)
    module.float32, module.float16 = module.DataType.FLOAT, module.DataType.HALF
    return module


# ----------------------------------------------------------------------------------------------------- something to run


class Mini(torch.nn.Module):
    """As small as a graph can be that has a bit of everything a detector has. half: its trunk is in half precision."""

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.conv, self.mix = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 6)
        self.norm, self.score, self.box = torch.nn.LayerNorm(6), torch.nn.Linear(6, 2), torch.nn.Linear(6, 4)
        self.dtype = torch.float16 if half else torch.float32
        self.conv.to(self.dtype)

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.conv(images.to(self.dtype)).relu().float()  # (B, 4, 8, 8)
        hidden = self.norm(self.mix(maps.flatten(2).transpose(1, 2)))  # (B, 64, 6)
        boxes = (self.box(hidden) + hidden[..., :4].pow(3).softmax(-1).log()).sigmoid()  # (B, 64, 4)
        seen = torch.nn.functional.grid_sample(
            maps, boxes[:, :, None, :2] * 2 - 1, align_corners=False
        )  # (B, 4, 64, 1)
        logits = self.score(hidden) + seen.sum(1)  # (B, 64, 2)
        best, index = logits.flatten(1).topk(5)
        chosen = (
            boxes.gather(1, (index // 2)[..., None].expand(-1, -1, 4)) * sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
        )
        return chosen, best.sigmoid(), index % 2


def write_mini(path: Path, precision: str = "fp32", batch: int | None = 1) -> Card:
    """Write `Mini` as an ONNX file of the precision; returns its card."""
    path.write_bytes(exported(precision, batch))
    return mini_card(precision, batch)


def mini_card(precision: str, batch: int | None) -> Card:
    return Card("mini", CategoryMap.of(["a", "b"]), (8, 8), batch, top=5, precision=precision, opset=17)


@cache
def exported(precision: str, batch: int | None) -> bytes:
    """The content of that file; always the same."""
    import onnx

    card = mini_card(precision, batch)
    free = {} if batch else {"dynamic_axes": {name: {0: "batch"} for name in (*card.inputs, *card.outputs)}}
    inputs = (torch.rand(batch or 2, 3, 8, 8), torch.full((batch or 2, 2), 8))
    how = {"input_names": card.inputs, "output_names": card.outputs, "opset_version": 17, "dynamo": False}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Mini(precision == "fp16").eval(), inputs, file, **how, **free)
    model = onnx.load_from_string(file.getvalue())
    for output, sides in zip(model.graph.output, ([5, 4], [5], [5]), strict=True):  # torch leaves them open
        for dim, side in zip(output.type.tensor_type.shape.dim[1:], sides, strict=True):
            dim.dim_value = side
    if precision == "int8":
        quantise(model.graph)
    return model.SerializeToString()


def quantise(graph: Any) -> None:
    """Put a quantiser and its inverse before the first convolution."""
    from onnx import helper

    scale = helper.make_tensor("scale", 1, [], [1 / 127])
    zero = helper.make_tensor("zero", 3, [], [0])
    graph.initializer.extend([scale, zero])
    index, conv = next((i, node) for i, node in enumerate(graph.node) if node.op_type == "Conv")
    source = conv.input[0]
    conv.input[0] = "dequantised"
    graph.node.insert(
        index, helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["dequantised"], "dq")
    )
    graph.node.insert(index, helper.make_node("QuantizeLinear", [source, "scale", "zero"], ["quantised"], "q"))
