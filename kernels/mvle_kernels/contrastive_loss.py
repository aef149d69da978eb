"""The symmetric contrastive loss of images and captions over a whole (global) batch.

Math     S = image text^T / temperature over all pairs of the batch; for each pair i
         loss_i = [logsumexp_j S_ij - S_ii] + [logsumexp_j S_ji - S_ii], where j runs over i itself and every pair that
         shares neither image nor caption with i: equal images or captions are never negatives.
Cost     two products of 2 b (W b) d FLOPs on each of W ranks: nothing beside the encoders.
Exact    float32 at least. Across ranks: embeddings are gathered with gradient (backward: a reduce-scatter sum), each
         rank keeps its own rows and columns, so the sum over ranks is the loss of the global batch and so is its
         gradient.
Limits   the same number of pairs on each rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import Op

CONTRASTIVE = Op("contrastive_loss")


class Gather(torch.autograd.Function):
    """[b, ...] of each rank -> [W * b, ...] in rank order; its backward sums over ranks and gives each its own part.

    Not by torch's functional collectives: they return a tensor that a thread of gloo is still at work on, and with
    torch 2.14.1 a CPU rank then died of a damaged heap, once in some thousand steps on a busy machine.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        whole = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        collective("all_gather_single", "all_gather_into_tensor")(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        collective("reduce_scatter_single", "reduce_scatter_tensor")(own, grad.contiguous(), group=ctx.group)
        return own, None


def collective(name: str, before: str) -> Any:
    """A function of torch.distributed by its name since torch 2.13, or the one before."""
    return getattr(dist, name, None) or getattr(dist, before)


def gather(x: Tensor, group: Any) -> Tensor:
    """[b, ...] of each rank -> [W * b, ...] in rank order, with gradient if x is floating; x itself without a group."""
    return x if group is None else Gather.apply(x, group)


@CONTRASTIVE.register("reference", "two plain products")
@CONTRASTIVE.register("dense", "two plain products")  # applied bottom up: dense is asked first
def _loss(
    image: Tensor, text: Tensor, temperature: Tensor, image_ids: Tensor, text_ids: Tensor, group: Any
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(image.dtype, torch.float32)
    image, text = image.to(compute), text.to(compute)
    all_images, all_texts = gather(image, group), gather(text, group)
    start = 0
    if group is not None:
        start = dist.get_rank(group) * len(image)
    own = torch.arange(start, start + len(image), device=image.device)
    same = (image_ids[:, None] == gather(image_ids, group)) | (text_ids[:, None] == gather(text_ids, group))
    same.scatter_(1, own[:, None], False)
    loss, correct = image.new_zeros(()), torch.zeros((), dtype=torch.int64, device=image.device)
    for queries, answers in ((image, all_texts), (text, all_images)):
        scores = (queries @ answers.T / temperature.to(compute)).masked_fill(same, -torch.inf)
        loss = loss + (torch.logsumexp(scores, 1) - scores.gather(1, own[:, None]).squeeze(1)).sum()
        correct = correct + (scores.argmax(1) == own).sum()
    return loss, correct


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(sum over this rank's pairs of both directions' losses, how many of the 2 b rows rank their partner first).

    image, text float [b, d] of unit length; temperature [1]; image_ids, text_ids int64 [b]; group: the process group
    that holds the rest of the batch, None if there is none. Raises ValueError if image and text differ in shape.
    """
    if image.shape != text.shape or image.dim() != 2:
        raise ValueError(f"image and text must both be [b, d]; got {tuple(image.shape)} and {tuple(text.shape)}.")
    return CONTRASTIVE(image, text, temperature, image_ids, text_ids, group)
