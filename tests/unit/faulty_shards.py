"""A short run over small shards, as its loader and its plan see it: what tests of the data's faults stand on."""

from __future__ import annotations

from typing import Any

from mvle.data.config import DataConfig
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer

TOTAL, STEPS = 12, 7  # 48 images: seven steps are nearly two epochs


def loader_of(shards: ShardSet, tokenizer: Tokenizer, **changes: Any) -> Loader:
    options = {"image_size": 16, "max_tokens": 12, "row_multiple": 8, "steps": STEPS, **changes}
    return Loader(options.pop("config", DataConfig()), plan_of(shards), shards, tokenizer, **options)


def plan_of(shards: ShardSet) -> SamplingPlan:
    return SamplingPlan(shards, seed=1, batch_total=TOTAL, slots=TOTAL, image_ratio=(0.3, 0.8))


def rows_of(shards: ShardSet, step: int) -> list[int]:
    plan = plan_of(shards)
    return [plan.row(int(counter)) for counter in plan.positions(step)]
