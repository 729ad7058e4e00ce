"""What a detector did with an image: the numbers are those of its own modules, and it does not notice being asked."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deimkit import recipes
from deimkit.boxes import cxcywh_to_xyxy
from deimkit.errors import DataError, DeimkitError
from deimkit.explore.labs.anatomy import Anatomy, dissect
from deimkit.explore.labs.anatomy_figures import draw_cells, draw_influence, draw_maps, draw_trajectories
from deimkit.explore.labs.anatomy_flow import draw_step, flow
from deimkit.explore.labs.anatomy_lab import AnatomyLab
from deimkit.explore.labs.anatomy_step import influence, part_of, take_step
from deimkit.explore.layers import all_layers
from deimkit.models.detector import Detector
from deimkit.models.predict import prepare
from deimkit.models.queries import cell_anchors
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.structures import Batch, Targets
from deimkit.training.learner import Learner
from tests.micro import ARCH, MICRO

DELTAS = replace(rtdetrv2_arch("tiny", "silu"), queries=ARCH.queries, groups=ARCH.groups)
DISCRETE = replace(DELTAS, decoder=replace(DELTAS.decoder, discrete=True))
ARCHS = {"gated": ARCH, "projected": DELTAS, "discrete": DISCRETE}
RTDETR = replace(recipes.get("deim_rtdetrv2_tiny"), arch=DELTAS)
PICTURE = np.random.default_rng(1).integers(0, 256, (50, 80, 3), np.uint8)


def shaken(arch) -> Detector:
    """A detector of which no weight, and no batch norm's mean, has a special value."""
    model = Detector(arch, ["a", "b", "c"])
    model.size = (64, 96)
    with torch.no_grad():
        for values in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            values += 0.05 * torch.randn_like(values)
    return model


def shown(model: Detector) -> Tensor:
    """The picture as the detector is shown it, (1, 3, h, w)."""
    return prepare(PICTURE, model.size).div(255)[None]


def batch(boxes: int = 3) -> Batch:
    """Two images as the loader ships them, with so many boxes in the first and one in the second."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    which = torch.tensor([0] * boxes + [1] * bool(boxes), dtype=torch.long)
    sides = 0.2 + 0.2 * torch.rand(len(which), 4, generator=generator)
    return Batch(images, Targets(which, torch.arange(len(which)) % 3, sides))


@pytest.fixture(params=ARCHS)
def model(request: pytest.FixtureRequest) -> Detector:
    return shaken(ARCHS[request.param])


# ------------------------------------------------------------------------------------------------------ dissect


def test_the_weights_of_a_head_add_up_to_one(model: Detector) -> None:
    anatomy = dissect(model, PICTURE)
    assert len(anatomy.gazes) == model.arch.decoder.layers
    for gaze in anatomy.gazes:
        assert gaze.weights.shape == (20, model.arch.decoder.heads, sum(anatomy.points))
        torch.testing.assert_close(gaze.weights.sum(-1), torch.ones(gaze.weights.shape[:2]))
        assert gaze.weights.std() > 1e-4, "weights that are all alike would prove nothing"


def test_sampling_by_hand_sees_what_the_module_sees(model: Detector) -> None:
    """Bilinear at the locations, times the weights, summed over points and levels; for whole cells at their centres."""
    anatomy = dissect(model, PICTURE)
    for layer, gaze in zip(model.decoder.layers, anatomy.gazes, strict=True):
        heads = []
        for h in range(gaze.weights.shape[1]):
            total: Tensor = torch.zeros(())
            parts = gaze.locations.split(anatomy.points, 2), gaze.weights.split(anatomy.points, 2)
            for value, at, weight in zip(gaze.values, *parts, strict=True):
                grid = 2 * at[:, h][None] - 1  # (1, Q, points, 2)
                found = F.grid_sample(value[h][None], grid, mode="bilinear", align_corners=False)[0]  # (D / H, Q, P)
                total = total + (found * weight[:, h]).sum(-1).T
            heads.append(total)
        seen = torch.cat(heads, 1)
        projected = getattr(layer.cross_attn, "output_proj", nn.Identity())
        torch.testing.assert_close(projected(seen), gaze.seen, atol=1e-5, rtol=1e-5)


def test_the_cells_are_those_that_became_queries(model: Detector) -> None:
    anatomy, starts = dissect(model, PICTURE), []
    model.queries.register_forward_hook(lambda _, given, start: starts.append((given, start)))
    with torch.no_grad():
        model.eval()(shown(model))
        (tokens, shapes), start = starts[0]
        anchors, valid = cell_anchors(shapes, torch.device("cpu"), torch.float32)
        features = model.queries.memory(tokens * valid)[0]
    assert anatomy.shapes == shapes
    torch.testing.assert_close(features[anatomy.chosen], start.content[0])
    torch.testing.assert_close(anatomy.cells[anatomy.chosen], start.proposals.logits[0])
    best = anatomy.cells.amax(1)
    assert best[anatomy.chosen].tolist() == sorted(best.tolist(), reverse=True)[:20]
    inside = valid[anatomy.chosen, 0]
    torch.testing.assert_close(anatomy.places[inside], anchors[anatomy.chosen][inside, :2].sigmoid())
    torch.testing.assert_close(torch.cat([x.flatten() for x in anatomy.confidence]), best.sigmoid())


def test_places_and_levels_are_counted_row_by_row() -> None:
    anatomy = dissect(shaken(ARCH), PICTURE)  # levels of 8 x 12, 4 x 6 and 2 x 3 cells
    anatomy = replace(anatomy, chosen=torch.tensor([0, 13, 95, 96, 119, 120, 125]))
    assert anatomy.shapes == ((8, 12), (4, 6), (2, 3))
    assert anatomy.level.tolist() == [0, 0, 0, 1, 1, 2, 2]
    x, y = anatomy.places.T
    assert x.tolist() == pytest.approx([0.5 / 12, 1.5 / 12, 11.5 / 12, 0.5 / 6, 5.5 / 6, 0.5 / 3, 2.5 / 3])
    assert y.tolist() == pytest.approx([0.5 / 8, 1.5 / 8, 7.5 / 8, 0.5 / 4, 3.5 / 4, 0.5 / 2, 1.5 / 2])
    assert anatomy.point_level.tolist() == [0] * 2 + [1] * 4 + [2] * 2


def test_boxes_are_those_of_every_layer_and_of_evaluation(model: Detector) -> None:
    anatomy = dissect(model, PICTURE)
    with torch.no_grad():
        preds = model.eval()(shown(model))
    assert torch.equal(anatomy.boxes[-1], preds.boxes[0]) and torch.equal(anatomy.logits, preds.logits[0])
    outputs = {output.name: output.preds for output in all_layers(model, shown(model))}
    names = ["proposals", *(f"layer{i}" for i in range(len(anatomy.gazes) - 1)), "final"]
    for name, boxes in zip(names, anatomy.boxes, strict=True):
        torch.testing.assert_close(boxes, outputs[name].boxes[0], atol=1e-5, rtol=0)
    assert [tuple(x.shape[1:]) for x in anatomy.backbone] == list(anatomy.shapes)
    assert anatomy.logits.amax(1)[anatomy.order].diff().max() <= 0


def test_distinct_queries_are_the_best_of_their_kind() -> None:
    anatomy = dissect(shaken(ARCH), PICTURE)
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.2, 0.19], [0.7, 0.7, 0.2, 0.2]])
    three = replace(anatomy, boxes=boxes[None], logits=torch.tensor([[0.0], [1.0], [-1.0]]))
    assert three.distinct(5).tolist() == [1, 2] and three.distinct(1).tolist() == [1]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_about_the_model_changes(training: bool) -> None:
    model = shaken(ARCH).train(training)
    model.backbone.eval()
    before, modes, random = deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    dissect(model, PICTURE)
    take_step(MICRO, model, batch())
    influence(model, MICRO.criterion(), batch())
    with pytest.raises(DataError, match=r"got \(1, 50, 80, 3\)"):
        dissect(model, PICTURE[None])
    model.size = (64, 50)  # which the model itself refuses, while it is listened to
    with pytest.raises(DataError, match="multiples of 32"):
        dissect(model, PICTURE)
    wrong = replace(batch(), targets=Targets(torch.zeros(1).long(), torch.zeros(1).long(), torch.full((1, 4), 7.0)))
    for ask in (lambda: take_step(MICRO, model, wrong), lambda: influence(model, MICRO.criterion(), wrong)):
        with pytest.raises(DataError, match="cxcywh"):
            ask()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_are_not_asked_are_not_there() -> None:
    model = shaken(replace(ARCH, decoder=replace(ARCH.decoder, asked=0)))
    assert len(dissect(model, PICTURE).gazes) == 1


def test_a_deployed_detector_looks_where_it_did(model: Detector) -> None:
    whole, deployed = dissect(model, PICTURE), dissect(model.deploy(), PICTURE)
    assert torch.equal(whole.chosen, deployed.chosen)
    torch.testing.assert_close(deployed.gazes[-1].weights, whole.gazes[-1].weights, atol=1e-4, rtol=1e-3)


def test_what_has_no_anatomy_is_refused() -> None:
    with pytest.raises(DeimkitError, match="Only a Detector has this anatomy; got Linear"):
        dissect(nn.Linear(2, 2), PICTURE)  # type: ignore[arg-type]
    for ask in (take_step, lambda recipe, model, b: influence(model, recipe.criterion(), b)):
        with pytest.raises(DeimkitError, match="got Linear"):
            ask(MICRO, nn.Linear(2, 2), batch())
        with pytest.raises(DeimkitError, match="deployed or frozen"):
            ask(MICRO, shaken(ARCH).deploy(), batch())
        with pytest.raises(DeimkitError, match="deployed or frozen"):
            ask(MICRO, shaken(ARCH).requires_grad_(False), batch())


# --------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("recipe", [MICRO, RTDETR], ids=["FDR", "deltas"])
def test_the_step_is_the_learners(recipe) -> None:
    """Its terms, their sum, its gradients and the changed weights are those of `Learner.learn` on another copy."""
    model = shaken(recipe.arch)
    learner = Learner(recipe, deepcopy(model))
    step = take_step(recipe, model, batch())
    before = [p.detach().clone() for p in learner.model.parameters()]
    random = torch.get_rng_state()
    terms = learner.gradients(batch())
    norm = torch.stack([p.grad.norm() for p in learner.model.parameters() if p.grad is not None]).norm()
    backbone = torch.stack([p.grad.norm() for p in learner.model.backbone.parameters() if p.grad is not None]).norm()
    assert step.norm == pytest.approx(float(norm), rel=1e-5) and step.norm <= recipe.optim.clip * 1.001
    assert step.gradients["backbone"] == pytest.approx(float(backbone), rel=1e-5)
    learner.optimizer.zero_grad()
    torch.set_rng_state(random)
    for buffer, old in zip(learner.model.buffers(), model.buffers(), strict=True):
        buffer.copy_(old)
    assert learner.learn(batch()) == terms == step.terms
    assert step.total == pytest.approx(sum(terms.values()))
    moved = torch.stack([(p.detach() - old).norm() for p, old in zip(learner.model.parameters(), before, strict=True)])
    assert step.moved == pytest.approx(float(moved.norm()), rel=1e-6) and step.moved > 0
    assert (step.lr, step.optimizer) == (recipe.optim.lr, "AdamW") and step.tensors[0] <= step.tensors[1]


@pytest.mark.parametrize("recipe", [MICRO, RTDETR], ids=["FDR", "deltas"])
def test_shapes_are_those_of_the_tensors(recipe) -> None:
    model, now = shaken(recipe.arch), batch()
    step = take_step(recipe, model, now)
    model.train()
    images = now.finish().images
    backbone = model.backbone(images)
    encoder = model.encoder(backbone)
    memory = model.decoder.remember(encoder)
    start, groups = model.queries(memory.tokens, memory.shapes), model.extra_queries(now.targets, 2)
    outputs = model(images, now.targets)
    assert step.images == images.shape and step.targets == 4
    assert step.backbone == [x.shape for x in backbone] and step.encoder == [x.shape for x in encoder]
    assert step.memory == memory.tokens.shape and step.queries == start.content.shape and not step.passes
    assert step.groups == {"denoise": (groups[0].content.shape, groups[0].repeat)}
    width = start.content.shape[1] + groups[0].content.shape[1]
    assert step.layers == [(2, width, recipe.arch.decoder.width)] * recipe.arch.decoder.layers
    assert list(step.outputs) == [output.name for output in outputs] == list(step.matches)
    for output in outputs:
        said = step.outputs[output.name]
        assert said["logits"] == output.preds.logits.shape and said["boxes"] == output.preds.boxes.shape
        assert said.get("edges") == (None if output.preds.edges is None else output.preds.edges.shape)
    own, shared = recipe.criterion().pairs(outputs, now.targets)
    assert step.pairs[0] == len(own.labels) == sum(step.matches.values())
    denoised = sum(n for name, n in step.matches.items() if name.startswith("denoise"))
    assert step.pairs[1] == (len(shared.labels) - denoised if recipe.share else 0)


def test_the_picture_says_every_shape(tmp_path: Path) -> None:
    step = take_step(MICRO, shaken(ARCH), batch())
    picture = draw_step(step)
    said = [text.get_text() for text in picture.axes[0].texts]
    for shape in (step.images, *step.backbone, *step.encoder, step.memory, step.queries, step.layers[0]):
        assert str(tuple(shape)) in said
    for fields in step.outputs.values():
        assert all(f"{field} {shape}" in said for field, shape in fields.items())
    assert f"loss {step.total:.3f}" in said and f"{len(step.terms)} terms" in said
    assert "dotted: no gradient comes back" in said
    picture.savefig(tmp_path / "flow.png")
    assert "dotted: no gradient comes back" not in [
        text.get_text() for text in draw_step(replace(step, passes=True)).axes[0].texts
    ]


def test_a_step_without_extra_queries_or_boxes_is_drawn_too() -> None:
    recipe = replace(RTDETR, arch=replace(DELTAS, groups=()))
    step = take_step(recipe, shaken(recipe.arch), batch(boxes=0))
    said = flow(step)
    assert said["extra queries"] == ("none",) and said["targets"][0] == "0 boxes, labels"
    assert step.pairs == (0, 0) and step.tensors[0] > 0
    assert draw_step(replace(step, layers=[(2, 20, 64), (2, 20, 64), (2, 20, 32)])).axes
    assert flow(replace(step, layers=[(2, 9), (2, 9), (2, 8)]))["decoder"] == (
        "layers 0-1",
        "(2, 9)",
        "layer 2",
        "(2, 8)",
    )


# ---------------------------------------------------------------------------------------------------- influence


def test_arrows_that_are_cut_carry_exactly_nothing_in_dfine() -> None:
    found = influence(shaken(ARCH), MICRO.criterion(), batch())
    assert (found.norms[:, found.parts.index("backbone")] > 0).all(), "everybody teaches the backbone"
    starts = [part for part in found.parts if part.startswith("queries.")]
    for output in found.outputs:
        for part in starts:  # content and boxes of the queries are detached
            assert (found.of(output, part) > 0) == (output == "proposals")
        assert (found.of(output, "groups.0") > 0) == output.startswith("denoise"), "own queries never see the noisy"
    assert found.of("proposals", "decoder.layers.0") == 0
    for group in ("", "denoise."):
        assert found.of(f"{group}layer0", "decoder.layers.1") == 0, "nor does the last layer learn from its pupil (DDF)"
        assert found.of(f"{group}layer0", "refine.box.1") == 0 < found.of(f"{group}final", "refine.box.0")
        assert found.of(f"{group}final", "refine.first") == 0 < found.of(f"{group}pre", "refine.first")


def test_boxes_look_forward_twice_in_rtdetrv2() -> None:
    found = influence(shaken(DELTAS), RTDETR.criterion(), batch())
    assert found.of("layer1", "refine.box.0") > 0 == found.of("final", "refine.box.0"), "through one layer, not two"
    assert found.of("final", "refine.box.1") > 0


def test_influence_is_the_gradient_of_an_outputs_terms() -> None:
    model, now = shaken(ARCH), batch()
    found = influence(model, MICRO.criterion(), now)
    terms = MICRO.criterion()(model.train()(now.finish().images, now.targets), now.targets)
    sum(value for name, value in terms.items() if name.endswith("/denoise.final")).backward()
    wanted = torch.stack([p.grad.norm() for p in model.decoder.layers[1].parameters() if p.grad is not None]).norm()
    assert found.of("denoise.final", "decoder.layers.1") == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    "name, part",
    [
        ("backbone.stem.stem1.conv.weight", "backbone"),
        ("encoder.aifi.linear1.bias", "encoder"),
        ("decoder.layers.11.norm1.weight", "decoder.layers.11"),
        ("decoder.position.layers.0.bias", "decoder.position"),
        ("queries.box.layers.2.weight", "queries.box"),
        ("refine.box.1.layers.0.bias", "refine.box.1"),
        ("refine.first.layers.0.bias", "refine.first"),
        ("groups.0.embed.weight", "groups.0"),
    ],
)
def test_parameters_belong_to_parts(name: str, part: str) -> None:
    assert part_of(name) == part


# ------------------------------------------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    torch.manual_seed(0)
    return dissect(shaken(ARCH), PICTURE)


def test_maps_and_cells_are_drawn_as_they_are(anatomy: Anatomy) -> None:
    maps = draw_maps(anatomy).axes
    assert [ax.get_title() for ax in maps[5:8]] == [f"encoder {tuple(x.shape)}" for x in anatomy.encoder]
    np.testing.assert_allclose(maps[6].images[0].get_array(), anatomy.encoder[1].norm(dim=0), rtol=1e-6)
    cells = draw_cells(anatomy).axes
    np.testing.assert_allclose(cells[0].images[0].get_array(), anatomy.confidence[0], rtol=1e-6)
    rings = [len(ax.collections[0].get_offsets()) for ax in cells]
    assert rings == anatomy.level.bincount(minlength=3).tolist() and sum(rings) == 20


def test_ways_lead_from_cell_to_box(anatomy: Anatomy) -> None:
    query = int(anatomy.order[0])
    ax = draw_trajectories(anatomy, [query])
    way = ax.lines[0].get_xydata()
    places = torch.cat([anatomy.places[query][None], anatomy.boxes[:, query, :2]]) * torch.tensor([80, 50])
    np.testing.assert_allclose(way, places, rtol=1e-5)
    frame = ax.patches[-1].get_bbox().extents
    np.testing.assert_allclose(frame, cxcywh_to_xyxy(anatomy.boxes[-1, query]) * torch.tensor([80, 50, 80, 50]), 1e-5)
    assert not draw_trajectories(anatomy, []).patches


def test_an_empty_field_is_an_arrow_that_is_cut() -> None:
    found = influence(shaken(ARCH), MICRO.criterion(), batch())
    ax = draw_influence(found)
    assert np.array_equal(ax.images[0].get_array().mask, found.norms == 0)
    assert len(ax.texts) == np.count_nonzero(found.norms)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found.outputs)


# ---------------------------------------------------------------------------------------------------------- lab


@pytest.fixture(params=ARCHS, scope="module")
def lab(request: pytest.FixtureRequest) -> AnatomyLab:
    torch.manual_seed(0)
    return AnatomyLab(shaken(ARCHS[request.param]), PICTURE)


def test_the_lab_shows_what_the_module_did(lab: AnatomyLab) -> None:
    anatomy = lab.anatomy
    found = lab.set(query=3, layer="layer1", level="all", head="all").found
    query = int(anatomy.order[2])
    gaze = anatomy.gazes[1]
    assert found.query == query and found.score == pytest.approx(float(anatomy.logits[query].max().sigmoid()))
    np.testing.assert_allclose(found.points, gaze.locations[query].double() * torch.tensor([80, 50]))
    np.testing.assert_allclose(found.weights, gaze.weights[query].double())
    np.testing.assert_allclose(found.shares.sum(1), 1, rtol=1e-6)
    first = anatomy.points[0]
    assert found.shares[1, 0] == pytest.approx(float(gaze.weights[query, :, :first].sum(1).mean()))
    assert found.shown.all() and found.even.sum() == pytest.approx(1)
    low, high = cxcywh_to_xyxy(gaze.around[query])[:2], cxcywh_to_xyxy(gaze.around[query])[2:]
    within = ((gaze.locations[query] >= low) & (gaze.locations[query] <= high)).all(-1)
    assert found.inside == pytest.approx(float(gaze.weights[query][within].sum() / gaze.weights[query].sum()), abs=1e-6)
    off = ((gaze.locations[query] < 0) | (gaze.locations[query] > 1)).any(-1)
    assert found.outside == int(off.sum())
    one = lab.set(head="2", level=lab.levels[1]).found
    assert one.shown.sum() == anatomy.points[1] and one.shown[1].any()
    assert one.shares[1, 2] == pytest.approx(float(gaze.weights[query, 1, -anatomy.points[2] :].sum()))


def test_every_control_can_be_moved_to_its_ends(lab: AnatomyLab) -> None:
    lab.set(query=1, layer=lab.layers[0], level="all", head="all")
    types = [(trace.type, trace.name) for trace in lab.figure().data]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for query in (1, len(lab.order)):
            for layer in lab.layers:
                for level in ("all", lab.levels[-1]):
                    for head in ("all", lab.heads[-1]):
                        figure = lab.set(query=query, layer=layer, level=level, head=head).figure()
                        assert [(trace.type, trace.name) for trace in figure.data] == types
                        assert lab.words(lab.found).startswith(f"Query {query} by confidence")
    points = next(trace for trace in figure.data if trace.name == f"points {lab.levels[-1]}")
    assert np.isfinite(points.x).sum() == lab.anatomy.points[-1], "of one head and one level"
    hidden = next(trace for trace in figure.data if trace.name == f"points {lab.levels[0]}")
    assert not np.isfinite(hidden.x).any()


def test_clicks_choose(lab: AnatomyLab) -> None:
    found = lab.set(query=1, layer=lab.layers[0], level="all", head="all").found
    rank = 7
    x, y = lab.cells[lab.order[rank - 1]]
    assert lab.clicked("cells 8 x 12", x, y) == {"query": rank}
    assert lab.clicked("weights", 3, 2) == {"head": "2"} and lab.clicked("weights", 3, 99) == {}
    assert lab.clicked(lab.layers[1], 0, 50.0) == {"layer": lab.layers[1]}
    assert lab.clicked("box after", 1, 1) == {} and found.moved > 0


def test_the_still_picture_is_drawn(lab: AnatomyLab) -> None:
    html = lab.set(query=2, layer=lab.layers[-1], level="all", head="all").still()["text/html"]
    assert "data:image/png;base64," in html and "Query 2 by confidence" in html
