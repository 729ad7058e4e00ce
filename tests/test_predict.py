"""From any kind of picture to detections in its own pixels, and what is refused on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from torch import Tensor, nn

from deimkit.data.split import CategoryMap
from deimkit.errors import DataError, DeimkitError, NonFiniteError
from deimkit.models.detector import Detector
from deimkit.models.postprocess import best, select
from deimkit.models.predict import predict, prepare
from deimkit.structures import Detections, Predictions

PETS = CategoryMap(ids=(18, 17), names=("dog", "cat"))


class Stub(nn.Module):
    """Answers with two boxes; the score of the first is the brightness of the image, which tells images apart."""

    def __init__(self, size: tuple[int, int] = (64, 96)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)
        self.categories, self.size = PETS, size
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Predictions:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(images)
        light = images.mean((1, 2, 3)).clamp(0.01, 0.99).logit() * self.weight  # (B,)
        logits = torch.full((len(images), 2, 2), -9.0).to(images)
        logits[:, 0, 1], logits[:, 1, 0] = light, -4.0
        boxes = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.25, 0.5, 0.5, 0.5]]).to(images)
        return Predictions(logits, boxes.expand(len(images), 2, 4))

    detect = Detector.detect


def gray(level: float, height: int = 20, width: int = 30) -> np.ndarray:
    """An even image; the stub finds a cat of score `level`."""
    return np.full((height, width, 3), round(level * 255), np.uint8)


def save(folder: Path, **levels: float) -> Path:
    """A folder with a PNG per keyword."""
    for name, level in levels.items():
        Image.fromarray(gray(level)).save(folder / f"{name}.png")
    return folder


# ---------------------------------------------------------------------------------------------- postprocessing


def test_postprocess_equals_published(shared: Path) -> None:
    golden = np.load(shared / "golden/golden/dfine_n.npz")
    preds = Predictions(*(torch.from_numpy(golden[k]).double() for k in ("pred_logits", "pred_boxes")))
    height_width = torch.from_numpy(golden["orig_target_sizes_wh"]).flip(1)
    coco = CategoryMap(ids=tuple(range(80)), names=tuple(map(str, range(80))))
    for i, found in enumerate(select(preds, height_width, coco)):
        torch.testing.assert_close(found.scores.float(), torch.from_numpy(golden["post/scores"][i]), rtol=0, atol=1e-6)
        assert_array_equal(found.labels, golden["post/labels_contiguous"][i])
        near = torch.isclose(found.boxes.float(), torch.from_numpy(golden["post/boxes"][i]), rtol=0, atol=2e-3).all(1)
        assert near.float().mean() > 0.99  # logits that tie in the file's float32 come in either order
        assert len(found) == 300 and found.size == tuple(height_width[i].tolist())


def test_postprocess_by_hand() -> None:
    """Two queries, two classes: three best answers, one query with both its classes."""
    logits = torch.tensor([[[2.0, 1.0], [-3.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]]])
    (found,) = select(Predictions(logits, boxes), torch.tensor([[100, 200]]), PETS, top=3)
    assert found.labels.tolist() == [0, 1, 1] and found.names == ["dog", "cat", "cat"] and found.ids == [18, 17, 17]
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 200, 100], [0, 0, 200, 100], [0, 40, 100, 60]]))
    assert found.size == (100, 200)


def test_postprocess_takes_what_there_is() -> None:
    assert select(Predictions(torch.empty(0, 4, 2), torch.empty(0, 4, 4)), torch.empty(0, 2), PETS) == []
    few = Predictions(torch.zeros(2, 3, 2), torch.rand(2, 3, 4))
    assert [len(found) for found in select(few, torch.ones(2, 2), PETS)] == [6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_postprocess_computes_in_single_precision_or_better(dtype: torch.dtype) -> None:
    preds = Predictions(torch.randn(1, 9, 2).to(dtype), torch.rand(1, 9, 4).to(dtype))
    boxes, scores, labels = best(preds, torch.tensor([[480, 640]]), 5)
    assert boxes.dtype == scores.dtype == torch.promote_types(dtype, torch.float32)
    assert boxes.shape == (1, 5, 4) and scores.shape == labels.shape == (1, 5)


@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_postprocess_refuses_nan(where: str) -> None:
    preds = Predictions(torch.zeros(2, 3, 2), torch.rand(2, 3, 4))
    getattr(preds, where)[1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="image 1 of the batch"):
        select(preds, torch.ones(2, 2), PETS)


@pytest.mark.gpu
def test_postprocess_on_gpu_equals_cpu() -> None:
    preds, sizes = Predictions(torch.randn(4, 300, 80), torch.rand(4, 300, 4)), torch.tensor([[480, 640]] * 4)
    here, there = (best(preds.to(device), sizes.to(device)) for device in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu())


# --------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("case", ["down", "up", "mixed"])
def test_prepare_equals_published(shared: Path, case: str) -> None:
    golden = np.load(shared / "golden/data/pipeline.npz")
    ours = prepare(golden[f"eval/{case}/in_hwc_uint8"], (64, 64))
    torch.testing.assert_close(ours / 255, torch.from_numpy(golden[f"eval/{case}/out_chw"]), rtol=0, atol=1e-7)


def test_images_are_shown_at_the_detectors_size_or_the_given_one() -> None:
    stub = Stub()
    for size, shape in ((None, (64, 96)), (32, (32, 32)), ((32, 64), (32, 64))):
        predict(stub, gray(0.5), size=size)
        assert stub.seen[-1].shape == (1, 3, *shape)
        assert stub.seen[-1].min() == stub.seen[-1].max() == 128 / 255


# --------------------------------------------------------------------------------------------------- sources


def as_path(folder: Path) -> Path:
    return save(folder, a=0.8) / "a.png"


ONE: dict[str, Any] = {
    "path": as_path,
    "string": lambda folder: str(as_path(folder)),
    "array": lambda folder: gray(0.8),
    "strided array": lambda folder: gray(0.8, 40, 60)[::-2, ::2],
    "gray array": lambda folder: gray(0.8)[..., 0],
    "byte tensor": lambda folder: torch.from_numpy(gray(0.8)).permute(2, 0, 1),
    "float tensor": lambda folder: torch.full((3, 20, 30), 0.8, requires_grad=True),
    "PIL": lambda folder: Image.fromarray(gray(0.8)),
    "PIL, gray": lambda folder: Image.fromarray(gray(0.8)[..., 0]),
    "PIL, palette": lambda folder: Image.fromarray(gray(0.8)).convert("P"),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_picture(kind: str, tmp_path: Path) -> None:
    source = ONE[kind](tmp_path)
    found = predict(Stub(), source)
    assert (
        isinstance(found, Detections) and found.names == ["cat"] and found.ids == [17] and found.labels.tolist() == [1]
    )
    assert found.size == (20, 30) and found.scores.item() == pytest.approx(0.8, abs=0.01)
    assert found.boxes.tolist() == [[7.5, 0, 22.5, 20]]
    assert str(found.image) == str(source) if kind in ("path", "string") else found.image is source


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_lists_keep_their_order(batch: int, tmp_path: Path) -> None:
    levels = [0.9, 0.6, 0.7, 0.95, 0.8]
    mixed = [gray(level, 10 + i, 20) for i, level in enumerate(levels)]
    mixed[3] = torch.full((3, 13, 20), levels[3])
    stub = Stub()
    found = predict(stub, mixed, batch=batch)
    assert isinstance(found, list) and [d.size for d in found] == [(10 + i, 20) for i in range(5)]
    assert [d.scores.item() for d in found] == pytest.approx(levels, abs=0.01)
    assert max(len(images) for images in stub.seen) == min(batch, 5)


def test_folder_is_read_flat_and_in_natural_order(tmp_path: Path) -> None:
    save(tmp_path, img10=0.9, img2=0.7, img1=0.6, **{"._img1": 0.5})
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper", img0=0.8)
    names = [Path(d.image).name for d in predict(Stub(), tmp_path)]
    assert names == ["img1.png", "img2.png", "img10.png"]
    assert [Path(d.image).name for d in predict(Stub(), str(tmp_path / "img1*"))] == ["img1.png", "img10.png"]
    assert len(predict(Stub(), f"{tmp_path}/**/*.png")) == 4


def test_a_file_named_like_a_glob_is_a_file(tmp_path: Path) -> None:
    save(tmp_path, **{"img[1]": 0.8})
    assert isinstance(predict(Stub(), tmp_path / "img[1].png"), Detections)


def test_exif_orientation_counts(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.fromarray(gray(0.8, 20, 30)).save(tmp_path / "a.jpg", exif=turned)
    for source in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
        found = predict(Stub(), source)
        assert found.size == (30, 20)
        found.plot()


def test_empty_list_and_any_iterable() -> None:
    assert predict(Stub(), []) == []
    assert len(predict(Stub(), (gray(0.8) for _ in range(3)))) == 3


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (12000, 40), (40, 12000), (2000, 12000)])
def test_extreme_shapes(height: int, width: int) -> None:
    found = predict(Stub(), gray(0.8, height, width))
    assert found.size == (height, width) and found.boxes[0].tolist() == [width / 4, 0, width * 3 / 4, height]


# --------------------------------------------------------------------------------------------------- manners


def test_threshold_is_inclusive_and_zero_keeps_everything() -> None:
    found = predict(Stub(), gray(0.8), threshold=0)
    assert len(found) == 4 and found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(predict(Stub(), gray(0.8), threshold=found.scores[0].item())) == 1
    assert len(predict(Stub(), gray(0.8), threshold=1)) == 0


def test_detector_is_left_as_it_was() -> None:
    stub = Stub().train()
    stub.norm.eval()  # a frozen norm stays frozen
    found = predict(stub, [gray(0.8)] * 3, batch=2)
    assert stub.training and not stub.norm.training and torch.is_grad_enabled()
    found[0].boxes += 1  # detections are ordinary tensors, free to change
    with pytest.raises(DataError):
        predict(stub, [gray(0.8), "missing/a.png"])
    assert stub.training and not stub.norm.training and torch.is_grad_enabled()


def test_images_come_in_the_precision_of_the_weights() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        stub = Stub().to(dtype)
        assert len(predict(stub, gray(0.8))) == 1 and stub.seen[0].dtype == dtype


def test_a_detector_need_not_be_a_module() -> None:
    class Engine:
        """As an exported model is: it finds what there is in bytes."""

        def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
            assert images.shape == (1, 3, 640, 640) and images.dtype == torch.uint8 and sizes.tolist() == [[20, 30]]
            preds = Predictions(torch.zeros(1, 1, 2), torch.full((1, 1, 4), 0.5))
            return select(preds, sizes, PETS)

    assert predict(Engine(), gray(0.8)).names == ["dog", "cat"]


REFUSED: dict[str, tuple[Any, str]] = {
    "float array": (np.zeros((8, 8, 3)), "uint8 pixels in .0, 255.; got float64"),
    "16 bits": (np.zeros((8, 8, 3), np.uint16), "got uint16"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\). Channels first\?"),
    "alpha": (np.zeros((8, 8, 4), np.uint8), r"Alpha\? image\[..., :3\]"),
    "no pixels": (np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
    "a batch of arrays": (np.zeros((2, 8, 8, 3), np.uint8), r"A batch\? list\(array\)"),
    "a batch": (torch.zeros(2, 3, 8, 8), r"A batch\? list\(tensor\)"),
    "channels last": (torch.zeros(8, 8, 3), r"must be one \(3, H, W\) image; got \(8, 8, 3\)"),
    "pixels as floats": (torch.full((3, 8, 8), 200.0), r"must be in \[0, 1\]; got 200.0 to 200.0. Of 0 to 255\?"),
    "normalised": (torch.full((3, 8, 8), -1.0), "Normalised"),
    "nan": (torch.full((3, 8, 8), torch.nan), "got nan"),
    "a number": (3, "Expected a picture as path, uint8 array, tensor or PIL image; got int"),
    "a list in a list": ([[gray(0.5)]], "got list"),
    "no such folder": ("missing/street.jpg", "No folder 'missing' to find 'street.jpg' in"),
    "no match": ("missing/*.jpg", r"in 'missing/\*.jpg'; got none"),
}


@pytest.mark.parametrize("source, says", REFUSED.values(), ids=REFUSED)
def test_refuses(source: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        predict(Stub(), source)


def test_missing_file_suggests_those_nearby(tmp_path: Path) -> None:
    save(tmp_path, street=0.8, harbour=0.8)
    with pytest.raises(DataError, match=r"No image, folder or video 'stret.png' in .* Did you mean 'street.png'\?"):
        predict(Stub(), tmp_path / "stret.png")


def test_folder_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got none"):
        predict(Stub(), tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"got only .txt, labels. A folder is not searched recursively"):
        predict(Stub(), tmp_path)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path, a=0.8) / "a.png"
    (tmp_path / "b.png").write_bytes(whole.read_bytes()[:60])
    with pytest.raises(DataError, match="b.png"):
        predict(Stub(), tmp_path)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 50, float("nan")])
def test_threshold_outside_range(threshold: float) -> None:
    with pytest.raises(DeimkitError, match=r"threshold must be in \[0, 1\]"):
        predict(Stub(), gray(0.5), threshold=threshold)


def test_batch_of_nothing() -> None:
    with pytest.raises(DeimkitError, match="batch must be at least 1; got 0"):
        predict(Stub(), [], batch=0)


# --------------------------------------------------------------------------------------------------- video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Twelve frames of growing brightness."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write videos")
    for i in range(12):
        writer.write(gray(0.5 + i / 25, 48, 64))
    writer.release()
    return path


def test_video_is_a_stream_of_frames(video: Path) -> None:
    stub = Stub().train()
    frames = predict(stub, video, threshold=0.4, batch=4)
    assert isinstance(frames, Iterator) and not stub.seen  # nothing is read before it is asked for
    first = next(frames)
    assert len(stub.seen) == 1 and stub.training  # one batch is in memory; the detector is free in between
    scores = [first.scores.item(), *(d.scores.item() for d in frames)]
    assert scores == pytest.approx([0.5 + i / 25 for i in range(12)], abs=0.03)
    assert first.size == (48, 64) and first.image.shape == (48, 64, 3)


def test_video_colours_are_rgb(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR
    writer.release()
    (frame,) = predict(Stub(), tmp_path / "red.avi", threshold=0)
    assert frame.image[..., 0].mean() > 200 and frame.image[..., 2].mean() < 50


def test_unreadable_or_missing_video(tmp_path: Path, video: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="broken.mp4' cannot be read as a video"):
        predict(Stub(), tmp_path / "broken.mp4")
    with pytest.raises(DataError, match="Did you mean 'clip.avi'"):
        predict(Stub(), tmp_path / "clip.mp4")


def test_video_without_opencv_says_what_to_install(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DeimkitError, match="OpenCV, which is missing: pip install"):
        predict(Stub(), video)
