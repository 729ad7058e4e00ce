"""A batch is a function of (seed, epoch, step), whoever loads it, and holds what the published loader's would."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deimkit.data.augment import Augment
from deimkit.data.dataset import Dataset
from deimkit.data.loader import Always, Loader, Pictures
from deimkit.data.split import CategoryMap, Split
from deimkit.errors import DataError, RecipeError
from deimkit.structures import Batch, Targets

SIZE = (64, 96)
AUGMENT = Augment(tile=32, multi_scale=2)


@dataclass(frozen=True, eq=False, repr=False)
class Memory(Split):
    """A split whose pictures are at hand; `broken` images raise."""

    pictures: tuple[np.ndarray, ...] = ()
    broken: tuple[tuple[int, Exception], ...] = ()

    def image(self, i: int) -> np.ndarray:
        for index, error in self.broken:
            if index == i:
                raise error
        return self.pictures[i]


def memory(n: int, boxes: Callable[[int], list[list[float]]] | None = None, **changes: Any) -> Memory:
    """n noisy pictures of different sizes; picture i has i % 4 boxes unless `boxes` says otherwise."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(40, 90, n), rng.integers(40, 120, n)], 1).astype(np.int32)
    pictures = tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    table = [boxes(i) if boxes else [[3, 4, 20 + k, 30 + k] for k in range(i % 4)] for i in range(n)]
    flat = np.array([box for rows in table for box in rows], np.float32).reshape(-1, 4)
    return Memory(
        **{
            "name": "memory",
            "categories": CategoryMap.of(10),
            "ids": [f"id{i}" for i in range(n)],
            "paths": [Path(f"pictures/{i}.png") for i in range(n)],
            "sizes": sizes,
            "boxes": flat,
            "labels": np.arange(len(flat)) % 10,
            "crowd": np.zeros(len(flat), bool),
            "areas": np.zeros(len(flat)),
            "starts": np.cumsum([0, *map(len, table)]),
            "annotation_ids": np.arange(len(flat)),
            "pictures": pictures,
        }
        | changes
    )


@dataclass(frozen=True)
class ByEpoch:
    """A clock of one epoch per stage."""

    stages: tuple[str, ...] = ("warm", "dense", "augment", "clean")

    def stage(self, epoch: int) -> str:
        return self.stages[epoch]

    def multi_scale(self, epoch: int) -> bool:
        return self.stages[epoch] != "clean"


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches hold the same, bit for bit."""
    tensors = [(a.images, b.images), (a.sizes, b.sizes)]
    tensors += [(getattr(a.targets, f), getattr(b.targets, f)) for f in ("image", "labels", "boxes")]
    plain = (a.ids, a.names, a.mix, a.size) == (b.ids, b.names, b.mix, b.size)
    return plain and all(torch.equal(x, y) for x, y in tensors)


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) > 0 and all(map(same, a, b))


@pytest.fixture
def loader() -> Iterator[Loader]:
    made = Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), seed=3)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------- (seed, epoch, step) alone


def test_batches_are_a_function_of_seed_epoch_and_step(loader: Loader) -> None:
    again = Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), seed=3, cache_bytes=0)
    other = Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), seed=4)
    for epoch in range(4):
        torch.manual_seed(epoch)
        np.random.seed(epoch)
        first = list(loader.epoch(epoch))
        assert len(first) == len(loader) == 5
        assert all_same(first, list(again.epoch(epoch)))
        assert all_same(first[3:], list(loader.epoch(epoch, start=3)))
        assert not same(first[0], next(other.epoch(epoch)))
    assert loader.assembler.pictures.kept and not again.assembler.pictures.kept
    clean = Loader(memory(23), 4, SIZE, AUGMENT, Always("clean", varied=False), seed=3)
    assert not same(next(clean.epoch(0)), next(clean.epoch(1)))


def test_workers_load_the_same_batches_and_know_the_epoch(loader: Loader) -> None:
    crew = Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), seed=3, workers=2)
    before = torch.get_rng_state()
    for epoch in (0, 1, 3, 2):
        assert all_same(list(loader.epoch(epoch)), list(crew.epoch(epoch)))
    half = crew.epoch(2)
    next(half)  # an epoch that is left unfinished
    assert all_same(list(loader.epoch(1, start=2)), list(crew.epoch(1, start=2)))
    assert torch.equal(before, torch.get_rng_state()), "loading draws from torch's global generator"
    crew.close()
    assert all_same(list(loader.epoch(3)), list(crew.epoch(3)))
    crew.close()


def test_a_worker_can_be_sent_to_another_process(loader: Loader) -> None:
    twin = pickle.loads(pickle.dumps(loader.assembler))
    task = loader.plan(1)[0]
    assert torch.equal(twin[task]["images"], loader.assembler[task]["images"])


def test_an_epoch_shows_every_image_once(loader: Loader) -> None:
    seen = [name for batch in loader.epoch(0) for name in batch.names]
    assert len(set(seen)) == len(seen) == 20
    whole = Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), drop_last=False)
    sizes = [len(batch) for batch in whole.epoch(0)]
    assert sizes == [4] * 5 + [3] and len(whole) == 6
    orders = [[name for batch in whole.epoch(e) for name in batch.names] for e in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_small_split_gives_one_small_batch() -> None:
    loader = Loader(memory(3), 16, 64, AUGMENT)
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 1 and len(batches[0]) == 3


def test_ranks_share_a_batch() -> None:
    """Two ranks of half a batch load what one process of a whole batch loads."""
    augment = replace(AUGMENT, mixup=0)
    whole = Loader(memory(23), 8, SIZE, augment, ByEpoch())
    ranks = [Loader(memory(23), 8, SIZE, augment, ByEpoch(), rank=r, world=2) for r in (0, 1)]
    for one, *parts in zip(whole.epoch(1), *(r.epoch(1) for r in ranks), strict=True):
        assert torch.equal(one.images, torch.cat([p.images for p in parts]))
        assert one.names == parts[0].names + parts[1].names and len(parts[0]) == 4
        assert torch.equal(one.targets.boxes, torch.cat([p.targets.boxes for p in parts]))
        assert one.size == parts[0].size == parts[1].size
    mixed = [[b.mix for b in Loader(memory(23), 4, SIZE, AUGMENT, ByEpoch(), rank=r, world=2).epoch(1)] for r in (0, 1)]
    assert mixed[0] == mixed[1] and any(mixed[0])


def test_ranks_evaluate_every_image_once() -> None:
    ranks = [list(Loader(memory(9), 4, 64, rank=r, world=4).epoch()) for r in range(4)]
    assert [len(batch) for batch in ranks[3]] == [1, 1, 0] and len({len(r) for r in ranks}) == 1
    assert sorted(name for r in ranks for b in r for name in b.names) == sorted(f"{i}.png" for i in range(9))
    empty = ranks[3][-1].finish()
    assert empty.images.shape == (0, 3, 64, 64) and len(empty.targets) == 0 and empty.sizes.shape == (0, 2)


# --------------------------------------------------------------------------------------------------------- its content


def test_evaluation_is_the_published_preprocessing(shared: Path) -> None:
    golden = np.load(shared / "golden/data/pipeline.npz")
    kinds = ("down", "up", "mixed")
    pictures = tuple(golden[f"eval/{kind}/in_hwc_uint8"] for kind in kinds)
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32)
    split = replace(
        memory(3, lambda i: golden[f"eval/{kinds[i]}/boxes_in_xyxy"].tolist()), pictures=pictures, sizes=sizes
    )
    (batch,) = Loader(split, 8, 64).epoch()
    assert batch.ids == ["id0", "id1", "id2"] and batch.names[1] == "1.png"
    assert batch.sizes.tolist() == sizes.tolist() and batch.mix is None and batch.size is None
    images = batch.finish().images
    for i, kind in enumerate(kinds):
        assert np.array_equal(images[i].numpy(), golden[f"eval/{kind}/out_chw"]), kind
        cxcywh = batch.targets.boxes[batch.targets.image == i] * 64
        xyxy = torch.cat([cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2], 1).numpy()
        expected = golden[f"eval/{kind}/boxes_after_val_xyxy"]
        assert np.allclose(xyxy, expected.clip(0, 64), atol=1e-4), kind


def test_mixup_is_the_published_blend(shared: Path) -> None:
    """λ·image + (1 - λ)·predecessor; the boxes and labels of an image, then those of its predecessor."""
    golden = {k.removeprefix("mixup/"): v for k, v in np.load(shared / "golden/data/pipeline.npz").items()}
    per_image = [(golden[f"boxes_in.{i}"], golden[f"labels_in.{i}"]) for i in range(3)]
    targets = Targets.from_list([{"boxes": torch.tensor(b), "labels": torch.tensor(n)} for b, n in per_image])
    blended = Batch(torch.from_numpy(golden["in"]), targets, mix=float(golden["beta"]), size=(12, 12)).finish()
    assert blended.mix is None and blended.size is None
    flat = Batch(torch.from_numpy(golden["in"]), targets, mix=float(golden["beta"])).finish()
    assert np.allclose(flat.images, golden["out"], atol=1e-6)
    nearest = Batch(torch.from_numpy(golden["in"]), targets, size=(12, 12)).finish().images
    assert np.array_equal(nearest, golden["multiscale/out12_nearest_of_mixup_in"])

    def pixels(i: int) -> list[list[float]]:
        x, y, w, h = (golden[f"boxes_in.{i}"].clip(0.3, 0.4) * 1000).T
        return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).tolist()

    still = Augment(mosaic=0, photometric=0, zoom_out=0, iou_crop=0, flip=0, mixup=1)
    pictures = tuple(np.zeros((1000, 1000, 3), np.uint8) for _ in range(3))
    counts = [len(golden[f"labels_in.{i}"]) for i in range(3)]
    labels = np.concatenate([golden[f"labels_in.{i}"] for i in range(3)])
    split = replace(memory(3, pixels), pictures=pictures, labels=labels)
    (batch,) = Loader(split, 3, 64, still, Always("dense"), shuffle=False).epoch()
    assert batch.mix is not None and 0.45 <= batch.mix <= 0.55
    for i in range(3):
        mine = batch.targets.image == i
        assert batch.targets.labels[mine].tolist() == golden[f"labels_out.{i}"].tolist()
        assert mine.sum() == counts[i] + counts[i - 1]
        expected = np.concatenate([golden[f"boxes_in.{k}"].clip(0.3, 0.4) for k in (i, (i - 1) % 3)])
        assert np.allclose(batch.targets.boxes[mine], expected, atol=1e-5)


def test_mixup_and_sizes_belong_to_their_stages() -> None:
    still = Augment(mosaic=0, photometric=0, zoom_out=0, iou_crop=0, mixup=1, multi_scale=1)
    loader = Loader(memory(40), 2, (64, 64), still, ByEpoch())
    by_stage = {loader.timeline.stage(e): list(loader.epoch(e)) for e in range(4)}
    assert {s for s, batches in by_stage.items() if any(b.mix for b in batches)} == {"dense"}
    assert all(b.mix for b in by_stage["dense"])
    assert all(b.size is None for b in by_stage["clean"])
    varied = {b.size for s in ("warm", "dense", "augment") for b in by_stage[s]}
    assert varied == {(32, 32), (64, 64)}  # a quarter of 64 less is 32 after rounding down, a quarter more is 64
    one = Loader(memory(5), 1, 64, still, ByEpoch())
    assert all(b.mix is None for b in one.epoch(1)), "an image alone has nobody to be blended with"


def test_batch_says_the_size_it_will_have() -> None:
    loader = Loader(memory(40), 4, (64, 128), replace(AUGMENT, multi_scale=1), Always("augment"))
    sizes = set()
    for batch in loader.epoch(0):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 64, 128)
        sizes.add(batch.size)
        finished = batch.finish()
        assert finished.images.shape[-2:] == batch.size and finished.images.max() <= 1
        finished.targets.check(4, 10, batch.names)
    assert len(sizes) > 1


def test_crowds_and_boxes_without_area_are_left_out() -> None:
    table = [[0, 0, 30, 30], [5, 5, 5, 20], [-10, 10, 20, 500], [2, 2, 30, 30]]
    split = memory(1, lambda i: table)
    split = replace(split, crowd=np.array([False, False, False, True]), labels=np.array([0, 1, 2, 3]))
    h, w = split.sizes[0]
    for augment in (None, Augment(flip=0)):
        (batch,) = Loader(split, 1, 64, augment, Always("clean")).epoch()
        assert batch.targets.labels.tolist() == [0, 2]
        assert np.allclose(
            batch.targets.boxes[1] * torch.tensor([w, h, w, h]), [10, (10 + h) / 2, 20, h - 10], atol=1e-3
        )


def test_images_without_boxes_stay() -> None:
    loader = Loader(memory(8, lambda i: []), 4, SIZE, AUGMENT, ByEpoch())
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            assert len(batch) == 4 and batch.targets.boxes.shape == (0, 4) and batch.targets.image.dtype == torch.int64


def test_sizes_are_those_of_the_files() -> None:
    split = memory(4)
    lying = replace(split, sizes=split.sizes[:, ::-1] + 5)
    for loader in (Loader(lying, 4, 64), Loader(lying, 4, 64, AUGMENT, Always("dense"), shuffle=False)):
        (batch,) = loader.epoch()
        assert batch.sizes.tolist() == split.sizes.tolist()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_loading_goes_on(workers: int) -> None:
    broken = replace(memory(8), broken=((5, DataError("pictures/5.png is truncated.")),))
    loader = Loader(broken, 2, 64, Augment(), Always("clean"), workers=workers, shuffle=False)
    got: list[Batch] = []
    with pytest.raises(DataError, match=r"^pictures/5\.png is truncated\.$"):
        for batch in loader.epoch(0):
            got.append(batch)
    assert [batch.names for batch in got] == [["0.png", "1.png"], ["2.png", "3.png"]]
    assert [batch.names for batch in loader.epoch(0, start=3)] == [["6.png", "7.png"]]
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_names_the_file(workers: int) -> None:
    broken = replace(memory(4), broken=((2, ZeroDivisionError("oh")),))
    loader = Loader(broken, 2, 64, workers=workers)
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader.epoch())
    said = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    assert "pictures/2.png" in said
    loader.close()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": 6, "world": 4}, "multiple of world=4"),
        ({"batch": 4, "world": 2, "rank": 2}, "rank=2"),
    ],
)
def test_impossible_loaders_are_refused(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Loader(memory(4), size=64, **wrong)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="'memory' has none"):
        Loader(memory(0), 4, 64)


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_keeps_to_its_bytes() -> None:
    split = memory(20)
    pictures = Pictures(split, cache_bytes=50_000)
    for i in [*range(20), *range(20)]:
        assert np.array_equal(pictures.sample(i).image, split.pictures[i])
    kept = sum(image.nbytes for image in pictures.kept.values())
    assert 25_000 < kept <= 50_000 and pictures.room == 50_000 - kept


# ----------------------------------------------------------------------------------------------------------- real files


def test_real_files(shared: Path, tmp_path: Path) -> None:
    data = Dataset.open(shared / "data/bccd")
    loader = Loader(data.train, 8, 128, replace(AUGMENT, tile=64), ByEpoch(), workers=1)
    for epoch in range(4):
        batches = loader.epoch(epoch)
        for batch in (next(batches), next(batches)):
            batch.targets.check(8, len(data.categories), batch.names)
            assert set(batch.ids) <= set(data.train.ids) and len(batch.targets) > 8
            assert batch.images.float().std() > 10
    loader.close()
    (shown, *_) = Loader(data.val, 4, 128).epoch()
    with Image.open(data.val.paths[0]) as file:
        expected = np.asarray(file.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR))
    assert np.array_equal(shown.images[0].permute(1, 2, 0), expected)


@pytest.mark.gpu
def test_workers_pin_for_the_gpu() -> None:
    loader = Loader(memory(8), 4, 64, Augment(), workers=1)
    assert all(batch.images.is_pinned() for batch in loader.epoch(0))
    loader.close()


def test_a_loader_process_leaves_the_first_signal_to_the_training() -> None:
    """A second SIGTERM ends it, for that one is from whoever finds that it hangs."""
    code = (
        "import os, signal; from deimkit.data.loader import _heed_no_signal; _heed_no_signal(0); "
        "[os.kill(os.getpid(), kind) for kind in (signal.SIGINT, signal.SIGTERM)]; print('here', flush=True); "
        "os.kill(os.getpid(), signal.SIGTERM); print('there')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "here\n" and done.returncode == -signal.SIGTERM
