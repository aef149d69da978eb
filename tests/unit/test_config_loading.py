"""How defaults, a YAML file and overrides become one config, and what can be asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvle.config import (
    Config,
    ConfigError,
    check_ranks,
    describe,
    differences,
    load_config,
    require_data,
)
from mvle.config_files import find_config
from mvle.config_keys import walk
from mvle.model.__main__ import main as print_sizes

from .recipes import recipes, stated


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {width: 96, heads: 4}\noptim: {lr: 0.5}\n")

    config = load_config(path, ["optim.lr=1e-3"])

    assert config.optim.lr == 1e-3
    assert config.model.width == 96
    assert config.model.cross_depth == Config().model.cross_depth


def test_an_override_may_hold_a_list_null_or_a_mapping() -> None:
    config = load_config(None, ["masking.image_ratio=[0.6, 1.0]", "optim.encoder_lr=null", "batch={total: 64}"])

    assert config.masking.image_ratio == (0.6, 1.0)
    assert config.optim.encoder_lr is None
    assert config.batch.total == 64


def test_a_mapping_is_merged_into_the_section_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {width: 96, heads: 4}\n")

    config = load_config(path, ["model={cross_depth: 2}"])

    assert (config.model.width, config.model.cross_depth) == (96, 2)


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\ndata:\n"])  # empty, a comment, sections without keys
def test_a_file_that_says_nothing_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)) == Config()


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(1e-12, 10, allow_nan=False),
    ratio=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0)),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1),
)
def test_yaml_of_a_config_reads_back_equal(tmp_path_factory, lr, ratio, folder) -> None:
    config = Config.from_dict({"optim": {"lr": lr}, "masking": {"image_ratio": ratio}, "run": {"folder": folder}})
    path = tmp_path_factory.mktemp("yaml") / "resolved.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")

    assert load_config(path) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().optim.lr = 1.0  # type: ignore[misc]


def test_help_lists_every_key_with_its_type_and_meaning() -> None:
    text = describe()

    for key, field in walk(Config):
        assert field.description, f"{key} has no description"
        assert f"  {key} " in text
    assert "replace | drop" in text
    assert max(len(line) for line in text.splitlines()) <= 200


def test_help_waits_for_no_heavy_import() -> None:
    heavy = "{'transformers', 'timm', 'torchvision', 'matplotlib', 'triton', 'sympy', 'tokenizers'}"
    code = f"import sys, mvle.config; mvle.config.describe(); print(*({heavy} & set(sys.modules)))"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())

    assert out.stdout.strip() == ""


def environment() -> dict[str, str]:
    """This process's environment, with its module path for a child."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_differences_name_the_key_and_leave_out_what_a_resume_may_change() -> None:
    before = Config()
    now = load_config(
        None, ["masking.text_ratio=0.4", "run.folder=x", "metrics.every=3", "kernels.backend=dense", "batch.micro=32"]
    )

    assert differences(now, before) == [("masking.text_ratio", 0.4, 0.3)]
    assert [key for key, *_ in differences(now, before, ignore=())] == [
        "run.name",
        "run.folder",
        "masking.text_ratio",
        "batch.micro",
        "metrics.every",
        "kernels.backend",
    ]


def test_a_name_finds_the_packaged_file_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert find_config("tiny").name == "tiny.yaml"


def test_a_path_comes_before_a_packaged_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("optim: {lr: 0.25}\n")

    assert load_config("tiny").optim.lr == 0.25


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_loads_and_says_what_it_is(name: str) -> None:
    path = find_config(name)
    header = path.read_text().splitlines()

    assert load_config(name).run.folder == f"runs/{name}"
    assert header[0].startswith("# ")
    text = path.read_text()
    for word in ("Reproduces", "Command", "Hardware", "Time", "Metric"):
        assert f"# {word}" in text, f"{path} does not say: {word}"


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_states_nothing_that_is_misspelt_or_unread(name: str) -> None:
    resolved = load_config(name).to_dict()
    for section, values in stated(name).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, (int, str)):
                assert resolved[section][key] in (value, [value])  # one pattern is a list of one


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_builds_on_meta_and_its_size_is_counted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_sizes([name]) == 0

    parts = [int(line.split()[-1].replace(",", "")) for line in capsys.readouterr().out.splitlines()[1:]]
    assert sum(parts[:-1]) == parts[-1] > 1e6


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        ([], 1, (512, 1)),
        (["batch.micro=64"], 1, (64, 8)),
        (["batch.micro=64"], 4, (64, 2)),
        ([], 4, (128, 1)),
    ],
)
def test_ranks_share_the_batch(overrides: list[str], ranks: int, expected: tuple[int, int]) -> None:
    arithmetic = check_ranks(load_config(None, ["data.slots=16", *overrides]), ranks)

    assert (arithmetic.micro, arithmetic.accumulate) == expected
    assert arithmetic.total == 512


@pytest.mark.parametrize("name", ["base", "large"])
def test_a_bare_machine_is_told_how_to_make_shards_and_how_to_go_without(name: str) -> None:
    config = load_config(name)

    with pytest.raises(ConfigError) as error:
        require_data(config)

    text = str(error.value)
    assert "data.train" in text and "data.val" in text
    assert "mvle.data pack" in text and "mvle.data index" in text
    overrides = text.splitlines()[-1].split("CONFIG ")[1].split()
    require_data(load_config(name, overrides))  # what it says to type does load


def test_a_run_that_never_validates_needs_no_validation_shards() -> None:
    require_data(load_config("base", ["data.train=shapes:train", "evaluation.every=0"]))


def test_keys_that_there_were_once_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As runs, checkpoints and exports of before have them."""
    path = tmp_path / "config.yaml"
    path.write_text("data: {max_pixels: 1000, threads: 3}\n")
    assert load_config(path) == load_config(None, ["data.threads=3"])
    assert caplog.text.count("data.max_pixels is no config key any more, and is left out: how large") == 1
    stated = {"data": {"max_pixels": 1000, "threads": 3}}
    assert Config.from_dict(stated).data.threads == 3
    assert stated["data"]["max_pixels"] == 1000
