"""AdamW with its four groups, and the clipped step that skips what is not finite.

No call here waits for the device: norms, clipping and the decision to skip stay on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.optim import AdamW

from ..section import Section
from .errors import OptimError
from .schedule import ScheduleConfig, learning_rate_factor, set_learning_rates  # noqa: F401  until its users import it


class OptimConfig(Section):
    """AdamW and gradient clipping."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate of everything but the encoders")
    encoder_lr: float | None = Field(
        None, gt=0, description="peak learning rate of both encoders (low for pretrained weights); null: optim.lr"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="the schedule ends at this share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of both moments, each in 0..1")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.05, ge=0, description="decoupled decay of matrices; biases, norms, positions and tokens have none"
    )
    clip: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_skipped: int = Field(
        5, gt=0, description="so many steps in a row whose gradient is not finite stop the run; fewer are skipped"
    )
    backend: Literal["torch", "apex"] = Field(
        "torch", description="whose fused AdamW: torch's, or NVIDIA apex's (on a GPU, where that is installed)"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="a slow average of the weights is kept, with this decay a step; null: none"
    )

    @field_validator("betas")
    @classmethod
    def check_betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        """Both in [0, 1)."""
        if not all(0 <= b < 1 for b in value):
            raise ValueError(f"expected two numbers of at least 0 and below 1; got {value}")
        return value


class Trainable(Protocol):
    """What the optimizer asks of a model."""

    def decay(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to the parameter."""

    def is_encoder(self, name: str) -> bool:
        """Whether the parameter belongs to an encoder, and so has optim.encoder_lr."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """As nn.Module has it."""


def build_optimizer(model: Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW over the groups of a model, by torch or apex.

    Call it after the model was sharded: an optimizer made before holds parameters that no longer exist. Raises
    OptimError for optim.backend=apex where that cannot be used.
    """
    groups = parameter_groups(model, config)
    if config.backend == "torch":
        return AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    from .optim_apex import ApexAdamW

    if devices := {p.device.type for group in groups for p in group["params"]} - {"cuda"}:
        raise OptimError(
            f"optim.backend=apex needs a GPU; got parameters on {', '.join(devices)}. Set optim.backend=torch."
        )
    return ApexAdamW(groups, betas=config.betas, eps=config.eps)


def parameter_groups(model: Trainable, config: OptimConfig) -> list[dict[str, Any]]:
    """At most four: encoder or other, decayed or not; each knows its `peak` learning rate."""
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (model.is_encoder(name), model.decay(name, parameter))
            members.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (encoder, decayed), parameters in sorted(members.items()):
        peak = config.encoder_lr if encoder and config.encoder_lr is not None else config.lr
        groups.append(
            {
                "params": parameters,
                "name": f"{'encoder' if encoder else 'other'} {'decayed' if decayed else 'not decayed'}",
                "peak": peak,
                "lr": peak,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
        )
    return groups


def check_optimizer(config: OptimConfig, device: str) -> None:
    """Before anything is built: raises OptimError where optim.backend cannot be used. device: run.device."""
    if config.backend == "apex":
        from .optim_apex import check_apex

        check_apex(device)


def total_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm of all gradients of the optimizer's parameters, over all ranks: 0-d on the device; all ranks must ask."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients have a sharded norm


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[Tensor, Tensor]:
    """Clip to `max_norm` over all parameters of the optimizer and step; a step whose norm is not finite is skipped.

    Returns (norm before clipping, skipped: 1.0 or 0.0), both 0-d float32 on the device and the same on every rank; all
    ranks must call it. A skipped step leaves weights, moments, step counters and gradients as they were.
    """
    norm = total_norm(optimizer)
    skipped = (~torch.isfinite(norm)).to(torch.float32).reshape(())
    # Fused AdamW, torch's and apex's alike, divides gradients by grad_scale as it reads them, so clipping costs no pass
    # of its own; and it leaves everything alone where found_inf is 1, before it reads a gradient: a norm of NaN reaches
    # nothing. Both must be 0-d to mix with sharded gradients.
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).to(torch.float32).reshape(())  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return norm, skipped
