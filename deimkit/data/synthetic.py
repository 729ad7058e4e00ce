"""The dataset that is always there: procedural scenes of textured shapes, drawn on first use and the same everywhere.

Small objects, occlusion, truncation, colours that hint at the class but do not tell, clutter that looks almost like an
object, uneven light, and a few images with nothing to find: enough for one training method to do better than another
within minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deimkit.data.scenes import SHAPES, Scene, draw
from deimkit.errors import DataError

VERSION = 2  # part of the folder's name; counts up when the pixels change
CLASSES = tuple(SHAPES)


@dataclass(frozen=True)
class Synthetic:
    """A dataset of drawn scenes; equal values draw equal pixels.

    train, val: how many images. size: their side in pixels, at least 32. seed: any integer >= 0. classes: some of
    `CLASSES`. Each image has 5 to 25 objects, one in thirty none. `DataError` if that cannot be drawn.
    """

    train: int = 400
    val: int = 100
    size: int = 192
    seed: int = 0
    classes: tuple[str, ...] = CLASSES

    def __post_init__(self) -> None:
        unknown = [name for name in self.classes if name not in SHAPES]
        if unknown or not self.classes:
            raise DataError(
                f"Synthetic.classes must be some of {', '.join(CLASSES)}; got {', '.join(unknown) or 'none'}."
            )
        if min(self.train, self.val) < 1 or self.size < 32 or self.seed < 0:
            raise DataError(f"Synthetic needs train >= 1, val >= 1, size >= 32 and seed >= 0; got {self!r}.")

    def scene(self, split: str, index: int) -> Scene:
        """Image `index` of "train" or "val" with its objects; it does not depend on any other image."""
        return draw((VERSION, self.seed, ("train", "val").index(split), index), self.size, self.classes)

    def write_once(self, root: str | Path) -> Path:
        """Draw the dataset into `root`/synthetic-<version> unless it is there already; returns that folder."""
        return self.write(Path(root) / f"synthetic-{VERSION}")

    def write(self, folder: str | Path) -> Path:
        """Draw the dataset into `folder` in COCO form, complete or not at all; one that is there already is kept.

        Raises `DataError` if the folder holds something else.
        """
        folder = Path(folder)
        if folder.exists():
            self._expect_at(folder)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (draft / "annotations").mkdir()
            for split, count in (("train", self.train), ("val", self.val)):
                self._write_split(draft, split, count)
            draft.chmod(0o755)
            os.rename(draft, folder)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not folder.exists():  # it does if another process was faster
                raise
            self._expect_at(folder)
        return folder

    def _expect_at(self, folder: Path) -> None:
        """Raise `DataError` unless `folder` holds what this value draws."""
        file = folder / "annotations" / "instances_train.json"
        found = json.loads(file.read_text())["info"]["description"] if file.is_file() else "something else"
        if found != self._description:
            raise DataError(
                f"{folder} must be free or hold {self._description}; it holds {found}. Choose another folder."
            )

    @property
    def _description(self) -> str:
        return f"{self!r}, version {VERSION}"

    def _write_split(self, folder: Path, split: str, count: int) -> None:
        """Write the images and the annotation file of one split."""
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = self.scene(split, index)
            name = f"{index:05d}.png"
            Image.fromarray(scene.image).save(folder / split / name, compress_level=1)
            images.append({"id": index + 1, "file_name": name, "width": self.size, "height": self.size})
            for (x1, y1, x2, y2), label, area in zip(
                scene.boxes.tolist(), scene.labels.tolist(), scene.areas.tolist(), strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        content = {
            "info": {"description": self._description},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
