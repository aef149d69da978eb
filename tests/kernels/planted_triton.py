"""Kernels to be caught: test_regress.py compiles them in a process without the interpreter, test_tune.py runs one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from mvle_kernels.launches import config
from mvle_kernels.triton_support import allocate, launch, power_of_2


@triton.jit(do_not_specialize=["total"])
def product_kernel(a, b, out, stride_a, stride_b, stride_out, step, total, T: tl.constexpr):
    """One tile of a product, over two steps of keys."""
    row, column = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    found = tl.zeros((T, T), tl.float32)
    for k in range(0, total, T):
        left = tl.load(a + row * stride_a + k + column)
        right = tl.load(b + (k + row) * stride_b + column * step)
        found = tl.dot(left, right, found)
    tl.store(out + row * stride_out + column, found.to(tl.bfloat16))


@triton.jit
def hoarding_kernel(x, out, BLOCK: tl.constexpr):
    """A row in the registers of one warp."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, tl.exp(value - tl.max(value, 0)) / tl.sum(value, 0))


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    """Does not compile."""
    tl.static_assert(BLOCK == 3, "BLOCK must be 3")
    tl.store(x, 0)


@triton.jit
def double_kernel(x, out, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Two times a row, which a block has to hold whole."""
    i = tl.arange(0, BLOCK_X)
    at = tl.program_id(0) * X + i
    tl.store(out + at, 2 * tl.load(x + at, mask=i < X), mask=i < X)


def doubled(x: torch.Tensor) -> torch.Tensor:
    X, out = x.shape[1], allocate(x.shape, x.dtype, x.device)
    rule = {"BLOCK_X": power_of_2(X), "num_warps": 2, "num_stages": 1}
    launch(double_kernel, x.shape[:1], config("double", x.device, x.dtype, {"x": X}, rule), x=x, out=out, X=X)
    return out


def product(step: int = 1) -> None:
    a, b, out = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    arguments = {"stride_a": 64, "stride_b": 64, "stride_out": 64, "step": step, "total": 1}
    launch(product_kernel, (1,), {"T": 64, "num_warps": 4, "num_stages": 3}, a=a, b=b, out=out, **arguments)


def hoard(block: int, warps: int) -> None:
    x = torch.empty(block, device="meta")
    launch(hoarding_kernel, (1,), {"BLOCK": block, "num_warps": warps}, x=x, out=torch.empty_like(x))


def broken() -> None:
    launch(broken_kernel, (1,), {"BLOCK": 4}, x=torch.empty(4, device="meta"))


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """As every file of kernels has it."""
    yield "product", product
    yield "the same product", product
    yield "row of eight warps", partial(hoard, 8192, 8)
    yield "row of one warp", partial(hoard, 8192, 1)
    yield "broken", broken


def worth_its_seconds(name: str) -> bool:
    """A product on all three architectures; else one will do. What spills without hints takes long."""
    if "unaligned" in name:
        return "sm_90" in name and "one warp" not in name
    return "product" in name or "sm_90" in name


def main() -> None:
    """Print what the regression check finds here."""
    from mvle_kernels import regress
    from mvle_kernels.compiled import compile_all

    wanted = {name: s for name, s in regress.sources([sys.modules[__name__]]) if worth_its_seconds(name)}
    product = next(s for name, s in wanted.items() if name.endswith("sm_90 aligned"))
    names = [p.name for p in product_kernel.params]
    said = {
        "figures": dict(zip(wanted, compile_all(list(wanted.values())), strict=True)),
        "different": len({s.key for s in wanted.values()}),
        "constants": [names[i] for (i,) in product.constants],
        "hinted": [names[i] for (i,) in product.hints],
        "launched": product.launched,
    }
    print(json.dumps(said))
