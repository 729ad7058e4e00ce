"""The story of a run in words: the state it is in, what happened, and the last words of what failed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deimkit.explore.tail import number

LOG_BYTES, LOG_LINES = 32_768, 40  # of the end of a log

# Events after which nobody trains yet, and those after which nobody trains any more.
BEFORE = ("new", "launched", "weights", "other data")
ENDS = {"finished": "finished", "early_stop": "finished", "stopped": "stopped", "failed": "failed"}


def state_of(event: str, alive: bool, asked: bool) -> str:
    """The state of a run in a word.

    event: the latest. alive: whether a process trains it. asked: whether it was asked to stop.
    """
    if event in ("finished", "early_stop"):
        return "finished"
    if alive and asked:
        return "stopping"
    if alive:
        return "starting" if event in BEFORE or event in ENDS else "training"
    return "not started" if event == "new" else ENDS.get(event, "died")


def in_words(event: Mapping[str, Any]) -> str:
    """What happened, as a sentence; epochs are counted from 1."""
    epoch = event["epoch"] + 1 if isinstance(event.get("epoch"), int) else "?"
    place = f"in epoch {epoch}, after {event.get('step', '?')} of its steps"
    why = str(event.get("why", "")).strip()
    match event.get("event"):
        case "launched":
            return "A process was launched."
        case "started":
            images = event.get("images")
            learned = (
                f", {images['train']} images to learn from" if isinstance(images, dict) and "train" in images else ""
            )
            return f"Training began on {event.get('device', '?')} in {event.get('precision', '?')}{learned}."
        case "resumed":
            return f"Training went on {place}."
        case "stopped":
            return f"Stopped as asked {place}; resume goes on from there."
        case "finished":
            return f"Finished.{_best(event)}"
        case "early_stop":
            return f"Finished early: the AP did not get better any more.{_best(event)}"
        case "failed":
            return f"Failed{_rank(event)}: {why}"
        case "skipped":
            return f"Skipped step {event.get('step', '?')} of epoch {epoch}: {why}"
        case "rolled_back":
            return f"Went back to the last checkpoint, from epoch {epoch}: too many steps in a row were not finite."
        case "returned_to_best":
            return f"Took up the best weights again before epoch {epoch}."
        case "dropped":
            return f"Goes on without image {event.get('image', '?')}: {why}"
        case "weights":
            return "Began from given weights."
        case "other data":
            return f"Goes on with other data: {event.get('data', '?')}."
    facts = [f"{name} {value}" for name, value in event.items() if name not in ("event", "time")]
    words = str(event.get("event", "something")).replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}{': ' if facts else ''}{', '.join(facts)}."


def _best(event: Mapping[str, Any]) -> str:
    ap, epoch = number(event.get("AP")), event.get("best_epoch")
    return f" Best AP {100 * ap:.1f} % after epoch {epoch + 1}." if math.isfinite(ap) and isinstance(epoch, int) else ""


def _rank(event: Mapping[str, Any]) -> str:
    return f" in process {event['rank']}" if "rank" in event else ""


def last_words(folder: Path) -> str:
    """The end of a run's log: from the last traceback on, if there is one, of the first worker that left one.

    Logs are `log.txt` and, of several processes, those below `ranks`. "" if there is none.
    """
    logs = sorted(folder.glob("ranks/**/*.log"), key=lambda log: log.stat().st_mtime)
    tails = {log: _tail(log) for log in [*logs, folder / "log.txt"] if log.is_file()}
    for log, text in tails.items():
        before, found, after = text.rpartition("Traceback (most recent call last)")
        if found:
            who = f"{log.relative_to(folder)}:\n" if log.name != "log.txt" else ""
            return who + _lines(found + after)
    return _lines(tails.get(folder / "log.txt", ""))


def _tail(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - LOG_BYTES, 0))
        return file.read().decode(errors="replace")


def _lines(text: str) -> str:
    """The last lines of a log, without colours and without what a live line overwrote."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-LOG_LINES:])
