"""The rows that blocks process, by formula, are those that they return; and what share of them holds nothing."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvle.data.batch import Batch
from mvle.engine.metrics import Metrics, MetricsConfig, read_rows
from mvle.engine.parallel import Parallel
from mvle.model.rows import processed_rows, step_rows

from ..helpers import make_batch, make_config, make_model

RAGGED, RATIOS = (3, 11, 6, 8, 4, 5, 16, 7), (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
PARTS = {
    "image encoder": "image_encoder",
    "text encoder": "text_encoder",
    "image cross": "image_cross",
    "text cross": "text_cross",
    "decoder": "decoder",
}


def observed(config: Any, batch: Batch) -> Counter[str]:
    """Rows that the blocks of each part return in one forward."""
    model, found = make_model(config, dtype=torch.float32), Counter[str]()
    for part in PARTS.values():
        for block in getattr(model, part).blocks:

            def count(module: Any, arguments: Any, result: Tensor, part: str = part) -> None:
                found[part] += len(result)

            block.register_forward_hook(count)
    model(batch, 0, model.counts(batch))
    return found


def predicted(config: Any, batch: Batch, row_multiple: int) -> Counter[str]:
    rows = step_rows(config, batch.text.lengths or (), batch.image_ratio, row_multiple, batch.images.shape[1])
    found: Counter[str] = Counter()
    for name, own in rows.items():
        found[PARTS[name.removesuffix(", last")]] += own.total * own.blocks
    return found


@pytest.mark.parametrize("row_multiple", [1, 16, 24])
@pytest.mark.parametrize("mode, insert", [("replace", "cross"), ("drop", "cross"), ("drop", "decoder")])
def test_rows_by_formula_are_those_that_blocks_return(mode: str, insert: str, row_multiple: int) -> None:
    batch = make_batch(RAGGED, ratios=RATIOS, row_multiple=row_multiple)
    for depth in (1, 2, 3):
        config = make_config(mode, insert, cross_depth=depth, decoder_depth=depth, row_multiple=row_multiple)
        assert predicted(config, batch, row_multiple) == observed(config, batch)


@pytest.mark.parametrize("weights", [w for w in product((0, 1), repeat=4) if any(w) and not all(w)])
def test_so_they_are_for_any_losses(weights: tuple[int, ...]) -> None:
    batch, config = make_batch(RAGGED, ratios=RATIOS), make_config("drop", "cross", weights)

    assert predicted(config, batch, 16) == observed(config, batch)


@pytest.mark.parametrize("clean_keep, side", [(0.5, 64), (1.0, 32)])
def test_so_they_are_where_images_show_less(clean_keep: float, side: int) -> None:
    batch, config = make_batch(RAGGED, ratios=RATIOS, side=side), make_config("drop", clean_keep=clean_keep)

    assert predicted(config, batch, 16) == observed(config, batch)


def test_nothing_is_padding_but_tails_and_the_room_for_drawn_captions() -> None:
    config, even, ragged = make_config(group=4), make_batch([7] * 8), make_batch(RAGGED)
    real, total = processed_rows(config, even, 1)
    assert real == total

    real, total = processed_rows(config, ragged, 1)
    assert total - real == (4 * 11 - 28) + (4 * 16 - 32)  # the first block of two; the last reads first rows alone

    image = step_rows(config, even.text.lengths or (), even.image_ratio, 16)["image encoder"]
    assert (image.real, image.total, image.blocks) == (2 * 8 * 17, 272, 2)
    assert step_rows(config, even.text.lengths or (), even.image_ratio, 100)["image encoder"].total == 300


def test_micro_batches_have_tails_of_their_own() -> None:
    config, batch = make_config(), make_batch(RAGGED, ratios=RATIOS)
    parts = [processed_rows(config, batch.micro(a, a + 4, 16), 16) for a in (0, 4)]

    assert processed_rows(config, batch, 16, micro=4) == tuple(map(sum, zip(*parts)))


def test_a_row_tells_the_share_of_padding_over_its_steps(tmp_path: Path) -> None:
    parallel = Parallel(0, 1, torch.device("cpu"))
    with Metrics(tmp_path / "metrics.jsonl", MetricsConfig(every=2), parallel, steps=4, pairs=8) as metrics:
        for step, rows in enumerate([(80, 100), (270, 300), (9, 10), (10, 10)], 1):
            metrics.update(
                step, {"loss": torch.tensor(1.0)}, {}, skipped=torch.tensor(0.0), wait=0.0, lr=1.0, rows=rows
            )

    assert [row["padding"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.125, 0.05]
