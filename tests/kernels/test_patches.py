"""patchify, embed_views, insert_mask_tokens, expand, and the packed form itself."""

from __future__ import annotations

import pytest
import torch
from mvle_kernels import (
    Packed,
    Stream,
    concatenate,
    embed_views,
    expand,
    expand_layout,
    insert_mask_tokens,
    patchify,
    row_index,
    sample_patch_mask,
    use_backend,
)
from mvle_kernels.layout import may_be_empty
from mvle_kernels.packed import from_host
from torch import Tensor

from .compare import BACKENDS, assert_backends_agree, forget_lengths, layout, random, results

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def photos(B: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randint(0, 256, (B, height, width, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


# ---- packed ---------------------------------------------------------------------------------------------------------


def test_packing_keeps_sequences_and_rounds_up_with_zeros() -> None:
    parts = [random(n, 3, seed=n) for n in (2, 0, 5)]
    packed = Packed.of(parts, 8)
    assert packed.total == 8 and packed.lengths == (2, 0, 5) and packed.max_length == 5
    assert packed.offsets.tolist() == [0, 2, 2, 7] and packed.offsets.dtype == torch.int32
    assert not packed.rows[7:].any()
    assert all(map(torch.equal, packed.unpack(), parts))
    sequence, position, real = row_index(packed)
    assert sequence.tolist() == [0, 0, 2, 2, 2, 2, 2, 3] and position.tolist() == [0, 1, 0, 1, 2, 3, 4, 0]
    assert real.tolist() == [True] * 7 + [False]
    assert torch.equal(packed.slice(1, 3, 4).rows, torch.cat([parts[2], torch.zeros(3, 3)]))


@pytest.mark.parametrize("start, stop", [(0, 4), (0, 2), (1, 3), (2, 4), (2, 2)])
@pytest.mark.parametrize("lengths", [[2, 0, 5, 1], [3, 3, 3, 3], [0, 0, 0, 0]])
def test_a_part_of_a_layout_is_the_layout_of_its_lengths(lengths: list[int], start: int, stop: int) -> None:
    part, other = Packed.layout_of(lengths, 8).part(start, stop, 4), Packed.layout_of(lengths[start:stop], 4)
    assert torch.equal(part.offsets, other.offsets) and part.offsets.dtype == torch.int32
    assert (part.lengths, part.total, len(part.rows)) == (other.lengths, other.total, 0)
    with pytest.raises(ValueError, match="lengths on the host"):
        forget_lengths(Packed.layout_of(lengths)).part(start, stop)


@pytest.mark.parametrize("lengths", [[], [4], [3, 3, 3], [0, 0], [0, 2], [2, 2, 1]])
def test_offsets_are_sums_of_lengths_whether_these_are_equal_or_not(lengths: list[int]) -> None:
    made = Packed.layout_of(lengths)
    assert made.offsets.tolist() == [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    assert made.offsets.dtype == torch.int32 and made.total == sum(lengths)


def test_numbers_of_the_host_arrive_as_they_are() -> None:
    assert from_host([2, 2, 2], torch.int64, None).tolist() == [2, 2, 2]
    assert from_host([1, 2, 3], torch.int32, "cpu").tolist() == [1, 2, 3]
    assert from_host([], torch.int64, "cpu").shape == (0,)
    assert from_host([0.5, 0.25], torch.float64, "cpu").dtype == torch.float64


def test_concatenation_drops_inner_tails_and_shifts_offsets() -> None:
    a, b = Packed.of([random(2, 3), random(1, 3)], 8), Packed.of([random(4, 3, seed=1)], 8)
    both = concatenate([a, b], 4)
    assert both.offsets.tolist() == [0, 2, 3, 7] and both.lengths == (2, 1, 4) and both.total == 8
    assert torch.equal(both.rows, torch.cat([a.rows[:3], b.rows[:4], torch.zeros(1, 3)]))
    last = concatenate([a, forget_lengths(b)], 1)
    assert last.lengths is None and last.total == 3 + 8 and last.offsets.tolist() == [0, 2, 3, 7]
    with pytest.raises(ValueError, match="only the last part"):
        concatenate([forget_lengths(a), b])


def test_packed_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        Packed.of([])
    with pytest.raises(ValueError, match="at least the longest sequence, 4; got 3"):
        Packed.layout_of([4], max_length=3)
    with pytest.raises(ValueError, match="must number 8"):
        Packed.layout_of([4], 8).with_rows(torch.zeros(4))
    with pytest.raises(ValueError, match="needs lengths on the host"):
        forget_lengths(Packed.of([torch.zeros(2)])).unpack()


# ---- patchify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_patchify_orders_row_column_channel_and_normalises(backend: str) -> None:
    images = photos()
    with use_backend(backend):
        rows = patchify(images, 4, MEAN, STD, torch.float64)
    assert rows.shape == (2, 6, 48) and rows.dtype == torch.float64
    for b in range(2):
        for n in range(6):
            top, left = 4 * (n // 3), 4 * (n % 3)
            for x in (0, 1, 5, 12, 47):
                y, column, channel = x // 12, x // 3 % 4, x % 3
                pixel = int(images[b, top + y, left + column, channel])
                assert abs(rows[b, n, x] - (pixel / 255 - MEAN[channel]) / STD[channel]) < 1e-12


def test_channels_that_are_alike_are_normalised_as_others_are() -> None:
    images, nearly = photos(), 0.25 * (1 + 2**-50)  # differs in float64, and in float32 not
    alike = patchify(images, 4, (0.4,) * 3, (0.25,) * 3)
    assert torch.equal(alike, patchify(images, 4, (0.4,) * 3, (0.25, 0.25, nearly)))


def test_patchify_takes_strided_images_and_refuses_others() -> None:
    images = photos(2, 16, 12)
    assert torch.equal(patchify(images[:, :8], 4, MEAN, STD), patchify(images[:, :8].contiguous(), 4, MEAN, STD))
    with pytest.raises(ValueError, match="multiples of the patch, 5"):
        patchify(images, 5, MEAN, STD)
    for wrong in (images.float(), images[0], images[..., :2]):
        with pytest.raises(ValueError, match=r"uint8 of shape \[B, height, width, 3\]"):
            patchify(wrong, 4, MEAN, STD)


# ---- views ----------------------------------------------------------------------------------------------------------

N, D = 16, 6


def embed_inputs(B: int) -> list[Tensor]:
    return [random(B, N, D), random(N + 1, D, seed=1), random(D, seed=2), random(D, seed=3)]


@pytest.mark.parametrize("counts", [[5, 0, 16, 9], [16, 16, 16, 16], [0, 0, 0, 0]])
@pytest.mark.parametrize(
    "views",
    [("clean",), ("replace",), ("drop",), ("clean", "drop"), ("replace", "clean"), ("own",), ("own", "drop", "own")],
)
def test_embed_views_agree_and_hold_every_view_in_order(views: tuple[str, ...], counts: list[int]) -> None:
    keep, masked = sample_patch_mask(0, torch.arange(4), (4, 4), 1, counts, row_multiple=8)
    own, _ = sample_patch_mask(1, torch.arange(4), (4, 4), 1, [3, 16, 0, 9], 8, Stream.CLEAN_PATCHES)
    shown = [own if view == "own" else view for view in views]
    rows = {"drop": keep.lengths, "own": own.lengths}

    def run(x: Tensor, positions: Tensor, first: Tensor, mask: Tensor) -> Tensor:
        packed = embed_views(x, positions, first, mask, keep, masked, shown, row_multiple=16)
        lengths = [1 + n for view in views for n in rows.get(view, (N,) * 4)]
        assert packed.lengths == tuple(lengths) and packed.total % 16 == 0
        assert not packed.rows[sum(lengths) :].any()
        return packed.rows

    assert_backends_agree(run, embed_inputs(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed_views_give_class_token_patches_and_mask_tokens_their_positions(backend: str) -> None:
    keep, masked = sample_patch_mask(0, torch.arange(1), (4, 4), 1, [6])
    x, positions, first, mask = embed_inputs(1)
    with use_backend(backend):
        packed = embed_views(x, positions, first, mask, keep, masked, ["replace", "drop", masked])
    replaced, dropped, others = packed.unpack()
    gone, kept = masked.rows.tolist(), keep.rows.tolist()
    assert torch.allclose(replaced[0], first + positions[0]) and torch.allclose(dropped[0], first + positions[0])
    for n in range(N):
        assert torch.allclose(replaced[n + 1], (mask if n in gone else x[0, n]) + positions[n + 1])
    for i, n in enumerate(kept):
        assert torch.allclose(dropped[i + 1], x[0, n] + positions[n + 1])
    for i, n in enumerate(gone):
        assert torch.allclose(others[i + 1], x[0, n] + positions[n + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed_views_and_insertion_have_the_gradients_of_finite_differences(backend: str) -> None:
    keep, masked = sample_patch_mask(0, torch.arange(2), (2, 2), 1, [1, 4])
    leaves = [t.requires_grad_() for t in (random(2, 4, 3), random(5, 3), random(3), random(3, seed=1))]

    def run(x: Tensor, positions: Tensor, first: Tensor, mask: Tensor) -> Tensor:
        packed = embed_views(x, positions, first, mask, keep, masked, ["clean", "replace", "drop", masked], 4)
        left = embed_views(x, positions, first, mask, keep, masked, ["drop"])
        return torch.cat([packed.rows, insert_mask_tokens(left, masked, mask, positions, 4).rows])

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, leaves)


def test_embed_views_refuse_a_view_without_its_masks() -> None:
    keep, _ = sample_patch_mask(0, torch.arange(1), (4, 4), 1, [6])
    for view in ("replace", "blurred"):
        with pytest.raises(ValueError, match=view):
            embed_views(*embed_inputs(1), keep, None, [view])


def test_inserted_mask_tokens_stand_where_patches_were_dropped() -> None:
    counts = [6, 0, 16]
    keep, masked = sample_patch_mask(0, torch.arange(3), (4, 4), 1, counts, row_multiple=8)
    x, positions, first, mask = embed_inputs(3)
    left = embed_views(x, positions, first, mask, keep, masked, ["drop"], 8)
    whole = insert_mask_tokens(left, masked, mask, positions, 8)
    assert whole.lengths == (N + 1,) * 3 and whole.total % 8 == 0 and not whole.rows[3 * (N + 1) :].any()
    for b, rows in enumerate(whole.unpack()):
        assert torch.equal(rows[0], left.unpack()[b][0])
        kept = keep.unpack()[b].tolist()
        for n in range(N):
            expected = left.unpack()[b][1 + kept.index(n)] if n in kept else mask + positions[n + 1]
            assert torch.equal(rows[n + 1], expected)


# ---- expand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 3, 0, 3, 2], [1], []])
@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [2, 0, 5, 1]])
@pytest.mark.parametrize("capacity", [None, 40])
def test_expand_agrees_with_the_reference(lengths: list[int], index: list[int], capacity: int | None) -> None:
    source, which = layout(lengths, 8), torch.tensor(index, dtype=torch.int32)
    target = expand_layout(source, which, capacity, row_multiple=16)
    assert_backends_agree(lambda rows: expand(source.with_rows(rows), which, target).rows, [random(source.total, D)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_expand_repeats_whole_sequences_and_keeps_tails_zero(backend: str) -> None:
    source = layout([2, 4, 1], 8)
    rows, which = random(8, D), torch.tensor([1, 1, 0])
    with use_backend(backend):
        out = expand(source.with_rows(rows), which)
    assert out.lengths is None and out.offsets.tolist() == [0, 4, 8, 10] and out.total == 3 * 4
    assert torch.equal(out.rows[:10], torch.cat([rows[2:6], rows[2:6], rows[:2]])) and not out.rows[10:].any()
    _, (gradient,) = results(lambda r: expand(source.with_rows(r), which).rows, [rows], backend)
    assert not gradient[6:].any() and gradient[:6].all()
    equal = layout([3, 3], 8)
    assert expand_layout(equal, torch.tensor([1, 0, 1])).lengths == (3, 3, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expand_has_the_gradient_of_finite_differences(backend: str) -> None:
    for lengths in ([2, 2], [1, 3]):
        source, which = layout(lengths, 8), torch.tensor([1, 1, 0])
        rows = random(source.total, 2).requires_grad_()
        with use_backend(backend):
            assert torch.autograd.gradcheck(lambda r, s=source, w=which: expand(s.with_rows(r), w).rows, [rows])


@pytest.mark.parametrize(("lengths", "shortest"), [((3, 5, 2), 2), ((3, 0, 2), 0)])
def test_what_is_drawn_is_as_long_as_the_shortest_that_can_be(lengths: tuple[int, ...], shortest: int) -> None:
    source = Packed.layout_of(lengths, 4)
    drawn = expand_layout(source, torch.tensor([2, 2, 0], dtype=torch.int32))

    assert drawn.lengths is None and drawn.shortest == shortest
    both = concatenate([source.with_rows(torch.zeros(source.total, 1)), drawn.with_rows(torch.zeros(drawn.total, 1))])
    assert both.lengths is None and both.shortest == shortest
    assert may_be_empty(both) == (shortest == 0)
