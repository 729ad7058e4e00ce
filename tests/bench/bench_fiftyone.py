"""What a detector makes of 1,000 images, 100 detections each with their traces, judged and put into FiftyOne.

The database is one of its own, begun here. Peer: FiftyOne's own way, by an object for every label, on fewer images.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from deimkit.data.split import Split
from deimkit.evaluation.coco import Results
from deimkit.evaluation.errors import errors
from deimkit.explore.fiftyone import ready
from deimkit.explore.findings import Findings
from deimkit.explore.traces import Traces
from tests.bench.paired import Row, seconds
from tests.scenes import random_results, random_split

IMAGES, MANY, CLASSES, OBJECTS, DETECTIONS, LAYERS, SIDE = 1000, 10_000, 80, 7, 100, 6, 640
PEER = 20  # images of which FiftyOne's own way is measured


def split_of(images: int, folder: Path) -> Split:
    """Random annotations on `images` links to one image."""
    rng = np.random.default_rng(0)
    split = random_split(rng, images, CLASSES, OBJECTS, side=SIDE)
    Image.new("L", (SIDE, SIDE)).save(folder / "all.png")
    paths = [folder / f"{i}.png" for i in range(images)]
    for path in paths:
        if not path.exists():
            os.link(folder / "all.png", path)
    return replace(split, paths=paths, labels=rng.integers(0, CLASSES, len(split.labels)))


def results_of(split: Split) -> Results:
    """The 100 most confident of random detections of each image."""
    found = random_results(np.random.default_rng(1), split, DETECTIONS)
    order = np.lexsort((-found.score, found.image))
    image = found.image[order]
    rank = np.arange(len(image)) - np.searchsorted(image, image)
    return Results(*(x[order[rank < DETECTIONS]] for x in found))


def traces_of(split: Split, results: Results) -> Traces:
    """Traces of the size of a detector's with six decoder layers."""
    n, m = len(results.score), len(split.labels)
    rng = np.random.default_rng(2)
    seen = rng.random((m, LAYERS), np.float32)
    return Traces(
        results=results,
        query=rng.integers(0, 300, n, np.int32),
        layers=tuple(f"layer{i}" for i in range(LAYERS - 1)) + ("final",),
        boxes=np.repeat(results.boxes.astype(np.float32)[:, None], LAYERS, 1),
        scores=np.repeat(results.score.astype(np.float32)[:, None], LAYERS, 1),
        start=results.boxes.astype(np.float32),
        spread=rng.random((n, 4), np.float32),
        matched=rng.integers(0, 300, (m, LAYERS), np.int32),
        matched_iou=seen,
        matched_score=seen,
        truth=split.boxes,
        fingerprint=split.fingerprint(),
    )


def ours(images: int, folder: Path) -> dict[str, float]:
    """Seconds to judge and to write, to write again, and peak memory in MiB before and after."""
    from deimkit.explore.fiftyone.database import connect
    from deimkit.explore.fiftyone.samples import to_fiftyone

    connect()
    split = split_of(images, folder)
    traces = traces_of(split, results_of(split))
    before = peak()
    start = time.perf_counter()
    found = Findings(errors(split, traces.results), traces)
    assert found.images and found.annotations and found.detections and found.errors.coco
    judged, held = time.perf_counter() - start, peak()
    write = seconds(lambda: to_fiftyone(split, found, name=f"bench {images}", overwrite=True))
    again = seconds(lambda: to_fiftyone(split, found, name=f"bench {images}"))
    return {"judge": judged, "write": write, "again": again, "before": before, "held": held, "peak": peak()}


def theirs(images: int, folder: Path) -> dict[str, float]:
    """Seconds to add as many images by FiftyOne's objects, with fewer attributes, and to let it evaluate them."""
    from deimkit.explore.fiftyone.database import connect, quiet
    from deimkit.explore.fiftyone.documents import relative

    fo = connect()
    split = split_of(images, folder)
    results, names = results_of(split), split.categories.names

    def labels(boxes: Any, label: Any, score: Any) -> Any:
        rows = zip(relative(boxes, np.full((len(boxes), 2), SIDE)), label.tolist(), score, strict=True)
        return fo.Detections(
            detections=[fo.Detection(label=names[k], bounding_box=box, confidence=s) for box, k, s in rows]
        )

    def sample(i: int) -> Any:
        rows, found = split.rows(i), results.image == i
        truth = labels(split.boxes[rows], split.labels[rows], [None] * (rows.stop - rows.start))
        said = labels(results.boxes[found], results.label[found], results.score[found].tolist())
        return fo.Sample(filepath=str(split.paths[i]), ground_truth=truth, predictions=said)

    dataset = fo.Dataset("peer", overwrite=True)
    with quiet():
        add = seconds(lambda: dataset.add_samples([sample(i) for i in range(images)], progress=False))
        judge = seconds(
            lambda: dataset.evaluate_detections(
                "predictions", gt_field="ground_truth", compute_mAP=True, eval_key="eval", progress=False
            )
        )
    return {"judge": judge, "write": add}


def peak() -> float:
    """The most memory this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measured(what: str, images: int, folder: Path, address: str) -> dict[str, float]:
    """The numbers of a process of its own."""
    code = f"import json; from pathlib import Path; from tests.bench import bench_fiftyone as b; print(json.dumps(b.{what}({images}, Path({str(folder)!r}))))"  # noqa: E501
    environment = {**os.environ, "FIFTYONE_DATABASE_URI": address, "FIFTYONE_DO_NOT_TRACK": "true"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(said.stdout.splitlines()[-1]))


def resident(process: int) -> float:
    """The most memory that another process has held, in MiB; NaN where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def rows() -> Iterator[Row]:
    if not ready().ok:
        return  # FiftyOne is an extra
    import fiftyone

    mongod = Path(fiftyone.__file__).parent / "db" / "bin" / "mongod"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket", "--wiredTigerCacheSizeGB", "0.5"]
        (folder / "db").mkdir()
        server = subprocess.Popen(
            [str(mongod), "--dbpath", str(folder / "db"), "--logpath", str(folder / "log"), *options],
            stdout=subprocess.DEVNULL,
        )
        try:
            yield from _measurements(folder, f"mongodb://127.0.0.1:{port}", server.pid)
        finally:
            server.terminate()
            server.wait()


def _measurements(folder: Path, address: str, server: int) -> Iterator[Row]:
    first, peer = measured("ours", IMAGES, folder, address), measured("theirs", PEER, folder, address)
    scale = IMAGES / PEER
    for what, name in (("judge", "evaluate"), ("write", "import")):
        slow = peer[what] * scale
        note = f"{IMAGES} images x {DETECTIONS} detections; FiftyOne's of {PEER} images, times {scale:.0f}"
        yield Row(name, first[what], slow, "s", slow / first[what], note)
    yield Row("import again", first["again"], None, "s", None)
    yield Row(
        "peak memory", first["peak"], None, "MiB", None, f"{first['before']:.0f} before, {first['held']:.0f} judged"
    )
    many = measured("ours", MANY, folder, address)
    for stage, name in (("before", "given"), ("held", "judged"), ("peak", "written")):
        grown = 1024 * (many[stage] - first[stage]) / (MANY - IMAGES)
        yield Row(f"memory per image, {name}", grown, None, "KiB", None, f"{many[stage]:.0f} MiB at {MANY} images")
    yield Row(f"import of {MANY}", many["write"], None, "s", None)
    yield Row("peak memory of mongod", resident(server), None, "MiB", None, "with a cache of 0.5 GB")
