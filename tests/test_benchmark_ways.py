"""What `deimkit bench` measures: in which ways, on which device and threads, and what becomes of ways that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deimkit as dk
from deimkit import recipes, shipping
from deimkit.__main__ import main
from deimkit.deploy.bench import lineup
from deimkit.deploy.bench.latency import place_for
from deimkit.deploy.bench.timing import Method
from deimkit.errors import DeployError
from deimkit.models.detector import Detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return dk.build("tiny", 3).eval()


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call each is enough to see who takes part."""
    monkeypatch.setattr(shipping, "USUAL", Method(rounds=1, pause=0.0, warmup=0.0, patience=0.0))


# ---------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `open_session` is asked for."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(shipping, "open_session", lambda *given: asked.append(given))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    return asked


@pytest.mark.parametrize(
    ("name", "device", "given"),
    [
        ("m.onnx", "cpu", ("cpu", 7)),
        ("m.onnx", "cuda:1", ("cuda:1", 7)),
        ("m.xml", "cpu", (None, 7)),
        ("m.XML", "cuda", (None, 7)),
        ("m.engine", "cuda", ("cuda", 7)),
        ("m.engine", "cuda:1", ("cuda:1", 7)),
    ],
)
def test_a_file_is_opened_where_it_was_asked_for(
    opened: list[tuple[Any, ...]], name: str, device: str, given: tuple[Any, ...]
) -> None:
    shipping._opened(Path(name), torch.device(device))
    assert opened == [(Path(name), None, *given)]


def test_an_engine_is_for_a_gpu(opened: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DeployError, match="CUDA device for m.engine.*got cpu. Use device='cuda'"):
        shipping._opened(Path("m.engine"), torch.device("cpu"))
    assert opened == []


# --------------------------------------------------------------------------------------------------- ways that fail


def names(report: dk.deploy.bench.latency.Report) -> list[str]:
    return [result.name.split(" on ")[0] for result in report.results]


def test_a_runtime_that_is_missing_stands_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup, "find_spec", lambda name: None)
    report = dk.bench("tiny", device="cpu", size=64, seconds=0.01, progress=False)
    assert report.remarks == ("tiny, OpenVINO, fp32: left out, OpenVINO is not installed: pip install openvino.",)
    assert report.to_dict()["remarks"] == list(report.remarks) and report.remarks[0] in str(report)
    assert any(name.startswith("ONNX Runtime") for name in names(report))


def test_no_compiler_leaves_the_other_ways(monkeypatch: pytest.MonkeyPatch, detector: Detector) -> None:
    class Broken(lineup.TorchSession):
        def run(self, images: torch.Tensor, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
            if "compiled" in self.name:
                raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)
            return super().run(images, sizes)

    monkeypatch.setattr(lineup, "TorchSession", Broken)
    report = dk.bench(detector, device="cpu", size=64, compile=True, seconds=0.01, progress=False)
    assert not any("compiled" in name for name in names(report)) and len(report.results) >= 3
    assert any("compiled" in remark and "BackendCompilerFailed" in remark for remark in report.remarks)


def test_no_memory_for_a_way_leaves_the_others(monkeypatch: pytest.MonkeyPatch, detector: Detector) -> None:
    def full(*given: Any, deployed: bool = True, **how: Any) -> Any:
        if deployed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager(*given, deployed=deployed, **how)

    eager, remarks = lineup.TorchSession, []
    monkeypatch.setattr(lineup, "TorchSession", full)
    found = lineup.Lineup(detector, Path())._by_torch("fp32", True, remarks.append)
    assert len(found) == 1 and "eager" in found[0].name
    assert remarks == ["detector, fp32, PyTorch: left out, OutOfMemoryError: CUDA out of memory"]


# ------------------------------------------------------------------------------------------------- files and papers


def test_a_file_is_compared_with_its_detector(tmp_path: Path) -> None:
    file = dk.export("tiny", tmp_path / "tiny.onnx", size=64, progress=False).path
    report = dk.bench(file, "tiny", device="cpu", size=64, seconds=0.01, progress=False)
    of_file = report.results[0]
    assert of_file.source == "tiny.onnx" and "eager" in report.baseline(of_file).name
    assert of_file.doubt == shipping.UNTOLD and report.results[1].doubt == ""


def test_a_detector_that_kept_only_the_name_is_doubted() -> None:
    recipe = recipes.get("tiny")
    changed = replace(recipe, arch=replace(recipe.arch, queries=replace(recipe.arch.queries, count=50)))
    assert shipping._doubt(dk.build(recipe), "tiny") == shipping._doubt(dk.build(changed), "own") == ""
    assert shipping._doubt(dk.build(changed), "tiny") == "its architecture is another than that of the recipe tiny"


# ------------------------------------------------------------------------------------------------------ where to


def test_a_place_is_made_ready(tmp_path: Path) -> None:
    assert place_for(tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("arguments", [["tiny"], ["--self-test"]])
def test_a_place_that_takes_no_file_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured all the same")

    monkeypatch.setattr(dk, "bench", never)
    monkeypatch.setattr(shipping, "can_bench", never)
    (tmp_path / "file").write_text("")
    assert main(["bench", *arguments, "--to", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    assert main(["bench", *arguments, "--to", str(tmp_path / "file" / "b.json")]) == 1
    assert "Expected a file that can be written" in capsys.readouterr().err
