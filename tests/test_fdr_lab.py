"""The labs about D-FINE's boxes: what they compute is the library's or worked out by hand, and they draw just that."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deimkit.boxes import xyxy_to_cxcywh
from deimkit.criterion import Criterion
from deimkit.distribution import decode, expectation, weighting
from deimkit.errors import DeimkitError
from deimkit.explore.labs.edges import EDGES, look
from deimkit.explore.labs.fdr_lab import DistillationLab, RefinementLab, WeightingLab, refinement, weighting_function
from deimkit.explore.labs.lab import Choice, Lab
from deimkit.explore.labs.loss_curves import matched
from deimkit.explore.labs.strips import edge_and_bin, place
from deimkit.explore.layers import all_layers
from deimkit.explore.still import picture
from deimkit.losses import DDF, FGL
from deimkit.models.detector import Detector
from deimkit.models.predict import prepare
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.structures import Batch, Targets
from tests.micro import ARCH
from tests.test_layers import shaken

PICTURE = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
THREE = replace(ARCH, decoder=replace(ARCH.decoder, layers=3))


@pytest.fixture(scope="module")
def model() -> Detector:
    torch.manual_seed(0)
    detector = shaken(Detector(THREE, ["ant", "bee"])).eval()
    with torch.no_grad():
        for head in detector.refine.box:
            head.layers[-1].weight.normal_(0, 0.5)
    detector.size = (64, 64)
    return detector


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.3], [0.5, 0.5, 0.8, 0.6]])
    return Batch(torch.rand(2, 3, 64, 64), Targets(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), boxes))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def ends(lab: Lab) -> Iterator[dict[str, object]]:
    """Every control at both of its ends, one after the other."""
    for control in lab.controls():
        values = control.options if isinstance(control, Choice) else (control.low, control.high)
        yield from ({control.name: value} for value in (values[0], values[-1]))


def check_whole(lab: Lab) -> None:
    """Every control at both ends: the same traces, finite numbers, words; and the still picture can be drawn."""
    shape = [(trace.type, trace.name) for trace in lab.figure().data]
    for move in ends(lab):
        figure = lab.set(**move).figure()
        assert [trace.type for trace in figure.data] == [kind for kind, _ in shape]
        assert len(lab.words(lab.found)) > 60 and "nan" not in lab.words(lab.found)
        for trace in figure.data:
            numbers = [v for v in np.ravel(trace.y) if not isinstance(v, str)]
            assert not np.isinf(np.array(numbers, float)).any(), trace.name
        for axis in figure.select_yaxes():
            assert axis.range is None or all(isinstance(end, (int, float)) and math.isfinite(end) for end in axis.range)
    assert picture(lab.figure()).axes


def near(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A box near another one, and how far out its edges are from that one's."""
    out = np.array([0.13, -0.05, 0.08, -0.11]) * np.tile(box[2:] - box[:2], 2)
    return box + out * [-1, -1, 1, 1], out


def trace(lab: Lab, name: str, nth: int = 0):
    """The n-th trace of a name in the lab's figure."""
    return [trace for trace in lab.figure().data if trace.name == name][nth]


# --------------------------------------------------------------------------------------------------- W(n)


def test_w_is_the_published_one_in_sides_of_the_box(shared: Path) -> None:
    golden = np.load(shared / "golden/losses/primitives.npz")
    for up, scale, bins in ((0.5, 4, 32), (0.25, 8, 16), (1.0, 2, 32)):
        lab = WeightingLab().set(a=up, c=1 / scale, N=bins)
        np.testing.assert_allclose(lab.found.W * scale, golden[f"W/up{up}_rs{scale}_rm{bins}"], rtol=1e-5, atol=1e-6)


def test_the_offset_lies_between_its_two_bins() -> None:
    found = WeightingLab().set(a=0.5, c=0.25, N=6, offset=0.3).found
    W = [-1, -0.5, (1 - 3**0.5) / 4, 0, (3**0.5 - 1) / 4, 0.5, 1]  # u = 2, step = 3 ** (2 / 4)
    np.testing.assert_allclose(found.W, W, atol=1e-12)
    np.testing.assert_allclose(found.uniform, np.linspace(-1, 1, 7), atol=1e-12)
    assert found.left == 4 and found.right == pytest.approx((0.3 - W[4]) / (W[5] - W[4]))
    assert found.rebuilt == pytest.approx(0.3)


def test_errors_are_those_of_the_bins() -> None:
    lab = WeightingLab().set(side=200)
    found = lab.found
    W = weighting(32, 0.5, 4.0, torch.float64).numpy() / 4
    nearest = np.abs(found.offsets[:, None] - W).min(1) * 200
    np.testing.assert_allclose(found.errors["W(n), nearest bin"], nearest, atol=1e-6)
    inside = np.abs(found.offsets) <= 1
    assert found.errors["W(n), two bins, float32"][inside].max() < 1e-3
    half = found.errors["W(n), two bins, float16"]
    assert 0.001 < half[inside].max() < 0.2, "eleven bits of a number up to 4, in pixels of a side of 200"
    clamped = (np.abs(found.offsets) - 1).clip(0) * 200  # beyond the last bin
    np.testing.assert_allclose(found.errors["W(n), two bins, float32"], clamped, atol=1e-3)
    uniform = found.errors["uniform, nearest bin"]
    near = np.abs(found.offsets) < 0.05
    assert uniform[near].max() == pytest.approx(200 / 32, rel=0.05) and nearest[near].max() < 2.5
    np.testing.assert_array_equal(trace(lab, "uniform, nearest bin").y, uniform)


def test_large_c_makes_even_steps() -> None:
    steps = np.diff(WeightingLab().set(c=2.0).found.W[1:-1])
    assert steps.max() / steps.min() < 1.3
    steps = np.diff(WeightingLab().set(c=0.05).found.W[1:-1])
    assert steps.max() / steps.min() > 5


def test_a_click_on_a_bin_takes_its_offset_and_odd_numbers_of_bins_are_refused() -> None:
    lab = WeightingLab()
    assert lab.clicked("W(n)", 3, -0.4) == {"offset": -0.4} and lab.clicked("bins of W(n)", 0.2, 1) == {"offset": 0.2}
    assert lab.clicked("uniform", 32, 2.0) == {"offset": 1.25} and lab.clicked("offset", 1, 1) == {}
    with pytest.raises(DeimkitError, match="N is even"):
        lab.compute(a=0.5, c=0.25, N=33, offset=0.0, side=100)


def test_weighting_lab_at_both_ends_of_every_control() -> None:
    check_whole(WeightingLab())


def test_the_words_say_what_is_clamped() -> None:
    lab = WeightingLab().set(offset=1.2)
    assert "beyond the last bin" in lab.words(lab.found) and lab.found.rebuilt == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------- refinement


def test_edges_are_what_the_model_says(model: Detector) -> None:
    edges = look(model, PICTURE, objects=5)
    shown = prepare(PICTURE, model.size).float().div(255)[None]
    outputs = {output.name: output.preds for output in all_layers(model, shown)}
    assert edges.layers == ("layer0", "layer1", "final")
    assert (np.diff(edges.scores) <= 0).all() and len(edges.names) == len(edges.scores) <= 5
    assert edges.scores[0] == pytest.approx(float(outputs["final"].logits.sigmoid().max()))
    size = torch.tensor([128.0, 96, 128, 96])
    for k, name in enumerate(edges.layers):
        said = outputs[name]
        query = int(outputs["final"].logits[0].amax(-1).argmax())
        np.testing.assert_allclose(edges.chance[k, 0], said.edges[0, query].softmax(-1), atol=1e-6)
        moved = torch.from_numpy((edges.chance[k] * edges.offsets).sum(-1))  # (n, 4) pixels outwards
        boxes = edges.anchors + moved.numpy() * [-1, -1, 1, 1]
        np.testing.assert_allclose(boxes, edges.boxes[k], atol=1e-3)  # parts add up to where the edges are
        again = decode(said.anchors, expectation(said.edges, weighting()))[0, query]
        np.testing.assert_allclose(xyxy_to_cxcywh(torch.from_numpy(edges.boxes[k, 0])), again * size, atol=1e-3)


def test_entropy_by_hand(model: Detector) -> None:
    edges = look(model, PICTURE, objects=1)
    one, even = np.eye(33)[3], np.full(33, 1 / 33)
    two = 0.5 * np.eye(33)[3] + 0.5 * np.eye(33)[4]
    known = replace(edges, chance=np.stack([one, even, two, one])[None, None])
    np.testing.assert_allclose(known.bits[0, 0], [0, math.log2(33), 1, 0], atol=1e-12)


def test_the_target_is_the_one_that_fgl_teaches(model: Detector) -> None:
    wanted, out = near(look(model, PICTURE, objects=1).anchors[0])
    edges = look(model, PICTURE, truth=[[0, 0, 4, 4], wanted], objects=1)
    np.testing.assert_allclose(edges.wanted[0], wanted, atol=1e-4)
    np.testing.assert_allclose(edges.target.sum(-1), 1, atol=1e-9)
    outwards = (edges.target * edges.offsets).sum(-1)[0]
    np.testing.assert_allclose(outwards, out, atol=1e-3)
    assert ((edges.target[0] > 0).sum(-1) <= 2).all()


def test_without_an_annotated_box_nothing_is_wanted(model: Detector) -> None:
    for truth in (None, np.empty((0, 4)), [[0, 0, 2, 2]]):
        edges = look(model, PICTURE, truth, objects=2)
        assert np.isnan(edges.target).all() and np.isnan(edges.wanted).all()


def test_refinement_lab_draws_what_it_found(model: Detector) -> None:
    lab = RefinementLab(model, PICTURE, objects=3).set(layer="layer1", edge="right", bin=20)
    found = lab.found
    assert found.layer == 1 and found.edge == 2 and found.bin == 20
    drawn = trace(lab, "chosen layer")
    at = place(2, 20, 33)
    assert drawn.x[at] == at and drawn.y[at] == found.chance[1, 2, 20] and np.isnan(drawn.y[place(2, 33, 33)])
    assert trace(lab, "chosen layer", 1).y[at] == pytest.approx(found.chance[1, 2, 20] * found.offsets[2, 20])
    np.testing.assert_array_equal(trace(lab, "right").y, found.bits[:, 2])
    assert trace(lab, "W(n)").y[20] == found.offsets[2, 20]
    assert f"{found.parts[1, 2, 20]:+.3f} px" in lab.words(found)
    sides = np.diff(found.boxes[0].reshape(2, 2), axis=0)[0]
    np.testing.assert_allclose(found.offsets[:, -1], np.tile(sides, 2), atol=1e-4)  # the last bin is one side out
    np.testing.assert_allclose(found.moved[-1] * [-1, -1, 1, 1], found.boxes[-1] - found.boxes[0], atol=1e-3)


def test_a_click_leads_from_picture_to_edge_to_bin(model: Detector) -> None:
    lab = RefinementLab(model, PICTURE, objects=3)
    x, y, right, bottom = lab.found.boxes[1]
    assert lab.clicked("edges", (x + right) / 2, bottom) == {"edge": "bottom"}
    assert lab.clicked("edges", x, (y + bottom) / 2) == {"edge": "left"}
    assert lab.clicked("chosen layer", place(3, 7, 33), 0.1) == {"edge": "bottom", "bin": 7}
    assert lab.clicked("top", "layer1", 4.0) == {"edge": "top", "layer": "layer1"}
    assert lab.clicked("W(n)", 5, 1.0) == {"bin": 5} and lab.clicked("last box", 1, 1) == {}
    assert edge_and_bin(place(1, 0, 33) - 1, 33) == {}, "between two edges there is nothing"


@pytest.mark.parametrize("truth", [None, [[10, 10, 90, 80]]])
def test_refinement_lab_at_both_ends_of_every_control(model: Detector, truth: object) -> None:
    check_whole(RefinementLab(model, PICTURE, truth, objects=2))


def test_no_objects_and_boxes_of_another_shape_are_refused(model: Detector) -> None:
    with pytest.raises(DeimkitError, match="1 or more; got 0"):
        RefinementLab(model, PICTURE, objects=0)
    with pytest.raises(DeimkitError, match=r"\(m, 4\) xyxy in pixels; got \(4, 5\)"):
        RefinementLab(model, PICTURE, np.ones((4, 5)))


# -------------------------------------------------------------------------------------------- distillation


def test_weights_and_divergences_make_the_loss(model: Detector, batch: Batch) -> None:
    lab = DistillationLab(model, batch)
    assert lab.layers == ("layer0", "layer1")
    outputs = all_layers(model, batch.images)
    for T in (1.0, 5.0):
        terms = Criterion((DDF(weight=1.0, T=T),))(outputs, batch.targets)
        total = np.zeros(2)
        for rank in range(len(lab.order)):
            found = lab.set(rank=rank, T=T).found
            total += found.kl.mean(-1) * found.weights[:, rank]
        np.testing.assert_allclose(total, [float(terms[f"ddf/{name}"]) for name in lab.layers], rtol=1e-4)
        np.testing.assert_allclose(found.loss, total, rtol=1e-4)


def test_weights_are_decoupled(model: Detector, batch: Batch) -> None:
    """Matched: IoU; others: the teacher's confidence; means of both, blended by the roots of their numbers."""
    lab = DistillationLab(model, batch)
    found, match = lab.found, lab.pairs.matches[0]
    matched, count = len(match.query), found.weights.shape[1]
    assert found.matched.sum() == matched and 3 <= matched < count
    blend = matched**0.5 / (matched**0.5 + (count - matched) ** 0.5)
    iou = lab.pairs.iou.view(2, matched)[0].numpy()
    hit = found.matched > 0
    np.testing.assert_allclose(np.sort(found.weights[0][hit]), np.sort(iou) * blend / matched, rtol=1e-5)
    confidence = all_layers(model, batch.images)[-1].preds.logits.sigmoid().amax(-1).flatten()[lab.order].numpy()
    np.testing.assert_allclose(found.weights[1][~hit], confidence[~hit] * (1 - blend) / (count - matched), rtol=1e-5)
    assert (np.diff(found.weights.mean(0)) <= 1e-12).all(), "heaviest first"


def test_kl_by_hand(model: Detector, batch: Batch) -> None:
    found = DistillationLab(model, batch).set(rank=2, T=3.0).found
    p, q = found.taught, found.learned
    np.testing.assert_allclose(found.kl, 9 * (p * np.log(p / q)).sum(-1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose([p.sum(-1), q[0].sum(-1)], 1, atol=1e-5)


def test_with_t_squared_the_gradient_keeps_its_size(model: Detector, batch: Batch) -> None:
    """For large T, T² KL tends to half the mean square of the logits' difference, whose gradient knows no T."""
    lab = DistillationLab(model, batch)
    found = lab.found
    image, query = found.image, found.query
    off = (lab.student[0, image, query] - lab.teacher[image, query]).numpy()
    off -= off.mean(-1, keepdims=True)
    assert found.slope[-1] == pytest.approx(np.linalg.norm(off) / 33 / 4, rel=0.2)  # a mean of four edges
    assert 0.2 < found.slope[0] / found.slope[-1] < 20


def test_a_query_is_called_by_its_target(model: Detector, batch: Batch) -> None:
    lab = DistillationLab(model, batch)
    match = lab.pairs.matches[0]
    row = {(int(i), int(q)): int(batch.targets.labels[t]) for i, q, t in zip(*match, strict=True)}
    for rank in range(len(lab.order)):
        found = lab.set(rank=rank).found
        known = row.get((found.image, found.query))
        assert found.meant == ("" if known is None else ("ant", "bee")[known])
        assert bool(found.matched[rank]) == (known is not None)


def test_distillation_lab_draws_what_it_found(model: Detector, batch: Batch) -> None:
    lab = DistillationLab(model, batch).set(rank=1, layer="layer1", edge="top", T=2.0)
    found = lab.found
    np.testing.assert_array_equal(trace(lab, "KL").z, found.kl)
    assert trace(lab, "student").y[place(1, 4, 33)] == found.learned[1, 1, 4]
    assert len(trace(lab, "matched").x) + len(trace(lab, "unmatched").x) == len(lab.order)
    assert lab.clicked("KL", "bottom", "layer0") == {"edge": "bottom", "layer": "layer0"}
    assert lab.clicked("unmatched", 7, 0.1) == {"rank": 7} and lab.clicked("without", 1, 1) == {}
    assert lab.clicked("student", place(2, 7, 33), 0.1) == {"edge": "right"}


def test_distillation_lab_at_both_ends_of_every_control(model: Detector, batch: Batch) -> None:
    check_whole(DistillationLab(model, batch))


def test_images_without_boxes_are_distilled_too(model: Detector) -> None:
    empty = Batch(torch.rand(1, 3, 64, 64), Targets(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0, 4)))
    lab = DistillationLab(model, empty)
    assert (
        lab.found.matched.sum() == 0 and lab.found.meant == "" and "0 of 20 queries are matched" in lab.words(lab.found)
    )
    check_whole(lab)


def test_targets_of_classes_that_the_detector_lacks_are_refused(model: Detector, batch: Batch) -> None:
    labels = batch.targets.labels + len(model.categories)
    strange = replace(batch, targets=replace(batch.targets, labels=labels))
    for ask in (DistillationLab, matched):
        with pytest.raises(
            DeimkitError, match=f"got a target of class {int(labels.max())}. Give it a dataset in its own"
        ):
            ask(model, strange)


def test_fresh_weights_teach_nothing_yet(batch: Batch) -> None:
    """All layers say the same before the first step: divergence and gradient are 0, and the lab still draws."""
    torch.manual_seed(0)
    lab = DistillationLab(Detector(THREE, 2), batch)
    assert lab.found.loss.max() == 0 and lab.found.slope.max() < 1e-6  # rounding, times T
    check_whole(lab)


# --------------------------------------------------------------------------------------- refusals and figures


def test_a_detector_without_edges_is_refused(batch: Batch) -> None:
    deltas = Detector(replace(rtdetrv2_arch("tiny", "silu"), queries=ARCH.queries), 2)
    deltas.size = (64, 64)
    said = re.escape("got a detector that refines by LookForwardTwice")
    with pytest.raises(DeimkitError, match=said):
        RefinementLab(deltas, PICTURE)
    with pytest.raises(DeimkitError, match=said):
        DistillationLab(deltas, batch)


def test_one_layer_has_nobody_to_teach(batch: Batch) -> None:
    alone = Detector(replace(ARCH, decoder=replace(ARCH.decoder, layers=1)), 2)
    with pytest.raises(DeimkitError, match="got a decoder of one layer"):
        DistillationLab(alone, batch)


def test_the_papers_figures(model: Detector) -> None:
    curves = [trace for trace in weighting_function().data if trace.xaxis == "x"]
    paper = weighting(32, 0.5, 4.0).numpy() / 4
    np.testing.assert_allclose(curves[0].y, paper, atol=1e-6)
    assert all(list(a.x) == list(b.x) for a, b in pairwise(curves)) and picture(weighting_function()).axes
    figure = refinement(model, [PICTURE, PICTURE[:, :80]])
    named = [trace for trace in figure.data if trace.name == "after the last"]
    assert len(named) == 4 and len(figure.layout.images) == 2
    for k in range(4):
        np.testing.assert_allclose(np.nansum(named[0].y[place(k, 0, 33) : place(k, 33, 33)]), 1, atol=1e-5)
    assert picture(figure).axes
    with pytest.raises(DeimkitError, match="shows 1 to 4 pictures; got 0"):
        refinement(model, [])


def test_fgl_pulls_a_distribution_to_the_two_bins_that_the_lab_shows(model: Detector) -> None:
    """The gradient of FGL at a pair's logits is what the model says less what the lab calls wanted, times the IoU."""
    shown = prepare(PICTURE, model.size).float().div(255)[None]
    wanted, _ = near(look(model, PICTURE, objects=1).anchors[0])
    edges = look(model, PICTURE, [wanted.tolist()], objects=1)
    outputs = [replace(output) for output in all_layers(model, shown) if output.name == "final"]
    preds = outputs[0].preds
    preds.edges = preds.edges.clone().requires_grad_()
    box = xyxy_to_cxcywh(torch.tensor(wanted / [128, 96, 128, 96]).float())[None]
    query = int(preds.logits[0].amax(-1).argmax())
    targets = Targets(torch.tensor([0]), preds.logits[0, query].argmax()[None], box)
    criterion = Criterion((FGL(weight=1.0),))
    own, pairs = criterion.pairs(outputs, targets)
    assert pairs.matches[0].query.tolist() == [query]
    criterion(outputs, targets)["fgl/final"].backward()
    expected = (edges.chance[-1, 0] - edges.target[0]) * float(pairs.iou)
    np.testing.assert_allclose(preds.edges.grad[0, query], expected, atol=1e-4)


def test_edges_have_four_names() -> None:
    assert EDGES == ("left", "top", "right", "bottom")
