"""Blocks that make again what they did not keep, and compiled ones: the same gradients, less memory, and nothing
compiled again."""

from __future__ import annotations

import random
import shutil
from functools import partial

import pytest
import torch
from mvle_kernels import Packed, use_backend
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mvle.data.batch import Batch
from mvle.engine.blocks import prepare_blocks
from mvle.model.model import MaskVLM

from ..helpers import make_batch, make_config, make_model
from ..kernels.kernel_checks import needs_triton

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")


def model_of(keep: str = "none", compiled: bool = False, mode: str = "replace") -> MaskVLM:
    model = make_model(make_config(mode), dtype=torch.float32)
    prepare_blocks(model, keep, compiled)
    return model


def gradients(model: MaskVLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch, 0, model.counts(batch)).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    whole = torch.stack([g.norm() for g in one.values()]).norm()
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() < 1e-5 * whole, name


def ragged(step: int) -> Batch:
    """Captions and image ratios of other lengths in each step."""
    draw = random.Random(step)
    return make_batch([draw.randint(3, 16) for _ in range(8)], ratios=[draw.choice([0.5, 0.7, 1.0]) for _ in range(8)])


@pytest.fixture
def dynamo():
    """Counters of torch.compile, empty, and nothing compiled; the limit that prepare_blocks raises is put back."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["replace", "drop"])
@pytest.mark.parametrize("keep", ["selective", "full"])
def test_making_again_gives_the_same_gradients_to_the_bit(keep: str, mode: str) -> None:
    plain, again = (gradients(model_of(k, mode=mode), ragged(0)) for k in ("none", keep))

    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_each_kind_keeps_less_than_the_one_before() -> None:
    def kept(keep: str) -> int:
        """Bytes that are still there after a forward."""
        model, batch = model_of(keep), ragged(0)
        gradients(model, batch)  # what is made once is made
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            losses = model(batch, 0, model.counts(batch))
        size = sum(event.self_cpu_memory_usage for event in found.key_averages())
        del losses
        return size

    none, selective, full = kept("none"), kept("selective"), kept("full")
    assert full < 0.6 * selective < 0.5 * none


@needs_triton
def test_selective_keeps_what_attention_of_a_kernel_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvle_kernels import attention_triton

    def forwards(keep: str) -> int:
        model, batch = model_of(keep), make_batch([3, 5, 4, 4])
        with use_backend("ragged_attention=triton"):
            before = len(launched)
            gradients(model, batch)
        return len(launched) - before

    launched = []
    launch = attention_triton.launch
    monkeypatch.setattr(attention_triton, "launch", lambda *a, **k: launched.append(a[0]) or launch(*a, **k))

    once = forwards("none")
    assert once > 0 and forwards("selective") == once and forwards("full") > once


@pytest.mark.parametrize("compiled", [False, True])
def test_names_and_first_weights_stay_as_they_are(compiled: bool) -> None:
    config = make_config()
    plain, prepared = MaskVLM(config, 50, 4), MaskVLM(config, 50, 4)
    prepare_blocks(prepared, "full", compiled)
    for model in (plain, prepared):
        model.init_weights(3)

    assert [n for n, _ in plain.named_modules()] == [n for n, _ in prepared.named_modules()]
    assert plain.state_dict().keys() == prepared.state_dict().keys()
    assert all(torch.equal(prepared.state_dict()[n], value) for n, value in plain.state_dict().items())


def test_two_hundred_ragged_steps_compile_in_the_first_alone_and_nothing_breaks(dynamo, monkeypatch) -> None:
    # what is compiled, and how often, is decided before a backend writes code; writing C++ for all of it takes 20 s
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = model_of(mode="drop"), model_of("full", compiled=True, mode="drop")
    batches = [ragged(step) for step in range(200)]
    graphs = []
    for step, batch in enumerate(batches):
        if step < 5 or step % 40 == 0:
            assert_close(gradients(plain, batch), gradients(compiled, batch))
        else:  # a forward decides what is compiled; its backward was then
            compiled(batch, 0, compiled.counts(batch))
        graphs.append(dynamo["stats"]["unique_graphs"])
    with torch.no_grad():
        for batch in batches[:4]:
            compiled(batch, 0, compiled.counts(batch))
            graphs.append(dynamo["stats"]["unique_graphs"])

    assert len({(batch.text.total, batch.image_ratio.count(1.0)) for batch in batches}) > 20, "the steps are ragged"
    assert 8 <= graphs[0] <= 15, "one for each piece of the three kinds of blocks, and for its ways to be called"
    assert graphs[199] == graphs[2], graphs
    assert graphs[203] == graphs[201] <= 2 * graphs[0], graphs
    assert not dynamo["graph_break"], "no piece breaks"


@needs_compiler
def test_compiled_code_has_the_gradients_of_the_plain_one(dynamo) -> None:
    plain, compiled = model_of().text_encoder, model_of(compiled=True).text_encoder
    for step in range(3):
        text: Packed = ragged(step).text
        results = []
        for encoder in (plain, compiled):
            encoder.zero_grad()
            encoder(text).rows.pow(2).sum().backward()
            results.append({name: p.grad for name, p in encoder.named_parameters()})
        assert_close(*results)

    assert dynamo["stats"]["unique_graphs"] == 2
