"""model.init_from: weights of another run or of an export, whatever fits; and first weights in a whole run, which needs
their source no more once it has a checkpoint."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvle import export
from mvle.config import Config
from mvle.data.tokenizer import Tokenizer, train_bpe
from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.checkpoint_files import find_latest
from mvle.engine.checkpoint_tensors import read_weights
from mvle.engine.ema import Ema
from mvle.engine.errors import RunError
from mvle.engine.first_weights import FirstWeights, first_weights
from mvle.engine.parallel import Parallel
from mvle.engine.run import RunFolder
from mvle.inference import open_run
from mvle.model.image_encoder import resample_positions
from mvle.model.model import MaskVLM
from mvle.model.sources import PretrainedError
from mvle.train import FINISHED, UNUSABLE, main

from .published import image_rows, pictures, randomised, roberta, vit
from .small_run import small_config, small_run
from .test_checkpoint_safety import Runs, replace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose every parameter is another than a drawn one."""
    run = small_run(tmp_path_factory.mktemp("first") / "run", objectives={"itm": {"group": 4}})
    opened = open_run(run.path)
    model = randomised(opened.model, 5).requires_grad_()
    model.heads.temperature.log_value.data.fill_(-2.0)
    save(run, model)
    return run


def save(run: RunFolder, model: torch.nn.Module, ema: Any = None) -> None:
    checkpoints = Checkpointer(run.checkpoints, CheckpointConfig(), Parallel(0, 1, torch.device("cpu")))
    checkpoints.save(9, model, torch.optim.AdamW(model.parameters()), {"pairs_seen": 72}, ema)


def new_config(run: RunFolder, **sections: Any) -> Config:
    """Of the same shape, with changes."""
    model = small_config(run.path).model.model_dump(mode="json")
    for key, value in sections.pop("model", {}).items():
        model[key] = {**model[key], **value} if isinstance(value, dict) else value
    return small_config(run.path, "runs/new", model={**model, "init_from": str(run.path)}, **sections)


def words_of(run: RunFolder) -> Tokenizer:
    return Tokenizer.load(run.tokenizer)


def start(config: Config, tokenizer: Tokenizer) -> tuple[FirstWeights, MaskVLM, dict[str, Tensor]]:
    """(what is given, the model with it, and with weights drawn alone)."""
    sizes = tokenizer.vocabulary, tokenizer.mask_id
    first = first_weights(config, *sizes, tokenizer)
    model, drawn = MaskVLM(config, *sizes), MaskVLM(config, *sizes)
    model.init_weights(0, first.values)
    drawn.init_weights(0)
    return first, model.requires_grad_(False), dict(drawn.requires_grad_(False).named_parameters())


# ---- what is taken --------------------------------------------------------------------------------------------------


def test_a_run_of_the_same_config_starts_with_every_weight_of_the_other(run: RunFolder) -> None:
    first, model, _ = start(new_config(run), words_of(run))
    theirs = read_weights(find_latest(run.checkpoints))
    assert {name for name, _ in model.named_parameters()} == theirs.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert first.lines == (
        f"model.init_from={run.path} at step 9 (weights as trained): {len(theirs)} of {len(theirs)} parameters",
        "drawn from run.seed: nothing",
    )


def test_an_export_gives_what_its_run_gives(run: RunFolder, tmp_path: Path) -> None:
    assert export.main([str(run.path), "--output", str(tmp_path / "out")]) == 0
    config = new_config(run, model={})
    config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": str(tmp_path / "out")})})
    first, _, _ = start(config, words_of(run))
    theirs = read_weights(find_latest(run.checkpoints))
    assert first.values.keys() == theirs.keys()
    assert all(torch.equal(first.values[name], value) for name, value in theirs.items())


def test_the_average_is_taken_where_the_run_keeps_one_and_said(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    averaged = RunFolder(tmp_path / "run")
    model = open_run(averaged.path).model.requires_grad_()
    ema = Ema(model, 0.9)
    for shadow in ema.tensors().values():
        shadow.data.add_(0.01)
    save(averaged, model, ema)
    first, _, _ = start(new_config(averaged), words_of(run))
    assert "(EMA of the weights)" in first.lines[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first.values[name], parameter.detach() + 0.01, rtol=0, atol=1e-6)


def test_another_resolution_and_drop_resample_positions_and_draw_what_is_new(run: RunFolder) -> None:
    config = new_config(run, model={"image": {"size": 96}}, masking={"cell": 16, "mode": "drop"})
    first, model, drawn = start(config, words_of(run))
    theirs = read_weights(find_latest(run.checkpoints))

    positions = resample_positions(theirs["image_encoder.positions"], (4, 4), (6, 6))
    assert torch.equal(model.image_encoder.positions, positions)
    for name in ("insert_token", "insert_positions"):
        assert torch.equal(model.get_parameter(name), drawn[name])
    rest = theirs.keys() - {"image_encoder.positions"}
    assert all(torch.equal(model.get_parameter(name), theirs[name]) for name in rest)
    assert "    image_encoder.positions resampled from 4x4 to 6x6" in first.lines
    assert first.lines[-1] == "drawn from run.seed: insert_token, insert_positions"


def test_from_drop_to_replace_what_only_drop_has_is_listed_as_not_used(run: RunFolder, tmp_path: Path) -> None:
    dropping = small_run(tmp_path / "drop", masking={"cell": 16, "mode": "drop"})
    first, _, _ = start(new_config(dropping), words_of(dropping))
    (line,) = [line for line in first.lines if "not used" in line]
    assert "insert_positions ((17, 32), no such parameter here)" in line and "insert_token ((32,), no such" in line


def test_other_words_of_the_same_number_are_no_reason_to_take_their_embeddings(run: RunFolder) -> None:
    own = words_of(run)
    turned = str.maketrans("abcdefghijklm nopqrstuvwxyz", "zyxwvutsrqpon mlkjihgfedcba")
    shapes = json.loads((run.tokenizer / "tokenizer.json").read_text())
    words = shapes["model"]["vocab"].items()
    other = same_size_as({w if number < 5 else w.translate(turned): number for w, number in words}, shapes)
    assert other.vocabulary == own.vocabulary and not other.same_words(own)

    first, model, drawn = start(new_config(run), other)

    for name in ("text_encoder.words.weight", "heads.tokens.weight", "heads.tokens.bias"):
        assert torch.equal(model.get_parameter(name), drawn[name]) and name not in first.values
    assert "text_encoder.positions" in first.values
    (line,) = [line for line in first.lines if "not used" in line]
    assert "text_encoder.words.weight (other words)" in line and "heads.tokens.bias (other words)" in line
    assert first.lines[-1] == "drawn from run.seed: text_encoder.words, heads.tokens"


def same_size_as(vocabulary: dict[str, int], whole: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    changed = {**whole, "model": {**whole["model"], "vocab": vocabulary, "merges": []}}
    specials = dict(zip(("bos_id", "pad_id", "eos_id", "unk_id", "mask_id"), range(5), strict=True))
    return Tokenizer(Backend.from_str(json.dumps(changed)), specials)


def test_another_number_of_words_and_other_heads_are_left_out_and_listed(run: RunFolder) -> None:
    other = train_bpe(["ein roter Kreis"] * 5, 300)
    config = new_config(run, model={"projection": 8, "text": {"max_tokens": 12}})
    first, model, _ = start(config, other)
    theirs = read_weights(find_latest(run.checkpoints))
    assert torch.equal(model.text_encoder.positions, theirs["text_encoder.positions"][:12])
    (line,) = [line for line in first.lines if "not used" in line]
    assert "heads.image_projection.weight ((16, 32), (8, 32) here)" in line
    assert "    text_encoder.positions cut from 40 to 12" in first.lines
    longer, _, _ = start(new_config(run, model={"text": {"max_tokens": 50}}), words_of(run))
    assert "text_encoder.positions ((40, 32), (50, 32) here)" in "".join(longer.lines)
    assert "text_encoder.positions" not in longer.values


def test_another_scale_of_pixels_is_folded_and_the_pixel_head_left_out(run: RunFolder) -> None:
    config = new_config(run, model={"image": {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.25]}})
    first, model, _ = start(config, words_of(run))
    theirs = open_run(run.path).model
    expected = image_rows(theirs.image_encoder, pictures(64))
    torch.testing.assert_close(image_rows(model.image_encoder, pictures(64)), expected, rtol=0, atol=1e-4)
    (line,) = [line for line in first.lines if "not used" in line]
    assert "heads.pixels.weight (other targets)" in line and "heads.pixels.weight" not in first.values
    objectives = {"itm": {"group": 4}, "mim": {"per_patch": True}}
    first, _, _ = start(new_config(run, objectives=objectives), words_of(run))
    assert "heads.pixels.weight (other targets)" in "".join(first.lines)


def test_other_attention_heads_of_the_same_width_are_refused(run: RunFolder) -> None:
    with pytest.raises(PretrainedError, match="trained with model.heads=2, and here it is 4: .* Set model.heads=2"):
        start(new_config(run, model={"heads": 4}), words_of(run))


def test_a_folder_that_holds_no_weights_is_said(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"init_from": str(tmp_path / "gone")})
    with pytest.raises(RunError, match="model.init_from=.*gone: RUN must be the folder of a run or of an export"):
        first_weights(config, 300, 4)
    empty = RunFolder(tmp_path / "empty").create()
    empty.write_config(small_config(tmp_path).to_yaml())
    with pytest.raises(RunError, match="has no checkpoint yet"):
        first_weights(small_config(tmp_path, model={"init_from": str(empty.path)}), 300, 4)


def test_given_values_of_another_shape_are_refused() -> None:
    model = MaskVLM(small_config(Path("x")), 300, 4)
    with pytest.raises(ValueError, match=r"given heads.match.bias must have shape \(2,\); got \(3,\)"):
        model.init_weights(0, {"heads.match.bias": torch.zeros(3)})


# ---- a whole run ----------------------------------------------------------------------------------------------------


def write_config(run: RunFolder, folder: Path, **model: Any) -> Path:
    """A run of a few steps over the other run's shard."""
    config = small_config(
        run.path.parent / "pairs.tar",
        folder / "new",
        model={**new_config(run).model.model_dump(mode="json"), "init_from": None, **model},
        schedule={"steps": 1, "kind": "constant", "warmup": 0},
        optim={"lr": 1e-3},
        evaluation={"every": 0},
    )
    path = folder / "new.yaml"
    path.write_text(config.to_yaml())
    return path


def test_a_run_starts_from_its_source_and_goes_on_without_it(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "source")
    config = write_config(run, tmp_path, init_from=str(tmp_path / "source"))

    assert main([str(config)]) == FINISHED
    said = capfd.readouterr().out
    assert f"weights     model.init_from={tmp_path}/source at step 9 (weights as trained): " in said
    before = read_weights(find_latest(run.checkpoints))
    after = read_weights(find_latest(tmp_path / "new" / "checkpoints"))
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert 0 < moved < 5e-3  # one step of 1e-3

    shutil.rmtree(tmp_path / "source")
    assert main([str(config), "schedule.steps=2"]) == FINISHED
    assert "goes on from step 1" in capfd.readouterr().out
    assert main([str(config), f"run.folder={tmp_path}/another"]) == UNUSABLE
    assert "RUN must be the folder of a run or of an export" in capfd.readouterr().err


def test_a_run_starts_from_published_encoders(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = words_of(run)
    sizes = {"depth": 1, "num_classes": 0}
    theirs = vit(tmp_path / "vit", **sizes)
    folder = tokenizer.save(tmp_path / "roberta", max_tokens=40)
    roberta(folder, vocab_size=tokenizer.vocabulary, num_hidden_layers=1, max_position_embeddings=42)
    image = {**new_config(run).model.image.model_dump(mode="json"), "pretrained": str(tmp_path / "vit")}
    text = {**new_config(run).model.text.model_dump(mode="json"), "pretrained": str(folder)}
    config = write_config(run, tmp_path, image=image, text=text)

    assert main([str(config), "tokenizer.kind=bpe"]) == FINISHED  # trained on the same captions: the same words
    said = capfd.readouterr().out
    assert "weights     model.image.pretrained=" in said and "\n            model.text.pretrained=" in said
    after = read_weights(find_latest(tmp_path / "new" / "checkpoints"))
    assert 0 < (after["image_encoder.class_token"] - theirs.cls_token[0, 0]).abs().max() < 5e-3

    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "vit")
    assert main([str(config), "schedule.steps=2"]) == FINISHED


def test_a_source_of_another_shape_ends_a_run_before_it_has_a_folder(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vit(tmp_path / "vit", depth=3)
    image = {**new_config(run).model.image.model_dump(mode="json"), "pretrained": str(tmp_path / "vit")}
    assert main([str(write_config(run, tmp_path, image=image))]) == UNUSABLE
    said = capfd.readouterr().err
    assert "mvle.train: model.image.pretrained=" in said and "3 blocks (model.image.depth is 1)" in said
    assert not (tmp_path / "new").exists()


def test_code_in_a_run_to_start_from_is_refused_and_not_run(
    run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "source")
    for checkpoint in (tmp_path / "source" / "checkpoints").glob("step_*"):
        replace(checkpoint, ".metadata", pickle.dumps(Runs(tmp_path / "ran")))
    assert main([str(write_config(run, tmp_path, init_from=str(tmp_path / "source")))]) == UNUSABLE
    assert "is refused: it names " in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
