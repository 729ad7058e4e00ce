"""TensorRT is found or politely missed, a plan makes sense, and every precision has its way in every version."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_tensorrt import Machine, tensorrt
from fake_tensorrt_names import VERSIONS, exists

from deimkit.data.split import CategoryMap
from deimkit.deploy.card import Card
from deimkit.deploy.trt import library
from deimkit.deploy.trt.build import build
from deimkit.deploy.trt.engine import TrtSession
from deimkit.deploy.trt.plan import Plan
from deimkit.deploy.trt.precision import ROUTES, route
from deimkit.errors import DeployError

CARD = Card("", CategoryMap.of(2), (8, 8), 1)
HERE = not torch.cuda.is_available()


def module(name: str = "tensorrt", **members: Any) -> ModuleType:
    found = ModuleType(name)
    vars(found).update(members)
    return found


# ------------------------------------------------------------------------------------------------- this machine


@pytest.mark.skipif(not HERE, reason="this machine has a GPU")
@pytest.mark.parametrize("ask", [library.tensorrt, lambda: build(Path("x"), CARD, Plan()), lambda: TrtSession("x")])
def test_without_a_gpu_tensorrt_is_not_even_imported(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib, "import_module", lambda name: pytest.fail("it would end the process"))
    with pytest.raises(DeployError, match="needs an NVIDIA GPU.*ONNX Runtime or OpenVINO"):
        ask()


def test_importing_these_modules_imports_no_tensorrt_and_asks_for_no_gpu() -> None:
    names = ["build", "cuda", "engine", "key", "library", "logger", "plan", "precision"]
    code = (
        "import sys, torch\n"
        "torch.cuda.is_available = torch.cuda._lazy_init = lambda: sys.exit('asked for a GPU')\n"
        + "".join(f"import deimkit.deploy.trt.{name}\n" for name in names)
        + "assert 'tensorrt' not in sys.modules and 'onnx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "found, message",
    [
        (None, "cannot be imported here.*install NVIDIA's `tensorrt-cu"),
        (module(__version__="99.0.0"), r"\(99.0.0\) is an empty placeholder"),
        (module(), r"\(no version\) is an empty placeholder"),
        (module(__version__="8.5.3.1", Builder=object), "8.6 or newer; got 8.5.3.1"),
    ],
    ids=["missing", "placeholder", "nameless", "old"],
)
def test_what_is_no_use_is_refused_with_a_remedy(
    found: ModuleType | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    with pytest.raises(DeployError, match=message):
        library.tensorrt()


@pytest.mark.parametrize("cuda, package", [("12.8", "tensorrt-cu12"), ("13.2", "tensorrt-cu13"), (None, "tensorrt-cu")])
def test_the_remedy_is_for_the_cuda_of_torch(cuda: str | None, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert package in library.remedy()


@pytest.mark.parametrize(
    "text, numbers",
    [("8.6.1", (8, 6, 1)), ("10.12.0.36", (10, 12, 0)), ("11.4.0.106", (11, 4, 0)), ("10.0.0b6", (10, 0, 0))],
)
def test_version(text: str, numbers: tuple[int, int, int]) -> None:
    assert library.version(module(__version__=text)) == numbers


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_from_8_6_on_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = Machine().install(monkeypatch, version)
    assert library.tensorrt() is trt


# --------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"precision": "half"}, "fp32, fp16, int8; got 'half'"),
        ({"batches": (0, 1, 2)}, "at least one"),
        ({"batches": (1, 4, 2)}, "rising"),
        ({"level": 6}, "got 6"),
        ({"level": -1}, "got -1"),
        ({"workspace": 0}, "got 0"),
    ],
)
def test_plans_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=message):
        Plan(**wrong)


# ---------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize(
    "version, precision, graph, name",
    [
        ("8.6.0", "fp32", "fp32", "fp32"),
        ("8.6.0", "fp16", "fp32", "fp16-flag"),
        ("8.6.0", "fp16", "fp16", "fp16-types"),
        ("8.6.0", "int8", "int8", "int8-qdq"),
        ("9.3.0", "fp16", "fp32", "fp16-flag"),
        ("10.0.1", "fp16", "fp32", "fp16-flag"),
        ("10.16.1.11", "fp16", "fp16", "fp16-typed"),
        ("10.3.0", "int8", "int8", "int8-qdq"),
        ("11.0.0.114", "fp32", "fp32", "fp32"),
        ("11.4.0.106", "fp16", "fp16", "fp16-typed"),
        ("11.4.0.106", "int8", "int8", "int8-typed"),
        ("12.0.0", "fp16", "fp16", "fp16-typed"),
    ],
)
def test_routes(version: str, precision: str, graph: str, name: str) -> None:
    found = route(module(__version__=version), Plan(precision), replace(CARD, precision=graph))
    assert found.name == name
    assert found.recipe(37) == (f"{found.words}, 37 layers kept in FP32" if found.pins else found.words)


@pytest.mark.parametrize(
    "version, precision, graph, message",
    [
        ("11.0.0.114", "fp16", "fp32", "no FP16 flag any more.*anew with `deimkit export .* --precision fp16`"),
        ("10.3.0", "fp32", "fp16", "--precision fp32"),
        ("10.3.0", "int8", "fp32", "engine of an ONNX file in fp32.*--precision int8"),
        ("8.6.0", "fp16", "int8", "--precision fp16"),
        ("11.4.0.106", "int8", "fp16", "--precision int8"),
    ],
)
def test_ways_that_do_not_exist(version: str, precision: str, graph: str, message: str) -> None:
    with pytest.raises(DeployError, match=message):
        route(module(__version__=version), Plan(precision), replace(CARD, precision=graph))


@pytest.mark.parametrize("version", VERSIONS)
def test_routes_name_only_flags_that_the_version_has(version: str) -> None:
    major = int(version.partition(".")[0])
    ways = [way for (of, _, _), way in ROUTES.items() if of == major]
    flags = {f"BuilderFlag.{flag}" for way in ways for flag in way.on + way.off}
    flags |= {f"NetworkDefinitionCreationFlag.{flag}" for way in ways for flag in way.network}
    assert len(ways) >= 3 and flags and all(exists(flag, version) for flag in flags)
    trt = tensorrt(version, Machine())
    assert all(hasattr(getattr(trt, cls), name) for cls, name in (flag.split(".") for flag in flags))
    assert not any(way.pins for way in ways) or exists("ILayer.precision", version)
