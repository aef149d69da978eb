"""Attention of libraries behind ragged_attention: what it refuses, what it is given, and which shapes go where.

The libraries run on a GPU alone. Here a function stands in for them that reads the offsets it is given, and leaves in
tails what nobody promised not to leave there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from mvle_kernels import (
    AttentionPlan,
    attention_libraries,
    attention_plan,
    explain,
    optional,
    ragged_attention,
    use_backend,
)
from mvle_kernels.attention_libraries import (
    CHOICES,
    Choice,
    choice,
    refuse_cudnn,
    refuse_varlen,
    refuse_xformers,
    unasked_cuda,
    unasked_cudnn,
    unasked_triton,
)
from mvle_kernels.dispatch import OPS
from torch import Tensor

from .compare import forget_lengths, layout, random, results

H, E = 2, 8


class OnGpu:
    """As much of a tensor on a GPU as a refusal looks at."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head: int = 64) -> None:
        self.dtype, self.shape = dtype, (1, H, head)


def plan_of(
    q: Sequence[int], k: Sequence[int], index: Sequence[int] | None = None, tail: int = 0, known: bool = True
) -> AttentionPlan:
    layouts = [layout(lengths, tail=tail) for lengths in (q, k)]
    if not known:
        layouts = [forget_lengths(x) for x in layouts]
    return attention_plan(*layouts, None if index is None else torch.tensor(index))


def attend(plan: AttentionPlan) -> Callable[..., Tensor]:
    return lambda *qkv: ragged_attention(*qkv, plan.q.offsets, plan.k.offsets, 9, 9, plan.kv_index, plan=plan)


class _Leftovers(torch.autograd.Function):
    """x, and NaN behind its first rows; so in the backward too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return torch.cat([x[:rows], torch.full_like(x[rows:], float("nan"))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grad[: ctx.rows], torch.full_like(grad[ctx.rows :], float("nan"))]), None


def packed_attention(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int) -> Tensor:
    """As a library computes it: what is in tails goes nowhere, and something is left there."""
    assert q_ends.dtype == k_ends.dtype == torch.int32 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert max_q >= int(q_ends.diff().max()) and max_k >= int(k_ends.diff().max())
    q, k, v = _Leftovers.apply(q, int(q_ends[-1])), *(_Leftovers.apply(x, int(k_ends[-1])) for x in (k, v))
    plan = plan_of(q_ends.diff().tolist(), k_ends.diff().tolist())
    with use_backend("reference"):
        rows = attend(plan)(q[: plan.q.total], k[: plan.k.total], v[: plan.k.total])
    return _Leftovers.apply(torch.cat([rows, q[plan.q.total :]]), plan.q.total)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends on the CPU, with a stand-in for the library."""

    def batch_of_one(q: Tensor, k: Tensor, v: Tensor, attn_bias: tuple[list[int], list[int]]) -> Tensor:
        ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in attn_bias]
        caps = [max(lengths) for lengths in attn_bias]
        assert len(q) == len(k) == len(v) == 1 and [q.shape[1], k.shape[1]] == [int(e[-1]) for e in ends]
        return packed_attention(q[0], k[0], v[0], *ends, *caps)[None]

    def mask_of(q: list[int], k: list[int], *, device: torch.device) -> tuple[list[int], list[int]]:
        return q, k

    monkeypatch.setattr(attention_libraries, "_varlen_attn", lambda: packed_attention)
    monkeypatch.setattr(attention_libraries, "_xformers_parts", lambda: (batch_of_one, mask_of))
    for backend in OPS["ragged_attention"].backends:
        if backend.name in ("varlen", "xformers"):
            monkeypatch.setitem(vars(backend), "refuse", lambda *_: None)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(("name", "known"), [("varlen", True), ("varlen", False), ("xformers", True)])
@pytest.mark.usefixtures("library")
def test_a_library_gets_the_sequences_and_tails_are_zero(name: str, known: bool, tail: int) -> None:
    plan = plan_of([3, 1, 4], [2, 5, 1], tail=tail, known=known)
    inputs = [random(x.total, H, E, seed=i) for i, x in enumerate((plan.q, plan.k, plan.k))]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)  # values of a head apart
    got, found = results(attend(plan), inputs, name)
    expected, truth = results(attend(plan), inputs, "reference")
    torch.testing.assert_close([got, *found], [expected, *truth], rtol=1e-12, atol=1e-12)


def test_varlen_is_called_as_this_torch_wants_it() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    parameters = list(inspect.signature(varlen).parameters.values())
    assert [p.name for p in parameters[:7]] == names
    assert all(p.default is not inspect.Parameter.empty for p in parameters[7:])


def test_xformers_is_called_as_it_wants_it() -> None:
    if reason := optional.xformers()[1]:
        pytest.skip(f"xformers cannot be used: {reason}")
    attend, mask_of = attention_libraries._xformers_parts()
    names = list(inspect.signature(attend).parameters)
    assert names[:4] == ["query", "key", "value", "attn_bias"]
    mask = mask_of([3, 1], [2, 5], device=torch.device("cpu"))
    assert mask.q_seqinfo.seqstart.tolist() == [0, 3, 4] and mask.k_seqinfo.seqstart.tolist() == [0, 2, 7]


def test_what_a_library_cannot_take_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([3, 1], [2, 5])
    cases = {
        "needs a GPU; got a tensor on cpu": ([torch.zeros(4, H, 64)] * 3, plan),
        "takes bfloat16 and float16; got torch.float32": ([OnGpu(torch.float32)] * 3, plan),
        "takes no kv_index": ([OnGpu()] * 3, plan_of([3, 1], [2], [0, 0])),
        "takes heads of 8, 16, … 256 values; got 12": ([OnGpu(head=12)] * 3, plan),
        "takes heads of 8, 16, … 256 values; got 264": ([OnGpu(head=264)] * 3, plan),
        "takes no empty sequence": ([OnGpu()] * 3, plan_of([3, 1], [2, 0])),
        "and some may be empty": ([OnGpu()] * 3, plan_of([3, 1], [2, 1], known=False)),
    }
    monkeypatch.setattr(attention_libraries, "installed", lambda _: True)
    monkeypatch.setattr(optional, "xformers", lambda: ("0.0.35", None))
    assert refuse_varlen(*[OnGpu()] * 3, plan) is None and refuse_xformers(*[OnGpu()] * 3, plan) is None
    for words, (inputs, of) in cases.items():
        for refuse in (refuse_varlen, refuse_xformers):
            assert words in str(refuse(*inputs, of))
    unknown = forget_lengths(layout([2, 2]))
    plan = attention_plan(unknown, forget_lengths(layout([2, 2])))
    monkeypatch.setattr(attention_libraries, "may_be_empty", lambda _: False)
    assert refuse_xformers(*[OnGpu()] * 3, plan) == "needs lengths on the host"
    plan = plan_of([3, 1], [2, 5])
    broken = "xformers 0.0.1 does not load: no symbol"
    monkeypatch.setattr(optional, "xformers", lambda: (None, broken))
    assert refuse_xformers(*[OnGpu()] * 3, plan) == broken
    monkeypatch.setattr(attention_libraries, "installed", lambda _: False)
    assert refuse_xformers(*[OnGpu()] * 3, plan) == "xformers is not installed"
    assert refuse_varlen(*[OnGpu()] * 3, plan) == "this torch has no torch.nn.attention.varlen"


@pytest.mark.parametrize(
    ("q", "k", "expected"),
    [(197, 197, "varlen"), (577, 577, "varlen"), (129, 129, "varlen")]
    + [
        (q, k, "triton")
        for q, k in [(77, 77), (197, 14), (14, 197), (14, 14), (577, 14), (1, 197), (0, 0), (128, 1024)]
    ],
)
def test_the_table_of_choices(q: int, k: int, expected: str) -> None:
    assert choice(plan_of([q], [k])).backend == expected


def test_the_table_leaves_out_no_shape_and_says_what_was_not_measured() -> None:
    assert all(str(c).endswith("(not measured yet)") for c in CHOICES if c.measured is None)
    for q in (0, 1, 128, 129, 1024):
        for k in (0, 1, 128, 129, 1024):
            assert choice(plan_of([q], [k])) in CHOICES


def test_a_row_of_the_table_sends_a_call_to_the_cuda_kernels_where_they_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, inputs = plan_of([197], [14]), [OnGpu()] * 3
    backends = {backend.name: backend for backend in OPS["ragged_attention"].backends}
    monkeypatch.setitem(vars(backends["triton"]), "refuse", lambda *_: None)
    monkeypatch.setitem(vars(backends["cuda"]), "refuse", lambda *_: None)
    assert unasked_triton(*inputs, short) is None
    assert "goes to triton" in str(unasked_cuda(*inputs, short))
    measured = Choice("anything", (0, 10**9), (0, 10**9), "cuda", "it took less", "a GPU, a day, a command")
    monkeypatch.setattr(attention_libraries, "CHOICES", (measured,))
    assert unasked_triton(*inputs, short) == "anything goes to cuda: it took less (a GPU, a day, a command)"
    assert unasked_cuda(*inputs, short) is None
    monkeypatch.setitem(vars(backends["cuda"]), "refuse", lambda *_: "not here")
    assert unasked_triton(*inputs, short) is None


@pytest.mark.skipif(find_spec("torch.nn.attention.varlen") is None, reason="torch without varlen attention")
def test_triton_steps_back_only_where_the_library_takes_the_call() -> None:
    long, inputs = plan_of([197], [197]), [OnGpu()] * 3
    reason = str(CHOICES[-1])
    assert reason.startswith(
        "long against long goes to varlen: it is tuned for that; until ours is found faster (a step"
    )
    assert unasked_triton(*inputs, long) == reason
    assert unasked_triton(*inputs, plan_of([197], [14])) is None
    assert unasked_triton(*inputs, plan_of([197], [197], [0])) is None
    assert unasked_triton(*[OnGpu(torch.float32)] * 3, long) is None


def test_the_order_of_backends_and_what_a_cpu_takes() -> None:
    names = [b.name for b in OPS["ragged_attention"].backends]
    assert names == ["triton", "cuda", "varlen", "cudnn", "xformers", "dense", "reference"]
    plan = plan_of([3, 1], [2, 5])
    said = explain(ragged_attention, *[random(n, H, 16).float() for n in (4, 7, 7)], plan)
    assert "varlen refused: needs a GPU" in said and "xformers refused: " in said and "dense chosen" in said


def test_cudnn_takes_runs_of_equal_lengths_on_demand_alone() -> None:
    runs = plan_of([197] * 5 + [80] * 4, [197] * 5 + [80] * 4)
    assert refuse_cudnn(*[OnGpu()] * 3, runs) is None
    for plan in (
        plan_of([9] * 4, [3, 4, 5, 6]),
        plan_of([3, 4, 5, 6], [9] * 4),
        plan_of([1] * 4, [7] * 3, [0, 1, 2, 2]),
    ):
        assert refuse_cudnn(*[OnGpu()] * 3, plan)
    assert refuse_cudnn(*[OnGpu(head=136)] * 3, runs) == "takes heads of at most 128 values; got 136"
    assert refuse_cudnn(*[torch.zeros(4, H, 64)] * 3, runs) == "needs a GPU; got a tensor on cpu"
    reason = unasked_cudnn(*[OnGpu()] * 3, runs)
    assert reason is not None and reason.startswith("long against long goes to varlen")


@pytest.mark.gpu
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("name", ["varlen", "cudnn", "xformers"])
def test_on_a_gpu_a_library_makes_what_torchs_ops_make(name: str, tail: int) -> None:
    lengths = ([197] * 5 + [80] * 4,) * 2 if name == "cudnn" else ([197, 3, 150], [197, 14, 130])
    on_cpu = plan_of(*lengths, tail=tail)
    plan = attention_plan(on_cpu.q.to("cuda"), on_cpu.k.to("cuda"))
    inputs = [random(x.total, H, 64, seed=i).cuda() for i, x in enumerate((plan.q, plan.k, plan.k))]
    rounded = [x.bfloat16() for x in inputs]
    refuse = {"varlen": refuse_varlen, "cudnn": refuse_cudnn, "xformers": refuse_xformers}[name]
    if reason := refuse(*rounded, plan):
        pytest.skip(f"{name}: {reason}")
    got, found = results(attend(plan), rounded, name)
    expected, truth = results(attend(plan), [x.double() for x in rounded], "reference")
    for ours, true in zip([got, *found], [expected, *truth], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=2e-2 * float(true.abs().max()))
    assert not got[got.shape[0] - tail :].any()
