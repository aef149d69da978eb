"""The image encoder: a pre-norm ViT that reads every wanted view of a batch in one packed call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mvle_kernels import Packed, PatchView, attention_plan, embed_views, patchify
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Block


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
        """images uint8 [B, size, size, 3]; views as `embed_views` takes them -> Packed [T, D], views end to end."""
        image = self.config
        pixels = patchify(images, image.patch, image.mean, image.std, self.patch_embed.weight.dtype)
        packed = embed_views(
            self.patch_embed(pixels),
            self.positions,
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
