"""Write the page of a run: `python -m mvle.report RUN [--data SHARDS ...]`.

RUN/report.html holds loss curves, the tables of evaluation.json, rebuilt pictures, filled words and retrieval examples,
and needs no other file. RUN/reconstructions.png is a small sheet of the rebuilt pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.remote import shown
from .evaluate import add_checkpoint_arguments

if TYPE_CHECKING:
    from .data.shards import ShardSet
    from .inference import OpenedRun

SHEET_ROWS = 6


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m mvle.report", description=__doc__.split("\n", 1)[0])
    made.add_argument("run", metavar="RUN", help="folder of a run")
    made.add_argument(
        "--data", nargs="+", metavar="SHARDS", help="shards (default: data.test of the run, else data.val)"
    )
    made.add_argument(
        "--pairs", type=int, metavar="N", help="images that retrieval searches (default: evaluation.pairs)"
    )
    made.add_argument("--rows", type=int, default=8, help="pairs in the sections of pictures and of words")
    add_checkpoint_arguments(made)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: run.device of the run")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a run or data that cannot be used."""
    options = parser().parse_args(arguments)
    from .config import ConfigError
    from .data.errors import DataError
    from .engine.checkpoint import CheckpointError
    from .evaluation.split import SplitError
    from .inference import RunError, open_run

    try:
        run = open_run(options.run, options.device, options.checkpoint, options.weights)
        print(f"page: {write_report(run, options)}")
    except (RunError, ConfigError, DataError, CheckpointError, SplitError, OSError) as error:
        print(f"mvle.report: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(run: OpenedRun, options: argparse.Namespace) -> Path:
    """Write report.html and, where pictures were rebuilt, reconstructions.png; returns the page's path."""
    from .engine.metrics import read_rows
    from .engine.run import RunFolder, write_text
    from .evaluate import default_data, open_data
    from .evaluation.split import Split, low_ratio
    from .reporting.gather import gather
    from .reporting.page import page
    from .reporting.sheet import write_sheet

    folder = RunFolder(run.folder)
    patterns = options.data or default_data(run)
    shards = open_data(run, patterns)
    pairs = run.config.evaluation.pairs if options.pairs is None else options.pairs
    shown = gather(run, Split(run.config, shards, run.tokenizer, pairs), rows=options.rows)
    rows = read_rows(folder.metrics) if folder.metrics.is_file() else []
    title = f"{run.folder.name}: masked vision-and-language pre-training"
    write_text(
        folder.report, page(title, facts(run, shards, patterns, rows), rows, figures(run), shown, low_ratio(run.config))
    )
    if shown.rebuilt:
        write_sheet(shown.rebuilt[:SHEET_ROWS], folder.path / "reconstructions.png")
    return folder.report


def figures(run: OpenedRun) -> dict[str, Any]:
    """evaluation.json, if it speaks of these weights (`Stored.identity`); {} otherwise."""
    path = run.folder / "evaluation.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("checkpoint") == run.identity else {}


def facts(
    run: OpenedRun, shards: ShardSet, patterns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    """What the page says of the run, at its top."""
    config = run.config
    image = config.model.image
    parameters = sum(p.numel() for p in run.model.parameters())
    ratio = config.masking.image_ratio
    share = f"{ratio[0]:g} to {ratio[1]:g}" if isinstance(ratio, tuple) else f"{ratio:g}"
    out = [
        ("steps", f"{run.step:,} of {config.schedule.steps:,}"),
        ("pairs seen", f"{run.meta.get('pairs_seen', run.step * config.batch.total):,}"),
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("weights", "EMA (slow average)" if run.weights == "ema" else "as trained"),
        ("images", f"{image.size} px, patches of {image.patch}"),
        ("masked", f"{share} of {config.masking.cell}-px cells, {config.masking.text_ratio:g} of the words"),
        ("trained on", shown(" ".join(config.data.patterns("train")))),
        ("shown here", f"{shown(' '.join(patterns))} ({shards.images:,} images)"),
    ]
    if config.approximations:
        out.append(("approximations", "; ".join(config.approximations)))
    speeds = [row["pairs/s"] for row in rows if row["kind"] == "train" and row.get("pairs/s")]
    if speeds:
        out.append(("speed", f"{sorted(speeds)[len(speeds) // 2]:,.0f} pairs/s (median)"))
    return out


if __name__ == "__main__":
    sys.exit(main())
