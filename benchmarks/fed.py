"""One question: does a training step wait for its data?

    python -m benchmarks.fed                                            base, 256 pairs, JPEGs of 480 pixels
    python -m benchmarks.fed --config tiny --pairs 32 --side 96 --images 64 --steps 6 --every 2

For each decoder two figures of one machine, from the same shards (loader_data.py): pairs a second of the loader alone,
its batches brought to the device and summed there, and a whole run of `python -m mvle.train` of so many steps. Of the
run the rows after the first are counted, as `metrics.jsonl` has them: the share of the time that steps waited for data,
and pairs a second. Words are a small vocabulary of the captions' own, so that a step is rather shorter than with real
ones, and waits rather more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from mvle.config import Config, load_config
from mvle.data.config import open_shards
from mvle.data.errors import DataError
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.tokenizer import all_captions, train_bpe
from mvle.engine.metrics import read_rows
from mvle.train import FINISHED
from mvle.train import main as train

from .loader_data import PhotoShards, make_shards
from .measure import wait

UNTIMED = 5  # batches that a loader makes before any is counted: those that it prepares ahead, and one more


def overrides(shards: PhotoShards, folder: Path, pairs: int, steps: int, every: int, decoder: str) -> list[str]:
    """What a recipe needs to run from these shards, and to leave nothing else behind."""
    return [
        f"data.train={json.dumps(list(shards.paths))}",
        *("data.val=null", "evaluation.every=0", f"data.decoder={decoder}"),
        *("tokenizer.kind=bpe", "tokenizer.vocabulary=400"),
        *(f"batch.total={pairs}", f"schedule.steps={steps}", f"metrics.every={every}"),
        *(f"checkpoint.every={steps}", f"run.folder={folder}"),
    ]


def loader_rate(config: Config, device: torch.device, batches: int) -> tuple[float, str]:
    """(pairs a second of the loader alone, the decoder and why). Raises DataError where it cannot be had."""
    shards = open_shards(config.data, "train")
    loader = Loader(
        config.data,
        SamplingPlan.build(config, shards),
        shards,
        train_bpe(all_captions(shards), 400),
        image_size=config.model.image.size,
        max_tokens=config.model.text.max_tokens,
        row_multiple=config.kernels.row_multiple,
        steps=UNTIMED + batches,
        pin_memory=device.type == "cuda",
        device=device,
    )
    total = torch.zeros((), dtype=torch.int64, device=device)
    with loader:
        for step, batch in enumerate(loader):
            if step == UNTIMED:
                wait(device)
                start = time.perf_counter()
            total += batch.to(device).images.sum()
    wait(device)
    return batches * config.batch.total / (time.perf_counter() - start), f"{loader.decoder.name}: {loader.decoder.why}"


def run_rates(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """What a run says of itself after its first row. Raises RuntimeError with its output where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train(list(arguments))
    if code != FINISHED:
        raise RuntimeError(f"the run ended with {code}:\n{said.getvalue()}")
    rows = read_rows(folder / "metrics.jsonl", "train")[1:]
    if not rows:
        raise RuntimeError("the run has one row alone: more steps, or rows more often.")
    names = ("data_wait", "pairs/s", "batches_ready", "decode_seconds", "read_seconds")
    return {name: mean(row[name] for row in rows) for name in names}


def fed(
    config: str,
    shards: PhotoShards,
    folder: Path,
    pairs: int,
    steps: int,
    every: int,
    decoders: Sequence[str],
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row a decoder: what the loader gives, and how a run waits for it, or the reason that there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for decoder in decoders:
        row: dict[str, Any] = {"config": config, "pairs": pairs, "side": shards.side, "decoder": decoder}
        place = folder / decoder
        arguments = [*overrides(shards, place, pairs, steps, every, decoder), *more]
        try:
            stated = load_config(config, arguments)
            row["threads"] = stated.data.threads
            row["loader_pairs_per_second"], row["why"] = loader_rate(stated, device, steps)
        except DataError as error:
            rows.append(row | {"skipped": str(error)})
            continue
        rows.append(row | run_rates([config, *arguments], place))
    return rows


def told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a row."""
    lines = []
    for row in rows:
        head = f"{row['config']}, {row['pairs']} pairs of {row['side']} px, {row['decoder']}"
        if "skipped" in row:
            lines.append(f"{head}: skipped, {row['skipped']}")
            continue
        alone, step = row["loader_pairs_per_second"], row["pairs/s"]
        lines.append(
            f"{head}, {row['threads']} threads: loader alone {alone:,.0f} pairs/s, run {step:,.0f} pairs/s "
            f"({alone / step:.1f} times), waits for data {row['data_wait']:.2%} of the time"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether a training step waits for its data.")
    parser.add_argument("--config", default="base")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--side", type=int, default=480, help="shorter side of the JPEGs, pixels")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps a row of metrics.jsonl")
    parser.add_argument("--decoders", nargs="+", default=["dali", "torch"])
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fed-") as name:
        folder = Path(name)
        shards = make_shards(folder / "photos", options.side, options.images, min(64, options.images))
        where = (options.pairs, options.steps, options.every, options.decoders, options.more)
        rows = fed(options.config, shards, folder, *where)
    print("\n".join(told(rows)))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
