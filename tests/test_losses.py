"""Every loss by hand, by brute force, against published numbers, and its gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deimkit.boxes import iou_giou
from deimkit.criterion import Criterion
from deimkit.distribution import encode, weighting
from deimkit.losses import DDF, FGL, L1, MAL, PSL, QFL, VFL, ClassLoss, Focal, GIoU, Loss, Pairs
from deimkit.matching import Hungarian
from deimkit.structures import Match, Output, Predictions, Targets
from tests.micro import MICRO


@dataclass(frozen=True)
class Corners(Loss):
    """How far the boxes' lower right corners are off: the recipe of a new box loss, followed."""

    name: ClassVar[str] = "corners"

    def __call__(self, pairs: Pairs) -> Tensor:
        off = (pairs.boxes - pairs.wanted)[:, :2] + (pairs.boxes - pairs.wanted)[:, 2:] / 2
        return pairs.sum(off.norm(dim=1)) / pairs.count


CLASS_LOSSES = [Focal(), VFL(), MAL(), MAL(alpha=0.5, gamma=2.0), QFL(), PSL(), PSL(to_one=True)]
ALL = [*CLASS_LOSSES, L1(), GIoU(), FGL(), DDF(), Corners()]


def predictions(images: int, queries: int, classes: int = 3, bins: int = 6, edges: bool = True) -> Predictions:
    boxes = torch.cat([torch.rand(images, queries, 2), torch.rand(images, queries, 2) * 0.4 + 0.1], -1).double()
    more = (torch.randn(images, queries, 4, bins + 1).double(), boxes + 0.02 * torch.randn_like(boxes)) if edges else ()
    return Predictions(torch.randn(images, queries, classes).double(), boxes, *more)


def example(edges: bool = True) -> tuple[list[Output], list[Match], Targets]:
    """Two layers and their teacher in 2 images, and two outputs of fewer queries and other matches."""
    targets = Targets(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), predictions(1, 3).boxes[0])
    final, first = predictions(2, 5, edges=edges), predictions(2, 4, edges=edges)
    outputs = [Output(f"layer{i}", predictions(2, 5, edges=edges), last=final) for i in range(2)]
    outputs += [Output("final", final), Output("denoise.layer0", predictions(2, 4, edges=edges), last=first)]
    outputs += [Output("denoise.final", first)]
    triples = [
        [(0, 1, 1), (0, 4, 0), (1, 0, 2)],
        [(1, 3, 2)],
        [],
        [(0, 0, 0), (0, 3, 1), (1, 2, 2), (1, 1, 2)],
        [(0, 1, 1)],
    ]
    return outputs, [Match(*torch.tensor(t, dtype=torch.long).reshape(-1, 3).T) for t in triples], targets


def pairs_of(outputs: list[Output], matches: list[Match], targets: Targets, **more: Any) -> Pairs:
    return Pairs.of(outputs, matches, targets, count=[2.0, 3.0, 1.0, 4.0, 5.0][: len(outputs)], **more)


# ------------------------------------------------------------------------------------------------------- pairs


def test_pairs_know_what_belongs_together() -> None:
    outputs, matches, targets = example()
    pairs = pairs_of(outputs, matches, targets)
    rows = [(k, b, q, t) for k, m in enumerate(matches) for b, q, t in torch.stack(m, 1).tolist()]
    for i, (k, b, q, t) in enumerate(rows):
        assert torch.equal(pairs.boxes[i], outputs[k].preds.boxes[b, q])
        assert torch.equal(pairs.wanted[i], targets.boxes[t].to(pairs.wanted))
        assert pairs.labels[i] == targets.labels[t]
        iou, giou = iou_giou(outputs[k].preds.boxes[b, q], targets.boxes[t])
        assert pairs.iou[i] == pytest.approx(iou.item()) and pairs.giou[i] == pytest.approx(giou.item())
        assert torch.equal(pairs.gather("edges")[i], outputs[k].preds.edges[b, q])
    assert pairs.sum(torch.ones(9)).tolist() == [3, 1, 0, 4, 1]
    assert pairs.sum(torch.arange(9.0)).tolist() == [0 + 1 + 2, 3, 0, 4 + 5 + 6 + 7, 8]

    some = pairs.only([3, 0])
    assert [o.name for o in some.outputs] == ["denoise.layer0", "layer0"] and some.count.tolist() == [4, 2]
    assert torch.equal(some.iou, torch.cat([pairs.iou[4:8], pairs.iou[:3]]))
    assert pairs.only(range(5)) is pairs

    parts = list(pairs.runs(lambda output: output.preds.boxes.shape))
    assert [len(part.outputs) for part in parts] == [3, 2]
    for part in parts:
        flat = part.stack("boxes").flatten(0, 2)
        assert torch.equal(flat[part.places()], part.boxes)


def test_boxes_without_area_share_nothing_and_pull_nowhere() -> None:
    point = torch.tensor([0.5, 0.5, 0.0, 0.0])
    boxes = torch.stack([point, point + torch.tensor([0.1, 0, 0, 0.3]), torch.tensor([0.5, 0.5, 0.2, 0.2])])
    boxes.requires_grad_()
    targets = Targets(torch.zeros(3).long(), torch.zeros(3).long(), point.repeat(3, 1))
    output = Output("final", Predictions(torch.zeros(1, 3, 1), boxes[None]))
    everyone = torch.arange(3)
    pairs = Pairs.of([output], [Match(torch.zeros_like(everyone), everyone, everyone)], targets, [1.0])
    assert pairs.iou.tolist() == [0, 0, 0] and pairs.giou[:2].tolist() == [-1, -1]
    assert pairs.giou[2].item() == pytest.approx(0.0, abs=1e-6)  # an ordinary pair: the hull is the box itself
    (grad,) = torch.autograd.grad(GIoU()(pairs).sum(), boxes)
    assert torch.isfinite(grad).all() and not grad[:2].any()


# ------------------------------------------------------------------------------------------------ class losses


def test_published_grid(shared: Path) -> None:
    """MAL and VFL of single entries, with d(loss)/d(logit)."""
    ref = np.load(shared / "golden/losses/mal_vfl_grid.npz")
    p, q = torch.from_numpy(ref["p"])[:, None], torch.from_numpy(ref["q"])

    def check(loss: ClassLoss, one: float, q: Tensor | float, key: str, g: int, grad: bool = True) -> None:
        theirs = torch.from_numpy(ref[key.format("loss")][g])
        z = p.logit().expand(-1, theirs[0].numel()).clone().requires_grad_()
        target, weight = loss.target_and_weight(z.sigmoid(), one, q)
        target = torch.as_tensor(target).to(z).expand_as(z)
        value = weight * F.binary_cross_entropy_with_logits(z, target, reduction="none")
        torch.testing.assert_close(value, theirs.reshape(z.shape), rtol=1e-6, atol=1e-9)
        if grad:
            theirs = torch.from_numpy(ref[key.format("grad_logit")][g]).reshape(z.shape)
            torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], theirs, rtol=1e-6, atol=1e-9)

    for g, gamma in enumerate(ref["gamma"].tolist()):
        for loss in (MAL(gamma=gamma), VFL(gamma=gamma)):
            check(loss, 1.0, q[None], f"{loss.name}/pos_{{}}", g)
            check(loss, 0.0, 0.0, f"{loss.name}/neg_{{}}", g)
        check(MAL(gamma=gamma, alpha=0.25), 0.0, 0.0, "mal/neg_{}_mal_alpha0.25", g, grad=False)


def quality(loss: ClassLoss, output: Output, match: Match, targets: Targets) -> Tensor:
    """What `q` is at each pair: the IoU, but for PSL its square, rescaled one image after another."""
    boxes, wanted = output.preds.boxes, targets.boxes[match.target]
    iou = iou_giou(boxes[match.image, match.query], wanted)[0].detach()
    if not isinstance(loss, PSL):
        return iou
    q = iou**2
    for b in match.image.unique():
        mine = match.image == b
        every = [iou_giou(box, gt)[0].item() for box in boxes[b] for gt in wanted[mine]]
        aim = 1.0 if loss.to_one else max(every)
        q[mine] *= max(1.0, aim / (q[mine].max().item() + 1e-8))
    return q


@pytest.mark.parametrize("loss", CLASS_LOSSES, ids=repr)
def test_class_loss_is_the_dense_formula(loss: ClassLoss) -> None:
    """Background at once and matched entries one by one is the same as whole tables of `one`, `q` and BCE."""
    outputs, matches, targets = example()
    matches[3] = Match(*(x[:3] for x in matches[3]))
    values = loss(pairs_of(outputs, matches, targets))
    for output, match, value, count in zip(outputs, matches, values, [2, 3, 1, 4, 5], strict=True):
        z = output.preds.logits
        one, q = torch.zeros_like(z), torch.zeros_like(z)
        at = match.image, match.query, targets.labels[match.target]
        one[at] = 1
        q[at] = quality(loss, output, match, targets)
        target, weight = loss.target_and_weight(z.sigmoid(), one, q)  # type: ignore[arg-type]
        expected = F.binary_cross_entropy_with_logits(z, target, weight, reduction="sum") / count
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_class_losses_by_hand() -> None:
    """One query, two classes, p = 1/2 for both, matched to class 1 with IoU 1/2."""
    output = Output("final", Predictions(torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])))
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.1]]))
    targets.boxes[0, 2:] = torch.tensor([0.2, 0.4])
    match = Match(*torch.zeros(3, 1, dtype=torch.long))
    pairs = Pairs.of([output], [match], targets, [1.0])
    assert pairs.iou.item() == pytest.approx(0.5)
    for loss, expected in (
        (Focal(), (0.25 * 0.5**2 + 0.75 * 0.5**2) * log(2)),
        (VFL(), (0.5 + 0.75 * 0.5**2) * log(2)),
        (MAL(), (1 + 0.5**1.5) * log(2)),
        (QFL(), (0 + 0.5**2) * log(2)),
        (PSL(), (0 + 0.75 * 0.5**2) * log(2)),  # aims at the image's largest IoU, which is 1/2
        (PSL(to_one=True), (0.25 * 0.5**2 + 0.75 * 0.5**2) * log(2)),
    ):
        assert loss(pairs).tolist() == pytest.approx([expected], rel=1e-6), loss.name


@pytest.mark.parametrize(("loss", "best"), [(PSL(), 0.5), (PSL(to_one=True), 1.0)])
def test_psl_rescales_image_by_image(loss: PSL, best: float) -> None:
    """IoUs 1/2 and 1/4 in one image, 1/8 in the other, where a query that is not matched has 1/2 too."""
    heights = torch.tensor([[0.2, 0.1, 0.4], [0.05, 0.2, 0.01]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.0]).repeat(2, 3, 1)
    boxes[..., 3] = heights
    targets = Targets(torch.tensor([0, 0, 1]), torch.zeros(3).long(), torch.tensor([[0.5, 0.5, 0.2, 0.4]] * 3))
    match = Match(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.arange(3))
    outputs = [Output("final", Predictions(torch.zeros(2, 3, 1), boxes))] * 2
    boxes[0, 2, 3] = 0.01
    pairs = Pairs.of(outputs, [match, match], targets, [1.0, 1.0])
    assert loss.quality(pairs).tolist() == pytest.approx([best, best / 4, best] * 2, rel=1e-5)


def test_psl_is_never_scaled_down_and_knows_no_overlap() -> None:
    """A perfect box aims at 1; boxes that touch no target aim at 0, as does one without area."""
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]], [[0.1, 0.1, 0.1, 0.1]], [[0.5, 0.5, 0.0, 0.0]]])
    targets = Targets(torch.arange(3), torch.zeros(3).long(), torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 3))
    match = Match(torch.arange(3), torch.zeros(3).long(), torch.arange(3))
    pairs = Pairs.of([Output("final", Predictions(torch.zeros(3, 1, 1), boxes))], [match], targets, [1.0])
    for loss in (PSL(), PSL(to_one=True)):
        assert loss.quality(pairs).tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


Synthetic = tuple[dict[str, Tensor], dict[str, dict[str, float]], Targets]


@pytest.fixture
def synthetic(shared: Path) -> Synthetic:
    """Arrays, losses and targets of the Deformable-DETR family's synthetic batch."""
    path = shared / "golden/family/criterion_synth.npz"
    if not path.exists():
        pytest.skip("no reference losses")
    ref = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    images = [{"labels": ref[f"in.gt_labels{i}"], "boxes": ref[f"in.gt_boxes{i}"]} for i in range(4)]
    return ref, json.loads(path.with_suffix(".json").read_text())["losses"], Targets.from_list(images)


@pytest.mark.parametrize(("loss", "key"), [(PSL(weight=1.0), "maxiou"), (PSL(weight=1.0, to_one=True), "max1")])
def test_published_psl(synthetic: Synthetic, loss: PSL, key: str) -> None:
    """PSL of normal and denoising queries by both strategies, its targets, and its gradients."""
    ref, losses, targets = synthetic
    slots = []  # 2 denoising groups of 5 positive, then 5 negative queries
    for row, i in enumerate(targets.image.tolist()):
        first = int((targets.image < i).sum())
        slots += [(i, 10 * group + row - first, row) for group in range(2)]
    group: dict[str, Any] = {"rule": Match(*torch.tensor(slots).T), "repeat": 2, "pooled": False}
    kinds = {"": ("", {}), "_0": ("aux_", {}), "_enc": ("enc_", {}), "_dn": ("dn_", group), "_dn_0": ("dn_aux_", group)}
    outputs = [
        Output(name, Predictions(ref[f"in.{v}logits"].requires_grad_(), ref[f"in.{v}boxes"]), **how)
        for name, (v, how) in kinds.items()
    ]
    terms = Criterion((loss,), Hungarian(), share=False)(outputs, targets)
    for name, value in terms.items():
        theirs = losses[f"psl_{key}_basematch"][f"loss_class{name.removeprefix('psl/')}"]
        assert value.item() == pytest.approx(theirs, rel=2e-6), name
    for name, field in (("", "logits"), ("_dn", "dn_logits")):
        (grad,) = torch.autograd.grad(terms[f"psl/{name}"], ref[f"in.{field}"], retain_graph=True)
        torch.testing.assert_close(grad, ref[f"psl_{key}_basematch.grad_loss_class_{field}"], rtol=1e-4, atol=1e-6)

    (match,) = Hungarian()(outputs[:1], targets)
    pairs = Pairs.of(outputs[:1], [match], targets, [9.0])
    aims = torch.zeros_like(ref["in.logits"])
    aims[match.image, match.query, pairs.labels] = loss.quality(pairs)
    torch.testing.assert_close(aims, ref[f"psl_{key}.soft_target"], rtol=1e-4, atol=1e-6)  # theirs adds 1e-6 to unions


def test_published_focal(synthetic: Synthetic) -> None:
    """Focal, L1 and GIoU of the Deformable-DETR family's synthetic batch, with their gradients."""
    ref, every, targets = synthetic
    losses = every["focal_basematch"]
    logits, boxes = ref["in.logits"].requires_grad_(), ref["in.boxes"].requires_grad_()
    outputs = [Output("final", Predictions(logits, boxes))]
    for name, prefix in (("layer0", "aux_"), ("proposals", "enc_")):
        outputs.append(Output(name, Predictions(ref[f"in.{prefix}logits"], ref[f"in.{prefix}boxes"])))
    terms = Criterion((Focal(), L1(), GIoU()), Hungarian(), share=False)(outputs, targets)

    suffix = {"final": "", "layer0": "_0", "proposals": "_enc"}
    theirs = {"focal": ("class", 1), "l1": ("bbox", 5), "giou": ("giou", 2)}
    for name, value in terms.items():
        loss, place = name.split("/")
        base, weight = theirs[loss]
        assert value.item() == pytest.approx(weight * losses[f"loss_{base}{suffix[place]}"], rel=1e-4), name
    (grad,) = torch.autograd.grad(terms["focal/final"], logits)
    torch.testing.assert_close(grad, ref["focal_basematch.grad_loss_class_logits"], rtol=1e-4, atol=1e-7)
    (grad,) = torch.autograd.grad(terms["l1/final"] + terms["giou/final"], boxes)
    torch.testing.assert_close(grad, ref["focal_basematch.grad_box"], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------- box losses


def test_box_losses_by_hand() -> None:
    """Unit squares of which one has moved by half its side: IoU 1/3, hull 3/2, so GIoU is 1/3 too."""
    side = 0.2
    output = Output("final", Predictions(torch.zeros(1, 2, 1), torch.tensor([[[0.5, 0.5, side, side]] * 2])))
    targets = Targets(torch.zeros(1).long(), torch.zeros(1).long(), torch.tensor([[0.5 + side / 2, 0.5, side, side]]))
    pairs = Pairs.of([output], [Match(torch.zeros(2).long(), torch.arange(2), torch.zeros(2).long())], targets, [4.0])
    assert L1()(pairs).tolist() == pytest.approx([2 * side / 2 / 4])
    assert GIoU()(pairs).tolist() == pytest.approx([2 * (1 - 1 / 3) / 4])
    assert Corners()(pairs).tolist() == pytest.approx([2 * side / 2 / 4])


def edge_output(edges: Tensor, boxes: Tensor, last: Predictions | None = None) -> Output:
    return Output("layer0", Predictions(torch.zeros(*boxes.shape[:2], 2), boxes, edges, boxes), last=last)


def test_fgl_by_hand() -> None:
    """A box on its target: every edge belongs to the middle bin, and IoU is 1."""
    box = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
    targets = Targets(torch.zeros(1).long(), torch.zeros(1).long(), box[0])
    match = Match(*torch.zeros(3, 1, dtype=torch.long))
    blank = torch.zeros(1, 1, 4, 33)
    right = blank.clone().index_fill_(-1, torch.tensor([16]), 50.0)
    wrong = blank.clone().index_fill_(-1, torch.tensor([20]), 50.0)
    for edges, expected in ((blank, 4 * log(33)), (right, 0.0), (wrong, 4 * 50.0)):
        pairs = Pairs.of([edge_output(edges, box)], [match], targets, [2.0])
        assert FGL()(pairs).tolist() == pytest.approx([expected / 2], abs=1e-5)


def test_fgl_is_least_where_the_distribution_means_the_target() -> None:
    outputs, matches, targets = example()
    pairs = pairs_of(outputs, matches, targets)
    W = weighting(6, dtype=torch.float64)
    left, right = encode(pairs.gather("anchors"), pairs.wanted, W)
    ideal = torch.zeros(9, 4, 7).double().scatter_(-1, left[..., None], (1 - right)[..., None])
    ideal = ideal.scatter_(-1, left[..., None] + 1, right[..., None])
    entropy = -torch.special.xlogy(ideal, ideal).sum((-1, -2))
    start = 0
    for output, match in zip(outputs, matches, strict=True):
        output.preds.edges[match.image, match.query] = ideal[start : start + len(match.query)].clamp(min=1e-12).log()
        start += len(match.query)
    best = FGL()(pairs)
    torch.testing.assert_close(best, pairs.sum(entropy * pairs.iou) / pairs.count, rtol=1e-6, atol=1e-8)
    for output in outputs:
        output.preds.edges = output.preds.edges + 0.1 * torch.randn_like(output.preds.edges)
    assert (FGL()(pairs) >= best).all() and FGL()(pairs).sum() > best.sum()


def test_ddf_is_the_formula_spelled_out() -> None:
    outputs, matches, targets = example()
    chosen = [0, 1, 3]
    pairs = pairs_of(outputs, matches, targets, normal=(3, 10)).only(chosen)
    T, expected = 5.0, []
    for k in chosen:
        student, teacher = outputs[k].preds, outputs[k].last
        p, q = (teacher.edges / T).softmax(-1), (student.edges / T).softmax(-1)
        kl = (p * (p / q).log()).sum(-1) * T**2  # (B, Q, 4)
        matched = {(b, i): t for b, i, t in torch.stack(matches[k], 1).tolist()}
        kinds: dict[bool, list[float]] = {True: [], False: []}
        for b, i in np.ndindex(*kl.shape[:2]):
            t = matched.get((b, i))
            trust = (
                iou_giou(student.boxes[b, i], targets.boxes[t])[0]
                if t is not None
                else teacher.logits[b, i].max().sigmoid()
            )
            kinds[t is not None] += (kl[b, i] * trust).tolist()
        m, u = 3**0.5, 7**0.5
        expected.append((np.mean(kinds[True]) * m + np.mean(kinds[False]) * u) / (m + u))
    assert DDF()(pairs).tolist() == pytest.approx(expected, rel=1e-9)


def test_ddf_of_a_student_that_equals_its_teacher_is_zero() -> None:
    outputs, matches, targets = example()
    for output in outputs[:2]:
        output.preds = replace(output.preds, edges=output.last.edges.clone().requires_grad_())
    value = DDF()(pairs_of(outputs, matches, targets, normal=(3, 10)).only([0, 1]))
    assert value.tolist() == [0.0, 0.0]
    for grad in torch.autograd.grad(value.sum(), [output.preds.edges for output in outputs[:2]]):
        assert grad.abs().max() < 1e-12


def test_ddf_never_teaches_the_teacher() -> None:
    outputs, matches, targets = example()
    teacher = outputs[0].last
    teacher.edges.requires_grad_(), teacher.logits.requires_grad_()
    outputs[0].preds.edges.requires_grad_(), outputs[0].preds.boxes.requires_grad_()
    value = DDF()(pairs_of(outputs, matches, targets, normal=(3, 10)).only([0]))
    inputs = [teacher.edges, teacher.logits, outputs[0].preds.boxes]
    assert torch.autograd.grad(value.sum(), inputs, allow_unused=True) == (None, None, None)


def test_which_losses_apply_where() -> None:
    plain, edges = predictions(1, 2, edges=False), predictions(1, 2)
    rows = [
        Output("pre", plain),
        Output("final", edges),
        Output("layer0", edges, last=edges),
        Output("x", plain, last=plain),
    ]
    assert [[loss.applies(o) for o in rows] for loss in (MAL(), L1(), FGL(), DDF())] == [
        [True] * 4, [True] * 4, [False, True, True, False], [False, False, True, False],
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------- gradients


def as_function(loss: Loss) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of the first layer's logits, boxes and edges, its IoUs held fixed."""
    outputs, matches, targets = example()
    known = pairs_of(outputs, matches, targets)

    def value(logits: Tensor, boxes: Tensor, edges: Tensor) -> Tensor:
        preds = replace(outputs[0].preds, logits=logits, boxes=boxes, edges=edges)
        now = [replace(outputs[0], preds=preds), *outputs[1:]]
        pairs = replace(pairs_of(now, matches, targets, normal=(3, 10)), iou=known.iou)
        return loss(pairs.only([0]))

    preds = outputs[0].preds
    return value, [x.clone().requires_grad_() for x in (preds.logits, preds.boxes, preds.edges)]


@pytest.mark.parametrize("loss", [Focal(), QFL(), PSL(to_one=True), L1(), GIoU(), FGL(), DDF(), Corners()], ids=repr)
def test_gradients_are_those_of_the_value(loss: Loss) -> None:
    """IoU as a weight or as a target passes no gradient, on purpose; so it is held fixed here."""
    assert torch.autograd.gradcheck(*as_function(loss), fast_mode=True)


@pytest.mark.parametrize("loss", [QFL(), PSL(), PSL(to_one=True, gamma=1.5)], ids=repr)
def test_quality_teaches_scores_alone(loss: ClassLoss) -> None:
    value, (logits, boxes, edges) = as_function(loss)
    assert torch.autograd.gradcheck(lambda z: value(z, boxes.detach(), edges.detach()), logits)
    assert torch.autograd.grad(value(logits, boxes, edges).sum(), boxes, allow_unused=True) == (None,)


@pytest.mark.parametrize("loss", [VFL(), MAL(), MAL(gamma=2.0, alpha=0.5)], ids=repr)
def test_gradients_hold_the_weight_fixed(loss: ClassLoss) -> None:
    """Those of VFL and MAL are weight * (p - target): their weights depend on p but pass no gradient, as published."""
    outputs, matches, targets = example()
    z, match = outputs[0].preds.logits.requires_grad_(), matches[0]
    (grad,) = torch.autograd.grad(loss(pairs_of(outputs, matches, targets)).sum(), z)
    one, q = torch.zeros_like(z), torch.zeros_like(z)
    at = match.image, match.query, targets.labels[match.target]
    one[at] = 1
    q[at] = iou_giou(outputs[0].preds.boxes[match.image, match.query], targets.boxes[match.target])[0]
    p = z.detach().sigmoid()
    target, weight = loss.target_and_weight(p, one, q)  # type: ignore[arg-type]
    torch.testing.assert_close(grad, weight * (p - target) / 2)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_no_pairs_make_finite_values_and_a_graph(loss: Loss) -> None:
    outputs, _, _ = example()
    leaves = [getattr(o.preds, k).requires_grad_() for o in outputs for k in ("logits", "boxes", "edges")]
    none = [Match(*torch.empty(3, 0).long()) for _ in outputs]
    targets = Targets(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0, 4))
    pairs = pairs_of(outputs, none, targets, normal=(0, 10))
    speaks = [k for k, output in enumerate(outputs) if loss.applies(output)]
    value = loss(pairs.only(speaks))
    assert value.shape == (len(speaks),) and torch.isfinite(value).all() and value.requires_grad
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    if not isinstance(loss, (ClassLoss, DDF)):
        assert not value.any()


@pytest.mark.parametrize("loss", [QFL(), PSL(), PSL(to_one=True)], ids=repr)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_a_detector_learns_by_it(loss: ClassLoss, counts: tuple[int, int]) -> None:
    """One step of a batch with an empty image, or without a target, moves it to where all terms are finite."""
    detector, n = MICRO.build(3).train(), sum(counts)
    boxes = predictions(1, n).boxes[0].float()
    targets = Targets(torch.zeros(n).long(), torch.arange(n), boxes)
    criterion, images = Criterion((loss, L1(), GIoU())), torch.rand(2, 3, 64, 64)
    torch.stack([*criterion(detector(images, targets), targets).values()]).sum().backward()
    grads = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.any() for grad in grads)
    torch.optim.SGD(detector.parameters(), lr=1e-4).step()
    terms = criterion(detector(images, targets), targets)
    assert terms.keys() >= {f"{loss.name}/{where}" for where in ("final", "layer0", "proposals", "denoise.final")}
