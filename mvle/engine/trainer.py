"""The trainer: builds a run from its config, steps it, and leaves a folder behind.

`Trainer.run` is the table of contents of a run; what each line does is one jump away. One step:

    batch (whole step of this rank) -> global counts -> micro-batches: forward, backward -> clip, step -> metrics

Every rank runs the same lines. Nothing in a step waits for the device but the log line.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from mvle_kernels import explain, set_backend

from ..config import BatchArithmetic, Config, ConfigError, check_ranks, differences
from ..data.loader import Loader, open_shards
from ..data.plan import SamplingPlan
from ..data.tokenizer import Tokenizer, build_tokenizer
from ..evaluation.validation import Validation
from ..model.model import MaskVLM, parameter_counts
from .checkpoint import Checkpointer
from .metrics import Metrics, read_rows
from .optim import build_optimizer, clip_and_step, learning_rate_factor, set_learning_rates
from .parallel import Parallel
from .run import RunFolder


class Trainer:
    """One run on one rank. Raises ConfigError where the config does not fit the ranks, or what the folder holds."""

    def __init__(self, config: Config, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.arithmetic: BatchArithmetic = check_ranks(config, parallel.ranks)
        self.folder = RunFolder(config.run.folder)
        self.checkpoints = Checkpointer(self.folder.checkpoints, config.checkpoint, parallel)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        set_backend(config.kernels.backend)

    def run(self) -> bool:
        """Train to the end, or until SIGTERM. Returns whether the run is finished."""
        path = self.checkpoints.latest() if self.folder.checkpoints.is_dir() else None
        self.open_data()
        self.build()
        start = self.resume(path)
        self.announce(start)
        if start >= self.config.schedule.steps:
            self.parallel.say(f"run {self.folder.path} is finished ({start} steps); these are its figures:")
            self.parallel.say(self.last_validation())
            return True
        self.write_config()
        return self.loop(start)

    # ---- building ---------------------------------------------------------------------------------------------------

    def open_data(self) -> None:
        """Shards, tokenizer (rank 0 makes it, the others read it) and the sampling plan."""
        config, parallel = self.config, self.parallel
        self.shards = open_shards(config.data, "train")
        self.validation_shards = open_shards(config.data, "val") if config.data.val else None
        if parallel.is_main:
            self.folder.create()
            self.tokenizer: Tokenizer = build_tokenizer(config.tokenizer, self.shards, self.folder.tokenizer)
        parallel.barrier()
        if not parallel.is_main:
            self.tokenizer = Tokenizer.load(self.folder.tokenizer)
        self.plan = SamplingPlan.build(config, self.shards)

    def build(self) -> None:
        """The model and its optimizer, in the one order that works."""
        config, parallel = self.config, self.parallel
        # 1) on meta: shapes only, so that no rank ever holds the whole model
        with torch.device("meta"):
            model = MaskVLM(config, self.tokenizer.vocabulary, self.tokenizer.mask_id)
        self.parameters = parameter_counts(model)
        # 2) sharded before it has memory, 3) then memory, 4) then weights, each from its own seed
        parallel.shard(model)
        model.to_empty(device=parallel.device)
        model.init_weights(config.run.seed)
        # 5) the optimizer last: one made before sharding would train tensors that no longer exist
        self.optimizer = build_optimizer(model, config.optim)
        self.model = model
        if parallel.ranks > 1:
            model.set_contrast_group(torch.distributed.group.WORLD)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        return {
            "config": self.config.to_dict(),
            "contrast_size": self.arithmetic.contrast,
            "fingerprints": {
                "data": self.shards.fingerprint,
                "tokenizer": self.tokenizer.fingerprint,
                "architecture": architecture(self.model),
            },
        }

    def resume(self, path: Any) -> int:
        """Load the newest whole checkpoint, if there is one; returns the steps done."""
        if path is None:
            return 0
        from .checkpoint import read_meta

        meta = read_meta(path)
        refuse_other_run(meta, self.identity(), self.folder)
        self.checkpoints.load(path, self.model, self.optimizer)
        return int(meta["step"])

    def write_config(self) -> None:
        """The resolved config beside the run."""
        if self.parallel.is_main:
            self.folder.write_config(self.config.to_yaml())

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def loop(self, start: int) -> bool:
        """Steps start .. schedule.steps; returns whether the last one was reached."""
        config, steps = self.config, self.config.schedule.steps
        validation = None
        if config.evaluation.every and self.validation_shards is not None:
            validation = Validation(config, self.validation_shards, self.tokenizer)
        loader = self.loader(start)
        metrics = Metrics(
            self.folder.metrics, config.metrics, self.parallel, steps=steps, pairs=config.batch.total, start=start
        )
        with stop_on_signals() as stop, metrics, loader:
            batches = iter(loader)
            step = start
            while step < steps:
                self.step(step, batches, loader, metrics)
                step += 1
                stopping = self.parallel.vote(stop.asked)
                if self.checkpoints.due(step) or step == steps or stopping:
                    with metrics.paused():
                        self.save(step)
                if validation and (step % config.evaluation.every == 0 or step == steps) and not stopping:
                    with metrics.paused():
                        metrics.record(step, "val", self.validate(validation))
                if stopping and step < steps:
                    metrics.say(f"stopped by signal {stop.name} after step {step}; the same command goes on from there")
                    return False
        return True

    def step(self, step: int, batches: Iterator[Any], loader: Loader, metrics: Metrics) -> None:
        """One optimizer step over the global batch."""
        waited = time.perf_counter()
        batch = next(batches).to(self.parallel.device)
        waited = time.perf_counter() - waited
        counts = self.parallel.all_reduce_sum(self.model.counts(batch))
        self.optimizer.zero_grad(set_to_none=True)
        micro, accumulate = self.arithmetic.micro, self.arithmetic.accumulate
        sums: dict[str, torch.Tensor] = {}
        for part in range(accumulate):
            piece = batch.micro(part * micro, (part + 1) * micro, self.config.kernels.row_multiple)
            with self.parallel.accumulating(self.model, last=part == accumulate - 1):
                losses = self.model(piece, self.config.run.seed, counts)
                (losses.total * self.parallel.ranks).backward()  # FSDP averages over ranks, and counts are global
            for name, value in losses.report.items():
                sums[name] = sums[name] + value if name in sums else value
        factor = learning_rate_factor(step, self.config.schedule, self.config.optim.min_lr_ratio)
        set_learning_rates(self.optimizer, factor)
        norm, skipped = clip_and_step(self.optimizer, self.config.optim.clip)
        self.model.clamp_temperature()
        state = {"grad_norm": norm, **losses.state}
        peak = max(group["lr"] for group in self.optimizer.param_groups)
        metrics.update(step + 1, sums, state, skipped=skipped, wait=waited, lr=peak)

    def loader(self, start: int) -> Loader:
        """The batches of this rank from step `start` on."""
        config = self.config
        return Loader(
            config.data,
            self.plan,
            self.shards,
            self.tokenizer,
            image_size=config.model.image.size,
            max_tokens=config.model.text.max_tokens,
            row_multiple=config.kernels.row_multiple,
            rank=self.parallel.rank,
            ranks=self.parallel.ranks,
            start_step=start,
            steps=config.schedule.steps,
            pin_memory=self.parallel.device.type == "cuda",
        )

    def save(self, step: int) -> None:
        """A checkpoint of `step` steps done: tensors, and the one integer of data state."""
        meta = self.identity() | {"pairs_seen": step * self.config.batch.total}
        self.checkpoints.save(step, self.model, self.optimizer, meta)

    def validate(self, validation: Validation) -> dict[str, float]:
        """Validation losses and retrieval on a fixed split, by every rank alike."""
        self.model.eval()
        self.model.set_contrast_group(None)
        try:
            return validation.run(self.model, self.parallel.device)
        finally:
            self.parallel.reshard(self.model)
            if self.parallel.ranks > 1:
                self.model.set_contrast_group(torch.distributed.group.WORLD)
            self.model.train()

    # ---- saying -----------------------------------------------------------------------------------------------------

    def announce(self, start: int) -> None:
        """One block at the start: what runs, on what, and why so."""
        parallel, config = self.parallel, self.config
        cuda = parallel.device.type == "cuda"
        device = torch.cuda.get_device_name(parallel.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        dtype = "bfloat16 weights in float32 shards, losses in float32" if cuda else "float32 (bfloat16 is for GPUs)"
        sharding = f"FSDP2 over {parallel.mesh}" if parallel.sharded else "unsharded (one CPU rank gains nothing by it)"
        total = sum(self.parameters.values())
        parts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in self.parameters.items())
        ops = "\n".join(f"    {line}" for line in explain().splitlines())
        parallel.say(
            f"run         {self.folder.path}, seed {config.run.seed}, "
            f"{f'goes on from step {start}' if start else 'from the start'} to {config.schedule.steps}\n"
            f"device      {device}; {dtype}; {sharding}\n"
            f"batch       {self.arithmetic}; contrast over {self.arithmetic.contrast}\n"
            f"data        {self.shards.images:,} images, {self.shards.pairs:,} pairs, {len(self.shards.shard_sizes)} "
            f"shards, fingerprint {self.shards.fingerprint[:12]}; {self.tokenizer.vocabulary:,} words\n"
            f"parameters  {total / 1e6:.2f}M: {parts}\n"
            f"masking     {config.masking.mode}: {config.masking.image_ratio} of {config.masking.cell}-pixel cells, "
            f"{config.masking.text_ratio} of a caption's tokens\n"
            f"kernels\n{ops}"
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


def architecture(model: MaskVLM) -> str:
    """A fingerprint of every parameter's name and (whole) shape."""
    import hashlib

    text = "\n".join(f"{name} {tuple(p.shape)}" for name, p in sorted(model.named_parameters()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def refuse_other_run(meta: dict[str, Any], identity: dict[str, Any], folder: RunFolder) -> None:
    """Raise ConfigError, with what differs, where a checkpoint is of another run than the one that would go on."""
    problems = []
    now, before = Config.from_dict(identity["config"]), Config.from_dict(meta["config"])
    for key, new, old in differences(now, before):
        problems.append(f"{key}: {old!r} in the checkpoint, {new!r} now")
    for name, value in identity["fingerprints"].items():
        if meta["fingerprints"][name] != value:
            problems.append(f"fingerprint of the {name}: {meta['fingerprints'][name]} in the checkpoint, {value} now")
    if meta["contrast_size"] != identity["contrast_size"]:
        problems.append(
            f"pairs that the contrastive loss compares: {meta['contrast_size']} in the checkpoint, "
            f"{identity['contrast_size']} now (ranks x batch.micro)"
        )
    if problems:
        raise ConfigError(
            f"{folder.path} holds another run (run.folder); what differs:\n    "
            + "\n    ".join(problems)
            + "\nChoose another run.folder for a new run, or start with what the checkpoint has."
        )


class StopFlag:
    """Set by a signal; read once a step."""

    def __init__(self) -> None:
        self.asked, self.name = False, ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT ask for a clean end inside the block; a second SIGINT interrupts as usual."""
    flag = StopFlag()
    before = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        if flag.asked:
            raise KeyboardInterrupt
        flag(number, frame)

    try:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, flag)
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
