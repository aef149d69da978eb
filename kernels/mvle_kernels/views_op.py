"""The views of an image as torch ops: what their launchers share, whoever wrote the kernels.

Launchers are `forward` and `backward` of views_triton.py or views_cuda.py; `by` names which.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, round_up
from .triton_support import define, launcher

WHOLE, REPLACED, SUBSET, NOTHING = range(4)  # kinds of views, as kernels know them


def type_of(*tensors: Tensor) -> torch.dtype:
    """What plain torch would add these in."""
    return reduce(torch.promote_types, [t.dtype for t in tensors])


# ---- forward and backward -------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    lists: Sequence[Tensor],
    kinds: Sequence[int],
    firsts: Sequence[int],
    total: int,
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [T, D], offsets [V B + 1], place [V, B, N + 1]: the row in which view v of image b shows position p; -1: it
    does not; -2 - row: that row shows the mask token).

    lists: patches and offsets of each view in turn that has a list. firsts: the first row of each view, and the row
    behind the last.
    """
    run = launcher("views", by).forward
    return run(x, positions, class_token, mask_token, lists, kinds, firsts, total)


def backward(
    gradient: Tensor, place: Tensor, masked: bool, dtype: torch.dtype, by: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x, of positions, of the mask token): the first in `dtype`, the others in float32."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    return launcher("views", by).backward(gradient, place, masked, dtype)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, D), V, total = x.shape, len(others[4]), others[6]
    rows = x.new_empty(total, D, dtype=type_of(x, *others[:3]))
    return rows, x.new_empty(V * B + 1, dtype=torch.int32), x.new_empty(V, B, N + 1, dtype=torch.int32)


def _backward_fake(gradient: Tensor, place: Tensor, masked: bool, dtype: torch.dtype, by: str) -> tuple[Tensor, ...]:
    (_, B, P), D = place.shape, gradient.shape[1]
    of_x = gradient.new_empty(B, P - 1, D, dtype=dtype)
    return of_x, *(gradient.new_empty(*shape, dtype=torch.float32) for shape in ((P, D), (D,)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])
    ctx.dtypes, ctx.lists, ctx.masked = [t.dtype for t in inputs[:4]], len(inputs[4]), REPLACED in inputs[5]
    ctx.by = inputs[-1]


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    x, positions, class_token, mask_token = ctx.dtypes
    of_x, of_positions, of_mask_token = backward_op(gradient, *ctx.saved_tensors, ctx.masked, x, ctx.by)
    of_class_token = of_positions[0].to(class_token, copy=True)  # the class token and its position get the same
    found = of_x, of_positions.to(positions), of_class_token, of_mask_token.to(mask_token)
    return *found, [None] * ctx.lists, *[None] * 4


backward_op = define(
    "embed_views_backward",
    "(Tensor gradient, Tensor place, bool masked, ScalarType dtype, str by) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
forward_op = define(
    "embed_views",
    "(Tensor x, Tensor positions, Tensor class_token, Tensor mask_token, Tensor[] lists, int[] kinds, SymInt[] firsts, "
    "SymInt total, str by) -> (Tensor, Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
)


# ---- the backend, as patches.py asks for it -------------------------------------------------------------------------


def embed_views(
    x: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    keep: Packed | None,
    masked: Packed | None,
    views: Sequence[str | Packed],
    row_multiple: int,
    by: str,
) -> Packed:
    """The backend of `embed_views`."""
    B, N, _ = x.shape
    kinds, lists = [], []
    lengths: list[int] = []
    firsts = [0]
    for view in views:
        shown = {"clean": None, "replace": masked, "drop": keep}[view] if isinstance(view, str) else view
        kinds.append(WHOLE if shown is None else REPLACED if view == "replace" else SUBSET)
        if shown is not None:
            lists += [shown.rows.contiguous(), shown.offsets.contiguous()]
        known = (shown.lengths or ()) if shown is not None and kinds[-1] == SUBSET else (N,) * B
        lengths += [n + 1 for n in known]
        firsts.append(firsts[-1] + sum(known) + B)
    total = round_up(firsts[-1], row_multiple)
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in (x, positions, class_token, mask_token)]
    rows, offsets, _ = forward_op(*given, lists, kinds, firsts, total, by)
    return Packed(rows, offsets, tuple(lengths), N + 1, total, min(lengths, default=0))
