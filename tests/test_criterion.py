"""The criterion beside the published one's numbers, and what it promises beyond them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.errors import NonFiniteError, RecipeError
from deimkit.losses import DDF, FGL, L1, MAL, VFL, GIoU
from deimkit.matching import Hungarian, union
from deimkit.structures import Match, Output, Predictions, Targets

Arrays = dict[str, Any]


def load(path: Path) -> Arrays:
    if not path.exists():
        pytest.skip(f"no reference numbers {path.name}")
    return {k: torch.from_numpy(v) if v.dtype.kind in "fib" else v for k, v in np.load(path).items()}


def golden_targets(ref: Arrays) -> Targets:
    images = sum(key.startswith("target.") and key.endswith(".labels") for key in ref)
    return Targets.from_list([{k: ref[f"target.{i}.{k}"] for k in ("boxes", "labels")} for i in range(images)])


def positives(ref: Arrays, targets: Targets) -> tuple[Match, int]:
    """The stored denoising assignment: each image's positive slots, group after group, against its targets in order."""
    groups, found = int(ref["dn.num_group"]), []
    for i in range(sum(key.startswith("dn.positive_idx.") for key in ref)):
        query, rows = ref[f"dn.positive_idx.{i}"].long(), (targets.image == i).nonzero()[:, 0]
        found.append(torch.stack([torch.full_like(query, i), query, rows.repeat(groups)]))
    return Match(*torch.cat(found, 1)), groups


def outputs_of(ref: Arrays, names: dict[str, str], targets: Targets, edges: bool = True) -> list[Output]:
    """The stored predictions as Outputs; `names` maps our names to the stored prefixes, "final" last of its group."""

    def preds(prefix: str) -> Predictions:
        fields = [ref[prefix + k].requires_grad_() for k in ("pred_logits", "pred_boxes")]
        if edges and prefix + "pred_corners" in ref:
            corners = ref[prefix + "pred_corners"].requires_grad_()
            fields += [corners.unflatten(-1, (4, 33)), ref[prefix + "ref_points"]]
        return Predictions(*fields)

    match, groups = positives(ref, targets) if "dn.num_group" in ref else (None, 1)
    read = {ours: preds(theirs) for ours, theirs in names.items()}
    outputs = []
    for name, p in read.items():
        group, _, part = name.rpartition(".")
        last = read[f"{group}.final" if group else "final"] if part.startswith("layer") else None
        how = {"rule": match, "repeat": groups, "pooled": False} if group else {}
        outputs.append(Output(name, p, last=last, **how))
    return outputs


def published(name: str, layers: int) -> str:
    """Our name of a published term: "loss_bbox_dn_1" -> "l1/denoise.layer1"."""
    loss, _, where = name.removeprefix("loss_").partition("_")
    place = {
        "": "final",
        "pre": "pre",
        "enc_0": "proposals",
        "dn_pre": "denoise.pre",
        f"dn_{layers - 1}": "denoise.final",
    }
    place |= {f"aux_{i}": f"layer{i}" for i in range(layers)} | {
        f"dn_{i}": f"denoise.layer{i}" for i in range(layers - 1)
    }
    return f"{'l1' if loss == 'bbox' else loss}/{place[where]}"


def assert_terms(terms: dict[str, Tensor], expected: dict[str, Any], tol: float = 1e-5) -> None:
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=tol, abs=1e-9), name


def assert_match(match: Match, ref: Arrays, name: str, targets: Targets) -> None:
    """The same pairs as stored image by image as (query, target of the image)."""
    stored = {int(key[len(name) + 1 :]): value for key, value in ref.items() if re.fullmatch(rf"{name}[./]\d+", key)}
    assert len(stored) >= 2
    for i, theirs in stored.items():
        mine = match.image == i
        first = int((targets.image < i).sum())
        pairs = torch.stack([match.query[mine], match.target[mine] - first], 1).tolist()
        assert sorted(pairs) == sorted(theirs.T.tolist()), f"{name} in image {i}"


def scenario(name: str) -> Criterion:
    """The parts that a stored scenario stands for."""
    gamma = float(name.split("_g")[1].split("_")[0]) if "_g" in name else 1.5
    alpha = float(name.split("malalpha")[1]) if "malalpha" in name else 1.0
    cls = VFL() if "vfl" in name else MAL(gamma=gamma, alpha=alpha)
    share = name.endswith("_uni") if name.startswith("rtdetr") else "nouni" not in name
    return Criterion((cls, L1(), GIoU(), FGL(), DDF()) if share else (cls, L1(), GIoU()), share=share)


SYNTHETIC = {
    "final": "main.", "layer0": "aux.0.", "layer1": "aux.1.", "pre": "pre.", "proposals": "enc.0.",
    "denoise.final": "dn.2.", "denoise.layer0": "dn.0.", "denoise.layer1": "dn.1.", "denoise.pre": "dn_pre.",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "dfine_mal_g1.0", "dfine_mal_g1.5", "dfine_mal_g2.0", "dfine_mal_g1.5_malalpha0.75", "dfine_vfl",
        "dfine_mal_nouni", "rtdetr_mal_g1.5", "rtdetr_vfl", "rtdetr_mal_uni",
    ],
)  # fmt: skip
def test_synthetic_scenarios(shared: Path, name: str) -> None:
    ref = load(shared / "golden/losses/criterion_inputs.npz")
    key = f"{name}@stable/"
    expected = {
        k.removeprefix(key): v
        for k, v in load(shared / "golden/losses/criterion_outputs.npz").items()
        if k.startswith(key)
    }
    targets = golden_targets(ref)
    rtdetr = name.startswith("rtdetr")
    names = {k: v for k, v in SYNTHETIC.items() if not (rtdetr and "pre" in k)}
    outputs = outputs_of(ref, names, targets, edges=not rtdetr)
    criterion = scenario(name)
    terms = criterion(outputs, targets)

    losses = {published(k, 3): v for k, v in expected.items() if k.startswith("loss_")}
    assert_terms(terms, losses)
    total = sum(terms.values())
    assert total.item() == pytest.approx(float(expected["TOTAL"]), rel=1e-5)

    matches = dict(zip(names, criterion.match(outputs, targets), strict=True))
    stored = {"main": "final", "aux_0": "layer0", "aux_1": "layer1", "enc_0": "proposals"} | (
        {} if rtdetr else {"pre": "pre"}
    )
    for theirs, ours in stored.items():
        assert_match(matches[ours], expected, f"match/{theirs}", targets)
    assert_match(union(matches[ours] for ours in stored.values()), expected, "go", targets)

    total.backward()
    for k, (plain, absolute, norm) in ((k, v.tolist()) for k, v in expected.items() if k.startswith("grad_absum/")):
        where, field = k.removeprefix("grad_absum/").split(".")
        grad = ref[re.sub(r"_(\d)$", r".\1", where) + "." + field].grad
        assert float(grad.abs().sum()) == pytest.approx(absolute, rel=1e-5), k
        assert float(grad.norm()) == pytest.approx(norm, rel=1e-5), k
        assert float(grad.sum()) == pytest.approx(plain, rel=1e-5, abs=1e-5 * absolute), k


@pytest.mark.parametrize(
    "model",
    ["dfine_n", "dfine_s", "dfine_l", "dfine_n_zero1", "dfine_n_zeroall", "rtdetrv2_r18vd", "rtdetrv2_r18vd_zero1"],
)
def test_training_steps(shared: Path, model: str) -> None:
    """The terms, matches and pooled match of a whole published training step, from its stored predictions."""
    size, _, tag = model.partition("_zero")
    ref = load(shared / f"golden/golden/{size}_train{'_zero' + tag if tag else ''}.npz")
    layers = 1 + sum(key.startswith("aux_outputs.") and key.endswith("pred_boxes") for key in ref)
    names = {"final": "", "proposals": "enc_aux_outputs.0."} | {
        f"layer{i}": f"aux_outputs.{i}." for i in range(layers - 1)
    }
    if "dn.num_group" in ref:
        names |= {"denoise.final": f"dn_outputs.{layers - 1}."}
        names |= {f"denoise.layer{i}": f"dn_outputs.{i}." for i in range(layers - 1)}
    for ours, theirs in {"pre": "pre_outputs.", "denoise.pre": "dn_pre_outputs."}.items():
        names |= {ours: theirs} if theirs + "pred_boxes" in ref else {}

    targets = golden_targets(ref)
    outputs = outputs_of(ref, names, targets)
    criterion = Criterion((MAL(), L1(), GIoU(), FGL(), DDF()), share="dfine" in model)
    expected = {published(k.removeprefix("loss/"), layers): v for k, v in ref.items() if k.startswith("loss/")}
    terms = criterion(outputs, targets)
    assert_terms(terms, expected)
    assert sum(terms.values()).item() == pytest.approx(float(ref["loss_total"]), rel=1e-5)

    matches = dict(zip(names, criterion.match(outputs, targets), strict=True))
    stored = {"main": "final", "enc_0": "proposals"} | {f"aux_{i}": f"layer{i}" for i in range(layers - 1)}
    stored |= {"pre": "pre"} if "pre" in names else {}
    for theirs, ours in stored.items():
        assert_match(matches[ours], ref, f"match/{theirs}", targets)
    assert_match(union(matches[ours] for ours in stored.values()), ref, "go", targets)


# -------------------------------------------------------------------------------------- beyond the published one

EVERYTHING = Criterion((MAL(), L1(), GIoU(), FGL(), DDF()))
FIELDS = ("logits", "boxes", "edges", "anchors")


def training_outputs(
    counts: Sequence[int] = (3, 0, 5), queries: int = 12, groups: int = 2
) -> tuple[list[Output], Targets]:
    """What a small detector answers in training, with leaves that take gradients, in float64."""
    images, n = len(counts), sum(counts)

    def boxes(*shape: int) -> Tensor:
        return torch.cat([torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.1], -1).double()

    def answer(count: int, edges: bool) -> Predictions:
        found = [torch.randn(images, count, 4).double(), boxes(images, count)]
        if edges:
            found += [torch.randn(images, count, 4, 33).double(), boxes(images, count)]
        return Predictions(*(x.requires_grad_() for x in found))

    image = torch.repeat_interleave(torch.arange(images), torch.tensor(counts))
    targets = Targets(image, torch.randint(4, (n,)), boxes(n))
    most = max(counts)
    slot = torch.cat([torch.arange(c) for c in counts])
    start = 2 * most * torch.arange(groups)[:, None]
    match = Match(image.repeat(groups), (start + slot).flatten(), torch.arange(n).repeat(groups))
    group: dict[str, Any] = {"rule": match, "repeat": groups, "pooled": False}
    outputs = []
    for prefix, count, how in (("", queries, {}), ("denoise.", 2 * most * groups, group)):
        last = answer(count, True)
        outputs += [Output(f"{prefix}layer{i}", answer(count, True), last=last, **how) for i in range(2)]
        outputs += [Output(f"{prefix}final", last, **how), Output(f"{prefix}pre", answer(count, False), **how)]
    return [*outputs, Output("proposals", answer(queries, False))], targets


def with_preds(outputs: list[Output], change: Any) -> list[Output]:
    """The outputs with every tensor of their predictions changed, each once, so that teachers stay shared."""
    seen: dict[int, Predictions] = {}

    def changed(preds: Predictions | None) -> Predictions | None:
        if preds is not None and id(preds) not in seen:
            values = {k: getattr(preds, k) for k in FIELDS}
            seen[id(preds)] = Predictions(**{k: None if v is None else change(v) for k, v in values.items()})
        return None if preds is None else seen[id(preds)]

    return [replace(output, preds=changed(output.preds), last=changed(output.last)) for output in outputs]


def numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in terms.items()}


def test_terms_are_named_after_loss_and_output() -> None:
    outputs, targets = training_outputs()
    names = {output.name for output in outputs}
    expected = {f"{loss}/{name}" for loss in ("mal", "l1", "giou") for name in names}
    expected |= {f"fgl/{name}" for name in names if "layer" in name or "final" in name}
    expected |= {f"ddf/{name}" for name in names if "layer" in name}
    terms = EVERYTHING(outputs, targets)
    assert set(terms) == expected
    assert all(value.shape == () and value.requires_grad for value in terms.values())


def test_the_terms_and_the_graph_never_depend_on_the_targets() -> None:
    """What DDP relies on: without boxes, and where students equal teachers, every leaf still gets a gradient."""
    outputs, targets = training_outputs()
    leaves = [getattr(o.preds, k) for o in outputs for k in FIELDS[:3] if getattr(o.preds, k) is not None]
    nothing = Match(*torch.empty(3, 0).long())
    none = [replace(output, rule=nothing if output.rule else None) for output in outputs]
    empty = Targets(targets.image[:0], targets.labels[:0], targets.boxes[:0])
    full, bare = EVERYTHING(outputs, targets), EVERYTHING(none, empty)
    assert list(full) == list(bare)
    box_terms = [value.item() for name, value in bare.items() if name.split("/")[0] in ("l1", "giou", "fgl")]
    assert box_terms and not any(box_terms)
    for terms in (full, bare):
        grads = torch.autograd.grad(sum(terms.values()), leaves)
        assert all(torch.isfinite(g).all() for g in grads)

    same = with_preds(outputs, lambda x: torch.zeros_like(x, requires_grad=True) if x.dim() == 4 else x)
    terms = EVERYTHING(same, targets)
    assert list(terms) == list(full)
    assert all(value.item() == 0 for name, value in terms.items() if name.startswith("ddf/"))


def test_denoising_of_a_batch_without_boxes_has_zero_queries_and_zero_terms() -> None:
    outputs, targets = training_outputs(counts=(0, 0))
    assert outputs[4].preds.logits.shape == (2, 0, 4)
    terms = numbers(EVERYTHING(outputs, targets))
    assert len(terms) == 9 * 3 + 6 + 4
    assert not any(value for name, value in terms.items() if "denoise" in name)
    assert terms["mal/final"] > 0 and terms["ddf/layer0"] > 0


def test_order_of_outputs_does_not_matter() -> None:
    outputs, targets = training_outputs()
    terms = numbers(EVERYTHING(outputs, targets))
    shuffled = [outputs[i] for i in torch.randperm(len(outputs)).tolist()]
    assert numbers(EVERYTHING(shuffled, targets)) == pytest.approx(terms, rel=1e-12)


@pytest.mark.parametrize("share", [True, False])
def test_more_targets_than_queries(share: bool) -> None:
    outputs, targets = training_outputs(counts=(500, 2, 0), queries=20, groups=1)
    terms = replace(EVERYTHING, share=share)(outputs, targets)
    assert all(torch.isfinite(value) for value in terms.values())
    own, shared = replace(EVERYTHING, share=share).pairs(outputs, targets)
    assert [len(match.query) for match in own.matches][:4] == [22] * 4
    assert all(len(match.query) >= 22 for match in shared.matches)
    assert own.count.tolist() == [502.0] * 9


def test_normalisers() -> None:
    outputs, targets = training_outputs(counts=(3, 0, 5), groups=2)
    own, shared = EVERYTHING.pairs(outputs, targets)
    pool = len(union(EVERYTHING.match(outputs, targets)[k] for k in (0, 1, 2, 3, 8)).query)
    assert own.count.tolist() == [8.0] * 4 + [16.0] * 4 + [8.0]
    assert shared.count.tolist() == [pool] * 4 + [16.0] * 4 + [pool]
    assert own.normal == (pool, 3 * 12)
    assert EVERYTHING.pairs(*training_outputs(counts=(0, 0)))[1].count.tolist() == [1.0] * 4 + [2.0] * 4 + [1.0]


def test_micro_batches_add_up() -> None:
    """Class and own-match terms add up exactly; shared ones are means of the parts, weighted by their boxes."""
    outputs, targets = training_outputs(counts=(3, 0, 5))
    parts = []
    for image in range(3):
        rows = (targets.image == image).nonzero()[:, 0]
        few = Targets(targets.image[rows] - image, targets.labels[rows], targets.boxes[rows])
        part = with_preds(outputs, lambda x, i=image: x[i : i + 1])
        for output in part:
            if output.rule:
                mine = output.rule.image == image
                target = output.rule.target[mine] - (int(rows[0]) if len(rows) else 0)
                output.rule = Match(torch.zeros_like(target), output.rule.query[mine], target)
        parts.append((part, few))

    def added(criterion: Criterion) -> dict[str, float]:
        terms = [numbers(criterion(part, few, boxes=8)) for part, few in parts]
        return {name: sum(t[name] for t in terms) for name in terms[0]}

    alone = Criterion((MAL(), L1(), GIoU(), FGL()), share=False)
    assert added(alone) == pytest.approx(numbers(alone(outputs, targets)), rel=1e-9)
    whole, shared = [numbers(EVERYTHING(part, few)) for part, few in parts], added(EVERYTHING)
    for name in ("l1/final", "ddf/layer0", "fgl/layer1"):
        assert shared[name] == pytest.approx(whole[0][name] * 3 / 8 + whole[2][name] * 5 / 8, rel=1e-9)


def test_half_precision_is_an_island_of_float32() -> None:
    outputs, targets = training_outputs()
    targets = Targets(targets.image, targets.labels, targets.boxes.float())
    narrow = with_preds(outputs, lambda x: x.bfloat16())
    wide = with_preds(narrow, lambda x: x.float())
    with torch.autocast("cpu", torch.bfloat16):
        terms = EVERYTHING(narrow, targets)
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert numbers(terms) == pytest.approx(numbers(EVERYTHING(wide, targets)), rel=1e-6)
    assert all(value.dtype == torch.float64 for value in EVERYTHING(outputs, targets).values())
    (grad,) = torch.autograd.grad(sum(terms.values()), narrow[0].preds.edges)
    assert grad.dtype == torch.bfloat16 and torch.isfinite(grad).all() and grad.any()


@dataclass(frozen=True)
class Spy:
    """A matcher that remembers whom it was asked about."""

    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        self.asked.append([output.name for output in outputs])
        return Hungarian(cls=1)(outputs, targets)


def test_every_matcher_is_asked_once_about_all_its_outputs() -> None:
    outputs, targets = training_outputs()
    general, special = Spy(), Spy()
    outputs[1].rule = outputs[3].rule = special
    matches = Criterion((L1(),), matcher=general).match(outputs, targets)
    assert general.asked == [["layer0", "final", "proposals"]]
    assert special.asked == [["layer1", "pre"]]
    assert matches[4] is outputs[4].rule
    expected = [*Hungarian(cls=1)([outputs[0], outputs[1]], targets)]
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(matches[i], expected[i], strict=True))


def test_outputs_that_are_not_pooled_keep_their_own_match() -> None:
    outputs, targets = training_outputs()
    outputs[-1].pooled = False
    own, shared = EVERYTHING.pairs(outputs, targets)
    assert len(shared.matches[-1].query) == 8 and shared.count[-1] == 8
    assert len(shared.matches[0].query) > 8
    assert torch.equal(own.iou, Criterion((L1(),), share=False).pairs(outputs, targets)[1].iou)


def test_images_only_see_their_own_targets() -> None:
    """An image's terms do not change with what else is in the batch, but for the normaliser."""
    outputs, targets = training_outputs(counts=(3, 0, 5))
    criterion = Criterion((MAL(), L1()), share=False)
    swap = torch.tensor([2, 1, 0])
    swapped = with_preds(outputs, lambda x: x[swap])
    for output in swapped:
        if output.rule:
            output.rule = Match(swap[output.rule.image], *output.rule[1:])
    mirrored = Targets(swap[targets.image], targets.labels, targets.boxes)  # no longer sorted by image
    assert numbers(criterion(swapped, mirrored)) == pytest.approx(numbers(criterion(outputs, targets)), rel=1e-9)


@pytest.mark.parametrize(
    ("position", "part", "image", "said"),
    [
        (0, "logits", 2, "layer0.*image 2"),
        (2, "boxes", 0, "final.*image 0"),
        (6, "logits", 1, "logits of output 'denoise.final'.*images \\[1\\]"),
        (4, "edges", 2, "edges of output 'denoise.layer0'.*images \\[2\\]"),
    ],
)
def test_non_finite_predictions_are_named(position: int, part: str, image: int, said: str) -> None:
    outputs, targets = training_outputs()
    with torch.no_grad():
        getattr(outputs[position].preds, part)[image] = torch.nan
    with pytest.raises(NonFiniteError, match=said):
        EVERYTHING(outputs, targets)


def test_finite_predictions_that_overflow_are_named_by_term() -> None:
    outputs, targets = training_outputs()
    outputs[0].preds.edges = torch.full_like(outputs[0].preds.edges, 1e300)
    outputs[0].preds.edges[..., ::2] = -1e308
    with pytest.raises(NonFiniteError, match="fgl/layer0|ddf/layer0"):
        Criterion((FGL(weight=1e300), DDF(weight=1e300)))(outputs, targets)


def test_degenerate_boxes_are_no_accident() -> None:
    """Boxes and targets without area give the same finite terms every time."""
    outputs, targets = training_outputs()
    targets.boxes[:, 2:] = 0
    flat = with_preds(outputs, lambda x: torch.cat([x[..., :2], 0 * x[..., 2:]], -1) if x.shape[-1] == 4 else x)
    first, second = (numbers(EVERYTHING(flat, targets)) for _ in range(2))
    assert first == second
    assert first["giou/denoise.final"] == pytest.approx(2 * 2)
    grads = torch.autograd.grad(sum(EVERYTHING(flat, targets).values()), outputs[0].preds.boxes)
    assert torch.isfinite(grads[0]).all()


def test_a_criterion_is_python_that_rebuilds_it() -> None:
    assert eval(repr(EVERYTHING)) == EVERYTHING
    with pytest.raises(TypeError):
        MAL(gama=2)  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="different names"):
        Criterion((MAL(), L1(), MAL(gamma=2.0)))


def test_transformers_agrees_where_it_does_the_same() -> None:
    """Its D-FINE loss pools no matches, has no final FGL, and balances the DDF of denoising queries otherwise."""
    loss = pytest.importorskip("transformers.loss.loss_d_fine")
    from tests.bench.bench_criterion import Step

    step = Step(per_image=4, groups=2)
    _, theirs, _ = loss.DFineForObjectDetectionLoss(**step.theirs())
    theirs = {published(name.replace("aux_5", "enc_0"), 6): value for name, value in theirs.items()}
    ours = Criterion((VFL(), L1(), GIoU(), FGL(), DDF()), share=False)(*step.ours(pre=False))
    same = {name for name in ours if not name.startswith(("ddf/denoise", "fgl/final", "fgl/denoise.final"))}
    assert len(same) == 3 * 13 + 10 + 5
    assert_terms({name: ours[name] for name in same}, {name: theirs[name] for name in same}, tol=1e-4)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu() -> None:
    outputs, targets = training_outputs()
    there = with_preds(outputs, lambda x: x.cuda())
    for output in there:
        output.rule = output.rule and Match(*(x.cuda() for x in output.rule))
    assert numbers(EVERYTHING(there, targets.to("cuda"))) == pytest.approx(
        numbers(EVERYTHING(outputs, targets)), rel=1e-9
    )
