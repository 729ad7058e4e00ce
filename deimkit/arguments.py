"""What the command line takes: every command with its arguments, as `deimkit COMMAND --help` says them."""

from __future__ import annotations

import argparse
from typing import Any

import deimkit as dk


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="deimkit", description="Train, look into and ship real-time DETR detectors.")
    parser.add_argument("--version", action="version", version=f"deimkit {dk.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
        return sub

    sub = command("recipes", "list the recipes with the papers' numbers, print one, or compare two")
    sub.add_argument("names", nargs="*", metavar="NAME", help="a recipe to print as Python; or: diff NAME NAME")

    command("weights", "list the published weights that can be fetched by name, with the papers' claims")

    sub = command("rehearse", "train a few steps of every stage, and forecast what the whole will take")
    sub.add_argument("recipe", help="name of a recipe (deimkit recipes)")
    sub.add_argument("--data", required=True, help="a dataset's folder or file, or synthetic: a hundred images will do")
    sub.add_argument("--steps", type=int, default=20, help="in all stages together")
    sub.add_argument(
        "--rehearsed", type=share, metavar="N", help="images per step of the dry run, on one device; or: largest"
    )
    sub.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--batch", type=int, help="images per step of the whole training (default: the recipe's)")
    sub.add_argument("--images", type=int, help="to learn from in the whole training (default: those of --data)")
    sub.add_argument("--val-images", type=int, help="to measure on after every epoch (default: those of --data)")
    sub.add_argument("--epochs", type=int, help="of the whole training (default: the recipe's)")
    sub.add_argument("--devices", type=int, help="that share the batch (default: all there are)")
    sub.add_argument("--workers", type=int, help="loader processes (default: what suits this machine)")

    sub = command("profile", "take a few steps apart: where their time and memory go, and what to change")
    sub.add_argument("recipe", help="name of a recipe (deimkit recipes)")
    sub.add_argument("--data", required=True, help="a dataset's folder or file, or synthetic: a hundred images will do")
    sub.add_argument("--steps", type=int, default=20, help="in all stages together")
    sub.add_argument("--batch", type=int, help="images per step (default: what one GPU here gets, 2 on a CPU)")
    sub.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    sub.add_argument("--workers", type=int, help="loader processes (default: what suits this machine)")
    sub.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    sub.add_argument("--compile", action="store_true", help="measure compiled steps too, once they are compiled")
    sub.add_argument("--trace", metavar="FILE", help="write what the profiler saw, for Perfetto or chrome://tracing")

    sub = command("train", "train a recipe on a dataset")
    sub.add_argument("recipe", nargs="?", help="name of a recipe (deimkit recipes)")
    sub.add_argument("--data", help="a dataset's folder or file, or synthetic")
    sub.add_argument("--out", help="the run's folder (default: runs/RECIPE)")
    sub.add_argument("--epochs", type=int)
    sub.add_argument("--batch", type=int, help="images per optimiser step")
    sub.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    sub.add_argument("--lr", type=float, help="base learning rate; the backbone's follows in proportion")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="--no-wait: train in the background"
    )
    sub.add_argument("--prepare", action="store_true", help="only write the run's folder, for deimkit sbatch")
    sub.add_argument(
        "--resume", metavar="RUN", help="continue this run from its last checkpoint (--data: on this data)"
    )
    sub.add_argument(
        "--weights", help="start from this checkpoint, file, address, Hugging Face folder or name (deimkit weights)"
    )
    sub.add_argument("--devices", type=int, default=1, help="processes on this machine that share a batch, one per GPU")
    sub.add_argument("--nodes", type=int, default=1, help="machines that do; the same command on each")
    sub.add_argument("--rdzv", metavar="HOST:PORT", help="where the machines meet (a job of Slurm finds it itself)")
    sub.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    sub.add_argument("--workers", type=int, help="loader processes")
    sub.add_argument(
        "--accumulate", type=parts, default=1, metavar="N", help="micro-batches per step, or auto: as memory requires"
    )
    sub.add_argument(
        "--compile", action="store_true", help="let torch compile the detector; `profile --compile` measures"
    )
    sub.add_argument("--deterministic", action="store_true", help="the same bits every time on a GPU too, but slower")
    logged = "show the run in tensorboard, wandb or mlflow too; may be given several times"
    sub.add_argument("--logger", action="append", default=[], metavar="NAME", help=logged)
    sub.add_argument("--patience", type=int, help="stop after so many epochs without a better AP")
    sub.add_argument("--evaluate-every", type=int, default=1, metavar="EPOCHS")
    sub.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints within an epoch too")
    sub.add_argument("--on-problem", default="refuse", choices=("refuse", "skip"), help="images the doctor finds wrong")

    sub = command("sbatch", "write the job of Slurm that trains a run, as often as it takes to finish it")
    sub.add_argument("folder", metavar="RUN", help="a run's folder (deimkit train ... --prepare)")
    sub.add_argument("--time", default="24:00:00", metavar="[DAYS-]HH:MM:SS", help="of one job (default: 24:00:00)")
    sub.add_argument("--partition")
    sub.add_argument("--account")
    sub.add_argument("--cpus", type=int, help="cores of each node (default: what its processes and their loaders need)")
    sub.add_argument("--notice", type=int, default=300, help="seconds before the end to save and leave (default: 300)")
    sub.add_argument("--line", action="append", default=[], help="another option of sbatch, as --line=--mem=200G")

    sub = command("eval", "measure a run or a checkpoint on a dataset: COCO's twelve numbers, and per class")
    sub.add_argument(
        "what", metavar="RUN", help="a run's folder, a .pt, a Hugging Face folder, or a recipe with --weights"
    )
    sub.add_argument("--data", required=True, help="a dataset's folder or file, or synthetic")
    sub.add_argument("--split", default="val", choices=("train", "val", "test"))
    sub.add_argument("--weights", help="a file, an address or a name (deimkit weights), when RUN is a recipe's")
    sub.add_argument("--size", type=int, nargs="+")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--backend", default="fast", choices=("fast", "pycocotools"))

    sub = command("errors", "show where a run or a checkpoint fails on a dataset, and what each error costs")
    sub.add_argument(
        "what", metavar="RUN", help="a run's folder, a .pt, a Hugging Face folder, or a recipe with --weights"
    )
    sub.add_argument("--data", required=True, help="a dataset's folder or file, or synthetic")
    sub.add_argument("--split", default="val", choices=("train", "val", "test"))
    sub.add_argument(
        "--threshold", type=fraction, help="the least score that is counted, in [0, 1] (default: where F1 is largest)"
    )
    sub.add_argument("--iou", type=fraction, default=0.5, help="from which IoU on a detection is right (default: 0.5)")
    sub.add_argument("--out", metavar="FILE.html", help="write a page with tables and curves")
    sub.add_argument("--sheet", metavar="FILE.html", help="write a page with the worst images of every kind")
    sub.add_argument(
        "--fixes", metavar="FILE.json", help="write the annotations to look at, for deimkit doctor --fixes"
    )
    sub.add_argument("--app", action="store_true", help="show images, boxes and views in FiftyOne's App")
    sub.add_argument("--weights", help="a file, an address or a name (deimkit weights), when RUN is a recipe's")
    sub.add_argument("--size", type=int, nargs="+")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--device", default="auto")

    sub = command("predict", "find objects in images, a folder or a video")
    sub.add_argument(
        "what", metavar="RUN", help="a run's folder, a .pt, a Hugging Face folder, or a recipe with --weights"
    )
    sub.add_argument("images", nargs="+", help="images, folders, or videos")
    sub.add_argument("--threshold", type=float, default=0.5, help="the least score, in [0, 1]")
    sub.add_argument("--out", help="folder for the drawn images, numbered in the order of the lines printed")
    sub.add_argument("--weights", help="a file, an address or a name (deimkit weights), when RUN is a recipe's")
    sub.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    sub.add_argument("--device", default="auto")

    sub = command("export", "write a detector as a file that runs without torch, and hold the file against it")
    sub.add_argument("what", metavar="RUN_OR_RECIPE", help="a run's folder, a .pt, a Hugging Face folder, or a recipe")
    sub.add_argument("--format", default="onnx", choices=("onnx", "openvino", "tensorrt"))
    where = "default: RUN/exported/RECIPE.onnx, or RECIPE.onnx here; what is not default is added: RECIPE_fp16_b8.onnx"
    sub.add_argument("--out", metavar="FILE", help=where)
    sub.add_argument("--data", help="annotated images to measure AP on; without, nothing is called verified")
    sub.add_argument("--images", type=int, default=100, help="of them (default: 100)")
    sub.add_argument("--weights", help="a file, an address or a name (deimkit weights), when it is a recipe")
    sub.add_argument("--size", type=int, nargs="+", help="pixels of the input: one number, or height and width")
    many = "images at a time, or: any, which for an engine is 1 to 8 (default: 1)"
    sub.add_argument("--batch", type=any_number, default=1, metavar="N", help=many)
    sub.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"))
    sub.add_argument("--device", help="the GPU that an engine is for, and where the file is tried: cuda, cuda:1, cpu")
    sub.add_argument("--opset", type=int, help="17 or more (default: 17, and 18 for fp16)")
    sub.add_argument("--exporter", choices=("torchscript", "dynamo"), help="of torch (default: by the opset)")
    sub.add_argument("--top", type=int, default=300, help="boxes per image (default: 300)")
    sub.add_argument("--raw", action="store_true", help="end in the logits and boxes of all queries")

    sub = command("bench", "measure how long detectors take, in every runtime of this machine side by side")
    sub.add_argument("what", nargs="*", metavar="RECIPE_OR_FILE", help="recipes, runs, checkpoints, exported files")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    sub.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="images at a time (default: 1)")
    sub.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "fp16"))
    sub.add_argument("--size", type=int, nargs="+", help="pixels of the input: one number, or height and width")
    sub.add_argument("--compile", action="store_true", help="measure what torch.compile makes of it too")
    sub.add_argument("--raw", action="store_true", help="measure without post-processing as well")
    sub.add_argument("--seconds", type=float, default=10.0, help="for which each is timed (default: 10)")
    sub.add_argument("--to", metavar="FILE.json", help="write every sample and the whole environment")
    sub.add_argument("--self-test", action="store_true", help="first see whether this machine can be measured at all")

    sub = command("replay", "try the batch of a step that was not finite again, and say what is wrong")
    sub.add_argument("file", help="RUN/replay/.../epoch0_step1.pt, as the run's log says")
    sub.add_argument("--device", help="default: that of then, if it is here")
    sub.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: that of then")

    sub = command("doctor", "list what is wrong with a dataset, with the remedy")
    sub.add_argument("data", nargs="?", help="a dataset's folder or file")
    sub.add_argument("--fixes", metavar="FILE.json", help="a list of `deimkit errors --fixes` to go through with it")
    sub.add_argument(
        "--fiftyone", action="store_true", help="examine instead what FiftyOne's App needs on this machine"
    )

    sub = command("download", "fetch, unpack and convert a published dataset, or list them")
    sub.add_argument("name", nargs="?", help="coco, crowdhuman, objects365, ...")
    sub.add_argument("--to", metavar="FOLDER", help="where to put it (default: data/NAME)")
    sub.add_argument("--from", dest="source", metavar="FOLDER", help="where files of it lie that you fetched yourself")
    sub.add_argument("--yes", action="store_true", help="agree to the dataset's terms and its size without being asked")
    return parser


def share(text: str) -> Any:
    """The images of a device from the command line: how many, or as many as there is memory for."""
    return text if text == "largest" else int(text)


def any_number(text: str) -> int | None:
    """Images at a time from the command line: how many, or any number."""
    return None if text == "any" else int(text)


def parts(text: str) -> Any:
    """Micro-batches of a step from the command line: how many, or as many as memory requires."""
    return text if text == "auto" else int(text)


def fraction(text: str) -> float:
    """A number in [0, 1] from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1]; got {text}")
    return value
