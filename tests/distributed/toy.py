"""A model small enough to reason about, with all that sharding treats apart: blocks, a float32 module, a buffer, a
parameter that gets no gradient, and sizes that no number of ranks divides."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    full_precision = True

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), 0.5))

    def forward(self) -> Tensor:
        return self.value * 1.0


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7)) for _ in range(2))
        self.temperature = Temperature()
        self.unused = nn.Linear(2, 3)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    def blocks_to_shard(self) -> list[nn.Module]:
        return list(self.blocks)

    def decay(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim >= 2

    def is_encoder(self, name: str) -> bool:
        return name.startswith("blocks.")

    def encode_images(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return (self.encode_images(x) / self.temperature() * self.scale[0]).pow(2).sum()


def pairs_of(step: int) -> Tensor:
    """The global batch of a step, float32 [8, 5]."""
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
