"""What a block does around attention equals its reference: the sum and norm that begin a branch, and feed-forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvle_kernels import add_norm, explain, feed_forward, use_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .kernel_checks import (
    DEVICE,
    STORAGE,
    assert_equals_reference,
    compiled_whole,
    far_apart,
    gradients,
    guarded,
    says_that_it_can,
    strided,
    triton_alone,
)

pytestmark = triton_alone
EPS = 1e-3


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * scale + 0.1).to(dtype).to(DEVICE)


# ---- sum and norm ---------------------------------------------------------------------------------------------------


def both(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """s and h side by side, so that both have a gradient."""
    return torch.cat(add_norm(x, y, weight, bias, EPS), 1)


def of_a_sum(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return both(x, y, weight, bias)


def alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return both(x, None, weight, bias)


def rows(T: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, y, weight, bias."""
    return [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((T, D), (T, D), (D,), (D,)))]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("T, D", [(7, 1), (5, 24), (33, 96), (3, 130)])  # fewer rows than a program takes, and more
def test_sum_and_norm_equal_the_reference_in_each_dtype(T: int, D: int, dtype: torch.dtype) -> None:
    if D == 1 and dtype != torch.float32:
        pytest.skip("the norm of one value is rounding alone")
    x, y, weight, bias = map(guarded, rows(T, D, dtype))
    assert_equals_reference(of_a_sum, [x, y, weight, bias], slack=4)
    assert_equals_reference(alone, [x, weight, bias], slack=4)


def test_a_run_of_rows_is_walked_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels import add_norm_triton

    monkeypatch.setattr(add_norm_triton, "PROGRAMS", 3)  # runs of 47 rows, no multiple of those taken at once
    monkeypatch.setattr(add_norm_triton, "rule", lambda *_: {"ROWS": 4, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1})
    assert_equals_reference(of_a_sum, rows(139, 24))


def test_rows_of_a_larger_buffer_are_taken_where_they_lie() -> None:
    x, y, weight, bias = rows(9, 40)
    assert_equals_reference(of_a_sum, [strided(x), strided(y), weight, bias])
    assert_equals_reference(of_a_sum, [x.T.contiguous().T, y, weight, bias])


def test_rows_far_from_zero_lose_nothing() -> None:
    x, y, weight, bias = rows(4, 64)
    assert_equals_reference(of_a_sum, [x + 1000, y, weight, bias], slack=200)  # 1000 / 2^24 of a value of 1


@pytest.mark.parametrize("read", ["sum", "norm"])
def test_a_result_that_nobody_reads_has_no_gradient(read: str) -> None:
    def one(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return add_norm(x, y, weight, bias, EPS)[read == "norm"]

    assert_equals_reference(one, rows(5, 24))


@pytest.mark.filterwarnings("ignore:var_mean")  # the reference's, of no values
def test_no_rows_are_no_mistake() -> None:
    assert_equals_reference(of_a_sum, rows(0, 24))


def test_a_row_that_is_not_finite_reaches_no_other() -> None:
    x, y, weight, bias = rows(5, 24)
    with use_backend("triton"):
        clean = of_a_sum(x, y, weight, bias)
        x = x.clone()
        x[2, 3] = float("nan")
        spoilt = of_a_sum(x, y, weight, bias)
    others = [0, 1, 3, 4]
    assert spoilt[others].equal(clean[others]) and spoilt[2, 24:].isnan().all()


def test_offsets_of_more_than_32_bits_of_rows() -> None:
    x, y, weight, bias = rows(3, 24)
    assert_equals_reference(of_a_sum, [far_apart(x), far_apart(y), weight, bias])
    assert_equals_reference(alone, [far_apart(x), weight, bias])


@settings(deadline=None, max_examples=15)
@given(T=st.integers(1, 20), D=st.integers(2, 70), added=st.booleans(), seed=st.integers(0, 99))
def test_sum_and_norm_of_any_shape(T: int, D: int, added: bool, seed: int) -> None:
    x, y, weight, bias = (drawn(*t.shape, seed=seed + i) for i, t in enumerate(rows(T, D)))
    assert_equals_reference(*((of_a_sum, [x, y, weight, bias]) if added else (alone, [x, weight, bias])), slack=4)


# ---- feed-forward ---------------------------------------------------------------------------------------------------


def layers(T: int, D: int, inner: int, out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, w1, b1, w2, b2."""
    shapes = ((T, D), (inner, D), (inner,), (out, inner), (out,))
    return [drawn(*s, dtype=dtype, seed=i, scale=0.5 if i else 1.5) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("T, D, inner, out", [(5, 8, 24, 8), (19, 6, 300, 10)])  # one band of columns, and two
def test_feed_forward_equals_the_reference_in_each_dtype(
    T: int, D: int, inner: int, out: int, dtype: torch.dtype
) -> None:
    x, *others = layers(T, D, inner, out, dtype)
    assert_equals_reference(feed_forward, [guarded(x), *others], slack=4)


def test_feed_forward_walks_a_run_of_rows_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels import feed_forward_triton

    monkeypatch.setattr(feed_forward_triton, "PROGRAMS", 3)
    assert_equals_reference(feed_forward, layers(139, 6, 20, 6), slack=2)


def test_feed_forward_takes_strides_no_rows_and_an_input_without_gradient() -> None:
    x, *others = layers(9, 8, 24, 8)
    assert_equals_reference(feed_forward, [strided(x), *others])
    assert_equals_reference(feed_forward, layers(0, 8, 24, 8))
    assert_equals_reference(lambda *weights: feed_forward(x.to(weights[0].dtype), *weights), others)


def test_tails_of_gelu_and_what_is_not_finite() -> None:
    from mvle_kernels.feed_forward_triton import gelu_backward

    z = torch.tensor([[-60.0, -8.0, 0.0, 8.0, 60.0, float("nan"), 1.0]], device=DEVICE)
    grad = torch.ones_like(z)
    a, total = gelu_backward(z, grad)
    expected = torch.nn.functional.gelu(z)
    assert torch.allclose(a, expected, equal_nan=True) and torch.allclose(total, grad[0], equal_nan=True)
    assert torch.allclose(grad, torch.ops.aten.gelu_backward(torch.ones_like(z), z), atol=1e-6, equal_nan=True)


def test_offsets_of_more_than_32_bits_of_the_widest_rows() -> None:
    from mvle_kernels.feed_forward_triton import gelu_backward

    z, grad = drawn(3, 40), drawn(3, 40, seed=1)
    expected = gelu_backward(z, near := grad.clone())
    far = far_apart(grad)
    got = gelu_backward(far_apart(z), far)
    for one, other in zip((far, *got), (near, *expected), strict=True):  # compiled for other alignments
        torch.testing.assert_close(one, other)


# ---- who takes them -------------------------------------------------------------------------------------------------


def test_both_are_bitwise_repeatable() -> None:
    for op, inputs in ((of_a_sum, rows(40, 24)), (feed_forward, layers(40, 8, 24, 8))):
        one, other = (gradients(op, inputs, "triton") for _ in range(2))
        assert one[0].equal(other[0]) and all(map(torch.equal, one[1], other[1]))


def test_explain_says_what_they_take() -> None:
    x, y, weight, bias = rows(4, 24)
    assert says_that_it_can(explain(add_norm, x, y, weight, bias, EPS))
    assert says_that_it_can(explain(add_norm, x, None, weight, bias, EPS))
    assert "triton not asked: " in explain(feed_forward, *layers(4, 8, 24, 8))
    assert "triton refused: takes tensors of one dtype" in explain(add_norm, x, y, weight.half(), bias, EPS)
    wide = torch.ones(8200, device=DEVICE)
    said = explain(add_norm, wide[None], None, wide, wide, EPS)
    assert "triton refused: takes rows of at most 8192 values; got 8200" in said


def test_torchs_ops_are_taken_where_somebody_looks_at_ops() -> None:
    """A kernel that is no op would be missing in counts, in what checkpointing keeps, and in what a compiler sees."""
    x, *others = layers(4, 8, 24, 8)
    with FlopCounterMode(display=False) as counter:
        assert "triton refused: is no torch op" in explain(feed_forward, x, *others)
        feed_forward(x, *others)
    assert counter.get_total_flops() == 2 * 4 * 8 * 24 * 2
    whole = compiled_whole(lambda *inputs: feed_forward(*inputs) * 2)
    assert torch.allclose(whole(x, *others), feed_forward(x, *others) * 2, rtol=1e-5)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, y, weight, bias = rows(4, 24)
    with pytest.raises(ValueError, match=r"got \(4, 24\), \(4, 23\), \(24,\), \(24,\)"):
        add_norm(x, y[:, :23], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"got \(4, 24\), None, \(24,\), \(7,\)"):
        add_norm(x, None, weight, bias[:7], EPS)
    x, w1, b1, w2, b2 = layers(4, 8, 24, 8)
    with pytest.raises(ValueError, match=r"weights \[I, D\] and \[O, I\].*got \(4, 8\), \(24, 8\), \(8, 23\)"):
        feed_forward(x, w1, b1, w2[:, :23], b2)
