"""What a step of N ranks takes: memory of a rank, traffic, and the largest micro-batch that fits.

Traced on fake tensors (engine/memory.py): activations, as a line over the pairs of a micro-batch.
Derived from them and from the shapes of the parameters: all the rest. P parameters, S ranks that share a copy of them,
R copies (S x R = all ranks), u the largest unit that is sharded by itself, r the root's own:

    always     shards in float32: weights 4 P/S, gradients 4 P/S, AdamW's moments 8 P/S, EMA 4 P/S. The first rank's
               shard is the largest, since a parameter is cut along its first dimension into ceil(n / S) rows
    gathered   weights in bfloat16: the root's stay whole from forward to backward (2 r), a unit's are there with the
               next one's, and one more is being received: 2 (r + 3 u)
    whole      gradients before they are summed over ranks: the root's in bfloat16 until the end, a unit's in bfloat16
    gradients  and, to be sent, in float32: 2 r + 6 u. With several micro-batches all stay, in float32: 4 P + 2 u
    one rank   is not sharded (half_weights.py): copies of all weights in bfloat16, 2 P, and their gradients, 2 P
    traffic    what a rank receives: weights for the forward of each micro-batch, and the units' again for its backward,
               in bfloat16, (S - 1)/S of it; gradients once, in float32; with R > 1 their shards twice (R - 1)/R; and
               the embeddings of the contrast, with their gradients
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.caption_lengths import typical_lengths
from ..model.flops import Flops, plain_flops, step_flops, total
from ..model.model import MaskVLM
from .blocks import ActivationCheckpointing
from .memory import activation_bytes, contrast_bytes, model_on_meta, typical_ratios
from .parallel import mesh_shape

if TYPE_CHECKING:
    from ..config import Config

CHOICES: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
MARGIN = 0.1  # of a GPU's memory: CUDA's context, NCCL's and cuBLAS's buffers, what the allocator cannot use
TRACED = 128  # pairs
AVERAGED = 1000  # pairs whose mean is the work of a pair


@dataclass(frozen=True)
class Line:
    """bytes = fixed + a_pair * pairs."""

    fixed: float
    a_pair: float

    def at(self, pairs: float) -> float:
        """Bytes for so many pairs."""
        return self.fixed + self.a_pair * pairs


def activation_lines(
    config: Config,
    vocabulary: int,
    choices: Sequence[ActivationCheckpointing] = CHOICES,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[ActivationCheckpointing, Line]:
    """Activations of a micro-batch for each choice of checkpointing.

    The whole model is traced once, at about TRACED pairs in whole groups of matching. What does not grow with the pairs
    (a gradient of the word head that the loss makes in its forward, gradients on their way) does not hang on depth
    either: it is the difference of two traces of a model with one block an encoder, which takes a fraction of the time.
    """
    group = config.objectives.itm.group
    pairs = group * math.ceil(TRACED / group)
    shallow = with_depth_one(config)
    few, many = activation_bytes(shallow, vocabulary, (pairs, 2 * pairs), "none", dtype)
    fixed = max(2 * few - many, 0)
    lines = {}
    for choice in choices:
        (peak,) = activation_bytes(config, vocabulary, (pairs,), choice, dtype)
        lines[choice] = Line(fixed, (peak - fixed) / pairs)
    return lines


def with_depth_one(config: Config) -> Config:
    """The config with one block in each encoder."""
    model = config.model
    image, text = (part.model_copy(update={"depth": 1}) for part in (model.image, model.text))
    return config.model_copy(update={"model": model.model_copy(update={"image": image, "text": text})})


@dataclass(frozen=True)
class Weights:
    """Parameters as sharding sees them.

    whole   all of them · root: of those, the root's own · unit: of the largest block that is sharded by itself
    encoders  of both encoders, which a contrast over several micro-batches passes twice
    shard   parameters of the first of S ranks
    """

    whole: int
    root: int
    unit: int
    encoders: int
    shard: Callable[[int], int]

    @staticmethod
    def of(model: MaskVLM) -> Weights:
        """Those of a model whose parameters are whole."""
        shapes = [tuple(p.shape) for p in model.parameters()]
        units = [count(block) for block in model.blocks_to_shard()]
        root = count(model) - sum(units)
        encoders = sum(count(b) for e in (model.image_encoder, model.text_encoder) for b in e.blocks)

        def shard(ranks: int) -> int:
            return sum(math.ceil(s[0] / ranks) * math.prod(s[1:]) for s in shapes)

        return Weights(count(model), root, max(units), encoders, shard)


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the first rank, beside activations; see the head of the file."""

    weights: int
    gradients: int
    moments: int
    ema: int
    gathered: int
    whole_gradients: int

    @property
    def fixed(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.ema + self.gathered + self.whole_gradients


def rank_memory(weights: Weights, ranks: int, shard: int, accumulate: int, ema: bool) -> RankMemory:
    """Of one of `ranks`, of which `shard` share a copy, with `accumulate` micro-batches a step."""
    own = 4 * weights.shard(shard)
    if ranks == 1:
        return RankMemory(own, own, 2 * own, own * ema, 2 * weights.whole, 2 * weights.whole)
    gathered = 2 * (weights.root + 3 * weights.unit)
    whole = 2 * weights.root + 6 * weights.unit if accumulate == 1 else 4 * weights.whole + 2 * weights.unit
    return RankMemory(own, own, 2 * own, own * ema, gathered, whole)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step."""

    weights: float
    gradients: float
    copies: float
    contrast: float

    @property
    def all(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.copies + self.contrast


def traffic(config: Config, weights: Weights, replicate: int, shard: int, per_rank: int, accumulate: int) -> Traffic:
    """Of one of replicate x shard ranks that has `per_rank` pairs in `accumulate` micro-batches."""
    apart, itc = (shard - 1) / shard, config.objectives.itc.weight > 0
    forward = weights.whole + (weights.encoders if itc and accumulate > 1 else 0)
    passes = accumulate * (forward + weights.whole - weights.root)
    others = (replicate * shard - 1) * per_rank * itc
    return Traffic(
        weights=2 * apart * passes,
        gradients=4 * apart * weights.whole,
        copies=2 * (replicate - 1) / replicate * 4 * weights.shard(shard),
        contrast=others * (2 * 2 * 4 * config.model.projection + 2 * 8),  # two sides there and back, and the ids
    )


def pair_work(config: Config, vocabulary: int) -> tuple[dict[str, float], float]:
    """(useful operations of a typical pair by part, share of what the plain graph needs for it).

    Without what grows with the batch: each pair is contrasted with batch.total others.
    """
    lengths, ratios = typical_lengths(AVERAGED, config.model.text.max_tokens), typical_ratios(config, AVERAGED)
    parts = step_flops(config, vocabulary, lengths, ratios, contrast_pairs=config.batch.total)
    plain = total(plain_flops(config, vocabulary, lengths, ratios, config.model.text.max_tokens))
    similar = parts.get("contrast", Flops()).total
    share = (total(parts).total - similar) / (plain.total - _contrast(config))
    return {name: work.total / AVERAGED for name, work in parts.items()}, share


def _contrast(config: Config) -> int:
    """Similarities of the plain graph over AVERAGED pairs, which no batch has."""
    itc = config.objectives.itc.weight > 0
    return 3 * 2 * AVERAGED * AVERAGED * config.model.projection * itc


@dataclass(frozen=True)
class Fit:
    """A choice of activation checkpointing on a rank.

    activations  bytes at the configured micro-batch, None where the ranks cannot share the batch
    total        with everything else
    largest      pairs of a micro-batch that fit, whatever batch.total is; 0: none
    micro        batch.micro to set: the largest that fits, divides what a rank has and is whole groups; None: none does
    """

    checkpointing: str
    activations: float | None
    total: float | None
    largest: int | None
    micro: int | None


@dataclass(frozen=True)
class RankPlan:
    """What a number of ranks comes to. problem: why they cannot run the config as it is, or None; then the numbers are
    for one micro-batch a step."""

    ranks: int
    replicate: int
    shard: int
    problem: str | None
    micro: int | None
    accumulate: int
    memory: RankMemory
    traffic: Traffic
    fits: tuple[Fit, ...]


def plan_ranks(
    config: Config,
    ranks: int,
    weights: Weights,
    lines: dict[ActivationCheckpointing, Line],
    gib: int | None,
    a_score: float,
) -> RankPlan:
    """For `ranks` ranks with `gib` GiB each (None: no GPU named, and nothing is said of what fits). a_score: bytes of
    the contrastive loss for each pair of pairs. Raises ParallelError where parallel.* does not fit the ranks."""
    from ..config import ConfigError, check_ranks

    replicate, shard = mesh_shape(config.parallel, ranks)
    problem, micro, accumulate = None, None, 1
    try:
        arithmetic = check_ranks(config, ranks)
        micro, accumulate = arithmetic.micro, arithmetic.accumulate
    except ConfigError as error:
        problem = str(error)
    ema, group = config.optim.ema is not None, config.objectives.itm.group if config.objectives.itm.weight else 1
    itc = config.objectives.itc.weight > 0
    per_rank = None if micro is None else micro * accumulate
    image = 3 * config.model.image.size**2

    def needed(line: Line, micro: int, per_rank: int) -> tuple[float, float]:
        """(activations, everything), where a rank has per_rank pairs in micro-batches of `micro`."""
        among = max(config.batch.total, ranks * per_rank) if itc else 0
        if per_rank == micro:  # the contrast is part of the forward; what was traced compares its own pairs alone
            activations = line.at(micro) + a_score * micro * max(among - micro, 0)
        else:  # it is over before the first forward
            activations = max(line.at(micro), a_score * per_rank * among)
        memory = rank_memory(weights, ranks, shard, per_rank // micro, ema)
        return activations, memory.fixed + activations + per_rank * image

    room = None if gib is None else gib * 2**30 * (1 - MARGIN)
    fits = []
    for choice, line in lines.items():
        now = None if micro is None or per_rank is None else needed(line, micro, per_rank)
        largest = best = None
        if room is not None:
            largest = _largest(lambda n, line=line: needed(line, n, n)[1] <= room, group)  # type: ignore[misc]
            if per_rank is not None:
                divisors = [n for n in range(group, per_rank + 1, group) if per_rank % n == 0]
                best = max((n for n in divisors if needed(line, n, per_rank)[1] <= room), default=None)
        fits.append(Fit(choice, now and now[0], now and now[1], largest, best))
    memory = rank_memory(weights, ranks, shard, accumulate, ema)
    moved = traffic(config, weights, replicate, shard, per_rank or 0, accumulate)
    return RankPlan(ranks, replicate, shard, problem, micro, accumulate, memory, moved, tuple(fits))


def _largest(fits: Callable[[int], bool], step: int) -> int:
    """The largest multiple of `step` that fits (0: none does). What is smaller than one that fits must fit too."""
    high = step
    while fits(high):
        high *= 2
    low = high // 2 if high > step else 0
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Capacity:
    """Everything that `python -m mvle.capacity` prints. Bytes and operations, for bfloat16 activations."""

    vocabulary: int
    parameters: dict[str, int]
    tokens: float
    flops_a_pair: dict[str, float]
    share_of_plain: float
    flops_a_step: float
    activations: dict[ActivationCheckpointing, Line]
    contrast_a_score: float
    plans: tuple[RankPlan, ...]


def capacity(config: Config, vocabulary: int, ranks: Sequence[int], gib: int | None) -> Capacity:
    """Estimate a config for numbers of ranks with `gib` GiB of memory each. Raises ParallelError, as `plan_ranks`."""
    from ..model.model import parameter_counts

    model = model_on_meta(config, vocabulary)
    weights = Weights.of(model)
    for n in ranks:
        mesh_shape(config.parallel, n)  # what cannot be is said before anything is traced
    lines = activation_lines(config, vocabulary)
    a_score = contrast_bytes()
    work, share = pair_work(config, vocabulary)
    lengths = typical_lengths(AVERAGED, config.model.text.max_tokens)
    return Capacity(
        vocabulary=vocabulary,
        parameters=parameter_counts(model),
        tokens=sum(lengths) / AVERAGED,
        flops_a_pair=work,
        share_of_plain=share,
        flops_a_step=sum(work.values()) * config.batch.total,
        activations=lines,
        contrast_a_score=a_score,
        plans=tuple(plan_ranks(config, n, weights, lines, gib, a_score) for n in ranks),
    )
