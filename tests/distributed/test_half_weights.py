"""One GPU computes with bfloat16 copies of its weights, and trains to the bit what FSDP trains on one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mvle.engine.ema import Ema
from mvle.engine.half_weights import ALIGNED, HalfWeights
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import FORWARD_METHODS, Parallel

from .toy import Toy, pairs_of

ENTRIES = ("forward", *FORWARD_METHODS)
Weights = dict[str, Tensor]


def half(model: nn.Module) -> HalfWeights:
    model.half_weights = HalfWeights(model, ENTRIES)
    return model.half_weights


def train(model: Toy, micro: int, steps: int = 4) -> tuple[Weights, list[float]]:
    """Weights and norms after some steps, as the engine makes them."""
    parallel = Parallel(0, 1, torch.device("cpu"))
    if isinstance(getattr(model, "half_weights", None), HalfWeights):
        around: Callable = parallel.accumulating
    else:
        parallel.mesh = object()  # sharded
        around = parallel.accumulating
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, encoder_lr=5e-3))
    ema, norms = Ema(model, 0.5), []
    for step in range(steps):
        parts = pairs_of(step).bfloat16().split(micro)
        for k, part in enumerate(parts):
            with around(model, last=k == len(parts) - 1):
                (model(part) / 8).backward()
        norm, skipped = clip_and_step(optimizer, 1.0)
        ema.update(step, skipped)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.encode_images(parts[0])
        Parallel.reshard(model)
        norms.append(float(norm))
    found = {**dict(model.named_parameters()), **{f"ema {n}": t for n, t in ema.tensors().items()}}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in found.items()}, norms


@pytest.fixture
def one_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("micro", [8, 4], ids=["whole", "micro-batches"])
def test_it_trains_what_fsdp_trains_on_one_rank_bit_for_bit(one_rank: None, micro: int) -> None:
    ours = Toy()
    half(ours)
    weights, norms = train(ours, micro)

    theirs, mesh = Toy(), init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    fully_shard(theirs.temperature, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in theirs.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(theirs, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(theirs, "encode_images")
    expected, expected_norms = train(theirs, micro)

    assert norms == expected_norms
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].equal(weight), name
    assert not weights["embed.weight"].equal(Toy().embed.weight)


def test_a_forward_sees_half_weights_and_everyone_else_float32() -> None:
    model, seen = Toy(), {}
    copies = half(model)
    before = dict(model.named_parameters())
    model.blocks[0].register_forward_pre_hook(lambda m, x: seen.update(dict(model.named_parameters())))
    with copies.training():
        model(pairs_of(0).bfloat16()).backward()

    exact = [name for name, p in seen.items() if p.dtype == torch.float32]
    assert exact == ["temperature.value"]
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.dtype == torch.float32 for name, p in before.items())
    assert after["unused.weight"].grad is None
    assert all(p.grad.dtype == torch.float32 for name, p in after.items() if not name.startswith("unused"))
    assert all(p.grad is None for name, p in seen.items() if name not in exact)  # no second set of gradients is kept


def test_a_module_that_is_used_under_two_names_has_one_copy_and_one_gradient() -> None:
    model = Toy()
    model.blocks[1] = model.blocks[0]
    tied = nn.ModuleList([model.embed])  # another module that holds the same parameters
    model.again = nn.Linear(5, 7)
    model.again.weight = tied[0].weight
    copies = half(model)
    with copies.training():
        x = pairs_of(0).bfloat16()
        assert model.again.weight is model.embed.weight
        (model.again(x) + model.embed(x)).sum().backward()
    assert torch.allclose(model.embed.weight.grad, 2 * x.float().sum(0).expand(7, 5), rtol=2**-7)


def test_weights_that_others_changed_are_those_of_the_next_forward() -> None:
    model, x = Toy(), pairs_of(0).bfloat16()
    half(model)
    with torch.no_grad():
        first = model(x)
        model.embed.weight.mul_(2)  # as an optimizer, a checkpoint or an average does
        second = model(x)
        model._apply(lambda t: t.clone())  # other tensors in the same places, as `to` and `to_empty` leave
        model.embed.weight.mul_(0.5)
        third = model(x)
    assert first.equal(third) and not first.equal(second)


def test_what_would_lose_gradients_or_mix_two_forwards_is_refused() -> None:
    model, x = Toy(), pairs_of(0).bfloat16()
    copies = half(model)
    with pytest.raises(RuntimeError, match="must run inside Parallel.accumulating"):
        model(x)
    with copies.training():
        with pytest.raises(RuntimeError, match="another cannot begin inside it"), copies.training():
            pass
        model(x).backward()
    with torch.inference_mode():
        assert torch.isfinite(model(x))
    with pytest.raises(ZeroDivisionError), copies.training():
        raise ZeroDivisionError
    assert model.embed.weight.dtype == torch.float32  # also behind an error


def test_copies_begin_where_tensor_cores_can_read_them() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(64, 64), nn.Linear(1, 1), nn.Linear(128, 64))
    copies = half(model)
    with torch.no_grad():
        model[1](torch.zeros(1, 64))
        copies._enter()
    for module in (model[1], model[3]):
        for parameter in module.parameters():
            assert parameter.dtype == torch.bfloat16 and parameter.storage_offset() % ALIGNED == 0
    copies._leave()
