"""Many shards: which are indexed again, several at once, without decoding, and indexes of DALI's own reader."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from mvle.data import decode
from mvle.data import index_many as module
from mvle.data import indexing as indexing_module
from mvle.data.__main__ import main
from mvle.data.decode import DecodeError, examine_image, identify_image
from mvle.data.errors import DataError
from mvle.data.index import ShardIndex, index_path
from mvle.data.index_many import Indexed, IndexOptions, index_many
from mvle.data.indexing import index_shard
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tar import members
from mvle.data.wds2idx import read_wds2idx, write_wds2idx

from .data_files import encode, oriented, pair, picture, write_shard
from .photos import forms, forms_for_torch, png_chunk, tiff


def shards(folder: Path, count: int, pairs: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_shard(folder / f"{s:03d}.tar", [(f"s{s}p{i}", pair(100 * s + i)) for i in range(pairs)])
        for s in range(count)
    ]


def made(paths: list[Path], options: IndexOptions = IndexOptions()) -> list[str]:  # noqa: B008
    """The shards that were indexed now, by name."""
    return sorted(done.path.name for done in index_many(paths, options) if not done.kept)


def test_only_what_needs_an_index_gets_one(tmp_path: Path) -> None:
    paths = shards(tmp_path, 4)
    index_shard(paths[0])
    assert made(paths) == ["001.tar", "002.tar", "003.tar"]
    assert made(paths) == []

    write_shard(paths[1], [("k", pair(7))])  # another size
    index_path(paths[2]).write_bytes(b"cut off")  # a damaged index
    assert made(paths) == ["001.tar", "002.tar"]
    assert made(paths, IndexOptions(max_pixels=10**6)) == ["000.tar", "001.tar", "002.tar", "003.tar"]
    assert made(paths, IndexOptions(max_pixels=10**6, caption_field="caption")) == [p.name for p in paths]
    assert made(paths, IndexOptions(max_pixels=10**6, caption_field="caption")) == []
    again = IndexOptions(max_pixels=10**6, caption_field="caption", again=True)
    assert made(paths, again) == [p.name for p in paths]


def test_several_processes_make_the_same_indexes_and_one_bad_shard_stops_none(tmp_path: Path) -> None:
    paths = shards(tmp_path / "one", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    others = [tmp_path / "other" / path.name for path in paths]
    for list_of in (paths, others):
        with open(list_of[1], "r+b") as file:
            file.truncate(1000)
    alone = {done.path.name: done for done in index_many(paths, IndexOptions(workers=1))}
    together = {done.path.name: done for done in index_many(others, IndexOptions(workers=2))}

    assert alone.keys() == together.keys() and len(alone) == 3
    for name, done in alone.items():
        other = together[name]
        if name == "001.tar":
            assert done.index is None and "is cut off" in done.error and "is cut off" in other.error
        else:
            assert done.index.identity == other.index.identity
            assert all(np.array_equal(c, other.index.columns[k]) for k, c in done.index.columns.items())


def test_small_sets_start_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(tmp_path, 2)
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    assert made(paths) == ["000.tar", "001.tar"]
    monkeypatch.setattr(module, "SMALL", 100)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(TypeError):  # it would now
        made(paths, IndexOptions(again=True))


# ---- without decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_header_tells_what_decoding_tells(form: str, orientation: int) -> None:
    if form in ("BMP", "GIF") and orientation > 1:
        pytest.skip(f"{form} has no EXIF")
    data = encode(picture(), form) if orientation == 1 else oriented(picture(), orientation, form)
    assert identify_image(data) == examine_image(data)[0]


def test_words_behind_the_pixels_of_a_png_do_not_make_it_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ImageMagick writes them. But for one that Pillow takes for EXIF."""
    png = encode(picture(), "PNG")
    worded, turned = (png[:-12] + png_chunk(b"tEXt", text) + png[-12:] for text in (b"date\0now", b"exif\0" + tiff(6)))
    assert identify_image(turned) == examine_image(turned)[0] and identify_image(turned).orientation == 6
    known = examine_image(worded)[0]
    monkeypatch.setattr(decode, "examine_image", lambda *_: pytest.fail("it is decoded"))
    assert identify_image(worded) == known


@pytest.mark.parametrize("name", forms() | forms_for_torch())
def test_a_header_tells_what_decoding_tells_of_odd_forms_too(name: str) -> None:
    data = (forms() | forms_for_torch())[name]
    assert identify_image(data) == examine_image(data)[0]


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(channels=1)),
        encode(picture(channels=4), "PNG"),
        encode(picture(channels=1), "PNG"),
        encode(picture(channels=4), "WEBP"),
        encode(picture(), "JPEG", progressive=True),
    ],
)
def test_a_header_tells_depth_and_channels(data: bytes) -> None:
    assert identify_image(data) == examine_image(data)[0]


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"\xff\xd8\xff\xd9", encode(picture(), "PNG")[:60], b"BM" + b"\0" * 40]
)
def test_what_has_no_header_is_refused_without_decoding_too(data: bytes) -> None:
    with pytest.raises(DecodeError):
        identify_image(data)


def test_an_index_without_decoding_has_the_same_rows_and_the_same_data(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1, pairs=5)
    verified = index_shard(path)
    plain = index_shard(path, verify=False)

    assert verified.verified and not plain.verified
    assert all(np.array_equal(c, plain.columns[k]) for k, c in verified.columns.items())
    assert verified.identity == plain.identity  # so a run may go on after the other was made
    plans = [SamplingPlan(ShardSet([index]), seed=0, batch_total=4, slots=2).fingerprint for index in (verified, plain)]
    assert plans[0] == plans[1]


def test_damage_behind_a_header_is_not_seen_without_decoding(tmp_path: Path) -> None:
    good = pair(0)
    cut = {**pair(1), "jpg": pair(1)["jpg"][:-300]}
    path = write_shard(tmp_path / "a.tar", [("good", good), ("cut", cut)])
    assert [key for key, _ in index_shard(path).left_out] == ["cut"]
    assert made([path], IndexOptions(verify=False)) == []  # a verified one is better, and stays
    assert index_shard(path, verify=False).left_out == []
    assert made([path]) == ["a.tar"]  # and an unverified one is not enough


# ---- stale ----------------------------------------------------------------------------------------------------------


def test_other_bytes_of_the_same_size_are_noticed_whatever_their_time(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("k", pair(0))])
    index_shard(path)
    before = path.stat()
    changed = bytearray(path.read_bytes())
    changed[600] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**9))  # older, as unpacked files are
    assert ShardIndex(path).stale() == "its first or last bytes are others than when it was indexed"
    with pytest.raises(DataError, match="changed since they were indexed.*first: its first or last bytes"):
        ShardSet.open(str(path))


def test_a_copy_is_no_other_shard_and_costs_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = shards(tmp_path / "a", 1)
    index_shard(path)
    copy = tmp_path / "b" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    shutil.copy(index_path(path), index_path(copy))
    assert ShardIndex(copy).stale() is None

    def read(*_: object) -> str:
        raise AssertionError("a shard of the time that its index knows is not read")

    monkeypatch.setattr("mvle.data.index.ends_of", read)
    assert ShardIndex(path).stale() is None
    with pytest.raises(AssertionError):
        ShardIndex(copy).stale()


# ---- wds2idx --------------------------------------------------------------------------------------------------------


def test_what_is_written_for_dali_is_read_back_and_gives_the_same_index(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1)
    place, samples = write_wds2idx(path)
    assert place == tmp_path / "000.idx" and samples == 3
    assert place.read_text().splitlines()[0] == "v1.2 3"
    assert read_wds2idx(place, path) == list(members(path))
    walked = index_shard(path)
    assert index_shard(path, wds2idx=True).identity == walked.identity


HOSTILE = {
    "another version": ("v1.1 1\njpg 512 4 k.jpg\n", "beginning with 'v1.2'"),
    "no number": ("v1.2 many\n", "beginning with 'v1.2'"),
    "too few": ("v1.2 2\njpg 512 4 k.jpg\n", "announces 2 samples and has 1"),
    "cut": ("v1.2 1\njpg 512 4\n", "line 2 is damaged"),
    "no offset": ("v1.2 1\njpg -512 4 k.jpg\n", "line 2 is damaged"),
    "another extension": ("v1.2 1\npng 512 4 k.jpg\n", "line 2 is damaged"),
    "outside": ("v1.2 1\njpg 512 99999999999 k.jpg\n", "no tar has it there"),
    "between blocks": ("v1.2 1\njpg 513 4 k.jpg\n", "no tar has it there"),
    "overlapping": ("v1.2 1\njpg 512 700 k.jpg json 1024 4 k.json\n", "no tar has it there"),
    "huge count": (f"v1.2 {10**30}\n", "announces"),
    "empty": ("", "begins with ''"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_of_wds2idx_is_refused(what: str, tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1)
    text, words = HOSTILE[what]
    (tmp_path / "000.idx").write_text(text)
    with pytest.raises(DataError, match=words):
        index_shard(path, wds2idx=True)


def test_a_file_of_wds2idx_of_another_shard_is_refused(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1)
    write_wds2idx(path)
    write_shard(path, [(f"z{i}", pair(i)) for i in range(3)])  # the same parts under other names, at the same places
    with pytest.raises(DataError, match=r"s0p0.jpg at byte 512, and the header before it is another's"):
        index_shard(path, wds2idx=True)


def test_names_with_rare_blanks_of_unicode_are_read_as_they_were_written(tmp_path: Path) -> None:
    names = ("a\u3000b", "a\u00a0c", "a\u2028d", "a\x1ce", "a\u0085f")
    path = write_shard(tmp_path / "a.tar", [(name, pair(i)) for i, name in enumerate(names)])
    place, samples = write_wds2idx(path)
    assert samples == len(names) and read_wds2idx(place, path) == list(members(path))


def test_a_name_with_a_blank_cannot_be_written(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("my cat", pair(0))])
    with pytest.raises(DataError, match="'my cat.jpg' has a blank in it"):
        write_wds2idx(path)


def test_dali_reads_a_shard_by_the_file(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import Pipeline, fn

    (path,) = shards(tmp_path, 1)
    place, _ = write_wds2idx(path)
    pipeline = Pipeline(batch_size=3, num_threads=1, device_id=None)
    with pipeline:
        image, text = fn.readers.webdataset(paths=[str(path)], index_paths=[str(place)], ext=["jpg", "json"])
        pipeline.set_outputs(image, text)
    pipeline.build()
    images, texts = pipeline.run()
    for i in range(3):
        parts = pair(i)
        assert images.at(i).tobytes() == parts["jpg"] and texts.at(i).tobytes() == parts["json"]


# ---- the program ----------------------------------------------------------------------------------------------------


def test_the_program_says_what_it_made_and_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path, 2)
    pattern = str(tmp_path / "*.tar")
    assert main(["index", pattern, "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert "6 images in " in said and " a second, " in said
    assert main(["index", pattern, "--no-verify"]) == 0
    assert capsys.readouterr().out.count("(up to date)") == 2
    assert main(["wds2idx", pattern]) == 0
    assert "001.idx: 3 samples" in capsys.readouterr().out
    assert main(["index", pattern, "--from-wds2idx"]) == 0
    assert "up to date" not in capsys.readouterr().out  # now they are verified
    assert main(["index", pattern, "--workers", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def _dies(path: Path, options: IndexOptions) -> Indexed:
    if path.name == "001.tar":
        os.kill(os.getpid(), signal.SIGKILL)  # as a machine without memory does, without a word
    return Indexed(path, index_shard(path), None, 0.0)


def test_a_process_that_is_killed_costs_its_own_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(tmp_path, 3)
    monkeypatch.setattr(module, "_index", _dies)
    found = {done.path.name: done for done in index_many(paths, IndexOptions(workers=2))}
    assert found.keys() == {"000.tar", "001.tar", "002.tar"}
    assert found["001.tar"].index is None and "was killed" in found["001.tar"].error
    assert found["000.tar"].index is not None and found["002.tar"].index is not None


def test_a_shard_that_is_written_while_it_is_indexed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = shards(tmp_path, 1)
    examine = indexing_module._examine_all

    def meanwhile(*arguments: object) -> object:
        found = examine(*arguments)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(indexing_module, "_examine_all", meanwhile)
    with pytest.raises(DataError, match="was written while it was indexed"):
        index_shard(path)
    assert not index_path(path).exists()
