"""Retrieval: which caption belongs to this image, and which image to this caption; and what the matching head says.

R@k = share of queries whose right answer is among the first k. Rules, the same in both directions:

    several captions   Karpathy's protocol: an image is right if *any* of its captions is within k; each caption asks
    equal ones         a caption that equals one of the image's, and an image with the same bytes, are right too
    ties               count against the query: equal scores, or a NaN, never help
    reranking          the first k candidates by contrastive similarity s, in the order of s / temperature + m, where m
                       are the log-odds of the matching head; behind them the rest, as they were

Why the sum: the head is trained to tell the true partner from negatives drawn with probability
softmax(s / temperature), so at its best m is the log of p(partner | query) over *that* proposal, and the proposal's own
logarithm, s / temperature, has to be added back. m alone would rank by what similarity does not know yet.

Scores are made for `CHUNK` queries at a time and never for all pairs at once. Encoded rows wait in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mvle_kernels import Packed
from torch import Tensor

from ..model.model import MaskVLM
from .ranks import Alone, Ranks, turns
from .split import Split

CHUNK = 128  # queries whose scores exist at one time
MATCHES = 256  # pairs of one call of the matching head
KS = (1, 5, 10)


@dataclass(eq=False)
class Embedded:
    """A split after the encoders, on the CPU.

    image_z [I, d], text_z [C, d] float32 of unit length · owner int64 [C], the image of each caption ·
    image_ids int64 [I] · text_ids int64 [C] · known int64 [I, m]: text ids of all captions of each image, repeated to
    the longest · image_rows, text_rows: encoder rows [length, D] of each, or empty lists
    """

    image_z: Tensor
    text_z: Tensor
    owner: Tensor
    image_ids: Tensor
    text_ids: Tensor
    known: Tensor
    image_rows: list[Tensor]
    text_rows: list[Tensor]

    def right(self, images: slice) -> Tensor:
        """bool [images, C]: which captions are right for these images."""
        same = self.image_ids[images, None] == self.image_ids[self.owner][None]
        for column in self.known[images].unbind(1):
            same |= column[:, None] == self.text_ids[None]
        return same

    def right_images(self, captions: slice) -> Tensor:
        """bool [captions, I]: which images are right for these captions."""
        same = self.image_ids[self.owner[captions]][:, None] == self.image_ids[None]
        for column in self.known.unbind(1):
            same |= self.text_ids[captions, None] == column[None]
        return same


def embed(
    model: MaskVLM,
    split: Split,
    device: torch.device | str,
    captions: str = "first",
    keep_rows: bool = True,
    ranks: Ranks | None = None,
) -> Embedded:
    """Encode a split. captions: all | first of each image. keep_rows: for `match` later. ranks: all of them share the
    work, and each gets all embeddings; not together with keep_rows, since encoder rows stay where they were made."""
    ranks = ranks or Alone()
    assert not (keep_rows and ranks.ranks > 1), "encoder rows are not gathered; pass keep_rows=False on several ranks"
    use = [c[:1] if captions == "first" else c for c in split.captions]
    flat = [caption for own in use for caption in own]
    width = model.config.model.projection
    image_z, text_z = torch.zeros(len(use), width), torch.zeros(len(flat), width)
    image_rows, text_rows = [], []
    for rows, mine in turns(list(split.chunks()), ranks):
        images = model.encode_images(split.batch(rows).images.to(device))
        if mine:
            image_z[rows.start : rows.stop] = images.z.float().cpu()  # sync: evaluation
        if keep_rows:
            image_rows += [r.cpu() for r in images.rows.unpack()]  # sync: evaluation
    for part, mine in turns(slices(len(flat)), ranks):
        texts = model.encode_texts(split.text(flat[part]).to(device))
        if mine:
            text_z[part] = texts.z.float().cpu()  # sync: evaluation
        if keep_rows:
            text_rows += [r.cpu() for r in texts.rows.unpack()]  # sync: evaluation
    most = max(map(len, split.text_ids))
    return Embedded(
        # other ranks' rows are zeros here, so sums have each row to the bit
        image_z=ranks.sum_on_cpu(image_z),
        text_z=ranks.sum_on_cpu(text_z),
        owner=torch.tensor([row for row, own in enumerate(use) for _ in own]),
        image_ids=torch.tensor(split.image_ids),
        text_ids=torch.tensor([i for own, ids in zip(use, split.text_ids, strict=True) for i in ids[: len(own)]]),
        known=torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in split.text_ids]),
        image_rows=image_rows,
        text_rows=text_rows,
    )


# ---- ranks ----------------------------------------------------------------------------------------------------------


def best_rank(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
    """int64 [Q]: how many wrong candidates come before the best right one, or level with it."""
    best = scores_QC.masked_fill(~right_QC, -torch.inf).amax(1, keepdim=True)
    ahead = ~right_QC & ~(scores_QC < best)  # not "less", rather than "at least": a NaN is never behind
    return ahead.sum(1)


def recalls(ranks: Tensor) -> dict[str, float]:
    """{"r1", "r5", "r10"} of ranks counted from 0."""
    return {f"r{k}": float((ranks < k).double().mean()) for k in KS}


def contrastive_ranks(found: Embedded) -> tuple[Tensor, Tensor]:
    """Ranks by similarity alone: of each image's best caption, of each caption's image."""
    to_text = [
        best_rank(found.image_z[part] @ found.text_z.T, found.right(part)) for part in slices(len(found.image_z))
    ]
    to_image = [
        best_rank(found.text_z[part] @ found.image_z.T, found.right_images(part)) for part in slices(len(found.text_z))
    ]
    return torch.cat(to_text), torch.cat(to_image)


def slices(total: int, size: int = CHUNK) -> list[slice]:
    """0 .. total, `size` at a time."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


# ---- the matching head ----------------------------------------------------------------------------------------------


def match_pairs(
    model: MaskVLM, found: Embedded, image_index: Sequence[int], text_index: Sequence[int], device: torch.device | str
) -> Tensor:
    """Log-odds float32 [P] on the CPU that images and captions belong together, `MATCHES` pairs at a time."""
    parts = []
    for part in slices(len(image_index), MATCHES):
        images, image_at = torch.unique(torch.tensor(image_index[part]), return_inverse=True)
        texts, text_at = torch.unique(torch.tensor(text_index[part]), return_inverse=True)
        image_rows = Packed.of([found.image_rows[i] for i in images.tolist()]).to(device)
        text_rows = Packed.of([found.text_rows[i] for i in texts.tolist()]).to(device)
        odds = model.match(image_rows, text_rows, image_at.to(device), text_at.to(device))
        parts.append(odds.float().cpu())  # sync: evaluation
    return torch.cat(parts) if parts else torch.zeros(0)


def reranked_ranks(
    model: MaskVLM, found: Embedded, k: int, temperature: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Ranks after the matching head reordered the first k candidates of each query, both directions."""
    images, texts = len(found.image_z), len(found.text_z)
    to_text = top(found.image_z, found.text_z, k)
    to_image = top(found.text_z, found.image_z, k)
    # a pair that both directions ask for is matched once; sorted by image, so that neighbours share rows
    asked = torch.cat([
        (torch.arange(images)[:, None] * texts + to_text).flatten(),
        (to_image * texts + torch.arange(texts)[:, None]).flatten(),
    ])  # fmt: skip
    pairs = torch.unique(asked)
    odds = match_pairs(model, found, (pairs // texts).tolist(), (pairs % texts).tolist(), device)
    odds = odds[torch.searchsorted(pairs, asked)]
    split_at = to_text.numel()
    odds_text, odds_image = odds[:split_at].view_as(to_text), odds[split_at:].view_as(to_image)
    ranks = []
    for queries, candidates, index, match, right in (
        (found.image_z, found.text_z, to_text, odds_text, found.right),
        (found.text_z, found.image_z, to_image, odds_image, found.right_images),
    ):
        parts = []
        for part in slices(len(queries)):
            similarity, truth = queries[part] @ candidates.T, right(part)
            scores = similarity.gather(1, index[part]) / temperature + match[part]
            parts.append(rerank(similarity, truth, index[part], scores))
        ranks.append(torch.cat(parts))
    return ranks[0], ranks[1]


def top(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k most similar candidates of each query, int64 [Q, k]."""
    k = min(k, len(candidates))
    return torch.cat([(queries[part] @ candidates.T).topk(k, dim=1).indices for part in slices(len(queries))])


def rerank(similarity_QC: Tensor, right_QC: Tensor, index_QK: Tensor, scores_QK: Tensor) -> Tensor:
    """Ranks int64 [Q] when candidates `index` are ordered by `scores`, and all others behind them by similarity."""
    right_QK = right_QC.gather(1, index_QK)
    behind = best_rank(similarity_QC, right_QC)
    return torch.where(right_QK.any(1), best_rank(scores_QK, right_QK), behind)


def retrieval(
    model: MaskVLM, found: Embedded, k: int, device: torch.device | str, rerank_too: bool = True
) -> dict[str, Any]:
    """The "retrieval" part of evaluation.json; "reranked" only where a matching head was trained."""
    to_text, to_image = contrastive_ranks(found)
    out: dict[str, Any] = {"k": k, "itc": {"image_to_text": recalls(to_text), "text_to_image": recalls(to_image)}}
    if rerank_too:
        temperature = float(model.heads.temperature())
        to_text, to_image = reranked_ranks(model, found, k, temperature, device)
        out["reranked"] = {"image_to_text": recalls(to_text), "text_to_image": recalls(to_image)}
    return out
