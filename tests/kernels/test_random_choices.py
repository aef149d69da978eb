"""The three choices of a step: patch masks, token masks, hard negatives."""

from __future__ import annotations

import math

import pytest
import torch
from mvle_kernels import (
    Packed,
    Stream,
    mask_of,
    pack_patch_mask,
    sample_negatives,
    sample_patch_mask,
    sample_token_mask,
)
from torch import Tensor

FAR = 2**35  # ids whose high word is not 0

# ---- patches --------------------------------------------------------------------------------------------------------


def test_every_pair_masks_exactly_its_count_of_whole_cells_in_ascending_order() -> None:
    counts = [0, 1, 5, 11, 12]
    keep, masked = sample_patch_mask(0, torch.arange(5) + FAR, (6, 8), 2, counts, row_multiple=16)
    assert masked.lengths == tuple(4 * c for c in counts)
    assert keep.lengths == tuple(48 - 4 * c for c in counts)
    assert masked.rows.dtype == keep.rows.dtype == torch.int32
    assert masked.total % 16 == 0 and not masked.rows[sum(masked.lengths) :].any()
    for kept, gone in zip(keep.unpack(), masked.unpack(), strict=True):
        assert kept.tolist() == sorted(kept.tolist()) and gone.tolist() == sorted(gone.tolist())
        assert sorted(kept.tolist() + gone.tolist()) == list(range(48))
        grid = torch.zeros(48, dtype=torch.bool)
        grid[gone.long()] = True
        cells = grid.view(3, 2, 4, 2).transpose(1, 2).flatten(2).float().mean(-1)
        assert set(cells.flatten().tolist()) <= {0.0, 1.0}


def test_patch_masks_depend_on_seed_and_pair_alone() -> None:
    ids = torch.arange(6) + FAR
    counts = [3, 4, 5, 6, 7, 8]
    _, whole = sample_patch_mask(9, ids, (4, 4), 1, counts)
    order = [4, 0, 5, 2]
    _, some = sample_patch_mask(9, ids[order], (4, 4), 1, [counts[i] for i in order], row_multiple=8)
    for i, rows in zip(order, some.unpack(), strict=True):
        assert torch.equal(rows, whole.unpack()[i])
    _, other = sample_patch_mask(10, ids, (4, 4), 1, counts)
    assert not torch.equal(other.rows, whole.rows)


def test_a_larger_count_masks_a_superset() -> None:
    ids = torch.arange(20)
    _, few = sample_patch_mask(0, ids, (4, 4), 1, [5] * 20)
    _, many = sample_patch_mask(0, ids, (4, 4), 1, [9] * 20)
    assert not (mask_of(few, 16) & ~mask_of(many, 16)).any()


def test_every_cell_is_masked_equally_often() -> None:
    pairs = 4000
    _, masked = sample_patch_mask(1, torch.arange(pairs), (4, 4), 1, [10] * pairs)
    share = mask_of(masked, 16).double().mean(0)
    bound = 5 * math.sqrt(0.625 * 0.375 / pairs)
    assert (share - 0.625).abs().max() < bound


def test_patch_masks_refuse_cells_and_counts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="cell must divide the patch grid 4 x 6; got a cell of 4"):
        sample_patch_mask(0, torch.arange(1), (4, 6), 4, [1])
    for counts in ([5, 1], [-1, 1], [1]):
        with pytest.raises(ValueError, match=r"0\.\.4 for each of 2 pairs"):
            sample_patch_mask(0, torch.arange(2), (4, 4), 2, counts)


def test_given_masks_are_packed_like_drawn_ones() -> None:
    keep, masked = sample_patch_mask(3, torch.arange(4), (4, 4), 2, [0, 1, 3, 4], row_multiple=8)
    again = pack_patch_mask(mask_of(masked, 16), [0, 4, 12, 16], row_multiple=8)
    for a, b in zip((keep, masked), again, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.offsets, b.offsets) and a.lengths == b.lengths


# ---- tokens ---------------------------------------------------------------------------------------------------------

MASK_ID, VOCABULARY = 4, 1000


def captions(lengths: list[int], row_multiple: int = 8, seed: int = 0) -> tuple[Packed, Tensor]:
    """Captions of ids 5.., bos 0 and eos 2, and which rows are maskable."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    for row in rows:
        if len(row):
            row[0], row[-1] = 0, 2
    text = Packed.of(rows, row_multiple)
    return text, (text.rows != 0) & (text.rows != 2)


def chosen(seed: int, ids: Tensor, text: Packed, maskable: Tensor, ratio: float = 0.3, **kw: object) -> tuple:
    return sample_token_mask(seed, ids, text, maskable, ratio, MASK_ID, VOCABULARY, **kw)


def test_every_caption_masks_its_exact_count_and_never_a_special() -> None:
    lengths = [2, 3, 5, 12, 13, 32, 0, 7]
    text, maskable = captions(lengths)
    tokens, positions, targets = chosen(0, torch.arange(8) + FAR, text, maskable, row_multiple=16)
    assert positions.lengths == tuple(0 if n < 3 else max(1, math.ceil(0.3 * (n - 2) - 1e-9)) for n in lengths)
    real = sum(positions.lengths)
    rows = positions.rows[:real].long()
    assert maskable[rows].all()
    assert torch.equal(targets[:real], text.rows[rows].long())
    assert positions.total % 16 == 0 and not positions.rows[real:].any() and (targets[real:] == -1).all()
    for b, part in enumerate(positions.unpack()):
        assert part.tolist() == sorted(set(part.tolist()))
        assert all(text.offsets[b] <= p < text.offsets[b + 1] for p in part.tolist())
    untouched = torch.ones(text.total, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(tokens.rows[untouched], text.rows[untouched])
    assert tokens.rows.dtype == text.rows.dtype and tokens.lengths == text.lengths


def test_counts_given_or_counted_make_no_difference() -> None:
    text, maskable = captions([4, 9, 2, 6])
    given = chosen(0, torch.arange(4), text, maskable, maskable_counts=[2, 7, 0, 4])
    counted = chosen(0, torch.arange(4), text, maskable)
    assert torch.equal(given[0].rows, counted[0].rows) and torch.equal(given[1].rows, counted[1].rows)
    assert torch.equal(given[2], counted[2])


@pytest.mark.parametrize("row_multiple", [1, 32])
def test_token_masks_depend_on_seed_and_pair_alone(row_multiple: int) -> None:
    lengths = [4, 9, 12, 3, 20, 7]
    text, maskable = captions(lengths)
    ids = torch.arange(6) + FAR
    tokens, positions, _ = chosen(5, ids, text, maskable, 0.5)
    order = [3, 1, 5, 0]
    part = Packed.of([text.unpack()[i] for i in order], row_multiple)
    some, where, _ = chosen(5, ids[order], part, (part.rows != 0) & (part.rows != 2), 0.5, row_multiple=row_multiple)
    for k, i in enumerate(order):
        assert torch.equal(some.unpack()[k], tokens.unpack()[i])
        assert torch.equal(
            where.unpack()[k] - part.offsets[k],
            positions.unpack()[i] - text.offsets[i],
        )


def test_four_fifths_become_the_mask_a_tenth_a_random_word_a_tenth_stay() -> None:
    pairs = 3000
    text, maskable = captions([22] * pairs)
    tokens, positions, targets = chosen(2, torch.arange(pairs), text, maskable, 0.5)
    now = tokens.rows.long()[positions.rows.long()]
    R = 10 * pairs
    assert len(targets) == R
    masks, same = (now == MASK_ID).double().mean(), (now == targets).double().mean()
    bound = 5 * math.sqrt(0.8 * 0.2 / R)
    assert abs(masks - 0.8) < bound and abs(same - 0.1) < bound
    random = now[(now != MASK_ID) & (now != targets)]
    assert abs(len(random) / R - 0.1) < bound
    assert random.min() >= 0 and random.max() < VOCABULARY
    assert abs(random.double().mean() - VOCABULARY / 2) < 5 * VOCABULARY / math.sqrt(12 * len(random))


def test_every_maskable_place_is_chosen_equally_often() -> None:
    pairs = 4000
    text, maskable = captions([12] * pairs)
    _, positions, _ = chosen(4, torch.arange(pairs), text, maskable)
    place = positions.rows.long() - text.offsets.long()[:-1].repeat_interleave(3)
    share = torch.bincount(place, minlength=12).double() / pairs
    assert not share[0] and not share[11]
    assert (share[1:11] - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / pairs)


# ---- negatives ------------------------------------------------------------------------------------------------------


def test_negatives_are_never_forbidden_and_flags_say_who_has_one() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = 30 * torch.randn(50, 8, 8, generator=generator)
    forbidden = torch.rand(50, 8, 8, generator=generator) < 0.6
    forbidden[:, 3] = True
    forbidden |= torch.eye(8, dtype=torch.bool)
    similarity[forbidden] = 1e4  # attractive, and out of bounds
    ids = torch.arange(400).view(50, 8) + FAR
    index, valid = sample_negatives(0, ids, similarity, forbidden, Stream.NEGATIVE_TEXT)
    assert index.dtype == torch.int32 and index.shape == valid.shape == (50, 8)
    assert torch.equal(valid, ~forbidden.all(-1)) and not valid[:, 3].any()
    assert not forbidden.gather(2, index.long()[..., None]).squeeze(2)[valid].any()
    assert not index[~valid].any()


def test_negatives_come_as_often_as_softmax_says() -> None:
    draws = 20_000
    scores = torch.tensor([0.5, -1.0, 9.0, 2.0, 1.0])
    forbidden = torch.tensor([False, False, True, False, False])
    ids = torch.arange(draws)[:, None]
    index, valid = sample_negatives(1, ids, scores.expand(draws, 1, 5), forbidden.expand(draws, 1, 5), 11)
    assert valid.all()
    expected = scores.masked_fill(forbidden, -math.inf).softmax(0).double()
    share = torch.bincount(index.flatten(), minlength=5).double() / draws
    assert share[2] == 0
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_two_draws_of_negatives_at_once_are_those_of_each() -> None:
    similarity = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    forbidden, ids = torch.eye(4, dtype=torch.bool).expand(6, 4, 4), torch.arange(24).view(6, 4)
    streams = (Stream.NEGATIVE_IMAGE, Stream.NEGATIVE_TEXT)
    index, valid = sample_negatives(0, ids, similarity, forbidden, torch.tensor(streams)[:, None, None])
    for both, scores, stream in zip(index, similarity, streams, strict=True):
        alone, known = sample_negatives(0, ids, scores, forbidden, stream)
        assert torch.equal(both, alone) and torch.equal(valid, known)


def test_negatives_depend_on_seed_stream_and_pair_alone() -> None:
    similarity, forbidden = torch.zeros(6, 4, 4), torch.eye(4, dtype=torch.bool).expand(6, 4, 4)
    ids = torch.arange(24).view(6, 4)
    index, _ = sample_negatives(0, ids, similarity, forbidden, Stream.NEGATIVE_IMAGE)
    some, _ = sample_negatives(0, ids[[4, 1]], similarity[:2], forbidden[:2], Stream.NEGATIVE_IMAGE)
    assert torch.equal(some, index[[4, 1]])
    other, _ = sample_negatives(0, ids, similarity, forbidden, Stream.NEGATIVE_TEXT)
    assert not torch.equal(other, index)
