"""The App: FiftyOne's page, served on this machine for a notebook's cell or a browser's tab; and how to reach it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import webbrowser
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from deimkit.explore.fiftyone.database import connect, guarded, quiet
from deimkit.explore.fiftyone.server import (
    ANSWER,
    LOOPBACK,
    AppError,
    demand_free,
    free_port,
    reachable,
    serve,
    version,
)

_apps: dict[int, App] = {}  # those that this process has open, by port


def launch(shown: Any, port: int | None = None, address: str = LOOPBACK, browser: str | bool | None = None) -> App:
    """Show a FiftyOne dataset or view in the App: in the cell of a notebook, elsewhere in a browser's tab.

    An App that this process has open already shows it instead. port: where the App is served, 5151 or the next free one
    if not given. address: from where it can be reached; it has no password, so that anything but this machine
    ("127.0.0.1") is for networks you trust. browser: False for no tab, True for one, or a browser's name; not given, a
    tab where there is a screen and no notebook. The App ends with its process: a script calls `wait()`.
    """
    fiftyone = connect()
    _demand_collection(fiftyone, shown)
    app = _running(port, address)
    with guarded("the App was opened"), quiet():
        if app is None:
            port = free_port(address) if port is None else demand_free(address, port)
            serve(fiftyone, address, port)
            app = _apps[port] = App(_session(fiftyone, shown, address, port), address)
            app.show()
        else:
            app.show(shown)
    if browser or (browser is None and not app.in_notebook and _has_screen()):
        webbrowser.get(browser if isinstance(browser, str) else None).open(app.url, new=2)
    return app


class App:
    """An App that is open: where it is, and what it shows.

    session: FiftyOne's own handle, for what is not here, such as `session.selected`.
    """

    def __init__(self, session: Any, address: str) -> None:
        self.session = session
        self.address = address
        self.port: int = session.server_port
        self.closed = False
        self._database = _database()

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        return str(self.session.url)

    @property
    def in_notebook(self) -> bool:
        """True where the App appears in cells."""
        from fiftyone.core.context import is_notebook_context

        return bool(is_notebook_context())

    @property
    def alive(self) -> bool:
        """True while its server answers, from the database that is open now."""
        return not self.closed and self._database == _database() and bool(version(self.address, self.port))

    def show(self, shown: Any = None, height: int | None = None) -> None:
        """Show another dataset, view, or saved view (by name) in every open page; in a notebook, in this cell too.

        height: of the cell, in pixels. The cell that showed the App before keeps a picture of it.
        """
        if shown is not None:
            self.turn(shown)
        if self.in_notebook:
            with guarded("the App was shown"), quiet():
                _patiently(lambda: self.session.show(height=height))

    def turn(self, shown: Any) -> None:
        """Let every open page show another dataset, view, or saved view (by name), where it is: from a click, say."""
        with guarded("the App was shown"), quiet():
            if isinstance(shown, str):
                shown = self.session.dataset.load_saved_view(shown)
            _demand_collection(connect(), shown)
            _patiently(lambda: _turn(self.session, shown))

    def wait(self) -> None:
        """Keep a script alive until the last page that shows the App is closed."""
        self.session.wait()

    def close(self) -> None:
        """Close the App and end its server; in a notebook a picture of it stays."""
        if not self.closed:
            self.closed = True
            _apps.pop(self.port, None)
            self.session._disable_wait_warning = True  # it takes a short life for a mistake
            with quiet():
                self.session.close()

    def __repr__(self) -> str:
        if self.closed:
            return "App(closed)"
        return "\n".join([f"App({_title(self.session)}: {self.url})", *hints(self.address, self.port)])

    def _repr_html_(self) -> str:
        if self.closed:
            return f"<p>{escape(repr(self))}</p>"
        link = f'<a href="{escape(self.url)}" target="_blank" rel="noopener">{escape(self.url)}</a>'
        items = "".join(f"<li>{escape(hint)}</li>" for hint in hints(self.address, self.port))
        return (
            f"<p>{escape(_title(self.session))} in the App: {link}</p>"
            f"<details><summary>It does not appear, or you are at another machine</summary><ul>{items}</ul></details>"
        )


def hints(address: str, port: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """How to see an App from elsewhere: one sentence for each thing that may stand between it and a browser."""
    user, host = environment.get("USER") or Path.home().name, socket.gethostname()
    said = []
    if address == LOOPBACK:
        tunnel = f"ssh -N -L {port}:{LOOPBACK}:{port} {user}@{host}"
        said.append(f"On another machine: run `{tunnel}` there, then open this address.")
    else:
        said.append(
            f"Whoever reaches port {port} of this machine can see and change the data: the App has no password."
        )
    if _in_container(environment):
        publish = f"start the container with `-p {LOOPBACK}:{port}:{port}`"
        inside = " and call launch(..., address='0.0.0.0')" if address == LOOPBACK else ""
        said.append(f"In a container: {publish}{inside}.")
    if any(name.startswith("VSCODE_") for name in environment):
        said.append(f"In VS Code on a remote machine: forward port {port} in the view Ports.")
    if "JUPYTERHUB_SERVICE_PREFIX" in environment:
        path = f"https://YOUR.HUB{environment['JUPYTERHUB_SERVICE_PREFIX']}proxy/{port}/"
        said.append(f"On JupyterHub: install jupyter-server-proxy, and set FIFTYONE_APP_PROXY_URL={path}.")
    if "COLAB_RELEASE_TAG" in environment:
        said.append("On Colab: the App appears in the cell only.")
    return said


# ----------------------------------------------------------------------------------------------------- the session


def _session(fiftyone: Any, shown: Any, address: str, port: int) -> Any:
    """FiftyOne's handle on a server that runs already, so that it has nothing to wait for and opens nothing itself."""
    from fiftyone.core.context import is_notebook_context

    logging.getLogger("fiftyone.core.config").addFilter(_is_news)
    remote = not is_notebook_context()
    return fiftyone.Session(dataset=shown, address=reachable(address), port=port, remote=remote, auto=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Is a notice worth reading? FiftyOne tells at every click of its own settings that they have been removed."""
    return "App config option has been removed" not in str(record.msg)


def _turn(session: Any, shown: Any) -> None:
    """Let every open page show something else; a dataset is shown without the view of it that was."""
    from fiftyone.core.view import DatasetView

    if isinstance(shown, DatasetView):
        session.view = shown
    else:
        session.view = None
        session.dataset = shown


def _patiently(send: Any) -> None:
    """Send something to the pages; again for a while, since FiftyOne does not wait for its own connection."""
    end = time.monotonic() + ANSWER
    while True:
        try:
            return send()
        except (RuntimeError, OSError) as error:  # "Client is not connected", or a server that was too busy
            if time.monotonic() > end:
                raise AppError(f"The App does not take anything ({error}): `close()` it and launch it anew.") from error
            time.sleep(0.5)


def _demand_collection(fiftyone: Any, shown: Any) -> None:
    """Refuse what FiftyOne cannot show."""
    from fiftyone.core.collections import SampleCollection

    if not isinstance(shown, SampleCollection):
        kind = type(shown).__name__
        raise AppError(f"The App shows a FiftyOne dataset or view; got {kind}. Make one with `to_fiftyone(...)`.")


def _title(session: Any) -> str:
    """What an App shows, in a few words."""
    name, view = session.dataset.name, session.view
    if view is None:
        return str(name)
    return f"{name}, {view.name or 'a view'}"


def _running(port: int | None, address: str) -> App | None:
    """The App that this process has open there, or anywhere if no port is asked for; one that died is cleared away."""
    for app in list(_apps.values()):
        if not app.alive:
            app.close()
        elif port in (None, app.port) and app.address == address:
            return app
    return None


def _database() -> str:
    """Which database this process has open."""
    return os.environ.get("FIFTYONE_PRIVATE_DATABASE_PORT", "")


def _in_container(environment: Mapping[str, str]) -> bool:
    marks = Path("/.dockerenv"), Path("/run/.containerenv")
    return "KUBERNETES_SERVICE_HOST" in environment or any(mark.exists() for mark in marks)


def _has_screen() -> bool:
    """Is there a screen on which a browser can open?"""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
