"""The public face: the names that notebooks and scripts rely on, used as they use them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import deimkit as dk
from deimkit.data.dataset import Dataset
from deimkit.errors import CheckpointError, DataError, DeimkitError, RecipeError
from deimkit.evaluation.measure import common_classes, measure, relabelled
from deimkit.losses import MAL
from tests.micro import MICRO, scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> dk.Run:
    out = tmp_path_factory.mktemp("runs") / "x"
    return dk.train(MICRO, data, out=out, epochs=1, batch=2, size=64, device="cpu", seed=0, workers=0, progress=False)


def test_every_public_name_is_there():
    assert all(getattr(dk, name) is not None for name in dk.__all__) and set(dk.__all__) < set(dir(dk))
    with pytest.raises(AttributeError, match="it has .*train"):
        dk.tarin  # noqa: B018


def test_importing_costs_nothing():
    code = "import sys, deimkit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("categories", [3, ["a", "b", "c"], dk.CategoryMap((7, "x", 2), ("a", "b", "c"))])
def test_a_detector_is_built_for_its_classes(categories):
    model = dk.build(MICRO, categories=categories)
    preds = model.eval()(torch.rand(2, 3, 64, 64))
    assert isinstance(preds, dk.Predictions) and preds.logits.shape == (2, 20, 3)
    assert len(model.categories) == 3 and model.size == (64, 64)


def test_a_step_by_hand(data):
    model, criterion = dk.build(MICRO, categories=data.categories), MICRO.criterion()
    targets = dk.Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    outputs = model.train()(torch.rand(2, 3, 64, 64), targets)
    terms = criterion(outputs, targets)
    assert {"final", "layer0", "proposals"} <= {output.name for output in outputs}
    assert terms["mal/final"].ndim == 0 and torch.isfinite(sum(terms.values()))


def test_a_run_is_trained_loaded_and_measured(run, data):
    assert run.finished and run.report.is_file() and {"recipe.py", "run.json"} <= set(os.listdir(run.folder))
    model = dk.load(run)
    assert not model.training and model.categories == data.categories and model.size == (64, 64)
    for same in (run.folder, str(run.folder), run.best):
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), dk.load(same).parameters(), strict=True))
    stats = dk.evaluate(run, data.val, device="cpu")
    (epoch,) = run.rows("epoch")
    assert stats["AP"] == epoch["AP"] == dk.evaluate(model, data.val)["AP"]
    assert set(stats["per_class"]) == set(data.categories.names)
    assert dk.evaluate(run.folder, data.val, size=96, batch=1, device="cpu", backend="pycocotools")["AP"] >= 0


def test_a_run_predicts(run, data):
    found = dk.load(run).predict(data.val.paths[0], threshold=0.0)
    assert isinstance(found, dk.Detections) and found.size == (64, 64) and len(found)
    many = dk.load(run).predict(data.val.paths[0].parent, threshold=0.0)
    assert len(many) == 2 and torch.allclose(many[0].scores, found.scores, atol=1e-5)


def test_a_run_of_its_own_process(tmp_path, data):
    """It returns at once, can be waited for by anyone, and leaves no zombie that would seem to train on."""
    started = time.monotonic()
    run = dk.train(MICRO, data, out=tmp_path / "x", epochs=1, batch=2, size=64, device="cpu", workers=0, wait=False)
    assert time.monotonic() - started < 5 and run.pid not in (None, os.getpid())
    with pytest.raises(DeimkitError, match=f"already being trained by process {run.pid}"):
        dk.resume(run, progress=False)
    with pytest.raises(DeimkitError, match="still training after 0 s"):
        run.wait(timeout=0)
    assert dk.Run.attach(tmp_path / "x").wait(timeout=120).finished
    assert run.pid is None and run.report.is_file() and run.last.is_file()
    assert [row["event"] for row in run.events()] == ["launched", "started", "finished"]


def test_a_run_that_dies_says_so(tmp_path, data):
    run = dk.train(MICRO, data, out=tmp_path / "x", epochs=50, batch=2, size=64, device="cpu", workers=0, wait=False)
    os.kill(run.pid, signal.SIGKILL)
    with pytest.raises(DeimkitError, match="failed: .*resume"):
        run.wait(timeout=20)
    (tmp_path / "x" / "recipe.py").write_text("Recipe(bacth=3)")
    run.start()
    with pytest.raises(DeimkitError, match="has no field 'bacth'"):
        run.wait(timeout=60)


def test_a_stop_request_is_heard_however_early(tmp_path, data):
    run = dk.train(MICRO, data, out=tmp_path / "x", epochs=500, batch=2, size=64, device="cpu", workers=0, wait=False)
    run.stop()
    assert run.wait(timeout=120).state == "stopped"


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path, data):
    """A subset is trained as given; what would silently put the whole source in its place is refused instead."""
    subset = replace(data, train=data.train.take(range(4)))
    options = dict(batch=2, size=64, device="cpu", workers=0, progress=False)
    with pytest.raises(DataError, match=r"train: 4 images, .*holds \(train: 6 images, .*wait=True"):
        dk.train(MICRO, subset, out=tmp_path / "x", epochs=1, wait=False, **options)
    assert not (tmp_path / "x").exists()
    run = dk.train(MICRO, subset, out=tmp_path / "x", epochs=2, **options)
    assert run.events()[0]["images"]["train"] == 4
    (run.folder / "events.jsonl").unlink()  # as if it were not finished
    with pytest.raises(DataError, match=r"resume\(run, dataset="):
        dk.resume(run, progress=False)
    assert dk.resume(run, progress=False, dataset=subset).finished
    (run.folder / "events.jsonl").unlink()
    assert dk.resume(run, wait=False, dataset=data).wait(timeout=120).finished  # other data, but said so
    assert [row["event"] for row in run.events()][:2] == ["other data", "launched"]


def test_a_fingerprint_follows_the_annotations_and_not_the_place(data):
    moved = replace(data.train, paths=[path.with_name("x") for path in data.train.paths])
    assert moved.fingerprint() == data.train.fingerprint()
    for field in ("sizes", "boxes", "labels", "crowd"):
        values = getattr(data.train, field).copy()
        values[0] = ~values[0] if values.dtype == bool else values[0] + 1
        assert replace(data.train, **{field: values}).fingerprint() != data.train.fingerprint()


def test_a_dataset_of_extremes_from_training_to_prediction(tmp_path):
    """A pixel, a panorama of 12,000, no box, 500 boxes, boxes beyond the image; 300 classes."""
    shapes = {"pixel.png": (1, 1), "panorama.png": (40, 12000), "empty.png": (64, 48), "crowd.png": (64, 64)}
    rng = np.random.default_rng(0)
    boxes = {
        "pixel.png": [[0, 0, 1, 1]],
        "panorama.png": [[11000, 5, 900, 30], [-50, -5, 80, 30]],
        "empty.png": [],
        "crowd.png": [[*xy, 8, 8] for xy in rng.uniform(0, 56, (500, 2)).tolist()],
    }
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name, shape in shapes.items():
            Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).save(tmp_path / split / name)
        found = [(i, box) for i, name in enumerate(shapes) for box in boxes[name]]
        content = {
            "images": [
                {"id": i, "file_name": name, "height": h, "width": w} for i, (name, (h, w)) in enumerate(shapes.items())
            ],
            "annotations": [
                {"id": n + 1, "image_id": i, "category_id": n % 300, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                for n, (i, box) in enumerate(found)
            ],
            "categories": [{"id": c, "name": f"thing {c}"} for c in range(300)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = Dataset.open(tmp_path)
    assert len(data.train) == len(data.val) == 4 and len(data.categories) == 300
    run = dk.train(MICRO, data, out=tmp_path / "run", epochs=4, batch=2, device="cpu", workers=0, progress=False)
    assert run.finished and run.report.is_file()
    assert {row["event"] for row in run.events()} <= {"started", "returned_to_best", "finished"}  # nothing was skipped
    assert all(row["loss"] > 0 for row in run.rows("step"))
    assert 0 <= dk.evaluate(run, data.val, device="cpu")["AP"] <= 1
    for path, found in zip(data.val.paths, dk.load(run).predict(data.val.paths, threshold=0.0), strict=True):
        height, width = shapes[path.name]
        assert found.size == (height, width) and len(found)
        x, y = found.boxes[:, 0::2], found.boxes[:, 1::2]
        assert min(x.min(), y.min()) >= 0 and x.max() <= width and y.max() <= height


def test_real_images_are_learned_and_predicted(shared, tmp_path):
    """Blood cells: the path of the README's table, at a size that a test can afford."""
    cells = Dataset.open(shared / "data" / "bccd")
    few = replace(cells, train=cells.train.take(range(8)), val=cells.val.take(range(4)))
    run = dk.train(MICRO, few, out=tmp_path, epochs=2, batch=4, size=96, device="cpu", workers=0, progress=False)
    assert run.finished and set(run.rows("epoch")[-1]["per_class"]) == {"RBC", "WBC", "Platelets"}
    found = dk.load(run).predict(cells.val.paths[0], threshold=0.0)
    assert len(found) and set(found.names) <= {"RBC", "WBC", "Platelets"}


def test_a_finished_run_is_left_alone(run, data, capsys):
    before = run.last.read_bytes(), run.events()
    assert dk.resume(run.folder).finished and dk.resume(run, wait=False).finished
    assert capsys.readouterr().out.count("is finished: nothing is left to train.") == 2
    assert (run.last.read_bytes(), run.events()) == before


def test_a_used_folder_is_refused_and_an_untrained_one_is_not(run, data, tmp_path):
    with pytest.raises(DeimkitError, match=r"already holds a run.*resume\('.*'\).*--resume"):
        dk.train(MICRO, data, out=run.folder)
    (tmp_path / "run.json").write_text("{}")  # of a training that failed before it began
    short = dk.train(MICRO, data, out=tmp_path, epochs=1, batch=6, size=64, device="cpu", workers=0, progress=False)
    assert short.finished


@pytest.mark.parametrize(
    "wrong, error, says",
    [
        ({"recipe": "tinny"}, RecipeError, "Did you mean 'tiny'"),
        ({"data": "no/such/folder"}, DataError, "does not exist"),
        ({"weights": "lost.pt"}, CheckpointError, "No weights at lost.pt"),
        ({"acumulate": 2}, RecipeError, "no option 'acumulate'. Did you mean 'accumulate'"),
        ({"precision": "int8"}, RecipeError, "precision must be one of"),
        ({"device": "cuda:99"}, DeimkitError, "finds only"),
        ({"device": "cpu", "precision": "fp16"}, DeimkitError, "needs a GPU"),
        ({"size": 100}, RecipeError, "Nearest: \\(96, 96\\)"),
        ({"epochs": 0}, RecipeError, "epochs=0"),
        ({"batch": 0}, RecipeError, "batch=0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, data, wrong, error, says):
    with pytest.raises(error, match=says):
        dk.train(**{"recipe": MICRO, "data": data, "out": tmp_path / "x", **wrong})
    assert not (tmp_path / "x").exists()


def test_a_damaged_image_to_measure_on_does_not_cost_the_report(tmp_path):
    some = scenes(tmp_path)
    damaged = some.val.paths[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    run = dk.train(
        MICRO, some, out=tmp_path / "x", epochs=1, batch=2, size=64, device="cpu", workers=0, progress=False,
        on_problem="skip",
    )  # fmt: skip
    assert run.finished and run.report.is_file()
    assert [e["split"] for e in run.events() if e["event"] == "dropped"] == ["val"]


@dataclass(frozen=True)
class Homemade(MAL):
    """A loss that no room of deimkit holds."""


def test_a_recipe_that_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, data):
    with pytest.raises(RecipeError, match="Unknown part 'Homemade'"):
        dk.train(replace(MICRO, losses=(Homemade(),)), data, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_run_starts_from_another(run, data, tmp_path):
    tuned = dk.train(
        MICRO,
        data,
        out=tmp_path / "x",
        weights=run,
        epochs=1,
        batch=6,
        size=64,
        device="cpu",
        workers=0,
        progress=False,
    )
    assert tuned.finished and tuned.events()[0]["event"] == "weights"


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_cannot_be_loaded_says_why(run, tmp_path):
    with pytest.raises(CheckpointError, match="Nothing to load at"):
        dk.load(tmp_path / "lost")
    with pytest.raises(CheckpointError, match="needs weights=PATH"):
        dk.load("tiny")
    with pytest.raises(CheckpointError, match="says itself which classes"):
        dk.load(run, categories=3)
    with pytest.raises(CheckpointError, match="No checkpoint"):
        (tmp_path / "run.json").write_text("{}")
        dk.load(tmp_path)
    torch.save({"model": {}}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="weights=path"):
        dk.load(tmp_path / "published.pth")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"format": 1, "recipe": subprocess.Popen}))
    with pytest.raises(CheckpointError, match="could run code"):
        dk.load(tmp_path / "evil.pt")


def test_a_file_is_read_once_and_fills_a_detector(run, data, monkeypatch):
    reads = []
    whole = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: (reads.append(args[0]), whole(*args, **options))[1])
    model = dk.load(MICRO, weights=run.best)
    assert len(reads) == 1 and model.categories == data.categories and not model.training
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images).logits, dk.load(run)(images).logits)


def test_a_head_for_other_classes_is_an_error_unless_it_is_replaced(run):
    with pytest.raises(CheckpointError, match="8 classes.*2.*replace_head"):
        dk.load(MICRO, weights=run.best, categories=["left", "right"])
    model = dk.load(MICRO, weights=run.best, categories=["left", "right"], replace_head=True)
    assert model(torch.rand(1, 3, 64, 64)).logits.shape == (1, 20, 2)


# -------------------------------------------------------------------------------------------------------- measuring


def test_measuring_leaves_every_module_in_its_mode(run, data):
    model = dk.load(run).train()
    model.backbone.eval()
    before = {name: module.training for name, module in model.named_modules()}
    measure(model, data.val)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert any(before.values()) and not all(before.values())


@pytest.mark.parametrize(
    "ours, theirs, classes",
    [
        (["a", "b"], ["a", "b"], None),
        (2, ["a", "b"], None),
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "b", "c"], ["c", "x", "a"], [2, -1, 0]),
        (3, ["class 1", "b"], [-1, 0, -1]),
    ],
)
def test_classes_are_matched_by_name(ours, theirs, classes):
    found = common_classes(dk.CategoryMap.of(ours), dk.CategoryMap.of(theirs))
    assert (found if found is None else found.tolist()) == classes


def test_other_classes_altogether_are_refused(run, data):
    strange = replace(data.val, categories=dk.CategoryMap.of([f"strange {i}" for i in range(8)]))
    with pytest.raises(DataError, match=r"knows 8 classes \(disc, .*the split has 8 \(strange 0"):
        dk.evaluate(run, strange, device="cpu")


def test_renumbered_classes_measure_the_same(run, data):
    """The split's classes in reverse order, its labels with them."""
    names = data.val.categories.names[::-1]
    turned = replace(data.val, categories=dk.CategoryMap.of(list(names)), labels=len(names) - 1 - data.val.labels)
    assert dk.evaluate(run, turned, device="cpu")["AP"] == pytest.approx(dk.evaluate(run, data.val, device="cpu")["AP"])


def test_detections_of_unknown_classes_are_left_out():
    boxes = torch.arange(12.0).view(3, 4)
    found = dk.Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([2, 0, 1]))
    kept = relabelled(found, torch.tensor([5, -1, 3]))
    assert kept.labels.tolist() == [3, 5] and torch.equal(kept.boxes, boxes[:2]) and len(kept) == 2
