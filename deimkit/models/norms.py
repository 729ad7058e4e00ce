"""Batch norms over the images of all processes, so that many small shares of a batch see what one large one would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deimkit.ranks import Ranks


class SumOverRanks(torch.autograd.Function):
    """The sum of every process's tensor; its gradient is the sum of every process's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The sum of every process's gradient."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SharedNorm(nn.BatchNorm2d):
    """A batch norm whose mean and variance are those of every process's maps (N, C, h, w), of the same size each.

    For CPUs; on GPUs torch has `SyncBatchNorm`. In evaluation it is a plain batch norm. Like all norms here, it has a
    weight, a bias and a momentum.
    """

    world: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = SumOverRanks.apply(wide.mean((0, 2, 3))) / self.world
        centred = wide - mean[:, None, None]
        var = SumOverRanks.apply(centred.square().mean((0, 2, 3))) / self.world
        with torch.no_grad():
            n = self.world * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * (n / max(n - 1, 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        y = centred * (var + self.eps).rsqrt()[:, None, None]
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Let the batch norms of a model see the batches of all `ranks`; nothing changes if this process is alone.

    The modules stay the same objects, so that what keeps hold of them (a frozen backbone) keeps them.
    """
    on_gpu = next(model.parameters()).is_cuda
    for module in model.modules() if ranks.many else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = nn.SyncBatchNorm if on_gpu else SharedNorm  # type: ignore[assignment]
            module.process_group, module.world = None, ranks.world  # type: ignore[assignment]
