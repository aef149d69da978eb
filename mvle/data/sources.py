"""Sources: the parts of a training set that have a name, and perhaps a weight of their own.

Without weights the sources are one set: the same pairs in the same order as if their shards had been named in one
list, and the names are for messages. With weights each pair is drawn from a source by weight first, and each source
has epochs of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import SamplingPlan
    from .shards import ShardSet


@dataclass(frozen=True)
class Source:
    """Consecutive shards of a set.

    shards: their numbers in the set · weight: in proportion to the share of the pairs that come from here, above 0;
    None, in all sources of a set alike: it has none.
    """

    name: str
    shards: range
    weight: float | None = None


def weights_of(sources: Sequence[Source]) -> tuple[int, ...]:
    """The weights in lowest terms, as they are written (0.3 and 0.1 are 3 and 1); (1,) where the sources are one set:
    there is one alone, or none has a weight."""
    fractions = [Fraction(repr(source.weight)) for source in sources if source.weight is not None]
    if not fractions:
        return (1,)
    if len(fractions) < len(sources):
        raise ValueError("either all sources of a set have a weight, or none has.")
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


def describe_sources(shards: ShardSet, plan: SamplingPlan, steps: int) -> list[str]:
    """What a run of `steps` steps sees, a line each: the set, and its sources where it has several."""
    epochs = plan.epochs(steps)
    mixed = len(epochs) > 1
    kept = f" ({plan.images:,} of them by data.fraction={plan.fraction:g})" if plan.fraction < 1 else ""
    lines = [
        f"{shards.images:,} images{kept}, {shards.pairs:,} pairs, {len(shards.shard_sizes)} shards, "
        f"fingerprint {shards.fingerprint[:12]}" + ("" if mixed else f"; {epochs[0]:.3g} epochs in {steps:,} steps")
    ]
    if len(shards.sources) < 2:
        return lines
    width = max(len(source.name) for source in shards.sources)
    weights = plan.weights
    for number, source in enumerate(shards.sources):
        images = sum(shards.shard_sizes[shard] for shard in source.shards)
        of = f"{plan.source_images[number]:,} of " if mixed and plan.fraction < 1 else ""
        line = f"{source.name:<{width}}  {of}{images:,} images, {len(source.shards)} shards"
        if mixed:
            share = weights[number] / sum(weights)
            line += f", weight {source.weight:g}: {share:.1%} of the pairs, {epochs[number]:.3g} epochs"
        lines.append(line)
    return lines
