"""Masked language modelling, p(text | image): masked words rebuilt from the visible ones and the whole image.

L = mean over masked tokens of -log p(token | visible tokens, image), in nats a token.
"""

from __future__ import annotations

from mvle_kernels import Packed, masked_token_loss

from ..data.batch import Batch
from ..model.heads import Heads
from ..model.queries import QuerySet, View
from ..model.step import Step, masked_token_count
from .base import Result
from .config import MlmConfig
from .masking import MaskingConfig


def mlm_sets(step: Step, context: View | None) -> list[QuerySet]:
    """The one question of MLM: the text cross encoder, read at the masked tokens."""
    assert step.choices.read is not None
    return [QuerySet("mlm", "text_cross", View.TEXT_MASKED, context, read=step.choices.read)]


class Mlm:
    """The objective; see the head of the file."""

    name = "mlm"

    def __init__(self, config: MlmConfig, masking: MaskingConfig) -> None:
        self.config, self.masking = config, masking
        self.weight = config.weight

    def views(self) -> frozenset[View]:
        """The masked caption, and what it reads of the image: the whole, as a rule (masking.context)."""
        return frozenset(v for v in (View.TEXT_MASKED, self.context) if v is not None)

    @property
    def context(self) -> View | None:
        """Which view of the image it reads."""
        return self.masking.partner(View.IMAGE_CLEAN, View.IMAGE_MASKED)

    def count(self, batch: Batch) -> int:
        """Masked tokens."""
        if batch.masks and "text" in batch.masks:
            return int(batch.masks["text"].sum())
        assert batch.text.lengths is not None
        return sum(masked_token_count(n, self.masking.text_ratio) for n in batch.text.lengths)

    def sets(self, step: Step) -> list[QuerySet]:
        """See `mlm_sets`."""
        return mlm_sets(step, self.context)

    def result(self, step: Step, rows: dict[str, Packed], heads: Heads) -> Result:
        """Sum of -log p over the masked tokens, and how many were right."""
        targets = step.choices.targets
        assert targets is not None
        loss, _, correct = masked_token_loss(
            rows["mlm"].rows, heads.tokens.weight, heads.tokens.bias, targets, vocabulary=heads.vocabulary
        )
        return Result(loss, {"mlm_correct": correct})
