"""Who makes a step: ours, ours without one saving, and what a user would take instead.

Each provider makes one whole optimizer step (forward, backward, clipping, AdamW) of a config over the same Batch, from
weights and an optimizer of its own. `skipped` says why one cannot run here, or None.

    step = made(PROVIDERS["plain"], SHAPES["tiny"], "drop", torch.device("cpu"))
    step()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from mvle_kernels import set_backend

from mvle.config import Config, check_ranks
from mvle.data.batch import Batch
from mvle.engine import build as build_file
from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.engine.train_step import TrainStep
from mvle.model.model import MaskVLM

from .peers import Provider, Step, albef, compiled_plain, flava
from .peers.training import plain_step
from .shapes import MASK, Shape
from .switches import SWITCHES


def dtype_on(device: torch.device) -> torch.dtype:
    """What products are made in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def made(provider: Provider, shape: Shape, mode: str, device: torch.device, *overrides: str) -> Step:
    """The provider's step over the pairs of a shape."""
    batch = shape.batch(mode).to(device)
    return provider.make(shape.config(mode, *overrides), shape.vocabulary, MASK, batch, device, dtype_on(device))


# ---- ours -----------------------------------------------------------------------------------------------------------


@cache
def parallel_on(device: torch.device) -> Parallel:
    """This process as its only rank. One for all steps: a process joins a process group once (on a GPU)."""
    return Parallel.start(ParallelConfig(), device.type)


def ours(
    config: Config,
    vocabulary: int,
    mask_id: int,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: Callable[..., MaskVLM] = MaskVLM,
    overrides: dict[str, Any] | None = None,
) -> Step:
    """The step of the engine, as `mvle.train` makes it. model: what is built in the place of MaskVLM."""
    if overrides:
        config = config.model_copy(update={"kernels": config.kernels.model_copy(update=overrides)})
    parallel = parallel_on(device)
    with mock.patch.object(build_file, "MaskVLM", model):
        built = build_file.build(config, parallel, vocabulary, mask_id)
    train_step = TrainStep(config, parallel, check_ranks(config, 1), built)

    def step() -> None:
        # a run meets a new batch in each step: no index of this one's captions is known yet
        fresh = replace(batch, text=replace(batch.text, cache={}))
        set_backend(config.kernels.backend)
        train_step(0, fresh)

    return step


def _no_kernels_of_our_own(device: torch.device) -> str | None:
    return "the same step as `ours` on a CPU: everything is torch's there" if device.type == "cpu" else None


# ---- all ------------------------------------------------------------------------------------------------------------

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("ours", "the engine's step", ours),
        Provider(
            "ours, compiled",
            "kernels.compile: torch.compile over the dense pieces of blocks",
            partial(ours, overrides={"compile": True}),
            skip=compiled_plain.needs_compiler,
        ),
        Provider(
            "ours, library attention",
            "what a rival gets by copying the idea: our step over torch's ops and its attention for ragged rows",
            partial(ours, overrides={"backend": "dense,ragged_attention=varlen|dense"}),
            skip=_no_kernels_of_our_own,
        ),
        Provider(
            "ours, cuDNN attention",
            "our step with equal lengths through cuDNN's attention",
            partial(ours, overrides={"backend": "ragged_attention=cudnn|triton|dense"}),
            skip=_no_kernels_of_our_own,
        ),
        *(
            Provider(f"without: {switch.name}", switch.without, partial(ours, model=switch.model))
            for switch in SWITCHES.values()
        ),
        # the strong form: captions padded to the longest of the batch alone, torch's attention, fused AdamW, bfloat16
        # products on a GPU
        Provider("plain", "each pass on its own, padded (benchmarks/peers/plain.py)", plain_step),
        compiled_plain.PROVIDER,
        albef.PROVIDER,
        flava.PROVIDER,
    )
}


def counts_ops(provider: Provider) -> bool:
    """Whether its ops can be counted one by one: not where torch.compile makes them."""
    return "compiled" not in provider.name
