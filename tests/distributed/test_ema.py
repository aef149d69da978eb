"""The average of the weights: the same on one process and on sharded ranks, blind to skipped steps, and exchanged
with the weights without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvle.engine.ema import Ema
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel, ParallelConfig

from .ranks import run_ranks
from .toy import Toy, pairs_of

DECAY = 0.3  # reached in the fourth step: the first follow the weights more closely


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full copies of what may be sharded. Every rank must ask."""
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def averaged_steps(result: str) -> None:
    """Six steps, the third not finite. Rank 0 writes the weights after each of them and the average."""
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        with torch.device("meta"):
            model = Toy()
        model.unused.requires_grad_(False)
        parallel.shard(model)
        model.to_empty(device="cpu")
        first = Toy()
        for (_, parameter), value in zip(model.named_parameters(), first.parameters(), strict=True):
            put(parameter, value.detach())
        with torch.no_grad():
            model.scale.copy_(first.scale)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        ema = Ema(model, DECAY)
        history, shadows = [whole(parameters(model))], [whole(ema.tensors())]
        for step in range(6):
            mine = pairs_of(step).chunk(parallel.ranks)[parallel.rank]
            if step == 2 and parallel.rank == 0:
                mine = mine * float("nan")
            (model(mine) * parallel.ranks / 8).backward()
            _, skipped = clip_and_step(optimizer, 1.0)
            optimizer.zero_grad(set_to_none=True)
            ema.update(step, skipped)
            history.append(whole(parameters(model)))
            shadows.append(whole(ema.tensors()))

        # exchanged for a forward, with the root still gathered from the one before, and back in spite of an error
        pairs = pairs_of(9).chunk(parallel.ranks)[parallel.rank]
        with torch.no_grad():
            before = model.encode_images(pairs)
            with pytest.raises(RuntimeError, match="in validation"), ema.swapped(model):
                inside = model.encode_images(pairs)
                raise RuntimeError("in validation")
            after = model.encode_images(pairs)
        parallel.reshard(model)
        assert torch.equal(before, after)
        restored, kept = whole(parameters(model)), whole(ema.tensors())
        ema.reset()
        again = whole(ema.tensors())
        if parallel.is_main:
            outcome = {"history": history, "shadows": shadows, "inside": inside}
            torch.save(outcome | {"restored": restored, "kept": kept, "again": again}, result)


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter, sharded or not."""
    with torch.no_grad():
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 ranks"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    result = str(tmp_path_factory.mktemp("ema") / "result.pt")
    if request.param == 1:
        averaged_steps(result)
    else:
        run_ranks(request.param, averaged_steps, result)
    return torch.load(result, weights_only=True)


def test_it_starts_as_the_weights_and_follows_the_formula(outcome: dict) -> None:
    trained = {name for name in outcome["history"][0] if not name.startswith("unused")}
    for name in trained:
        expected = outcome["history"][0][name].double()
        for step, weights in enumerate(outcome["history"][1:]):
            if step != 2:
                decay = min(DECAY, (1 + step) / (10 + step))
                expected = decay * expected + (1 - decay) * weights[name]
            torch.testing.assert_close(outcome["shadows"][step + 1][name].double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(outcome["shadows"][-1][name], outcome["history"][-1][name]), name
    assert outcome["shadows"][0].keys() == trained, "what is not trained has no average"


def test_a_skipped_step_leaves_it_as_it_was_to_the_bit(outcome: dict) -> None:
    for name, shadow in outcome["shadows"][2].items():
        assert torch.equal(outcome["shadows"][3][name], shadow), name
        assert not torch.equal(outcome["shadows"][4][name], shadow), name


def test_swapped_computes_with_the_average_and_gives_the_weights_back_to_the_bit(outcome: dict) -> None:
    alone = Toy()
    alone.load_state_dict(outcome["history"][-1] | outcome["shadows"][-1], strict=False)
    with torch.no_grad():
        mine = pairs_of(9)[: len(outcome["inside"])]
        torch.testing.assert_close(outcome["inside"], alone.encode_images(mine))
    for name, weight in outcome["history"][-1].items():
        assert torch.equal(outcome["restored"][name], weight), name
    for name, shadow in outcome["shadows"][-1].items():
        assert torch.equal(outcome["kept"][name], shadow), name


def test_reset_starts_again_from_the_weights(outcome: dict) -> None:
    for name, shadow in outcome["again"].items():
        assert torch.equal(shadow, outcome["history"][-1][name]), name
