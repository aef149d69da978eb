"""The sizes that kernels are compiled for are those of the packaged recipes."""

from __future__ import annotations

import pytest
from mvle_kernels.recipes import RECIPES

from mvle.config import load_config


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_they_are_those_of_the_config(name: str) -> None:
    recipe, model = RECIPES[name], load_config(name).model
    image = model.image
    assert (recipe.width, recipe.heads, recipe.mlp) == (model.width, model.heads, model.mlp_ratio * model.width)
    assert (recipe.patches, recipe.patch) == ((image.size // image.patch) ** 2, image.patch)
    assert recipe.tokens == model.text.max_tokens and recipe.vocabulary % 128 == 0
    cells = (image.size // load_config(name).masking.cell) ** 2
    assert recipe.masked == 4 * -(-0.6 * cells // 1)
