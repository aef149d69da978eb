"""One question: how many images a second come out of a loader on a CPU, ours beside others, and what do they take?

    python -m benchmarks.loader                        all sizes, within 20 minutes of two free cores; a line a round
    python -m benchmarks.loader --write                the same, into benchmarks/results/loader_cpu.json
    python -m benchmarks.loader_report                 the table of docs/performance.md out of that

JPEGs of 224, 480 and 1024 pixels on their shorter side (loader_data.py), windows of 224 pixels out of them. Loaders and
how they are set up: peers/loaders.py; one that is missing here is skipped with the reason. They are opened one after
the other, once a round: none computes ahead while another is timed. Each makes some batches untimed, so that all of its
workers are at work, then batches are counted for some seconds. What is reported is the median over rounds; ratios are
of neighbours of one round, with quartiles. Processes of a loader are counted in its CPU time.

It also reports what the plan costs a pair: order, caption, window and random numbers of one pair, without its image.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet

from .loader_data import PhotoShards, make_shards
from .loader_report import RESULT, written
from .measure import Ratio
from .peers.loaders import LOADERS, PILLOW, TORCHVISION, Missing, Open, Setup
from .report import about

SIDES = (224, 480, 1024)
IMAGES = {224: 2048, 480: 1024, 1024: 512}
DISTINCT = 64
PACKAGES = ("torchvision", "pillow", "numpy", "webdataset", "nvidia-dali-cuda130")


@dataclass(frozen=True)
class Turn:
    """One loader in one round."""

    images: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    @property
    def cpu_share(self) -> float:
        """Of all cores."""
        return self.cpu_seconds / self.seconds / (os.cpu_count() or 1)


def cpu_seconds() -> float:
    """Of this process, its threads, and the processes that it started and that live (Linux; elsewhere its own)."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.is_file():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def take_turn(loader: Open, shards: PhotoShards, setup: Setup, seconds: float, untimed: int) -> Turn:
    """Open, take `untimed` batches, count for some seconds (two batches at least), close. Raises Missing."""
    batches = loader(shards, setup)
    try:
        for _ in range(untimed):
            images = next(batches)
        if images.dtype != torch.uint8 or len(images) != setup.batch:
            raise RuntimeError(f"expected {setup.batch} uint8 images; got {images.dtype} {tuple(images.shape)}.")
        taken, cpu, start = 0, cpu_seconds(), time.perf_counter()
        while (now := time.perf_counter() - start) < seconds or taken < 2:
            next(batches)
            taken += 1
        return Turn(taken * setup.batch, now, cpu_seconds() - cpu)
    finally:
        batches.close()  # type: ignore[attr-defined]
        del batches
        gc.collect()  # workers of a DataLoader end with it


def measure(
    shards: PhotoShards, setup: Setup, rounds: int, seconds: float, untimed: int, loaders: Mapping[str, Open] = LOADERS
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """(turns of each loader, why others have none). Every other round goes backwards."""
    turns: dict[str, list[Turn]] = {}
    missing: dict[str, str] = {}
    for number in range(rounds):
        names = [name for name in loaders if name not in missing]
        for name in names[:: -1 if number % 2 else 1]:
            try:
                turn = take_turn(loaders[name], shards, setup, seconds, untimed)
            except Missing as why:
                missing[name] = str(why)
                print(f"{shards.side} px  {name:<26} skipped: {why}", flush=True)
                continue
            turns.setdefault(name, []).append(turn)
            print(f"{shards.side} px  {name:<26} {turn.rate:8,.0f} images/s  CPU {turn.cpu_share:.0%}", flush=True)
    return {name: turns[name] for name in loaders if name in turns}, missing


def rows_of(side: int, turns: Mapping[str, Sequence[Turn]]) -> Iterator[dict[str, Any]]:
    """A row a loader: medians, and ratios to both loaders of webdataset where they were measured."""
    for name, own in turns.items():
        row: dict[str, Any] = {
            "side": side,
            "loader": name,
            "images_per_second": median(turn.rate for turn in own),
            "cpu_share": median(turn.cpu_share for turn in own),
            "images_per_cpu_second": median(turn.images / turn.cpu_seconds for turn in own),
            "rates": [round(turn.rate, 1) for turn in own],
        }
        for key, reference in (("against_pillow", PILLOW), ("against_torchvision", TORCHVISION)):
            if reference in turns:
                row[key] = asdict(Ratio.of([1 / t.rate for t in turns[reference]], [1 / t.rate for t in own]))
        yield row


def plan_step(shards: PhotoShards, pairs: int = 256) -> Callable[[], object]:
    """Draws the pairs of one step after the other."""
    plan = SamplingPlan(ShardSet.open(shards.paths), seed=0, batch_total=pairs, slots=64)
    steps = count()
    return lambda: plan.draws(plan.positions(next(steps)))


def plan_cost(shards: PhotoShards, pairs: int = 256, steps: int = 50) -> float:
    """Seconds a pair that the plan takes, median over steps of `pairs` pairs, the first two not counted."""
    step = plan_step(shards, pairs)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) / pairs)
    return median(times[2:])


def versions() -> dict[str, str | None]:
    """Of what takes part; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """As Linux calls it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def run(folder: Path, sides: Sequence[int], setup: Setup, rounds: int, seconds: float, images: int | None) -> Any:
    """Everything, as it goes to the results. images: of each size, None: as many as take a while."""
    torch.set_num_threads(1)  # what decodes has threads of its own, and a DataLoader's worker has one
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    sizes, pair = {}, 0.0
    for side in sides:
        number = images or IMAGES.get(side, 512)
        shards = make_shards(folder / str(side), side, number, min(DISTINCT, number))
        sizes[str(side)] = {"images": number, "mean_bytes": round(shards.mean_bytes)}
        pair = plan_cost(shards)
        turns, missing = measure(shards, setup, rounds, seconds, untimed=3 * setup.workers)
        rows += rows_of(side, turns)
        skipped |= missing
    where = about("cpu") | {"cpu": cpu_model(), "versions": versions()}
    asked = asdict(setup) | {"rounds": rounds, "seconds": seconds, "data": sizes}
    return {"about": where, "setup": asked, "rows": rows, "plan_seconds_a_pair": pair, "skipped": skipped}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Images a second of loaders on a CPU.")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="shorter sides of the JPEGs, pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each loader in each round, start not included")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of each loader")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="side of the windows, pixels")
    parser.add_argument("--images", type=int, help="of each size")
    parser.add_argument("--write", action="store_true", help=f"into benchmarks/results/{RESULT.name}")
    options = parser.parse_args(arguments)
    setup = Setup(options.batch, options.workers, options.size)
    with tempfile.TemporaryDirectory(prefix="photos-") as folder:
        result = run(Path(folder), options.sides, setup, options.rounds, options.seconds, options.images)
    print(written(result))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote benchmarks/results/{RESULT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
