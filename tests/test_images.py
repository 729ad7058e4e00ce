"""Every kind of file becomes upright 8-bit RGB, or one sentence that names it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deimkit.data import images
from deimkit.data.images import from_pil, image_size, is_rotated, read_image
from deimkit.errors import DataError

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [99, 99, 99], [200, 200, 200]]], np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def gray(*values: int) -> np.ndarray:
    """One row of gray RGB pixels."""
    return np.repeat(np.array(values, np.uint8)[None, :, None], 3, axis=2)


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    if transparent:
        image.info["transparency"] = 0
    return image


# What is stored, and the row of pixels that must be seen.
MODES: dict[str, tuple[Callable[[], Image.Image], np.ndarray]] = {
    "gray": (lambda: Image.fromarray(np.array([[0, 7, 255]], np.uint8)), gray(0, 7, 255)),
    "one bit": (lambda: Image.fromarray(np.array([[True, False]])), gray(255, 0)),
    "gray with alpha": (
        lambda: Image.fromarray(np.array([[[100, 255], [100, 0], [0, 51]]], np.uint8), "LA"),
        gray(100, 255, 204),
    ),
    "rgba": (
        lambda: Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8), "RGBA"),
        np.array([[[10, 20, 30], [255, 255, 255]]], np.uint8),
    ),
    "palette": (lambda: palette(False), np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)),
    "transparent palette": (lambda: palette(True), np.array([[[255, 255, 255], [40, 50, 60]]], np.uint8)),
    "16 bits": (lambda: Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)), gray(0, 1, 128, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, tmp_path: Path) -> None:
    make, expected = MODES[mode]
    path = saved(tmp_path, make())
    assert np.array_equal(read_image(path), expected)
    assert image_size(path) == expected.shape[:2]


def test_fractions_and_cmyk(tmp_path: Path) -> None:
    fractions = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.array_equal(read_image(saved(tmp_path, fractions, "a.tif")), gray(0, 128, 255))
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(read_image(saved(tmp_path, cyan, "a.jpg", quality=100)).astype(int) - [0, 255, 255]).max() <= 2


def test_fractions_beyond_one_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([[0.0, 300.0]], np.float32)), "depth.tif")
    with pytest.raises(DataError, match=r"depth\.tif must hold fractions in \[0, 1\]; got \[0, 300\]"):
        read_image(path)


# EXIF orientation: what has to be done with the stored pixels to look at them.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_is_applied_once(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(CORNERS), exif=exif)
    expected = TURNS[orientation](CORNERS)
    assert np.array_equal(read_image(path), expected)
    assert image_size(path) == expected.shape[:2]
    assert is_rotated(path) == (orientation > 1)


def test_result_may_be_written_to_and_wrapped(tmp_path: Path) -> None:
    for mode in ("RGB", "L", "RGBA"):
        pixels = read_image(saved(tmp_path, Image.new(mode, (5, 4))))
        assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8
        assert pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("size", [(1, 1), (12_000, 300), (1, 500)])
def test_extreme_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", size, (1, 2, 3)), "a.jpg")
    assert read_image(path).shape == (size[1], size[0], 3)
    assert image_size(path) == size[::-1]


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.new("L", (100, 100)))
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"a\.png has 100 x 100 pixels; at most 9,999"):
        read_image(path)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, says",
    [
        (jpeg()[:1000], "cannot be read: image file is truncated"),
        (jpeg()[:30], "is not an image|cannot be read"),
        (b"", "is empty"),
        (b"hello", "is not an image that Pillow knows"),
    ],
)
def test_damage_is_one_sentence_with_the_name(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for source in (None, content):
        with pytest.raises(DataError, match=says) as caught:
            read_image(path, source)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jpg does not exist"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(DataError, match="is a folder"):
        image_size(tmp_path)


def test_random_damage_is_always_a_data_error(tmp_path: Path) -> None:
    chance, whole = random.Random(0), jpeg()
    refused = 0
    for _ in range(200):
        bad = bytearray(whole[: chance.randrange(len(whole))])
        for _ in range(chance.randrange(4)):
            bad[chance.randrange(max(1, len(bad))) : 1] = bytes([chance.randrange(256)])
        try:
            assert read_image(tmp_path / "a.jpg", bytes(bad)).shape[2] == 3
        except DataError:
            refused += 1
    assert refused > 150


def test_photographs_are_as_pillow_sees_them(shared: Path) -> None:
    for path in sorted((shared / "data" / "bccd" / "val").glob("*.jpg"))[:5]:
        assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_an_opened_image_is_read_like_its_file(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        saved(tmp_path, Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)), "deep.png"),
        saved(tmp_path, Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "clear.png"),
        saved(tmp_path, palette(transparent=True), "palette.png"),
        saved(tmp_path, Image.fromarray(CORNERS), "turned.png", exif=turned),
    ]
    for file in files:
        with Image.open(file) as image:
            assert np.array_equal(from_pil(image), read_image(file)), file.name
