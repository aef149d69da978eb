"""The views of an image by CUDA: csrc/cuda/views.cu has the maths, the cost and the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_support import native
from .triton_support import allocate
from .views_op import type_of

CHUNK = 64  # images whose gradients of positions one block sums


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
    """(rows [T, D], offsets [V B + 1], place [V, B, N + 1]): views_op.py says what of."""
    B, N, D = x.shape
    V, device = len(kinds), x.device
    rows = allocate((total, D), type_of(x, positions, class_token, mask_token), device)
    offsets = allocate((V * B + 1,), torch.int32, device)
    place = allocate((V, B, N + 1), torch.int32, device)
    lists = [numbers.int() for numbers in lists]
    run = native(x).embed_views
    run(x, positions, class_token, mask_token, lists, kinds, firsts, rows, offsets, place)
    return rows, offsets, place


def backward(gradient: Tensor, place: Tensor, masked: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x, of positions, of the mask token): the first in `dtype`, the others in float32."""
    _, B, P = place.shape
    D, device = gradient.shape[1], gradient.device
    chunks = -(-B // CHUNK)
    of_x = allocate((B, P - 1, D), dtype, device)
    of_positions = allocate((chunks, P, D), torch.float32, device)
    of_mask_token = allocate((chunks if masked else 0, P, D), torch.float32, device)
    run = native(gradient).embed_views_backward
    run(gradient, place, of_x, of_positions, of_mask_token, CHUNK)
    return of_x, of_positions.sum(0), of_mask_token.sum((0, 1))
