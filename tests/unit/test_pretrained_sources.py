"""Where model.image.pretrained and model.text.pretrained are read from: files, of which only tensors are unpickled, and
names that timm and the hub know."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mvle.hub import HubError
from mvle.model import sources
from mvle.model.config import ModelConfig
from mvle.model.image_encoder import ImageEncoder
from mvle.model.pretrained import IMAGE_KEY, TEXT_KEY, image_weights, text_weights
from mvle.model.sources import PretrainedError, published_image, published_text

from .published import (
    HALF,
    WORDS,
    image_encoder,
    image_rows,
    load,
    model_config,
    pictures,
    randomised,
    roberta,
    vit,
    vit_rows,
)

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
