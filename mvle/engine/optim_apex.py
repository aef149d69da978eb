"""AdamW by NVIDIA apex's fused kernel, under torch's own form: the same groups, state and way to skip a step.

apex's FusedAdam class keeps its step in the group, knows no DTensor, and takes a scale only from a GradScaler. So its
kernel is called here (amp_C.multi_tensor_adam_capturable: one pass over all tensors of a group, in float32), and what
is around it is torch's: state of a parameter is step, exp_avg and exp_avg_sq, which a checkpoint of either backend
holds. The kernel reads from the device whether to do nothing, and what to divide gradients by, so nothing waits.

What the kernel takes (apex, csrc/multi_tensor_adam.cu): a flag int32 [1], not 0: do nothing; lists of gradients,
parameters and both moments; the learning rate, the step (int32, that of this update) and the inverse scale as tensors
of one value; mode 1 is decoupled decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from mvle_kernels import optional
from torch import Tensor

from .errors import OptimError

DECOUPLED, BIAS_CORRECTED = 1, 1


class ApexAdamW(torch.optim.Optimizer):
    """Like torch's fused AdamW, `grad_scale` and `found_inf` included: 0-d tensors, or None.

    Parameters and gradients are float32 on a CUDA device, sharded (DTensor) or not. Raises OptimError where apex cannot
    be used, and why.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._kernel, self._apply = fused_kernel()
        self._parts: dict[tuple[int, ...], tuple[list[Tensor], list[list[int]]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; none where found_inf is 1."""
        assert closure is None, "a closure would be called between the gradients and their norm"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            for part in self._alike([self.state[p]["step"] for p in parameters]):
                self._update(group, [parameters[i] for i in part])

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Of parameters that have made as many steps."""
        device = parameters[0].device
        states = [self.state[p] for p in parameters]
        one = torch.ones(1, dtype=torch.float32, device=device)
        skip = torch.zeros_like(one) if self.found_inf is None else self.found_inf.reshape(1).to(torch.float32)
        inverse = one if self.grad_scale is None else self.grad_scale.reshape(1).to(torch.float32).reciprocal()
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, (1 - skip).reshape(()))
        lists = [
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(p) for p in parameters],
            *([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq")),
        ]
        filled = [i for i, part in enumerate(lists[1]) if part.numel()]  # a shard may have nothing
        if not filled:
            return
        beta1, beta2 = group["betas"]
        self._apply(
            self._kernel,
            skip.to(torch.int32),
            [[tensors[i] for i in filled] for tensors in lists],
            one * group["lr"],
            beta1,
            beta2,
            group["eps"],
            steps[0].reshape(1).to(torch.int32),
            DECOUPLED,
            BIAS_CORRECTED,
            group["weight_decay"],
            inverse,
        )

    def _alike(self, steps: list[Tensor]) -> list[list[int]]:
        """Places of parameters that have made equally many steps: the kernel takes one number for all. They stay alike,
        so the numbers are looked at once for the tensors that hold them: at the first step and after a load."""
        key = tuple(map(id, steps))
        if key not in self._parts:
            parts: dict[float, list[int]] = {}
            for i, made in enumerate(torch.stack(steps).tolist() if steps else ()):  # sync: once after a start
                parts.setdefault(made, []).append(i)
            self._parts[key] = steps, list(parts.values())  # the tensors too, or another one could have their id
        return self._parts[key][1]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fused_kernel() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(apex's kernel, what cuts its lists into pieces). Raises OptimError where apex cannot be used, and why."""
    version, why = optional.apex()
    if why:
        raise OptimError(
            f"optim.backend=apex needs NVIDIA's apex, built with its CUDA extensions; {why}. Build it from its "
            "repository (github.com/NVIDIA/apex), or set optim.backend=torch."
        )
    kernel = getattr(import_module("amp_C"), "multi_tensor_adam_capturable", None)
    if kernel is None:
        raise OptimError(f"optim.backend=apex needs an apex whose Adam can be captured; {version} is too old.")
    return kernel, import_module("apex.multi_tensor_apply").multi_tensor_applier
