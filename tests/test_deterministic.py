"""Deterministic mode: other paths for the same numbers, and no operation that a GPU would do in any order.

There need be no GPU: which operations a training step calls is the same on a CPU, and torch's documentation says which
of them a GPU cannot repeat.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deimkit import recipes
from deimkit.errors import DeimkitError
from deimkit.models import attention
from deimkit.models.attention import corner_by_corner, look, sample
from deimkit.recipes.recipe import Recipe
from deimkit.structures import Batch, Targets
from deimkit.training.deterministic import WORKSPACE, deterministic
from deimkit.training.learner import Learner
from tests.micro import MICRO, same, scenes, trainer

# What `torch.use_deterministic_algorithms` is documented to refuse on CUDA, and which operations of aten do it.
REFUSED = {
    "torch.nn.AvgPool3d": ("avg_pool3d_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "torch.nn.AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "torch.nn.MaxPool3d": ("max_pool3d_with_indices_backward",),
    "torch.nn.MaxUnpool1d": ("max_unpool2d",),
    "torch.nn.MaxUnpool2d": ("max_unpool2d",),
    "torch.nn.MaxUnpool3d": ("max_unpool3d",),
    "torch.nn.functional.interpolate": (
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
        "_upsample_bilinear2d_aa_backward",
        "_upsample_bicubic2d_aa_backward",
    ),
    "torch.nn.ReflectionPad1d": ("reflection_pad1d_backward",),
    "torch.nn.ReflectionPad2d": ("reflection_pad2d_backward",),
    "torch.nn.ReflectionPad3d": ("reflection_pad3d_backward",),
    "torch.nn.ReplicationPad1d": ("replication_pad1d_backward",),
    "torch.nn.ReplicationPad2d": ("replication_pad2d_backward",),
    "torch.nn.ReplicationPad3d": ("replication_pad3d_backward",),
    "torch.nn.NLLLoss": ("nll_loss_forward", "nll_loss2d_forward"),
    "torch.nn.CTCLoss": ("_ctc_loss_backward", "_cudnn_ctc_loss"),
    "torch.nn.EmbeddingBag": ("_embedding_bag_backward", "_embedding_bag_dense_backward"),
    "torch.Tensor.put_": ("put", "put_"),
    "torch.histc": ("histc",),
    "torch.bincount": ("bincount",),  # with weights only
    "torch.median": ("median.dim", "nanmedian.dim"),
    "torch.kthvalue": ("kthvalue",),
    "torch.nn.functional.grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "torch.Tensor.scatter_reduce": ("scatter_reduce", "scatter_reduce_"),
}
# No page says which of its kernels a GPU picks for attention, and some of them do not repeat themselves.
FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
FORBIDDEN = {op for ops in REFUSED.values() for op in ops} | {f"{op}{end}" for op in FUSED for end in ("", "_backward")}

RTDETR = recipes.get("deim_rtdetrv2_tiny")
CASES = {
    "D-FINE": MICRO,
    "RT-DETRv2": RTDETR,
    "discrete": replace(RTDETR, arch=replace(RTDETR.arch, decoder=replace(RTDETR.arch.decoder, discrete=True))),
}
INSIDE_AND_OUT = [-3.0, -1.2, -1.0, -0.875, -0.31, 0.0, 0.4, 0.99, 1.0, 1.3]  # some on borders and centres of cells


class Walk(TorchDispatchMode):
    """Notes every operation of aten that is called within it, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, weights = str(func.overloadpacket.__name__), kwargs.get("weights", args[1] if len(args) > 1 else None)
        if name != "bincount" or weights is not None:
            self.called |= {name, f"{name}.{func._overloadname}"}
        return func(*args, **kwargs)


def batch(size: tuple[int, int] | None = (96, 128)) -> Batch:
    """Bytes as the loader ships them, to be blended and resized; the third image has nothing in it."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 3, 64, 96), dtype=torch.uint8, generator=draw)
    boxes = torch.rand(9, 4, generator=draw) * 0.3 + 0.2
    targets = Targets(torch.arange(9) % 2, torch.arange(9) % 3, boxes)
    return Batch(images, targets, [0, 1, 2], ["a", "b", "c"], mix=0.5, size=size)


def learner(recipe: Recipe, **how: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(recipe, recipe.build(3), **how)


def step(recipe: Recipe, steps: int = 1, **how: Any) -> tuple[list[dict[str, float]], Learner]:
    """The terms of the first steps of a training, and who learned."""
    who = learner(recipe, **how)
    return [who.learn(batch()) for _ in range(steps)], who


@pytest.fixture
def mode() -> Iterator[None]:
    with deterministic():
        yield


# ---------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("mode_", ["bilinear", "nearest"])
def test_corner_by_corner_is_grid_sample(mode_: str) -> None:
    """Values, and gradients with respect to maps and points, at points in, on and beyond the border."""
    value = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    at = torch.tensor(INSIDE_AND_OUT, dtype=torch.float64)
    if mode_ == "nearest":
        at = at + 0.013  # halfway between two cells either is right
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).expand(2, -1, -1, -1).clone().requires_grad_()
    ours, theirs = corner_by_corner(value, grid, mode_), F.grid_sample(value, grid, mode=mode_, align_corners=False)
    torch.testing.assert_close(ours, theirs)
    push = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(x, (value, grid), push, materialize_grads=True) for x in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_point_by_hand() -> None:
    """A quarter of the way right of the first cell and on its row; half outside; and nowhere."""
    value = torch.tensor([[[[4.0, 8.0], [6.0, 2.0]]]])
    x = torch.tensor([0.25, -0.5, 7.0])  # in cells
    grid = torch.stack([(x * 2 + 1) / 2 - 1, torch.full((3,), -0.5)], -1).reshape(1, 1, 3, 2)
    assert corner_by_corner(value, grid, "bilinear").flatten().tolist() == [5.0, 2.0, 0.0]
    assert corner_by_corner(value, grid, "nearest").flatten().tolist() == [4.0, 4.0, 0.0]  # -0.5 is rounded to even


@pytest.mark.parametrize("discrete", [False, True])
def test_sampling_is_the_same_in_both_modes(discrete: bool) -> None:
    """With weights and several levels, in values and all gradients."""
    values = [torch.randn(2 * 2, 2, *hw, dtype=torch.float64, requires_grad=True) for hw in ((3, 4), (2, 1))]
    locations = (torch.rand(2, 3, 2, 3, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = [*values, weights] if discrete else [*values, locations, weights]

    def all_of_it() -> tuple[Tensor, ...]:
        seen = sample(values, locations, weights, (2, 1), discrete)
        return seen, *torch.autograd.grad(seen.square().sum(), inputs)

    usual = all_of_it()
    with deterministic():
        ours = all_of_it()
        assert torch.autograd.gradcheck(
            lambda *_: sample(values, locations, weights, (2, 1), discrete), inputs, eps=1e-7, atol=1e-5
        )
    for mine, other in zip(ours, usual, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_look_at(shape: tuple[int, int, int], mode: None) -> None:
    maps, points, queries = shape
    value = torch.randn(maps, 4, 3, 3, requires_grad=True)
    found = look(value, torch.rand(maps, points, queries, 2), "bilinear")
    assert found.shape == (maps, 4, points, queries)
    found.sum().backward()
    assert value.grad is not None and not value.grad.any()


def test_points_that_are_no_numbers_read_no_memory(mode: None) -> None:
    grid = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).reshape(1, 1, 4, 1).expand(-1, -1, -1, 2)
    assert not look(torch.ones(1, 1, 2, 2, requires_grad=True), grid, "bilinear").any()


def test_only_gradients_take_the_long_way(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("grid_sample itself repeats itself, only its gradient does not")

    monkeypatch.setattr(attention, "corner_by_corner", never)
    with torch.no_grad():
        assert look(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 2), "bilinear").item() == 1.0
    with pytest.raises(AssertionError):
        look(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 2), "bilinear")


@pytest.mark.parametrize("name", CASES)
def test_a_model_learns_the_same_in_both_modes(name: str) -> None:
    """Every term of the loss of two steps, the second after an update, to float rounding."""
    usual, _ = step(CASES[name], steps=2)
    with deterministic():
        ours, _ = step(CASES[name], steps=2)
    assert ours[0] == pytest.approx(usual[0], rel=1e-5, abs=1e-5)
    assert sum(ours[1].values()) == pytest.approx(sum(usual[1].values()), rel=2e-3)


# ---------------------------------------------------------------------- by construction
@pytest.mark.parametrize("how", [{}, {"precision": torch.bfloat16}, {"accumulate": 2}], ids=["fp32", "bf16", "parts"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_calls_nothing_that_a_gpu_cannot_repeat(name: str, how: dict[str, Any]) -> None:
    """From bytes to the moved average: blending, resizing, forward, matching, losses, backward, clipping, AdamW."""
    with deterministic(), Walk() as walk:
        step(CASES[name], **how)
    assert not walk.called & FORBIDDEN
    assert walk.called >= {"convolution_backward", "index_add", "bmm", "_foreach_norm", "_foreach_lerp_"}


@pytest.mark.parametrize("name", CASES)
def test_the_walk_sees_what_it_is_for(name: str) -> None:
    """Without the mode there is the gradient of `grid_sample` and of fused attention, and nothing else of the table."""
    with Walk() as walk:
        step(CASES[name])
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert walk.called & FORBIDDEN == {"grid_sampler_2d_backward", fused, f"{fused}_backward"}


def test_the_walk_fails_without_our_path(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention, "corner_by_corner", lambda value, grid, mode: F.grid_sample(value, grid, mode, align_corners=False)
    )
    with Walk() as walk:
        step(MICRO)
    assert walk.called & FORBIDDEN == {"grid_sampler_2d_backward"}


def test_the_table_has_all_that_torch_documents() -> None:
    """Every operation that this version of torch says it refuses on CUDA; a new one is to be entered here."""
    said = str(torch.use_deterministic_algorithms.__doc__).split("operations will throw", 1)[1].split("In addition,")[0]
    entries = [" ".join(entry.split()) for entry in re.split(r"\n\s+\* ", said)[1:]]
    on_cuda = [entry for entry in entries if "CUDA" in entry or not re.search("MPS|quantized|CPU", entry)]
    names = {name for entry in on_cuda for name in re.findall(r":(?:class|func):`~?([\w.]+?)(?:\(\))?`", entry)[:1]}
    assert len(names) > 15 and names <= REFUSED.keys()
    missing = [op for op in FORBIDDEN if not hasattr(torch.ops.aten, op.partition(".")[0])]
    assert set(missing) <= set(FUSED) | {f"{op}_backward" for op in FUSED}, "a name that torch does not know"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_repeats_itself(name: str, precision: torch.dtype) -> None:
    """Bit for bit, after a few steps at an ordinary size; to be run in a process that has not used the GPU before."""

    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        recipe = replace(CASES[name], size=(320, 320))
        who = Learner(recipe, recipe.build(3).cuda(), precision)
        for _ in range(5):
            who.learn(batch((320, 320)))
        return [p.detach().clone() for p in who.model.parameters()]

    with deterministic():
        assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


# ---------------------------------------------------------------------- the block
def settings() -> tuple[Any, ...]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    fused = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return cudnn.deterministic, cudnn.benchmark, *fused, cuda.math_sdp_enabled(), *algorithms, os.environ.get(WORKSPACE)


@pytest.mark.parametrize("given", [None, ":0:0", ":16:8"])
def test_the_block_leaves_everything_as_it_was(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, given)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        within = (True, False, False, False, False, True, True, False, given if given == ":16:8" else ":4096:8")
        with pytest.raises(ZeroDivisionError), deterministic():
            assert settings() == within
            with deterministic():
                assert settings() == within
            assert settings() == within
            1 / 0  # noqa: B018
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def used_gpu(monkeypatch: pytest.MonkeyPatch, used: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used[0])


def test_too_late_for_cublas_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    used_gpu(monkeypatch, [512])
    before = settings()
    with pytest.raises(DeimkitError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 .* got None. Set it .*wait=False"):
        deterministic().__enter__()
    assert settings() == before
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()


def test_what_cublas_began_with_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads its setting once: a second block of the same process must not find it gone."""
    monkeypatch.setenv(WORKSPACE, "")
    used = [0]
    used_gpu(monkeypatch, used)
    for _ in range(2):
        with deterministic():
            used[0] = 512
        assert os.environ[WORKSPACE] == ":4096:8" and not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------------- a run
def test_a_plan_asks_for_it(tmp_path: Path) -> None:
    """For as long as the run trains; what it learns is the same to rounding, and the same to the bit the next time."""
    data, on = scenes(tmp_path), []

    def note(row: dict[str, Any]) -> None:
        on.append(torch.are_deterministic_algorithms_enabled())

    first, again = (trainer(tmp_path / name, data, seen=note, deterministic=True).fit() for name in ("a", "b"))
    usual = trainer(tmp_path / "c", data).fit()
    assert len(on) == 18 and all(on) and not torch.are_deterministic_algorithms_enabled()
    assert same(first, again)
    assert first.rows("step")[0]["terms"] == pytest.approx(usual.rows("step")[0]["terms"], rel=1e-5, abs=1e-5)
