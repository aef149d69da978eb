"""The trainer: builds a run from its config, steps it, and leaves a folder behind.

`Trainer.run` is the table of contents of a run; what each line does is one jump away. One step of the loop:

    batch (whole step of this rank) -> TrainStep -> metrics, skip log -> votes -> checkpoint, validation where due

Every rank runs the same lines. Nothing in a step waits for the device but the log line.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from mvle_kernels import explain, set_backend

from ..config import BatchArithmetic, Config, check_ranks
from ..data.batch import Batch
from ..data.config import open_shards
from ..data.decoders import choose_decoder
from ..data.loader import Loader
from ..data.plan import SamplingPlan
from ..data.sources import describe_sources
from ..data.tokenizer import Tokenizer, build_tokenizer
from ..evaluation.validation import Validation
from ..model.flops import step_flops, total
from ..model.rows import processed_rows
from .build import architecture, build, contrast_over_ranks, describe_build
from .checkpoint import Checkpointer
from .checkpoint_files import read_meta
from .data_wait import DataWait
from .first_weights import first_weights
from .gpus import peak_tflops
from .metrics import Metrics, read_rows
from .parallel import Parallel
from .profiling import Profiler
from .resume import identity, refuse_other_run
from .run import RunFolder
from .schedule import image_size
from .signals import StopFlag, forget_stop, note_stop
from .skips import NotFiniteError, SkipLog
from .trackers import open_trackers
from .train_step import TrainStep
from .watch import Watch

STOP, SAVE_FAILED = 1, 2  # votes, the gravest wins


class Trainer:
    """One run on one rank. Raises ConfigError where the config does not fit the ranks, or what the folder holds."""

    def __init__(self, config: Config, parallel: Parallel, watch: Watch, stop: StopFlag) -> None:
        self.config, self.parallel, self.watch, self.stop = config, parallel, watch, stop
        self.arithmetic: BatchArithmetic = check_ranks(config, parallel.ranks)
        self.folder = RunFolder(config.run.folder)
        self.checkpoints = Checkpointer(self.folder.checkpoints, config.checkpoint, parallel)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        set_backend(config.kernels.backend)

    def run(self) -> bool:
        """Train to the end, or until a signal. Returns whether the run is finished."""
        path = self.checkpoints.latest() if self.folder.checkpoints.is_dir() else None
        self.open_data()
        self.build(fresh=path is None)
        start = self.resume(path)
        self.announce(start)
        owed = self.owes_validation(start)
        if start >= self.config.schedule.steps and not owed:
            self.parallel.say(f"run {self.folder.path} is finished ({start} steps); these are its figures:")
            self.parallel.say(self.last_validation())
            return True
        self.write_config()
        try:
            return self.loop(start, owed)
        except NotFiniteError:  # raised by all ranks in the same step: what is being saved can still be finished
            self.checkpoints.wait()
            raise

    # ---- building ---------------------------------------------------------------------------------------------------

    def open_data(self) -> None:
        """Shards, tokenizer (rank 0 makes it, the others read it) and the sampling plan."""
        config, parallel = self.config, self.parallel
        self.watch.enter("opening data", long=True)
        self.decoder = choose_decoder(config.data.decoder, parallel.device)
        self.shards = open_shards(config.data, "train")
        self.validation_shards = open_shards(config.data, "val") if config.data.val else None
        if parallel.is_main:
            self.folder.create()
            self.tokenizer: Tokenizer = build_tokenizer(config.tokenizer, self.shards, self.folder.tokenizer)
        self.watch.enter("tokenizer", long=True)
        parallel.barrier()
        if not parallel.is_main:
            self.tokenizer = Tokenizer.load(self.folder.tokenizer)
        self.plan = SamplingPlan.build(config, self.shards)

    def build(self, fresh: bool) -> None:
        """What is trained, and the step that trains it. fresh: no checkpoint is there to go on from."""
        self.watch.enter("building the model", long=True)
        words = self.tokenizer.vocabulary, self.tokenizer.mask_id
        first = first_weights(self.config, *words, self.tokenizer) if fresh else None
        self.built = build(self.config, self.parallel, *words, first)
        self.model = self.built.model
        self.train_step = TrainStep(self.config, self.parallel, self.arithmetic, self.built, self.watch.enter)
        fingerprints = {
            "data": self.shards.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "architecture": architecture(self.model),
        }
        self.identity = identity(self.config, fingerprints, self.config.batch.total)

    def resume(self, path: Path | None) -> int:
        """Load the newest whole checkpoint, if there is one; returns the steps done."""
        if path is None:
            return 0
        self.watch.enter("loading a checkpoint", long=True)
        meta = read_meta(path)
        refuse_other_run(path, meta, self.identity, self.folder, self.model)
        self.checkpoints.load(path, self.model, self.built.optimizer, self.built.ema)
        return int(meta["step"])

    def write_config(self) -> None:
        """The resolved config beside the run."""
        if self.parallel.is_main:
            self.folder.write_config(self.config.to_yaml())
            forget_stop(self.folder.stopped)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def owes_validation(self, step: int) -> bool:
        """Whether the run was ended between the checkpoint of `step` and the validation that is due behind it."""
        config, owed = self.config.evaluation, False
        due = config.every and self.validation_shards is not None and step > 0
        if due and self.parallel.is_main and (step % config.every == 0 or step == self.config.schedule.steps):
            rows = read_rows(self.folder.metrics, "val") if self.folder.metrics.is_file() else []
            owed = all(row["step"] != step for row in rows)
        return self.parallel.vote(owed)

    def loop(self, start: int, owed: bool = False) -> bool:
        """Steps start .. schedule.steps, after a validation that an earlier process owed; returns whether the last one
        was reached."""
        config, parallel, steps = self.config, self.parallel, self.config.schedule.steps
        validation = None
        if config.evaluation.every and self.validation_shards is not None:
            validation = Validation(config, self.validation_shards, self.tokenizer)
        metrics = Metrics(
            self.folder.metrics,
            config.metrics,
            parallel,
            steps=steps,
            pairs=config.batch.total,
            start=start,
            trackers=open_trackers(config, self.folder, parallel, start),
            peak_tflops=peak_tflops(parallel.device),
        )
        skips = SkipLog(metrics, parallel, config.optim.max_skipped)
        with (
            metrics,
            self.loader(start) as loader,
            Profiler(config.metrics.profile, self.folder.profile, parallel, metrics) as profiler,
        ):
            if owed and validation:
                self.validate(validation, start, metrics, skips)
            metrics.watch(DataWait(loader.counts, config.data, self.decoder.name, parallel.device.type == "cuda"))
            batches = iter(loader)
            for step in range(start, steps):
                done = step + 1
                with profiler.step(done):
                    self.step(step, batches, metrics, skips)
                vote = self.vote()
                if vote == SAVE_FAILED:
                    self.checkpoints.wait()  # raises what went wrong
                if step == start:
                    parallel.shorten_timeouts()
                if self.checkpoints.due(done) or done == steps or vote == STOP:
                    self.save(done, metrics, skips)
                if validation and (done == steps or (done % config.evaluation.every == 0 and vote != STOP)):
                    self.validate(validation, done, metrics, skips)
                if vote == STOP and done < steps:
                    self.stopped(done, metrics)
                    return False
            self.watch.enter("finishing", long=True)
            skips.flush()
            self.checkpoints.wait()
        return True

    def step(self, step: int, batches: Iterator[Batch], metrics: Metrics, skips: SkipLog) -> None:
        """One optimizer step over the global batch, and what is written down of it."""
        self.watch.enter("waiting for data", step + 1)
        waited = time.perf_counter()
        batch = next(batches).to(self.parallel.device)
        waited = time.perf_counter() - waited
        if any(step == end for _, end in self.config.schedule.phases):
            metrics.say(f"images have {batch.images.shape[1]} pixels a side from step {step + 1} on")
        result = self.train_step(step, batch)
        self.watch.enter("metrics")
        if result.norms:
            metrics.extra(result.norms)
        metrics.update(
            step + 1,
            result.sums,
            result.state,
            skipped=result.skipped,
            wait=waited,
            lr=result.lr,
            replaced=batch.replaced,
            truncated=batch.truncated,
            flops=self.flops(batch),
            rows=processed_rows(self.config, batch, self.config.kernels.row_multiple, self.arithmetic.micro),
        )
        skips.note(step + 1, result.skipped, batch.keys, result.broken, result.sums)

    def flops(self, batch: Batch) -> int:
        """Useful operations of this rank's step, from what the host knows."""
        lengths, contrasted = batch.text.lengths or (), self.config.batch.total
        parts = step_flops(
            self.config,
            self.tokenizer.vocabulary,
            lengths,
            batch.image_ratio,
            contrast_pairs=contrasted,
            side=batch.images.shape[1],
        )
        return total(parts).total

    def loader(self, start: int) -> Loader:
        """The batches of this rank from step `start` on."""
        config = self.config
        return Loader(
            config.data,
            self.plan,
            self.shards,
            self.tokenizer,
            image_size=partial(image_size, schedule=config.schedule, full=config.model.image.size),
            max_tokens=config.model.text.max_tokens,
            row_multiple=config.kernels.row_multiple,
            rank=self.parallel.rank,
            ranks=self.parallel.ranks,
            start_step=start,
            steps=config.schedule.steps,
            pin_memory=self.parallel.device.type == "cuda",
            device=self.parallel.device,
        )

    def save(self, step: int, metrics: Metrics, skips: SkipLog) -> None:
        """A checkpoint of `step` steps done: tensors, and the one integer of data state."""
        self.watch.enter("saving", long=True)
        with metrics.paused():
            # a run that goes on from here does not see these steps again
            skips.flush()
            metrics.catch_up(step)
            meta = self.identity | {"pairs_seen": step * self.config.batch.total}
            self.checkpoints.save(step, self.model, self.built.optimizer, meta, self.built.ema)

    def validate(self, validation: Validation, step: int, metrics: Metrics, skips: SkipLog) -> None:
        """Validation losses and retrieval on a fixed split, shared by the ranks, of the EMA weights where there are
        some; and a checkpoint of what is best so far."""
        self.watch.enter("validating", long=True)
        with metrics.paused():
            figures = self.figures(validation)
            metrics.record(step, "val", figures)
        if self.config.checkpoint.best and self.checkpoints.is_best(step, figures):
            if not self.checkpoints.saved(step):
                self.save(step, metrics, skips)
            self.checkpoints.mark_best(step, figures)

    def figures(self, validation: Validation) -> dict[str, float]:
        """What validation finds, the same on every rank."""
        model, ema = self.model, self.built.ema
        model.eval()
        contrast_over_ranks(model, self.parallel, False)
        try:
            with ema.swapped(model) if ema is not None else contextlib.nullcontext():
                return validation.run(model, self.parallel.device, self.parallel)
        finally:
            self.parallel.reshard(model)
            contrast_over_ranks(model, self.parallel, True)
            model.train()

    def vote(self) -> int:
        """What all ranks do after this step: 0 go on, STOP, or SAVE_FAILED."""
        self.watch.enter("votes")
        own = SAVE_FAILED if self.checkpoints.failed else STOP if self.stop.asked else 0
        return self.parallel.agree(own)

    def stopped(self, step: int, metrics: Metrics) -> None:
        """After a signal and a checkpoint: leave a mark for whoever starts runs."""
        self.checkpoints.wait()
        metrics.say(f"stopped by signal {self.stop.name} after step {step}; the same command goes on from there")
        if self.parallel.is_main:
            note_stop(self.folder.stopped, step, self.stop.name)

    # ---- saying -----------------------------------------------------------------------------------------------------

    def announce(self, start: int) -> None:
        """One block at the start: what runs, on what, and why so."""
        config = self.config
        data, *sources = describe_sources(self.shards, self.plan, config.schedule.steps)
        decoder = f"{self.decoder.name}: {self.decoder.why}"
        if self.decoder.name == "dali" and (unverified := self.shards.unverified_shards):
            of = f"{unverified} of {len(self.shards.indexes)} shards"
            decoder += f"; torch decodes each image of {of} first, once a rank (indexed with --no-verify)"
        self.parallel.say(
            f"run         {config.run.name} in {self.folder.path}, seed {config.run.seed}, "
            f"{f'goes on from step {start}' if start else 'from the start'} to {config.schedule.steps}\n"
            + describe_build(config, self.parallel, self.arithmetic, self.built)
            + f"data        {data}; {self.tokenizer.vocabulary:,} words\n"
            + "".join(f"    {line}\n" for line in sources)
            + f"decoder     {decoder}\n"
            + "kernels\n"
            + "\n".join(f"    {line}" for line in explain().splitlines())
        )

    def last_validation(self) -> str:
        """The newest validation row, as a table."""
        if not self.folder.metrics.is_file():
            return "no metrics.jsonl in the folder"
        rows = read_rows(self.folder.metrics, "val")
        if not rows:
            return "no validation was made"
        last = {k: v for k, v in rows[-1].items() if k not in ("step", "kind")}
        width = max(map(len, last))
        return "\n".join(f"    {name:<{width}}  {value:.4f}" for name, value in last.items())
