"""Whether kernels still compile as well as they did: no GPU needed.

    python -m mvle_kernels.regress                 compile what base and large launch, hold it against the baseline
    python -m mvle_kernels.regress --list          and print the figures of each
    python -m mvle_kernels.regress --only NAME     those alone whose name has NAME in it
    python -m mvle_kernels.regress --of cuda       those in CUDA alone (or triton)
    python -m mvle_kernels.regress --write         make the figures of now the baseline, to be looked at and committed

Every launch of each `variants()` of the files `*_triton.py` is compiled for sm_80, sm_90 and sm_100, aligned and
unaligned; compiled.py says what is read from a binary. It is held against baselines/triton-VERSION.json: code differs
from one version of Triton to the next, so each has its own, and a version without one fails. What csrc/cuda holds is
compiled whole by nvcc, where there is one, for all that csrc/build.py names; compiled_cuda.py says what is read, and
baselines/nvcc-VERSION.json holds it. What fails:

    always                   does not compile; a stack in an aligned one; more shared or tensor memory than there is
    against the baseline     registers up by more than a tenth; more stack; over 1 KiB more shared memory; fewer vector
                             accesses, or fewer bytes by them; over a tenth more narrow accesses for as many of those
                             bytes; fewer tensor-core instructions, or an older kind; another launch (warps, stages,
                             programs, block sizes), whose binary may look as good; a launch that is new or gone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from . import launches
from .compiled import ARCHITECTURES, FIGURES, SHARED, TENSOR_MEMORY, Source, compile_all, source
from .triton_support import INSTALLED, Launch, captured, interpreting

BASELINES = Path(__file__).parent / "baselines"
HOW = "python -m mvle_kernels.regress --write"
MOOD = 1.1  # as many times more registers or narrow accesses may be a compiler's mood
Figures = dict[str, int]  # FIGURES, and how it is launched
Table = Mapping[str, "Figures | str"]  # name of a binary -> its figures, or why there are none


# ---- what is compiled -----------------------------------------------------------------------------------------------


def kernel_files() -> list[Any]:
    """Each file of Triton kernels, imported."""
    return [import_module(f"{__package__}.{file.stem}") for file in sorted(Path(__file__).parent.glob("*_triton.py"))]


def sources(modules: Sequence[Any], only: str = "") -> Iterator[tuple[str, Source]]:
    """(name, source) of each binary: `file / variant / kernel / architecture specialisation`."""
    seen: set[str] = set()
    for file, (variant, call) in ((m.__name__.rpartition(".")[2], each) for m in modules for each in m.variants()):
        place = f"{file} / {variant}"
        if place in seen:
            raise ValueError(f"two variants are called {place!r}")
        seen.add(place)
        calls = {architecture: _launches(call, architecture) for architecture in ARCHITECTURES}
        if not any(calls.values()):
            raise ValueError(f"{place!r} launches nothing")
        for architecture, made in calls.items():
            for kernel, launch in made:
                for aligned in (True, False):
                    name = f"{place} / {kernel} / {architecture} {'aligned' if aligned else 'unaligned'}"
                    if only in name:
                        yield name, source(launch, architecture, aligned)


def _launches(call: Callable[[], object], architecture: str) -> list[tuple[str, Launch]]:
    """Kernels with their names; the second launch of one in a call has a 2 behind it."""
    with launches.target(architecture), captured() as made:
        call()
    times = Counter[str]()
    named = []
    for launch in made:
        kernel = launch.kernel.fn.__name__
        times[kernel] += 1
        named.append((f"{kernel} {times[kernel]}" if times[kernel] > 1 else kernel, launch))
    return named


# ---- the rules ------------------------------------------------------------------------------------------------------


def wrong(name: str, now: Figures | str) -> Iterator[str]:
    """What no baseline excuses."""
    if isinstance(now, str):
        yield f"does not compile: {now}"
        return
    architecture, specialisation = name.split(" / ")[-1].split()
    if specialisation != "unaligned" and now["stack"]:
        yield f"stack {now['stack']} bytes: registers spill in what a step launches"
    most = SHARED.get(architecture.rstrip("af"), SHARED["sm_80"])  # a launch is for each of them
    if now["shared"] > most:
        yield f"shared {now['shared']} bytes: {architecture} has {most}"
    if now["tmem"] > TENSOR_MEMORY:
        yield f"tmem {now['tmem']} columns: {architecture} has {TENSOR_MEMORY}"


def worse(before: Figures, now: Figures) -> Iterator[str]:
    """What changed for the worse."""
    launched = sorted({*before, *now} - {*FIGURES})
    if changed := [f"{n} {before.get(n, 0)} -> {now.get(n, 0)}" for n in launched if before.get(n, 0) != now.get(n, 0)]:
        yield f"launch changed: {', '.join(changed)}. If that is meant: {HOW}"
    if now["registers"] > MOOD * before["registers"]:
        yield f"registers {before['registers']} -> {now['registers']}: more than a tenth up"
    for what, slack in (("stack", 0), ("shared", 1024)):
        if now[what] > before[what] + slack:
            yield f"{what} {before[what]} -> {now[what]} bytes: more than before"
    for kind in ("load", "store"):
        wide, half, narrow = f"{kind}16", f"{kind}8", f"{kind}1"
        was, has = (16 * f[wide] + 8 * f[half] for f in (before, now))  # bytes by vector accesses, at least
        if now[wide] < before[wide]:
            yield f"{wide} {before[wide]} -> {now[wide]}: vector accesses are lost"
        elif has < was:
            yield f"{wide} and {half} {was} -> {has} bytes: vector accesses are lost"
        elif now[narrow] * was > MOOD * before[narrow] * has:
            yield f"{narrow} {before[narrow]} -> {now[narrow]} beside {was} -> {has} bytes: more accesses are narrow"
    # the newest kind that the baseline has; a newer one in its place is no loss
    kinds = ("tcgen05", "wgmma", "mma")
    best = next((kind for kind in kinds if before[kind]), None)
    if best and now[best] < before[best] and not any(now[kind] for kind in kinds[: kinds.index(best)]):
        yield f"{best} {before[best]} -> {now[best]}: tensor-core instructions are lost"


def differences(baseline: Mapping[str, Figures], now: Table) -> list[str]:
    """A line for each rule that a binary breaks."""
    lines = []
    for name in sorted(baseline.keys() | now.keys()):
        if name not in now:
            lines.append(f"{name}: is in the baseline and launched no more. If that is meant: {HOW}")
            continue
        found = now[name]
        never = [f"{name}: {line}" for line in wrong(name, found)]
        lines += never
        if name not in baseline:
            lines.append(f"{name}: is not in the baseline. If it is as it should be: {HOW}")
        elif not isinstance(found, str) and not never:
            lines += [f"{name}: {line}" for line in worse(baseline[name], found)]
    return lines


# ---- baselines and tables -------------------------------------------------------------------------------------------


def baseline_file(folder: Path) -> Path:
    """That of the installed version."""
    import triton

    return folder / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def read(file: Path) -> dict[str, Figures]:
    """A baseline; figures that it does not name are 0."""
    return {name: dict.fromkeys(FIGURES, 0) | found for name, found in json.loads(file.read_text()).items()}


def write(file: Path, table: Mapping[str, Figures]) -> None:
    """One line a binary, in order: a change shows as the lines that it changes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = {name: {figure: n for figure, n in table[name].items() if n} for name in sorted(table)}
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in shown.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def listing(now: Table) -> str:
    """Every binary with its figures, a column each, and how it is launched."""
    wide = max([len(name) for name in now], default=0)
    rows = [f"{'':{wide}}  " + "  ".join(f"{name:>9}" for name in FIGURES) + "  launch"]
    for name in sorted(now):
        found = now[name]
        if not isinstance(found, str):
            launched = [f"{n}={value}" for n, value in found.items() if n not in FIGURES]
            found = "  ".join([*(f"{found[figure]:9}" for figure in FIGURES), *launched])
        rows.append(f"{name:{wide}}  {found}")
    return "\n".join(rows)


def check(modules: Sequence[Any], folder: Path, only: str = "", rewrite: bool = False, show: bool = False) -> int:
    """Compile what is in Triton, list, write, compare: the exit code."""
    file = baseline_file(folder)
    if not (file.exists() or rewrite or show):
        print(missing(file))
        return 1
    begin = time.perf_counter()
    wanted = dict(sources(modules, only))
    if not wanted:
        print(f"nothing is launched whose name has {only!r} in it")
        return 1
    compiled = zip(wanted.items(), compile_all(list(wanted.values())), strict=True)
    now: Table = {name: f if isinstance(f, str) else f | item.launched for (name, item), f in compiled}
    once = len({item.key for item in wanted.values()})
    print(f"{len(now)} binaries, {once} of them different, compiled in {time.perf_counter() - begin:.0f} s")
    return hold(file, now, only, rewrite, show)


def check_cuda(folder: Path, only: str = "", rewrite: bool = False, show: bool = False) -> int:
    """The same of what is in CUDA; passed over, with the reason, where it cannot be compiled here."""
    try:
        from . import compiled_cuda

        build = compiled_cuda.builder()
    except FileNotFoundError as reason:
        print(f"csrc/cuda is passed over: {reason}")
        return 0
    begin = time.perf_counter()
    try:
        release, table = compiled_cuda.kernels()
        table |= compiled_cuda.launches()
    except build.Missing as reason:
        print(f"csrc/cuda is passed over: {reason}")
        return 0
    except RuntimeError as error:
        print(f"csrc/cuda: {error}")
        return 1
    now = {name: dict.fromkeys(FIGURES, 0) | found for name, found in table.items() if only in name}
    print(f"{len(now)} kernels and launches of csrc/cuda, in {time.perf_counter() - begin:.0f} s")
    return hold(folder / f"nvcc-{release}.json", now, only, rewrite, show)


def missing(file: Path) -> str:
    """What is said where a version has no baseline."""
    return f"no baseline for this compiler: {file} is missing. Make it, look at it, commit it: {HOW}"


def hold(file: Path, now: Table, only: str, rewrite: bool, show: bool) -> int:
    """List, write, compare with a baseline: the exit code."""
    if show:
        print(listing(now))
    if rewrite:
        others = read(file) if only and file.exists() else {}
        others = {name: found for name, found in others.items() if only not in name}
        write(file, others | {name: found for name, found in now.items() if not isinstance(found, str)})
        print(f"wrote {file}")
    elif not file.exists():
        print(missing(file))
        return 1
    lines = differences({name: found for name, found in read(file).items() if only in name}, now)
    print("\n".join([f"{len(lines)} differences from {file.name}:", *lines]) if lines else f"as in {file.name}")
    return 1 if lines else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m mvle_kernels.regress", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--write", action="store_true", help="make the figures of now the baseline")
    made.add_argument("--list", action="store_true", help="print every figure")
    made.add_argument("--of", choices=("triton", "cuda"), help="kernels of one language alone")
    made.add_argument("--only", default="", metavar="NAME", help="binaries alone whose name has this in it")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line does."""
    chosen = parser().parse_args(arguments)
    if not INSTALLED and chosen.of != "cuda":
        print("triton is not installed: its kernels cannot be compiled (--of cuda: the others)")
        return 1
    if any(name.startswith("TRITON_") for name in os.environ):
        # the interpreter cannot compile, and other settings change what is compiled. They are read at Triton's import
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        again = [sys.executable, "-m", f"{__package__}.regress", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, again, clean)
    assert not interpreting() or chosen.of == "cuda"
    parts = [check_cuda(BASELINES, chosen.only, chosen.write, chosen.list)] if chosen.of != "triton" else []
    parts += [check(kernel_files(), BASELINES, chosen.only, chosen.write, chosen.list)] if chosen.of != "cuda" else []
    return max(parts)


if __name__ == "__main__":
    sys.exit(main())
