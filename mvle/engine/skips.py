"""Steps that were skipped because their gradient was not finite: which pairs they had, and when it is too much.

The device skips such a step by itself (engine/optim.py). The host looks at a step's flag two steps later, when the
device has long been done with it, so that it never waits for the step that it has just launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .metrics import Metrics
from .parallel import Parallel

LATE = 2  # steps between a step and the look at its flag
SHOWN = 5  # keys on the screen; metrics.jsonl has them all


class NotFiniteError(RuntimeError):
    """Too many steps in a row were not finite."""


@dataclass(frozen=True, eq=False)
class _Noted:
    """A step whose flag is not yet looked at."""

    step: int
    flag: Tensor  # on the host; valid after `copied`
    copied: Any  # CUDA event, None on a CPU
    keys: Sequence[str]
    broken: Tensor | None
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class Skip:
    """A skipped step. keys: the pairs to blame; where none is (blamed is False), all pairs of the global batch."""

    step: int
    keys: list[str]
    blamed: bool

    def __str__(self) -> str:
        more = f" and {len(self.keys) - SHOWN} more" if len(self.keys) > SHOWN else ""
        what = "to blame:" if self.blamed else "no pair is to blame (an overflow?) among"
        return f"step {self.step} was not finite; {what} {', '.join(self.keys[:SHOWN])}{more}"


class SkipLog:
    """Notes every step, and writes a row of kind "skipped" for each that was. Every rank makes one and calls alike.

    limit   so many skipped steps in a row (optim.max_skipped) raise NotFiniteError, on all ranks in the same step
    """

    def __init__(self, metrics: Metrics, parallel: Parallel, limit: int) -> None:
        self.metrics, self.parallel, self.limit = metrics, parallel, limit
        self._waiting: deque[_Noted] = deque()
        self._row: list[Skip] = []  # skipped steps since the last that was not

    def note(
        self,
        step: int,
        skipped: Tensor,
        keys: Sequence[str],
        broken: Tensor | None = None,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Remember a step, and look at the one of two steps ago. Nothing given may be changed afterwards.

        step     steps done, this one included
        skipped  0-d float32 on the device, 1 where the step was skipped: the same on every rank
        keys     of this rank's pairs
        broken   bool [len(keys)] on the device: pairs whose own rows were not finite; None: not known
        losses   0-d tensors, this rank's share of the global losses
        """
        flag, copied = skipped.detach(), None
        if flag.device.type == "cuda":
            flag = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append(_Noted(step, flag, copied, keys, broken, losses or {}))
        if len(self._waiting) > LATE:
            self._look(self._waiting.popleft())

    def flush(self) -> None:
        """Look at every step noted: before a checkpoint (a resume from it would not see them again) and at the end."""
        while self._waiting:
            self._look(self._waiting.popleft())

    def _look(self, noted: _Noted) -> None:
        if noted.copied is not None:
            noted.copied.synchronize()  # sync: with what the device did two steps ago
        if not noted.flag.item():  # sync: none on a GPU, where the flag is a host copy of two steps ago
            self._row.clear()
            return
        skip = self._record(noted)
        self._row.append(skip)
        if len(self._row) >= self.limit:
            steps = "\n    ".join(map(str, self._row))
            raise NotFiniteError(
                f"{len(self._row)} steps in a row were not finite, as many as optim.max_skipped allows; they changed "
                f"nothing:\n    {steps}\n"
                "Look at the pairs that are to blame, and leave them out of the shards. Where none is: lower optim.lr, "
                "or make schedule.warmup longer. metrics.jsonl has all keys; the same command goes on from the last "
                "checkpoint, and optim.max_skipped=N lets more steps pass."
            )

    def _record(self, noted: _Noted) -> Skip:
        """Ask all ranks for their pairs; rank 0 writes."""
        broken = noted.broken.tolist() if noted.broken is not None else []  # sync: only after a step that was skipped
        guilty = [key for key, bad in zip(noted.keys, broken, strict=False) if bad]
        losses = {name: float(value) for name, value in noted.losses.items()}
        mine = (guilty, list(noted.keys), losses)
        ranks: list[Any] = [mine]
        if self.parallel.ranks > 1:
            ranks = [None] * self.parallel.ranks
            dist.all_gather_object(ranks, mine, group=self.parallel.cpu_group)
        guilty, keys = ([key for rank in ranks for key in rank[part]] for part in (0, 1))  # in the order of positions
        losses = {name: sum(rank[2][name] for rank in ranks) for name in losses}
        skip = Skip(noted.step, guilty or keys, bool(guilty))
        values = {"keys": skip.keys, "blamed": skip.blamed, "losses": losses}
        self.metrics.record(noted.step, "skipped", values, line=f"SKIPPED {skip}")
        return skip
