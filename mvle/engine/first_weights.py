"""What a run starts from where it starts fresh: weights of published encoders, or those of another run, or none.

    model.image.pretrained, model.text.pretrained    the encoders alone, exactly (mvle/model/pretrained.py)
    model.init_from                                  everything that fits, of a run or an export

A run that goes on reads none of it. Every rank reads the source, whole and on the CPU, and keeps its part of it, as
with weights that are drawn; what is not given is drawn from run.seed and the parameter's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.image_encoder import resample_positions
from ..model.layouts import rescale_pixels
from ..model.model import MaskVLM
from ..model.pretrained import (
    IMAGE_KEY,
    TEXT_KEY,
    Given,
    check_sources,
    grouped,
    image_weights,
    shown,
    text_weights,
)
from ..model.sources import PretrainedError
from .checkpoint_files import steps_in
from .errors import RunError
from .run import RunFolder
from .stored import Stored, find_stored

if TYPE_CHECKING:
    from ..config import Config
    from ..data.tokenizer import Tokenizer
    from ..model.config import ModelConfig

IMAGE_POSITIONS = ("image_encoder.positions", "insert_positions")
WORDS = ("text_encoder.words.weight", "heads.tokens.weight", "heads.tokens.bias")


@dataclass(frozen=True, eq=False)
class FirstWeights:
    """values: by the names of parameters, whole, on the CPU · lines: for the block that a run prints at its start."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def is_fresh(config: Config) -> bool:
    """Whether a run of this config has no checkpoint to go on from."""
    return not steps_in(RunFolder(config.run.folder).checkpoints)


def check_first_weights(config: Config) -> None:
    """Raise PretrainedError, RunError or CheckpointError where a fresh run could not have its first weights. What they
    are is looked at, and fetched if need be, before the ranks meet; nothing for a run that goes on."""
    if not is_fresh(config):
        return
    check_sources(config.model)
    if config.model.init_from is not None:
        refuse_other_heads(config.model, find_source(config.model.init_from))


def first_weights(config: Config, vocabulary: int, mask_id: int, tokenizer: Tokenizer | None = None) -> FirstWeights:
    """First weights as the config names them; empty where it names none.

    tokenizer: the run's; None (a dry run has none): words are compared by their number alone. Raises PretrainedError,
    RunError, CheckpointError.
    """
    model = config.model
    sources: dict[str, Given] = {}
    if model.image.pretrained is not None:
        sources[f"{IMAGE_KEY}={model.image.pretrained}"] = image_weights(model, model.image.pretrained)
    if model.text.pretrained is not None:
        same = None if tokenizer is None else lambda name: tokenizer.same_words(tokenizer.load(name))
        sources[f"{TEXT_KEY}={model.text.pretrained}"] = text_weights(model, model.text.pretrained, vocabulary, same)
    if model.init_from is not None:
        stored = find_source(model.init_from)
        sources[f"model.init_from={stored}"] = weights_of_run(config, stored, vocabulary, mask_id, tokenizer)
    if not sources:
        return FirstWeights()
    values = {name: value for given in sources.values() for name, value in given.values.items()}
    return FirstWeights(values, tuple(describe(sources, shapes_of(config, vocabulary, mask_id))))


def shapes_of(config: Config, vocabulary: int, mask_id: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of the model."""
    with torch.device("meta"):
        model = MaskVLM(config, vocabulary, mask_id)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def find_source(folder: str) -> Stored:
    """What model.init_from names. Raises RunError, with the key, and CheckpointError."""
    try:
        return find_stored(folder)
    except RunError as error:
        raise RunError(f"model.init_from={folder}: {error}") from None


# ---- another run ----------------------------------------------------------------------------------------------------


def weights_of_run(config: Config, stored: Stored, vocabulary: int, mask_id: int, tokenizer: Tokenizer | None) -> Given:
    """Of a run or an export, every parameter whose name and shape this model has; positions are resampled to its grid,
    those of captions cut. Word embeddings and the token head are taken if the words are the same ones."""
    refuse_other_heads(config.model, stored)
    model, theirs = config.model, stored.config.model
    shapes, tensors = shapes_of(config, vocabulary, mask_id), stored.tensors()
    unused, notes = [], []
    if tokenizer is not None and not tokenizer.same_words(stored.read_tokenizer()):
        unused += [f"{name} (other words)" for name in WORDS if tensors.pop(name, None) is not None]
    for name in IMAGE_POSITIONS:
        if name in tensors and name in shapes and theirs.image.grid != model.image.grid:
            tensors[name] = resample_positions(tensors[name], theirs.image.grid, model.image.grid)
            notes.append(f"{name} resampled from {by(theirs.image.grid)} to {by(model.image.grid)}")
    captions, longest = "text_encoder.positions", model.text.max_tokens
    if captions in tensors and len(tensors[captions]) > longest:
        notes.append(f"{captions} cut from {len(tensors[captions])} to {longest}")
        tensors[captions] = tensors[captions][:longest]
    unused += fit_pixels(config, stored.config, tensors, notes)
    values = {name: value for name, value in tensors.items() if shapes.get(name) == tuple(value.shape)}
    for name in tensors.keys() - values.keys():
        here = f"{shapes[name]} here" if name in shapes else "no such parameter here"
        unused.append(f"{name} ({tuple(tensors[name].shape)}, {here})")
    return Given(values, tuple(grouped(sorted(unused))), tuple(notes))


def fit_pixels(config: Config, theirs: Config, tensors: dict[str, Tensor], notes: list[str]) -> list[str]:
    """Fold another scale of pixels into the patch embedding, and leave out a pixel head that predicts another scale;
    returns what is left out."""
    old, new = theirs.model.image, config.model.image
    scales = ((old.mean, old.std), (new.mean, new.std))
    names = ("image_encoder.patch_embed.weight", "image_encoder.patch_embed.bias")
    if scales[0] != scales[1] and old.patch == new.patch and tensors.keys() >= set(names):
        weight, bias = (tensors[name] for name in names)
        tensors |= zip(names, rescale_pixels(weight, bias, *scales), strict=True)
        notes.append(
            f"made for model.image.mean={shown(old.mean)}, std={shown(old.std)}: folded into the patch embedding"
        )
    per_patch = (theirs.objectives.mim.per_patch, config.objectives.mim.per_patch)
    if scales[0] == scales[1] and per_patch[0] == per_patch[1]:
        return []
    heads = [name for name in list(tensors) if name.startswith("heads.pixels.")]
    return [f"{name} (other targets)" for name in heads if tensors.pop(name, None) is not None]


def refuse_other_heads(model: ModelConfig, stored: Stored) -> None:
    """Raise PretrainedError where tensors have the shapes of this model and another meaning."""
    heads = stored.config.model.heads
    if heads != model.heads and stored.config.model.width == model.width:
        raise PretrainedError(
            f"model.init_from={stored.folder} was trained with model.heads={heads}, and here it is {model.heads}: its "
            f"attention would mean something else. Set model.heads={heads}."
        )


# ---- words ----------------------------------------------------------------------------------------------------------


def describe(sources: Mapping[str, Given], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """For each source what was taken, adapted and not used; then what keeps weights that are drawn."""
    lines, taken = [], set[str]()
    for name, given in sources.items():
        taken |= given.values.keys()
        lines.append(f"{name}: {len(given.values)} of {len(shapes)} parameters")
        lines += [f"    {note}" for note in given.notes]
        lines += [f"    not used: {', '.join(given.unused)}"] if given.unused else []
    drawn = [name for name in shapes if name not in taken]
    parts = {name.split(".")[0] for name in taken}
    whole = dict.fromkeys(name.split(".")[0] for name in drawn if name.split(".")[0] not in parts)
    single = grouped(name for name in drawn if name.split(".")[0] in parts)
    return [*lines, f"drawn from run.seed: {', '.join([*whole, *single]) or 'nothing'}"]


def by(grid: tuple[int, int]) -> str:
    """A grid in words."""
    return f"{grid[0]}x{grid[1]}"
