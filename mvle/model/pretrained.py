"""First weights of the encoders from published ones: does the source fit, and what of it goes where.

What fits is taken exactly: an encoder computes what timm's or transformers' computes. Three things are adapted, and
said so: positions are resampled to the grid (text: cut to the longest caption), the scale of pixels that the source
expects is folded into the patch embedding, and word embeddings beyond the tokenizer's are left out. Anything else that
differs is another architecture and refused, difference by difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .image_encoder import ImageEncoder, resample_positions
from .layouts import ROBERTA_OFFSET, VIT, Layout, rescale_pixels, roberta, whole_positions
from .sources import PretrainedError, Published, published_image, published_text
from .text_encoder import TextEncoder

IMAGE_KEY, TEXT_KEY = "model.image.pretrained", "model.text.pretrained"

# Parts of names that this model has no place for, and what they are.
FEATURES = {
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "ls1.": "layer scale",
    "ls2.": "layer scale",
    "gamma_": "layer scale",
    "q_norm": "normalised queries and keys",
    "k_norm": "normalised queries and keys",
    "norm_pre": "a norm before its first block",
    "fc_norm": "a norm behind the mean of its patches, in the place of one behind its last block",
    "rope": "rotary positions",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "distance_embedding": "relative positions",
    "crossattention": "cross-attention",
}
LACKING = {
    "cls_token": "no class token",
    "pos_embed": "no learned positions",
    "norm.weight": "no norm behind its last block",
    "norm.bias": "no norm behind its last block, or one without bias",
    "attn.qkv.": "attention in another form, or without biases",
}


@dataclass(frozen=True, eq=False)
class Given:
    """First weights by the names of parameters; what of the source was not used (names, in words); what was adapted."""

    values: dict[str, Tensor] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# ---- the two encoders -----------------------------------------------------------------------------------------------


def image_weights(config: ModelConfig, name: str) -> Given:
    """Values of image_encoder.* from a ViT by name or path. Raises PretrainedError."""
    source = fitting_image(config, name)
    tensors, _ = without_prefix(source, VIT)
    values = VIT.read(tensors, config.image.depth)
    image, notes = config.image, []
    side = math.isqrt(len(values["positions"]) - 1)
    if (side, side) != image.grid:
        notes.append(f"positions resampled from {side}x{side} to {image.grid[0]}x{image.grid[1]}")
        values["positions"] = resample_positions(values["positions"], (side, side), image.grid)
    facts = source.facts
    if facts is None:
        notes.append("a file says neither heads, eps and activation nor the scale of pixels: taken to be the config's")
    elif facts.mean and facts.std and (facts.mean, facts.std) != (image.mean, image.std):
        weight, bias = values["patch_embed.weight"], values["patch_embed.bias"]
        values["patch_embed.weight"], values["patch_embed.bias"] = rescale_pixels(
            weight, bias, (facts.mean, facts.std), (image.mean, image.std)
        )
        notes.append(
            f"made for model.image.mean={shown(facts.mean)}, std={shown(facts.std)}: folded into the patch embedding"
        )
    return Given({f"image_encoder.{k}": v for k, v in values.items()}, unused_of(source, VIT), tuple(notes))


def text_weights(config: ModelConfig, name: str, vocabulary: int, same_words: Callable[[str], bool] | None) -> Given:
    """Values of text_encoder.* from a RoBERTa by name or path. Raises PretrainedError.

    vocabulary: ids of the run's tokenizer; same_words: whether a tokenizer (by name or folder) has the same ones, for
    the same words; None: that is not looked at.
    """
    source = fitting_text(config, name)
    layout = layout_of_text(source)
    tensors, _ = without_prefix(source, layout)
    values = layout.read(tensors, config.text.depth)
    notes = []
    values["positions"] = values["positions"][: config.text.max_tokens]
    rows = len(values["words.weight"])
    notes += check_words(source, rows, vocabulary, same_words)
    if rows > vocabulary:
        notes.append(f"{rows - vocabulary} word embeddings beyond the tokenizer's {vocabulary:,} left out")
        values["words.weight"] = values["words.weight"][:vocabulary]
    if source.facts is None:
        notes.append("a file says neither heads, eps and activation nor where positions begin: taken to be RoBERTa's")
    return Given({f"text_encoder.{k}": v for k, v in values.items()}, unused_of(source, layout), tuple(notes))


def check_words(source: Published, rows: int, vocabulary: int, same_words: Callable[[str], bool] | None) -> list[str]:
    """Raise PretrainedError unless row i of the word embeddings is the word with id i of the run's tokenizer. Returns
    what could not be looked at, in words."""
    mend = (
        f"Set tokenizer.kind=transformers and tokenizer.name={source.tokenizer}."
        if source.tokenizer
        else "Name the tokenizer that it was trained with: tokenizer.kind=transformers, tokenizer.name=…"
    )
    same, notes = False, []
    if source.tokenizer is None or same_words is None:
        notes.append("of its words only the number was compared")
    else:
        try:
            same = same_words(source.tokenizer)
        except (ImportError, OSError, ValueError):  # its weights are here, its tokenizer is not
            notes.append(f"its tokenizer ({source.tokenizer}) cannot be had: of its words only the number was compared")
        else:
            if not same:
                raise PretrainedError(f"{source} has other words than the run's tokenizer ({vocabulary:,} ids). {mend}")
    if rows < vocabulary or (rows != vocabulary and not same):
        raise PretrainedError(
            f"{source} has embeddings of {rows:,} words, and the run's tokenizer has {vocabulary:,} ids. {mend}"
        )
    return notes


def check_sources(config: ModelConfig) -> None:
    """Raise PretrainedError where a published encoder that the config names cannot be had or is of another shape. What
    it takes to know that is fetched. Words are compared later, when the run has its tokenizer."""
    if config.image.pretrained is not None:
        fitting_image(config, config.image.pretrained)
    if config.text.pretrained is not None:
        fitting_text(config, config.text.pretrained)


def fitting_image(config: ModelConfig, name: str) -> Published:
    """A ViT by name or path that is of the config's shape. Raises PretrainedError."""
    source = published_image(IMAGE_KEY, name, lambda shown: refuse_image(config, shown))
    refuse_image(config, source)
    return source


def fitting_text(config: ModelConfig, name: str) -> Published:
    """The same of a RoBERTa."""
    source = published_text(TEXT_KEY, name)
    refuse_text(config, source)
    return source


# ---- what is another architecture -----------------------------------------------------------------------------------

Sizes = dict[str, tuple[float, float, str]]  # config key -> (the source's, the config's, of what)


def refuse_image(config: ModelConfig, source: Published) -> None:
    """Raise PretrainedError, with every difference and its key, where a ViT is not of the config's shape."""
    tensors, _ = without_prefix(source, VIT)
    patch_embed, fc1 = tensors[VIT.anchor], tensors.get("blocks.0.mlp.fc1.weight")
    sizes: Sizes = {
        "model.width": (len(patch_embed), config.width, "wide"),
        "model.image.depth": (VIT.depth_of(tensors), config.image.depth, "blocks"),
        "model.image.patch": (patch_embed.shape[-1], config.image.patch, "pixels a side of a patch"),
        **common_sizes(config, source, fc1),
    }
    with torch.device("meta"):
        own = ImageEncoder(config, 1)
    lines = [*differences(source, sizes, 1e-6), *strangers(VIT, tensors)]
    lines = lines or other_shapes(VIT, tensors, own, resizable={"positions"})
    patches = len(whole_positions(tensors["pos_embed"])) - 1 if not lines else 0
    if patches != math.isqrt(patches) ** 2:
        lines.append(f"positions of {patches} patches, which are no square")
    refuse(source, lines)


def refuse_text(config: ModelConfig, source: Published) -> None:
    """The same of a RoBERTa, and where it has fewer positions than model.text.max_tokens."""
    layout = layout_of_text(source)
    tensors, prefix = without_prefix(source, layout)
    types = len(tensors.get("embeddings.token_type_embeddings.weight", ()))
    if source.facts is None and (prefix not in ("", "roberta.") or types != 1):
        raise PretrainedError(
            f"{source} must be a RoBERTa: names that begin with roberta. or with nothing, and one type of tokens; got "
            f"{prefix or 'nothing'} and {types} types. A folder with its config.json says more than a file."
        )
    fc1 = tensors.get("encoder.layer.0.intermediate.dense.weight")
    sizes: Sizes = {
        "model.width": (tensors[layout.anchor].shape[-1], config.width, "wide"),
        "model.text.depth": (layout.depth_of(tensors), config.text.depth, "blocks"),
        **common_sizes(config, source, fc1),
    }
    with torch.device("meta"):
        own = TextEncoder(config, 1)
    lines = [*differences(source, sizes, 1e-5), *strangers(layout, tensors)]
    refuse(source, lines or other_shapes(layout, tensors, own, resizable={"positions", "words.weight"}))
    positions = len(tensors["embeddings.position_embeddings.weight"]) - offset_of(source)
    if positions < config.text.max_tokens:
        raise PretrainedError(
            f"{source} has positions for {positions} tokens, and model.text.max_tokens is {config.text.max_tokens}. "
            f"Set model.text.max_tokens={positions} or less."
        )


def refuse(source: Published, lines: list[str]) -> None:
    """Raise PretrainedError with these differences, if there are any."""
    if lines:
        raise PretrainedError(
            f"{source} is another architecture than the config's. It has\n    "
            + "\n    ".join(lines)
            + "\nName an encoder of the same shape, or change the keys that are named."
        )


def common_sizes(config: ModelConfig, source: Published, fc1: Tensor | None) -> Sizes:
    """What both encoders have keys in common for. fc1: the first layer of its first feed-forward."""
    sizes: Sizes = {}
    if source.facts is not None:
        sizes["model.heads"] = (source.facts.heads, config.heads, "heads")
    if fc1 is not None and len(fc1) != int(fc1.shape[1] * config.mlp_ratio):
        sizes["model.mlp_ratio"] = (
            len(fc1) / fc1.shape[1],
            config.mlp_ratio,
            "times as wide within a feed-forward layer",
        )
    return sizes


def differences(source: Published, sizes: Sizes, eps: float) -> Iterator[str]:
    """Phrases for other sizes, and for what only a config says."""
    yield from (f"{its:g} {what} ({key} is {own:g})" for key, (its, own, what) in sizes.items() if its != own)
    if source.facts is not None:
        if source.facts.eps != eps:
            yield f"norms with eps {source.facts.eps:g} (here {eps:g})"
        yield from source.facts.other


def strangers(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Phrases for tensors that only one side has."""
    needed = {name: None for rule in layout.rules_of(layout.depth_of(tensors)) for name in rule.theirs}
    extra = [name for name in tensors if name not in needed and not name.startswith(layout.unused)]
    for kind, names, words in (
        ("tensors that are not known here:", extra, FEATURES),
        ("none of the tensors", [name for name in needed if name not in tensors], LACKING),
    ):
        said = {name: next((word for part, word in words.items() if part in name), None) for name in names}
        yield from dict.fromkeys(word for word in said.values() if word is not None)
        if unsaid := grouped(name for name, word in said.items() if word is None):
            yield f"{kind} {', '.join(unsaid)}"


def other_shapes(layout: Layout, tensors: Mapping[str, Tensor], own: nn.Module, resizable: set[str]) -> list[str]:
    """Phrases for tensors of other shapes, where sizes and names are right. resizable: may have another length."""
    try:
        read = layout.read(tensors, layout.depth_of(tensors))
    except (RuntimeError, ValueError, IndexError) as error:
        return [f"tensors of other shapes: {str(error).splitlines()[0]}"]
    lines = []
    for name, parameter in own.named_parameters():
        if name in read:  # the mask token is ours alone
            first = 1 if name in resizable else 0
            if read[name].shape[first:] != parameter.shape[first:] or read[name].ndim != parameter.ndim:
                lines.append(f"{name} of shape {tuple(read[name].shape)} (here {tuple(parameter.shape)})")
    return lines


# ---- names ----------------------------------------------------------------------------------------------------------


def offset_of(source: Published) -> int:
    """Where a RoBERTa's positions begin."""
    return source.facts.offset if source.facts is not None else ROBERTA_OFFSET


def layout_of_text(source: Published) -> Layout:
    """RoBERTa's, with the source's first position."""
    return roberta(offset_of(source))


def without_prefix(source: Published, layout: Layout) -> tuple[dict[str, Tensor], str]:
    """(the encoder's tensors by their names in it, what stands before those in the source). Raises PretrainedError."""
    found = [name for name in source.tensors if name.endswith(layout.anchor)]
    if len(found) != 1:
        some = ", ".join(grouped(source.tensors)[:6]) or "nothing"
        raise PretrainedError(f"{source} expected one encoder with a tensor {layout.anchor}; got {len(found)}: {some}.")
    prefix = found[0].removesuffix(layout.anchor)
    return {n.removeprefix(prefix): t for n, t in source.tensors.items() if n.startswith(prefix)}, prefix


def unused_of(source: Published, layout: Layout) -> tuple[str, ...]:
    """What of a source does not enter the encoder, shortened."""
    tensors, prefix = without_prefix(source, layout)
    needed = {f"{prefix}{n}" for rule in layout.rules_of(layout.depth_of(tensors)) for n in rule.theirs}
    return tuple(grouped(name for name in source.tensors if name not in needed))


def grouped(names: Iterable[str]) -> list[str]:
    """Names of tensors, those of one layer or of all blocks in one: blocks.0.norm.weight -> blocks.*.norm."""
    layers = (re.sub(r"\.(weight|bias)$", "", re.sub(r"\.\d+\.", ".*.", name)) for name in names)
    return list(dict.fromkeys(layers))


def shown(numbers: Iterable[float]) -> str:
    """Numbers as they are typed in an override."""
    return "[" + ",".join(f"{number:g}" for number in numbers) + "]"
