"""How many images a core prepares per second in each stage of training, beside the published chain of transforms."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from deimkit.data.augment import Augment
from deimkit.data.loader import Always, Loader
from deimkit.data.split import CategoryMap, Split
from tests.bench.paired import Row, paired

IMAGES, BATCH, SIZE = 48, 16, 640


def photos(folder: Path) -> Split:
    """Procedural scenes of 640 x 480 as JPEG files of about 150 KB, as COCO's are, with about seven boxes each."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:03}.jpg" for i in range(IMAGES)]
    boxes = [_paint(path, rng) for path in paths]
    n = sum(map(len, boxes))
    return Split(
        name="photos",
        categories=CategoryMap.of(80),
        ids=list(range(IMAGES)),
        paths=paths,
        sizes=np.full((IMAGES, 2), (480, 640), np.int32),
        boxes=np.concatenate(boxes),
        labels=rng.integers(0, 80, n),
        crowd=np.zeros(n, bool),
        areas=np.zeros(n),
        starts=np.cumsum([0, *map(len, boxes)]),
        annotation_ids=np.arange(n),
    )


def _paint(path: Path, rng: np.random.Generator) -> NDArray[np.float32]:
    """Write one scene, a soft background with sharp shapes and sensor noise, and return its boxes."""
    soft = Image.fromarray(rng.integers(40, 216, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(soft)
    low = rng.integers(0, (560, 400), (rng.integers(3, 12), 2))
    boxes = np.concatenate([low, low + rng.integers(20, 80, low.shape)], 1).astype(np.float32)
    for box in boxes.tolist():
        draw.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    noisy = np.asarray(soft) + rng.normal(0, 15, (480, 640, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return boxes


class Published:
    """The transforms in the published order, of torchvision v2 on Pillow images; one process, one thread."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.colour = v2.RandomPhotometricDistort(p=0.5)
        self.geometry = v2.Compose([v2.RandomZoomOut(fill=0), v2.RandomApply([v2.RandomIoUCrop()], p=0.8)])
        self.tail = v2.Compose(
            [
                v2.SanitizeBoundingBoxes(min_size=1),
                v2.RandomHorizontalFlip(),
                v2.Resize([SIZE, SIZE]),
                v2.SanitizeBoundingBoxes(min_size=1),
            ]
        )
        self.shorten = v2.Resize(320)
        self.turn = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.5, 1.5))

    def read(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        image = Image.open(self.split.paths[i]).convert("RGB")
        rows = self.split.rows(i)
        boxes = BoundingBoxes(torch.from_numpy(self.split.boxes[rows]), format="XYXY", canvas_size=(480, 640))
        return image, {"boxes": boxes, "labels": torch.from_numpy(self.split.labels[rows])}

    def mosaic(self, i: int) -> tuple[Image.Image, dict[str, Any]]:
        tiles = [self.shorten(*self.read(k)) for k in (i, *(random.randrange(IMAGES) for _ in range(3)))]
        w, h = (max(image.size[axis] for image, _ in tiles) for axis in (0, 1))
        canvas, boxes = Image.new("RGB", (2 * w, 2 * h)), []
        for (image, target), corner in zip(tiles, ((0, 0), (w, 0), (0, h), (w, h)), strict=True):
            canvas.paste(image, corner)
            boxes.append(target["boxes"].as_subclass(torch.Tensor) + torch.tensor(corner * 2))
        joined = BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(2 * h, 2 * w))
        return self.turn(canvas, {"boxes": joined, "labels": torch.cat([target["labels"] for _, target in tiles])})

    def sample(self, i: int, stage: str) -> tuple[torch.Tensor, dict[str, Any]]:
        if stage == "dense" and random.random() < 0.5:
            image, target = self.colour(*self.mosaic(i))
        elif stage != "clean":
            image, target = self.geometry(*self.colour(*self.read(i)))
        else:
            image, target = self.read(i)
        image, target = self.tail(image, target)
        boxes = F.convert_bounding_box_format(target["boxes"], new_format="CXCYWH").as_subclass(torch.Tensor) / SIZE
        return F.pil_to_tensor(image).float() / 255, {"boxes": boxes, "labels": target["labels"]}

    def batch(self, indices: list[int], stage: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        images, targets = zip(*(self.sample(i, stage) for i in indices), strict=True)
        stacked = torch.stack(images)
        if stage == "dense" and random.random() < 0.5:
            weight = random.uniform(0.45, 0.55)
            stacked = stacked.roll(1, 0).mul_(1 - weight).add_(stacked.mul(weight))
        return stacked, list(targets)


def rows() -> Iterator[Row]:
    """One row per stage without a cache, and one with every image cached, as for a small dataset.

    Ours ends with bytes and decisions: division by 255 and MixUp's blend are left to the device (`Batch.finish`).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        split = photos(Path(folder))
        published = Published(split)
        for stage in ("clean", "dense", "augment"):
            for cache, note in ((0, "no cache"), (1 << 30, "all images cached")):
                loader = Loader(split, BATCH, SIZE, Augment(), Always(stage), cache_bytes=cache)
                ours, peer, ratio = paired(_epochs(loader), lambda: _epoch(published, stage), runs=3)  # noqa: B023
                yield Row(f"loader, {stage}, {note}", IMAGES / ours, IMAGES / peer, "images/s/core", ratio, "640 x 640")
    torch.set_num_threads(threads)


def _epochs(loader: Loader) -> Callable[[], None]:
    """A function that runs the next epoch each time it is called."""
    epochs = iter(range(1_000_000))

    def run() -> None:
        for _ in loader.epoch(next(epochs)):
            pass

    return run


def _epoch(published: Published, stage: str) -> None:
    for start in range(0, IMAGES, BATCH):
        published.batch(list(range(start, start + BATCH)), stage)
