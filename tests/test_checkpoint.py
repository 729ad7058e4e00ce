"""A checkpoint is whole or absent, and reading one never runs code."""

import errno
import os
import pickle

import pytest
import torch

from deimkit.errors import CheckpointError
from deimkit.training import checkpoint


def test_what_is_saved_comes_back(tmp_path):
    state = {"recipe": "Recipe()", "model": {"w": torch.arange(6.0).view(2, 3)}, "epoch": 3}
    checkpoint.save(tmp_path / "last.pt", state)
    found = checkpoint.load(tmp_path / "last.pt")
    assert found["epoch"] == 3 and torch.equal(found["model"]["w"], state["model"]["w"])
    assert os.listdir(tmp_path) == ["last.pt"]  # no partial file left behind


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"recipe": "r", "epoch": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device.*previous checkpoint is intact"):
        checkpoint.save(path, {"recipe": "r", "epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_copy_survives_the_next_save(tmp_path):
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    checkpoint.save(last, {"recipe": "r", "epoch": 1})
    checkpoint.copy(last, best)
    checkpoint.save(last, {"recipe": "r", "epoch": 2})
    assert checkpoint.load(best)["epoch"] == 1 and checkpoint.load(last)["epoch"] == 2


class Bomb:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped):
    victim = str(tmp_path / "ran")
    if zipped:
        torch.save({"model": Bomb(victim)}, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Bomb(victim)}))
    with pytest.raises(CheckpointError, match="evil.pth was refused: .* could run code"):
        checkpoint.load(tmp_path / "evil.pth")
    assert not os.path.exists(victim)


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_a_truncated_file_is_named(tmp_path, keep):
    checkpoint.save(tmp_path / "last.pt", {"recipe": "r", "w": torch.zeros(1000)})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="cut.pt is damaged"):
        checkpoint.load(tmp_path / "cut.pt")


def test_a_missing_file_names_its_neighbours(tmp_path):
    checkpoint.save(tmp_path / "best.pt", {"recipe": "r"})
    with pytest.raises(CheckpointError, match="No checkpoint at .*lost.pt. There: best.pt"):
        checkpoint.load(tmp_path / "lost.pt")


def test_another_kind_of_file_is_told_how_to_be_loaded(tmp_path):
    torch.save({"model": {}}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="weights=path"):
        checkpoint.load(tmp_path / "published.pth")
