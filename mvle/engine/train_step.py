"""One optimizer step over the global batch.

    global counts -> micro-batches, augmented -> (contrast over the whole batch) -> forward, backward of each
        -> clip, step -> EMA

Nothing here waits for the device. The result holds device tensors; who wants numbers decides when to wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.augment import augmented
from ..data.batch import Batch
from ..model.model import NAMES
from .build import Built
from .optim import clip_and_step, total_norm
from .parallel import Parallel
from .schedule import learning_rate_factor, set_learning_rates

if TYPE_CHECKING:
    from ..config import BatchArithmetic, Config
    from ..objectives.itc import ContrastPart

Enter = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step leaves behind.

    sums      name -> 0-d tensor, this rank's share of the global losses and of what was right: add over ranks
    state     name -> 0-d tensor that every rank has alike: grad_norm before clipping, temperature
    skipped   0-d float32, 1.0 where the gradient was not finite and the step left everything as it was
    broken    bool [B], this rank's pairs whose own rows were not finite
    lr        peak learning rate of the step
    norms     grad_norm_NAME of each objective, at the steps that ask for them
    """

    sums: dict[str, Tensor]
    state: dict[str, Tensor]
    skipped: Tensor
    broken: Tensor
    lr: float
    norms: dict[str, Tensor] = field(default_factory=dict)


class TrainStep:
    """Steps a model. `enter` is called with the name of what comes next, for whoever watches over ranks."""

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        arithmetic: BatchArithmetic,
        built: Built,
        enter: Enter = lambda phase: None,
    ) -> None:
        self.config, self.parallel, self.arithmetic, self.enter = config, parallel, arithmetic, enter
        self.model, self.optimizer, self.ema = built.model, built.optimizer, built.ema

    def __call__(self, step: int, batch: Batch) -> StepResult:
        """Step number `step` (0 for the first) over this rank's whole batch, which is on the device."""
        optim, every = self.config.optim, self.config.metrics.gradient_norms
        self.enter("counting")
        counts = self.parallel.all_reduce_sum(self.model.counts(batch))
        pieces = self.pieces(batch)
        contrast = self.contrast(batch, pieces)
        norms = {}
        if every and (step + 1) % every == 0:
            norms = self.gradient_norms(pieces, counts, contrast)
        self.enter("forward and backward")
        sums, state, broken = self.backward(pieces, counts, contrast)
        self.enter("optimizer")
        set_learning_rates(self.optimizer, learning_rate_factor(step, self.config.schedule, optim.min_lr_ratio))
        norm, skipped = clip_and_step(self.optimizer, optim.clip)
        self.model.clamp_temperature()
        if self.ema is not None:
            self.ema.update(step, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        peak = max(group["lr"] for group in self.optimizer.param_groups)
        return StepResult(sums, {"grad_norm": norm, **state}, skipped, broken, peak, norms)

    def pieces(self, batch: Batch) -> list[Batch]:
        """The micro-batches: contiguous pairs, with their images augmented, once for all that is made of them."""
        micro, multiple = self.arithmetic.micro, self.config.kernels.row_multiple
        pieces = [batch.micro(k * micro, (k + 1) * micro, multiple) for k in range(self.arithmetic.accumulate)]
        return [augmented(piece, self.config.data.augment) for piece in pieces]

    def contrast(self, batch: Batch, pieces: Sequence[Batch]) -> list[ContrastPart | None]:
        """Each micro-batch's part of the contrastive loss over the global batch; None where one forward has it all."""
        if len(pieces) == 1 or not self.model.contrasts:
            return [None] * len(pieces)
        self.enter("contrast over the whole batch")
        seed = self.config.run.seed
        return [*self.model.contrast_parts(batch, [self.model.contrast_embeddings(p, seed) for p in pieces])]

    def backward(
        self,
        pieces: Sequence[Batch],
        counts: Tensor,
        contrast: Sequence[ContrastPart | None],
        only: str | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Gradients of the step into the parameters; (sums, state, broken), see StepResult."""
        sums: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        broken = []
        for k, (piece, part) in enumerate(zip(pieces, contrast, strict=True)):
            with self.parallel.accumulating(self.model, last=k == len(pieces) - 1):
                losses = self.model(piece, self.config.run.seed, counts, part, only)
                (losses.total * self.parallel.ranks).backward()  # FSDP averages over ranks, and counts are global
            for name, value in losses.report.items():
                sums[name] = sums[name] + value if name in sums else value
            state = losses.state
            broken.append(losses.broken)
        return sums, state, broken[0] if len(broken) == 1 else torch.cat(broken)

    def gradient_norms(
        self, pieces: Sequence[Batch], counts: Tensor, contrast: Sequence[ContrastPart | None]
    ) -> dict[str, Tensor]:
        """The norm of each objective's own (weighted) gradient, by a forward and a backward of its own."""
        norms = {}
        for name in NAMES:
            if any(o.name == name for o in self.model.objectives):
                self.enter(f"gradient norm of {name}")
                self.backward(pieces, counts, contrast, only=name)
                norms[f"grad_norm_{name}"] = total_norm(self.optimizer)
                self.optimizer.zero_grad(set_to_none=True)
        return norms
