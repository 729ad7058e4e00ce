"""Fixtures that every test may use."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.loopback import Site

SHARED = Path(__file__).resolve().parents[2] / "shared"
LACKING = "needs the reference data beside the checkout (../shared)"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numerics and real images that lies beside the checkout of those who develop deimkit.

    Without it a test is skipped; with DEIMKIT_REFERENCE=1 in the environment it fails, for machines that must have it.
    """
    if not (SHARED / "golden").is_dir():
        (pytest.fail if os.environ.get("DEIMKIT_REFERENCE") == "1" else pytest.skip)(LACKING)
    return SHARED


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many tests had nothing to compare with: a green line alone would hide it."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if LACKING in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} comparisons with published numbers were skipped: {LACKING}.")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server on this machine that does as it is told (`Site.plan`)."""
    monkeypatch.setenv("no_proxy", "*")
    with Site() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
