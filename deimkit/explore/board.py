"""The board: one or several runs at a glance, live in a notebook, and a picture that stays where nothing is live."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from deimkit.errors import DeimkitError
from deimkit.explore.board_live import Live
from deimkit.explore.board_page import Page
from deimkit.explore.frame import VIEW
from deimkit.explore.snapshot import Reader, Snapshot
from deimkit.training.run import Run


class Board:
    """One or several runs on one page, which a notebook shows and keeps up to date.

    runs: runs or their folders; nothing but the folders is read, so that any kernel can show a run that another process
    trains. every: seconds between looks at the folders. In a notebook it is a widget with buttons, and beside it the
    same page as a plain picture, hidden while the widget lives, so that a saved notebook shows it without a kernel.
    """

    def __init__(self, *runs: Run | Path | str, every: float = 2.0) -> None:
        if not runs or not every > 0:
            raise DeimkitError(f"A board needs at least one run and every > 0 seconds; got {len(runs)} and {every}.")
        self.runs = [run if isinstance(run, Run) else Run(run) for run in runs]
        self.every = every
        self.page = Page()
        self.snapshots: list[Snapshot] = []
        self.matching: int | None = None  # the run whose matching is shown
        self.mark = f"dk-still-{uuid.uuid4().hex[:8]}"
        self._readers = [Reader(run, name) for run, name in zip(self.runs, names(self.runs), strict=True)]
        self._stamps: list[tuple[Any, ...]] = []
        self._lock = threading.RLock()
        self._live: Live | None = None

    def refresh(self) -> bool:
        """Read what is new in the folders and draw it; False if nothing is."""
        with self._lock:
            stamps = [reader.stamp() for reader in self._readers]
            if stamps == self._stamps and not any(s.trouble for s in self.snapshots):
                return False
            self.snapshots = [reader.read() for reader in self._readers]
            self.page.show(self.snapshots, None if self.matching is None else self.snapshots[self.matching])
            self._stamps = stamps
            return True

    def forget(self) -> None:
        """Read the folders at the next refresh, whether they changed or not."""
        self._stamps = []

    @property
    def live(self) -> Live | None:
        """The widget; None where ipywidgets is not installed."""
        if self._live is None:
            with suppress(ImportError):
                self._live = Live(self)
        return self._live

    def close(self) -> None:
        """Stop looking, and take the widget away; the picture stays."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def still(self) -> dict[str, Any]:
        """The page as a notebook keeps it: HTML, a PNG of its pictures, and text, by MIME type."""
        with self._lock:
            self.refresh()
            note = f"As it was at {time.strftime('%H:%M on %Y-%m-%d')}; run this cell for the live board."
            html = self.page.html(self.mark, note)
            return {"text/html": html, "image/png": self.page.png(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Board({', '.join(f'{s.name}: {s.state}' for s in self.snapshots) or 'not looked yet'})"

    def _repr_html_(self) -> str:
        return str(self.still()["text/html"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        still, live = self.still(), self.live
        return still | ({VIEW: live.start()} if live else {})

    def _ipython_display_(self) -> None:
        """Show the widget, and beside it the picture: front ends do not fall back from one to the other."""
        from IPython.display import DisplayHandle, display

        still = self.still()
        if (live := self.live) is not None:
            display({VIEW: live.start(), "text/plain": repr(self)}, raw=True)
            live.kept = DisplayHandle(self.mark)
        display(still, raw=True, display_id=self.mark)


def names(runs: list[Run]) -> list[str]:
    """What to call every run: the name of its folder, with as much before it as tells it from the others."""
    paths = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        found = ["/".join(parts[-length:]) for parts in paths]
        if len(set(found)) == len(found):
            return found
    repeated = Counter[str]()
    found = [parts[-1] for parts in paths]
    for i, name in enumerate(found):
        repeated[name] += 1
        found[i] = name if repeated[name] == 1 else f"{name} ({repeated[name]})"
    return found
