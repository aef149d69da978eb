"""What all Triton kernels share: whether they can run, how they are launched, and how they become torch ops.

Needs no triton. A kernel's own file (`*_triton.py`) imports triton at its head and is imported when its backend is
first taken, so that `import mvle_kernels` is fast and works where triton is absent.

    refuse, unasked     why a call cannot go to Triton, and why it does not go there of itself
    allocate            memory of results; `allocator` replaces it, for a check that puts guards around
    launch              the one door to a kernel; `captured` collects launches in the place of making them, which is how
                        the regression check compiles what a step launches, without a GPU
    define              launchers and formulas -> a torch op (fake, autograd, FLOPs) and a function that calls it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: bfloat16 products


# ---- whether they can run -------------------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether kernels run on the CPU, by Triton's interpreter. Decided before a kernel's file is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ImportError:  # something hides it
        return False


INSTALLED = _installed()


_capabilities: dict[int | None, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, asked once; (0, 0) where there is none."""
    if device.index not in _capabilities:
        there = torch.cuda.is_available()
        _capabilities[device.index] = torch.cuda.get_device_capability(device) if there else (0, 0)
    return _capabilities[device.index]


def refuse(*tensors: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why no kernel can take these tensors, or None. dtypes: of the first; the others are whatever they are."""
    if not INSTALLED:
        return "triton is not installed"
    device = tensors[0].device
    if device.type == "cpu":
        if not interpreting():
            return "needs a GPU; for checks on a CPU set TRITON_INTERPRET=1 before Python starts"
    elif device.type != "cuda":
        return f"needs a GPU of NVIDIA's; got a tensor on {device.type}"
    elif (found := capability(device)) < OLDEST:
        if not found[0]:
            return "needs a GPU; torch sees none"  # a fake tensor, say
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}; {torch.cuda.get_device_name(device)} is older"
    if any(t.device != device for t in tensors):
        return f"needs all tensors on one device; got {sorted({str(t.device) for t in tensors})}"
    if tensors[0].dtype not in dtypes:
        return f"takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}; got {tensors[0].dtype}"
    return None


def looked_at() -> str | None:
    """Why a kernel that is no torch op stands back: somebody looks at ops (torch.compile, which fuses these itself, a
    FLOP counter, selective checkpointing), and would not see what it does."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return "is no torch op, and somebody looks at ops"
    return None


def unasked(*tensors: Tensor) -> str | None:
    """Why a call does not come here of itself, though it could; None on a GPU."""
    return "the interpreter is for checks; demand triton to have it" if tensors[0].device.type == "cpu" else None


# ---- memory and launches --------------------------------------------------------------------------------------------


_allocator: Callable[..., Tensor] = torch.empty


@contextmanager
def allocator(empty: Callable[..., Tensor]) -> Iterator[None]:
    """Memory of results from `empty(shape, dtype=, device=)`: a check puts guards around it."""
    global _allocator
    before, _allocator = _allocator, empty
    try:
        yield
    finally:
        _allocator = before


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel fills whole; what is in it before means nothing."""
    return _allocator(tuple(shape), dtype=dtype, device=device)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what is passed by name (constexprs too), programs along each axis, warps, stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int


_captured: list[Launch] | None = None


@contextmanager
def captured() -> Iterator[list[Launch]]:
    """Collect launches and make none: tensors may be on the meta device."""
    global _captured
    before, _captured = _captured, []
    try:
        yield _captured
    finally:
        _captured = before


def launch(kernel: Any, grid: Sequence[int], config: Mapping[str, int], /, **arguments: Any) -> None:
    """Start a kernel. config: its constexprs that a choice decides (block sizes), and num_warps, num_stages.

    Launches on the device of the first tensor, whichever is current. A grid with a 0 starts nothing.
    """
    blocks = {name: value for name, value in config.items() if name not in ("num_warps", "num_stages")}
    warps, stages = config.get("num_warps", 4), config.get("num_stages", 2)
    if _captured is not None:
        _captured.append(Launch(kernel, tuple(grid), arguments | blocks, warps, stages))
        return
    if 0 in grid:
        return
    first = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](**arguments, **blocks, num_warps=warps, num_stages=stages)


def power_of_2(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least n and at_least: extents of blocks."""
    return max(at_least, 1 << (n - 1).bit_length() if n > 0 else 1)


def dot_dtype(dtype: torch.dtype) -> Any:
    """What products of this dtype are made in. The interpreter's bfloat16 is wrong: there values become float32 right
    after each load, which is exact."""
    import triton.language as tl

    if interpreting():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def launcher(op: str, by: str) -> Any:
    """The file of launchers of `op` written in `by` (triton, cuda), imported when it is first taken."""
    return import_module(f"{__package__}.{op}_{by}")


# ---- ops ------------------------------------------------------------------------------------------------------------


def _without_lists(backward: Callable[..., Any]) -> Callable[..., Any]:
    """An op's backward answers a list of tensors with a list; to an autograd.Function the list is one argument."""

    def run(ctx: Any, *gradients: Any) -> Any:
        found = backward(ctx, *gradients)
        return tuple(None if isinstance(g, list) else g for g in found) if isinstance(found, tuple) else found

    return run


def _tell_counters(packet: Any, formula: Callable[..., int]) -> None:
    """A FLOP counter knows the formulas that were there when it was made: one that waits for an op's first call, with
    which the op is defined, learns its formula here."""
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if known is not None:
            known.setdefault(packet, formula)


def define(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register mvle::name, and return a function that computes it.

    forward(*args) launches; its results alias nothing. fake(*args) has their shapes alone. setup(ctx, inputs, output)
    keeps what backward(ctx, *gradients) reads. flops(*args) counts useful operations.

    A dispatcher's call of an op written in Python costs tens of microseconds. So the function goes there only where
    somebody looks at ops: torch.compile, fake tensors, a FLOP counter, selective checkpointing. Else it goes straight
    to the launcher, with the same setup and backward. Neither is differentiable twice.
    """
    op = torch.library.custom_op(f"mvle::{name}", forward, mutates_args=(), schema=schema)
    op.register_fake(fake)
    packet, formula = getattr(torch.ops.mvle, name), None
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return flops(*args, **kwargs)

        register_flop_formula(packet, get_raw=True)(count)
        formula = count
    direct: Callable[..., Any] = forward
    if backward is not None:
        assert setup is not None, f"mvle::{name} has a backward and nothing that keeps what it reads"
        op.register_autograd(backward, setup_context=setup)
        body = {"forward": staticmethod(forward), "setup_context": staticmethod(setup)}
        body["backward"] = staticmethod(once_differentiable(_without_lists(backward)))
        function: Any = type(name, (torch.autograd.Function,), body)
        direct = function.apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if _get_current_dispatch_mode() is None:
            return direct(*args)
        if formula is not None:
            _tell_counters(packet, formula)
        return op(*args)

    return call
