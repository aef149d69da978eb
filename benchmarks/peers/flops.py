"""FLOPs of each peer's step a pair, forward and backward, as torch counts them; no optimizer, no drawing of masks.

    python -m benchmarks.peers.flops base --vocabulary 50265 --pairs 4 --tokens 14 --padded 32

Attention counts as two products forward and four backward. Plain and ALBEF are counted on meta tensors, at any size
within seconds. FLAVA picks rows by their content, so it runs in earnest, on the CPU: 4 pairs of base take minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mvle.config import Config, load_config
from mvle.data.batch import Batch
from mvle.model.model import MaskVLM

from ..shapes import MASK, make_batch
from . import albef, flava
from .plain import Plain, PlainInputs, plain_inputs
from .training import Sized


def on_meta(inputs: PlainInputs) -> PlainInputs:
    """The inputs without their content."""
    batch = replace(inputs.batch, **{f.name: _meta(getattr(inputs.batch, f.name)) for f in fields(Batch)})
    return replace(inputs, batch=batch, **{f.name: _meta(getattr(inputs, f.name)) for f in fields(inputs)[2:]})


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def plain_flops(config: Config, vocabulary: int, inputs: PlainInputs) -> int:
    """Of plain.py; `masking.mode` as configured."""
    with torch.device("meta"):
        model = MaskVLM(config, vocabulary, MASK)
        pairs = torch.arange(len(inputs.batch))
        negatives = (pairs, pairs, pairs > 0)
    return count(partial(Plain(model).losses, on_meta(inputs), negatives))


def albef_flops(config: Config, vocabulary: int, inputs: PlainInputs) -> int:
    """Of albef.py, with the queues of the paper."""
    with torch.device("meta"):
        model = albef.Albef(config, vocabulary)
        return count(partial(model.losses, on_meta(inputs)))


def flava_flops(config: Config, vocabulary: int, inputs: PlainInputs, codebook: bool = False) -> int:
    """Of flava.py. Attention is written out here: torch has no formula for the fused one on a CPU."""
    model = flava.build(config.model, vocabulary, codebook, fused=False)
    return count(partial(flava.losses, model, flava.flava_inputs(inputs, config.model, 0), config.model))


def count(losses: Callable[[], dict[str, Tensor]]) -> int:
    """Of a forward and the backward of the sum."""
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(losses().values())).sum().backward()
    return counter.get_total_flops()


COUNTS: dict[str, Callable[[Config, int, PlainInputs], int]] = {
    "plain": plain_flops,
    "ALBEF": albef_flops,
    "FLAVA": flava_flops,
    "FLAVA, codebook": partial(flava_flops, codebook=True),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="FLOPs of each peer's step a pair.")
    parser.add_argument("config", help="a recipe, e.g. base")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--vocabulary", type=int, default=50265)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=14, help="of each caption")
    parser.add_argument("--padded", type=int, default=32, help="length that captions are padded to")
    options = parser.parse_args(arguments)
    overrides = [f"batch.total={options.pairs}", f"objectives.itm.group={options.pairs}", *options.overrides]
    config = load_config(options.config, overrides)
    batch = make_batch(config, options.vocabulary, (options.tokens,) * options.pairs)
    inputs = plain_inputs(Sized(config, options.vocabulary, MASK), batch, 0, options.padded)
    for name, counted in COUNTS.items():
        flops = counted(config, options.vocabulary, inputs) / options.pairs
        print(f"{name:<16} {flops / 1e9:8.1f} GFLOP a pair", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
