"""Shards that other tools wrote, indexed where they lie: every member is part of a pair or has a reason."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from mvle.data.__main__ import main
from mvle.data.captions import CaptionError, bytes_id, captions_of
from mvle.data.errors import DataError
from mvle.data.indexing import index_shard
from mvle.data.left_out import left_out_lines
from mvle.data.shards import ShardSet

from .data_files import encode, oriented, picture


def foreign_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar as tarfile writes it, which is how webdataset's and img2dataset's writers do."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "bigdata"
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset_pair(i: int, image: bytes | None, caption: str | None) -> list[tuple[str, bytes]]:
    """The members that img2dataset's webdataset writer leaves of one row of its input, with its own fields."""
    key, failed = f"{i:09d}", image is None
    record = {
        "caption": caption, "url": f"https://host.invalid/{i}.jpg", "key": key,
        "status": "failed_to_download" if failed else "success",
        "error_message": "HTTP Error 404: Not Found" if failed else None,
        "width": None if failed else 32, "height": None if failed else 24, "original_width": None if failed else 640,
        "original_height": None if failed else 480, "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip
    text = [(f"{key}.txt", caption.encode())] if caption is not None else []
    data = [(f"{key}.jpg", image)] if image is not None else []
    return [*data, (f"{key}.json", json.dumps(record, indent=4).encode()), *text]


def pairs_of(path: Path) -> Counter[tuple[int, tuple[str, ...]]]:
    shards = ShardSet.open(str(path))
    return Counter((shards.image_id(row), tuple(shards.captions(row))) for row in range(shards.images))


def keys_of(path: Path, caption_field: str | None = None) -> dict[str, list[str]]:
    """key -> captions, of what was indexed."""
    index_shard(path, caption_field)
    shards = ShardSet.open(str(path))
    return {shards.key(row): shards.captions(row) for row in range(shards.images)}


# --- img2dataset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [None, "caption", "txt"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_img2datasets_shards_are_indexed_as_they_are(tmp_path: Path, field: str | None, form: int) -> None:
    images = [encode(picture(i)) for i in range(5)]
    members = [member for i in range(5) for member in img2dataset_pair(i, images[i], f"Foto  {i}, größer\n")]
    path = foreign_tar(tmp_path / "00000.tar", members, form)
    before = path.read_bytes()

    index = index_shard(path, field)

    assert index.left_out == []
    assert pairs_of(path) == Counter({(bytes_id(images[i]), (f"Foto {i}, größer",)): 1 for i in range(5)})
    assert path.read_bytes() == before


def test_what_img2dataset_could_not_fetch_or_caption_is_left_out_with_its_words(tmp_path: Path) -> None:
    members = [
        *img2dataset_pair(0, encode(picture(0)), "a dog"),
        *img2dataset_pair(1, None, "a cat"),
        *img2dataset_pair(2, encode(picture(2)), None),
    ]
    index = index_shard(foreign_tar(tmp_path / "00000.tar", members))
    reasons = dict(index.left_out)
    assert index.images == 1
    assert reasons["000000001"] == (
        "no image among its parts (json, txt): failed_to_download, HTTP Error 404: Not Found"
    )
    assert reasons["000000002"].startswith("no caption: nothing in captions or caption of its .json, nor in a .txt")


def test_what_lies_beside_shards_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    beginnings = {
        "00000.parquet": (b"PAR1" + bytes(1000), "it is parquet, a table that lies beside shards"),
        "00000_stats.json": (b'{"count": 1}' + b" " * 600, "it begins with b'{\"count\"'"),
        "a.tar.gz": (b"\x1f\x8b" + bytes(1000), "it is gzip.*gunzip"),
        "a.tar.zst": (b"\x28\xb5\x2f\xfd" + bytes(1000), "it is zstd.*unzstd"),
        "a.tar": (b"", "it is empty"),
    }
    for name, (data, message) in beginnings.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} must be an? .*{message}"):
            index_shard(tmp_path / name)


def test_a_shard_that_is_none_does_not_keep_the_others_from_their_indexes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_tar(tmp_path / "a.tar", img2dataset_pair(0, encode(picture(0)), "a dog"))
    (tmp_path / "b.tar").write_bytes(b"PAR1" + bytes(1000))
    foreign_tar(tmp_path / "c.tar", img2dataset_pair(2, encode(picture(2)), "a cat"))
    assert main(["index", f"{tmp_path}/*.tar"]) == 2
    said = capsys.readouterr()
    assert "1 of 3 shards were not indexed:\n" in said.err and "b.tar must be a tar; it is parquet" in said.err
    assert ShardSet.open([f"{tmp_path}/a.tar", f"{tmp_path}/c.tar"]).images == 2


# --- names -----------------------------------------------------------------------------------------------------------


def test_folders_capitals_and_several_dots_in_names_are_pairs(tmp_path: Path) -> None:
    image = encode(picture(0))
    members = [
        ("./train/n01/IMG_1.JPG", image), ("./train/n01/IMG_1.TXT", b"capitals"),
        ("n02/my.cat.jpeg", image), ("n02/my.cat.txt", b"a cat"), ("n02/my.dog.jpeg", image),
        ("n02/my.dog.json", b'{"caption": "a dog"}'),
        ("k.input.png", image), ("k.cls", b"7"), ("k.txt", b"an only image has all parts of its key"),
        ("w.webp", encode(picture(1), "WEBP")), ("w.txt", b"webp"), ("w.embedding.npy", b"\x93NUMPY"),
        ("__meta__.json", b'{"webdataset": 1}'), ("README", b"no suffix"), ("n02/.DS_Store", b""),
    ]  # fmt: skip
    path = foreign_tar(tmp_path / "a.tar", members)

    assert keys_of(path) == {
        "./train/n01/IMG_1": ["capitals"],
        "n02/my.cat": ["a cat"],
        "n02/my.dog": ["a dog"],
        "k.input": ["an only image has all parts of its key"],
        "w": ["webp"],
    }
    shards = ShardSet.open(str(path))
    assert shards.indexes[0].left_out == []
    assert (shards.extra(3, "cls"), shards.extra(4, "embedding.npy")) == (b"7", b"\x93NUMPY")


def test_a_part_without_its_image_is_named_apart_from_the_pairs_of_its_first_name(tmp_path: Path) -> None:
    members = [(f"my.{i}.jpg", encode(picture(i))) for i in range(3)]
    members += [(f"my.{i}.txt", b"a caption") for i in (0, 2, 3)]
    index = index_shard(foreign_tar(tmp_path / "a.tar", members))
    assert index.images == 2
    assert [key for key, _ in index.left_out] == ["my.1", "my"]
    assert index.left_out[1][1] == "no image among its parts (3.txt)"


def test_names_that_are_no_text_or_move_a_cursor_neither_end_an_index_nor_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = encode(picture(0))
    members = [
        ("k.jpg", image), ("k.txt", b"a dog"), ("k.\udcff\udcfe", b"a part whose name is no UTF-8"),
        ("\udcff\x1b[2J.jpg", b""), ("\udcff\x1b[2J.txt", b"clears the screen"), ("new\nline.txt", b"x"),
    ]  # fmt: skip
    path = foreign_tar(tmp_path / "a.tar", members)
    assert main(["index", str(path)]) == 0
    assert main(["inspect", str(path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert said.isascii() and "\x1b" not in said
    assert r"a.tar \udcff\x1b[2J: undecodable: the file is empty" in said and r"a.tar new\nline: no image" in said


def test_left_out_lines_count_all_and_list_some() -> None:
    found = [("a", "no caption: x"), ("b", "no caption: y"), ("c", "undecodable: z")]
    assert left_out_lines(found, 1, "--reasons N") == [
        "left out: 3 (no caption 2, undecodable 1)",
        "    a: no caption: x",
        "    and 2 more (--reasons N)",
    ]
    assert left_out_lines([], 5) == ["left out: nothing"]


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("components", "field", "expected"),
    [
        ({"json": b'{"meta": {"alt": "deep"}}'}, "meta.alt", ["deep"]),
        ({"json": b'{"meta.alt": "flat", "meta": {"alt": "deep"}}'}, "meta.alt", ["flat"]),
        ({"json": b'{"sentences": [{"raw": "a"}, {"raw": "b"}, {}, 3]}'}, "sentences.raw", ["a", "b"]),
        ({"txt": b"\xef\xbb\xbfone\r\n\r\ntwo words\n"}, "txt-lines", ["one", "two words"]),
        ({"txt": b"one\ntwo"}, None, ["one two"]),
        ({"json": b'{"txt": "no"}', "txt": b"yes"}, "txt", ["yes"]),
    ],
)
def test_a_caption_field_may_lie_deeper_and_a_text_may_hold_several(
    components: Mapping[str, bytes], field: str | None, expected: list[str]
) -> None:
    assert captions_of(components, field) == expected


def test_a_caption_field_that_is_not_there_is_told_with_what_there_is() -> None:
    with pytest.raises(CaptionError, match=r"nothing in alt; the \.json has caption, url"):
        captions_of({"json": b'{"url": "x", "caption": "a dog"}'}, "alt")
    with pytest.raises(CaptionError, match=r"nothing in a\.b\.c"):
        captions_of({"json": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"}, "a.b.c")


def test_the_command_line_takes_the_caption_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("k.jpg", encode(picture(0))), ("k.json", b'{"sentences": [{"raw": "one"}, {"raw": "two"}]}')]
    path = foreign_tar(tmp_path / "a.tar", members)
    assert main(["index", str(path)]) == 0
    assert "0 images, 0 captions, 1 left out" in capsys.readouterr().out
    assert main(["index", str(path), "--caption-field", "sentences.raw"]) == 0
    assert "1 images, 2 captions, 0 left out" in capsys.readouterr().out


def test_a_set_without_a_usable_image_is_answered_with_what_shows_why(tmp_path: Path) -> None:
    index_shard(foreign_tar(tmp_path / "a.tar", [("k.jpg", b"")]))
    with pytest.raises(DataError, match=r"no usable image .*python -m mvle.data index .*a\.tar"):
        ShardSet.open(f"{tmp_path}/a.tar")


# --- hostile files ---------------------------------------------------------------------------------------------------


def png(width: int, height: int, before: bytes = b"") -> bytes:
    """A PNG header that announces a size, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def hostile_files() -> dict[str, tuple[bytes, str | None]]:
    """name -> bytes, and how the reason begins, or None for what is a picture however odd."""
    jpeg = encode(picture(0, 64, 64))
    sixteen = Image.fromarray(picture(1)[:, :, 0].astype("uint16") << 8)
    frames = [Image.fromarray(picture(i)) for i in (2, 3)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    return {
        "whole.jpg": (jpeg, None),
        "cmyk.jpg": (encode(Image.fromarray(picture(4)).convert("CMYK")), None),
        "grey.jpg": (encode(picture(5, channels=1)), None),
        "turned.jpg": (oriented(picture(6), 6), None),
        "sixteen.png": (encode(sixteen, "PNG"), None),
        "really_a_jpeg.png": (encode(picture(7)), None),
        "palette.png": (encode(Image.fromarray(picture(8)).convert("P"), "PNG", transparency=0), None),
        "animation.gif": (animation.getvalue(), None),
        "trailing.jpg": (encode(picture(9)) + b"<script>" * 100, None),
        "empty.jpg": (b"", "undecodable: the file is empty"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "undecodable"),
        "page.jpg": (b"<html><body>404</body></html>", "undecodable: no image format"),
        "junk.webp": (bytes(range(256)) * 8, "undecodable: no image format"),
        "bomb.png": (png(60_000, 60_000), "over the pixel bound"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(40), "over the pixel bound"),
        "nothing.gif": (b"GIF89a" + struct.pack("<HH", 0, 10) + bytes(40), "undecodable: a picture without pixels"),
        "no_pixels.png": (png(8, 8), "undecodable"),
        "cut.png": (encode(picture(10), "PNG")[:-20], "undecodable: a PNG"),
        "float.tif": (encode(Image.new("F", (8, 8)), "TIFF"), "undecodable: floating-point"),
        "table.tiff": (b"II*\0" + struct.pack("<I", 0xFFFFFFFF) + bytes(60), "undecodable"),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's word about the table that is none
@pytest.mark.parametrize("captions", ["txt", "json", "none"])
def test_hostile_files_planted_in_a_foreign_tar_are_pairs_or_have_a_reason_and_end_nothing(
    tmp_path: Path, captions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = hostile_files()
    members: list[tuple[str, bytes]] = []
    for name, (data, _) in hostile.items():
        key = name.partition(".")[0] + name.rpartition(".")[2]  # bomb.png and bomb.gif are no parts of one pair
        members.append((f"{key}.{name.rpartition('.')[2]}", data))
        if captions == "txt":
            members.append((f"{key}.txt", b"a picture"))
        elif captions == "json":
            members.append((f"{key}.json", json.dumps({"caption": "a picture", "id": name}).encode()))
    path = foreign_tar(tmp_path / "a.tar", members)

    assert main(["index", str(path)]) == 0

    index = ShardSet.open(str(path)).indexes[0] if captions != "none" else index_shard(path)
    left_out = dict(index.left_out)
    assert index.images + len(index.left_out) == len(hostile)
    assert f"{index.images} images" in capsys.readouterr().out
    for name, (_, reason) in hostile.items():
        key = name.partition(".")[0] + name.rpartition(".")[2]
        if captions == "none":
            assert left_out[key].startswith("no caption")
        elif reason is None:
            assert key not in left_out, (name, left_out.get(key))
        else:
            assert left_out[key].startswith(reason), (name, left_out.get(key))
            assert captions == "txt" or f"({name})" in left_out[key]
