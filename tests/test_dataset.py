"""One Dataset whatever the source, and a list of what was wrong with it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deimkit.data.dataset import CategoryMap, Dataset, Packed, Split
from deimkit.errors import DataError

WIDTH, HEIGHT = 40, 30


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name), 2, 3)).save(path)
    return path


def coco(
    names: list[str], boxes: list[tuple[Any, Any, Any]], categories: dict[Any, str] | None = None, **extra: Any
) -> dict[str, Any]:
    """COCO content: images numbered from 1, and boxes as (image id, category id, xywh)."""
    return {
        "images": [{"id": i, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names, 1)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": b, **extra} for k, (i, c, b) in enumerate(boxes, 1)
        ],
        "categories": [{"id": i, "name": n} for i, n in (categories or {1: "cat", 2: "dog"}).items()],
    }


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def coco_set(root: Path, content: dict[str, Any] | None = None, file: str = "annotations/instances_train.json") -> Path:
    """A COCO folder with the images of `content` in train/ and a val split of one image."""
    content = content or coco(["a.png", "b.png"], [(1, 2, [1, 2, 3, 4]), (1, 1, [5, 6, 7, 8])])
    write(root / file, content)
    for image in content["images"]:
        picture(root / "train" / image["file_name"])
    picture(root / "val" / "v.png")
    write(root / "annotations/instances_val.json", {**coco(["v.png"], []), "categories": content["categories"]})
    return root


# ------------------------------------------------------------------------------------------------- categories


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (3, 17, 90), ("a", "b", "c"), (1, "1", "x")])
def test_category_map_round_trip(ids: tuple[Any, ...]) -> None:
    categories = CategoryMap(ids=ids, names=("cat", "dog", "cow"))
    again = CategoryMap.from_dict(json.loads(json.dumps(categories.to_dict())))
    assert again == categories and hash(again) == hash(categories) and len(again) == 3
    assert [again.index(id_) for id_ in ids] == [0, 1, 2]
    assert [again.id(i) for i in range(3)] == list(ids)
    assert pickle.loads(pickle.dumps(categories)) == categories


def test_category_map_of() -> None:
    assert CategoryMap((1, 5, "x"), ("cat", "dog", "cat")).distinct == ("cat (1)", "dog", "cat (x)")
    names = CategoryMap.of(["cat", "dog"])
    assert names.ids == (0, 1) and names.name(1) == "dog" and CategoryMap.of(names) is names
    assert len(CategoryMap.of(80)) == 80 and CategoryMap.of(2).names == ("class 0", "class 1")
    assert len(CategoryMap.of([])) == 0


def test_category_map_refuses() -> None:
    with pytest.raises(DataError, match="id 7; the ids are 1, 2"):
        CategoryMap((1, 2), ("a", "b")).index(7)
    with pytest.raises(DataError, match="1 twice"):
        CategoryMap((1, 1), ("a", "b"))
    with pytest.raises(DataError, match="2 ids and 1 names"):
        CategoryMap((1, 2), ("a",))


@pytest.mark.parametrize("values", [[], [1], [3, "a", "ü, [", 10**20, "\udcff"], list(range(100))])
def test_packed_is_a_list(values: list[Any]) -> None:
    packed = Packed(values)
    assert packed == values and list(packed) == values and len(packed) == len(values)
    assert [packed[i] for i in range(-len(values), 0)] == values and packed[1:3] == values[1:3]
    assert packed.take([0] * bool(values)) == values[:1]
    assert pickle.loads(pickle.dumps(packed)) == values
    with pytest.raises(IndexError):
        packed[len(values)]


# ---------------------------------------------------------------------------------------------------- layouts

ONE = coco(["a.png", "b.png"], [(1, 2, [1, 2, 3, 4])])  # a.png shows a dog at (1, 2)-(4, 6), b.png nothing
YOLO = "1 0.0625 0.13333333 0.075 0.13333333\n"  # the same
VOC = """<annotation><filename>{0}.png</filename><size><width>40</width><height>30</height></size>{1}</annotation>"""
DOG = """<object><name>{0}</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object>"""


def images(root: Path, *names: str) -> None:
    for name in names:
        picture(root / name)


def roboflow_coco(root: Path) -> Path:
    for folder in ("train", "valid"):
        images(root / folder, "a.png", "b.png")
        write(root / folder / "_annotations.coco.json", ONE)
    return root


def official_coco(root: Path) -> Path:
    for folder in ("train2017", "val2017"):
        images(root / folder, "a.png", "b.png")
        write(root / "annotations" / f"instances_{folder}.json", ONE)
        write(root / "annotations" / f"captions_{folder}.json", {"images": []})
    return root


def short_coco(root: Path) -> Path:
    for folder in ("train", "val", "test"):
        images(root / folder, "a.png", "b.png")
        write(root / "annotations" / f"instances_{folder}.json", ONE)
    return root


def images_folder_coco(root: Path) -> Path:
    for folder in ("train", "validation"):
        images(root / "images" / folder, "a.png", "b.png")
        write(root / f"{folder}.json", ONE)
    return root


def outer_folder(root: Path) -> Path:
    short_coco(root / "unpacked")
    return root


def voc_kit(root: Path, trainval: str = "train") -> Path:
    images(root / "JPEGImages", "a.png", "b.png", "c.png", "d.png")
    for stem in "abcd":
        content = DOG.format("dog" if stem == "a" else "cat") if stem in "ac" else ""
        write(root / "Annotations" / f"{stem}.xml", VOC.format(stem, content))
    write(root / f"ImageSets/Main/{trainval}.txt", "a\nb\n")
    write(root / "ImageSets/Main/val.txt", "c  1\nd -1\n")
    return root


def voc_devkit(root: Path) -> Path:
    voc_kit(root / "VOC2012", "trainval")
    return root


def roboflow_voc(root: Path) -> Path:
    for folder in ("train", "valid"):
        images(root / folder, "a.png", "b.png")
        write(root / folder / "a.xml", VOC.format("elsewhere/a", DOG.format("dog")))
        write(root / folder / "b.xml", VOC.format("b", ""))
    write(root / "valid" / "b.xml", VOC.format("b", DOG.format("cat")))
    return root


def yolo(root: Path, spec: str, place: str = "images/{}", labels: str = "labels/{}", val: str = "val") -> Path:
    for folder in ("train", val):
        images(root / place.format(folder), "a.png", "b.png")
        write(root / labels.format(folder) / "a.txt", YOLO)
    if spec:
        write(root / "data.yaml", spec)
    return root


def yolo_listed(root: Path) -> Path:
    yolo(root, "path: .\ntrain: train.txt\nval: [images/val]\nnames: {0: cat, 1: dog}\n")
    write(root / "train.txt", "./images/train/a.png\n./images/train/b.png\n")
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "coco of roboflow": roboflow_coco,
    "coco, official": official_coco,
    "coco, short": short_coco,
    "coco, images/": images_folder_coco,
    "coco, one folder deeper": outer_folder,
    "voc kit": voc_kit,
    "voc devkit, trainval": voc_devkit,
    "voc of roboflow": roboflow_voc,
    "yolo, list": lambda r: yolo(r, "train: images/train\nval: images/val\nnames: [cat, dog]\n"),
    "yolo, dict and path": lambda r: yolo(
        r, "path: ../set\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}"
    ),
    "yolo of roboflow": lambda r: yolo(
        r,
        "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']",
        "{}/images",
        "{}/labels",
        "valid",
    ),
    "yolo, lists of files": yolo_listed,
    "yolo, no yaml": lambda r: write(yolo(r, "") / "classes.txt", "cat\ndog\n").parent,
    "yolo, split outside": lambda r: write(yolo(r, "", "{}/images", "{}/labels") / "classes.txt", "cat\ndog").parent,
    "yolo, beside": lambda r: write(yolo(r, "", "{}", "{}", "valid") / "obj.names", "cat\ndog").parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    data = Dataset.open(LAYOUTS[layout](tmp_path / "set"))
    assert data.categories.names == ("cat", "dog")
    assert data.train is not None and data.val is not None
    for split in (data.train, data.val):
        assert len(split) == 2 and split.problems == ()
        assert split.sizes.tolist() == [[HEIGHT, WIDTH]] * 2 and split.sizes.dtype == np.int32
        assert all(path.is_absolute() and path.is_file() for path in split.paths)
    assert data.train.paths[0].name == "a.png" and data.train.starts.tolist() == [0, 1, 1]
    assert data.train.labels.tolist() == [1]
    assert np.allclose(data.train.boxes, [[1, 2, 4, 6]], atol=1e-4)
    assert data.train.image(1).shape == (HEIGHT, WIDTH, 3)
    assert len(data.notes) <= 1


UNSPLIT: dict[str, Callable[[Path], Path]] = {
    "coco in the folder": lambda r: write(r / "_annotations.coco.json", ONE).parent,
    "coco file beside": lambda r: write(r / "labels.json", ONE),
    "voc": lambda r: write(r / "a.xml", VOC.format("a", DOG.format("dog"))).parent,
    "yolo": lambda r: write(write(r / "a.txt", YOLO).parent / "classes.txt", "cat\ndog").parent,
}


@pytest.mark.parametrize("layout", UNSPLIT)
def test_without_splits_some_images_become_val(layout: str, tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    if layout == "voc":
        write(tmp_path / "b.xml", VOC.format("b", ""))
    data = Dataset.open(UNSPLIT[layout](tmp_path))
    assert data.train is not None and data.val is not None
    assert [path.name for path in [*data.val.paths, *data.train.paths]] == ["b.png", "a.png"]
    assert len(data.train.labels) == 1 and len(data.val.labels) == 0
    assert any("no val split: 1 of 2 images" in note for note in data.notes)


def test_single_file_with_images_in_a_sibling_folder(tmp_path: Path) -> None:
    images(tmp_path / "pictures", "a.png", "b.png")
    assert [len(split) for split in Dataset.open(write(tmp_path / "labels" / "x.json", ONE)).splits] == [1, 1]
    val = Dataset.open(write(tmp_path / "annotations" / "val.json", ONE))
    assert val.train is None and val.val is not None and len(val.val) == 2


def test_division_is_the_same_everywhere_and_moves_no_image(tmp_path: Path) -> None:
    names = [f"photo_{i}.png" for i in range(200)]
    images(tmp_path, *names)
    first = Dataset.open(write(tmp_path / "all.json", coco(names[:150], [])))
    later = Dataset.open(write(tmp_path / "all.json", coco(names, [])))
    assert first.val is not None and later.val is not None and later.train is not None
    val = [path.name for path in first.val.paths]
    assert val[:3] == ["photo_9.png", "photo_19.png", "photo_31.png"] and 8 <= len(val) <= 25
    assert set(val) <= {path.name for path in later.val.paths}
    assert sorted([*later.train.ids, *later.val.ids]) == list(range(1, 201))


def test_copies_by_roboflow_stay_together(tmp_path: Path) -> None:
    names = [f"{photo}_jpg.rf.{copy}.png" for photo in range(20) for copy in "abc"]
    images(tmp_path, *names)
    data = Dataset.open(write(tmp_path / "all.json", coco(names, [])))
    photos = [{path.name.split(".rf.")[0] for path in split.paths} for split in data.splits]
    assert photos[0] and photos[1] and not photos[0] & photos[1]


def test_test_split_serves_as_val(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        images(tmp_path / folder, "a.png", "b.png")
        write(tmp_path / folder / "_annotations.coco.json", coco(["a.png", "b.png"], [(1, 9, [1, 1, 5, 5])]))
    data = Dataset.open(tmp_path)
    assert data.val is not None and data.val.name == "val" and data.test is None and "test" in data.notes[0]
    assert [p.split for p in data.problems] == ["train", "val"] and list(data.val.without(data.problems).ids) == [2]


def test_several_files_for_a_split_prefer_the_plainest(tmp_path: Path) -> None:
    root = coco_set(tmp_path)
    write(root / "annotations/instances_extra_train.json", {"not": "read"})
    data = Dataset.open(root)
    assert data.train is not None and len(data.train) == 2 and "instances_extra_train.json" in data.notes[0]


def test_one_image_of_many_is_enough_to_find_the_folder(tmp_path: Path) -> None:
    content = coco([f"{i}.png" for i in range(100)], [])
    images(tmp_path / "deep" / "down", "3.png")
    data = Dataset.open(write(tmp_path / "labels.json", content))
    assert data.train is not None and list(data.train.ids) == [4] and len(data.problems) == 99


def test_paths_of_another_machine_are_found_by_name(tmp_path: Path) -> None:
    content = coco(["C:\\photos\\a.png", "/home/me/b.png"], [])
    images(tmp_path / "pictures", "a.png", "b.png")
    data = Dataset.open(write(tmp_path / "labels.json", content))
    assert sorted(path.name for split in data.splits for path in split.paths) == ["a.png", "b.png"]
    assert not data.problems and "found by their names" in data.notes[0]


# -------------------------------------------------------------------------------------------------- category ids


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (7, 90), ("a", "b")])
def test_category_ids_survive(ids: tuple[Any, Any], tmp_path: Path) -> None:
    content = coco(["a.png"], [(1, ids[1], [1, 1, 5, 5]), (1, ids[0], [2, 2, 5, 5])], {ids[1]: "dog", ids[0]: "cat"})
    split = Dataset.open(coco_set(tmp_path, content)).train
    assert split is not None
    assert split.categories.ids == ids and split.labels.tolist() == [1, 0]
    written = split.to_coco()
    assert [a["category_id"] for a in written["annotations"]] == [ids[1], ids[0]]
    assert written["categories"] == [{"id": ids[0], "name": "cat"}, {"id": ids[1], "name": "dog"}]


def two_lists(root: Path, train: dict[Any, str], val: dict[Any, str]) -> Dataset:
    """A dataset whose splits have different categories; each has one box of its first category."""
    for name, categories in (("train", train), ("val", val)):
        picture(root / name / "a.png")
        content = coco(["a.png"], [(1, next(iter(categories)), [1, 1, 5, 5])], categories)
        write(root / "annotations" / f"{name}.json", content)
    return Dataset.open(root)


@pytest.mark.parametrize(
    "train, val, names, says",
    [
        ({1: "cat", 2: "dog"}, {1: "cat"}, ("cat", "dog"), "only train.json has 'dog'"),
        ({1: "cat"}, {2: "cow", 1: "cat"}, ("cat", "cow"), "only val.json has 'cow'"),
        ({0: "cat", 1: "dog"}, {1: "cat", 2: "dog"}, ("cat", "dog"), "'cat', 'dog' have other ids"),
        ({1: "cat", 2: "dog"}, {1: "dog", 2: "cat"}, ("cat", "dog"), "matched by name"),
    ],
)
def test_categories_that_differ(
    train: dict[Any, str], val: dict[Any, str], names: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    data = two_lists(tmp_path, train, val)
    assert data.categories.names == names
    (problem,) = data.problems
    assert problem.severity == "warning" and problem.kind == "categories differ" and says in problem.detail
    for split, first in zip(data.splits, (train, val), strict=True):
        assert split.categories.name(split.labels[0]) == next(iter(first.values()))


def test_categories_that_cannot_be_reconciled(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Category 1 is 'cat' in train.json and 'cow' in val.json"):
        two_lists(tmp_path, {1: "cat", 2: "dog"}, {1: "cow"})


# ----------------------------------------------------------------------------------------------- single bad rows

BAD_BOXES = [
    ([float("nan"), 1, 2, 3], 1, "error", "box not finite", "annotation 2 has the box [nan, 1, nan, 4]"),
    ([1, 1, 2, float("inf")], 1, "error", "box not finite", "annotation 2"),
    ([5, 5, 0, 3], 1, "warning", "box without area", "[5, 5, 5, 8]"),
    ([5, 5, -3, 3], 1, "warning", "box without area", "annotation 2"),
    ([100, 100, 5, 5], 1, "error", "box outside the image", "wholly outside the image of 40 x 30 px"),
    ([1, 1, 5, 5], 9, "error", "unknown category", "category 9, which is none of the 2 categories"),
    ([1, 1, 5, 5], None, "error", "unknown category", "category None"),
    ([1, 1, 5], 1, "error", "malformed entry", '"bbox": [1, 1, 5]'),
    (["1", 1, 5, 5], 1, "error", "malformed entry", "expected ids and a bbox of four numbers"),
    (None, 1, "error", "malformed entry", '"bbox": null'),
    ([1, 1, 5, 5], [1], "error", "malformed entry", '"category_id": [1]'),
]


@pytest.mark.parametrize("box, category, severity, kind, says", BAD_BOXES)
def test_bad_boxes_are_left_out_and_listed(
    box: Any, category: Any, severity: str, kind: str, says: str, tmp_path: Path
) -> None:
    content = coco(["a.png", "b.png"], [(1, 1, [1, 1, 5, 5]), (1, category, box), (2, 2, [2, 2, 6, 6])])
    split = Dataset.open(coco_set(tmp_path, content)).train
    assert split is not None
    (problem,) = split.problems
    assert (problem.severity, problem.kind, problem.image, problem.split) == (severity, kind, 1, "train")
    assert says in problem.detail and "\n" not in str(problem)
    assert split.labels.tolist() == [0, 1] and split.annotation_ids.tolist() == [1, 3]
    assert list(split.without([problem]).ids) == [2] and split.without([problem]).problems == ()


def test_boxes_that_stick_out_are_clipped(tmp_path: Path) -> None:
    content = coco(["a.png"], [(1, 1, [-5, -5, 20, 20]), (1, 1, [35, 25, 5.5, 5.5])])
    split = Dataset.open(coco_set(tmp_path, content)).train
    assert split is not None
    assert split.boxes.tolist() == [[0, 0, 15, 15], [35, 25, 40, 30]]
    assert [(p.severity, p.kind) for p in split.problems] == [
        ("warning", "box sticks out")
    ]  # half a pixel is no matter


def spoil(content: dict[str, Any], how: str) -> None:
    """Do something bad to the entry of the second image, or to what belongs to it."""
    second = content["images"][1]
    if how == "missing file":
        second["file_name"] = "gone.png"
    elif how == "path outside the folder":
        second["file_name"] = "../../outside.png"
    elif how == "duplicate image id":
        second["id"] = 1
    elif how == "duplicate file":
        second["file_name"] = "a.png"
    elif how == "duplicate annotation id":
        content["annotations"][1]["id"] = 1
    elif how == "malformed entry":
        del second["file_name"]
    elif how == "unreadable image":
        second.update(file_name="torn.png", width=0)


@pytest.mark.parametrize(
    "kind, images_left, severity",
    [
        ("missing file", [1], "error"),
        ("path outside the folder", [1], "error"),
        ("duplicate image id", [1], "error"),
        ("duplicate file", [1, 2], "warning"),
        ("duplicate annotation id", [1, 2], "warning"),
        ("malformed entry", [1], "error"),
        ("unreadable image", [1], "error"),
    ],
)
def test_bad_images_are_left_out_and_listed(kind: str, images_left: list[int], severity: str, tmp_path: Path) -> None:
    content = coco(["a.png", "b.png"], [(1, 1, [1, 1, 5, 5]), (2, 2, [2, 2, 6, 6])])
    root = coco_set(tmp_path / "set", content)
    picture(tmp_path / "outside.png")
    write(root / "train" / "torn.png", "this is no image")
    spoil(content, kind)
    write(root / "annotations/instances_train.json", content)
    split = Dataset.open(root).train
    assert split is not None and list(split.ids) == images_left
    assert (severity, kind) in [(p.severity, p.kind) for p in split.problems]
    assert len(split.labels) == (
        1 if kind != "duplicate image id" and len(images_left) == 1 else 1 + (len(images_left) > 1)
    )
    assert split.starts[-1] == len(split.labels)


def test_size_is_read_where_the_file_does_not_say_it(tmp_path: Path) -> None:
    content = coco(["a.png"], [(1, 1, [1, 1, 5, 5])])
    content["images"][0].update(width=None, height=float("nan"))
    split = Dataset.open(coco_set(tmp_path, content)).train
    assert split is not None and split.sizes.tolist() == [[HEIGHT, WIDTH]] and split.problems == ()


def test_problems_of_a_divided_set_are_kept_once(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    content = coco(["a.png", "b.png", "gone.png"], [(1, 9, [1, 1, 5, 5]), (2, 9, [1, 1, 5, 5]), (7, 1, [1, 1, 5, 5])])
    data = Dataset.open(write(tmp_path / "all.json", content))
    assert sorted((p.split, p.kind) for p in data.problems) == [
        ("train", "malformed entry"),
        ("train", "missing file"),
        ("train", "unknown category"),
        ("val", "unknown category"),
    ]


YOLO_ROWS = [
    ("0 0.5 0.5 0.5 0.5", [10, 7.5, 30, 22.5], ""),
    ("0.0 0.5 0.5 0.5 0.5", [10, 7.5, 30, 22.5], ""),
    ("0 0.1 0.1 0.5 0.2 0.3 0.9", [4, 3, 20, 27], ""),  # a polygon of three corners
    ("0 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9", [4, 3, 20, 27], ""),
    ("0 320 240 100 100", None, "box outside the image"),
    ("7 0.5 0.5 0.5 0.5", None, "unknown category"),
    ("0 0.5 0.5 0.5", None, "malformed entry"),
    ("0 0.5 0.5 0.5 0.5 0.9", None, "malformed entry"),
    ("dog 0.5 0.5 0.5 0.5", None, "malformed entry"),
    ("0 nan 0.5 0.5 0.5", None, "box not finite"),
    ("0 0.5 0.5 0 0.5", None, "box without area"),
]


@pytest.mark.parametrize("line, box, kind", YOLO_ROWS)
def test_yolo_rows(line: str, box: list[float] | None, kind: str, tmp_path: Path) -> None:
    root = yolo(tmp_path, "train: images/train\nval: images/val\nnames: [cat, dog]\n")
    write(root / "labels/train/a.txt", f"\n{line}\n")
    split = Dataset.open(root / "data.yaml").train
    assert split is not None
    assert np.allclose(split.boxes, np.array([box] if box else []).reshape(-1, 4), atol=1e-4)
    assert [p.kind for p in split.problems] == ([kind] if kind else [])
    if kind:
        assert split.problems[0].file.endswith(("a.txt", "a.png")) and "2" in split.problems[0].detail


def test_yolo_key_points_are_left_out(tmp_path: Path) -> None:
    root = yolo(tmp_path, "train: images/train\nval: images/val\nnames: [cat]\nkpt_shape: [2, 2]\n")
    for split in ("train", "val"):
        write(root / f"labels/{split}/a.txt", "0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9\n")
    split = Dataset.open(root).train
    assert split is not None and np.allclose(split.boxes, [[10, 7.5, 30, 22.5]])


def test_yolo_without_names_numbers_its_classes(tmp_path: Path) -> None:
    data = Dataset.open(yolo(tmp_path, ""))
    assert data.categories.names == ("class 0", "class 1") and "No file names" in data.notes[0]


def test_voc_difficult_and_damaged(tmp_path: Path) -> None:
    root = voc_kit(tmp_path)
    hard = DOG.format("dog").replace("</object>", "<difficult>1</difficult></object>")
    write(root / "Annotations/a.xml", VOC.format("a", hard + "<object><name>dog</name></object>"))
    write(root / "Annotations/b.xml", "<annotation><oops>")
    data = Dataset.open(root)
    assert data.train is not None and data.train.crowd.tolist() == [True] and len(data.train) == 1
    assert [p.kind for p in data.train.problems] == ["malformed entry"] * 2
    assert "1 boxes of train marked difficult" in data.notes[0]


# ------------------------------------------------------------------------------------ impossible: one clear sentence


def yaml_set(spec: str) -> Callable[[Path], Path]:
    return lambda root: yolo(root, spec)


IMPOSSIBLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such folder": (lambda r: r / "bcdc", "bcdc does not exist; expected a dataset. Did you mean 'bccd'?"),
    "near the built-in": (lambda r: r / "sinthetic", "Did you mean 'synthetic'?"),
    "nothing near": (lambda r: r / "quite" / "else", "The nearest folder is"),
    "empty folder": (lambda r: r / "bccd", "is no dataset: .* got an empty folder"),
    "only images": (lambda r: picture(r / "bccd" / "a.png").parent, "is no dataset: .* got a.png"),
    "no annotation file": (lambda r: picture(r / "a.png"), "a.png is no annotation file"),
    "torn json": (lambda r: write(r / "x.json", '{"images": ['), "x.json is not valid JSON .* copied completely"),
    "not coco": (lambda r: write(r / "x.json", {"a": 1}), "is not a COCO file: .* got a"),
    "results": (lambda r: write(r / "x.json", [{"score": 1}]), "is not a COCO file: expected an object .* got a list"),
    "no images": (lambda r: write(r / "x.json", coco([], [])), "x.json lists no images"),
    "no categories": (lambda r: write(r / "x.json", {**ONE, "categories": []}), "x.json has no categories"),
    "two names": (
        lambda r: write(r / "x.json", {**ONE, "categories": [{"id": 1, "name": n} for n in "ab"]}),
        "gives category 1 two names",
    ),
    "no image found": (lambda r: write(r / "x.json", ONE), "None of the 2 images of .*x.json was found, .* 'a.png'"),
    "no usable image": (
        lambda r: (
            write(picture(r / "set" / "a.png").parent / "x.json", coco(["a.png", "gone.png"], []))
            and write(r / "set" / "a.png", "torn").parent / "y.json"
            and write(r / "set" / "y.json", {**ONE, "images": [{"id": 1, "file_name": "a.png"}]})
        ),
        "no usable image in all; expected at least one. The first problem: a.png",
    ),
    "two datasets": (
        lambda r: short_coco(r / "one").parent if short_coco(r / "two") else r,
        "holds 2 datasets: one, two",
    ),
    "xml without objects": (lambda r: write(r / "v" / "a.xml", VOC.format("a", "")).parent, "None of the 1 XML files"),
    "yaml without names": (yaml_set("train: images/train\n"), "must give names"),
    "yaml with a lost folder": (yaml_set("train: nowhere\nnames: [a]"), "names 'nowhere', which does not exist"),
    "torn yaml": (yaml_set("train: [\n"), "not valid YAML"),
    "yolo without labels": (
        lambda r: write(picture(r / "y" / "images" / "a.png").parent.parent / "d.yaml", "train: images\nnames: [a]"),
        "None of the 1 images of train has a label file; expected .*labels/a.txt",
    ),
    "yolo without images": (
        lambda r: write(r / "y" / "d.yaml", "train: .\nnames: [a]"),
        "has no image for train; expected at least one",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_inputs_get_one_clear_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "bccd").mkdir()
    make, says = IMPOSSIBLE[case]
    with pytest.raises(DataError, match=says) as caught:
        Dataset.open(make(tmp_path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ mean but possible


def test_three_hundred_classes_and_five_hundred_boxes(tmp_path: Path) -> None:
    categories = {3 * i: f"c{i}" for i in range(300)}
    boxes = [(1, 3 * (k % 300), [k % 30, k % 20, 4, 5]) for k in range(500)]
    split = Dataset.open(coco_set(tmp_path, coco(["a.png"], boxes, categories))).train
    assert split is not None and split.boxes.shape == (500, 4) and len(split.categories) == 300
    assert split.problems == ()


def test_one_class_one_pixel_one_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (1, 1))
    content = coco(["a.png"], [(1, 1, [0, 0, 1, 1])], {1: "dot"})
    content["images"][0].update(width=1, height=1)
    data = Dataset.open(write(tmp_path / "all.json", content))
    assert data.train is not None and data.val is None
    assert data.train.boxes.tolist() == [[0, 0, 1, 1]] and data.train.problems == ()


# ------------------------------------------------------------------------------------------------------- the split


@pytest.fixture
def split(tmp_path: Path) -> Split:
    boxes = [(2, 1, [0, 0, 2, 2]), (1, 2, [1, 1, 3, 3]), (2, 2, [4, 4, 5, 5]), (2, 1, [6, 6, 7, 7])]
    content = coco(["a.png", "b.png", "c.png"], boxes)
    content["annotations"][2].update(iscrowd=1, area=11.5)
    found = Dataset.open(coco_set(tmp_path, content)).train
    assert found is not None
    return found


def test_rows_follow_their_images(split: Split) -> None:
    assert split.starts.tolist() == [0, 1, 4, 4]
    assert split.boxes[split.rows(1)].tolist() == [[0, 0, 2, 2], [4, 4, 9, 9], [6, 6, 13, 13]]
    assert split.labels[split.rows(0)].tolist() == [1] and split.rows(2) == slice(4, 4)
    assert split.areas.tolist() == [9, 4, 11.5, 49] and split.crowd.tolist() == [False, False, True, False]
    assert split.images_of_rows.tolist() == [0, 1, 1, 1]
    assert [a.dtype for a in (split.boxes, split.labels, split.crowd, split.areas, split.starts)] == [
        np.dtype(t) for t in (np.float32, np.int64, bool, np.float64, np.int64)
    ]


@pytest.mark.parametrize("chosen", [[], [0], [2], [1, 0], [2, 1, 0], [1, 1]])
def test_take(split: Split, chosen: list[int]) -> None:
    part = split.take(chosen)
    assert list(part.ids) == [split.ids[i] for i in chosen] and len(part) == len(chosen)
    for k, i in enumerate(chosen):
        assert part.paths[k] == split.paths[i] and part.sizes[k].tolist() == split.sizes[i].tolist()
        for a, b in (
            (part.boxes, split.boxes),
            (part.labels, split.labels),
            (part.annotation_ids, split.annotation_ids),
        ):
            assert np.array_equal(a[part.rows(k)], b[split.rows(i)])
    assert part.starts[-1] == len(part.boxes)


def test_without(split: Split) -> None:
    assert list(split.without([]).ids) == [1, 2, 3]
    assert list(split.without([2]).ids) == [1, 3]
    assert split.without([1, 2, 3]).boxes.shape == (0, 4)


def test_pickle_is_small_and_equal(split: Split) -> None:
    again = pickle.loads(pickle.dumps(split))
    assert again.paths == split.paths and again.ids == split.ids and np.array_equal(again.boxes, split.boxes)
    assert again.to_coco() == split.to_coco()


def test_to_coco(split: Split) -> None:
    written = json.loads(json.dumps(split.to_coco()))
    assert written["images"][1] == {"id": 2, "file_name": "b.png", "height": HEIGHT, "width": WIDTH}
    assert written["annotations"][2] == {
        "id": 3,
        "image_id": 2,
        "category_id": 2,
        "bbox": [4, 4, 5, 5],
        "area": 11.5,
        "iscrowd": 1,
    }


def test_repr_says_how_much(split: Split, tmp_path: Path) -> None:
    assert repr(split) == "Split('train', 3 images, 4 boxes, 2 categories)"
    assert "train 3 images with 4 boxes" in repr(Dataset.open(tmp_path))


@pytest.mark.parametrize("name, images_, boxes", [("bccd", 87, 1137), ("coco128", 128, 898)])
def test_truth_scores_one(name: str, images_: int, boxes: int, shared: Path) -> None:
    """The annotations handed in as detections score AP = 1 with pycocotools, whatever the category ids."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    val = Dataset.open(shared / "data" / name).val
    assert val is not None and (len(val), len(val.labels)) == (images_, boxes)
    truth = COCO()
    truth.dataset = val.to_coco()
    truth.createIndex()
    found = [{**a, "score": 1.0} for a in truth.dataset["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1.0
