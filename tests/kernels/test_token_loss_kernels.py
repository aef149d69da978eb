"""The token loss of each backend equals its reference: in one buffer and in chunks, with words and padding of any
number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvle_kernels import explain, masked_token_loss, use_backend
from mvle_kernels.triton_support import launcher
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .kernel_checks import (
    DEVICE,
    ROUNDING,
    STORAGE,
    assert_a_torch_op,
    assert_equals_reference,
    assert_no_order_of_threads_matters,
    both_backends,
    compiled_whole,
    emulated_bytes_read,
    far_apart,
    gradients,
    guarded,
    order_of_threads,
    says_that_it_can,
    strided,
    under_test,
)

pytestmark = both_backends
TARGETS = [3, -1, 0, 41, 3, 40, -1]
ONE_BUFFER, CHUNKS = 512.0, 3 * 45 * 4 / 2**20  # MiB: of everything here; of 3 rows in float32, 6 in 16 bits


@pytest.fixture(autouse=True)
def small_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To Triton a row of a test is several blocks: whole ones, one that ends the words, one of padding alone."""
    if backend != "triton":
        return
    import mvle_kernels.token_loss_triton as it

    monkeypatch.setattr(it, "rule", lambda columns: {"BLOCK": 16, "num_warps": 1, "num_stages": 1})


@pytest.fixture(params=[ONE_BUFFER, CHUNKS], ids=["one buffer", "chunks"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import mvle_kernels.token_loss_op as it

    monkeypatch.setattr(it, "BUDGET_MIB", request.param)


in_both_ways = pytest.mark.usefixtures("budget")


def case(
    R: int = len(TARGETS), D: int = 5, C: int = 45, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """rows, weight, bias; logits of a few units."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in ((R, D), (C, D), (C,))]


def loss(targets: Tensor | list[int] = TARGETS, vocabulary: int | None = 42) -> Callable[..., Tensor]:
    targets = torch.as_tensor(targets, dtype=torch.int64).to(DEVICE) if isinstance(targets, list) else targets

    def op(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return masked_token_loss(rows, weight, bias, targets, vocabulary=vocabulary)[0]

    return op


def run(inputs: list[Tensor], targets: list[int] = TARGETS, vocabulary: int = 42, scale: float = 1.0) -> list[Tensor]:
    """loss, count, correct, ranks and the three gradients, by the kernels."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    named = torch.tensor(targets, dtype=torch.int64, device=DEVICE)
    with use_backend(under_test()):
        found = masked_token_loss(*leaves, named, vocabulary=vocabulary, ranks=True)
        (found[0] * scale).backward()
    return [found[0].detach(), *found[1:], *[x.grad for x in leaves if x.grad is not None]]


# ---- values ---------------------------------------------------------------------------------------------------------


@in_both_ways
@pytest.mark.parametrize("dtype", STORAGE)
# one word; one row of one value; a block and a word of the next; padding that fills a block; no padding
@pytest.mark.parametrize("R, D, C, V", [(7, 5, 1, 1), (1, 1, 3, 2), (7, 5, 17, 17), (7, 3, 64, 42), (7, 8, 45, 45)])
def test_it_equals_the_reference_in_each_dtype(R: int, D: int, C: int, V: int, dtype: torch.dtype) -> None:
    targets = torch.tensor([t % V if t >= 0 else t for t in TARGETS[:R]], device=DEVICE)
    inputs = [guarded(x) for x in case(R, D, C, dtype)]
    assert_equals_reference(loss(guarded(targets), V), inputs, slack=4)


@in_both_ways
def test_it_needs_no_bias_and_takes_part_of_the_inputs_without_gradient() -> None:
    rows, weight, bias = case()
    assert_equals_reference(loss(), [rows, weight])
    assert_equals_reference(lambda x: loss()(x, weight.to(x.dtype), bias.to(x.dtype)), [rows])
    assert_equals_reference(lambda w: loss()(rows.to(w.dtype), w, bias.to(w.dtype)), [weight])
    assert_equals_reference(lambda b: loss()(rows.to(b.dtype), weight.to(b.dtype), b), [bias])


@in_both_ways
def test_strides_and_the_dtype_of_targets_do_not_matter() -> None:
    rows, weight, bias = case()
    assert_equals_reference(loss(), [strided(rows), strided(weight), bias])
    assert_equals_reference(loss(), [rows.T.contiguous().T, weight.T.contiguous().T, bias])
    for dtype in (torch.int32, torch.int16):
        spread = torch.tensor(TARGETS, dtype=dtype, device=DEVICE).repeat_interleave(2)[::2]
        assert not spread.is_contiguous()
        assert_equals_reference(loss(spread), [rows, weight, bias])


@in_both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_places_of_a_stable_sort_and_a_target_in_front_is_correct(dtype: torch.dtype) -> None:
    targets = [t for t in range(42) if t % 3 == 0] + [-1]
    rows, weight, bias = case(len(targets), dtype=dtype)
    rows, weight, bias = rows.round(), weight.round(), bias.zero_()  # small integers: exact, with many ties
    _, count, correct, ranks, *_ = run([rows, weight, bias], targets)

    order = (rows.float() @ weight[:42].float().T).argsort(dim=1, descending=True, stable=True)
    expected = [int((order[r] == t).nonzero()) if t >= 0 else -1 for r, t in enumerate(targets)]
    assert ranks.tolist() == expected and ranks.dtype == torch.int32
    assert count == len(targets) - 1 and correct == expected.count(0)
    for backend in ("dense", "reference"):
        with use_backend(backend):
            named = torch.tensor(targets, device=DEVICE)
            assert masked_token_loss(rows, weight, bias, named, vocabulary=42, ranks=True)[3].equal(ranks)


# ---- what is not a word, a target or a number -----------------------------------------------------------------------


@in_both_ways
def test_the_padded_vocabulary_is_never_scored_and_never_learns() -> None:
    rows, weight, bias = case()
    weight[42:], bias[42:] = 1e30, 1e30
    value, _, _, ranks, d_rows, d_weight, d_bias = run([rows, weight, bias])
    assert value.isfinite() and d_rows.isfinite().all() and ranks.max() < 42
    assert d_weight[42:].eq(0).all() and d_bias[42:].eq(0).all() and d_weight[:42].ne(0).any(1).all()


@in_both_ways
def test_rows_without_a_target_cost_and_learn_nothing() -> None:
    inputs = case()
    for targets in ([-1] * 7, []):
        value, count, correct, ranks, *gradients = run([inputs[0][: len(targets)], *inputs[1:]], targets)
        assert value == 0 and count == 0 and correct == 0 and ranks.eq(-1).all()
        assert all(not g.any() for g in gradients)
    d_rows = run(inputs)[4]
    assert [r for r, d in enumerate(d_rows) if not d.any()] == [1, 6]


@in_both_ways
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_row_that_is_not_a_number_shows_in_the_loss_and_spreads_to_no_other_row(what: float) -> None:
    rows, weight, bias = case()
    rows[3, 2] = what
    value, _, _, ranks, d_rows, d_weight, d_bias = run([rows, weight, bias])
    assert not value.isfinite() and not d_rows[3].isfinite().any() and ranks[3] == 42
    others = [r for r in range(7) if r != 3]
    assert d_rows[others].isfinite().all() and ranks[others].max() < 42
    assert d_weight[42:].eq(0).all() and d_bias[42:].eq(0).all()


@in_both_ways
def test_words_that_a_bias_forbids_have_no_mass() -> None:
    rows, weight, bias = case()
    bias[:20] = float("-inf")  # more than a block: a maximum of nothing
    assert_equals_reference(loss([23, -1, 41, 20, 21, 40, -1]), [rows, weight, bias])
    assert run([rows, weight, bias])[0].isinf()  # and to ask for one of them costs without bound


@in_both_ways
def test_a_target_that_names_no_word_is_not_overlooked() -> None:
    for wrong in (42, 44, 45, 1000, -2, 2**32 + 5, 2**32 - 1, -(2**32)):  # of some the lower 32 bits are a word, or -1
        value, count, correct, ranks, *_ = run(case(), [wrong] * 7)
        assert value.isnan() and count == 7 and correct == 0 and ranks.eq(42).all()


# ---- the kernel alone -----------------------------------------------------------------------------------------------


def launched(logits: Tensor, targets: list[int], V: int, with_slope: bool = True) -> tuple[Tensor, Tensor]:
    """(partial, ranks) of the kernel over these logits, which become their gradient."""
    partial, ranks = torch.empty(len(logits), device=DEVICE), torch.empty(len(logits), dtype=torch.int32, device=DEVICE)
    named = torch.tensor(targets, device=DEVICE)
    launcher("token_loss", under_test()).row_losses(logits, named, partial, ranks, -1, V, with_slope)
    return partial, ranks


@pytest.mark.parametrize("C", [40, 41])  # rows that vectors of 16 bytes divide, and such that they do not
def test_offsets_of_more_than_32_bits(C: int) -> None:
    logits = case(3, C=C)[0] @ case(3, C=C)[1].T
    near, apart = logits.bfloat16(), far_apart(logits.bfloat16())
    expected, found = launched(near, [5, -1, 39], 40), launched(apart, [5, -1, 39], 40)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1]) and apart.equal(near)
    assert near[1].eq(0).all() and near[[0, 2]].ne(0).any(1).all()


@pytest.mark.parametrize("C", [44, 45])  # whole vectors of 16 bytes, and not
def test_a_row_is_written_whole_and_nothing_beside_it(C: int) -> None:
    logits = torch.full((3, 60), float("nan"), device=DEVICE)  # also in the padding: it is written, never read
    logits[:, :33] = torch.randn(3, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    truth = logits[:, :33].softmax(1) - torch.eye(33, device=DEVICE)[[32, 0, 7]]
    partial, _ = launched(logits[:, :C], [32, 0, 7], 33)
    torch.testing.assert_close(logits[:, :33], truth)
    assert partial.isfinite().all() and logits[:, 33:C].eq(0).all() and logits[:, C:].isnan().all()


def logits_of(R: int, C: int, dtype: torch.dtype, before: int = 0, between: int = 0) -> Tensor:
    """Of a few units, in whole halves: ties everywhere. As many elements lie before the first row and between rows."""
    draw = torch.Generator().manual_seed(C)
    rows = torch.empty(before + R * (C + between), dtype=dtype, device=DEVICE).as_strided(
        (R, C), (C + between, 1), before
    )
    return rows.copy_(torch.randn(R, C, generator=draw).mul_(4).round_().div_(2))


def check(logits: Tensor, targets: list[int], V: int, error: float) -> None:
    """What the kernel makes of logits whose rows all have a target against float64, and that a row it has not to
    change stays as it is."""
    z = logits[:, :V].double()
    label = torch.tensor(targets, device=DEVICE)[:, None]
    truth = torch.logsumexp(z, 1) - z.gather(1, label)[:, 0]
    slope = z.softmax(1).scatter_add(1, label, -torch.ones_like(z[:, :1]))
    order = z.argsort(dim=1, descending=True, stable=True)
    kept = logits.clone()
    for with_slope in (False, True):
        partial, ranks = launched(logits, targets, V, with_slope)
        assert (partial - truth).abs().max() <= 1e-5 * truth.abs().max() and ranks.tolist() == (
            order == label
        ).nonzero()[:, 1].tolist()
        assert with_slope or logits.equal(kept)
    assert (logits[:, :V] - slope).abs().max() <= error and logits[:, V:].eq(0).all()


cuda_alone = pytest.mark.backends("cuda")  # about its threads, its shared memory


# 16 bytes divide all; not the address; not the stride; not the length of a row
LAID = {"aligned": (0, 0, 0), "address": (0, 1, 0), "stride": (0, 0, 1), "length": (1, 0, 7)}


@cuda_alone
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("laid", LAID)
# warps and a vector; the words end within a vector, or with one; all warps, of which some threads have a vector more
@pytest.mark.parametrize("C, V", [(264, 264), (1032, 1001), (5000, 4994), (5000, 4992)])
def test_rows_of_several_warps(C: int, V: int, laid: str, dtype: torch.dtype) -> None:
    more, *around = LAID[laid]
    check(logits_of(4, C + more, dtype, *around), [0, V - 1, V // 2, 255], V, ROUNDING[dtype])


LONG = [(torch.float32, 41_696), (torch.float32, 41_700), (torch.float32, 41_728), (torch.bfloat16, 84_000)]


@cuda_alone
@pytest.mark.parametrize("dtype, C", LONG)
@pytest.mark.parametrize("before", [0, 1])
def test_rows_that_just_fit_into_shared_memory_or_do_not(dtype: torch.dtype, C: int, before: int) -> None:
    check(logits_of(2, C, dtype, before), [C - 8, 77], C - 7, ROUNDING[dtype])


@cuda_alone
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the emulation counts what it reads; a GPU's profiler would")
@pytest.mark.parametrize("dtype, C, times", [(torch.bfloat16, 50_304, 1), (*LONG[0], 1), (*LONG[1], 2)])
def test_a_row_is_read_once_where_it_fits_into_shared_memory(dtype: torch.dtype, C: int, times: int) -> None:
    before = emulated_bytes_read()
    launched(logits_of(3, C, dtype), [5, -1, C - 80], C - 79)  # a row has no target: nothing of it is read
    assert emulated_bytes_read() - before == 2 * times * -(-(C - 79) * dtype.itemsize // 16) * 16


@cuda_alone
@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
def test_a_word_that_is_not_a_number_shows_to_all_warps(what: float) -> None:
    for place in (0, 1500, 4990):
        logits = logits_of(2, 5000, torch.float32)
        logits[0, place] = what
        (loss, other), ranks = launched(logits, [700, 700], 4994)
        assert other.isfinite() and logits[1].isfinite().all() and ranks[1] < 4994 and logits[:, 4994:].eq(0).all()
        if what == float("-inf"):
            assert loss.isfinite() and logits[0].isfinite().all() and logits[0, place] == 0
        else:
            assert loss.isnan() and logits[0, :4994].isnan().all() and ranks[0] == 4994
    logits = torch.full((1, 5000), float("-inf"), device=DEVICE)  # and a row without a mass is no number
    loss, ranks = launched(logits, [3], 4994)
    assert loss.isnan() and ranks[0] == 4994 and logits[0, :4994].isnan().all() and logits[0, 4994:].eq(0).all()


@cuda_alone
def test_what_is_added_to_all_logits_changes_nothing_however_much_it_is() -> None:
    logits, more = logits_of(2, 3000, torch.float32), logits_of(2, 3000, torch.float32) + 2.0**20
    (loss, ranks), (same, same_ranks) = launched(logits, [5, 2999], 3000), launched(more, [5, 2999], 3000)
    assert loss.equal(same) and ranks.equal(same_ranks) and logits.equal(more)
    wide = torch.tensor([[-3.4e38, 3.4e38, 3.0e38, -3.4e38]], device=DEVICE)
    loss, ranks = launched(wide, [1], 4)
    assert loss == 0 and ranks == 0 and wide.eq(0).all()
    lowest = torch.full((1, 4), -3.4e38, device=DEVICE)
    loss, ranks = launched(lowest, [2], 4)
    torch.testing.assert_close(loss, torch.tensor([4.0], device=DEVICE).log())
    assert ranks == 2 and lowest[0].tolist() == [0.25, 0.25, -0.75, 0.25]


@cuda_alone
def test_no_order_of_threads_matters() -> None:
    for C in (45, 3001):
        assert_no_order_of_threads_matters(loss([3, -1, 0, 41, C - 2], C - 1), case(5, 4, C + 7, torch.bfloat16))
    found = []
    for seed in range(8):
        if DEVICE.type == "cpu":
            order_of_threads(1000 * seed)
        logits = logits_of(2, 5000, torch.bfloat16)
        found.append([*launched(logits, [4000, 3], 5000), logits])
    for other in found[1:]:  # loss, ranks, gradient
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


# ---- chunks, scale, order -------------------------------------------------------------------------------------------


def test_chunks_are_of_about_equal_length_and_fit_the_budget() -> None:
    from mvle_kernels.token_loss_op import BUDGET_MIB, rows_of_a_chunk

    assert rows_of_a_chunk(1024, 50304, 2, BUDGET_MIB) == 1024  # base is not cut
    assert rows_of_a_chunk(6000, 50304, 2, BUDGET_MIB) == 3000  # 5336 would fit: two of 3000, not 5336 and 664
    assert rows_of_a_chunk(7, 45, 4, CHUNKS) == 3
    assert rows_of_a_chunk(5, 50304, 2, 1e-9) == 1
    assert rows_of_a_chunk(0, 50304, 2, BUDGET_MIB) == 0


@in_both_ways
@pytest.mark.parametrize("dtype", STORAGE)
def test_gradients_follow_the_gradient_of_the_loss_and_can_be_asked_for_again(dtype: torch.dtype) -> None:
    inputs = case(dtype=dtype)
    for once, thrice in zip(run(inputs)[4:], run(inputs, scale=3.0)[4:]):
        torch.testing.assert_close(3 * once, thrice, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
    leaf = inputs[0].requires_grad_()
    with use_backend(under_test()):
        value = loss()(leaf, *inputs[1:])
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0].clone()
    assert torch.autograd.grad(value, leaf, retain_graph=True)[0].equal(first)
    again = torch.autograd.grad(value, leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        again.sum().backward()


def test_the_gradient_of_the_weight_is_summed_in_float32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    import mvle_kernels.token_loss_op as it

    monkeypatch.setattr(it, "BUDGET_MIB", 0.0)  # a row a chunk: in bfloat16 a sum of equal terms ends at 256 of them
    rows, weight, bias = case(1, D=1, C=4, dtype=torch.bfloat16)
    assert_equals_reference(loss([1] * 300, 4), [rows.repeat(300, 1), weight, bias])


@in_both_ways
def test_two_runs_are_bitwise_equal() -> None:
    inputs = case(dtype=torch.bfloat16)
    assert all(a.equal(b) for a, b in zip(run(inputs), run(inputs), strict=True))


@in_both_ways
def test_without_a_backward_nothing_is_kept() -> None:
    inputs = case()
    with use_backend(under_test()):
        value = loss()(*inputs)
    with use_backend("reference"):
        torch.testing.assert_close(value, loss()(*inputs))
    with use_backend(under_test()), torch.no_grad():
        assert not loss()(*[x.requires_grad_() for x in inputs]).requires_grad
    assert not value.requires_grad


@in_both_ways
@pytest.mark.parametrize("torchs", [None, "dense", "reference"])
@pytest.mark.parametrize("rows", STORAGE)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_mean_the_same_to_every_backend(
    weight: torch.dtype, rows: torch.dtype, torchs: str | None
) -> None:
    backend = torchs or under_test()
    given = [x.to(dtype) for x, dtype in zip(case(), (rows, weight, weight))]
    truth, gradients_of_truth = gradients(loss(), [x.double() for x in given], "reference")
    out, found = gradients(loss(), given, backend)
    assert out.dtype == torch.float32 and [g.dtype for g in found] == [rows, weight, weight]
    rounding = max(ROUNDING[rows], ROUNDING[weight])
    for a, b in zip([out, *found], [truth, *gradients_of_truth], strict=True):
        assert (a - b).abs().max() <= 4 * rounding * max(1.0, float(b.abs().max()))
    if weight == torch.float32 != rows:  # master weights: their gradient is not rounded to the dtype of the rows
        assert not found[1].to(rows).float().equal(found[1])

    with torch.autocast(DEVICE.type, torch.bfloat16):
        same, others = gradients(loss(), given, backend)
    assert same.equal(out)
    if backend != "reference":  # whose backward is autograd's own, and torch's docs want that outside
        assert all(a.equal(b) for a, b in zip(others, found, strict=True))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    import mvle_kernels.token_loss_op as it

    R, D = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    C = data.draw(st.integers(1, 70 if under_test() == "triton" else 3000))
    V = data.draw(st.integers(1, C))
    targets = data.draw(st.lists(st.integers(-1, V - 1), min_size=R, max_size=R))
    inputs = case(R, D, C, data.draw(st.sampled_from(STORAGE)), seed=C)
    before, it.BUDGET_MIB = it.BUDGET_MIB, data.draw(st.sampled_from([ONE_BUFFER, CHUNKS]))
    try:
        assert_equals_reference(loss(targets, V), inputs, slack=4)
    finally:
        it.BUDGET_MIB = before


# ---- as an op -------------------------------------------------------------------------------------------------------


def test_it_is_a_torch_op_and_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    import mvle_kernels.token_loss_op as it

    rows, weight, bias = (x.requires_grad_() for x in case())
    targets = torch.tensor(TARGETS, device=DEVICE)
    assert_a_torch_op("masked_token_loss", rows, weight, bias, targets, -1, 42, True, under_test())
    learns = [True, True, True]
    assert_a_torch_op("masked_token_loss_chunked", rows, weight, bias, targets, -1, 42, 3, learns, under_test())
    for budget in (ONE_BUFFER, CHUNKS):
        monkeypatch.setattr(it, "BUDGET_MIB", budget)
        torch.compiler.reset()
        whole = compiled_whole(lambda x, w, b: loss(targets)(x * 2, w, b))
        with use_backend(under_test()):
            got = torch.autograd.grad(whole(rows, weight, bias), (rows, weight, bias))
            expected = torch.autograd.grad(loss(targets)(rows * 2, weight, bias), (rows, weight, bias))
        torch.testing.assert_close(got, expected)


@in_both_ways
def test_its_flops_are_those_of_three_products() -> None:
    rows, weight, bias = (x.requires_grad_() for x in case())
    product = 2 * 7 * 45 * 5
    with use_backend(under_test()):
        with FlopCounterMode(display=False) as counted:
            loss()(rows, weight, bias).backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            loss()(rows, weight, bias)
    assert counted.get_total_flops() == 3 * product and forward.get_total_flops() == product


def test_explain_says_when_it_is_taken() -> None:
    rows, weight, bias = case()
    targets = torch.tensor(TARGETS, device=DEVICE)
    said = explain(masked_token_loss, rows.double(), weight, bias, targets)
    assert f"{under_test()} refused: takes float32, bfloat16, float16; got torch.float64" in said
    assert "dense chosen" in said
    assert says_that_it_can(explain(masked_token_loss, rows, weight, bias, targets))
