"""The views of an image in one buffer: rows are scattered to where they are shown, their gradients gathered back.

Math     `place` [V, B, N + 1] says in which row of the result view v of image b shows position p (0: the class token,
         n + 1: patch n); -1: it does not; -2 - row: that row shows the mask token. Forward: rows[place[v, b, p]] =
         (x[b, p - 1], the class token or the mask token) + positions[p]. Backward: the gradient of a patch is the sum
         over the views that show it, in order; those of positions, class token and mask token are sums over images,
         first of a chunk of them in one program, then of the chunks.
Cost     reads x once and writes the result once, in one launch; the backward reads the gradient of the result and
         writes that of x. Floor of base at 256 pairs, bfloat16, replace: 50176 rows in, 100864 out, of 768 values of 2
         bytes = 232 MB, and as much backward. Plain torch adds positions and chooses mask tokens in passes of their
         own, and copies views into the buffer: by count, 26 launches of 1036 MB and 16 of 763 MB.
Exact    float32, rounded once; sums of a fixed order, no atomics: bitwise repeatable.
Limits   a view shows a patch at most once; fewer than 2^31 rows.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .packed import round_up
from .recipes import RECIPES
from .triton_support import allocate, launch, power_of_2
from .views_op import NOTHING, REPLACED, SUBSET, WHOLE, type_of

CHUNK = 64  # images whose gradients of positions one program sums

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(width: int) -> dict[str, int]:
    """8 positions of an image, 256 of their values at a time: a warp reads 16 bytes a thread of one row."""
    return {"ROWS": 8, "BLOCK_D": min(power_of_2(width, 16), 256), "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}


def backward_rule(width: int) -> dict[str, int]:
    """One position of 8 images at a time, 256 of its values: sums stay in registers until the chunk ends."""
    return {"ROWS": 8, "BLOCK_D": min(power_of_2(width, 16), 256), "num_warps": 4, "num_stages": 1}


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def places(b, p, shown, ends, first, KIND: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """`place` of positions p of image b in a view whose first row is `first`.

    A list of patches is turned round by comparing: its places are few, and nobody has to sort.
    """
    if KIND == 3:
        return tl.zeros_like(p) - 1
    row = first + b * P + p
    if KIND == 0:
        return row
    begin = tl.load(ends + b)
    count = tl.load(ends + b + 1) - begin
    found = tl.zeros_like(p)  # where in the list the position's patch stands, from 1; 0: it does not
    for start in range(0, P - 1, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        n = tl.load(shown + begin + i, mask=i < count, other=-2).to(tl.int32)
        hit = n[None, :] + 1 == p[:, None]
        found = tl.maximum(found, tl.max(tl.where(hit, i[None, :] + 1, 0), 1))
    if KIND == 1:
        return tl.where(found > 0, -2 - row, row)
    return tl.where((p == 0) | (found > 0), first + begin + b + found, -1)


@triton.jit(do_not_specialize=["first_a", "first_b", "end", "tail"])
def embed_kernel(
    # inputs
    x,
    positions,
    class_token,
    mask_token,
    shown_a,
    ends_a,
    shown_b,
    ends_b,
    # outputs
    rows,
    offsets,
    place,
    # sizes
    images,
    first_a,  # first row of each view, the row behind both, and rows of zeros from there on
    first_b,
    end,
    tail,
    # strides
    stride_b,
    stride_n,
    stride_p,
    # compile-time
    KIND_A: tl.constexpr,
    KIND_B: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A few positions of one image, in two views; or a few rows of the tail."""
    blocks: tl.constexpr = (P + ROWS - 1) // ROWS
    views: tl.constexpr = 1 if KIND_B == 3 else 2
    program = tl.program_id(0)
    b = program // blocks
    kind = rows.dtype.element_ty
    if b < images:
        p = (program % blocks) * ROWS + tl.arange(0, ROWS)
        real = p < P
        a = places(b, p, shown_a, ends_a, first_a, KIND_A, P, BLOCK_N)
        c = places(b, p, shown_b, ends_b, first_b, KIND_B, P, BLOCK_N)
        slot = b.to(tl.int64) * P + p
        tl.store(place + slot, a, mask=real)
        tl.store(offsets + b + tl.zeros_like(p), a, mask=p == 0)
        if views == 2:
            tl.store(place + (slot + images * P), c, mask=real)
            tl.store(offsets + images + b + tl.zeros_like(p), c, mask=p == 0)
        row_a = tl.where(a < -1, -2 - a, a).to(tl.int64)[:, None] * D
        row_c = tl.where(c < -1, -2 - c, c).to(tl.int64)[:, None] * D
        source = x + b.to(tl.int64) * stride_b + (p - 1).to(tl.int64)[:, None] * stride_n
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            inside = real[:, None] & (d < D)
            patch = tl.load(source + d, mask=inside & (p > 0)[:, None], other=0).to(tl.float32)
            position = tl.load(positions + p.to(tl.int64)[:, None] * stride_p + d, mask=inside, other=0).to(tl.float32)
            first = tl.load(class_token + d, mask=d < D, other=0).to(tl.float32)
            shows = tl.where((p == 0)[:, None], first, patch) + position
            covers = position
            if KIND_A == 1 or KIND_B == 1:
                covers += tl.load(mask_token + d, mask=d < D, other=0).to(tl.float32)
            value = tl.where((a < -1)[:, None], covers, shows)
            tl.store(rows + row_a + d, value.to(kind), mask=inside & (a != -1)[:, None])
            if views == 2:
                value = tl.where((c < -1)[:, None], covers, shows)
                tl.store(rows + row_c + d, value.to(kind), mask=inside & (c != -1)[:, None])
    else:
        t = (program - images * blocks) * ROWS + tl.arange(0, ROWS)
        tl.store(offsets + views * images + tl.zeros_like(t), tl.zeros_like(t) + end, mask=t == 0)
        row = (end + t).to(tl.int64)[:, None] * D
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            zero = tl.zeros([ROWS, BLOCK_D], kind)
            tl.store(rows + row + d, zero, mask=(t < tail)[:, None] & (d < D))


@triton.jit
def embed_backward_kernel(
    # inputs
    gradient,
    place,
    # outputs
    of_x,
    of_positions,  # of each chunk, and what of it came through mask tokens
    of_mask_token,
    # sizes
    images,
    # strides
    stride_r,
    # compile-time
    V: tl.constexpr,
    MASKED: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One position in a chunk of the images."""
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p, chunk = program // columns % P, program // columns // P
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    covered = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, CHUNK, ROWS):
        b = (chunk * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (b < images)[:, None] & (d < D)
        own = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for v in tl.static_range(V):
            at = tl.load(place + (b + v * images) * P + p, mask=b < images, other=-1)
            row = tl.where(at < -1, -2 - at, at).to(tl.int64)[:, None] * stride_r
            g = tl.load(gradient + row + d, mask=inside & (at != -1)[:, None], other=0).to(tl.float32)
            if MASKED:
                own += tl.where((at < -1)[:, None], 0.0, g)
                covered += tl.where((at < -1)[:, None], g, 0.0)
            else:
                own += g
        of_patch = of_x + (b[:, None] * (P - 1) + p - 1) * D + d
        tl.store(of_patch, own.to(of_x.dtype.element_ty), mask=inside & (p > 0))
        total += own

    part = (chunk.to(tl.int64) * P + p) * D + d
    summed = tl.sum(total, 0, keep_dims=True)
    if MASKED:
        through = tl.sum(covered, 0, keep_dims=True)
        summed += through
        tl.store(of_mask_token + part, through, mask=d < D)
    tl.store(of_positions + part, summed, mask=d < D)


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    lists: Sequence[Tensor],
    kinds: Sequence[int],
    firsts: Sequence[int],
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [T, D], offsets [V B + 1], place [V, B, N + 1]).

    lists: patches and offsets of each view in turn that has a list. firsts: the first row of each view, and the row
    behind the last. Two views are one launch.
    """
    B, N, D = x.shape
    V, device = len(kinds), x.device
    rows = allocate((total, D), type_of(x, positions, class_token, mask_token), device)
    offsets = allocate((V * B + 1,), torch.int32, device)
    place = allocate((V, B, N + 1), torch.int32, device)
    chosen: Mapping[str, int] = config("embed_views", device, rows.dtype, {"d": D}, rule(D))
    given = iter(lists)
    pairs = [(next(given), next(given)) if kind in (REPLACED, SUBSET) else (place, place) for kind in kinds]
    for v in range(0, V, 2):
        w = min(v + 1, V - 1)
        tail = total - firsts[-1] if v + 2 >= V else 0
        programs = B * -(-(N + 1) // chosen["ROWS"]) + max(1, -(-tail // chosen["ROWS"]))
        launch(
            embed_kernel,
            (programs,),
            chosen,
            x=x,
            positions=positions,
            class_token=class_token,
            mask_token=mask_token,
            shown_a=pairs[v][0],
            ends_a=pairs[v][1],
            shown_b=pairs[w][0],
            ends_b=pairs[w][1],
            rows=rows,
            offsets=offsets[v * B :],
            place=place[v:],
            images=B,
            first_a=firsts[v],
            first_b=firsts[w],
            end=firsts[min(v + 2, V)],
            tail=tail,
            stride_b=x.stride(0),
            stride_n=x.stride(1),
            stride_p=positions.stride(0),
            KIND_A=kinds[v],
            KIND_B=kinds[w] if w > v else NOTHING,
            P=N + 1,
            D=D,
        )
    return rows, offsets, place


def backward(gradient: Tensor, place: Tensor, masked: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x, of positions, of the mask token): the first in `dtype`, the others in float32."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    V, B, P = place.shape
    D, device = gradient.shape[1], gradient.device
    chunks = -(-B // CHUNK)
    of_x = allocate((B, P - 1, D), dtype, device)
    of_positions = allocate((chunks, P, D), torch.float32, device)
    of_mask_token = allocate((chunks if masked else 0, P, D), torch.float32, device)
    chosen: Mapping[str, int] = config("embed_views_backward", device, gradient.dtype, {"d": D}, backward_rule(D))
    launch(
        embed_backward_kernel,
        (-(-D // chosen["BLOCK_D"]) * P * chunks,),
        chosen,
        gradient=gradient,
        place=place,
        of_x=of_x,
        of_positions=of_positions,
        of_mask_token=of_mask_token,
        images=B,
        stride_r=gradient.stride(0),
        V=V,
        MASKED=masked,
        P=P,
        D=D,
        CHUNK=CHUNK,
    )
    return of_x, of_positions.sum(0), of_mask_token.sum((0, 1))


# ---- what base and large launch -------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    make = partial(torch.randn, dtype=torch.bfloat16, device=device)
    for name, recipe in RECIPES.items():
        B, N, D = recipe.pairs, recipe.patches, recipe.width
        x, positions = make(B, N, D), make(N + 1, D)
        for mode, second, listed in (("replace", REPLACED, recipe.masked), ("drop", SUBSET, N - recipe.masked)):
            firsts = [0, B * (N + 1), B * (N + 1) + B * ((N if mode == "replace" else listed) + 1)]
            patches = torch.arange(listed, dtype=torch.int32, device=device).repeat(B)
            lists = [patches, torch.arange(B + 1, dtype=torch.int32, device=device) * listed]
            total, token = round_up(firsts[-1], 128), positions[0]
            views = x, positions, token, token, lists, [WHOLE, second], firsts, total
            yield f"{name}, {mode}, forward", partial(forward, *views)
            gradient = make(total, D)
            place = torch.empty(2, B, N + 1, dtype=torch.int32, device=device)
            if not place.is_meta:
                place = forward(*views)[2]
            yield f"{name}, {mode}, backward", partial(backward, gradient, place, second == REPLACED, x.dtype)
