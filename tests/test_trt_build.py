"""Engines are built as the plan says, in every version, and say of themselves how; nothing here needs a GPU."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from fake_tensorrt import KINDS, TIMINGS, IBuilderConfig, Machine, write_mini
from fake_tensorrt_names import VERSIONS
from micro import ARCH

from deimkit.deploy.card import Card
from deimkit.deploy.onnx_file import write_onnx
from deimkit.deploy.trt.build import Built, build
from deimkit.deploy.trt.engine import TrtSession
from deimkit.deploy.trt.key import read, sidecar
from deimkit.deploy.trt.plan import SENSITIVE, Plan
from deimkit.errors import DeployError
from deimkit.models.detector import Detector

OLD = [version for version in VERSIONS if not version.startswith("11")]
Maker = Callable[..., Built]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    """A detector as the exporter writes it."""
    path = tmp_path_factory.mktemp("onnx") / "micro.onnx"
    return path, write_onnx(Detector(ARCH, 3).eval(), path, size=(64, 64))


def plan_of(machine: Machine) -> dict[str, Any]:
    assert not machine.violations
    return machine.plans[-1]


# ----------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_means_it(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, version)
    built = build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    plan = plan_of(machine)
    assert plan["flags"] == [] and plan["kept"] == [] and built.recipe == "FP32"
    assert plan["network"] == (["EXPLICIT_BATCH"] if version == "8.6.0" else [])
    assert plan["dtypes"]["labels"] == ("INT32" if version == "8.6.0" else "INT64")


@pytest.mark.parametrize("version", OLD)
def test_fp16_by_flag_keeps_what_is_sensitive(
    version: str, detector: tuple[Path, Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.install(monkeypatch, version)
    path, card = detector
    built = build(path, card, Plan("fp16"), out=tmp_path / "e.engine", device="cpu")
    plan = plan_of(machine)
    assert plan["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS", "TF32"]
    assert built.recipe == f"FP16 flag, {len(plan['kept'])} layers kept in FP32"
    assert built.card.precision == "fp16" and card.precision == "fp32"
    graph, kept = onnx.load(path).graph, set(plan["kept"])
    of_all, of_kept = (
        Counter(KINDS[node.op_type] for node in graph.node if whole or node.name in kept) for whole in (True, False)
    )
    everything = ("NORMALIZATION", "SOFTMAX", "TOPK", "GRID_SAMPLE")
    assert all(of_kept[kind] == of_all[kind] > 0 for kind in everything)
    assert of_kept["MATRIX_MULTIPLY"] == of_kept["CONVOLUTION"] == of_kept["CAST"] == of_kept["SHAPE"] == 0
    assert 0 < of_kept["ELEMENTWISE"] < of_all["ELEMENTWISE"] and of_kept["UNARY"] >= 5


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "11.4.0.106"])
def test_a_detector_is_built_and_run(
    version: str, detector: tuple[Path, Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.install(monkeypatch, version)
    path, card = detector
    images, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[480, 640]])
    with TrtSession(build(path, card, Plan(), tmp_path / "e.engine", "cpu").path, device="cpu", graph=True) as session:
        session.run(torch.rand(1, 3, 64, 64), sizes)
        found = session.run(images, sizes)
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores = runtime.run(["scores"], {"images": images.numpy(), "sizes": sizes.numpy()})[0]
    torch.testing.assert_close(found["scores"].as_subclass(torch.Tensor), torch.from_numpy(scores))
    assert found["boxes"].shape == (1, card.top, 4) and found["labels"].dtype == torch.int64 and not machine.violations


def test_the_way_from_the_last_products_to_boxes_and_samples_is_kept(
    detector: tuple[Path, Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    path, card = detector
    bare = Plan("fp16", keep=())
    build(path, card, bare, out=tmp_path / "e.engine", device="cpu")
    kept = plan_of(machine)["kept"]
    samples, boxes = "layers.0/cross_attn/sampling_offsets/Add", "refine/box.1/layers.2/Add"
    assert {f"/detector/decoder/{end}" for end in (samples, boxes, "refine/score.1/Add")} < {*kept}
    assert not [name for name in kept if "backbone" in name or "encoder" in name or "linear1" in name]
    build(path, card, replace(bare, ends=False), out=tmp_path / "e.engine", device="cpu")
    assert plan_of(machine)["kept"] == []


def test_more_can_be_kept_by_type_and_by_name(
    detector: tuple[Path, Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    path, card = detector
    build(path, card, Plan("fp16", keep=("CONVOLUTION", "gateway"), ends=False), tmp_path / "e.engine", "cpu")
    kept = plan_of(machine)["kept"]
    convolutions = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    assert {*convolutions} < {*kept}
    assert {name for name in kept if name not in convolutions} == {name for name in kept if "/gateway/" in name}


@pytest.mark.parametrize(
    "version, precision, flags, network",
    [
        ("8.6.0", "fp16", ["FP16", "TF32"], ["EXPLICIT_BATCH"]),
        ("10.0.1", "fp16", ["TF32"], ["STRONGLY_TYPED"]),
        ("10.16.1.11", "fp16", ["TF32"], ["STRONGLY_TYPED"]),
        ("11.0.0.114", "fp16", ["TF32"], []),
        ("11.4.0.106", "int8", ["TF32"], []),
        ("8.6.0", "int8", ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "TF32"], ["EXPLICIT_BATCH"]),
        ("10.3.0", "int8", ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "TF32"], []),
    ],
)
def test_precisions_that_stand_in_the_file(
    version: str, precision: str, flags: list[str], network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.install(monkeypatch, version)
    card = write_mini(tmp_path / "m.onnx", precision)
    built = build(tmp_path / "m.onnx", card, Plan(precision), device="cpu")
    plan = plan_of(machine)
    assert (plan["flags"], plan["network"]) == (flags, network)
    assert bool(plan["kept"]) == ("kept in FP32" in built.recipe) == (precision == "int8" and version in OLD)


def test_eleven_refuses_to_reach_fp16_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "11.4.0.106")
    with pytest.raises(DeployError, match="no FP16 flag any more"):
        build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan("fp16"), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


# ------------------------------------------------------------------------------------------------- plan and profile


def test_the_plan_reaches_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.7.0")
    card = write_mini(tmp_path / "m.onnx", batch=None)
    build(tmp_path / "m.onnx", card, Plan(workspace=2**30, level=5, batches=(2, 4, 16)), device="cpu")
    plan = plan_of(machine)
    assert plan["level"] == 5 and plan["pools"] == {"WORKSPACE": 2**30}
    assert plan["profile"] == {
        "images": [(2, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)],
        "sizes": [(2, 2), (4, 2), (16, 2)],
    }


def test_what_is_not_asked_for_is_left_to_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "8.6.0")
    build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    plan = plan_of(machine)
    assert (plan["level"], plan["pools"], plan["profile"]) == (3, {}, None)


# ------------------------------------------------------------------------------------------------------ timing cache


def test_a_second_build_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    card, plan = write_mini(tmp_path / "m.onnx"), Plan(timing_cache=tmp_path / "new" / "timings")
    build(tmp_path / "m.onnx", card, plan, device="cpu")
    first = machine.measured
    build(tmp_path / "m.onnx", card, plan, device="cpu")
    assert first > 20 and machine.measured == 0 and not machine.violations
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["timings"]


@pytest.mark.parametrize(
    "content",
    [b"garbage", TIMINGS + b'[["8.6.0", "Tesla T4"], []]', TIMINGS + b'[["10.3.0", "NVIDIA L4"], []]', TIMINGS],
)
def test_timings_of_no_use_are_replaced(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    path = tmp_path / "timings"
    path.write_bytes(content)
    card, plan = write_mini(tmp_path / "m.onnx"), Plan(timing_cache=path)
    build(tmp_path / "m.onnx", card, plan, device="cpu")
    assert "a new one is begun" in caplog.text and machine.measured > 20
    build(tmp_path / "m.onnx", card, plan, device="cpu")
    assert machine.measured == 0 and not machine.violations


# ------------------------------------------------------------------------------------------------------- failures


def test_what_the_parser_does_not_know_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    card = write_mini(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    for node in model.graph.node:
        node.op_type = {"Relu": "Elu", "Log": "Atan"}.get(node.op_type, node.op_type)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(DeployError, match=r"10.3.0 does not understand m.onnx: node \d+: no importer for Elu; node"):
        build(tmp_path / "m.onnx", card, Plan(), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    card = write_mini(tmp_path / "m.onnx", "fp16")  # half precision, of which the card knows nothing
    with pytest.raises(DeployError, match=r"could not build m.onnx \(FP32\): half precision is in the network"):
        build(tmp_path / "m.onnx", replace(card, precision="fp32"), Plan(), device="cpu")


def test_a_profile_that_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    card = write_mini(tmp_path / "m.onnx", batch=None)

    def refuse(config: Any, profile: Any) -> int:
        config._error("no such batch")
        return -1

    monkeypatch.setattr(IBuilderConfig, "add_optimization_profile", refuse)
    with pytest.raises(DeployError, match=r"no batches of 1 to 8 images: no such batch"):
        build(tmp_path / "m.onnx", card, Plan(), device="cpu")


def test_messages_reach_logging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = Machine().install(monkeypatch, "10.3.0")
    build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    caplog.set_level(logging.DEBUG)
    severity = trt.ILogger.Severity
    for kind in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING, severity.INFO, severity.VERBOSE):
        trt._logger.log(kind, kind.name)
    told = [(record.levelname, record.message) for record in caplog.records if record.name == "deimkit.tensorrt"]
    assert told == [
        ("CRITICAL", "INTERNAL_ERROR"),
        ("ERROR", "ERROR"),
        ("WARNING", "WARNING"),
        ("INFO", "INFO"),
        ("DEBUG", "VERBOSE"),
    ]
    assert list(trt._logger.errors) == ["INTERNAL_ERROR", "ERROR"]


# --------------------------------------------------------------------------------------------------- what is written


def test_an_engine_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine("NVIDIA GeForce RTX 4090 / Laptop").install(monkeypatch, "10.12.0.36")
    card = write_mini(tmp_path / "m.onnx", batch=None)
    built = build(tmp_path / "m.onnx", card, Plan("fp16"), device="cpu")
    start = "m_nvidia-geforce-rtx-4090-laptop_sm7.5_trt10.12.0.36_driver550.54_fp16-flag_b1-8_"
    assert built.path.name.startswith(start) and built.path.suffix == ".engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", built.path.name, sidecar(built.path).name]
    told = json.loads(sidecar(built.path).read_text())
    assert told["engine"]["recipe"] == built.recipe and told["engine"]["driver"] == "550.54"
    assert read(built.path) == (built.card, built.key, built.recipe)
    assert built.card == replace(card, precision="fp16", versions={"tensorrt": "10.12.0.36"})
    assert built.seconds > 0


def test_two_engines_share_a_name_only_if_they_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(
        plan: Plan | None = None, precision: str = "fp32", machine: Machine | None = None, version: str = "10.3.0"
    ) -> str:
        (machine or Machine()).install(monkeypatch, version)
        card = write_mini(tmp_path / "m.onnx", precision)
        return build(tmp_path / "m.onnx", card, plan or Plan(), device="cpu").path.name

    others = [
        name(Plan("fp16")),
        name(Plan("fp16", keep=(*SENSITIVE, "conv"))),
        name(Plan("fp16", ends=False)),
        name(Plan("fp16"), "fp16"),
        name(Plan(level=1)),
        name(Plan(workspace=2**28)),
        name(machine=Machine("NVIDIA L4")),
        name(machine=Machine(driver="570.1")),
        name(version="10.7.0"),
    ]
    again = [name(), name(Plan(timing_cache=tmp_path / "timings"))]
    assert len({*others, *again}) == len(others) + 1 and again[0] == again[1]


def test_an_unknown_driver_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(driver=None).install(monkeypatch, "10.3.0")
    built = build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    assert built.key.driver == "" and "_driver0_" in built.path.name


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda engine: sidecar(engine).unlink(), "json does not exist.*move the two together"),
        (lambda engine: engine.unlink(), "engine does not exist"),
        (lambda engine: sidecar(engine).write_text("{"), "does not say what its engine is"),
        (lambda engine: sidecar(engine).write_text("[]"), "does not say what its engine is"),
        (lambda engine: sidecar(engine).write_text('{"engine": {}}'), "does not say what its engine is"),
        (lambda engine: sidecar(engine).write_text('{"recipe": ""}'), "does not say what its engine is"),
    ],
)
def test_engines_without_papers_are_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine().install(monkeypatch, "10.3.0")
    built = build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    damage(built.path)
    with pytest.raises(DeployError, match=message):
        read(built.path)


def test_everything_a_build_made_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch, "10.3.0")
    build(tmp_path / "m.onnx", write_mini(tmp_path / "m.onnx"), Plan(), device="cpu")
    gc.collect()
    left = [type(thing).__name__ for thing in gc.get_objects() if getattr(type(thing), "machine", None) is machine]
    assert set(left) <= {"Listener"}
