"""model.image.pretrained and model.text.pretrained: the encoders compute what timm's ViT and transformers' RoBERTa
compute, at any grid and scale of pixels; everything of another architecture is refused by name.
Where they are read from: test_pretrained_sources.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mvle.config import ConfigError, load_config
from mvle.data.tokenizer import Tokenizer, train_bpe
from mvle.engine.first_weights import first_weights
from mvle.exporting.encoders import write_image_encoder, write_text_encoder
from mvle.model import pretrained, sources
from mvle.model.config import ModelConfig
from mvle.model.image_encoder import ImageEncoder
from mvle.model.pretrained import IMAGE_KEY, image_weights, refuse_image, text_weights
from mvle.model.sources import Facts, PretrainedError, Published
from mvle.model.text_encoder import TextEncoder

from .published import (
    HALF,
    WORDS,
    captions,
    image_encoder,
    image_rows,
    model_config,
    pictures,
    randomised,
    roberta,
    roberta_rows,
    text_encoder,
    vit,
    vit_rows,
)

# ---- the same outputs, both ways ------------------------------------------------------------------------------------


def test_base_equals_timms_vit_base_patch16_224_in_and_out(tmp_path: Path) -> None:
    import timm

    config = ModelConfig()
    theirs = vit(tmp_path / "in", **dict.fromkeys(("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio")))
    images = pictures(224)

    ours = image_encoder(config, tmp_path / "in")
    write_image_encoder(tmp_path / "out", config, ours)
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()  # strictly

    expected = vit_rows(theirs, images, HALF, HALF)
    assert expected.shape == (2, 197, 768) and expected.std() > 0.5
    torch.testing.assert_close(image_rows(ours, images), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(vit_rows(again, images, HALF, HALF), expected, rtol=0, atol=1e-4)


def test_base_equals_transformers_roberta_base_in_and_out_on_ragged_captions(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from transformers import RobertaModel

    config = ModelConfig()
    shape = {"vocab_size": 2000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    theirs = roberta(tmp_path / "in", **shape, intermediate_size=3072, max_position_embeddings=514)
    texts = captions((3, 32, 17, 4), 2000)

    ours = text_encoder(config, tmp_path / "in", 2000)
    write_text_encoder(tmp_path / "out", config, ours, tokenizer)
    again, report = RobertaModel.from_pretrained(tmp_path / "out", add_pooling_layer=False, output_loading_info=True)

    expected = roberta_rows(theirs, texts)
    assert not any(report.values()), report
    for whole in (ours(texts).unpack(), roberta_rows(again.eval(), texts)):
        for rows, wanted in zip(whole, expected, strict=True):
            torch.testing.assert_close(rows.detach(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_every_roberta_is_read_whatever_its_padding_id(kind: str, padding: int, tmp_path: Path) -> None:
    theirs = roberta(tmp_path, kind, pad_token_id=padding, max_position_embeddings=17 + padding)
    texts = captions((3, 16, 7), WORDS)
    for rows, wanted in zip(
        text_encoder(model_config(), tmp_path)(texts).unpack(), roberta_rows(theirs, texts), strict=True
    ):
        torch.testing.assert_close(rows.detach(), wanted, rtol=0, atol=1e-5)


def test_a_masked_language_model_gives_its_encoder_and_says_what_it_leaves(tmp_path: Path) -> None:
    import transformers

    whole = randomised(transformers.RobertaForMaskedLM(roberta().config))
    whole.save_pretrained(tmp_path)
    texts = captions((3, 16, 7), WORDS)
    encoder = text_encoder(model_config(), tmp_path)
    for rows, wanted in zip(encoder(texts).unpack(), roberta_rows(whole.roberta, texts), strict=True):
        torch.testing.assert_close(rows.detach(), wanted, rtol=0, atol=1e-5)
    assert set(text_weights(model_config(), str(tmp_path), WORDS, None).unused) >= {
        "lm_head.dense",
        "lm_head.layer_norm",
    }


def test_another_scale_of_pixels_is_folded_into_the_patch_embedding_and_said(tmp_path: Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = vit(tmp_path, pretrained_cfg_overlay={"mean": mean, "std": std})
    config = model_config(image={"mean": (0.1, 0.5, 0.3), "std": (0.2, 0.5, 0.4)})

    rows = image_rows(image_encoder(config, tmp_path), pictures(64))

    torch.testing.assert_close(rows, vit_rows(theirs, pictures(64), mean, std), rtol=0, atol=1e-4)
    (note,) = image_weights(config, str(tmp_path)).notes
    assert "model.image.mean=[0.485,0.456,0.406], std=[0.229,0.224,0.225]: folded" in note


def test_a_class_token_without_a_position_has_none_here(tmp_path: Path) -> None:
    theirs = vit(tmp_path, no_embed_class=True)
    rows = image_rows(image_encoder(model_config(), tmp_path), pictures(64))
    torch.testing.assert_close(rows, vit_rows(theirs, pictures(64), HALF, HALF), rtol=0, atol=1e-5)


# ---- other lengths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [224, 32])  # to 64 pixels: down and up
def test_positions_are_resampled_to_the_grid_of_the_config_and_said(source: int, tmp_path: Path) -> None:
    theirs = vit(tmp_path, img_size=source)
    given = image_weights(model_config(), str(tmp_path))

    grid = theirs.pos_embed[0, 1:].T.reshape(1, 32, source // 16, source // 16)
    wanted = F.interpolate(grid, size=(4, 4), mode="bilinear", antialias=True)[0].flatten(1).T
    found = given.values["image_encoder.positions"]
    assert torch.equal(found[0], theirs.pos_embed[0, 0])
    torch.testing.assert_close(found[1:], wanted, rtol=1e-5, atol=1e-6)
    side = source // 16
    assert f"positions resampled from {side}x{side} to 4x4" in given.notes


def test_the_same_grid_takes_positions_as_they_are(tmp_path: Path) -> None:
    theirs = vit(tmp_path)
    given = image_weights(model_config(), str(tmp_path))
    assert torch.equal(given.values["image_encoder.positions"], theirs.pos_embed[0]) and given.notes == ()
    assert given.unused == ("head",)


def test_what_the_source_lacks_keeps_its_own_first_values(tmp_path: Path) -> None:
    vit(tmp_path / "vit")
    roberta(tmp_path / "roberta")
    given = {**image_weights(model_config(), str(tmp_path / "vit")).values}
    given |= text_weights(model_config(), str(tmp_path / "roberta"), WORDS, None).values
    ours = {f"image_encoder.{n}" for n, _ in ImageEncoder(model_config(), 16).named_parameters()}
    ours |= {f"text_encoder.{n}" for n, _ in TextEncoder(model_config(), WORDS).named_parameters()}
    assert ours - given.keys() == {"image_encoder.mask_token"} and not given.keys() - ours


# ---- another architecture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 64}, "64 wide (model.width is 32)"),
        ({"depth": 3}, "3 blocks (model.image.depth is 2)"),
        ({"num_heads": 4}, "4 heads (model.heads is 2)"),
        ({"patch_size": 8}, "8 pixels a side of a patch (model.image.patch is 16)"),
        ({"mlp_ratio": 4.0}, "4 times as wide within a feed-forward layer (model.mlp_ratio is 2)"),
        ({"reg_tokens": 4}, "register tokens"),
        ({"init_values": 0.1}, "layer scale"),
        ({"qk_norm": True}, "normalised queries and keys"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"global_pool": "avg"}, "a norm behind the mean of its patches"),
        ({"pre_norm": True}, "a norm before its first block"),
        ({"pos_embed": "none"}, "no learned positions"),
        ({"qkv_bias": False}, "attention in another form, or without biases"),
        ({"act_layer": "quick_gelu"}, "another activation than GELU (QuickGELU"),
        ({"scale_mlp_norm": True}, "tensors that are not known here: blocks.*.mlp.norm"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "no plain pre-norm blocks (ResPostBlock)"),
        ({"img_size": (64, 32)}, "a grid of 4x2 patches, which is no square"),
    ],
)
def test_a_vit_of_another_architecture_is_refused_with_the_difference(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    vit(tmp_path, **arguments)
    with pytest.raises(PretrainedError) as error:
        image_weights(model_config(), str(tmp_path))
    assert message in str(error.value) and str(error.value).startswith(f"model.image.pretrained={tmp_path} is another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 64, "intermediate_size": 128}, "64 wide (model.width is 32)"),
        ({"num_hidden_layers": 3}, "3 blocks (model.text.depth is 2)"),
        ({"num_attention_heads": 4}, "4 heads (model.heads is 2)"),
        ({"intermediate_size": 128}, "4 times as wide within a feed-forward layer (model.mlp_ratio is 2)"),
        ({"layer_norm_eps": 1e-12}, "norms with eps 1e-12 (here 1e-05)"),
        ({"hidden_act": "gelu_new"}, "another activation than GELU (gelu_new)"),
        ({"is_decoder": True, "add_cross_attention": True}, "cross-attention"),
        ({"max_position_embeddings": 12}, "Set model.text.max_tokens=10 or less."),
        ({"kind": "Bert"}, "must be a RoBERTa (model_type roberta, xlm-roberta, camembert); got bert."),
        (
            {"kind": "RobertaPreLayerNorm"},
            "must be a RoBERTa (model_type roberta, xlm-roberta, camembert); got roberta-pre",
        ),
    ],
)
def test_a_text_encoder_of_another_architecture_is_refused_with_the_difference(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    roberta(tmp_path, **arguments)
    with pytest.raises(PretrainedError) as error:
        text_weights(model_config(), str(tmp_path), WORDS, None)
    assert message in str(error.value) and str(error.value).startswith(f"model.text.pretrained={tmp_path} ")


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    vit(tmp_path, depth=3, num_heads=4, reg_tokens=1)
    with pytest.raises(PretrainedError) as error:
        image_weights(model_config(), str(tmp_path))
    for part in ("3 blocks", "4 heads", "register tokens", "change the keys that are named"):
        assert part in str(error.value)


def test_other_norms_and_other_shapes_are_refused() -> None:
    tensors = vit().state_dict()
    with pytest.raises(PretrainedError, match=r"norms with eps 1e-05 \(here 1e-06\)"):
        refuse_image(model_config(), Published(IMAGE_KEY, "x", tensors, Facts(2, 1e-5)))
    tensors["blocks.1.attn.qkv.weight"] = tensors["blocks.1.attn.qkv.weight"][:64]
    with pytest.raises(PretrainedError, match=r"blocks.1.attn.qkv.weight of shape \(64, 32\) \(here \(96, 32\)\)"):
        refuse_image(model_config(), Published(IMAGE_KEY, "x", tensors, Facts(2, 1e-6)))


def test_positions_of_no_square_are_refused_where_nothing_says_which_grid_they_have() -> None:
    tensors = vit(img_size=(64, 48)).state_dict()
    with pytest.raises(PretrainedError, match="positions of 12 patches, which are no square"):
        refuse_image(model_config(), Published(IMAGE_KEY, "x", tensors))


def test_what_is_no_vit_is_refused(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet18", num_classes=2), tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(PretrainedError, match="must be a ViT .*; got a ResNet"):
        image_weights(model_config(), str(tmp_path / "resnet"))
    roberta(tmp_path / "roberta")
    with pytest.raises(PretrainedError, match="config.json must be one that timm saved; it is of roberta"):
        image_weights(model_config(), str(tmp_path / "roberta"))


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a red circle and a blue square"] * 5, 320)


def test_words_must_be_those_of_the_runs_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_bpe(["einer blauer Kreis"] * 5, 320)
    words = tokenizer.vocabulary
    folder = tokenizer.save(tmp_path / "roberta", max_tokens=16)
    roberta(folder, vocab_size=words)

    def same(run: Tokenizer) -> Any:
        return lambda name: run.same_words(Tokenizer.load(name))

    assert text_weights(model_config(), str(folder), words, same(tokenizer)).notes == ()
    with pytest.raises(PretrainedError, match=f"has other words .* tokenizer.name={folder}"):
        text_weights(model_config(), str(folder), other.vocabulary, same(other))


def test_embeddings_beyond_the_same_words_are_left_out_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = tokenizer.vocabulary
    folder = tokenizer.save(tmp_path / "roberta", max_tokens=16)
    theirs = roberta(folder, vocab_size=words + 6)
    given = text_weights(model_config(), str(folder), words, lambda name: True)
    assert torch.equal(given.values["text_encoder.words.weight"], theirs.embeddings.word_embeddings.weight[:words])
    assert given.notes == (f"6 word embeddings beyond the tokenizer's {words} left out",)


def test_a_source_without_tokenizer_must_have_as_many_words(tmp_path: Path) -> None:
    roberta(tmp_path)
    assert "only the number was compared" in text_weights(model_config(), str(tmp_path), WORDS, None).notes[0]
    for words in (49, 51):
        with pytest.raises(
            PretrainedError, match=f"of 50 words, and the run's tokenizer has {words} ids. Name the token"
        ):
            text_weights(model_config(), str(tmp_path), words, None)


# ---- the config -----------------------------------------------------------------------------------------------------


def test_init_from_and_pretrained_encoders_exclude_each_other_by_name() -> None:
    with pytest.raises(ConfigError, match="model.image.pretrained and model.text.pretrained: expected one of them"):
        load_config(None, ["model.init_from=a", "model.image.pretrained=b", "model.text.pretrained=c"])


def test_the_block_at_the_start_says_what_was_taken_and_what_was_drawn(tmp_path: Path) -> None:
    vit(tmp_path / "vit", img_size=32)
    roberta(tmp_path / "roberta")
    config = load_config(
        None,
        [
            f"model={json.dumps(model_config().model_dump(mode='json'))}",
            f"model.image.pretrained={tmp_path}/vit",
            f"model.text.pretrained={tmp_path}/roberta",
        ],
    )
    lines = "\n".join(first_weights(config, WORDS, 4).lines)
    for part in (
        f"model.image.pretrained={tmp_path}/vit: 30 of ",
        "    positions resampled from 2x2 to 4x4\n",
        "    not used: head\n",
        "    not used: pooler.dense\n",
        "drawn from run.seed: image_cross, text_cross, decoder, heads, image_encoder.mask_token",
    ):
        assert part in lines, lines


def test_reading_maps_the_file_into_memory(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "x.safetensors")
    assert torch.equal(
        load_file(tmp_path / "x.safetensors")["x"], sources.read_tensors("k", tmp_path / "x.safetensors")["x"]
    )
    assert pretrained.grouped(["a.0.b.weight", "a.1.b.bias", "c"]) == ["a.*.b", "c"]
