"""Published weights are fetched when asked for, checked, kept, and found again without a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from filling import fill

from deimkit import recipes
from deimkit.models.detector import Detector
from deimkit.weights import save_hf

REPOSITORY = "ustc-community/dfine-nano-coco"


class Hub(BaseHTTPRequestHandler):
    """A hub that has one repository; `drops` are requests for the weights that break off half way."""

    folder: Path
    drops = 0
    damage = False
    asked: Counter = Counter()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not self.path.startswith(f"/{REPOSITORY}/resolve/main/") or not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        type(self).asked[path.name] += 1
        content = bytes(len(content)) if self.damage and path.suffix == ".safetensors" else content
        if path.suffix == ".safetensors" and self.asked[path.name] <= self.drops:
            self.wfile.write(content[first : first + 100_000])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[first:])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path):
    """The hub's address and the detector that it serves."""
    detector = fill(Detector(recipes.get("dfine_n").arch, 80))
    save_hf(detector, tmp_path / "served")
    handler = type("Served", (Hub,), {"folder": tmp_path / "served", "asked": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", detector, handler
    server.shutdown()
    server.server_close()


LOAD = """
import json, sys
import deimkit as dk
from deimkit.errors import DeimkitError
try:
    model = dk.load("dfine_n", weights="coco")
    total = sum(x.double().sum().item() for x in model.parameters())
    print(json.dumps({"sum": total, "classes": len(model.categories)}))
except DeimkitError as error:
    print(json.dumps({"error": str(error)}))
"""


def load(address: str | None, home: Path) -> dict:
    """What a process says that loads dfine_n's published weights: the hub's client reads its address only once."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_are_fetched_once_and_found_again_without_the_hub(served, tmp_path):
    address, detector, handler = served
    expected = {"sum": sum(x.double().sum().item() for x in detector.parameters()), "classes": 80}
    assert load(address, tmp_path / "home") == pytest.approx(expected)
    assert handler.asked["model.safetensors"] == 1
    assert load(None, tmp_path / "home") == pytest.approx(expected)


@pytest.mark.slow
def test_a_dropped_connection_loses_nothing(served, tmp_path):
    address, detector, handler = served
    handler.drops = 7  # one more than the client tries: then it is for the user to try again
    assert "What was loaded is kept: try again" in load(address, tmp_path / "home")["error"]
    assert load(address, tmp_path / "home")["classes"] == 80


def test_damaged_weights_are_refused_and_fetched_anew(served, tmp_path):
    address, _, handler = served
    handler.damage = True
    assert "arrived damaged: expected SHA-256" in load(address, tmp_path / "home")["error"]
    handler.damage = False
    assert load(address, tmp_path / "home")["classes"] == 80


def test_without_a_network_the_error_says_what_to_bring(tmp_path):
    said = load(None, tmp_path / "home")["error"]
    assert REPOSITORY in said and "pass weights=FOLDER" in said
