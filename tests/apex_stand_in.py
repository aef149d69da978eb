"""A stand-in for the kernel of NVIDIA's apex, which runs on a GPU alone: the same arguments, looked at one by one, and
the same arithmetic in plain torch. It holds what is around the kernel, and nothing of the kernel itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvle.engine import optim_apex
from mvle.engine.optim import OptimConfig, parameter_groups
from mvle.engine.optim_apex import ApexAdamW

CALLS: list[list[tuple[int, ...]]] = []  # shapes of the gradients of each call


@torch.no_grad()
def stand_in(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: Tensor,
    mode: int,
    correct: int,
    decay: float,
    inverse: Tensor,
) -> None:
    """What amp_C.multi_tensor_adam_capturable makes of its arguments."""
    assert [type(x) for x in (chunk, beta1, beta2, eps, mode, correct, decay)] == [int, *[float] * 3, int, int, float]
    assert (chunk, mode, correct) == (65536, 1, 1)
    assert noop.dtype == step.dtype == torch.int32 and lr.dtype == inverse.dtype == torch.float32
    assert noop.numel() == step.numel() == lr.numel() == inverse.numel() == 1
    gradients, *others = lists
    assert len(others) == 3 and gradients and all(len(tensors) == len(gradients) for tensors in others)
    for tensors in zip(*lists, strict=True):
        g = tensors[0]
        assert not any(isinstance(t, DTensor) for t in tensors), "a DTensor has no address"
        assert all(t.dtype == torch.float32 and t.shape == g.shape and t.device == noop.device for t in tensors)
        assert g.numel(), "behind an empty tensor what was gathered is never launched"
        for block in zip(*(t.view(-1).split(chunk) for t in tensors), strict=True):
            _update(block, noop, lr, beta1, beta2, eps, step, decay, inverse)
    CALLS.append([tuple(g.shape) for g in gradients])


def _update(
    block: tuple[Tensor, ...],
    noop: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: Tensor,
    decay: float,
    inverse: Tensor,
) -> None:
    g, p, m, v = block
    scaled = g * inverse
    first = beta1 * m + (1 - beta1) * scaled
    second = beta2 * v + (1 - beta2) * scaled * scaled
    root = (second / (1 - torch.pow(beta2, step))).sqrt() + eps
    stepped = p - lr * (first / (1 - torch.pow(beta1, step)) / root + decay * p)
    for old, new in zip(block, (scaled, stepped, first, second), strict=True):  # it leaves gradients scaled
        old.copy_(torch.where(noop == 1, old, new))


def by_apex(model: Any, config: OptimConfig) -> ApexAdamW:
    """What build_optimizer makes for optim.backend=apex, on a CPU, where a run is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim_apex, "fused_kernel", lambda: stand_in)
        return ApexAdamW(parameter_groups(model, config), config.betas, config.eps)
