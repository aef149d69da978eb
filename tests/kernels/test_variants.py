"""What the regression check compiles and the tuner times can be called: at a small size, by the interpreter; and at
sizes far beyond base's its grids are those that a GPU takes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import mvle_kernels
import pytest
from mvle_kernels import launches
from mvle_kernels.recipes import RECIPES, Recipe
from mvle_kernels.triton_support import captured

from .kernel_checks import DEVICE, guards, needs_triton

SMALL = Recipe(32, 2, 64, patches=4, patch=2, tokens=4, words=20, vocabulary=128, pairs=2, caption=3, masked=2)
# more of each than the second and third axis of a grid have programs
LARGE = {
    "pairs": replace(RECIPES["base"], pairs=2**20),
    "patches": replace(RECIPES["base"], patches=300**2, patch=1),
    "heads": replace(RECIPES["base"], pairs=32, heads=2**16, width=2**22),
}
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


@needs_triton
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("file", FILES)
def test_no_size_asks_for_more_programs_than_a_grid_has(file: str, size: str) -> None:
    with mock.patch.dict(RECIPES, {"large": LARGE[size]}, clear=True), launches.target("sm_90"), captured() as made:
        for _, call in import_module(f"mvle_kernels.{file}").variants():
            call()
    for launch in made:
        first, *others = launch.grid
        assert 0 < first < 2**31 and all(0 < n < 2**16 for n in others), (launch.kernel, launch.grid)
