"""The command line does what it was asked, or says in one sentence why not."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deimkit import recipes
from deimkit.__main__ import RUNS, claimed, claims, main, table
from deimkit.arguments import build_parser
from deimkit.data.dataset import CategoryMap, Dataset
from deimkit.weights.classes import COCO_NAMES
from tests.micro import MICRO, scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _zoo(monkeypatch):
    """Let "micro" be the name of a recipe."""
    monkeypatch.setitem(recipes._ALL, "micro", MICRO)


QUICK = ["--epochs", "1", "--batch", "2", "--size", "64", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> str:
    out = str(tmp_path_factory.mktemp("runs") / "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes._ALL, "micro", MICRO)
        assert main(["train", "micro", "--data", data.source, "--out", out, *QUICK]) == 0
    return out


def last_line(capsys) -> object:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *args: str) -> str:
    """The one sentence that the command line gives for refusing these arguments."""
    assert main([*args, "--json"]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"deimkit {args[0]}: ") and json.loads(printed.out.splitlines()[-1])["error"] in line
    return line


def test_two_recipes_are_compared(capsys):
    assert main(["recipes", "diff", "deim_table5_gamma1.5", "deim_table5_gamma2.0", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("losses") and "gamma=2.0" in line.partition("->")[2] for line in printed)
    assert set(json.loads(printed[-1])["diff"]) == {"name", "losses", "paper.ap"}
    assert "diff NAME NAME; got diff tiny." in refused(capsys, "recipes", "diff", "tiny")
    assert "Did you mean" in refused(capsys, "recipes", "diff", "tiny", "deim_dfin_n")
    assert "got diff." in refused(capsys, "recipes", "diff")
    assert main(["recipes", "diff", "tiny", "tiny"]) == 0 and "no difference" in capsys.readouterr().out


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = last_line(capsys)
    assert {"tiny", "deim_dfine_n"} <= {row["name"] for row in rows}
    assert next(row for row in rows if row["name"] == "deim_dfine_l")["paper"]["ap"] == 54.7
    assert main(["recipes", "deim_dfine_n"]) == 0
    assert recipes.parse(capsys.readouterr().out) == recipes.get("deim_dfine_n")


def test_a_training_is_rehearsed_and_forecast(capsys, data):
    command = ["rehearse", "micro", "--data", data.source, "--size", "64", "--device", "cpu"]
    assert main([*command, "--steps", "8", "--images", "1000", "--val-images", "0", "--workers", "0", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert any(line.startswith("in all ") for line in printed)
    assert result["hours"] == pytest.approx(sum(stage["hours"] for stage in result["stages"].values()))
    assert sum(stage["steps"] for stage in result["stages"].values()) == MICRO.fit_to(1000).timeline.steps
    assert result["evaluation_hours"] == 0 and result["epochs"] == MICRO.timeline.total
    assert result["low"] <= result["hours"] <= result["high"] and result["images"] == 1000
    assert "Give" in refused(capsys, *command, "--steps", "1")
    assert "--images must be at least 1; got -5" in refused(capsys, *command, "--images", "-5")


def test_train_twice_into_one_folder(capsys, tmp_path, data):
    out = str(tmp_path / "X")
    command = ["train", "micro", "--data", data.source, "--out", out, *QUICK]
    assert main([*command, "--json"]) == 0
    result = last_line(capsys)
    assert result["run"] == out and result["state"] == "finished" and 0 <= result["AP"] <= 1
    assert Path(result["report"]).is_file()
    assert f"`deimkit train --resume {out}`" in refused(capsys, *command)
    assert main(["train", "--resume", out, "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "is finished: nothing is left to train" in printed[0] and json.loads(printed[-1])["AP"] == result["AP"]


def test_a_run_is_measured_and_predicts(capsys, tmp_path, data, run):
    assert main(["eval", run, "--data", data.source, "--json", "--device", "cpu"]) == 0
    result = last_line(capsys)
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"} <= set(result)
    assert result["APl"] is None and set(result["per_class"]) == set(data.categories.names)

    image = str(data.val.paths[0])
    shown = ["--threshold", "0", "--size", "96", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["predict", run, image, *shown, "--json"]) == 0
    (row,) = last_line(capsys)
    assert row["image"] == image and set(row["objects"][0]) == {"name", "score", "box"}
    assert (tmp_path / f"000001_{Path(image).name}.png").is_file()


def test_the_papers_claim_stands_beside_a_measurement_of_cocos_classes(capsys, tmp_path, data, run, monkeypatch):
    coco = replace(data.val, categories=CategoryMap.of(list(COCO_NAMES)))
    paper = claimed("deim_dfine_n", coco)
    assert claims(paper) == "AP 0.430  AP50 0.604  AP75 0.462  APs 0.245  APm 0.471  APl 0.621"
    assert claims(recipes.Paper("t", ap=50.0)).startswith("AP 0.500  AP50 -  ")
    assert claimed("deim_dfine_n", data.val) is None and claimed(run, coco) is None and claimed("x.pt", coco) is None
    (tmp_path / "recipe.py").write_text(recipes.to_python(recipes.get("deim_dfine_l")))
    assert claimed(str(tmp_path), coco).ap == 54.7

    monkeypatch.setattr("deimkit.__main__.claimed", lambda what, split: paper)
    assert main(["eval", run, "--data", data.source, "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"claimed on COCO val2017 (DEIM Table 11): {claims(paper)}" in printed
    assert json.loads(printed[-1])["claimed"]["ap"] == 43.0


def test_what_a_measurement_left_out_is_said(capsys, tmp_path, run):
    broken = scenes(tmp_path)
    annotations = next(Path(broken.source).rglob("*val*.json"))
    state = json.loads(annotations.read_text())
    state["annotations"][0]["bbox"][2] = 0
    annotations.write_text(json.dumps(state))
    assert main(["eval", run, "--data", broken.source, "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("1 problem(s) of this split stayed out of it") for line in printed)
    assert json.loads(printed[-1])["problems"] == 1


def test_a_weight_file_needs_its_recipe(capsys, data, run):
    weights = str(Path(run) / "checkpoints" / "best.pt")
    assert main(["eval", "micro", "--weights", weights, "--data", data.source, "--json"]) == 0
    assert last_line(capsys)["AP"] >= 0
    assert "needs weights=" in refused(capsys, "eval", "tiny", "--data", data.source)


def test_the_doctor_has_an_exit_status(capsys, tmp_path, data):
    assert main(["doctor", data.source, "--json"]) == 0
    assert last_line(capsys)["ok"] is True
    assert main(["doctor", str(tmp_path), "--json"]) == 1
    report = last_line(capsys)
    assert report["ok"] is False and report["problems"][0]["severity"] == "error"


def test_what_is_refused_is_said_in_one_sentence(capsys, tmp_path, data, run):
    lost = str(tmp_path / "lost")
    assert "Did you mean 'tiny'" in refused(capsys, "train", "tinny", "--data", data.source, "--out", lost)
    assert "Did you mean 'tiny'" in refused(capsys, "recipes", "tinny")
    assert "does not exist" in refused(capsys, "train", "tiny", "--data", lost, "--out", lost)
    assert "needs a recipe and --data" in refused(capsys, "train", "tiny", "--out", lost)
    assert "No weights at" in refused(capsys, "train", "tiny", "--data", data.source, "--out", lost, "--weights", lost)
    assert "multiples of 32" in refused(capsys, "train", "tiny", "--data", data.source, "--out", lost, "--size", "100")
    assert "No run in" in refused(capsys, "train", "--resume", lost)
    assert "Nothing to load" in refused(capsys, "eval", lost, "--data", data.source)
    assert "Nothing to load" in refused(capsys, "predict", lost, str(data.val.paths[0]))
    assert "has no test split" in refused(capsys, "eval", run, "--data", data.source, "--split", "test")
    assert "No image" in refused(capsys, "predict", run, str(data.val.paths[0]) + "x", "--device", "cpu")
    assert "in [0, 1]" in refused(capsys, "predict", run, str(data.val.paths[0]), "--threshold", "50")
    assert not Path(lost).exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unsafe_and_unfitting_files_are_refused(capsys, tmp_path, data, run):
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"format": 1, "recipe": subprocess.Popen}))
    assert "could run code" in refused(capsys, "eval", str(evil), "--data", data.source)
    other = tmp_path / "other.pth"
    torch.save(MICRO.build(["left", "right"]).state_dict(), other)
    assert "knows 2 classes" in refused(capsys, "eval", "micro", "--weights", str(other), "--data", data.source)


def test_a_recipe_file_with_a_misspelt_field_is_refused(capsys, tmp_path, run):
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("recipe.py", "run.json"):
        (folder / name).write_text((Path(run) / name).read_text().replace("batch=", "bacth="))
    assert "no field 'bacth'. Did you mean 'batch'" in refused(capsys, "train", "--resume", str(folder))


@pytest.mark.parametrize(
    "args", [["trian", "tiny"], ["train", "tiny", "--epoch-count", "3"], ["train", "--epochs", "x"]]
)
def test_a_misspelt_command_or_option_exits_with_2(capsys, args):
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2 and "deimkit" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_no_traceback(capsys, tmp_path, data):
    blocked = tmp_path / "file"
    blocked.touch()
    assert "file" in refused(capsys, "train", "tiny", "--data", data.source, "--out", str(blocked / "run"))


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "deimkit", "recipes", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and json.loads(done.stdout.splitlines()[-1])


def test_a_table_has_dashes_where_nothing_was_to_be_found():
    result = {"AP": 0.5, "APl": float("nan"), "per_class": {"cat": {"AP": None, "AP50": 0.25, "count": 0}}}
    assert table(result).splitlines() == ["AP 0.500  APl -", "  cat  AP -  AP50 0.250  boxes 0"]


def test_every_command_is_carried_out() -> None:
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert set(commands or ()) == set(RUNS)
