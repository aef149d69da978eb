"""Counter-based randomness: Philox4x32-10, and the three random choices a step makes on the device.

Every draw is a pure function of (seed, stream, id, index): no generator state, so a mask is the same
bit for bit on any backend, any batch size, any order of the batch and any number of ranks.

Math     Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): ten rounds of two 32x32 -> 64
         bit products. key = seed (low, high); counter = (index, stream, id low, id high).
Cost     about 100 elementwise integer operations a word group; a step draws a few thousand groups.
Exact    plain int64 arithmetic. The 64-bit product wraps, and `(p >> 32) & 0xffffffff` of the wrapped product is
         still its true high word. The same expressions run on numpy arrays (the sampling plan) and on torch tensors.

`philox` is generic over both libraries; numpy is imported only when numpy asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, from_host, row_index

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a draw is for. Two streams never share a word; the numbers are part of every run's identity."""

    SHARD_ORDER = 0
    WINDOW_ORDER = 1
    SOURCE = 2
    CAPTION = 3
    CROP = 4
    SPARE = 5
    AUGMENTATION = 6
    PATCH_MASK = 7
    TOKEN_CHOICE = 8
    TOKEN_FATE = 9
    RANDOM_WORD = 10
    NEGATIVE_IMAGE = 11
    NEGATIVE_TEXT = 12
    EVALUATION = 13
    INITIAL_WEIGHTS = 14
    CLEAN_PATCHES = 15


def philox(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on four int64 arrays (numpy or torch) that hold 32-bit words; returns four such arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(seed: int, stream: Any, ids: Any, count: int) -> Any:
    """`count` 32-bit words for each id: int64 [..., count] of the library (numpy or torch) of `ids` (int64 [...]).

    stream: a number, or int64 numbers that broadcast against ids, so that several streams cost the launches of one.
    Word w of an id is lane w % 4 of the Philox block with index w // 4.
    """
    blocks: Any
    stack: Any
    if isinstance(ids, Tensor):
        blocks, stack = torch.arange((count + 3) // 4, device=ids.device, dtype=torch.int64), torch.stack
    else:
        import numpy

        ids = numpy.asarray(ids, dtype=numpy.int64)
        blocks, stack = numpy.arange((count + 3) // 4, dtype=numpy.int64), numpy.stack
    stream = int(stream) if isinstance(stream, int) else stream[..., None]
    # the four broadcast; after three rounds each has the whole shape
    counter = (blocks, stream, (ids & WORD)[..., None], ((ids >> 32) & WORD)[..., None])
    drawn = stack(philox(counter, split_seed(seed)), -1)
    return drawn.reshape(*drawn.shape[:-2], -1)[..., :count]


def split_seed(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a seed (any Python int; taken modulo 2^64)."""
    return seed & WORD, (seed >> 32) & WORD


def uniform(drawn: Any) -> Any:
    """32-bit words -> float64 in the open interval (0, 1)."""
    if isinstance(drawn, Tensor):
        drawn = drawn.double()  # an integer tensor plus 0.5 would be float32, where the largest words round to 1
    return (drawn + 0.5) / 4294967296.0


def exact_count(ratio: float, total: int) -> int:
    """ceil(ratio * total), immune to the last bit of the product (0.1 * 30 is 3.0000000000000004)."""
    return min(total, math.ceil(ratio * total - 1e-9))


def sample_patch_mask(
    seed: int,
    pair_ids: Tensor,
    grid: tuple[int, int],
    cell: int,
    counts: Sequence[int],
    row_multiple: int = 1,
    stream: int = Stream.PATCH_MASK,
) -> tuple[Packed, Packed]:
    """Which patches of each image stay visible and which are masked, in square cells chosen uniformly.

    pair_ids int64 [B]; grid = (rows, columns) of patches; cell = patches along a cell's side (it must divide the
    grid); counts = masked *cells* of each pair, known on the host; stream: what the draw is for, a masked view or the
    patches that a clean one goes without (CLEAN_PATCHES). Returns (keep, masked): Packed int32, ascending patch numbers
    0..N-1, with lengths on the host. Rows of the tail are zero.
    Raises ValueError for a cell that does not divide the grid or a count outside 0..cells.
    """
    height, width = grid
    if height % cell or width % cell:
        raise ValueError(f"cell must divide the patch grid {height} x {width}; got a cell of {cell} patches.")
    cells = (height // cell) * (width // cell)
    if len(counts) != pair_ids.numel() or any(not 0 <= c <= cells for c in counts):
        raise ValueError(
            f"counts must hold one number of masked cells in 0..{cells} for each of {pair_ids.numel()} pairs; "
            f"got {tuple(counts)}."
        )
    noise = words(seed, stream, pair_ids, cells)
    rank = torch.argsort(torch.argsort(noise, dim=1, stable=True), dim=1)
    wanted = from_host(counts, torch.int64, pair_ids.device).unsqueeze(1)
    masked_BN = (
        (rank < wanted)
        .view(-1, height // cell, 1, width // cell, 1)
        .expand(-1, -1, cell, -1, cell)
        .reshape(-1, height * width)
    )
    return pack_patch_mask(masked_BN, [c * cell * cell for c in counts], row_multiple)


def pack_patch_mask(masked_BN: Tensor, counts: Sequence[int], row_multiple: int = 1) -> tuple[Packed, Packed]:
    """A bool mask [B, N] (True = masked) with its host counts -> (keep, masked) as `sample_patch_mask` gives them."""
    patches = masked_BN.shape[1]
    order = torch.argsort(masked_BN.to(torch.uint8), dim=1, stable=True)  # the visible first, each part ascending
    packed: list[Packed] = []
    for lengths in ([patches - c for c in counts], counts):
        layout = Packed.layout_of(lengths, row_multiple, masked_BN.device, max_length=patches)
        sequence, position, real = row_index(layout)
        sequence = sequence.clamp(max=max(len(lengths) - 1, 0))
        if packed:  # the masked ones come behind those kept
            position = position + packed[0].offsets.diff()[sequence]
        rows = order[sequence, position.clamp(max=patches - 1)]
        packed.append(layout.with_rows((rows * real).to(torch.int32)))
    return packed[0], packed[1]


def sample_token_mask(
    seed: int,
    pair_ids: Tensor,
    tokens: Packed,
    maskable: Tensor,
    ratio: float,
    mask_id: int,
    vocabulary: int,
    maskable_counts: Sequence[int] | None = None,
    row_multiple: int = 1,
) -> tuple[Packed, Packed, Tensor]:
    """Choose max(1, ceil(ratio * maskable)) tokens of each caption; 80% become the mask token, 10% a random word.

    tokens Packed int32 [T]; maskable bool [T] (specials False); maskable_counts = how many are maskable in each
    caption, known on the host (None: counted here, which waits for the device).
    Returns (tokens with the masks in place, positions, targets): positions is Packed int32 [R] of rows of `tokens`,
    ascending in each caption, its lengths known on the host; targets int64 [R] are the original ids, -1 on the tail.
    A caption with nothing to mask has no positions.
    """
    sequence, position, real = row_index(tokens)
    maskable = maskable & real
    captions, longest = tokens.sequences, tokens.max_length
    if maskable_counts is None:
        per_caption = torch.zeros(captions + 1, dtype=torch.int64, device=maskable.device)
        per_caption.index_add_(0, sequence, maskable.long())
        maskable_counts = per_caption[:captions].tolist()  # sync: only for callers without host counts
    counts = tuple(0 if n == 0 else max(1, exact_count(ratio, n)) for n in maskable_counts)

    # 1) rank the maskable tokens of each caption by their noise; the first `count` are chosen
    offsets = tokens.offsets.long()
    slots = torch.arange(longest, device=maskable.device)
    row_SL = (offsets[:-1, None] + slots).clamp(max=max(tokens.total - 1, 0))
    inside = slots < (offsets[1:] - offsets[:-1])[:, None]
    open_SL = maskable[row_SL] & inside
    # choice, fate and random word at once: streams 8, 9 and 10
    streams = torch.arange(Stream.TOKEN_CHOICE, Stream.RANDOM_WORD + 1, device=maskable.device)[:, None]
    noise, fate, word = words(seed, streams, pair_ids, longest)
    rank = torch.argsort(torch.argsort(noise.masked_fill(~open_SL, WORD + 1), dim=1, stable=True), dim=1)
    layout = Packed.layout_of(counts, row_multiple, maskable.device, max_length=max(counts, default=0))
    chosen_SL = (rank < layout.offsets.diff()[:, None]) & open_SL

    # 2) positions, ascending, as a packed list of known size
    ascending = torch.argsort((~chosen_SL).to(torch.uint8), dim=1, stable=True)
    caption, k, used = row_index(layout)
    caption = caption.clamp(max=max(captions - 1, 0))
    column = ascending[caption, k.clamp(max=longest - 1)]
    rows = row_SL[caption, column] * used
    targets = torch.where(used, tokens.rows.long()[rows], -1)

    # 3) 80% mask token, 10% random word, 10% unchanged
    fate, word = uniform(fate), word % vocabulary
    now_SL = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, word, tokens.rows.long()[row_SL]))
    cut = position.clamp(max=longest - 1)
    chosen = chosen_SL[sequence.clamp(max=captions - 1), cut] & real
    replaced = torch.where(chosen, now_SL[sequence.clamp(max=captions - 1), cut], tokens.rows.long())
    return tokens.with_rows(replaced.to(tokens.rows.dtype)), layout.with_rows(rows.to(torch.int32)), targets


def sample_negatives(
    seed: int, pair_ids: Tensor, similarity: Tensor, forbidden: Tensor, stream: int | Tensor
) -> tuple[Tensor, Tensor]:
    """One negative for each row, drawn with probability softmax(similarity) over the candidates that are allowed.

    pair_ids int64 [..., G]; similarity float [..., G, C] (already divided by the temperature); forbidden bool of that
    shape. stream: what the draw is for; n draws are one call where similarity is a stack of theirs, [n, ..., G, C], and
    stream int64 [n, ..., 1] has their numbers. A draw is the Gumbel-argmax: noise word c belongs to candidate c.
    Returns (index int32 [..., G] or [n, ..., G] into the candidates, valid bool [..., G]); a row without a candidate is
    not valid and its index is 0.
    """
    noise = uniform(words(seed, stream, pair_ids, similarity.shape[-1]))
    score = similarity.double() - torch.log(-torch.log(noise))
    score = score.masked_fill(forbidden, -math.inf)
    valid = ~forbidden.all(dim=-1)
    return torch.where(valid, score.argmax(dim=-1), 0).to(torch.int32), valid
