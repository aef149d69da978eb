"""Masked image modelling, p(image | text): masked pixels rebuilt from the visible ones and the whole caption.

L = sum over masked patches of |prediction - pixels| / (masked patches * X), pixels in normalised RGB.
A Laplace likelihood of the masked pixels, up to constants. The masked image asks, the caption is read by the image
cross encoder and again by the decoder, and a linear layer gives pixels of the masked patches only.
"""

from __future__ import annotations

from mvle_kernels import Packed, masked_pixel_loss, row_index

from ..data.batch import Batch
from ..model.config import ImageEncoderConfig
from ..model.heads import Heads
from ..model.queries import QuerySet, View
from ..model.step import Step, masked_patches
from .base import Result
from .config import MimConfig
from .masking import MaskingConfig


def mim_sets(step: Step, masking: MaskingConfig, context: View | None) -> list[QuerySet]:
    """The two questions of MIM: the image cross encoder (all rows, the decoder attends to them), then the decoder. Both
    read the same context."""
    masked = step.choices.masked
    assert masked is not None
    drop = masking.mode == "drop"
    behind_class = masked.with_rows(masked.rows + 1)
    return [
        QuerySet(
            "mim.cross",
            "image_cross",
            View.IMAGE_MASKED,
            context,
            insert=drop and masking.insert == "cross",
        ),
        QuerySet(
            "mim.decoder",
            "decoder",
            "mim.cross",
            context,
            insert=drop and masking.insert == "decoder",
            read=behind_class,
        ),
    ]


class Mim:
    """The objective; see the head of the file."""

    name = "mim"

    def __init__(self, config: MimConfig, masking: MaskingConfig, image: ImageEncoderConfig) -> None:
        self.config, self.masking, self.image = config, masking, image
        self.weight = config.weight

    def views(self) -> frozenset[View]:
        """The masked image, and what it reads of the caption: the whole, as a rule (masking.context)."""
        return frozenset(v for v in (View.IMAGE_MASKED, self.context) if v is not None)

    @property
    def context(self) -> View | None:
        """Which view of the caption it reads."""
        return self.masking.partner(View.TEXT_CLEAN, View.TEXT_MASKED)

    def count(self, batch: Batch) -> int:
        """Masked values: patches times X."""
        return masked_patches(batch, self.masking, self.image) * 3 * self.image.patch**2

    def sets(self, step: Step) -> list[QuerySet]:
        """See `mim_sets`."""
        return mim_sets(step, self.masking, self.context)

    def result(self, step: Step, rows: dict[str, Packed], heads: Heads) -> Result:
        """Sum of distances over the masked patches."""
        masked = step.choices.masked
        assert masked is not None
        sequence, _, real = row_index(masked)
        height, width = self.image.of(step.batch.images).grid
        which = (sequence * (height * width) + masked.rows).masked_fill(~real, -1)
        loss = masked_pixel_loss(
            heads.pixels(rows["mim.decoder"].rows),
            step.batch.images,
            which,
            self.image.patch,
            self.image.mean,
            self.image.std,
            self.config.kind,
            self.config.per_patch,
        )
        return Result(loss)
