"""`make bench`: run every `bench_*.py` beside this file and print what it measured, with the machine it ran on."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

from deimkit.deploy.machine import processor
from tests.bench.paired import Row

HERE = Path(__file__).parent


def topics() -> list[str]:
    """The names of what can be measured: "criterion" for bench_criterion.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def machine() -> dict[str, str | int]:
    """What a number needs beside it to mean something: processor, cores, accelerator, versions, date."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text: name, ours, peer, unit, how many times better, note."""
    cells = [("", "ours", "peer", "unit", "ratio", "")]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        cells.append((row.name, f"{row.ours:.4g}", peer, row.unit, ratio, row.note))
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    # words stand to the left, numbers to the right
    align = ["<", ">", ">", "<", ">", "<"]
    lines = ("  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, align, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Print a table per topic; 1 if a topic failed, so that a broken benchmark is noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=topics(), help=f"one topic of: {', '.join(topics())}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write machine and rows to this file")
    args = parser.parse_args()

    print("  ".join(f"{key}: {value}" for key, value in machine().items()))
    measured: list[dict[str, object]] = []
    failed = []
    for topic in [args.only] if args.only else topics():
        print(f"\n{topic}", flush=True)
        try:
            rows = list(importlib.import_module(f"tests.bench.bench_{topic}").rows())
        except Exception:  # one broken topic must not hide the numbers of the others
            traceback.print_exc()
            failed.append(topic)
            continue
        print(table(rows), flush=True)
        measured += [{"topic": topic, **row._asdict()} for row in rows]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": measured}, indent=1) + "\n")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
