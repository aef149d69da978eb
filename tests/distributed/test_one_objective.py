"""One objective, whatever the ranks: the same pairs, masks and negatives, the same losses and gradients.

One process takes three optimizer steps over a real loader and writes down what it saw. Then the same steps, each from
the same weights, on other numbers of ranks, in micro-batches, and in two copies of two shards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvle.config import Config, check_ranks
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer, all_captions, train_bpe
from mvle.engine.build import Built, contrast_over_ranks
from mvle.engine.optim import build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel
from mvle.engine.train_step import TrainStep
from mvle.model.model import MaskVLM
from mvle.objectives import itm

from ..unit.small_run import small_config, write_shard
from .ranks import free_port, run_ranks

STEPS, TOTAL, GROUP = 3, 24, 2
MASKING: dict[str, dict[str, Any]] = {
    "replace": {"mode": "replace"},
    "drop": {"mode": "drop"},
    "keep": {"mode": "replace", "clean_keep": 0.5},  # and smaller images in the first step
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Way:
    """A way to share the same global batch."""

    accumulate: int = 1
    replicate: int = 1
    mode: str = "replace"  # of MASKING

    def size(self, step: int) -> int:
        """Side of the images, pixels."""
        return 32 if self.mode == "keep" and step == 0 else 64

    def config(self, shard: str, ranks: int) -> Config:
        micro = TOTAL // ranks // self.accumulate
        return small_config(
            Path(shard),
            masking={"cell": 16, "image_ratio": [0.6, 1.0], **MASKING[self.mode]},
            objectives={"itm": {"group": GROUP}, "mim": {"kind": "l1+mse"}},
            batch={"total": TOTAL, "micro": micro},
            data={"train": [shard], "slots": 12, "crop_scale": [0.5, 1.0]},
            parallel={"replicate": self.replicate},
        )


class Observed:
    """A model on this rank, and what its steps draw: masks and negatives by pair."""

    def __init__(self, way: Way, shard: str, parallel: Parallel, dtype: torch.dtype) -> None:
        config = way.config(shard, parallel.ranks)
        shards, tokenizer = data_of(shard, config.tokenizer.vocabulary)
        with torch.device("meta"):
            model = MaskVLM(config, tokenizer.vocabulary, tokenizer.mask_id).to(dtype)
        parallel.shard(model)
        model.to_empty(device="cpu")
        model.init_weights(0)
        contrast_over_ranks(model, parallel, True)
        self.parallel, self.model = parallel, model
        self.optimizer = build_optimizer(model, config.optim)
        self.train = TrainStep(
            config, parallel, check_ranks(config, parallel.ranks), Built(model, self.optimizer, None, {})
        )
        plan = SamplingPlan.build(config, shards)
        self.loader = Loader(
            config.data, plan, shards, tokenizer, way.size, 40, 16, parallel.rank, parallel.ranks, steps=STEPS
        )
        self.masks: dict[int, Tensor] = {}
        self.negatives: dict[int, Tensor] = {}
        self._watch_masks()

    def _watch_masks(self) -> None:
        choose = self.model.choose

        def watched(batch: Any, *arguments: Any) -> Any:
            choices = choose(batch, *arguments)
            clean = [torch.zeros(0)] * len(batch) if choices.clean is None else choices.clean.unpack()
            drawn = (choices.masked.unpack(), choices.tokens.unpack(), clean)
            for pair, masked, tokens, shown in zip(batch.pair_ids.tolist(), *drawn, strict=True):
                end = torch.tensor([-1])
                self.masks[pair] = torch.cat([masked.long(), end, tokens.long(), end, shown.long()])
            return choices

        self.model.choose = watched  # type: ignore[method-assign]

    def see_negatives(self, step: Any, group: int) -> Any:
        image, text, valid = DRAW(step, group)
        ids = step.batch.pair_ids
        for i, pair in enumerate(ids.tolist()):
            self.negatives[pair] = torch.stack([ids[image.index[i]], ids[text.index[i]], valid[i].long()])
        return image, text, valid

    def step(self, batch: Any) -> dict[str, Any]:
        """Forward and backward of the global batch; what this rank saw of it, and the whole gradients."""
        self.masks.clear()
        self.negatives.clear()
        counts = self.parallel.all_reduce_sum(self.model.counts(batch))
        pieces = self.train.pieces(batch)
        sums, _, _ = self.train.backward(pieces, counts, self.train.contrast(batch, pieces))
        report = {name: self.parallel.all_reduce_sum(value.double()) for name, value in sums.items()}
        gradients = {n: whole(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        drawn = {"keys": batch.keys, "ids": batch.pair_ids, "images": batch.images.clone()}
        return {
            **drawn,
            "masks": dict(self.masks),
            "negatives": dict(self.negatives),
            "report": report,
            "grad": gradients,
        }


@cache
def data_of(shard: str, vocabulary: int) -> tuple[ShardSet, Tokenizer]:
    shards = ShardSet.open([shard])
    return shards, train_bpe(all_captions(shards), vocabulary)


DRAW = itm.draw_negatives


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def alone(folder: str, mode: str, dtype: torch.dtype) -> None:
    """The reference: one process, one forward a step, real optimizer steps."""
    with Parallel.start(Way().config(f"{folder}/pairs.tar", 1).parallel, "cpu") as parallel:
        seen = Observed(Way(mode=mode), f"{folder}/pairs.tar", parallel, dtype)
        itm.draw_negatives = seen.see_negatives
        steps = []
        try:
            for batch in seen.loader:
                weights = {n: p.detach().clone() for n, p in seen.model.named_parameters()}
                found = seen.step(batch)
                steps.append({"weights": weights, **found})
                for name, parameter in seen.model.named_parameters():
                    if name in found["grad"]:  # drop mode has a mask token that nothing reads
                        parameter.grad = found["grad"][name].clone()  # the fused optimizer scales it in place
                clip_and_step(seen.optimizer, 1.0)
                seen.optimizer.zero_grad(set_to_none=True)
        finally:
            itm.draw_negatives = DRAW
        torch.save(steps, f"{folder}/{mode}-{dtype}.pt".replace("torch.", ""))


def shared(folder: str, ways: list[Way], ports: list[int], ranks_to_break: bool = False) -> None:
    """On each rank: every way, in both precisions, held against the reference."""
    for way, port in zip(ways, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = way.config(f"{folder}/pairs.tar", int(os.environ.get("WORLD_SIZE", "1")))
        with Parallel.start(config.parallel, "cpu") as parallel:
            for dtype, tolerance in TOLERANCE.items():
                hold(folder, way, parallel, dtype, tolerance)


def hold(folder: str, way: Way, parallel: Parallel, dtype: torch.dtype, tolerance: float) -> None:
    expected = torch.load(f"{folder}/{way.mode}-{dtype}.pt".replace("torch.", ""), weights_only=True)
    seen = Observed(way, f"{folder}/pairs.tar", parallel, dtype)
    itm.draw_negatives = seen.see_negatives
    where = f"{way}, {parallel.ranks} ranks, {dtype}"
    for at, (batch, want) in enumerate(zip(seen.loader, expected, strict=True)):
        set_weights(seen.model, want["weights"])
        got = seen.step(batch)
        mine = slice(parallel.rank * len(batch), (parallel.rank + 1) * len(batch))
        assert got["keys"] == want["keys"][mine], where
        assert torch.equal(got["ids"], want["ids"][mine]) and torch.equal(got["images"], want["images"][mine])
        for pair in got["ids"].tolist():
            assert torch.equal(got["masks"][pair], want["masks"][pair]), f"masks of pair {pair}, {where}"
            if dtype == torch.float64:  # similarities in float32 differ in their last bits, and may change a draw
                assert torch.equal(got["negatives"][pair], want["negatives"][pair]), f"negatives of {pair}, {where}"
        for name, value in want["report"].items():
            difference = abs(float(got["report"][name]) - float(value))
            assert difference <= tolerance * max(abs(float(value)), 1.0), f"{name} at step {at}, {where}: {difference}"
        worst, name = largest_difference(want["grad"], got["grad"])
        assert worst <= tolerance, f"gradient of {name} at step {at}, {where}: {worst}"
    itm.draw_negatives = DRAW


def set_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[name]
            if hasattr(parameter, "device_mesh"):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> tuple[float, str]:
    """Of any parameter's gradient, as a share of max(its norm, 1e-4 of the whole gradient's norm); and whose."""
    assert one.keys() == two.keys()
    total = torch.stack([g.norm() for g in one.values()]).norm()
    return max((float((two[n] - g).norm() / torch.maximum(g.norm(), 1e-4 * total)), n) for n, g in one.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("one_objective")
    write_shard(made / "pairs.tar", images=60, repeat_first=True)
    for mode in MASKING:
        for dtype in TOLERANCE:
            alone(str(made), mode, dtype)
    return str(made)


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (1, [Way(accumulate=2), Way(accumulate=4, mode="drop")]),
        (2, [Way(), Way(accumulate=2), Way(mode="drop"), Way(accumulate=2, mode="keep")]),
        (3, [Way(accumulate=2)]),
        (4, [Way(), Way(accumulate=3), Way(replicate=2)]),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "",
)
def test_any_number_of_ranks_has_the_pairs_masks_negatives_losses_and_gradients_of_one(
    folder: str, ranks: int, ways: list[Way]
) -> None:
    if ranks == 1:
        shared(folder, ways, [0] * len(ways))
    else:
        run_ranks(ranks, shared, folder, ways, [free_port() for _ in ways])
