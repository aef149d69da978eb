"""What is predicted without a GPU, against real steps on a CPU and against sharding itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mvle_kernels import contrastive_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mvle import capacity as program
from mvle.config import Config, load_config
from mvle.engine import capacity
from mvle.engine.blocks import ActivationCheckpointing, prepare_blocks
from mvle.engine.capacity import (
    CHOICES,
    Line,
    Weights,
    activation_lines,
    plan_ranks,
    rank_memory,
    traffic,
    with_depth_one,
)
from mvle.engine.gpus import GPUS
from mvle.engine.half_weights import HalfWeights
from mvle.engine.memory import LiveBytes, activation_bytes, contrast_bytes, model_on_meta, typical_batch
from mvle.engine.parallel import Parallel
from mvle.model.model import MaskVLM

WORDS, GIB = 1000, 2**30
SIZES = "{width: 64, heads: 2, image: {size: 112, depth: 2}, text: {depth: 2}, cross_depth: 2, decoder_depth: 1}"


def small(*overrides: str) -> Config:
    """Seven by seven patches, two blocks an encoder."""
    return load_config(None, [f"model={SIZES}", "masking.cell=16", "objectives.itm.group=8", *overrides])


def real_peak(step: Any) -> int:
    """Bytes that torch's allocator has given out at most while a step runs, beside those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_activations_are_those_of_a_real_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "TRACED", 32)
    config = small(f"masking.mode={mode}")

    lines = activation_lines(config, WORDS, CHOICES, torch.float32)

    for choice in CHOICES:
        real = real_peak(real_step(config, choice, 24))
        assert abs(lines[choice].at(24) - real) <= 0.15 * real, (choice, lines[choice].at(24), real)
    assert lines["none"].a_pair > 1.2 * lines["selective"].a_pair > 1.4 * lines["full"].a_pair


def real_step(config: Config, choice: ActivationCheckpointing, pairs: int) -> Any:
    """Forward and backward on real tensors, whose gradients exist already."""
    model = MaskVLM(config, WORDS, 4)
    model.init_weights(0)
    prepare_blocks(model, choice, compiled=False)
    batch = typical_batch(config, pairs)

    def step() -> None:
        model(batch, 0, model.counts(batch)).total.backward()

    step()
    return step


def test_bytes_alive_are_those_that_torchs_own_tracker_finds() -> None:
    config = with_depth_one(small("objectives.mlm.weight=0", "objectives.itm.weight=0"))
    model = model_on_meta(config, WORDS, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        batch = typical_batch(config, 8)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        theirs = MemTracker()
        theirs.track_external(model)
        with theirs:
            model(batch, 0, model.counts(batch)).total.backward()
    found = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]
    others = 2 * sum(map(size, model.parameters())) + size(batch.images)  # the tracker counts all that it meets

    (ours,) = activation_bytes(config, WORDS, (8,), "none", torch.bfloat16)

    assert ours == pytest.approx(found["Total"] - others, rel=0.001)


def test_bytes_of_a_contrast_are_those_of_a_real_one() -> None:
    z = torch.nn.functional.normalize(torch.randn(600, 4), dim=1).requires_grad_()
    ids, temperature = torch.arange(600), torch.full((1,), 0.07, requires_grad=True)

    def step() -> None:
        contrastive_loss(z, z, temperature, ids, ids)[0].backward()

    step()
    assert contrast_bytes() * 600**2 == pytest.approx(real_peak(step), rel=0.05)


# --- what sharding does ----------------------------------------------------------------------------------------------


class Received(TorchDispatchMode):
    """Bytes that a rank receives by gathering and by summing."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "_allgather_base_" in name:
            self.gathered += size(args[0]) - size(args[1])
        elif "_reduce_scatter_base_" in name:
            self.summed += size(args[1]) - size(args[0])
        return func(*args, **(kwargs or {}))


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.fixture
def four_ranks() -> Iterator[Parallel]:
    """Rank 0 of four that send nothing, sharding as on GPUs."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    parallel = Parallel(0, 1, torch.device("cpu"))
    parallel.ranks, parallel.mesh, parallel.device = 4, init_device_mesh("cpu", (4,)), torch.device("cuda")
    try:
        yield parallel
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sharded_step_takes_and_receives_what_is_predicted(four_ranks: Parallel, accumulate: int) -> None:
    config = with_depth_one(small())
    weights = Weights.of(model_on_meta(config, WORDS))
    model = model_on_meta(config, WORDS)
    prepare_blocks(model, "full", compiled=False)
    four_ranks.shard(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        batch = typical_batch(config, 8)
        shards = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
        with LiveBytes([*shards, batch.images, batch.text.rows, batch.text.offsets]) as tracker, Received() as received:
            for _ in range(accumulate if accumulate > 1 else 0):
                model.contrast_embeddings(batch, 0)
            for k in range(accumulate):
                with four_ranks.accumulating(model, last=k == accumulate - 1):
                    model(batch, 0, model.counts(batch)).total.backward()
    (activations,) = activation_bytes(config, WORDS, (8,), "full", torch.bfloat16)

    memory = rank_memory(weights, 4, 4, accumulate, ema=False)
    moved = traffic(config, weights, 1, 4, 8 * accumulate, accumulate)

    assert sum(s.numel() for s in shards) == memory.weights / 4
    assert tracker.live == pytest.approx(memory.gradients, rel=0.01)
    everything = memory.gradients + memory.gathered + memory.whole_gradients + activations
    assert tracker.peak <= everything <= 1.25 * tracker.peak
    assert received.gathered == pytest.approx(moved.weights, rel=0.01)
    assert received.summed == pytest.approx(moved.gradients, rel=0.01)


# --- what is made of it ----------------------------------------------------------------------------------------------


def plan(config: Config, ranks: int, gib: int | None = 40) -> capacity.RankPlan:
    weights = Weights.of(model_on_meta(config, WORDS))
    return plan_ranks(config, ranks, weights, {"none": Line(0.2 * GIB, 0.1 * GIB)}, gib, contrast_bytes())


def test_the_largest_micro_batch_fits_and_one_more_group_does_not() -> None:
    config = small("batch.total=4096", "data.slots=64")

    (fit,) = plan(config, 8).fits

    assert fit.largest is not None and fit.micro is not None
    assert fit.largest % 8 == 0 and 330 < fit.largest < 360  # 36 of 40 GiB, 0.1 a pair
    assert fit.micro == 256  # of the 512 pairs of a rank
    (tight,) = plan(small(f"batch.total={8 * fit.largest}", "data.slots=8"), 8).fits
    (over,) = plan(small(f"batch.total={8 * (fit.largest + 8)}", "data.slots=8"), 8).fits
    assert tight.total is not None and over.total is not None
    assert tight.total <= 36 * GIB < over.total


def test_one_rank_holds_copies_of_all_weights_and_their_gradients() -> None:
    """As half_weights.py makes them: measured, on a CPU, by what the buffers take."""
    config = load_config("tiny")
    model = model_on_meta(config, 342).to_empty(device="cpu")
    weights = Weights.of(model)
    memory = rank_memory(weights, 1, 1, 1, ema=False)
    copies = HalfWeights(model, ("forward",))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with copies.training():
        inside = [p for p in model.parameters() if p.dtype == torch.bfloat16]
        for parameter in inside:
            parameter.grad = torch.zeros_like(parameter)
        taken = sum(p.numel() * 2 for p in inside)
        gradients = sum(p.grad.numel() * 2 for p in inside if p.grad is not None)
    assert memory.gathered == pytest.approx(taken, rel=1e-4)  # the temperature alone has no copy
    assert memory.whole_gradients == pytest.approx(gradients, rel=1e-4)
    assert memory.gradients == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None) + 4


def test_ranks_that_cannot_share_the_batch_are_told_why_and_still_planned_for() -> None:
    found = plan(small("batch.total=512", "objectives.itm.group=32"), 64)

    assert found.problem is not None and "objectives.itm.group must divide" in found.problem
    assert found.fits[0].total is None and found.fits[0].largest


def test_copies_of_the_weights_are_shared_by_fewer_ranks_and_summed_between() -> None:
    weights = Weights.of(model_on_meta(small(), WORDS))
    apart, whole = traffic(small(), weights, 2, 4, 8, 1), traffic(small(), weights, 1, 8, 8, 1)

    assert plan(small("parallel.replicate=2", "batch.total=64"), 8).shard == 4
    assert apart.copies == 4 * weights.shard(4) and whole.copies == 0
    assert apart.weights == pytest.approx(whole.weights * (3 / 4) / (7 / 8))
    assert traffic(small(), weights, 1, 1, 8, 1).all == 0


# --- the program -----------------------------------------------------------------------------------------------------


LINES = {choice: Line(1e6, 1e6) for choice in CHOICES}
TINY = ["tiny", "model.image.depth=1", "model.text.depth=1", "model.cross_depth=1"]


def test_the_program_prints_a_page_and_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capacity, "TRACED", 32)
    arguments = [*TINY, "batch.total=64", "--ranks", "2,3", "--gpu", "H100"]
    assert program.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    made: list[Any] = []
    monkeypatch.setattr(capacity, "activation_lines", lambda *_: made.append(1) or LINES)  # once is enough to trace
    assert program.main(arguments) == 0
    page = capsys.readouterr().out

    assert [p["ranks"] for p in found["plans"]] == [2, 3] and set(found["activations"]) == set(CHOICES)
    assert found["flops_a_step"] == pytest.approx(64 * sum(found["flops_a_pair"].values()))
    assert found["plans"][0]["fits"][0]["micro"] == 32
    assert made and f"{sum(found['parameters'].values()) / 1e6:.1f}M parameters, 512 words" in page
    assert "3 ranks cannot run it as it is: batch.total must be a multiple" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "t4"], f"--gpu must be one of {', '.join(GPUS)}; got t4."),
        (["--ranks", "8,x"], "--ranks must be numbers above 0"),
        (["--ranks", "0"], "--ranks must be numbers above 0"),
        (["model.widht=3"], "model.widht"),
        (["parallel.replicate=3", "--ranks", "8"], "parallel.replicate must divide"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: list[str], message: str, capsys: Any) -> None:
    assert program.main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
