"""Image-text contrast: the global tokens of a pair are nearer to each other than to those of every other pair.

L = mean over the 2 B rows (images to captions, captions to images) of the InfoNCE loss with a learned temperature;
pairs that share an image or a caption are not negatives of each other. See mvle_kernels/contrastive_loss.py.
"""

from __future__ import annotations

from typing import Any

from mvle_kernels import Packed, contrastive_loss

from ..data.batch import Batch
from ..model.heads import Heads
from ..model.queries import QuerySet, View
from ..model.step import Step
from .base import Result
from .config import ItcConfig


class Itc:
    """The objective; see the head of the file. `group` is the process group that holds the rest of the batch."""

    name = "itc"

    def __init__(self, config: ItcConfig) -> None:
        self.config = config
        self.weight = config.weight
        self.group: Any = None

    def views(self) -> frozenset[View]:
        """Both sides whole."""
        return frozenset({View.IMAGE_CLEAN, View.TEXT_CLEAN})

    def count(self, batch: Batch) -> int:
        """Rows of the two directions."""
        return 2 * len(batch)

    def sets(self, step: Step) -> list[QuerySet]:
        """None: the projected globals are enough."""
        return []

    def result(self, step: Step, rows: dict[str, Packed], heads: Heads) -> Result:
        """Sum over both directions, and how many rows rank their partner first."""
        assert step.image_z is not None and step.text_z is not None and step.temperature is not None
        batch = step.batch
        loss, correct = contrastive_loss(
            step.image_z, step.text_z, step.temperature, batch.image_ids, batch.text_ids, self.group
        )
        return Result(loss, {"itc_correct": correct})
