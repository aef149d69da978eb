"""How a kernel is held against its reference: on the GPU that is there, or on a CPU, where Triton's interpreter runs
those in Triton and csrc/cuda/emulated.h those in CUDA.

The helpers ask `under_test()` whose kernels they are to run: conftest.py has the mark that sets it.
`guards()` puts bands of canaries around every buffer that a kernel fills, and NaN into it, so that what is written
outside and what is not written inside both show. `guarded(x)` is an input with NaN before and behind it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from mvle_kernels import compiled_cuda, cuda_support, triton_support, use_backend
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BAND = 256  # elements on each side: more than a block of the tests is wide
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
# relative to the largest value of a tensor: a few roundings of the dtype that it is stored in. The interpreter cuts
# bfloat16 where a GPU rounds it
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, which Python names from 3.13 on

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# ---- whose kernels --------------------------------------------------------------------------------------------------

both_backends = pytest.mark.backends("triton", "cuda")
triton_alone = pytest.mark.backends("triton")  # about its block sizes, its launches
EMULATED = Path(__file__).parents[2] / "build" / "emulated"
_under_test = "triton"


def under_test() -> str:
    """The backend that a test is about."""
    return _under_test


@contextmanager
def kernels_of(backend: str) -> Iterator[None]:
    """`under_test()` for the length of a with block. Threads of emulated kernels take turns in the same order each
    time."""
    global _under_test
    before, _under_test = _under_test, backend
    if backend == "cuda" and DEVICE.type == "cpu":
        order_of_threads(0)
    try:
        yield
    finally:
        _under_test = before


@cache
def unavailable(backend: str) -> str | None:
    """Why kernels of a backend cannot run here, or None. Those in CUDA are compiled for the CPU where there is no GPU,
    if their sources changed."""
    if backend == "triton":
        return None if find_spec("triton") else "triton is not installed"
    if DEVICE.type == "cuda":
        return cuda_support.load()
    build = compiled_cuda.builder()
    try:
        cuda_support.emulate(build.build_emulated(EMULATED))
    except build.Missing as missing:
        return f"CUDA kernels cannot be compiled for the CPU: {missing}"
    return None


def says_that_it_can(said: str) -> bool:
    """Whether `explain` says of the tested backend that it takes a call: on a CPU on demand alone, on a GPU of itself,
    or where another comes first."""
    if DEVICE.type == "cpu":
        return f"{under_test()} not asked: the " in said
    return f"{under_test()} " in said and f"{under_test()} refused" not in said


def order_of_threads(seed: int) -> None:
    """The order in which threads of emulated kernels take turns, from the next launch on."""
    set_seed = ctypes.CDLL(str(EMULATED / "libmvle_cuda_emulated.so")).mvle_emulated_seed
    set_seed.argtypes = [ctypes.c_uint64]
    set_seed(seed)


def emulated_bytes_read() -> int:
    """What emulated kernels have read of global memory until now, by vectors."""
    count = ctypes.CDLL(str(EMULATED / "libmvle_cuda_emulated.so")).mvle_emulated_bytes_read
    count.restype = ctypes.c_uint64
    return int(count())


def assert_no_order_of_threads_matters(op: Callable[..., Tensor], inputs: Sequence[Tensor], seeds: int = 8) -> None:
    """Output and gradients of the CUDA kernels are bitwise the same in whatever order threads take turns: where a
    barrier is missing they are not, for some order."""
    found = []
    for seed in range(seeds):
        if DEVICE.type == "cpu":
            order_of_threads(1000 * seed)
        out, of_inputs = gradients(op, inputs, "cuda")
        found.append([out, *of_inputs])
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True)), "the order of threads shows in a result"


# ---- buffers --------------------------------------------------------------------------------------------------------


def canary(dtype: torch.dtype) -> float:
    """What a band is filled with."""
    return 12345.0 if dtype.is_floating_point else 77


@contextmanager
def guards() -> Iterator[None]:
    """Every buffer that kernels fill lies between canaries; raises AssertionError if one of them was touched."""
    made: list[tuple[Tensor, int]] = []

    def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = int(torch.Size(shape).numel())
        whole = torch.full((size + 2 * BAND,), canary(dtype), dtype=dtype, device=device)
        inside = whole[BAND : BAND + size]
        inside.fill_(float("nan") if dtype.is_floating_point else -1234567 if dtype.is_signed else 0)
        made.append((whole, size))
        return inside.view(tuple(shape))

    with triton_support.allocator(empty):
        yield
    assert made, "no kernel asked for memory: nothing was checked"
    for whole, size in made:
        for band in (whole[:BAND], whole[BAND + size :]):
            assert (band == canary(whole.dtype)).all(), f"a buffer of {size} elements was written outside"


def guarded(x: Tensor) -> Tensor:
    """The same values, with NaN (or an impossible index) before and behind them in memory."""
    outside = float("nan") if x.dtype.is_floating_point else 2**30 if x.dtype != torch.uint8 else 255
    whole = torch.full((x.numel() + 2 * BAND,), outside, dtype=x.dtype, device=x.device)
    inside = whole[BAND : BAND + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def strided(x: Tensor) -> Tensor:
    """The same values where rows do not follow one another: every other row of a larger buffer, NaN between them."""
    outside = float("nan") if x.dtype.is_floating_point else 0
    whole = torch.full((x.shape[0], 2, *x.shape[1:]), outside, dtype=x.dtype, device=x.device)
    whole[:, 1] = x
    return whole[:, 1]


def vast(shape: Sequence[int], dtype: torch.dtype, device: torch.device = DEVICE) -> Tensor:
    """A dense tensor of any size. On a CPU its memory exists where it is touched, so no machine has to have it, and as
    much lies before it: where 32 bits miscount an offset, a kernel misses inside of the process, and a test fails."""
    if device.type == "cuda":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = int(torch.Size(shape).numel())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, (2**31 + size + BAND) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, offset=2**31 * dtype.itemsize)[:size].view(tuple(shape))


def far_apart(x: Tensor) -> Tensor:
    """The same three rows, each 2^30 elements and more behind the one before: a stride fits into 32 bits, twice it does
    not."""
    assert len(x) == 3
    apart = 2**30 + 2**20
    whole = vast((2 * apart + x[0].numel(),), x.dtype, x.device)
    rows = whole.as_strided(x.shape, (apart, *x[0].contiguous().stride()))
    rows.copy_(x)
    return rows


@contextmanager
def last_programs(of: int, programs: int) -> Iterator[None]:
    """The interpreter numbers programs of a grid's first axis as the last ones of `of`: what nobody could wait for."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def place(x: int, y: int, z: int) -> None:
        builder.grid_idx = (of - programs + x, y, z)

    with mock.patch.object(builder, "set_grid_idx", place):
        yield


# ---- results --------------------------------------------------------------------------------------------------------


def gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Output and input gradients of op(*inputs) under a backend, for one random gradient of the output.

    Inputs keep their memory: strides, and what lies around them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use_backend(backend):
        out = op(*leaves)
        draw = torch.Generator().manual_seed(seed)
        out.backward(torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.device, out.dtype))
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return out.detach(), found


def assert_equals_reference(op: Callable[..., Tensor], inputs: Sequence[Tensor], *, slack: float = 1.0) -> None:
    """The kernels' output and gradients against the reference's in float64, to a few roundings of the inputs' dtype.

    op takes the floating inputs alone; the others are bound already. slack: times as many roundings."""
    with guards():
        got, got_gradients = gradients(op, inputs, under_test())
    truth, true_gradients = gradients(op, [x.double() for x in inputs], "reference")
    tolerance = slack * ROUNDING[inputs[0].dtype]
    for name, a, b in zip(
        ["output", *(f"gradient {i}" for i in range(len(inputs)))],
        [got, *got_gradients],
        [truth, *true_gradients],
        strict=True,
    ):
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if b.numel():
            error = (a.double() - b).abs().max().item()
            assert error <= tolerance * max(1.0, float(b.abs().max())), f"{name}: error {error:.2e}"


def assert_a_torch_op(name: str, *arguments: object) -> None:
    """torch's own checks of mvle::name (schema, fake, autograd, compiled by aot), on these arguments."""
    torch.library.opcheck(getattr(torch.ops.mvle, name).default, arguments)


def compiled_whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under torch.compile as one graph, without a code generator."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
