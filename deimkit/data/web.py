"""What a web server says about a file, and what its refusals mean: worth another attempt, or not to be had."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any

from deimkit.errors import DataError

CHUNK = 1 << 20  # bytes read at once
SILENCE = 30.0  # seconds without a byte after which a connection counts as dropped

PARTIAL, NO_SUCH_PIECE = 206, 416

_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that may be another one in a moment
_REMEDY = dict.fromkeys(
    (301, 302, 303, 307, 308), "It leads in circles, or to what is no web address: look for the file's new one"
) | {
    401: "It asks for a login: fetch it with a browser",
    403: "It may ask for a login: fetch it with a browser",
    404: "It has moved or is gone: look for its new address where it is published",
    410: "It is gone: look for its new address where it is published",
}


class Dropped(Exception):
    """The connection ended early, or the server is not well: worth another attempt."""


@dataclass(frozen=True)
class Announced:
    """What the head of an answer says of its body.

    start: which byte of the file it begins with, -1 if that is not clear. total: bytes of the whole file, None if not
    said. delimited: whether the end of the body can be told from a dropped connection without knowing the total.
    validator: what names this version of the file: a strong ETag, else its date, else "".
    """

    start: int
    total: int | None
    delimited: bool
    validator: str

    @staticmethod
    def of(status: int, headers: Message) -> Announced:
        """Read from the status and the headers of an answer."""
        chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        tag = headers.get("ETag", "")
        validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
        if status not in (PARTIAL, NO_SUCH_PIECE):
            length = headers.get("Content-Length", "")
            return Announced(0, int(length) if length.isdecimal() and not chunked else None, chunked, validator)
        unit, _, span = headers.get("Content-Range", "").partition(" ")
        piece, _, total = span.partition("/")
        start = piece.partition("-")[0]
        known = unit == "bytes" and start.isdecimal()
        return Announced(int(start) if known else -1, int(total) if total.isdecimal() else None, chunked, validator)


def ask(url: str, headers: dict[str, str]) -> Any:
    """The answer to a request, to be used as a context: the file, a piece of it, or that there is no such piece.

    Raises `Dropped` if it is worth another attempt, else `DataError`.
    """
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.build_opener(_SafeRedirects).open(request, timeout=SILENCE)
    except urllib.error.HTTPError as error:
        if error.code == NO_SUCH_PIECE:
            return error  # which is an answer, too
        error.close()
        raise _refusal(url, error.code) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(f"{url} shows a certificate that is not trusted: {error.reason}.") from error
        raise Dropped(f"no connection ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _dropped(error) from error


def chunks(response: Any) -> Iterator[bytes]:
    """The body as it comes in; nothing that has come in is lost when the connection drops, which is a `Dropped`."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _dropped(error) from error
        if not chunk:
            return
        yield chunk


def expect_web_address(url: str) -> None:
    """Raise `DataError` unless `url` leads to the web, and not to a file of this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"Expected an address that begins with http:// or https://; got {url!r}.")


def expect_no_page(url: str, headers: Message, start: bytes = b"") -> None:
    """Raise `DataError` if the headers, or the `start` of the body, are those of a web page."""
    looks_so = start.lstrip()[:64].lower().startswith((b"<!doctype html", b"<html"))
    if looks_so or headers.get_content_type() == "text/html":
        raise DataError(
            f"{url} sends a web page instead of the file: a login, a notice, or a network that asks you to sign in. "
            "Look at it with a browser."
        )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another web address, and from a protected address only to a protected one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        expect_web_address(newurl)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DataError(f"{req.full_url} redirects to {newurl}, which is not protected. Fetch it with a browser.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refusal(url: str, code: int) -> Exception:
    answer = f"{code} {http.client.responses.get(code, '')}".strip()
    if code in _LATER:
        return Dropped(f"the server answered {answer}")
    remedy = _REMEDY.get(code, "Look at the address with a browser")
    return DataError(f"Expected a file at {url}; the server answered {answer}. {remedy}.")


def _dropped(error: Exception) -> Dropped:
    return Dropped(f"the connection dropped ({str(error) or type(error).__name__})")
