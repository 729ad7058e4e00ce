"""A web server on this machine that drops, lies and stalls as it is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """How the server answers one request: well, unless told otherwise.

    drop: bytes of the body after which the connection breaks. length: what it claims instead of the truth. ranges:
    whether it knows them. start: where it begins a piece, whatever was asked for. chunked: no length, but an end that
    can be told. silent: no length at all. stall: seconds of silence at the end.
    """

    status: int = 200
    drop: int | None = None
    length: int | None = None
    ranges: bool = True
    start: int | None = None
    etag: str = '"1"'
    date: str = ""
    type: str = "application/octet-stream"
    location: str = ""
    chunked: bool = False
    silent: bool = False
    stall: float = 0.0
    body: bytes | None = None


class Site(ThreadingHTTPServer):
    """A loopback server: files by path, what to do with the next requests, and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.plan: list[Reply] = []
        self.default = Reply()
        self.asked: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away, as it does in these tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: Any) -> None:
        """Nothing: the tests read `asked`."""

    def do_GET(self) -> None:
        site, span = self.server, self.headers["Range"]
        site.asked.append((self.path, span))
        reply = site.plan.pop(0) if site.plan else site.default
        body = site.files.get(self.path) if reply.body is None else reply.body
        if body is None:
            return self.send_error(404)
        start = int(span[len("bytes=") :].rstrip("-")) if span and reply.ranges else 0
        changed = self.headers["If-Range"] not in (None, reply.etag, reply.date)
        start = 0 if changed else start
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        piece = body[start:]
        self.send_response(206 if start and reply.status == 200 else reply.status)
        for name, value in (("ETag", reply.etag), ("Last-Modified", reply.date), ("Location", reply.location)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", reply.type)
        if start:
            start = start if reply.start is None else reply.start
            piece = body[start:]
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not reply.silent:
            self.send_header("Content-Length", str(len(piece) if reply.length is None else reply.length))
        self.end_headers()
        piece = piece[: reply.drop]
        if reply.chunked:
            piece = b"%x\r\n%s\r\n" % (len(piece), piece) + (b"0\r\n\r\n" if reply.drop is None else b"")
        self.wfile.write(piece)
        time.sleep(reply.stall)
        self.close_connection = True
