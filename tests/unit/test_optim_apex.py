"""AdamW by apex's kernel is torch's AdamW: the same weights, state, skips and checkpoints.

apex runs on a GPU alone. On a CPU a stand-in takes the place of its kernel: the same arguments, looked at one by one,
and the same arithmetic in plain torch. What is held here is everything around the kernel; the last test has the real
one.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mvle_kernels import optional
from torch import Tensor, nn

from mvle.engine.errors import OptimError
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.optim_apex import ApexAdamW

from ..distributed.ranks import run_ranks
from ..distributed.toy import Toy, pairs_of
from .checkpoint_run import Run

CHUNK = 2048 * 32


def kernel(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inverse: Tensor,
) -> None:
    """What amp_C.multi_tensor_adam_capturable makes of its arguments."""
    assert chunk == CHUNK and mode == 1 and bias_correction == 1
    assert noop.dtype == step.dtype == torch.int32 and noop.shape == step.shape == (1,)
    assert lr.dtype == inverse.dtype == torch.float32 and lr.shape == inverse.shape == (1,)
    assert len(lists) == 4 and len({len(tensors) for tensors in lists}) == 1
    assert all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for tensors in lists for t in tensors)
    if noop.item():
        return
    for g, p, m, v in zip(*lists, strict=True):
        assert p.numel() and g.shape == p.shape == m.shape == v.shape
        g.mul_(inverse)  # it leaves them so
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first, second = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
        update = (m / first) / ((v / second).sqrt() + eps) + weight_decay * p
        p.sub_(lr * update)


def stand_in() -> dict[str, ModuleType]:
    """The modules of an apex whose kernel is that of this file."""
    made = {name: ModuleType(name) for name in ("apex", "apex.optimizers", "apex.multi_tensor_apply", "amp_C")}
    for name, module in made.items():
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []  # type: ignore[attr-defined]
    made["amp_C"].multi_tensor_adam_capturable = kernel  # type: ignore[attr-defined]
    apply = lambda op, noop, lists, *rest: op(CHUNK, noop, lists, *rest)  # noqa: E731
    made["apex.multi_tensor_apply"].multi_tensor_applier = apply  # type: ignore[attr-defined]
    return made


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    made = stand_in()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    optional.apex.cache_clear()
    yield made
    optional.apex.cache_clear()


def by_apex(model: nn.Module, config: OptimConfig) -> ApexAdamW:
    """The groups that a run has, on a CPU, where a run would be refused."""
    groups = [dict(group) for group in build_optimizer(model, config).param_groups]  # type: ignore[arg-type]
    kept = ("params", "name", "peak", "lr", "weight_decay")
    return ApexAdamW([{key: group[key] for key in kept} for group in groups], config.betas, config.eps)


def stepped(model: nn.Module, optimizer: Any, steps: list[float]) -> list[Tensor]:
    """Train on losses times these numbers; the norms."""
    norms = []
    for i, scale in enumerate(steps):
        (model(pairs_of(i)) * scale).backward()
        norms.append(clip_and_step(optimizer, 1.0)[0])
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # far above the limit of clipping; far below it
def test_steps_are_those_of_torch(scale: float, apex: dict[str, ModuleType]) -> None:
    model, config = Toy(), OptimConfig(lr=1e-2, encoder_lr=3e-3, weight_decay=0.1)
    plain = copy.deepcopy(model)
    ours, theirs = by_apex(model, config), build_optimizer(plain, config)
    torch.testing.assert_close(stepped(model, ours, [scale] * 4), stepped(plain, theirs, [scale] * 4))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
        assert {k: v.shape for k, v in ours.state.get(a, {}).items()} == {
            k: v.shape for k, v in theirs.state.get(b, {}).items()
        }
        if b in theirs.state:
            assert ours.state[a]["step"].equal(theirs.state[b]["step"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, apex: dict[str, ModuleType]) -> None:
    model = Toy()
    optimizer = by_apex(model, OptimConfig(lr=1e-2))
    stepped(model, optimizer, [1.0])
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(list(optimizer.state.values()))
    stepped(model, optimizer, [bad])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for now, before in zip(optimizer.state.values(), state, strict=True):
        assert all(torch.equal(now[key], before[key]) for key in before)


def test_parameters_that_made_fewer_steps_are_corrected_by_their_own(apex: dict[str, ModuleType]) -> None:
    results = []
    for make in (by_apex, build_optimizer):
        model = Toy()
        optimizer = make(model, OptimConfig(lr=1e-2))
        model.embed.requires_grad_(False)  # two steps without it
        stepped(model, optimizer, [1.0, 1.0])
        model.embed.requires_grad_(True)
        stepped(model, optimizer, [1.0, 1.0])
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["torch", "apex"])
def test_a_checkpoint_of_one_backend_goes_on_under_the_other(
    first: str, tmp_path: Path, apex: dict[str, ModuleType]
) -> None:
    def run(backend: str) -> Run:
        made = Run(tmp_path / "checkpoints")
        if backend == "apex":
            made.optimizer = by_apex(made.model, OptimConfig(lr=1e-2))  # type: ignore[assignment]
        return made

    other = "apex" if first == "torch" else "torch"
    run(first).train(3).save()
    resumed = run(other).resume().train(3)
    whole = Run(tmp_path / "whole").train(6)
    assert resumed.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(resumed.tensors()[name], tensor, rtol=5e-5, atol=1e-6)


def on_two_ranks(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    sys.modules.update(stand_in())
    optional.apex.cache_clear()
    config, plain = OptimConfig(lr=1e-2), Toy()
    model = fully_shard(copy.deepcopy(plain), mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    ours, theirs = by_apex(model, config), build_optimizer(plain, config)
    stepped(model, ours, [1.0] * 3)
    stepped(plain, theirs, [1.0] * 3)  # both ranks have the same pairs
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), b, rtol=2e-5, atol=1e-6)
        assert a not in ours.state or isinstance(ours.state[a]["exp_avg"], DTensor)
    if dist.get_rank() == 0:
        Path(folder, "done").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_shards_of_two_ranks_are_stepped_as_the_whole(tmp_path: Path) -> None:
    run_ranks(2, on_two_ranks, str(tmp_path))
    assert (tmp_path / "done").exists()


# ---- where it cannot be had -----------------------------------------------------------------------------------------


def test_on_a_cpu_it_is_refused(apex: dict[str, ModuleType]) -> None:
    with pytest.raises(OptimError, match=r"optim\.backend=apex needs a GPU"):
        build_optimizer(Toy(), OptimConfig(backend="apex"))


def test_without_apex_or_with_another_package_of_that_name_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, apex: dict[str, ModuleType]
) -> None:
    def refusal() -> str:
        optional.apex.cache_clear()
        with pytest.raises(OptimError) as refused:
            by_apex(Toy(), OptimConfig())
        assert "github.com/NVIDIA/apex" in str(refused.value) or "too old" in str(refused.value)
        return str(refused.value)

    del apex["amp_C"].multi_tensor_adam_capturable  # type: ignore[attr-defined]
    assert "is too old" in refusal()
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert "without its CUDA extensions (amp_C)" in refusal()
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert "is not NVIDIA's" in refusal()
    monkeypatch.setitem(sys.modules, "apex", None)
    assert "not installed" in refusal()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex's kernel needs a GPU; torch sees none")
def test_the_real_kernel_makes_the_steps_of_torch() -> None:
    optional.apex.cache_clear()
    if reason := optional.apex()[1]:
        pytest.skip(f"apex: {reason}")
    model, config = Toy().cuda(), OptimConfig(lr=1e-2, weight_decay=0.1, backend="apex")
    plain = copy.deepcopy(model)
    ours, theirs = (
        build_optimizer(model, config),
        build_optimizer(plain, config.model_copy(update={"backend": "torch"})),
    )
    for one, optimizer in ((model, ours), (plain, theirs)):
        for i, scale in enumerate([1.0, math.nan, 1.0]):
            (one(*(x.cuda() for x in [pairs_of(i)])) * scale).backward()
            clip_and_step(optimizer, 1.0)
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
