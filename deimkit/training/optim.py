"""Who learns how fast: AdamW whose groups follow the types of modules, and the moving average that is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deimkit.errors import CheckpointError, RecipeError
from deimkit.training.timeline import Timeline, momentum

KINDS = ("backbone", "backbone_norm", "norm", "bias", "weight")
"""The kinds of parameter. In the backbone: its norm layers ("backbone_norm") and everything else (convolutions and
HGNetV2's learnable affines). Outside: norm layers, biases of all other layers, and the rest (embeddings too)."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Group:
    """Kinds of parameter that train alike: at the base rate or the `slow` one, with weight `decay` or without."""

    kinds: tuple[str, ...]
    slow: bool = False
    decay: bool = True


# Three rule sets cover the published files. Where a norm is free, its weight and bias have no weight decay.
NORMS_FREE = (
    Group(("backbone", "backbone_norm"), slow=True),
    Group(("norm",), decay=False),
    Group(("bias", "weight")),
)  # D-FINE-L, X and DEIM-D-FINE-L, X
NORMS_AND_BIASES_FREE = (
    Group(("backbone", "backbone_norm"), slow=True),
    Group(("norm", "bias"), decay=False),
    Group(("weight",)),
)  # D-FINE-N, S, M and DEIM-D-FINE-N
ALL_NORMS_FREE = (
    Group(("backbone",), slow=True),
    Group(("backbone_norm", "norm"), decay=False),
    Group(("bias", "weight")),
)  # DEIM-D-FINE-S, M, and RT-DETRv2 with and without DEIM


@dataclass(frozen=True)
class Optim:
    """AdamW: its rates, and the rules which kinds of parameter (`KINDS`) learn at which rate and which decay.

    lr: the base rate. backbone_lr: the rate of slow groups. clip: the largest L2 norm of the whole gradient; 0 does not
    clip. groups: every kind exactly once; a kind that a model does not have is no problem.

    backbone_norms_as_published: the published files mean to train the backbone's norms at its rate and without decay.
    But the name patterns of D-FINE-N to X and DEIM-N, L, X do not recognise HGNetV2's "bn", which then decays, and
    those of DEIM-S, M and DEIM-RT-DETRv2 forget the rate, so that it learns at the base rate. True keeps what ran;
    False does what was meant.
    """

    lr: float = 4e-4
    backbone_lr: float = 2e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.1
    groups: tuple[Group, ...] = ALL_NORMS_FREE
    backbone_norms_as_published: bool = True

    def __post_init__(self) -> None:
        if min(self.lr, self.backbone_lr, self.weight_decay, self.clip) < 0:
            raise RecipeError(
                f"Rates, weight decay and clip must be >= 0; got lr={self.lr}, backbone_lr={self.backbone_lr}, "
                f"weight_decay={self.weight_decay}, clip={self.clip}."
            )
        named = [kind for group in self.groups for kind in group.kinds]
        if sorted(named) != sorted(KINDS):
            raise RecipeError(
                f"Optim.groups must name each of {', '.join(KINDS)} exactly once; got {', '.join(named)}."
            )

    @property
    def rules(self) -> tuple[Group, ...]:
        """The groups as they will be built: `groups`, or those with the backbone's norms as they were meant."""
        if self.backbone_norms_as_published:
            return self.groups
        others = [replace(g, kinds=tuple(k for k in g.kinds if k != "backbone_norm")) for g in self.groups]
        return (Group(("backbone_norm",), slow=True, decay=False), *(g for g in others if g.kinds))

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The groups for an optimiser, without empty ones: name, lr, weight_decay, params and their param_names.

        Parameters that do not require a gradient are left out. Raises `RecipeError` if none does.
        """
        kinds = dict(parameter_kinds(model))
        groups = []
        for rule in self.rules:
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and kinds[n] in rule.kinds]
            if named:
                groups.append(
                    {
                        "name": "+".join(rule.kinds),
                        "lr": self.backbone_lr if rule.slow else self.lr,
                        "weight_decay": self.weight_decay if rule.decay else 0.0,
                        "params": [p for _, p in named],
                        "param_names": [n for n, _ in named],
                    }
                )
        if not groups:
            raise RecipeError(
                "The model has no parameter that requires a gradient; nothing can be trained. Unfreeze some."
            )
        return groups

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimiser of `model`, which must already be on its device; fused where all of it is on a GPU.

        A state that it loads may come from another kind of device: it goes on as is right for this one.
        """
        groups = self.parameter_groups(model)
        for group in groups:
            del group["param_names"]
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=on_gpu or None
        )
        optimizer.register_load_state_dict_pre_hook(_as_built)
        return optimizer

    def scaled_to_batch(self, published: int, batch: int) -> Optim:
        """Both rates for another batch than the one of `published` images that they were made for.

        A larger batch raises them in proportion, as the authors advise; a smaller one leaves them alone: Adam's steps
        do not grow with the batch, and a small dataset needs the pace (README, "Where we differ"). Their other halves
        (EMA and warm-up) follow from the steps of the run: `Timeline.scaled_to`.
        """
        if published < 1 or batch < 1:
            raise RecipeError(f"A batch has at least one image; got {batch} for {published}.")
        return self.times(max(batch / published, 1.0))

    def times(self, factor: float) -> Optim:
        """Both rates `factor` times as high."""
        return replace(self, lr=self.lr * factor, backbone_lr=self.backbone_lr * factor)


def _as_built(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state with this optimiser's own way to compute a step, which also says where its step counts must be."""
    ours = {"fused": optimizer.defaults["fused"], "foreach": optimizer.defaults["foreach"]}
    return {**state, "param_groups": [{**group, **ours} for group in state["param_groups"]]}


def parameter_kinds(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, kind) of every parameter, shared ones once; the backbone is `model.backbone`, if there is one."""
    part = getattr(model, "backbone", None)
    backbone = {id(p) for p in part.parameters()} if isinstance(part, nn.Module) else set()
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        is_norm = id(parameter) in norms
        if id(parameter) in backbone:
            yield name, "backbone_norm" if is_norm else "backbone"
        elif is_norm:
            yield name, "norm"
        else:
            yield name, "bias" if name.endswith("bias") else "weight"


class EMA:
    """The moving average of a model: slower, smoother, and what is evaluated and kept.

    `ema.model` is a copy in evaluation mode that asks for no gradients. Every floating entry of the state dict is
    averaged, batch-norm statistics included, in float32 if the model is in half precision; integer entries (BatchNorm's
    step counters) keep the values they had when the average began, as published, for nothing reads them. `updates`
    counts from 1 and sets the momentum, decay * (1 - exp(-updates / ramp)); `decay` may be changed on the way.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, ramp: float = 1000) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self._followed: nn.Module | None = None
        self._average: list[Tensor] = []
        self._current: list[Tensor] = []

    @classmethod
    def of(cls, model: nn.Module, timeline: Timeline) -> EMA:
        """The average that `timeline` asks for."""
        return cls(model, timeline.ema_decay, timeline.ema_ramp)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`, which keeps its tensors; call it after every optimiser step."""
        self.updates += 1
        if model is not self._followed:
            self._follow(model)
        pairs = zip(self._current, self._average, strict=True)
        current = [new.to(old.device, old.dtype) for new, old in pairs]
        torch._foreach_lerp_(self._average, current, 1 - momentum(self.updates, self.decay, self.ramp))

    def _follow(self, model: nn.Module) -> None:
        """Look up once which tensors there are: a state dict takes longer than the arithmetic, and a GPU would wait."""
        state = model.state_dict()
        pairs = [(old, state[name]) for name, old in self.model.state_dict().items() if old.is_floating_point()]
        self._average, self._current = [old for old, _ in pairs], [new for _, new in pairs]
        self._followed = model

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = {"shadow", "updates"} - state.keys()
        if missing:
            raise CheckpointError(
                f"The state of an EMA needs shadow and updates; {' and '.join(sorted(missing))} is missing. "
                "Load weights alone with `ema.model.load_state_dict`."
            )
        self.model.load_state_dict(state["shadow"])
        self.updates = state["updates"]
