"""Checkpoints: written whole or not at all, in the background if asked to, found again, loaded on any number of ranks.

A save in three parts, each of which every rank waits for before the next begins:

    1) rank 0 makes a folder under a name that nobody loads
    2) each rank writes its tensors there
    3) rank 0 adds meta.json, gives the folder its name, sets `latest`, and removes what need not be kept

Where a part fails on any rank, all of them undo the save and raise. An asynchronous save copies the tensors to CPU
memory and returns; a thread then does the same three parts, over a process group of its own. It is one thread, so what
is asked of it is done in order, and one save is in flight at most.

Which files are what: checkpoint_files.py. Tensors: checkpoint_tensors.py. The best one: checkpoint_best.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..section import Section
from .checkpoint_best import Best, Figure, forget_best, is_better, read_best, write_best
from .checkpoint_files import (
    find_latest,
    folder_of,
    publish,
    read_meta,
    remove_leftovers,
    start_writing,
    step_of,
    steps_in,
    what_is_wrong,
)
from .checkpoint_tensors import Average, Staging, load_weights, restore, state_tensors, write_tensors
from .errors import CheckpointError, first_cause
from .parallel import MARGIN, Parallel


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, gt=0, description="steps between checkpoints; the last step has one always")
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None,
        gt=0,
        description="those of every so many steps are kept for ever (a multiple of checkpoint.every); null: none",
    )
    best: Figure | None = Field(
        None, description="figure of validation by which the best one so far is kept, too; null: none"
    )
    asynchronous: bool = Field(
        False,
        description="write in the background while training goes on; takes CPU memory for a copy of what a rank writes",
    )

    @model_validator(mode="after")
    def check_multiple(self) -> CheckpointConfig:
        """Only what is written can be kept."""
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every must be a multiple of checkpoint.every ({self.every}), since others are not written; got "
                f"{self.keep_every}. Set it to {-(-self.keep_every // self.every) * self.every}."
            )
        return self


class Checkpointer:
    """Saves, finds and loads the checkpoints of a run. All ranks call each method together.

    Making one removes what a killed save left behind.

    failed   an asynchronous save failed on some rank, which `wait` raises. Ranks learn it at different moments: let
             them vote on it in each step
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig, parallel: Parallel) -> None:
        self.folder, self.config, self.parallel = Path(folder), config, parallel
        self.failed = False
        self._step: int | None = None  # of the newest that this process saved or loaded
        self._best: Best | None = None  # on rank 0
        self._group: Any = None  # of saves alone: the main thread's votes never meet them
        self._staging = Staging() if config.asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoints", *_on(parallel.device)) if config.asynchronous else None
        self._unfinished: list[Future[None]] = []
        if parallel.cpu_group is not None:
            # a save may take longer than a step may wait
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=parallel.first_timeout + MARGIN))
        else:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as intended
        if parallel.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            if (best := read_best(self.folder)) and not folder_of(self.folder, best.step).is_dir():
                forget_best(self.folder)
        parallel.barrier()

    # --- saving ---

    def due(self, step: int) -> bool:
        """Whether `step` (steps done) is one of checkpoint.every."""
        return step % self.config.every == 0

    def saved(self, step: int) -> bool:
        """Whether the state after `step` steps has been saved (or is being saved, or was loaded) by this process."""
        return step == self._step

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: Mapping[str, Any] | None = None,
        ema: Average | None = None,
    ) -> Path:
        """Write the state after `step` steps; returns its folder. With checkpoint.asynchronous it is not there yet.

        meta (JSON values) is stored with it; step, ranks, threads, versions and the sizes of the files are added.
        Waits for a save in flight. Raises CheckpointError on every rank if any rank could not write; what was there
        before stays as it was.
        """
        self.wait()
        self.parallel.reshard(model)
        tensors = state_tensors(model, optimizer, ema)
        facts = {
            **(meta or {}),
            "step": step,
            "ranks": self.parallel.ranks,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        if self._staging is not None:
            self._staging.copy(tensors)
        self._do(partial(self._save, step, tensors, facts))
        self._step = step
        return folder_of(self.folder, step)

    def wait(self) -> None:
        """Until what is in flight is done. Raises CheckpointError on every rank where it failed on any."""
        unfinished, self._unfinished = self._unfinished, []
        wait(unfinished)
        self.failed = False
        for work in unfinished:
            work.result()

    def _do(self, work: Callable[[], None]) -> None:
        """Now, or in the background behind what is asked for already."""
        if self._thread is None:
            work()
        else:
            self._unfinished.append(self._thread.submit(self._in_background, work))

    def _in_background(self, work: Callable[[], None]) -> None:
        if self.failed:
            return  # what was asked for behind a save that failed speaks of a checkpoint that is not there
        try:
            try:
                work()
            except CheckpointError:
                raise
            except Exception as error:  # such as another rank that died
                raise CheckpointError(f"a checkpoint was not written: {first_cause(error)}.") from error
        except CheckpointError as error:
            self.failed = True
            self.parallel.say(str(error))  # at once: the loop may be in a long step
            raise

    def _save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        final = folder_of(self.folder, step)
        temporary = self.folder / f".{final.name}.writing"

        def finish() -> None:
            publish(temporary, final, facts)
            self._purge(step)

        what = f"the checkpoint of step {step}"
        self._together(what, lambda: start_writing(temporary), main_only=True, undo=temporary)
        self._together(what, lambda: self._write(temporary, tensors), undo=temporary)
        self._together(what, finish, main_only=True, undo=temporary)

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(folder, tensors, self._group, self._staging.copies if self._staging else None)

    def _together(self, what: str, work: Callable[[], None], main_only: bool = False, undo: Path | None = None) -> None:
        """Do a part of a save; if it fails on any rank, undo and raise on all."""
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

        own: BaseException | None = None
        try:
            if self.parallel.is_main or not main_only:
                work()
        except (Exception, CheckpointException) as error:
            own = error
        reasons = self._share("" if own is None else first_cause(own))
        if not any(reasons):
            return
        if self.parallel.is_main and undo is not None:
            shutil.rmtree(undo, ignore_errors=True)
        several = self.parallel.ranks > 1
        reason = next(f"rank {rank}: {reason}" if several else reason for rank, reason in enumerate(reasons) if reason)
        free = shutil.disk_usage(self.folder).free / 2**20
        raise CheckpointError(
            f"{what} was not written: {reason}. Checkpoints that were there before are whole. {self.folder} has "
            f"{free:,.0f} MiB free: make room and start again, or lower checkpoint.keep."
        ) from own

    def _share(self, own: str) -> list[str]:
        """What each rank says, in their order, on every rank."""
        if self._group is None:
            return [own]
        said = [""] * self.parallel.ranks
        dist.all_gather_object(said, own, group=self._group)
        return said

    def _purge(self, step: int) -> None:
        """Keep the newest checkpoint.keep, the best, and those of checkpoint.keep_every. Steps beyond the one just
        written belong to a run that was set back: they count as oldest."""
        newest = sorted(steps_in(self.folder), key=lambda s: (s <= step, s), reverse=True)
        best, keep_every = read_best(self.folder), self.config.keep_every
        for old in newest[self.config.keep :]:
            if (best and old == best.step) or (keep_every and old % keep_every == 0):
                continue
            try:
                shutil.rmtree(folder_of(self.folder, old))
            except OSError as error:
                self.parallel.say(f"the old checkpoint of step {old} could not be removed: {error}")

    # --- the best one ---

    def is_best(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether checkpoint.best is better in `figures`, found by validation after `step` steps, than ever before.

        Rank 0 decides for all; a figure that is not finite is never the best. If so: save, unless it is saved already,
        and `mark_best`. Raises CheckpointError where validation does not give that figure.
        """
        metric = self.config.best
        if metric is None:
            return False
        if metric not in figures:
            raise CheckpointError(
                f"checkpoint.best expected a figure that validation gives (after step {step}: "
                f"{', '.join(sorted(figures))}); got {metric}, whose objective is not trained."
            )
        return self.parallel.vote(self.parallel.is_main and is_better(figures[metric], self._best))

    def mark_best(self, step: int, figures: Mapping[str, float]) -> None:
        """The checkpoint of `step`, which is saved (or is being saved), is the best so far: best.json names it once it
        is published, and it is kept until a better one comes."""
        if not self.saved(step) or self.config.best is None:
            raise ValueError(f"the best checkpoint must be saved before it is marked; got step {step}.")
        best = Best(step, self.config.best, float(figures[self.config.best]))
        self._best = best

        def mark() -> None:
            write_best(self.folder, best)
            self._purge(step)  # the best until now

        self._do(lambda: self._together(f"{self.folder / 'best.json'}", mark, main_only=True))

    def _resume_best(self, step: int) -> None:
        """Take up what best.json says, if it speaks of the past of a run that goes on from `step`."""
        best = read_best(self.folder)
        if best is None:
            return
        problem = what_is_wrong(folder_of(self.folder, best.step))
        if best.step > step:
            problem = f"it is beyond step {step}, from which the run goes on"
        if problem is not None:
            self.parallel.say(f"the best checkpoint, of step {best.step}, counts no more: {problem}")
            forget_best(self.folder)
        elif best.metric == self.config.best:
            self._best = best

    # --- loading ---

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole: the one that `latest` names, else the next older; None if there is none.

        Reads the checksums of all tensors. Says which ones were passed over, and why. Raises CheckpointError where
        there are some and all are broken.
        """
        step, problem = -2, ""
        if self.parallel.is_main:
            try:
                path = find_latest(self.folder, read_tensors=True)
                step = -1 if path is None else step_of(path)
            except CheckpointError as error:
                step, problem = -2, str(error)
        step = self.parallel.agree(step)  # one rank looks, so that all load the same
        if step == -2:
            raise CheckpointError(problem or f"none of the checkpoints in {self.folder} is whole; see rank 0.")
        return None if step == -1 else folder_of(self.folder, step)

    def load(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Average | None = None
    ) -> dict[str, Any]:
        """Go on from the checkpoint that `latest` found: fill model, optimizer and EMA in place; returns meta.json.

        They may be sharded otherwise than those that were saved, or not at all. Raises CheckpointError where the
        tensors do not fit, UnsafeCheckpoint where it holds more than tensors.
        """
        restore(path, model, optimizer, ema, self._group)
        meta = read_meta(path)
        self._step = int(meta["step"])
        if self.parallel.is_main:
            self._resume_best(self._step)
        return meta


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, weights: str = "model") -> dict[str, Any]:
    """Fill a model for use, on one process, from a checkpoint of any number of ranks; returns meta.json.

    weights: model, or ema where the run keeps an average of its weights. Raises CheckpointError where the checkpoint is
    not whole, is damaged, has no such weights or does not fit, UnsafeCheckpoint where it holds more than tensors.
    """
    path = Path(path)
    if (problem := what_is_wrong(path)) is not None:
        raise CheckpointError(f"{problem}.")
    load_weights(path, model, weights)
    return read_meta(path)


def _on(device: torch.device) -> tuple[Any, ...]:
    """How a thread starts that computes on `device`: a new one would be on the first GPU, whichever the rank's is."""
    return (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
