"""Image-text contrast: the global tokens of a pair are nearer to each other than to those of every other pair.

L = mean over the 2 B rows (images to captions, captions to images) of the InfoNCE loss with a learned temperature;
pairs that share an image or a caption are not negatives of each other. See mvle_kernels/contrastive_loss.py.

The batch is the whole global one, also where a rank takes it in several micro-batches. Their embeddings z are then all
made first, without a graph; one loss over them gives g = dL/dz and dL/dtemperature; and the forward of each micro-batch
contributes sum(z * g), whose gradient is the micro-batch's part of the whole one. That is exact: there is no dropout,
so z is the same in both passes. It costs one more forward of the two encoders over clean views and no further gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mvle_kernels import Packed, contrastive_loss
from torch import Tensor

from ..data.batch import Batch
from ..model.heads import Heads
from ..model.queries import QuerySet, View
from ..model.step import Step
from .base import Result
from .config import ItcConfig


@dataclass(frozen=True, eq=False)
class ContrastPart:
    """What one micro-batch of b pairs contributes to the contrastive loss of the whole batch.

    image, text float [b, d]: gradient of the loss by its unit embeddings. The rest belongs to the batch as a whole and
    is given to its first micro-batch, the others have zeros: temperature [1], the gradient by it; loss and correct 0-d,
    the sums that `contrastive_loss` returns.
    """

    image: Tensor
    text: Tensor
    temperature: Tensor
    loss: Tensor
    correct: Tensor


def contrast_parts(
    embeddings: Sequence[tuple[Tensor, Tensor]], temperature: Tensor, batch: Batch, group: Any
) -> list[ContrastPart]:
    """The contrastive loss of the whole batch by parts, for micro-batches whose graphs are never alive together.

    embeddings: (image_z, text_z), each [b, d], of the micro-batches of this rank in order; temperature [1]; batch: all
    pairs of the rank; group: the process group that holds the other ranks' pairs. Every rank must call it.
    """
    image = torch.cat([image for image, _ in embeddings]).requires_grad_()
    text = torch.cat([text for _, text in embeddings]).requires_grad_()
    temperature = temperature.detach().requires_grad_()
    with torch.enable_grad():
        loss, correct = contrastive_loss(image, text, temperature, batch.image_ids, batch.text_ids, group)
    by_image, by_text, by_temperature = torch.autograd.grad(loss, (image, text, temperature))
    whole = (by_temperature, loss.detach(), correct)
    sizes = [len(image) for image, _ in embeddings]
    return [
        ContrastPart(i, t, *(whole if k == 0 else [torch.zeros_like(x) for x in whole]))
        for k, (i, t) in enumerate(zip(by_image.split(sizes), by_text.split(sizes), strict=True))
    ]


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
        if (part := step.contrast) is not None:
            carrier = (
                (step.image_z * part.image).sum()
                + (step.text_z * part.text).sum()
                + (step.temperature.to(part.temperature.dtype) * part.temperature).sum()
            )
            return Result(part.loss + (carrier - carrier.detach()), {"itc_correct": part.correct})
        loss, correct = contrastive_loss(
            step.image_z, step.text_z, step.temperature, batch.image_ids, batch.text_ids, self.group
        )
        return Result(loss, {"itc_correct": correct})
