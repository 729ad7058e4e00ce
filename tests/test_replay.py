"""Steps that are not finite: what is said about them, what is kept, and that a replay shows the same again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deimkit as dk
from deimkit.__main__ import main
from deimkit.data.dataset import Dataset
from deimkit.errors import CheckpointError, NonFiniteError
from deimkit.ranks import Ranks
from deimkit.structures import Batch
from deimkit.training import replay as module
from deimkit.training.learner import Learner
from deimkit.training.machine import random_state
from deimkit.training.run import Run
from deimkit.training.trainer import Trainer
from tests.micro import CLOCK, MICRO, equal, scenes, trainer

SHORT = replace(MICRO, timeline=CLOCK.scaled_to(1, 3))
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return scenes(tmp_path)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], how: Callable[[Batch], None]) -> None:
    """Let `how` damage the batches of the steps for which `bad(number of the step)` holds."""
    whole = Trainer._step

    def step(self: Trainer, batch: Batch) -> dict[str, float]:
        if bad(self.global_step):
            how(batch)
        return whole(self, batch)

    monkeypatch.setattr(Trainer, "_step", step)


def infinite_pixel(batch: Batch) -> None:
    batch.images = batch.images.float()
    batch.images[1, 0, 5, 7] = math.inf


def missing_corner(batch: Batch) -> None:
    batch.targets.boxes[batch.targets.image == 1, 2] = math.nan


def skipped(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.events() if row["event"] == "skipped"]


@pytest.mark.parametrize(
    ("how", "why", "fault"),
    [
        (infinite_pixel, "final", "its pixels are not finite"),
        (missing_corner, "Targets.boxes must be finite; got \\[.*nan", "a box of it is not finite"),
    ],
)
def test_a_poisoned_batch_is_named_and_a_replay_shows_the_same(tmp_path, data, monkeypatch, how, why, fault):
    spoil(monkeypatch, lambda step: step == 1, how)
    one = trainer(tmp_path / "run", data, SHORT)
    run = one.fit()
    monkeypatch.undo()
    assert run.finished
    (event,) = skipped(run)
    kept = torch.load(event["batch"], weights_only=True)
    names = kept["replay"]["names"]
    assert event["at_fault"] == {names[1]: fault} and event["images"] == names
    assert f"At fault: {names[1]} ({fault})" in event["why"] and "deimkit replay" in one.progress.lines[0]

    drawn = torch.get_rng_state()
    again = dk.replay(event["batch"])
    assert torch.equal(drawn, torch.get_rng_state())
    assert again.reproduced and again.now == again.noted == kept["why"]
    assert re.search(why, again.now)
    assert again.finding.images == {names[1]: fault} and again.where == {"epoch": 0, "step": 1}
    assert "now:  the same" in str(again) and f"at fault: {names[1]}: {fault}" in str(again)


def overflowing(run: Trainer) -> None:
    """Weights that are too large for fp16, and only for that."""
    with torch.no_grad():
        run.learner.model.encoder.input_proj[0].conv.weight.mul_(1e7)


def test_an_overflow_in_fp16_names_the_part_of_the_detector(tmp_path, data, monkeypatch):
    whole = Trainer._step

    def step(self: Trainer, batch: Batch) -> dict[str, float]:
        if self.global_step == 1:
            overflowing(self)
        return whole(self, batch)

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr("deimkit.training.trainer.SKIPS", 100)
    one = trainer(tmp_path / "run", data, SHORT)
    one.precision = torch.float16
    run = one.fit()
    first, second = skipped(run)
    assert "float16" in first["module"] and first["module"].startswith("the output of encoder.input_proj.0")
    assert f"First not finite: {first['module']}." in first["why"] and len(first["at_fault"]) == 2
    assert Path(first["batch"]).parent == Path(second["batch"]).parent, "one copy of the weights is enough"

    again = dk.replay(first["batch"])
    assert again.reproduced and again.now == again.noted and again.finding.module == first["module"]
    assert again.precision == "float16"
    fine = dk.replay(first["batch"], precision="fp32")
    assert not fine.reproduced and fine.finding == module.Finding("", {}) and "everything is finite" in str(fine)


def test_the_steps_random_numbers_come_again(tmp_path, data, monkeypatch):
    """The loss of a replay is that of the step to the last bit, noise of the denoising queries included."""
    seen = []
    whole = Learner.gradients

    def gradients(self, batch, watch=None):
        terms = whole(self, batch, watch)
        seen.append(terms)
        if len(seen) == 2:
            raise NonFiniteError("as if it were not")
        return terms

    monkeypatch.setattr(Learner, "gradients", gradients)
    run = trainer(tmp_path / "run", data, SHORT).fit()
    (event,) = skipped(run)
    dk.replay(event["batch"])
    assert seen[-1] == seen[1] and seen[2] != seen[1]
    assert event["at_fault"] == {} and event["module"] == "" and event["why"] == "as if it were not"


def test_looking_leaves_no_trace(tmp_path, data):
    one = trainer(tmp_path / "run", data, SHORT)
    one._prepare()
    batch = next(one.loader.epoch(1))
    before, drawn = {k: v.clone() for k, v in one.learner.model.state_dict().items()}, torch.get_rng_state()
    fine = module.examine(one.learner, batch, random_state(CPU))
    assert fine == module.Finding("", {}) and str(fine) == ""
    infinite_pixel(batch)
    assert module.examine(one.learner, batch, random_state(CPU)).images == {batch.names[1]: "its pixels are not finite"}
    assert equal(before, one.learner.model.state_dict()) and torch.equal(drawn, torch.get_rng_state())


def test_of_several_processes_each_looks_at_its_own_images(tmp_path, data, monkeypatch):
    one = trainer(tmp_path / "run", data, SHORT)
    one._prepare()
    batch = next(one.loader.epoch(1))
    monkeypatch.setattr(one.learner, "ranks", Ranks(1, 2))
    monkeypatch.setattr(one.learner, "losses", None)
    missing_corner(batch)
    assert module.examine(one.learner, batch, random_state(CPU)).images == {batch.names[1]: "a box of it is not finite"}


def test_one_image_is_found_by_itself(tmp_path, data, monkeypatch):
    """Pixels and boxes are fine, and it is still this image that the detector cannot stand."""
    one = trainer(tmp_path / "run", data, SHORT)
    one._prepare()
    batch = next(one.loader.epoch(1))
    batch.images[1] = 0
    batch.images = batch.images.float() / 255
    batch.mix = batch.size = None

    def divide(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0] / given[0].amax((1, 2, 3), keepdim=True), *given[1:])

    one.learner.model.backbone.register_forward_pre_hook(divide)
    found = module.examine(one.learner, batch, random_state(CPU))
    assert list(found.images) == [batch.names[1]] and found.module.startswith("the output of backbone.")


def test_broken_weights_are_named_first(tmp_path, data):
    one = trainer(tmp_path / "run", data, SHORT)
    one._prepare()
    with torch.no_grad():
        one.learner.model.decoder.layers[0].cross_attn.sampling_offsets.weight[0, 0] = math.nan
    found = module.examine(one.learner, next(one.loader.epoch(1)), random_state(CPU))
    assert found.module == "the weights decoder.layers.0.cross_attn.sampling_offsets.weight" and len(found.images) == 2
    assert "First not finite: the weights decoder.layers.0" in str(found)


def test_only_the_newest_are_kept(tmp_path, data, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    spoil(monkeypatch, lambda step: step in (0, 2, 3, 5), infinite_pixel)
    run = trainer(tmp_path / "run", data, replace(MICRO, timeline=CLOCK.scaled_to(2, 3))).fit()
    assert len(skipped(run)) == 4
    kept = {p.name: sorted(f.name for f in p.iterdir()) for p in (tmp_path / "run" / "replay").iterdir()}
    assert kept == {
        "from_epoch0_step2": ["epoch0_step2.pt", "epoch1_step0.pt", "weights.pt"],
        "from_epoch1_step2": ["epoch1_step2.pt", "weights.pt"],
    }


def test_what_is_no_replay_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no batch.*folder replay of a run"):
        dk.replay(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="No checkpoint at .*absent"):
        dk.replay(tmp_path / "absent.pt")


def test_the_command(tmp_path, data, monkeypatch, capsys):
    spoil(monkeypatch, lambda step: step == 1, infinite_pixel)
    (event,) = skipped(trainer(tmp_path / "run", data, SHORT).fit())
    monkeypatch.undo()
    assert main(["replay", event["batch"], "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said["reproduced"] and list(said["at_fault"].values()) == ["its pixels are not finite"]
    assert text[0].startswith("2 images with ") and text[0].endswith("step 1 of epoch 0, tried again in float32 on cpu")


def test_what_was_kept_before_a_kill_makes_way(tmp_path, data):
    """The same steps come again after a kill, with other weights; another process's share of this step stays."""
    one = trainer(tmp_path / "run", data, SHORT)
    one._prepare()
    batch, drawn = next(one.loader.epoch(1)), random_state(CPU)
    series = tmp_path / "run" / "replay" / "from_epoch0_step1"
    facts = {"why": "inf", "where": {"epoch": 0, "step": 1}}
    module.keep(series / "epoch0_step1_rank0.pt", one.learner, batch, drawn, facts, begins=True)
    module.keep(series / "epoch0_step2_rank0.pt", one.learner, batch, drawn, facts, begins=False)
    before = module.read(series / "epoch0_step1_rank0.pt")["model"]
    with torch.no_grad():
        next(one.learner.model.parameters()).add_(1)
    torch.save({}, series / "epoch0_step1_rank1.pt")
    module.keep(series / "epoch0_step1_rank0.pt", one.learner, batch, drawn, facts, begins=True)
    assert sorted(path.name for path in series.iterdir()) == [
        *("epoch0_step1_rank0.pt", "epoch0_step1_rank1.pt", "weights.pt"),
    ]
    after = module.read(series / "epoch0_step1_rank0.pt")["model"]
    assert not equal(before, after) and equal(after, one.learner.model.state_dict())
    (series.parent / "note.txt").write_text("not a folder")
    blocked = series.parent / "from_epoch0_step5"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="Could not keep a batch in .*from_epoch0_step5"):
        module.keep(blocked / "epoch0_step5.pt", one.learner, batch, drawn, facts, begins=True)
