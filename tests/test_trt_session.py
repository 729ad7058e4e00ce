"""Engines run as TensorRT wants it and give what ONNX Runtime gives, in every version; nothing here needs a GPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from fake_tensorrt import Builder, ICudaEngine, IExecutionContext, Machine, write_mini
from fake_tensorrt_names import VERSIONS
from torch import Tensor

from deimkit.deploy.trt.build import Built, build
from deimkit.deploy.trt.engine import TrtSession
from deimkit.deploy.trt.key import sidecar
from deimkit.deploy.trt.plan import Plan
from deimkit.errors import DeployError

DTYPES = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64}


class Bench:
    """A machine with an engine on it. run: as a user's program would, with work of its own queued before."""

    def __init__(
        self, folder: Path, monkeypatch: Any, version: str = "10.3.0", batch: int | None = 1, precision: str = "fp32"
    ) -> None:
        self.machine = Machine()
        self.trt = self.machine.install(monkeypatch, version)
        self.onnx = folder / "m.onnx"
        self.card = write_mini(self.onnx, precision, batch)
        self.built: Built = build(self.onnx, self.card, Plan(precision), device="cpu")
        self.runtime = onnxruntime.InferenceSession(str(self.onnx), providers=["CPUExecutionProvider"])

    def open(self, **how: Any) -> TrtSession:
        return TrtSession(self.built.path, device="cpu", **how)

    def run(self, session: TrtSession, batch: int = 1) -> dict[str, Tensor]:
        """What the session finds in random images; it has to be what ONNX Runtime finds."""
        images, sizes = torch.rand(batch, 3, 8, 8), torch.randint(8, 99, (batch, 2))
        self.machine.caller.queued += 1
        found = session.run(images, sizes)
        assert not self.machine.violations
        assert self.machine.current is self.machine.caller and self.machine.settled()
        expected = self.runtime.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        for (name, dtype), answer in zip(DTYPES.items(), expected, strict=True):
            assert found[name].dtype == dtype and found[name].shape == answer.shape
            torch.testing.assert_close(found[name].as_subclass(Tensor), torch.from_numpy(answer).to(dtype))
        return found

    def count(self, what: str) -> int:
        return sum(call.startswith(what) for call in self.machine.calls)


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("version", VERSIONS)
def test_runs_are_those_of_onnx_runtime(
    version: str, graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, version)
    with bench.open(graph=graph) as session:
        for _ in range(3):
            bench.run(session)
    assert bench.count("set_input_shape") == 2 and bench.count("set_tensor_address") == 5  # once, not for every run
    assert bench.count("execute") == (2 if graph else 3)  # the first run, and what the graph records
    assert session.device == torch.device("cpu") and session.card == bench.built.card
    assert session.name == f"TensorRT {version}, FP32{', CUDA graph' if graph else ''}, on Tesla T4"
    assert not bench.machine.violations


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "11.4.0.106"])
def test_any_number_of_images(version: str, graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, version, batch=None)
    with bench.open(graph=graph) as session:
        for batch in (8, 8, 8, 3, 3, 8, 1):
            bench.run(session, batch)
    assert bench.count("set_input_shape") == 2 * 4  # 8, 3, 8, 1
    assert not bench.machine.violations


@pytest.mark.parametrize(
    "version, precision", [("8.6.0", "fp16"), ("10.3.0", "int8"), ("10.16.1.11", "fp16"), ("11.0.0.114", "fp16")]
)
def test_precisions_run(version: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, version, precision=precision)
    with bench.open() as session:
        bench.run(session)


def test_too_many_images_are_refused_and_the_session_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, batch=None)
    with bench.open(graph=True) as session:
        bench.run(session, 2)
        with pytest.raises(DeployError, match=r"float32 \(1 to 8, 3, 8, 8\).*got float32 \(9, 3, 8, 8\)"):
            session.run(torch.rand(9, 3, 8, 8), torch.full((9, 2), 8))
        bench.run(session, 2)


def test_a_shape_that_tensorrt_does_not_take_is_told_and_the_session_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: IExecutionContext, name: str, shape: Any) -> bool:
        self._error("there is no room for it")
        return False

    bench = Bench(tmp_path, monkeypatch, batch=None)
    with bench.open() as session:
        bench.run(session, 2)
        with monkeypatch.context() as patch:
            patch.setattr(IExecutionContext, "set_input_shape", refuse)
            with pytest.raises(DeployError, match=r"built for 1 to 8 images at a time; got 3 \(.*no room for it"):
                session.run(torch.rand(3, 3, 8, 8), torch.full((3, 2), 8))
        bench.run(session, 3)


@pytest.mark.parametrize(
    "images, sizes, message",
    [
        (torch.rand(2, 3, 8, 8), torch.full((2, 2), 8), r"float32 \(1, 3, 8, 8\)"),
        (torch.rand(1, 3, 8, 9), torch.full((1, 2), 8), r"float32 \(1, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 2), 8), "got uint8"),
        (torch.rand(1, 3, 8, 8), torch.full((2,), 8), r"Expected sizes as int64 \(1, 2\).*got int64 \(2,\)"),
    ],
)
def test_wrong_inputs_are_refused_before_they_are_copied(
    images: Tensor, sizes: Tensor, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open() as session, pytest.raises(DeployError, match=message):
        session.run(images, sizes)
    assert bench.count("execute") == 0


# ----------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize(
    "machine, version, message",
    [
        (Machine("NVIDIA L4"), "10.3.0", "built for Tesla T4 .* here are NVIDIA L4 .*build it again"),
        (Machine(), "10.7.0", "TensorRT 10.3.0; here are Tesla T4 .* TensorRT 10.7.0"),
    ],
    ids=["another GPU", "another TensorRT"],
)
def test_engines_from_elsewhere_are_refused(
    machine: Machine, version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    machine.install(monkeypatch, version)
    with pytest.raises(DeployError, match=message):
        bench.open()


def test_another_driver_is_only_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    caplog.set_level(logging.WARNING)
    bench.open().close()
    assert "driver" not in caplog.text
    bench.machine = Machine(driver="570.1")
    bench.machine.install(monkeypatch, "10.3.0")
    with bench.open() as session:
        bench.run(session)
    assert "tuned with driver 550.54; here is 570.1" in caplog.text


def test_damaged_engines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.built.path.write_bytes(b"no engine")
    with pytest.raises(DeployError, match=f"cannot read {bench.built.path.name}: the plan is damaged"):
        bench.open()


def test_an_engine_with_the_papers_of_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    papers = sidecar(bench.built.path)
    papers.write_text(json.dumps(json.loads(papers.read_text()) | {"postprocess": False}))
    with pytest.raises(DeployError, match=r"has \['boxes', 'images', 'labels', 'scores', 'sizes'\], not what"):
        bench.open()


# ------------------------------------------------------------------------------------------------------- failures


def test_no_room_for_a_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda engine: engine._error("out of memory"))
    with pytest.raises(DeployError, match="No room on the GPU .*: out of memory"):
        bench.open()
    assert not bench.machine.violations


@pytest.mark.parametrize("method", ["execute_async_v3", "set_tensor_address"])
def test_what_tensorrt_refuses_is_told(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)

    def refuse(context: Any, *_: Any) -> bool:
        context._error("not today")
        return False

    with bench.open() as session:
        with monkeypatch.context() as patch:
            patch.setattr(IExecutionContext, method, refuse)
            with pytest.raises(DeployError, match="not today"):
                bench.run(session)
            assert bench.machine.settled()  # the caller may free the images all the same
        bench.run(session)


def test_shapes_that_cannot_be_inferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, batch=None)
    monkeypatch.setattr(IExecutionContext, "infer_shapes", lambda context: ["sizes"])
    with bench.open() as session, pytest.raises(DeployError, match="was built for 1 to 8"):
        bench.run(session)


def test_old_errors_are_not_taken_for_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.trt._logger.log(bench.trt.ILogger.Severity.ERROR, "long ago")
    monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda engine: None)
    with pytest.raises(DeployError, match="it gave no reason"):
        bench.open()
    bench.trt._logger.log(bench.trt.ILogger.Severity.ERROR, "long ago")
    monkeypatch.setattr(Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(DeployError, match="it gave no reason"):
        build(bench.onnx, bench.card, Plan(), device="cpu")


# ------------------------------------------------------------------------------------------------------- lifetimes


def test_close_waits_and_lets_go_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    session = bench.open(graph=True)
    found = bench.run(session)
    boxes = found["boxes"].clone()
    session.close()
    session.close()
    assert bench.machine.calls[-1] == "synchronize" and not bench.machine.violations
    assert torch.equal(found["boxes"], boxes)  # what was found outlives the session
    with pytest.raises(DeployError, match="is closed"):
        session.run(torch.rand(1, 3, 8, 8), torch.full((1, 2), 8))


def test_a_session_that_is_only_dropped_lets_go_in_order_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    session = bench.open()
    bench.run(session)
    del session
    assert not bench.machine.violations


def test_two_sessions_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with bench.open(graph=True) as one, bench.open() as other:
        for _ in range(2):
            bench.run(one)
            bench.run(other)
    assert len({stream.cuda_stream for stream in bench.machine.streams}) == len(bench.machine.streams) >= 2
