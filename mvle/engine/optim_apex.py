"""AdamW by NVIDIA apex's fused kernel, under torch's own form: the same groups, state and way to skip a step.

What is called is amp_C.multi_tensor_adam_capturable, one pass over all tensors of a group, and not apex's class
FusedAdam: that counts the steps of a group and not of a parameter, counts them by the flag of the step before (so it
counts a skipped one), takes scale and flag from private methods of a GradScaler, and hands DTensors to C++ code that
reads their addresses. State of a parameter is torch's: step, exp_avg and exp_avg_sq. A checkpoint of either backend
goes on under the other.

    kernel(chunk, noop, [gradients, parameters, exp_avg, exp_avg_sq], lr, beta1, beta2, eps, step, mode, correct, decay,
           inverse)

chunk is the elements of a block; noop int32, 1: leave everything alone; lr, step (int32, that of this update) and
inverse (gradients are multiplied by it) are tensors of one value, so nothing waits; mode 1 is decoupled decay; correct
1: moments are corrected for their start. It reads all lists by the dtype of the gradients, with offsets of 32 bits in
older versions, and launches what it has gathered when it comes to the last chunk of the last tensor: an empty tensor
there, and nothing is launched (apex, csrc/multi_tensor_adam.cu and csrc/multi_tensor_apply.cuh).

Never run here: tests hold what is around the kernel, by a stand-in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from mvle_kernels import optional
from torch import Tensor

from .errors import OptimError

CHUNK = 2048 * 32  # what apex's own optimizers take
DECOUPLED, CORRECTED = 1, 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class ApexAdamW(torch.optim.Optimizer):
    """Like torch's fused AdamW, `grad_scale` (gradients are divided by it) and `found_inf` (1: the step is skipped)
    included: 0-d float32 tensors on the device, or None.

    Parameters are float32 on a CUDA device, sharded (DTensor) or not. Raises OptimError for other dtypes, and where
    apex cannot be used, with the reason.

    Parameters that have made the same steps share one counter (state["step"] of each is the same tensor), since the
    kernel takes one for all. After values of state were written from elsewhere, call `share_steps`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        if other := {p.dtype for p in self._parameters()} - {torch.float32}:
            raise OptimError(f"optim.backend=apex takes float32 parameters; got {', '.join(map(str, other))}.")
        self._kernel = fused_kernel()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; none where found_inf is 1."""
        device = next(self._parameters()).device
        one = torch.ones((), dtype=torch.float32, device=device)
        skipped = torch.zeros_like(one) if self.found_inf is None else self.found_inf
        inverse = one if self.grad_scale is None else self.grad_scale.reciprocal()
        noop, made = skipped.int(), one - skipped
        for step, members in self._cohorts():
            step += made
            for group in self.param_groups:
                lists = self._lists([p for p in group["params"] if p in members])
                if not lists[0]:
                    continue
                self._kernel(
                    CHUNK,
                    noop,
                    lists,
                    one * group["lr"],
                    *group["betas"],
                    group["eps"],
                    step.int(),
                    DECOUPLED,
                    CORRECTED,
                    group["weight_decay"],
                    inverse,
                )

    def share_steps(self) -> None:
        """Let parameters whose counters are equal share one. Waits for the device: call it after a load alone."""
        states = list(self.state.values())
        values = torch.stack([state["step"] for state in states]).tolist() if states else []  # sync: after a load
        counters: dict[float, Tensor] = {}
        for state, value in zip(states, values, strict=True):
            state["step"] = counters.setdefault(value, state["step"])

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _cohorts(self) -> list[tuple[Tensor, set[Tensor]]]:
        """(counter, parameters that have a gradient and share it). Who has none now stays behind with the old one."""
        sharing: dict[int, list[Tensor]] = {}
        for parameter, state in self.state.items():
            sharing.setdefault(id(state["step"]), []).append(parameter)
        cohorts = []
        for parameters in sharing.values():
            stepping = [p for p in parameters if p.grad is not None]
            step = self.state[parameters[0]]["step"]
            if 0 < len(stepping) < len(parameters):
                step = step.clone()
                for parameter in stepping:
                    self.state[parameter]["step"] = step
            if stepping:
                cohorts.append((step, set(stepping)))
        if new := [p for p in self._parameters() if p.grad is not None and p not in self.state]:
            step = torch.zeros((), dtype=torch.float32, device=new[0].device)
            for parameter in new:
                self.state[parameter] = {"step": step, **{key: torch.zeros_like(parameter) for key in MOMENTS}}
            cohorts.append((step, set(new)))
        return cohorts

    def _lists(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Gradients, parameters and both moments as the kernel takes them: this rank's parts, without empty ones."""
        kept = [p for p in parameters if local(p).numel()]
        gradients = [local(p.grad).contiguous() for p in kept if p.grad is not None]
        return [gradients, [local(p) for p in kept], *([local(self.state[p][key]) for p in kept] for key in MOMENTS)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_apex(device: str) -> None:
    """device: run.device. Raises OptimError where optim.backend=apex could not be used on it, and why."""
    if device == "cpu" or not torch.cuda.is_available():
        got = "run.device=cpu" if device == "cpu" else "none that torch sees"
        raise OptimError(f"optim.backend=apex needs a GPU; got {got}. Set optim.backend=torch.")
    fused_kernel()


def fused_kernel() -> Callable[..., None]:
    """apex's kernel. Raises OptimError where apex cannot be used, and why."""
    _, why = optional.apex()
    if why:
        raise OptimError(
            f"optim.backend=apex needs NVIDIA's apex with its CUDA extensions; {why}. "
            f"To have it: {optional.TO_HAVE['apex']}. Or set optim.backend=torch."
        )
    return getattr(import_module(optional.APEX_EXTENSION), optional.APEX_KERNEL)
