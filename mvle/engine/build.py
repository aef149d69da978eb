"""The model and its optimizer, built in the one order that works on any number of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..model.model import MaskVLM, parameter_counts
from .blocks import prepare_blocks
from .ema import Ema
from .first_weights import FirstWeights
from .optim import build_optimizer
from .parallel import Parallel

if TYPE_CHECKING:
    from ..config import BatchArithmetic, Config


CONTEXTS = {  # masking.context, for people
    "clean": "each rebuilt from the whole of the other side",
    "masked": "each rebuilt from the other side masked too",
    "none": "each rebuilt from its own side alone",
}


@dataclass(frozen=True, eq=False)
class Built:
    """model on its device, sharded, with its first weights · optimizer · ema or None · parameters of each part · where
    first weights that were not drawn came from, in lines."""

    model: MaskVLM
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    parameters: dict[str, int]
    origin: tuple[str, ...] = ()


def build(
    config: Config, parallel: Parallel, vocabulary: int, mask_id: int, first: FirstWeights | None = None
) -> Built:
    """Everything that training changes. first: weights that a fresh run does not draw, the same on every rank."""
    first = first or FirstWeights()
    # 1) on meta: shapes only, so that no rank ever holds the whole model
    with torch.device("meta"):
        model = MaskVLM(config, vocabulary, mask_id)
    parameters = parameter_counts(model)
    # 2) what a block does in its forward, which sharding then wraps
    prepare_blocks(model, config.parallel.activation_checkpointing, config.kernels.compile)
    # 3) sharded before it has memory, 4) then memory, 5) then weights, given or each from its own seed
    parallel.shard(model)
    model.to_empty(device=parallel.device)
    model.init_weights(config.run.seed, first.values)
    # 6) optimizer and EMA last: made before sharding they would hold tensors that no longer exist
    optimizer = build_optimizer(model, config.optim)
    ema = Ema(model, config.optim.ema) if config.optim.ema is not None else None
    contrast_over_ranks(model, parallel, True)
    return Built(model, optimizer, ema, parameters, first.lines)


def contrast_over_ranks(model: MaskVLM, parallel: Parallel, on: bool) -> None:
    """Whether the contrastive loss sees the pairs of all ranks (training) or those of one forward (validation)."""
    model.set_contrast_group(torch.distributed.group.WORLD if on and parallel.ranks > 1 else None)


def architecture(model: MaskVLM) -> str:
    """A fingerprint of every parameter's name and (whole) shape."""
    text = "\n".join(f"{name} {tuple(p.shape)}" for name, p in sorted(model.named_parameters()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def describe_build(config: Config, parallel: Parallel, arithmetic: BatchArithmetic, built: Built) -> str:
    """Lines of what was built, for the block that a run prints at its start."""
    cuda = parallel.device.type == "cuda"
    device = torch.cuda.get_device_name(parallel.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    dtype = "bfloat16 copies of float32 weights, losses in float32" if cuda else "float32 (bfloat16 is for GPUs)"
    sharding = f"FSDP2 over {parallel.mesh}" if parallel.sharded else "unsharded (one rank gains nothing by it)"
    blocks = f"activation checkpointing {config.parallel.activation_checkpointing}"
    blocks += ", blocks compiled" if config.kernels.compile else ""
    total = sum(built.parameters.values())
    parts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in built.parameters.items())
    average = f"; EMA {config.optim.ema}, which validation uses" if built.ema is not None else ""
    origin = "".join(f"{'' if i else 'weights':<12}{line}\n" for i, line in enumerate(built.origin))
    return (
        f"device      {device}; {dtype}; {sharding}; {blocks}\n"
        f"batch       {arithmetic}; one contrast over all of them\n"
        f"parameters  {total / 1e6:.2f}M: {parts}{average}\n"
        f"{origin}"
        f"optimizer   AdamW by the fused kernel of {config.optim.backend} (optim.backend)\n"
        f"masking     {config.masking.mode}: {config.masking.image_ratio} of {config.masking.cell}-pixel cells, "
        f"{config.masking.text_ratio} of a caption's tokens; {CONTEXTS[config.masking.context]}\n"
        + "".join(f"approximate {line}\n" for line in config.approximations)
    )
