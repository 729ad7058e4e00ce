"""The loss lab against the library's losses, numbers worked by hand, and the published grid; and how it looks."""

from __future__ import annotations

from itertools import product
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deimkit.criterion import Criterion
from deimkit.data.loader import Always, Loader
from deimkit.data.split import CategoryMap
from deimkit.explore.labs import loss_curves as curves
from deimkit.explore.labs.lab import Choice
from deimkit.explore.labs.loss_curves import PUBLISHED, P, Q, entry, made_up, matched, quality_of, target_of, tuned
from deimkit.explore.labs.loss_figures import cost_at, draw_paper, draw_seeds, draw_shares, shares
from deimkit.explore.labs.loss_lab import TUNED, LossLab
from deimkit.explore.still import picture
from deimkit.losses import MAL, PSL, QFL, VFL, Focal, Pairs
from deimkit.structures import Match, Output, Predictions, Targets
from tests.micro import MICRO, scenes

LN2 = log(2)


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def batch_of(iou: Tensor, z: Tensor) -> Pairs:
    """Pairs of one image with these IoUs and logits."""
    pairs = made_up(iou.double())
    pairs.outputs[0].preds.logits = z.double()[None, :, None]
    return pairs


@pytest.fixture
def pairs() -> Pairs:
    return batch_of(torch.rand(30), torch.randn(30))


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("loss", "iou", "one", "cost", "slope"),
    [
        (MAL(), 0.05, 1.0, LN2, 0.5 - 0.05**1.5),
        (VFL(), 0.05, 1.0, 0.05 * LN2, 0.05 * 0.45),
        (QFL(), 0.25, 1.0, LN2 / 16, 0.25**2 * 0.25 + 2 * 0.25 * 0.25 * LN2),
        (Focal(), 0.05, 1.0, 0.25 * LN2 / 4, -0.25 * (0.125 + 2 * 0.5 * 0.25 * LN2)),
        (PSL(), 0.5, 1.0, 0.25 * LN2 / 16, 0.25 * (0.25**2 * 0.25 + 2 * 0.25 * 0.25 * LN2)),
        (MAL(), 0.0, 0.0, 0.5**1.5 * LN2, 0.5**2.5),
        (VFL(), 0.0, 0.0, 0.75 * LN2 / 4, 0.75 * 0.125),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_cost_and_slope_at_a_score_of_one_half(loss: Any, iou: float, one: float, cost: float, slope: float) -> None:
    """There the cross-entropy is log 2 for every target, and its slope is 1/2 - target."""
    quality = quality_of(loss, doubles(iou)) if one else 0.0
    found = entry(loss, doubles(0.0), quality, one)
    assert [float(value) for value in found] == pytest.approx([cost, slope], abs=1e-12)


def test_the_published_grid(shared: Path) -> None:
    """MAL and VFL of single entries and their slopes, by the released code."""
    ref = np.load(shared / "golden/losses/mal_vfl_grid.npz")
    z, q = (x.contiguous() for x in torch.broadcast_tensors(doubles(*ref["p"]).logit()[:, None], doubles(*ref["q"])))
    for g, gamma in enumerate(ref["gamma"].tolist()):
        for loss in (MAL(gamma=gamma), VFL(gamma=gamma)):
            for found, kind in zip(entry(loss, z, q), ("loss", "grad_logit"), strict=True):
                np.testing.assert_allclose(found, ref[f"{loss.name}/pos_{kind}"][g], rtol=1e-6, atol=1e-9)
            for found, kind in zip(entry(loss, z[:, 0], one=0.0), ("loss", "grad_logit"), strict=True):
                np.testing.assert_allclose(found, ref[f"{loss.name}/neg_{kind}"][g], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", PUBLISHED.values(), ids=PUBLISHED)
def test_slopes_are_those_of_the_costs(loss: Any) -> None:
    """Of those losses too whose weight passes gradient; MAL's and VFL's background does not."""
    z, q, step = torch.linspace(-4, 4, 33).double(), torch.full((33,), 0.37).double(), 1e-6
    for quality, one in ((q, 1.0), (0.0, 0.0)):
        if not one and loss.name in ("mal", "vfl"):
            continue
        up, down = entry(loss, z + step, quality, one)[0], entry(loss, z - step, quality, one)[0]
        np.testing.assert_allclose(entry(loss, z, quality, one)[1], (up - down) / (2 * step), atol=1e-8)


def test_a_cusp_has_no_slope() -> None:
    cost, slope = entry(QFL(gamma=0.5), doubles(0.0), doubles(0.5))
    assert (float(cost), float(slope)) == (0.0, 0.0)


@pytest.mark.parametrize("loss", [*PUBLISHED.values(), PSL(to_one=True)], ids=repr)
def test_costs_of_pairs_add_up_to_the_loss(loss: Any, pairs: Pairs) -> None:
    z = pairs.outputs[0].preds.logits[0, :, 0]
    assert float(curves.costs_of(loss, pairs).sum()) == pytest.approx(float(loss(pairs)[0] * pairs.count[0]))
    torch.testing.assert_close(curves.logits_of(pairs), z)


def test_made_up_pairs_have_the_ious_that_were_asked_for() -> None:
    iou = torch.linspace(0, 1, 21).double()
    torch.testing.assert_close(made_up(iou).iou, iou)
    torch.testing.assert_close(quality_of(PSL(), iou), iou**2)  # beside a perfect match
    torch.testing.assert_close(target_of(MAL(), iou), iou**1.5)
    torch.testing.assert_close(target_of(Focal(), iou), torch.ones_like(iou))


def test_tuned_changes_what_a_loss_has() -> None:
    assert tuned(MAL(), gamma=2.0, alpha=0.5) == MAL(gamma=2.0, alpha=0.5)
    assert tuned(QFL(), gamma=1.0, alpha=0.5) == QFL(gamma=1.0)


def test_pairs_of_a_detector_are_those_of_the_criterion(tmp_path: Path) -> None:
    data = scenes(tmp_path)
    assert data.train is not None
    batch = next(iter(Loader(data.train, 3, (64, 64), None, Always("clean"), seed=0).epoch(0)))
    detector = MICRO.build(CategoryMap.of(8)).train()
    found = matched(detector, batch)
    assert detector.training and not found.iou.requires_grad and len(found.iou) == len(batch.targets)
    with torch.no_grad():
        preds = detector.eval()(batch.finish().images)
    theirs = Criterion((MAL(),))([Output("final", preds)], batch.targets)["mal/final"]
    torch.testing.assert_close(MAL()(found)[0], theirs)


# ------------------------------------------------------------------------------------------------------ the lab


def test_the_lab_opens_at_a_bad_match() -> None:
    found = LossLab().found
    assert found.star == pytest.approx((LN2, 0.5 - 0.05**1.5)) and found.other == pytest.approx(0.05 * LN2)
    assert found.aim == pytest.approx(0.05**1.5)
    for name, loss in PUBLISHED.items():
        quality = quality_of(loss, torch.full_like(P, 0.05))
        torch.testing.assert_close((found.cost[name], found.slope[name]), entry(loss, P.logit(), quality))
    row = int((Q == 0.5).nonzero())
    torch.testing.assert_close(found.maps[0][row], cost_at(MAL(), P, 0.5))
    torch.testing.assert_close(found.maps[1][row], cost_at(VFL(), P, 0.5))
    # at one score, half of the cross-entropy is paid by pairs below an IoU of one half, and a quarter of VFL
    assert found.share["MAL"][20] == pytest.approx(21 / 41)
    assert found.share["VFL"][20] == pytest.approx(sum(range(21)) / sum(range(41)))


def test_a_new_loss_brings_its_published_numbers() -> None:
    lab = LossLab().set(gamma=3.0, alpha=0.2)
    assert lab.set(loss="VFL").values | {"loss": 0} == lab.values | {"gamma": 2.0, "alpha": 0.75, "loss": 0}
    assert lab.set(loss="Focal", gamma=0.0).values["gamma"] == 0.0 and lab.values["alpha"] == 0.25
    lab.set(alpha=0.5).set(loss="Focal")
    assert lab.values["alpha"] == 0.5, "nothing new was chosen"
    torch.testing.assert_close(
        lab.found.cost[TUNED], entry(Focal(alpha=0.5, gamma=0.0), P.logit(), torch.ones_like(P))[0]
    )


def test_the_background_has_no_iou() -> None:
    found = LossLab().set(entry="background", iou=0.7).found
    for name, loss in PUBLISHED.items():
        torch.testing.assert_close(found.cost[name], entry(loss, P.logit(), one=0.0)[0])
    assert found.star[0] == pytest.approx(0.5**1.5 * LN2) and found.aim == pytest.approx(0.7**1.5)


def test_a_batch_pays_by_its_own_qualities(pairs: Pairs) -> None:
    found = LossLab(pairs).found
    for name, loss in PUBLISHED.items():
        costs = curves.costs_of(loss, pairs)
        for edge, share in zip(Q.tolist(), found.share[name].tolist(), strict=True):
            assert share == pytest.approx(float(costs[pairs.iou <= edge].sum() / costs.sum()))
    assert found.counted[-1] == pytest.approx(1) and found.counted[20] == pytest.approx(
        float((pairs.iou <= 0.5).double().mean())
    )


def test_of_no_pairs_nobody_pays() -> None:
    nobody = torch.zeros(0).long()
    targets = Targets(nobody, nobody, torch.zeros(0, 4))
    output = Output("final", Predictions(torch.zeros(1, 5, 2), torch.rand(1, 5, 4)))
    empty = Pairs.of([output], [Match(nobody, nobody, nobody)], targets, [1.0])
    found = LossLab(empty).found
    assert not any(share.any() for share in found.share.values()) and len(found.ious) == 0
    assert not any(share.any() for share in shares(PUBLISHED, empty, [0.0, 0.5, 1.0]).values())


SINGLE = [
    {control.name: option}
    for control in LossLab().controls()
    for option in (control.options if isinstance(control, Choice) else (control.low, control.high))
]
CORNERS = [
    {"loss": loss, "iou": iou, "score": score, "gamma": gamma}
    for loss in PUBLISHED
    for iou, score, gamma in product((0.0, 1.0), (0.01, 0.99), (0.0, 4.0))
]


@pytest.mark.filterwarnings("error")
def test_every_control_at_its_ends(pairs: Pairs) -> None:
    for lab in (LossLab(), LossLab(pairs)):
        for values in SINGLE + CORNERS:
            found = lab.set(**values).found
            numbers = [*found.cost.values(), *found.slope.values(), *found.target.values(), *found.share.values()]
            assert all(bool(torch.isfinite(each).all()) for each in (*numbers, *found.maps)), values
            assert f"{found.score:g}" in lab.words(found)


@pytest.mark.filterwarnings("error")
def test_the_traces_stay_the_same() -> None:
    lab = LossLab()
    kinds = [(trace.type, trace.xaxis) for trace in lab.figure().data]
    for values in SINGLE:
        assert [(trace.type, trace.xaxis) for trace in lab.set(**values).figure().data] == kinds


def test_the_figure_shows_what_was_found(pairs: Pairs) -> None:
    lab = LossLab(pairs).set(loss="QFL", beside="PSL", iou=0.4, score=0.3)
    found, figure = lab.found, lab.figure()
    drawn = [trace for trace in figure.data if getattr(trace, "mode", "") == "lines"]
    lines = [*found.cost.values(), *found.slope.values(), *found.target.values(), *found.share.values(), found.counted]
    for trace, values in zip(drawn, lines, strict=True):
        np.testing.assert_array_equal(trace.y, values)
    maps = [trace for trace in figure.data if trace.type == "contour"]
    for trace, values in zip(maps, found.maps, strict=True):
        np.testing.assert_array_equal(trace.z, values)
    stars = [(trace.x[0], trace.y[0]) for trace in figure.data if trace.name == "star"]
    assert stars == [(0.3, found.star[0]), (0.3, found.star[1]), (0.4, found.aim), (0.3, 0.4), (0.3, 0.4)]
    assert not figure.layout.dragmode and "QFL as set" in {trace.name for trace in figure.data}


def test_a_click_on_a_map_puts_the_star_there() -> None:
    lab = LossLab()
    assert lab.clicked("map 1", 0.3049, 0.98) == {"score": 0.3, "iou": 0.98}
    assert lab.clicked("map 2", 0.0, 1.2) == {"score": 0.01, "iou": 1.0}
    assert lab.clicked("star", 0.3, 0.3) == {}


def test_words_say_the_numbers() -> None:
    lab = LossLab()
    assert "costs 0.693 with MAL as set and 0.035 with VFL as published" in lab.words(lab.found)
    assert "wants a score of 0.01 and pulls the logit down by 0.489" in lab.words(lab.found)
    lab.set(loss="QFL", iou=0.5)
    assert "does not pull it" in lab.words(lab.found) and "beta" in lab.words(lab.found)
    lab.set(loss="VFL", iou=0.0)
    assert "VFL asks nothing of it." in lab.words(lab.found), "its weight is the IoU"
    assert "does not pull it" in lab.words(lab.set(iou=0.3, score=0.3).found), "and not down by 0.000"
    assert "a background entry" in lab.words(lab.set(entry="background").found)


def test_the_still_renders(pairs: Pairs) -> None:
    html = LossLab(pairs).still()["text/html"]
    assert "data:image/png;base64," in html and "IoU of the match, q: 0.05" in html


# ------------------------------------------------------------------------------------------- figures of the paper


def test_the_papers_sentences_about_its_figures() -> None:
    """DEIM 3.3: for IoU 0.05 VFL is "almost unchanged" and MAL rises; for 0.95 "both perform similarly"."""
    low = {loss.name: cost_at(loss, P, 0.05) for loss in (VFL(), MAL())}
    assert low["vfl"].max() < 0.25 and low["mal"].max() > 4
    assert bool((low["mal"].diff() > 0)[5:].all()) and float(low["mal"][49] / low["vfl"][49]) == pytest.approx(20)
    ratio = cost_at(MAL(), P, 0.95) / cost_at(VFL(), P, 0.95)
    assert ratio[:50].min() > 1 and ratio[:50].max() < 1.06
    assert float(cost_at(VFL(), 0.9, 0.0)) == 0


def test_the_papers_figures_show_the_losses() -> None:
    figure = draw_paper(score=0.5, iou=0.05)
    surfaces = [trace for trace in figure.data if trace.type == "surface"]
    marks = [float(trace.z[0]) for trace in figure.data if trace.type == "scatter3d"]
    assert [trace.name for trace in surfaces] == ["VFL", "MAL"]
    np.testing.assert_allclose(surfaces[1].z[-1], -P.log())  # an IoU of 1
    assert marks == pytest.approx([0.05 * LN2 + 0.1, LN2 + 0.1])
    said = " ".join(words.text for words in figure.layout.annotations)
    assert "0.035" in said and "0.693" in said and "Fig. 4b" in said
    assert picture(figure).png().startswith(b"\x89PNG")


def test_shares_are_those_of_the_bins() -> None:
    pairs = batch_of(doubles(0.1, 0.2, 0.5, 0.9, 1.0), torch.zeros(5))  # the cross-entropy is log 2 everywhere
    found = shares({"VFL": VFL(), "MAL": MAL()}, pairs, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(found["pairs"], [0.4, 0.6])  # a pair at an edge belongs above it
    np.testing.assert_allclose(found["MAL"], [0.4, 0.6])
    np.testing.assert_allclose(found["VFL"], [0.3 / 2.7, 2.4 / 2.7], rtol=1e-6)
    bars = draw_shares({"VFL": VFL()}, pairs, bins=2).data
    np.testing.assert_allclose(bars[1].y, 100 * found["VFL"])
    assert list(bars[0].x) == ["0 to 0.5", "0.5 to 1"] and [bar.name for bar in bars] == ["number of pairs", "VFL"]


def test_seeds_are_thin_and_means_broad() -> None:
    lines = draw_seeds({"MAL": [[1, 2], [3, 6]], "VFL": [[0, 1], [2, 1]]}, "title", "AP").data
    assert [list(line.y) for line in lines if line.showlegend is not False] == [[2, 4], [1, 1]]
    assert len(lines) == 6
