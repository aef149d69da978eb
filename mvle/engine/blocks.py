"""What transformer blocks keep for their backward, and whether torch.compile makes their dense pieces.

Both replace methods of a block and nothing else: names of parameters, initial weights, checkpoints and the hooks of
FSDP, which sit around a block, stay as they are.

Compiled are the pieces around attention (`AttentionBlock.DENSE`), one by one, and not whole blocks. Attention takes
plans, whose lengths are others in each step: a compiler that saw them would compile in each step, until it gives up. Of
a piece it sees rows, and it is told that their number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from mvle_kernels import attention_ops
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..model.layers import AttentionBlock

ActivationCheckpointing = Literal["none", "selective", "full"]

# What `selective` keeps, with attention_ops(). A GPU has several kernels for attention.
COSTLY = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]
# All pieces that are wrapped for `selective` share the code of one function, and torch counts compilations by code.
COMPILATIONS = 64


def prepare_blocks(model: nn.Module, activation_checkpointing: ActivationCheckpointing, compiled: bool) -> None:
    """Set up every transformer block of a model, before it is sharded.

    none       everything that the backward reads is kept
    selective  results of matrix products and of attention are kept, the rest (norms, GELU, gathers) is made again
    full       a block keeps its input alone, and its forward is made again

    Gradients are the same to the bit; compiled ones to rounding. On a CPU torch.compile needs a C++ compiler.
    """
    if compiled:
        import torch._dynamo.config as limits

        limits.recompile_limit = max(limits.recompile_limit, COMPILATIONS)
    kept = [*COSTLY, *attention_ops()] if activation_checkpointing == "selective" else []
    for block in model.modules():
        if isinstance(block, AttentionBlock):
            if activation_checkpointing == "full":
                block.forward = _made_again(block.forward)  # type: ignore[method-assign]
            elif activation_checkpointing == "selective":
                # what is compiled must contain its checkpointing: from outside its products cannot be seen, nor kept
                for name in (*block.DENSE, "attend") if compiled else ("forward",):
                    setattr(block, name, _made_again(getattr(block, name), keep=kept))
            for name in block.DENSE if compiled else ():
                setattr(block, name, torch.compile(getattr(block, name), dynamic=True))


def _made_again(function: Callable[..., Any], keep: Sequence[Any] = ()) -> Callable[..., Any]:
    """The function, made again in its backward from its arguments and the results of the ops in `keep`."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if keep:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(keep))

    def again(*arguments: Any) -> Any:
        return checkpoint(function, *arguments, **options)

    return again
