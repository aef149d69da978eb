"""Shards, their indexes and sets of them: what is kept, what is left out and why, what is said when one is stale."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from mvle.data.captions import caption_flags, captions_of, text_id
from mvle.data.errors import DataError
from mvle.data.index import index_path
from mvle.data.indexing import index_shard
from mvle.data.patterns import expand_pattern
from mvle.data.shards import ShardSet
from mvle.data.tar import TarWriter, members, split_name

from .data_files import encode, make_shards, oriented, pair, picture, write_shard


def test_an_index_points_at_the_bytes_of_every_image(tmp_path: Path) -> None:
    parts = {f"k{i}": pair(i) for i in range(5)}
    path = write_shard(tmp_path / "a.tar", list(parts.items()))
    index_shard(path)

    shards = ShardSet.open([str(path)])

    assert (shards.images, shards.pairs, shards.shard_sizes) == (5, 10, (5,))
    for row in range(5):
        assert shards.image_bytes(row) == parts[shards.key(row)]["jpg"]
        assert shards.extra(row, "json") == parts[shards.key(row)]["json"]
        assert shards.captions(row) == json.loads(parts[shards.key(row)]["json"])["captions"]
        assert shards.size(row) == (32, 24)


def test_sizes_in_the_index_are_displayed_sizes(tmp_path: Path) -> None:
    turned = {**pair(0), "jpg": oriented(picture(), 6)}
    index = index_shard(write_shard(tmp_path / "a.tar", [("k", turned)]))
    assert (index.columns["width"][0], index.columns["height"][0], index.columns["orientation"][0]) == (24, 32, 6)


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path: Path) -> None:
    good, large = pair(0), {**pair(1), "jpg": encode(picture(1, 64, 64))}
    pairs = [
        ("good", good),
        ("cut", {**good, "jpg": good["jpg"][:-300]}),
        ("html", {**good, "jpg": b"<html>"}),
        ("large", large),
        ("silent", {**good, "json": b'{"captions": ["  "]}'}),
        ("broken", {**good, "json": b"{"}),
        ("lonely", {"json": good["json"]}),
        ("good", pair(2)),
    ]
    index = index_shard(write_shard(tmp_path / "a.tar", pairs), max_pixels=24 * 32)

    reasons = dict(index.left_out)
    assert index.images == 1
    assert reasons["cut"].startswith("undecodable")
    assert reasons["html"].startswith("undecodable")
    assert reasons["large"].startswith("over the pixel bound") and "(--max-pixels)" in reasons["large"]
    assert reasons["silent"].startswith("no caption")
    assert reasons["broken"].startswith("no caption")
    assert reasons["lonely"].startswith("no image")
    assert reasons["good"].startswith("repeated key")


def test_the_name_before_packing_is_part_of_the_reason(tmp_path: Path) -> None:
    parts = {"jpg": b"", "json": b'{"captions": ["a"], "id": "holiday/7.jpg"}'}
    index = index_shard(write_shard(tmp_path / "a.tar", [("k", parts)]))
    assert index.left_out == [("k", "undecodable: the file is empty (holiday/7.jpg)")]


def test_an_index_is_the_same_however_often_it_is_made(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [(f"k{i}", pair(i)) for i in range(70)])
    first = index_shard(path, threads=1).path, index_path(path).read_bytes()
    second = index_shard(path, threads=4).path, index_path(path).read_bytes()
    assert first == second


def test_a_missing_index_is_answered_with_the_command(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "my shard.tar", [("k", pair(0))])
    with pytest.raises(DataError, match=r"(?s)have no index.*python -m mvle.data index '.*my shard.tar'"):
        ShardSet.open([str(path)])


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_shard_that_changed_after_its_index_is_refused(tmp_path: Path, change: str) -> None:
    path = write_shard(tmp_path / "a.tar", [("k", pair(0))])
    index_shard(path)
    if change == "size":
        write_shard(path, [("k", pair(0)), ("l", pair(1))])
    os.utime(path, ns=(0, index_path(path).stat().st_mtime_ns + 10**9))
    with pytest.raises(DataError, match=r"(?s)changed since they were indexed.*python -m mvle.data index"):
        ShardSet.open([str(path)])


def test_a_copy_of_a_shard_and_its_index_has_the_same_fingerprint(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("k", pair(0))])
    index_shard(path)
    (tmp_path / "copy").mkdir()
    for name in (path, index_path(path)):
        (tmp_path / "copy" / name.name).write_bytes(name.read_bytes())
    copied = ShardSet.open([str(tmp_path / "copy" / "a.tar")])
    assert copied.fingerprint == ShardSet.open([str(path)]).fingerprint


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc, which is not there")
def test_an_open_set_keeps_no_index_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shards = make_shards(tmp_path, [1] * 20)
    shards.close()
    assert shards.key(19) == "s19p0"
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_another_caption_gives_another_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for name, caption in (("a", "one dog"), ("b", "two dogs")):
        (tmp_path / name).mkdir()
        path = write_shard(tmp_path / name / "x.tar", [("k", pair(0, caption))])
        index_shard(path)
        prints.add(ShardSet.open([str(path)]).fingerprint)
    assert len(prints) == 2


def test_rows_run_through_the_shards_in_order(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 0, 3])
    assert [shards.key(row) for row in range(5)] == ["s0p0", "s0p1", "s2p0", "s2p1", "s2p2"]
    with pytest.raises(IndexError, match=r"0\.\.4; got 5"):
        shards.key(5)


def test_a_damaged_index_is_no_crash(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("k", pair(0))])
    index_shard(path)
    index_path(path).write_bytes(index_path(path).read_bytes()[:200])
    with pytest.raises(DataError, match=r"(?s)damaged.*python -m mvle.data index .*a\.tar"):
        ShardSet.open([str(path)])


def test_a_cut_shard_is_named_when_it_is_indexed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("k", pair(0))])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"a\.tar is cut off"):
        index_shard(path)


def test_a_compressed_shard_is_named_as_such(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("k.jpg"), io.BytesIO())
    with pytest.raises(DataError, match="uncompressed tar; it is gzip"):
        index_shard(tmp_path / "a.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_form_are_walked_as_tarfile_does(tmp_path: Path, form: int) -> None:
    names = ["a.jpg", "folder/b.c.json", "x" * 90 + ".jpg", "deep/" * 15 + "k.jpg"]
    names += [] if form == tarfile.USTAR_FORMAT else ["y" * 150 + ".jpg", "ü" * 60 + ".jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 500 * i
            tar.addfile(info, io.BytesIO(bytes(500 * i)))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [tuple(m) for m in members(tmp_path / "a.tar")] == expected


def test_our_tars_are_read_by_tarfile(tmp_path: Path) -> None:
    names = ["a.jpg", "z" * 180 + ".png", "ünlaut.json"]
    with TarWriter(tmp_path / "a.tar") as tar:
        for name in names:
            tar.add(name, name.encode())
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    assert found == {name: name.encode() for name in names}


def test_a_tar_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TarWriter(tmp_path / "a.tar") as tar:
        tar.add("a.jpg", b"abc")
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_the_key_ends_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("v1.0/a.objects.PNG") == ("v1.0/a", "objects.png")


def test_patterns_expand_ranges_lists_and_globs_in_order(tmp_path: Path) -> None:
    for name in ("t-000.tar", "t-001.tar", "t-002.tar", "v-a.tar", "v-b.tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand_pattern(str(tmp_path / pattern))]

    assert names("t-{000..002}.tar") == ["t-000.tar", "t-001.tar", "t-002.tar"]
    assert names("{v-b,t-001}.tar") == ["v-b.tar", "t-001.tar"]
    assert names("v-*.tar") == ["v-a.tar", "v-b.tar"]
    with pytest.raises(DataError, match=r"there is no shard .*t-003"):
        names("t-{000..003}.tar")
    with pytest.raises(DataError, match=r"no shard matches .*x-\*"):
        names("x-*.tar")


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, [1])
    path = str(tmp_path / "part-000.tar")
    with pytest.raises(DataError, match="comes twice"):
        ShardSet.open([path, path])


@pytest.mark.parametrize(
    ("caption", "flags"),
    [
        ("a dog on the left", 1),
        ("the leftmost Red door", 3),
        ("a bright blue sky", 2),
        ("a copyright notice was left-handed", 1),
        ("a reddish cat", 2),
        ("covered in starlight", 0),
        *(
            (f"a {word} thing", 2)
            for word in ["bluish", "whitish", "purplish", "orangish", "greys", "blond", "blonde", "colorful"]
        ),
        *(
            (f"a {word} thing", 2)
            for word in ["multi-coloured", "grayscale", "monochrome", "khaki", "aqua", "dark", "tanned"]
        ),
        *(
            (f"a {word} thing", 2)
            for word in ["brightly", "blackened", "lighter", "pale", "redheaded", "black-and-white", "navy-blue"]
        ),
        *((f"a {word} thing", 0) for word in ["blackboard", "discord", "greenhouse", "bluebird", "standard", "light"]),
    ],
)
def test_flags_say_what_a_flip_would_spoil_and_what_names_a_colour(caption: str, flags: int) -> None:
    assert caption_flags(caption) == flags


def test_captions_that_differ_in_case_and_spaces_have_one_id() -> None:
    assert text_id("A  Dog runs ") == text_id("a dog runs") != text_id("a dog ran")


@pytest.mark.parametrize(
    ("components", "field", "expected"),
    [
        ({"json": b'{"captions": ["a", " b "]}'}, None, ["a", "b"]),
        ({"json": b'{"caption": "a\\n b"}'}, None, ["a b"]),
        ({"json": b'{"url": "x"}', "txt": b"from text"}, None, ["from text"]),
        ({"json": b'{"caption": "json"}', "txt": b"from text"}, "txt", ["from text"]),
        ({"json": b'{"caption": "json", "alt": "other"}'}, "alt", ["other"]),
        ({"json": b'{"captions": [1, null, "x"]}'}, None, ["x"]),
    ],
)
def test_captions_are_found_where_other_tools_put_them(
    components: dict[str, bytes], field: str | None, expected: list[str]
) -> None:
    assert captions_of(components, field) == expected
