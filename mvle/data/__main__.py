"""`python -m mvle.data pack | index | inspect | shapes | wds2idx`: from files and captions to shards that train."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .decode import MAX_PIXELS
from .errors import DataError
from .left_out import left_out_lines
from .pack import FORMATS
from .rows_table import CAPTION_COLUMNS, IMAGE_COLUMNS

EPILOG = """from files to training:
  python -m mvle.data pack --format jsonl --input pairs.jsonl --images DIR --output data/mine
  python -m mvle.data index data/mine/*.tar
  python -m mvle.data inspect data/mine/*.tar
  python -m mvle.train CONFIG 'data.train=data/mine/train-*.tar' 'data.val=data/mine/val-*.tar'

an input row: {"image": "file under DIR", "captions": ["...", "..."], "split": "train"}
other inputs (karpathy json, csv, tsv, folders), shards made elsewhere, and URLs: docs/data.md"""


def parser() -> argparse.ArgumentParser:
    """The command line of all programs."""
    top = argparse.ArgumentParser(
        "python -m mvle.data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    programs = top.add_subparsers(dest="program", required=True, metavar="PROGRAM")

    pack = programs.add_parser("pack", help="image files and captions -> tar shards")
    pack.add_argument("--format", choices=FORMATS, default="jsonl", help="form of the input (default: jsonl)")
    pack.add_argument("--input", metavar="FILE", help="the rows; none for --format folder")
    pack.add_argument("--images", required=True, metavar="DIR", help="folder that the rows' image paths start from")
    pack.add_argument("--output", required=True, metavar="DIR", help="folder for SPLIT-00000.tar, ...")
    pack.add_argument("--split", metavar="NAME", help="pack the rows of this split alone")
    pack.add_argument("--default-split", default="train", metavar="NAME", help="of rows without one (default: train)")
    pack.add_argument("--shard-mb", type=int, default=256, metavar="N", help="largest shard, MiB (default: 256)")
    pack.add_argument("--overwrite", action="store_true", help="replace shards of the same split")
    pack.add_argument("--reasons", type=int, default=20, metavar="N", help="left-out rows to list (default: 20)")
    karpathy = pack.add_argument_group("karpathy")
    karpathy.add_argument("--restval", default="train", metavar="NAME", help="split for restval (default: train)")
    table = pack.add_argument_group("csv and tsv")
    table.add_argument("--separator", metavar="C", help="what parts columns (default: , or for tsv a tab)")
    table.add_argument("--no-quotes", action="store_true", help="a quote is a plain sign")
    table.add_argument("--image-column", metavar="NAME", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    table.add_argument("--caption-column", metavar="NAME", help=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    table.add_argument("--split-column", metavar="NAME", help="default: split, where there is one")
    folder = pack.add_argument_group("folder")
    folder.add_argument("--split-folders", action="store_true", help="the first folder of a path is its split")
    pack.set_defaults(run=run_pack)

    index = programs.add_parser("index", help="decode every image once and write the index beside each shard")
    index.add_argument("shards", nargs="+", metavar="SHARD", help="tars: paths, URLs, globs, {000..127}.tar")
    index.add_argument(
        "--caption-field",
        metavar="NAME",
        help="JSON field with the captions (a.b goes into objects); txt: the text file is one caption; txt-lines: one "
        "a line (default: JSON captions, caption, then txt)",
    )
    index.add_argument("--index-folder", metavar="DIR", help="for shards that nothing can be written beside")
    index.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="leave out larger images")
    index.add_argument("--no-verify", action="store_true", help="read headers alone: faster, and damage is met later")
    index.add_argument("--from-wds2idx", action="store_true", help="where members are stands in SHARD.idx (wds2idx)")
    index.add_argument("--again", action="store_true", help="make an index anew that is there and up to date")
    index.add_argument("--workers", type=int, metavar="N", help="shards at once (default: cores, 1 for a few MiB)")
    index.add_argument("--threads", type=int, metavar="N", help="decoding threads of each (default: 2 alone, else 1)")
    index.add_argument("--reasons", type=int, default=20, metavar="N", help="left-out images to list (default: 20)")
    index.set_defaults(run=run_index)

    offsets = programs.add_parser("wds2idx", help="write the index that DALI's own WebDataset reader takes, SHARD.idx")
    offsets.add_argument("shards", nargs="+", metavar="SHARD", help="tar files on a disk, globs, {000..127}.tar")
    offsets.set_defaults(run=run_wds2idx)

    inspect = programs.add_parser("inspect", help="counts, sizes, caption lengths, what was left out, a contact sheet")
    inspect.add_argument("shards", nargs="+", metavar="SHARD", help="indexed tar files, patterns, or shapes:SPLIT")
    inspect.add_argument("--index-folder", metavar="DIR", help="where indexes are that do not lie beside their shards")
    inspect.add_argument("--sheet", default="contact_sheet.png", metavar="FILE", help="where the picture goes")
    inspect.add_argument("--reasons", type=int, default=20, metavar="N", help="left-out images to list (default: 20)")
    inspect.set_defaults(run=run_inspect)

    shapes = programs.add_parser("shapes", help="draw the demo set (training on shapes:train does so by itself)")
    shapes.add_argument("--folder", default="data/shapes", metavar="DIR", help="data.shapes_folder")
    shapes.add_argument("--captions", choices=["sentence", "short"], default="sentence", help="data.shapes_captions")
    shapes.set_defaults(run=run_shapes)
    return top


def run_pack(options: argparse.Namespace) -> None:
    """Pack, and say what was written and what was left out."""
    from .pack import pack
    from .rows import RowOptions

    rows = RowOptions(
        Path(options.images), options.default_split, options.restval, options.separator, not options.no_quotes,
        options.image_column, options.caption_column, options.split_column, options.split_folders,
    )  # fmt: skip
    report = pack(
        options.format, options.input, rows, options.output, options.split, options.shard_mb * 2**20, options.overwrite
    )
    for split, images in report.images.items():
        shards = [path for path in report.shards if path.name.startswith(f"{split}-")]
        size = sum(path.stat().st_size for path in shards) / 2**20
        print(f"{split}: {images:,} images, {report.captions[split]:,} captions, {len(shards)} shards, {size:,.1f} MiB")
    for note in report.notes:
        print(note)
    for split, count in report.unasked.items():
        print(f"{split}: {count:,} rows were not asked for (--split)")
    print("\n".join(left_out_lines(report.left_out, options.reasons, "--reasons N")))
    print(f"Next: python -m mvle.data index {options.output}/*.tar")


def run_index(options: argparse.Namespace) -> None:
    """Index every shard that needs it, and list what was left out. A shard that cannot be indexed does not keep the
    others from it; at the end all such are named (DataError)."""
    from .index_many import IndexOptions, index_many
    from .patterns import expand_pattern

    if any(n is not None and n < 1 for n in (options.workers, options.threads)):
        raise DataError(f"--workers and --threads must be at least 1; got {options.workers}, {options.threads}.")
    started, made, size, failed = time.perf_counter(), 0, 0, list[str]()
    left_out: list[tuple[str, str]] = []
    paths = [path for pattern in options.shards for path in expand_pattern(pattern)]
    how = IndexOptions(
        options.caption_field, options.max_pixels, not options.no_verify, options.index_folder,
        options.from_wds2idx, options.workers, options.threads, options.again,
    )  # fmt: skip
    for done in index_many(paths, how):
        if done.index is None:
            failed.append(f"    {done.path}: {done.error}")
            print(f"{done.path}: not indexed", flush=True)
            continue
        index = done.index
        counts = f"{index.images:,} images, {index.pairs:,} captions, {len(index.left_out):,} left out"
        print(f"{done.path}: {counts} ({'up to date' if done.kept else f'{done.seconds:.1f} s'})", flush=True)
        left_out += [(f"{done.path.name} {key}", reason) for key, reason in index.left_out]
        if not done.kept:
            made, size = made + index.images + len(index.left_out), size + index.header["size"]
    seconds = time.perf_counter() - started
    if made and len(paths) > 1:
        print(
            f"{made:,} images in {seconds:.1f} s: {made / seconds:,.0f} a second, {size / seconds / 2**20:,.0f} MiB/s"
        )
    print("\n".join(left_out_lines(left_out, options.reasons, "--reasons N")))
    if failed:
        raise DataError("\n".join([f"{len(failed)} of {len(paths)} shards were not indexed:", *sorted(failed)]))


def run_wds2idx(options: argparse.Namespace) -> None:
    """Write SHARD.idx beside each shard."""
    from .patterns import expand_pattern
    from .wds2idx import write_wds2idx

    for pattern in options.shards:
        for path in expand_pattern(pattern):
            if not isinstance(path, Path):
                raise DataError(f"wds2idx takes files on a disk; got {path}.")
            place, samples = write_wds2idx(path)
            print(f"{place}: {samples:,} samples")


def run_inspect(options: argparse.Namespace) -> None:
    """Print the report and write the contact sheet."""
    from .inspect import contact_sheet, describe
    from .shards import ShardSet

    shards = ShardSet.open(options.shards, index_folder=options.index_folder)
    print(describe(shards, options.reasons))
    print(f"contact sheet: {contact_sheet(shards, options.sheet)}")


def run_shapes(options: argparse.Namespace) -> None:
    """Draw every split."""
    from .shapes import SPLITS, shape_shards

    for split in sorted(SPLITS):
        paths = shape_shards(split, options.folder, options.captions)
        print(f"{split}: {SPLITS[split][0]:,} pictures in {len(paths)} shards, {paths[0].parent}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where the data cannot be used."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (DataError, OSError) as error:
        print(f"mvle.data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
