"""FLAVA's training step on image-caption pairs: transformers' FlavaForPreTraining at the encoder sizes of a config.

FLAVA, Singh et al., CVPR 2022 (arXiv 2112.04482). The model and its losses are transformers'; here are only its sizes,
its inputs, and two changes. Attention is torch's fused one, where transformers writes the scores out: the same
mathematics (a test holds it so), and the form that is strong on a GPU. And class tokens, mask token and positions start
as small random numbers: transformers starts them at zero, and the gradient of a norm over a row of zeros (eps 1e-12)
overflows.

    GC    contrast over the batch, whole image against whole caption
    ITM   a tenth of the pairs has another pair's caption; two classes on the multimodal encoder's global row
    MMM   masked image and masked caption, concatenated, through the multimodal encoder: codes of masked patches out of
          8,192, and masked words

A step over pairs has these three. FLAVA also trains on images alone and on captions alone (MIM, MLM), in steps of
their own, which is another data set and not part of a step over pairs.

The codes of an image come from DALL-E's encoder, which FLAVA runs, frozen, in each step, over the image at 8 pixels a
patch. PROVIDER is given the codes, as if somebody had stored them; WITH_CODEBOOK computes them in the step, as one has
to where crops are random. Weights are random in both: codes cost the same whatever they are.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvle.config import Config
from mvle.data.batch import Batch
from mvle.engine.optim import build_optimizer
from mvle.model.config import ModelConfig

from . import Provider, Step
from .plain import PlainInputs, plain_inputs
from .training import Decayed, Sized, normalised, training_step

CODES, CODE_PIXELS = 8192, 8  # codes of an image patch; pixels of a patch's side that the codebook reads
OTHER_CAPTION = 10  # one pair in so many has another's caption

DIFFERENCES = (
    "masked image and masked caption are read together, so each is rebuilt from a masked partner; ours reads a whole "
    "one. So one multimodal pass over both where ours has image cross encoder, text cross encoder and decoder",
    "one multimodal encoder of 2 * cross_depth blocks (6 at base, as in the paper) over 1 + 1 + N + L rows, no "
    "cross-attention",
    "ITM on the masked pair of the same pass, random negatives for a tenth of the pairs: no pass of its own, where "
    "ours has two further questions a pair with hard negatives",
    "codes of 8,192 instead of pixels: a wider head at masked patches, and DALL-E's encoder in each step (left out "
    "unless the row says `codebook`); in all 309 GFLOP a pair, with the codebook 361, plain 444 (base, captions padded "
    "to 32)",
    "MIM and MLM over images and captions alone are steps of their own in FLAVA, and not counted",
    "pre-norm text encoder; a layer in front of word and code heads; poolers, computed and not used",
    "images and words are masked as ours are, the paper masks 40 % of patches and 15 % of words: heads see what is "
    "masked, encoders cost the same",
    "equal images or captions of a batch count as negatives",
    "transformers picks masked rows by boolean indexing: the device is waited for several times a step",
)


def attend(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> Any:
    """FlavaSelfAttention's forward by torch's attention. Raises ValueError if the attention weights are asked for."""
    if output_attentions:
        raise ValueError("output_attentions must be off: fused attention has no weights to give.")
    parts = (self.query(hidden_states), self.key(hidden_states), self.value(hidden_states))
    q, k, v = (x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for x in parts)
    seen = None if attention_mask is None else attention_mask.to(q.dtype)
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2),)


def build(model: ModelConfig, vocabulary: int, codebook: bool, fused: bool = True) -> nn.Module:
    """FlavaForPreTraining of a config's sizes, with random weights. fused: attention by torch's fused form."""
    from transformers import FlavaConfig, FlavaForPreTraining
    from transformers.models.flava.modeling_flava import FlavaSelfAttention

    size: dict[str, Any] = {
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "initializer_range": model.initial_std,
    }
    image = {"image_size": model.image.size, "patch_size": model.image.patch, "vocab_size": CODES}
    text = {"vocab_size": vocabulary, "max_position_embeddings": model.text.max_tokens}
    config = FlavaConfig(
        image_config={**size, **image, "num_hidden_layers": model.image.depth},
        text_config={**size, **text, "num_hidden_layers": model.text.depth},
        multimodal_config={**size, "num_hidden_layers": 2 * model.cross_depth},
        hidden_size=model.width,
        projection_dim=model.projection,
        initializer_range=model.initial_std,
        init_codebook=codebook,
    )
    flava = FlavaForPreTraining(config).train()
    if codebook:
        flava.image_codebook.eval()
    for name, parameter in flava.named_parameters():
        if name.endswith(("cls_token", "mask_token", "image_model.embeddings.position_embeddings")):
            nn.init.normal_(parameter, std=model.initial_std)
    for module in flava.modules() if fused else ():
        if isinstance(module, FlavaSelfAttention):
            module.forward = partial(attend, module)
    return flava


@dataclass(frozen=True, eq=False)
class FlavaInputs:
    """What the model is called with, apart from pixels, which each step makes of the bytes.

    images uint8 [B, height, width, 3]; code_images float32 [B, 3, 8 rows, 8 columns] in 0..1; arguments: by name.
    """

    images: Tensor
    code_images: Tensor
    arguments: dict[str, Tensor]


def flava_inputs(plain: PlainInputs, model: ModelConfig, seed: int) -> FlavaInputs:
    """The pairs of a batch as FLAVA takes them; every tenth has the caption of the next."""
    images, (rows, columns) = plain.batch.images, model.image.grid
    pairs, device = len(images), images.device
    assert plain.masked_tokens_BL is not None and plain.token_masked_BL is not None
    assert plain.patch_masked_BN is not None
    other = torch.arange(pairs, device=device)
    swapped = (other % OTHER_CAPTION == 0) & (pairs > 1)
    other = torch.where(swapped, (other + 1) % pairs, other)
    tokens, chosen = plain.tokens_BL[other], plain.token_masked_BL[other]
    codes = torch.randint(CODES, (pairs, rows * columns), generator=torch.Generator().manual_seed(seed))
    shrunk = F.interpolate(
        images.permute(0, 3, 1, 2) / 255, (CODE_PIXELS * rows, CODE_PIXELS * columns), mode="bilinear", antialias=True
    )
    arguments = {
        "input_ids": tokens,
        "input_ids_masked": plain.masked_tokens_BL[other],
        "attention_mask": plain.real_BL[other].float(),
        "bool_masked_pos": plain.patch_masked_BN,
        "mlm_labels": torch.where(chosen, tokens, -100),
        "mim_labels": codes.to(device),
        "itm_labels": (~swapped).long(),
    }
    return FlavaInputs(images, shrunk, arguments)


def losses(flava: Any, inputs: FlavaInputs, model: ModelConfig) -> dict[str, Tensor]:
    """global_contrastive, itm, mmm_image and mmm_text, 0-d each. With a codebook the codes are computed."""
    arguments = dict(inputs.arguments)
    if flava.image_codebook is not None:
        del arguments["mim_labels"]
        with torch.no_grad():
            codes = flava.image_codebook.get_codebook_indices(inputs.code_images)
        arguments["mim_labels"] = codes.flatten(1)
    found = flava(pixel_values=normalised(inputs.images, model.image), **arguments).loss_info
    return {name: loss for name, loss in found.items() if loss is not None}


def make(
    config: Config,
    vocabulary: int,
    mask_id: int,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    codebook: bool = False,
) -> Step:
    """FLAVA's step over a batch; it is not charged for drawing its masks. codebook: codes are computed in the step.
    Raises ValueError if images or words are not masked."""
    if not (config.objectives.mim.weight and config.objectives.mlm.weight):
        raise ValueError("FLAVA masks both sides: objectives.mim.weight and objectives.mlm.weight must be above 0.")
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        flava = build(config.model, vocabulary, codebook)
    plain = plain_inputs(Sized(config, vocabulary, mask_id), batch, config.run.seed)
    inputs = flava_inputs(plain, config.model, config.run.seed)
    optimizer = build_optimizer(Decayed(flava), config.optim)
    return training_step(optimizer, lambda: losses(flava, inputs, config.model), None, config.optim.clip, device, dtype)


def needs_transformers(device: torch.device) -> str | None:
    """Why there is no FLAVA, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "FLAVA is transformers': pip install transformers"
    return None


PROVIDER = Provider(
    "FLAVA", "transformers' FLAVA at the same encoder sizes, codes given", make, DIFFERENCES, needs_transformers
)
WITH_CODEBOOK = Provider(
    "FLAVA, codebook",
    "the same, codes of images by DALL-E's encoder in the step",
    partial(make, codebook=True),
    DIFFERENCES,
    needs_transformers,
)
