"""MongoDB servers that belong to a test, so that no test meets another's datasets or those of whoever runs it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deimkit.explore.fiftyone.mongod import mongod_path

THERE = importlib.util.find_spec("fiftyone") is not None and mongod_path().is_file()
needs_mongod = pytest.mark.skipif(not THERE, reason="needs FiftyOne with its mongod: `make fiftyone`")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Mongod:
    """A server of a test's own, on the same port whenever it is started."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What FIFTYONE_DATABASE_URI takes; one that is gone is noticed within seconds."""
        return f"mongodb://127.0.0.1:{self.port}/?serverSelectionTimeoutMS=3000"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.folder.mkdir(exist_ok=True)
        where = ["--dbpath", str(self.folder), "--logpath", str(self.folder / "own.log"), "--port", str(self.port)]
        limits = ["--bind_ip", "127.0.0.1", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]
        self.process = subprocess.Popen([mongod_path(), *where, *limits], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("mongod did not listen")

    def kill(self) -> None:
        """End it at once, as an out-of-memory killer does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Mongod:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.kill()


def run_python(code: str, **environment: str) -> str:
    """What a Python of its own prints, since FiftyOne keeps one database per process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FIFTYONE_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
