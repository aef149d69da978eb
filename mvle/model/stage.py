"""A cross stage (image cross encoder, text cross encoder, image decoder): every query set of a step in one pass.

    x = distinct sources · x += SA(x), q = query(x) · x, q = as the sets repeat them · x += CA(q) · x += FFN(x) · …
    last block: queries = x[read], keys = all of x; and where only a sequence's first row is read, none of x but itself

`plan_stage` turns the sets into index tensors, once a step; `Stage` is the module and knows nothing of objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from mvle_kernels import AttentionPlan, Packed, attention_plan, concatenate, expand, expand_layout, round_up, row_index
from torch import Tensor, nn

from .layers import BlockPlan, ContextProjection, CrossBlock, Single
from .queries import Draw, QuerySet


@dataclass(frozen=True, eq=False)
class StagePlan:
    """The layouts and indices that all blocks of a stage share in one step."""

    sources: Packed
    contexts: Packed | None  # None: nobody reads any
    blocks: tuple[BlockPlan, ...]
    outputs: tuple[tuple[str, Packed], ...]  # what each set gets back, in order


def group_capacity(lengths: Sequence[int], group: int) -> int:
    """Rows that hold any choice of one sequence of its own group for each pair: group size x longest, summed."""
    return sum(len(part) * max(part) for part in (lengths[a : a + group] for a in range(0, len(lengths), group)))


def plan_stage(
    sets: Sequence[QuerySet],
    sources: Mapping[str, Packed],
    contexts: Mapping[str, Packed | None],
    row_multiple: int,
    depth: int,
    heads: int,
) -> StagePlan:
    """Lay out one stage. sources: each set's source (mask tokens inserted) by set name, the same object where shared;
    contexts: by set name likewise, of every set or of none. Sets whose sequences are drawn with unknown lengths can
    only read their first rows.
    """
    sets = sorted(sets, key=lambda s: s.read == "global")  # those last, and in the order in which they came
    own = _distinct([sources[s.name] for s in sets])
    read_from = _distinct([context for s in sets if (context := contexts[s.name]) is not None])
    if read_from and any(contexts[s.name] is None for s in sets):
        raise ValueError("sets that read a context and sets that read none are asked in separate calls.")
    x = concatenate(own, row_multiple)
    context = concatenate(read_from, row_multiple) if read_from else None
    context_starts = dict(zip(map(id, read_from), accumulate([0, *(c.sequences for c in read_from)]), strict=False))

    # 1) the query sequences: each set's parts end to end
    parts = [_parts(s, sources[s.name], context_starts.get(id(contexts[s.name]), 0)) for s in sets]
    set_layouts = [[part.layout for part in of_one] for of_one in parts]
    every = [part for of_one in parts for part in of_one]
    plain = all(s.expand == (None,) for s in sets) and len(own) == len(sets)
    queries = x if plain else concatenate([_bare(part.layout) for part in every], row_multiple)
    spread = None if plain else _spread(own, every, queries.total)
    kv_index: Tensor | None = torch.cat([part.reads for part in every])
    if len(sets) == 1 and sets[0].kv_index == (None,):
        kv_index = None

    # 2) the rows that the last block computes, and 3) what each set gets back
    rows, read = None, queries
    if any(s.read != "all" for s in sets):
        rows, read = _rows_to_read(sets, set_layouts, queries, row_multiple)
    outputs = tuple((s.name, _output_layout(s, layouts)) for s, layouts in zip(sets, set_layouts, strict=True))

    # 4) each block: the first meets the distinct sources, the last asks for what is read alone
    shared = spread is not None
    among = attention_plan(queries, queries) if depth > 1 + shared or rows is None else None
    across = at_the_end = None
    if context is not None:
        across = attention_plan(queries, context, kv_index) if depth > 1 else None
        at_the_end = attention_plan(read, context, kv_index) if rows is not None or depth == 1 else across
    blocks = []
    for i in range(depth):
        last = i == depth - 1
        self_plan, single = among, None
        if i == 0 and shared:
            self_plan = attention_plan(x, x)
        elif last and rows is not None:
            self_plan, single = _asked_at_the_end(sets, set_layouts, queries, read, row_multiple, heads)
        blocks.append(
            BlockPlan(self_plan, at_the_end if last else across, None if i else spread, rows if last else None, single)
        )
    return StagePlan(x, context, tuple(blocks), outputs)


@dataclass(frozen=True, eq=False)
class _Part:
    """Source sequences as one part of a set repeats them: in order (draw None) or as drawn, their layout, and the
    context that each reads, int32."""

    source: Packed
    draw: Draw | None
    layout: Packed
    reads: Tensor


def _parts(s: QuerySet, source: Packed, first_context: int) -> list[_Part]:
    pairs = torch.arange(source.sequences, device=source.offsets.device, dtype=torch.int32)
    return [
        _Part(
            source,
            draw,
            source if draw is None else _drawn_layout(source, draw),
            (pairs if reads is None else reads.index) + first_context,
        )
        for draw, reads in zip(s.expand, s.kv_index, strict=True)
    ]


def _asked_at_the_end(
    sets: Sequence[QuerySet],
    set_layouts: Sequence[Sequence[Packed]],
    queries: Packed,
    read: Packed,
    row_multiple: int,
    heads: int,
) -> tuple[AttentionPlan | None, Single | None]:
    """Self-attention of a last block whose sets do not read everything: of the sets that read more than first rows, and
    of those that do not (they come last)."""
    before = [layout for s, parts in zip(sets, set_layouts, strict=True) if s.read != "global" for layout in parts]
    others = sum(layout.sequences for layout in before)
    if others == queries.sequences:
        return attention_plan(read, queries), None
    device = queries.offsets.device
    lengths = [n for layout in before for n in layout.lengths or ()]
    start, sequences = sum(lengths), queries.sequences - others
    longest, room = max(lengths, default=0), round_up(start, row_multiple)
    whole = Packed(queries.rows[:0], queries.offsets[: others + 1], tuple(lengths), longest, room)
    asked = replace(read.part(0, others), total=read.total)
    theirs = Packed(
        queries.rows[:0],
        queries.offsets[others:] - start,
        None if queries.lengths is None else queries.lengths[others:],
        queries.max_length,
        queries.total - start,
        queries.shortest,
    )
    absorbed = Packed.layout_of([heads] * sequences, 1, device)
    first = sum(asked.lengths or ())
    single = Single(first, first + sequences, whole.total, start, attention_plan(absorbed, theirs))
    return attention_plan(asked, whole) if others else None, single


def _rows_to_read(
    sets: Sequence[QuerySet], set_layouts: Sequence[Sequence[Packed]], queries: Packed, row_multiple: int
) -> tuple[Tensor, Packed]:
    """The rows of the query buffer that any set reads, int64, and their layout: one sequence for each query sequence.
    The tail repeats row 0: nobody reads it, and so no gradient comes from it."""
    got = [_read_positions(s, layout) for s, parts in zip(sets, set_layouts, strict=True) for layout in parts]
    lengths = [n for one, _ in got for n in one]
    read = Packed.layout_of(lengths, row_multiple, queries.offsets.device)
    sequence, _, real = row_index(read)
    positions = torch.cat([*(p for _, p in got), got[0][1].new_zeros(read.total - sum(lengths))])
    start = queries.offsets.long()[sequence.clamp(max=max(queries.sequences - 1, 0))]
    return (start + positions) * real, read


def _output_layout(s: QuerySet, parts: Sequence[Packed]) -> Packed:
    if isinstance(s.read, Packed):
        return s.read
    counts = [n for p in parts for n in ([1] * p.sequences if s.read == "global" else _known(s, p))]
    return Packed.layout_of(counts, 1, parts[0].offsets.device)


def _distinct(parts: Sequence[Packed]) -> list[Packed]:
    return list({id(p): p for p in parts}.values())


def _bare(layout: Packed) -> Packed:
    """The layout around rows without width, to be concatenated for its offsets alone."""
    return layout.with_rows(layout.offsets.new_empty(layout.total, 0))


def _drawn_layout(source: Packed, draw: Draw) -> Packed:
    assert source.lengths is not None, "sources have lengths on the host"
    if draw.lengths is not None:
        return Packed.layout_of(draw.lengths, 1, source.offsets.device, source.max_length)
    return expand_layout(source, draw.index, group_capacity(source.lengths, draw.group))


def _known(s: QuerySet, layout: Packed) -> tuple[int, ...]:
    if layout.lengths is None:
        raise ValueError(f"set {s.name} reads all rows of sequences whose lengths only the device knows.")
    return layout.lengths


def _read_positions(s: QuerySet, layout: Packed) -> tuple[tuple[int, ...], Tensor]:
    """How many rows of each sequence are read, and their positions in it, without a tail."""
    if isinstance(s.read, Packed):
        lengths = _known(s, s.read)
        return lengths, s.read.rows[: sum(lengths)].long()
    if s.read == "global":
        return (1,) * layout.sequences, torch.zeros(layout.sequences, dtype=torch.int64, device=layout.offsets.device)
    lengths = _known(s, layout)
    return lengths, row_index(layout)[1][: sum(lengths)]


def _spread(own: Sequence[Packed], every: Sequence[_Part], total: int) -> Callable[[Tensor], Tensor]:
    sizes = [sum(p.lengths or ()) for p in own]
    slots = {id(p): i for i, p in enumerate(own)}
    layouts = [p.part(0, p.sequences) for p in own]  # without tails

    def run(x: Tensor) -> Tensor:
        parts = x.split([*sizes, len(x) - sum(sizes)])
        rows = []
        for part in every:
            slot = slots[id(part.source)]
            if part.draw is None:
                rows.append(parts[slot])
            else:
                rows.append(expand(layouts[slot].with_rows(parts[slot]), part.draw.index, part.layout).rows)
        tail = total - sum(len(r) for r in rows)
        return torch.cat([*rows, x.new_zeros(tail, x.shape[1])])

    return run


class Stage(nn.Module):
    """`depth` cross blocks over one fixed context, and a final norm."""

    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.context = ContextProjection(width, heads, depth)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, plan: StagePlan) -> dict[str, Packed]:
        """The rows that each set reads, by set name."""
        x = plan.sources.rows
        keys_values: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if plan.contexts is not None:
            keys_values = self.context.split(self.context(plan.contexts.rows))
        for block, block_plan, kv in zip(self.blocks, plan.blocks, keys_values, strict=True):
            x = block(x, block_plan, kv)
        x = self.norm(x)
        counts = [sum(layout.lengths or ()) for _, layout in plan.outputs]
        parts = x.split([*counts, len(x) - sum(counts)])
        return {
            name: layout.with_rows(torch.cat([rows, rows.new_zeros(layout.total - len(rows), rows.shape[1])]))
            if layout.total > len(rows)
            else layout.with_rows(rows)
            for (name, layout), rows in zip(plan.outputs, parts, strict=False)
        }
