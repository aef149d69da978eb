"""The header pass over tars: C++ and Python say the same of any file, and of good ones what tarfile and Pillow say."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from mvle.data import decode, headers, headers_python
from mvle.data.errors import DataError
from mvle.data.headers import Headers, scan

HOST = headers.host()[0] is not None
compiled = pytest.mark.skipif(not HOST, reason=f"the compiled pass is not here: {headers.host()[1]}")
BOTH = [pytest.param(True, marks=compiled, id="C++"), pytest.param(False, id="Python")]
ENDING = bytes(1024)


def rows(found: Headers | DataError) -> list[tuple[Any, ...]] | str:
    """Every column, or what is wrong."""
    if isinstance(found, DataError):
        return str(found)
    columns = (found.offsets, found.sizes, found.formats, found.orientations, found.widths, found.heights)
    return [(found.name(i), *(int(column[i]) for column in columns)) for i in range(len(found))]


def header(
    name: bytes = b"a", size: bytes = b"00000000000\0", kind: bytes = b"0", checksum: int | None = None
) -> bytes:
    """A block of a tar."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def image(form: str, size: tuple[int, int] = (7, 5), mode: str = "RGB", **options: Any) -> bytes:
    """A picture of a format as Pillow writes it."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


IMAGES = {
    "jpeg": image("JPEG"),
    "progressive": image("JPEG", (300, 200), progressive=True),
    "grey": image("JPEG", mode="L"),
    "cmyk": image("JPEG", mode="CMYK"),
    "turned": image("JPEG", (31, 17), exif=turned(6)),
    "turned, a long profile before its size": image("JPEG", (31, 17), exif=turned(8), icc_profile=bytes(90_000)),
    "a long comment": image("JPEG", comment=bytes(60_000)),
    "png": image("PNG"),
    "16 bits": image("PNG", mode="I;16"),
    "palette": image("PNG", mode="P"),
    "webp": image("WEBP", (33, 20)),
    "webp, lossless": image("WEBP", (33, 20), lossless=True),
    "webp, alpha": image("WEBP", (33, 20), "RGBA", exif=turned(3)),
    "gif": image("GIF"),
    "bmp": image("BMP"),
    "bmp, top down": image("BMP")[:22] + (-5 & 0xFFFFFFFF).to_bytes(4, "little") + image("BMP")[26:],
}


@pytest.mark.parametrize("native", BOTH)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_has_the_size_and_turn_that_pillow_finds(name: str, native: bool, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(header(b"a.img", octal(len(IMAGES[name]))) + padded(IMAGES[name]) + ENDING)
    (found,) = scan([tmp_path / "a.tar"], compiled=native)
    assert isinstance(found, Headers)
    with Image.open(io.BytesIO(IMAGES[name])) as picture:
        assert (found.widths[0], found.heights[0]) == picture.size
        assert decode.FORMATS[found.formats[0]] == picture.format.lower()
        if picture.format == "JPEG":
            assert found.orientations[0] == picture.getexif().get(0x0112, 1)


@pytest.mark.parametrize("native", BOTH)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int, native: bool, tmp_path: Path) -> None:
    names = ["a.jpg", "b/" + "c" * 90 + ".txt", "d" * 60 + "/" + "e" * 90 + ".json", "empty"]
    names += [] if form == tarfile.USTAR_FORMAT else ["f" * 300 + ".png", "ö/ü.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty" else i * 700 + 1
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            folder = tarfile.TarInfo(f"folder{i}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(f"link{i}" * (40 if form != tarfile.USTAR_FORMAT else 1))
            link.type, link.linkname = tarfile.SYMTYPE, "x" * (300 if form != tarfile.USTAR_FORMAT else 9)
            tar.addfile(link)
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    found = rows(scan([tmp_path / "a.tar"], compiled=native)[0])
    assert [row[:3] for row in found] == expected and len(expected) == len(names)


# A header whose bytes, taken as signed, sum to -1: as what stands for "no number" must not
SUM_BELOW_ZERO = bytearray(header())
SUM_BELOW_ZERO[265:273] = b"\x80" * 7 + b"\xde"
SUM_BELOW_ZERO[148:156] = b"xxxxxxxx"


def pax(**fields: object) -> bytes:
    """Records of a pax header."""
    records = b""
    for key, value in fields.items():
        rest = f" {key}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
        records += str(length).encode() + rest
    return records


SPARSE_PAX = b"22 GNU.sparse.major=1\n"
WRONG = {
    "empty": (b"", "it is empty"),
    "shorter than a block": (b"x" * 100, "it begins with"),
    "gzip": (b"\x1f\x8b" + bytes(600), "it is gzip"),
    "a wrong checksum": (header(checksum=5), "it begins with"),
    "a wrong checksum further on": (header() + header(checksum=5), "the header at byte 512 is damaged"),
    "a checksum that is no number": (bytes(SUM_BELOW_ZERO), "it begins with"),
    "a size that is no number": (header(size=b"0000000x000\0"), "it begins with"),
    "a size past the end": (header(size=octal(10**6)), "is cut off: a member at byte 0 needs 1000000 bytes"),
    "a size of 63 bits": (
        header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7),
        "is cut off: .* needs 9223372036854775807 bytes",
    ),
    "a size of 64 bits": (header(size=b"\x80\0\0\0" + b"\xff" * 8), "it begins with"),
    "a size of 88 bits": (header(size=b"\x80" + b"\xff" * 11), "it begins with"),
    "a negative size": (header(size=b"\xff" * 12), "it begins with"),
    "a member that is cut": (header(size=octal(600)) + bytes(500), "is cut off: .* needs 600 bytes"),
    "a name of two MiB": (
        header(kind=b"L", size=octal(2 << 20)) + bytes(2 << 20),
        "a name or attributes of 2097152 bytes",
    ),
    "attributes of two MiB": (header(kind=b"x", size=octal(2 << 20)) + bytes(2 << 20), "attributes of 2097152 bytes"),
    "a sparse file": (header() + header(kind=b"S"), "holds a sparse file at byte 512"),
    "a sparse file of pax": (
        header(kind=b"x", size=octal(22)) + padded(SPARSE_PAX) + header(),
        "a sparse file at byte 1024",
    ),
    "a pax size past the end": (
        header(kind=b"x", size=octal(12)) + padded(b"12 size=999\n") + header(),
        "needs 999 bytes",
    ),
    "a pax size that is none": (
        header(kind=b"x", size=octal(11)) + padded(b"11 size=-1\n") + header(),
        "at byte 1024 is damaged",
    ),
    "a name for all": (
        header() + header(kind=b"g", size=octal(10)) + padded(b"10 path=a\n"),
        "for all .* at byte 512:",
    ),
    "a size for all": (header(kind=b"g", size=octal(10)) + padded(b"10 size=5\n"), "for all .* at byte 0:"),
    "sparse files for all": (header(kind=b"g", size=octal(22)) + padded(SPARSE_PAX), "for all .* at byte 0:"),
    "attributes for all of two MiB": (
        header(kind=b"g", size=octal(2 << 20)) + bytes(2 << 20),
        "attributes of 2097152 bytes",
    ),
    "a huge pax size": (
        header(kind=b"x", size=octal(29)) + padded(b"29 size=99999999999999999999\n") + header(),
        "at byte 1024 is damaged",
    ),
}


@pytest.mark.parametrize("native", BOTH)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(case: str, native: bool, tmp_path: Path) -> None:
    content, words = WRONG[case]
    (tmp_path / "a.tar").write_bytes(content)
    (found,) = scan([tmp_path / "a.tar"], compiled=native, called=["its name"])
    with pytest.raises(DataError, match=f"(?s)^its name .*{words}"):
        raise found if isinstance(found, DataError) else AssertionError(rows(found))


@pytest.mark.parametrize("native", BOTH)
def test_one_bad_shard_among_many_spoils_no_other(native: bool, tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.tar").write_bytes(header(b"%d.txt" % i, octal(1)) + padded(b"x") + ENDING)
    (tmp_path / "4.tar").write_bytes(b"no tar at all")
    (tmp_path / "5.tar").unlink()
    (tmp_path / "6.tar").unlink()
    (tmp_path / "6.tar").mkdir()
    (tmp_path / "7.tar").unlink()
    os.mkfifo(tmp_path / "7.tar")
    found = scan([tmp_path / f"{i}.tar" for i in range(9)], threads=3, compiled=native)
    for i, shard in enumerate(found):
        if i in (4, 5, 6, 7):
            assert isinstance(shard, DataError) and f"{i}.tar" in str(shard)
        else:
            assert isinstance(shard, Headers) and shard.name(0) == f"{i}.txt" and len(shard) == 1


NOTHING_BEHIND = [b"1", b"2", b"3", b"4", b"5", b"6"]


@st.composite
def kinds_of_members(draw: st.DrawFn) -> bytes:
    """Members of every kind, each of them whole, in any order, with names and sizes from where they may be."""
    parts = []
    for i in range(draw(st.integers(1, 6))):
        size, kind = draw(st.integers(0, 1500)), draw(st.sampled_from([*NOTHING_BEHIND, b"0", b"\0", b"7", b"8", b"V"]))
        name, noted = draw(st.sampled_from([b"%d.txt", b"d%d/", b"e/%d"])) % i, size
        before = draw(st.sampled_from(["", "", "L", "K", "x", "X", "g"]))
        if before in ("L", "K"):
            long = b"l%d/" % i + b"n" * draw(st.integers(1, 700)) + b"\0"
            parts += [header(b"././@LongLink", octal(len(long)), before.encode()), padded(long)]
        elif before:
            keys = draw(
                st.sets(st.sampled_from(["comment"] if before == "g" else ["path", "size", "comment", "mtime"]))
            )
            values = {"path": f"p{i}/ö{'/' * draw(st.integers(0, 2))}", "size": size, "comment": "x", "mtime": 1.5}
            records = pax(**{key: values[key] for key in sorted(keys)})
            parts += [header(b"pax", octal(len(records)), before.encode()), padded(records)]
            noted = draw(st.integers(0, 1500)) if "size" in keys else size
        if before and kind == b"\0":
            name = name.rstrip(b"/")  # versions of tarfile differ in what this is
        parts.append(header(name, octal(noted), kind))
        if kind not in NOTHING_BEHIND and not (kind == b"\0" and name.endswith(b"/")):
            parts.append(padded(bytes([i + 1]) * size))
    return b"".join(parts) + ENDING


@pytest.mark.parametrize("native", BOTH)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=kinds_of_members())
def test_members_among_those_of_every_kind_are_those_that_tarfile_finds(
    content: bytes, native: bool, tmp_path: Path
) -> None:
    path = tmp_path / "kinds.tar"
    path.write_bytes(content)
    with tarfile.open(path, "r:") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    found = rows(scan([path], compiled=native)[0])
    assert not isinstance(found, str), found
    assert [row[:3] for row in found] == expected


@pytest.mark.parametrize("native", BOTH)
def test_a_long_name_that_is_cut_behind_a_slash_is_of_no_folder(native: bool, tmp_path: Path) -> None:
    name = b"d" * 99 + b"/file.txt"
    long = header(b"././@LongLink", octal(len(name) + 1), b"L") + padded(name + b"\0")
    (tmp_path / "a.tar").write_bytes(long + header(name[:100], octal(3), b"\0") + padded(b"abc") + ENDING)
    assert [row[:3] for row in rows(scan([tmp_path / "a.tar"], compiled=native)[0])] == [(name.decode(), 1536, 3)]


# ---- any file -------------------------------------------------------------------------------------------------------

KINDS = [b"0", b"\0", b"5", b"1", b"2", b"3", b"6", b"L", b"K", b"x", b"X", b"g", b"S", b"7", b"8", b"\xff"]
PAX = [
    b"13 path=a/b.c\n",
    b"12 size=513\n",
    b"22 GNU.sparse.major=1\n",
    b"9 path=\xff\n",
    b"12 path=b//\n",
    b"11 comment=\n",
    b"99 path=short\n",
    b"0 a=b\n",
]
SIZES = st.one_of(
    st.integers(0, 3000).map(octal),
    st.sampled_from(
        [b" 17\0", b"       17 \0", b"\0" * 12, b"777777777777", b"\x80" + bytes(10) + b"\x09", b"+7", b"0o7"]
    ),
    st.binary(min_size=12, max_size=12),
)
NAMES = st.one_of(
    st.sampled_from([b"a.jpg", b"x/y.z.png", b"\xff\xfe", b"", b"n" * 100, b"a/"]), st.binary(max_size=100)
)
CONTENTS = st.one_of(
    st.sampled_from([*IMAGES.values(), *PAX, b"", b"".join(PAX)]),
    st.binary(max_size=700),
    st.builds(lambda data, n: data[:n], st.sampled_from(list(IMAGES.values())), st.integers(0, 400)),
)


@st.composite
def flipped(draw: st.DrawFn) -> bytes:
    """An image with a few bytes that are not its own."""
    data = bytearray(draw(st.sampled_from(list(IMAGES.values()))))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, min(len(data), 200) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Blocks and contents, most of which fit together; then, maybe, cut or with bytes that are not its own."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        content = draw(st.one_of(CONTENTS, flipped()))
        size = octal(len(content)) if draw(st.integers(0, 5)) else draw(SIZES)
        checksum = None if draw(st.integers(0, 15)) else draw(st.integers(0, 9000))
        parts += [header(draw(NAMES), size, draw(st.sampled_from(KINDS)), checksum), padded(content)]
    whole = bytearray(b"".join(parts) + (ENDING if draw(st.booleans()) else b""))
    for _ in range(draw(st.integers(0, 3)) if whole and draw(st.booleans()) else 0):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 3)) == 0 else whole)


@compiled
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(content=tars())
def test_both_passes_say_the_same_of_any_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.tar"
    path.write_bytes(content)
    native, twin = (rows(scan([path], compiled=which)[0]) for which in (True, False))
    assert native == twin


@compiled
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(flipped(), CONTENTS))
def test_both_passes_say_the_same_of_any_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.tar"
    path.write_bytes(header(b"a", octal(len(content))) + padded(content) + ENDING)
    assert rows(scan([path], compiled=True)[0]) == rows(scan([path], compiled=False)[0])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=flipped())
def test_a_size_that_is_found_is_that_of_pillow(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.tar"
    path.write_bytes(header(b"a", octal(len(content))) + padded(content) + ENDING)
    (found,) = scan([path], compiled=False)
    assert isinstance(found, Headers)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            size, form = picture.size, picture.format
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # what Pillow does not open has no size to compare
    if form in ("JPEG", "PNG", "BMP") and found.widths[0]:
        assert (found.widths[0], found.heights[0]) == size


# The compiled pass alone, where memory is left for no thread's stack (8 MiB each), or for one or two
LITTLE_MEMORY = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("mvle._host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
small, large, more, threads = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
expected = host.scan([small.encode()] * 9, 1, True)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
assert host.scan([small.encode()] * 9, threads, True) == expected
try:
    host.scan([large.encode()] * 9, threads, True)
except MemoryError:
    print("MemoryError")
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="bounds a process's memory as Linux does")
@pytest.mark.parametrize(("more", "threads"), [(1 << 20, 8), (20 << 20, 8), (20 << 20, 2), (1 << 20, 1)])
def test_too_little_memory_for_threads_or_names_ends_no_process(more: int, threads: int, tmp_path: Path) -> None:
    (tmp_path / "small.tar").write_bytes(header(b"a", octal(1)) + padded(b"x") + ENDING)
    name = b"n" * (1 << 20)
    named = header(b"././@LongLink", octal(len(name)), b"L") + name + header()
    (tmp_path / "large.tar").write_bytes(named * 24 + ENDING)  # 24 MiB of names
    module = headers.host()[0]
    assert module is not None
    command = [module.__file__, tmp_path / "small.tar", tmp_path / "large.tar", str(more), str(threads)]
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "MemoryError\n"), done.stderr


def test_an_installation_without_the_extension_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mvle._host", None)
    headers.host.cache_clear()
    try:
        module, why = headers.host()
        assert module is None and why.startswith("Python, since C++ is not there")
        with pytest.raises(ImportError, match="C\\+\\+ is not there"):
            scan([], compiled=True)
    finally:
        monkeypatch.undo()
        headers.host.cache_clear()


def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("mvle._host")
    other.__file__ = "_host.so"
    monkeypatch.setitem(sys.modules, "mvle._host", other)
    headers.host.cache_clear()
    try:
        assert headers.host() == (None, "Python, since _host.so is of another version: install mvle again")
    finally:
        monkeypatch.undo()
        headers.host.cache_clear()


def test_the_twin_reads_no_more_than_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(headers_python.os, "pread", lambda *a: read.append(len(found := pread(*a))) or found)
    (tmp_path / "a.tar").write_bytes(b"".join(header(b"%d" % i, octal(10**6)) + padded(bytes(10**6)) for i in range(5)))
    assert len(scan([tmp_path / "a.tar"], compiled=False)[0]) == 5
    assert sum(read) <= 6 * headers_python.WINDOW and np.max(read) <= headers_python.WINDOW
