"""Findings in a real FiftyOne dataset: samples, fields, saved views, updates, clear refusals, and the same mAP."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deimkit.data.dataset import Dataset, Split
from deimkit.errors import DataError
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.fiftyone.agreement import agreement
from deimkit.explore.fiftyone.documents import relative
from deimkit.explore.fiftyone.marks import marked
from deimkit.explore.fiftyone.samples import to_fiftyone
from deimkit.explore.fiftyone.saved_views import as_view, view_of
from deimkit.explore.findings import Findings
from deimkit.explore.views import changed, views_of
from tests import findings_scene, micro
from tests.scenes import random_results, split_of


def mongod() -> Path | None:
    """The database server that came with FiftyOne, if both are installed."""
    spec = importlib.util.find_spec("fiftyone")
    places = spec.submodule_search_locations if spec is not None else None
    server = Path(places[0]) / "db" / "bin" / "mongod" if places else None
    return server if server is not None and server.is_file() else None


needs_fiftyone = pytest.mark.skipif(mongod() is None, reason="needs fiftyone and a mongod in its folder")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of these tests' own, that FiftyOne uses by its address."""
    folder = tmp_path_factory.mktemp("mongo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(mongod()), "--dbpath", str(folder), "--logpath", str(folder / "log"), "--bind_ip", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"], stdout=subprocess.DEVNULL
    )
    patch = pytest.MonkeyPatch()
    address = f"mongodb://127.0.0.1:{port}"
    patch.setenv("FIFTYONE_DATABASE_URI", address)
    if "fiftyone" in sys.modules:
        patch.setattr(sys.modules["fiftyone"].config, "database_uri", address)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    try:
        yield address
    finally:
        patch.undo()
        server.terminate()
        server.wait()


@pytest.fixture
def fo(database: str) -> Iterator[Any]:
    """FiftyOne with an empty database."""
    from deimkit.explore.fiftyone.database import connect

    fiftyone = connect()
    yield fiftyone
    for name in fiftyone.list_datasets():
        fiftyone.delete_dataset(name)


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return findings_scene.findings(tmp_path / "images")


def put(found: Findings, **how: Any) -> Any:
    """The findings in a FiftyOne dataset called "scene"."""
    return to_fiftyone(found.split, found, **({"name": "scene"} | how))


def test_relative_boxes() -> None:
    assert relative(np.array([[25, 50, 75, 150]]), np.array([[200, 100]])) == [[0.25, 0.25, 0.5, 0.5]]


@needs_fiftyone
def test_everything_is_there(fo: Any, found: Findings) -> None:
    said: list[str] = []
    dataset = put(found, progress=said.append)
    assert len(dataset) == 5 and dataset.persistent and said == ["writing 5/5"]
    sample = dataset.first()
    assert Path(sample.filepath) == found.split.paths[0] and sample.tags == ["test"] and sample.image_id == "a"
    assert (sample.metadata.width, sample.metadata.height) == (224, 224)
    assert (sample.predictions_right, sample.predictions_wrong, sample.predictions_missed) == (1, 1, 1)
    assert dataset.values("predictions_ap")[3] is None and sample.predictions_ap == pytest.approx(0.5)

    truth, said_of = sample.ground_truth.detections, sample.predictions.detections
    assert [t.label for t in truth] == ["猫", "dog"] and truth[1].predictions_missed and not truth[1].iscrowd
    assert np.allclose(truth[0].bounding_box, np.array([10, 10, 40, 40]) / 224)
    assert truth[0].predictions_layer_query == [0, 0, 99] and truth[0].predictions_switches == 1
    best, second = said_of
    assert (best.label, best.confidence, best.verdict, best.query) == ("猫", 0.9, "right", 0)
    assert best.target == second.target == truth[0].id and second.verdict == "duplicate"
    assert len(best.layer_iou) == len(best.layer_score) == 3 and len(best.spread) == 4
    start = sample.predictions_start.detections[0]
    assert np.allclose(start.bounding_box, np.array([15, 15, 40, 40]) / 224) and start.query == 0
    assert best.instance.id == truth[0].instance.id == start.instance.id != truth[1].instance.id

    last = dataset.last()
    assert last.ground_truth.detections[0].iscrowd
    schema = dataset.get_field_schema(flat=True)
    assert isinstance(schema["predictions.detections.verdict"], fo.StringField)
    assert isinstance(schema["ground_truth.detections.predictions_missed"], fo.BooleanField)


@needs_fiftyone
def test_saved_views_show_what_the_views_select(fo: Any, found: Findings) -> None:
    second = changed(found, findings_scene.findings(found.split.paths[0].parent, rows=findings_scene.ROWS[2:]))
    dataset = put(second)
    ids = list(second.split.ids)
    for view in views_of(second):
        wanted = [ids[shown.image] for shown in view.select(second)]
        assert as_view(dataset, view, "predictions").values("image_id") == wanted, view.name
        saved = dataset.load_saved_view(f"predictions: {view.name}")
        assert saved.values("image_id") == wanted
    assert len(dataset.list_saved_views()) == len(views_of(second)) + 1
    everything = dataset.load_saved_view("predictions: all images")
    assert len(everything) == 5
    assert dataset.count("predictions.detections") == 5 and everything.count("predictions.detections") == 4
    false = dataset.load_saved_view("predictions: confident false positives")
    assert set(false.values("predictions.detections.verdict", unwind=True)) == {"class", "background", "location"}


@needs_fiftyone
def test_again_updates_and_never_duplicates(fo: Any, found: Findings) -> None:
    dataset = put(found)
    ids = dataset.values("id")
    sample = dataset.first()
    sample.ground_truth.detections[0].tags.append("looked at")
    sample.ground_truth.detections.append(fo.Detection(label="dog", bounding_box=[0, 0, 0.1, 0.1]))
    sample.save()
    again = put(replace(found, threshold=0.75))
    assert again.values("id") == ids and again.first().predictions_wrong == 1
    assert again.values("predictions_right") == [1, 0, 0, 0, 0]
    truth = again.first().ground_truth.detections
    assert [t.label for t in truth] == ["猫", "dog", "dog"] and truth[0].tags == ["looked at"]
    assert again.count("predictions.detections") == 7 and len(again.list_saved_views()) == len(views_of(found)) + 1
    fresh = put(found, overwrite=True)
    assert len(fresh.first().ground_truth.detections) == 2


@needs_fiftyone
def test_two_runs_side_by_side(fo: Any, found: Findings) -> None:
    put(found, field="deim")
    other = findings_scene.findings(found.split.paths[0].parent, traced=False, rows=findings_scene.ROWS[2:])
    dataset = put(other, field="deim_b")
    put(found, field="deim")
    sample = dataset.reload() or dataset.first()
    truth = sample.ground_truth.detections[0]
    assert len(dataset) == 5 and (truth.deim_missed, truth.deim_b_missed) == (False, True)
    assert len(sample.deim.detections) == 2 and len(sample.deim_b.detections) == 0
    assert "deim_start" in dataset.get_field_schema() and "deim_b_start" not in dataset.get_field_schema()
    assert dataset.info["deimkit"]["runs"].keys() == {"deim", "deim_b"}
    alone = dataset.load_saved_view("deim_b: worst images")
    assert "deim" not in alone.get_field_schema() and "deim_b_ap" in alone.get_field_schema()


@needs_fiftyone
def test_images_that_moved_are_found_again(fo: Any, found: Findings, tmp_path: Path) -> None:
    dataset = put(found)
    ids, there = dataset.values("id"), tmp_path / "there"
    found.split.paths[0].parent.rename(there)
    with pytest.raises(DataError, match=r"5 of the 5 images of test are gone, such as .*a\.png"):
        put(found)
    paths = [there / path.name for path in found.split.paths]
    split = replace(found.split, paths=paths)
    moved = Findings(errors(split, found.errors.results), threshold=0.5)
    again = put(moved)
    assert again.values("id") == ids and again.values("filepath") == [str(path) for path in paths]


@needs_fiftyone
def test_what_is_not_ours_stays_as_it_is(fo: Any, found: Findings) -> None:
    theirs = fo.Dataset("scene")
    theirs.add_sample(fo.Sample(filepath="/nowhere.png"))
    for overwrite in (False, True):
        with pytest.raises(DataError, match="'scene' that deimkit did not make"):
            put(found, overwrite=overwrite)
    assert len(fo.load_dataset("scene")) == 1
    with pytest.raises(DataError, match="does not take 'Scene'"):
        put(found, name="Scene")  # the same in addresses


@needs_fiftyone
def test_other_classes_and_taken_fields_are_refused(fo: Any, found: Findings) -> None:
    dataset = put(found)
    other = split_of([[]], [[]], names=("x",))
    other = replace(other, paths=found.split.paths[:1])
    with pytest.raises(DataError, match="has the classes '猫', 'dog', and this split 'x'"):
        to_fiftyone(other, Findings(errors(other, Results.concat([]))), name="scene")
    dataset.add_sample_field("note_ap", fo.FloatField)
    with pytest.raises(DataError, match="has a field 'note_ap' already"):
        put(found, field="note")
    with pytest.raises(DataError, match="findings of"):
        to_fiftyone(found.split.take([0]), found, name="scene")


@needs_fiftyone
@pytest.mark.parametrize(
    "field", ["", "my run", "1st", "_hidden", "a.b", "猫", "ground_truth", "tags", "filepath", "id"]
)
def test_field_names_are_words_that_nobody_has(fo: Any, found: Findings, field: str) -> None:
    with pytest.raises(DataError, match="field must be a word"):
        put(found, field=field)
    assert not fo.dataset_exists("scene"), "nothing half-made is left"


@needs_fiftyone
def test_what_was_corrected_in_the_app_keeps_its_tags(fo: Any, found: Findings) -> None:
    dataset = put(found)
    sample = dataset.first()
    first, second = sample.ground_truth.detections
    first.label, first.tags = "dog", ["fix"]
    second.bounding_box, second.tags = [0, 0, 0.5, 0.5], ["moved"]
    sample.save()
    truth = put(found).first().ground_truth.detections
    assert [(t.label, t.tags) for t in truth] == [("猫", ["fix"]), ("dog", ["moved"])]
    assert truth[1].bounding_box != [0, 0, 0.5, 0.5] and [t.id for t in truth] == [first.id, second.id]


@needs_fiftyone
def test_images_of_a_split_are_shown_in_their_order(fo: Any, found: Findings) -> None:
    dataset = put(found)
    assert view_of(dataset, found.split, [3, 0]).values("image_id") == ["d", "a"]
    assert len(view_of(dataset, found.split, [])) == 0


@needs_fiftyone
def test_tags_of_the_app_go_to_the_doctor(fo: Any, found: Findings) -> None:
    dataset = put(found)
    assert marked(dataset, found.split).problems == ()
    sample = dataset.first()
    sample.ground_truth.detections[1].tags.append("fix")
    sample.save()
    last = dataset.last()
    last.tags.append("fix")
    last.save()
    report = marked(dataset, found.split)
    said = [(p.image, p.kind, p.detail) for p in report.problems]
    assert said == [
        ("a", "marked for repair", "dog at (100, 100, 20, 20) is tagged 'fix'"),
        ("e", "marked for repair", "the image is tagged 'fix'"),
    ]
    assert list(found.split.without(report.problems).ids) == ["b", "c", "d"]
    assert len(marked(dataset, found.split, tag="other").problems) == 0


@needs_fiftyone
def test_a_death_in_the_middle_keeps_what_was_written(
    fo: Any, found: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deimkit.explore.fiftyone import samples

    monkeypatch.setattr(samples, "AT_ONCE", 2)

    def die(text: str) -> None:
        if text == "writing 4/5":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(found, progress=die)
    dataset = fo.load_dataset("scene")
    assert len(dataset.exists("predictions")) == 4 and dataset.list_saved_views() == []
    put(found)
    dataset.reload()
    assert len(dataset) == len(dataset.exists("predictions")) == 5
    assert "predictions: worst images" in dataset.list_saved_views()


@needs_fiftyone
def test_one_call_from_a_detector(fo: Any, tmp_path: Path) -> None:
    data = micro.scenes(tmp_path)
    detector = micro.MICRO.build(data.categories)
    dataset = to_fiftyone(data, detector, top=5)
    assert dataset.name == data.name and dataset.count("predictions.detections") == 10
    to_fiftyone(data, detector, split="train", top=5)
    dataset.reload()
    assert len(dataset) == 8 and dataset.count_sample_tags() == {"train": 6, "val": 2}
    assert dataset.info["deimkit"]["runs"]["predictions"]["splits"] == ["train", "val"]
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        to_fiftyone(data, detector, split="test")


@needs_fiftyone
def test_empty_split(fo: Any) -> None:
    split = split_of([], [])
    dataset = to_fiftyone(split, Findings(errors(split, Results.concat([]))))
    assert len(dataset) == 0 and dataset.name == f"test {split.fingerprint()}"


# ------------------------------------------------------------------------------------------------- the same mAP


def blank(split: Split, folder: Path, size: tuple[int, int] = (640, 640)) -> Split:
    """The split with images of that height and width."""
    paths = [folder / f"{i}.png" for i in range(len(split))]
    for path in paths:
        Image.new("L", size[::-1]).save(path)
    return replace(split, paths=paths, sizes=np.array([size] * len(split), np.int32).reshape(-1, 2))


def both(split: Split, *rows: tuple[int, int, float, list[float]]) -> Any:
    """What FiftyOne and we make of these detections."""
    found = Findings(errors(split, findings_scene.results(list(rows))))
    return agreement(put(found), found)


@needs_fiftyone
def test_same_map_on_the_scene(fo: Any, tmp_path: Path) -> None:
    rows = [(i, k, score, [x, y, right, bottom + 0.5]) for i, k, score, (x, y, right, bottom) in findings_scene.ROWS]
    found = findings_scene.findings(tmp_path, rows=rows)
    same = agreement(put(found), found)
    assert abs(same.difference) < 1e-6 and same.reasons == [] and set(same.per_class) == {"猫", "dog"}
    assert all(abs(a - b) < 1e-6 for a, b in same.per_class.values())


@needs_fiftyone
def test_equal_scores_rank_differently(fo: Any, tmp_path: Path) -> None:
    box = [10.0, 10, 50, 50]
    split = blank(split_of([[], [box]], [[], [0]]), tmp_path)
    tie = both(split, (0, 0, 0.9, box), (1, 0, 0.9, box))
    assert (tie.ours, tie.theirs) == (0.5, 1.0) and tie.reasons[0].startswith("2 detections share a score")
    assert both(split, (0, 0, 0.8, box), (1, 0, 0.9, box)).theirs == 1.0


@needs_fiftyone
def test_a_half_is_not_always_a_half(fo: Any, tmp_path: Path) -> None:
    split = blank(split_of([[[0, 4, 51, 22]]], [[0]]), tmp_path, (26, 84))
    half = both(split, (0, 0, 0.9, [0, 4, 51, 13]))
    assert half.ours == pytest.approx(0.1) and half.theirs == 0 and half.reasons[0].startswith("1 IoUs")


@needs_fiftyone
def test_a_crowd_may_come_first_among_many(fo: Any, tmp_path: Path) -> None:
    corner = np.random.default_rng(1).uniform(0, 500, (120, 2))
    many = np.concatenate([corner, corner + 20], 1).tolist()
    boxes = [[[200.0, 200, 300, 300], *many, [150.0, 150, 450, 450]]]
    split = split_of(boxes, [[0] * 122], crowd=[[False] * 121 + [True]])
    taken = both(blank(split, tmp_path), (0, 0, 0.9, [210, 200, 310, 300]))
    assert taken.ours > 0 and taken.theirs == 0 and taken.reasons[0].startswith("1 crowd regions")


@needs_fiftyone
def test_agreement_is_about_the_same_images(fo: Any, found: Findings) -> None:
    dataset = put(found)
    dataset.delete_samples([dataset.first().id])
    with pytest.raises(DataError, match="Expected the 5 images"):
        agreement(dataset, found)


@needs_fiftyone
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_same_map_on_real_annotations(fo: Any, shared: Path, name: str) -> None:
    data = Dataset.open(shared / "data" / name)
    assert data.val is not None
    rows = random_results(np.random.default_rng(0), data.val, 3)
    found = Findings(errors(data.val, rows))
    same = agreement(to_fiftyone(data, found), found)
    assert same.ours > 0.1 and abs(same.difference) < 1e-6
    assert all(abs(a - b) < 1e-6 for a, b in same.per_class.values())
