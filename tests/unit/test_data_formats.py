"""One set of pairs, written as people have it: jsonl, karpathy json, csv, tsv, a folder. All pack to the same pairs."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvle.data.__main__ import main
from mvle.data.errors import DataError
from mvle.data.indexing import index_shard
from mvle.data.pack import PackReport, pack
from mvle.data.rows import RowOptions
from mvle.data.shards import ShardSet

from .data_files import encode, picture

SPLITS = ("train", "train", "train", "val", "test", "train")
CAPTIONS = (
    ["a dog", 'a "big" dog, in the grass', "ein größerer Hund"],
    ["a cat"],
    ["two cats", "two | cats"],
    ["a bird left of a tree"],
    ["'quoted'", "tab\tinside"],
    ["six", "six", "six again"],  # a caption that comes twice counts twice
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.0.jpg (a name of several dots), b.PNG and so on, each in the folder of its split."""
    for i, split in enumerate(SPLITS):
        path = tmp_path / "images" / name_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(i), "PNG" if i % 2 else "JPEG"))
        assert path.parent.name == split
    return tmp_path / "images"


def name_of(i: int) -> str:
    return f"{SPLITS[i]}/{'ab'[i % 2]}.{i}{'.PNG' if i % 2 else '.jpg'}"


def write_jsonl(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    rows = [{"image": name_of(i), "captions": CAPTIONS[i], "split": SPLITS[i]} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return "jsonl", folder / "rows.jsonl", {}


def write_karpathy(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    rows = [
        {
            "filepath": SPLITS[i],
            "filename": name_of(i).split("/")[1],
            "split": "restval" if i == 1 else SPLITS[i],
            "sentences": [{"raw": text, "tokens": text.split()} for text in CAPTIONS[i]],
            "cocoid": 100 + i,
        }
        for i in range(6)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return "karpathy", folder / "dataset.json", {}


def table_lines() -> list[list[str]]:
    """One caption a line, captions of an image apart from one another, their order kept."""
    longest = max(len(captions) for captions in CAPTIONS)
    return [[name_of(i), CAPTIONS[i][n], SPLITS[i]] for n in range(longest) for i in range(6) if n < len(CAPTIONS[i])]


def write_csv(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        csv.writer(file).writerows([["image", "caption", "split"], *table_lines()])
    return "csv", folder / "rows.csv", {}


def write_tsv(folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """open_clip's default columns and separator; it has no split of its own."""
    with open(folder / "rows.tsv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([["filepath", "title", "fold"], *table_lines()])
    return "tsv", folder / "rows.tsv", {"split_column": "fold"}


def write_folder(folder: Path) -> tuple[str, None, dict[str, Any]]:
    for i in range(6):
        path = folder / "images" / name_of(i)
        path.with_suffix(".txt").write_bytes("\r\n".join(CAPTIONS[i]).encode("utf-8-sig"))
    return "folder", None, {"split_folders": True}


Writer = Callable[[Path], tuple[str, Path | None, dict[str, Any]]]
WRITERS = [write_jsonl, write_karpathy, write_csv, write_tsv, write_folder]


def pack_from(images: Path, writer: Writer, **options: Any) -> PackReport:
    form, source, how = writer(images.parent)
    return pack(form, source, replace(RowOptions(images), **how), images.parent / "out", **options)


def pairs_of(report: PackReport) -> Counter[tuple[str, int, tuple[str, ...]]]:
    """(split, id of the image's bytes, captions in order) of what was packed."""
    for path in report.shards:
        index_shard(path)
    found: Counter[tuple[str, int, tuple[str, ...]]] = Counter()
    for path in report.shards:
        shards = ShardSet.open(str(path))
        for row in range(shards.images):
            found[path.name.split("-")[0], shards.image_id(row), tuple(shards.captions(row))] += 1
    return found


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_pairs_in_the_same_splits(images: Path, writer: Writer) -> None:
    from mvle.data.captions import bytes_id

    report = pack_from(images, writer)

    expected = Counter(
        (SPLITS[i], bytes_id((images / name_of(i)).read_bytes()), tuple(" ".join(c.split()) for c in CAPTIONS[i]))
        for i in range(6)
    )
    assert pairs_of(report) == expected
    assert report.left_out == []
    assert (report.images, report.captions) == ({"test": 1, "train": 4, "val": 1}, {"test": 2, "train": 9, "val": 1})


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_leaves_out_what_it_names_and_the_folder_lacks(images: Path, writer: Writer) -> None:
    form, source, how = writer(images.parent)
    (images / name_of(0)).unlink()
    report = pack(form, source, replace(RowOptions(images), **how), images.parent / "out")
    assert sum(report.images.values()) == 5
    missing = "a .txt without an image" if form == "folder" else "no such image file"
    assert [reason for _, reason in report.left_out] == [missing]


def test_rows_of_another_split_than_the_asked_one_are_counted(images: Path) -> None:
    report = pack_from(images, write_csv, split="val")
    assert (report.images, report.unasked) == ({"val": 1}, {"train": 4, "test": 1})


# --- karpathy --------------------------------------------------------------------------------------------------------


def test_restval_is_training_data_unless_another_split_is_asked_for(images: Path) -> None:
    report = pack_from(images, write_karpathy)
    assert report.images["train"] == 4 and report.notes[0].startswith("restval: 1 images go into train")

    _, source, _ = write_karpathy(images.parent)
    options = RowOptions(images, restval="restval")
    report = pack("karpathy", source, options, images.parent / "apart")
    assert report.images == {"restval": 1, "test": 1, "train": 3, "val": 1} and report.notes == []


def test_cocos_own_ids_stay_with_the_pair(images: Path) -> None:
    report = pack_from(images, write_karpathy)
    pairs_of(report)
    train = ShardSet.open(str(next(path for path in report.shards if "train" in path.name)))
    record = json.loads(train.extra(0, "json") or b"")
    assert (record["cocoid"], record["id"]) == (100, name_of(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "no list `images`"),
        ("{", "it is not JSON"),
        ('{"images": [{"split": "train"}]}', r"images\[0\]: .*it has no filename"),
        ('{"images": [{"filename": "a.jpg", "sentences": ["a dog"]}]}', r"images\[0\]: .*objects with `raw`"),
        ('{"images": [{"filename": "../a.jpg", "sentences": []}]}', r"images\[0\]: an image must lie under --images"),
        ('{"images": [{"filename": "a.jpg", "filepath": "..", "sentences": []}]}', r"images\[0\]: an image must lie"),
        ('{"images": [{"filename": "a.jpg", "split": "a/b", "sentences": []}]}', r"images\[0\]: a split must be"),
    ],
)
def test_a_json_that_is_not_karpathys_is_told_where(images: Path, text: str, message: str) -> None:
    (images.parent / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        pack("karpathy", images.parent / "x.json", RowOptions(images), images.parent / "out")


# --- tables ----------------------------------------------------------------------------------------------------------


def pack_table(images: Path, text: str | bytes, **options: Any) -> PackReport:
    source = images.parent / "table"
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    return pack("csv", source, RowOptions(images, **options), images.parent / "out", overwrite=True)


def captions_of(report: PackReport) -> dict[str, list[str]]:
    pairs_of(report)
    shards = ShardSet.open([str(path) for path in report.shards])
    records = [json.loads(shards.extra(row, "json") or b"") for row in range(shards.images)]
    return {record["id"]: record["captions"] for record in records}


def test_flickr30ks_results_are_read_with_a_bar_and_its_broken_line_is_counted(images: Path) -> None:
    text = (
        "image_name| comment_number| comment\n"
        f'{name_of(0)}| 0| Two "friends" .\n'
        f"{name_of(2)}| 4   A line without its second bar .\n"
        f'{name_of(0)}| 1| " Young " guys .\n'
    )
    report = pack_table(images, text, separator="|")
    assert captions_of(report) == {name_of(0): [' Two "friends" .', ' " Young " guys .']}
    assert report.left_out == [
        (name_of(2), "columns differ from the header's: line 3 has 2, the header 3"),
    ]


def test_quotes_are_read_as_the_csv_module_does_and_on_request_as_plain_signs(images: Path) -> None:
    quoted = f'image,caption\n{name_of(0)},"one, two\nand ""three"""\n{name_of(2)},plain "x"\n'
    assert captions_of(pack_table(images, quoted)) == {
        name_of(0): ['one, two\nand "three"'],
        name_of(2): ['plain "x"'],
    }
    open_quote = f'image,caption\n{name_of(0)},"12 inches of snow\n{name_of(2)},b\n'
    with pytest.raises(DataError, match=r"table, the record that begins in line 2: .*--no-quotes"):
        pack_table(images, open_quote)
    assert len(captions_of(pack_table(images, open_quote, quotes=False))) == 2


def test_blank_captions_and_lines_without_an_image_are_counted_by_line(images: Path) -> None:
    text = f"image,caption\n{name_of(0)},a\n\n{name_of(0)}, \n,who\n{name_of(2)},\n"
    report = pack_table(images, text)
    assert captions_of(report) == {name_of(0): ["a"]}
    assert report.left_out == [
        (name_of(0), "blank caption: line 4"),
        ("a line", "no image named: line 5"),
        (name_of(2), "blank caption: line 6"),
        (name_of(2), "no caption"),
    ]


def test_an_absolute_path_below_the_folder_is_the_same_image(images: Path) -> None:
    text = f"image,caption\n{images / name_of(0)},a\n./{name_of(0)},b\n"
    assert captions_of(pack_table(images, text)) == {name_of(0): ["a", "b"]}


def test_columns_can_be_named_and_the_usual_names_are_found_in_any_case(images: Path) -> None:
    text = f"Caption,picture,Image\nwrong,{name_of(0)},{name_of(2)}\n"
    assert captions_of(pack_table(images, text)) == {name_of(2): ["wrong"]}
    assert captions_of(pack_table(images, text, image_column="picture")) == {name_of(0): ["wrong"]}


def test_a_table_without_splits_goes_into_the_split_that_is_asked_for(images: Path) -> None:
    assert pack_table(images, f"image,caption\n{name_of(0)},a\n", default_split="val").images == {"val": 1}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "line 1: expected a header with a column for the image .*it has nothing"),
        ("x.jpg,a dog\n", {}, "line 1: expected a header with a column for the image.*'x.jpg', 'a dog'"),
        ("image;caption\n", {}, "column for the image .*'image;caption'.*--separator"),
        ("image,words\n", {}, "column for the caption .*--caption-column"),
        ("image,caption\n", {"image_column": "path"}, r"column for the image \(path\)"),
        ("image,caption\n", {"split_column": "fold"}, r"column for the split \(fold\)"),
        ("url,caption\n", {}, "URLs are not fetched here"),
        ("image,caption\nhttps://x/a.jpg,a\n", {}, "line 2: .*is a URL"),
        ("image,caption\n/etc/hostname,a\n", {}, "line 2: an image must lie under --images"),
        ('image,caption\n"a\n",a\nb/../../c.jpg,a\n', {}, "line 4: an image must lie under --images"),
        ("image,caption,split\na.jpg,a,../x\n", {}, "line 2: a split must be a plain name"),
        ("image,caption,split\na.jpg,a,train\na.jpg,b,val\n", {}, "line 3: a.jpg is in split val, .* by .*line 2"),
        ("image,caption\n", {"separator": "||"}, "--separator must be one character"),
        (b"image,caption\na.jpg,gr\xfcn\n", {}, "line 2: expected UTF-8"),
        ("image,caption\n", {}, "has no row with an image and a caption"),
        ("image,caption\na.jpg,\n", {}, "has no row with an image.*\n.*left out: 2 .*\n.*a.jpg: blank caption: line 2"),
    ],
)
def test_a_wrong_table_is_told_by_line(images: Path, text: str | bytes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack_table(images, text, **options)
    assert not (images.parent / "out").exists()


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_besides_pairs_is_named_and_counted(images: Path) -> None:
    write_folder(images.parent)
    (images / "train" / "a.0.txt").unlink()
    (images / "train" / "b.1.txt").write_bytes(b"gr\xfcn")
    (images / "train" / "a.2.txt").write_text("\n \n")
    (images / "train" / "lonely.txt").write_text("a text")
    (images / "train" / "table.parquet").touch()
    (images / "train" / ".DS_Store").touch()
    (images / "top.jpg").write_bytes(b"")
    (images / "top.txt").write_text("in no split")
    (images / ".cache").mkdir()
    (images / "loop").symlink_to(images, target_is_directory=True)

    report = pack("folder", None, RowOptions(images, split_folders=True), images.parent / "out")

    assert report.images == {"test": 1, "train": 1, "val": 1}
    assert dict(report.left_out) == {
        "train/a.0.jpg": "an image without a .txt",
        "train/b.1.PNG": "a text that is not UTF-8: invalid start byte",
        "train/a.2.jpg": "no caption",
        "train/lonely.txt": "a .txt without an image",
        "train/table.parquet": "neither an image nor a .txt",
        "train/.DS_Store": "a hidden file",
        "top.jpg": "in no folder of a split",
        ".cache": "a hidden folder",
        "loop": "a link to a folder",
    }


def test_a_folder_takes_no_input_file_and_the_other_formats_need_one(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--input is not for --format folder"):
        pack("folder", tmp_path / "rows.csv", RowOptions(images), tmp_path / "out")
    with pytest.raises(DataError, match="--input must be a csv file; there is no file named"):
        pack("csv", None, RowOptions(images), tmp_path / "out")


def test_shards_are_not_packed_onto_a_url(images: Path) -> None:
    form, source, _ = write_jsonl(images.parent)
    with pytest.raises(DataError, match="--output must be a folder on a disk; got memory://x"):
        pack(form, source, RowOptions(images), "memory://x")


def test_the_command_line_packs_a_table_and_says_what_is_left_out(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images.parent / "results.csv").write_text(f"file|words\n{name_of(0)}|a dog\n{name_of(0)}|\ngone.jpg|b\n")
    options = ["--separator", "|", "--image-column", "file", "--caption-column", "words", "--default-split", "dev"]
    files = ["--input", str(images.parent / "results.csv"), "--images", str(images), "--output", f"{images.parent}/out"]
    assert main(["pack", "--format", "csv", *files, *options, "--reasons", "1"]) == 0
    said = capsys.readouterr().out
    assert "dev: 1 images, 1 captions, 1 shards" in said
    assert "left out: 2 (blank caption 1, no such image file 1)" in said
    assert f"{name_of(0)}: blank caption: line 3" in said and "and 1 more (--reasons N)" in said
