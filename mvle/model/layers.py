"""The blocks of the model. All read packed rows [T, D]; attention is the only place where sequences meet.

Names and layouts follow timm's ViT (pre-norm) and RoBERTa (post-norm), so that weights carry over.
Rows of a packed tail are carried along and never read: attention skips them, so they cost a little and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from mvle_kernels import AttentionPlan, ragged_attention
from torch import Tensor, nn


def attend(q_TD: Tensor, k_THE: Tensor, v_THE: Tensor, plan: AttentionPlan) -> Tensor:
    """ragged_attention under a plan; queries come and go as [T, D], keys and values as [T_k, H, E]."""
    q_THE = q_TD.unflatten(1, k_THE.shape[1:])
    q, k = plan.q, plan.k
    return ragged_attention(
        q_THE, k_THE, v_THE, q.offsets, k.offsets, q.max_length, k.max_length, plan.kv_index, plan=plan
    ).flatten(1)


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
    """Multi-head self-attention; in a last block only the rows that are read ask (`rows`), and all answer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, plan: AttentionPlan, rows: Rows | None = None) -> Tensor:
        width = x.shape[1]
        if rows is None:
            q, k, v = self.qkv(x).split(width, 1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            k, v = F.linear(x, weight[width:], bias[width:]).split(width, 1)
            q = F.linear(rows.of(x), weight[:width], bias[:width])
        heads = (self.heads, width // self.heads)
        return self.proj(attend(q, k.unflatten(1, heads), v.unflatten(1, heads), plan))


class CrossAttention(nn.Module):
    """Queries of one side against keys and values that a ContextProjection has made of the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, k_THE: Tensor, v_THE: Tensor, plan: AttentionPlan) -> Tensor:
        return self.proj(attend(self.query(x), k_THE, v_THE, plan))


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


class Block(nn.Module):
    """Pre-norm transformer block (ViT)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.attn(self.norm1(x), plan)
        return x + self.mlp(self.norm2(x))


class PostNormBlock(nn.Module):
    """Post-norm transformer block (BERT, RoBERTa)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = self.norm1(x + self.attn(x, plan))
        return self.norm2(x + self.mlp(x))


class CrossBlock(nn.Module):
    """Pre-norm block of a cross encoder or decoder: self-attention, cross-attention, feed-forward."""

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
        if rows is not None and spread is None:
            x = rows.of(x) + self.attn(self.norm1(x), self_plan, rows)
        else:
            x = x + self.attn(self.norm1(x), self_plan)
            if spread is not None:
                x = spread(x)
            if rows is not None:
                x = rows.of(x)
        x = x + self.cross(self.norm2(x), *kv, cross_plan)
        return x + self.mlp(self.norm3(x))
