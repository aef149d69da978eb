"""Linear + cross-entropy of masked words: cuBLAS makes the products, a row kernel all between them, in place.

Math     token_loss.py has it. A program takes one row r of z = x W^T + b. First pass: m = max z, s = sum exp(z - m),
         lse = m + log s, rank = words that a stable sort by falling score puts before the target. partial[r] = lse -
         z_t. Second pass: z becomes its own gradient, softmax(z) - onehot(t). Then dx = dz W, dW = dz^T x, db = sum dz;
         what comes from behind the loss is one number, so it scales x and dx, never dz.
Cost     products of 2 R C D FLOPs: one forward, two backward. The row kernel reads s R C bytes twice and writes them
         once (s: bytes of the dtype). Floor: one read and one write, base at 256 pairs and 4 masked words of each,
         bfloat16: 1024 rows of 50304 logits, 206 MB. One read would hold a row of 100 kB on the chip between the
         passes: in the registers of one program it spills (sm_90, 32 warps: 64 registers, 224 bytes of stack), and
         Triton hands out no shared memory. The second read finds in L2 what is still there. db reads dz once more.
         Above BUDGET_MIB of logits, rows go through one buffer in chunks, and dx and dW are made in the forward: a
         chunk more reads and writes dW in float32 once more (8 C D bytes).
Exact    logits are rounded to the dtype of the rows, bias included; all else of the row kernel is float32. Sums over
         chunks and gradients that come out in float32 are float32 throughout; a dW of 16 bits is rounded once. A row is
         one program's, rows are added by torch in a fixed order: bitwise repeatable. Words of the padded tail are
         never read and never learn; a row without a target is zero. Logits that are not finite make loss and gradient
         so, as in the reference; a target that names no word, whatever it is, makes the loss not a number.
Limits   first derivatives only; W and its padded tail finite (0 times infinity is not a number).
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .recipes import RECIPES
from .triton_support import allocate, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(columns: int) -> dict[str, int]:
    """A row is one program. Eight values a thread at a time are one load of 16 bytes and at most 64 registers: two
    programs of 16 warps a multiprocessor, which is what 256 rows (large) fill."""
    block = power_of_2(min(columns, 4096), 32)
    return {"BLOCK": block, "num_warps": max(1, block // 256), "num_stages": 1}


# ---- kernel ---------------------------------------------------------------------------------------------------------

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # where a maximum begins: -inf - -inf would not be a number


@triton.jit
def _load(logits, start, column, V: tl.constexpr, C: tl.constexpr, TAIL: tl.constexpr):
    """A block of logits; -inf in the place of padding. The mask of the load is that of the columns, whose number
    divides by 8: one of the words would cost the wide loads."""
    if TAIL:
        z = tl.load(logits + start + column, mask=start + column < C, other=float("-inf")).to(tl.float32)
        return tl.where(start + column < V, z, float("-inf"))
    return tl.load(logits + start + column).to(tl.float32)


@triton.jit
def _take_in(z, column, place, own, highest, mass, before):
    """What a block of logits does to their maximum (times log2 e), to the sum of exponentials and to the rank; the last
    two stay apart for each place in a block, so that one value alone crosses threads."""
    lower = highest
    highest = tl.maximum(highest, tl.max(z, 0) * LOG2E)
    mass = mass * tl.exp2(lower - highest) + tl.exp2(z * LOG2E - highest)
    before += tl.where((z > own) | ((z == own) & (column < place)), 1, 0)
    return highest, mass, before


@triton.jit
def _slope(z, column, place, lse):
    return tl.exp2(z * LOG2E - lse) - tl.where(column == place, 1.0, 0.0)


@triton.jit(do_not_specialize=["ignore"])
def token_loss_kernel(
    # input, and with SLOPE output
    logits,
    # inputs
    targets,
    # outputs
    partial,
    ranks,
    # strides
    stride_r,
    # scalars
    ignore,
    # compile-time
    V: tl.constexpr,  # words
    C: tl.constexpr,  # columns: words and padding
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of logits: its loss, the rank of its target and, in its place, its gradient."""
    WHOLE: tl.constexpr = V // BLOCK * BLOCK  # columns in blocks of words alone: nothing there asks for masks
    r = tl.program_id(0).to(tl.int64)
    given = tl.load(targets + r)  # compared as wide as it is: its lower half may be a word that it is not
    logits += r * stride_r
    column = tl.arange(0, BLOCK)

    if given == ignore:
        tl.store(partial + r, 0.0)
        tl.store(ranks + r, -1)
        if SLOPE:
            zero = tl.zeros([BLOCK], logits.dtype.element_ty)
            for start in range(0, C, BLOCK):
                tl.store(logits + start + column, zero, mask=start + column < C)
    else:
        named = (given >= 0) & (given < V)
        target = tl.where(named, given, -1).to(tl.int32)
        own = tl.load(logits + target, mask=named, other=float("nan")).to(tl.float32)

        highest = LOWEST
        mass = tl.zeros([BLOCK], tl.float32)
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, WHOLE, BLOCK):
            z = _load(logits, start, column, V, C, False)
            highest, mass, before = _take_in(z, column, target - start, own, highest, mass, before)
        for start in range(WHOLE, C, BLOCK):
            z = _load(logits, start, column, V, C, True)
            highest, mass, before = _take_in(z, column, target - start, own, highest, mass, before)
        lse = highest + tl.log2(tl.sum(mass, 0))

        loss = (lse - own * LOG2E) / LOG2E
        tl.store(partial + r, loss)
        tl.store(ranks + r, tl.where(tl.abs(loss) < float("inf"), tl.sum(before, 0), V))
        if SLOPE:
            for start in range(0, WHOLE, BLOCK):
                slope = _slope(_load(logits, start, column, V, C, False), column, target - start, lse)
                tl.store(logits + start + column, slope.to(logits.dtype.element_ty))
            for start in range(WHOLE, C, BLOCK):
                slope = _slope(_load(logits, start, column, V, C, True), column, target - start, lse)
                slope = tl.where(start + column < V, slope, 0.0)
                tl.store(logits + start + column, slope.to(logits.dtype.element_ty), mask=start + column < C)


# ---- launcher -------------------------------------------------------------------------------------------------------


def row_losses(
    logits: Tensor, targets: Tensor, partial: Tensor, ranks: Tensor, ignore: int, vocabulary: int, with_slope: bool
) -> None:
    """Fill partial [R] and ranks [R] from logits [R, C], which become their gradient, if asked for."""
    R, C = logits.shape
    launch(
        token_loss_kernel,
        (R,),
        config("token_loss", logits.device, logits.dtype, {"c": C}, rule(C)),
        logits=logits,
        targets=targets,
        partial=partial,
        ranks=ranks,
        stride_r=logits.stride(0),
        ignore=ignore,
        V=vocabulary,
        C=C,
        SLOPE=with_slope,
    )


# ---- what base and large launch --------------------------------------------------------------------------------------


def _alone(logits: Tensor, targets: Tensor, vocabulary: int, with_slope: bool) -> None:
    R, device = len(logits), logits.device
    losses, ranks = allocate((R,), torch.float32, device), allocate((R,), torch.int32, device)
    row_losses(logits, targets, losses, ranks, -1, vocabulary, with_slope)


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, recipe in RECIPES.items():
        for with_slope in (True, False):
            R = 4 * recipe.pairs
            logits = torch.randn(R, recipe.vocabulary, dtype=torch.bfloat16, device=device)
            targets = torch.randint(0, recipe.words, (R,), device=device)
            call = partial(_alone, logits, targets, recipe.words, with_slope)
            yield f"{name}, {'loss and gradient' if with_slope else 'loss alone'}", call
