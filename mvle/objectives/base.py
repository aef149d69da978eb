"""What every objective is: what it needs, its denominator, and what it makes of the rows that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mvle_kernels import Packed
from torch import Tensor

from ..data.batch import Batch
from ..model.heads import Heads
from ..model.queries import QuerySet, View
from ..model.step import Step


@dataclass(frozen=True, eq=False)
class Result:
    """Sums over the (micro-)batch, never means: `loss` 0-d, `correct` per name; the caller divides by global counts."""

    loss: Tensor
    correct: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One loss of the paper. A new objective is a new file with these four methods."""

    name: str
    weight: float

    def views(self) -> frozenset[View]:
        """Which views its sets and losses read."""
        ...

    def count(self, batch: Batch) -> Tensor | int:
        """Its denominator on this rank, from lengths and ids alone: known before the first forward."""
        ...

    def sets(self, step: Step) -> list[QuerySet]:
        """Its questions to the cross stages, once the views are encoded."""
        ...

    def result(self, step: Step, rows: dict[str, Packed], heads: Heads) -> Result:
        """Its loss, from the rows of its sets."""
        ...


def forbidden_pairs(batch: Batch, group: int) -> Tensor:
    """bool [groups, G, G]: pairs of a group that share an image or a caption (each with itself too)."""
    image_ids, text_ids = batch.image_ids.view(-1, group), batch.text_ids.view(-1, group)
    return (image_ids[:, :, None] == image_ids[:, None]) | (text_ids[:, :, None] == text_ids[:, None])
