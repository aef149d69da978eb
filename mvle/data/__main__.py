"""`python -m mvle.data pack | index | inspect | shapes`: from image files and captions to shards that train."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from .decode import MAX_PIXELS
from .errors import DataError

EPILOG = """from files to training:
  python -m mvle.data pack --format jsonl --input pairs.jsonl --images DIR --output data/mine
  python -m mvle.data index data/mine/*.tar
  python -m mvle.data inspect data/mine/*.tar
  python -m mvle.train CONFIG 'data.train=data/mine/train-*.tar' 'data.val=data/mine/val-*.tar'

an input row: {"image": "file under DIR", "captions": ["...", "..."], "split": "train"}"""


def parser() -> argparse.ArgumentParser:
    """The command line of all four programs."""
    top = argparse.ArgumentParser(
        "python -m mvle.data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    programs = top.add_subparsers(dest="program", required=True, metavar="PROGRAM")

    pack = programs.add_parser("pack", help="image files and captions -> tar shards")
    pack.add_argument("--format", choices=["jsonl"], default="jsonl", help="form of the input (default: jsonl)")
    pack.add_argument("--input", required=True, metavar="FILE", help="the rows")
    pack.add_argument("--images", required=True, metavar="DIR", help="folder that the rows' image paths start from")
    pack.add_argument("--output", required=True, metavar="DIR", help="folder for SPLIT-00000.tar, ...")
    pack.add_argument("--split", metavar="NAME", help="pack the rows of this split alone")
    pack.add_argument("--shard-mb", type=int, default=256, metavar="N", help="largest shard, MiB (default: 256)")
    pack.add_argument("--overwrite", action="store_true", help="replace shards of the same split")
    pack.set_defaults(run=run_pack)

    index = programs.add_parser("index", help="decode every image once and write the index beside each shard")
    index.add_argument("shards", nargs="+", metavar="SHARD", help="tar files, globs, or braces such as {000..127}.tar")
    index.add_argument("--caption-field", metavar="NAME", help="JSON field with the captions, or txt (default: look)")
    index.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="leave out larger images")
    index.add_argument("--threads", type=int, default=2, metavar="N", help="decoding threads (default: 2)")
    index.add_argument("--reasons", type=int, default=20, metavar="N", help="left-out images to list (default: 20)")
    index.set_defaults(run=run_index)

    inspect = programs.add_parser("inspect", help="counts, sizes, caption lengths, what was left out, a contact sheet")
    inspect.add_argument("shards", nargs="+", metavar="SHARD", help="indexed tar files, patterns, or shapes:SPLIT")
    inspect.add_argument("--sheet", default="contact_sheet.png", metavar="FILE", help="where the picture goes")
    inspect.add_argument("--reasons", type=int, default=20, metavar="N", help="left-out images to list (default: 20)")
    inspect.set_defaults(run=run_inspect)

    shapes = programs.add_parser("shapes", help="draw the demo set (training on shapes:train does so by itself)")
    shapes.add_argument("--folder", default="data/shapes", metavar="DIR", help="data.shapes_folder")
    shapes.add_argument("--captions", choices=["sentence", "short"], default="sentence", help="data.shapes_captions")
    shapes.set_defaults(run=run_shapes)
    return top


def run_pack(options: argparse.Namespace) -> None:
    """Pack, and say what was written and what was missing."""
    from .pack import pack_jsonl

    report = pack_jsonl(
        options.input, options.images, options.output, options.split, options.shard_mb * 2**20, options.overwrite
    )
    for split, images in report.images.items():
        shards = [path for path in report.shards if path.name.startswith(f"{split}-")]
        size = sum(path.stat().st_size for path in shards) / 2**20
        print(f"{split}: {images:,} images, {report.captions[split]:,} captions, {len(shards)} shards, {size:,.1f} MiB")
    if report.missing:
        print(f"{len(report.missing):,} image files are missing and were left out:")
        print("\n".join(f"    {name}" for name in report.missing[:20]))
        if len(report.missing) > 20:
            print(f"    and {len(report.missing) - 20:,} more")
    print(f"Next: python -m mvle.data index {options.output}/*.tar")


def run_index(options: argparse.Namespace) -> None:
    """Index every shard, and list what was left out."""
    from .indexing import index_shard
    from .patterns import expand_pattern

    listed = 0
    for path in [path for pattern in options.shards for path in expand_pattern(pattern)]:
        started = time.perf_counter()
        index = index_shard(path, options.caption_field, options.max_pixels, options.threads)
        seconds = time.perf_counter() - started
        print(
            f"{path}: {index.images:,} images, {index.pairs:,} captions, {len(index.left_out):,} left out "
            f"({seconds:.1f} s)",
            flush=True,
        )
        for key, reason in index.left_out[: max(options.reasons - listed, 0)]:
            print(f"    {key}: {reason}")
        listed += len(index.left_out)
    if listed > options.reasons:
        print(f"{listed - options.reasons:,} more left out are not shown (--reasons N; or inspect)")


def run_inspect(options: argparse.Namespace) -> None:
    """Print the report and write the contact sheet."""
    from .inspect import contact_sheet, describe
    from .shards import ShardSet

    shards = ShardSet.open(options.shards)
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
