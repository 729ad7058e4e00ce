"""The stand-in for TensorRT has the names that the real one has, and minds what the real one minds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tensorrt import CLASSES, Machine, tensorrt, write_mini
from fake_tensorrt_names import NAMES, TABLE, VERSIONS, exists


def recorded(text: str) -> dict[str, dict[str, bool]]:
    """ "class.member" -> version -> whether introspection found it, from the table in Markdown."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if "|" in line]
    columns = rows[0][1:]
    return {row[0]: dict(zip(columns, [cell == "Y" for cell in row[1:]], strict=True)) for row in rows[2:]}


def test_names_are_those_that_introspection_found(shared: Path) -> None:
    text = (shared / "facts" / "tensorrt_api_matrix.md").read_text(encoding="utf-8")
    found = recorded("\n".join(line for line in text.splitlines() if line.startswith("|")))
    versions = {v: next(c for c in found["Builder.create_network"] if c.startswith(v)) for v in VERSIONS}
    wrong = [
        f"{name} in {version}"
        for name in sorted(NAMES.keys() & found.keys())
        for version, column in versions.items()
        if exists(name, version) != found[name][column]
    ]
    assert not wrong
    assert len(NAMES.keys() & found.keys()) > 40
    gone = set(re.findall(r"[\w.]+", text.partition("REMOVED 10.16.1->11.0:")[2].partition("\n")[0]))
    ends = {name for name in NAMES if exists(name, "10.16.1.11") and not exists(name, "11.0.0.114")}
    assert ends <= gone and "ILayer.precision" in ends


def test_nothing_has_other_names() -> None:
    own = {cls.__name__: {name for name in vars(cls) if not name.startswith("_")} for cls in CLASSES}
    for name, members in own.items():
        known = {entry.split(".")[1] for entry in NAMES if entry.startswith(f"{name}.")}
        assert members - {"trt", "machine"} <= known, name
    assert own.keys() <= TABLE.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_has_its_names_and_no_others(version: str) -> None:
    trt = tensorrt(version, Machine())
    trt.Severity = trt.ILogger.Severity
    for name in NAMES:
        cls, member = name.split(".")
        assert hasattr(getattr(trt, cls), member) == exists(name, version), name
    assert not hasattr(trt.BuilderFlag, "BF16")


class Loud:
    """Ways to go wrong, each with what comes of it."""

    def __init__(self, trt: Any, machine: Machine, onnx: Path) -> None:
        class Logger(trt.ILogger):
            def log(self, severity: Any, msg: str) -> None:
                self.heard = msg

        class Unready(Logger):
            def __init__(self) -> None:
                pass

        self.trt, self.machine, self.onnx, self.unready = trt, machine, onnx, Unready
        self.logger = Logger()
        self.builder = trt.Builder(self.logger)
        flags = trt.NetworkDefinitionCreationFlag
        self.network = self.builder.create_network(1 << int(flags.EXPLICIT_BATCH) if trt._major < 10 else 0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.parser.parse_from_file(str(onnx))
        self.config = self.builder.create_builder_config()

    def layer(self, kind: str) -> Any:
        layers = [self.network.get_layer(i) for i in range(self.network.num_layers)]
        return next(layer for layer in layers if layer.type.name == kind)

    def build(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)

    def context(self) -> Any:
        """A context, all of whose memory is there; the rest of what it needs is kept by this object."""
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(self.build())
        context = self.engine.create_execution_context()
        kinds = {"FLOAT": torch.float32, "INT32": torch.int32, "INT64": torch.int64}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.memory = {
            name: self.machine.allocate(
                tuple(context.get_tensor_shape(name)), kinds[self.engine.get_tensor_dtype(name).name]
            )
            for name in names
        }
        for name, tensor in self.memory.items():
            assert context.set_tensor_address(name, tensor.data_ptr())
        return context

    def execute(self, stream: int = 7001) -> None:
        with self.machine.on(self.machine.stream(torch.device("cpu"))):
            self.machine.current.wait_stream(self.machine.caller)
            assert self.context_.execute_async_v3(stream)


def late_flag(loud: Loud) -> None:
    loud.build()
    loud.config.set_flag(loud.trt.BuilderFlag.TF32)


def late_timings(loud: Loud) -> None:
    loud.build()
    loud.config.set_timing_cache(loud.config.create_timing_cache(b""), False)


def lost_timings(loud: Loud) -> None:
    loud.config.set_timing_cache(loud.config.create_timing_cache(b""), False)
    loud.build()


def lost_parser(loud: Loud) -> None:
    loud.parser = None
    loud.build()


def whole_number(loud: Loud) -> None:
    next(layer for layer in [loud.layer("TOPK")]).set_output_type(1, loud.trt.float32)
    assert loud.build() is None
    raise AssertionError(loud.logger.heard)


def cast(loud: Loud) -> None:
    loud.layer("CAST").set_output_type(0, loud.trt.float32)
    assert loud.build() is None
    raise AssertionError(loud.logger.heard)


def unheeded(loud: Loud) -> None:
    loud.layer("SOFTMAX").precision = loud.trt.float32
    loud.build()


def freed_memory(loud: Loud) -> None:
    loud.context_ = loud.context()
    del loud.memory["scores"]
    loud.execute()


def default_stream(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.execute(0)


def other_stream(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.execute(123)


def too_early(loud: Loud) -> None:
    loud.context_ = loud.context()
    with loud.machine.on(loud.machine.stream(torch.device("cpu"))):
        loud.context_.execute_async_v3(7001)


def lost_engine(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.engine = None


def lost_runtime(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.runtime = None


def no_memory(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.context_.set_tensor_address("scores", 4711)


def small_memory(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.small = loud.machine.allocate((1, 4), torch.float32)
    loud.context_.set_tensor_address("scores", loud.small.data_ptr())


def wrong_memory(loud: Loud) -> None:
    loud.context_ = loud.context()
    loud.wrong = loud.machine.allocate((1, 5), torch.float16)
    loud.context_.set_tensor_address("scores", loud.wrong.data_ptr())


def two_loggers(loud: Loud) -> None:
    loud.trt.Runtime(type(loud.logger)())


NOTED = {
    late_flag: "flag after the build",
    late_timings: "timing cache after the build",
    lost_timings: "timing cache is gone",
    lost_parser: "parser",
    unheeded: "will be ignored",
    freed_memory: "was freed",
    default_stream: "default stream",
    other_stream: "another stream",
    too_early: "before the caller's work",
    lost_engine: "engine is gone before its context",
    lost_runtime: "runtime is gone before its engine",
    no_memory: "no memory of the GPU",
    small_memory: r"memory for \(1, 4\)",
    wrong_memory: "memory of torch.float16",
    two_loggers: "second logger",
}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini") / "mini.onnx"
    write_mini(path)
    return path


@pytest.mark.parametrize("wrong", NOTED, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_wrongs_are_noted(wrong: Callable[[Loud], None], version: str, mini: Path) -> None:
    machine = Machine()
    wrong(Loud(tensorrt(version, machine), machine, mini))
    assert re.search(NOTED[wrong], "; ".join(machine.violations))


@pytest.mark.parametrize("wrong, message", [(whole_number, "output 1 is INT"), (cast, "type is what it is")])
def test_wrong_types_cannot_be_built(wrong: Callable[[Loud], None], message: str, mini: Path) -> None:
    machine = Machine()
    with pytest.raises(AssertionError, match=message):
        wrong(Loud(tensorrt("10.3.0", machine), machine, mini))


REFUSED = {
    "a logger that was not initialised": (lambda loud: loud.trt.Builder(loud.unready()), TypeError),
    "a flag for its number": (lambda loud: loud.builder.create_network(loud.trt.BuilderFlag.TF32), TypeError),
    "a path that is no string": (lambda loud: loud.parser.parse_from_file(loud.onnx), TypeError),
    "a number for a flag": (lambda loud: loud.config.set_flag(3), TypeError),
    "too many arguments": (lambda loud: loud.builder.create_builder_config(1), TypeError),
    "a shift of a flag": (lambda loud: 1 << loud.trt.BuilderFlag.TF32, TypeError),
    "a name of old": (lambda loud: setattr(loud.config, "max_workspace_size", 1), AttributeError),
    "a flag that is not there": (lambda loud: loud.trt.BuilderFlag.BF16, AttributeError),
    "a level that is text": (lambda loud: setattr(loud.config, "builder_optimization_level", "3"), TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken(name: str, mini: Path) -> None:
    machine = Machine()
    action, error = REFUSED[name]
    with pytest.raises(error):
        action(Loud(tensorrt("10.3.0", machine), machine, mini))


def test_done_right_nothing_is_noted(mini: Path) -> None:
    machine = Machine()
    loud = Loud(tensorrt("10.3.0", machine), machine, mini)
    loud.context_ = loud.context()
    loud.memory["images"].as_subclass(torch.Tensor).uniform_()
    loud.memory["sizes"].as_subclass(torch.Tensor).fill_(8)
    loud.execute()
    assert not machine.violations
    assert (loud.memory["scores"] > 0).all() and loud.memory["scores"].shape == (1, 5)
    loud.context_ = None
    loud.engine = None
    loud.runtime = None
    assert not machine.violations


def test_signatures_are_read_from_the_stand_in() -> None:
    """Every public method takes only what is named, so that a misspelt keyword is an error here as well."""
    for cls in CLASSES:
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                kinds = {p.kind for p in inspect.signature(member).parameters.values()}
                assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}, f"{cls.__name__}.{name}"
