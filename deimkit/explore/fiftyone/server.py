"""The server of the App: which port it gets, and starting it on a machine that may be slow."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import urllib.request
from typing import Any

from deimkit.errors import DeimkitError

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 5151, 100  # FiftyOne's own, and how many are tried from there on where none is asked for
ATTEMPTS = 3  # at starting the server, which FiftyOne gives a minute each; on a busy machine the first may not do
ANSWER = 60.0  # seconds for the server to answer once it listens


class AppError(DeimkitError):
    """An App that cannot be served as it was asked for."""


def serve(fiftyone: Any, address: str, port: int) -> None:
    """Start the server of the App, and wait until it answers.

    It is laid where FiftyOne's sessions look for one before they start their own: those give it ten seconds.
    """
    from fiftyone.core.service import ServerService, ServiceListenTimeout
    from fiftyone.core.session import session as sessions

    for _ in range(ATTEMPTS):
        try:
            server = ServerService(port, address=address, do_not_track=fiftyone.config.do_not_track)
        except ServiceListenTimeout:
            continue
        end = time.monotonic() + ANSWER
        while time.monotonic() < end:
            if version(address, port):
                sessions._server_services[port] = server
                return
            time.sleep(0.2)
        server.stop()
    raise AppError(
        f"The App's server did not answer on port {port} in {ATTEMPTS} attempts; this machine may be too busy. "
        "Try again, or look at the contact sheet, which needs no server."
    )


def version(address: str, port: int) -> str:
    """The version of the FiftyOne that serves an App there; "" if none does."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{reachable(address)}:{port}/fiftyone", timeout=5) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def free_port(address: str) -> int:
    """The first port from FiftyOne's own on that nobody listens on."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        if not _obstacle(address, port):
            return port
    return demand_free(address, FIRST_PORT)


def demand_free(address: str, port: int) -> int:
    """The port if the App can be served on it; else who or what is in the way."""
    if why := _obstacle(address, port):
        other = version(address, port)
        who = f", by another App (FiftyOne {other})" if other else ""
        raise AppError(
            f"The App cannot be served on {address}:{port}: {why}{who}. Name another port, such as "
            f"launch(..., port={port + 1}), or none, and the next free one is used."
        )
    return port


def _obstacle(address: str, port: int) -> str:
    """Why nothing can listen on a port, in the system's words; "" if something can."""
    try:
        with socket.socket() as probe:
            if os.name == "posix":  # a port that was closed just now counts as free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
        with socket.socket() as probe:  # some systems let two programs have a port, by different addresses
            return os.strerror(errno.EADDRINUSE) if probe.connect_ex((reachable(address), port)) == 0 else ""
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise AppError(
                f"This machine has no address {address!r} to serve the App on ({error.strerror}). "
                f"Use {LOOPBACK!r} for this machine alone, or '0.0.0.0' for all its networks."
            ) from error
        return error.strerror or str(error)


def reachable(address: str) -> str:
    """Where this machine reaches what is served on an address."""
    return LOOPBACK if address in ("0.0.0.0", "") else address
