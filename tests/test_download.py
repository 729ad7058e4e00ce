"""Datasets arrive whole and harmless, or the reason is said: against a server that drops, lies and sends malice."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import stat
import tarfile
import urllib.request
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deimkit.__main__ import agree, main, narrator
from deimkit.data import archives, download, fetch, web
from deimkit.data.archives import extract, is_extracted
from deimkit.data.convert import crowdhuman_to_coco, objects365_to_coco, shrink
from deimkit.data.dataset import Dataset
from deimkit.data.download import Published, Source
from deimkit.errors import DataError, DeimkitError
from deimkit.training.progress import Progress
from tests.loopback import Reply, Site
from tests.test_dataset import coco, picture

CONTENT = np.random.default_rng(0).bytes(1_000_000)


@pytest.fixture
def url(site: Site) -> str:
    site.files["/a.bin"] = CONTENT
    return site.url("/a.bin")


def get(url: str, path: Path, **options: Any) -> Path:
    return fetch.fetch(url, path, pause=0.0, **options)


def refusal(call: Callable[[], Any]) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))
    return str(caught.value)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------------- fetching


def test_a_file_arrives_with_progress(site: Site, url: str, tmp_path: Path) -> None:
    heard: list[str] = []
    digests = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "md5": hashlib.md5(CONTENT).hexdigest().upper()}
    path = get(url, tmp_path / "deep" / "a.bin", size=len(CONTENT), note=heard.append, **digests)
    assert path.read_bytes() == CONTENT and left(path.parent) == ["a.bin"]
    assert any(line.startswith("a.bin 1.0 MB of 1.0 MB, ") and line.endswith("0 s left") for line in heard)
    assert get(url, path) == path and len(site.asked) == 1  # what is there is not asked for again


def test_an_empty_file_arrives(site: Site, tmp_path: Path) -> None:
    site.files["/empty"] = b""
    assert get(site.url("/empty"), tmp_path / "empty").read_bytes() == b""


def test_ten_drops_lose_nothing(site: Site, url: str, tmp_path: Path) -> None:
    site.plan = [Reply(drop=70_000 + 1000 * k) for k in range(10)]
    path = get(url, tmp_path / "a.bin", retries=1)
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]
    starts = [int(span[6:-1]) for _, span in site.asked[1:] if span]
    assert starts == [sum(70_000 + 1000 * k for k in range(n)) for n in range(1, 11)]  # not a byte was sent twice


def test_what_arrived_outlives_the_process(site: Site, url: str, tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(url, tmp_path / "a.bin", note=interrupt)
    part = tmp_path / "a.bin.part"
    have = part.stat().st_size
    assert have > 0 and part.read_bytes() == CONTENT[:have]
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT
    assert have == len(CONTENT) or site.asked[1] == ("/a.bin", f"bytes={have}-")


def test_a_connection_that_falls_silent_counts_as_dropped(
    site: Site, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "SILENCE", 0.2)
    site.plan = [Reply(drop=300_000, stall=0.6)]
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT and site.asked[1][1] == "bytes=300000-"


def test_a_complete_part_needs_no_request(site: Site, url: str, tmp_path: Path) -> None:
    site.plan = [Reply(drop=600_000)]
    site.default = Reply(500)
    assert "answered 500" in refusal(lambda: get(url, tmp_path / "a.bin", retries=0))
    (tmp_path / "a.bin.part").write_bytes(CONTENT)  # the process died between the last byte and the new name
    asked = len(site.asked)
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT and len(site.asked) == asked


@pytest.mark.parametrize(
    "replies",
    [
        [Reply(500), Reply(503), Reply(429)],
        [Reply(drop=0), Reply(drop=0)],
        [Reply(drop=300_000, ranges=False), Reply(drop=500_000, ranges=False), Reply(ranges=False)],
        [Reply(drop=300_000), Reply(start=1)],  # a piece from somewhere else
        [Reply(drop=300_000), Reply(body=b"x" * 10)],  # 416: it says that it is shorter, then longer again
        [Reply(drop=300_000, etag="", date="Mon, 01 Jan 2024 00:00:00 GMT")] * 2,
        [Reply(drop=300_000, etag='W/"1"')] * 2,
        [Reply(drop=300_000, chunked=True), Reply(chunked=True)],
        [Reply(drop=300_000, etag=""), Reply(etag="")],
    ],
    ids=["unwell", "empty", "no ranges", "wrong piece", "shorter", "date", "weak tag", "chunked", "no tag"],
)
def test_what_a_server_may_do_on_the_way(site: Site, url: str, tmp_path: Path, replies: list[Reply]) -> None:
    site.plan = list(replies)
    if "x" * 10 in str(replies):
        assert "promised 1000000 bytes and now has 10" in refusal(lambda: get(url, tmp_path / "a.bin"))
    assert get(url, tmp_path / "a.bin", retries=4).read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]


def test_two_versions_are_never_joined(site: Site, url: str, tmp_path: Path) -> None:
    newer = CONTENT[::-1]
    site.plan = [Reply(drop=400_000), Reply(body=newer, etag='"2"', drop=100_000)]
    site.default = Reply(etag='"2"')
    site.files["/a.bin"] = newer
    assert get(url, tmp_path / "a.bin").read_bytes() == newer
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:500])  # a part that nothing is known of
    assert get(url, tmp_path / "a.bin").read_bytes() == newer


def test_parts_from_two_addresses_are_never_joined(site: Site, url: str, tmp_path: Path) -> None:
    site.files["/mirror/a.bin"] = CONTENT[::-1]
    site.plan = [Reply(drop=400_000), Reply(403)]
    assert "403" in refusal(lambda: get(url, tmp_path / "a.bin"))
    assert get(site.url("/mirror/a.bin"), tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


def test_another_version_is_seen_even_if_the_server_does_not_compare(site: Site, url: str, tmp_path: Path) -> None:
    class Forgetful(str):
        """An ETag that equals whatever it is compared with, so that the server sends a piece of the new version."""

        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return True

    site.plan = [Reply(drop=400_000), Reply(etag=Forgetful('"2"'), body=CONTENT[::-1])]
    site.default = Reply(etag='"2"')
    site.files["/a.bin"] = CONTENT[::-1]
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT[::-1]
    assert [span for _, span in site.asked] == [None, "bytes=400000-", None]


@pytest.mark.parametrize(
    "reply, options, said",
    [
        (Reply(404), {}, "404 Not Found. It has moved or is gone"),
        (Reply(403), {}, "403 Forbidden. It may ask for a login"),
        (Reply(401), {}, "401 Unauthorized. It asks for a login"),
        (Reply(410), {}, "410 Gone"),
        (Reply(418), {}, "418"),
        (Reply(500), {}, "answered 500 Internal Server Error 3 times in a row, with 0 bytes here. Run again"),
        (Reply(type="text/html; charset=utf-8"), {}, "sends a web page instead of the file"),
        (Reply(body=b"\n <!DOCTYPE html><p>Sign in"), {}, "sends a web page instead of the file"),
        (Reply(length=2_000_000), {}, "promised 2000000 bytes and now has 1000000"),
        (Reply(length=500_000), {"size": 1_000_000}, "announces 500000 bytes; expected 1000000"),
        (Reply(length=2_000_000), {"size": 1_000_000}, "announces 2000000 bytes; expected 1000000"),
        (Reply(chunked=True), {"size": 999_999}, "sends more than the 999999 bytes"),
        (Reply(silent=True), {}, "does not say how long it is"),
        (Reply(302, location="file:///etc/passwd"), {}, "302 Found. It leads in circles"),
        (Reply(302, location="ftp://127.0.0.1/a"), {}, "begins with http:// or https://; got 'ftp:"),
        (Reply(302, location="/a.bin"), {}, "302 Found. It leads in circles, or to what is no web address"),
        (Reply(drop=0), {}, "the connection dropped 3 times in a row, with 0 bytes of 1.0 MB here"),
    ],
)
def test_what_cannot_be_had_is_said(
    site: Site, url: str, tmp_path: Path, reply: Reply, options: dict[str, Any], said: str
) -> None:
    site.default = reply
    assert said in refusal(lambda: get(url, tmp_path / "a.bin", retries=2, **options))
    assert not (tmp_path / "a.bin").exists()


def test_an_unknown_length_is_enough_with_a_digest_or_a_size(site: Site, url: str, tmp_path: Path) -> None:
    site.default = Reply(silent=True)
    assert get(url, tmp_path / "a", size=len(CONTENT)).read_bytes() == CONTENT
    assert get(url, tmp_path / "b", md5=hashlib.md5(CONTENT).hexdigest()).read_bytes() == CONTENT


def test_an_error_in_the_middle_keeps_what_is_there(site: Site, url: str, tmp_path: Path) -> None:
    site.plan = [Reply(drop=300_000), Reply(403), Reply(type="text/html"), Reply(body=b"<html>", etag='"2"')]
    for said in ("403", "web page", "web page"):
        assert said in refusal(lambda: get(url, tmp_path / "a.bin"))
        assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:300_000]
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT and site.asked[-1][1] == "bytes=300000-"


def test_redirects_are_followed_within_the_web(site: Site, url: str, tmp_path: Path) -> None:
    site.plan = [Reply(302, location=url, body=b""), Reply(drop=400_000), Reply(307, location=url, body=b"")]
    assert get(site.url("/old"), tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked[-1] == ("/a.bin", "bytes=400000-")


def test_a_redirect_may_not_take_protection_away() -> None:
    request = urllib.request.Request("https://example.org/a")
    handler = web._SafeRedirects()
    assert "not protected" in refusal(
        lambda: handler.redirect_request(request, None, 302, "", {}, "http://example.org/a")
    )
    assert handler.redirect_request(request, None, 302, "", {}, "https://example.org/b").full_url.endswith("/b")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "/etc/passwd", "http://", "data:,a"])
def test_only_web_addresses_are_fetched(tmp_path: Path, url: str) -> None:
    assert "Expected an address that begins with http:// or https://" in refusal(lambda: get(url, tmp_path / "a"))
    assert left(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    assert "no connection" in refusal(lambda: get("http://127.0.0.1:1/a", tmp_path / "a", retries=1))


def test_a_wrong_digest_is_put_aside_and_fetched_anew(site: Site, url: str, tmp_path: Path) -> None:
    site.files["/a.bin"] = b"!" + CONTENT[1:]
    md5 = hashlib.md5(CONTENT).hexdigest()
    said = refusal(lambda: get(url, tmp_path / "a.bin", md5=md5))
    assert f"expected {md5}" in said and "put aside" in said and left(tmp_path) == ["a.bin.damaged"]
    site.files["/a.bin"] = CONTENT
    assert get(url, tmp_path / "a.bin", md5=md5).read_bytes() == CONTENT


def test_a_file_of_another_size_in_its_place_is_not_taken_for_it(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"short")
    assert "with 5 bytes; expected 1000000" in refusal(lambda: get(url, tmp_path / "a.bin", size=1_000_000))


Usage = namedtuple("Usage", "total used free")


def test_the_disk_is_looked_at_first(site: Site, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, fetch.MARGIN + 999_999))
    said = refusal(lambda: get(url, tmp_path / "a.bin"))
    assert "a.bin needs" in said and "are free" in said and (tmp_path / "a.bin.part").exists() is False
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_disk_that_fills_up_loses_nothing(
    site: Site, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:60_000])

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "open", lambda path, mode, buffering: Full(path, "a"), raising=False)
        said = refusal(lambda: get(url, tmp_path / "a.bin"))
    have = (tmp_path / "a.bin.part").read_bytes()
    assert f"cannot grow beyond {fetch.amount(len(have))}: the disk is full" in said
    assert len(have) > 100_000 and have == CONTENT[: len(have)]
    assert get(url, tmp_path / "a.bin").read_bytes() == CONTENT and site.asked[-1][1] == f"bytes={len(have)}-"


def test_amounts_and_durations_read_well() -> None:
    assert [fetch.amount(n) for n in (0, 999, 1000, 815_585_330, 19_336_861_798, 3e12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "815.6 MB",
        "19.3 GB",
        "3.0 TB",
    ]
    assert [fetch.duration(s) for s in (0, 89, 372, 7200)] == ["0 s", "89 s", "6 min", "2.0 h"]


# ----------------------------------------------------------------------------------------------------- unpacking


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members:
            bundle.writestr(name, content, zipfile.ZIP_DEFLATED)
    return path


def make_tar(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as bundle:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content) if info.isreg() else 0
            bundle.addfile(info, io.BytesIO(content))
    return path


def zip_info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def tar_info(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HONEST = [("train/a.jpg", b"a" * 1000), ("train/B.jpg", b"b"), ("train/b.jpg", b"c"), ("./notes.txt", b"")]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz"])
def test_an_honest_archive_is_unpacked_once(tmp_path: Path, name: str) -> None:
    archive = (make_zip if name == "x.zip" else make_tar)(tmp_path / name, *HONEST)
    folder = tmp_path / "out"
    assert extract(archive, folder) == folder and (folder / "train/a.jpg").read_bytes() == b"a" * 1000
    assert left(folder) == [f".{name}.done", "notes.txt", "train"] and left(folder / "train") == [
        "B.jpg",
        "a.jpg",
        "b.jpg",
    ]
    before = (folder / "train/a.jpg").stat().st_mtime_ns
    extract(archive, folder)
    assert (folder / "train/a.jpg").stat().st_mtime_ns == before and is_extracted(name, folder)
    shutil.rmtree(folder / "train")
    assert not is_extracted(name, folder)
    extract(archive, folder)
    assert (folder / "train/b.jpg").read_bytes() == b"c"


def test_another_archive_of_the_same_name_is_unpacked(tmp_path: Path) -> None:
    extract(make_zip(tmp_path / "x.zip", ("a.txt", b"old")), tmp_path / "out")
    extract(make_zip(tmp_path / "x.zip", ("a.txt", b"newer")), tmp_path / "out")
    assert (tmp_path / "out/a.txt").read_bytes() == b"newer"


def test_two_archives_fill_one_folder(tmp_path: Path) -> None:
    for name in "ab":
        extract(make_tar(tmp_path / f"{name}.tar", (f"VOC/JPEGImages/{name}.jpg", name.encode())), tmp_path / "out")
    assert left(tmp_path / "out/VOC/JPEGImages") == ["a.jpg", "b.jpg"]


def test_an_archive_of_nothing(tmp_path: Path) -> None:
    assert left(extract(make_zip(tmp_path / "x.zip"), tmp_path / "out")) == [".x.zip.done"]


ESCAPES = [
    ("../evil.txt", "out of the folder"),
    ("train/../../evil.txt", "out of the folder"),
    ("..\\evil.txt", "out of the folder"),
    ("/tmp/evil.txt", "an absolute path"),
    ("\\evil.txt", "an absolute path"),
    ("C:\\evil.txt", "begins with a drive"),
    ("c:evil.txt", "begins with a drive"),
    (".", "no usable name"),
]
EVIL_ZIP = [((name, b"x"), said) for name, said in ESCAPES] + [
    ((zip_info("evil", stat.S_IFLNK | 0o777), b"/etc/passwd"), "a symbolic link"),
    ((zip_info("evil", stat.S_IFCHR | 0o666), b""), "a device"),
    ((zip_info("evil", stat.S_IFIFO | 0o666), b""), "a pipe"),
    (("evil", b"\0" * 30_000_000), "a bomb"),
]
EVIL_TAR = [((name, b"x"), said) for name, said in ESCAPES] + [
    ((tar_info("evil", tarfile.SYMTYPE, "/etc/passwd"), b""), "a symbolic link"),
    ((tar_info("evil", tarfile.LNKTYPE, "train/a.jpg"), b""), "a hard link"),
    ((tar_info("evil", tarfile.CHRTYPE), b""), "a device"),
    ((tar_info("evil", tarfile.BLKTYPE), b""), "a device"),
    ((tar_info("evil", tarfile.FIFOTYPE), b""), "a pipe"),
    ((tar_info("evil", b"Z"), b""), "unknown kind"),
]


@pytest.mark.parametrize("evil, said", EVIL_ZIP)
def test_a_malicious_zip_is_refused_by_name(tmp_path: Path, evil: tuple[Any, bytes], said: str) -> None:
    archive = make_zip(tmp_path / "x.zip", ("train/a.jpg", b"a"), evil)
    refused_whole(archive, getattr(evil[0], "filename", evil[0]), said)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("evil, said", EVIL_TAR)
def test_a_malicious_tar_is_refused_by_name(tmp_path: Path, evil: tuple[Any, bytes], said: str, suffix: str) -> None:
    archive = make_tar(tmp_path / f"x.{suffix}", ("train/a.jpg", b"a"), evil)
    refused_whole(archive, getattr(evil[0], "name", evil[0]), said)


def refused_whole(archive: Path, name: str, said: str) -> None:
    """The archive is refused with the member's name, and nothing of it is left anywhere."""
    sentence = refusal(lambda: extract(archive, archive.parent / "out"))
    assert said in sentence and repr(name) in sentence and str(archive) in sentence
    assert left(archive.parent) == ["out", archive.name] and left(archive.parent / "out") == []


def test_bombs_of_every_build_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = b"\0" * 30_000_000
    refused_whole(make_tar(tmp_path / "x.tar.gz", ("evil", zeros)), "evil", "a bomb")
    (tmp_path / "x.tar.gz").unlink()
    refused_whole(make_zip(tmp_path / "x.zip", ("large.jpg", CONTENT), ("evil", zeros)), "evil", "a bomb")
    many = [(f"evil{k}", zeros[:3_000_000]) for k in range(5)]  # none alone is large
    refused_whole(make_zip(tmp_path / "x.zip", *many), "evil3", "a bomb")
    monkeypatch.setattr(archives, "MEMBERS", 3)
    few = make_zip(tmp_path / "x.zip", *((f"f{k}", b"") for k in range(5)))
    refused_whole(few, "f3", "more than 3 members")


def test_a_zip_in_a_zip_stays_packed(tmp_path: Path) -> None:
    bomb = make_zip(tmp_path / "inner.zip", ("zeros", b"\0" * 30_000_000)).read_bytes()
    extract(make_zip(tmp_path / "x.zip", ("inner.zip", bomb)), tmp_path / "out")
    assert (tmp_path / "out/inner.zip").read_bytes() == bomb


def test_a_bomb_in_a_header_is_refused(tmp_path: Path) -> None:
    info = tar_info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 20_000_000
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as bundle:
        bundle.addfile(info, io.BytesIO(b"n" * info.size))
    assert "claims a header of" in refusal(lambda: extract(tmp_path / "x.tar.gz", tmp_path / "out"))
    assert left(tmp_path / "out") == []


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("secret.jpg", b"a"))
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flags in the central directory
    archive.write_bytes(bytes(data))
    refused_whole(archive, "secret.jpg", "encrypted")


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tar"])
def test_a_damaged_archive_is_said_to_be_damaged(tmp_path: Path, name: str) -> None:
    archive = (make_zip if name == "x.zip" else make_tar)(tmp_path / name, ("a.jpg", CONTENT))
    archive.write_bytes(archive.read_bytes()[:500_000])
    assert "is damaged" in refusal(lambda: extract(archive, tmp_path / "out")) and left(tmp_path / "out") == []


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("a.jpg", CONTENT))
    data = bytearray(archive.read_bytes())
    data[500_000] ^= 1
    archive.write_bytes(bytes(data))
    assert "is damaged" in refusal(lambda: extract(archive, tmp_path / "out"))


def test_a_name_that_is_file_and_folder_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "x.zip", ("a", b"file"), ("a/b", b"in a folder"))
    assert "'a/b' both as a file and as a folder" in refusal(lambda: extract(archive, tmp_path / "out"))


def test_what_is_no_archive_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    assert "expected one of .zip" in refusal(lambda: extract(tmp_path / "x.rar", tmp_path / "out"))


def test_unpacking_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, folder = make_zip(tmp_path / "x.zip", *HONEST), tmp_path / "out"

    def interrupt(draft: Path) -> None:
        assert (draft / "train/a.jpg").is_file() and not (folder / "train").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(archive, folder, finish=interrupt)
    assert left(folder) == []

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        assert "is full" in refusal(lambda: extract(archive, folder))
    assert left(folder) == []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, fetch.MARGIN + 900))
        assert "'train/a.jpg' of " in refusal(lambda: extract(archive, folder))
    (folder / ".x.zip.unpacking").mkdir()  # of a process that was killed
    (folder / ".x.zip.unpacking" / "half").touch()
    extract(archive, folder)
    assert left(folder) == [".x.zip.done", "notes.txt", "train"]


# ---------------------------------------------------------------------------------------------------- conversions


def odgt(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def person(*fbox: float, tag: str = "person", **extra: int) -> dict[str, Any]:
    return {"tag": tag, "fbox": list(fbox), "vbox": [0, 0, 1, 1], "hbox": [0, 0, 1, 1], "extra": extra}


CROWD = {
    "ID": "273271,1a",
    "gtboxes": [
        person(-5, 2, 15, 40),  # of 40 x 30 px: 10 x 28 of it are in the picture
        person(1, 1, 4, 4, ignore=1),
        person(3, 3, 5, 5, tag="mask"),
        person(50, 1, 4, 4),  # outside
    ],
}


def test_crowdhumans_full_boxes_become_coco(tmp_path: Path) -> None:
    picture(tmp_path / "Images/273271,1a.jpg")
    lost = {"ID": "lost", "gtboxes": [person(1, 1, 2, 2)]}
    empty = {"ID": "empty", "gtboxes": []}
    picture(tmp_path / "Images/empty.jpg")
    found = crowdhuman_to_coco(odgt(tmp_path / "a.odgt", CROWD, "", lost, empty), tmp_path / "Images")
    assert found["images"] == [
        {"id": 1, "file_name": "Images/273271,1a.jpg", "height": 30, "width": 40},
        {"id": 2, "file_name": "Images/empty.jpg", "height": 30, "width": 40},
    ]
    assert [(a["image_id"], a["bbox"], a["area"], a["iscrowd"]) for a in found["annotations"]] == [
        (1, [0, 2, 10, 28], 280, 0),
        (1, [1, 1, 4, 4], 16, 1),
        (1, [3, 3, 5, 5], 25, 1),
    ]
    assert found["categories"] == [{"id": 1, "name": "person"}]
    assert len(found["info"]["left_out"]) == 1 and "lost.jpg" in found["info"]["left_out"][0]
    assert crowdhuman_to_coco(odgt(tmp_path / "none.odgt"), tmp_path / "Images")["images"] == []


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[]",
        {"ID": "a"},
        {"ID": 3, "gtboxes": []},
        {"ID": "../a", "gtboxes": []},
        {"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3]}]},
        {"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, "4"]}]},
        {"ID": "a", "gtboxes": [{"fbox": [1, 2, 3, 4]}]},
    ],
)
def test_a_malformed_odgt_line_is_named(tmp_path: Path, row: Any) -> None:
    assert "Line 2 of" in refusal(lambda: crowdhuman_to_coco(odgt(tmp_path / "a.odgt", CROWD, row), tmp_path))


def objects(*images: tuple[int, str, int, int], boxes: list[tuple[int, list[float]]]) -> dict[str, Any]:
    """Objects365 content: images as (id, name, width, height), boxes as (image id, xywh)."""
    return {
        "images": [{"id": i, "file_name": n, "width": w, "height": h, "license": 5} for i, n, w, h in images],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 7, "iscrowd": 0, "isfake": 0, "area": b[2] * b[3], "bbox": b}
            for k, (i, b) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 7, "name": "Lamp"}, {"id": 365, "name": "Table Tennis"}],
    }


def test_objects365_is_shrunk_and_its_boxes_with_it(tmp_path: Path) -> None:
    for name, size in (("wide.jpg", (1280, 700)), ("small.jpg", (640, 480)), ("tall.png", (3, 1282))):
        picture(tmp_path / "train/patch0" / name, size)
    (tmp_path / "train/patch0/torn.jpg").write_bytes((tmp_path / "train/patch0/wide.jpg").read_bytes()[:900])
    small = (tmp_path / "train/patch0/small.jpg").read_bytes()
    (complaint,) = shrink(tmp_path / "train")
    assert "torn.jpg cannot be read" in complaint and not (tmp_path / "train/patch0/torn.jpg").exists()
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "train/patch0").iterdir()}
    assert sizes == {"wide.jpg": (640, 350), "small.jpg": (640, 480), "tall.png": (1, 640)}
    assert (tmp_path / "train/patch0/small.jpg").read_bytes() == small  # untouched
    assert shrink(tmp_path / "train") == [] and shrink(tmp_path / "nothing") == []

    content = objects(
        (1, "images/v1/patch0/wide.jpg", 1280, 700),
        (2, "images/v1/patch0/small.jpg", 640, 480),
        (3, "images/v2/patch9/torn.jpg", 640, 480),
        (4, "images/v2/patch9/tall.png", 1282, 3),  # lies on its side
        boxes=[(1, [100, 50, 200, 100]), (1, [1200, 600, 200, 200]), (2, [1, 2, 3, 4]), (3, [1, 1, 2, 2])],
    )
    found = objects365_to_coco(content, tmp_path)
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in found["images"]] == [
        (1, "train/patch0/wide.jpg", 640, 350),
        (2, "train/patch0/small.jpg", 640, 480),
    ]
    assert [(a["image_id"], a["bbox"], a["area"], a["category_id"]) for a in found["annotations"]] == [
        (1, [50, 25, 100, 50], 5000, 7),
        (1, [600, 300, 40, 50], 2000, 7),
        (2, [1, 2, 3, 4], 12, 7),
    ]
    assert [text.partition(":")[0] for text in found["info"]["left_out"]] == [
        "images/v2/patch9/torn.jpg",
        "images/v2/patch9/tall.png",
    ]


# ------------------------------------------------------------------------------------------------- whole datasets


def tree(root: Path, *paths: Path) -> list[tuple[str, bytes]]:
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths]


@pytest.fixture
def mini(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """COCO as it is published, but of three images and from the loopback server."""
    here = tmp_path / "published"
    categories = {1: "person", 3: "car"}
    for split, names in (("train2017", ["1.jpg", "2.jpg"]), ("val2017", ["3.jpg"])):
        images = [picture(here / split / name) for name in names]
        site.files[f"/{split}.zip"] = make_zip(here / f"{split}.zip", *tree(here, *images)).read_bytes()
    labels = [
        ("annotations/instances_train2017.json", coco(["1.jpg", "2.jpg"], [(1, 3, [1, 2, 3, 4])], categories)),
        ("annotations/instances_val2017.json", coco(["3.jpg"], [(1, 1, [1, 2, 3, 4])], categories)),
        ("annotations/captions_val2017.json", {"images": [], "annotations": []}),
    ]
    packed = make_zip(here / "annotations.zip", *((name, json.dumps(content).encode()) for name, content in labels))
    site.files["/annotations_trainval2017.zip"] = packed.read_bytes()
    real = download.DATASETS["coco"]
    sources = []
    for source in real.sources:
        body = site.files[f"/{source.name}"]
        md5 = hashlib.md5(body).hexdigest()
        sources.append(replace(source, url=site.url(f"/{source.name}"), size=len(body), md5=md5))
    published = replace(real, sources=tuple(sources))
    monkeypatch.setitem(download.DATASETS, "coco", published)
    return published


def test_coco_from_the_command_line(
    site: Site, mini: Published, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site.plan = [Reply(drop=300)]
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    assert main(["download", "coco", "--yes", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["data"] == "data/coco" and "train RECIPE --data data/coco" in printed[-2]
    data = Dataset.open("data/coco")
    assert (len(data.train), len(data.val), data.categories.names) == (2, 1, ("person", "car")) and not data.problems
    assert "downloads" not in left(tmp_path / "data/coco")

    asked = len(site.asked)
    assert main(["download", "coco"]) == 0 and len(site.asked) == asked  # at once, and without a question
    shutil.rmtree(tmp_path / "data/coco/val2017")
    assert main(["download", "coco", "--yes"]) == 0 and site.asked[asked:] == [("/val2017.zip", None)]
    assert len(Dataset.open("data/coco").val) == 1


def test_files_that_you_have_are_taken_from_your_folder(site: Site, mini: Published, tmp_path: Path) -> None:
    (tmp_path / "mine/deep").mkdir(parents=True)
    (tmp_path / "mine/deep/train2017.zip").write_bytes(site.files["/train2017.zip"])
    data = download.download("coco", tmp_path / "coco", tmp_path / "mine")
    assert {path for path, _ in site.asked} == {"/val2017.zip", "/annotations_trainval2017.zip"}
    assert len(Dataset.open(data).train) == 2 and (tmp_path / "mine/deep/train2017.zip").is_file()


def test_an_interrupted_download_of_a_dataset_carries_on(site: Site, mini: Published, tmp_path: Path) -> None:
    heard: list[str] = []

    def interrupt(text: str) -> None:
        heard.append(text)
        if text.startswith("annotations"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.download("coco", tmp_path / "coco", note=interrupt)
    assert left(tmp_path / "coco/downloads") == [
        "annotations_trainval2017.zip.part",
        "annotations_trainval2017.zip.part.json",
    ]
    asked = len(site.asked)
    download.download("coco", tmp_path / "coco")
    assert all(path.startswith("/annotations") for path, _ in site.asked[asked:])
    assert len(Dataset.open(tmp_path / "coco").train) == 2


def test_the_disk_must_hold_a_dataset_and_its_largest_archive(
    site: Site, mini: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [source.size for source in mini.sources]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, fetch.MARGIN + sum(sizes) + max(sizes) - 1))
    assert "Downloading and unpacking coco needs" in refusal(lambda: download.download("coco", tmp_path / "coco"))
    assert not site.asked and not (tmp_path / "coco").exists()
    (tmp_path / "coco/downloads").mkdir(parents=True)
    (tmp_path / "coco/downloads/train2017.zip.part").write_bytes(b"x")  # what is here already counts
    download.download("coco", tmp_path / "coco")
    assert len(Dataset.open(tmp_path / "coco").train) == 2


def test_a_bomb_from_a_publisher_is_refused(
    site: Site, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "x.zip", ("../evil.jpg", b"x"))
    site.files["/x.zip"] = archive.read_bytes()
    bad = Published("Bad", "none", "http://127.0.0.1", (Source("x.zip", url=site.url("/x.zip")),))
    monkeypatch.setitem(download.DATASETS, "bad", bad)
    assert main(["download", "bad", "--to", str(tmp_path / "out"), "--yes", "--json"]) == 1
    assert "'../evil.jpg' is a path that leads out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "evil.jpg").exists() and left(tmp_path / "out") == ["downloads"]


def test_crowdhuman_from_your_folder(tmp_path: Path, capsys: Any) -> None:
    mine, to = tmp_path / "mine", tmp_path / "out"
    for number in "123":
        image = picture(tmp_path / f"{number}/Images/t{number}.jpg")
        mine.mkdir(exist_ok=True)
        make_zip(mine / f"CrowdHuman_train0{number}.zip", *tree(tmp_path / number, image))
    make_zip(mine / "CrowdHuman_val.zip", *tree(tmp_path / "v", picture(tmp_path / "v/Images/v1.jpg")))
    odgt(mine / "annotation_train.odgt", *({"ID": f"t{k}", "gtboxes": CROWD["gtboxes"]} for k in "123"))
    assert main(["download", "crowdhuman", "--to", str(to)]) == 1
    said = capsys.readouterr().err
    assert "CrowdHuman_train01.zip" in said and "crowdhuman.org/download.html" in said and "--from FOLDER" in said
    assert main(["download", "crowdhuman", "--to", str(to), "--from", str(mine)]) == 1
    assert "holds no annotation_val.odgt" in capsys.readouterr().err
    odgt(mine / "annotation_val.odgt", {"ID": "v1", "gtboxes": [person(1, 1, 5, 5)]})
    assert main(["download", "crowdhuman", "--to", str(to), "--from", str(mine), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == str(to)
    data = Dataset.open(to)
    assert (len(data.train), len(data.val), data.categories.names) == (3, 1, ("person",)) and not data.problems
    assert data.train.crowd.tolist() == [False, True, True] * 3
    assert main(["download", "crowdhuman", "--to", str(to)]) == 0  # nothing is left to do


def test_objects365_from_your_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deimkit.data.convert.HELD_OUT", 1)
    mine, to = tmp_path / "mine", tmp_path / "out"

    def patch(name: str, *images: str) -> None:
        folder = tmp_path / "raw" / name
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        paths = [picture(folder / "patch" / image, (1280, 640)) for image in images]
        make_tar(mine / name, *tree(folder, *paths))

    patch("train/patch0.tar.gz", "t1.jpg")
    patch("val/images/v1/patch0.tar.gz", "v1.jpg")
    patch("val/images/v2/patch16.tar.gz", "v2.jpg")
    train = objects((1, "images/v1/patch0/t1.jpg", 1280, 640), (9, "images/v1/patch0/x.jpg", 1280, 640), boxes=[])
    rows = [(k, f"images/v1/patch0/v{k}.jpg", 1280, 640) for k in (1, 2)]
    val = objects(*rows, boxes=[(1, [2, 2, 8, 8]), (2, [4, 4, 8, 8])])
    (mine / "zhiyuan_objv2_train.json").write_text(json.dumps(train))
    (mine / "zhiyuan_objv2_val.json").write_text(json.dumps(val))
    said: list[str] = []
    data = Dataset.open(download.download("objects365", to, mine, say=said.append))
    assert [p.name for p in data.val.paths] == ["v1.jpg"] and data.val.boxes.tolist() == [[1, 1, 5, 5]]
    assert sorted(p.name for p in data.train.paths) == ["t1.jpg", "v2.jpg"] and not data.problems
    assert data.train.boxes.tolist() == [[2, 2, 6, 6]] and data.train.sizes.tolist() == [[320, 640]] * 2
    assert data.categories.ids == (7, 365)
    assert any("1 images of train are left out; the first: images/v1/patch0/x.jpg: is missing" in t for t in said)

    patch("train/patch1.tar.gz", "x.jpg")  # another patch arrives later
    again: list[str] = []
    download.download("objects365", to, mine, say=again.append)
    assert [t for t in again if "unpacked" in t] == [f"patch1.tar.gz is unpacked into {to / 'train'}"]
    assert len(Dataset.open(to).train) == 3


def test_voc_opens_where_it_says(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xml = (
        "<annotation><filename>{0}.jpg</filename><size><width>40</width><height>30</height></size><object>"
        "<name>dog</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object></annotation>"
    )
    sources = []
    for source, words in zip(download.DATASETS["voc2007"].sources, (("train", "val"), ("test",)), strict=True):
        root = tmp_path / source.name
        paths = []
        for word in words:
            paths.append(picture(root / f"VOCdevkit/VOC2007/JPEGImages/{word}1.jpg"))
            for file, text in (
                (f"Annotations/{word}1.xml", xml.format(f"{word}1")),
                (f"ImageSets/Main/{word}.txt", f"{word}1\n"),
            ):
                paths.append(root / "VOCdevkit/VOC2007" / file)
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                paths[-1].write_text(text)
        body = make_tar(tmp_path / f"{source.name}.tar", *tree(root, *paths)).read_bytes()
        site.files[f"/{source.name}"] = body
        md5 = hashlib.md5(body).hexdigest()
        sources.append(replace(source, url=site.url(f"/{source.name}"), size=len(body), md5=md5))
    small = replace(download.DATASETS["voc2007"], sources=tuple(sources))
    monkeypatch.setitem(download.DATASETS, "voc2007", small)
    data = Dataset.open(download.download("voc2007", tmp_path / "voc"))
    assert [len(split) for split in data.splits] == [1, 1, 1] and data.categories.names == ("dog",)


# ----------------------------------------------------------------------------------------------- the command line


def test_the_published_datasets_are_listed(capsys: Any) -> None:
    assert main(["download", "--json"]) == 0
    printed = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(printed.splitlines()[-1])}
    assert rows["coco"]["bytes"] == 19_336_861_798 + 815_585_330 + 252_907_541 and rows["coco"]["by_hand"] == []
    assert rows["crowdhuman"]["by_hand"][0] == "CrowdHuman_train01.zip" and "non-commercial" in printed
    assert {"objects365", "voc2007", "voc2012"} <= set(rows) and all(row["page"] for row in rows.values())


def test_the_table_is_in_order() -> None:
    for published in download.DATASETS.values():
        for source in published.sources:
            assert bool(source.url) == bool(source.size), "what can be fetched has a size"
            assert source.url.endswith(source.name) or not source.url
            assert source.md5 is None or (len(source.md5) == 32 and int(source.md5, 16))


def test_nothing_is_fetched_without_consent(mini: Published, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["download", "cocoo"]) == 1 and "Did you mean 'coco'" in capsys.readouterr().err
    assert main(["download", "coco"]) == 1 and "Add --yes" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer in ("n\n", "", "\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        with pytest.raises(DeimkitError, match="coco was not fetched"):
            agree("coco", mini)
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    agree("coco", mini)


def test_a_log_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    for pause, lines in ((60.0, 0), (-1.0, 3)):
        tell = narrator(Progress(stream), pause)
        for _ in range(3):
            tell("a.zip 1.0 of 2.0 GB")
        assert stream.getvalue().count("\n") == lines
