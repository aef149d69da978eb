"""Patch rows, views, inserted mask tokens and repeated sequences by kernels equal their references. Views have kernels
of both backends, the others Triton's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvle_kernels import (
    Packed,
    embed_views,
    expand,
    expand_layout,
    explain,
    insert_mask_tokens,
    pack_patch_mask,
    patchify,
    use_backend,
)
from mvle_kernels.recipes import RECIPES
from mvle_kernels.triton_support import launcher
from torch import Tensor

from .compare import forget_lengths, layout
from .kernel_checks import (
    DEVICE,
    ROUNDING,
    STORAGE,
    assert_a_torch_op,
    assert_equals_reference,
    assert_no_order_of_threads_matters,
    both_backends,
    compiled_whole,
    far_apart,
    gradients,
    guarded,
    guards,
    says_that_it_can,
    strided,
    triton_alone,
    under_test,
)

pytestmark = triton_alone
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
Pair = tuple[Packed, Packed]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def photos(B: int, height: int, width: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, height, width, 3), generator=draw, dtype=torch.uint8).to(DEVICE)


def masks(patches: int, counts: Sequence[int], seed: int = 0) -> Pair:
    """keep, masked: counts[b] of image b's patches are masked; lists lie between impossible numbers."""
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(patches, generator=draw) for _ in counts])
    made = pack_patch_mask((ranks < torch.tensor(counts)[:, None]).to(DEVICE), counts, row_multiple=8)
    return made[0].with_rows(guarded(made[0].rows)), made[1].with_rows(guarded(made[1].rows))


def leaves(B: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, positions, class token, mask token."""
    return [numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(B, N, D), (N + 1, D), (D,), (D,)])]


def views(pair: Pair, which: Sequence[str | Packed], multiple: int = 16) -> Callable[..., Tensor]:
    return lambda *given: embed_views(*given, *pair, which, multiple).rows


def insertion(pair: Pair, multiple: int = 16, tail: int = 1) -> tuple[Callable[..., Tensor], int]:
    """The op over rows, mask token and positions; how many rows it takes."""
    keep, masked = pair
    assert keep.lengths is not None
    rows = layout([n + 1 for n in keep.lengths], 8, tail).to(DEVICE)
    return lambda x, token, p: insert_mask_tokens(rows.with_rows(x), masked, token, p, multiple).rows, rows.total


def repetition(source: Packed, index: Sequence[int], capacity: int | None = None) -> Callable[[Tensor], Tensor]:
    source, which = source.to(DEVICE), torch.tensor(index, dtype=torch.int32, device=DEVICE)
    target = expand_layout(source, guarded(which), capacity, 16)
    return lambda rows: expand(source.with_rows(rows), guarded(which), target).rows


# ---- patchify -------------------------------------------------------------------------------------------------------


def assert_patchified(images: Tensor, patch: int, dtype: torch.dtype) -> None:
    with use_backend("triton"), guards():
        got = patchify(images, patch, MEAN, STD, dtype)
    with use_backend("reference"):
        truth = patchify(images, patch, MEAN, STD, torch.float64)
    assert got.dtype == dtype and got.shape == truth.shape
    assert got.numel() == 0 or (got - truth).abs().max() <= 4 * {2: 2**-8, 4: 2**-22}[got.element_size()]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("patch", [1, 3, 16])  # one pixel; 27 values; the real 768
def test_patches_equal_the_reference_in_each_dtype(patch: int, dtype: torch.dtype) -> None:
    assert_patchified(guarded(photos(2, 2 * patch, 3 * patch)), patch, dtype)


def test_pixels_of_any_strides() -> None:
    images = photos(3, 8, 12)
    turned = images.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)  # the same, channels first in memory
    for other in (turned, strided(images), images[:, :, 4:], images.flip(0)[:, 4:, ::3]):
        assert_patchified(other, 4, torch.float32)
    assert_patchified(far_apart(images), 4, torch.float32)
    assert_patchified(far_apart(images.transpose(0, 3)).transpose(0, 3), 4, torch.float32)  # channels far apart
    assert_patchified(images[:0], 4, torch.float32)


def test_patches_of_images_larger_than_one_program() -> None:
    assert_patchified(photos(2, 48, 32), 16, torch.float32)  # 4608 values: a program and a bit


# ---- views ----------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("which", [("clean", "replace"), ("clean", "drop"), ("replace",), ("drop", "replace", "clean")])
def test_views_equal_the_reference_in_each_dtype(which: tuple[str, ...], dtype: torch.dtype) -> None:
    pair = masks(9, [4, 0, 9])  # some, none and all of an image; 10 positions: a block of 8 and a bit
    assert_equals_reference(views(pair, which), [guarded(x) for x in leaves(3, 9, 20, dtype)], slack=2)


@both_backends
def test_a_view_shows_the_patches_it_is_given_in_any_order() -> None:
    pair = masks(5, [2, 3])
    given = Packed.of([torch.tensor([4, 0, 2]), torch.tensor([3, 1])], 8).to(DEVICE)
    assert_equals_reference(views(pair, [given, "replace", given]), leaves(2, 5, 7))


@both_backends
def test_a_layout_is_the_one_that_plain_torch_makes() -> None:
    pair = masks(6, [2, 6, 0])
    for which in (["clean", "drop"], ["drop"], ["replace", "clean", pair[1]]):
        with use_backend(under_test()), guards():
            got = embed_views(*leaves(3, 6, 4), *pair, which, 32)
        with use_backend("dense"):
            expected = embed_views(*leaves(3, 6, 4), *pair, which, 32)
        assert torch.equal(got.offsets, expected.offsets) and got.offsets.dtype == torch.int32
        for name in ("lengths", "max_length", "total", "min_length"):
            assert getattr(got, name) == getattr(expected, name), name


@both_backends
def test_wide_rows_and_many_images() -> None:
    # 256 values and a bit, which is two programs for each of 4 positions
    assert_equals_reference(views(masks(3, [1]), ["replace", "drop"]), leaves(1, 3, 300))
    many = [b % 4 for b in range(70)]  # a chunk of 64 images and a bit
    assert_equals_reference(views(masks(3, many), ["replace"]), leaves(70, 3, 5))


def test_many_chunks_of_images_each_taken_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("views_triton", "insert_triton"):
        monkeypatch.setattr(f"mvle_kernels.{file}.CHUNK", 16)
    counts = [b % 4 for b in range(45)]  # two chunks of 16 images, which are two turns of 8, and one of 13
    assert_equals_reference(views(masks(3, counts), ["clean", "replace"]), leaves(45, 3, 5))
    run, total = insertion(masks(3, counts))
    assert_equals_reference(run, [numbers(total, 5), numbers(5, seed=1), numbers(4, 5, seed=2)])


def test_lists_of_patches_as_long_as_those_of_base(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("views_triton", "insert_triton"):  # backwards of another test: as few turns as can be
        monkeypatch.setattr(f"mvle_kernels.{file}.CHUNK", 8)
    patches = RECIPES["base"].patches
    assert patches > 3 * import_module("mvle_kernels.views_triton").rule(4)["BLOCK_N"], "a list is read in four turns"
    pair = masks(patches, [patches, RECIPES["base"].masked])  # all of an image, and what base masks
    assert_equals_reference(views(pair, ["replace", pair[1]]), leaves(2, patches, 4))
    run, total = insertion(pair)
    assert_equals_reference(run, [numbers(total, 4), numbers(4, seed=1), numbers(patches + 1, 4, seed=2)])


@both_backends
@pytest.mark.parametrize("tail", [1, 16, 17, 100])  # a program takes 8 rows or 16 at a time
def test_views_with_a_long_tail(tail: int) -> None:
    pair = masks(2, [1, 0])
    rows = 2 * (2 + 1) + (1 + 1) + (2 + 1)
    with use_backend(under_test()), guards():
        out = embed_views(*leaves(2, 2, 5), *pair, ["clean", "drop"], rows + tail)
    with use_backend("dense"):
        expected = embed_views(*leaves(2, 2, 5), *pair, ["clean", "drop"], rows + tail)
    assert len(out.rows) == rows + tail and out.rows.equal(expected.rows)


@both_backends
def test_views_of_strided_rows() -> None:
    x, positions, class_token, mask_token = leaves(3, 4, 6)
    pair = masks(4, [1, 2, 3])
    others = [strided(positions), class_token, mask_token]
    assert_equals_reference(views(pair, ["clean", "replace"]), [strided(x), *others])
    assert_equals_reference(
        views(pair, ["clean", "replace"]), [x.transpose(0, 1).contiguous().transpose(0, 1), *others]
    )
    assert_equals_reference(views(pair, ["drop"]), [x.mT.contiguous().mT, positions.T.contiguous().T, *others[1:]])


@both_backends
def test_offsets_of_more_than_32_bits_in_views() -> None:
    backward = launcher("views", under_test()).backward
    given = leaves(3, 2, 4, torch.bfloat16)
    pair = masks(2, [1, 2, 0])
    assert_equals_reference(views(pair, ["clean", "replace"]), [far_apart(given[0]), *given[1:]])
    assert_equals_reference(views(pair, ["clean"]), [given[0], far_apart(given[1]), *given[2:]])
    x, positions, *tokens = leaves(2, 3, 4, torch.bfloat16)
    x = far_apart(x.transpose(0, 1)).transpose(0, 1)  # patches of an image
    assert_equals_reference(views(masks(3, [1, 2]), ["clean", "replace"]), [x, positions, *tokens])
    place = torch.tensor([[[2, 0, 1]]], dtype=torch.int32, device=DEVICE)
    gradient = numbers(3, 4, dtype=torch.bfloat16)
    of_x, of_positions, _ = backward(far_apart(gradient), place, False, torch.bfloat16)
    assert torch.equal(of_x[0], gradient[:2]) and torch.equal(of_positions, gradient[[2, 0, 1]].float())


@both_backends
def test_no_images_and_no_patches() -> None:
    for B, N, counts in ((0, 4, []), (2, 0, [0, 0])):
        keep, masked = (Packed.layout_of(counts, 8, DEVICE, N) for _ in range(2))
        pair = tuple(p.with_rows(torch.zeros(p.total, dtype=torch.int32, device=DEVICE)) for p in (keep, masked))
        with use_backend(under_test()), guards():
            out = embed_views(*leaves(B, N, 4), *pair, ["clean", "replace", "drop"], 4)
        assert out.offsets.tolist() == list(range(3 * B + 1)) and out.total == 8 * (B // 2)


@both_backends
def test_what_is_not_a_number_stays_where_it_is_shown() -> None:
    pair = masks(6, [2, 3])
    gone, kept = int(pair[1].rows[0]), int(pair[0].rows[0])
    given = leaves(2, 6, 4)
    given[0][0, gone] = given[0][1, 0] = float("nan")  # masked in image 0
    with use_backend(under_test()):
        out = embed_views(*(x.requires_grad_() for x in given), *pair, ["replace", "clean"], 16)
        replaced, other, whole, _ = out.unpack()
        gradient = torch.ones_like(out.rows)
        gradient[1 + kept, 2] = gradient[28:] = float("nan")  # one value of a patch that is shown, and the tail
        out.rows.backward(gradient)
    assert replaced.isfinite().all()
    assert whole.isnan().any(1).nonzero().tolist() == [[1 + gone]] and other[0].isfinite().all()
    x, positions, *tokens = (leaf.grad for leaf in given)
    assert x.isnan().nonzero().tolist() == [[0, kept, 2]] and positions.isnan().nonzero().tolist() == [[kept + 1, 2]]
    assert all(token.isfinite().all() for token in tokens)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("width", [264, 5])  # two vectors of a lane, or one; and no vectors
def test_no_order_of_threads_matters(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvle_kernels.views_cuda.CHUNK", 6)  # warps take two images of it, or one
    pair = masks(20, [b % 21 for b in range(0, 40, 3)])  # a block of 16 positions and a bit
    given = leaves(14, 20, width)
    assert_no_order_of_threads_matters(views(pair, ["replace", "drop"]), given)
    assert_equals_reference(views(pair, ["replace", "drop", "clean"], 64), given, slack=2)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("other", STORAGE)
@pytest.mark.parametrize("dtype", STORAGE)
def test_positions_and_tokens_have_types_of_their_own(dtype: torch.dtype, other: torch.dtype) -> None:
    x, positions, class_token, mask_token = leaves(2, 4, 24, dtype)
    slack = 4 * max(ROUNDING[dtype], ROUNDING[other]) / ROUNDING[dtype]
    run = views(masks(4, [1, 3]), ["replace", "drop"])
    assert_equals_reference(run, [x, positions.to(other), class_token, mask_token], slack=slack)
    assert_equals_reference(run, [x, positions, class_token, mask_token.to(other)], slack=slack)
    assert_equals_reference(run, [x, positions, class_token.to(other), mask_token], slack=slack)


@pytest.mark.backends("cuda")
def test_a_gradient_narrower_than_what_it_is_wanted_in_is_refused() -> None:
    place = torch.tensor([[[2, 0, 1]]], dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="expected one type, or one that is float32"):
        launcher("views", "cuda").backward(numbers(3, 8, dtype=torch.bfloat16), place, False, torch.float32)


@pytest.mark.backends("cuda")
def test_lists_longer_than_a_block_has_threads() -> None:
    pair = masks(150, [150, 0, 140, 129])
    assert_equals_reference(views(pair, ["replace", pair[1]]), leaves(4, 150, 8), slack=2)


@pytest.mark.backends("cuda")
def test_rows_that_32_bits_cannot_count() -> None:
    x, positions, class_token, mask_token = leaves(1, 1, 8, torch.bfloat16)
    first = 2**28  # of a result that begins far before: 2^31 elements, which nobody touches
    given = x, positions, class_token, mask_token, [], [0], [first, first + 2], first + 3
    rows, offsets, place = launcher("views", "cuda").forward(*given)
    assert torch.equal(rows[first : first + 2], torch.cat([class_token[None], x[0]]) + positions)
    assert rows[-1].eq(0).all() and offsets.tolist() == [first, first + 2] and place.tolist() == [[[first, first + 1]]]
    place = torch.tensor([[[first, -2 - first - 1]]], dtype=torch.int32, device=DEVICE)
    of_x, of_positions, of_mask_token = launcher("views", "cuda").backward(rows, place, True, rows.dtype)
    assert torch.equal(of_positions, rows[first : first + 2].float()) and of_x.eq(0).all()
    assert torch.equal(of_mask_token, of_positions[1])


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("begin", [0, 1])  # rows whose strides no vector has, and whose addresses no vector has
@pytest.mark.parametrize("odd", range(5))
def test_addresses_and_strides_that_no_vector_has(odd: int, begin: int) -> None:
    def moved(x: Tensor) -> Tensor:
        """The same values, 36 bytes from row to row."""
        whole = x.new_full((*x.shape[:-1], 9), float("nan"))
        whole[..., begin : begin + 8] = x
        return whole[..., begin : begin + 8]

    given = leaves(2, 3, 8)
    run = views(masks(3, [1, 2]), ["replace", "clean"])
    if odd < 4:
        given[odd] = moved(given[odd])
        return assert_equals_reference(run, given)
    backward = launcher("views", "cuda").backward
    place = torch.tensor([[[2, 0, 1]]], dtype=torch.int32, device=DEVICE)
    gradient = numbers(3, 8)
    found, expected = (backward(g, place, False, g.dtype) for g in (moved(gradient), gradient))
    assert all(map(torch.equal, found, expected))


# ---- mask tokens inserted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE)
def test_insertion_equals_the_reference_in_each_dtype(dtype: torch.dtype) -> None:
    run, total = insertion(masks(9, [4, 0, 9]))
    given = [numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(total, 20), (20,), (10, 20)])]
    assert_equals_reference(run, [guarded(x) for x in given], slack=2)


def test_insertion_of_wide_and_of_strided_rows_and_of_many() -> None:
    for N, counts, D in ((3, [1], 300), (3, [b % 4 for b in range(70)], 5)):
        run, total = insertion(masks(N, counts))
        given = numbers(total, D), numbers(D, seed=1), numbers(N + 1, D, seed=2)
        assert_equals_reference(run, [strided(given[0]), given[1], strided(given[2])])
    run, total = insertion(masks(2, [1]), 1)
    assert_equals_reference(run, [numbers(total, 3).T.contiguous().T, numbers(3), numbers(3, 3).T.contiguous().T])


@pytest.mark.parametrize("tail", [20, 23, 24, 25, 100])  # one program of each of 3 positions takes 8 rows at a time
def test_insertion_of_rows_with_a_long_tail(tail: int) -> None:
    run, total = insertion(masks(2, [1, 0]), tail=tail)
    assert_equals_reference(run, [numbers(total, 5), numbers(5, seed=1), numbers(3, 5, seed=2)])


def test_offsets_of_more_than_32_bits_in_insertion() -> None:
    from mvle_kernels.insert_triton import backward, forward

    ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    kind = torch.bfloat16
    rows, token, positions = numbers(3, 4, dtype=kind), numbers(4, dtype=kind), numbers(3, 4, dtype=kind)
    out, place = forward(far_apart(rows), ints([0, 3]), ints([]), ints([0, 0]), token, far_apart(positions), 3)
    assert torch.equal(out, rows) and place.tolist() == [[0, 1, 2]]
    out, place = forward(rows, ints([0, 1]), ints([0, 1]), ints([0, 2]), token * 0, far_apart(positions), 3)
    assert torch.equal(out, torch.cat([rows[:1], positions[1:]])) and place.tolist() == [[0, -1, -1]]
    of_rows, of_positions = backward(far_apart(rows), place, ints([0, 1]), 2, kind)
    assert torch.equal(of_rows, torch.cat([rows[:1], rows[:1] * 0])) and torch.equal(of_positions[1:], rows[1:].float())


def test_inserted_tokens_do_not_meet_what_is_not_a_number() -> None:
    keep, masked = masks(4, [2, 2])
    run, total = insertion((keep, masked), 16)
    rows, token, positions = (x.requires_grad_() for x in (numbers(total, 3), numbers(3), numbers(5, 3)))
    with torch.no_grad():
        rows[1] = rows[6:] = float("nan")  # the first patch that image 0 shows, and the tail
    with use_backend("triton"):
        out = run(rows, token, positions)
        gradient = torch.ones_like(out)
        shown = 1 + int(keep.rows[0])
        gradient[shown, 1] = gradient[10:] = float("nan")
        out.backward(gradient)
    assert out.isnan().any(1).nonzero().tolist() == [[shown]]
    assert rows.grad is not None and rows.grad.isnan().nonzero().tolist() == [[1, 1]] and rows.grad[6:].eq(0).all()
    assert token.grad.isfinite().all() and positions.grad.isfinite().all()


# ---- whole sequences again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [2, 0, 11, 1]])
def test_repetition_equals_the_reference_in_each_dtype(lengths: list[int], dtype: torch.dtype) -> None:
    source = layout(lengths, 8, tail=20)  # a tail longer than all blocks of a sequence
    for index in ([3, 3, 0, 3, 2], [1], []):
        run = repetition(source, index, 70)
        assert_equals_reference(run, [guarded(numbers(source.total, 20, dtype=dtype))], slack=2)


def test_a_sequence_that_everybody_reads() -> None:
    source = layout([3, 2], 8)
    assert_equals_reference(repetition(source, [1] * 20 + [0]), [numbers(source.total, 4)])
    source = layout([1, 1])
    assert_equals_reference(repetition(source, [s % 3 == 0 for s in range(270)]), [numbers(2, 4)])


def test_repetition_of_wide_of_strided_and_of_far_rows() -> None:
    run = repetition(layout([1, 2]), [1, 0, 1])
    assert_equals_reference(run, [strided(numbers(3, 300))])
    assert_equals_reference(repetition(layout([1, 11]), [1, 0, 1]), [numbers(12, 300)])  # two programs each way
    assert_equals_reference(run, [numbers(3, 5).T.contiguous().T])
    assert_equals_reference(run, [far_apart(numbers(3, 4, dtype=torch.bfloat16))])
    assert_equals_reference(run, [numbers(3, 2, 4)])


def test_far_gradients_of_repetition_and_lengths_that_only_the_device_knows() -> None:
    from mvle_kernels.expand_triton import backward

    ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    gradient = numbers(3, 4, dtype=torch.bfloat16)
    got = backward(far_apart(gradient), ints([1, 0]), ints([0, 1, 3]), ints([0, 2, 3]), 4, 2)
    assert torch.equal(got, torch.cat([gradient[2:], gradient[:2], gradient[:1] * 0]))
    source = forget_lengths(layout([2, 4, 1], 8), 5)
    assert_equals_reference(repetition(source, [2, 1, 1, 0]), [numbers(8, 3)])


@pytest.mark.parametrize("capacity", [9, 7, 5, 1])  # within a sequence, at the ends of two, within the first
def test_what_a_small_capacity_cuts_off_is_neither_written_nor_learnt_from(capacity: int) -> None:
    from mvle_kernels.expand_triton import backward

    source = layout([2, 5, 1], 8).to(DEVICE)
    index = torch.tensor([1, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    rows = numbers(source.total, 3)
    whole, cut = expand_layout(source, index, 16), expand_layout(source, index, capacity)
    with use_backend("triton"), guards():
        out = expand(source.with_rows(guarded(rows)), index, cut).rows
    with use_backend("reference"):
        leaf = rows.clone().requires_grad_()
        expected = expand(source.with_rows(leaf), index, whole).rows[:capacity]
    assert out.equal(expected)

    gradient = guarded(numbers(capacity, 3, seed=1))  # behind its rows lies what is not a number
    with guards():
        found = backward(gradient, index, source.offsets, cut.offsets, source.total, 5)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf, gradient)[0])


def test_repetition_does_not_read_what_nobody_asked_for() -> None:
    source = layout([2, 3, 1], 8)
    run = repetition(source, [0, 2, 0])
    rows = numbers(source.total, 3)
    rows[2:5] = rows[6:] = float("nan")
    with use_backend("triton"):
        leaf = rows.requires_grad_()
        out = run(leaf)
        gradient = torch.ones_like(out)
        gradient[2, 1] = gradient[5:] = float("nan")
        out.backward(gradient)
    assert out.isfinite().all() and out[5:].eq(0).all()
    assert leaf.grad is not None and leaf.grad.isnan().nonzero().tolist() == [[5, 1]] and leaf.grad[2:5].eq(0).all()


# ---- all of them ----------------------------------------------------------------------------------------------------


@both_backends
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    N, D = data.draw(st.integers(1, 11)), data.draw(st.integers(1, 40))
    counts = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3))
    which = data.draw(st.lists(st.sampled_from(["clean", "replace", "drop"]), min_size=1, max_size=3))
    dtype, pair = data.draw(st.sampled_from(STORAGE)), masks(N, counts, seed=D)
    multiple = data.draw(st.integers(1, 9))
    assert_equals_reference(views(pair, which, multiple), leaves(len(counts), N, D, dtype), slack=4)
    if under_test() != "triton":  # has no kernels of the others
        return
    run, total = insertion(pair, multiple)
    given = [numbers(total, D, dtype=dtype), numbers(D, dtype=dtype, seed=1), numbers(N + 1, D, dtype=dtype, seed=2)]
    assert_equals_reference(run, given, slack=4)
    source = layout(counts, multiple, tail=data.draw(st.integers(0, 5)))
    index = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=5))
    assert_equals_reference(repetition(source, index), [numbers(source.total, D, dtype=dtype)], slack=4)


def every_op() -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Those that have kernels of the backend under test."""
    pair = masks(4, [1, 3])
    inserted, total = insertion(pair)
    source = layout([2, 3], 8)
    of_views = [
        (views(pair, ["clean", "replace"]), leaves(2, 4, 6)),
        (views(pair, ["drop"]), leaves(2, 4, 6)),
    ]
    if under_test() != "triton":
        return of_views
    return [
        *of_views,
        (inserted, [numbers(total, 6), numbers(6), numbers(5, 6)]),
        (repetition(source, [1, 1, 0]), [numbers(source.total, 6)]),
    ]


@both_backends
def test_they_compile_as_one_graph_and_repeat_bit_by_bit() -> None:
    for run, inputs in every_op():
        out, found = gradients(run, inputs, under_test())
        for again in (run, compiled_whole(run)):
            other, same = gradients(again, inputs, under_test())
            assert torch.equal(out, other) and all(map(torch.equal, found, same))
    images = photos(1, 4, 8)
    with use_backend(under_test()):
        whole = compiled_whole(lambda x: patchify(x, 4, MEAN, STD) * 2)
        assert torch.equal(whole(images), patchify(images, 4, MEAN, STD) * 2)


@both_backends
def test_views_are_torch_ops() -> None:
    from mvle_kernels import views_op  # noqa: F401  registers them

    keep, masked = masks(2, [1, 1])
    given = [x.requires_grad_() for x in leaves(2, 2, 3)]
    lists = [masked.rows, masked.offsets, keep.rows, keep.offsets]
    assert_a_torch_op("embed_views", *given, lists, [1, 2], [0, 6, 10], 12, under_test())
    place = torch.tensor([[[0, 1, -4], [3, 4, 5]]], dtype=torch.int32, device=DEVICE)
    assert_a_torch_op("embed_views_backward", numbers(6, 3), place, True, torch.float32, under_test())


def test_they_are_torch_ops() -> None:
    from mvle_kernels import expand_triton, insert_triton, patches_triton  # noqa: F401  registers them

    ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    assert_a_torch_op("patchify", photos(1, 4, 4), 2, [1 / 255] * 3, [-0.5] * 3, torch.bfloat16)
    keep, masked = masks(2, [1, 1])
    rows, token, positions = (x.requires_grad_() for x in (numbers(4, 3), numbers(3), numbers(3, 3)))
    two = keep.offsets + ints([0, 1, 2])
    assert_a_torch_op("insert_mask_tokens", rows, two, masked.rows, masked.offsets, token, positions, 8)
    assert_a_torch_op(
        "insert_mask_tokens_backward", numbers(6, 3), ints([[0, 1, -1]] * 1), ints([0, 2]), 4, torch.float32
    )
    assert_a_torch_op("expand", rows, ints([1, 1]), ints([0, 2, 3]), ints([0, 1, 2]), 4, 2)
    assert_a_torch_op("expand_backward", numbers(4, 3), ints([1, 1]), ints([0, 2, 3]), ints([0, 1, 2]), 4, 2)


@both_backends
def test_autocast_leaves_them_as_they_are_and_mixed_dtypes_meet_in_the_wider() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for run, inputs in every_op():
            assert_equals_reference(run, inputs)
        x, *others = leaves(2, 4, 6)
        run = views(masks(4, [1, 3]), ["clean", "replace"])
        x = x.bfloat16()
        out, found = gradients(run, [x, *others], under_test())
        expected, dense = gradients(run, [x, *others], "dense")
    assert out.dtype == expected.dtype == torch.float32 and torch.equal(out, expected)
    for a, b in zip(found, dense, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-7)


@both_backends
def test_explain_says_when_views_are_taken() -> None:
    keep, _ = masks(4, [2])
    x, positions, *tokens = leaves(1, 4, 6)
    call = partial(explain, embed_views, x, positions, *tokens)
    assert says_that_it_can(call(keep, None, ["clean"], 1))
    said = explain(embed_views, x, positions.double(), *tokens, keep, None, ["clean"], 1)
    assert f"{under_test()} refused: takes float32, bfloat16, float16; got torch.float64" in said
    drawn = forget_lengths(keep).with_rows(keep.rows)
    assert says_that_it_can(call(drawn, None, ["clean"], 1))  # reads no list
    with pytest.raises(ValueError, match="whose lengths the host knows"), use_backend(under_test()):
        embed_views(x, positions, *tokens, drawn, None, ["drop"])


def test_explain_says_when_they_are_taken() -> None:
    chosen = "triton chosen" if DEVICE.type == "cuda" else "triton not asked: the interpreter is for checks"
    images, (_, masked) = photos(1, 4, 4), masks(4, [2])
    _, positions, *tokens = leaves(1, 4, 6)
    rows = Packed.of([positions])
    index = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert chosen in explain(patchify, images, 4, MEAN, STD, torch.bfloat16)
    assert "gives float32, bfloat16, float16; got float64" in explain(patchify, images, 4, MEAN, STD, torch.float64)
    assert chosen in explain(insert_mask_tokens, rows, masked, tokens[0], positions, 1)
    assert "got torch.float64" in explain(insert_mask_tokens, rows, masked, tokens[0].double(), positions, 1)
    assert chosen in explain(expand, rows, index, expand_layout(rows, index))
    for longest, said in ((524280, chosen), (524281, "takes sequences of at most 524280 rows; got 524281")):
        long = forget_lengths(rows, longest).with_rows(rows.rows)
        assert said in explain(expand, long, index, expand_layout(rows, index))
