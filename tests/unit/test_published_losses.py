"""The losses of a whole step beside the formulas that others published, each written out here from the model's own
embeddings and predictions: contrast as in open_clip, masked pixels as in SimMIM and, normalised by patch, in MAE."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mvle_kernels import mask_of
from torch import Tensor

from mvle.data.batch import Batch
from mvle.model.model import MaskVLM
from mvle.model.queries import View

from ..helpers import make_batch, make_config, make_model

SEED, PATCH, SIDE = 5, 16, 4  # 64 pixels: a grid of 4 x 4 patches


def reported(model: MaskVLM, batch: Batch, name: str) -> Tensor:
    return model(batch, SEED, model.counts(batch)).report[name]


def test_contrast_is_open_clips_loss_where_no_image_or_caption_is_there_twice() -> None:
    model, batch = make_model(make_config(weights=(0, 0, 1, 0))), make_batch(equal_images=())
    image_features = model.encode_images(batch.images).z
    text_features = model.encode_texts(batch.text).z
    logit_scale = 1 / model.heads.temperature()

    # ClipLoss.forward, one process
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(batch))
    total_loss = (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2

    torch.testing.assert_close(reported(model, batch, "itc"), total_loss.detach(), rtol=1e-10, atol=0)


def predicted(model: MaskVLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """(predictions [B, N, X], 0 where nothing is masked; masked bool [B, N]) of a step."""
    seen: list[Tensor] = []
    hook = model.heads.pixels.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    model(batch, SEED, model.counts(batch))
    hook.remove()
    choices = model.choose(batch, SEED, frozenset({View.IMAGE_MASKED}))
    masked = mask_of(choices.masked, SIDE**2)
    whole = torch.zeros(len(batch), SIDE**2, 3 * PATCH**2, dtype=torch.float64)
    whole[masked] = seen[0][: int(masked.sum())]
    return whole, masked


def pixels(batch: Batch, model: MaskVLM) -> Tensor:
    """Normalised pictures as torchvision makes them, [B, 3, height, width]."""
    image = model.config.model.image
    x = batch.images.permute(0, 3, 1, 2).double() / 255
    return (x - torch.tensor(image.mean).view(3, 1, 1)) / torch.tensor(image.std).view(3, 1, 1)


def unpatchify(x: Tensor) -> Tensor:
    """MAE's: rows of (row, column, channel) -> [B, 3, height, width]."""
    x = x.reshape(len(x), SIDE, SIDE, PATCH, PATCH, 3)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 3, SIDE * PATCH, SIDE * PATCH)


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_masked_pixels_cost_what_simmim_says(mode: str) -> None:
    model, batch = make_model(make_config(mode, weights=(1, 0, 0, 0))), make_batch()
    predictions, masked = predicted(model, batch)
    x, x_rec = pixels(batch, model), unpatchify(predictions)

    # SimMIM.forward
    mask = masked.view(-1, SIDE, SIDE).long()
    mask = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).unsqueeze(1).contiguous()
    loss_recon = F.l1_loss(x, x_rec, reduction="none")
    loss = (loss_recon * mask).sum() / (mask.sum() + 1e-5) / 3

    torch.testing.assert_close(reported(model, batch, "mim"), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_masked_pixels_normalised_by_patch_cost_what_mae_says(mode: str) -> None:
    model, batch = make_model(make_config(mode, weights=(1, 0, 0, 0), kind="mse", per_patch=True)), make_batch()
    pred, masked = predicted(model, batch)
    imgs, mask = pixels(batch, model), masked.double()

    # MaskedAutoencoderViT.forward_loss, norm_pix_loss
    x = imgs.reshape(len(imgs), 3, SIDE, PATCH, SIDE, PATCH)
    target = torch.einsum("nchpwq->nhwpqc", x).reshape(len(imgs), SIDE**2, PATCH**2 * 3)
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = (pred - target) ** 2
    loss = loss.mean(dim=-1)
    loss = (loss * mask).sum() / mask.sum()

    torch.testing.assert_close(reported(model, batch, "mim"), loss, rtol=1e-6, atol=0)
