"""`mvle.train CONFIG --dry-run`: build all that a run would build, print it, and make two steps on made-up data.

It needs no data, no tokenizer and no run folder, and writes nothing: what it answers is whether the config fits these
ranks, this machine and its memory. Images have their full size: phases of schedule.resolution need less. The second
step is timed; the first also allocates and compiles.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mvle_kernels import Packed, explain, set_backend

from ..config import check_ranks
from ..data.batch import Batch
from ..data.config import open_shards
from ..data.errors import DataError
from ..data.shards import SHAPES
from ..data.tokenizer import known_vocabulary
from .build import build, describe_build
from .first_weights import first_weights
from .metrics import memory_gib
from .parallel import Parallel
from .train_step import TrainStep

if TYPE_CHECKING:
    from ..config import Config

SPECIALS = 5  # bos, pad, eos, unknown, mask


def dry_run(config: Config, parallel: Parallel) -> None:
    """Build, print, step twice. Raises what a run would raise on the way; every rank must call it."""
    arithmetic = check_ranks(config, parallel.ranks)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    set_backend(config.kernels.backend)
    vocabulary, whence = known_vocabulary(config.tokenizer)
    built = build(config, parallel, vocabulary, SPECIALS - 1, first_weights(config, vocabulary, SPECIALS - 1))
    ops = "\n".join(f"    {line}" for line in explain().splitlines())
    data = describe_data(config) if parallel.is_main else ""  # every rank would open the indexes for one line
    parallel.say(
        f"dry run of  {config.run.name} (a run would live in {config.run.folder}), {config.schedule.steps:,} steps, "
        f"schedule {config.schedule.kind}\n"
        + describe_build(config, parallel, arithmetic, built)
        + f"data        {data}\n"
        f"tokenizer   {vocabulary:,} words ({whence})\n"
        f"checkpoints {describe_checkpoints(config)}\n"
        f"kernels\n{ops}"
    )
    train_step = TrainStep(config, parallel, arithmetic, built)
    for step in range(2):
        batch = made_up_batch(config, vocabulary, arithmetic.per_rank, step * parallel.ranks + parallel.rank)
        parallel.barrier()
        start = time.perf_counter()
        result = train_step(step, batch.to(parallel.device))
        names = list(result.sums)
        numbers = parallel.all_reduce_sum(torch.stack([result.sums[name].double() for name in names])).tolist()  # sync
        seconds = time.perf_counter() - start
        losses = "  ".join(f"{n} {v:.3f}" for n, v in zip(names, numbers, strict=True) if not n.endswith("_correct"))
        parallel.say(f"step {step + 1}      {losses}  grad_norm {float(result.state['grad_norm']):.3f}")
    parallel.say(
        f"speed       {seconds:.2f} s for the second step, {config.batch.total / seconds:,.1f} pairs/s, no loader\n"
        f"memory      {memory_gib(parallel.device):.2f} GiB on rank 0\n"
        "nothing was written; the losses are those of random pixels and words"
    )


def made_up_batch(config: Config, vocabulary: int, pairs: int, seed: int) -> Batch:
    """Random pixels, and captions of 5 .. model.text.max_tokens random words, all from `seed`; on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    image, longest = config.model.image, config.model.text.max_tokens
    lengths = torch.randint(min(5, longest), longest + 1, (pairs,), generator=draw).tolist()
    captions = [torch.randint(SPECIALS, vocabulary, (n,), generator=draw, dtype=torch.int32) for n in lengths]
    low, high = config.masking.ratio_range
    return Batch(
        images=torch.randint(0, 256, (pairs, image.size, image.size, 3), generator=draw, dtype=torch.uint8),
        text=Packed.of(captions, config.kernels.row_multiple),
        pair_ids=torch.arange(pairs) + seed * pairs,
        image_ids=torch.arange(pairs) + seed * pairs,
        text_ids=torch.arange(pairs) + seed * pairs,
        keys=[f"made up {i}" for i in range(pairs)],
        image_ratio=tuple((low + (high - low) * torch.rand(pairs, generator=draw)).tolist()),
        augmentation=torch.cat([torch.randint(n, (pairs, k), generator=draw) for n, k in ((2**32, 4), (2, 1))], 1),
    )


def describe_data(config: Config) -> str:
    """What data.train and data.val name."""
    parts = []
    for split in ("train", "val"):
        sources = config.data.sources(split)
        if not sources:
            parts.append(f"data.{split} names none yet")
            continue
        if (
            any(p.startswith(SHAPES) for p in config.data.patterns(split))
            and not Path(config.data.shapes_folder).is_dir()
        ):
            parts.append(f"data.{split}: pictures of shapes, which a run draws at its first start")
            continue
        try:
            shards = open_shards(config.data, split)
            of = f" of {len(sources)} sources" if len(sources) > 1 else ""
            parts.append(f"data.{split}: {shards.images:,} images, {shards.pairs:,} pairs{of}")
        except DataError as error:
            parts.append(f"data.{split} cannot be used: {error}")
    return "; ".join(parts) + "; the steps below use made-up pairs"


def describe_checkpoints(config: Config) -> str:
    """When they are written, and what is kept."""
    own = config.checkpoint
    kept = f"every {own.every} steps{' in the background' if own.asynchronous else ''}, the newest {own.keep} are kept"
    kept += f", and every {own.keep_every} steps one for ever" if own.keep_every else ""
    kept += f", and the best by {own.best}" if own.best else ""
    every = config.evaluation.every
    return kept + (f"; validation every {every} steps" if every else "; no validation")
