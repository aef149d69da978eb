"""One question: how long is a training step (forward, backward, clipped optimizer step), ours against the plain graph?

    pytest benchmarks/ --benchmark-only

Shape: tiny at 32 pairs, captions as long as those of shapes. Both providers have equal weights, the same batch and the
same optimizer; the plain graph pads to the longest caption and is not charged for drawing its masks. Read the ratio of
their medians in one run, not the times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mvle_kernels import Packed

from mvle.config import load_config
from mvle.data.batch import Batch
from mvle.engine.optim import build_optimizer, clip_and_step
from mvle.model.model import MaskVLM

from .peers.plain import Plain, plain_inputs

VOCABULARY, MASK = 342, 4  # what the BPE of shapes comes to


def make_batch(pairs: int = 32, seed: int = 0) -> Batch:
    """Random pixels and words; 1, 2 or 3 objects a caption (11, 21 or 31 tokens), as often as in training."""
    draw = torch.Generator().manual_seed(seed)
    objects = torch.multinomial(torch.tensor([0.5, 0.4, 0.1]), pairs, replacement=True, generator=draw) + 1
    captions = [
        torch.cat([torch.tensor([0]), torch.randint(5, VOCABULARY, (10 * n - 1,), generator=draw), torch.tensor([2])])
        for n in objects.tolist()
    ]
    return Batch(
        images=torch.randint(0, 256, (pairs, 64, 64, 3), generator=draw, dtype=torch.uint8),
        text=Packed.of([c.to(torch.int32) for c in captions], 16),
        pair_ids=torch.arange(pairs),
        image_ids=torch.arange(pairs),
        text_ids=torch.arange(pairs),
        keys=[str(i) for i in range(pairs)],
        image_ratio=tuple((0.6 + 0.4 * torch.rand(pairs, generator=draw)).tolist()),
    )


def ours(model: MaskVLM, batch: Batch) -> Callable[[], Any]:
    """The engine's step."""
    optimizer = build_optimizer(model, model.config.optim)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch, 0, model.counts(batch)).total.backward()
        clip_and_step(optimizer, 1.0)

    return step


def plain(model: MaskVLM, batch: Batch) -> Callable[[], Any]:
    """The plain graph's step: autograd over each pass on its own."""
    optimizer = build_optimizer(model, model.config.optim)
    weights = {o.name: o.weight for o in model.objectives}
    inputs = plain_inputs(model, batch, 0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = Plain(model).losses(inputs)
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        clip_and_step(optimizer, 1.0)

    return step


@pytest.mark.parametrize("mode", ["replace", "drop"])
@pytest.mark.parametrize("provider", [ours, plain], ids=lambda p: p.__name__)
@pytest.mark.benchmark(group="step, tiny, 32 pairs", min_rounds=15, warmup=True, warmup_iterations=2)
def test_step(benchmark: Any, provider: Callable[..., Callable[[], Any]], mode: str) -> None:
    model = MaskVLM(load_config("tiny", [f"masking.mode={mode}"]), VOCABULARY, MASK)
    model.init_weights(0)
    benchmark.extra_info["mode"] = mode
    benchmark(provider(model, make_batch()))
