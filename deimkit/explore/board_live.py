"""The live part of a board: its widget, its buttons, and the thread that looks at the folders."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deimkit.explore.frame import STYLE, framed
from deimkit.training.run import Run

if TYPE_CHECKING:
    from deimkit.explore.board import Board

KEEP_S = 60.0  # seconds between the pictures that are kept in a notebook file while a run goes on
LARGE = 1 << 30  # bytes of a checkpoint that is not looked at again unasked


class Watch(threading.Thread):
    """Looks every so often, until `look` says False, it is `end`ed, or its owner is gone.

    A look that took long is followed by a rest nine times as long: a board takes a tenth of a core at most.
    """

    def __init__(self, owner: Live, every: float) -> None:
        super().__init__(name="deimkit board", daemon=True)
        self.owner = weakref.ref(owner)
        self.every = every
        self.woken = threading.Event()
        self.over = False

    def run(self) -> None:
        """Look, rest, look."""
        rest = self.every
        while not self.over:
            self.woken.wait(rest)
            self.woken.clear()
            owner = self.owner()
            if owner is None or self.over:
                return
            started = time.thread_time()
            if not owner.look():
                return
            rest = max(self.every, 9 * (time.thread_time() - started))
            del owner

    def end(self) -> None:
        """Look no more."""
        self.over = True
        self.woken.set()


class Live:
    """The widget of a board: the page piece by piece, buttons, and a thread that keeps it up to date while it is seen.

    What a button does is done in a thread of its own, so that the kernel stays free; what goes wrong is said in a
    sentence on the board.
    """

    def __init__(self, board: Board) -> None:
        import ipywidgets as w

        self.board = board
        self.kept: Any = None  # the handle of the picture that stays in the notebook
        self._kept_at, self._kept_states = time.monotonic(), [s.state for s in board.snapshots]
        self._splits: dict[Path, Any] = {}
        self._shown: tuple[Any, ...] = ()  # the checkpoint whose predictions are shown
        self._predicting: threading.Thread | None = None
        self._troubled = False
        self._looking = threading.RLock()  # the buttons' threads look as well
        self.watch: Watch | None = None

        wide = w.Layout(width="100%")
        self.head, self.message, self.sheet, self.seen, self.story = (w.HTML(layout=wide) for _ in range(5))
        self.pictures: dict[str, Any] = {}
        columns = "repeat(auto-fill, minmax(min(420px, 100%), 1fr))"
        self.gallery = w.GridBox(layout=w.Layout(grid_template_columns=columns, max_width="1240px", grid_gap="10px"))
        self.pick = w.Dropdown(options=[(r.name, i) for i, r in enumerate(board._readers)], description="Run")
        self.stop = w.Button(description="Stop", icon="stop", tooltip="Save a checkpoint, then stop training")
        self.resume = w.Button(description="Resume", icon="play", tooltip="Go on from the last checkpoint")
        self.again = w.Button(description="Refresh", icon="refresh", tooltip="Look at the folder now")
        self.predict = w.ToggleButton(
            description="Predictions", icon="image", tooltip="What the best checkpoint sees in a few validation images"
        )
        self.matching = w.ToggleButton(
            description="Matching", icon="search", tooltip="What the matching microscope recorded during training"
        )
        self.stop.on_click(lambda _: self.act("stop the run", self.stop_run))
        self.resume.on_click(lambda _: self.act("resume the run", self.resume_run))
        self.again.on_click(lambda _: self.act("refresh the board", self.look_again))
        self.predict.observe(lambda _: self.turn(), "value")
        self.matching.observe(lambda _: self.turn(), "value")
        self.pick.observe(lambda _: self.turn(), "value")
        chosen = [self.pick] if len(board.runs) > 1 else []
        bar = [*chosen, self.stop, self.resume, self.again, self.predict, self.matching]
        buttons = w.HBox(bar, layout=w.Layout(flex_flow="row wrap"))
        self.root = w.VBox([self.head, buttons, self.message, self.gallery, self.sheet, self.seen, self.story])
        self.root._view_count = 0  # from now on the front end counts how often the widget is shown
        self.root.observe(self._viewed, "_view_count")
        self._w = w
        self.update()

    # ------------------------------------------------------------------ looking
    def start(self) -> dict[str, Any]:
        """Keep the widget up to date from now on; returns what a front end needs to show it."""
        if self.watch is None or not self.watch.is_alive():
            self.watch = Watch(self, self.board.every)
            weakref.finalize(self, self.watch.end)  # and so at the end of the process
            self.watch.start()
        return self.root.get_view_spec()

    def close(self) -> None:
        """Look no more, and take the widget out of the notebook."""
        if self.watch is not None:
            self.watch.end()
        _close(self.root)

    def look(self) -> bool:
        """Bring the widget up to date; False if it was closed, and needs no more looks."""
        with self._looking:
            if self.root.comm is None:
                return False
            try:
                before = [s.state for s in self.board.snapshots]
                if self.board.refresh():
                    self.update()
                    self.keep()
                if before != [s.state for s in self.board.snapshots]:
                    self.say("")  # what was said is no longer so
                if self.predict.value:
                    self.follow()
                if self._troubled:
                    self.say("")
                self._troubled = False
            except Exception as error:  # whatever it is, it is told on the board, and the next look may succeed
                self._troubled = True
                self.say(f"The board could not be refreshed: {str(error) or type(error).__name__}")
            return True

    def update(self) -> None:
        """Show the page as it is."""
        page, snapshots = self.board.page, self.board.snapshots
        hide = f"<style>.{self.board.mark} {{ display: none }}</style>"
        self.head.value = f'{STYLE}{hide}<div class="dk-board">{page.head}</div>'
        self.sheet.value = page.sheet
        self.story.value = f'<div class="dk-board">{page.story}</div>'
        for title, html in page.pictures.items():
            if title not in self.pictures:
                self.pictures[title] = self._w.HTML()
            self.pictures[title].value = html
        shown = tuple(self.pictures[title] for title in page.pictures)
        if shown != self.gallery.children:
            self.gallery.children = shown
        if snapshots:
            chosen = snapshots[self.pick.value or 0]
            self.stop.disabled = not chosen.alive
            self.resume.disabled = chosen.alive or chosen.state in ("finished", "gone")

    def keep(self) -> None:
        """Put the page into the notebook file too: when a state changes, and now and then."""
        states = [s.state for s in self.board.snapshots]
        if self.kept is not None and (states != self._kept_states or time.monotonic() - self._kept_at > KEEP_S):
            self._kept_at, self._kept_states = time.monotonic(), states
            self.kept.update(self.board.still(), raw=True)

    def say(self, words: str) -> None:
        """Show a sentence under the buttons."""
        self.message.value = f'<p role="status" class="dk-alert">{escape(words[:1000])}</p>' if words else ""

    def _viewed(self, change: Any) -> None:
        """Rest while no front end shows the widget, and go on when one does again."""
        if change["new"] and not change["old"]:
            self.start()
            if self.watch is not None:
                self.watch.woken.set()
        elif change["old"] and not change["new"] and self.watch is not None:
            self.watch.end()

    # ------------------------------------------------------------------ buttons
    def act(self, what: str, action: Callable[[], str]) -> threading.Thread:
        """Do something in a thread of its own, which is returned, and say what came of it."""

        def attempt() -> None:
            try:
                said = action()
            except Exception as error:  # of any kind: the sentence on the board is where it is heard
                said = f"Could not {what}: {str(error) or type(error).__name__}"
            self.look()
            self.say(said)

        worker = threading.Thread(target=attempt, name=f"deimkit board: {what}", daemon=True)
        worker.start()
        return worker

    @property
    def chosen(self) -> tuple[Run, str]:
        """The run that the buttons are about, and its name."""
        i = self.pick.value or 0
        return self.board.runs[i], self.board._readers[i].name

    def stop_run(self) -> str:
        """Ask the chosen run to stop."""
        run, name = self.chosen
        if run.pid is None:
            return f"No process trains {name}: there is nothing to stop."
        run.stop()
        return f"{name} was asked to stop; it saves a checkpoint after its current step."

    def resume_run(self) -> str:
        """Let the chosen run go on in a process of its own."""
        from deimkit.api import resume

        run, name = self.chosen
        if run.finished and run.pid is None:
            return f"{name} is finished: nothing is left to train."
        resume(run, wait=False, progress=False)
        return f"{name} goes on from its last checkpoint, in process {run.pid}."

    def look_again(self) -> str:
        """Read the folders whether they changed or not."""
        self.board.forget()
        return f"Looked at {time.strftime('%H:%M:%S')}."

    def turn(self) -> None:
        """Follow what was chosen: which run, predictions or none, matching or none."""
        self.board.matching = (self.pick.value or 0) if self.matching.value else None
        if not self.predict.value:
            self._shown, self.seen.value = (), ""
        self.board.forget()
        self.update()
        if self.watch is not None:
            self.watch.woken.set()

    def follow(self) -> None:
        """Show what the chosen run's best checkpoint sees, if it is not what is shown already."""
        if self._predicting is not None and self._predicting.is_alive():
            return
        run, name = self.chosen
        found = run.best.stat() if run.best.is_file() else None
        newest = (name, found and found.st_mtime_ns)
        again = self._shown[:1] == (name,)
        if newest == self._shown or (again and found is not None and found.st_size > LARGE):
            return
        self._shown = newest
        self._predicting = self.act("show predictions", lambda: self.show_predictions(run, name))

    def show_predictions(self, run: Run, name: str) -> str:
        """Predict on a few validation images; takes seconds, so it is not for the kernel's own thread."""
        from deimkit.explore.samples import samples, validation

        self.say(f"Looking at images with the best checkpoint of {name} …")
        if run.folder not in self._splits:
            self._splits[run.folder] = validation(run)
        picture = samples(run, self._splits[run.folder])
        words = f"Validation images of {name}: left as annotated, right what its best checkpoint sees"
        if self.predict.value:
            self.seen.value = f'<div class="dk-board">{framed(words, picture, words, "dk-large")}</div>'
        return ""


def _close(widget: Any) -> None:
    """Close a widget and all that is inside it."""
    for part in getattr(widget, "children", ()):
        _close(part)
    widget.close()
