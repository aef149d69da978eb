"""python -m mvle.export: the folder gives what the run gives, in mvle, timm, transformers; the card has its figures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import mvle
from mvle import evaluate, export, report
from mvle.config import Config
from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.ema import Ema
from mvle.engine.errors import CheckpointError, RunError
from mvle.engine.parallel import Parallel
from mvle.engine.run import RunFolder
from mvle.inference import Pretrained, open_run
from mvle.reporting.page import tables_section

from .published import image_rows, pictures, randomised, roberta_rows, vit_rows
from .small_run import small_run

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a small red circle in the top left", "a large blue cross in the bottom right", "green square"]
MASKED = ["a <mask> circle", "a large <mask> in the <mask> right", "<mask>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Step 3 as drawn; step 5, the best, and an EMA of it; every weight of both is its own."""
    made = small_run(tmp_path_factory.mktemp("export") / "run")
    model = randomised(open_run(made.path).model, 5).requires_grad_()
    ema = Ema(model, 0.9)
    for shadow in ema.tensors().values():
        shadow.data.add_(0.01)
    config = CheckpointConfig(keep=5, best="val_loss")
    checkpoints = Checkpointer(made.checkpoints, config, Parallel(0, 1, torch.device("cpu")))
    checkpoints.save(5, model, torch.optim.AdamW(model.parameters()), {"pairs_seen": 40}, ema)
    checkpoints.mark_best(5, {"val_loss": 1.0})
    return made


@pytest.fixture(scope="module")
def folder(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported") / "tiny"
    assert export.main([str(run.path), "--output", str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))


# ---- the same outputs -----------------------------------------------------------------------------------------------


def everything(model: Pretrained, images: list[np.ndarray]) -> list:
    pictures, masks = model.reconstruct(images, TEXTS, seed=2)
    alone, _ = model.reconstruct(images, None, ratio=0.5)
    embedded = [model.encode_images(images), model.encode_texts(TEXTS), model.match(images, TEXTS)]
    return [*embedded, pictures, masks, alone, model.fill(images, MASKED), model.fill(None, MASKED)]


def test_an_export_gives_what_its_run_gives_to_the_bit(run: RunFolder, folder: Path, images: list) -> None:
    before, after = everything(mvle.load(str(run.path)), images), everything(mvle.load(str(folder)), images)
    for ours, theirs in zip(before, after, strict=True):
        assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs


def test_the_image_encoder_loads_strictly_in_timm_and_gives_the_same(run: RunFolder, folder: Path) -> None:
    import timm

    config, model = open_run(run.path).config, open_run(run.path).model
    theirs = timm.create_model(f"local-dir:{folder / 'image_encoder'}", pretrained=True).eval()

    with safe_open(folder / "image_encoder" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == theirs.state_dict().keys()
    image, expected = config.model.image, image_rows(model.image_encoder, pictures(64))
    torch.testing.assert_close(vit_rows(theirs, pictures(64), image.mean, image.std), expected, rtol=0, atol=1e-4)
    stated = theirs.pretrained_cfg
    assert (tuple(stated["mean"]), tuple(stated["std"])) == (image.mean, image.std)
    assert tuple(stated["input_size"]) == (3, 64, 64)
    with torch.no_grad():
        head_out = theirs((pictures(64).float() / 255 - 0.5).permute(0, 3, 1, 2) / 0.5)
    torch.testing.assert_close(head_out, expected[:, 0], rtol=0, atol=1e-4)


def test_the_text_encoder_and_its_tokenizer_give_the_same_in_transformers(run: RunFolder, folder: Path) -> None:
    from transformers import AutoTokenizer, RobertaModel

    ours = mvle.load(str(run.path))
    place = folder / "text_encoder"
    theirs, loading = RobertaModel.from_pretrained(place, add_pooling_layer=False, output_loading_info=True)
    ids = AutoTokenizer.from_pretrained(place)(TEXTS)["input_ids"]

    assert not any(loading.values())
    assert ids == ours._ids(TEXTS)
    texts = ours._packed(ids)
    for rows, wanted in zip(ours.model.text_encoder(texts).unpack(), roberta_rows(theirs.eval(), texts), strict=True):
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-4)


def test_a_whole_robertamodel_misses_its_pooler_alone(folder: Path) -> None:
    from transformers import RobertaModel

    _, loading = RobertaModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert {name.split(".")[0] for name in loading.pop("missing_keys")} == {"pooler"} and not any(loading.values())


def test_the_exported_encoders_are_first_weights_like_any_other(run: RunFolder, folder: Path) -> None:
    from mvle.model.pretrained import image_weights, text_weights

    opened = open_run(run.path)
    given = image_weights(opened.config.model, str(folder / "image_encoder")).values
    words = opened.tokenizer.vocabulary

    def same(name: str) -> bool:
        return opened.tokenizer.same_words(type(opened.tokenizer).load(name))

    given |= text_weights(opened.config.model, str(folder / "text_encoder"), words, same).values
    own = {n: p for n, p in opened.model.named_parameters() if n.startswith(("image_encoder.", "text_encoder."))}
    assert own.keys() - given.keys() == {"image_encoder.mask_token"}
    assert all(torch.equal(value, own[name]) for name, value in given.items())


# ---- which weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], (5, "ema")),
        (["--weights", "model"], (5, "model")),
        (["--checkpoint", "3"], (3, "model")),
        (["--checkpoint", "best"], (5, "ema")),
    ],
)
def test_the_checkpoint_and_weights_that_are_asked_for_are_exported(options, found, run, tmp_path: Path) -> None:
    assert export.main([str(run.path), "--output", str(tmp_path / "x"), *options]) == 0
    opened = open_run(tmp_path / "x")
    assert (opened.step, opened.weights) == found
    step, weights = found
    wanted = dict(open_run(run.path, step=step, weights=weights).model.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in opened.model.named_parameters())


def test_keys_within_urls_reach_neither_an_export_nor_the_report(run: RunFolder, tmp_path: Path) -> None:
    secret = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    url = "https://host/a-{000..003}.tar?X-Sig=SECRET&more=SECRET"
    values = open_run(run.path).config.to_dict()
    values["data"] |= {"train": {"coco": {"shards": [url], "weight": 1.0}}, "test": [url]}
    secret.config.write_text(Config.from_dict(values).to_yaml())
    found = {"pairs": 3, "data": [url], "captions": "first", "step": 5, "weights": "ema"}
    found["checkpoint"] = open_run(run.path).identity
    secret.evaluation.write_text(json.dumps(found))

    made = export.export(open_run(secret.path), tmp_path / "export")

    assert json.loads((made / "evaluation.json").read_text())["data"] == ["https://host/a-{000..003}.tar?..."]
    assert not [path for path in made.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    assert mvle.load(str(made)).config.data.test == ("https://host/a-{000..003}.tar?...",)
    assert "SECRET" not in tables_section(found) and "https://host/a-" in tables_section(found)


def test_an_export_holds_one_step_and_one_kind_of_weights(folder: Path) -> None:
    assert open_run(folder, step=5, weights="ema").step == 5
    with pytest.raises(RunError, match="is an export of step 5, and holds no other; got 3"):
        mvle.load(str(folder), step=3)
    with pytest.raises(RunError, match="is an export of weights=ema, and holds no others; got model"):
        mvle.load(str(folder), weights="model")


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_an_export_holds_safetensors_and_text_alone(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "mvle_tokenizer.json"}
    assert names == {
        *("README.md", "config.yaml", "meta.json", "model.safetensors"),
        *(f"image_encoder/{name}" for name in ("config.json", "model.safetensors")),
        *(f"text_encoder/{name}" for name in ("config.json", "model.safetensors", *tokenizer)),
        *(f"tokenizer/{name}" for name in tokenizer),
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.yaml").stat().st_mode


def test_what_is_there_is_replaced_only_if_it_is_an_export_and_that_is_asked_for(
    run: RunFolder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x"
    shutil.copytree(folder, target)
    (target / "stray").touch()
    for options, words in (([], "--overwrite replaces it"), (["--overwrite"], None)):
        code = export.main([str(run.path), "--output", str(target), *options])
        said = capsys.readouterr()
        assert (code, (target / "stray").exists()) == ((2, True) if words else (0, False))
        assert words is None or (
            words in said.err and said.err.startswith("mvle.export: --output must be a new folder")
        )
    for other in (run.path, tmp_path):
        assert export.main([str(run.path), "--output", str(other), "--overwrite"]) == 2
        assert "is something else" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert export.main([str(run.path), "--output", str(tmp_path / "empty")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x"], "nothing is left beside them"


def test_a_failed_export_leaves_what_was_there(
    run: RunFolder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    before = (tmp_path / "x" / "meta.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "meta", full)
    assert export.main([str(run.path), "--output", str(tmp_path / "x"), "--overwrite"]) == 2
    assert "mvle.export: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "meta.json").read_bytes() == before


def test_an_export_that_is_not_whole_is_refused_with_the_file(folder: Path, tmp_path: Path) -> None:
    def spoil(name: str, change) -> Path:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "x")
        change(tmp_path / "x" / name)
        return tmp_path / "x"

    with pytest.raises(CheckpointError, match=r"model.safetensors must have \d+ bytes; got no such file"):
        open_run(spoil("model.safetensors", Path.unlink))
    with pytest.raises(CheckpointError, match="has no meta.json, which is written last"):
        open_run(spoil("meta.json", Path.unlink))
    with pytest.raises(CheckpointError, match=r"model.safetensors must have \d+ bytes; got 10"):
        open_run(spoil("model.safetensors", lambda path: os.truncate(path, 10)))

    def garbage(path: Path) -> None:
        path.write_bytes(b"\xff" * path.stat().st_size)

    with pytest.raises(CheckpointError, match="model.safetensors is damaged: its SHA-256 must be"):
        open_run(spoil("model.safetensors", garbage))

    def one_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the last weight: still a file of its form
        path.write_bytes(content)

    with pytest.raises(CheckpointError, match="model.safetensors is damaged: its SHA-256 must be"):
        open_run(spoil("model.safetensors", one_bit))
    with pytest.raises(RunError, match="must be the folder of a run or of an export, with its config.yaml"):
        open_run(spoil("config.yaml", Path.unlink))
    (tmp_path / "x" / "README.md").write_text("a card may be edited")
    with pytest.raises(RunError, match="with its config.yaml"):
        open_run(tmp_path / "x")


def test_a_config_that_does_not_fit_the_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    config = tmp_path / "x" / "config.yaml"
    text = config.read_text().replace("projection: 16", "projection: 32")
    config.write_text(text)
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    meta["files"]["config.yaml"] = len(text)
    (tmp_path / "x" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"image_projection.weight is \(16, 32\) .* and \(32, 32\) in the model"):
        open_run(tmp_path / "x")


def test_exporting_needs_neither_timm_nor_transformers(run: RunFolder, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('timm', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from mvle.export import main\n"
        f"sys.exit(main([{str(run.path)!r}, '--output', {str(tmp_path / 'x')!r}]))"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"written to {tmp_path / 'x'}" in done.stdout


# ---- the card -------------------------------------------------------------------------------------------------------


def test_a_card_without_figures_says_so_and_has_the_facts(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "None were measured of these weights." in text
    for fact in (
        "| step | 5 of 1,000 |",
        "| pairs seen | 40 |",
        "| weights | EMA of the weights |",
        "64 px, patches of 16",
    ):
        assert fact in text


def test_a_card_has_the_figures_of_exactly_these_weights(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    assert evaluate.main(["all", str(copy.path), "--data", str(run.path.parent / "pairs.tar")]) == 0
    copy.metrics.write_text(
        '{"step": 5, "kind": "val", "val_loss": 1.25}\n{"step": 9, "kind": "val", "val_loss": 7.0}\n'
    )
    figures = json.loads(copy.evaluation.read_text())

    for weights, known in (("ema", True), ("model", False)):
        target = tmp_path / weights
        assert export.main([str(copy.path), "--output", str(target), "--weights", weights]) == 0
        text = (target / "README.md").read_text()
        first = figures["retrieval"]["itc"]["image_to_text"]
        row = f"| image to caption, by similarity | {first['r1']:.3f} | {first['r5']:.3f} | {first['r10']:.3f} |"
        assert (row in text) == known and (target / "evaluation.json").exists() == known
        tables = "| masked words |", "| masked pixels,", "| true pair or not |", "| -log p, nats |"
        assert [table in text for table in tables] == [known] * 4
        assert ("`python -m mvle.evaluate all` on" in text) == known
    assert "Validation while training, after step 5" in (tmp_path / "model" / "README.md").read_text()
    assert "| val_loss | 1.2500 |" in (tmp_path / "model" / "README.md").read_text()
    assert "val_loss" not in (tmp_path / "ema" / "README.md").read_text(), "the run validates what it trains"


def test_a_card_names_what_ran_and_what_the_model_was_trained_on(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    assert evaluate.main(["conditional", str(copy.path), "--data", str(run.path.parent / "pairs.tar")]) == 0
    values = open_run(copy.path).config.to_dict()
    sources = {"coco": {"shards": ["c-{0..9}.tar", "d.tar"], "weight": 1.0}, "web": {"shards": ["w.tar"], "weight": 3}}
    values["data"] |= {"train": sources, "fraction": 0.25}
    copy.config.write_text(Config.from_dict(values).to_yaml())

    text = (export.export(open_run(copy.path), tmp_path / "export") / "README.md").read_text()

    assert "coco (weight 1): c-{0..9}.tar d.tar; web (weight 3): w.tar; data.fraction 0.25 of the images;" in text
    assert "`python -m mvle.evaluate conditional` on" in text and "evaluate all" not in text


def test_an_export_can_be_evaluated_and_reported_as_a_run(folder: Path, run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    shard = str(run.path.parent / "pairs.tar")
    assert evaluate.main(["retrieval", str(tmp_path / "x"), "--data", shard]) == 0
    assert report.main([str(tmp_path / "x"), "--data", shard, "--rows", "1"]) == 0
    assert (tmp_path / "x" / "report.html").is_file()
    assert mvle.load(str(tmp_path / "x")).run.step == 5


def test_the_lines_of_python_of_the_page_and_of_the_card_load_an_export(
    folder: Path, tmp_path: Path, images: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "tiny")
    Image.fromarray(images[0]).save(tmp_path / "picture.png")
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "tiny").symlink_to(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    for page in (ROOT / "docs" / "weights.md", folder / "README.md"):
        block = next(b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "mvle.load" in b)
        assert sum(bool(line.strip()) for line in block.splitlines()) == 8
        names: dict = {}
        exec(compile(block, str(page), "exec"), names)
        assert names["similarity"].shape == (1, 1) and names["odds"].shape == (1,)
        assert len(names["words"][0]) == 1 and names["pictures"].shape == (1, 64, 64, 3)
