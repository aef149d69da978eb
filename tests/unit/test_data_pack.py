"""From image files and captions to shards: pack, index and inspect, as functions and on the command line."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvle.data import pack as pack_module
from mvle.data.__main__ import main
from mvle.data.errors import DataError
from mvle.data.indexing import index_shard
from mvle.data.inspect import contact_sheet
from mvle.data.pack import PackReport, pack
from mvle.data.rows import RowOptions
from mvle.data.shards import ShardSet

from .data_files import encode, make_shards, picture, spoil


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight files (one not an image), one row that names a file that is not there; two splits."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    rows = []
    for i in range(8):
        name = f"sub/photo.{i}.JPG" if i % 2 else f"{i}.png"
        data = b"<html>" if i == 3 else encode(picture(i), "JPEG" if i % 2 else "PNG")
        (tmp_path / "images" / name).write_bytes(data)
        rows.append({"image": name, "captions": [f"ein Bild {i}", "größer"], "split": "val" if i > 5 else "train"})
    rows.append({"image": "gone.jpg", "captions": ["x"], "split": "train", "licence": "none"})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return tmp_path


def packed(source: Path, output: str = "out", images: str = "images", **options: Any) -> PackReport:
    return pack("jsonl", source / "rows.jsonl", RowOptions(source / images), source / output, **options)


def test_image_bytes_are_packed_as_they_are_even_if_undecodable(source: Path) -> None:
    report = packed(source)
    (train,) = sorted((source / "out").glob("train-*.tar"))
    index = index_shard(train)
    shards = ShardSet.open([str(train)])

    assert report.images == {"train": 6, "val": 2} and report.left_out == [("gone.jpg", "no such image file")]
    assert [reason for _, reason in index.left_out] and "sub/photo.3.JPG" in index.left_out[0][1]
    for row in range(shards.images):
        record = json.loads(shards.extra(row, "json") or b"")
        assert shards.image_bytes(row) == (source / "images" / record["id"]).read_bytes()
        assert shards.captions(row) == record["captions"]


def test_packing_twice_gives_the_same_bytes(source: Path) -> None:
    packed(source, "one")
    packed(source, "two")
    for path in (source / "one").iterdir():
        assert path.read_bytes() == (source / "two" / path.name).read_bytes()


def test_shards_stay_below_their_bound(source: Path) -> None:
    report = packed(source, shard_bytes=6000)
    assert len(report.shards) > 2
    assert [p.name for p in report.shards if "train" in p.name][:2] == ["train-00000.tar", "train-00001.tar"]
    assert all(path.stat().st_size < 6000 + 2048 for path in report.shards)
    for path in report.shards:
        index_shard(path)
    shards = ShardSet.open([str(path) for path in report.shards])
    assert len({shards.key(row) for row in range(shards.images)}) == shards.images == 7


def test_what_a_killed_pack_left_is_removed_and_another_that_is_at_work_is_not(source: Path) -> None:
    first = packed(source)
    folder = first.shards[0].parent
    left, busy, older = (folder / f".packing.{name}.tmp" for name in ("0123", "4567", "89ab"))
    for place in (left, busy, older):
        place.mkdir()
        (place / ".train-00000.tar.89ab.tmp").write_bytes(bytes(99))
    for name in (left.name, ".packing.cdef.tmp"):  # the second was killed before it had a folder
        (folder / name).with_suffix(".lock").touch()
    with open(busy.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = packed(source, overwrite=True)
        assert sorted(path.name for path in folder.glob(".*")) == [".packing.4567.lock", busy.name]
    assert report.notes == [f"removed {path}, which a pack had left that was killed" for path in (left, older)]
    assert [path.name for path in report.shards] == [path.name for path in first.shards]


def test_a_pack_that_is_at_work_holds_its_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    inner = pack_module._pack_split

    def watched(*arguments: Any) -> None:
        seen.append(pack_module._sweep(arguments[3].parent))
        inner(*arguments)
        assert arguments[3].is_dir()

    monkeypatch.setattr(pack_module, "_pack_split", watched)
    packed(source)
    assert seen and not any(seen)


def test_one_split_can_be_packed_alone(source: Path) -> None:
    packed(source, split="val")
    assert [p.name for p in (source / "out").iterdir()] == ["val-00000.tar"]
    with pytest.raises(DataError, match=r"no row of split dev \(it has train, val\)"):
        packed(source, split="dev")


def test_shards_that_are_there_are_not_overwritten_unasked(source: Path) -> None:
    packed(source)
    index_shard(source / "out" / "train-00000.tar")
    with pytest.raises(DataError, match=r"holds shards already \(train-00000\.tar\).*--overwrite"):
        packed(source)
    packed(source, overwrite=True)
    assert sorted(p.name for p in (source / "out").iterdir()) == ["train-00000.tar", "val-00000.tar"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: expected \{.*it is not JSON"),
        ('{"captions": ["a"]}', "line 2: .*names no image"),
        ('{"image": "0.png", "captions": 3}', "line 2: .*no list of texts"),
        ('{"image": "0.png", "captions": ["a"], "split": "../x"}', "line 2: a split must be a plain name"),
    ],
)
def test_a_wrong_row_is_named_by_its_line_and_nothing_is_written(source: Path, line: str, message: str) -> None:
    rows = source / "rows.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        packed(source)
    assert not (source / "out").exists()


def test_a_wrong_image_folder_is_said_and_leaves_nothing(source: Path) -> None:
    (source / "empty").mkdir()
    with pytest.raises(DataError, match="none of the 9 image files is under"):
        packed(source, images="empty")
    assert list((source / "out").iterdir()) == []


def test_pack_index_and_inspect_from_the_command_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source / "out"
    arguments = ["--input", str(source / "rows.jsonl"), "--images", str(source / "images"), "--output", str(out)]

    assert main(["pack", "--format", "jsonl", *arguments]) == 0
    said = capsys.readouterr().out
    assert main(["index", f"{out}/*.tar"]) == 0
    indexed = capsys.readouterr().out
    assert main(["inspect", f"{out}/{{train,val}}-00000.tar", "--sheet", str(source / "sheet.png")]) == 0
    inspected = capsys.readouterr().out

    assert "train: 6 images, 12 captions, 1 shards" in said and "gone.jpg: no such image file" in said
    assert "python -m mvle.data index" in said
    assert "5 images, 10 captions, 1 left out" in indexed and "undecodable" in indexed
    assert "7 images, 14 captions in 2 shards" in inspected and "left out: 1 (undecodable 1)" in inspected
    assert Image.open(source / "sheet.png").size[0] > 1000


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing.tar")]) == 2
    assert capsys.readouterr().err.startswith("mvle.data: there is no shard")


def test_inspect_counts_what_the_shards_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, [4, 3])
    assert main(["inspect", f"{tmp_path}/*.tar", "--sheet", str(tmp_path / "sheet.png")]) == 0
    report = capsys.readouterr().out
    assert "7 images, 14 captions in 2 shards" in report
    assert "width 32..32, height 24..24" in report and "jpeg 7" in report
    assert "left out: nothing" in report


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt"])
def test_an_image_outside_the_folder_is_refused_by_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": name, "captions": ["a caption"]}) + "\n")

    with pytest.raises(DataError, match="line 1: an image must lie under --images"):
        packed(tmp_path)


def test_an_image_in_two_splits_is_refused_by_both_places_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = [
        {"image": name, "captions": ["a"], "split": split} for name, split in (("a.jpg", "train"), ("./a.jpg", "val"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = [{"filename": r["image"], "split": r["split"], "sentences": [{"raw": "a"}]} for r in rows]
    (tmp_path / "rows.json").write_text(json.dumps({"images": listed}))
    (tmp_path / "rows.csv").write_text("image,caption,split\na.jpg,a,train\n./a.jpg,a,val\n")

    for form, file, here, there in (
        ("jsonl", "rows.jsonl", "line 2", "line 1"),
        ("karpathy", "rows.json", r"images\[1\]", r"images\[0\]"),
        ("csv", "rows.csv", "line 3", "line 2"),
    ):
        with pytest.raises(DataError, match=f"{here}: a.jpg is in split val, and in train by .*{there}. An image must"):
            pack(form, tmp_path / file, RowOptions(tmp_path / "images"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_sheet_says_which_image_is_bad_and_shows_the_others(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4])
    whole = np.asarray(Image.open(contact_sheet(shards, tmp_path / "whole.png", 1, 4)))
    spoil(shards, 2)
    torn = np.asarray(Image.open(contact_sheet(shards, tmp_path / "torn.png", 1, 4)))
    assert whole.shape == torn.shape
    differ = (whole[8:200] != torn[8:200]).any((0, 2))
    tiles = [bool(differ[left : left + 192].any()) for left in range(8, 808, 200)]
    assert tiles == [False, False, True, False]
    assert (torn[8:200, 408:600] == 255).all() and (torn[200:, 408:600] < 128).any()  # no picture, and its name


def test_a_pack_that_cannot_begin_says_why_and_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def full(self: Path, *given: Any, **named: Any) -> None:
        if self.name.startswith(".packing"):
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(self, *given, **named)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left on device"):
        packed(source)
    assert list((source / "out").iterdir()) == []
