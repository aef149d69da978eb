"""Ragged attention of each backend equals its reference, both ways, whatever the lengths and whoever reads whom."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mvle_kernels import AttentionPlan, attention_plan, explain, ragged_attention, use_backend
from mvle_kernels.attention import reader_sizes, readers_a_chunk, readers_of
from mvle_kernels.triton_support import launcher
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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

pytestmark = both_backends
H = 2


def plan_of(q: Sequence[int], k: Sequence[int], index: Sequence[int] | None = None, tail: int = 0) -> AttentionPlan:
    named = None if index is None else torch.tensor(index, dtype=torch.int32, device=DEVICE)
    return attention_plan(layout(q, tail=tail).to(DEVICE), layout(k, tail=tail).to(DEVICE), named)


def storage() -> tuple[torch.dtype, ...]:
    """What the backend takes: those in CUDA 16 bits alone. The first is the most exact."""
    return STORAGE if under_test() == "triton" else (torch.float16, torch.bfloat16)


def values(plan: AttentionPlan, head: int = 16, dtype: torch.dtype | None = None, heads: int = H) -> list[Tensor]:
    """q, k, v."""
    dtype = dtype or storage()[0]
    if dtype not in storage():
        pytest.skip(f"kernels in CUDA take no {dtype}")
    draw = torch.Generator().manual_seed(head)
    rows = plan.q.total, plan.k.total, plan.k.total
    return [torch.randn(n, heads, head, generator=draw).to(DEVICE, dtype) for n in rows]


def attend(plan: AttentionPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    q, k = plan.q, plan.k
    caps = q.offsets, k.offsets, q.max_length, k.max_length, plan.kv_index
    return lambda *qkv: ragged_attention(*qkv, *caps, plan=plan)


def set_tiles(monkeypatch: pytest.MonkeyPatch, rows: int = 16, keys: int = 16) -> None:
    """Tiles so small that short sequences need several: the paths of long ones."""
    tiles = {"BLOCK_Q": rows, "BLOCK_K": keys, "num_warps": 4, "num_stages": 1}
    for file in ("attention_triton", "attention_backward_triton"):
        monkeypatch.setattr(f"mvle_kernels.{file}.rule", lambda *_: tiles)


def set_readers(monkeypatch: pytest.MonkeyPatch, readers: int) -> None:
    """So few readers a chunk that small hubs have several."""
    monkeypatch.setattr("mvle_kernels.attention.readers_a_chunk", lambda _: readers)


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("head", [16, 24, 64, 80, 128])  # the smallest, the largest, and such as are no power of two
def test_it_equals_the_reference_in_each_dtype_and_head(head: int, dtype: torch.dtype) -> None:
    plan = plan_of([3, 17], [18, 5], tail=2)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan, head, dtype)], slack=2)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(
    ("q", "k"),
    [
        ([1], [1]),  # one row
        ([0, 1, 2, 15], [2, 1, 0, 33]),  # neither side long, and nothing on either
        ([16, 17, 33], [17, 16, 15]),  # a tile; one row more; two tiles and one
        ([0, 0], [3, 1]),
        ([2, 1], [0, 0]),
        ([], []),
    ],
)
def test_it_equals_the_reference_at_any_length(q: list[int], k: list[int], tail: int) -> None:
    plan = plan_of(q, k, tail=tail)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan)])


HUBS = {
    "repeats": ([2, 3, 1, 4], [5, 3], [1, 0, 1, 1]),
    "contexts that nobody reads": ([2, 3], [4, 1, 5, 2], [2, 0]),
    "one context for all": ([3] * 7, [4], [0] * 7),
    "empty contexts and empty readers": ([3, 0, 2, 1], [0, 5, 0], [1, 1, 0, 1]),
    "two hubs": ([1, 2] * 6, [3, 2, 20], [2, 0] * 5 + [1, 2]),
}


@pytest.mark.parametrize("case", HUBS)
@pytest.mark.parametrize("readers", [1, 2, 100])  # a chunk for each; hubs in several; none in several
def test_it_equals_the_reference_whoever_reads_whom(case: str, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_readers(monkeypatch, readers)
    plan = plan_of(*HUBS[case], tail=3)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan)])


def test_a_quarter_of_the_queries_on_one_pair() -> None:
    index = [s % 7 if s % 4 else 7 for s in range(136)]
    plan = plan_of([2] * 136, [3] * 8, index)
    assert index.count(7) > readers_a_chunk(2), "the hub needs more than one chunk"
    assert_equals_reference(attend(plan), values(plan, heads=1))
    first, again = (gradients(attend(plan), values(plan, heads=1), under_test()) for _ in range(2))
    assert first[0].equal(again[0]) and all(map(torch.equal, first[1], again[1]))


@pytest.mark.parametrize("index", [None, [1, 0, 1, 1]])
def test_tails_and_partial_sums_that_are_several_programs_work(
    index: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("attention_triton", "attention_backward_triton"):
        monkeypatch.setattr(f"mvle_kernels.{file}.FILL", 16)
    monkeypatch.setattr("mvle_kernels.attention_triton.fillers", lambda n: 3)
    monkeypatch.setattr("mvle_kernels.attention_backward_triton.fillers", lambda n: 3)
    set_readers(monkeypatch, 1)
    plan = plan_of([2, 3, 1, 4], [5, 3] if index else [5, 3, 1, 2], index, tail=9)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan)])


@pytest.mark.parametrize("spoilt", ["q_offsets", "k_offsets", "kv_index"])
def test_offsets_and_indices_may_be_columns_of_a_table(spoilt: str) -> None:
    plan = plan_of([2, 3, 1], [5, 3], [1, 0, 1])
    lists = {"q_offsets": plan.q.offsets, "k_offsets": plan.k.offsets, "kv_index": plan.kv_index}
    lists[spoilt] = torch.stack([lists[spoilt], lists[spoilt] + 1000], 1)[:, 0]
    assert not lists[spoilt].is_contiguous()

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ragged_attention(q, k, v, lists["q_offsets"], lists["k_offsets"], 3, 5, lists["kv_index"])

    assert_equals_reference(op, values(plan))


@pytest.mark.parametrize("index", [None, [2, 0, 2, 1, 2]])
@pytest.mark.parametrize("dtype", STORAGE)
def test_contexts_of_several_blocks(
    index: list[int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tiles(monkeypatch)
    set_readers(monkeypatch, 2)
    plan = plan_of([5, 0, 20, 3, 1], [40, 17, 33] if index else [40, 17, 33, 0, 16], index, tail=2)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan, 24, dtype)], slack=2)


def test_a_context_of_more_rows_than_are_ever_held_whole() -> None:
    plan = plan_of([2, 3], [300, 1])
    assert_equals_reference(attend(plan), values(plan, heads=1), slack=2)


@pytest.mark.parametrize("indexed", [False, True])
def test_lengths_that_only_the_device_knows(indexed: bool) -> None:
    q, k = layout([3, 1, 0, 4], tail=40).to(DEVICE), layout([2, 0, 5, 1], tail=9).to(DEVICE)  # capacity, mostly unused
    index = torch.tensor([2, 2, 0, 1], device=DEVICE) if indexed else None
    plan = attention_plan(forget_lengths(q, 18), forget_lengths(k, 20), index)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan)])


@triton_alone
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("keys", [64, 16])  # held whole, and in blocks
def test_scores_far_from_zero(offset: float, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, keys=keys)
    plan = plan_of([3], [40])
    q, k, v = values(plan)
    q[..., 0], k[..., 0] = 1.0, offset  # to every score the same: softmax does not see it
    out, found = gradients(attend(plan), [q, k, v], under_test())
    expected, truth = gradients(attend(plan), [x.double() for x in (q, k, v)], "reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    for got, true in zip(found, truth, strict=True):  # that of q has sums of ds times 1000
        torch.testing.assert_close(got.double(), true, rtol=1e-2, atol=1e-2)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    lengths = st.lists(st.integers(0, 20), min_size=1, max_size=4)
    q, k = data.draw(lengths), data.draw(lengths)
    index = [data.draw(st.integers(0, len(k) - 1)) for _ in q]
    plan = plan_of(q, k, index, data.draw(st.integers(0, 3)))
    head, dtype = data.draw(st.integers(16, 40)), data.draw(st.sampled_from(storage()))
    assert_equals_reference(attend(plan), values(plan, head, dtype, heads=1), slack=4)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_keys_and_values_cut_from_one_product_and_values_of_a_head_apart() -> None:
    plan = plan_of([3, 2], [4, 3])
    q, k, v = values(plan)
    both = torch.stack([k, v, k, v], 1)  # as they come for the blocks of a stage
    assert_equals_reference(attend(plan), [strided(q), both[:, 2], both[:, 3]])
    assert_equals_reference(attend(plan), [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)])


@pytest.mark.parametrize("keys", [64, 16])  # held whole, and in blocks
@pytest.mark.parametrize("one", [0, 1, 2])
def test_each_tensor_has_strides_of_its_own(one: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, keys=keys)
    plan = plan_of([3, 2], [20, 3])
    inputs = values(plan)
    inputs[one] = inputs[one].transpose(0, 1).contiguous().transpose(0, 1)  # heads apart, rows near
    assert_equals_reference(attend(plan), inputs)


def test_a_gradient_of_any_strides() -> None:
    plan = plan_of([3, 2], [4, 3])
    grads = []
    for backend in (under_test(), "reference"):
        leaves = [x.requires_grad_() for x in values(plan)]
        with use_backend(backend):
            attend(plan)(*leaves).sum().backward()  # strides 0
            (attend(plan)(*leaves).transpose(0, 1) * values(plan)[0].transpose(0, 1).contiguous()).sum().backward()
        grads.append([x.grad for x in leaves])
    near = 2 * ROUNDING[grads[0][0].dtype]
    torch.testing.assert_close(*grads, rtol=near, atol=near)


@pytest.mark.parametrize("tiles", [None, 16])
@pytest.mark.parametrize("far", [0, 1, 2])
def test_offsets_of_more_than_32_bits(far: int, tiles: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        set_tiles(monkeypatch)
    plan = plan_of([3], [3]) if not tiles else plan_of([1, 2], [2, 1], [1, 0])
    inputs = values(plan, dtype=torch.bfloat16)
    inputs[far] = far_apart(inputs[far])
    assert_equals_reference(attend(plan), inputs)


@pytest.mark.parametrize("tiles", [None, 16])
@pytest.mark.parametrize("far", [0, 1, 2])
def test_heads_that_lie_far_apart(far: int, tiles: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        set_tiles(monkeypatch)
    plan = plan_of([2, 3], [20, 3]) if tiles else plan_of([2, 3], [4, 3])
    inputs = values(plan, dtype=torch.bfloat16, heads=3)
    inputs[far] = far_apart(inputs[far].transpose(0, 1)).transpose(0, 1)
    assert_equals_reference(attend(plan), inputs)


@pytest.mark.parametrize("tiles", [None, 16])
@pytest.mark.parametrize("axis", [0, 1])  # rows, and heads
def test_a_gradient_that_lies_far_apart(axis: int, tiles: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = (
        launcher("attention", under_test()).forward,
        launcher("attention_backward", under_test()).backward,
    )
    if tiles:
        set_tiles(monkeypatch)
    plan = plan_of([3], [20] if tiles else [4])
    q, k, v = values(plan, dtype=torch.bfloat16, heads=3)
    ends = plan.q.offsets, plan.k.offsets, None, None, 3, 20 if tiles else 4
    out, lse = forward(q, k, v, *ends)
    gradient = far_apart((q + 1).transpose(0, axis)).transpose(0, axis)
    found, expected = (backward(g, q, k, v, out, lse, *ends) for g in (gradient, q + 1))
    assert all(map(torch.equal, found, expected)) and all(x.any() for x in found)


# ---- what is not a number stays where it is -------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, [0, 2, 1, 0]])
@pytest.mark.parametrize("keys", [64, 16])  # held whole, and in blocks
def test_a_sequence_that_is_not_finite_reaches_no_other(
    index: list[int] | None, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tiles(monkeypatch, keys=keys)
    plan = plan_of([3, 1, 4, 2], [20, 2, 3] if index else [20, 2, 3, 4], index, tail=2)
    broken = 0 if index is None else 1  # a query sequence, and the context that it alone reads
    context = 0 if index is None else 2
    clean = gradients(attend(plan), values(plan), under_test())
    inputs = values(plan)
    ends = [p.offsets.tolist() for p in (plan.q, plan.k, plan.k)]
    inputs[0][ends[0][broken]] = float("nan")
    inputs[1][ends[1][context]] = float("inf")
    inputs[2][ends[2][context]] = float("nan")
    for x, layout_ends in zip(inputs, ends, strict=True):
        x[layout_ends[-1] :] = float("nan")  # nor does what lies in a tail matter
    out, grads = gradients(attend(plan), inputs, under_test())
    assert out[ends[0][broken] : ends[0][broken + 1]].isnan().any()
    for got, expected, of in zip([out, *grads], [clean[0], *clean[1]], [ends[0], *ends], strict=True):
        one = broken if of is ends[0] else context
        others = torch.tensor([not of[one] <= row < of[one + 1] for row in range(len(got))])
        assert torch.equal(got[others], expected[others])


@triton_alone
def test_nobody_writes_or_reads_the_sums_of_a_tail() -> None:
    from mvle_kernels.attention_backward_triton import backward
    from mvle_kernels.attention_triton import forward

    plan = plan_of([3, 1], [4, 2], tail=3)
    q, k, v = values(plan)
    ends = plan.q.offsets, plan.k.offsets, None, None, 3, 4
    with guards():  # memory is not a number where nobody writes
        out, lse = forward(q, k, v, *ends)
        found = backward(q + 1, q, k, v, out, lse, *ends)
    assert lse[:, 4:].isnan().all() and lse[:, :4].isfinite().all()
    assert not out[4:].any() and all(bool(g.isfinite().all()) for g in found)


def test_an_empty_context_gives_zeros_whatever_the_query() -> None:
    plan = plan_of([2, 3], [0, 2])
    inputs = values(plan)
    inputs[0][:2] = float("nan")
    out, grads = gradients(attend(plan), inputs, under_test())
    assert not out[:2].any() and out[2:].all()
    assert not grads[0][:2].any() and all(bool(g.isfinite().all()) for g in (out, *grads))


# ---- who reads whom -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunks_hold_every_reader_once_and_none_walks_long(data: st.DataObject) -> None:
    contexts, a_chunk = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    index = data.draw(st.lists(st.integers(0, contexts - 1), max_size=20))
    found = readers_of(torch.tensor(index, dtype=torch.int64), contexts, a_chunk)
    C, P = reader_sizes(len(index), contexts, a_chunk)
    chunks, slots, order = (part.tolist() for part in found.split([4 * C, 4 * P, len(index)]))
    chunks, slots = [chunks[i : i + 4] for i in range(0, 4 * C, 4)], [slots[i : i + 4] for i in range(0, 4 * P, 4)]
    real = [c for c in chunks if c[0] >= 0]

    for context in range(contexts):
        own = [c for c in real if c[0] == context]
        assert own and own[0][3] == -1 and all(c[2] <= a_chunk for c in own)
        read = [s for _, first, count, _ in own for s in order[first : first + count]]
        assert read == [s for s, c in enumerate(index) if c == context]
        parts = [c[3] for c in own[1:]]
        if parts:
            assert parts == list(range(parts[0], parts[0] + len(parts))) and slots[parts[0]][:2] == [
                context,
                len(parts),
            ]
    assert sum(count for _, count, _, _ in slots) == len([c for c in real if c[3] >= 0])
    assert all(c[2] == 0 for c in chunks if c[0] < 0)


def test_readers_are_found_once_a_plan_and_not_without_a_gradient() -> None:
    plan = plan_of([2, 1, 4], [3, 2], [1, 0, 1])
    q, k, v = values(plan)
    with use_backend(under_test()):
        plain = attend(plan)(q, k, v)
        assert not plan.cache
        assert attend(plan)(q.requires_grad_(), k, v).equal(plain)
        kept = plan.readers
        attend(plan)(q, k, v)
    assert plan.readers is kept and set(plan.cache) == {"readers"}


# ---- as a torch op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, [1, 1]])
def test_it_is_a_torch_op(index: list[int] | None) -> None:
    import mvle_kernels.attention_op  # noqa: F401  registers it

    plan = plan_of([2, 3], [4, 1], index)
    inputs = [x.requires_grad_() for x in values(plan)]
    ends = plan.q.offsets, plan.k.offsets, plan.kv_index, None if index is None else plan.readers
    assert_a_torch_op("ragged_attention", *inputs, *ends, 3, 4, under_test())
    q, k, v = (x.detach() for x in inputs)
    out, lse = torch.ops.mvle.ragged_attention(q, k, v, *ends, 3, 4, under_test())
    assert_a_torch_op("ragged_attention_backward", q + 1, q, k, v, out, lse, *ends, 3, 4, under_test())


@pytest.mark.parametrize("index", [None, [1, 1, 0]])
def test_it_compiles_as_one_graph(index: list[int] | None) -> None:
    plan = plan_of([2, 3, 1], [4, 1] if index else [4, 1, 0], index, tail=1)
    run = attend(plan)
    whole = compiled_whole(lambda *qkv: run(*qkv) * 2)
    grads = []
    for function in (whole, lambda *qkv: run(*qkv) * 2):
        leaves = [x.requires_grad_() for x in values(plan)]
        with use_backend(under_test()):
            out = function(*leaves)
            out.sum().backward()
        grads.append([out.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*grads)


def test_autocast_leaves_it_what_it_is_given() -> None:
    plan = plan_of([2, 3], [4, 1])
    inputs = values(plan)
    expected = gradients(attend(plan), inputs, under_test())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out, grads = gradients(attend(plan), inputs, under_test())
    assert out.dtype == inputs[0].dtype and out.equal(expected[0]) and all(map(torch.equal, grads, expected[1]))


@pytest.mark.parametrize("index", [None, [0, 1, 1]])
def test_flops_are_those_of_the_products_of_equal_lengths(index: list[int] | None) -> None:
    plan = plan_of([2] * 3, [5] * (2 if index else 3), index, tail=3)
    leaves = [x.requires_grad_() for x in values(plan)]
    counter = FlopCounterMode(display=False)
    for op in [op for op in counter.flop_registry if str(op).startswith("mvle.")]:
        del counter.flop_registry[op]  # as one made before the first call has none of them
    with counter, use_backend(under_test()):
        attend(plan)(*leaves).sum().backward()
    product = 2 * H * 16 * 3 * 2 * 5
    found = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    assert found == {"mvle.ragged_attention": 2 * product, "mvle.ragged_attention_backward": 4 * product}


def test_repeated_calls_are_bitwise_equal_and_need_no_plan() -> None:
    plan = plan_of([2, 3, 4], [4, 1], [1, 0, 1])
    bare = functools.partial(
        ragged_attention,
        q_offsets=plan.q.offsets.long(),
        k_offsets=plan.k.offsets.long(),
        max_q=4,
        max_k=4,
        kv_index=plan.kv_index.long(),
    )
    first, again = gradients(attend(plan), values(plan), under_test()), gradients(bare, values(plan), under_test())
    assert first[0].equal(again[0]) and all(map(torch.equal, first[1], again[1]))


@triton_alone
def test_explain_says_when_it_is_taken() -> None:
    def say(head: int, dtype: torch.dtype, longest: int = 3) -> str:
        plan = plan_of([2, longest], [3, 3])
        return explain(ragged_attention, *values(plan, head, dtype), plan)

    assert "triton refused: takes float32, bfloat16, float16; got torch.float64" in say(16, torch.float64)
    assert "triton refused: takes heads of 16 to 128 values; got 8" in say(8, torch.float32)
    assert "triton refused: takes heads of 16 to 128 values; got 129" in say(129, torch.float32)
    assert "triton refused: takes sequences of at most 1024 rows; got 1025" in say(16, torch.float32, 1025)
    taken = "triton chosen" if DEVICE.type == "cuda" else "triton not asked: the interpreter is for checks"
    assert taken in say(16, torch.float32, 1024)


@pytest.mark.backends("cuda")
def test_explain_says_when_cuda_is_taken() -> None:
    def say(head: int, dtype: torch.dtype, longest: int = 9) -> str:
        plan = plan_of([2, longest], [3, 3])
        q = torch.zeros(plan.q.total, 1, head, dtype=dtype, device=DEVICE)
        return explain(ragged_attention, q, q[: plan.k.total], q[: plan.k.total], plan)

    assert "cuda refused: takes bfloat16, float16; got torch.float32" in say(16, torch.float32)
    assert "cuda refused: takes heads of 16 to 128 values; got 8" in say(8, torch.float16)
    assert "cuda refused: takes sequences of at most 1024 rows; got 1025" in say(16, torch.float16, 1025)
    assert says_that_it_can(say(16, torch.float16, 1024))


# ---- CUDA alone: what its own tiles and blocks do -------------------------------------------------------------------

cuda_alone = pytest.mark.backends("cuda")
LONG = [(128, [70, 3, 17, 64], [200, 81, 80, 15]), (64, [33, 130], [300, 241]), (16, [5, 65], [730, 79])]


@cuda_alone
@pytest.mark.parametrize(("head", "q", "k"), LONG)  # more keys than lie in registers, and in shared memory
def test_contexts_of_several_blocks_of_keys(head: int, q: list[int], k: list[int]) -> None:
    plan = plan_of(q, k, tail=1)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan, head, heads=1)], slack=2)


@cuda_alone
@pytest.mark.parametrize(
    "k", [5, 16, 17, 32, 33, 64, 70]
)  # one, two and four tiles of keys a block, and several blocks
@pytest.mark.parametrize("q", [7, 17, 100])  # one, two and four warps
def test_every_way_to_share_keys_and_queries_among_warps(q: int, k: int) -> None:
    plan = plan_of([q, 1], [k, 2], tail=2)
    assert_equals_reference(attend(plan), [guarded(x) for x in values(plan, heads=1)], slack=2)


@cuda_alone
def test_scores_far_from_zero_in_16_bits() -> None:
    for offset, keys in ((-1000.0, 40), (1000.0, 40), (1000.0, 100)):
        plan = plan_of([3], [keys])
        q, k, v = values(plan)
        q[..., 0], k[..., 0] = 1.0, offset
        out, _ = gradients(attend(plan), [q, k, v], under_test())
        expected, _ = gradients(attend(plan), [x.double() for x in (q, k, v)], "reference")
        torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)


@cuda_alone
@pytest.mark.parametrize("index", [None, [1, 0, 1, 1, 1]])
def test_the_order_in_which_threads_take_turns_does_not_matter(
    index: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_readers(monkeypatch, 2)
    plan = plan_of([20, 3, 70, 2, 5], [18, 90] if index else [18, 90, 5, 1, 3], index, tail=1)
    assert_no_order_of_threads_matters(attend(plan), values(plan, heads=1), seeds=4)


@cuda_alone
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_blocks_that_share_the_queries_of_a_sequence(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("attention_cuda", "attention_backward_cuda"):
        monkeypatch.setattr(f"mvle_kernels.{file}.parts_of", lambda *_: parts)
    plan = plan_of([150, 20], [30, 90])
    assert_equals_reference(attend(plan), values(plan, heads=1), slack=2)


@triton_alone
def test_what_base_and_large_launch_can_be_collected_without_memory() -> None:
    from mvle_kernels import attention_backward_triton, attention_triton, launches, triton_support

    for file in (attention_triton, attention_backward_triton):
        names = [name for name, _ in file.variants()]
        assert len(set(names)) == len(names) and {"base, 197x197", "base, 1x197, indexed", "large, 197x32"} < set(names)
        for arch in ("sm_80", "sm_90", "sm_100"):
            for _, call in file.variants():
                with triton_support.captured() as started, launches.target(arch):
                    call()
                assert started and all(0 < n < 2**31 for one in started for n in one.grid)
