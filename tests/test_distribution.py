"""W(n), decoding and encoding against the reference numerics and against each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deimkit.boxes import xyxy_to_cxcywh
from deimkit.distribution import decode, encode, expectation, weighting


@pytest.fixture(scope="module")
def golden(shared: Path):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(shared / "golden/losses/primitives.npz").items()}


@pytest.mark.parametrize("up", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("bins", [16, 32])
def test_weighting_is_the_published_one(golden, up, scale, bins):
    torch.testing.assert_close(weighting(bins, up, scale), golden[f"W/up{up}_rs{scale}_rm{bins}"], rtol=2e-6, atol=2e-6)


def test_weighting_by_hand():
    W = weighting(bins=6, up=0.5, scale=4.0, dtype=torch.float64)  # u = 2, step = 3 ** (2 / 4)
    expected = torch.tensor([-4, -2, 1 - 3**0.5, 0, 3**0.5 - 1, 2, 4], dtype=torch.float64)
    torch.testing.assert_close(W, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", [4, 8])
def test_decode_is_the_published_one(golden, scale):
    boxes = decode(golden["b2d/points_cxcywh"], golden["d2b/dist"], scale)
    torch.testing.assert_close(boxes, golden[f"d2b/rs{scale}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("up", "scale"), [(0.5, 4), (0.5, 8), (0.25, 4), (1.0, 2)])
def test_encode_is_the_published_one(golden, up, scale):
    boxes = xyxy_to_cxcywh(golden["b2d/boxes_xyxy"])
    left, right = encode(golden["b2d/points_cxcywh"], boxes, weighting(32, up, scale), scale)
    name = f"b2d/up{up}_rs{scale}"
    assert torch.equal(left.flatten(), golden[f"{name}/index"].long())
    torch.testing.assert_close(right.flatten(), golden[f"{name}/w_right"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [4, 8])
def test_encode_finds_the_published_bin_of_every_offset(golden, scale):
    d = golden["translate/gt"][:, None].expand(-1, 4)  # from far below the first offset to far beyond the last
    anchors = torch.tensor([0.5, 0.5, 0.2, 0.2]).double().expand(len(d), 4)
    left, right = encode(
        anchors, _outwards(anchors, d.double(), scale), weighting(32, 0.5, scale, torch.float64), scale
    )
    name = f"translate/up0.5_rs{scale}"
    position = golden[f"{name}/index"].long() + golden[f"{name}/w_right"].double()
    inside = d[:, 0] >= -scale / 2  # beyond that a box would have a negative size
    torch.testing.assert_close((left + right)[inside, 2], position[inside], rtol=1e-4, atol=1e-4)


def _outwards(anchors, d, scale):
    """Boxes whose right and bottom edges lie `d` out, with the left and top ones far out to keep the size positive."""
    low = anchors[:, :2] - 10
    high = anchors[:, :2] + (d[:, 2:] + scale / 2) * anchors[:, 2:] / scale
    return xyxy_to_cxcywh(torch.cat([low, high], 1))


def test_expectation_is_the_published_one(golden):
    edges = golden["integral/corners"].unflatten(-1, (4, 33))
    torch.testing.assert_close(expectation(edges, weighting()), golden["integral/out_up0.5_rs4"], rtol=1e-5, atol=1e-6)


def test_decode_undoes_encode():
    W = weighting(dtype=torch.float64)
    anchors = torch.rand(200, 4, dtype=torch.float64) * 0.5 + 0.2
    boxes = anchors * (1 + 0.2 * torch.randn(200, 4, dtype=torch.float64).clamp(-2, 2))
    left, right = encode(anchors, boxes, W)
    offsets = W[left] * (1 - right) + W[left + 1] * right
    inside = (offsets.abs() < W[-1]).all(1)
    assert inside.sum() > 100
    torch.testing.assert_close(decode(anchors, offsets)[inside], boxes[inside], rtol=1e-10, atol=1e-10)


def test_edges_beyond_the_ends_belong_to_the_end_bins():
    anchor = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    left, right = encode(anchor, torch.tensor([[0.5, 0.5, 1.0, 1.0]]), weighting())
    assert left.tolist() == [[31] * 4] and right.tolist() == [[1.0] * 4]
    left, right = encode(anchor, torch.tensor([[0.5, 0.9, 0.0, 0.0]]), weighting())  # its top edge is far inwards
    assert left[0, 1] == 0 and right[0, 1] == 0


def test_an_anchor_without_size_and_no_anchor_at_all_stay_finite():
    left, right = encode(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), weighting())
    assert left.tolist() == [[31] * 4] and right.tolist() == [[1.0] * 4]
    left, right = encode(torch.empty(0, 4), torch.empty(0, 4), weighting())
    assert left.shape == right.shape == (0, 4)


def test_expectation_of_bfloat16_logits_is_float32():
    edges = torch.randn(3, 4, 33)
    mean = expectation(edges.bfloat16(), weighting())
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, expectation(edges, weighting()), rtol=0.05, atol=0.05)
