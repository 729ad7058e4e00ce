"""The matching microscope tells the truth about the matches, disturbs nothing, and has a row for whatever comes."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.data.dataset import Dataset
from deimkit.errors import RecipeError
from deimkit.explore.microscope import draw_microscope
from deimkit.losses import L1, MAL, Pairs
from deimkit.matching import Hungarian
from deimkit.models.detector import Detector
from deimkit.structures import Match, Output, Predictions, Targets
from deimkit.training.microscope import (
    IOU_BINS,
    POSITIVES,
    Microscope,
    Probe,
    moved,
    pearson,
    positives_histogram,
    ranks,
    starting_cells,
    switched,
    tables,
)
from deimkit.training.run import append, read_rows
from tests.micro import MICRO, scenes
from tests.test_criterion import EVERYTHING, training_outputs, with_preds

OWN = replace(EVERYTHING, share=False)


def seen(outputs: list[Output], targets: Targets, criterion: Criterion = EVERYTHING, **microscope: Any) -> dict:
    """The row of one step, which is plain JSON."""
    scope = Microscope(every=1, **microscope)
    scope.look(*criterion.pairs(outputs, targets))
    row = scope.row()
    assert row is not None and json.loads(json.dumps(row, allow_nan=False)) == row
    return row


def match(*triples: tuple[int, int, int]) -> Match:
    """A match from (image, query, target) triples."""
    return Match(*torch.tensor(triples).reshape(-1, 3).long().unbind(1))


# --------------------------------------------------------------------------------------------------- hand-worked


def hand_worked() -> tuple[Pairs, Pairs]:
    """Two images with two targets and one, three queries, two classes.

    A prediction is its target's box with the width times 1, 0.45 or 0.25, which is then the IoU as well. The shared
    match has one query more in either image.
    """
    wanted = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.6, 0.6]])
    targets = Targets(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), wanted)

    def answer(placed: Match, iou: Sequence[float], logits: Tensor, edges: Tensor | None = None) -> Predictions:
        boxes = torch.full((2, 3, 4), 0.05)
        narrow = torch.tensor([1.0, 1.0, 0.0, 1.0]) + torch.tensor(iou)[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])
        boxes[placed.image, placed.query] = wanted[placed.target] * narrow
        return Predictions(logits, boxes, edges)

    none = torch.full((2, 3, 2), -9.0)
    logits = none.clone()
    logits[0, 0, 0], logits[0, 2, 1], logits[1, 1, 1] = 0.0, math.log(3), math.log(1 / 3)  # 0.5, 0.75, 0.25
    logits[0, 1, 0], logits[1, 0, 0] = math.log(4), math.log(1 / 9)  # the best unmatched: 0.8 and 0.1
    sharp = torch.full((2, 3, 4, 33), -1e4)
    sharp[..., :4] = 0.0  # four bins as likely as each other: 2 bits
    matches = {
        "proposals": match((0, 0, 0), (0, 1, 1), (1, 0, 2)),
        "layer0": match((0, 0, 0), (0, 2, 1), (1, 1, 2)),
        "final": match((0, 0, 0), (0, 2, 1), (1, 1, 2)),
    }
    outputs = [
        Output("final", answer(matches["final"], (1.0, 0.45, 0.25), logits, sharp)),
        Output("layer0", answer(matches["layer0"], (0.45, 0.45, 0.25), none, torch.zeros_like(sharp))),
        Output("proposals", answer(matches["proposals"], (0.25, 0.25, 0.25), none)),
    ]
    own = Pairs.of(outputs, [matches[output.name] for output in outputs], targets, [3.0] * 3)
    pool = match((0, 0, 0), (0, 1, 1), (0, 2, 1), (1, 0, 2), (1, 1, 2))
    return own, Pairs.of(outputs, [pool] * 3, targets, [5.0] * 3)


def test_a_row_worked_by_hand() -> None:
    scope = Microscope(every=1)
    scope.look(*hand_worked())
    row = scope.row()
    assert row is not None
    score, iou = np.array([0.5, 0.75, 0.25]), np.array([1, 0.45, 0.25])
    assert row["images"] == 2 and row["targets"] == 3
    assert (row["targets_per_image"], row["positives"], row["positives_shared"]) == (1.5, 1.5, 2.5)
    assert row["positives_hist"] == [0, 1, 1] + 7 * [0]  # one image with one, one with two or three
    assert row["shared_hist"] == [0, 0, 2] + 7 * [0]  # two and three
    assert row["iou"] == {
        "proposals": [0, 0, 3] + 7 * [0],
        "layer0": [0, 0, 1, 0, 2] + 5 * [0],
        "final": [0, 0, 1, 0, 1, 0, 0, 0, 0, 1],
    }
    assert row["low"] == pytest.approx({"proposals": 1, "layer0": 1, "final": 2 / 3})
    assert row["unstable"] == pytest.approx({"layer0": 2 / 3, "final": 0})
    assert row["alignment"]["pearson"] == pytest.approx(stats.pearsonr(score, iou).statistic)
    assert row["alignment"]["spearman"] == pytest.approx(0.5)  # ranks 2 3 1 and 3 2 1
    assert row["score"] == pytest.approx({"matched": 0.5, "best_unmatched": 0.45})
    assert row["entropy"] == pytest.approx({"layer0": math.log2(33), "final": 2})


def test_what_is_low_can_be_chosen() -> None:
    scope = Microscope(every=1, low=0.3)
    scope.look(*hand_worked())
    assert scope.row()["low"] == pytest.approx({"proposals": 1, "layer0": 1 / 3, "final": 1 / 3})


def test_micro_batches_become_one_row() -> None:
    """Twice the same two images: the same means of twice as many."""
    scope = Microscope(every=1)
    scope.look(*hand_worked())
    once = scope.row()
    scope.look(*hand_worked())
    scope.look(*hand_worked())
    twice = scope.row()
    for name in ("positives_hist", "shared_hist"):
        assert twice[name] == [2 * n for n in once[name]]
    for name in ("low", "unstable", "score", "entropy"):
        assert twice[name] == pytest.approx(once[name])
    assert (twice["images"], twice["targets"], twice["positives"]) == (4, 6, once["positives"])


# ------------------------------------------------------------------------------------------------ by brute force


@pytest.mark.parametrize("counts", [(3, 0, 5), (7, 7), (30, 2, 1)])
def test_a_row_of_real_matches_by_brute_force(counts: tuple[int, ...]) -> None:
    """Among them more targets than queries, of which some go without."""
    outputs, targets = training_outputs(counts)
    own, shared = EVERYTHING.pairs(outputs, targets)
    row = seen(outputs, targets)
    matched = {
        output.name: {t: (i, q) for i, q, t in torch.stack(pairs).T.tolist()}
        for output, pairs in zip(outputs, own.matches, strict=True)
    }
    assert (row["images"], row["targets"]) == (len(counts), sum(counts))

    for before, now in (("proposals", "layer0"), ("layer0", "layer1"), ("layer1", "final")):
        either = matched[before].keys() | matched[now].keys()
        other = [t for t in either if matched[before].get(t) != matched[now].get(t)]
        assert row["unstable"][now] == pytest.approx(len(other) / len(either))
    assert list(row["unstable"]) == ["layer0", "layer1", "final"]

    final = next(k for k, output in enumerate(outputs) if output.name == "final")
    preds = outputs[final].preds
    image, query, target = own.matches[final]
    score = preds.logits[image, query, targets.labels[target]].detach().sigmoid().numpy()
    iou = own.only([final]).iou.detach().numpy()
    assert row["alignment"]["pearson"] == pytest.approx(stats.pearsonr(score, iou).statistic, rel=1e-6)
    assert row["alignment"]["spearman"] == pytest.approx(stats.spearmanr(score, iou).statistic, rel=1e-6)
    assert row["low"]["final"] == pytest.approx((iou < 0.5).mean())
    assert row["iou"]["final"] == np.histogram(iou, 10, (0, 1))[0].tolist()
    assert row["positives"] == pytest.approx(len(query) / len(counts))
    assert row["positives_shared"] == pytest.approx(len(shared.matches[final].query) / len(counts))

    taken = set(matched["final"].values())
    best = [
        max((preds.logits[i, q].max().sigmoid().item() for q in range(12) if (i, q) not in taken), default=None)
        for i in range(len(counts))
    ]
    assert row["score"]["best_unmatched"] == pytest.approx(np.mean([b for b in best if b is not None]))
    for k, output in enumerate(outputs):
        if output.name in row["entropy"]:
            image, query, _ = own.matches[k]
            p = output.preds.edges.detach()[image, query].softmax(-1)
            assert row["entropy"][output.name] == pytest.approx(-(p * p.log2()).sum(-1).mean().item())
    assert list(row["entropy"]) == ["layer0", "layer1", "final"]


def test_ten_layers_come_in_their_order() -> None:
    outputs, targets = training_outputs()
    final = next(output for output in outputs if output.name == "final")
    outputs = [Output(f"layer{i}", final.preds) for i in reversed(range(11))] + [final]
    assert list(seen(outputs, targets)["unstable"]) == [f"layer{i}" for i in range(1, 11)] + ["final"]


@pytest.mark.parametrize("count, place", [(0, 0), (1, 1), (3, 2), (4, 3), (7, 3), (8, 4), (255, 8), (256, 9), (999, 9)])
def test_bins_of_positives(count: int, place: int) -> None:
    counts = positives_histogram(np.array([count]))
    assert len(counts) == len(POSITIVES) and counts[place] == sum(counts) == 1


def test_correlations_of_ties_constants_and_of_too_few() -> None:
    x, y = np.array([1.0, 1, 2, 3, 3, 3]), np.array([2.0, 1, 1, 5, 4, 4])
    assert pearson(ranks(x), ranks(y)) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert (
        math.isnan(pearson(x, np.ones(6))) and math.isnan(pearson(x[:2], y[:2])) and math.isnan(pearson(x[:0], x[:0]))
    )
    assert np.isnan(ranks(np.array([1.0, np.nan]))).all()


# ----------------------------------------------------------------------------------------------- whatever comes


def test_no_targets_at_all() -> None:
    row = seen(*training_outputs(counts=(0, 0)))
    assert (row["images"], row["targets"], row["positives"], row["positives_shared"]) == (2, 0, 0, 0)
    assert row["positives_hist"][0] == 2 and not any(row["iou"]["final"])
    nothing = [row["alignment"]["pearson"], row["alignment"]["spearman"], row["score"]["matched"]]
    nothing += [*row["low"].values(), *row["unstable"].values(), *row["entropy"].values()]
    assert nothing == [None] * 12
    assert 0 < row["score"]["best_unmatched"] < 1


def test_every_query_is_matched() -> None:
    row = seen(*training_outputs(counts=(20, 20), queries=5), criterion=OWN)
    assert (row["positives"], row["targets_per_image"]) == (5, 20)
    assert row["score"]["best_unmatched"] is None


def test_without_edges_proposals_and_denoising() -> None:
    outputs, targets = training_outputs()
    plain = [Output(o.name, replace(o.preds, edges=None, anchors=None)) for o in outputs if o.rule is None]
    row = seen([o for o in plain if o.name != "proposals"], targets, criterion=Criterion((MAL(), L1())))
    assert (
        row["entropy"] == {} and set(row["iou"]) == {"layer0", "final"} and set(row["unstable"]) == {"layer1", "final"}
    )
    only = seen([o for o in plain if o.name == "proposals"], targets, criterion=Criterion((MAL(), L1())))
    assert only["positives"] is None and set(only["iou"]) == {"proposals"} and only["targets"] == 8


def test_numbers_that_are_not_finite_become_none() -> None:
    outputs, targets = training_outputs()
    own, shared = EVERYTHING.pairs(outputs, targets)
    with torch.no_grad():
        outputs[0].preds.edges[0] = torch.nan  # layer0's
        outputs[2].preds.logits[2] = torch.nan  # the final layer's
        own.iou[: len(own.matches[0].query)] = torch.nan
    scope = Microscope(every=1)
    scope.look(own, shared)
    row = scope.row()
    json.dumps(row, allow_nan=False)
    assert row["entropy"]["layer0"] is None and row["entropy"]["layer1"] is not None
    assert row["alignment"] == {"pearson": None, "spearman": None}
    assert row["score"] == {"matched": None, "best_unmatched": None}
    assert row["low"]["layer0"] is None and sum(row["iou"]["layer0"]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    outputs, targets = training_outputs()
    targets = Targets(targets.image, targets.labels, targets.boxes.float())
    row = seen(with_preds(outputs, lambda x: x.to(dtype)), targets)
    assert 0 < row["score"]["matched"] < 1 and 0 < row["entropy"]["final"] < math.log2(33)


# --------------------------------------------------------------------------------------------- disturbs nothing


def test_most_steps_are_not_looked_at() -> None:
    scope = Microscope(every=3)
    assert [step for step in range(8) if scope.watch_for(step) is not None] == [0, 3, 6]
    assert scope.row() is None
    with pytest.raises(RecipeError, match="every=0"):
        Microscope(every=0)


def test_a_step_that_failed_after_its_look_leaves_no_trace() -> None:
    outputs, targets = training_outputs()
    scope = Microscope(every=2)
    EVERYTHING(outputs, targets, watch=scope.watch_for(0))
    EVERYTHING(outputs, targets, watch=scope.watch_for(1))
    assert scope.row() is None
    EVERYTHING(outputs, targets, watch=scope.watch_for(2))
    assert scope.row()["images"] == 3 and scope.row() is None


def test_the_training_is_the_same_and_its_graph_is_let_go() -> None:
    def gradients(watch: Any) -> list[Tensor]:
        torch.manual_seed(1)
        outputs, targets = training_outputs()
        leaves = [output.preds.boxes for output in outputs]
        return list(torch.autograd.grad(sum(EVERYTHING(outputs, targets, watch=watch).values()), leaves))

    scope = Microscope(every=1)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(gradients(scope.look), gradients(None), strict=True))
    torch.set_rng_state(before)

    outputs, targets = training_outputs()
    own, shared = EVERYTHING.pairs(outputs, targets)
    assert own.iou.requires_grad
    values = [getattr(output.preds, name) for output in outputs for name in ("logits", "boxes")]
    copies, state = [value.clone() for value in values], torch.get_rng_state()
    scope.look(own, shared)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(values, copies, strict=True))
    assert not scope.looks[-1].numbers.requires_grad
    gone = weakref.ref(own.iou)
    del own, shared, outputs, values
    assert gone() is None
    assert scope.row() is not None


@pytest.mark.gpu
def test_a_gpu_sees_the_same() -> None:
    outputs, targets = training_outputs()
    here = seen(outputs, targets)
    there = with_preds(outputs, lambda x: x.cuda())
    for output in there:
        output.rule = output.rule and Match(*(x.cuda() for x in output.rule))
    row = seen(there, targets.to("cuda"))
    for name, value in here.items():
        assert row[name] == (value if name == "iou" else pytest.approx(value))


# ---------------------------------------------------------------------------------------------------- the probe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("data"))


def detector(data: Dataset, seed: int) -> Detector:
    torch.manual_seed(seed)
    return MICRO.build(data.categories)


def probe(data: Dataset, **how: Any) -> Probe:
    return Probe(data.train, MICRO.size, MICRO.matcher, **{"images": 4, **how})


def test_queries_changed_are_counted_by_hand() -> None:
    """Six targets: kept, moved to an idle query, two that swapped, lost, and never matched."""
    before, now = np.array([0, 1, 2, 3, 4, -1]), np.array([0, 5, 3, 2, -1, -1])
    assert moved(before, now).tolist() == [0, 1, 1, 1, 1]
    assert switched(np.zeros(6, int), before, now) == 5  # queries 1, 5, 2, 3 and 4
    assert switched(np.arange(6), before, now) == 7  # the two that swapped are now in two images, so four queries
    old, new = tables((np.array([1.0]), np.array([7.0])), (np.array([0.0, 2.0]), np.array([7.0, 8.0])))
    assert old.tolist() == [-1, 7, -1] and new.tolist() == [7, -1, 8]


def test_the_same_detector_changes_nothing_and_another_does(data: Dataset) -> None:
    scope, first, second = probe(data), detector(data, 0), detector(data, 1)
    first.train(), second.train()
    state = torch.get_rng_state()
    row = scope.row(first)
    assert (row["images"], row["changed"], row["instability"]) == (4, None, None) and row["targets"] > 4
    again = scope.row(first)
    assert (again["changed"], again["instability"]) == (0, 0)
    before = scope.cells.clone()
    changed = scope.row(second)
    assert changed["changed"] == pytest.approx((before != scope.cells).float().mean().item())
    assert 0 < changed["changed"] <= 1 and 0 < changed["instability"] <= 2 * changed["targets"] / 4
    assert first.training and second.training and torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks for module in first.modules())
    json.dumps([row, again, changed], allow_nan=False)


def test_cells_are_those_the_queries_start_from(data: Dataset) -> None:
    """The proposals' scores are those of the caught cells, and a target's cell is that of its query."""
    model = detector(data, 0).eval()
    images = torch.rand(2, 3, 64, 64)
    scores: list[Tensor] = []
    starts: list[Any] = []
    handles = [
        model.queries.score.register_forward_hook(lambda module, inputs, out: scores.append(out)),
        model.queries.register_forward_hook(lambda module, inputs, out: starts.append(out)),
    ]
    with torch.no_grad(), starting_cells(model) as cells:
        model(images)
    for handle in handles:
        handle.remove()
    chosen = scores[0].gather(1, cells[0][..., None].expand(-1, -1, scores[0].shape[2]))
    assert cells[0].shape == (2, 20) and torch.equal(chosen, starts[0].proposals.logits)

    scope = probe(data, images=1)
    scope.row(model)
    batch = scope.batches[0].finish()
    with torch.no_grad(), starting_cells(model) as cells:
        found = Hungarian()([Output("final", model(batch.images))], batch.targets)[0]
    assert scope.cells[found.target].tolist() == cells[0][0, found.query].tolist()
    assert len(set(scope.cells.tolist())) == len(scope.cells)


def test_a_resumed_probe_goes_on_as_if_nothing_had_happened(data: Dataset, tmp_path: Path) -> None:
    models = [detector(data, seed) for seed in range(2)]
    undisturbed, first, second = (probe(data, seed=3) for _ in range(3))
    expected = [undisturbed.row(model) for model in models][1]
    first.row(models[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.row(models[1]) == expected and expected["changed"] > 0

    other = probe(data, seed=3, images=3)
    other.load_state_dict(first.state_dict())
    assert other.row(models[1])["changed"] is None  # of other images nothing is known
    other = probe(data, seed=3)
    other.load_state_dict({**first.state_dict(), "ids": ["a", "b", "c", "d"]})
    assert other.row(models[1])["changed"] is None
    fresh = probe(data)
    fresh.load_state_dict(probe(data).state_dict())
    assert fresh.row(models[0])["changed"] is None


def test_a_probe_of_more_images_than_there_are_shows_all_and_the_seed_chooses(data: Dataset) -> None:
    assert probe(data, images=99).indices == list(range(6))
    chosen = {tuple(probe(data, images=2, seed=seed).indices) for seed in range(8)}
    assert len(chosen) > 1 and probe(data, images=2, seed=5).indices == probe(data, images=2, seed=5).indices


def test_a_probe_never_fails_a_training(data: Dataset, tmp_path: Path) -> None:
    model, broken = detector(data, 0), detector(data, 1)
    with torch.no_grad():
        next(broken.refine.parameters()).fill_(torch.nan)
    scope = probe(data)
    scope.row(model)
    for sick, changed in ((broken, None), (model, None), (model, 0.0)):
        assert scope.row(sick)["changed"] == changed

    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    split = replace(data.train, paths=[torn, *list(data.train.paths)[1:]])
    assert Probe(split, MICRO.size, MICRO.matcher).row(model)["images"] == 5

    empty = data.train.take([])
    assert Probe(empty, MICRO.size, MICRO.matcher).row(model)["images"] == 0
    bare = replace(data.train, boxes=data.train.boxes[:0], labels=data.train.labels[:0], crowd=data.train.crowd[:0])
    bare = replace(bare, areas=bare.areas[:0], annotation_ids=bare.annotation_ids[:0], starts=np.zeros(7, np.int64))
    nothing = Probe(bare, MICRO.size, MICRO.matcher)
    assert nothing.row(model)["targets"] == 0 and nothing.row(model)["changed"] is None


# ------------------------------------------------------------------------------------------------------ drawing


def history(epochs: int = 3) -> list[dict[str, Any]]:
    """Rows as a run writes them, from random matches."""
    rows: list[dict[str, Any]] = []
    for epoch in range(epochs):
        for step in range(2):
            rows.append({"kind": "matching", "epoch": epoch, "step": step, **seen(*training_outputs((3, epoch, 5)))})
        changed = {"changed": epoch / 4 if epoch else None, "instability": None}
        rows.append({"kind": "probe", "epoch": epoch, "images": 2, "targets": 8, **changed})
    return rows


def said(figure: Any) -> list[list[str]]:
    """What is written in each panel."""
    return [[text.get_text() for text in ax.texts] for ax in figure.axes[:9]]


def test_nine_panels_with_names_at_their_lines(tmp_path: Path) -> None:
    rows = [{"kind": "step", "epoch": 0, "step": 0, "loss": 1.0}, *history(), {"kind": "epoch", "epoch": 2, "AP": 0.1}]
    for row in rows:
        append(tmp_path / "metrics.jsonl", row)
    figure = draw_microscope(read_rows(tmp_path / "metrics.jsonl"))
    words = said(figure)
    assert [len(ax.lines) for ax in figure.axes[:9]] == [3, 0, 0, 3, 3, 1, 2, 2, 3]
    assert set(words[0]) == {"targets", "own match", "shared"} and set(words[4]) == {"layer0", "layer1", "final"}
    assert set(words[7]) == {"matched", "best unmatched"} and "nothing yet" not in sum(words, [])
    mesh = figure.axes[2].collections[0].get_array()
    assert mesh.shape == (IOU_BINS, 6) and np.allclose(mesh.sum(0), 1)
    bars = [patch.get_height() for patch in figure.axes[1].patches]
    newest = [row for row in rows if row["kind"] == "matching" and row["epoch"] == 2]
    assert bars[: len(POSITIVES)] == np.sum([row["positives_hist"] for row in newest], 0).tolist()
    assert figure.png().startswith(b"\x89PNG")


def test_names_stay_apart_and_inside() -> None:
    figure = draw_microscope(history())
    for ax in figure.axes[:9]:
        heights = sorted(text.get_position()[1] for text in ax.texts if text.get_position()[0] > 1)
        assert all(b - a > 0.099 for a, b in zip(heights, heights[1:], strict=False)) and max(heights, default=0) <= 1


@pytest.mark.parametrize("rows", [[], [{"kind": "step", "epoch": 0, "step": 0}]], ids=["no rows", "other rows"])
def test_nothing_to_draw_is_said(rows: list[dict[str, Any]]) -> None:
    figure = draw_microscope(rows)
    assert said(figure) == [["nothing yet"]] * 9
    assert figure.png().startswith(b"\x89PNG")


def test_rows_of_empty_batches_and_of_none_can_be_drawn() -> None:
    row = {"kind": "matching", "epoch": 0, "step": 0, **seen(*training_outputs(counts=(0, 0)))}
    words = said(draw_microscope([row, {"kind": "probe", "epoch": 0, "changed": None}]))
    assert [panel == ["nothing yet"] for panel in words] == [False, False, True, True, True, True, True, False, True]
