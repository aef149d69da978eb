"""`dense` held against `reference`: the same call under both backends, forward and backward, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mvle_kernels import Packed, use_backend
from torch import Tensor

BACKENDS = ("reference", "dense")


def results(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Output and input gradients of op(*inputs) under a backend, for one random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with use_backend(backend):
        out = op(*leaves)
        if out.requires_grad:  # an output of nothing need not
            generator = torch.Generator().manual_seed(seed)
            gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            out.backward(gradient.to(out.device, out.dtype))
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_backends_agree(op: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """Forward and backward to `tolerance`, relative to the largest value of each tensor (at least 1)."""
    expected, expected_grads = results(op, inputs, "reference")
    got, got_grads = results(op, inputs, "dense")
    for a, b in zip([got, *got_grads], [expected, *expected_grads], strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values, the same for the same seed and shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layout(lengths: Sequence[int], row_multiple: int = 1, tail: int = 0) -> Packed:
    """A layout with lengths known on the host and at least `tail` rows of tail."""
    made = Packed.layout_of(lengths, row_multiple)
    return Packed(made.rows, made.offsets, made.lengths, made.max_length, made.total + tail)


def forget_lengths(made: Packed, max_length: int | None = None) -> Packed:
    """The same layout as a draw on the device leaves it: lengths unknown on the host."""
    return Packed(made.rows, made.offsets, None, max_length or made.max_length, made.total)
