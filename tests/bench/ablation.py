"""What DEIM and its parts are worth on a small dataset: a few recipes, several seeds, equal epochs, one table.

`python -m tests.bench.ablation --out runs/ablation` trains what is not trained yet and prints the table as Markdown.
`--family rtdetrv2` compares the tiny RT-DETRv2 with and without DEIM, `--data` names another dataset.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

import deimkit as dk
from deimkit.losses import VFL
from deimkit.recipes.archs import dfine_arch
from deimkit.recipes.dfine import dfine_losses
from deimkit.recipes.recipe import Recipe
from deimkit.recipes.small import deim_rtdetrv2_tiny, rtdetrv2_tiny, tiny
from deimkit.training.timeline import StepDecay


def variants(family: str) -> dict[str, Recipe]:
    """The recipes that are compared: DEIM, DEIM without one of its parts, and the family's own."""
    if family == "rtdetrv2":
        return {"DEIM-RT-DETRv2": deim_rtdetrv2_tiny, "RT-DETRv2": rtdetrv2_tiny}
    clock, relu = tiny.timeline, dfine_arch("tiny", activation="relu")
    plain = replace(clock, warm=0, dense=0, lr=StepDecay(warmup=clock.lr.warmup))
    return {
        "DEIM": tiny,
        "DEIM without MAL (VFL)": replace(tiny, name="tiny_vfl", losses=dfine_losses(VFL(), tiny.arch)),
        "DEIM without Dense O2O": replace(
            tiny, name="tiny_sparse", augment=replace(tiny.augment, mosaic=0.0, mixup=0.0)
        ),
        "D-FINE": replace(tiny, name="tiny_dfine", arch=relu, losses=dfine_losses(VFL(), relu), timeline=plain),
    }


def finished(folder: Path) -> bool:
    """Whether a run got to its end."""
    return any(event["event"] == "finished" for event in dk.Run(folder).events())


def trained(recipe: Recipe, data: str, seed: int, epochs: int | None, folder: Path) -> list[dict[str, float]]:
    """The numbers (of the EMA weights) after each epoch of a run, trained or resumed if not finished."""
    if not (folder / "run.json").is_file():
        dk.train(recipe, data, out=folder, epochs=epochs, seed=seed, device="cpu")
    elif not finished(folder):
        dk.resume(folder)
    if not finished(folder):
        raise SystemExit(f"{folder} was stopped; the same command goes on with it")
    return dk.Run(folder).rows("epoch")


def main() -> None:
    """Train all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--family", choices=("dfine", "rtdetrv2"), default="dfine")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    lines = ["| recipe | AP | AP50 | AP75 | minutes |", "|---|---|---|---|---|"]
    for name, recipe in variants(args.family).items():
        folders = {seed: args.out / f"{recipe.name}_{Path(args.data).name}_seed{seed}" for seed in range(args.seeds)}
        runs = [trained(recipe, args.data, seed, args.epochs, folder) for seed, folder in folders.items()]
        minutes = mean(sum(row["train_s"] + row["evaluate_s"] for row in run) for run in runs) / 60
        cells = [
            f"{100 * mean(values):.1f} ± {100 * stdev(values) if len(values) > 1 else 0:.1f}"
            for values in ([run[-1][key] for run in runs] for key in ("AP", "AP50", "AP75"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {minutes:.1f} |")
    lines.append(
        f"\n{args.data}, {args.seeds} seeds (mean ± standard deviation), {args.epochs or tiny.timeline.total} epochs, "
        f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, torch {torch.__version__}."
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
