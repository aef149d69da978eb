"""mvle_kernels: the ops of masked vision-and-language pre-training, usable on their own. Needs torch alone.

Packed buffers (`Packed`), counter-based random choices, patches and views, ragged attention, what a block does around
it, and the three losses.
Each op is one file: maths, cost, limits, reference, fast backend, public function. `explain(op, *args)` says which
backend a call takes and why the others were refused; `set_backend` or MVLE_BACKEND demands one.
"""

from .add_norm import add_norm
from .attention import AttentionPlan, attention_ops, attention_plan, ragged_attention
from .contrastive_loss import contrastive_loss
from .dispatch import explain, set_backend, use_backend
from .feed_forward import feed_forward
from .packed import Packed, concatenate, round_up, row_index
from .patches import PatchView, embed_views, expand, expand_layout, insert_mask_tokens, mask_of, patchify
from .pixel_loss import masked_pixel_loss
from .random import (
    Stream,
    exact_count,
    pack_patch_mask,
    philox,
    sample_negatives,
    sample_patch_mask,
    sample_token_mask,
    uniform,
    words,
)
from .token_loss import masked_token_loss

__all__ = [
    "AttentionPlan",
    "Packed",
    "PatchView",
    "Stream",
    "add_norm",
    "attention_ops",
    "attention_plan",
    "concatenate",
    "contrastive_loss",
    "embed_views",
    "exact_count",
    "expand",
    "expand_layout",
    "explain",
    "feed_forward",
    "insert_mask_tokens",
    "mask_of",
    "masked_pixel_loss",
    "masked_token_loss",
    "pack_patch_mask",
    "patchify",
    "philox",
    "ragged_attention",
    "round_up",
    "row_index",
    "sample_negatives",
    "sample_patch_mask",
    "sample_token_mask",
    "set_backend",
    "uniform",
    "use_backend",
    "words",
]
