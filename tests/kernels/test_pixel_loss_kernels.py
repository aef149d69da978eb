"""The pixel loss of each backend equals its reference, on patches of any size and images of any strides."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvle_kernels import explain, masked_pixel_loss, use_backend
from torch import Tensor

from .kernel_checks import (
    DEVICE,
    STORAGE,
    assert_a_torch_op,
    assert_equals_reference,
    assert_no_order_of_threads_matters,
    both_backends,
    compiled_whole,
    far_apart,
    guarded,
    says_that_it_can,
    strided,
    under_test,
)

pytestmark = both_backends
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def case(patch: int, grid: tuple[int, int], rows: list[int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """prediction, images, rows."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, grid[0] * patch, grid[1] * patch, 3), generator=draw, dtype=torch.uint8)
    prediction = torch.randn(len(rows), patch * patch * 3, generator=draw).to(dtype)
    return prediction.to(DEVICE), images.to(DEVICE), torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def loss(images: Tensor, rows: Tensor, patch: int, kind: str = "l1+mse", per_patch: bool = True) -> partial[Tensor]:
    return partial(
        masked_pixel_loss,
        images=images,
        rows=rows,
        patch=patch,
        mean=MEAN,
        std=STD,
        kind=kind,
        per_patch=per_patch,
    )


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("patch", [1, 3, 4, 14])  # one pixel; 27 values; 48; 588: none a power of two
def test_it_equals_the_reference_in_each_dtype(patch: int, dtype: torch.dtype) -> None:
    prediction, images, rows = case(patch, (2, 3), [0, 5, -1, 17, 11], dtype)
    per_patch = patch > 1  # the variance of one pixel's three values is as good as any
    assert_equals_reference(loss(guarded(images), guarded(rows), patch, per_patch=per_patch), [guarded(prediction)])


@pytest.mark.parametrize("kind", ["l1", "mse", "l1+mse"])
@pytest.mark.parametrize("per_patch", [False, True])
def test_it_equals_the_reference_in_each_kind(kind: str, per_patch: bool) -> None:
    prediction, images, rows = case(4, (3, 2), [3, -1, 4], torch.float32)
    assert_equals_reference(loss(images, rows, 4, kind, per_patch), [prediction])


def test_strides_do_not_matter() -> None:
    prediction, images, rows = case(4, (2, 2), [1, 9, 4], torch.float32)
    turned = images.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)  # the same pixels, channels first in memory
    assert not turned.is_contiguous() and turned.equal(images)
    assert_equals_reference(loss(turned, rows, 4), [strided(prediction)])
    assert_equals_reference(loss(images, rows, 4), [prediction.T.contiguous().T])
    column = torch.stack([rows, rows + 1000], 1)[:, 0]
    assert_equals_reference(loss(images, column, 4), [prediction])


def test_a_patch_of_nearly_one_colour() -> None:
    prediction, images, rows = case(4, (2, 2), [1, 9, 4], torch.float32)
    images.fill_(100)
    images[..., 0, 0, 0] = 101  # its variance is of the size of what keeps the division safe
    assert_equals_reference(loss(images, rows, 4), [prediction * 0.01])


def test_offsets_of_more_than_32_bits() -> None:
    prediction, images, rows = case(4, (1, 1), [2, 0, 1], torch.bfloat16)
    assert_equals_reference(loss(far_apart(images), rows, 4), [prediction])
    assert_equals_reference(loss(images, rows, 4), [far_apart(prediction)])


def test_rows_that_name_no_patch_count_nothing_even_where_they_are_not_numbers() -> None:
    prediction, images, rows = case(4, (2, 2), [-1, 2, -1], torch.float32)
    prediction[0] = prediction[2] = float("nan")
    leaf = prediction.requires_grad_()
    with use_backend(under_test()):
        value = loss(images, rows, 4)(leaf)
        value.backward()
    assert value.isfinite() and leaf.grad is not None
    assert leaf.grad[[0, 2]].eq(0).all() and leaf.grad[1].ne(0).any()


def test_a_prediction_that_is_not_a_number_shows_in_the_loss_and_in_its_gradient() -> None:
    prediction, images, rows = case(4, (2, 2), [1, 2], torch.float32)
    prediction[1, 5] = float("nan")
    leaf = prediction.requires_grad_()
    with use_backend(under_test()):
        value = loss(images, rows, 4, "l1")(leaf)
        value.backward()
    assert value.isnan() and leaf.grad is not None and leaf.grad[1, 5].isnan() and leaf.grad[0].isfinite().all()


def test_no_rows_and_no_gradient() -> None:
    prediction, images, rows = case(4, (2, 2), [], torch.float32)
    with use_backend(under_test()):
        assert loss(images, rows, 4)(prediction) == 0
        prediction, images, rows = case(4, (2, 2), [1], torch.float32)
        value = loss(images, rows, 4)(prediction)
    with use_backend("reference"):
        torch.testing.assert_close(value, loss(images, rows, 4)(prediction))
    assert not value.requires_grad


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    patch = data.draw(st.integers(1, 6))
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    rows = data.draw(st.lists(st.integers(-1, 3 * grid[0] * grid[1] - 1), min_size=1, max_size=6))
    kind, per_patch = data.draw(st.sampled_from(["l1", "mse", "l1+mse"])), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(STORAGE))
    prediction, images, named = case(patch, grid, rows, dtype, seed=len(rows))
    assert_equals_reference(loss(images, named, patch, kind, per_patch), [prediction], slack=4)


def test_it_is_a_torch_op_and_compiles_as_one_graph() -> None:
    import mvle_kernels.pixel_loss_op  # noqa: F401  registers it

    prediction, images, rows = case(4, (2, 2), [1, -1, 3], torch.float32)
    scale, shift = [1 / 255] * 3, [-0.5] * 3
    leaf = prediction.requires_grad_()
    assert_a_torch_op("masked_pixel_loss", leaf, images, rows, 4, scale, shift, True, True, False, True, under_test())
    whole = compiled_whole(lambda x: loss(images, rows, 4)(x * 2))
    with use_backend(under_test()):
        value = whole(leaf)
        value.backward()
        expected = loss(images, rows, 4)(leaf * 2)
    torch.testing.assert_close(value, expected)
    assert leaf.grad is not None and leaf.grad[0].ne(0).any()


def test_explain_says_when_it_is_taken() -> None:
    prediction, images, rows = case(4, (2, 2), [1], torch.float64)
    said = explain(masked_pixel_loss, prediction, images, rows, 4, MEAN, STD, "l1", False)
    assert f"{under_test()} refused: takes float32, bfloat16, float16; got torch.float64" in said
    assert "dense chosen" in said
    said = explain(masked_pixel_loss, prediction.float(), images, rows, 4, MEAN, STD, "l1", False)
    assert says_that_it_can(said)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("patch", [8, 16, 24, 32])  # rows of which 8 bytes are a part: 192 values to 3072
def test_vectors_equal_the_reference(patch: int, dtype: torch.dtype) -> None:
    prediction, images, rows = case(patch, (2, 2), [0, 5, -1, 11, 2], dtype)
    for per_patch in (False, True):
        run = loss(guarded(images), rows, patch, per_patch=per_patch)
        assert_equals_reference(run, [guarded(prediction)], slack=4)


def odd_images(images: Tensor) -> dict[str, Tensor]:
    """The same pixels where no vector can read them, each for a reason of its own."""
    B, height, width, _ = images.shape

    def lying(begin: int, b: int, h: int, w: int, c: int) -> Tensor:
        whole = torch.full((begin + B * b + height * h + width * w + 3 * c,), 255, dtype=torch.uint8, device=DEVICE)
        found = whole[begin:].as_strided(images.shape, (b, h, w, c))
        return found.copy_(images)

    row, image = 3 * width, 3 * width * height
    return {
        "address": lying(1, image, row, 3, 1),
        "from image to image": lying(0, image + 4, row, 3, 1),
        "from row to row": lying(0, 2 * image, row + 4, 3, 1),
        "from pixel to pixel": lying(0, 2 * image, 4 * width, 4, 1),
        "from channel to channel": lying(0, 3 * image, row, 3, image),
    }


@pytest.mark.backends("cuda")
def test_addresses_and_strides_that_no_vector_has() -> None:
    prediction, images, rows = case(8, (2, 2), [0, 5, 11], torch.float32)
    for other in odd_images(images).values():
        assert other.equal(images)
        assert_equals_reference(loss(other, rows, 8), [prediction])
    for begin in (0, 1):  # rows whose strides no vector has, and whose addresses no vector has
        whole = prediction.new_full((3, prediction.shape[1] + 1), float("nan"))
        whole[:, begin : begin + prediction.shape[1]] = prediction
        assert_equals_reference(loss(images, rows, 8), [whole[:, begin : begin + prediction.shape[1]]])


@pytest.mark.parametrize("patch", [3, 1])  # within a patch, and from patch to patch
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_rows_pixels_and_channels_far_apart(axis: int, patch: int) -> None:
    _, images, _ = case(3, (1, 1), [], torch.float32)
    images = images[:1]
    far = far_apart(images.transpose(0, axis).contiguous()).transpose(0, axis)
    prediction, _, rows = case(patch, (1, 1), [0] if patch == 3 else [0, 8, 5], torch.float32)
    assert_equals_reference(loss(far, rows, patch, per_patch=patch > 1), [prediction])


@pytest.mark.backends("cuda")
def test_no_order_of_threads_matters() -> None:
    for patch in (4, 16):
        prediction, images, rows = case(patch, (2, 2), [1, -1, 3, 9, 4, 2], torch.float32)
        assert_no_order_of_threads_matters(loss(images, rows, patch), [prediction])
