"""How many rows the blocks of a step process, and how many of them hold nothing: the price of shapes that repeat.

Packed buffers pad no sequence, but T is rounded up to kernels.row_multiple; and where only the device knows how long
the captions are that matching draws, their buffer has room for the longest of each group. By formula, from lengths and
ratios that the host knows; the tests hold it against the rows that blocks really return.

A block counts with the rows of its feed-forward layer, which are those that it returns: of a last block, the rows that
are read. Not counted are the buffers of contexts (a product each), what a backend pads within its attention, rows that
are processed again (activation checkpointing, the first pass of a contrast over micro-batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvle_kernels import exact_count, round_up

from ..data.batch import Batch
from .flops import Sections, image_counts
from .stage import group_capacity
from .step import masked_token_count


@dataclass(frozen=True)
class Rows:
    """A packed buffer of total rows (T), of which real belong to a sequence, that passes through some blocks."""

    real: int
    total: int
    blocks: int


def step_rows(
    config: Sections, lengths: Sequence[int], image_ratios: Sequence[float], row_multiple: int, side: int | None = None
) -> dict[str, Rows]:
    """The buffers of one forward, by the part of the model that they belong to; parts that nothing asks are left out.

    config        its sections model, masking and objectives
    lengths       tokens of each pair's caption, with bos and eos
    image_ratios  share of cells masked in each pair's image
    side          of the images, pixels; None: model.image.size

    The captions that matching draws count as long as those of their group are on average, whatever is drawn.
    """
    model, masking, kinds = config.model, config.masking, config.objectives
    mim, mlm, itc, itm = (o.weight > 0 for o in (kinds.mim, kinds.mlm, kinds.itc, kinds.itm))
    patches, masked_of_each, seen_of_each = image_counts(config, image_ratios, side)
    pairs, text, masked, seen = len(lengths), sum(lengths), sum(masked_of_each), sum(seen_of_each)
    words = sum(masked_token_count(n, masking.text_ratio) for n in lengths)
    whole, clean = pairs * (patches + 1), pairs * (exact_count(masking.clean_keep, patches) + 1)
    asking = whole if masking.insert == "cross" else seen  # the masked images, where they enter the cross encoder
    room = group_capacity(lengths, kinds.itm.group)  # for the captions drawn

    def buffer(real: int, blocks: int, empty: int = 0) -> Rows:
        return Rows(real, round_up(real + empty, row_multiple), blocks)

    depth = model.cross_depth
    rows = {
        "image encoder": buffer(clean * (mlm or itc or itm) + seen * mim, model.image.depth),
        "text encoder": buffer(text * ((mim or itc or itm) + mlm), model.text.depth),
        "image cross": buffer(asking * mim + 3 * clean * itm, depth - itm),
        "image cross, last": buffer(asking * mim + 3 * pairs, int(itm)),
        "text cross": buffer(text * mlm + 3 * text * itm, depth - 1, (room - text) * itm),
        "text cross, last": buffer(words * mlm + 3 * pairs * itm, 1),
        "decoder": buffer(whole * mim, model.decoder_depth - 1),
        "decoder, last": buffer(masked * mim, 1),
    }
    return {name: own for name, own in rows.items() if own.real and own.blocks}


def processed_rows(config: Sections, batch: Batch, row_multiple: int, micro: int | None = None) -> tuple[int, int]:
    """(real, all) rows that blocks process in a step over a batch, in micro-batches of `micro` pairs (None: in one)."""
    lengths, ratios, side = batch.text.lengths or (), batch.image_ratio, batch.images.shape[1]
    micro = micro or len(batch)
    real = total = 0
    for a in range(0, len(batch), micro):
        part = slice(a, a + micro)
        for rows in step_rows(config, lengths[part], ratios[part], row_multiple, side).values():
            real, total = real + rows.real * rows.blocks, total + rows.total * rows.blocks
    return real, total
