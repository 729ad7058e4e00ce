"""How detections came to be: the last layer says what evaluation does; every other number is worked out once more."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_iou

from deimkit import evaluate, recipes
from deimkit.boxes import cxcywh_to_xyxy, iou_giou, xyxy_to_cxcywh
from deimkit.criterion import Criterion
from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.data.loader import Loader
from deimkit.data.synthetic import Synthetic
from deimkit.distribution import weighting
from deimkit.errors import DataError, DeimkitError, NonFiniteError
from deimkit.evaluation.coco import Evaluator, Results
from deimkit.evaluation.coco import evaluate as score
from deimkit.evaluation.errors import best_first
from deimkit.evaluation.measure import common_classes, relabelled
from deimkit.explore.answers import edge_spread
from deimkit.explore.layers import all_layers
from deimkit.explore.traces import Traces, trace
from deimkit.matching import Hungarian, PositionModulated, SimOTA
from deimkit.models.detector import Detector
from deimkit.models.postprocess import select
from deimkit.models.predict import predicting, prepare
from deimkit.structures import Output, Predictions, Targets
from tests.micro import ARCH
from tests.test_layers import shaken

ARRAYS = [f.name for f in fields(Traces) if f.name not in ("results", "layers", "fingerprint")]
SIZE = (64, 96)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Seven pictures of 80 px; the first one's boxes are crowds but one, the third has none, one reaches outside."""
    source = Synthetic(train=1, val=7, size=80).write(tmp_path_factory.mktemp("traces") / "scenes")
    found = Dataset.open(source).val
    assert found is not None and np.diff(found.starts)[[0, 2]].all()
    crowd, boxes = found.crowd.copy(), found.boxes.copy()
    crowd[1 : found.starts[1]] = True
    boxes[found.starts[4]] += (-30, 0, 0, 0)
    keep = found.images_of_rows != 2
    counts = np.where(np.arange(7) == 2, 0, np.diff(found.starts))
    return replace(
        found,
        boxes=boxes[keep],
        labels=found.labels[keep],
        crowd=crowd[keep],
        areas=found.areas[keep],
        starts=np.concatenate([[0], counts.cumsum()]),
        annotation_ids=np.arange(keep.sum()),
    )


def model_of(arch=ARCH, classes: CategoryMap | int = 3) -> Detector:
    """A detector with nothing special about its weights."""
    model = shaken(Detector(arch, classes)).eval()
    model.size = SIZE
    return model


def evaluated(model: Detector, split: Split, batch: int) -> Results:
    """What evaluation collects, before any detection is left out."""
    evaluator, classes = Evaluator(split), common_classes(model.categories, split.categories)
    loader = Loader(split, batch=batch, size=model.size, shuffle=False, drop_last=False)
    for shown, task in zip(loader.epoch(0), loader.plan(0), strict=True):
        shown = shown.finish()
        with predicting(model):
            found = select(model(shown.images), shown.sizes, model.categories)
        for i, detections in zip(task.indices, found, strict=True):
            evaluator.add(i, detections if classes is None else relabelled(detections, classes))
    return evaluator.packed().by_image()


def same(a: Results, b: Results) -> bool:
    """Whether two results are equal bit for bit."""
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def model(split: Split) -> Detector:
    torch.manual_seed(0)
    return model_of(classes=split.categories)


@pytest.fixture(scope="module")
def traces(model: Detector, split: Split) -> Traces:
    return trace(model, split, top=300, batch=3)


def test_detections_are_those_of_evaluation(model: Detector, split: Split, traces: Traces) -> None:
    expected = evaluated(model, split, 3)
    assert same(traces.results, expected) and len(traces) == 7 * 160
    assert score(split, traces.results)["AP50"] == evaluate(model, split, batch=3)["AP50"]
    assert np.array_equal(traces.boxes[:, -1], expected.boxes) and np.array_equal(traces.scores[:, -1], expected.score)


@pytest.mark.parametrize("name", ["tiny", "dfine_n", "rtdetrv2_r18vd", "rtdetrv2_r50vd_m"])
def test_any_detector_can_be_traced(name: str, split: Split) -> None:
    recipe, two = recipes.get(name), split.take([0, 2])
    model = recipe.build(split.categories).train()
    model.size = (64, 64)
    found = trace(model, two, recipe.matcher)
    assert model.training
    asked = 3 if name == "rtdetrv2_r50vd_m" else len(model.decoder.layers)  # the one of which a layer before the last
    assert found.layers == (*(f"layer{i}" for i in range(len(model.decoder.layers) - 1)), "final")[:asked]
    assert same(found.results, best(evaluated(model, two, 8), 100))
    assert np.array_equal(found.boxes[:, -1], found.results.boxes)
    assert np.array_equal(found.scores[:, -1], found.results.score)
    assert np.isfinite(found.spread).all() if "rtdetr" not in name else np.isnan(found.spread).all()
    assert (found.matched >= 0).all(1).tolist() == (~two.crowd).tolist()


def best(results: Results, top: int) -> Results:
    """The first so many rows of each image."""
    rows = np.concatenate([np.flatnonzero(results.image == i)[:top] for i in np.unique(results.image)])
    return Results(*(column[rows] for column in results))


def asked_directly(model: Detector, split: Split, i: int) -> tuple[dict[str, Output], Targets, NDArray[np.int64]]:
    """What all layers say of one image, what it should show, and the rows that this is; all without `trace`."""
    image = split.image(i)
    size = np.array(image.shape[1::-1] * 2, np.float32)  # width, height, width, height
    rows = np.arange(*split.starts[i : i + 2])[~split.crowd[split.rows(i)]]
    wanted = xyxy_to_cxcywh(torch.from_numpy(np.clip(split.boxes[rows], 0, size) / size))
    targets = Targets(torch.zeros(len(rows)).long(), torch.from_numpy(split.labels[rows]), wanted)
    outputs = all_layers(model, prepare(image, model.size)[None].float().div_(255))
    return {output.name: output for output in outputs}, targets, rows


def test_every_layer_and_the_start_are_those_of_the_query(model: Detector, split: Split, traces: Traces) -> None:
    firsts: list[Tensor] = []
    hook = model.queries.register_forward_hook(lambda part, given, start: firsts.append(start.boxes.sigmoid()))
    for i in range(len(split)):
        outputs, _, _ = asked_directly(model, split, i)
        mine = traces.results.image == i
        query, label = traces.query[mine], traces.results.label[mine]
        size = np.tile(split.sizes[i][::-1], 2)
        assert len(set(zip(query.tolist(), label.tolist(), strict=True))) == 160, "20 queries with 8 classes each"
        for layer, name in enumerate(traces.layers):
            preds = outputs[name].preds
            expected = cxcywh_to_xyxy(preds.boxes[0, query]).numpy() * size
            np.testing.assert_allclose(traces.boxes[mine, layer], expected, atol=1e-3)
            scores = preds.logits[0, query, label].sigmoid().numpy()
            np.testing.assert_allclose(traces.scores[mine, layer], scores, atol=1e-5)
        np.testing.assert_allclose(traces.start[mine], cxcywh_to_xyxy(firsts[-1][0, query]).numpy() * size, atol=1e-3)
    hook.remove()
    centres = (traces.start[:, :2] + traces.start[:, 2:]) / 2
    assert ((centres >= 0) & (centres <= 80)).all(), "a query starts inside of the image"


def test_spread_is_that_of_the_edges(model: Detector, split: Split, traces: Traces) -> None:
    refine, W = model.arch.refine, weighting().double().numpy()
    for i in (0, 5):
        outputs, _, _ = asked_directly(model, split, i)
        mine = traces.results.image == i
        query, preds = traces.query[mine], outputs["final"].preds
        chance = preds.edges[0, query].double().softmax(-1).numpy()
        variance = (chance * W**2).sum(-1) - (chance * W).sum(-1) ** 2
        side = preds.anchors[0, query, 2:].double().numpy() * split.sizes[i][::-1]  # (n, 2) width and height in pixels
        expected = np.sqrt(variance) * np.tile(side, 2) / refine.scale
        np.testing.assert_allclose(traces.spread[mine], expected, rtol=1e-3)
    assert np.ptp(traces.spread) > 0


def test_spread_by_hand() -> None:
    """Half on no offset and half on the outermost: 2 units of side / 4 apart from the mean."""
    model = model_of()
    edges = torch.full((1, 2, 4, 33), -torch.inf)
    edges[..., 16] = 0
    edges[0, 1, :2, 32] = 0
    anchors = torch.tensor([[[0.5, 0.5, 0.2, 0.1]] * 2])
    preds = Predictions(torch.zeros(1, 2, 3), anchors, edges, anchors)
    expected = torch.tensor([[0.0] * 4, [2 * 0.2 / 4, 2 * 0.1 / 4, 0, 0]])
    torch.testing.assert_close(edge_spread(model, preds, torch.tensor([0, 0]), torch.tensor([0, 1])), expected)


@pytest.mark.parametrize(
    "matcher", [None, Hungarian(cls=0.5), PositionModulated()], ids=["given", "other", "modulated"]
)
def test_annotations_know_the_query_that_the_matcher_gives_them(model, split, traces, matcher) -> None:
    found = traces if matcher is None else trace(model, split, matcher, batch=7)
    criterion, seen = Criterion((), matcher or Hungarian()), np.zeros(len(split.labels), bool)
    for i in range(len(split)):
        outputs, targets, rows = asked_directly(model, split, i)
        for layer, name in enumerate(found.layers):
            match = criterion.match([outputs[name]], targets)[0]
            query = np.full(len(rows), -1)
            query[match.target] = match.query
            assert found.matched[rows, layer].tolist() == query.tolist()
            preds, found_rows = outputs[name].preds, rows[match.target]
            iou = iou_giou(preds.boxes[0, match.query], targets.boxes[match.target])[0].numpy()
            np.testing.assert_allclose(found.matched_iou[found_rows, layer], iou, atol=1e-4)
            scores = preds.logits[0, match.query, targets.labels[match.target]].sigmoid().numpy()
            np.testing.assert_allclose(found.matched_score[found_rows, layer], scores, atol=1e-5)
        seen[rows] = True
    assert seen.tolist() == (~split.crowd).tolist() and (found.matched[~seen] == -1).all()
    nobody = found.matched < 0
    assert nobody[seen].any(), "23 annotations in one image, and 20 queries"
    assert np.array_equal(np.isnan(found.matched_iou), nobody) and np.array_equal(np.isnan(found.matched_score), nobody)


def test_of_several_queries_the_nearest_is_told(model: Detector, split: Split) -> None:
    found, several = trace(model, split, SimOTA()), 0
    for i in range(len(split)):
        outputs, targets, rows = asked_directly(model, split, i)
        final = outputs["final"]
        match = SimOTA()([final], targets)[0]
        iou = iou_giou(final.preds.boxes[0, match.query], targets.boxes[match.target])[0]
        for k, row in enumerate(rows):
            mine = match.target == k
            several += int(mine.sum()) > 1 and float(iou[mine].amax()) > 0
            if mine.any():
                assert found.matched[row, -1] in match.query[mine]
                assert found.matched_iou[row, -1] == pytest.approx(float(iou[mine].amax()), abs=1e-4)
            else:
                assert found.matched[row, -1] == -1
    assert several


def test_classes_are_matched_by_name(split: Split) -> None:
    """A detector with a class more, another order and one class unknown speaks of those that both have."""
    names = split.categories.names
    model = model_of(classes=CategoryMap.of(["other", *reversed(names[1:])]))
    found = trace(model, split, top=300, batch=3)
    assert same(found.results, evaluated(model, split, 3))
    assert set(found.results.label) == set(range(1, len(names)))
    unknown = split.labels == 0
    assert unknown.any() and (found.matched[unknown] == -1).all()
    matched = np.flatnonzero(found.matched[:, -1] >= 0)
    assert len(matched) > 20
    for row in matched:
        same_pair = (found.results.image == split.images_of_rows[row]) & (found.query == found.matched[row, -1])
        same_pair &= found.results.label == split.labels[row]
        assert found.scores[same_pair][0, -1] == pytest.approx(found.matched_score[row, -1])
    with pytest.raises(DataError, match="none is in both"):
        trace(model_of(classes=["moon"]), split)


def test_the_best_are_kept(model: Detector, split: Split, traces: Traces) -> None:
    assert same(trace(model, split, top=7, batch=3).results, best(traces.results, 7))
    least = float(np.median(traces.results.score))
    sure = trace(model, split, threshold=least, batch=3)
    kept = traces.results.score >= least
    assert same(sure.results, Results(*(column[kept] for column in traces.results)))
    assert np.array_equal(sure.boxes, traces.boxes[kept]) and np.array_equal(sure.query, traces.query[kept])
    assert np.array_equal(sure.matched, traces.matched), "annotations are traced whatever is kept"


def test_only_so_many_of_a_class_are_kept(split: Split, traces: Traces) -> None:
    kept = traces.of_class(2)
    judged = best_first(traces.results, 2)
    assert 0 < len(kept) < len(traces)
    for ours, theirs in zip(kept.results, judged, strict=True):
        assert np.array_equal(ours, theirs), "the rows that Errors keeps"
    assert np.array_equal(kept.boxes[:, -1], kept.results.boxes.astype(np.float32))
    assert np.array_equal(kept.matched, traces.matched) and len(traces.of_class(1000)) == len(traces)


def test_nothing_to_find_and_nothing_found(model: Detector, split: Split) -> None:
    for images, threshold in (([], 0.0), ([2], 1.0)):  # no image; one image, without boxes
        found = trace(model, split.take(images), threshold=threshold)
        assert len(found) == 0 and found.boxes.shape == (0, 2, 4) and found.scores.shape == (0, 2)
        assert found.start.shape == found.spread.shape == (0, 4) and found.results.boxes.shape == (0, 4)
        assert found.matched.shape == found.matched_iou.shape == found.matched_score.shape == (0, 2)
        assert found.iou(np.empty(0, int)).shape == (0, 2) and found.query.dtype == found.matched.dtype == np.int32
    found = trace(model, split.take([2]), top=300)
    assert len(found) == 160 and found.matched.shape == (0, 2) and np.isnan(found.iou(np.full(160, -1))).all()


def test_overlaps_with_annotations(split: Split, traces: Traces) -> None:
    target = np.arange(len(traces)) % (len(split.labels) + 1) - 1
    found = traces.iou(target)
    for k in range(len(traces)):
        if target[k] < 0:
            assert np.isnan(found[k]).all()
            continue
        wanted = torch.from_numpy(split.boxes[target[k]]).double()[None]
        expected = box_iou(torch.from_numpy(traces.boxes[k]).double(), wanted)[:, 0]
        np.testing.assert_allclose(found[k], expected, atol=1e-5)
    assert np.nanmax(found) > 0.1


def test_the_model_stays_in_its_modes(model: Detector, split: Split) -> None:
    model.train()
    model.backbone.eval()
    modes = [part.training for part in model.modules()]
    trace(model, split.take([0]))
    assert [part.training for part in model.modules()] == modes
    model.eval()


def test_remarks_workers_and_size(model: Detector, split: Split, traces: Traces) -> None:
    remarks: list[str] = []
    found = trace(model, split, top=300, batch=3, workers=1, progress=remarks.append)
    assert remarks == ["tracing 3/7", "tracing 6/7", "tracing 7/7"]
    assert all(np.array_equal(getattr(found, f), getattr(traces, f), equal_nan=True) for f in ARRAYS)
    square = trace(model, split, batch=3, size=64)
    assert same(square.results, trace(model, split, batch=3, size=(64, 64)).results)
    assert not np.array_equal(square.boxes[:100], traces.boxes[:60])


def test_traces_are_kept_in_a_file(split: Split, traces: Traces, tmp_path: Path) -> None:
    file = traces.save(tmp_path / "ours.traces")
    again = Traces.load(file)
    assert list(tmp_path.iterdir()) == [file] and same(again.results, traces.results)
    assert again.layers == traces.layers == ("layer0", "final") and again.fingerprint == split.fingerprint()
    for name in ARRAYS:
        a, b = getattr(again, name), getattr(traces, name)
        assert np.array_equal(a, b, equal_nan=True) and a.dtype == b.dtype
    assert repr(again) == f"Traces(1120 detections and {len(split.labels)} annotations, 2 layers)"


def test_what_holds_no_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.npz does not exist"):
        Traces.load(tmp_path / "nothing.npz")
    text, other, cut, array = (tmp_path / name for name in ("text", "other.npz", "cut.npz", "array.npy"))
    text.write_text("no traces")
    np.savez(other, query=np.zeros(3))
    cut.write_bytes(other.read_bytes()[:100])
    np.save(array, np.zeros(3))
    for file in (text, other, cut, array, tmp_path):
        with pytest.raises(DataError, match="holds no traces"):
            Traces.load(file)


def test_what_cannot_be_traced_is_refused(model: Detector, split: Split, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(split.paths[3].read_bytes()[:200])
    broken = replace(split, paths=[*split.paths[:3], tmp_path / "broken.jpg", *split.paths[4:]])
    with pytest.raises(DataError, match="broken.jpg"):
        trace(model.train(), broken)
    assert model.training
    model.eval()
    with pytest.raises(DeimkitError, match="threshold=50"):
        trace(model, split, threshold=50)
    with pytest.raises(DeimkitError, match="top=0"):
        trace(model, split, top=0)
    with pytest.raises(DeimkitError, match="deployed"):
        trace(model.deploy(), split)
    lost = deepcopy(model)
    nn.init.constant_(lost.refine.score[-1].weight, torch.nan)
    with pytest.raises(NonFiniteError, match="image 0 of the batch"):
        trace(lost, split)


@pytest.mark.gpu
def test_on_a_gpu(model: Detector, split: Split) -> None:
    found = trace(deepcopy(model).cuda(), split)
    assert np.array_equal(found.boxes[:, -1], found.results.boxes.astype(np.float32))
    assert (found.matched >= 0).all(1).tolist() == (~split.crowd).tolist()
