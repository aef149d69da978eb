"""The blocks of the model. All read packed rows [T, D]; attention is the only place where sequences meet.

A block is attention with dense pieces around it, which treat every row alike, whatever sequence it is of.
Names and layouts follow timm's ViT (pre-norm) and RoBERTa (post-norm), so that weights carry over.
Rows of a packed tail are carried along and never read: attention skips them, so they cost a little and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from mvle_kernels import AttentionPlan, ragged_attention
from torch import Tensor, nn


def attend(q_TD: Tensor, k_THE: Tensor, v_THE: Tensor, plan: AttentionPlan) -> Tensor:
    """ragged_attention under a plan: queries [T, D], keys and values [T_k, H, E] -> [T, H, E]."""
    q_THE = q_TD.unflatten(1, k_THE.shape[1:])
    q, k = plan.q, plan.k
    return ragged_attention(
        q_THE, k_THE, v_THE, q.offsets, k.offsets, q.max_length, k.max_length, plan.kv_index, plan=plan
    )


@dataclass(frozen=True)
class Rows:
    """Which rows of a packed buffer go on: `index` int64 [R] into it, `real` bool [R] or None where all are."""

    index: Tensor
    real: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The chosen rows of x, those of the tail zero."""
        x = x.index_select(0, self.index)
        return x if self.real is None else x * self.real[:, None]


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """What multi-head self-attention learns; in a last block only the rows that are read ask, and all answer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, D] (of `rows` alone, if given), keys and values [T, H, E]."""
        width = x.shape[1]
        if rows is None:
            q, k, v = self.qkv(x).split(width, 1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            k, v = F.linear(x, weight[width:], bias[width:]).split(width, 1)
            q = F.linear(rows.of(x), weight[:width], bias[:width])
        heads = (self.heads, width // self.heads)
        return q, k.unflatten(1, heads), v.unflatten(1, heads)


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
    one by one (engine/blocks.py)."""

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
        return self.after(x, self.attend(*self.before(x), plan))

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(self.norm1(x))

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x = x + self.attn.proj(read.flatten(1))
        return x + self.mlp(self.norm2(x))


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

    DENSE = ("before", "between", "ask", "after")

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)

    def forward(
        self,
        x: Tensor,
        self_plan: AttentionPlan,
        kv: tuple[Tensor, Tensor],
        cross_plan: AttentionPlan,
        spread: Callable[[Tensor], Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """x [T, D] -> [T', D]. spread: after self-attention, sequences are repeated (hard negatives share it).
        rows: what is read of the result; with both, self-attention is whole and the rows are picked behind it."""
        early = rows if spread is None else None
        read = self.attend(*self.before(x, early), self_plan)
        x = self.between(x if early is None else early.of(x), read)
        if spread is not None:
            x = spread(x)
            if rows is not None:
                x = rows.of(x)
        return self.after(x, self.attend(self.ask(x), *kv, cross_plan))

    def before(self, x: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(self.norm1(x), rows)

    def between(self, x: Tensor, read: Tensor) -> Tensor:
        return x + self.attn.proj(read.flatten(1))

    def ask(self, x: Tensor) -> Tensor:
        return self.cross.query(self.norm2(x))

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x = x + self.cross.proj(read.flatten(1))
        return x + self.mlp(self.norm3(x))
