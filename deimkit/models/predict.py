"""Whatever holds pictures, a path, a folder, an array, a video, becomes the objects in them."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from deimkit.data.images import IMAGE_SUFFIXES, from_pil, read_image
from deimkit.errors import DataError, DeimkitError
from deimkit.structures import Detections

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}


def predict(
    detector: Any,
    source: Any,
    threshold: float = 0.5,
    batch: int = 8,
    size: int | tuple[int, int] | None = None,
) -> Detections | list[Detections] | Iterator[Detections]:
    """The objects that `detector` sees in `source`, in pixels of the original image.

    source: the path of an image, of a folder or a glob of images, or of a video; a picture as (H, W, 3) or (H, W) uint8
    array, as (3, H, W) tensor (uint8, or float in [0, 1]) or as PIL image; or a list of any of these.
    threshold: the least score, in [0, 1]. batch: images at a time. size: pixels or (height, width) the images are
    resized to, by default the detector's; the aspect ratio is not kept, as in training.

    Returns `Detections` for one picture, a list for many (a folder in natural order), and for a video an iterator
    that yields one `Detections` per frame and holds no more than a batch of them. Runs where the detector's weights
    are and leaves the detector in the mode it was in. Raises `DataError` naming what cannot be read.
    """
    if not 0 <= threshold <= 1:
        raise DeimkitError(f"threshold must be in [0, 1]; got {threshold}. A percentage? Divide by 100.")
    if batch < 1:
        raise DeimkitError(f"batch must be at least 1; got {batch}.")
    if size is None:
        size = getattr(detector, "size", (640, 640))
    height_width = (size, size) if isinstance(size, int) else size

    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return _stream(detector, _frames(_open_video(Path(source).expanduser())), threshold, batch, height_width)
    pictures, many = _pictures(source)
    found = list(_stream(detector, pictures, threshold, batch, height_width))
    return found if many else found[0]


def prepare(image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """An (H, W, 3) image as the (3, height, width) bytes that a detector is shown: bilinear, antialiased, stretched."""
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)


def pixels(picture: Any) -> NDArray[np.uint8]:
    """Any single picture that `predict` takes as an (H, W, 3) uint8 RGB array."""
    match picture:
        case str() | Path():
            return read_image(picture)
        case Image.Image():
            return from_pil(picture)
        case Tensor():
            return _from_tensor(picture)
        case np.ndarray():
            return _from_array(picture)
    raise DataError(
        f"Expected a picture as path, uint8 array, tensor or PIL image; got {type(picture).__name__}. "
        "Folders, globs and videos are given alone, not in a list."
    )


def _stream(
    detector: Any, pictures: Iterable[Any], threshold: float, batch: int, size: tuple[int, int]
) -> Iterator[Detections]:
    """Detections in the order of `pictures`, of which no more than `batch` are held at once."""

    def load(picture: Any) -> tuple[Tensor, tuple[int, int]]:
        image = pixels(picture)
        return prepare(image, size), image.shape[:2]

    rest = iter(pictures)
    with ThreadPoolExecutor(min(4, batch)) as pool:  # decoding and resizing release Python's lock
        while chunk := list(islice(rest, batch)):
            images, sizes = zip(*pool.map(load, chunk), strict=True)
            for picture, found in zip(chunk, detector.detect(torch.stack(images), torch.tensor(sizes)), strict=True):
                yield replace(found.above(threshold), image=picture)


@contextmanager
def predicting(detector: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in detector.modules()] if isinstance(detector, nn.Module) else []
    detector.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _pictures(source: Any) -> tuple[list[Any], bool]:
    """The pictures that `source` stands for, and whether it is of a kind that can hold many."""
    if isinstance(source, (str, Path)):
        return _files(Path(source).expanduser())
    if isinstance(source, Iterable) and not isinstance(source, (np.ndarray, Tensor, Image.Image)):
        return list(source), True
    return [source], False


def _files(path: Path) -> tuple[list[Any], bool]:
    """The same for a path: one file, the images of a folder, or those that a glob matches."""
    if path.is_file():
        return [path], False
    if path.is_dir():
        inside = list(path.iterdir())
    elif glob.has_magic(str(path)):
        inside = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise _missing(path)
    images = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
    if not images:
        others = sorted({file.suffix or file.name for file in inside})[:5]
        raise DataError(
            f"Expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {str(path)!r}; got "
            + (f"only {', '.join(others)}. A folder is not searched recursively: '**/*.jpg' is." if others else "none.")
        )
    return sorted(images, key=_natural), True


def _natural(path: Path) -> list[Any]:
    """A key by which image 2 comes before image 10."""
    parts = re.split(r"([0-9]+)", str(path).lower())  # text, number, text, ...
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"No folder {str(folder)!r} to find {path.name!r} in; the working folder is {os.getcwd()!r}.")
    files = sorted(folder.iterdir())
    close = difflib.get_close_matches(path.stem, [file.stem for file in files], n=3)
    near = [repr(file.name) for file in files if file.stem in close]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    return DataError(f"No image, folder or video {path.name!r} in {str(folder.resolve())!r}.{hint}")


def _from_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3:
        raise DataError(f"A tensor must be one (3, H, W) image; got {tuple(image.shape)}. A batch? list(tensor).")
    image = image.detach()
    if image.is_floating_point():
        if not ((image >= 0) & (image <= 1)).all():
            raise DataError(
                f"A float tensor must be in [0, 1]; got {float(image.min())} to {float(image.max())}. "
                "Of 0 to 255? Divide by 255. Normalised? Undo it: the detector takes plain pixels."
            )
        image = (image * 255).round().byte()
    return _from_array(image.permute(1, 2, 0).cpu().numpy())  # (3, H, W) -> (H, W, 3)


def _from_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, 2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"An array must be one (H, W, 3) or (H, W) image; got {image.shape}. "
            "Channels first? image.transpose(1, 2, 0). Alpha? image[..., :3]. A batch? list(array)."
        )
    if image.dtype != np.uint8:
        raise DataError(
            f"An array must hold uint8 pixels in [0, 255]; got {image.dtype}. "
            "Floats in [0, 1]? (image * 255).round().astype('uint8')."
        )
    return np.ascontiguousarray(image)


def _open_video(path: Path) -> Any:
    """OpenCV's reader of a video file."""
    if not path.is_file():
        raise _missing(path)
    try:
        import cv2
    except ImportError as error:
        raise DeimkitError("Videos are read with OpenCV, which is missing: pip install 'deimkit[video]'.") from error
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise DataError(f"{str(path)!r} cannot be read as a video. Convert it, for example to H.264 in an .mp4 file.")
    return video


def _frames(video: Any) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video as RGB arrays, one at a time."""
    try:
        while True:
            more, frame = video.read()
            if not more:
                return
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV's BGR to RGB
    finally:
        video.release()
