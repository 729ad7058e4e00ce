"""What each way to speed a training step up is worth here, and `python -m tests.bench.bench_speed` for a whole report.

That one call takes a recipe's steps apart at the largest batch that fits, eager and compiled, and prints the profile,
a Markdown table and the rows; with `--out FOLDER` it also writes them there, as speed.json, speed.md and trace.json.gz.
On an H200 with 16 cores it should take about five minutes. What it costs to compile is in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import deimkit as dk
from deimkit import recipes
from deimkit.data.dataset import Dataset
from deimkit.errors import DeimkitError
from deimkit.training.advice import advice
from deimkit.training.compiled import compile_parts
from deimkit.training.learner import Learner, clones
from deimkit.training.machine import pick_device, pick_precision
from deimkit.training.profile import PARTS, Profile
from deimkit.training.run import plain
from tests.bench.__main__ import machine, table
from tests.bench.bench_loader import photos
from tests.bench.bench_step import noise
from tests.bench.paired import Row, paired

Work = Callable[[], Any]


def rows() -> Iterator[Row]:
    """Every way, on a GPU for D-FINE-L as it is trained, on a CPU for the tiny recipe to see that it runs."""
    if torch.cuda.is_available():
        yield from ways("dfine_l", 640, 16, "cuda")
    else:
        yield from ways("tiny", 96, 4, "cpu")


def ways(name: str, size: int, batch: int, device: str, compiles: bool = True) -> Iterator[Row]:
    """A part of a step done the one way and the other, in turn; ours is the way of deimkit."""
    where = pick_device(device)
    recipe = recipes.get(name).fit_to(118_287, batch=batch, size=size)
    learner = Learner(recipe, recipe.build(80).to(where), pick_precision("auto", where))
    step = done(lambda: learner.learn(loaded), where)
    images = noise(batch, size)
    as_bytes = (images.images * 255).byte().contiguous(memory_format=torch.channels_last)
    loaded = replace(images, images=as_bytes.pin_memory() if where.type == "cuda" else as_bytes)
    what = f"{name}, {batch} x {size} px, {where.type}"

    def row(called: str, ours: Work, other: Work, note: str, runs: int = 7) -> Row:
        a, b, ratio = paired(done(ours, where), done(other, where), runs=runs, warmup=2)
        return Row(f"{called}: {what}", 1e3 * a, 1e3 * b, "ms", ratio, note)

    step()  # gradients and the optimiser's memory are there
    said = "peer: torch's default" if where.type == "cuda" else "peer: fused, which rounds otherwise"
    yield row("AdamW", *optimisers(learner), said)
    buffers = list(learner.model.buffers())
    yield row(
        "batch statistics kept", lambda: clones(buffers), lambda: [x.clone() for x in buffers], "peer: one by one"
    )
    ema, model = learner.ema, learner.model
    floating = [(a, b) for a, b in zip(ema.model.parameters(), model.parameters(), strict=True)]
    alone = [list(side) for side in zip(*floating, strict=True)]
    sums = torch.no_grad()(lambda: torch._foreach_lerp_(*alone, 0.0))
    yield row("moving average", lambda: ema.update(model), sums, "peer: its sums alone")
    yield from copies(batch, size, where, row)
    if where.type == "cuda":
        yield row("step", step, benchmarked(step), "peer: cudnn.benchmark", runs=5)
    if compiles:
        compile_parts(learner.model)
        started = time.perf_counter()
        step()
        took = time.perf_counter() - started

        def eager() -> None:
            with torch.compiler.set_stance("force_eager"):
                step()

        yield row("step", eager, step, f"peer: compiled, which took {took:.0f} s", runs=5)


def done(work: Work, where: torch.device) -> Work:
    """The work, over only when a GPU has done it."""

    def run() -> None:
        work()
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    return run


def optimisers(learner: Learner) -> tuple[Work, Work]:
    """A step of the optimiser as it is built, fused on a GPU alone, and of one that is fused where that is not."""
    ours = learner.optimizer
    fused = None if ours.defaults["fused"] else True
    other = torch.optim.AdamW([{**group, "fused": fused} for group in ours.param_groups], fused=fused)
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
    return ours.step, other.step


def copies(batch: int, size: int, where: torch.device, row: Callable[..., Row]) -> Iterator[Row]:
    """Images brought to a GPU as bytes from pinned memory, and as floats from memory that is not."""
    if where.type != "cuda":
        return
    floats = torch.rand(batch, 3, size, size)
    pinned = (floats * 255).byte().pin_memory()
    yield row(
        "images to the GPU",
        lambda: pinned.to(where, non_blocking=True).float().div_(255),
        lambda: floats.to(where),
        "bytes, pinned; peer: floats, pageable",
    )


def benchmarked(step: Work) -> Work:
    """A step for which cuDNN tries its algorithms out."""

    def run() -> None:
        torch.backends.cudnn.benchmark = True
        step()
        torch.backends.cudnn.benchmark = False

    return run


# ---------------------------------------------------------------------------------------------------- the report
def data(folder: Path, images: int = 512) -> Dataset:
    """Photo-like scenes, a few of them over and over; none is kept decoded, so that each costs what a new one does."""
    split = photos(folder)
    many = replace(split.take(i % len(split) for i in range(images)), name="train")
    return Dataset("photos", str(folder), folder, split.categories, train=many)


def largest(name: str, batches: Sequence[int], folder: Path, compile: bool, trace: Path | None, **how: Any) -> Profile:
    """The profile at the largest of these batches for which there is memory."""
    for batch in batches:
        try:
            return dk.profile(name, data(folder), batch=batch, compile=compile, trace=trace, **how)
        except (DeimkitError, torch.OutOfMemoryError) as error:
            known = isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)
            if not known:
                raise
            print(f"{name}: {batch} images do not fit", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(f"{name}: none of the batches {list(batches)} fits.")


def markdown(found: Sequence[Profile]) -> str:
    """One line for each profile, for the stage that lasts longest."""
    head = [
        "recipe",
        "batch",
        "images/s",
        "step, ms",
        *PARTS,
        "idle",
        "waits",
        "GiB",
        "compiled, ms",
        "saves",
        "build, s",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for p in found:
        main, c = p.stage(p.main), p.compiled
        cells = [p.recipe, p.batch, f"{p.batch / main.step_s:.1f}", f"{1e3 * main.step_s:.0f}"]
        cells += [f"{1e3 * main.seconds.get(part, 0.0):.1f}" for part in PARTS]
        cells += ["" if p.idle is None else f"{p.idle:.0%}", "" if p.waits is None else sum(p.waits.values())]
        cells += [f"{p.peak / 2**30:.1f}"]
        cells += [f"{1e3 * c.compiled_s:.0f}", f"{1 - c.ratio:.0%}", f"{c.build_s:.0f}"] if c else ["", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the profiles of the recipes, and what every way is worth."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_speed", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["dfine_l"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 16, 8, 4, 2, 1], help="those to try, in turn")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--steps", type=int, default=24, help="in all stages together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="folder for speed.json, speed.md and trace.json.gz")
    args = parser.parse_args(argv)

    print("  ".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    how = {"size": args.size, "steps": args.steps, "device": args.device, "workers": args.workers}
    found: list[Profile] = []
    measured: list[Row] = []
    for name in args.recipes:
        trace = args.out / "trace.json.gz" if args.out and not found else None
        with tempfile.TemporaryDirectory() as folder:
            found.append(largest(name, args.batches, Path(folder), args.compile, trace, **how))
        print(f"\n{found[-1]}", flush=True)
        measured += ways(name, args.size, found[-1].batch, args.device, compiles=False)
    print(f"\n{markdown(found)}\n\n{table(measured)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        values = {"machine": machine(), "profiles": [{**p.to_dict(), "advice": advice(p)} for p in found]}
        values["rows"] = [row._asdict() for row in measured]
        (args.out / "speed.json").write_text(json.dumps(plain(values), indent=1) + "\n")
        (args.out / "speed.md").write_text(markdown(found) + "\n")


if __name__ == "__main__":
    main()
