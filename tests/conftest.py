"""Fixtures that every test may use."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numerics and real images that lies beside the checkout of those who develop deimkit."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("needs the reference data beside the checkout (../shared)")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
