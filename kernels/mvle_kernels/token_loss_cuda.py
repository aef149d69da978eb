"""The row kernel of the token loss by CUDA: csrc/cuda/token_loss.cu has the maths, the cost and the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_support import native


def row_losses(
    logits: Tensor, targets: Tensor, partial: Tensor, ranks: Tensor, ignore: int, vocabulary: int, with_slope: bool
) -> None:
    """Fill partial [R] and ranks [R] from logits [R, C], which become their gradient, if asked for."""
    if targets.dtype not in (torch.int32, torch.int64):
        targets = targets.long()
    native(logits).token_loss_rows(logits, targets, partial, ranks, ignore, vocabulary, with_slope)
