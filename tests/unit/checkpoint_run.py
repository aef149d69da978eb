"""A toy run of one process with its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.checkpoint_tensors import state_tensors
from mvle.engine.ema import Ema
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel

from ..distributed.toy import Toy, pairs_of

ALONE = Parallel(0, 1, torch.device("cpu"))


class Run:
    """A toy run with its checkpoints. config: of its checkpoints."""

    def __init__(self, folder: Path, seed: int = 0, ema: bool = False, **config: object) -> None:
        self.model = Toy(seed)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-2))
        self.ema = Ema(self.model, 0.5) if ema else None
        self.checkpoints = Checkpointer(folder, CheckpointConfig(**config), ALONE)
        self.step = 0

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.model(pairs_of(self.step)).backward()
            _, skipped = clip_and_step(self.optimizer, 1.0)
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.step, skipped)
            self.step += 1
        return self

    def save(self) -> Path:
        return self.checkpoints.save(self.step, self.model, self.optimizer, {"pairs": 8 * self.step}, self.ema)

    def resume(self) -> Run:
        path = self.checkpoints.latest()
        assert path is not None
        self.step = self.checkpoints.load(path, self.model, self.optimizer, self.ema)["step"]
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        return state_tensors(self.model, self.optimizer, self.ema)


def same(a: Run, b: Run) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
