"""The detector and its parts: shapes, hand-worked numbers, who may see and teach whom, and what deployment keeps."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filling import fill
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deimkit.errors import DataError, RecipeError
from deimkit.models.attention import DeformableAttention, remember, sample, split_heads
from deimkit.models.decoder import Decoder
from deimkit.models.detector import Arch, Detector
from deimkit.models.encoder import GELAN, Hybrid, position_code
from deimkit.models.groups import Denoise, QueryGroup, blocked
from deimkit.models.hgnetv2 import HGNetV2
from deimkit.models.layers import activation, inverse_sigmoid
from deimkit.models.queries import TopK, cell_anchors
from deimkit.models.refine import FDR, Quality
from deimkit.recipes.archs import DFINES, HGNETS, dfine_arch, hgnetv2
from deimkit.structures import Output, Targets

TINY = dfine_arch("tiny")
CPU = torch.device("cpu")


def some_targets(*boxes_per_image: int) -> Targets:
    count = torch.tensor(boxes_per_image, dtype=torch.long)
    n = int(count.sum())
    boxes = torch.cat([torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.2 + 0.1], 1)
    return Targets(torch.repeat_interleave(torch.arange(len(count)), count), torch.randint(0, 5, (n,)), boxes)


def outputs_of(model: Detector, images: Tensor, targets: Targets) -> dict[str, Output]:
    return {output.name: output for output in model.train()(images, targets)}


def still(model: Detector) -> Detector:
    """A detector in training mode whose batch norms keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


# ---------------------------------------------------------------------------------------------- the whole detector


@pytest.mark.parametrize("size", DFINES)
def test_every_size_predicts_on_any_multiple_of_32(size: str) -> None:
    model = Detector(dfine_arch(size), 7).eval()
    names = set(model.state_dict())
    for h, w in ((192, 256), (224, 96)):
        with torch.no_grad():
            preds = model(torch.rand(1, 3, h, w))
        cells = sum((h // s) * (w // s) for s in model.arch.backbone.strides)
        queries = min(model.arch.queries.count, cells)
        assert preds.logits.shape == (1, queries, 7)
        assert preds.boxes.shape == (1, queries, 4)
        assert preds.edges.shape == (1, queries, 4, 33)
        assert set(model.state_dict()) == names  # no table of an input size is kept in it


@pytest.mark.parametrize("name", HGNETS)
def test_backbone_maps_have_the_channels_and_strides_of_the_spec(name: str) -> None:
    spec = hgnetv2(name, levels=(0, 1, 2, 3))
    with torch.no_grad():
        maps = spec.build()(torch.rand(1, 3, 64, 96))
    expected = [(1, c, 64 // s, 96 // s) for c, s in zip(spec.channels, spec.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected


def test_tiny_is_small_enough_for_two_cpu_cores() -> None:
    model = Detector(TINY, 3).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 160, 160))
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    assert counter.get_total_flops() < 1.2e9


def test_training_outputs_are_named_and_tied() -> None:
    torch.manual_seed(0)
    targets = some_targets(2, 3)
    outputs = outputs_of(Detector(TINY, 5), torch.rand(2, 3, 96, 96), targets)
    own = ["final", "layer0", "layer1", "pre", "proposals"]
    assert list(outputs) == own + ["denoise.final", "denoise.layer0", "denoise.layer1", "denoise.pre"]
    groups = 50 // 3
    for name, output in outputs.items():
        noisy = name.startswith("denoise.")
        queries = 2 * 3 * groups if noisy else 100
        assert output.preds.logits.shape == (2, queries, 5)
        assert output.repeat == (groups if noisy else 1)
        assert output.pooled is not noisy
        assert (output.rule is not None) is noisy
        assert (output.preds.edges is None) is (name.endswith("pre") or name == "proposals")
        final = outputs["denoise.final" if noisy else "final"].preds
        assert output.last is (final if "layer" in name else None)
    rule = outputs["denoise.final"].rule
    assert len(rule.query) == groups * len(targets)
    assert torch.equal(rule.image, targets.image[rule.target])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(1, 3, 100, 96), "multiples of 32; got 100 x 96"),
        (torch.rand(1, 3, 0, 32), "multiples of 32"),
        (torch.rand(3, 96, 96), "float \\(B, 3, height, width\\)"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 1, 96, 96), "\\(1, 1, 96, 96\\)"),
    ],
)
def test_unusable_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Detector(TINY, 2).eval()(images)


def test_training_needs_targets() -> None:
    with pytest.raises(DataError, match="got None"):
        Detector(TINY, 2)(torch.rand(1, 3, 64, 64))


def test_labels_beyond_the_categories_are_refused() -> None:
    with pytest.raises(DataError, match="\\[0, 2\\); got 4"):
        Detector(TINY, 2)(torch.rand(1, 3, 64, 64), replace(some_targets(1), labels=torch.tensor([4])))


@pytest.mark.parametrize("size", DFINES)
def test_arch_is_rebuilt_by_its_repr(size: str) -> None:
    arch = dfine_arch(size, "relu")
    parts = {t.__name__: t for t in (Arch, HGNetV2, Hybrid, GELAN, Decoder, TopK, Denoise, FDR)}
    assert eval(repr(arch), parts) == arch
    assert hash(arch) == hash(dfine_arch(size, "relu"))


def test_no_image_gives_no_prediction() -> None:
    preds = Detector(TINY, 5).eval()(torch.rand(0, 3, 64, 96))
    assert preds.boxes.shape == (0, 100, 4)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="n, s, m, l, x"):
        dfine_arch("xl")
    with pytest.raises(RecipeError, match="'swish'"):
        activation("swish")


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    model = fill(Detector(TINY, 5)).double().eval()
    x = torch.rand(3, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits[1:2], model(x[1:2]).logits)


def test_queries_that_only_train_change_nothing_for_the_others() -> None:
    model = fill(Detector(TINY, 5)).double().eval()
    x = torch.rand(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        alone = model(x)
        beside = {o.name: o for o in still(model)(x, some_targets(4, 0))}["final"].preds
    torch.testing.assert_close(beside.logits, alone.logits)
    torch.testing.assert_close(beside.edges, alone.edges)


@pytest.mark.parametrize("count", [(0, 0), (3, 0), (0, 130)])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(count: tuple[int, int]) -> None:
    model = Detector(TINY, 5)
    outputs = outputs_of(model, torch.rand(2, 3, 64, 64), some_targets(*count))
    assert len(outputs) == 9
    sum(o.preds.logits.sum() + o.preds.boxes.sum() for o in outputs.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_detector_without_groups_trains() -> None:
    model = Detector(replace(TINY, groups=()), 5)
    assert list(outputs_of(model, torch.rand(1, 3, 64, 64), some_targets(2))) == [
        "final", "layer0", "layer1", "pre", "proposals",
    ]  # fmt: skip


def test_autocast_keeps_boxes_and_distributions_in_float32() -> None:
    model = fill(Detector(TINY, 5))
    x, targets = torch.rand(2, 3, 96, 96), some_targets(2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = still(model)(x, targets)
    for output in outputs:
        assert output.preds.logits.isfinite().all()
        assert output.preds.boxes.dtype == torch.float32
        assert output.preds.edges is None or output.preds.edges.dtype == torch.float32
    sum(o.preds.boxes.sum() + o.preds.logits.float().sum() for o in outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_weights_predict() -> None:
    preds = Detector(TINY, 5).eval().bfloat16()(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert preds.boxes.dtype == torch.float32
    assert preds.boxes.isfinite().all()


def test_tables_made_without_gradients_serve_training() -> None:
    model, x = Detector(TINY, 5), torch.rand(1, 3, 160, 352)
    with torch.inference_mode():
        model.eval()(x)
    outputs = outputs_of(model, x, some_targets(1))
    outputs["final"].preds.boxes.sum().backward()
    assert model.refine.box[0].layers[-1].weight.grad is not None


@pytest.mark.slow
def test_export_takes_any_batch() -> None:
    model, x = fill(Detector(TINY, 5)).deploy(), torch.rand(2, 3, 64, 96)

    class Tensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            preds = self.detector(x)
            return preds.logits, preds.boxes

    program = torch.export.export(Tensors(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("b", min=1, max=8)}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x[:1])[0], model(x[:1]).logits)


# -------------------------------------------------------------------------------------------------- deployment


@pytest.mark.parametrize("fold_all", [False, True])
@pytest.mark.parametrize("size", ["tiny", "n"])
def test_deployment_predicts_the_same(size: str, fold_all: bool) -> None:
    model = fill(Detector(dfine_arch(size), 5)).double().eval()
    x = torch.rand(1, 3, 96, 128, dtype=torch.float64)
    fast = model.deploy(fold_all)
    with torch.no_grad():
        before, after = model(x), fast(x)
    assert (before.logits - after.logits).abs().max() < 1e-10
    assert (before.boxes - after.boxes).abs().max() < 1e-10
    left = {type(m).__name__ for m in fast.encoder.fpn_blocks.modules()}
    assert not left & {"RepVGG", "BatchNorm2d"}
    assert any(isinstance(m, nn.BatchNorm2d) for m in fast.modules()) is not fold_all
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.encoder.fpn_blocks.modules())  # a copy, not the model


def test_deployment_keeps_the_last_score_and_quality_head_only() -> None:
    fast = Detector(TINY, 5).deploy()
    for heads in (fast.refine.score, fast.refine.quality):
        assert [isinstance(head, nn.Identity) for head in heads] == [True, True, False]
    assert len(fast.refine.box) == 3


def test_a_detector_survives_pickling() -> None:
    model = Detector(TINY, ["cat", "dog"]).eval()
    again = pickle.loads(pickle.dumps(model))
    assert again.arch == model.arch
    assert again.categories.names == ("cat", "dog")


# ------------------------------------------------------------------------------------------------ how it starts


def test_initial_values_are_the_published_ones() -> None:
    model = Detector(TINY, 5)
    prior = -math.log(99)
    for head in (model.queries.score, *model.refine.score):
        assert torch.allclose(head.bias, torch.full((5,), prior))
    for mlp in (model.queries.box, model.refine.first, *model.refine.box, *(q.reg_conf for q in model.refine.quality)):
        assert mlp.layers[-1].weight.abs().sum() == mlp.layers[-1].bias.abs().sum() == 0
        assert mlp.layers[0].weight.abs().sum() > 0
    first, *others = (dict(layer.named_parameters()) for layer in model.decoder.layers)
    assert others and all(torch.equal(first[name], layer[name]) for layer in others for name in first)
    assert not torch.equal(model.refine.box[0].layers[0].weight, model.refine.box[1].layers[0].weight)
    embed = model.groups[0].embed.weight
    assert embed[-1].abs().sum() == 0 and 0.8 < embed[:-1].std() < 1.2


def test_the_first_boxes_are_the_anchors_of_the_chosen_cells() -> None:
    model = Detector(TINY, 5)
    outputs = outputs_of(model, torch.rand(1, 3, 96, 96), some_targets(1))
    anchors, _ = cell_anchors(((12, 12), (6, 6), (3, 3)), CPU, torch.float32)
    proposals = outputs["proposals"].preds.boxes[0]
    distance = (proposals[:, None] - anchors.sigmoid()).abs().amax(-1)  # (Q, L)
    assert (distance.amin(1) < 1e-6).all()
    torch.testing.assert_close(outputs["final"].preds.boxes[0], proposals, atol=1e-4, rtol=0)


def test_heads_start_by_looking_in_eight_directions() -> None:
    attention = DeformableAttention(32, 8, (1, 2))
    offsets = attention.sampling_offsets.bias.view(8, 3, 2)
    square = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]).float()
    torch.testing.assert_close(offsets[:, 0], square)  # level 0, its only point
    torch.testing.assert_close(offsets[:, 1], square)  # level 1, first point
    torch.testing.assert_close(offsets[:, 2], 2 * square)


# ------------------------------------------------------------------------------------------- who teaches whom


def taught(model: Detector, value: Tensor) -> set[str]:
    """The parts of the detector that a loss on `value` reaches."""
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(value.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
    reached = {n for n, g in zip(names, grads, strict=True) if g is not None and g.abs().sum() > 0}
    return {".".join(n.split(".")[: 3 if n.split(".")[2].isdigit() else 2]) for n in reached}


def test_gradients_reach_what_they_should() -> None:
    model = still(fill(Detector(TINY, 5)))
    outputs = {o.name: o.preds for o in model(torch.rand(1, 3, 96, 96), some_targets(3))}
    layers = {f"decoder.layers.{i}" for i in range(3)}
    boxes = {f"refine.box.{i}" for i in range(3)}
    heads = ("refine.", "queries.", "decoder.", "groups.")

    def reach(value: Tensor) -> set[str]:
        return {name for name in taught(model, value) if name.startswith(heads)}

    assert reach(outputs["final"].boxes) == layers | boxes | {"decoder.position"}
    assert reach(outputs["layer0"].boxes) == {"decoder.layers.0", "refine.box.0", "decoder.position"}
    assert reach(outputs["final"].logits) == layers | boxes | {"decoder.position", "refine.score.2", "refine.quality.2"}
    pre = {"decoder.layers.0", "decoder.position"}
    assert reach(outputs["pre"].boxes) == pre | {"refine.first"}
    assert reach(outputs["pre"].logits) == pre | {"refine.score.0"}
    assert reach(outputs["proposals"].boxes) == {"queries.memory", "queries.box"}
    assert reach(outputs["proposals"].logits) == {"queries.memory", "queries.score"}
    assert "groups.0" in {name[:8] for name in reach(outputs["denoise.final"].logits)}
    assert not outputs["final"].anchors.requires_grad


# ---------------------------------------------------------------------------------------------------- attention


def bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """level (d, h, w) at x, y as fractions of the map; zero outside."""
    _, h, w = level.shape
    x, y, total = x * w - 0.5, y * h - 0.5, torch.zeros(level.shape[0], dtype=level.dtype)
    for column, row in product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
        if 0 <= column < w and 0 <= row < h:
            total += level[:, row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def test_sampling_is_a_weighted_sum_of_bilinear_looks() -> None:
    maps = [torch.randn(2, 6, 3, 4).double(), torch.randn(2, 6, 2, 1).double()]
    points, heads = (2, 1), 3
    locations = torch.rand(2, 5, heads, 3, 2).double() * 1.4 - 0.2
    weights = torch.rand(2, 5, heads, 3).double()
    found = sample(split_heads(maps, heads), locations, weights, points)
    for b, q, head in product(range(2), range(5), range(heads)):
        own = [m[b, 2 * head : 2 * head + 2] for m in maps]
        expected = sum(
            w * bilinear(own[level], *xy)
            for level, w, xy in zip(
                (0, 0, 1), weights[b, q, head].tolist(), locations[b, q, head].tolist(), strict=True
            )
        )
        torch.testing.assert_close(found[b, q, 2 * head : 2 * head + 2], expected)


def test_offsets_are_counted_in_halves_of_the_box_and_shared_by_the_points_of_a_level() -> None:
    attention = DeformableAttention(8, 1, (1, 2)).eval()
    nn.init.zeros_(attention.sampling_offsets.bias)
    ramp = torch.arange(8.0).expand(1, 8, 8, 8)  # the value at x is 8 x - 0.5
    values = remember([ramp, ramp], 1)
    query, box = torch.zeros(1, 1, 8), torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
    assert attention(query, box, values)[0, 0, 0].item() == pytest.approx(3.5)
    with torch.no_grad():
        attention.sampling_offsets.bias.view(3, 2)[:, 0] = torch.tensor([1.0, 0.0, 1.0])
    # level 0: 1 * 0.25 / 2; level 1: half of that, for its second point only; weights 1/3 each
    assert attention(query, box, values)[0, 0, 0].item() == pytest.approx(3.5 + 8 * (0.125 + 0.0625) / 3)


def published_primitives(shared: Path) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(shared / "golden" / "losses" / "primitives.npz").items()}


def test_sampling_beside_the_published_numbers(shared: Path) -> None:
    ref = published_primitives(shared)
    shapes = ref["msda/shapes_hw"].tolist()
    values = [ref[f"msda/value.{i}"].reshape(8, 8, h, w) for i, (h, w) in enumerate(shapes)]  # (B * H, D / H, h, w)
    found = sample(values, ref["msda/loc"], ref["msda/attn"], tuple(ref["msda/num_points"].tolist()))
    torch.testing.assert_close(found, ref["msda/out"])


def test_quality_beside_the_published_numbers(shared: Path) -> None:
    ref = published_primitives(shared)
    quality = Quality(FDR(), "silu")
    quality.load_state_dict({k.removeprefix("lqe/param/"): v for k, v in ref.items() if k.startswith("lqe/param/")})
    chance = ref["integral/corners"].unflatten(-1, (4, 33)).softmax(-1)
    torch.testing.assert_close(ref["lqe/scores"] + quality(chance), ref["lqe/out"])


# --------------------------------------------------------------------------------------- tables of an input size


def test_position_code_of_a_two_by_three_map() -> None:
    """Width 4 has one frequency, 1: a cell's code is sin u, cos u, sin v, cos v."""
    published = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]  # columns outermost
    sensible = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # as the tokens run: rows outermost
    for cells, row_major in ((published, False), (sensible, True)):
        expected = [[math.sin(u), math.cos(u), math.sin(v), math.cos(v)] for u, v in cells]
        code = position_code(2, 3, 4, row_major, CPU, torch.float64)
        torch.testing.assert_close(code, torch.tensor(expected).double())


def test_position_code_knows_many_frequencies_and_agrees_on_squares() -> None:
    code = position_code(5, 5, 16, True, CPU, torch.float64)
    assert torch.equal(code, position_code(5, 5, 16, False, CPU, torch.float64))
    row, column = 3, 2
    rate = [10000 ** (-k / 4) for k in range(4)]
    expected = [f(x * r) for x in (row, column) for f in (math.sin, math.cos) for r in rate]
    torch.testing.assert_close(code[row * 5 + column], torch.tensor(expected).double())


def test_row_major_codes_change_what_is_seen_on_non_square_inputs_only() -> None:
    published = fill(Detector(TINY, 5)).eval()
    sensible = fill(Detector(replace(TINY, encoder=replace(TINY.encoder, row_major=True)), 5)).eval()
    with torch.no_grad():
        for (h, w), same in (((96, 96), True), ((64, 96), False)):
            x = torch.rand(1, 3, h, w)
            assert torch.equal(published(x).logits, sensible(x).logits) is same


def test_anchors_of_the_published_input_size() -> None:
    anchors, valid = cell_anchors(((80, 80), (40, 40), (20, 20)), CPU, torch.float32)
    assert anchors.shape == (8400, 4) and (~valid).sum() == 316  # the border ring of the finest level
    assert anchors[~valid[:, 0]].isposinf().all()
    cell = 3 * 80 + 5  # row 3, column 5 of level 0
    torch.testing.assert_close(anchors[cell].sigmoid(), torch.tensor([5.5 / 80, 3.5 / 80, 0.05, 0.05]))
    torch.testing.assert_close(anchors[-1].sigmoid(), torch.tensor([19.5 / 20, 19.5 / 20, 0.2, 0.2]))
    assert cell_anchors(((80, 80), (40, 40), (20, 20)), CPU, torch.float32)[0] is anchors  # built once


def test_queries_are_the_most_confident_cells() -> None:
    queries = fill(TopK(4).build(8, 3, "silu"))
    tokens, shapes = torch.randn(2, 24, 8), ((4, 5), (2, 2))
    start = queries(tokens, shapes)
    anchors, valid = cell_anchors(shapes, CPU, torch.float32)
    features = queries.memory(tokens * valid)
    best = queries.score(features).amax(-1).argsort(1, descending=True)[:, :4]
    for b in range(2):
        torch.testing.assert_close(start.content[b], features[b, best[b]])
        torch.testing.assert_close(start.boxes[b], queries.box(features[b, best[b]]) + anchors[best[b]])
    assert not start.content.requires_grad and not start.boxes.requires_grad


# ------------------------------------------------------------------------------------------ queries that only train


def test_who_may_look_at_whom() -> None:
    """Two own queries; a group of two parts that sees them; a group of one part that does not."""
    part = torch.tensor
    groups = [
        QueryGroup("a", torch.empty(0), torch.empty(0), part([0, 0, 1]), looks=True),
        QueryGroup("b", torch.empty(0), torch.empty(0), part([0, 0]), looks=False),
    ]
    sees = [
        "11.....",
        "11.....",
        "1111...",
        "1111...",
        "11..1..",
        ".....11",
        ".....11",
    ]
    assert (~blocked(2, groups)).tolist() == [[c == "1" for c in row] for row in sees]


def test_denoising_noise_stays_within_its_reach() -> None:
    targets = Targets(torch.tensor([1, 0, 1]), torch.tensor([3, 1, 2]), torch.tensor([[0.5, 0.5, 0.2, 0.1]] * 3))
    noised = Denoise(100, box_noise=0.5).draw(targets, 3, 80)
    assert noised.groups == 50 and noised.labels.shape == (3, 200)
    boxes = noised.boxes.sigmoid()
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    moved = torch.cat([centre - half, centre + half], -1) - torch.tensor([0.4, 0.45, 0.6, 0.55])
    moved = (moved / torch.tensor([0.1, 0.05, 0.1, 0.05])).abs() / 0.5  # in units of box_noise * half the size
    negative = (torch.arange(200) // 2) % 2 == 1
    real = torch.zeros(3, 200, dtype=torch.bool)
    real[0, 0::2] = real[1] = True
    assert (moved[real & ~negative] < 1.001).all()
    assert ((moved[real & negative] > 0.999) & (moved[real & negative] < 2.001)).all()
    assert (noised.labels[~real] == 80).all() and (noised.boxes[~real] < -11.5).all()

    m = noised.match
    assert len(m.query) == 3 * 50 and not negative[m.query].any()
    assert torch.equal(m.image, targets.image[m.target])
    first = m.target[:3].tolist()  # of the first group: slots follow the order of the rows within an image
    assert sorted(zip(m.image[:3].tolist(), m.query[:3].tolist(), first, strict=True)) == [
        (0, 0, 1),
        (1, 0, 0),
        (1, 1, 2),
    ]


def test_a_quarter_of_the_denoised_labels_is_redrawn() -> None:
    targets = some_targets(*[10] * 20)
    noised = Denoise(100).draw(targets, 20, 1000)
    same = noised.labels[noised.match.image, noised.match.query] == targets.labels[noised.match.target]
    assert 0.70 < same.float().mean() < 0.80
    calm = Denoise(100, label_noise=0.0, box_noise=0.0).draw(targets, 20, 1000)
    torch.testing.assert_close(
        calm.boxes[calm.match.image, calm.match.query].sigmoid(), targets.boxes[calm.match.target]
    )


@pytest.mark.parametrize("images", [0, 2])
def test_denoising_nothing_makes_no_query(images: int) -> None:
    group = Denoise(100).build(8, 5)(some_targets(*[0] * images), images)
    assert group.content.shape == (images, 0, 8) and group.content.requires_grad
    assert group.boxes.shape == (images, 0, 4)
    assert len(group.rule.query) == 0


# ------------------------------------------------------------------------------------------------- small layers


def test_inverse_sigmoid_is_finite_and_exact_between() -> None:
    x = torch.tensor([0.0, 1e-7, 0.25, 0.5, 1.0])
    expected = [math.log(1e-5), math.log(1e-5), math.log(1 / 3), 0.0, -math.log(1e-5)]
    torch.testing.assert_close(inverse_sigmoid(x), torch.tensor(expected), atol=1e-4, rtol=0)
    assert inverse_sigmoid(x.bfloat16()).dtype == torch.float32


def test_padding_of_even_kernels_keeps_the_size() -> None:
    x = torch.rand(1, 3, 64, 64)
    stem = hgnetv2("tiny").build().stem
    assert stem(x).shape == (1, 16, 16, 16)
    assert F.pad(x, (0, 1, 0, 1)).shape == (1, 3, 65, 65)


def test_a_frozen_backbone_keeps_its_stem_and_its_statistics() -> None:
    net = hgnetv2("tiny", frozen=True).build().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sum(x.sum() for x in net(torch.rand(2, 3, 64, 64))).backward()
    learns = {name for name, p in net.named_parameters() if p.grad is not None}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())  # statistics too
    assert learns and not any(name.startswith("stem.") or ".bn." in name for name in learns)
    assert "stages.1.blocks.0.layers.0.conv.weight" in learns
