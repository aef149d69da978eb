"""What the peers share around their losses: first weights, the optimizer step, and the whole step of plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvle.config import Config
from mvle.data.batch import Batch
from mvle.engine.optim import build_optimizer, clip_and_step
from mvle.model.config import ImageEncoderConfig
from mvle.model.model import MaskVLM

from . import Step
from .plain import Plain, PlainInputs, plain_inputs


@dataclass(frozen=True)
class Sized:
    """What `plain_inputs` asks of a model, for a peer that is no MaskVLM."""

    config: Config
    vocabulary: int
    mask_id: int
    training: bool = True


class Decayed:
    """A module as the engine's optimizer wants to see it: matrices decay, and no part has a rate of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def decay(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim >= 2 and "position" not in name and "token" not in name.rsplit(".", 1)[-1]

    def is_encoder(self, name: str) -> bool:
        return False


def training_step(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[], Mapping[str, Tensor]],
    weights: Mapping[str, float] | None,
    clip: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Step:
    """One optimizer step a call, over the sum of `losses()`, weighted by name (None: all by 1).

    A call returns the losses, detached, and `skipped`: 1 where the gradient was not finite, and so nothing was learned.
    Clipping is the engine's, which costs no pass over the gradients: a peer's step is no slower than ours there.
    """

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = losses()
        sum(loss if weights is None else weights[name] * loss for name, loss in found.items()).backward()  # type: ignore
        _, skipped = clip_and_step(optimizer, clip)
        return {name: loss.detach() for name, loss in found.items()} | {"skipped": skipped}

    return step


def plain_step(
    config: Config,
    vocabulary: int,
    mask_id: int,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    losses_of: Callable[[MaskVLM], Callable[[PlainInputs], Mapping[str, Tensor]]] = lambda model: Plain(model).losses,
) -> Step:
    """A step of the plain graph from the first weights of a MaskVLM; it is not charged for drawing its masks.

    losses_of: what computes the losses over a model's weights.
    """
    with torch.device(device):
        model = MaskVLM(config, vocabulary, mask_id)
    model.init_weights(config.run.seed)
    optimizer = build_optimizer(model, config.optim)
    weights = {o.name: o.weight for o in model.objectives}
    inputs, losses = plain_inputs(model, batch, config.run.seed), losses_of(model)
    return training_step(optimizer, lambda: losses(inputs), weights, config.optim.clip, device, dtype)


def normalised(images: Tensor, image: ImageEncoderConfig) -> Tensor:
    """uint8 [B, height, width, 3] -> float32 [B, 3, height, width], minus the set's mean, over its deviation."""
    x = images.to(torch.float32) / 255
    return ((x - x.new_tensor(image.mean)) / x.new_tensor(image.std)).permute(0, 3, 1, 2)
