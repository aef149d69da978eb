"""A config file that extends another: what wins, what is refused, and in which file a mistake is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvle.config import Config, ConfigError, load_config
from mvle.config_files import config_names, find_config, read_config


def write(folder: Path, **files: str) -> None:
    """folder/NAME.yaml for each name."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def message(name: Path, *overrides: str) -> str:
    """What load_config refuses it with."""
    with pytest.raises(ConfigError) as error:
        load_config(name, overrides)
    return str(error.value)


def test_a_file_is_laid_over_the_one_it_extends_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="model: {width: 96, heads: 4, image: {size: 64, depth: 2}}\noptim: {lr: 0.5}\nmasking: {cell: 16}\n",
        own="extends: base.yaml\nmodel: {image: {depth: 3}}\noptim: {lr: 0.25}\n",
    )

    config = load_config(tmp_path / "own.yaml", ["optim.lr=0.125"])

    assert (config.model.width, config.model.image.size, config.model.image.depth) == (96, 64, 3)
    assert config.optim.lr == 0.125
    assert load_config(tmp_path / "own.yaml").optim.lr == 0.25


def test_a_list_replaces_the_list_below_it(tmp_path: Path) -> None:
    write(
        tmp_path, base="data: {train: [a.tar, b.tar], val: v.tar}\n", own="extends: base.yaml\ndata: {train: [c.tar]}\n"
    )

    config = load_config(tmp_path / "own.yaml")

    assert (config.data.train, config.data.val) == (("c.tar",), ("v.tar",))


def test_a_section_with_nothing_below_it_takes_nothing_away(tmp_path: Path) -> None:
    write(tmp_path, base="optim: {lr: 0.5}\n", own="extends: base.yaml\noptim:\n")

    assert load_config(tmp_path / "own.yaml").optim.lr == 0.5


def test_files_extend_one_another_in_a_chain_and_the_nearest_wins(tmp_path: Path) -> None:
    write(
        tmp_path,
        one="optim: {lr: 0.1, clip: 3.0, weight_decay: 0.3}\n",
        two="extends: one.yaml\noptim: {lr: 0.2, clip: 2.0}\n",
        three="extends: two.yaml\noptim: {lr: 0.3}\n",
    )

    optim = load_config(tmp_path / "three.yaml").optim

    assert (optim.lr, optim.clip, optim.weight_decay) == (0.3, 2.0, 0.3)


def test_a_path_starts_from_the_folder_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    write(tmp_path / "mine", base="optim: {lr: 0.5}\n")
    write(tmp_path / "mine" / "deep", own="extends: ../base.yaml\n")
    write(tmp_path, base="optim: {lr: 0.1}\n")
    monkeypatch.chdir(tmp_path)

    assert load_config("mine/deep/own.yaml").optim.lr == 0.5


def test_a_name_is_a_packaged_recipe_unless_a_file_of_that_name_lies_beside(tmp_path: Path) -> None:
    write(tmp_path, own="extends: tiny\nrun: {name: own}\n")
    assert load_config(tmp_path / "own.yaml") == load_config("tiny", ["run.name=own"])

    (tmp_path / "tiny").write_text("optim: {lr: 0.25}\n")
    assert load_config(tmp_path / "own.yaml").optim.lr == 0.25


def test_extends_on_the_command_line_takes_the_place_of_what_the_file_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, own="extends: base\nrun: {name: own}\noptim: {clip: 2.0}\n", other="optim: {lr: 0.5, clip: 5.0}\n")
    monkeypatch.chdir(tmp_path)

    over_tiny = load_config("own.yaml", ["extends=tiny"])
    assert over_tiny == load_config("tiny", ["run.name=own", "optim.clip=2.0"])
    assert load_config("own.yaml", ["extends=tiny", "extends=other.yaml"]).optim.lr == 0.5  # the last one
    assert load_config("own.yaml", ["extends=null"]) == load_config(None, ["run.name=own", "optim.clip=2.0"])
    assert load_config(None, ["extends=other.yaml"]).optim.lr == 0.5


def test_only_the_named_file_changes_what_it_extends(tmp_path: Path) -> None:
    write(tmp_path, one="optim: {lr: 0.5}\n", two="extends: one.yaml\noptim: {clip: 2.0}\n", own="extends: null\n")

    optim = load_config(tmp_path / "own.yaml", [f"extends={tmp_path / 'two.yaml'}"]).optim

    assert (optim.lr, optim.clip) == (0.5, 2.0)


def test_the_resolved_config_stands_alone(tmp_path: Path) -> None:
    write(tmp_path, own="extends: tiny\nrun: {name: own}\n")

    text = load_config(tmp_path / "own.yaml").to_yaml()

    assert "extends" not in text
    write(tmp_path, resolved=text)
    assert load_config(tmp_path / "resolved.yaml") == load_config(tmp_path / "own.yaml")


def test_a_circle_is_refused_with_its_files(tmp_path: Path) -> None:
    write(tmp_path, a="extends: b.yaml\n", b="extends: ./c.yaml\n", c=f"extends: ../{tmp_path.name}/a.yaml\n")

    said = message(tmp_path / "a.yaml")

    assert "got a circle: " in said
    assert [Path(name).name for name in said.rstrip(".").split("circle: ")[1].split(" -> ")] == [
        "a.yaml",
        "b.yaml",
        "c.yaml",
        "a.yaml",
    ]
    write(tmp_path, d="extends: d.yaml\n")
    assert "got a circle" in message(tmp_path / "d.yaml")


@pytest.mark.parametrize("value", ["3", "[tiny, base]", "{name: tiny}", "''", "true"])
def test_extends_is_one_name(tmp_path: Path, value: str) -> None:
    write(tmp_path, own=f"extends: {value}\n")

    said = message(tmp_path / "own.yaml")

    assert "extends must be the name or the path of one config; got " in said
    assert said.endswith(f" [in {tmp_path / 'own.yaml'}]")


def test_what_is_extended_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, own="extends: bsae\n", empty="")

    said = message(tmp_path / "own.yaml")

    assert f"extends=bsae, set in {tmp_path / 'own.yaml'}: there is no config bsae in {tmp_path}" in said
    assert said.endswith("Did you mean base?")
    assert "extends=bsae, set on the command line: " in message(tmp_path / "empty.yaml", "extends=bsae")


# --- which file a mistake is in ---


@pytest.mark.parametrize(
    ("base", "own", "overrides", "end"),
    [
        ("masking: {image_raito: 0.5}", "", [], "Did you mean masking.image_ratio? [in BASE]"),
        ("", "modle: {width: 96}", [], "[in OWN]"),
        ("", "optim: {lr: fast}", [], "got 'fast' (str). [in OWN]"),
        ("optim: {lr: fast}", "optim: {clip: 1.0}", [], "got 'fast' (str). [in BASE]"),
        ("optim: {lr: fast}", "optim: {lr: slow}", [], "got 'slow' (str). [in OWN]"),
        ("optim: {lr: 0.5}", "", ["optim.lr=slow"], "got 'slow' (str)."),
        ("model: 3", "", [], "got 3 (int). [in BASE]"),
        ("model: {width: 96}", "model: 3", [], "got 3 (int). [in OWN]"),
        ("model: 3", "model: {width: 96, heads: 5}", [], "got 96. [in OWN]"),
        # across keys and sections: each one's place, once if it is the same
        ("model: {heads: 5}", "", ["model.width=96"], "[model.heads in BASE, model.width on the command line]"),
        ("model: {width: 96, heads: 5}", "", [], "got 96. [in BASE]"),
        (
            "model: {image: {size: 64, patch: 16}}",
            "masking: {cell: 24}",
            [],
            "[masking.cell in OWN, model.image.patch in BASE]",
        ),
        ("", "optim: {betas: [0.9, 1.0]}", [], "got (0.9, 1.0). [in OWN]"),
    ],
)
def test_a_mistake_is_told_with_its_file(tmp_path: Path, base: str, own: str, overrides: list[str], end: str) -> None:
    write(tmp_path, base=base, own=f"extends: base.yaml\n{own}\n")

    said = message(tmp_path / "own.yaml", *overrides).replace(str(tmp_path / "base.yaml"), "BASE")

    said = said.replace(str(tmp_path / "own.yaml"), "OWN")
    assert said.endswith(end), said


def test_a_broken_file_is_named_wherever_it_is_in_the_chain(tmp_path: Path) -> None:
    write(tmp_path, base="model: [", list="- 1\n", own="extends: base.yaml\n", other="extends: list.yaml\n")

    assert f"{tmp_path / 'base.yaml'} must be YAML" in message(tmp_path / "own.yaml")
    assert f"{tmp_path / 'list.yaml'} must hold sections" in message(tmp_path / "other.yaml")


def test_extends_belongs_at_the_top(tmp_path: Path) -> None:
    write(tmp_path, own="model: {extends: base}\n")

    assert "unknown config key model.extends" in message(tmp_path / "own.yaml")


def test_overrides_alone_are_told_without_a_place() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["optim.lr=fast"])

    assert str(error.value).endswith("got 'fast' (str).")


# --- names ---


def test_names_of_folders_come_last_and_each_is_found() -> None:
    names = config_names()

    assert names.index("tiny") < names.index("ablation/itc")
    for name in names:
        assert find_config(name).is_file()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("itc_itm", "ablation/itc_itm"),
        ("itc_itn", "ablation/itc_itm"),
        ("ablation/itc_itn", "ablation/itc_itm"),
        ("configs/lage.yaml", "large"),
        ("no/such/folder/itc.yaml", "ablation/itc"),
    ],
)
def test_a_name_that_is_not_there_gets_the_nearest(name: str, meant: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as error:
        find_config(name)

    assert str(error.value).endswith(f"Did you mean {meant}?")
    assert "ablation/itc" in str(error.value)


def test_what_is_read_knows_the_place_of_every_value(tmp_path: Path) -> None:
    write(tmp_path, base="optim: {lr: 0.5, clip: 1.0}\n", own="extends: base.yaml\noptim: {lr: 0.25}\n")

    stated = read_config(tmp_path / "own.yaml", ["run.seed=1"])

    assert stated.values == {"optim": {"lr": 0.25, "clip": 1.0}, "run": {"seed": 1}}
    assert stated.origins == {
        "optim.lr": f"in {tmp_path / 'own.yaml'}",
        "optim.clip": f"in {tmp_path / 'base.yaml'}",
        "run.seed": "on the command line",
    }
    assert Config.from_dict(stated.values).optim.lr == 0.25
