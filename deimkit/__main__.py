"""The command line: the same verbs as the package, each with `--json` for a last line that a program can read."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import is_torchelastic_launched

import deimkit as dk
from deimkit.arguments import build_parser
from deimkit.errors import DeimkitError
from deimkit.ranks import Ranks
from deimkit.training.progress import Progress
from deimkit.training.run import plain

if TYPE_CHECKING:
    from deimkit.data.download import Published
    from deimkit.data.split import Split
    from deimkit.explore.findings import Findings

INTERRUPTED = 130  # the exit status of a program that was interrupted, as shells know it


def run_recipes(args: argparse.Namespace) -> tuple[int, Any]:
    """List all recipes, print one, or print what differs between two."""
    match args.names:
        case []:
            return list_recipes()
        case ["diff", a, b]:
            changes = dk.recipes.diff(dk.recipes.get(a), dk.recipes.get(b))
            wide = max(map(len, changes), default=0)
            if not changes:
                print(f"no difference between {a} and {b}")
            for field, (before, after) in changes.items():
                print(f"{field:{wide}}  {before!r} -> {after!r}")
            return 0, {"a": a, "b": b, "diff": {field: [repr(x), repr(y)] for field, (x, y) in changes.items()}}
        case [name] if name != "diff":
            text = dk.recipes.to_python(dk.recipes.get(name))
            print(text, end="")
            return 0, {"name": name, "recipe": text}
    raise DeimkitError(f"recipes takes nothing, one NAME, or: diff NAME NAME; got {' '.join(args.names)}.")


def list_recipes() -> tuple[int, Any]:
    """Print every recipe with what its paper claims."""
    rows = []
    print(f"{'recipe':36} {'epochs':>6}  {'AP':>5}  {'M':>3}  {'GFLOPs':>6}  claimed in")
    for name in dk.recipes.names():
        recipe = dk.recipes.get(name)
        paper = recipe.paper
        row = {"name": name, "epochs": recipe.timeline.total, "batch": recipe.batch, "size": list(recipe.size)}
        rows.append(row | ({"paper": vars(paper)} if paper else {}))
        claim = (
            f"{cell(paper.ap, 5, 1)}  {cell(paper.params_m, 3)}  {cell(paper.gflops, 6)}  {paper.table}"
            if paper
            else ""
        )
        print(f"{name:36} {recipe.timeline.total:6}  {claim}".rstrip())
    return 0, rows


def run_weights(args: argparse.Namespace) -> tuple[int, Any]:
    """Print the published weights: for which recipe, under which name, and from where."""
    from deimkit.weights.sources import BY_HAND, listed

    print(f"{'recipe':21}  {'weights':8}  claimed AP  {'licence':10}  from")
    rows = []
    for source in listed():
        paper = source.paper
        row = {"recipe": source.recipe, "weights": source.what, "from": str(source.place), "licence": source.licence}
        rows.append(row | ({"paper": vars(paper)} if paper else {}))
        claim = cell(paper.ap if paper else None, 10, 1)
        print(f"{source.recipe:21}  {source.what:8}  {claim}  {source.licence:10}  {source.place}")
    print("AP is claimed on COCO val2017; `deimkit recipes` says in which table.")
    print("imagenet fills the backbone alone, of every other recipe with the same backbone too.")
    print(BY_HAND)
    return 0, rows


def run_rehearse(args: argparse.Namespace) -> tuple[int, Any]:
    """Measure a few steps, and forecast the whole training."""
    data = dk.Dataset.open(args.data)
    for note in data.notes:
        print(note)
    images, val_images = (
        len(split or ()) if given is None else given
        for given, split in ((args.images, data.train), (args.val_images, data.val))
    )
    if images < 1:
        raise DeimkitError(f"--images must be at least 1; got {images}.")
    whole = {"epochs": args.epochs, "batch": args.batch}
    dk.recipes.get(args.recipe).fit_to(images, **whole)  # what is impossible is said before anything is measured
    dry = dk.rehearse(
        args.recipe, data, steps=args.steps, batch=args.rehearsed, size=pair(args.size), device=args.device
    )
    print(dry)
    forecast = dry.forecast(images, val_images, **whole, devices=args.devices, workers=args.workers)
    print(f"\n{forecast}")
    stages = {
        stage.stage: {"steps": stage.steps, "step_s": stage.step, "hours": stage.hours} for stage in forecast.stages
    }
    low, high = forecast.range
    said = {"hours": forecast.hours, "low": low, "high": high, "stages": stages}
    said |= {"evaluation_hours": forecast.evaluation / 3600, "devices": forecast.devices, "workers": forecast.workers}
    measured = {"recipe": args.recipe, "device": dry.device, "rehearsed": dry.batch, "memory": dry.memory}
    measured |= {"fit": None if dry.fit is None else vars(dry.fit)}
    return 0, measured | {"images": images, "epochs": forecast.recipe.timeline.total, "disk": forecast.disk} | said


def run_profile(args: argparse.Namespace) -> tuple[int, Any]:
    """Take a few steps apart, and say what to change."""
    found = dk.profile(
        args.recipe,
        args.data,
        steps=args.steps,
        batch=args.batch,
        size=pair(args.size),
        device=args.device,
        compile=args.compile,
        trace=args.trace,
        precision=args.precision,
        workers=args.workers,
        accumulate=args.accumulate,
    )
    print(found)
    return 0, found.to_dict()


def run_train(args: argparse.Namespace) -> tuple[int, Any]:
    """Train, or resume."""
    if args.resume and args.prepare:
        raise DeimkitError("--prepare writes a new run, and --resume goes on with one: give only one of them.")
    if args.resume:
        run = dk.resume(args.resume, wait=args.wait, dataset=dk.Dataset.open(args.data) if args.data else None)
    else:
        if not args.recipe or not args.data:
            raise DeimkitError(
                "train needs a recipe and --data (or --resume RUN). For example: deimkit train tiny --data synthetic"
            )
        begin = dk.prepare if args.prepare else partial(dk.train, wait=args.wait)
        run = begin(
            args.recipe,
            args.data,
            out=args.out or f"runs/{args.recipe}",
            epochs=args.epochs,
            batch=args.batch,
            size=pair(args.size),
            lr=args.lr,
            device=args.device,
            seed=args.seed,
            weights=args.weights,
            precision=args.precision,
            workers=args.workers,
            accumulate=args.accumulate,
            deterministic=args.deterministic,
            compile=args.compile,
            loggers=tuple(args.logger),
            patience=args.patience,
            evaluate_every=args.evaluate_every,
            save_every=args.save_every,
            on_problem=args.on_problem,
            devices=args.devices,
            nodes=args.nodes,
            rdzv=args.rdzv,
        )
    best = max(run.rows("epoch"), key=lambda row: row["AP"] or 0, default={})
    if not Ranks.join().main:
        pass  # the first process speaks for all
    elif args.prepare:
        print(f"ready to train in {run.folder}")
    elif not args.wait:
        print(f"training in {run.folder}; its output is in {run.folder / 'log.txt'}")
    elif best:
        print(table(best))
        print(f"report: {run.report}")
    as_asked = run.finished or args.prepare or not args.wait
    status = 0 if as_asked or is_torchelastic_launched() else INTERRUPTED  # torchrun starts what seems lost again
    return status, {"run": run.folder, "state": run.state, "report": run.report, **numbers(best)}


def run_replay(args: argparse.Namespace) -> tuple[int, Any]:
    """Try a batch again; the exit status is 0 whether it is finite now or not."""
    again = dk.replay(args.file, device=args.device, precision=args.precision)
    print(again)
    said = {"then": again.noted, "now": again.now, "reproduced": again.reproduced, "module": again.finding.module}
    return 0, said | {"at_fault": again.finding.images, "device": again.device, "precision": again.precision}


def run_sbatch(args: argparse.Namespace) -> tuple[int, Any]:
    """Write a run's job, and say how to queue it."""
    job = dk.Run(args.folder).sbatch(
        args.time, args.partition, args.account, cpus=args.cpus, notice=args.notice, lines=args.line
    )
    print(f"queue it with: sbatch {shlex.quote(str(job))}")
    return 0, {"job": job}


def run_eval(args: argparse.Namespace) -> tuple[int, Any]:
    """Measure a detector on a split."""
    split = split_of(args)
    detector = dk.load(args.what, weights=args.weights, device=args.device)
    result = dk.evaluate(detector, split, size=pair(args.size), batch=args.batch, backend=args.backend)
    print(table(result))
    left_out = len(split.problems)
    if left_out:
        print(f"{left_out} problem(s) of this split stayed out of it; `deimkit doctor {args.data}` lists them")
    paper = claimed(args.what, split)
    if paper is not None:
        print(f"claimed on COCO val2017 ({paper.table}): {claims(paper)}")
    return 0, {**result, "problems": left_out, "claimed": None if paper is None else vars(paper)}


def run_errors(args: argparse.Namespace) -> tuple[int, Any]:
    """Judge every detection of a detector on a split, and show what is asked for."""
    from deimkit.api import load_detector
    from deimkit.evaluation.page import write
    from deimkit.explore.contact_page import contact_sheet_page
    from deimkit.explore.fiftyone.readiness import ready
    from deimkit.explore.findings import find
    from deimkit.explore.fixes import fix_list

    split = split_of(args)
    if args.app:
        ready().demand()
    progress = Progress()
    what = load_detector(args.what, weights=args.weights) if args.weights else args.what
    found = find(
        what,
        split,
        threshold=args.threshold,
        iou=args.iou,
        size=pair(args.size),
        batch=args.batch,
        device=args.device,
        progress=narrator(progress),
    )
    summary = found.errors.summary(args.threshold)
    progress.line(costs(summary))
    pages = {}
    if args.out:
        pages["page"] = found.errors.page(args.out, args.threshold)
    if args.sheet:
        pages["sheet"] = contact_sheet_page(found, args.sheet)
    if args.fixes:
        pages["fixes"] = write(Path(args.fixes), fix_list(found).to_json())
    for name, path in pages.items():
        progress.line(f"{name}: {path}")
    if args.app:
        show_app(found, f"{args.data} {args.split}", progress)
    return 0, summary | {name: str(path) for name, path in pages.items()}


def show_app(found: Findings, name: str, progress: Progress) -> None:
    """Put findings into the FiftyOne dataset of that name, and show its App until the last page of it is closed.

    A detector has a field by its own name there, so that the next one stands beside it.
    """
    from deimkit.explore.fiftyone import launch, to_fiftyone

    field = re.sub(r"\W", "_", f"run_{found.name}" if not found.name[:1].isalpha() else found.name, flags=re.ASCII)
    dataset = to_fiftyone(found.split, found, name, field, progress=narrator(progress))
    app = launch(dataset.load_saved_view(f"{field}: all images"))
    progress.line(repr(app))
    app.wait()


def split_of(args: argparse.Namespace) -> Split:
    """The split that was asked for; `DeimkitError` if the dataset has none of that name."""
    split = getattr(dk.Dataset.open(args.data), args.split)
    if split is None:
        raise DeimkitError(f"{args.data} has no {args.split} split.")
    return split


def run_predict(args: argparse.Namespace) -> tuple[int, Any]:
    """Detect, print the objects, and draw them if asked."""
    from deimkit.models.predict import predict

    detector = dk.load(args.what, weights=args.weights, device=args.device)
    rows = []
    for source in args.images:
        found = predict(detector, source, threshold=args.threshold, size=pair(args.size))
        for index, detections in enumerate([found] if isinstance(found, dk.Detections) else found):
            name = str(detections.image) if isinstance(detections.image, (str, Path)) else f"{source}#{index}"
            print(f"{name}: {len(detections)} objects")
            rows.append({"image": name, "objects": objects(detections)})
            if args.out:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                drawn = Path(args.out) / f"{len(rows):06d}_{Path(name.partition('#')[0]).name}.png"
                detections.plot().figure.savefig(drawn, dpi=150, bbox_inches="tight")
    return 0, rows


def run_export(args: argparse.Namespace) -> tuple[int, Any]:
    """Export a detector; the exit status is 1 if the file differs from it."""
    done = dk.export(
        args.what,
        args.out,
        format=args.format,
        data=args.data,
        weights=args.weights,
        size=pair(args.size),
        batch=args.batch,
        precision=args.precision,
        images=args.images,
        device=args.device,
        postprocess=not args.raw,
        opset=args.opset,
        exporter=args.exporter,
        top=args.top,
    )
    print(done)
    return 1 if done.parity.verdict == "differs" else 0, done.to_dict()


def run_bench(args: argparse.Namespace) -> tuple[int, Any]:
    """Measure, or see first whether this machine can be measured; the exit status is then 1 if something fails."""
    from deimkit.deploy.bench.latency import place_for
    from deimkit.evaluation.page import write
    from deimkit.shipping import can_bench

    to = place_for(args.to) if args.to else None
    if args.self_test:
        checks = can_bench(args.device)
        print("\n".join(map(str, checks)))
        told = [check.to_dict() for check in checks]
        if to is not None:
            print(f"all of it: {write(to, json.dumps(told, indent=1))}")
        return int(any(check.ok is False for check in checks)), told
    if not args.what:
        raise DeimkitError("Which detectors? For example: deimkit bench dfine_n, or deimkit bench --self-test.")
    report = dk.bench(
        *args.what,
        device=args.device,
        batches=args.batch,
        precisions=args.precision,
        size=pair(args.size),
        compile=args.compile,
        raw=args.raw,
        seconds=args.seconds,
    )
    print(report)
    if to is not None:
        print(f"all of it: {report.write(to)}")
    return 0, report.to_dict()


def run_doctor(args: argparse.Namespace) -> tuple[int, Any]:
    """Examine a dataset, or what FiftyOne needs; the exit status is 1 if it has errors."""
    if args.fiftyone:
        from deimkit.explore.fiftyone.readiness import fiftyone_report

        text, ok, checks = fiftyone_report()
        print(text)
        return 0 if ok else 1, checks
    if args.data is None:
        raise DeimkitError("Which dataset? deimkit doctor DATA, or deimkit doctor --fiftyone for FiftyOne's App.")
    report = dk.doctor(args.data, fixes=args.fixes)
    print(report.table())
    return 0 if report.ok else 1, json.loads(report.to_json())


def run_download(args: argparse.Namespace) -> tuple[int, Any]:
    """List the published datasets, or make one ready to train on."""
    from deimkit.data.download import DATASETS, download, find, is_complete

    if args.name is None:
        return 0, [published_row(name, published) for name, published in DATASETS.items()]
    published = find(args.name)
    if not (is_complete(args.name, args.to) or published.by_hand or args.yes):
        agree(args.name, published)
    progress = Progress()
    data = download(args.name, args.to, args.source, note=narrator(progress), say=progress.line)
    progress.line(f"train on it with: deimkit train RECIPE --data {data}")
    return 0, {"name": args.name, "data": data, "licence": published.licence, "page": published.page}


def published_row(name: str, published: Published) -> dict[str, Any]:
    """Print what there is to know of a published dataset, and return it as a row."""
    from deimkit.data.fetch import amount

    size = "by hand" if published.by_hand else amount(published.size or 0)
    print(f"{name:11} {size:>8}  {published.title}\n{'':21} {published.licence}: {published.page}")
    row = {"name": name, "title": published.title, "bytes": published.size, "by_hand": published.by_hand}
    return row | {"licence": published.licence, "page": published.page}


def agree(name: str, published: Published) -> None:
    """Ask whether to go on; a `DeimkitError` if the answer is no or nobody is there to give one."""
    from deimkit.data.fetch import amount

    terms = (
        f"{name} is {amount(published.size or 0)} to fetch, under these terms: {published.licence} ({published.page})"
    )
    if not sys.stdin.isatty():
        raise DeimkitError(f"{terms}. Add --yes to agree and go on.")
    print(f"{terms}.\nGo on? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DeimkitError(f"{name} was not fetched.")


def narrator(progress: Progress, pause: float = 60.0) -> Callable[[str], None]:
    """What tells how far it is: a live line, or in a log one line a minute."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if progress.live:
            progress.note(text)
        elif time.monotonic() - last > pause:
            last = time.monotonic()
            progress.line(text)

    return tell


def claimed(what: str, split: Split) -> dk.recipes.Paper | None:
    """What a paper claims for the recipe of that name or run, if the split has COCO's classes; else None."""
    from deimkit.weights.classes import COCO_NAMES

    text = Path(what) / "recipe.py"
    if what in dk.recipes.names():
        recipe = dk.recipes.get(what)
    elif text.is_file():
        recipe = dk.recipes.parse(text.read_text(encoding="utf-8"))
    else:
        return None
    return recipe.paper if split.categories.names == COCO_NAMES else None


def claims(paper: dk.recipes.Paper) -> str:
    """The six APs of a paper as fractions, named and aligned as in `table`."""
    values = {name: getattr(paper, name.lower()) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    return "  ".join(f"{name} {number(v and v / 100)}" for name, v in values.items())


def pair(size: list[int] | None) -> int | tuple[int, int] | None:
    """One number or two from the command line as a size."""
    if size is None or len(size) == 1:
        return size[0] if size else None
    if len(size) != 2:
        raise DeimkitError(f"--size takes one number, or height and width; got {len(size)} numbers.")
    return size[0], size[1]


def cell(value: float | None, width: int, digits: int = 0) -> str:
    """A number in a column, or blanks."""
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def objects(detections: dk.Detections) -> list[dict[str, Any]]:
    """Detections as plain rows: name, score, and box as xyxy pixels."""
    rows = zip(detections.names, detections.scores.tolist(), detections.boxes.tolist(), strict=True)
    return [{"name": n, "score": round(s, 4), "box": [round(v, 1) for v in b]} for n, s, b in rows]


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The twelve numbers of a result."""
    return {k: v for k, v in result.items() if k.startswith(("AP", "AR"))}


def table(result: dict[str, Any]) -> str:
    """COCO's numbers and the classes as aligned text."""
    head = "  ".join(f"{name} {number(value)}" for name, value in numbers(result).items())
    classes = result.get("per_class", {})
    wide = max(map(len, classes), default=0)
    lines = [
        f"  {name:<{wide}}  AP {number(c['AP'])}  AP50 {number(c['AP50'])}  boxes {c['count']}"
        for name, c in classes.items()
    ]
    return "\n".join([head, *lines])


def costs(summary: dict[str, Any]) -> str:
    """What every kind of error costs and how often it occurs, as aligned text."""
    counts = summary["verdicts"] | {"missed": summary["overlooked"]}
    lines = [
        f"AP {number(summary['AP'])}  AP at IoU {summary['iou']:g} {number(summary['AP_at_iou'])}  "
        f"objects {summary['objects']}  right {counts['right']}  not found {summary['missed']}",
        f"what an error costs in AP at IoU {summary['iou']:g}; counted from score {summary['threshold']:.3f} on",
    ]
    lines += [
        f"  {kind:<15}  {number(cost)}  {counts.get(kind, '')}".rstrip() for kind, cost in summary["costs"].items()
    ]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three decimals, or a dash where there was nothing to measure."""
    return "-" if value is None or value != value else f"{value:.3f}"


# What each command of the parser does.
RUNS: dict[str, Callable[[argparse.Namespace], tuple[int, Any]]] = {
    "recipes": run_recipes,
    "weights": run_weights,
    "rehearse": run_rehearse,
    "profile": run_profile,
    "train": run_train,
    "sbatch": run_sbatch,
    "eval": run_eval,
    "export": run_export,
    "bench": run_bench,
    "predict": run_predict,
    "replay": run_replay,
    "doctor": run_doctor,
    "download": run_download,
    "errors": run_errors,
}


def answer(args: argparse.Namespace) -> tuple[int, Any]:
    """The exit status of a command, and its result; what is wrong is said in one clear sentence on stderr."""
    try:
        return RUNS[args.command](args)
    except BrokenPipeError:
        raise
    except (DeimkitError, OSError) as error:
        print(f"deimkit {args.command}: {error}", file=sys.stderr)
        return 1, {"error": str(error)}
    except KeyboardInterrupt:
        print(f"deimkit {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED, {"error": "interrupted"}
    finally:
        Ranks.leave()


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it did what it was asked, else non-zero."""
    args = build_parser().parse_args(argv)
    try:
        status, result = answer(args)
        if args.json and os.environ.get("RANK", "0") == "0":
            print(json.dumps(plain(result), allow_nan=False), flush=True)
    except BrokenPipeError:  # who reads us, such as `head`, has read enough; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
