"""Ranks as evaluation sees them: who has which chunk, and the sum of what all found.

A sharded model's forward is a collective: every rank must make as many calls as the others. Where the chunks do not go
round, a rank without one computes the last one again, and what it finds does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """This process among those that evaluate together (the engine's Parallel is one)."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def ranks(self) -> int:
        """How many there are."""

    def sum_on_cpu(self, tensor: Tensor) -> Tensor:
        """A tensor on the CPU, of one shape everywhere, summed over ranks; equal on every rank. May be in place."""


class Alone:
    """One process."""

    rank, ranks = 0, 1

    def sum_on_cpu(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def turns(chunks: Sequence[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """(chunk, whether it counts here): chunks rank, rank + ranks, ...; as many turns on every rank."""
    for first in range(0, len(chunks), ranks.ranks):
        at = first + ranks.rank
        yield chunks[min(at, len(chunks) - 1)], at < len(chunks)


def sum_figures(figures: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Figures summed over ranks by name, in float64. The names and their order are the same on every rank."""
    total = ranks.sum_on_cpu(torch.tensor(list(figures.values()), dtype=torch.float64))
    return dict(zip(figures, total.tolist(), strict=True))
