"""Better launches for the GPU that is here, found by trying them. Nothing in training calls this.

    python -m mvle_kernels.tune                every launch of base and large; writes launches.json
    python -m mvle_kernels.tune --only NAME    those alone whose key has NAME in it

A key (kernel, dtype, kind of shape) of launches.py has a config by the kernel's rule. Tried beside it: 1 to 8 warps, 1
to 3 stages, each block of the config (BLOCK_...) halved or doubled, one at a time. A config is dropped where a kernel
does not compile, spills, has more shared memory than the architecture, or gives another result than the rule: a block
that has to hold a whole row may not be halved, and only the result tells. The rest are timed in turns on the tensors
of `variants("cuda")`, with caches swept before each run, and compared by their medians; over all variants that share a
key. One that is 3% faster than the rule is written, at once: a kernel that reads outside its tensors ends the process,
and --only goes on behind it. Entries of other architectures stay as they are. The regression check then finds other
launches than its baselines have, and wants them written anew.

Measured not yet on a GPU
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import launches
from .compiled import SHARED, TENSOR_MEMORY, compile_all, source
from .regress import kernel_files
from .triton_support import Launch, allocator, captured, interpreting

Config = Mapping[str, int]
Call = Callable[[], object]
WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3)
SMALLEST = 16  # a block's extent: less cannot enter a product
ROUNDS = 15
GAIN = 0.97  # of the rule's time: what a config must reach to be written
# differences of results that another order of additions makes, relative to the largest value
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@dataclass
class Entry:
    """What is tuned: a rule, and the variants (file, name) that ask for it."""

    rule: Config
    variants: list[tuple[Any, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where calls are compiled, run and timed."""

    architecture: str
    device: str
    seconds: Callable[[Call], float]  # of one run
    fits: Callable[[Sequence[Sequence[Launch]]], list[bool]]  # whether launches of a call are worth timing


# ---- what is tried --------------------------------------------------------------------------------------------------


def candidates(rule: Config) -> list[dict[str, int]]:
    """The rule first, then what is near it."""
    blocks = [dict(rule)]
    for name in rule:
        if name.startswith("BLOCK_"):
            blocks += [{**rule, name: n} for n in (rule[name] // 2, rule[name] * 2) if n >= SMALLEST]
    near = [{**b, "num_warps": w, "num_stages": s} for b, w, s in product(blocks, WARPS, STAGES)]
    return [dict(rule), *(config for config in near if config != dict(rule))]


def takes_device(module: Any) -> bool:
    """Whether a file can make its variants' tensors on a device; else they are without memory always."""
    return "device" in inspect.signature(module.variants).parameters


def variants_on(module: Any, device: str) -> Iterator[tuple[str, Call]]:
    """Variants over tensors of a device."""
    yield from module.variants(device) if takes_device(module) else module.variants()


def entries(modules: Sequence[Any], architecture: str, only: str = "") -> dict[str, Entry]:
    """key -> what there is to tune."""
    found: dict[str, Entry] = {}
    for module in modules:
        for name, call in variants_on(module, "meta"):
            with launches.target(architecture), launches.trying({}) as asked, captured():
                call()
            for key, rule in asked.items():
                if only in key:
                    found.setdefault(key, Entry(rule)).variants.append((module, name))
    return found


# ---- what is right --------------------------------------------------------------------------------------------------


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in _tensors(part)] if isinstance(result, (tuple, list)) else []


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Memory that a kernel does not fill holds no result of the run before."""

    def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device)

    with allocator(empty):
        yield


def same(got: object, expected: object) -> bool:
    """Whether results agree to a few roundings; what is not a number has to be so in both."""
    ours, theirs = _tensors(got), _tensors(expected)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return False
        elif a.numel():
            largest = b.nan_to_num().abs().max().item()  # sync: the tuner compares results, no step comes here
            slack = ROUNDING.get(a.dtype, 1e-4) * max(1.0, largest)
            if not torch.allclose(a, b, rtol=0, atol=slack, equal_nan=True):
                return False
    return True


def _run(key: str, config: Config, call: Call, architecture: str) -> object:
    with launches.target(architecture), launches.trying({key: config}):
        return call()


def _result(key: str, config: Config, call: Call, architecture: str) -> object:
    """What a config computes; None where it does not run."""
    try:
        with _nothing_left():
            return _run(key, config, call, architecture)
    except Exception as error:  # too few resources, an assertion of the kernel's: another config may do
        print(f"    {config}: {type(error).__name__}")
        return None


# ---- tuning ---------------------------------------------------------------------------------------------------------


def worth_timing(key: str, entry: Entry, bench: Bench) -> list[dict[str, int]]:
    """Candidates that compile and do not spill in any variant."""
    near = candidates(entry.rule)
    fine = [True] * len(near)
    for module, wanted in entry.variants:
        call = next(c for name, c in variants_on(module, "meta") if name == wanted)
        made = []
        for config in near:
            with captured() as launched:
                _run(key, config, call, bench.architecture)
            made.append(launched)
        fine = [a and b for a, b in zip(fine, bench.fits(made), strict=True)]
    return [config for config, ok in zip(near, fine, strict=True) if ok]


def ratios(key: str, entry: Entry, near: Sequence[Config], bench: Bench) -> list[float]:
    """Each candidate's time over the rule's: the geometric mean over the variants; infinity where a result differs."""
    logs = [0.0] * len(near)
    for module, wanted in entry.variants:
        call = next(c for name, c in variants_on(module, bench.device) if name == wanted)
        expected = _result(key, entry.rule, call, bench.architecture)
        if expected is None:
            raise RuntimeError(f"{key}: the rule itself does not run: {dict(entry.rule)}")
        right = [same(_result(key, config, call, bench.architecture), expected) for config in near]
        runs: list[list[float]] = [[] for _ in range(len(near) + 1)]
        for _ in range(ROUNDS):  # in turns: a clock that changes, changes for all
            for i, config in enumerate([entry.rule, *near]):
                if i == 0 or right[i - 1]:
                    with launches.target(bench.architecture), launches.trying({key: config}):
                        runs[i].append(bench.seconds(call))
        rule = median(runs[0])
        for i, ok in enumerate(right):
            logs[i] += math.log(median(runs[i + 1]) / rule) / len(entry.variants) if ok else math.inf
    return [math.exp(value) for value in logs]


def tuned(key: str, entry: Entry, bench: Bench) -> dict[str, int] | None:
    """The best config, or None where the rule is as good."""
    near = [config for config in worth_timing(key, entry, bench) if config != dict(entry.rule)]
    found = ratios(key, entry, near, bench)
    best = min(range(len(near)), key=found.__getitem__, default=None)
    if best is None or found[best] > GAIN:
        print(f"{key}: the rule stays, of {len(near) + 1} tried")
        return None
    print(f"{key}: {near[best]} takes {found[best]:.2f} of the rule's time, of {len(near) + 1} tried")
    return near[best]


def merged(
    table: Mapping[str, Mapping[str, Config]], architecture: str, found: Mapping[str, Config | None]
) -> dict[str, dict[str, Config]]:
    """The table with what was found; None: the rule is better than what stood there."""
    mine = {**table.get(architecture, {}), **found}
    whole = {**table, architecture: {key: config for key, config in mine.items() if config is not None}}
    return {name: dict(sorted(configs.items())) for name, configs in sorted(whole.items()) if configs}


def write(file: Path, table: Mapping[str, Mapping[str, Config]]) -> None:
    """One line a key: a change shows as the lines that it changes."""
    parts = []
    for architecture, configs in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(dict(config))}" for key, config in configs.items()]
        parts.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n  }")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    launches.table.cache_clear()


def tune(modules: Sequence[Any], bench: Bench, file: Path, only: str = "") -> int:
    """Tune each key, writing after each: what was found stays found. The exit code."""
    for module in modules:
        if not takes_device(module):
            print(f"{module.__name__}: variants() takes no device, nothing can be timed")
    wanted = entries(list(filter(takes_device, modules)), bench.architecture, only)
    if not wanted:
        print(f"no key has {only!r} in it")
        return 1
    for key, entry in wanted.items():
        table = json.loads(file.read_text()) if file.exists() else {}
        write(file, merged(table, bench.architecture, {key: tuned(key, entry, bench)}))
    print(f"wrote {file}")
    return 0


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def compiled_well(architecture: str, calls: Sequence[Sequence[Launch]]) -> list[bool]:
    """Whether all launches of a call compile, spill nothing and have the memory."""
    flat = [source(launch, architecture, True) for made in calls for launch in made]
    found = iter(compile_all(flat))
    limit = SHARED.get(architecture, min(SHARED.values()))
    fine = []
    for made in calls:
        fits = [
            not isinstance(f, str) and f["stack"] == 0 and f["shared"] <= limit and f["tmem"] <= TENSOR_MEMORY
            for f in (next(found) for _ in made)
        ]
        fine.append(all(fits))
    return fine


def on_gpu() -> Bench:
    """The current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launches.architecture(device)
    swept = torch.empty(2**30, dtype=torch.uint8, device=device)  # more than any cache, and longer than a launch takes

    def seconds(call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        swept.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return Bench(architecture, str(device), seconds, lambda calls: compiled_well(architecture, calls))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m mvle_kernels.tune", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--only", default="", metavar="NAME", help="keys alone that have this in them")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line does."""
    chosen = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs a GPU; torch sees none. Without one the rules of the kernels hold")
        return 1
    if interpreting():
        print("tuning times kernels on a GPU: unset TRITON_INTERPRET")
        return 1
    return tune(kernel_files(), on_gpu(), launches.TABLE, chosen.only)


if __name__ == "__main__":
    sys.exit(main())
