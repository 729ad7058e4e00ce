"""The one loop: outputs and targets become matches, matches become pairs, pairs become named, weighted terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deimkit.errors import NonFiniteError, RecipeError
from deimkit.losses import Loss, Pairs
from deimkit.matching import Hungarian, Matcher, union
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Match, Output, Targets


@dataclass(frozen=True)
class Criterion:
    """The loss of a detector, term by term.

    losses: which, with their weights. matcher: who answers for what, unless an output brings its own rule.
    share: the box losses of all pooled outputs follow the union of their matches (GO-LSD).
    """

    losses: tuple[Loss, ...]
    matcher: Matcher = Hungarian()
    share: bool = True

    def __post_init__(self) -> None:
        names = [loss.name for loss in self.losses]
        if len(set(names)) < len(names):
            raise RecipeError(f"Losses need different names, as their terms do; got {names}. Rename one in a subclass.")

    def __call__(
        self,
        outputs: Sequence[Output],
        targets: Targets,
        boxes: float | None = None,
        watch: Callable[[Pairs, Pairs], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """Weighted scalars named "loss/output", to be added up: `{"mal/final": ..., "l1/layer0": ...}`.

        Which terms there are depends on the outputs alone, never on their values or the targets. boxes: how many target
        boxes to normalise by where this call sees only a part of them (a micro-batch, a rank): its terms then count for
        len(targets) / boxes, so that those of all micro-batches add up to the terms of the whole. watch: shown the
        pairs that each output's own match makes, and those of the shared one, before the losses are. ranks: which
        processes see the rest of the batch: every normaliser is that of all of them, so that their terms too add up.
        Works in float32 whatever the predictions are (float64 if they are), also under autocast.
        Raises `NonFiniteError` naming the output and the images at fault.
        """
        outputs = list(outputs)
        with torch.autocast(targets.boxes.device.type, enabled=False):
            own, shared = self.pairs(outputs, targets, boxes, ranks)
            if watch is not None:
                watch(own, shared)
            terms: dict[str, Tensor] = {}
            for loss in self.losses:
                speaks = [k for k, output in enumerate(outputs) if loss.applies(output)]
                if speaks:
                    values = loss.weight * loss((shared if loss.union else own).only(speaks))  # (K,)
                    terms |= zip([f"{loss.name}/{outputs[k].name}" for k in speaks], values.unbind(), strict=True)
        _check(terms, outputs)
        return terms

    def pairs(
        self, outputs: list[Output], targets: Targets, boxes: float | None = None, ranks: Ranks = ALONE
    ) -> tuple[Pairs, Pairs]:
        """The matched pairs of every output: by its own match, and by the shared one where it is pooled."""
        device = targets.boxes.device
        matches = self._match_with(outputs, targets, ranks)
        pooled = [k for k, output in enumerate(outputs) if output.pooled and self.share]
        pool = union(_move([matches[k] for k in pooled], torch.device("cpu")))
        normal = next((k for k, output in enumerate(outputs) if output.pooled), 0)
        answering = len((pool if pooled else matches[normal]).query)

        here = torch.tensor([len(targets), len(pool.query), answering, outputs[normal].preds.boxes[..., 0].numel()])
        count, pool_count, answering, queries = ranks.sum(here).tolist()
        n = max(count if boxes is None else boxes, 1)
        portion = 1.0 if boxes is None else count / n
        pool_count = max(pool_count / portion, 1.0) if portion else 1.0
        *own, pool = _move([*matches, pool], device)
        every = Pairs.of(
            outputs + [outputs[k] for k in pooled],
            own + [pool] * len(pooled),
            targets,
            count=[float(n * output.repeat) for output in outputs] + [pool_count] * len(pooled),
            portion=portion,
            normal=(answering, queries),
            everywhere=ranks.sum,
        )
        place = {k: len(outputs) + i for i, k in enumerate(pooled)}
        everyone = range(len(outputs))
        return every.only(everyone), every.only([place.get(k, k) for k in everyone])

    def _match_with(self, outputs: list[Output], targets: Targets, ranks: Ranks) -> list[Match]:
        """`match`, of which every process hears if it fails in one, so that none waits for that one."""
        matches, failure = [], None
        try:
            matches = self.match(outputs, targets)
        except NonFiniteError as error:
            failure = error
        ranks.agree(failure)
        return matches

    def match(self, outputs: Sequence[Output], targets: Targets) -> list[Match]:
        """One `Match` per output: known by construction, or by the output's matcher, or by the criterion's."""
        found = {k: output.rule for k, output in enumerate(outputs) if isinstance(output.rule, Match)}
        asked: dict[int, tuple[Matcher, list[int]]] = {}
        for k, output in enumerate(outputs):
            if k not in found:
                matcher = output.rule or self.matcher
                asked.setdefault(id(matcher), (matcher, []))[1].append(k)
        for matcher, members in asked.values():
            found |= zip(members, matcher([outputs[k] for k in members], targets), strict=True)
        return [found[k] for k in range(len(outputs))]


def _move(matches: list[Match], device: torch.device) -> list[Match]:
    """Those matches that are elsewhere, on `device`, in one copy."""
    away = [k for k, match in enumerate(matches) if match.query.device != device]
    if not away:
        return matches
    table = torch.cat([torch.stack(matches[k]) for k in away], 1).to(device, non_blocking=True)  # (3, M)
    moved = dict(zip(away, table.split([len(matches[k].query) for k in away], 1), strict=True))
    return [Match(*moved[k]) if k in moved else match for k, match in enumerate(matches)]


def _check(terms: dict[str, Tensor], outputs: list[Output]) -> None:
    """Look at all terms at once; only if one is not finite, look for who is at fault."""
    values = torch.stack(list(terms.values())).detach()
    if torch.isfinite(values).all():
        return
    bad = [name for name, finite in zip(terms, torch.isfinite(values).tolist(), strict=True) if not finite]
    for output in outputs:
        for field in ("logits", "boxes", "edges"):
            value = getattr(output.preds, field)
            images = [] if value is None else (~torch.isfinite(value)).flatten(1).any(1).nonzero()[:, 0].tolist()
            if images:
                raise NonFiniteError(
                    f"Predictions must be finite; {field} of output {output.name!r} are not in images {images} of the "
                    f"batch, so {bad[0]} is not either. Skip the batch, or go back to the last good checkpoint."
                )
    raise NonFiniteError(f"Losses must be finite; {', '.join(bad[:6])} overflowed from finite predictions.")
