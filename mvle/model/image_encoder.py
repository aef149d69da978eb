"""The image encoder: a pre-norm ViT that reads every wanted view of a batch in one packed call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mvle_kernels import Packed, PatchView, attention_plan, embed_views, patchify
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Block


def resample_positions(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Positions [1 + rows * columns, D] of the class token and a grid of patches -> those of another grid, in the same
    dtype. The class token keeps its own, and the same grid gives the same tensor.

    By the filter that makes images smaller (a triangle as wide as the step between patches), so that a patch gets the
    mean of what it covers; to a finer grid that is linear interpolation, with edges held. As two products of
    matrices, whose backward has a fixed order on every device.
    """
    if grid == to:
        return positions
    compute = torch.promote_types(positions.dtype, torch.float32)
    x_RCD = positions[1:].to(compute).unflatten(0, grid)
    rows, columns = (_triangle(n, m, x_RCD) for n, m in zip(grid, to, strict=True))
    new = torch.einsum("ar,rcd,bc->abd", rows, x_RCD, columns).flatten(0, 1)
    return torch.cat([positions[:1], new.to(positions.dtype)])


def _triangle(n: int, m: int, like: Tensor) -> Tensor:
    """Weights [m, n] of n places in each of m that span the same length; every row sums to 1."""
    step = n / m
    there = (torch.arange(m, dtype=like.dtype, device=like.device) + 0.5) * step
    here = torch.arange(n, dtype=like.dtype, device=like.device) + 0.5
    weight = (1 - (there[:, None] - here).abs() / max(step, 1)).clamp(min=0)
    return weight / weight.sum(1, keepdim=True)


class ImageEncoder(nn.Module):
    """uint8 images -> rows of class token and patches, for each view asked for."""

    def __init__(self, config: ModelConfig, row_multiple: int) -> None:
        super().__init__()
        image, width = config.image, config.width
        rows, columns = image.grid
        self.config, self.row_multiple = image, row_multiple
        self.patch_embed = nn.Linear(3 * image.patch**2, width)
        self.class_token = nn.Parameter(torch.empty(width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(rows * columns + 1, width))
        inner = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, config.heads, inner) for _ in range(image.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, keep: Packed | None, masked: Packed | None, views: Sequence[PatchView]) -> Packed:
        """images uint8 [B, side, side, 3], side = model.image.size or less; views as `embed_views` takes them -> Packed
        [T, D], views end to end."""
        image = self.config
        pixels = patchify(images, image.patch, image.mean, image.std, self.patch_embed.weight.dtype)
        packed = embed_views(
            self.patch_embed(pixels),
            resample_positions(self.positions, image.grid, image.of(images).grid),
            self.class_token,
            self.mask_token,
            keep,
            masked,
            views,
            self.row_multiple,
        )
        plan = attention_plan(packed, packed)
        x = packed.rows
        for block in self.blocks:
            x = block(x, plan)
        return packed.with_rows(self.norm(x))
