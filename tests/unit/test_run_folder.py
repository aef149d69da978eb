"""A run's name and folder: one is made from the other."""

from __future__ import annotations

from typing import Any

import pytest

from mvle.config import Config, ConfigError, load_config
from mvle.engine.run import RunConfig


@pytest.mark.parametrize(
    ("given", "name", "folder"),
    [
        ({}, "default", "runs/default"),
        ({"name": None, "folder": None}, "default", "runs/default"),
        ({"name": "first"}, "first", "runs/first"),
        ({"name": "first", "folder": None}, "first", "runs/first"),
        ({"folder": "/scratch/second/"}, "second", "/scratch/second/"),
        ({"name": "first", "folder": "elsewhere"}, "first", "elsewhere"),
        ({"folder": "/"}, "default", "/"),  # no last part
    ],
)
def test_name_and_folder_make_each_other(given: dict[str, Any], name: str, folder: str) -> None:
    run = Config.from_dict({"run": given}).run

    assert (run.name, run.folder) == (name, folder)
    assert RunConfig.model_validate(run.model_dump()) == run  # as a stored config has it


@pytest.mark.parametrize("override", ["run.folder=3", "run.name=3", "run.name=''", "run.folder=''"])
def test_what_is_no_text_is_refused_once_and_by_name(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])

    (line,) = str(error.value).splitlines()
    assert override.partition("=")[0] in line and "expected text" in line
