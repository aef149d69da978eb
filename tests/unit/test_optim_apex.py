"""AdamW by apex's kernel is torch's AdamW: the same weights, state, skips and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mvle_kernels import optional
from torch import Tensor, nn

from mvle import train
from mvle.config import Config, differences
from mvle.engine.errors import OptimError
from mvle.engine.optim import OptimConfig, build_optimizer, check_optimizer, clip_and_step
from mvle.engine.optim_apex import ApexAdamW

from ..apex_stand_in import CALLS, by_apex
from ..distributed.toy import Toy, pairs_of
from .checkpoint_run import Run

CONFIG = OptimConfig(lr=1e-2, encoder_lr=3e-3, weight_decay=0.1, betas=(0.85, 0.95), eps=1e-6)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, scales: list[float], frozen: str = "") -> list[Tensor]:
    """Train on losses times these numbers, with one module that gets no gradient; the norms."""
    norms = []
    for i, scale in enumerate(scales):
        (model(pairs_of(i)) * scale).backward()
        if frozen:
            model.get_submodule(frozen).zero_grad(set_to_none=True)
        norms.append(clip_and_step(optimizer, 1.0)[0])
        optimizer.zero_grad()
    return norms


def both(work: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> tuple[ApexAdamW, torch.optim.Optimizer]:
    """The same work under each backend: weights and state must be the same."""
    made: list[Any] = []
    for build in (by_apex, build_optimizer):
        model = Toy()
        optimizer = build(model, CONFIG)
        work(model, optimizer)
        made.append((dict(model.named_parameters()), optimizer))
    (weights, ours), (expected, theirs) = made
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        state, truth = ours.state.get(weight, {}), theirs.state.get(expected[name], {})
        assert list(state) == list(truth) and all(state[key].dtype == truth[key].dtype for key in truth)
        torch.testing.assert_close(dict(state), dict(truth), **CLOSE)
    return ours, theirs


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # far above the limit of clipping; far below it
def test_steps_are_those_of_torch(scale: float) -> None:
    norms = []

    both(lambda model, optimizer: norms.append(stepped(model, optimizer, [scale] * 4)))

    torch.testing.assert_close(*norms)


def test_each_group_is_one_call_with_all_its_gradients() -> None:
    CALLS.clear()

    ours, _ = both(lambda model, optimizer: stepped(model, optimizer, [1.0] * 2))

    shapes = [[tuple(p.shape) for p in g["params"] if p in ours.state] for g in ours.param_groups]
    assert len(shapes) == 4 and shapes * 2 == CALLS


def test_a_rate_that_changes_is_that_of_the_step() -> None:
    def warm_up(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for factor in (0.1, 0.5, 1.0):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            stepped(model, optimizer, [1.0])

    both(warm_up)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_to_the_bit(bad: float) -> None:
    model = Toy()
    optimizer = by_apex(model, CONFIG)
    stepped(model, optimizer, [1.0])
    held = [p.detach() for p in model.parameters()] + [t for s in optimizer.state.values() for t in s.values()]
    before = [tensor.clone() for tensor in held]

    (model(pairs_of(1)) * bad).backward()
    gradients = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    _, skipped = clip_and_step(optimizer, 1.0)

    assert skipped.item() == 1
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
    assert all(torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0)) for p, g in gradients.items())


def test_a_first_step_that_is_skipped_is_not_counted() -> None:
    ours, _ = both(lambda model, optimizer: stepped(model, optimizer, [math.nan, 1.0, math.nan, 1.0]))

    assert {state["step"].item() for state in ours.state.values()} == {2.0}


def test_each_parameter_is_corrected_by_the_steps_that_it_has_made_itself() -> None:
    def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        stepped(model, optimizer, [1.0], frozen="embed")  # it comes later,
        stepped(model, optimizer, [1.0, 1.0])
        stepped(model, optimizer, [1.0, 1.0], frozen="temperature")  # another stays behind,
        stepped(model, optimizer, [1.0, 1.0])  # and steps with the others again

    ours, _ = both(work)

    assert {state["step"].item() for state in ours.state.values()} == {5.0, 6.0, 7.0}


def test_without_a_scale_and_a_flag_it_steps_as_torch_does() -> None:
    def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(pairs_of(0)).backward()
        optimizer.step()

    both(work)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def run(folder: Path, backend: str) -> Run:
    made = Run(folder, ema=True)
    if backend == "apex":
        made.optimizer = by_apex(made.model, OptimConfig(lr=1e-2))
    return made


@pytest.mark.parametrize("first, then", [("torch", "apex"), ("apex", "torch")])
def test_a_checkpoint_of_one_backend_goes_on_under_the_other(first: str, then: str, tmp_path: Path) -> None:
    run(tmp_path, first).train(3).save()

    resumed = run(tmp_path, then).resume().train(3)

    whole = run(tmp_path / "whole", "torch").train(6).tensors()
    assert resumed.tensors().keys() == whole.keys() and any(name.startswith("ema.") for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed.tensors()[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_under_apex_that_goes_on_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path, "apex").train(3).save()
    CALLS.clear()

    resumed = run(tmp_path, "apex").resume().train(3)

    assert len(CALLS) == 3 * 4  # counters that were loaded one by one are shared again
    whole = run(tmp_path / "whole", "apex").train(6).tensors()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.tensors().items())


def test_loaded_counters_that_differ_stay_apart(tmp_path: Path) -> None:
    def train_and_go_on(backend: str) -> Run:
        started = run(tmp_path / backend, backend)
        stepped(started.model, started.optimizer, [1.0], frozen="embed")
        started.train(2).save()
        return run(tmp_path / backend, backend).resume().train(2)

    ours, theirs = train_and_go_on("apex").tensors(), train_and_go_on("torch").tensors()

    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert {float(t) for name, t in ours.items() if name.endswith(".step")} == {4.0, 5.0}


def test_a_run_may_go_on_under_another_backend() -> None:
    before, now = (Config.from_dict({"optim": {"backend": name}}) for name in ("torch", "apex"))

    assert not differences(now, before)


# ---- where it cannot be had -----------------------------------------------------------------------------------------


def test_a_model_on_a_cpu_is_refused() -> None:
    with pytest.raises(OptimError, match=r"optim\.backend=apex needs a GPU; got parameters on cpu"):
        build_optimizer(Toy(), OptimConfig(backend="apex"))


def test_parameters_of_other_dtypes_are_refused() -> None:
    with pytest.raises(OptimError, match=r"takes float32 parameters; got torch\.bfloat16"):
        by_apex(Toy().bfloat16(), CONFIG)


def test_a_run_on_a_cpu_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert train.main(["tiny", "optim.backend=apex", "run.device=cpu"]) == train.UNUSABLE

    assert "optim.backend=apex needs a GPU; got run.device=cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_check_at_the_start_says_what_is_missing_and_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimConfig(backend="apex")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptimError, match="needs a GPU; got none that torch sees"):
        check_optimizer(config, "auto")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optional, "apex", lambda: (None, "the installed package is another one"))
    with pytest.raises(OptimError, match=r"is another one\. To have it: APEX_CPP_EXT=1.*NVIDIA/apex.*backend=torch"):
        check_optimizer(config, "auto")

    check_optimizer(OptimConfig(), "auto")


@pytest.mark.gpu
def test_the_real_kernel_makes_the_steps_of_torch() -> None:
    if reason := optional.apex()[1]:
        pytest.skip(f"apex cannot be used: {reason}")
    weights = []
    for backend in ("apex", "torch"):
        model = Toy().cuda()
        model.big = nn.Parameter(torch.linspace(-1, 1, 3 * 65536 + 5, device="cuda"))  # several blocks
        optimizer = build_optimizer(model, CONFIG.model_copy(update={"backend": backend}))
        for i, scale in enumerate([1.0, math.nan, 1.0]):
            ((model(pairs_of(i).cuda()) + model.big.pow(2).sum()) * scale).backward()
            clip_and_step(optimizer, 1.0)
            optimizer.zero_grad()
        assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
        weights.append(list(model.parameters()))
    torch.testing.assert_close(*weights, **CLOSE)
