"""Each thing that deimkit does right with TensorRT is noticed by a test if it is done wrong.

A mutation replaces a piece of the source of one module; the tests that are named with it have to fail then. As they
pass otherwise, it is the mutation that they notice.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import test_trt_build as built
import test_trt_plan as planned
import test_trt_session as run
from test_trt_build import detector  # noqa: F401 - a fixture

Check = Callable[..., None]


def case(check: Check, **values: Any) -> Check:
    """A test with one set of its parameters."""
    return partial(check, **values)


ONE = case(run.test_runs_are_those_of_onnx_runtime, version="10.3.0", graph=False)
GRAPH = case(run.test_runs_are_those_of_onnx_runtime, version="10.3.0", graph=True)
OLD = case(run.test_runs_are_those_of_onnx_runtime, version="8.6.0", graph=False)
MANY = case(run.test_any_number_of_images, version="10.3.0", graph=False)
MANY_GRAPHS = case(run.test_any_number_of_images, version="10.3.0", graph=True)
FP32 = case(built.test_fp32_means_it, version="10.3.0")
FP32_OLD = case(built.test_fp32_means_it, version="8.6.0")
FP16 = case(built.test_fp16_by_flag_keeps_what_is_sensitive, version="10.3.0")
ENDS = built.test_the_way_from_the_last_products_to_boxes_and_samples_is_kept
TYPED = case(
    built.test_precisions_that_stand_in_the_file,
    version="10.0.1",
    precision="fp16",
    flags=["TF32"],
    network=["STRONGLY_TYPED"],
)
AGAIN = built.test_a_second_build_measures_nothing
GARBAGE = case(built.test_timings_of_no_use_are_replaced, content=b"garbage")
OTHERS = case(built.test_timings_of_no_use_are_replaced, content=built.TIMINGS + b'[["10.3.0", "NVIDIA L4"], []]')
NAMES = built.test_two_engines_share_a_name_only_if_they_are_the_same
PLAN = built.test_the_plan_reaches_the_builder
CLOSE = run.test_close_waits_and_lets_go_in_order
NOT_RUN = case(run.test_what_tensorrt_refuses_is_told, method="execute_async_v3")
NO_ADDRESS = case(run.test_what_tensorrt_refuses_is_told, method="set_tensor_address")
WRONG_INPUTS = next(
    mark.args[1] for mark in run.test_wrong_inputs_are_refused_before_they_are_copied.pytestmark if mark.args
)
IMAGES, SIZES = (
    case(
        run.test_wrong_inputs_are_refused_before_they_are_copied,
        **dict(zip(("images", "sizes", "message"), row, strict=True)),
    )
    for row in (WRONG_INPUTS[1], WRONG_INPUTS[3])
)


def elsewhere(index: int) -> Check:
    rows = next(mark.args[1] for mark in run.test_engines_from_elsewhere_are_refused.pytestmark if mark.args)
    return case(
        run.test_engines_from_elsewhere_are_refused,
        **dict(zip(("machine", "version", "message"), rows[index], strict=True)),
    )


def useless(index: int) -> Check:
    rows = next(mark.args[1] for mark in planned.test_what_is_no_use_is_refused_with_a_remedy.pytestmark if mark.args)
    return case(
        planned.test_what_is_no_use_is_refused_with_a_remedy,
        **dict(zip(("found", "message"), rows[index], strict=True)),
    )


@dataclass(frozen=True)
class Mutation:
    """In a module, `old` becomes `new`, and perhaps more; `by` has to notice."""

    what: str
    module: str
    old: str
    new: str
    by: Check
    more: tuple[tuple[str, str], ...] = field(default=())


# pieces of the sources that several mutations change
BIND = "        self._bound = None\n        context = self._context\n"
BUFFERS = "{name: self._buffer(name) for name in (*self.card.inputs, *self.card.outputs)}"
OURS = "            with torch.cuda.stream(self.stream):\n                yield self.stream.cuda_stream\n"

MUTATIONS = [
    # ---- running
    Mutation(
        "set_input_shape is forgotten",
        "engine",
        "if not context.set_input_shape(name, (batch, *rest[name])):",
        "if name is None:",
        MANY,
    ),
    Mutation(
        "shapes are set for every run", "engine", "if bound is None or bound.batch != len(images):", "if True:", ONE
    ),
    Mutation(
        "shapes are set only once",
        "engine",
        "if bound is None or bound.batch != len(images):",
        "if bound is None:",
        MANY,
    ),
    Mutation(
        "the answer to set_input_shape is not read",
        "engine",
        "                self._refuse(batch)\n        if",
        "                pass\n        if",
        run.test_a_shape_that_tensorrt_does_not_take_is_told_and_the_session_lives_on,
    ),
    Mutation(
        "what infer_shapes lacks is not read",
        "engine",
        "if context.infer_shapes():",
        "if context.infer_shapes() is None:",
        run.test_shapes_that_cannot_be_inferred,
    ),
    Mutation(
        "addresses are set before shapes",
        "engine",
        BIND,
        f"{BIND}        early = {BUFFERS}\n"
        "        all(context.set_tensor_address(n, b.data_ptr()) for n, b in early.items())\n",
        MANY,
        (
            (
                f"        buffers = {BUFFERS}\n        for name, buffer in buffers",
                "        buffers = early\n        for name, buffer in {}",
            ),
        ),
    ),
    Mutation(
        "an output has no address",
        "engine",
        "for name, buffer in buffers.items():",
        "for name, buffer in list(buffers.items())[:-1]:",
        ONE,
    ),
    Mutation("memory is not kept", "engine", "buffer.data_ptr()", "self._buffer(name).data_ptr()", ONE),
    Mutation(
        "an input's memory is swapped for another",
        "engine",
        "bound.buffers[name].copy_(given)",
        "bound.buffers[name] = given.clone()",
        ONE,
    ),
    Mutation(
        "inputs are copied only once",
        "engine",
        "                bound.buffers[name].copy_(given)\n",
        "                bound.buffers[name].copy_(given) if bound.replay is None else None\n",
        GRAPH,
    ),
    Mutation(
        "the answer to set_tensor_address is not read",
        "engine",
        "if not context.set_tensor_address(name, buffer.data_ptr()):",
        "if context.set_tensor_address(name, buffer.data_ptr()) is None:",
        NO_ADDRESS,
    ),
    Mutation(
        "the answer to execute is not read",
        "engine",
        "if not self._context.execute_async_v3(stream):",
        "if self._context.execute_async_v3(stream) is None:",
        NOT_RUN,
    ),
    Mutation("the default stream is used", "engine", "execute_async_v3(stream)", "execute_async_v3(0)", ONE),
    Mutation(
        "the graph is recorded before the first run",
        "engine",
        "                self._enqueue(stream)\n                if self._graph:",
        "                self._graph or self._enqueue(stream)\n                if self._graph:",
        GRAPH,
    ),
    Mutation("the graph is recorded for every run", "engine", "if bound.replay is not None:", "if False:", GRAPH),
    Mutation(
        "the graph outlives its shapes",
        "engine",
        BIND,
        f"        old = self._bound and self._bound.replay\n{BIND}",
        MANY_GRAPHS,
        (("Bound(batch, buffers)", "Bound(batch, buffers, old)"),),
    ),
    Mutation(
        "labels keep TensorRT 8's type", "engine", 'x.to(torch.int64 if name == "labels" else torch.float32)', "x", OLD
    ),
    Mutation(
        "TensorRT 8's integers are taken for int64", "engine", '"INT32": torch.int32', '"INT32": torch.int64', OLD
    ),
    Mutation("images of any shape are taken", "engine", "        self.expect(images, sizes)\n", "", IMAGES),
    Mutation("sizes of any shape are taken", "engine", "        self.expect(images, sizes)\n", "", SIZES),
    # ---- opening and closing
    Mutation(
        "an engine that is None is used",
        "engine",
        "if self._engine is None:",
        "if False:",
        run.test_damaged_engines_are_refused,
    ),
    Mutation(
        "a context that is None is used",
        "engine",
        '        if self._context is None:\n            raise DeployError(f"No room',
        '        if False:\n            raise DeployError(f"No room',
        run.test_no_room_for_a_context,
    ),
    Mutation(
        "names are not compared",
        "engine",
        "if names != {*self.card.inputs, *self.card.outputs}:",
        "if False:",
        run.test_an_engine_with_the_papers_of_another_is_refused,
    ),
    Mutation(
        "where the engine is from is not asked",
        "engine",
        "        self.key.expect(self._trt, gpu, path.name)\n",
        "",
        elsewhere(0),
    ),
    Mutation("close does not wait", "engine", "        self._cuda.finish()\n", "", CLOSE),
    Mutation(
        "a closed session runs",
        "engine",
        "        self.closed = True\n",
        "",
        CLOSE,
    ),
    Mutation(
        "the runtime is let go first",
        "engine",
        "        self._context = None\n        self._engine = None\n        self._runtime = None\n",
        "        self._runtime = None\n        self._engine = None\n        self._context = None\n",
        CLOSE,
    ),
    Mutation(
        "the engine is let go before the context",
        "engine",
        "        self._context = None\n        self._engine = None\n",
        "        self._engine = None\n        self._context = None\n",
        CLOSE,
    ),
    Mutation(
        "old errors are told as new",
        "engine",
        "        complaint(self._trt)  # what came before is not this engine's\n",
        "",
        run.test_old_errors_are_not_taken_for_new_ones,
    ),
    # ---- streams
    Mutation("our stream does not wait for the caller's", "cuda", "        self.stream.wait_stream(caller)\n", "", ONE),
    Mutation(
        "the caller's stream does not wait for ours",
        "cuda",
        "            caller.wait_stream(self.stream)\n",
        "            pass\n",
        ONE,
    ),
    Mutation(
        "it waits only if nothing went wrong",
        "cuda",
        f"        try:\n{OURS}        finally:\n            caller.wait_stream(self.stream)\n",
        f"        if True:\n{OURS}            caller.wait_stream(self.stream)\n",
        NOT_RUN,
    ),
    Mutation("the handle is not our stream's", "cuda", "yield self.stream.cuda_stream", "yield 1", ONE),
    Mutation(
        "inputs are copied on the caller's stream",
        "cuda",
        "with torch.cuda.stream(self.stream):",
        "with self.current():",
        ONE,
    ),
    Mutation("what was recorded is not queued again", "cuda", "return graph.replay", "return lambda: None", GRAPH),
    # ---- building
    Mutation("TF32 stays on", "build", "for name in way.off:", "for name in ():", FP32),
    Mutation("flags are not set", "build", "for name in way.on:", "for name in ():", FP16),
    Mutation(
        "network flags are not set, 8", "build", "bits(trt.NetworkDefinitionCreationFlag, way.network)", "0", FP32_OLD
    ),
    Mutation(
        "network flags are not set, 10", "build", "bits(trt.NetworkDefinitionCreationFlag, way.network)", "0", TYPED
    ),
    Mutation(
        "a flag's number is taken for its bit",
        "build",
        "1 << int(getattr(flags, name))",
        "int(getattr(flags, name))",
        TYPED,
    ),
    Mutation("layers are not pinned", "build", "if way.pins else 0", "if way is None else 0", FP16),
    Mutation(
        "the answer of the parser is not read",
        "build",
        "if parser.parse_from_file(str(onnx)):",
        "if parser.parse_from_file(str(onnx)) is not None:",
        built.test_what_the_parser_does_not_know_is_told,
    ),
    Mutation("the parser is given a Path", "build", "parse_from_file(str(onnx))", "parse_from_file(onnx)", FP32),
    Mutation(
        "the parser is let go before the build",
        "build",
        "    parse(trt, parser, onnx)\n",
        "    parse(trt, parser, onnx)\n    del parser\n",
        FP32,
    ),
    Mutation(
        "an engine that is None is written",
        "build",
        "if engine is None:",
        "if False:",
        built.test_a_build_that_fails_says_why,
    ),
    Mutation(
        "there is no profile",
        "build",
        "    if card.batch is None:\n        add_profile",
        "    if False:\n        add_profile",
        MANY,
    ),
    Mutation(
        "sizes are left out of the profile", "build", "for name in card.inputs:", "for name in card.inputs[:1]:", MANY
    ),
    Mutation(
        "a profile that is not taken passes",
        "build",
        "config.add_optimization_profile(profile) < 0",
        "config.add_optimization_profile(profile) is None",
        built.test_a_profile_that_is_not_taken,
    ),
    Mutation(
        "timings are not kept",
        "build",
        "    with written_whole(path) as file:\n        file.write_bytes(bytes(config",
        "    with written_whole(path.with_name('x')) as file:\n        file.write_bytes(bytes(config",
        AGAIN,
    ),
    Mutation("timings are kept, but not used", "build", 'path.read_bytes() if path.is_file() else b""', 'b""', AGAIN),
    Mutation(
        "the timing cache dies before the build",
        "build",
        "    yield  # `cache` has",
        "    del cache\n    yield  # `cache` has",
        AGAIN,
    ),
    Mutation(
        "timings of another GPU are taken",
        "build",
        "not config.set_timing_cache(cache, False):",
        "not config.set_timing_cache(cache, True):",
        OTHERS,
    ),
    Mutation("damaged timings are used", "build", "cache is None or not", "not", GARBAGE),
    Mutation(
        "the new timing cache is not set",
        "build",
        "        config.set_timing_cache(cache, False)\n    yield",
        "    yield",
        GARBAGE,
    ),
    Mutation(
        "workspace is forgotten",
        "build",
        "        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)",
        "        pass",
        PLAN,
    ),
    Mutation(
        "workspace is set the old way",
        "build",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)",
        "config.max_workspace_size = plan.workspace",
        PLAN,
    ),
    Mutation(
        "level is forgotten", "build", "        config.builder_optimization_level = plan.level", "        pass", PLAN
    ),
    Mutation(
        "the card tells the file's precision",
        "build",
        "card = replace(card, precision=plan.precision, ",
        "card = replace(card, ",
        FP16,
    ),
    Mutation(
        "old errors are told as the build's",
        "build",
        "    complaint(trt)  # what came before is not this build's\n",
        "",
        run.test_old_errors_are_not_taken_for_new_ones,
    ),
    Mutation(
        "a second logger is made",
        "build",
        "trt.OnnxParser(network, listener(trt))",
        "trt.OnnxParser(network, listener.__wrapped__(trt))",
        FP32,
    ),
    # ---- logging
    Mutation("the logger is not initialised", "logger", "base.__init__(self)", "object.__init__(self)", FP32),
    Mutation(
        "errors are not remembered",
        "logger",
        "if level >= logging.ERROR:",
        "if False:",
        built.test_a_build_that_fails_says_why,
    ),
    # ---- precisions
    Mutation("casts are pinned", "precision", 'GIVEN = {"CAST", ', "GIVEN = {", FP16),
    Mutation("whole numbers are pinned", "precision", " and first.dtype == trt.float32", "", FP16),
    Mutation("indices become FP32", "precision", "if layer.get_output(i).dtype == trt.float32:", "if True:", FP16),
    Mutation("precisions are counted, but not set", "precision", "        layer.precision = trt.float32\n", "", FP16),
    Mutation("types of layers do not count", "precision", "layer.type.name in keep or ", "", FP16),
    Mutation(
        "names of layers do not count",
        "precision",
        "layer.type.name in keep or any(part in layer.name.lower() for part in keep if part.islower())",
        "layer.type.name in keep",
        built.test_more_can_be_kept_by_type_and_by_name,
    ),
    Mutation(
        "products of matrices are pinned",
        "precision",
        "layer is not None and layer.type.name not in PRODUCTS",
        "layer is not None",
        FP16,
    ),
    Mutation(
        "sampling is not walked back from", "precision", 'if layer.type.name == "GRID_SAMPLE"', "if layer is None", ENDS
    ),
    Mutation(
        "outputs are not walked back from", "precision", "for i in range(network.num_outputs)]", "for i in ()]", ENDS
    ),
    Mutation("inputs that are left out are walked to", "precision", "tensor is None or ", "", ENDS),
    Mutation("shapes are walked through", "precision", "tensor.dtype != trt.float32 or ", "", ENDS),
    Mutation(
        "11 is taken for 10", "precision", "10: 10}", "10: 10, 11: 10}", built.test_eleven_refuses_to_reach_fp16_by_flag
    ),
    # ---- names and papers
    Mutation(
        "the GPU is not compared",
        "key",
        "here = (gpu.name, gpu.capability,",
        "here = (self.gpu, gpu.capability,",
        elsewhere(0),
    ),
    Mutation(
        "the version is not compared",
        "key",
        "gpu.capability, trt.__version__)",
        "gpu.capability, self.tensorrt)",
        elsewhere(1),
    ),
    Mutation(
        "another driver is not remarked on",
        "key",
        "gpu.driver != self.driver:",
        "False:",
        run.test_another_driver_is_only_remarked_on,
    ),
    Mutation("the plan is not in the name", "key", " + repr(told).encode()", "", NAMES),
    Mutation("the driver is not in the name", "key", 'driver=gpu.driver or ""', 'driver=""', NAMES),
    # ---- finding TensorRT
    Mutation(
        "the GPU is asked for last",
        "library",
        "if not torch.cuda.is_available():",
        'if importlib.import_module("tensorrt") is None:',
        case(planned.test_without_a_gpu_tensorrt_is_not_even_imported, ask=planned.library.tensorrt),
    ),
    Mutation("a placeholder is taken", "library", 'if not hasattr(module, "Builder"):', "if False:", useless(1)),
    Mutation("8.5 is taken", "library", "if version(module) < OLDEST:", "if False:", useless(3)),
]


def parts(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """The functions and methods of a module, by name; what decorators wrapped is unwrapped."""
    for name, thing in vars(module).items():
        inside = (
            vars(thing).items() if inspect.isclass(thing) and thing.__module__ == module.__name__ else [("", thing)]
        )
        for inner, member in inside:
            if callable(member):
                function = inspect.unwrap(member)
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    yield f"{name}.{inner}", function


def mutate(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module do what the mutated source says, wherever its functions have been imported to."""
    module = importlib.import_module(f"deimkit.deploy.trt.{mutation.module}")
    source = inspect.getsource(module)
    for old, new in ((mutation.old, mutation.new), *mutation.more):
        assert source.count(old) == 1, f"{mutation.module}.py has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    changed = ModuleType(module.__name__)
    exec(compile(source, f"{mutation.module}.py", "exec", dont_inherit=True), vars(changed))  # noqa: S102
    there, swapped = dict(parts(module)), 0
    for name, function in parts(changed):
        if meaning(function.__code__) != meaning(there[name].__code__):
            monkeypatch.setattr(there[name], "__code__", function.__code__)
            swapped += 1
    for name, value in vars(changed).items():
        if name.isupper() and value != getattr(module, name):
            monkeypatch.setattr(module, name, value)
            swapped += 1
    assert swapped, "the mutation changes nothing"


def meaning(code: CodeType) -> tuple[Any, ...]:
    """What code does, without where it stands: line numbers differ below a mutation."""
    inner = tuple(meaning(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts)
    return code.co_code, code.co_names, inner


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.module}: {mutation.what}")
def test_mutations_are_noticed(
    mutation: Mutation, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = inspect.signature(mutation.by).parameters.values()
    fixtures = {p.name: request.getfixturevalue(p.name) for p in wanted if p.default is inspect.Parameter.empty}
    mutate(mutation, monkeypatch)
    with pytest.raises(BaseException) as noticed:  # noqa: B017 - a failed assertion, or whatever the mistake leads to
        mutation.by(**fixtures)
    assert not isinstance(noticed.value, (KeyboardInterrupt, SystemExit))
