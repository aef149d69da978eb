"""The blocks of the model. All read packed rows [T, D]; attention is the only place where sequences meet.

A block is attention with dense pieces around it, which treat every row alike, whatever sequence it is of.
Names and layouts follow timm's ViT (pre-norm) and RoBERTa (post-norm), so that weights carry over.
Rows of a packed tail are carried along and never read: attention skips them, so they cost a little and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from mvle_kernels import AttentionPlan, add_norm, feed_forward, ragged_attention
from torch import Tensor, nn


def attend(q_TD: Tensor, k_THE: Tensor, v_THE: Tensor, plan: AttentionPlan) -> Tensor:
    """ragged_attention under a plan: queries [T, D], keys and values [T_k, H, E] -> [T, H, E]."""
    q_THE = q_TD.unflatten(1, k_THE.shape[1:])
    q, k = plan.q, plan.k
    return ragged_attention(
        q_THE, k_THE, v_THE, q.offsets, k.offsets, q.max_length, k.max_length, plan.kv_index, plan=plan
    )


def branch(x: Tensor, added: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(rows with which a block goes on, rows with which a branch begins): the sum, and its norm; see add_norm."""
    return add_norm(x, added, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Single:
    """The sequences at the end of a buffer of which only the first row is read.

    first, stop   their queries among the rows that are read
    whole         rows of the buffer that hold the sequences before them (rounded up)
    start         row of the buffer where their own begin
    plan          H absorbed queries a sequence against its rows, as one head of width D
    """

    first: int
    stop: int
    whole: int
    start: int
    plan: AttentionPlan


@dataclass(frozen=True)
class BlockPlan:
    """What a cross block does in one step beside its weights.

    self_plan   who attends to whom; None where every sequence is a single one
    cross_plan  which context each sequence reads; None: none of them reads any, and cross-attention is skipped
    spread      behind self-attention and the query of cross-attention, sequences are repeated (hard negatives share
                both); None: they are not
    rows        int64 [R], which rows of the result are read; None: all
    single      the sequences of which only the first row is read; None: none, or none apart from the others
    """

    self_plan: AttentionPlan | None
    cross_plan: AttentionPlan | None
    spread: Callable[[Tensor], Tensor] | None = None
    rows: Tensor | None = None
    single: Single | None = None

    def repeated(self, x: Tensor) -> Tensor:
        """Rows behind self-attention, for each sequence that repeats them; those alone that are read."""
        if self.spread is None:
            return x
        x = self.spread(x)
        return x if self.rows is None else x.index_select(0, self.rows)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class SelfAttention(nn.Module):
    """What multi-head self-attention learns; in a last block only the rows that are read ask, and all answer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, D] (of `rows` alone, if given), keys and values [T, H, E]."""
        if rows is not None:
            return self.query(x.index_select(0, rows)), *self.keys_values(x)
        q, k, v = self.qkv(x).split(x.shape[1], 1)
        return q, k.unflatten(1, (self.heads, -1)), v.unflatten(1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        """Queries [T, D] of rows [T, D]."""
        width = x.shape[1]
        return F.linear(x, self.qkv.weight[:width], self.qkv.bias[:width])

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, E] of rows [T, D]."""
        width = x.shape[1]
        k, v = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).split(width, 1)
        return k.unflatten(1, (self.heads, -1)), v.unflatten(1, (self.heads, -1))

    def absorb(self, q_SD: Tensor) -> Tensor:
        """One query a sequence, [S, D] -> H rows that meet rows of x in the place of keys, [S * H, D].

        q (W_k x + b_k) = (W_k^T q) x + a number that is the same for every x, which softmax does not see. Scaled by
        sqrt(H), since attention divides by the root of D and not of D / H.
        """
        width = q_SD.shape[1]
        key_HED = self.qkv.weight[width : 2 * width].unflatten(0, (self.heads, -1))
        q_HSE = (q_SD * self.heads**0.5).unflatten(1, (self.heads, -1)).transpose(0, 1)
        return torch.bmm(q_HSE, key_HED).transpose(0, 1).flatten(0, 1)

    def values(self, read_TD: Tensor) -> Tensor:
        """What absorbed queries have read, [S * H, 1, D] -> [S, D]: W_v mean(x) + b_v = mean(W_v x + b_v)."""
        width = read_TD.shape[-1]
        value_HED = self.qkv.weight[2 * width :].unflatten(0, (self.heads, -1))
        read_HSD = read_TD.view(-1, self.heads, width).transpose(0, 1)
        return torch.bmm(read_HSD, value_HED.transpose(1, 2)).transpose(0, 1).flatten(1) + self.qkv.bias[2 * width :]


class CrossAttention(nn.Module):
    """Queries of one side against keys and values that a ContextProjection has made of the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)


class ContextProjection(nn.Module):
    """Keys and values of every block of a stage in one product: the context does not change between blocks."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads, self.depth = heads, depth
        self.kv = nn.Linear(width, depth * 2 * width)

    def forward(self, context_TD: Tensor) -> Tensor:
        """[T, D] -> [T, depth * 2 * D]; `split` cuts it. (Two steps, since a sharded module may not return views.)"""
        return self.kv(context_TD)

    def split(self, kv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each block (k, v), each [T, H, E]."""
        parts = kv.unflatten(1, (self.depth * 2, self.heads, -1)).unbind(1)
        return list(zip(parts[0::2], parts[1::2], strict=True))


class AttentionBlock(nn.Module):
    """Any of the blocks below. DENSE names the methods between which it attends; they, and `attend`, may be replaced
    one by one (engine/blocks.py).

    Where a branch begins with a norm, the block goes on with the rows that `branch` gives back, not with its own: a
    backward then adds up what comes by both in the pass of the norm."""

    DENSE: ClassVar[tuple[str, ...]] = ("before", "after")
    attend = staticmethod(attend)


class Block(AttentionBlock):
    """Pre-norm transformer block (ViT)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x, q, k, v = self.before(x)
        return self.after(x, self.attend(q, k, v, plan))

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, h = branch(x, None, self.norm1)
        return x, *self.attn.project(h)

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x, h = branch(x, self.attn.proj(read.flatten(1)), self.norm2)
        return x + self.mlp(h)


class PostNormBlock(AttentionBlock):
    """Post-norm transformer block (BERT, RoBERTa)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        return self.after(x, self.attend(*self.before(x), plan))

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(x)

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x = self.norm1(x + self.attn.proj(read.flatten(1)))
        return self.norm2(x + self.mlp(x))


class CrossBlock(AttentionBlock):
    """Pre-norm block of a cross encoder or decoder: self-attention, cross-attention, feed-forward."""

    DENSE = ("before", "between", "before_single", "between_single", "ask", "after")

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)

    def forward(self, x: Tensor, plan: BlockPlan, kv: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [T, D], keys and values of this block (None: no context) -> [T', D]: the rows that are read, of sequences
        as repeated."""
        if plan.single is not None:
            assert plan.rows is not None
            x = self.attend_to_self(x, plan.self_plan, plan.rows, plan.single)
        else:
            assert plan.self_plan is not None
            early = plan.rows if plan.spread is None else None
            x, q, k, v = self.before(x, early)
            read = self.attend(q, k, v, plan.self_plan)
            x = self.between(x if early is None else x.index_select(0, early), read)
        if kv is None or plan.cross_plan is None:
            return self.after(plan.repeated(x), None)
        x, query = self.ask(x)
        return self.after(plan.repeated(x), self.attend(plan.repeated(query), *kv, plan.cross_plan))

    def attend_to_self(self, x: Tensor, plan: AttentionPlan | None, rows: Tensor, single: Single) -> Tensor:
        """Self-attention where the sequences at the end ask with their first row alone: it needs neither keys nor
        values of theirs, and one query of each."""
        x, q, k, v, absorbed, h = self.before_single(x, rows, single.first, single.stop, single.whole, single.start)
        read = q.new_zeros(q.shape) if plan is None else self.attend(q, k, v, plan).flatten(1)
        alone = self.attend(absorbed, h, h, single.plan)
        return self.between_single(x.index_select(0, rows), read, alone, single.first, single.stop)

    def before(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, h = branch(x, None, self.norm1)
        return x, *self.attn.project(h, rows)

    def between(self, x: Tensor, read: Tensor) -> Tensor:
        return x + self.attn.proj(read.flatten(1))

    def before_single(
        self, x: Tensor, rows: Tensor, first: int, stop: int, whole: int, start: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x; queries of all rows that are read, keys and values of the sequences before the single ones; absorbed
        queries and rows of those."""
        x, h = branch(x, None, self.norm1)
        q = self.attn.query(h.index_select(0, rows))
        return x, q, *self.attn.keys_values(h[:whole]), self.attn.absorb(q[first:stop]), h[start:].unsqueeze(1)

    def between_single(self, x: Tensor, read: Tensor, alone: Tensor, first: int, stop: int) -> Tensor:
        return x + self.attn.proj(read.slice_scatter(self.attn.values(alone), 0, first, stop))

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, h = branch(x, None, self.norm2)
        return x, self.cross.query(h)

    def after(self, x: Tensor, read: Tensor | None) -> Tensor:
        x, h = branch(x, None if read is None else self.cross.proj(read.flatten(1)), self.norm3)
        return x + self.mlp(h)
