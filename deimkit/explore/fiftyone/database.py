"""The way to FiftyOne's database: opening it, and a clear sentence when it cannot be opened or goes away."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deimkit.explore.fiftyone.mongod import DatabaseError, database_folder, installer, setting, without_password
from deimkit.explore.fiftyone.readiness import Check, Readiness, fiftyone_report, ready

__all__ = ["Check", "DatabaseError", "Readiness", "connect", "fiftyone_report", "guarded", "quiet", "ready"]

PATIENCE = 180.0  # seconds for mongod to listen; FiftyOne alone gives up after 60
KEPT = "What was written until a moment before is kept in {place}; run the same again, and it is opened anew."

# Which run of the server this process talked to last: it may be killed and come back between two calls.
_run: Any = None


def connect() -> Any:
    """Import FiftyOne with its database open, and return it; at once if it is open already.

    Every way this can fail is a `DatabaseError` that says what is missing and the command that brings it. A database
    that went away is started again. FiftyOne's usage reports stay off unless FIFTYONE_DO_NOT_TRACK says otherwise.
    """
    global _run
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "true")
    killed = False
    if not _answers():
        ready().demand()
        fiftyone = _imported()
        _forget()
        _open(fiftyone)
        killed = _was_killed()
    with guarded("it was opened"):
        before, _run = _run, _run_of_server()
        if killed or before not in (None, _run):
            _recount()
    return sys.modules["fiftyone"]


@contextmanager
def guarded(doing: str = "FiftyOne was at work") -> Iterator[None]:
    """Turn the loss of the database within a `with` block or a decorated function into one sentence.

    doing: what was under way, as the sentence tells it: "The database went away while {doing}."
    """
    try:
        yield
    except _losses() as error:
        address = setting("database_uri")
        place = without_password(address) if address else database_folder()
        last = "" if address else last_words(database_folder())
        why = f" Its last words: {last}." if last else ""
        raise DatabaseError(
            f"FiftyOne's database went away while {doing}: it was stopped, killed, or is out of reach.{why} "
            + KEPT.format(place=place)
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep FiftyOne's notices off the screen; its errors are heard."""
    logger = logging.getLogger("fiftyone")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def last_words(folder: Path) -> str:
    """Why the server that last ran in a database folder stopped, as its log has it; "" if it does not say."""
    log = _log(folder)
    said = ""
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 2**18, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
        for line in lines:
            said = _reason(line, said)
    return said


def _log(folder: Path) -> Path:
    return folder / "log" / "mongo.log"


def _reason(line: str, before: str) -> str:
    """What a line of mongod's log says about its end; what was said before if it says nothing, "" at a new start."""
    try:
        row = json.loads(line)
    except ValueError:  # the first line may be cut
        return before
    if "MongoDB starting" in row["msg"]:
        return ""
    if row.get("s") not in ("E", "F") or before:
        return before
    facts = row.get("attr", {})
    cause = facts.get("error") or facts.get("message") or facts.get("msg") or ""
    cause = os.strerror(cause) if isinstance(cause, int) and cause > 0 else cause
    return f"{row['msg']}: {cause}".rstrip(": .") if cause else str(row["msg"])


# ------------------------------------------------------------------------------------------------------- opening


def _imported() -> Any:
    """FiftyOne itself; an installation that does not import is one of the ways to fail."""
    try:
        import fiftyone
    except Exception as error:  # of any kind: it checks its settings and its dependencies while it is imported
        raise DatabaseError(
            f"FiftyOne is installed and cannot be imported: {error}. Install the versions that deimkit is tested with: "
            f"`make fiftyone` in a checkout, or `{installer()} -c requirements.lock 'deimkit[fiftyone]'`."
        ) from error
    return fiftyone


def _answers() -> bool:
    """Does the database that this process has opened, if any, still answer?"""
    odm = sys.modules.get("fiftyone.core.odm.database")
    if odm is None or odm._client is None:
        return False
    import pymongo
    from pymongo.errors import PyMongoError

    try:
        with pymongo.timeout(3):
            odm._client.admin.command("ping")
    except PyMongoError:
        return False
    return True


def _forget() -> None:
    """Let FiftyOne look for its database anew: left alone, it would never leave one that is gone."""
    import fiftyone.core.odm.database as odm
    import pymongo

    with pymongo.timeout(1):  # it says good-bye to its server first
        odm._disconnect()
    odm._db_service = None
    odm._connection_kwargs.clear()
    os.environ.pop("FIFTYONE_PRIVATE_DATABASE_PORT", None)


def _open(fiftyone: Any) -> None:
    """Open the database, starting FiftyOne's own where no address is given."""
    import fiftyone.core.odm as odm
    from fiftyone.core.config import FiftyOneConfigError
    from pymongo.errors import PyMongoError

    if not fiftyone.config.database_uri:
        server = _started()
        odm.database._db_service = server  # laid where FiftyOne keeps it; it ends with the last process that uses it
        os.environ["FIFTYONE_PRIVATE_DATABASE_PORT"] = str(server.port)
    try:
        with quiet():
            odm.get_db_conn()
    except (ConnectionError, RuntimeError, FiftyOneConfigError, PyMongoError) as error:
        said = f"FiftyOne could not open its database: {error}. `deimkit doctor --fiftyone` tells more."
        raise DatabaseError(said) from error


def _started() -> Any:
    """FiftyOne's own database server, once it listens.

    FiftyOne itself would wait for a minute, also for a server that has ended long since.
    """
    from fiftyone.core.service import DatabaseService, ServiceException

    folder = database_folder()
    try:
        server = DatabaseService()
    except (OSError, ServiceException) as error:
        raise DatabaseError(f"FiftyOne's database in {folder} could not be started: {error}.") from error
    end = time.monotonic() + PATIENCE
    while not _listens(server.child):
        if _ended(server.child):
            why = last_words(folder) or "it said nothing"
            raise DatabaseError(
                f"FiftyOne's database in {folder} does not start: {why}. Its log is {_log(folder)}; "
                "`export FIFTYONE_DATABASE_DIR=/another/folder` begins an empty one."
            )
        if time.monotonic() > end:
            raise DatabaseError(f"FiftyOne's database in {folder} did not listen within {PATIENCE:.0f} s; try again.")
        time.sleep(0.1)
    return server


def _was_killed() -> bool:
    """Does FiftyOne's own database say that it was not closed before it was opened this time?"""
    log = _log(database_folder())
    return not setting("database_uri") and log.is_file() and "unclean shutdown" in log.read_text("utf-8", "replace")


def _run_of_server() -> Any:
    """What tells one run of the server from the next; None if it does not say."""
    import fiftyone.core.odm as odm

    return odm.get_db_conn().command("hello").get("topologyVersion", {}).get("processId")


def _recount() -> None:
    """Count the documents of every collection anew where the count that MongoDB keeps of them is wrong.

    That count, unlike the documents, is not written to disk at once, and `len(dataset)` believes it.
    """
    import fiftyone.core.odm as odm

    database = odm.get_db_conn()
    for name in database.list_collection_names(filter={"type": "collection"}):
        collection = database[name]
        if collection.estimated_document_count() != collection.count_documents({}, hint="_id_"):
            database.command("validate", name)


def _listens(wrapper: Any) -> bool:
    """Does the server that FiftyOne's wrapper process looks after wait for connections?"""
    import psutil

    try:
        sockets = [s for child in wrapper.children(recursive=True) for s in child.net_connections("tcp")]
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN for s in sockets)


def _ended(process: Any) -> bool:
    """Is a process gone, or dead and not yet buried?"""
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _losses() -> tuple[type[Exception], ...]:
    """The exceptions that say the database is gone; none where no FiftyOne is."""
    try:
        from mongoengine.connection import ConnectionFailure as Unconnected
        from pymongo.errors import ConnectionFailure
    except ImportError:
        return ()
    return ConnectionFailure, Unconnected
