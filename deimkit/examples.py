"""The detector that the labs look into: small, trained once on drawn scenes, and from then on there at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deimkit import __version__, api, recipes
from deimkit.data import synthetic
from deimkit.data.dataset import Dataset
from deimkit.data.synthetic import Synthetic
from deimkit.errors import DeimkitError
from deimkit.recipes.recipe import Recipe
from deimkit.training.progress import Progress, Silent
from deimkit.training.run import Run
from deimkit.weights.addresses import cache_folder

SCENES = "scenes"  # in the folder of the run: the dataset that it learned


@dataclass(frozen=True)
class Lesson:
    """What an example learns, from which scenes, and how long it takes on two quiet cores, in words."""

    recipe: Recipe
    scenes: Synthetic
    takes: str

    @property
    def folder(self) -> Path:
        """Where its run is kept: beside fetched weights, in a folder that no other lesson shares."""
        taught = f"{self.recipe!r} {self.scenes!r} {synthetic.VERSION} {__version__}"
        digest = hashlib.sha256(taught.encode()).hexdigest()[:8]
        return cache_folder().parent / "examples" / f"{self.recipe.name}-{self.recipe.timeline.total}-{digest}"


# Images are only flipped: so few steps teach more when they are easy (AP 20 after 6 epochs; with mosaics 3 after 7).
_TINY = recipes.get("tiny")
_END = _TINY.timeline.total
_PLAIN = replace(_TINY, timeline=replace(_TINY.timeline, warm=_END, dense=_END, augment=_END))

FULL = Lesson(_PLAIN.fit_to(400, epochs=6, lr=3e-3), Synthetic(), "four minutes")
FAST = Lesson(_PLAIN.fit_to(160, epochs=3, lr=3e-3), Synthetic(train=160, val=40), "one minute")


def example(fast: bool | None = None, progress: bool = True) -> Run:
    """The run of a tiny detector that knows the synthetic scenes: trained once, kept, and there at once ever after.

    What it learned is `Dataset.open(run.folder / "scenes")`. It is kept in `~/.cache/deimkit/examples`, or where
    `DEIMKIT_CACHE` says, and trained anew when its recipe changes. fast: a much shorter training that finds little,
    with a folder of its own; by default if the environment says DEIMKIT_FAST=1. progress: say how far it is. A process
    that asks while another one trains it waits; one that was interrupted goes on. Needs no network. Raises
    `DeimkitError` if it cannot be kept there, or was stopped before its end.
    """
    if fast is None:
        fast = os.environ.get("DEIMKIT_FAST", "0") not in ("", "0")
    lesson = FAST if fast else FULL
    folder = lesson.folder
    if not _learned(folder):
        try:
            with _alone(folder, Progress() if progress else Silent()) as shown:
                _learn(lesson, folder, shown, progress)
        except OSError as error:
            raise DeimkitError(
                f"{folder} cannot hold the example ({error}). Set DEIMKIT_CACHE to a folder that can."
            ) from error
    return Run(folder)


def _learned(folder: Path) -> bool:
    """Whether the run in `folder` is there and was trained to its end."""
    return (folder / "run.json").is_file() and Run(folder).finished


@contextmanager
def _alone(folder: Path, shown: Progress) -> Iterator[Progress]:
    """A block that one process is in at a time; the others say that they wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            shown.line(f"another process is training the example; waiting until it is in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield shown
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # which a forked loader that lingers would keep otherwise


def _learn(lesson: Lesson, folder: Path, shown: Progress, progress: bool) -> None:
    """Draw the scenes and train the run, or whatever is left to do of that."""
    if _learned(folder):  # by the process that this one waited for
        return
    shown.line(f"training the example, once: about {lesson.takes} on two CPU cores; it is kept in {folder}")
    data = Dataset.open(lesson.scenes.write(folder / SCENES))
    if (folder / "run.json").is_file():
        run = api.resume(folder, progress=progress, dataset=data)
    else:
        run = api.train(lesson.recipe, data, out=folder, device="cpu", progress=progress)
    if not run.finished:
        raise DeimkitError(f"The example in {folder} was stopped before its end. Ask again, and it goes on from there.")
