"""Two answers to the same pictures are compared as detections, and only a complete proof is called one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deimkit import recipes
from deimkit.data.dataset import CategoryMap, Split
from deimkit.deploy.card import Card
from deimkit.deploy.difference import Difference, compare
from deimkit.deploy.parity import TOLERANCES, Accuracy, Contender, Parity, Tolerance, pictures, prove, spread
from deimkit.deploy.session import Session
from deimkit.errors import DeployError, NonFiniteError
from deimkit.models.detector import Detector
from deimkit.models.postprocess import best
from deimkit.structures import Predictions
from tests.micro import ARCH
from tests.scenes import split_of

Answer = dict[str, Tensor]
Change = Callable[[Answer], Answer]

CLASSES = CategoryMap(ids=(3, 17, "x"), names=("cat", "dog", "cow"))
SIZE = torch.tensor([[50, 100]])  # sides are counted in 100 px


def answer(*rows: tuple[float, float, float, float, float, int]) -> Answer:
    """One image's x1, y1, x2, y2, score, label as a session gives them."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(1, -1, 6)
    return {"boxes": table[..., :4], "scores": table[..., 4], "labels": table[..., 5].long()}


THREE = ((10, 10, 20, 20, 0.9, 0), (40, 10, 60, 30, 0.6, 1), (70, 20, 90, 40, 0.3, 2))


# --------------------------------------------------------------------------------------------------- difference


def test_an_answer_does_not_differ_from_itself() -> None:
    assert compare(answer(*THREE), answer(*THREE), SIZE) == Difference(images=1, matched=3)


def test_boxes_and_scores_by_hand() -> None:
    """1 px of 100 in one edge, 0.5 px in another box, and scores 0.02 and 0.01 apart."""
    a, b, c = THREE
    theirs = answer((11, 10, 20, 20, 0.88, 0), (*b[:3], 30.5, 0.59, 1), c)
    found = compare(answer(*THREE), theirs, SIZE)
    assert (found.matched, found.unmatched, found.moved) == (3, 0, 0)
    assert found.box_max == pytest.approx(0.01) and found.box_mean == pytest.approx(0.005)
    assert found.score_max == pytest.approx(0.02)
    for first, second in ((answer(*THREE), theirs), (theirs, answer(*THREE))):
        sure = compare(first, second, SIZE, above=0.595)  # one side that reaches it is enough
        assert (sure.matched, sure.box_mean) == (2, pytest.approx(0.0075))


def test_tied_rows_may_change_places() -> None:
    tied = [(10 * i, 0, 10 * i + 5, 5, 0.5, 0) for i in range(4)]
    found = compare(answer(*tied), answer(tied[1], tied[0], tied[2], tied[3]), SIZE)
    assert found == Difference(images=1, matched=4, moved=2)


def test_a_tie_at_the_border_is_not_a_loss() -> None:
    """The last of ours is 0.00005 above the last of theirs: either could have been kept. 0.002 above, it could not."""
    a, b, _ = THREE
    ours = answer(a, b, (70, 20, 90, 40, 0.30005, 2))
    theirs = answer(a, b, (0, 0, 5, 5, 0.3, 1))
    found = compare(ours, theirs, SIZE)
    assert (found.matched, found.lost, found.extra, found.border) == (2, 0, 0, 2)
    assert compare(ours, theirs, SIZE, above=0.5).border == 0
    farther = compare(answer(a, b, (70, 20, 90, 40, 0.302, 2)), theirs, SIZE)
    assert (farther.lost, farther.extra, farther.border) == (1, 0, 1)


def test_a_lost_detection_does_not_move_the_ranks_behind_it() -> None:
    a, b, c = THREE
    found = compare(answer(*THREE), answer(b, c, (0, 40, 5, 45, 0.1, 0)), SIZE)
    assert (found.matched, found.moved, found.lost, found.extra, found.unmatched) == (2, 0, 1, 0, 1)
    assert found.border == 1, "what takes its place lies below all of ours"


def test_another_class_in_the_same_place() -> None:
    a, b, c = THREE
    found = compare(answer(*THREE), answer((*a[:5], 2), b, c), SIZE)
    assert (found.matched, found.relabelled, found.lost, found.extra, found.unmatched) == (2, 1, 0, 0, 2)


def test_twins_are_paired_at_the_least_total_distance() -> None:
    """Greedily the first would take the nearer box, and leave its twin with one that is twice as far."""
    twins = answer((10, 10, 20, 20, 0.5, 0), (11, 10, 20, 20, 0.5, 0))
    found = compare(twins, answer((11.2, 10, 20, 20, 0.5, 0), (10.4, 10, 20, 20, 0.5, 0)), SIZE)
    assert found.matched == 2 and found.box_max == pytest.approx(0.004)


def test_what_is_far_apart_is_no_pair() -> None:
    found = compare(answer(THREE[0]), answer((16, 10, 26, 20, 0.9, 0)), SIZE)  # 6 px of 100
    assert (found.matched, found.lost + found.border, found.extra + found.border) == (0, 2, 2)


def test_nan_is_counted_not_compared() -> None:
    theirs = answer(*THREE)
    theirs["boxes"][0, 1, 2] = torch.nan
    assert compare(answer(*THREE), theirs, SIZE) == Difference(images=1, nonfinite=1)
    with pytest.raises(NonFiniteError, match="image 0"):
        compare(theirs, answer(*THREE), SIZE)


def test_an_infinite_logit_is_no_certainty() -> None:
    """Its sigmoid would be a finite 1.0."""
    ours = {"logits": torch.zeros(1, 4, 3), "boxes": torch.full((1, 4, 4), 0.5)}
    theirs = {"logits": ours["logits"].clone(), "boxes": ours["boxes"]}
    theirs["logits"][0, 1, 1] = torch.inf
    assert compare(ours, theirs, SIZE).nonfinite == 1


@pytest.mark.parametrize("rows", [[], [(0, 0, 0, 0, 0.0, 0)] * 3], ids=["none", "zeros"])
def test_silence_is_seen(rows: list[tuple[float, float, float, float, float, int]]) -> None:
    found = compare(answer(*THREE), answer(*rows), SIZE)
    assert found.silent == 1 and found.matched == 0 and found.lost == 3
    assert compare(answer(*rows), answer(*rows), SIZE).silent == 0


def test_raw_answers_are_compared_by_their_best() -> None:
    """Queries in another order are the same detections, also beside a post-processed answer of only ten."""
    rng = torch.Generator().manual_seed(1)
    logits, boxes = torch.randn(2, 20, 3, generator=rng), torch.rand(2, 20, 4, generator=rng) / 2
    sizes, order = torch.tensor([[50, 100], [80, 60]]), torch.randperm(20, generator=rng)
    raw, moved = {"logits": logits, "boxes": boxes}, {"logits": logits[:, order], "boxes": boxes[:, order]}
    assert compare(raw, moved, sizes) == Difference(images=2, matched=2 * 60)
    ten = dict(zip(("boxes", "scores", "labels"), best(Predictions(logits, boxes), sizes, 10), strict=True))
    assert compare(ten, moved, sizes) == Difference(images=2, matched=20)
    shifted = moved | {"boxes": moved["boxes"] + torch.tensor([0.01, 0, 0, 0])}
    assert compare(raw, shifted, sizes).box_max == pytest.approx(0.01, rel=1e-4), (
        "1 px of 100; 0.6 px of 80 in the other"
    )


def test_no_images_and_other_images() -> None:
    none = {"boxes": torch.empty(0, 300, 4), "scores": torch.empty(0, 300), "labels": torch.empty(0, 300).long()}
    assert compare(none, none, torch.empty(0, 2, dtype=torch.long)) == Difference()
    with pytest.raises(DeployError, match="answers to 1 and 0"):
        compare(answer(*THREE), none, SIZE)


def test_differences_add_up() -> None:
    a = Difference(images=1, matched=3, box_max=0.3, box_mean=0.1, score_max=0.1, lost=1)
    b = Difference(images=2, matched=1, box_max=0.5, box_mean=0.5, score_max=0.0, lost=2, silent=1)
    total = a + b
    assert total == Difference(3, 4, 0.5, pytest.approx(0.2), 0.1, lost=3, silent=1)
    assert total + Difference() == total and Difference() + Difference() == Difference()


# --------------------------------------------------------------------------------------------------- verdicts

GOOD = Difference(images=8, matched=2400, box_max=5e-4, score_max=5e-5)
HALF = Accuracy(images=100, torch=0.5, runtime=0.5)


def row(precision: str = "fp32", held: Difference = GOOD, accuracy: Accuracy | None = HALF) -> Contender:
    return Contender("toy", precision, (64, 64), (1,), held, held, Tolerance.of(precision), accuracy)


@pytest.mark.parametrize(
    "contender, verdict, words",
    [
        (row(), "verified", ""),
        (row(held=replace(GOOD, box_max=2e-3)), "differs", "Boxes differ by up to 2.0e-03"),
        (row("fp16", replace(GOOD, box_max=2e-3)), "verified", ""),
        (row(held=replace(GOOD, score_max=2e-4)), "differs", "Scores differ by up to 2.0e-04"),
        (row(held=replace(GOOD, lost=4)), "verified", "4 of 4804"),
        (row(held=replace(GOOD, lost=3, relabelled=1)), "differs", "3 detections are lost, 0 are new, and 1 have"),
        (row(held=replace(GOOD, nonfinite=2)), "differs", "NaN or infinity in 2 of 8 images"),
        (row("int8", replace(GOOD, nonfinite=2)), "differs", "NaN or infinity in 2 of 8 images"),
        (row(held=replace(GOOD, silent=8)), "differs", "opset=17"),
        (row(held=Difference(images=8)), "compared", "no detection to compare"),
        (row("fp16", Difference(images=8)), "compared", "no detection that scores 0.05 or more"),
        (row("int8", replace(GOOD, box_max=0.04, lost=900)), "verified", ""),
        (row(accuracy=None), "compared", "AP was not measured: give data="),
        (row(accuracy=replace(HALF, runtime=0.4985)), "differs", "AP differs by -0.15 points"),
        (row("fp16", accuracy=replace(HALF, runtime=0.4985)), "verified", ""),
        (row("int8", accuracy=replace(HALF, runtime=0.465)), "differs", "AP differs by -3.50 points"),
        (row(accuracy=replace(HALF, runtime=None)), "differs", "NaN or infinity while AP was measured"),
        (row(accuracy=Accuracy(100, None, None)), "compared", "nothing to find"),
        (row(accuracy=Accuracy(100, 0.001, 0.001)), "compared", "PyTorch's own AP is 0.1"),
        (row(accuracy=replace(HALF, images=19)), "compared", "19 images"),
        (row(accuracy=replace(HALF, images=20)), "verified", "AP on 20 images"),
    ],
)
def test_only_a_complete_proof_is_called_verified(contender: Contender, verdict: str, words: str) -> None:
    found = Parity("PyTorch", (contender,))
    told = [str(found), found.html(), json.dumps(found.to_dict(), allow_nan=False)]
    assert found.verdict == verdict and words in str(found)
    assert [verdict in text for text in told] == [True] * 3
    assert found.verified == (verdict == "verified")
    assert any("verified" in text for text in told) == found.verified
    assert Parity.from_dict(json.loads(told[2])) == found


def test_a_report_is_as_good_as_its_worst_runtime() -> None:
    unfinished, wrong = row(accuracy=None), row(held=replace(GOOD, silent=8))
    assert Parity("PyTorch", (row(), row("fp16"))).verified
    assert Parity("PyTorch", (row(), unfinished)).verdict == "compared"
    assert Parity("PyTorch", (row(), unfinished, wrong)).verdict == "differs"
    assert Parity("PyTorch").verdict == "compared", "nothing was compared"
    assert "verified" not in str(Parity("PyTorch", (row(), unfinished))), "not even of the runtime that agrees"


def test_tolerances_loosen_with_the_precision() -> None:
    fp32, fp16, int8 = TOLERANCES.values()
    assert (fp32.boxes, fp32.scores, fp32.above) == (1e-3, 1e-4, 0) and int8.boxes is None
    assert fp32.ap < fp16.ap < int8.ap and "0.05 or more" in str(fp16) and str(int8) == "AP within 3.0 points"
    with pytest.raises(DeployError, match="bf16"):
        Tolerance.of("bf16")


# ------------------------------------------------------------------------------------------------------- proof


class Fake(Session):
    """The detector itself with its answers changed, as a runtime of some precision and batch."""

    def __init__(self, detector: Detector, change: Change, raw: bool = False, **card: object) -> None:
        self.detector, self.change = detector, change
        self.asked: list[int] = []
        self.shown: set[float] = set()
        self.card = Card("", detector.categories, (64, 96), **{"batch": None, "postprocess": not raw, **card})
        self.name, self.device = "Fake 1.0 on CPU", torch.device("cpu")

    def run(self, images: Tensor, sizes: Tensor) -> Answer:
        self.expect(images, sizes)
        self.asked.append(len(images))
        self.shown |= set(images.double().mean((1, 2, 3)).tolist())
        with torch.no_grad():
            preds = self.detector(images)
        if not self.card.postprocess:
            return self.change({"logits": preds.logits, "boxes": preds.boxes})
        boxes, scores, labels = best(preds, sizes, self.card.top)
        return self.change({"boxes": boxes, "scores": scores, "labels": labels})

    def close(self) -> None:
        pass


def same(answer: Answer) -> Answer:
    return answer


def shifted(answer: Answer) -> Answer:
    return answer | {"boxes": answer["boxes"] + 0.25}  # of 96 px: 2.6e-3


def shifted_where_unsure(answer: Answer) -> Answer:
    return answer | {"boxes": answer["boxes"] + 2.0 * (answer["scores"] < 0.05)[..., None]}


def broken(answer: Answer) -> Answer:
    return answer | {"scores": answer["scores"] * torch.nan}


def silent(answer: Answer) -> Answer:
    return {name: torch.zeros_like(x) for name, x in answer.items()}


def wrong(answer: Answer) -> Answer:
    return answer | {"labels": (answer["labels"] + 1) % len(CLASSES)}


@pytest.fixture(scope="module")
def detector() -> Detector:
    """One of random weights whose scores spread from 0 to 1."""
    torch.manual_seed(0)
    detector = Detector(ARCH, CLASSES).eval()
    with torch.no_grad():
        for name, weight in detector.named_parameters():
            if name.startswith("refine.score") and name.endswith("weight"):
                weight.normal_(0, 0.5)
            if name.startswith("refine.score") and name.endswith("bias"):
                weight.zero_()
    return detector


@pytest.fixture(scope="module")
def taught(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Twenty pictures annotated with what the detector sees most clearly in them, so that it has an AP."""
    folder, shown = tmp_path_factory.mktemp("taught"), pictures(20, (64, 96))
    found = [detector.detect(torch.from_numpy(x).permute(2, 0, 1)[None], torch.tensor([[64, 96]]))[0] for x in shown]
    for i, picture in enumerate(shown):
        Image.fromarray(picture).save(folder / f"{i}.png")
    split = split_of([f.boxes[:4].tolist() for f in found], [f.labels[:4].tolist() for f in found], CLASSES.names)
    paths = [folder / f"{i}.png" for i in range(len(shown))]
    return replace(split, categories=CLASSES, paths=paths, sizes=np.tile(np.int32([64, 96]), (20, 1)))


def test_the_same_answers_are_verified(detector: Detector, taught: Split) -> None:
    session, said = Fake(detector, same), []
    found = prove(detector, [session], taught, note=said.append)
    row = found.contenders[0]
    assert found.verified, str(found)
    assert row.batches == (1, 2, 8) and row.every.images == 24 and row.every.matched == 24 * 60
    assert row.accuracy is not None and row.accuracy.torch == row.accuracy.runtime > 0.3
    assert session.asked[:13] == [1] * 8 + [2] * 4 + [8] and "Fake 1.0 on CPU, AP on 20 images" in said
    assert "PyTorch" in found.reference and not detector.training


def test_without_data_a_comparison_is_only_that(detector: Detector) -> None:
    found = prove(detector, [Fake(detector, same)])
    assert found.verdict == "compared" and "give data=" in str(found)
    assert found.contenders[0].held.matched == 24 * 60


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_static_batch_is_filled_up(detector: Detector, batch: int) -> None:
    session = Fake(detector, same, raw=True, batch=batch)
    found = prove(detector, [session])
    row = found.contenders[0]
    assert "Fake 1.0 on CPU, raw outputs" in str(found) and Parity.from_dict(found.to_dict()) == found
    assert row.batches == (batch,) and set(session.asked) == {batch} and len(session.shown) == 8
    assert row.every.images == -(-8 // batch) * batch and row.verdict == "compared" and row.every.unmatched == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (shifted, "Boxes differ by up to 2.6e-03"),
        (wrong, "have another class"),
        (broken, "NaN or infinity in 24 of 24 images"),
        (silent, "No detection in 24 of 24 images"),
    ],
)
def test_what_differs_is_named(detector: Detector, taught: Split, change: Change, words: str) -> None:
    found = prove(detector, [Fake(detector, change), Fake(detector, same)], taught)
    assert [row.verdict for row in found.contenders] == ["differs", "agrees"] and words in str(found)


def test_half_precision_answers_for_what_it_is_sure_of(detector: Detector) -> None:
    """2 px of 120 are more than the hundredth that is allowed."""
    row = prove(detector, [Fake(detector, shifted_where_unsure, precision="fp16")]).contenders[0]
    assert row.verdict == "compared" and row.held.box_max < 1e-6 < 1.6e-2 < row.every.box_max
    assert 0 < row.held.matched < row.every.matched


def test_nan_only_in_data_is_found_by_ap(detector: Detector, taught: Split) -> None:
    """The few pictures are fine, but not all of what AP is measured on."""
    session = Fake(detector, same, batch=8)
    session.change = lambda answer: broken(answer) if len(session.asked) > 2 else answer
    assert prove(detector, [session], taught).contenders[0].faults == [
        "NaN or infinity while AP was measured. Keep the layers that overflow in FP32, or export in FP32."
    ]


def test_a_broken_detector_is_no_reference(detector: Detector) -> None:
    broken_one = copy.deepcopy(detector)
    torch.nn.init.constant_(next(broken_one.refine.parameters()), torch.nan)
    with pytest.raises(NonFiniteError, match="The detector itself is broken"):
        prove(broken_one, [Fake(detector, same)])


def test_sizes_and_tops_have_a_reference_each(detector: Detector) -> None:
    sessions = [Fake(detector, same, top=7), Fake(detector, same, top=60)]
    sessions[1].card = replace(sessions[1].card, size=(96, 64))
    narrow, tall = prove(detector, sessions, batches=(4,)).contenders
    assert narrow.every == Difference(images=8, matched=56) and tall.size == (96, 64) and tall.every.matched == 480


@pytest.mark.parametrize("raw", [False, True], ids=["boxes", "raw"])
def test_ap_is_of_as_many_boxes_as_the_file_gives(detector: Detector, taught: Split, raw: bool) -> None:
    """Three boxes of four are found at most, so that AP is lower than with all of them."""
    tops = (3, 60)
    few, all_of_them = prove(detector, [Fake(detector, same, raw, top=top) for top in tops], taught).contenders
    assert few.accuracy is not None and all_of_them.accuracy is not None and few.verdict == "agrees"
    assert few.accuracy.torch == few.accuracy.runtime < all_of_them.accuracy.torch == all_of_them.accuracy.runtime


def test_a_file_of_one_box_is_not_called_untrained(detector: Detector) -> None:
    row = prove(detector, [Fake(detector, shifted, top=1)], batches=(8,)).contenders[0]
    assert not row.alike and row.verdict == "differs"


@pytest.mark.parametrize("seed", range(3))
def test_fresh_weights_are_alike(seed: int) -> None:
    """The best scores are up to 0.03 apart, and yet most neighbours are equal but for rounding."""
    torch.manual_seed(seed)
    fresh = recipes.get("tiny").build().eval()
    session = Fake(fresh, wrong)
    session.card = replace(session.card, size=fresh.size, categories=fresh.categories)
    session.change = lambda answer: answer | {"labels": (answer["labels"] + 1) % 80}
    row = prove(fresh, [session], batches=(8,)).contenders[0]
    assert row.alike and row.verdict == "compared" and row.held.unmatched


def test_only_what_was_made_from_it_is_compared(detector: Detector) -> None:
    session = Fake(detector, same)
    session.card = replace(session.card, categories=CategoryMap.of(3))
    with pytest.raises(DeployError, match="the detector it was made from"):
        prove(detector, [session])
    assert prove(detector, []).verdict == "compared"


def test_pictures_are_the_same_every_time() -> None:
    first, second = pictures(2, (64, 96)), pictures(2, (64, 96))
    assert [x.shape for x in first] == [(64, 96, 3)] * 2 and not np.array_equal(*first)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) and pictures(0, (64, 64)) == []


def test_a_subset_is_spread_over_the_split() -> None:
    split = split_of([[] for _ in range(10)], [[] for _ in range(10)])
    assert list(spread(split, 4).ids) == [0, 2, 5, 7]
    assert list(spread(split, 100).ids) == list(range(10)) and not len(spread(split.take([]), 5))


def test_swapped_sizes_and_rising_scores_are_noticed(detector: Detector) -> None:
    """Pictures that are drawn have another shape than the input, so that neither passes for the other."""

    class Swapped(Fake):
        def run(self, images: Tensor, sizes: Tensor) -> Answer:
            return super().run(images, sizes.flip(1))

    assert any("Boxes differ" in fault for fault in prove(detector, [Swapped(detector, same)]).contenders[0].faults)
    rising = Fake(detector, lambda answer: {name: x.flip(1) for name, x in answer.items()})
    assert any("do not descend in 24 of 24" in fault for fault in prove(detector, [rising]).contenders[0].faults)
