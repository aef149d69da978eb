"""model.image.pretrained and model.text.pretrained: the encoders compute what timm's ViT and transformers' RoBERTa
compute, at any grid and scale of pixels; everything of another architecture is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import time
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
from mvle.hub import HubError
from mvle.model import pretrained, sources
from mvle.model.config import ModelConfig
from mvle.model.image_encoder import ImageEncoder
from mvle.model.pretrained import IMAGE_KEY, TEXT_KEY, image_weights, refuse_image, text_weights
from mvle.model.sources import Facts, PretrainedError, Published, published_image, published_text
from mvle.model.text_encoder import TextEncoder

from .published import captions, image_rows, load, pictures, randomised, roberta, roberta_rows, vit, vit_rows

HALF = (0.5, 0.5, 0.5)
WORDS = 50


def model_config(**values: Any) -> ModelConfig:
    """Of the shape that `vit` and `roberta` have."""
    image = {"size": 64, "depth": 2, **values.pop("image", {})}
    text = {"depth": 2, "max_tokens": 16, **values.pop("text", {})}
    return ModelConfig.model_validate(
        {"width": 32, "heads": 2, "mlp_ratio": 2.0, "image": image, "text": text, **values}
    )


def image_encoder(config: ModelConfig, name: str | Path) -> ImageEncoder:
    return load(ImageEncoder(config, 16), image_weights(config, str(name)).values, "image_encoder.")


def text_encoder(config: ModelConfig, name: str | Path, words: int = WORDS) -> TextEncoder:
    return load(TextEncoder(config, words), text_weights(config, str(name), words, None).values, "text_encoder.")


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


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "old.bin", "vit.pth", "nested.pt"])
def test_a_file_of_tensors_is_read_and_says_what_it_cannot_say(form: str, tmp_path: Path) -> None:
    theirs = vit(num_classes=0)
    path = tmp_path / form
    state = theirs.state_dict()
    if form.endswith(".safetensors"):
        save_file(state, path)
    else:
        whole = {"model": state, "epoch": 3} if form.startswith("nested") else state
        torch.save(whole, path, _use_new_zipfile_serialization=not form.startswith("old"))

    given = image_weights(model_config(), str(path))

    encoder = load(ImageEncoder(model_config(), 16), given.values, "image_encoder.")
    expected = vit_rows(theirs, pictures(64), HALF, HALF)
    torch.testing.assert_close(image_rows(encoder, pictures(64)), expected, rtol=0, atol=1e-5)
    assert "a file says neither heads" in given.notes[0]


def test_a_bare_file_of_a_bert_is_not_taken_for_a_roberta(tmp_path: Path) -> None:
    save_file(roberta(kind="Bert", type_vocab_size=2).state_dict(), tmp_path / "bert.safetensors")
    with pytest.raises(PretrainedError, match="must be a RoBERTa: .* got nothing and 2 types"):
        text_weights(model_config(), str(tmp_path / "bert.safetensors"), WORDS, None)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_but_tensors_is_unpickled(
    nested: bool, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    whole = {"model": vit().state_dict(), "arguments": Harmful()} if nested else Harmful()
    torch.save(whole, tmp_path / "bad.bin", _use_new_zipfile_serialization=zipped)
    roberta(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    shutil.copy(tmp_path / "bad.bin", tmp_path / "folder" / "pytorch_model.bin")

    for read in (
        lambda: image_weights(model_config(), str(tmp_path / "bad.bin")),
        lambda: text_weights(model_config(), str(tmp_path / "folder"), WORDS, None),
    ):
        with pytest.raises(PretrainedError, match="is refused: it holds more than tensors"):
            read()
    assert not (tmp_path / "harm").exists()


def test_the_config_of_a_folder_may_name_no_further_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    torch.save(Harmful(), tmp_path / "bad.pth")
    vit(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["model_args"] |= {"pretrained": True, "checkpoint_path": str(tmp_path / "bad.pth")}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    assert len(image_weights(model_config(), str(tmp_path / "vit")).values) == 30
    assert not (tmp_path / "harm").exists()


def test_a_path_that_is_not_there_or_holds_something_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "text.bin").write_text("no weights")
    for name, message in (
        ("gone.safetensors", "there is no such file"),
        ("gone", "there is no such folder"),
        ("empty", "must hold config.json and model.safetensors or pytorch_model.bin; it holds nothing"),
        ("cut.safetensors", "cannot be read"),
        ("text.bin", "is refused|cannot be read"),
    ):
        for key, read in ((IMAGE_KEY, lambda n: image_weights(model_config(), n)), (TEXT_KEY, read_text)):
            with pytest.raises(PretrainedError, match=f"{key}.*({message})"):
                read(str(tmp_path / name))


def read_text(name: str) -> Any:
    return text_weights(model_config(), name, WORDS, None)


# ---- names ----------------------------------------------------------------------------------------------------------

NAME = "vit_tiny_patch16_224.augreg_in21k"


def test_a_timm_name_is_fetched_from_its_repository_and_loaded_by_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    theirs = randomised(timm.create_model(NAME, weight_init="skip"))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    asked = []

    def fetch(repository: str, *wanted: Any) -> list[Path]:
        asked.append((repository, wanted))
        return [tmp_path / "weights.safetensors"]

    monkeypatch.setattr(sources, "fetch", fetch)
    config = ModelConfig(width=192, heads=3)

    rows = image_rows(image_encoder(config, NAME), pictures(224))

    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k", (("model.safetensors", "pytorch_model.bin"),))]
    torch.testing.assert_close(rows, vit_rows(theirs, pictures(224), HALF, HALF), rtol=0, atol=1e-4)


def test_a_vit_of_another_shape_is_refused_before_its_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("asked the hub"))
    for name, message in ((NAME, "192 wide"), ("vit_base_patch16_clip_224.openai", "norm before its first block")):
        with pytest.raises(PretrainedError, match=f"{name} is another architecture(.|\n)*{message}"):
            image_weights(ModelConfig(), name)


def test_a_name_that_timm_does_not_know_is_said_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PretrainedError, match="timm does not know that name.* Did you mean vit_base_patch16_224"):
        image_weights(ModelConfig(), "vit_base_patch16_224.augreg_in21")


def test_a_roberta_by_name_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roberta(tmp_path)
    names = []

    def fetch(repository: str, *wanted: tuple[str, ...]) -> list[Path]:
        names.append((repository, *wanted))
        return [tmp_path / options[0] for options in wanted]

    monkeypatch.setattr(sources, "fetch", fetch)
    found = published_text(TEXT_KEY, "roberta-base")
    assert names == [
        ("roberta-base", ("config.json",)),
        ("roberta-base", ("model.safetensors", "pytorch_model.bin")),
    ]
    assert found.tokenizer == "roberta-base" and found.facts is not None and found.facts.heads == 2


def test_without_a_network_the_key_and_the_ways_out_are_named_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvle.hub.reachable", lambda host, port: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    for key, read, name in (
        (IMAGE_KEY, lambda n: published_image(IMAGE_KEY, n, lambda shown: None), NAME),
        (TEXT_KEY, lambda n: published_text(TEXT_KEY, n), "roberta-base"),
    ):
        with pytest.raises(PretrainedError) as error:
            read(name)
        for part in (f"{key}={name} cannot be had. Tried the local cache and ", f"{key}=PATH", f"{key}=null"):
            assert part in str(error.value)
    assert time.perf_counter() - started < 20


def test_the_hub_is_asked_for_the_second_name_where_the_first_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from mvle import hub

    asked = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if name == "a":
            raise EntryNotFoundError("no such file")
        return f"/cache/{name}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "reachable", lambda host, port: True)
    monkeypatch.setattr(hub, "offline", lambda: False)
    assert hub.fetch("some/where", ("a", "b")) == [Path("/cache/b")]
    assert asked == [("a", True), ("b", True), ("a", False), ("b", False)]
    monkeypatch.setattr(hub, "offline", lambda: True)
    with pytest.raises(HubError, match="Tried the local cache: not in the cache"):
        hub.fetch("some/where", ("a", "b"))


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
