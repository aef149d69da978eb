"""Patches and sequences as a user of torch would write them: what the ops of mvle_kernels are measured beside.

In their strong form: indices lie in memory as each function wants them, and nothing is charged for making them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_patches(images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images [B, height, width, 3] -> normalised patches [B, N, X] in float32."""
    middle, scale = (torch.tensor(x, device=images.device) for x in (mean, std))
    x = ((images / 255 - middle) / scale).unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def _chosen(x_BND: Tensor, index_BV: Tensor) -> Tensor:
    """Rows index [B, V] (int64) of each sequence: [B, V, D]."""
    return x_BND.gather(1, index_BV[..., None].expand(-1, -1, x_BND.shape[-1]))


def _whole(x_BND: Tensor, class_token: Tensor) -> Tensor:
    """The class token before the patches of each image: [B, N + 1, D]."""
    return torch.cat([class_token.expand(len(x_BND), 1, -1), x_BND], 1)


def replaced_views(
    x_BND: Tensor, positions: Tensor, class_token: Tensor, mask_token: Tensor, covered_BP: Tensor
) -> Tensor:
    """The whole view of each image, then each with the mask token where covered (bool, P = N + 1): [2 B P, D]."""
    whole = _whole(x_BND, class_token)
    # in this order torch.compile plans fewer passes for the backward than with the masked view made first
    return torch.cat([whole + positions, torch.where(covered_BP[..., None], mask_token, whole) + positions]).flatten(
        0, 1
    )


def dropped_views(x_BND: Tensor, positions: Tensor, class_token: Tensor, shown_BS: Tensor) -> Tensor:
    """The whole view of each image, then of each the positions shown, 0 (the class) first: [B (N + 1) + B S, D]."""
    whole = _whole(x_BND, class_token) + positions
    return torch.cat([whole.flatten(0, 1), _chosen(whole, shown_BS).flatten(0, 1)])


def inserted(rows: Tensor, mask_token: Tensor, positions: Tensor, covered_BP: Tensor, place_BP: Tensor) -> Tensor:
    """Class and visible rows of each image, [B S, D], with mask tokens where covered: [B P, D]. place: of each position
    that is not covered, its row among those of its image; anything where it is."""
    shown = _chosen(rows.unflatten(0, (len(place_BP), -1)), place_BP)
    return torch.where(covered_BP[..., None], mask_token + positions, shown).flatten(0, 1)
