"""A weight file from the web is fetched once, kept if it is good, and otherwise refused with the reason."""

from __future__ import annotations

import hashlib
import io
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deimkit.data import fetch
from deimkit.errors import CheckpointError
from deimkit.weights.addresses import WebFile, cache_folder, is_address
from tests.loopback import Reply, Site


def saved(content: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTENT = saved({"stem.weight": torch.rand(100, 1000)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no pause between two attempts."""
    monkeypatch.setenv("DEIMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def url(site: Site) -> str:
    site.files["/a/w.pth"] = CONTENT
    return site.url("/a/w.pth")


def kept(cache: Path) -> list[str]:
    """The names of all weight files in the cache, whole or in part."""
    return sorted(path.name for path in cache.rglob("*.*") if path.is_file())


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


def test_a_file_is_fetched_once_and_found_again_without_a_network(site: Site, url: str, cache: Path) -> None:
    heard: list[str] = []
    path = WebFile(url).fetch(heard.append)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache) and kept(cache) == ["w.pth"]
    assert any(line.startswith("w.pth 40") and " of 40" in line for line in heard)
    site.shutdown()
    assert WebFile(url).fetch() == path and len(site.asked) == 1


def test_equal_names_at_two_addresses_are_two_files(site: Site, url: str) -> None:
    site.files["/b/w.pth?download=1"] = saved({"stem.weight": torch.zeros(1)})
    other = WebFile(site.url("/b/w.pth?download=1")).fetch()
    assert other.name == "w.pth" and WebFile(url).fetch().read_bytes() == CONTENT != other.read_bytes()


def test_ten_drops_lose_nothing(site: Site, url: str) -> None:
    site.plan = [Reply(drop=20_000 + 1000 * k) for k in range(10)]
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert WebFile(url, sha256, len(CONTENT)).fetch().read_bytes() == CONTENT
    starts = [int(span[6:-1]) for _, span in site.asked if span]
    assert starts == [sum(20_000 + 1000 * k for k in range(n)) for n in range(1, 11)]  # not a byte was sent twice


def test_what_arrived_outlives_an_error(site: Site, url: str) -> None:
    site.plan, site.default = [Reply(drop=100_000)], Reply(500)
    assert "answered 500" in refusal(WebFile(url).fetch)
    site.default = Reply()
    assert WebFile(url).fetch().read_bytes() == CONTENT and site.asked[-1][1] == "bytes=100000-"


def test_another_checksum_or_size_is_refused_and_not_kept(site: Site, url: str, cache: Path) -> None:
    said = refusal(WebFile(url, sha256="0" * 64).fetch)
    assert f"What came from {url} was deleted" in said and "expected SHA-256 0000" in said and not kept(cache)
    assert "announces" in refusal(WebFile(url, size=7).fetch) and not kept(cache)
    assert WebFile(url, hashlib.sha256(CONTENT).hexdigest()).fetch().read_bytes() == CONTENT  # fetched anew


@pytest.mark.parametrize(
    "reply, says",
    [
        (Reply(404), "answered 404 Not Found.*pass weights=FILE"),
        (Reply(403), "answered 403 Forbidden. It may ask for a login"),
        (Reply(type="text/html", body=b"<html>sign in</html>"), "a web page instead of the file.*pass weights=FILE"),
        (Reply(body=b"version https://git-lfs.github.com/spec/v1"), "was deleted.*damaged or not a weight file"),
        (Reply(body=CONTENT[:-1000]), "was deleted.*damaged or not a weight file"),
        (Reply(body=saved([1, 2])), "was deleted.*Expected a state dict"),
        (Reply(body=saved({"model": subprocess.Popen})), "was deleted.*could run code"),
    ],
)
def test_what_is_no_weight_file_is_refused_and_not_kept(
    site: Site, url: str, cache: Path, reply: Reply, says: str
) -> None:
    site.plan = [reply]
    with pytest.raises(CheckpointError, match=says):
        WebFile(url).fetch()
    assert not kept(cache) and WebFile(url).fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["/", "", "/model", "/w.zip", "/w.pth/", "/view?file=w.pth"])
def test_an_address_of_something_else_is_not_asked(site: Site, path: str) -> None:
    assert "Expected the address of a .pth, .pt or .safetensors file" in refusal(WebFile(site.url(path)).fetch)
    assert not site.asked


def test_four_at_once_fetch_it_once(site: Site, url: str) -> None:
    site.default = Reply(stall=0.2)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: WebFile(url).fetch(), range(4)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT and len(site.asked) == 1


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({}, "home/.cache/deimkit/weights"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/deimkit/weights"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/deimkit/weights"),
        ({"XDG_CACHE_HOME": "xdg", "DEIMKIT_CACHE": "own"}, "own/weights"),
        ({"DEIMKIT_CACHE": "~/own"}, "home/own/weights"),
    ],
)
def test_where_weights_are_kept(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "DEIMKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path / "home")} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == tmp_path / folder and not cache_folder().exists()


def test_a_cache_that_cannot_be_written_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEIMKIT_CACHE", str(tmp_path / "file"))
    assert "Set DEIMKIT_CACHE to a folder that can" in refusal(WebFile(url).fetch)


def test_what_an_address_is() -> None:
    assert is_address("https://a/b.pth") and is_address("HTTP://a/b.pth")
    assert not is_address("a/b.pth") and not is_address(Path("https:/a/b.pth")) and not is_address(None)
