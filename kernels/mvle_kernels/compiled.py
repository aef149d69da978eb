"""What a launch becomes on a GPU that is not here: its binary, and the figures that say how it will run.

Triton compiles for any architecture without a driver, and its own tools read the binary. Figures of one binary:

    registers, stack, shared   a thread's registers and bytes of stack (anything spilled lies there), a program's bytes
                               of shared memory
    load16, load8, load1       instructions that read global memory, by the bytes of one: at least 16; 8 to 15; fewer
    store16, store8, store1
    mma, wgmma, tcgen05        tensor-core instructions: of sm_80, which later ones also have; of sm_90; of sm_100
    tmem                       columns of the tensor memory that sm_100 has for the results of its products

A kernel has two specialisations. `aligned` is what a step launches: pointers and numbers that 16 divides are known to
be such, which vector instructions and asynchronous copies need. `unaligned` knows nothing of the kind. In both a number
that equals 1 is a constant, unless the kernel asks not to specialise it. Triton's own binder decides all of this from
the arguments (3.6 and 3.8 by the same rules); tensors on the meta device begin at address 0, so a view of one is as
aligned as the same view of a real tensor.

`Source.launched` has what no binary says: a block that is longer than it need be, or more programs, may leave every
figure as it was.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from .triton_support import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# bytes of shared memory that a program may have, by CUDA's table of compute capabilities
SHARED = {name: kib * 1024 for name, kib in {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}.items()}
SHARED |= {name: kib * 1024 for name, kib in {"sm_100": 227, "sm_103": 227, "sm_120": 99}.items()}
ACCESSES = ("load16", "load8", "load1", "store16", "store8", "store1")
FIGURES = ("registers", "stack", "shared", *ACCESSES, "mma", "wgmma", "tcgen05", "tmem")
TENSOR_MEMORY = 512  # columns
ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b")  # values of one, and bits of a value
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared[^;]*?\], (0x[0-9a-f]+|\d+)\b")  # the first size: bytes of one copy
TENSOR = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma\b"}


@dataclass(frozen=True)
class Source:
    """A launch as Triton compiles it: for one architecture, in one specialisation."""

    launch: Launch
    architecture: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    hints: dict[tuple[int, ...], Any]

    @property
    def key(self) -> str:
        """Equal where the binaries are."""
        kernel = self.launch.kernel.fn
        which = (kernel.__module__, kernel.__qualname__, self.architecture, self.launch.warps, self.launch.stages)
        return repr((*which, self.signature, self.constants, self.hints))

    @property
    def launched(self) -> dict[str, int]:
        """How: warps, stages, programs, and every number or flag that is a constexpr (block sizes)."""
        launch = self.launch
        named = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
        numbers = {name: int(value) for name, value in named.items() if isinstance(value, int)}
        return {"warps": launch.warps, "stages": launch.stages, "programs": math.prod(launch.grid)} | numbers


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def source(launch: Launch, architecture: str, aligned: bool) -> Source:
    """What Triton would make of these arguments; hints are left out where not aligned."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, unknown = bind(**launch.arguments)  # special: (type or "constexpr", hints) of each argument
    assert not unknown, f"{kernel.fn.__name__} has no arguments {sorted(unknown)}"
    signature = {name: kind for name, (kind, _) in zip(bound, special, strict=True)}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, (value, (kind, hint)) in enumerate(zip(bound.values(), special, strict=True)):
        if kind == "constexpr":
            constants[(i,)] = value
        elif aligned and hint:
            hints[(i,)] = backend.parse_attr(hint)
    return Source(launch, architecture, signature, constants, hints)


# ---- figures --------------------------------------------------------------------------------------------------------


def instructions(ptx: str) -> dict[str, int]:
    """Counts of accesses of global memory and of tensor-core instructions in a program's text."""
    counts = dict.fromkeys(ACCESSES, 0)
    accesses = [(kind, int(n or 1) * int(bits) // 8) for kind, n, bits in ACCESS.findall(ptx)]
    accesses += [("ld", int(size, 0)) for size in COPY.findall(ptx)]
    for kind, size in accesses:
        counts[f"{'load' if kind == 'ld' else 'store'}{16 if size >= 16 else 8 if size >= 8 else 1}"] += 1
    return counts | {name: len(re.findall(pattern, ptx)) for name, pattern in TENSOR.items()}


def resources(usage: str) -> dict[str, int]:
    """Registers and bytes of stack from what cuobjdump says of a binary."""
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def figures(wanted: Source) -> dict[str, int]:
    """Compile, and read the binary."""
    import triton
    from triton.compiler.compiler import ASTSource

    text = ASTSource(wanted.launch.kernel, wanted.signature, wanted.constants, wanted.hints)
    options = {"num_warps": wanted.launch.warps, "num_stages": wanted.launch.stages}
    binary = triton.compile(text, target=_target(wanted.architecture), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = resources(usage) | instructions(binary.asm["ptx"])
    found |= {"shared": binary.metadata.shared, "tmem": binary.metadata.tmem_size or 0}
    return {name: found[name] for name in FIGURES}


# ---- many at once ---------------------------------------------------------------------------------------------------

_work: Sequence[Source] = ()  # what the processes of a pool find in their copy of this one's memory


def _one(index: int) -> dict[str, int] | str:
    try:
        return figures(_work[index])
    except Exception as error:  # the answer: the check fails with it, and goes on with the others
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {said[-1] if said else 'no reason given'}"


@contextmanager
def _empty_cache() -> Iterator[None]:
    """A cache that nobody else fills: what is measured was compiled now."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="mvle-kernels-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def compile_all(wanted: Sequence[Source], processes: int | None = None) -> list[dict[str, int] | str]:
    """Figures of each, or why it does not compile; equal sources are compiled once."""
    global _work
    unique = list({item.key: item for item in wanted}.values())
    found: dict[str, dict[str, int] | str] = {}
    _work = unique
    workers = max(1, min(len(unique), processes or os.cpu_count() or 1))
    with _empty_cache():
        # fork: kernels are not copied by name, and torch is not imported again
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            futures = [pool.submit(_one, i) for i in range(len(unique))]
        for item, future in zip(unique, futures, strict=True):
            if not isinstance(future.exception(), BrokenProcessPool):
                found[item.key] = future.result()
        # a compiler that died took its neighbours' work with it: each of those once more, alone
        for i, item in enumerate(unique):
            if item.key not in found:
                with ProcessPoolExecutor(1, get_context("fork")) as pool:
                    last = pool.submit(_one, i)
                found[item.key] = "the compiler died" if last.exception() else last.result()
    _work = ()
    return [found[item.key] for item in wanted]
