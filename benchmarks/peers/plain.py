"""The plain graph: MaskVLM as the paper says it, each pass on its own. Read it beside the paper.

Everything is padded to [B, L, D] with key padding masks, every word of the vocabulary is scored at every token, every
patch is predicted, and nothing is shared, pruned or packed. It reads the weights of a MaskVLM by name and computes with
torch alone; only the random choices (masks, hard negatives) come from the model's own code.

    E_i, E_t    image and text encoder             I, T     whole image and caption of a pair
    G_i, G_t    image and text cross encoder       I', T'   the same, masked
    D           image decoder                      G(x; c)  x reads its context c; g(.) takes the global row, row 0

    MIM   P = W_p D(G_i(E_i(I'); E_t(T)); E_t(T))            L = sum over masked patches of |P - I| / (masked patches X)
    MLM   p = softmax(W_w G_t(E_t(T'); E_i(I)))              L = mean over masked tokens of -log p(token)
          (`masking.context` masked: MIM reads E_t(T') and MLM E_i(I'); none: their blocks have no cross-attention)
    ITC   s_ab = cos(P_i g(E_i(I_a)), P_t g(E_t(T_b))) / tau
          L = mean over the 2 B rows and columns of s of -log softmax(s)_aa, equal images or captions left out
    ITM   m(I, T) = softmax(W_m [g(G_i(E_i(I); E_t(T))) * g(G_t(E_t(T); E_i(I)))])
          L = mean of -log m(I_a, T_a)[1], -log m(I_neg(a), T_a)[0], -log m(I_a, T_neg(a))[0]

Mask modes. `replace`: a masked patch is a learned token with its position before E_i. `drop`: E_i reads the visible
patches alone, and mask tokens enter before G_i (`masking.insert` cross) or between G_i and D (decoder).

Two approximations. With `masking.clean_keep` below 1, E_i(I) reads some of the patches of I alone while the model
trains. Images smaller than the model's (`schedule.resolution`) have fewer patches, and positions resampled to them.

    losses = plain_losses(model, batch, seed)              dict of 0-d means, ready for backward
    Plain(model).losses(plain_inputs(model, batch, seed))  the same in two parts: a benchmark times the second
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mvle.data.batch import Batch
from mvle.model.model import MaskVLM
from mvle.model.step import Choices, Step, choose_clean_patches, choose_image_masks, choose_token_masks
from mvle.objectives.itm import draw_negatives

Negatives = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PlainInputs:
    """One batch, padded, with its masks: what every plain pass reads. Masks are True where masked; clean_left_out_BN is
    True where the clean image goes without a patch, None where it is whole.

    most_visible, most_shown: patches of the masked and of the clean image that shows most of them (so that no pass
    waits for the device to learn it)
    """

    batch: Batch
    seed: int
    tokens_BL: Tensor
    real_BL: Tensor
    masked_tokens_BL: Tensor | None
    token_masked_BL: Tensor | None
    patch_masked_BN: Tensor | None
    most_visible: int | None
    clean_left_out_BN: Tensor | None = None
    most_shown: int | None = None


class Masking(Protocol):
    """What masks depend on; a MaskVLM has it."""

    config: Any
    vocabulary: int
    mask_id: int
    training: bool


def plain_inputs(model: Masking, batch: Batch, seed: int, length: int | None = None) -> PlainInputs:
    """Pad the captions of a batch to `length` tokens (None: the longest) and draw the masks that the model would."""
    config = model.config
    kinds, N = config.objectives, patches_of(model, batch.images)
    tokens_BL, real_BL = padded(batch.text.unpack(), length)
    patch_masked_BN = masked_tokens_BL = token_masked_BL = clean_left_out_BN = most_visible = most_shown = None
    both = config.masking.context == "masked" and kinds.mim.weight + kinds.mlm.weight > 0  # each reads the other's
    if kinds.mim.weight or both:
        _, masked = choose_image_masks(batch, seed, config.masking, config.model.image, 1)
        patch_masked_BN = torch.zeros(len(batch), N, dtype=torch.bool, device=batch.images.device)
        for b, patches in enumerate(masked.unpack()):
            patch_masked_BN[b, patches.long()] = True
        most_visible = int((~patch_masked_BN).sum(1).max())
    if kinds.mlm.weight or both:
        tokens, _, within, _ = choose_token_masks(batch, seed, config.masking, model.mask_id, model.vocabulary, 1)
        masked_tokens_BL, _ = padded(tokens.unpack(), length)
        token_masked_BL = torch.zeros_like(real_BL)
        for b, positions in enumerate(within.unpack()):
            token_masked_BL[b, positions.long()] = True
    if config.masking.clean_keep < 1 and model.training:
        shown = choose_clean_patches(batch, seed, config.masking, config.model.image, 1)
        clean_left_out_BN = torch.ones(len(batch), N, dtype=torch.bool, device=batch.images.device)
        for b, patches in enumerate(shown.unpack()):
            clean_left_out_BN[b, patches.long()] = False
        most_shown = int((~clean_left_out_BN).sum(1).max())
    masks = (masked_tokens_BL, token_masked_BL, patch_masked_BN, most_visible, clean_left_out_BN, most_shown)
    return PlainInputs(batch, seed, tokens_BL, real_BL, *masks)


def plain_losses(model: MaskVLM, batch: Batch, seed: int, negatives: Negatives | None = None) -> dict[str, Tensor]:
    """The mean of each loss that the model's config trains, by name, with gradient to the model's parameters.

    negatives: (other image for each caption int [B], other caption for each image int [B], valid bool [B]); None draws
    them as the model does.
    """
    return Plain(model).losses(plain_inputs(model, batch, seed), negatives)


def padded(captions: list[Tensor], length: int | None) -> tuple[Tensor, Tensor]:
    """Captions of different lengths -> (token ids int64 [B, L], real bool [B, L])."""
    L = max(len(c) for c in captions) if length is None else length
    tokens = torch.stack([F.pad(c.long(), (0, L - len(c))) for c in captions])
    lengths = torch.tensor([len(c) for c in captions], device=tokens.device)
    return tokens, torch.arange(L, device=tokens.device) < lengths[:, None]


def patches_of(model: Masking, images: Tensor) -> int:
    """Patches of an image."""
    return (images.shape[1] // model.config.model.image.patch) ** 2


class Plain:
    """The passes of the paper over a MaskVLM's weights."""

    def __init__(self, model: MaskVLM) -> None:
        self.weights: Mapping[str, Tensor] = dict(model.named_parameters())
        self.config, self.vocabulary = model.config, model.vocabulary

    # ---- layers -----------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def attention(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, real_BL: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(E)) V a head, keys of the padding hidden."""
        heads = self.config.model.heads
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BLD, k_BLD, v_BLD))
        seen = None if real_BL is None else real_BL[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)

    def self_attention(self, name: str, x: Tensor, real_BL: Tensor | None) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        return self.linear(f"{name}.proj", self.attention(q, k, v, real_BL))

    def cross_attention(self, stage: str, i: int, x: Tensor, context: Tensor, context_real: Tensor | None) -> Tensor:
        """Block i of a stage has rows [2 i D, 2 (i + 1) D) of the stage's key and value weights."""
        D, name = x.shape[-1], f"{stage}.blocks.{i}.cross"
        weight = self.weights[f"{stage}.context.kv.weight"][2 * i * D : 2 * (i + 1) * D]
        bias = self.weights[f"{stage}.context.kv.bias"][2 * i * D : 2 * (i + 1) * D]
        k, v = F.linear(context, weight, bias).chunk(2, -1)
        return self.linear(f"{name}.proj", self.attention(self.linear(f"{name}.query", x), k, v, context_real))

    # ---- blocks -----------------------------------------------------------------------------------------------------

    def image_block(self, name: str, x: Tensor, real: Tensor | None) -> Tensor:
        """Pre-norm: self-attention, feed-forward."""
        x = x + self.self_attention(f"{name}.attn", self.norm(f"{name}.norm1", x, 1e-6), real)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-6))

    def text_block(self, name: str, x: Tensor, real_BL: Tensor) -> Tensor:
        """Post-norm: self-attention, feed-forward."""
        x = self.norm(f"{name}.norm1", x + self.self_attention(f"{name}.attn", x, real_BL), 1e-5)
        return self.norm(f"{name}.norm2", x + self.mlp(f"{name}.mlp", x), 1e-5)

    def cross_block(
        self, stage: str, i: int, x: Tensor, real: Tensor | None, context: Tensor | None, context_real: Tensor | None
    ) -> Tensor:
        """Pre-norm: self-attention, cross-attention (if there is a context), feed-forward."""
        name = f"{stage}.blocks.{i}"
        x = x + self.self_attention(f"{name}.attn", self.norm(f"{name}.norm1", x, 1e-6), real)
        if context is not None:
            x = x + self.cross_attention(stage, i, self.norm(f"{name}.norm2", x, 1e-6), context, context_real)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm3", x, 1e-6))

    # ---- encoders ---------------------------------------------------------------------------------------------------

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [B, height, width, 3] -> normalised patches [B, N, X], values ordered (row, column, channel)."""
        image = self.config.model.image
        B, p, rows, columns = len(images), image.patch, images.shape[1] // image.patch, images.shape[2] // image.patch
        x = images.to(self.weights["heads.pixels.weight"].dtype) / 255
        x = (x - x.new_tensor(image.mean)) / x.new_tensor(image.std)
        return x.reshape(B, rows, p, columns, p, 3).permute(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, p * p * 3)

    def positions(self, name: str, patches: int) -> Tensor:
        """Of the class token and so many patches in a square, [1 + N, D]: resampled as smaller pixels would be."""
        weight, (rows, columns) = self.weights[name], self.config.model.image.grid
        if patches == rows * columns:
            return weight
        grid = weight[1:].T.reshape(1, -1, rows, columns)
        small = F.interpolate(grid, size=(isqrt(patches),) * 2, mode="bilinear", antialias=True)
        return torch.cat([weight[:1], small.flatten(2)[0].T])

    def image_encoder(
        self,
        images: Tensor,
        masked_BN: Tensor | None = None,
        left_out_BN: Tensor | None = None,
        most_visible: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(rows [B, 1 + N, D], None), or where patches are left out, which drop mode does with masked ones, (rows
        [B, 1 + V, D] of the others, which are real).

        most_visible: V, patches of the image that shows most of them; None: they are counted.
        """
        w, name = self.weights, "image_encoder"
        x = self.linear(f"{name}.patch_embed", self.pixels(images))
        positions, real = self.positions(f"{name}.positions", x.shape[1]), None
        x = x + positions[1:]
        if masked_BN is not None and self.config.masking.mode == "replace":
            x = torch.where(masked_BN[..., None], w[f"{name}.mask_token"] + positions[1:], x)
        elif masked_BN is not None:
            left_out_BN = masked_BN
        if left_out_BN is not None:
            V = int((~left_out_BN).sum(1).max()) if most_visible is None else most_visible
            visible_BV = left_out_BN.byte().argsort(dim=1, stable=True)[:, :V]  # in order; then others, as padding
            x = x.gather(1, visible_BV[..., None].expand(-1, -1, x.shape[-1]))
            real = F.pad(~left_out_BN.gather(1, visible_BV), (1, 0), value=True)
        first = (w[f"{name}.class_token"] + positions[0]).expand(len(x), 1, -1)
        x = torch.cat([first, x], 1)
        for i in range(self.config.model.image.depth):
            x = self.image_block(f"{name}.blocks.{i}", x, real)
        return self.norm(f"{name}.norm", x, 1e-6), real

    def text_encoder(self, tokens_BL: Tensor, real_BL: Tensor) -> Tensor:
        """Token ids -> rows [B, L, D]; row 0, the bos token, is the global one."""
        w, name = self.weights, "text_encoder"
        x = F.embedding(tokens_BL, w[f"{name}.words.weight"]) + w[f"{name}.positions"][: tokens_BL.shape[1]]
        x = self.norm(f"{name}.norm", x, 1e-5)
        for i in range(self.config.model.text.depth):
            x = self.text_block(f"{name}.blocks.{i}", x, real_BL)
        return x

    # ---- cross encoders and decoder ---------------------------------------------------------------------------------

    def cross(
        self, stage: str, x: Tensor, real: Tensor | None, context: Tensor | None, context_real: Tensor | None
    ) -> Tensor:
        """G_i, G_t or D: rows [B, L, D] that read the other side's rows [B, L', D], or nothing, in every block."""
        depth = self.config.model.decoder_depth if stage == "decoder" else self.config.model.cross_depth
        for i in range(depth):
            x = self.cross_block(stage, i, x, real, context, context_real)
        return self.norm(f"{stage}.norm", x, 1e-6)

    def insert(self, x: Tensor, masked_BN: Tensor) -> Tensor:
        """Class and visible rows [B, 1 + V, D] -> [B, 1 + N, D], mask tokens with their positions at masked patches."""
        tokens = self.weights["insert_token"] + self.positions("insert_positions", masked_BN.shape[1])[1:]
        row_BN = (~masked_BN).cumsum(1)  # of x, behind the class, that is the patch if it is visible
        patches = x.gather(1, row_BN[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], torch.where(masked_BN[..., None], tokens, patches)], 1)

    # ---- losses -----------------------------------------------------------------------------------------------------

    def mim(self, inputs: PlainInputs, text: Tensor | None) -> Tensor:
        """The masked image through its encoder, cross encoder and decoder. text: the caption that it reads."""
        images, masked_BN, masking = inputs.batch.images, inputs.patch_masked_BN, self.config.masking
        assert masked_BN is not None
        x, real = self.image_encoder(images, masked_BN, None, inputs.most_visible)
        if real is not None and masking.insert == "cross":
            x, real = self.insert(x, masked_BN), None
        x = self.cross("image_cross", x, real, text, inputs.real_BL)
        if real is not None:
            x = self.insert(x, masked_BN)
        x = self.cross("decoder", x, None, text, inputs.real_BL)
        return self.pixel_loss(x[:, 1:], images, masked_BN)

    def pixel_loss(self, x: Tensor, images: Tensor, masked_BN: Tensor) -> Tensor:
        """Mean distance of predicted and true pixels over masked patches; rows [B, N, D]."""
        predicted, target = self.linear("heads.pixels", x), self.pixels(images)
        kind = self.config.objectives.mim
        if kind.per_patch:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / torch.sqrt(variance + 1e-6)
        d = predicted - target
        distance = {"l1": d.abs(), "mse": d.square(), "l1+mse": d.abs() + d.square()}[kind.kind]
        return (distance * masked_BN[..., None]).sum() / (masked_BN.sum() * d.shape[-1])

    def mlm(self, inputs: PlainInputs, image: Tensor | None, image_real: Tensor | None) -> Tensor:
        """The masked caption through its encoder and cross encoder. image: what it reads."""
        tokens, chosen = inputs.masked_tokens_BL, inputs.token_masked_BL
        assert tokens is not None and chosen is not None
        x = self.cross("text_cross", self.text_encoder(tokens, inputs.real_BL), inputs.real_BL, image, image_real)
        return self.word_loss(x, inputs.tokens_BL, chosen)

    def word_loss(self, x: Tensor, true_BL: Tensor, chosen: Tensor) -> Tensor:
        """Mean -log p of the true word over masked tokens; rows [B, L, D]."""
        logits = self.linear("heads.tokens", x)[..., : self.vocabulary]
        loss = F.cross_entropy(logits.flatten(0, 1), true_BL.flatten(), reduction="none")
        return (loss * chosen.flatten()).sum() / chosen.sum().clamp(min=1)

    def embed(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the two global rows, [B, d] each."""
        z_i = self.linear("heads.image_projection", image[:, 0])
        z_t = self.linear("heads.text_projection", text[:, 0])
        return z_i / z_i.norm(dim=1, keepdim=True), z_t / z_t.norm(dim=1, keepdim=True)

    def itc(self, batch: Batch, z_i: Tensor, z_t: Tensor) -> Tensor:
        """Mean over both directions of -log softmax of the pair's own similarity."""
        own = torch.eye(len(batch), dtype=torch.bool, device=z_i.device)
        equal = batch.image_ids[:, None] == batch.image_ids
        equal |= batch.text_ids[:, None] == batch.text_ids
        s = (z_i @ z_t.T / self.weights["heads.temperature.log_value"].exp()).masked_fill(equal & ~own, -torch.inf)
        return -(s.log_softmax(1).diagonal().mean() + s.log_softmax(0).diagonal().mean()) / 2

    def itm(self, inputs: PlainInputs, image: Tensor, text: Tensor, negatives: Negatives) -> Tensor:
        """Mean cross-entropy of: the pair itself, its caption with another image, its image with another caption."""
        other_image, other_text, valid = (n.long() if n.dtype != torch.bool else n for n in negatives)
        real, everyone = inputs.real_BL, torch.ones_like(valid)
        questions = (
            (image, text, real, 1, everyone),
            (image[other_image], text, real, 0, valid),
            (image, text[other_text], real[other_text], 0, valid),
        )
        total, asked = image.new_zeros(()), torch.zeros_like(valid[0], dtype=torch.long)
        for i, t, t_real, label, counted in questions:
            g_i = self.cross("image_cross", i, None, t, t_real)[:, 0]
            g_t = self.cross("text_cross", t, t_real, i, None)[:, 0]
            logits = self.linear("heads.match", g_i * g_t)
            loss = F.cross_entropy(logits, torch.full_like(counted, label, dtype=torch.long), reduction="none")
            total, asked = total + (loss * counted).sum(), asked + counted.sum()
        return total / asked

    def masked_text(self, inputs: PlainInputs) -> Tensor | None:
        """What MIM reads of a caption that is masked too; None: nothing."""
        if self.config.masking.context == "none":
            return None
        assert inputs.masked_tokens_BL is not None
        return self.text_encoder(inputs.masked_tokens_BL, inputs.real_BL)

    def masked_image(self, inputs: PlainInputs) -> tuple[Tensor | None, Tensor | None]:
        """The same of an image, and which of its rows are real; (None, None): nothing."""
        if self.config.masking.context == "none":
            return None, None
        return self.image_encoder(inputs.batch.images, inputs.patch_masked_BN, None, inputs.most_visible)

    def losses(self, inputs: PlainInputs, negatives: Negatives | None = None) -> dict[str, Tensor]:
        """Every loss with a weight above 0, by name."""
        batch, kinds, context = inputs.batch, self.config.objectives, self.config.masking.context
        aligned = kinds.itc.weight or kinds.itm.weight
        losses = {}
        if aligned or (kinds.mim.weight and context == "clean"):
            text = self.text_encoder(inputs.tokens_BL, inputs.real_BL)
        if aligned or (kinds.mlm.weight and context == "clean"):
            image, _ = self.image_encoder(
                batch.images, None, inputs.clean_left_out_BN, inputs.most_shown
            )  # equally many rows, all real
        if kinds.mim.weight:
            losses["mim"] = self.mim(inputs, text if context == "clean" else self.masked_text(inputs))
        if kinds.mlm.weight:
            losses["mlm"] = self.mlm(inputs, *((image, None) if context == "clean" else self.masked_image(inputs)))
        if not aligned:
            return losses
        step = Step(batch, inputs.seed, 1, Choices())
        if kinds.itc.weight:
            step.image_z, step.text_z = self.embed(image, text)
            step.temperature = self.weights["heads.temperature.log_value"].exp()
            losses["itc"] = self.itc(batch, step.image_z, step.text_z)
        if kinds.itm.weight:
            if negatives is None:
                other_image, other_text, valid = draw_negatives(step, kinds.itm.group)
                negatives = (other_image.index, other_text.index, valid)
            losses["itm"] = self.itm(inputs, image, text, negatives)
        return losses
