"""The text encoder: a post-norm RoBERTa that reads clean and masked captions in one packed call."""

from __future__ import annotations

import torch
from mvle_kernels import Packed, attention_plan, row_index
from torch import nn

from .config import ModelConfig
from .layers import PostNormBlock


class TextEncoder(nn.Module):
    """Packed token ids -> rows of the same layout; row 0 of each caption (bos) is its global token."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.width
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(config.text.max_tokens, width))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        inner = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(PostNormBlock(width, config.heads, inner) for _ in range(config.text.depth))

    def forward(self, tokens: Packed) -> Packed:
        """tokens Packed int32 [T] -> Packed [T, D]."""
        _, position, _ = row_index(tokens)
        x = self.norm(self.words(tokens.rows) + self.positions.index_select(0, position))
        plan = attention_plan(tokens, tokens)
        for block in self.blocks:
            x = block(x, plan)
        return tokens.with_rows(x)
