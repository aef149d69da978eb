"""Names and layouts of timm's ViT and transformers' RoBERTa beside those of this model's encoders, as data, both ways.

Pure functions on dicts of tensors; nothing here reads or writes a file. "{block}" in a name stands for the number of a
block.

    timm ViT       class token and patches by a convolution      ours: patches as rows of `patchify`, a linear layer
    RoBERTa        query, key and value apart                    ours: one linear layer, the three end to end
                   token type 0 added to every word              ours: a part of the positions
                   position 0 is row padding_idx + 1             ours: row 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROBERTA_OFFSET = 2  # padding_idx + 1 of every RoBERTa that was published


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and the tensors of the other layout that it is made of. read: theirs -> ours; write: back."""

    ours: str
    theirs: tuple[str, ...]
    read: Callable[..., Tensor]
    write: Callable[[Tensor], tuple[Tensor, ...]]

    def of(self, block: int) -> Rule:
        """The same for one block."""
        number = str(block)
        theirs = tuple(name.replace("{block}", number) for name in self.theirs)
        return Rule(self.ours.replace("{block}", number), theirs, self.read, self.write)


@dataclass(frozen=True)
class Layout:
    """How another library lays out an encoder.

    blocks   how the names of its blocks begin
    anchor   a tensor that each such encoder has: what stands before it in a name is a prefix
    rules    every tensor that an encoder needs
    unused   beginnings of names that change nothing in what the encoder computes: heads, and buffers that are constant
    """

    blocks: str
    anchor: str
    rules: tuple[Rule, ...]
    unused: tuple[str, ...]

    def rules_of(self, depth: int) -> Iterator[Rule]:
        """The rules of an encoder of `depth` blocks."""
        for rule in self.rules:
            if "{block}" in rule.ours:
                yield from (rule.of(block) for block in range(depth))
            else:
                yield rule

    def depth_of(self, names: Mapping[str, Tensor]) -> int:
        """Blocks of an encoder whose tensors have these names."""
        numbers = [re.match(re.escape(self.blocks) + r"(\d+)\.", name) for name in names]
        return 1 + max((int(n[1]) for n in numbers if n), default=-1)

    def read(self, tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
        """Their tensors -> ours. Positions come in full length."""
        return {rule.ours: rule.read(*(tensors[name] for name in rule.theirs)) for rule in self.rules_of(depth)}

    def write(self, tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
        """Our tensors -> theirs, contiguous. What they have no place for (the mask token) is left out."""
        out: dict[str, Tensor] = {}
        for rule in self.rules_of(depth):
            written = rule.write(tensors[rule.ours])
            out |= {name: t.contiguous() for name, t in zip(rule.theirs, written, strict=True)}
        return out


def _same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda tensor: tensor, lambda tensor: (tensor,))


def _layer(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A linear layer or a norm: weight and bias."""
    return _same(f"{ours}.weight", f"{theirs}.weight"), _same(f"{ours}.bias", f"{theirs}.bias")


# ---- timm's ViT -----------------------------------------------------------------------------------------------------


def convolution_to_linear(weight: Tensor) -> Tensor:
    """[D, 3, patch, patch] -> [D, X], X ordered (row, column, channel) as `patchify` orders it."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def linear_to_convolution(weight: Tensor) -> Tensor:
    """[D, X] -> [D, 3, patch, patch]."""
    patch = math.isqrt(weight.shape[1] // 3)
    return weight.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)


def whole_positions(theirs: Tensor) -> Tensor:
    """[1, N + 1, D] -> [N + 1, D]; [1, N, D] too: a ViT whose class token has no position adds nothing to it."""
    positions = theirs[0]
    if math.isqrt(len(positions)) ** 2 == len(positions) and math.isqrt(len(positions) - 1) ** 2 != len(positions) - 1:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    return positions


VIT = Layout(
    blocks="blocks.",
    anchor="patch_embed.proj.weight",
    rules=(
        Rule(
            "patch_embed.weight",
            ("patch_embed.proj.weight",),
            convolution_to_linear,
            lambda weight: (linear_to_convolution(weight),),
        ),
        _same("patch_embed.bias", "patch_embed.proj.bias"),
        Rule("class_token", ("cls_token",), lambda token: token[0, 0], lambda token: (token[None, None],)),
        Rule("positions", ("pos_embed",), whole_positions, lambda positions: (positions[None],)),
        *(
            rule
            for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            for rule in _layer(f"blocks.{{block}}.{name}", f"blocks.{{block}}.{name}")
        ),
        *_layer("norm", "norm"),
    ),
    unused=("head.", "pre_logits.", "attn_pool.", "mask_token", "decoder_"),
)


# ---- transformers' RoBERTa ------------------------------------------------------------------------------------------


def _three(kind: str) -> Rule:
    """weight or bias of query, key and value."""
    parts = tuple(f"encoder.layer.{{block}}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))
    return Rule(
        f"blocks.{{block}}.attn.qkv.{kind}", parts, lambda *qkv: torch.cat(qkv), lambda whole: tuple(whole.chunk(3))
    )


def roberta(offset: int = ROBERTA_OFFSET) -> Layout:
    """The layout of RobertaModel. offset: the row of its first position, padding_idx + 1."""

    def read_positions(positions: Tensor, types: Tensor) -> Tensor:
        return positions[offset:] + types[0]

    def write_positions(positions: Tensor) -> tuple[Tensor, Tensor]:
        width = positions.shape[1]
        return torch.cat([positions.new_zeros(offset, width), positions]), positions.new_zeros(1, width)

    layer = "encoder.layer.{block}"
    return Layout(
        blocks="encoder.layer.",
        anchor="embeddings.word_embeddings.weight",
        rules=(
            _same("words.weight", "embeddings.word_embeddings.weight"),
            Rule(
                "positions",
                ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"),
                read_positions,
                write_positions,
            ),
            *_layer("norm", "embeddings.LayerNorm"),
            _three("weight"),
            _three("bias"),
            *_layer("blocks.{block}.attn.proj", f"{layer}.attention.output.dense"),
            *_layer("blocks.{block}.norm1", f"{layer}.attention.output.LayerNorm"),
            *_layer("blocks.{block}.mlp.fc1", f"{layer}.intermediate.dense"),
            *_layer("blocks.{block}.mlp.fc2", f"{layer}.output.dense"),
            *_layer("blocks.{block}.norm2", f"{layer}.output.LayerNorm"),
        ),
        unused=("pooler.", "embeddings.position_ids", "embeddings.token_type_ids"),
    )


# ---- the scale of pixels --------------------------------------------------------------------------------------------


def rescale_pixels(
    weight: Tensor,
    bias: Tensor,
    before: tuple[tuple[float, ...], tuple[float, ...]],
    now: tuple[tuple[float, ...], tuple[float, ...]],
) -> tuple[Tensor, Tensor]:
    """Weight [D, X] and bias [D] of a patch embedding that expects pixels of (mean, std) `before` -> the same function
    of a picture for pixels of (mean, std) `now`.

    (x - m) / s = (x - m') / s' * (s' / s) + (m' - m) / s
    """
    compute = torch.promote_types(weight.dtype, torch.float64)
    mean, std, new_mean, new_std = (torch.tensor(v, dtype=compute) for v in (*before, *now))
    patch = weight.shape[1] // 3
    whole = weight.to(compute)
    shifted = bias.to(compute) + whole @ ((new_mean - mean) / std).repeat(patch)
    return (whole * (new_std / std).repeat(patch)).to(weight.dtype), shifted.to(bias.dtype)
