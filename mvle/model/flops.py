"""Useful floating-point operations of a training step, by formula, from what the host knows: lengths and ratios.

A product of [m, k] and [k, n] is 2 m k n operations; its backward is two of the same size, or one where the input
learns nothing (pixels). Attention of q queries to k keys is two products a head: 4 q k D. Nothing else is counted:
norms, GELU, softmax, losses and the optimizer are no products.

Useful is what the packed step has to compute: real tokens, visible patches, rows that are read, each shared thing once.
No rounding of rows, no padding within a backend's call, nothing that is computed again (activation checkpointing, the
first pass of a contrast over several micro-batches, attention's backward). So a figure of use (MFU) is never
better for wasted work. Held within 1% of torch's own counter over the `reference` ops (tests/unit/test_flops.py).

One thing only the device knows: how long the captions are that matching draws as negatives. Each is counted as if the
captions of a group were dealt out among its pairs anew, which is right on average for uniform draws; `drawn` gives the
true lengths where someone has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from mvle_kernels import exact_count, round_up

from ..objectives.config import ObjectivesConfig
from ..objectives.masking import MaskingConfig
from .config import ModelConfig
from .step import masked_cells, masked_token_count


class Sections(Protocol):
    """The sections of a config that decide the work of a step."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def masking(self) -> MaskingConfig: ...
    @property
    def objectives(self) -> ObjectivesConfig: ...


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and of its backward."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Of both."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def learned(forward: int) -> Flops:
    """Products both of whose factors have a gradient."""
    return Flops(forward, 2 * forward)


def total(parts: dict[str, Flops]) -> Flops:
    """The sum of all parts."""
    return reduce(add, parts.values(), Flops())


@dataclass(frozen=True)
class Asked:
    """One query set, as numbers. Sequences are those after the set has repeated its sources.

    sources    rows of each distinct source sequence
    rows       of each sequence
    contexts   rows of the context that each sequence reads; None: they read none, and cross-attention is skipped
    read       rows of each sequence that the last block computes; None: all; "global": the first
    """

    sources: Sequence[int]
    rows: Sequence[int]
    contexts: Sequence[int] | None
    read: Sequence[int] | str | None


@dataclass(frozen=True)
class Sizes:
    """Width D, hidden width of the feed-forward layer, heads."""

    width: int
    inner: int
    heads: int

    @staticmethod
    def of(model: ModelConfig) -> Sizes:
        """The sizes of every block of a model."""
        return Sizes(model.width, int(model.width * model.mlp_ratio), model.heads)

    def linear(self, rows: int, outputs: int = 1) -> int:
        """rows through [D, outputs * D]."""
        return 2 * rows * self.width * outputs * self.width

    def mlp(self, rows: int) -> int:
        """Both layers."""
        return 4 * rows * self.width * self.inner

    def attention(self, queries: Sequence[int], keys: Sequence[int]) -> int:
        """Scores and weighted values, sequence by sequence, all heads."""
        return 4 * self.width * sum(q * k for q, k in zip(queries, keys, strict=True))

    def block(self, lengths: Sequence[int]) -> int:
        """An encoder block."""
        rows = sum(lengths)
        return self.linear(rows, 4) + self.attention(lengths, lengths) + self.mlp(rows)

    def cross_block(self, asked: Asked, shared: bool, pruned: bool) -> int:
        """A block of a cross stage, without keys and values of its context.

        shared: the first block of a stage some of whose sets repeat their sources; pruned: the last of a stage some of
        whose sets do not read everything.
        """
        rows = asked.rows
        left = rows if not pruned or asked.read is None else [1] * len(rows) if asked.read == "global" else asked.read
        assert not isinstance(left, str)
        count, crosses = sum(left), asked.contexts is not None
        behind = self.mlp(count)
        if asked.contexts is not None:
            behind += self.attention(left, asked.contexts) + self.linear(count)
        if shared:  # self-attention and the query of cross-attention on the distinct sources, whatever is read
            distinct = sum(asked.sources)
            return behind + self.linear(distinct, 4 + crosses) + self.attention(asked.sources, asked.sources)
        if pruned and asked.read == "global":  # query, key and value weights at one row; H queries of width D read rows
            return behind + self.linear(count, 4 + crosses) + self.heads * self.attention(left, rows)
        return behind + self.linear(sum(rows), 2) + self.linear(count, 2 + crosses) + self.attention(left, rows)

    def stage(self, sets: Mapping[str, Asked], depth: int) -> dict[str, int]:
        """Each set's part of a stage, by its name. Sets with a context and those without are asked in two calls."""
        parts = {}
        for crosses in (True, False):
            call = {name: s for name, s in sets.items() if (s.contexts is not None) == crosses}
            spread = any(len(s.rows) > len(s.sources) for s in call.values())
            pruned = any(s.read is not None for s in call.values())
            for name, s in call.items():
                blocks = (self.cross_block(s, spread and i == 0, pruned and i == depth - 1) for i in range(depth))
                parts[name] = sum(blocks)
        return parts


def step_flops(
    config: Sections,
    vocabulary: int,
    lengths: Sequence[int],
    image_ratios: Sequence[float],
    *,
    drawn: Sequence[int] | None = None,
    contrast_pairs: int | None = None,
    side: int | None = None,
) -> dict[str, Flops]:
    """Useful operations of one step, forward and backward, by part; parts that nothing asks for are left out.

    config          its sections model, masking and objectives
    vocabulary      words that are scored
    lengths         tokens of each pair's caption, with bos and eos
    image_ratios    share of cells masked in each pair's image
    drawn           length of the other caption that matching draws for each pair; None: those of `lengths`
    side            of the images, pixels; None: model.image.size (schedule.resolution has phases of less)
    contrast_pairs  pairs that each pair is contrasted with, over all ranks; None: these alone

    patches             pixels to rows, once for both views
    image clean, masked, text      the encoders
    mim, mlm, itm       their sequences in the cross encoders; itm's draw of negatives
    decoder, contexts   MIM's decoder; keys and values of all contexts
    heads, contrast     pixels, words, embeddings, match; similarities
    """
    model, kinds = config.model, config.objectives
    sizes, D, pairs = Sizes.of(model), model.width, len(lengths)
    patches, masked, masked_rows = image_counts(config, image_ratios, side)
    clean = [1 + exact_count(config.masking.clean_keep, patches)] * pairs  # rows of each clean image view, in training
    whole, words = [patches + 1] * pairs, _masked_words(config, lengths)
    mim, mlm, itc, itm = (o.weight > 0 for o in (kinds.mim, kinds.mlm, kinds.itc, kinds.itm))
    other = list(lengths) if drawn is None else list(drawn)
    context = config.masking.context
    clean_image, masked_image = itc or itm or (mlm and context == "clean"), mim or (mlm and context == "masked")
    clean_text, masked_text = itc or itm or (mim and context == "clean"), mlm or (mim and context == "masked")
    X = 3 * model.image.patch**2

    forward: dict[str, int] = {
        "image clean": model.image.depth * sizes.block(clean) * clean_image,
        "image masked": model.image.depth * sizes.block(masked_rows) * masked_image,
        "text": model.text.depth * sizes.block(lengths) * (clean_text + masked_text),
    }
    to_images, to_texts = _questions(config, lengths, other, clean, whole, masked_rows)
    for stage in (to_images, to_texts):
        for name, work in sizes.stage(stage, model.cross_depth).items():
            forward[name] = forward.get(name, 0) + work
    if mim:
        asked = {"decoder": Asked(whole, whole, None if context == "none" else lengths, masked)}
        forward |= sizes.stage(asked, model.decoder_depth)
    # distinct contexts of a stage: masked captions and images, if MIM and MLM read those, beside ITM's whole ones
    of_images = (itm or (mim and context == "clean")) + (mim and context == "masked")
    rows = sum(lengths) * (model.cross_depth * of_images + model.decoder_depth * (mim and context != "none"))
    rows += sum(clean) * model.cross_depth * (itm or (mlm and context == "clean"))
    rows += sum(masked_rows) * model.cross_depth * (mlm and context == "masked")
    forward["contexts"] = sizes.linear(rows, 2)
    forward["heads"] = 2 * D * (sum(masked) * X * mim + sum(words) * vocabulary * mlm)
    forward["heads"] += 2 * D * pairs * (2 * model.projection * itc + 3 * 2 * itm)
    forward["contrast"] = 2 * 2 * pairs * (contrast_pairs or pairs) * model.projection * itc
    parts = {name: learned(work) for name, work in forward.items() if work}
    if itm and itc:
        parts["itm"] += Flops(2 * pairs * kinds.itm.group * model.projection, 0)
    if clean_image or masked_image:
        pixels = 2 * pairs * patches * X * D
        parts = {"patches": Flops(pixels, pixels)} | parts
    return parts


def _masked_words(config: Sections, lengths: Sequence[int]) -> list[int]:
    return [masked_token_count(n, config.masking.text_ratio) for n in lengths]


def _questions(
    config: Sections,
    lengths: Sequence[int],
    other: Sequence[int],
    clean: list[int],
    whole: list[int],
    masked_rows: list[int],
) -> tuple[dict[str, Asked], dict[str, Asked]]:
    """What is asked of the image and of the text cross encoder, by objective. other: lengths of the captions drawn;
    clean, whole, masked_rows: rows of each clean image, of all patches, of each masked image."""
    kinds, context = config.objectives, config.masking.context
    to_images, to_texts = dict[str, Asked](), dict[str, Asked]()
    if kinds.mim.weight > 0:
        asking = masked_rows if config.masking.insert == "decoder" else whole
        to_images["mim"] = Asked(asking, asking, None if context == "none" else lengths, None)
    if kinds.mlm.weight > 0:
        images = {"clean": clean, "masked": masked_rows, "none": None}[context]
        to_texts["mlm"] = Asked(lengths, lengths, images, _masked_words(config, lengths))
    if kinds.itm.weight > 0:
        captions = [*lengths, *lengths, *other]
        to_images["itm"] = Asked(clean, clean * 3, captions, "global")
        to_texts["itm"] = Asked(lengths, captions, clean * 3, "global")
    return to_images, to_texts


def plain_flops(
    config: Sections,
    vocabulary: int,
    lengths: Sequence[int],
    image_ratios: Sequence[float],
    length: int | None = None,
) -> dict[str, Flops]:
    """The same of the plain graph (benchmarks/peers/plain.py): each pass on its own, captions padded to `length` tokens
    (None: the longest), visible patches to the most of the batch, heads and last blocks at every row. The parts are
    those of `step_flops`, but contexts belong to who reads them, and patches to the encoders."""
    model, kinds = config.model, config.objectives
    sizes, D, pairs = Sizes.of(model), model.width, len(lengths)
    L = max(lengths) if length is None else length
    patches, _, masked_rows = image_counts(config, image_ratios)
    mim, mlm, itc, itm = (o.weight > 0 for o in (kinds.mim, kinds.mlm, kinds.itc, kinds.itm))
    X = 3 * model.image.patch**2
    images, texts = [patches + 1] * pairs, [L] * pairs
    clean = [1 + exact_count(config.masking.clean_keep, patches)] * pairs
    visible = [max(masked_rows)] * pairs
    pixels = 2 * pairs * patches * X * D

    def crossed(rows: Sequence[int], contexts: Sequence[int] | None, depth: int) -> int:
        keys_values = sizes.linear(sum(contexts or ()), 2)
        return depth * (sizes.cross_block(Asked(rows, rows, contexts, None), False, False) + keys_values)

    context = config.masking.context
    text = learned(model.text.depth * sizes.block(texts))
    masked_image = learned(model.image.depth * sizes.block(visible)) + Flops(pixels, pixels)
    parts = {"text": Flops(), "image masked": Flops(), "image clean": Flops()}
    if itc or itm or (mim and context == "clean"):
        parts["text"] += text
    if itc or itm or (mlm and context == "clean"):
        parts["image clean"] += learned(model.image.depth * sizes.block(clean)) + Flops(pixels, pixels)
    if mlm:
        parts["text"] += text
        parts["image masked"] += masked_image if context == "masked" else Flops()
        read = {"clean": clean, "masked": visible, "none": None}[context]
        parts["mlm"] = learned(crossed(texts, read, model.cross_depth))
    if mim:
        parts["image masked"] += masked_image
        parts["text"] += text if context == "masked" else Flops()
        inserted = visible if config.masking.insert == "decoder" else images
        captions = None if context == "none" else texts
        parts["mim"] = learned(crossed(inserted, captions, model.cross_depth))
        parts["decoder"] = learned(crossed(images, captions, model.decoder_depth))
    if itm:
        one = crossed(clean, texts, model.cross_depth) + crossed(texts, clean, model.cross_depth)
        draw = 2 * pairs * kinds.itm.group * model.projection * itc
        parts["itm"] = learned(3 * one) + Flops(draw, 0)
    heads = 2 * D * pairs * (patches * X * mim + L * round_up(vocabulary, 128) * mlm)
    parts["heads"] = learned(heads + 2 * D * pairs * (2 * model.projection * itc + 3 * 2 * itm))
    if itc:
        parts["contrast"] = learned(2 * pairs * pairs * model.projection)
    return {name: work for name, work in parts.items() if work.total}


def image_counts(
    config: Sections, ratios: Sequence[float], side: int | None = None
) -> tuple[int, list[int], list[int]]:
    """(patches of an image, how many are masked in each, rows of each masked view)."""
    image, masking = config.model.image, config.masking
    if side is not None:
        image = image.model_copy(update={"size": side})
    patches = image.grid[0] * image.grid[1]
    masked = [masked_cells(r, masking, image) * (masking.cell // image.patch) ** 2 for r in ratios]
    return patches, masked, [1 + patches - m * (masking.mode == "drop") for m in masked]
