"""What each part of DEIM is worth on the synthetic scenes: four recipes, several seeds, equal epochs, one table.

`python -m tests.bench.ablation --out runs/ablation` trains what is not trained yet and prints the table as Markdown.
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
from deimkit.recipes.tiny import tiny
from deimkit.training.timeline import StepDecay


def variants() -> dict[str, Recipe]:
    """The recipes that are compared: DEIM, DEIM without one of its parts, and D-FINE's own."""
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


def measured(recipe: Recipe, seed: int, epochs: int | None, out: Path) -> dict[str, float]:
    """The numbers of the last epoch (of the EMA weights) of a run, trained or resumed if not finished."""
    folder = out / f"{recipe.name}_seed{seed}"
    if not (folder / "run.json").is_file():
        dk.train(recipe, "synthetic", out=folder, epochs=epochs, seed=seed, device="cpu")
    elif not any(event["event"] == "finished" for event in dk.Run(folder).events()):
        dk.resume(folder)
    return dk.Run(folder).metrics("epoch")[-1]


def main() -> None:
    """Train all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    lines = ["| recipe | AP | AP50 | AP75 | minutes |", "|---|---|---|---|---|"]
    for name, recipe in variants().items():
        rows = [measured(recipe, seed, args.epochs, args.out) for seed in range(args.seeds)]
        folders = [args.out / f"{recipe.name}_seed{seed}" for seed in range(args.seeds)]
        minutes = mean(sum(r["train_s"] + r["evaluate_s"] for r in dk.Run(f).metrics("epoch")) for f in folders) / 60
        cells = [
            f"{100 * mean(values):.1f} ± {100 * stdev(values) if len(values) > 1 else 0:.1f}"
            for values in ([row[key] for row in rows] for key in ("AP", "AP50", "AP75"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {minutes:.1f} |")
    epochs = args.epochs or tiny.timeline.total
    lines.append(
        f"\n{args.seeds} seeds (mean ± standard deviation), {epochs} epochs, "
        f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, torch {torch.__version__}."
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
