"""What the regression check compiles and the tuner times can be called: at a small size, by the interpreter."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from unittest import mock

import mvle_kernels
import pytest
from mvle_kernels.recipes import RECIPES, Recipe

from .triton_checks import DEVICE, guards, needs_triton

SMALL = Recipe(32, 2, 64, patches=4, patch=2, tokens=4, words=20, vocabulary=128, pairs=2, caption=3, masked=2)
FILES = sorted(path.stem for path in Path(mvle_kernels.__file__).parent.glob("*_triton.py"))


@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_every_variant_runs_over_the_tensors_that_it_makes(file: str) -> None:
    kernels = import_module(f"mvle_kernels.{file}")

    with mock.patch.dict(RECIPES, {"small": SMALL}, clear=True):
        names = []
        for name, call in kernels.variants(str(DEVICE)):
            with guards():
                call()
            names.append(name)
        without_memory = [name for name, _ in kernels.variants()]

    assert names and len(set(names)) == len(names) and without_memory == names
