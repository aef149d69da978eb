"""The steps that are measured: how large the model is, how many pairs, how long their captions, how images are masked.

    shape = SHAPES["base-64"]
    config, batch = shape.config("drop"), shape.batch("drop")

Pixels and words are random: no saving depends on what they show. What a step costs depends on lengths and ratios alone,
and those are as in training: captions of `tiny` are as long as those of shapes, which it trains on; all others have
the lengths of real captions (mvle/data/caption_lengths.py; mean 14 tokens, at most 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mvle_kernels import Packed

from mvle.config import Config, load_config
from mvle.data.batch import Batch
from mvle.data.caption_lengths import typical_lengths
from mvle.model.flops import plain_flops, step_flops, total
from mvle.model.rows import processed_rows

MASK, FIRST_WORD = 4, 5  # words have ids from FIRST_WORD on
SHAPES_BPE, ROBERTA = 342, 50265  # vocabularies: what the BPE of shapes comes to; roberta-base

# How masked patches are treated, as overrides of a recipe.
MODES: dict[str, tuple[str, ...]] = {
    "replace": ("masking.mode=replace",),
    "drop": ("masking.mode=drop",),
    "drop, late": ("masking.mode=drop", "masking.insert=decoder"),
}
FEW_PAIRS = ("kernels.row_multiple=16",)  # the recipes round to 128 rows, which is 0.2% of a batch of a GPU
VIT_S = (
    *FEW_PAIRS,
    "model.width=384",
    "model.heads=6",
    "model.image.depth=12",
    "model.text.depth=12",
    "model.cross_depth=3",
    "model.decoder_depth=3",
)


def shapes_lengths(pairs: int, seed: int = 0) -> tuple[int, ...]:
    """Captions of shapes, with bos and eos: 1, 2 or 3 objects (11, 21 or 31 tokens), as often as in training."""
    draw = torch.Generator().manual_seed(seed)
    objects = torch.multinomial(torch.tensor([0.5, 0.4, 0.1]), pairs, replacement=True, generator=draw) + 1
    return tuple(10 * n + 1 for n in objects.tolist())


def make_batch(config: Config, vocabulary: int, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Random pixels and words on the CPU: a pair a caption length, no two pairs alike."""
    draw, pairs, size = torch.Generator().manual_seed(seed), len(lengths), config.model.image.size
    bos, eos = torch.tensor([0]), torch.tensor([2])
    captions = [torch.cat([bos, torch.randint(FIRST_WORD, vocabulary, (n - 2,), generator=draw), eos]) for n in lengths]
    low, high = config.masking.ratio_range
    return Batch(
        images=torch.randint(0, 256, (pairs, size, size, 3), generator=draw, dtype=torch.uint8),
        text=Packed.of([c.to(torch.int32) for c in captions], config.kernels.row_multiple),
        pair_ids=torch.arange(pairs),
        image_ids=torch.arange(pairs),
        text_ids=torch.arange(pairs),
        keys=[str(i) for i in range(pairs)],
        image_ratio=tuple((low + (high - low) * torch.rand(pairs, generator=draw)).tolist()),
    )


@dataclass(frozen=True)
class Shape:
    """A named step. recipe: a packaged config; overrides: on top of it."""

    name: str
    what: str
    recipe: str
    pairs: int
    vocabulary: int
    overrides: tuple[str, ...] = ()

    def config(self, mode: str = "replace", *overrides: str) -> Config:
        """The whole config of a mode (a key of MODES). Negatives come from groups of 32 pairs, or of all if fewer."""
        group = f"objectives.itm.group={min(32, self.pairs)}"
        own = (f"batch.total={self.pairs}", group, *self.overrides, *MODES[mode])
        return load_config(self.recipe, [*own, *overrides])

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each caption, with bos and eos; always the same."""
        if self.recipe == "tiny":
            return shapes_lengths(self.pairs)
        return typical_lengths(self.pairs, self.config().model.text.max_tokens)

    def batch(self, mode: str = "replace") -> Batch:
        """The pairs of the step, on the CPU; always the same."""
        return make_batch(self.config(mode), self.vocabulary, self.lengths())

    def useful_flops(self, mode: str = "replace") -> int:
        """Operations that a step has to make (mvle/model/flops.py): real tokens, visible patches, what is read."""
        config = self.config(mode)
        ratios = self.batch(mode).image_ratio
        return total(step_flops(config, self.vocabulary, self.lengths(), ratios)).total

    def plain_flops(self, mode: str = "replace") -> int:
        """The same of the plain graph, captions padded to the longest of the batch."""
        config = self.config(mode)
        ratios = self.batch(mode).image_ratio
        return total(plain_flops(config, self.vocabulary, self.lengths(), ratios)).total

    def padding(self, mode: str = "replace") -> float:
        """Share of the rows of our step that hold nothing (mvle/model/rows.py)."""
        config = self.config(mode)
        real, rows = processed_rows(config, self.batch(mode), config.kernels.row_multiple)
        return 1 - real / rows


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("tiny", "configs/tiny.yaml: 1.1M parameters, 64 px, 32 pairs", "tiny", 32, SHAPES_BPE),
        Shape("vit-s-4", "ViT-S/16 and as wide a text encoder, 224 px, 4 pairs", "base", 4, ROBERTA, VIT_S),
        Shape("base-2", "configs/base.yaml: 334M parameters, 224 px, 2 pairs", "base", 2, ROBERTA, FEW_PAIRS),
        Shape("base-64", "configs/base.yaml, 64 pairs", "base", 64, ROBERTA),
        Shape("base-256", "configs/base.yaml, 256 pairs", "base", 256, ROBERTA),
        Shape("large-64", "configs/large.yaml: 861M parameters, 64 pairs", "large", 64, ROBERTA),
    )
}
