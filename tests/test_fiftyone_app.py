"""The App: a port that is free, hints for those who are elsewhere, and a page that shows what it is told to."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deimkit.explore.fiftyone import app as app_module
from deimkit.explore.fiftyone import server
from deimkit.explore.fiftyone.app import App, hints, launch
from deimkit.explore.fiftyone.server import AppError, demand_free, free_port
from tests.loopback import Site
from tests.mongod import Mongod, needs_mongod, run_python


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that a program of another kind listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_port_that_is_taken(taken: int) -> None:
    with pytest.raises(AppError, match=rf"127.0.0.1:{taken}: Address already in use\..*port={taken + 1}\), or none"):
        demand_free("127.0.0.1", taken)


def test_port_that_another_app_has(site: Site) -> None:
    site.files["/fiftyone"] = json.dumps({"version": "1.22.1"}).encode()
    with pytest.raises(AppError, match=r"in use, by another App \(FiftyOne 1.22.1\)"):
        demand_free("127.0.0.1", site.server_port)
    assert server.version("127.0.0.1", site.server_port) == "1.22.1"


def test_next_free_port_is_found(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_PORT", taken)
    port = free_port("127.0.0.1")
    assert taken < port < taken + server.PORTS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
    monkeypatch.setattr(server, "PORTS", 1)
    with pytest.raises(AppError, match="in use"):
        free_port("127.0.0.1")


@pytest.mark.parametrize("address", ["203.0.113.9", "no.such.host.invalid"])
def test_address_that_is_not_here(address: str) -> None:
    with pytest.raises(AppError, match=rf"This machine has no address '{address}'.*'127.0.0.1'.*'0.0.0.0'"):
        demand_free(address, 5151)


def test_what_answers_wrongly_is_no_app(site: Site, taken: int) -> None:
    for body in (b"<html>", b"[]", b"{}", b"1"):
        site.files["/fiftyone"] = body
        assert server.version("127.0.0.1", site.server_port) == ""


@pytest.mark.parametrize(
    "address, environment, said",
    [
        ("127.0.0.1", {"USER": "ada"}, r"`ssh -N -L 5151:127.0.0.1:5151 ada@\S+`"),
        ("0.0.0.0", {}, "no password"),
        ("127.0.0.1", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, r"-p 127.0.0.1:5151:5151` and call .*'0.0.0.0'"),
        ("0.0.0.0", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, r"-p 127.0.0.1:5151:5151`\."),
        ("127.0.0.1", {"VSCODE_PID": "1"}, "forward port 5151"),
        ("127.0.0.1", {"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, "FIFTYONE_APP_PROXY_URL=.*/user/ada/proxy/5151/"),
        ("127.0.0.1", {"COLAB_RELEASE_TAG": "1"}, "On Colab"),
    ],
)
def test_hints(address: str, environment: dict[str, str], said: str) -> None:
    assert re.search(said, "\n".join(hints(address, 5151, environment)))


def stand_in(view: Any = None) -> Any:
    """What an App needs to know of FiftyOne's session."""
    return SimpleNamespace(
        server_port=5151, url="http://127.0.0.1:5151/", dataset=SimpleNamespace(name="a<b"), view=view
    )


def test_app_says_where_it_is() -> None:
    app = App(stand_in(SimpleNamespace(name="duplicates")), "127.0.0.1")
    assert repr(app).startswith("App(a<b, duplicates: http://127.0.0.1:5151/)\nOn another machine: run `ssh")
    html = app._repr_html_()
    assert '<a href="http://127.0.0.1:5151/"' in html and "a&lt;b, duplicates" in html and "ssh -N -L" in html
    app.closed = True
    assert repr(app) == "App(closed)" and "http" not in app._repr_html_() and not app.alive


def test_only_what_fiftyone_has_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fiftyone")
    monkeypatch.setattr(app_module, "connect", lambda: None)
    with pytest.raises(AppError, match=r"shows a FiftyOne dataset or view; got list\. Make one with `to_fiftyone"):
        launch([])


def test_pages_that_take_nothing_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [RuntimeError("Client is not connected"), RuntimeError("Client is not connected"), None]

    def send() -> None:
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(app_module.time, "sleep", lambda seconds: None)
    app_module._patiently(send)
    assert not answers
    answers += [RuntimeError("Client is not connected")]
    monkeypatch.setattr(app_module, "ANSWER", -1.0)
    with pytest.raises(AppError, match=r"Client is not connected.*launch it anew"):
        app_module._patiently(send)


# ---------------------------------------------------------------------------------------------------- for real

SERVED = """
import subprocess, sys, time
from urllib.request import urlopen
import numpy as np
from PIL import Image
from deimkit.explore.fiftyone.database import connect
from deimkit.explore.fiftyone.app import AppError, launch
fiftyone = connect()
Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(FOLDER + "/a.png")
dataset = fiftyone.Dataset("shown")
dataset.persistent = True
dataset.add_samples([fiftyone.Sample(filepath=FOLDER + "/a.png")], progress=False)
dataset.save_view("first", dataset.limit(1))
print("begin")
app = launch(dataset, browser=False)
print("end", app.alive, urlopen(app.url).status)
print("same", launch(dataset, browser=False) is app)
app.show("first")
print("view", app.session.view.name, launch(dataset, browser=False).session.view)
other = '''
from deimkit.explore.fiftyone.app import AppError, launch
from deimkit.explore.fiftyone.database import connect
try:
    launch(connect().load_dataset("shown"), port=%d, browser=False)
except AppError as error:
    print("SAID", error)
''' % app.port
print(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout)
port = app.port
app.close()
app.close()
print("closed", app, app.alive)
app = launch(dataset, port=port, browser=False)
print("anew", app.port == port, app.alive)
app.close()
"""


@pytest.mark.slow
@needs_mongod
def test_app_is_served_and_shows_what_it_is_told(tmp_path: Path) -> None:
    with Mongod(tmp_path / "database") as database:
        told = run_python(f"FOLDER = {str(tmp_path)!r}\n{SERVED}", FIFTYONE_DATABASE_URI=database.address)
    assert "begin\nend True 200\nsame True\nview first None\n" in told  # and nothing printed between
    assert re.search(r"SAID .*in use, by another App \(FiftyOne ", told)
    assert "closed App(closed) False\nanew True True" in told
