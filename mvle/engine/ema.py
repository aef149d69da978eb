"""EMA: a slow average of the weights, which validation, export and evaluation may use in their place.

    shadow += (1 - d) * (weight - shadow),     d = min(decay, (1 + step) / (10 + step))

The shadow of a parameter has its dtype (float32, whatever a forward computes in) and is sharded as it is: each rank
averages its own part, without a word to the others and without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parallel import Parallel


class Ema:
    """The average of every trained parameter of a model that is sharded, on its device and has its first weights.

    Starts as a copy of the weights; `decay` is what it is left with once the first steps, in which it follows the
    weights closely, are over.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        Parallel.reshard(model)  # after a forward the root has whole parameters, which are not those that are trained
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadows = {name: p.detach().clone() for name, p in self.weights.items()}
        # The average is what SGD does to a shadow whose gradient is -weight and whose decay is 1, and its fused form is
        # the one pass that leaves everything alone where a flag on the device (found_inf) is 1.
        self.average = torch.optim.SGD(
            [_local(s) for s in self.shadows.values()], lr=0.0, weight_decay=1.0, maximize=True, fused=True
        )

    def update(self, step: int, skipped: Tensor) -> None:
        """After optimizer step number `step` (0 for the first; the number of the step, skipped ones counted, so that a
        run that goes on needs no count of its own).

        skipped: 0-d float32 on the device; where it is 1 the shadow stays as it is, to the bit.
        """
        (group,) = self.average.param_groups
        group["lr"] = 1 - min(self.decay, (1 + step) / (10 + step))
        # asked for in each step: the first forward of a sharded model moves weights that its ranks share unevenly
        for shadow, weight in zip(group["params"], self.weights.values(), strict=True):
            shadow.grad = _local(weight)
        self.average.found_inf = skipped  # type: ignore[attr-defined]
        self.average.step()
        self.average.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The shadow of each parameter by its name, not copied: a checkpoint stores them, and fills them in place."""
        return dict(self.shadows)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the weights as they are."""
        for name, shadow in self.shadows.items():
            _local(shadow).copy_(_local(self.weights[name]))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with the average; behind it, with its weights again, to the bit, also on errors.

        Neither train nor save inside: what the optimizer holds is the average then.
        """
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        Parallel.reshard(model)  # parameters that a forward has gathered are thrown away: they are of before
        for name, shadow in self.shadows.items():
            weight, average = _local(self.weights[name]), _local(shadow)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without a graph."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
