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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .recipes import RECIPES
from .token_loss import as_given, product
from .triton_support import allocate, define, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------

BUDGET_MIB = 512  # of logits alive at once: base and large at their own batches stay far below and are not cut


def rule(columns: int) -> dict[str, int]:
    """A row is one program. Eight values a thread at a time are one load of 16 bytes and at most 64 registers: two
    programs of 16 warps a multiprocessor, which is what 256 rows (large) fill."""
    block = power_of_2(min(columns, 4096), 32)
    return {"BLOCK": block, "num_warps": max(1, block // 256), "num_stages": 1}


def rows_of_a_chunk(rows: int, columns: int, size: int, budget_mib: float) -> int:
    """All rows where their logits fit into the budget, else chunks of about equal length that do."""
    most = max(1, int(budget_mib * 2**20) // (columns * size))
    return rows if rows <= most else -(-rows // -(-rows // most))


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


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a b in float32; fresh: whatever total was before, it is a b."""
    beta = 0.0 if fresh else 1.0
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def score(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    with_slope: bool,
    logits: Tensor,
    partial: Tensor,
    ranks: Tensor,
) -> None:
    """Fill logits [R, C] (with their gradient, if asked for), partial [R] and ranks [R]. All of one dtype: rows,
    weight, bias, logits."""
    R, C = logits.shape
    if bias is None:
        torch.mm(rows, weight.T, out=logits)
    else:
        torch.addmm(bias, rows, weight.T, out=logits)
    launch(
        token_loss_kernel,
        (R,),
        config("token_loss", rows.device, rows.dtype, {"c": C}, rule(C)),
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


def _sums(partial: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, rows with a target, rows whose best word is the target."""
    return partial.sum(), (ranks >= 0).sum(), (ranks == 0).sum()


def forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, correct, ranks [R], slope [R, C]; [0, C] without a backward)."""
    R, C, dtype, device = rows.shape[0], weight.shape[0], rows.dtype, rows.device
    logits = allocate((R, C), dtype, device)
    partial = allocate((R,), torch.float32, device)
    ranks = allocate((R,), torch.int32, device)
    with as_given(device):
        cast = None if bias is None else bias.to(dtype)
        score(rows, weight.to(dtype), cast, targets, ignore, vocabulary, with_slope, logits, partial, ranks)
    return *_sums(partial, ranks), ranks, logits if with_slope else logits.new_empty(0, C)


def forward_chunked(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    chunk: int,
    learns: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, correct, ranks [R], and in float32 the gradients of rows, weight and bias, for a gradient of the
    loss of 1). chunk: fewer than R rows. learns: which of the three are asked for; the others have length 0."""
    (R, D), C, dtype, device = rows.shape, weight.shape[0], rows.dtype, rows.device
    logits = allocate((chunk, C), dtype, device)
    partial = allocate((R,), torch.float32, device)
    ranks = allocate((R,), torch.int32, device)
    d_rows = allocate((R if learns[0] else 0, D), torch.float32, device)
    d_weight = allocate((C if learns[1] else 0, D), torch.float32, device)
    d_bias = torch.zeros(C if learns[2] else 0, dtype=torch.float32, device=device)
    with as_given(device):
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, R, chunk):
            part = slice(start, min(start + chunk, R))
            x, z = rows[part], logits[: part.stop - start]
            score(
                *(x, cast_weight, cast_bias, targets[part], ignore, vocabulary),
                *(any(learns), z, partial[part], ranks[part]),
            )
            if learns[0]:
                _add_product(d_rows[part], z, cast_weight, fresh=True)
            if learns[1]:
                _add_product(d_weight, z.T, x, fresh=start == 0)
            if learns[2]:
                d_bias += z.sum(0, dtype=torch.float32)
    d_weight[vocabulary:].zero_()  # 0 times a row that is not a number would be none
    return *_sums(partial, ranks), ranks, d_rows, d_weight, d_bias


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(rows: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    R, C = rows.shape[0], weight.shape[0]
    count, correct = (rows.new_empty((), dtype=torch.int64) for _ in range(2))
    slope = rows.new_empty(R if rest[-1] else 0, C)
    return rows.new_empty((), dtype=torch.float32), count, correct, rows.new_empty(R, dtype=torch.int32), slope


def _fake_chunked(rows: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (R, D), C = rows.shape, weight.shape[0]
    sums = _fake(rows, weight, False)[:4]
    shapes = [(R, D), (C, D), (C,)]
    kept = [(n if learns else 0, *more) for learns, (n, *more) in zip(rest[-1], shapes, strict=True)]
    return *sums, *(rows.new_empty(shape, dtype=torch.float32) for shape in kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weight, bias, _, _, ctx.vocabulary, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1], rows, weight)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    slope, rows, weight = ctx.saved_tensors
    d_rows = d_weight = d_bias = None
    with as_given(rows.device):
        if ctx.needs_input_grad[0]:
            d_rows = (product(slope, weight.to(rows.dtype), torch.float32) * gradient).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            scaled = (rows.float() * gradient).to(rows.dtype)  # [R, D] is scaled, not [C, D]
            d_weight = product(slope.T, scaled, weight.dtype)
            d_weight[ctx.vocabulary :].zero_()
        if ctx.needs_input_grad[2]:
            d_bias = (slope.sum(0, dtype=torch.float32) * gradient).to(ctx.bias_dtype)
    return d_rows, d_weight, d_bias, *[None] * 4


def _setup_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.learns = list(inputs[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])


def _backward_chunked(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.learns, strict=True)
    return *((d * gradient).to(dtype) if learns else None for d, dtype, learns in made), *[None] * 5


def _flops(rows: Tensor, weight: Tensor, *_: Any) -> int:
    """Of the forward; torch counts the two products of the backward."""
    return 2 * rows.shape[0] * weight.shape[0] * weight.shape[1]


def _flops_chunked(rows: Tensor, weight: Tensor, *rest: Any) -> int:
    return _flops(rows, weight) * (1 + sum(rest[-1][:2]))


_ARGUMENTS = "(Tensor rows, Tensor weight, Tensor? bias, Tensor targets, SymInt ignore, SymInt vocabulary, "
token_loss = define(
    "masked_token_loss",
    _ARGUMENTS + "bool with_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
    flops=_flops,
)
token_loss_chunked = define(
    "masked_token_loss_chunked",
    _ARGUMENTS + "SymInt chunk, bool[] learns) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward_chunked,
    _fake_chunked,
    setup=_setup_chunked,
    backward=_backward_chunked,
    flops=_flops_chunked,
)


def masked_token_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    budget_mib: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend: as token_loss.py asks for it. budget_mib: of logits; BUDGET_MIB."""
    learns = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (rows, weight, bias)]
    budget = BUDGET_MIB if budget_mib is None else budget_mib
    chunk = rows_of_a_chunk(rows.shape[0], weight.shape[0], rows.element_size(), budget)
    call = (rows, weight, bias, targets.contiguous(), ignore, vocabulary)
    if chunk >= rows.shape[0]:
        return token_loss(*call, any(learns))[:4]
    return token_loss_chunked(*call, chunk, learns)[:4]


# ---- what base and large launch --------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, recipe in RECIPES.items():
        for with_slope in (True, False):
            rows = torch.randn(4 * recipe.pairs, recipe.width, dtype=torch.bfloat16, device=device)
            weight = torch.randn(recipe.vocabulary, recipe.width, dtype=torch.bfloat16, device=device) * 0.02
            targets = torch.randint(0, recipe.words, (rows.shape[0],), device=device)
            call = partial(forward, rows, weight, weight[:, 0].contiguous(), targets, -1, recipe.words, with_slope)
            yield f"{name}, {'loss and gradient' if with_slope else 'loss alone'}", call
