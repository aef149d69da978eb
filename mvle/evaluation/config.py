"""How often, and on how much, a run is validated while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..section import Section


class EvaluationConfig(Section):
    """Validation during training; the same numbers are the defaults of `python -m mvle.evaluate`."""

    every: int = Field(500, ge=0, description="steps between validations (losses and R@1 on data.val); 0: never")
    pairs: int = Field(256, gt=0, description="images of the split that are used, chosen by evaluation.seed")
    captions: Literal["all", "first"] = Field(
        "all",
        description="captions of an image that retrieval ranks: all (Karpathy's protocol), or the first alone, so that "
        "it is a list of pairs",
    )
    k: int = Field(32, gt=0, description="candidates of each query that the matching head reranks")
    seed: int = Field(1, ge=0, description="key of the images and masks of every evaluation, apart from run.seed")
