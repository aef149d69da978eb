"""The sizes that the recipes base and large train at: what variants of kernels are compiled and held for.

A test holds them against configs/base.yaml and configs/large.yaml, which this library does not read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """width, heads of attention, width of the MLP, patches of an image and side of one, tokens of the longest caption,
    words of the vocabulary and rows of its matrix; of a batch: pairs, tokens of a caption (mean), masked patches of an
    image."""

    width: int
    heads: int
    mlp: int
    patches: int = 196
    patch: int = 16
    tokens: int = 32
    words: int = 50265
    vocabulary: int = 50304
    pairs: int = 256
    caption: int = 14
    masked: int = 120

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def values(self) -> int:
        """Values of a patch: X."""
        return 3 * self.patch * self.patch


RECIPES = {"base": Recipe(768, 12, 3072), "large": Recipe(1024, 16, 4096, pairs=64)}
