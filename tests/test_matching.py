"""Matching against brute force, against the published costs and pairs, and at its edges."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deimkit.boxes import cxcywh_to_xyxy, iou_giou, xyxy_to_cxcywh
from deimkit.criterion import Criterion
from deimkit.errors import NonFiniteError
from deimkit.losses import L1, MAL, GIoU
from deimkit.matching import ALONE, CELLS, Hungarian, Matcher, PositionModulated, SimOTA, largest, union, widen
from deimkit.structures import Match, Output, Predictions, Targets
from tests.micro import MICRO


def random_output(images: int, queries: int, classes: int = 5, name: str = "final") -> Output:
    boxes = torch.cat([torch.rand(images, queries, 2), torch.rand(images, queries, 2) * 0.4 + 0.05], -1)
    return Output(name, Predictions(torch.randn(images, queries, classes), boxes))


def random_targets(*counts: int, classes: int = 5) -> Targets:
    n = sum(counts)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    return Targets(image, torch.randint(classes, (n,)), torch.cat([torch.rand(n, 2), torch.rand(n, 2) * 0.4 + 0.05], 1))


def plain_cost(matcher: Hungarian, output: Output, targets: Targets, image: int) -> Tensor:
    """The cost table (n, Q) of one image, written down as the papers do."""
    rows = targets.image == image
    p = output.preds.logits[image].sigmoid()[:, targets.labels[rows]].T
    boxes, wanted = output.preds.boxes[image][None], targets.boxes[rows][:, None]
    if isinstance(matcher, PositionModulated):
        fit = ((iou_giou(boxes, wanted)[1] + 1) / 2) ** matcher.power
        p = p * fit * (max(1.0, 1 / (fit.max().item() + 1e-8)) if matcher.rescale else 1.0)
    positive = matcher.alpha * (1 - p) ** matcher.gamma * -torch.log(p + 1e-8)
    negative = (1 - matcher.alpha) * p**matcher.gamma * -torch.log(1 - p + 1e-8)
    l1 = (boxes - wanted).abs().sum(-1)
    return matcher.cls * (positive - negative) + matcher.l1 * l1 - matcher.giou * iou_giou(boxes, wanted)[1]


def pairs(match: Match, image: int) -> set[tuple[int, int]]:
    mine = match.image == image
    return set(zip(match.query[mine].tolist(), match.target[mine].tolist(), strict=True))


def test_cost_by_hand() -> None:
    # p = 1/2: focal cost (1/4 - 3/4) * (1/2)^2 * ln 2. Equal halves side by side: L1 is 1/2, they touch: GIoU is 0.
    output = Output("final", Predictions(torch.zeros(1, 1, 1), torch.tensor([[[0.25, 0.5, 0.5, 1.0]]])))
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.75, 0.5, 0.5, 1.0]]))
    cost = Hungarian().cost([output], targets, torch.tensor([0]))
    assert cost.item() == pytest.approx(2 * (0.25 - 0.75) * 0.25 * np.log(2) + 5 * 0.5 - 2 * 0, abs=1e-6)


MODULATED = [PositionModulated(), PositionModulated(rescale=False), PositionModulated(power=2.0, cls=3.0)]


@pytest.mark.parametrize("matcher", [Hungarian(), Hungarian(cls=1, l1=0, giou=3, alpha=0.4, gamma=1.5), *MODULATED])
def test_cost_is_the_formula_and_only_of_the_own_image(matcher: Hungarian) -> None:
    targets = random_targets(3, 0, 4)
    outputs = [random_output(3, 6), random_output(3, 9)]
    cost = matcher.cost(outputs, targets, torch.arange(7))
    expected = [torch.cat([plain_cost(matcher, o, targets, b) for o in outputs], 1) for b in (0, 2)]
    torch.testing.assert_close(cost, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matcher", [Hungarian(), *MODULATED])
def test_assignment_is_the_best_of_all(matcher: Hungarian) -> None:
    targets = random_targets(3, 1, 4)
    outputs = [random_output(3, 5), random_output(3, 6, name="other")]
    for output, match in zip(outputs, matcher(outputs, targets), strict=True):
        for b, n in enumerate((3, 1, 4)):
            cost = plain_cost(matcher, output, targets, b)
            best = min(cost[range(n), list(q)].sum().item() for q in permutations(range(cost.shape[1]), n))
            first = int((targets.image < b).sum())
            found = pairs(match, b)
            assert len({q for q, _ in found}) == len({t for _, t in found}) == n
            assert sum(cost[t - first, q].item() for q, t in found) == pytest.approx(best, abs=1e-5)


MATCHERS = [Hungarian(), PositionModulated(), SimOTA(candidates=4, outside=100.0)]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_costs_have_parts_that_add_up(matcher: Hungarian | SimOTA) -> None:
    targets, output = random_targets(3, 0, 4), random_output(3, 6)
    output.preds.logits.requires_grad_()
    for b, n in enumerate((3, 0, 4)):
        rows = (targets.image == b).nonzero()[:, 0]
        costs = matcher.costs([output], targets, rows)
        assert all(table.shape == (n, 6) and not table.requires_grad for table in (costs.iou, *costs.parts.values()))
        assert torch.equal(costs.total, matcher.cost([output], targets, rows))
        torch.testing.assert_close(costs.total, torch.stack([*costs.parts.values()]).sum(0))
        iou, giou = iou_giou(output.preds.boxes[b], targets.boxes[rows][:, None])
        torch.testing.assert_close(costs.iou, iou)
        if isinstance(matcher, Hungarian):
            torch.testing.assert_close(costs.parts["giou"], -2 * giou)
            l1 = (output.preds.boxes[b] - targets.boxes[rows][:, None]).abs().sum(-1)
            torch.testing.assert_close(costs.parts["l1"], 5 * l1)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_targets_need_no_order(matcher: Matcher) -> None:
    targets, output = random_targets(4, 3, 5), random_output(3, 8)
    for boxes in (targets.boxes, output.preds.boxes):
        boxes[..., 2:] += 1.0  # all overlap: no ties
    shuffle = torch.randperm(12)
    mixed = Targets(targets.image[shuffle], targets.labels[shuffle], targets.boxes[shuffle])
    straight, crooked = (matcher([output], t)[0] for t in (targets, mixed))
    assert torch.equal(crooked.image, mixed.image[crooked.target])
    for b in range(3):
        assert pairs(straight, b) == {(q, int(shuffle[t])) for q, t in pairs(crooked, b)}


@pytest.mark.parametrize(
    ("counts", "queries", "matched"),
    [
        ((0, 0), 4, [0, 0]),
        ((3, 0), 4, [3, 0]),
        ((9, 2), 4, [4, 2]),
        ((2, 1), 0, [0, 0]),
        ((500, 0, 500), 30, [30, 0, 30]),
    ],
)
def test_counts(counts: tuple[int, ...], queries: int, matched: list[int]) -> None:
    targets = random_targets(*counts)
    match = Hungarian()([random_output(len(counts), queries)], targets)[0]
    assert torch.bincount(match.image, minlength=len(counts)).tolist() == matched
    assert torch.equal(match.image, targets.image[match.target])
    assert len({*zip(match.image.tolist(), match.query.tolist(), strict=True)}) == sum(matched)
    assert len(match.target.unique()) == sum(matched)
    assert match.query.dtype == match.target.dtype == match.image.dtype == torch.int64


def test_same_target_twice_takes_two_queries() -> None:
    targets = random_targets(1)
    twice = Targets(*(torch.cat([x, x]) for x in (targets.image, targets.labels, targets.boxes)))
    match = Hungarian()([random_output(1, 5)], twice)[0]
    assert len(match.query.unique()) == 2 and sorted(match.target.tolist()) == [0, 1]


@pytest.mark.parametrize("matcher", MATCHERS)
def test_crowd_is_worked_out_in_parts_and_threads(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, outputs = random_targets(40, 7, 0, 25), [random_output(4, 30), random_output(4, 20)]
    whole = matcher(outputs, targets)
    monkeypatch.setattr("deimkit.matching.CELLS", 500)
    monkeypatch.setattr("deimkit.matching.ALONE", 0)
    parts = matcher(outputs, targets)
    assert min(CELLS, ALONE) > 72 * 50
    assert all(torch.equal(a, b) for x, y in zip(whole, parts, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_boxes_are_named(value: float, matcher: Matcher) -> None:
    outputs = [random_output(3, 6), random_output(3, 4, name="layer1")]
    outputs[1].preds.boxes[2, 3, 0] = value
    with pytest.raises(NonFiniteError, match=r"'layer1'.*image 2"):
        matcher(outputs, random_targets(2, 0, 2))


def test_boxes_without_area_match_and_cost_the_worst_overlap() -> None:
    output, targets = random_output(1, 3), random_targets(2)
    output.preds.boxes[..., 2:] = 0
    targets.boxes[:, 2:] = 0
    output.preds.boxes[0, 1] = targets.boxes[1]  # not even their hull has an area
    matcher = Hungarian(cls=0, l1=0, giou=1)
    assert matcher.cost([output], targets, torch.arange(2)).tolist() == [[1.0] * 3] * 2
    first, second = Hungarian()([output], targets)[0], Hungarian()([output], targets)[0]
    assert (1, 1) in pairs(first, 0) and pairs(first, 0) == pairs(second, 0)


def test_half_precision_is_matched_in_float32() -> None:
    output, targets = random_output(2, 20), random_targets(5, 3)
    narrow = Output("final", Predictions(output.preds.logits.bfloat16(), output.preds.boxes.bfloat16()))
    wide = Output("final", Predictions(narrow.preds.logits.float(), narrow.preds.boxes.float()))
    for a, b in zip(Hungarian()([narrow], targets)[0], Hungarian()([wide], targets)[0], strict=True):
        assert torch.equal(a, b)
    assert widen(torch.zeros(1, dtype=torch.float16)).dtype == torch.float32
    assert widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def synthetic_batch(shared: Path) -> tuple[dict[str, Tensor], Targets]:
    """The numbers of the Deformable-DETR family's synthetic batch by name, and its targets."""
    path = shared / "golden/family/criterion_synth.npz"
    if not path.exists():
        pytest.skip("no reference costs")
    ref = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    targets = Targets.from_list(
        [{"labels": ref[f"in.gt_labels{i}"], "boxes": ref[f"in.gt_boxes{i}"]} for i in range(4)]
    )
    return ref, targets


def test_published_costs_and_pairs(shared: Path) -> None:
    """Every part of the cost, the whole cost and the pairs of the Deformable-DETR family's synthetic batch."""
    ref, targets = synthetic_batch(shared)
    names = {"last": "", "aux0": "aux_", "enc": "enc_"}
    outputs = [Output(k, Predictions(ref[f"in.{v}logits"], ref[f"in.{v}boxes"])) for k, v in names.items()]
    everything = torch.arange(len(targets))

    for weights, term, shift in (((1, 0, 0), "cls", 0.0), ((0, 1, 0), "l1", 0.0), ((0, 0, 1), "giou_1minus", -1.0)):
        ours = Hungarian(*weights).cost(outputs[:1], targets, everything)
        theirs = torch.cat([ref[f"term.{term}{i}"].T for i in range(4)]) + shift
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # 1 - p of a p near 1 has few digits
    for output, match in zip(outputs, Hungarian()(outputs, targets), strict=True):
        ours = Hungarian().cost([output], targets, everything)
        theirs = torch.cat([ref[f"match_base.{output.name}.cost{i}"].T for i in range(4)])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        for i in range(4):
            query, target = (ref[f"match_base.{output.name}.{k}{i}"].tolist() for k in ("src", "tgt"))
            first = int((targets.image < i).sum())
            assert pairs(match, i) == {(q, t + first) for q, t in zip(query, target, strict=True)}


def test_published_box_operations(shared: Path) -> None:
    """deimkit.boxes and the cost's own GIoU, on boxes of which some have a negative size."""
    ref = {k: torch.from_numpy(v) for k, v in np.load(shared / "golden/losses/box_ops.npz").items()}
    a, b = ref["a_cxcywh"], ref["b_cxcywh"]
    torch.testing.assert_close(cxcywh_to_xyxy(a), ref["a_xyxy"])
    torch.testing.assert_close(xyxy_to_cxcywh(ref["a_xyxy"]), ref["a_back_cxcywh"])
    iou, giou = iou_giou(a[:, None], b[None])
    torch.testing.assert_close(iou, ref["iou"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(giou, ref["giou"], rtol=1e-5, atol=1e-6)

    output = Output("final", Predictions(torch.zeros(1, len(a), 1), a[None]))
    targets = Targets(torch.zeros(len(b)).long(), torch.zeros(len(b)).long(), b)
    cost = Hungarian(cls=0, l1=0, giou=1).cost([output], targets, torch.arange(len(b)))
    torch.testing.assert_close(-cost.T, ref["giou"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- position-modulated


def test_modulated_cost_by_hand() -> None:
    """Boxes that touch have GIoU 0, so half of what p = 1/2 says counts with power 1, and all of it when rescaled."""
    output = Output("final", Predictions(torch.zeros(1, 1, 1), torch.tensor([[[0.25, 0.5, 0.5, 1.0]]])))
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.75, 0.5, 0.5, 1.0]]))
    for rescale, p in ((False, 0.25), (True, 0.5)):
        costs = PositionModulated(power=1.0, rescale=rescale).costs([output], targets, torch.tensor([0]))
        expected = 2 * (0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p))
        assert costs.parts["class"].item() == pytest.approx(expected, abs=1e-6)


def test_without_power_nothing_is_modulated() -> None:
    targets, outputs = random_targets(3, 4), [random_output(2, 6)]
    plain, modulated = (m.cost(outputs, targets, torch.arange(7)) for m in (Hungarian(), PositionModulated(power=0)))
    torch.testing.assert_close(plain, modulated)


def test_modulation_of_an_image_knows_no_other_image_and_no_other_output() -> None:
    targets, outputs = random_targets(3, 4), [random_output(2, 6), random_output(2, 5)]
    together = PositionModulated().cost(outputs, targets, torch.arange(7))
    for b, rows in enumerate((torch.arange(3), torch.arange(3, 7))):
        alone = [PositionModulated().cost([o], targets, rows) for o in outputs]
        assert torch.equal(together[targets.image == b], torch.cat(alone, 1))


def test_pairwise_modulation_of_the_synthetic_batch(shared: Path) -> None:
    """The class cost beside a second derivation of the pair-wise reading, in float64 for rounding's sake."""
    ref, targets = synthetic_batch(shared)
    outputs = [Output("final", Predictions(ref["in.logits"].double(), ref["in.boxes"].double()))]
    for rescale, name in ((False, "plain"), (True, "rescale_image_max")):
        ours = PositionModulated(cls=1.0, rescale=rescale).costs(outputs, targets, torch.arange(len(targets)))
        theirs = torch.cat([ref[f"own.pairwise_modcls_{name}{i}"].T for i in range(4)]).double()
        torch.testing.assert_close(ours.parts["class"], theirs, rtol=1e-5, atol=5e-5)


def test_largest_of_a_group() -> None:
    values = torch.tensor([[0.5, 0.1], [0.25, 0.0], [0.0, 0.75], [0.0, 0.0]])
    group = torch.tensor([3, 0, 3, 1])
    assert largest(values, group, 5).tolist() == [0.75, 0.25, 0.75, 0.0]
    assert largest(values[:, :0], group, 5).tolist() == [0.0] * 4
    assert largest(values[:0], group[:0], 5).tolist() == []


# ------------------------------------------------------------------------------------------------------ SimOTA


def loops(matcher: SimOTA, output: Output, targets: Targets, image: int) -> tuple[set[tuple[int, int]], int]:
    """SimOTA of one image, one pair after another, and how many queries several targets took."""
    rows = [t for t in range(len(targets)) if targets.image[t] == image]
    boxes, p = output.preds.boxes[image].double().numpy(), output.preds.logits[image].double().sigmoid().numpy()
    cost, iou = np.empty((len(rows), len(boxes))), np.empty((len(rows), len(boxes)))
    for i, t in enumerate(rows):
        for q, box in enumerate(boxes):
            gt, one = targets.boxes[t].double().numpy(), np.eye(p.shape[1])[targets.labels[t]]
            low = np.maximum(box[:2] - box[2:] / 2, gt[:2] - gt[2:] / 2)
            high = np.minimum(box[:2] + box[2:] / 2, gt[:2] + gt[2:] / 2)
            inter = np.prod(np.clip(high - low, 0, None))
            iou[i, q] = inter / (box[2] * box[3] + gt[2] * gt[3] - inter)
            bce = -sum(np.log(p[q, c]) if one[c] else np.log(1 - p[q, c]) for c in range(len(one)))
            inside = all(gt[d] - gt[2 + d] / 2 < box[d] < gt[d] + gt[2 + d] / 2 for d in (0, 1))
            cost[i, q] = matcher.cls * bce + matcher.iou * -np.log(iou[i, q] + 1e-8)
            cost[i, q] += 0 if inside else matcher.outside
    takers: dict[int, list[int]] = {}
    for i in range(len(rows)):
        k = max(int(sum(sorted(iou[i], reverse=True)[: matcher.candidates])), 1)
        for q in sorted(range(len(boxes)), key=lambda q: cost[i, q])[:k]:
            takers.setdefault(q, []).append(i)
    found = set()
    for q, claimants in takers.items():
        winner = claimants[0] if len(claimants) == 1 else int(cost[:, q].argmin())
        found.add((q, rows[winner]))
    return found, sum(len(claimants) > 1 for claimants in takers.values())


@pytest.mark.parametrize("matcher", [SimOTA(), SimOTA(candidates=3), SimOTA(cls=2.0, iou=0.5, outside=1.0)])
def test_simota_is_the_rule_spelled_out(matcher: SimOTA) -> None:
    """Boxes gather around their image's targets, so that every target deserves several and some are wanted twice."""
    counts, queries = (5, 0, 1, 12), 40
    targets = random_targets(*counts)
    outputs = [random_output(4, queries), random_output(4, 9, name="other")]
    for output in outputs:
        for b in (0, 2, 3):
            near = targets.boxes[targets.image == b]
            near = near[torch.randint(len(near), (output.preds.boxes.shape[1],))]
            output.preds.boxes[b] = near * (0.9 + 0.2 * torch.rand(len(near), 4))
    contested = 0
    for output, match in zip(outputs, matcher(outputs, targets), strict=True):
        for b in range(4):
            expected, several = loops(matcher, output, targets, b)
            assert pairs(match, b) == expected
            contested += several
        assert torch.equal(match.image, targets.image[match.target])
        order = (match.image * 100 + match.target) * 100 + match.query
        assert torch.equal(order, order.sort().values) and len(match.query) > sum(counts) - 12
    assert contested >= 5


def test_a_contested_query_may_go_to_a_target_that_did_not_take_it() -> None:
    """Three targets want one query each; the first prefers another query, yet the contested one is cheapest for it."""
    cost = np.array([[1.0, 2.0], [9.0, 3.0], [9.0, 4.0]])
    row, query = SimOTA()._assign(cost, np.zeros((3, 2)))
    assert list(zip(row.tolist(), query.tolist(), strict=True)) == [(0, 0), (0, 1)]


def test_simota_by_hand() -> None:
    """Same centre and width, so the IoU is the ratio of heights: 1 + 0.9 + 0.8 + 0.5 is three queries, 0.4 is one."""
    boxes = [[0.25, 0.5, 0.2, 0.4 * r] for r in (0.5, 0.9, 1.0, 0.8)] + [[0.75, 0.5, 0.2, 0.16], [0.5, 0.1, 0.1, 0.1]]
    output = Output("final", Predictions(torch.zeros(1, 6, 3), torch.tensor([boxes])))
    targets = Targets(
        torch.zeros(2).long(), torch.zeros(2).long(), torch.tensor([[x, 0.5, 0.2, 0.4] for x in (0.25, 0.75)])
    )
    assert pairs(SimOTA()([output], targets)[0], 0) == {(1, 0), (2, 0), (3, 0), (4, 1)}
    assert pairs(SimOTA(candidates=2)([output], targets)[0], 0) == {(2, 0), (4, 1)}  # 1.0 + 0.9, rounded down
    costs = SimOTA().costs([output], targets, torch.arange(2))
    assert costs.parts["class"].flatten().tolist() == pytest.approx([3 * np.log(2)] * 12)  # all three classes at 1/2
    assert costs.parts["iou"][0, :4].tolist() == pytest.approx([-3 * np.log(r) for r in (0.5, 0.9, 1.0, 0.8)], abs=1e-5)
    assert costs.parts["outside"].tolist() == [[0, 0, 0, 0, 1e5, 1e5], [1e5, 1e5, 1e5, 1e5, 0, 1e5]]


def test_simota_prefers_queries_inside_of_the_target() -> None:
    """The first overlaps more (1/5 against 1/10), but has its centre just outside; alone, it is better than none."""
    boxes = torch.tensor([[[0.61, 0.5, 0.2, 0.2], [0.5, 0.5, 0.02, 0.2]]])
    boxes[0, 0, 2] = 0.3
    targets = Targets(torch.zeros(1).long(), torch.zeros(1).long(), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    output = Output("final", Predictions(torch.zeros(1, 2, 1), boxes))
    assert pairs(SimOTA()([output], targets)[0], 0) == {(1, 0)}
    assert pairs(SimOTA(outside=0.0)([output], targets)[0], 0) == {(0, 0)}
    alone = Output("final", Predictions(torch.zeros(1, 1, 1), boxes[:, :1]))
    assert pairs(SimOTA()([alone], targets)[0], 0) == {(0, 0)}


@pytest.mark.parametrize(("counts", "queries"), [((0, 0), 4), ((3, 0), 4), ((9, 2), 4), ((2, 1), 0), ((500, 0), 30)])
def test_simota_gives_every_query_one_target_at_most(counts: tuple[int, ...], queries: int) -> None:
    targets = random_targets(*counts)
    match = SimOTA()([random_output(len(counts), queries)], targets)[0]
    taken = torch.bincount(match.image, minlength=len(counts))
    assert ((taken > 0) == (torch.tensor(counts) * queries > 0)).all() and (taken <= queries).all()
    assert torch.equal(match.image, targets.image[match.target])
    assert len({*zip(match.image.tolist(), match.query.tolist(), strict=True)}) == len(match.query)
    assert match.query.dtype == match.target.dtype == match.image.dtype == torch.int64


def test_simota_of_the_same_target_twice_serves_one_of_them() -> None:
    targets = random_targets(1)
    twice = Targets(*(torch.cat([x, x]) for x in (targets.image, targets.labels, targets.boxes)))
    assert SimOTA()([random_output(1, 5)], twice)[0].target.unique().tolist() == [0]


# -------------------------------------------------------------------------------------------------- a detector


@pytest.mark.parametrize("matcher", [PositionModulated(), SimOTA()])
def test_a_detector_learns_by_it(matcher: Matcher) -> None:
    """One step of a batch with an empty image moves it, by finite gradients, to where all terms are finite."""
    detector, targets = MICRO.build(3).train(), random_targets(3, 0, classes=3)
    criterion, images = Criterion((MAL(), L1(), GIoU()), matcher), torch.rand(2, 3, 64, 64)

    torch.stack([*criterion(detector(images, targets), targets).values()]).sum().backward()
    grads = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.any() for grad in grads)
    torch.optim.SGD(detector.parameters(), lr=1e-4).step()
    assert criterion(detector(images, targets), targets).keys() >= {"mal/final", "l1/layer0", "giou/proposals"}


# ------------------------------------------------------------------------------------------------------- union


def match_of(*triples: tuple[int, int, int]) -> Match:
    return Match(*torch.tensor(triples, dtype=torch.long).reshape(-1, 3).T)


def triples_of(match: Match) -> list[tuple[int, ...]]:
    return sorted(map(tuple, torch.stack(match, 1).tolist()))


@pytest.mark.parametrize(
    ("layers", "pooled"),
    [
        ([], []),
        ([[]], []),
        ([[(0, 3, 1)]], [(0, 3, 1)]),
        ([[(0, 3, 1)], [(0, 5, 1)]], [(0, 3, 1), (0, 5, 1)]),  # a target keeps several queries
        ([[(0, 3, 2)], [(0, 3, 1)], [(0, 3, 2)]], [(0, 3, 2)]),  # most votes
        ([[(0, 3, 2)], [(0, 3, 1)]], [(0, 3, 1)]),  # a tie: the lower target
        ([[(0, 3, 2)], [(0, 3, 1)], [(0, 3, 1)], [(0, 3, 2)]], [(0, 3, 1)]),
        ([[(0, 3, 2)], [(1, 3, 5)]], [(0, 3, 2), (1, 3, 5)]),  # same query number, another image
    ],
)
def test_union_by_hand(layers: list[list[tuple[int, int, int]]], pooled: list[tuple[int, int, int]]) -> None:
    assert triples_of(union(match_of(*layer) for layer in layers)) == pooled


def test_union_is_the_rule_spelled_out_and_knows_no_order() -> None:
    layers = [Match(torch.randint(3, (40,)), torch.randint(12, (40,)), torch.randint(6, (40,))) for _ in range(7)]
    votes = Counter(tuple(t) for layer in layers for t in torch.stack(layer, 1).tolist())
    expected: dict[tuple[int, int], int] = {}
    for (image, query, target), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0][2])):
        expected.setdefault((image, query), target)
    assert triples_of(union(layers)) == sorted((*key, target) for key, target in expected.items())
    assert triples_of(union(reversed(layers))) == triples_of(union(layers))
    assert triples_of(union([union(layers)])) == triples_of(union(layers))
