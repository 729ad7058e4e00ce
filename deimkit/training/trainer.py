"""The step and the epoch: a batch becomes outputs, outputs become losses, losses become a step, epochs become a detector."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from deimkit.data.dataset import CategoryMap, Dataset, Split
from deimkit.data.loader import Loader
from deimkit.errors import DataError, DeimkitError, NonFiniteError
from deimkit.models.detector import Detector
from deimkit.structures import Batch, Targets
from deimkit.training import checkpoint
from deimkit.training.optim import EMA
from deimkit.training.progress import Progress
from deimkit.training.run import Plan, Run, read_rows
from deimkit.training.timeline import BestTracker

SKIPS = 5  # non-finite steps in a row before the run goes back to its last checkpoint
ROLLBACKS = 2  # times it goes back before it stops


class Trainer:
    """Trains the run in `folder`, from its last checkpoint if it has one.

    recipe: what to train. plan: how. dataset: its train split is learned, its val split is measured after every epoch.
    `fit` returns the Run; raises `DataError` for a dataset with errors, `NonFiniteError` when a loss stays non-finite.
    """

    def __init__(
        self, recipe: Any, plan: Plan, dataset: Dataset, folder: Path, progress: Progress | None = None
    ) -> None:
        self.recipe, self.plan, self.folder = recipe, plan, Path(folder)
        self.run = Run(folder)
        self.progress = progress or Progress()
        self.device = pick_device(plan.device)
        self.precision = pick_precision(plan.precision, self.device)
        if dataset.train is None:
            raise DataError(f"{dataset!r} has no train split to learn from.")
        self.train = usable(dataset.train, plan)
        self.val = usable(dataset.val, plan) if dataset.val is not None else None
        self.categories: CategoryMap = dataset.categories
        self.interrupted = False

    def fit(self) -> Run:
        """Train to the end of the timeline, or to the first of: a stop request, no better AP for `patience` epochs."""
        with self._own_process(), torch.random.fork_rng(devices=self._cuda_devices()):
            try:
                self._prepare()
                self._epochs()
            except DeimkitError as error:
                self._event("failed", why=str(error))
                raise
            finally:
                self.loader.close()
        return self.run

    # ------------------------------------------------------------------ set-up
    def _prepare(self) -> None:
        recipe, plan = self.recipe, self.plan
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(plan.seed)
        self.timeline = recipe.timeline
        self.loader = Loader(
            self.train,
            batch=recipe.batch,
            size=recipe.size,
            augment=recipe.augment,
            timeline=self.timeline,
            seed=plan.seed,
            workers=default_workers() if plan.workers is None else plan.workers,
        )
        self.steps = len(self.loader)
        self.criterion = recipe.criterion()
        self.model = recipe.build(self.categories)
        if plan.weights is not None and not self.run.last.is_file():
            from deimkit.weights import load_weights

            self._event("weights", report=load_weights(self.model, plan.weights, replace_head=True).to_dict())
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = recipe.optim.build(self.model)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.ema = EMA.of(self.model, self.timeline)
        self.epoch, self.step_in_epoch, self.global_step = 0, 0, 0
        self.tracker = BestTracker(self.timeline.augment, reloads=recipe.return_to_best)
        self.best_epoch = -1
        self.skips, self.rollbacks = 0, 0
        resumed = self.run.last.is_file()
        if resumed:
            self._restore(checkpoint.load(self.run.last))
        self.journal = Journal(self.folder, self.epoch, self.step_in_epoch)
        self._event(
            "resumed" if resumed else "started",
            epoch=self.epoch,
            step=self.step_in_epoch,
            device=str(self.device),
            precision=str(self.precision).removeprefix("torch."),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            versions={"torch": torch.__version__, "python": platform.python_version()},
            images=len(self.train),
            skipped=[str(p) for p in getattr(self.train, "skipped", [])],
        )

    def _epochs(self) -> None:
        while self.epoch < self.timeline.total:
            if self.step_in_epoch == 0 and self.tracker.starts(self.epoch):
                self._return_to_best()
            if not self._epoch():
                self._save(self.run.last)
                self._event("stopped", epoch=self.epoch, step=self.step_in_epoch)
                self.progress.line(
                    f"stopped in epoch {self.epoch + 1} after {self.step_in_epoch} steps; resume goes on from there"
                )
                return
            metrics = self._evaluate()
            save, reload = self.tracker.ends(self.epoch, float(metrics["AP"])) if metrics else (None, False)
            if save:
                self.best_epoch = self.epoch
            if reload:
                self._return_to_best()
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self._keep(save)
            if self.plan.patience is not None and self.epoch - 1 - self.best_epoch >= self.plan.patience:
                self._event("early_stop", epoch=self.epoch, best_epoch=self.best_epoch, AP=self.tracker.best)
                return
        self._event("finished", epoch=self.epoch, best_epoch=self.best_epoch, AP=self.tracker.best)

    # ------------------------------------------------------------------ one epoch
    def _epoch(self) -> bool:
        """Train the rest of the current epoch; False if asked to stop in the middle."""
        started, first = time.monotonic(), self.step_in_epoch
        self.model.train()
        for batch in self.loader.epoch(self.epoch, start=first):
            before = time.monotonic()
            terms = self._step(batch)
            self.step_in_epoch += 1
            self.global_step += 1
            now = time.monotonic()
            done = self.step_in_epoch - first
            row = {
                "kind": "step",
                "epoch": self.epoch,
                "step": self.step_in_epoch - 1,
                "loss": sum(terms.values()) if terms else math.nan,
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "boxes": len(batch.targets),
                "images_per_s": round(len(batch) * done / (now - started), 3),
                "step_s": round(now - before, 4),
                "memory_mib": self._memory(),
                "terms": terms,
            }
            self.journal.write("metrics.jsonl", row)
            left = (now - started) / done * (self.steps * (self.timeline.total - self.epoch) - self.step_in_epoch)
            self.progress.step(row, self.steps, self.timeline.total, left)
            if self.interrupted or (self.folder / "stop").exists():
                return False
            if self.plan.save_every and self.global_step % self.plan.save_every == 0:
                self._save(self.run.last)
        self.epoch_s = time.monotonic() - started
        return True

    def _step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns every weighted loss term, or {} if the step was skipped as non-finite."""
        factor = self.timeline.lr_factor(self.global_step, self.steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        batch = batch.to(self.device, non_blocking=True).finish()
        batch.targets.check(len(batch), len(self.categories), batch.names)
        parts = micro_batches(batch, self.plan.accumulate)
        total: dict[str, Tensor] = {}
        try:
            for part in parts:
                terms = self._losses(part, boxes=max(len(batch.targets), 1))
                self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
                for name, value in terms.items():
                    total[name] = total.get(name, 0) + value.detach()
            values = torch.stack(list(total.values())).tolist()
            if not all(map(math.isfinite, values)):
                bad = [name for name, value in zip(total, values, strict=True) if not math.isfinite(value)]
                raise NonFiniteError(
                    f"The loss is not finite: {', '.join(bad[:6])} at epoch {self.epoch}, step {self.step_in_epoch}."
                )
            self._apply()
        except NonFiniteError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._skip(batch, error)
            return {}
        self.skips = 0
        return dict(zip(total, values, strict=True))

    def _losses(self, batch: Batch, boxes: int) -> dict[str, Tensor]:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        mixed = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision) if mixed else nullcontext():
            outputs = self.model(images, batch.targets)
        return self.criterion(outputs, batch.targets, boxes=boxes)

    def _apply(self) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip or math.inf)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            names = [
                n for n, p in self.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            raise NonFiniteError(
                f"The gradient is not finite in {', '.join(names[:6])} at epoch {self.epoch}, step {self.step_in_epoch}."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def _skip(self, batch: Batch, error: NonFiniteError) -> None:
        """The policy for a non-finite step: save its batch for replay and skip it; then roll back; then stop."""
        self.skips += 1
        replay = self.folder / "replay" / f"epoch{self.epoch}_step{self.step_in_epoch}.pt"
        replay.parent.mkdir(exist_ok=True)
        torch.save({"images": batch.images.cpu(), "names": batch.names, **vars(batch.targets.to("cpu"))}, replay)
        self._event(
            "skipped", why=str(error), images=batch.names, batch=str(replay), epoch=self.epoch, step=self.step_in_epoch
        )
        self.progress.line(f"skipped a step: {error} Its batch is in {replay}.")
        if self.skips < SKIPS:
            return
        if self.rollbacks == ROLLBACKS or not self.run.last.is_file():
            raise NonFiniteError(
                f"{error} {SKIPS} steps in a row were not finite and going back to a checkpoint did not help. "
                f"The batches are in {replay.parent}; try precision='fp32' or a lower learning rate."
            )
        self.rollbacks += 1
        self.skips = 0
        state = checkpoint.load(self.run.last)
        self._restore_weights(state)
        self._event("rolled_back", to_epoch=state["epoch"], to_step=state["step_in_epoch"])

    # ------------------------------------------------------------------ evaluation
    def _evaluate(self) -> dict[str, Any] | None:
        last = self.epoch + 1 == self.timeline.total
        if self.val is None or (not last and (self.epoch + 1) % self.plan.evaluate_every):
            return None
        from deimkit.evaluation.measure import measure

        started = time.monotonic()
        metrics = measure(
            self.ema.model,
            self.val,
            size=self.recipe.size,
            batch=2 * self.recipe.batch,
            device=self.device,
            note=self.progress.note,
        )
        row = {
            "kind": "epoch",
            "epoch": self.epoch,
            "train_s": round(self.epoch_s, 2),
            "evaluate_s": round(time.monotonic() - started, 2),
            **metrics,
        }
        self.journal.write("metrics.jsonl", row)
        mark = "  best" if metrics["AP"] > (self.tracker.best or 0) else ""
        self.progress.line(
            f"epoch {self.epoch + 1:>3}/{self.timeline.total}  {self.timeline.stage(self.epoch):<7}  AP {metrics['AP']:.3f}  "
            f"AP50 {metrics['AP50']:.3f}  AP75 {metrics['AP75']:.3f}  {self.epoch_s + row['evaluate_s']:.0f} s{mark}"
        )
        return metrics

    def _return_to_best(self) -> None:
        """Take up the best weights from before the clean stage again, as the published two-stage solver does."""
        self._restore_weights(checkpoint.load(self.stage1))
        self._event("returned_to_best", epoch=self.epoch)

    # ------------------------------------------------------------------ state
    @property
    def best(self) -> Path:
        """The checkpoint of the best AP."""
        return self.folder / "checkpoints" / "best.pt"

    @property
    def stage1(self) -> Path:
        """The best checkpoint from before the clean stage, which training returns to."""
        return self.folder / "checkpoints" / "stage1.pt"

    def _save(self, path: Path) -> None:
        checkpoint.save(path, self._state())

    def _keep(self, save: str | None) -> None:
        """Save the newest state, and keep it as the best, and as stage 1's best, where the tracker says so."""
        if save:
            checkpoint.save(self.best, self._state())
        if save == "stage1":
            checkpoint.copy(self.best, self.stage1)
        self._save(self.run.last)

    def _state(self) -> dict[str, Any]:
        return {
            "recipe": repr(self.recipe),
            "categories": self.categories.to_dict(),
            "size": list(self.recipe.size),
            "versions": {"torch": torch.__version__},
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "global_step": self.global_step,
            "tracker": asdict(self.tracker),
            "best_epoch": self.best_epoch,
            "skips": self.skips,
            "rollbacks": self.rollbacks,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["recipe"] != repr(self.recipe):
            raise DeimkitError(
                f"{self.run.last} was trained with another recipe than {self.folder / 'recipe.py'} asks for. "
                "Resume with the same recipe, or start a new run with weights=that checkpoint."
            )
        self._restore_weights(state)
        for name in ("epoch", "step_in_epoch", "global_step", "best_epoch", "skips", "rollbacks"):
            setattr(self, name, state[name])
        self.tracker = BestTracker(**state["tracker"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)

    def _restore_weights(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    # ------------------------------------------------------------------ surroundings
    def _event(self, event: str, **facts: Any) -> None:
        Journal.append(
            self.folder / "events.jsonl", {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **facts}
        )

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextmanager
    def _own_process(self) -> Iterator[None]:
        """Mark the folder as being trained by this process, and turn SIGINT and SIGTERM into "save, then leave"."""
        (self.folder / "pid").write_text(str(os.getpid()))
        (self.folder / "stop").unlink(missing_ok=True)
        before: dict[signal.Signals, Any] = {}

        def leave(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        try:
            for kind in (signal.SIGINT, signal.SIGTERM):
                before[kind] = signal.signal(kind, leave)
        except ValueError:
            before.clear()  # not the main thread: signals stay with whoever owns them
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
            (self.folder / "pid").unlink(missing_ok=True)


class Journal:
    """Appends rows to the run folder, and forgets what was written after the checkpoint that a run resumes from."""

    def __init__(self, folder: Path, epoch: int, step: int) -> None:
        self.folder = folder
        path = folder / "metrics.jsonl"
        rows = read_rows(path)
        kept = [r for r in rows if (r["epoch"], r.get("step", math.inf)) < (epoch, step)]
        if path.is_file():
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(temporary, path)

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Append one row to the file `name` of the run folder."""
        self.append(self.folder / name, row)

    @staticmethod
    def append(path: Path, row: dict[str, Any]) -> None:
        """Append one row to `path`."""
        with open(path, "a") as file:
            file.write(json.dumps(row, default=float) + "\n")


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """`batch` cut into at most `count` consecutive parts, images and targets together."""
    if count == 1:
        return [batch]
    parts, t = [], batch.targets
    for rows in np.array_split(np.arange(len(batch)), min(count, len(batch))):
        first, end = int(rows[0]), int(rows[-1]) + 1
        mine = (t.image >= first) & (t.image < end)
        targets = Targets(t.image[mine] - first, t.labels[mine], t.boxes[mine])
        parts.append(Batch(batch.images[first:end], targets, batch.ids[first:end], batch.names[first:end]))
    return parts


def usable(split: Split, plan: Plan) -> Split:
    """The split as it may be trained on: without problems, or without the images that have them if the plan says skip."""
    errors = [p for p in split.problems if p.severity == "error"]
    if not errors:
        return split
    if plan.on_problem == "refuse":
        raise DataError(
            f"The {split.name} split has {len(errors)} problem(s), the first: {errors[0]} "
            "`deimkit doctor` lists all with their remedy; on_problem='skip' trains without them."
        )
    return split.without(errors)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the best this machine has."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeimkitError(
            f"device={name!r}, but torch {torch.__version__} sees no CUDA GPU here. Use device='cpu' or 'auto'."
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DeimkitError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:0', 'mps' ...; got {name!r}.") from error


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: "auto" is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise DeimkitError("precision='fp16' needs a GPU; on a CPU use 'fp32' or 'bf16'.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def default_workers() -> int:
    """Loader processes for this machine: all cores but one, at most 8; none where only two cores share the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 2 else min(cores - 1, 8)
