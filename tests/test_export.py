"""From a detector to a file and back: what the file says of itself, what runtimes make of it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import deimkit as dk
from deimkit.__main__ import main
from deimkit.api import load_detector
from deimkit.data.split import CategoryMap
from deimkit.deploy import ort
from deimkit.deploy.card import Card
from deimkit.deploy.eager import TorchSession
from deimkit.deploy.export import _calibration, export_detector, parity_file, put
from deimkit.deploy.onnx_file import read_card, write_onnx
from deimkit.deploy.open_file import open_session
from deimkit.deploy.parity import spread
from deimkit.deploy.quantize import write_int8
from deimkit.deploy.served import Served
from deimkit.deploy.session import Session
from deimkit.errors import CheckpointError, DeimkitError, DeployError
from deimkit.evaluation.measure import detect
from deimkit.models.detector import Detector
from deimkit.models.hgnetv2 import Stem
from deimkit.shipping import _not_usual
from tests.filling import fill
from tests.micro import ARCH, scenes, trainer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ("disc", "ring", "triangle", "square", "star", "cross", "gear", "moon")
GAPPY = CategoryMap(ids=(90, 3, 17, 44, 1, 7, 8, 9), names=NAMES)
ANY_SIZE = [(48, 40), (100, 30), (64, 64)]  # height and width of the pictures that are predicted on


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A micro detector whose dataset counts its categories with gaps and out of order."""
    model = Detector(ARCH, GAPPY)
    fill(model)
    model.size = (64, 96)
    return model.eval()


@pytest.fixture(scope="module")
def files(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same detector in four ONNX files."""
    folder = tmp_path_factory.mktemp("exported")
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"batch": 2},
        "any": {"batch": None, "opset": 18},
        "raw": {"batch": None, "postprocess": False},
    }
    for name, how in ways.items():
        write_onnx(detector, folder / f"{name}.onnx", recipe="micro", **how)
    return {name: folder / f"{name}.onnx" for name in ways}


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ANY_SIZE]


# ---------------------------------------------------------------------------------------------- what a file says
def test_a_card_survives_json() -> None:
    card = Card("micro", GAPPY, (64, 96), None, postprocess=False, top=12, precision="int8", versions={"torch": "2"})
    assert Card.from_json(card.to_json()) == card and card.outputs == ("logits", "boxes") and card.inputs == ("images",)
    assert replace(card, postprocess=True).outputs == ("boxes", "scores", "labels")


@pytest.mark.parametrize("text", ["nothing", "[1]", '{"recipe": "micro"}', '{"size": [1]}'])
def test_what_is_no_card_is_refused(text: str) -> None:
    with pytest.raises(DeployError, match="description"):
        Card.from_json(text)


def test_a_file_says_what_it_is(detector: Detector, files: dict[str, Path]) -> None:
    card = read_card(files["any"])
    assert card.categories == GAPPY and card.size == (64, 96) and card.batch is None and card.recipe == "micro"
    assert card.top == 160 == 20 * len(GAPPY), "of 20 queries and 8 classes no more pairs than these"
    model = onnx.load(str(files["any"]))
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["names"].startswith("disc, ring, triangle") and "64 x 96" in told["input_size"]
    assert "255" in told["normalisation"] and told["recipe"] == "micro"
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [card.opset] == [18]
    shapes = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output]
    assert shapes == [["batch", 160, 4], ["batch", 160], ["batch", 160]]
    assert read_card(files["one"]).opset == 17 and read_card(files["raw"]).top == 160


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an old opset": ({"opset": 16}, "at least 17; got 16.*LayerNormalization"),
    "a new exporter for an old opset": ({"opset": 17, "exporter": "dynamo"}, "opset 18 and later; got 17"),
    "fp16 by the old exporter": ({"precision": "fp16", "exporter": "torchscript"}, "no runtime opens the file"),
    "an exporter of another name": ({"exporter": "jit"}, "exporter is one of torchscript, dynamo; got 'jit'"),
    "a precision of another name": ({"precision": "half"}, "precision is one of fp32, fp16; got 'half'"),
    "a size between cells": ({"size": (64, 100)}, "multiples of 32; got 64 x 100"),
    "no image": ({"batch": 0}, "at least 1, or None"),
}


def test_no_path_of_this_machine_is_in_a_file(files: dict[str, Path]) -> None:
    here = str(Path(dk.__file__).parent).encode()
    assert not [name for name, path in files.items() if here in path.read_bytes() or b".py" in path.read_bytes()]


@pytest.mark.parametrize(("how", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exported_is_refused(
    detector: Detector, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(DeployError, match=message):
        write_onnx(detector, tmp_path / "new.onnx", **how)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_file_that_was_there(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.onnx"
    path.write_text("old")

    def fails(*args: Any, **how: Any) -> None:
        print("at node\n Softmax_12")
        raise RuntimeError("No Adapter To Version $17\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    said = r"torchscript \(RuntimeError: No Adapter .*\$17\). It said last: at node Softmax_12\. Try exporter='dynamo'"
    with pytest.raises(DeployError, match=said):
        write_onnx(detector, path)
    for how in ({"opset": 17}, {"precision": "fp16"}):
        with pytest.raises(DeployError, match="Try another version of torch"):
            write_onnx(detector, path, **how)

    def full(*args: Any, **how: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="No space left"):
        write_onnx(detector, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_opset_that_torch_did_not_write_is_refused(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **how: export(*a, **how | {"opset_version": 18}))
    with pytest.raises(DeployError, match="Asked for opset 17, and torch .* wrote 18"):
        write_onnx(detector, tmp_path / "new.onnx")
    assert not list(tmp_path.iterdir())


def test_a_detector_is_left_as_it_is(detector: Detector, tmp_path: Path) -> None:
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    detector.train()
    write_onnx(detector, tmp_path / "m.onnx", postprocess=False)
    assert detector.training and all(p.requires_grad for p in detector.parameters())
    detector.eval()
    for name, x in detector.state_dict().items():
        assert_close(x, before[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # of torch's exporters, about themselves
@pytest.mark.parametrize("opset", [17, 18])
def test_no_runtime_gets_the_border_of_the_stem_wrong(tmp_path: Path, opset: int) -> None:
    """Zeros around negative numbers, which the affine blocks make, are not what a max pooling pads with."""
    stem = Stem(4, 8, lab=True).eval()
    fill(stem)
    with torch.no_grad():
        stem.stem1.lab.bias.fill_(-3.0)  # type: ignore[union-attr]
    images = torch.randn(1, 3, 32, 32)
    where, dynamo = str(tmp_path / "stem.onnx"), opset > 17
    how: dict[str, Any] = {"external_data": False, "verbose": False} if dynamo else {}
    torch.onnx.export(stem, (images,), where, input_names=["x"], opset_version=opset, dynamo=dynamo, **how)
    found = onnxruntime.InferenceSession(where, providers=["CPUExecutionProvider"]).run(None, {"x": images.numpy()})[0]
    with torch.no_grad():
        assert_close(torch.from_numpy(found), stem(images), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- what runtimes say
def sessions(files: dict[str, Path], detector: Detector) -> list[Session]:
    found: list[Session] = [open_session(path, threads=1) for path in files.values()]
    found += [TorchSession(detector), TorchSession(detector, postprocess=False, deployed=False)]
    return found


def test_every_runtime_predicts_the_same_ids_names_and_boxes(detector: Detector, files: dict[str, Path]) -> None:
    shown = pictures()
    expected: Any = detector.predict(shown, threshold=0.3)
    assert sum(map(len, expected)) > 10 and {i for found in expected for i in found.ids} <= set(GAPPY.ids)
    for session in sessions(files, detector):
        with session:
            found: Any = Served(session).predict(shown, threshold=0.3)
        for ours, theirs in zip(expected, found, strict=True):
            assert theirs.ids == ours.ids and theirs.names == ours.names and theirs.size == ours.size, session.name
            assert_close(theirs.boxes, ours.boxes, rtol=0, atol=1e-3)
            assert_close(theirs.scores, ours.scores, rtol=0, atol=1e-5)


def test_openvino_predicts_the_same(detector: Detector, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from deimkit.deploy.vino import write_openvino

    assert write_openvino(files["one"], tmp_path / "one.xml") == read_card(files["one"])
    assert {path.name for path in tmp_path.iterdir()} == {"one.xml", "one.bin"}
    done = export_detector(detector, tmp_path / "new" / "one.xml", "openvino")
    written = {path.name: path for path in done.path.parent.iterdir()}
    told = json.loads(written.pop("one.xml.parity.json").read_text())["sha256"]
    assert told == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in written.items()}
    expected: Any = detector.predict(pictures(), threshold=0.3)
    shouted = Path(shutil.copy(files["two"], tmp_path / "two.ONNX"))
    for path in (tmp_path / "one.xml", shouted, files["any"], files["raw"]):
        with open_session(path, "openvino", threads=1) as session:
            assert session.card == read_card(files[path.stem])
            found: Any = Served(session).predict(pictures(), threshold=0.3)
        assert [theirs.ids for theirs in found] == [ours.ids for ours in expected]
        assert_close(torch.cat([x.boxes for x in found]), torch.cat([x.boxes for x in expected]), rtol=0, atol=1e-3)


def test_a_deployed_file_is_evaluated_as_its_detector_is(
    detector: Detector, files: dict[str, Path], tmp_path: Path
) -> None:
    data = scenes(tmp_path)
    assert data.val is not None
    expected = detect(detector, data.val)
    assert len(expected.score) > 100
    for name in ("one", "two", "raw"):
        served = dk.load(files[name])
        found = detect(served, data.val, batch=3)
        assert_close(torch.from_numpy(found.score), torch.from_numpy(expected.score), rtol=0, atol=1e-5)
        assert dk.evaluate(served, data.val)["AP"] == pytest.approx(dk.evaluate(detector, data.val)["AP"], abs=1e-9)


def test_half_precision_stays_near(detector: Detector, tmp_path: Path) -> None:
    card = write_onnx(detector, tmp_path / "half.onnx", precision="fp16")
    assert (card.precision, card.opset, card.exporter) == ("fp16", 18, "dynamo")
    kinds = {init.data_type for init in onnx.load(str(tmp_path / "half.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    images, sizes = torch.rand(1, 3, 64, 96), torch.tensor([[64, 96]])
    with (
        open_session(tmp_path / "half.onnx", threads=1) as half,
        TorchSession(detector, precision="fp16") as torch_half,
    ):
        said, expected = half.run(images, sizes), torch_half.run(images, sizes)
    assert said["boxes"].dtype == said["scores"].dtype == torch.float32
    assert_close(said["scores"], expected["scores"], rtol=0, atol=5e-3)


def test_int8_is_made_of_fp32_and_says_so(detector: Detector, files: dict[str, Path], tmp_path: Path) -> None:
    data = scenes(tmp_path)
    assert data.train is not None
    card = write_int8(files["one"], tmp_path / "int8.onnx", data.train, images=2)
    assert card == read_card(tmp_path / "int8.onnx") == replace(read_card(files["one"]), precision="int8")
    nodes = onnx.load(str(tmp_path / "int8.onnx")).graph.node
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in nodes}
    found: Any = Served(open_session(tmp_path / "int8.onnx", threads=1)).predict(pictures()[0], threshold=0)
    assert len(found) == 160 and torch.isfinite(found.boxes).all()
    with pytest.raises(DeployError, match="INT8 is made of an FP32 file"):
        write_int8(tmp_path / "int8.onnx", tmp_path / "twice.onnx", data.train)


def test_a_session_takes_what_it_was_exported_for(files: dict[str, Path]) -> None:
    sizes = torch.tensor([[64, 96]])
    with open_session(files["one"], threads=1) as session:
        for images in (torch.rand(2, 3, 64, 96), torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 96).double()):
            with pytest.raises(DeployError, match=r"float32 \(1, 3, 64, 96\).*another export"):
                session.run(images, sizes)


def test_what_a_machine_lacks_is_said(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeployError, match="has no CUDAExecutionProvider.*onnxruntime-gpu"):
        open_session(files["one"], device="cuda")
    silent = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    gpu = SimpleNamespace(
        __version__="1.99",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        InferenceSession=lambda *a, **how: silent,
    )
    with pytest.raises(DeployError, match="fell back to CPUExecutionProvider"):
        ort._opened(gpu, files["one"], None, torch.device("cuda"))
    with pytest.raises(DeployError, match="A CUDA graph needs a CUDA device"):
        TorchSession(Detector(ARCH, 2), graph=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeployError, match=r"onnxruntime is missing: pip install 'deimkit\[export\]'"):
        open_session(files["one"])


OPENED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no file": ("gone.onnx", {}, "No file at"),
    "no model": ("text.onnx", {}, "cannot be read as an ONNX file|not one of|does not say"),
    "another suffix": ("model.pt", {}, "ends in .onnx, .xml, .engine"),
    "another runtime": (
        "one.onnx",
        {"runtime": "tensorrt"},
        "by onnxruntime or openvino; got runtime='tensorrt'",
    ),
    "a graph on a CPU": ("one.onnx", {"graph": True}, "CUDA graph is for"),
    "OpenVINO on a GPU": (
        "one.onnx",
        {"runtime": "openvino", "device": "cuda"},
        "OpenVINO is used on cpu here; got device='cuda'",
    ),
    "ONNX Runtime elsewhere": ("one.onnx", {"device": "mps"}, "used on cpu or cuda here; got device='mps'"),
    "no device": ("one.onnx", {"device": "foo"}, "used on cpu or cuda here; got device='foo'"),
    "TensorRT on a CPU": ("some.engine", {"device": "cpu"}, "TensorRT is used on cuda here; got device='cpu'"),
}


@pytest.mark.parametrize(("name", "how", "message"), OPENED.values(), ids=OPENED.keys())
def test_what_cannot_be_opened_is_refused(
    files: dict[str, Path], tmp_path: Path, name: str, how: dict[str, Any], message: str
) -> None:
    for other in ("text.onnx", "some.engine"):
        (tmp_path / other).write_text("This is no model.")
    path = files["one"] if name == "one.onnx" else tmp_path / name
    with pytest.raises(DeployError, match=message):
        open_session(path, **how)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    ends = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [1]) for x in "ab"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])), str(tmp_path / "x.onnx"))
    with pytest.raises(DeployError, match="does not say its classes"):
        dk.load(tmp_path / "x.onnx")


# ---------------------------------------------------------------------------------------------- the verbs
def test_load_opens_what_was_exported(detector: Detector, files: dict[str, Path]) -> None:
    served = dk.load(files["one"], device="auto")
    assert isinstance(served, Served) and served.size == (64, 96) and served.categories == GAPPY
    assert "micro in fp32, 64 x 96, batch 1, by ONNX Runtime" in repr(served)
    assert served.predict(pictures()[0], threshold=0.3).ids == detector.predict(pictures()[0], threshold=0.3).ids  # type: ignore[union-attr]
    with pytest.raises(DeployError, match="weights and classes inside"):
        dk.load(files["one"], weights="coco")
    with pytest.raises(DeployError, match="runtime= is for exported files"):
        dk.load("tiny", runtime="onnxruntime")
    with pytest.raises(DeployError, match="which only predicts"):
        load_detector(files["one"])


def test_an_export_is_proved_and_only_then_verified(detector: Detector, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "m.onnx"
    done = dk.export(detector, out, progress=False)
    assert done.path == out and done.parity.verdict == "compared"
    told = parity_file(out).read_text()
    assert "verified" not in told + str(done) and "give data=" in str(done)
    assert json.loads(told)["contenders"][0]["every"]["matched"] > 0
    assert all(row.held.box_max < 1e-5 and not row.faults for row in done.parity.contenders)


def test_a_recipe_is_exported_by_name_and_a_run_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "tiny", "--size", "64", "--batch", "any", "--json"]) in (0, 1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        told["path"] == "tiny_any_64x64.onnx" and (tmp_path / told["path"]).is_file() and told["card"]["batch"] is None
    )
    assert told["card"]["size"] == [64, 64] and told["parity"]["verdict"] != "verified"
    assert main(["export", "tiny", "--precision", "int8"]) == 1
    assert "give data= (--data)" in capsys.readouterr().err
    assert main(["export", "tiny", "--format", "tensorrt"]) == 1
    assert "TensorRT" in capsys.readouterr().err or not torch.cuda.is_available()


def test_another_suffix_than_the_format_is_refused(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="ends in .xml; got"):
        export_detector(detector, tmp_path / "m.onnx", "openvino")
    with pytest.raises(DeployError, match="format is one of onnx, openvino, tensorrt; got 'coreml'"):
        export_detector(detector, tmp_path / "m.onnx", "coreml")


def test_a_file_is_measured_from_the_command_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    assert main(["bench", str(files["one"]), "--seconds", "0.1", "--device", "cpu", "--to", str(out)]) == 0
    said = capsys.readouterr().out
    assert "one.onnx 64 x 96, ONNX Runtime" in said and "T4" not in said
    assert json.loads(out.read_text())["results"][0]["source"] == "one.onnx"
    assert main(["bench"]) == 1 and "deimkit bench --self-test" in capsys.readouterr().err


def test_the_self_test_runs_a_small_detector_in_every_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--self-test", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and "a small graph" in line and "ONNX Runtime" in line for line in lines)


def test_a_checkpoint_with_gappy_ids_keeps_them_in_every_file(tmp_path: Path) -> None:
    """From a dataset whose ids have gaps, through training, to the rows that COCO's tools read."""
    new = {old: 7 * old * old for old in range(1, 9)}  # 7, 28, 63, ...
    for file in (scenes(tmp_path).root / "annotations").glob("*.json"):
        told = json.loads(file.read_text())
        told["categories"] = [row | {"id": new[row["id"]]} for row in told["categories"]]
        told["annotations"] = [row | {"category_id": new[row["category_id"]]} for row in told["annotations"]]
        file.write_text(json.dumps(told))
    data = dk.Dataset.open(tmp_path / "scenes")
    trainer(tmp_path / "run", data).fit()
    shown = [str(path) for path in data.val.paths]  # type: ignore[union-attr]
    expected: Any = dk.load(tmp_path / "run").predict(shown, threshold=0)
    assert {row["category_id"] for found in expected for row in found.to_coco()} == set(new.values())
    for called, how in {"micro": {}, "micro_b2_raw": {"batch": 2, "postprocess": False}}.items():
        done = dk.export(str(tmp_path / "run"), progress=False, **how)
        assert done.path == tmp_path / "run" / "exported" / f"{called}.onnx" and done.card.recipe == "micro"
        for runtime in ("onnxruntime", "openvino") if find_spec("openvino") else ("onnxruntime",):
            found: Any = dk.load(done.path, runtime=runtime).predict(shown, threshold=0)
            for ours, theirs in zip(expected, found, strict=True):
                rows = [{row["category_id"]: row["score"] for row in reversed(x.to_coco())} for x in (ours, theirs)]
                assert rows[0] == pytest.approx(rows[1], abs=1e-5), "the best score of every id"


def test_file_and_proof_come_together_or_not_at_all(detector: Detector, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    dk.export(detector, out, progress=False)
    told = json.loads(parity_file(out).read_text())
    assert told["sha256"] == {out.name: hashlib.sha256(out.read_bytes()).hexdigest()}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path.parent / f"{tmp_path.name}_cats"
    for file in (scenes(other).root / "annotations").glob("*.json"):
        rows = json.loads(file.read_text())
        rows["categories"] = [row | {"name": f"nothing of ours {row['id']}"} for row in rows["categories"]]
        file.write_text(json.dumps(rows))
    data = dk.Dataset.open(other / "scenes")
    for wrong in ({"data": data}, {"images": 0}, {"device": "cuda"}, {"top": 0}, {"weights": "coco"}):
        with pytest.raises(DeimkitError):
            dk.export(detector, out, progress=False, **{"size": 32, **wrong})
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, wrong


def test_int8_does_not_look_at_the_images_that_judge_it(detector: Detector, tmp_path: Path) -> None:
    data = scenes(tmp_path, train=3, val=4)
    out = tmp_path / "m.onnx"
    done = export_detector(detector, out, precision="int8", split=data.val, images=2, calibration=data.train)
    assert done.made == "calibrated on images of train" and done.card.precision == "int8"
    assert data.val is not None
    seen, made = _calibration(data.val, 2, None)
    assert "leaves out" in made and sorted([*seen.ids, *spread(data.val, 2).ids]) == sorted(data.val.ids)
    assert _calibration(data.val, 4, None)[1] == "calibrated on the images of val that AP is measured on too"


def test_an_untrained_detector_is_compared_with_nothing(tmp_path: Path) -> None:
    done = dk.export("tiny", tmp_path / "t.onnx", size=64, progress=False)
    assert done.parity.verdict == "compared" and "all alike" in str(done)


def test_fresh_weights_are_the_same_every_time_and_leave_random_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    first = dk.export("tiny", size=64, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert dk.export("tiny", "again.onnx", size=64, progress=False).path.read_bytes() == first.path.read_bytes()


NAMED: dict[str, dict[str, Any]] = {
    "": {"precision": "fp32", "batch": 1, "size": None},
    "fp16": {"precision": "fp16", "batch": 1, "size": None},
    "any": {"precision": "fp32", "batch": None, "size": None},
    "int8_b8_480x800_raw": {"precision": "int8", "batch": 8, "size": (480, 800), "postprocess": False},
    "top20_opset18_torchscript": {
        "precision": "fp32",
        "batch": 1,
        "size": None,
        "top": 20,
        "opset": 18,
        "exporter": "torchscript",
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_exports_of_other_options_have_other_names(name: str) -> None:
    assert "_".join(_not_usual(**NAMED[name])) == name


def test_the_detectors_own_size_is_not_named(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {(64, 96): "detector.onnx", (96, 64): "detector_96x64.onnx"}
    assert {size: str(dk.export(detector, size=size, progress=False).path) for size in asked} == asked


def test_where_a_folder_lies_nothing_is_computed_or_replaced(detector: Detector, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("old")
    parity_file(out).mkdir()
    said: list[str] = []
    with pytest.raises(DeployError, match="m.onnx.parity.json', and there is a folder"):
        export_detector(detector, out, note=said.append)
    assert not said and out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(DeployError, match="at least 17; got 16"):
        export_detector(detector, tmp_path / "new" / "folder" / "x.onnx", opset=16)
    assert not (tmp_path / "new").exists()


def test_files_are_put_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    new = [tmp_path / "new" / name for name in ("a", "b", "c")]
    for file in new:
        file.write_text("new")
    (tmp_path / "a").write_text("old")
    replace_ = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if self == new[2]:
            raise OSError("in use")
        return replace_(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="in use"):
            put(new, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "a"} and (tmp_path / "a").read_text() == "old"
    for file in new:
        file.write_text("new")
    put(new, tmp_path)
    assert [(tmp_path / file.name).read_text() for file in new] == ["new"] * 3


def test_a_served_file_takes_no_batch_of_none(files: dict[str, Path]) -> None:
    served = Served(open_session(files["one"], threads=1))
    for batch in (0, -1):
        with pytest.raises(DeimkitError, match=f"batch must be at least 1; got {batch}"):
            served.predict(pictures()[0], batch=batch)
    with pytest.raises(DeployError, match="got device='foo'"):
        dk.load(files["one"], device="foo")


class Eight(TorchSession):
    """One that takes at most eight images, as an engine does."""

    @property
    def most(self) -> int:
        return 8


def test_too_many_images_are_told_the_true_range(detector: Detector) -> None:
    session = Eight(detector)
    with pytest.raises(DeployError, match=r"float32 \(1 to 8, 3, 64, 96\).*got float32 \(32, 3, 64, 96\)"):
        session.run(torch.rand(32, 3, 64, 96), torch.full((32, 2), 64))
    assert "batches of 1 to 8" in repr(Served(session)) and "any batch" in repr(Served(TorchSession(detector)))


def test_a_closed_session_says_so(detector: Detector, files: dict[str, Path]) -> None:
    sizes = torch.tensor([[64, 96]])
    for session in sessions(files, detector):
        session.close()
        with pytest.raises(DeployError, match="is closed. Open the file again"):
            session.run(torch.rand(1, 3, 64, 96), sizes)


def test_what_onnx_runtime_raises_is_told_as_ours(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> None:
        raise ArithmeticError("Failed to allocate memory")  # its own types, too, are no RuntimeErrors

    session = open_session(files["one"], threads=1)
    monkeypatch.setattr(session, "_session", SimpleNamespace(run=no_memory))
    with pytest.raises(DeployError, match="ONNX Runtime .* could not run: Failed to allocate memory"):
        session.run(torch.rand(1, 3, 64, 96), torch.tensor([[64, 96]]))


def test_a_served_file_finds_nothing_in_no_image(files: dict[str, Path]) -> None:
    for name in ("any", "two"):
        assert Served(open_session(files[name], threads=1)).detect(torch.zeros(0, 3, 64, 96), torch.zeros(0, 2)) == []


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path / "run", scenes(tmp_path)).fit()
    best = dk.Run(tmp_path / "run").best
    state = torch.load(best, weights_only=False)
    state["ema"]["shadow"]["gone.weight"] = torch.zeros(1)
    torch.save(state, best)
    with pytest.raises(CheckpointError, match="best.pt was written by another version.*gone.weight"):
        dk.load(best)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batches": ()}, r"from 1 on.*got \(\)"),
        ({"batches": (1, 0)}, "from 1 on"),
        ({"seconds": float("nan")}, "finite; got nan"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(how: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=message):
        dk.bench("tiny", **how)


def test_each_file_is_measured_for_itself(files: dict[str, Path]) -> None:
    report = dk.bench(str(files["one"]), str(files["any"]), device="cpu", seconds=0.05, progress=False)
    assert [result.source for result in report.results] == ["one.onnx", "any.onnx"]
    assert all(report.baseline(result) is result for result in report.results), "of two detectors there is no ratio"
