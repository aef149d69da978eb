"""First weights on several ranks: each keeps its part of what one rank would have."""

from __future__ import annotations

from pathlib import Path

import torch

from mvle.config import Config
from mvle.engine.build import build
from mvle.engine.first_weights import first_weights
from mvle.engine.parallel import Parallel

from ..unit.published import roberta, vit
from ..unit.small_run import small_config, small_run
from .ranks import run_ranks
from .test_ema import whole

WORDS, MASK = 342, 4


def configs(folder: Path) -> dict[str, Config]:
    """From published encoders at another resolution, and from a run at another resolution in drop."""
    plain = small_config(folder / "pairs.tar").model.model_dump(mode="json")
    image, text = {**plain["image"], "size": 96}, plain["text"]
    encoders = {
        **plain,
        "image": {**image, "pretrained": str(folder / "vit")},
        "text": {**text, "pretrained": str(folder / "roberta")},
    }
    drop = {"cell": 16, "mode": "drop"}
    another = {**plain, "image": image, "init_from": str(folder / "run")}
    return {
        "published": small_config(folder / "pairs.tar", model=encoders),
        "run": small_config(folder / "pairs.tar", model=another, masking=drop),
    }


def weights(config: Config, parallel: Parallel) -> dict[str, torch.Tensor]:
    first = first_weights(config, WORDS, MASK)
    assert len(first.values) > 20
    return whole(dict(build(config, parallel, WORDS, MASK, first).model.named_parameters()))


def several(folder: str) -> None:
    for name, config in configs(Path(folder)).items():
        with Parallel.start(config.parallel, "cpu") as parallel:
            assert parallel.sharded
            torch.save(weights(config, parallel), f"{folder}/{name}{parallel.rank}.pt")


def test_two_ranks_start_with_the_weights_of_one(tmp_path: Path) -> None:
    small_run(tmp_path / "run")
    vit(tmp_path / "vit", depth=1)
    roberta(tmp_path / "roberta", vocab_size=WORDS, num_hidden_layers=1, max_position_embeddings=42)

    run_ranks(2, several, str(tmp_path))

    for name, config in configs(tmp_path).items():
        with Parallel.start(config.parallel, "cpu") as parallel:
            alone = weights(config, parallel)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert found.keys() == alone.keys()
            assert all(torch.equal(found[key], value) for key, value in alone.items()), f"{name}, rank {rank}"
