"""Every mistake in a config is refused, in a message that names the key, what was expected, and what came."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvle.config import ConfigError, check_ranks, load_config

MISTAKES = {
    # keys
    "masking.image_raito=0.5": "unknown config key masking.image_raito. Did you mean masking.image_ratio?",
    "modle.width=96": "unknown config key modle.* Did you mean model?",
    "image_ratio=0.5": "Did you mean masking.image_ratio?",
    "model=3": "model is a section: expected keys below it such as model.width; got 3",
    "model.width.x=3": "model.width: expected integer above 0; got {'x': 3}",
    # types
    "model.width=wide": "model.width: expected integer above 0; got 'wide' (str)",
    "optim.lr=true": "optim.lr: expected number above 0; got True (bool)",
    "optim.betas=[0.9]": "optim.betas: expected [number, number]; got [0.9] (list)",
    "run.folder=3": "run.folder: expected text",
    "masking.mode=dropp": "masking.mode: expected replace | drop; got 'dropp' (str). Did you mean drop?",
    "masking.image_ratio=most": "masking.image_ratio: expected number | [number, number]; got 'most'",
    # ranges
    "optim.lr=-1": "optim.lr: expected number above 0; got -1",
    "optim.betas=[0.9, 1.0]": "optim.betas: expected two numbers of at least 0 and below 1; got (0.9, 1.0)",
    "masking.image_ratio=0": "masking.image_ratio: expected a share above 0",
    "masking.image_ratio=[0.8, 0.6]": "in that order; got (0.8, 0.6)",
    "masking.text_ratio=1.5": "masking.text_ratio: expected number above 0 and at most 1; got 1.5",
    "masking.clean_keep=0": "masking.clean_keep: expected number above 0 and at most 1; got 0",
    "schedule.warmup=2.5": "expected a share below 1 or a whole number of steps; got 2.5",
    # combinations
    "model.width=767": "model: width must be a multiple of heads (12); got 767",
    "model.image.size=100": "model.image: size must be a multiple of patch (16); got 100",
    "model.dropout=0.1": "dropout must be 0; got 0.1. Blocks are shared",
    "masking.cell=24": "masking.cell must be a multiple of model.image.patch (16); got 24",
    "masking.cell=48": "masking.cell must divide model.image.size (224); got 48",
    "masking.insert=decoder": "masking.insert=decoder expected masking.mode=drop",
    "masking.clean_keep=0.5, objectives.mlm.weight=0, objectives.itc.weight=0, objectives.itm.weight=0": (
        "masking.clean_keep=0.5 expected a loss that reads whole images (itc, itm, or mlm with masking.context=clean); "
        "got weight 0 for each"
    ),
    "schedule.warmup=5000": "schedule.warmup must be at most schedule.steps (1000); got 5000",
    "batch.micro=100": "batch.micro must divide batch.total (512); got 100. Set it to a divisor, such as 4.",
    "objectives.itm.group=48": "objectives.itm.group must divide batch.total (512)",
    "data.slots=7": "data.slots must divide batch.total (512); got 7. Set it to a divisor, such as 1, or null.",
    "checkpoint.best=val_mim, objectives.mim.weight=0": "expected objectives.mim.weight above 0; got 0",
    "checkpoint.best=val_loss, evaluation.every=0": "expected validation while training; got evaluation.every=0",
    "metrics.profile=[100,2000]": "metrics.profile must end within schedule.steps (1000); got [100, 2000]",
    # overrides
    "schedule.steps": "an override must be key.sub=value, such as schedule.steps=100; got 'schedule.steps'",
    "=3": "an override must be key.sub=value",
    "model.image=[1": "the value of model.image must be YAML; got '[1'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gets_its_message(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, override.split(", ") if ", " in override and "[" not in override else [override])

    parts = MISTAKES[override].split(".* ")
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_all_mistakes_of_a_file_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["optim.lr=-1", "model.width=wide", "masking.text_ratio=0"])

    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "config key model.width",
        "config key masking.text_ratio",
        "config key optim.lr",
    ]


def test_a_group_matters_only_where_itm_is_trained() -> None:
    load_config(None, ["objectives.itm.group=48", "objectives.itm.weight=0"])


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["data.slots=16"], 3, "batch.total must be a multiple of the number of ranks (3); got 512. Start 1 ranks"),
        (["data.slots=16"], 32, "data.slots must be a multiple of the number of ranks (32); got 16. Start 16 ranks"),
        (
            ["data.slots=16", "batch.micro=128"],
            8,
            "batch.micro must divide batch.total / ranks (512 / 8 = 64); got 128",
        ),
        (["data.slots=32"], 32, "objectives.itm.group must divide batch.total / ranks (16)"),
    ],
)
def test_ranks_that_cannot_share_the_batch_are_refused(overrides: list[str], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_ranks(load_config(None, overrides), ranks)

    assert message in str(error.value)


def test_an_unknown_name_lists_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="no config lage: .* large.* Did you mean large"):
        load_config("lage")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "must be YAML"),
        ("- 1\n- 2\n", "must hold sections"),
        ("!!python/object:os.system {}", "must be YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message):
        load_config(path)
