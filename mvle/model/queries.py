"""What an objective may ask of the model: views of the pairs, and query sets over them.

An objective says what it needs, the model answers: it concatenates what was asked, runs each module once, and hands
each objective its rows. Sharing between objectives and pruning of what nobody reads follow from that alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from mvle_kernels import Packed
from torch import Tensor


class View(Enum):
    """One side of every pair, whole or masked."""

    IMAGE_CLEAN = "image clean"
    IMAGE_MASKED = "image masked"
    TEXT_CLEAN = "text clean"
    TEXT_MASKED = "text masked"


@dataclass(frozen=True, eq=False)
class Draw:
    """Other sequences in the place of the pairs' own: index int32 [P] into the batch.

    Drawn on the device from each pair's own group (group = its size), so the host knows no more than a bound on their
    rows; or chosen by the host (evaluation), which then gives their lengths.
    """

    index: Tensor
    group: int = 1
    lengths: tuple[int, ...] | None = None


Copies = tuple[Draw | None, ...]  # each part goes once over all pairs: in order (None), or as drawn

StageName = Literal["image_cross", "text_cross", "decoder"]


@dataclass(frozen=True, eq=False)
class QuerySet:
    """One question to a cross stage.

    source    a view, or the name of a set of an earlier stage: the sequences that ask
    context   the view of the other side that they read; None: nothing, and cross-attention is skipped
    insert    mask tokens enter here (drop mode)
    expand    source sequences, repeated: (None,) = each once; (None, draw, None) = in order, as drawn, in order
    kv_index  which pair's context each of them reads, in the same parts
    read      rows that the last block computes: "all", "global" (row 0 of each sequence), or Packed int32 positions in
              each sequence
    """

    name: str
    stage: StageName
    source: View | str
    context: View | None
    insert: bool = False
    expand: Copies = (None,)
    kv_index: Copies = (None,)
    read: Packed | Literal["all", "global"] = "all"

    def __post_init__(self) -> None:
        if len(self.expand) != len(self.kv_index):
            raise ValueError(
                f"expand and kv_index of set {self.name} must have the same number of parts; "
                f"got {len(self.expand)} and {len(self.kv_index)}."
            )
        if isinstance(self.read, Packed) and len(self.expand) != 1:
            raise ValueError(f"set {self.name} reads given positions, so it cannot repeat its sequences.")
