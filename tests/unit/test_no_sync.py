"""A step never waits for the device: nothing in it asks a tensor for a value, or copies and waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mvle_kernels.packed import from_host
from torch import Tensor

from benchmarks.nosync import RefuseSyncs, SyncError, fake_device
from mvle.config import Config, check_ranks
from mvle.data.batch import Batch
from mvle.engine.build import Built, build
from mvle.engine.ema import Ema
from mvle.engine.metrics import Metrics
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel
from mvle.engine.train_step import TrainStep
from mvle.model.model import MaskVLM

from ..apex_stand_in import by_apex
from ..helpers import MASK, NAMES, VOCABULARY, make_batch, make_config
from .small_run import small_config

MODES = [("replace", "cross"), ("drop", "cross"), ("drop", "decoder")]
SUBSETS = [(0, s) for s in (("mim",), ("mlm",), ("itc",), ("itm",), ("mim", "mlm"), ("mlm", "itm"), ("itc", "itm"))]
SUBSETS += [(2, ("mim",)), (2, ("mim", "itm"))]  # in drop, MIM is what differs


def ragged() -> Batch:
    """Eight pairs, no two rows of lengths or ratios alike: nothing can be taken for a batch of equal lengths."""
    return make_batch((3, 11, 6, 8, 4, 5, 16, 7), ratios=[0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])


def alone(config: Config, device: torch.device | str = "cpu", built: Built | None = None) -> TrainStep:
    """The step of one rank."""
    parallel = Parallel(0, 1, torch.device(device))
    return TrainStep(config, parallel, check_ranks(config, 1), built or build(config, parallel, VOCABULARY, MASK))


def config_of(mode: str, insert: str, micro: int | None = None, **sections: Any) -> Config:
    masking = {"cell": 16, "image_ratio": [0.3, 1.0], "mode": mode, "insert": insert}
    return small_config(Path("pairs.tar"), masking=masking, batch={"total": 8, "micro": micro}, **sections)


# ---- what is refused ------------------------------------------------------------------------------------------------

ASKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, flags: x.sum().item(),
    "if": lambda x, flags: bool(flags.all()),
    "tolist": lambda x, flags: x.tolist(),
    "cpu": lambda x, flags: x.cpu(),
    "nonzero": lambda x, flags: flags.nonzero(),
    "where": lambda x, flags: torch.where(flags),
    "masked_select": lambda x, flags: x.masked_select(flags),
    "bool as index": lambda x, flags: x[flags],
    "bool as index of a write": lambda x, flags: x.index_put_((flags,), x.new_zeros(())),
    "unique": lambda x, flags: torch.unique(x),
    "unique_consecutive": lambda x, flags: torch.unique_consecutive(x),
    "repeat_interleave": lambda x, flags: torch.repeat_interleave(x, flags.long()),
    "equal": lambda x, flags: torch.equal(x, x + 1),
    "bincount": lambda x, flags: torch.bincount(flags.long()),
    "masked_fill with a tensor": lambda x, flags: x.masked_fill(flags, x.sum()),
}
COPIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor from a list": lambda x, flags: torch.tensor([1, 2], device=x.device),
    "tensor from a number": lambda x, flags: torch.as_tensor(3, device=x.device),
    "to": lambda x, flags: torch.ones(3).to(x.device),
    "copy_": lambda x, flags: x.copy_(torch.ones(4)),
    "to the host": lambda x, flags: x.to("cpu", non_blocking=True),
    "write of a bool": lambda x, flags: flags.__setitem__(flags.long(), True),
    "index from the host": lambda x, flags: x[torch.tensor([0, 1])],
}
FREE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "numbers": lambda x, flags: torch.where(flags, 0.0, x * 2 + 1).clamp(max=3).masked_fill(flags, 1),
    "index": lambda x, flags: x[flags.long()],
    "repeat_interleave of known size": lambda x, flags: torch.repeat_interleave(x, flags.long(), output_size=4),
    "write of a number to a slice": lambda x, flags: x[1:].fill_(2),
    "equal numbers": lambda x, flags: from_host([2, 2, 2], torch.int64, x.device),
}


def assert_refused(asks: Callable[[Tensor, Tensor], Any], x: Tensor, flags: Tensor) -> None:
    with RefuseSyncs(), pytest.raises(SyncError, match=r"waits for the device.*test_no_sync.py:\d+ <lambda>"):
        asks(x, flags)


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_what_asks_the_cpu_is_refused(asks: Callable[[Tensor, Tensor], Any]) -> None:
    assert_refused(asks, torch.ones(4), torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("asks", (ASKS | COPIES).values(), ids=ASKS | COPIES)
def test_what_asks_the_device_and_a_copy_that_is_waited_for_are_refused(asks: Callable[[Tensor, Tensor], Any]) -> None:
    with fake_device() as device:
        assert_refused(asks, torch.ones(4, device=device), torch.ones(4, dtype=torch.bool, device=device))


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
def test_what_does_not_wait_is_let_through(free: Callable[[Tensor, Tensor], Any]) -> None:
    with fake_device() as device:
        x, flags = torch.ones(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
        with RefuseSyncs() as watch:
            free(x, flags)
            assert not watch.copies
            from_host([1, 2, 3], torch.int64, device)

    assert [name.split()[1] for name in watch.copies] == ["from_host"]


@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
def test_a_backward_is_watched_too(fake: bool) -> None:
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * grad.sum().item()

    def run(x: Tensor) -> None:
        out = Asks.apply(x.requires_grad_()).sum()
        with RefuseSyncs(), pytest.raises(SyncError, match="_local_scalar_dense.*test_no_sync.py:.*backward"):
            out.backward()

    if not fake:
        run(torch.ones(3))
        return
    with fake_device(backward=True) as device:
        run(torch.ones(3, device=device))


# ---- the step -------------------------------------------------------------------------------------------------------


def fake_step(
    batch: Batch,
    mode: str,
    insert: str,
    losses: tuple[str, ...] = NAMES,
    backward: bool = False,
    **more: Any,
) -> tuple[int, int]:
    """Copies to the device in counts and forward, on a fake CUDA device, and in the backward, if it is to be: then on
    another fake device."""
    weights = [float(name in losses) for name in NAMES]
    with fake_device(backward) as device:
        with device:
            model = MaskVLM(make_config(mode, insert, weights, **more), VOCABULARY, MASK)
        batch = batch.to(device)
        with RefuseSyncs() as watch:
            total = model(batch, 0, model.counts(batch)).total
            forward = watch.copies.total()
            if backward:
                total.backward()
    return forward, watch.copies.total() - forward


@pytest.mark.parametrize("mode, insert", MODES)
def test_a_forward_on_a_fake_gpu_waits_for_nothing(mode: str, insert: str) -> None:
    copies, _ = fake_step(ragged(), mode, insert)

    # lengths, ratios and (here) colours that differ: what a step has to tell the device, each in a few hundred bytes
    assert 0 < copies <= {"replace": 9, "drop": 11}[mode]


@pytest.mark.parametrize("mode, insert", MODES)
def test_a_backward_waits_for_nothing_and_tells_the_device_nothing(mode: str, insert: str) -> None:
    _, copies = fake_step(ragged(), mode, insert, backward=True)

    assert copies == 0


@pytest.mark.parametrize("mode, losses", SUBSETS, ids=str)
def test_no_subset_of_losses_waits(mode: int, losses: tuple[str, ...]) -> None:
    fake_step(ragged(), *MODES[mode], losses, backward=True)


def test_images_that_show_less_do_not_wait() -> None:
    batch = make_batch((3, 11, 6, 8), ratios=[0.3, 0.5, 0.6, 0.7], side=32)

    fake_step(batch, "drop", "cross", backward=True, clean_keep=0.5)


def test_equal_lengths_are_made_on_the_device() -> None:
    copies, _ = fake_step(make_batch([9] * 8), "replace", "cross")

    # twice the colours, which differ here, and in two stages which rows of a sequence are read
    assert copies <= 4


def test_micro_batches_with_one_contrast_wait_for_nothing() -> None:
    config, batch = config_of("replace", "cross", micro=4), ragged()
    with fake_device(backward=True) as device:
        with device:
            model = MaskVLM(config, VOCABULARY, MASK)
        train = alone(config, device, Built(model, None, None, {}))  # type: ignore[arg-type]
        batch = batch.to(device)
        with RefuseSyncs():
            pieces = train.pieces(batch)
            sums, _, _ = train.backward(pieces, model.counts(batch), train.contrast(batch, pieces))

    assert len(pieces) == 2 and sums["itc"].device.type == device.type


@pytest.mark.parametrize("build_one", [build_optimizer, by_apex], ids=["torch", "apex"])
def test_optimizer_and_average_on_a_fake_gpu_wait_for_nothing(build_one: Callable[..., Any]) -> None:
    with fake_device() as device:
        with device:
            model = MaskVLM(make_config(), VOCABULARY, MASK)
        optimizer, ema = build_one(model, OptimConfig()), Ema(model, 0.99)
        with RefuseSyncs() as watch:
            for step in range(2):  # the first makes the state
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                norm, skipped = clip_and_step(optimizer, 1.0)
                model.clamp_temperature()
                ema.update(step, skipped)
                optimizer.zero_grad(set_to_none=True)

    assert norm.device.type == skipped.device.type == "cuda"
    assert not watch.copies


@pytest.mark.parametrize("micro", [None, 4], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("mode, insert", MODES)
def test_the_whole_step_with_its_metrics_asks_for_no_value(
    mode: str, insert: str, micro: int | None, tmp_path: Path
) -> None:
    config = config_of(mode, insert, micro, optim={"ema": 0.99}, metrics={"gradient_norms": 2, "every": 9})
    train, batch = alone(config), ragged()
    with Metrics(tmp_path / "metrics.jsonl", config.metrics, train.parallel, steps=99, pairs=8) as metrics:
        results = []
        with RefuseSyncs():
            for step in range(2):
                result = train(step, batch)
                metrics.extra(result.norms)
                metrics.update(step + 1, result.sums, result.state, skipped=result.skipped, wait=0.0, lr=result.lr)
                results.append(result)

    assert [sorted(r.norms) for r in results] == [[], sorted(f"grad_norm_{name}" for name in NAMES)]
    assert float(results[1].sums["loss"]) < float(results[0].sums["loss"])


@pytest.mark.gpu
@pytest.mark.parametrize("mode, insert", MODES)
def test_a_step_on_a_gpu_never_waits_for_it(mode: str, insert: str) -> None:
    config, batch = config_of(mode, insert, optim={"ema": 0.99}), ragged()
    with Parallel.start(config.parallel, "cuda") as parallel:
        train = TrainStep(config, parallel, check_ranks(config, 1), build(config, parallel, VOCABULARY, MASK))
        batch = batch.to(parallel.device)
        train(0, batch)  # libraries are loaded, memory is allocated
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (1, 2):
                result = train(step, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert result.sums["loss"].isfinite()
