"""One training step of D-FINE-N beside transformers' on the same images: where its time goes, what memory it takes.

On a CPU 4 images of 320 px in float32, on a GPU also 32 of 640 px in bfloat16.
`python -m tests.bench.bench_step ours` (or `peer`) prints the peak memory of a process that trains three steps.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deimkit import recipes
from deimkit.data.augment import Augment
from deimkit.data.loader import Always, Loader
from deimkit.structures import Batch, Targets
from deimkit.training.machine import peak_memory
from deimkit.training.optim import EMA
from tests.bench.bench_loader import photos
from tests.bench.bench_models import peer as transformers_model
from tests.bench.paired import Row, paired, seconds

PARTS = ("forward", "losses", "backward", "optimiser")
PUBLISHED = dict(zip(PARTS, (393, 86, 556, 40), strict=True))  # ms, the authors' code on two cores like those we use
PUBLISHED_GB = 1.65  # its peak memory there
PER_IMAGE = 7  # targets, about COCO's mean


class Ours:
    """The whole step of a recipe: forward with denoising, matching and losses, backward, clip, AdamW, EMA."""

    def __init__(self, name: str, pixels: int, batch: int, device: str = "cpu") -> None:
        self.recipe = recipes.get(name).fit_to(118287, batch=batch, size=pixels)
        self.device = torch.device(device)
        self.model = self.recipe.build(80).to(self.device, memory_format=torch.channels_last).train()
        self.criterion = self.recipe.criterion()
        self.optimizer = self.recipe.optim.build(self.model)
        self.ema = EMA.of(self.model, self.recipe.timeline)
        self.spent: dict[str, list[float]] = {part: [] for part in PARTS}

    def __call__(self, batch: Batch) -> None:
        """Train on one batch, and keep the seconds of each part."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with self._timed("forward"), half(self.device):
            outputs = self.model(images, batch.targets)
        with self._timed("losses"):
            loss = torch.stack(list(self.criterion(outputs, batch.targets).values())).sum()
        with self._timed("backward"):
            loss.backward()
        with self._timed("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update(self.model)

    def _timed(self, part: str) -> Any:
        return Timed(self.spent[part], self.device)


class Timed:
    """Adds the seconds of a `with` block to a list, the GPU's included."""

    def __init__(self, spent: list[float], device: torch.device) -> None:
        self.spent, self.device = spent, device

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.spent.append(time.perf_counter() - self.start)


class Peer:
    """The same step of D-FINE in transformers: its own denoising and loss, backward, clip, AdamW (no EMA)."""

    def __init__(self, size: str, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = transformers_model(size).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __call__(self, batch: Batch) -> None:
        """Train on one batch."""
        t = batch.targets
        labels = [
            {"class_labels": t.labels[t.image == i], "boxes": t.boxes[t.image == i]} for i in range(len(batch.images))
        ]
        with half(self.device):
            loss = self.model(pixel_values=batch.images, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def half(device: torch.device) -> Any:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def noise(batch: int, pixels: int, device: str = "cpu") -> Batch:
    """Random images with random targets, the same every time."""
    draw = torch.Generator().manual_seed(0)
    image = torch.arange(batch).repeat_interleave(PER_IMAGE)
    boxes = torch.rand(len(image), 4, generator=draw) * 0.3 + 0.2
    targets = Targets(image, torch.randint(80, (len(image),), generator=draw), boxes)
    images = torch.rand(batch, 3, pixels, pixels, generator=draw)
    return Batch(images, targets, list(range(batch)), [f"{i}.jpg" for i in range(batch)]).to(device)


def rows() -> Iterator[Row]:
    """The step and its parts, its memory, and what Dense O2O adds to it."""
    yield from step("cpu", 320, 4)
    yield memory()
    yield from dense()
    if torch.cuda.is_available():
        yield from step("cuda", 640, 32)


def step(device: str, pixels: int, batch: int, runs: int = 7) -> Iterator[Row]:
    """The whole step beside transformers', then its parts."""
    ours, peer, images = Ours("dfine_n", pixels, batch, device), Peer("n", device), noise(batch, pixels, device)
    name = f"D-FINE-N step, {batch} x {pixels} px, {device}"
    mine, other, ratio = paired(lambda: ours(images), lambda: peer(images), runs=runs, warmup=2)
    yield Row(name, mine * 1e3, other * 1e3, "ms", ratio, "denoising, losses, AdamW, EMA; peer: transformers, no EMA")
    for part in PARTS:
        said = f"published code, on another such machine: {PUBLISHED[part]}" if device == "cpu" else ""
        yield Row(f"  {part}", median(ours.spent[part][2:]) * 1e3, None, "ms", None, said)


def memory() -> Row:
    """Peak memory of processes that do nothing but train three steps of 4 x 320 px on the CPU."""
    ours, peer = (
        float(subprocess.run([sys.executable, "-m", __name__, who], capture_output=True, text=True, check=True).stdout)
        for who in ("ours", "peer")
    )
    said = f"process maximum; published code, on another such machine: {PUBLISHED_GB} GB"
    return Row("D-FINE-N step, peak memory, 4 x 320 px, cpu", ours, peer, "GiB", peer / ours, said)


def dense(batches: int = 6) -> Iterator[Row]:
    """What the dense stage adds to a step of 4 x 320 px, in percent: in the training process, and by its targets."""
    with tempfile.TemporaryDirectory() as folder:
        split = photos(Path(folder))
        fetch: dict[str, float] = {}
        ready: dict[str, list[Batch]] = {}
        for stage in ("augment", "dense"):
            loader = Loader(split, 4, 320, Augment(tile=160), Always(stage, varied=False), workers=1)
            ready[stage], spent = [], []
            epoch = loader.epoch(0)
            ready[stage].append(next(epoch).finish())  # the worker has started
            for _ in range(batches):
                time.sleep(1.0)  # it is ahead, as enough workers always are
                spent.append(seconds(lambda: ready[stage].append(next(epoch).finish())))  # noqa: B023
            loader.close()
            fetch[stage] = median(spent)
    ours = Ours("deim_dfine_n", 320, 4)
    sparse, crowded, ratio = paired(_each(ours, ready["augment"]), _each(ours, ready["dense"]), runs=5)
    per_step = sparse / (batches + 1)
    added = 100 * (fetch["dense"] - fetch["augment"]) / per_step
    yield Row(
        "Dense O2O, enough workers: added by fetching", added, None, "% of a step", None, "MixUp's blend included"
    )
    targets = [sum(len(batch.targets) for batch in ready[stage]) for stage in ("augment", "dense")]
    said = f"{targets[1] / targets[0]:.1f} times as many targets"
    yield Row("Dense O2O: added by its targets", 100 * (ratio - 1), None, "% of a step", None, said)


def _each(train: Callable[[Batch], None], batches: list[Batch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            train(batch)

    return run


def main() -> None:
    """Train three steps and print this process's peak memory in GiB."""
    train = Ours("dfine_n", 320, 4) if sys.argv[1] == "ours" else Peer("n")
    for _ in range(3):
        train(noise(4, 320))
    print(peak_memory() / 2**30)


if __name__ == "__main__":
    main()
