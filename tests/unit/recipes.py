"""The packaged recipes by name, for tests that go through all of them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import yaml

from mvle.config_files import config_names, find_config
from mvle.objectives.masking import MaskingConfig

CONTEXTS = get_args(MaskingConfig.model_fields["context"].annotation)


def stated(name: str) -> dict[str, Any]:
    """What the file of a recipe says itself, without what it extends."""
    return yaml.safe_load(find_config(name).read_text(encoding="utf-8"))


def recipes(folder: str = "") -> list[Any]:
    """Parameters of a test: every recipe whose name starts with `folder`. Those whose masking.context is not a value of
    that key yet are skipped, with that reason."""
    parameters = []
    for name in config_names():
        context = stated(name).get("masking", {}).get("context", "clean")
        missing = pytest.mark.skipif(context not in CONTEXTS, reason=f"masking.context={context} is not there yet")
        if name.startswith(folder):
            parameters.append(pytest.param(name, marks=missing))
    return parameters
