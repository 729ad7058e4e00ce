"""The whole of a training: steps become epochs, epochs a detector, and whatever ends it, it goes on from there."""

from __future__ import annotations

import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deimkit.data.dataset import Dataset, Split
from deimkit.data.loader import Loader
from deimkit.data.problems import Id
from deimkit.errors import CheckpointError, DataError, DeimkitError, NonFiniteError
from deimkit.models.detector import Detector
from deimkit.ranks import ALONE, Ranks
from deimkit.structures import Batch
from deimkit.training import checkpoint
from deimkit.training.deterministic import deterministic
from deimkit.training.learner import Learner
from deimkit.training.loggers import Loggers, open_loggers
from deimkit.training.machine import (
    default_workers,
    peak_memory,
    pick_device,
    pick_precision,
    random_state,
    set_random_state,
    versions,
)
from deimkit.training.memory import release
from deimkit.training.microscope import Microscope, Probe
from deimkit.training.progress import Progress, Silent
from deimkit.training.ready import culprit, expect_equal_shares, usable
from deimkit.training.replay import Finding, examine, keep
from deimkit.training.run import Plan, Run, append, keep_rows
from deimkit.training.timeline import BestTracker

SKIPS = 5  # non-finite steps in a row before the run goes back to its last checkpoint
ROLLBACKS = 2  # times it goes back before it stops
VAL_PER_WORKER = 256  # images to measure on that are worth starting a process for
POSITION = ("epoch", "step_in_epoch", "global_step", "epoch_s", "best_epoch", "skips", "rollbacks")


class Trainer:
    """Trains the run in `folder`, from its last checkpoint if it has one.

    recipe: what to train. plan: how. dataset: its train split is learned, its val split is measured after every epoch.
    ranks: which processes share every batch; the first one writes the folder, and all do the same steps. `fit` returns
    the Run. Raises `DataError` for a dataset with errors, `NonFiniteError` when a loss stays non-finite; whatever ends
    a training, it goes on from the last checkpoint as if nothing had happened.
    """

    cache_bytes: int | None = None  # of decoded images that the loader keeps, if not as many as it likes
    probed = 16  # images whose matches are compared from epoch to epoch

    def __init__(
        self,
        recipe: Any,
        plan: Plan,
        dataset: Dataset,
        folder: Path,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.plan, self.folder, self.ranks = recipe, plan, Path(folder), ranks
        self.run = Run(folder)
        self.progress = (progress or Progress()) if ranks.main else Silent()
        self.device = pick_device(plan.device, ranks.local if ranks.many else None)
        self.precision = pick_precision(plan.precision, self.device)
        dataset = usable(dataset, plan.on_problem)
        self.splits: dict[str, Split] = {s.name: s for s in (dataset.train, dataset.val) if s is not None}
        self.categories = dataset.categories
        self.timeline = recipe.timeline
        self.interrupted = False
        self.at_end = ExitStack()  # what is to be closed, however the training ends
        expect_equal_shares(recipe.batch, len(self.splits["train"]), ranks.world, plan.parts)

    def fit(self) -> Run:
        """Train to the end of the timeline, or to the first of: a stop request, no better AP for `patience` epochs."""
        exactly = deterministic() if self.plan.deterministic else nullcontext()
        with self._signals(), exactly, torch.random.fork_rng(devices=self._cuda_devices()), self.at_end:
            self._prepare()
            try:
                self._epochs()
            except torch.OutOfMemoryError as error:
                raise DeimkitError(self._too_large()) from error
        return self.run

    # ------------------------------------------------------------------ set-up
    def _prepare(self) -> None:
        """Everything as it is before the first step, or as the last checkpoint has it."""
        if self.ranks.main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for half_written in (self.folder / "checkpoints").glob(".*.partial"):  # by a process that was killed
                half_written.unlink()
        self._seed()
        model: Detector = self.recipe.build(self.categories)
        resumed = self.run.last.is_file()
        if self.plan.weights is not None and not resumed:
            self._fine_tune(model, self.plan.weights)
        elif self.recipe.arch.backbone.frozen and not resumed:
            self.progress.line(
                f"{self.recipe.name} keeps its stem and batch norms frozen, which is meant for pretrained weights; "
                'without weights=, such as weights="imagenet", they stay as they were drawn'
            )
        self.learner = Learner(
            self.recipe, model.to(self.device), self.precision, self.plan.parts, self.ranks, self.plan.compile
        )
        self.epoch, self.step_in_epoch, self.global_step = 0, 0, 0
        self.epoch_s = 0.0  # spent on the steps of the current epoch
        self.tracker = BestTracker(self.timeline.augment, reloads=self.recipe.return_to_best)
        self.best_epoch = -1
        self.skips, self.rollbacks = 0, 0
        self.series: Path | None = None  # where the batches of the steps go that are not finite in a row
        self.dropped: dict[str, list[Id]] = {}
        self.scope = Microscope()
        shown = self.splits.get("val", self.splits["train"])
        self.probe = Probe(shown, self.recipe.size, self.recipe.matcher, images=self.probed)
        if resumed:
            self._restore(checkpoint.load(self.run.last))
        self._open_loader()
        self.at_end.callback(lambda: self.loader.close())
        self.loggers = self.ranks.once(self._open_loggers) or Loggers(self._lost)
        self.at_end.callback(self.loggers.close, "failed")  # unless they were told how it ended
        if self.ranks.main:
            self._forget_what_comes_again()
        self._note_start("resumed" if resumed else "started")
        if not resumed:
            self._save(self.run.last)  # a disk that is full says so now, and a rollback always has a place to go

    def _seed(self) -> None:
        """Seed what this training draws from, and nothing else."""
        torch.random.default_generator.manual_seed(self.plan.seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.plan.seed)

    def _fine_tune(self, model: Detector, weights: str) -> None:
        from deimkit.weights import load_weights

        report = load_weights(model, weights, replace_head=True)
        self._note("weights", report=report.to_dict())
        self.progress.line(str(report))

    def _open_loader(self) -> None:
        self.loader = Loader(
            self.splits["train"],
            batch=self.recipe.batch,
            size=self.recipe.size,
            augment=self.recipe.augment,
            timeline=self.timeline,
            seed=self.plan.seed,
            workers=default_workers() if self.plan.workers is None else self.plan.workers,
            cache_bytes=self.cache_bytes,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        self.steps = len(self.loader)

    def _forget_what_comes_again(self) -> None:
        """Take out the rows of steps and epochs that were trained after the checkpoint this run goes on from."""
        here = self.epoch, self.step_in_epoch
        keep_rows(self.folder / "metrics.jsonl", lambda row: (row["epoch"], row.get("step", math.inf)) < here)
        keep_rows(self.folder / "events.jsonl", lambda row: True)

    def _record(self, kind: str, trained: int, **numbers: Any) -> dict[str, Any]:
        """Write a row, and show it in every logger; trained: steps since the beginning, those it is about included."""
        row = {"kind": kind, "epoch": self.epoch, "global_step": trained, **numbers}
        append(self.folder / "metrics.jsonl", row)
        self.loggers.log(row)
        return row

    def _open_loggers(self) -> Loggers:
        return open_loggers(self.plan.loggers, self.folder, self.recipe, self.plan, self.global_step, self._lost)

    def _lost(self, name: str, why: str) -> None:
        self._note("logger_lost", logger=name, why=why)
        self.progress.line(f"goes on without {name}: {why}")

    def _note(self, event: str, **facts: Any) -> None:
        """Write down that something happened, once for all processes."""
        if self.ranks.main:
            self.run.note(event, **facts)

    def _note_start(self, event: str) -> None:
        self._note(
            event,
            epoch=self.epoch,
            step=self.step_in_epoch,
            device=str(self.device),
            precision=str(self.precision).removeprefix("torch."),
            processes=self.ranks.world,
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            versions=versions(),
            images={name: len(split) for name, split in self.splits.items()},
        )

    # ------------------------------------------------------------------ the run
    def _epochs(self) -> None:
        while self.epoch < self.timeline.total and not self._out_of_patience():
            if self._asked_to_stop() or not self._epoch():
                self._leave()
                return
            self._end_epoch()
        event = "finished" if self.epoch == self.timeline.total else "early_stop"
        self.loggers.close(event)
        self._note(event, epoch=self.epoch, best_epoch=self.best_epoch, AP=self.tracker.best)

    def _out_of_patience(self) -> bool:
        """Whether the last evaluation lies `patience` epochs or more behind the best one."""
        if self.plan.patience is None or self.best_epoch < 0:
            return False
        evaluated = self.epoch // self.plan.evaluate_every * self.plan.evaluate_every - 1
        return evaluated - self.best_epoch >= self.plan.patience

    def _asked_to_stop(self) -> bool:
        """Whether any process was interrupted, or the run asked to stop; the same answer for all."""
        asked = self.interrupted or (self.ranks.main and (self.folder / "stop").exists())
        return self.ranks.most(int(asked)) > 0

    def _leave(self) -> None:
        self._save(self.run.last)
        self.loggers.close("stopped")
        self._note("stopped", epoch=self.epoch, step=self.step_in_epoch)
        self.progress.line(
            f"stopped in epoch {self.epoch + 1} after {self.step_in_epoch} steps; resume goes on from there"
        )

    def _end_epoch(self) -> None:
        """Measure what was learned, keep it, and go on to the next epoch."""
        ap = self._evaluate()
        if self.ranks.main:
            self._record("probe", self.global_step, **self.probe.row(cast(Detector, self.learner.ema.model)))
        save, reload = self.tracker.ends(self.epoch, ap) if ap is not None else (None, False)
        if save:
            self.best_epoch = self.epoch
        if reload:
            self._return_to_best()
        self.epoch, self.step_in_epoch, self.epoch_s = self.epoch + 1, 0, 0.0
        self._keep(save)

    # ------------------------------------------------------------------ one epoch
    def _epoch(self) -> bool:
        """Train the rest of the current epoch; False if asked to stop in the middle."""
        if self.step_in_epoch == 0 and self.tracker.starts(self.epoch):
            self._return_to_best()
        started = last = time.monotonic()
        first = self.step_in_epoch
        self.learner.ema.decay = self.timeline.ema_decay_at(self.epoch, self.tracker.refreshes)
        self.learner.model.train()
        for batch in self._batches():
            before = time.monotonic()
            terms = self._step(batch)
            self.step_in_epoch += 1
            self.global_step += 1
            now = time.monotonic()
            self.epoch_s += now - last
            waited, last = before - last, now
            self._tell(batch, terms, (now - started) / (self.step_in_epoch - first), waited, now - before)
            if self._asked_to_stop():
                return False
            if self.plan.save_every and self.global_step % self.plan.save_every == 0:
                self._save(self.run.last)
        return True

    def _batches(self) -> Iterator[Batch]:
        """What is left of the epoch; an image that cannot be read is dropped, or ends the training: `on_problem`."""
        while True:
            try:
                batches = self.loader.epoch(self.epoch, start=self.step_in_epoch)
                yield from self._together(self.learner.courier.ahead(batches))
                return
            except DataError as error:
                self._drop("train", error)
                self.loader.close()
                self._open_loader()

    def _together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of this process, as long as every process has one; what fails in one fails in all."""
        while True:
            self.ranks.beat(f"step {self.step_in_epoch} of epoch {self.epoch}")
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except DataError as error:
                failure = error
            self.ranks.agree(failure)
            if batch is None:
                return
            yield batch

    def _drop(self, name: str, error: DataError) -> None:
        """Go on without the image of the split `name` that `error` is about, or save and raise if it must not."""
        split = self.splits[name]
        image = culprit(split, error)
        if self.plan.on_problem == "refuse" or image is None:
            self._save(self.run.last)
            raise DataError(
                f"{error} Then resume the run; with on_problem='skip' it leaves such images out."
            ) from error
        self.splits[name] = split.without([image])
        self.dropped.setdefault(name, []).append(image)
        self._note("dropped", image=image, split=name, why=str(error), epoch=self.epoch, step=self.step_in_epoch)
        self.progress.line(f"goes on without an image: {error}")

    def _tell(self, batch: Batch, terms: dict[str, float], per_step: float, waited: float, step_s: float) -> None:
        """Write the row of a step, and show where the run is; one process does, with the numbers of all.

        per_step: mean seconds of a step of this epoch. waited, step_s: seconds for the batch to come, and for the step.
        """
        boxes = int(self.ranks.sum(torch.tensor(len(batch.targets))))
        if not self.ranks.main:
            return
        row = {
            "step": self.step_in_epoch - 1,
            "loss": sum(terms.values()) if terms else math.nan,
            "lr": self.learner.lr,
            "boxes": boxes,
            "images_per_s": round(self.ranks.world * len(batch) / per_step, 3),
            "wait_s": round(waited, 4),
            "step_s": round(step_s, 4),
            "memory_mib": self._memory(),
            "terms": terms,
        }
        row = self._record("step", self.global_step, **row)
        left = per_step * (self.steps * (self.timeline.total - self.epoch) - self.step_in_epoch)
        self.progress.step(row, self.steps, self.timeline.total, left)

    # ------------------------------------------------------------------ one step
    def _step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns every weighted loss term, or {} if the step was skipped as non-finite."""
        self.learner.set_rates(self.timeline.lr_factor(self.global_step, self.steps))
        drawn = random_state(self.device)
        try:
            terms = self._learned(batch)
        except NonFiniteError as error:
            self._skip(batch, error, drawn)
            return {}
        self.skips, self.series = 0, None
        seen = self.scope.row()
        if seen is not None:
            self._record("matching", self.global_step + 1, step=self.step_in_epoch, **seen)
        return terms

    def _learned(self, batch: Batch) -> dict[str, float]:
        """The terms of a step; one that runs out of memory is taken again in smaller parts, if the plan lets it."""
        while True:
            try:
                return self.learner.learn(batch, self.scope.watch_for(self.global_step) if self.ranks.main else None)
            except torch.OutOfMemoryError:
                if self.plan.accumulate != "auto" or self.learner.accumulate >= len(batch):
                    raise
            release()  # what the step held is free only after the error that held it
            self.scope.step = None  # what it has seen is seen again
            self.learner.accumulate = min(2 * self.learner.accumulate, len(batch))
            where = {"epoch": self.epoch, "step": self.step_in_epoch}
            self._note("out_of_memory", accumulate=self.learner.accumulate, **where)
            self.progress.line(
                f"step {self.step_in_epoch} of epoch {self.epoch} does not fit into the memory of {self.device}; goes "
                f"on with accumulate={self.learner.accumulate}"
            )

    def _skip(self, batch: Batch, error: NonFiniteError, drawn: dict[str, Tensor]) -> None:
        """The policy for a non-finite step: keep its batch for a replay and skip it; then roll back; then stop."""
        self.skips += 1
        where = {"epoch": self.epoch, "step": self.step_in_epoch}
        place = f"epoch{self.epoch}_step{self.step_in_epoch}"
        begins = self.series is None
        self.series = self.series or self.folder / "replay" / f"from_{place}"
        file = self.series / f"{place}_rank{self.ranks.rank}.pt" if self.ranks.many else self.series / f"{place}.pt"
        facts = {"recipe": repr(self.recipe), "categories": self.categories.to_dict(), "device": str(self.device)}
        facts |= {"precision": str(self.precision).removeprefix("torch."), "why": str(error), "where": where}
        self._in_all(lambda: keep(file, self.learner, batch, drawn, facts, begins))
        looks = self.ranks.gather((batch.names, examine(self.learner, batch, drawn)))
        names = [name for mine, _ in looks for name in mine]
        finding = Finding(looks[0][1].module, {name: what for _, f in looks for name, what in f.images.items()})
        said = f"{error} {finding}".strip()
        self._note(
            "skipped", why=said, images=names, at_fault=finding.images, module=finding.module, batch=file, **where
        )
        self.progress.line(
            f"skipped step {self.step_in_epoch} of epoch {self.epoch}: {said} Its batch is in {file}; `deimkit replay` "
            "tries it again."
        )
        if self.skips < SKIPS:
            return
        if self.rollbacks == ROLLBACKS:
            raise NonFiniteError(
                f"{error} {SKIPS} steps in a row were not finite, {ROLLBACKS + 1} times, although the run went back "
                f"to its last checkpoint. The batches are in {self.series.parent}; try precision='fp32' or a lower "
                "learning rate."
            )
        self.rollbacks += 1
        self.skips, self.series = 0, None
        state = checkpoint.load(self.run.last)
        self.learner.load_state_dict(state)
        self._note("rolled_back", to_epoch=state["epoch"], to_step=state["step_in_epoch"], **where)

    def _too_large(self) -> str:
        height, width = self.recipe.size
        parts, share = self.learner.accumulate, self.recipe.batch // self.ranks.world
        more = f"accumulate={2 * parts}" if self.ranks.many else f"accumulate={2 * parts} or 'auto'"
        smaller = f"{more}, or with a smaller batch or size" if 2 * parts <= share else "a smaller size, or recipe"
        return (
            f"{share} images of {height} x {width} in {parts} part(s) do not fit into the memory of {self.device}. "
            f"Train with {smaller}."
        )

    # ------------------------------------------------------------------ evaluation
    def _evaluate(self) -> float | None:
        """The AP of the averaged weights; None if it is not this epoch's turn or there is nothing to find."""
        last = self.epoch + 1 == self.timeline.total
        if "val" not in self.splits or (not last and (self.epoch + 1) % self.plan.evaluate_every):
            return None
        started = time.monotonic()
        metrics = self._measure()
        seconds = {"train_s": round(self.epoch_s, 2), "evaluate_s": round(time.monotonic() - started, 2)}
        if self.ranks.main:
            self._record("epoch", self.global_step, **seconds, **metrics)
        best = "  best" if metrics["AP"] > (self.tracker.best or 0) else ""
        self.progress.line(
            f"epoch {self.epoch + 1:>3}/{self.timeline.total}  {self.timeline.stage(self.epoch):<7}  "
            f"AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  AP75 {metrics['AP75']:.3f}  "
            f"{sum(seconds.values()):.0f} s{best}"
        )
        return metrics["AP"] if math.isfinite(metrics["AP"]) else None

    def _measure(self) -> dict[str, Any]:
        from deimkit.evaluation.measure import measure

        batch = max(1, min(2 * self.recipe.batch // self.learner.accumulate, 32))
        while True:
            try:
                return measure(
                    cast(Detector, self.learner.ema.model),
                    self.splits["val"],
                    size=self.recipe.size,
                    batch=batch,
                    device=self.device,
                    workers=min(self.loader.workers, len(self.splits["val"]) // VAL_PER_WORKER),
                    note=self.progress.note,
                    ranks=self.ranks,
                )
            except DataError as error:
                self._drop("val", error)
            except torch.OutOfMemoryError:
                if batch == 1 or self.ranks.many:
                    raise
                batch //= 2

    def _return_to_best(self) -> None:
        """Take up the best weights from before the clean stage again, as the published two-stage solver does."""
        self.learner.load_state_dict(checkpoint.load(self.stage1))
        self._note("returned_to_best", epoch=self.epoch)

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
        """Write the state down, in one process; every other goes on when it is there."""
        self._write(lambda: checkpoint.save(path, self._state()))

    def _write(self, write: Callable[[], Any]) -> None:
        """Let the first process write something, and go on when it is there."""
        self._in_all(lambda: write() if self.ranks.main else None)

    def _in_all(self, write: Callable[[], Any]) -> None:
        """Let every process write something; what fails in one fails in all."""
        failure = None
        try:
            write()
        except CheckpointError as error:
            failure = error
        self.ranks.agree(failure)

    def _keep(self, save: str | None) -> None:
        """Save the newest state, and keep it as the best, and as stage 1's best, where the tracker says so."""
        if save:
            self._save(self.best)
        if save == "stage1":
            self._write(lambda: checkpoint.copy(self.best, self.stage1))
        self._save(self.run.last)

    def _state(self) -> dict[str, Any]:
        return {
            "recipe": repr(self.recipe),
            "categories": self.categories.to_dict(),
            "size": list(self.recipe.size),
            "versions": versions(),
            **self.learner.state_dict(),
            **{name: getattr(self, name) for name in POSITION},
            "tracker": asdict(self.tracker),
            "probe": self.probe.state_dict(),
            "dropped": self.dropped,
            "accumulate": self.learner.accumulate,
            **random_state(self.device),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint of this very run."""
        if state["recipe"] != repr(self.recipe):
            raise DeimkitError(
                f"{self.run.last} was trained with another recipe than {self.folder / 'recipe.py'} asks for. "
                "Resume with the same recipe, or start a new run with weights=that checkpoint."
            )
        if state["categories"] != self.categories.to_dict():
            raise DataError(
                f"{self.run.last} was trained for {len(state['categories']['names'])} classes, and {self.plan.data} "
                f"now has {len(self.categories)}, or others. Mend the dataset, or start a new run with weights=that "
                "checkpoint."
            )
        self.learner.load_state_dict(state)
        for name in POSITION:
            setattr(self, name, state[name])
        self.tracker = BestTracker(**state["tracker"])
        if "probe" in state:  # older checkpoints have none, and the comparison of epochs begins anew
            self.probe.load_state_dict(state["probe"])
        self.dropped = state["dropped"]
        if self.plan.accumulate == "auto":
            self.learner.accumulate = state.get("accumulate", 1)
        for name, images in self.dropped.items():
            self.splits[name] = self.splits[name].without(images)
        set_random_state(state, self.device)

    # ------------------------------------------------------------------ surroundings
    def _memory(self) -> float:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return round(peak_memory() / 2**20, 1)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into "save, then leave"; a second one leaves at once."""

        def leave(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before: dict[signal.Signals, Any] = {}
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
