"""Whatever a file holds, the detector sees upright 8-bit RGB.

Every reader of pixels goes through here, so that training, prediction and the doctor see the same picture: the EXIF
orientation applied once, transparency laid on white, and 16 bits scaled to 8 instead of clipped.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deimkit.errors import DataError

Pixels = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm"})

# A panorama of 12,000 x 6,000 is 72 million pixels. Beyond this a small file may claim more memory than there is.
MAX_PIXELS = 178_956_970

# What Pillow raises for files that are damaged in one way or another, and for those that are no images at all.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_ORIENTATION = 0x0112  # the EXIF tag
_MOVED = range(2, 9)  # its values that mirror or turn the picture
_TURNED = range(5, 9)  # those that exchange height and width


def read_image(path: str | Path, data: bytes | None = None) -> Pixels:
    """The image at `path` as it should be looked at: (H, W, 3) uint8 RGB.

    EXIF orientation is applied. Gray, palette and CMYK images become RGB as Pillow converts them; transparent pixels
    are laid on white; 16-bit gray is scaled by 255 / 65535; floating-point images must lie in [0, 1]. The first frame
    of several counts. data: the content of the file, if it is already at hand. Raises `DataError` naming the file if
    it is missing, truncated, no image, or larger than `MAX_PIXELS`.
    """
    with _opened(path, data) as image:
        return from_pil(image, path)


def from_pil(image: Image.Image, name: str | Path = "the image") -> Pixels:
    """An opened image as `read_image` shows it: upright, (H, W, 3) uint8 RGB. name: what an error calls it."""
    upright = ImageOps.exif_transpose(image) if _orientation(image) in _MOVED else image
    return np.array(_rgb(upright, name))  # a copy: what Pillow lends may not be written to


def image_size(path: str | Path, data: bytes | None = None) -> tuple[int, int]:
    """Height and width of the image at `path` after EXIF orientation, from its header alone.

    Raises `DataError` naming the file.
    """
    with _opened(path, data) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _TURNED else (height, width)


def is_rotated(path: str | Path, data: bytes | None = None) -> bool:
    """True if the EXIF orientation of the image at `path` asks for it to be turned or mirrored."""
    with _opened(path, data) as image:
        return _orientation(image) in _MOVED


@contextmanager
def _opened(path: str | Path, data: bytes | None) -> Iterator[Image.Image]:
    """The image at `path`, not yet decoded; what goes wrong with it inside the block becomes a `DataError`."""
    try:
        with Image.open(io.BytesIO(data) if data is not None else path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read. "
                    "Cut it into tiles."
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected an image.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; expected an image.") from None
    except PermissionError:
        raise DataError(f"{path} may not be read; expected an image. Change its permissions.") from None
    except Image.UnidentifiedImageError:
        what = "is empty" if _is_empty(path, data) else "is not an image that Pillow knows"
        raise DataError(f"{path} {what}. Copy the file again, or take it out of the dataset.") from None
    except _DAMAGE as error:
        raise DataError(
            f"{path} cannot be read: {_said(error)}. Copy the file again, or take it out of the dataset."
        ) from error


def _is_empty(path: str | Path, data: bytes | None) -> bool:
    return (len(data) if data is not None else Path(path).stat().st_size) == 0


def _said(error: BaseException) -> str:
    """What an error says, without a full stop; its type if it says nothing."""
    return str(error).strip().rstrip(".") or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation from the header; the PNG class's own `getexif` would decode the whole image for it."""
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


def _rgb(image: Image.Image, path: str | Path) -> Image.Image | Pixels:
    """The image in RGB, whatever its mode."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_eight_bits(image, path)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, path: str | Path) -> Pixels:
    """A gray image of 16 bits or of fractions, scaled to 8 bits: (H, W)."""
    gray = np.asarray(image).astype(np.float64)
    top, what = (1.0, "fractions") if image.mode == "F" else (65535.0, "16-bit values")
    if not (np.isfinite(gray).all() and gray.min() >= 0 and gray.max() <= top):
        raise DataError(
            f"{path} must hold {what} in [0, {top:g}]; got [{gray.min():g}, {gray.max():g}]. Save it as an 8-bit image."
        )
    return np.rint(gray * (255 / top)).astype(np.uint8)
