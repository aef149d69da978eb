"""The packaged recipes by name, for tests that go through all of them."""

from __future__ import annotations

from typing import Any

import yaml

from mvle.config_files import config_names, find_config


def stated(name: str) -> dict[str, Any]:
    """What the file of a recipe says itself, without what it extends."""
    return yaml.safe_load(find_config(name).read_text(encoding="utf-8"))


def recipes(folder: str = "") -> list[str]:
    """Every recipe whose name starts with `folder`."""
    return [name for name in config_names() if name.startswith(folder)]
