"""The entries that evaluation uses, held against the plain graph, and what they do without a partner."""

from __future__ import annotations

import pytest
import torch
from mvle_kernels import Packed, patchify
from torch import Tensor

from benchmarks.peers.plain import Plain, padded
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_batch, make_config, make_model

MODES = (("replace", "cross"), ("drop", "cross"), ("drop", "decoder"))
LENGTHS = (3, 7, 5, 4)


def some_masks() -> Tensor:
    masked = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[2] = True
    masked[3] = False
    return masked


def masked_captions() -> tuple[Packed, Packed]:
    """Captions with mask tokens in place, and the rows of these."""
    text = make_batch(LENGTHS).text
    lengths = (1, 2, 0, 1)
    rows = [1, 4, 8, 16]
    tokens = text.rows.clone()
    tokens[rows] = MASK
    layout = Packed.layout_of(lengths, 8)
    return text.with_rows(tokens), layout.with_rows(torch.tensor([*rows, 0, 0, 0, 0], dtype=torch.int32))


@torch.no_grad()
def test_embeddings_are_unit_length_and_those_of_the_plain_graph() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    plain = Plain(model)
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.text)
    z_i, z_t = plain.embed(plain.image_encoder(batch.images)[0], plain.text_encoder(*padded(batch.text.unpack(), None)))
    assert torch.allclose(images.z, z_i, rtol=1e-10) and torch.allclose(texts.z, z_t, rtol=1e-10)
    assert torch.allclose(images.z.norm(dim=1), torch.ones(4).double())
    assert images.rows.lengths == (17,) * 4 and texts.rows.lengths == LENGTHS


@torch.no_grad()
def test_match_scores_any_choice_of_pairs_as_the_plain_graph_does() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    images, texts = model.encode_images(batch.images).rows, model.encode_texts(batch.text).rows
    i, t = torch.tensor([0, 3, 3, 1, 0]), torch.tensor([2, 0, 3, 1, 2])
    scores = model.match(images, texts, i, t)
    plain = Plain(model)
    tokens, real = padded(batch.text.unpack(), None)
    image, text = plain.image_encoder(batch.images)[0][i], plain.text_encoder(tokens, real)[t]
    g_i = plain.cross("image_cross", image, None, text, real[t])[:, 0]
    g_t = plain.cross("text_cross", text, real[t], image, None)[:, 0]
    logits = plain.linear("heads.match", g_i * g_t)
    assert torch.allclose(scores, logits[:, 1] - logits[:, 0], rtol=1e-9)
    assert torch.allclose(scores[0], scores[4], rtol=1e-12)  # the same pair; some CPUs round by the place in a batch


@torch.no_grad()
def test_fill_gives_the_words_of_the_plain_graph_at_the_asked_positions() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    text, positions = masked_captions()
    logits = model.fill(text, positions, batch.images)
    plain = Plain(model)
    tokens, real = padded(text.unpack(), None)
    rows = plain.cross("text_cross", plain.text_encoder(tokens, real), real, plain.image_encoder(batch.images)[0], None)
    everything = plain.linear("heads.tokens", rows)[..., :VOCABULARY]
    expected = everything[[0, 1, 1, 3], [1, 1, 5, 1]]
    assert logits.shape == (4, VOCABULARY) and logits.dtype == torch.float32
    assert torch.allclose(logits, expected.float(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fill_without_images_skips_cross_attention_as_a_model_does_that_was_trained_without() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    text, positions = masked_captions()
    plain = Plain(model)
    tokens, real = padded(text.unpack(), None)
    rows = plain.cross("text_cross", plain.text_encoder(tokens, real), real, None, None)
    expected = plain.linear("heads.tokens", rows)[..., :VOCABULARY][[0, 1, 1, 3], [1, 1, 5, 1]].float()

    alone = model.fill(text, positions, None)

    assert torch.allclose(alone, expected, rtol=1e-5, atol=1e-6)
    assert (alone - model.fill(text, positions, batch.images)).abs().amin(1).max() > 0
    unlearned = make_model(make_config(context="none"))
    assert torch.equal(unlearned.fill(text, positions, batch.images), alone)
    assert torch.equal(make_model(make_config(context="masked")).fill(text, positions, None), alone)


@pytest.mark.parametrize("per_patch", [False, True])
@pytest.mark.parametrize(("mode", "insert"), MODES)
@torch.no_grad()
def test_reconstruct_keeps_visible_pixels_and_predicts_the_masked_ones(mode: str, insert: str, per_patch: bool) -> None:
    model, batch, masked = make_model(make_config(mode, insert, per_patch=per_patch)), make_batch(LENGTHS), some_masks()
    rebuilt = model.reconstruct(batch.images, masked, batch.text)
    assert rebuilt.shape == (4, 16, 768) and rebuilt.dtype == torch.float32
    pixels = patchify(batch.images, 16, (0, 0, 0), (1, 1, 1))
    assert (rebuilt - pixels)[~masked].abs().max() < 1e-6
    expected = plain_pixels(model, batch.images, masked, batch.text)
    assert torch.allclose(rebuilt[masked], expected[masked].float(), rtol=1e-4, atol=1e-5)


def plain_pixels(model: MaskVLM, images: Tensor, masked: Tensor, text: Packed | None) -> Tensor:
    """Predictions of all patches in pixel units."""
    plain, config = Plain(model), model.config
    context = real = None
    if text is not None:
        tokens, real = padded(text.unpack(), None)
        context = plain.text_encoder(tokens, real)
    x, visible = plain.image_encoder(images, masked)
    if visible is not None and config.masking.insert == "cross":
        x, visible = plain.insert(x, masked), None
    x = plain.cross("image_cross", x, visible, context, real)
    if visible is not None:
        x = plain.insert(x, masked)
    predicted = plain.linear("heads.pixels", plain.cross("decoder", x, None, context, real)[:, 1:])
    image = config.model.image
    if config.objectives.mim.per_patch:
        target = plain.pixels(images)
        predicted = predicted * torch.sqrt(target.var(-1, keepdim=True) + 1e-6) + target.mean(-1, keepdim=True)
    scale, shift = (torch.tensor(v, dtype=torch.float64) for v in (image.std, image.mean))
    return (predicted.unflatten(-1, (-1, 3)) * scale + shift).flatten(-2)


@pytest.mark.parametrize(("mode", "insert"), MODES)
@torch.no_grad()
def test_reconstruct_without_captions_skips_cross_attention(mode: str, insert: str) -> None:
    model, batch, masked = make_model(make_config(mode, insert)), make_batch(LENGTHS), some_masks()

    alone = model.reconstruct(batch.images, masked, None)

    expected = plain_pixels(model, batch.images, masked, None)
    assert torch.allclose(alone[masked], expected[masked].float(), rtol=1e-4, atol=1e-5)
    captioned = model.reconstruct(batch.images, masked, batch.text)
    assert all((alone - captioned)[b][masked[b]].abs().max() > 1e-3 for b in range(3))
    unlearned = make_model(make_config(mode, insert, context="none"))
    assert torch.equal(unlearned.reconstruct(batch.images, masked, batch.text), alone)
    captions = batch.text.unpack()
    with pytest.raises(ValueError, match="got one of length 0. Without captions, text is None"):
        model.reconstruct(batch.images, masked, Packed.of([captions[0], captions[1][:0], *captions[2:]]))


def test_the_entries_of_evaluation_keep_no_graph() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    text, positions = masked_captions()
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.text)
    index = torch.arange(4)
    results = [
        images.z,
        texts.rows.rows,
        model.match(images.rows, texts.rows, index, index),
        model.fill(text, positions, batch.images),
        model.reconstruct(batch.images, some_masks(), batch.text),
    ]
    assert not any(r.requires_grad for r in results)
