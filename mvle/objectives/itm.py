"""Image-text matching: is this the caption of this image? With hard negatives, as ALBEF draws them.

For each pair: itself, its caption with another image, its image with another caption. The others are drawn within
the pair's group with probability softmax(contrastive similarity); pairs that share an image or a caption are
excluded, and a pair without a candidate is left out. Cross-entropy of two classes on the product of the two cross
encoders' global rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mvle_kernels import Packed, Stream, sample_negatives
from torch import Tensor

from ..data.batch import Batch
from ..model.heads import Heads
from ..model.queries import Draw, QuerySet, View
from ..model.step import Step
from .base import Result, forbidden_pairs
from .config import ItmConfig


def draw_negatives(step: Step, group: int) -> tuple[Draw, Draw, Tensor]:
    """(other image for each caption, other caption for each image, valid bool [B]); uniform if ITC is off."""
    batch = step.batch
    forbidden = forbidden_pairs(batch, group)
    similarity = torch.zeros(forbidden.shape, device=forbidden.device)
    if step.image_z is not None and step.text_z is not None and step.temperature is not None:
        image, text = step.image_z.detach().unflatten(0, (-1, group)), step.text_z.detach().unflatten(0, (-1, group))
        similarity = image @ text.transpose(1, 2) / step.temperature.detach().to(image.dtype)
    ids = batch.pair_ids.view(-1, group)
    first = torch.arange(0, len(batch), group, device=ids.device)[:, None]
    # both draws at once: an image for each caption, and a caption for each image
    streams = torch.arange(Stream.NEGATIVE_IMAGE, Stream.NEGATIVE_TEXT + 1, device=ids.device)[:, None, None]
    both = torch.stack([similarity.transpose(1, 2), similarity])
    index, valid = sample_negatives(step.seed, ids, both, forbidden, streams)
    other_image, other_text = (Draw(own.flatten(), group) for own in (index + first).to(torch.int32))
    return other_image, other_text, valid.flatten()


class Itm:
    """The objective; see the head of the file."""

    name = "itm"

    def __init__(self, config: ItmConfig) -> None:
        self.config = config
        self.weight = config.weight

    def views(self) -> frozenset[View]:
        """Both sides whole."""
        return frozenset({View.IMAGE_CLEAN, View.TEXT_CLEAN})

    def count(self, batch: Batch) -> Tensor:
        """Questions asked: one a pair, and two more where the pair has a candidate."""
        valid = ~forbidden_pairs(batch, self.config.group).all(-1)
        return len(batch) + 2 * valid.sum()

    def sets(self, step: Step) -> list[QuerySet]:
        """Three questions a pair to each side; the first self-attention and the contexts are shared."""
        image, text, step.itm_valid = draw_negatives(step, self.config.group)
        return [
            QuerySet(
                "itm.image",
                "image_cross",
                View.IMAGE_CLEAN,
                View.TEXT_CLEAN,
                expand=(None, image, None),
                kv_index=(None, None, text),
                read="global",
            ),
            QuerySet(
                "itm.text",
                "text_cross",
                View.TEXT_CLEAN,
                View.IMAGE_CLEAN,
                expand=(None, None, text),
                kv_index=(None, image, None),
                read="global",
            ),
        ]

    def result(self, step: Step, rows: dict[str, Packed], heads: Heads) -> Result:
        """Sum of the cross-entropies of the questions that count, and how many were answered right."""
        assert step.itm_valid is not None
        logits = heads.match_logits(rows["itm.image"].rows, rows["itm.text"].rows)
        pairs = len(step.batch)
        label = (torch.arange(3 * pairs, device=logits.device) < pairs).long()
        asked = torch.cat([torch.ones_like(step.itm_valid), step.itm_valid, step.itm_valid])
        loss = F.cross_entropy(logits, label, reduction="none")
        right = (logits.argmax(1) == label) & asked
        return Result(torch.where(asked, loss, torch.zeros_like(loss)).sum(), {"itm_correct": right.sum()})
