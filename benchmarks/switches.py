"""The step with one of its savings switched off: the same losses and gradients, more work.

Each switch is a MaskVLM that transforms what is asked (query sets, contexts) or pads what is packed; the model itself
has no branch for any of them. So each row of the table is one idea, and the oracle holds every switch to the same
mathematics (tests/unit/test_switches.py).

    model = SWITCHES["packing"].model(config, vocabulary, mask_id)      in the place of MaskVLM(config, …)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mvle_kernels import Packed, attention_plan, concatenate, expand, expand_layout
from mvle_kernels import patches as patches_file
from mvle_kernels.layout import padded_length
from torch import Tensor

from mvle.model import model as model_file
from mvle.model import stage as stage_file
from mvle.model.layers import ContextProjection
from mvle.model.model import STAGES, MaskVLM
from mvle.model.queries import Draw, QuerySet, View
from mvle.model.stage import StagePlan, group_capacity, plan_stage
from mvle.model.step import Choices, Step


@dataclass(frozen=True)
class Switch:
    """A saving: its name, what the step does without it, and the model that does it."""

    name: str
    without: str
    model: Callable[..., MaskVLM]


class Patched(MaskVLM):
    """A model in whose forward some functions of the model's files are others."""

    @contextmanager
    def patched(self) -> Iterator[None]:
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.patched():
            return super().forward(*args, **kwargs)


# ---- packing --------------------------------------------------------------------------------------------------------


class Padded(Patched):
    """Every sequence of a buffer has as many rows as the longest."""

    @contextmanager
    def patched(self) -> Iterator[None]:
        def padded(parts: Sequence[Packed], row_multiple: int = 1) -> Packed:
            packed = concatenate(parts, row_multiple)
            rows = sum(p.sequences * padded_length(p) for p in parts)
            return longer(packed, rows)

        with mock.patch.object(model_file, "concatenate", padded), mock.patch.object(stage_file, "concatenate", padded):
            with mock.patch.object(patches_file, "concatenate", padded):
                yield


# ---- one call -------------------------------------------------------------------------------------------------------


class CallForEachView(MaskVLM):
    """An encoder call for each view."""

    def encode(self, step: Step, wanted: frozenset[View]) -> None:
        for view in View:
            if view in wanted:
                super().encode(step, frozenset({view}))


class CallForEachSet(MaskVLM):
    """A call of a cross stage for each set that asks it."""

    def ask(self, step: Step, sets: Sequence[QuerySet], known: Mapping[str, Packed] | None = None) -> dict[str, Packed]:
        rows: dict[str, Packed] = dict(known or {})
        for stage in STAGES:
            for s in sets:
                if s.stage == stage:
                    rows |= super().ask(step, [s], rows)
        return rows


# ---- what is read ---------------------------------------------------------------------------------------------------


class HeadsOnEveryRow(MaskVLM):
    """The pixel head at every patch and the word head at every token, as many rows as the plain graph has."""

    def choose(self, batch: Any, seed: int, wanted: frozenset[View]) -> Choices:
        choices = super().choose(batch, seed, wanted)
        rows, columns = self.config.model.image.grid
        if choices.masked is not None:
            choices = replace(choices, masked=longer(choices.masked, len(batch) * rows * columns))
        if choices.read is not None and choices.targets is not None:
            total = max(batch.text.total, choices.read.total)
            targets = F.pad(choices.targets, (0, total - len(choices.targets)), value=-1)
            choices = replace(choices, read=longer(choices.read, total), targets=targets)
        return choices


def longer(packed: Packed, total: int) -> Packed:
    """The same sequences in a buffer of `total` rows."""
    total = max(total, packed.total)
    tail = packed.rows.new_zeros(total - packed.total, *packed.rows.shape[1:])
    return replace(packed, rows=torch.cat([packed.rows, tail]), total=total, cache={})


class LastBlocksWhole(MaskVLM):
    """Last blocks compute every row, and what is read is picked behind them. (So nothing is absorbed either.)"""

    def ask(self, step: Step, sets: Sequence[QuerySet], known: Mapping[str, Packed] | None = None) -> dict[str, Packed]:
        whole = [replace(s, read="all", expand=tuple(map(self.on_the_host(step, s), s.expand))) for s in sets]
        rows = dict(known or {})
        for stage in STAGES:  # a later stage reads the rows of an earlier one
            asked = [(s, w) for s, w in zip(sets, whole, strict=True) if s.stage == stage]
            found = super().ask(step, [w for _, w in asked], rows)
            rows |= found | {s.name: picked(found[s.name], s) for s, _ in asked}
        return rows

    @staticmethod
    def on_the_host(step: Step, s: QuerySet) -> Callable[[Draw | None], Draw | None]:
        """The draw with the lengths of what was drawn, for which the host waits."""

        def known(draw: Draw | None) -> Draw | None:
            if draw is None or not isinstance(s.source, View):
                return draw
            lengths = step.views[s.source].lengths
            assert lengths is not None
            return replace(draw, lengths=tuple(lengths[i] for i in draw.index.tolist()))

        return known


def picked(rows: Packed, s: QuerySet) -> Packed:
    """What a set reads, of all rows of its sequences."""
    if isinstance(s.read, Packed):
        assert s.read.lengths is not None
        sequence = torch.repeat_interleave(
            torch.arange(s.read.sequences, device=rows.offsets.device), torch.tensor(s.read.lengths)
        )
        at = rows.offsets.long()[sequence] + s.read.rows[: len(sequence)].long()
        found = rows.rows.index_select(0, at)
        return s.read.with_rows(F.pad(found, (0, 0, 0, s.read.total - len(found))))
    if s.read == "global":
        one = Packed.layout_of([1] * rows.sequences, 1, rows.offsets.device)
        return one.with_rows(rows.rows.index_select(0, rows.offsets.long()[:-1]))
    return rows


class NothingAbsorbed(Patched):
    """Keys and values of every row of ITM's sequences, for the one query that reads them."""

    @contextmanager
    def patched(self) -> Iterator[None]:
        def all_rows(sets: Any, layouts: Any, queries: Packed, read: Packed, *rest: Any) -> Any:
            return attention_plan(read, queries), None

        with mock.patch.object(stage_file, "_asked_at_the_end", all_rows):
            yield


# ---- what is shared -------------------------------------------------------------------------------------------------


def repeated(packed: Packed, draws: Sequence[Draw | None], row_multiple: int) -> Packed:
    """Sequences in order, or as drawn, part after part in one buffer."""
    assert packed.lengths is not None
    parts = []
    for draw in draws:
        if draw is None:
            parts.append(packed)
        else:
            layout = expand_layout(packed, draw.index, group_capacity(packed.lengths, draw.group))
            parts.append(expand(packed, draw.index, layout))
    known = sorted(parts, key=lambda p: p.lengths is None)
    assert [id(p) for p in known] == [id(p) for p in parts], "what the device drew comes last"
    return concatenate(parts, row_multiple)


class Replanned(Patched):
    """A model whose stages are planned by its own `plan`, from other sets, sources or contexts."""

    plan: Callable[..., StagePlan]

    @contextmanager
    def patched(self) -> Iterator[None]:
        with mock.patch.object(model_file, "plan_stage", self.plan):
            yield


class ContextForEachSequence(Replanned):
    """Keys and values of a context anew for each sequence that reads it."""

    def plan(self, sets: Sequence[QuerySet], sources: Any, contexts: Any, *rest: Any) -> StagePlan:
        copies, apart = {}, []
        for s in sets:
            context = contexts[s.name]
            if context is None:
                return plan_stage(sets, sources, contexts, *rest)
            pairs = torch.arange(context.sequences, device=context.offsets.device, dtype=torch.int32)
            copies[s.name] = repeated(context, s.kv_index, 1)
            reads = tuple(Draw(pairs + part * context.sequences) for part in range(len(s.kv_index)))
            apart.append(replace(s, kv_index=reads))
        return plan_stage(apart, sources, copies, *rest)


class SelfAttentionForEachSequence(Replanned):
    """ITM's sequences are repeated before the first block instead of within it."""

    def plan(self, sets: Sequence[QuerySet], sources: Any, contexts: Any, *rest: Any) -> StagePlan:
        copies, apart = {}, []
        for s in sets:
            source = sources[s.name]
            copies[s.name] = source if s.expand == (None,) else repeated(source, s.expand, 1)
            if s.expand != (None,):
                pairs = torch.arange(source.sequences, device=source.offsets.device, dtype=torch.int32)
                reads = torch.cat([pairs if draw is None else draw.index for draw in s.kv_index])
                s = replace(s, expand=(None,), kv_index=(Draw(reads),))
            apart.append(s)
        return plan_stage(apart, copies, contexts, *rest)


class ProductForEachBlock(MaskVLM):
    """Keys and values of a context by one product a block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for stage in STAGES:
            getattr(self, stage).context.__class__ = ContextBlockByBlock


class ContextBlockByBlock(ContextProjection):
    """See ProductForEachBlock."""

    def forward(self, context_TD: Tensor) -> list[Tensor]:  # type: ignore[override]
        weights, biases = self.kv.weight.chunk(self.depth), self.kv.bias.chunk(self.depth)
        return [F.linear(context_TD, w, b) for w, b in zip(weights, biases, strict=True)]

    def split(self, kv: list[Tensor]) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        return [part.unflatten(1, (2, self.heads, -1)).unbind(1) for part in kv]  # type: ignore[misc]


SWITCHES: dict[str, Switch] = {
    s.name: s
    for s in (
        Switch("packing", "every caption and every image takes as many rows as the longest of the batch", Padded),
        Switch("both views in one call", "an encoder call a view", CallForEachView),
        Switch("all questions in one call", "a call of a cross stage for each objective", CallForEachSet),
        Switch("masked rows only in the heads", "pixel and word head at every row", HeadsOnEveryRow),
        Switch("last blocks only where read", "every row of last blocks, nothing absorbed", LastBlocksWhole),
        Switch("keys and values once a pair", "anew for each sequence that reads them", ContextForEachSequence),
        Switch("keys and values in one product", "a product for each block", ProductForEachBlock),
        Switch(
            "ITM's first self-attention shared",
            "self-attention and query of the first block for each of the three questions",
            SelfAttentionForEachSequence,
        ),
        Switch("ITM's last self-attention absorbed", "keys and values of every row for one query", NothingAbsorbed),
    )
}
