"""One question: how long is a training step (forward, backward, clipped optimizer step), and what does it take?

    pytest benchmarks/test_step.py --benchmark-only                                 a table at the end
    pytest benchmarks/test_step.py --benchmark-only --benchmark-json=run.json       python -m benchmarks.report run.json

Shapes, providers and how steps are measured: shapes.py, providers.py, measure.py. Every row is made in turn with the
plain step of its shape and mode; read the ratio, not the times. The row of `plain` is plain against itself: the noise.
On a GPU the large shapes are measured, on a CPU the small ones; the table says what was left out.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from statistics import median
from typing import Any

import pytest
import torch

from mvle.model.model import MaskVLM

from .counts import count
from .measure import Ratio, Step, matmul_roof, parts_of, peak_memory, seconds
from .peers import Provider
from .providers import PROVIDERS, counts_ops, dtype_on, made, ours, parallel_on
from .report import about
from .shapes import SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = tuple(PROVIDERS)
MAIN = tuple(name for name in ALL if not name.startswith("without: "))
SWITCHES = tuple(name for name in ALL if name not in MAIN)
EAGER = tuple(name for name in MAIN if "compiled" not in name)  # compiling takes minutes
# (shape, mode, providers, rounds): what fits into 12 minutes of two cores, or into 5 of a GPU; the switches of vit-s-4
# are made where --only switches asks for them
ON_A_CPU = (
    ("tiny", "replace", ALL, 8),
    ("tiny", "drop", ("ours", "plain"), 8),
    ("tiny", "drop, late", ("ours", "plain"), 8),
    ("vit-s-4", "replace", EAGER, 4),
    ("vit-s-4", "drop", ("ours", "plain"), 4),
    ("vit-s-4", "drop, late", ("ours",), 4),
    ("vit-s-4", "replace", SWITCHES, 6),
    ("base-2", "replace", ("ours",), 3),
    ("base-2", "drop", ("ours",), 3),
)
ON_A_GPU = (
    ("base-64", "replace", ALL, 8),
    ("base-64", "drop", ALL, 10),
    ("base-256", "replace", MAIN, 10),
    ("base-256", "drop", MAIN, 10),
    ("base-256", "drop, late", ("ours", "ours, compiled"), 10),
    ("large-64", "replace", MAIN, 5),
    ("large-64", "drop", MAIN, 5),
)
WARM = 2  # steps before any is timed: the first makes the optimizer's moments, the second settles in what that left
ABOUT = about(DEVICE.type)  # now: the checkout may be another one when the run ends
ROWS = ON_A_GPU if DEVICE.type == "cuda" else ON_A_CPU


@cache
def roof(threads: int) -> float:
    """FLOP/s of a large product, here and now, by as many threads as the steps have."""
    return matmul_roof(DEVICE, dtype_on(DEVICE))


@pytest.fixture(autouse=True)
def threads(shape: str) -> Iterator[int]:
    """One for tiny, to which a second adds nothing; all cores for what is larger; OMP_NUM_THREADS overrules both."""
    parallel_on(DEVICE)  # as a run starts: on a CPU it keeps the memory that it frees
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if shape == "tiny" else os.cpu_count() or 1)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


class References:
    """The plain steps that others are held against; those of one shape at a time. None where plain does not fit into
    the memory of the device: a row has no ratio then."""

    def __init__(self) -> None:
        self.shape, self.steps = "", dict[str, Step | None]()

    def __call__(self, shape: str, mode: str) -> Step | None:
        if shape != self.shape:
            self.shape, self.steps = shape, {}
            gc.collect()
        if mode not in self.steps:
            try:
                step = self.steps[mode] = made(PROVIDERS["plain"], SHAPES[shape], mode, DEVICE)
                for _ in range(WARM):
                    step()
            except torch.OutOfMemoryError:
                self.steps[mode] = None
        return self.steps[mode]


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    yield References()


@pytest.mark.parametrize(
    ("shape", "mode", "provider", "rounds"),
    [(shape, mode, PROVIDERS[name], rounds) for shape, mode, names, rounds in ROWS for name in names],
    ids=lambda v: v.name if isinstance(v, Provider) else "" if isinstance(v, int) else v,
)
def test_step(
    benchmark: Any, references: References, threads: int, shape: str, mode: str, provider: Provider, rounds: int
) -> None:
    if reason := provider.skip(DEVICE):
        pytest.skip(f"{shape}, {mode}, {provider.name}: {reason}")
    size = SHAPES[shape]
    info: dict[str, Any] = {"shape": shape, "mode": mode, "provider": provider.name, "pairs": size.pairs}

    def counted(step: Step) -> None:
        if counts_ops(provider):
            info.update(asdict(count(step)))
        else:
            step()

    try:
        info["peak_bytes"], step = peak_memory(lambda: made(provider, size, mode, DEVICE), DEVICE, counted)
    except torch.OutOfMemoryError:
        pytest.skip(f"{shape}, {mode}, {provider.name}: does not fit into the memory of the device")
    for _ in range(WARM):  # not those that peak_memory made: a profiler listened to them
        step()
    # three models of base are too many for a small machine
    modes = (mode,) if mode == "replace" or shape == "base-2" else (mode, "replace")
    others = {name: other for name in modes if (other := references(shape, name)) is not None}
    times: dict[str, list[float]] = {name: [] for name in others}
    own: list[float] = []

    def run_the_others() -> None:
        for name, other in others.items():
            times[name].append(seconds(other, DEVICE))

    benchmark.group = f"step, {size.what}, {mode}"
    benchmark.pedantic(lambda: own.append(seconds(step, DEVICE)), setup=run_the_others, rounds=rounds)
    for name, reference in times.items():
        info["ratio" if name == mode else "ratio_to_replace"] = asdict(Ratio.of(reference, own))
    info |= {"seconds": median(own), "pairs_per_second": size.pairs / median(own), "roof": roof(threads)}
    info |= {"device": str(DEVICE), "about": ABOUT, "threads": threads, "differences": list(provider.differences)}
    if not provider.differences:
        info |= {"useful_flops": size.useful_flops(mode), "plain_flops": size.plain_flops(mode)}
        info["mfu"] = info["useful_flops"] / info["seconds"] / info["roof"]
    if provider.name.startswith("ours"):
        info["padding"] = size.padding(mode)
    benchmark.extra_info.update(info)


@pytest.mark.parametrize(
    ("shape", "mode"),
    dict.fromkeys((shape, mode) for shape, mode, *_ in ROWS if mode != "drop, late" and shape != "base-2"),
)
def test_parts(benchmark: Any, shape: str, mode: str) -> None:
    """The step of ours, cut into its parts."""
    models: list[MaskVLM] = []

    def kept(*arguments: Any) -> MaskVLM:
        models.append(MaskVLM(*arguments))
        return models[-1]

    provider = replace(PROVIDERS["ours"], make=partial(ours, model=kept))
    step = made(provider, SHAPES[shape], mode, DEVICE)
    step()
    found: list[dict[str, dict[str, float]]] = []
    benchmark.group = f"parts, {SHAPES[shape].what}, {mode}"
    benchmark.pedantic(lambda: found.append(parts_of(step, models[0], DEVICE)), rounds=3 if shape == "tiny" else 1)
    parts = {
        part: {way: median(one[part][way] for one in found) for way in ("forward", "backward")} for part in found[0]
    }
    benchmark.extra_info.update({"shape": shape, "mode": mode, "parts": parts, "device": str(DEVICE)})
