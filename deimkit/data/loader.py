"""The loader: a split becomes batches, the same ones whoever loads them and wherever one starts.

What a batch holds is a function of (seed, epoch, step) alone, not of the number of workers or of whether the run was
resumed: workers share no state, each of their tasks says all they need to know.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deimkit.data.augment import Augment, Boxes, Labels, Pixels, Sample, resize, to_fractions, to_tile
from deimkit.data.split import Split
from deimkit.errors import DataError, RecipeError
from deimkit.structures import Batch, Targets


class Clock(Protocol):
    """What the loader asks of a timeline; `deimkit.training.timeline.Timeline` is one."""

    def stage(self, epoch: int) -> str:
        """The augmentation stage of an epoch: "warm", "dense", "augment" or "clean"."""

    def multi_scale(self, epoch: int) -> bool:
        """Whether the batches of an epoch vary in size."""


@dataclass(frozen=True)
class Always:
    """The clock that stands still: every epoch is of one stage."""

    name: str = "augment"
    varied: bool = True

    def stage(self, epoch: int) -> str:
        """The one stage."""
        return self.name

    def multi_scale(self, epoch: int) -> bool:
        """Whether sizes may vary; they do if the augmentation has a list of them."""
        return self.varied


class Task(NamedTuple):
    """A step of an epoch: which images, in which stage, and what was decided for the whole batch."""

    epoch: int
    stage: str
    indices: list[int]
    mix: float | None = None
    size: tuple[int, int] | None = None


class Pictures:
    """A split as a source of samples, which keeps the images it has decoded up to a number of bytes.

    What came first stays: where every epoch visits every image, the least recently used one is the next to be needed.
    Crowd annotations and boxes without area are left out, and boxes are clipped to the image.
    """

    def __init__(self, split: Split, cache_bytes: int) -> None:
        self.split = split
        self.sizes = np.array(split.sizes, np.int64).reshape(-1, 2)  # as annotated, until the file has been seen
        self.room = cache_bytes
        self.kept: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self.split)

    def sample(self, index: int) -> Sample:
        """Image `index` at its own size."""
        image = self._image(index)
        rows = self.split.rows(index)
        height, width = image.shape[:2]
        boxes = np.clip(self.split.boxes[rows], 0, np.array([width, height] * 2, np.float32))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1) & ~self.split.crowd[rows]
        return Sample(image, boxes[keep], self.split.labels[rows][keep])

    def tile(self, index: int, side: int) -> Sample:
        """Image `index` with its shorter side resized to `side` pixels."""
        return to_tile(self.sample(index), side)

    def _image(self, index: int) -> Pixels:
        if index in self.kept:
            return self.kept[index]
        image = self.split.image(index)
        self.sizes[index] = image.shape[:2]
        if image.nbytes <= self.room:
            self.room -= image.nbytes
            self.kept[index] = image
        return image


class Found(NamedTuple):
    """What is in an image. boxes: (n, 4) cxcywh fractions. labels: (n,)."""

    boxes: Boxes
    labels: Labels

    @staticmethod
    def joined(parts: list[Found]) -> Found:
        """All of it in one."""
        boxes = [np.empty((0, 4), np.float32), *(part.boxes for part in parts)]
        labels = [np.empty(0, np.int64), *(part.labels for part in parts)]
        return Found(np.concatenate(boxes), np.concatenate(labels))


class Assembler(Dataset[Any]):
    """Turns a `Task` into the tensors of a batch; this is what lives in a worker process."""

    def __init__(self, pictures: Pictures, size: tuple[int, int], augment: Augment | None, seed: int) -> None:
        self.pictures = pictures
        self.size = size
        self.augment = augment
        self.seed = seed

    def __getitem__(self, task: Task) -> dict[str, Tensor] | DataError:
        """The tensors of a `Batch` and its `Targets` by name, or the error that names the file at fault.

        images is (B, 3, H, W) uint8 with the channels of a pixel side by side, as decoders write and GPUs read them.
        """
        shape = (len(task.indices), 3, *self.size)
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        found = []
        for index, image in zip(task.indices, images, strict=True):
            try:
                found.append(self._fill(image.permute(1, 2, 0).numpy(), index, task))
            except DataError as error:
                return error
            except Exception as error:
                error.add_note(f"while loading {self.pictures.split.paths[index]}")
                raise
        if task.mix is not None:  # every image also gets the objects of the one before it, which will shine through
            found = [Found.joined([own, other]) for own, other in zip(found, found[-1:] + found[:-1], strict=True)]
        rows = Found.joined(found)
        columns = {
            "image": np.repeat(np.arange(len(found)), [len(f.labels) for f in found]),
            "labels": rows.labels,
            "boxes": rows.boxes,
            "sizes": self.pictures.sizes[task.indices],
        }
        return {"images": images} | {name: torch.from_numpy(column) for name, column in columns.items()}

    def _fill(self, out: Pixels, index: int, task: Task) -> Found:
        """Write image `index` into `out` (H, W, 3) and return what is in it."""
        if self.augment is not None:
            rng = _random(self.seed, task.epoch, _SAMPLE, index)
            return Found(*self.augment.sample(self.pictures, index, task.stage, rng, out))
        image, boxes, labels = self.pictures.sample(index)
        out[:] = resize(image, self.size)
        return Found(to_fractions(boxes, *image.shape[:2]), labels)


_ORDER, _STEP, _SAMPLE = range(3)  # the third part of a random number's key: what it decides


def _random(*key: int) -> Generator:
    """Random numbers that depend on the key alone."""
    return np.random.default_rng(key)


class Loader:
    """The batches of a split, epoch by epoch.

    For training give it `augment` and a `timeline`. Without `augment` it is the loader of evaluation: every image once
    and in order, resized exactly as Pillow does, with all its boxes but crowds.

    split: such as `Dataset.train`. batch: images per step, over all ranks. size: (height, width), or one side.
    timeline: says of an epoch which stage it is and whether sizes vary; None is `Always()`. shuffle, drop_last: None is
    what training or evaluation wants. A split smaller than one batch still gives one, smaller, batch per epoch.
    workers: processes that load, until `close`; 0 loads while the caller waits. cache_bytes: how many bytes of decoded
    images to keep, in all workers together (None: a gibibyte for training); what comes out is the same without.

    rank, world: rank r gets the r-th of `world` consecutive slices of the batch that a single process would get, with
    the same MixUp weight and size; only the image that is blended into the slice's first one is another (the slice's
    last). Where images run short, at the end of an evaluation, a slice has one less, and may be empty.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        size: int | tuple[int, int],
        augment: Augment | None = None,
        timeline: Clock | None = None,
        seed: int = 0,
        workers: int = 0,
        drop_last: bool | None = None,
        shuffle: bool | None = None,
        rank: int = 0,
        world: int = 1,
        cache_bytes: int | None = None,
    ) -> None:
        if not len(split):
            raise DataError(f"A loader needs at least one image; the split {split.name!r} has none.")
        if batch < 1 or batch % world or not 0 <= rank < world:
            raise RecipeError(
                f"Expected a batch that is a multiple of world={world} and a rank in [0, {world}); "
                f"got batch={batch} and rank={rank}."
            )
        self.split = split
        self.batch = batch
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.augment = augment
        self.timeline = timeline or Always()
        self.seed = seed
        self.workers = workers
        self.drop_last = augment is not None if drop_last is None else drop_last
        self.shuffle = augment is not None if shuffle is None else shuffle
        self.rank, self.world = rank, world
        if cache_bytes is None:
            cache_bytes = 0 if augment is None else 1 << 30
        self.assembler = Assembler(Pictures(split, cache_bytes // max(workers, 1)), self.size, augment, seed)
        self._tasks: list[Task] = []
        self._processes: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Steps per epoch."""
        n = len(self.split)
        return max(n // self.batch, 1) if self.drop_last else ceil(n / self.batch)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on: bytes and decisions, for `Batch.finish` on the device.

        Raises `DataError` naming the file if an image cannot be read; another call may go on at the step after it.
        """
        tasks = self.plan(epoch)[start:]
        for task, parts in zip(tasks, self._assembled(tasks), strict=True):
            if isinstance(parts, DataError):
                raise parts
            yield Batch(
                images=parts["images"],
                targets=Targets(parts["image"], parts["labels"], parts["boxes"]),
                ids=[self.split.ids[i] for i in task.indices],
                names=[Path(self.split.paths[i]).name for i in task.indices],
                sizes=parts["sizes"],
                mix=task.mix,
                size=task.size,
            )

    def plan(self, epoch: int) -> list[Task]:
        """What every step of an epoch will do, on this rank."""
        n = len(self.split)
        order = _random(self.seed, epoch, _ORDER).permutation(n) if self.shuffle else np.arange(n)
        return [self._task(epoch, step, order) for step in range(len(self))]

    def _task(self, epoch: int, step: int, order: NDArray[np.int64]) -> Task:
        batch = order[step * self.batch : (step + 1) * self.batch]
        mine = np.array_split(batch, self.world)[self.rank].tolist()
        stage = self.timeline.stage(epoch)
        if self.augment is None:
            return Task(epoch, stage, mine)
        rng = _random(self.seed, epoch, _STEP, step)
        mix = self.augment.mixed(stage, rng)
        size = self.augment.resized(self.size, rng) if self.timeline.multi_scale(epoch) else None
        return Task(epoch, stage, mine, mix if len(mine) > 1 else None, size)

    def _assembled(self, tasks: list[Task]) -> Iterator[dict[str, Tensor] | DataError]:
        """The tensors of each task, in order."""
        if not self.workers:
            return map(self.assembler.__getitem__, tasks)
        if self._processes is None:
            self._processes = DataLoader(
                self.assembler,
                batch_size=None,
                sampler=self._tasks,
                num_workers=self.workers,
                persistent_workers=True,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # its own, so that loading does not draw from torch's global one
                worker_init_fn=_heed_no_signal,
            )
        self._tasks[:] = tasks
        return iter(self._processes)

    def close(self) -> None:
        """End the worker processes; the next epoch would start new ones."""
        self._processes = None


def _heed_no_signal(worker: int) -> None:
    """Leave it to the training to end this process: it still needs a batch or two, when all are told to leave.

    A second SIGTERM is for this one alone, from whoever finds that it hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _as_is(parts: Any) -> Any:
    return parts
