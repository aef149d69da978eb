"""What kernels are compiled for is what steps of the packaged recipes launch: sizes, and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from mvle_kernels import use_backend
from mvle_kernels.attention import ATTENTION
from mvle_kernels.layout import padded_length
from mvle_kernels.recipes import RECIPES
from mvle_kernels.regress import kernel_files
from mvle_kernels.triton_support import captured, power_of_2
from torch import Tensor

from benchmarks.shapes import MASK, MODES, make_batch
from mvle.config import load_config
from mvle.engine.memory import model_on_meta
from mvle.model.model import MaskVLM

from .kernel_checks import DEVICE, needs_triton


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_they_are_those_of_the_config(name: str) -> None:
    recipe, model = RECIPES[name], load_config(name).model
    image = model.image
    assert (recipe.width, recipe.heads, recipe.mlp) == (model.width, model.heads, model.mlp_ratio * model.width)
    assert (recipe.patches, recipe.patch) == ((image.size // image.patch) ** 2, image.patch)
    assert recipe.tokens == model.text.max_tokens and recipe.vocabulary % 128 == 0
    cells = (image.size // load_config(name).masking.cell) ** 2
    assert recipe.masked == 4 * -(-0.6 * cells // 1)


def kind(q: Any, head: int, plan: Any) -> tuple[int, int, int, bool]:
    """What decides how attention is compiled: blocks of queries and keys, width of a head, whether it is indexed."""
    longest = (padded_length(plan.q), padded_length(plan.k))
    return *(power_of_2(n, 16) for n in longest), head, plan.kv_index is not None


def met(mode: str) -> Iterator[tuple[int, int, int, bool]]:
    """The attention of a step of base, two blocks deep and of few pairs. Heads too wide for a kernel are dense's."""
    shallow = ["model.image.depth=1", "model.text.depth=1", "model.cross_depth=2", "model.decoder_depth=2"]
    config = load_config("base", [*shallow, "batch.total=4", "objectives.itm.group=4", *MODES[mode]])
    model = MaskVLM(config, 60, MASK)
    model.init_weights(0)
    batch = make_batch(config, 60, (14, 32, 9, 20))
    judge, seen = ATTENTION.judge, []
    ATTENTION.judge = lambda q, k, v, plan: seen.append(kind(q, q.shape[-1], plan)) or judge(q, k, v, plan)
    try:
        with torch.no_grad():
            model(batch, 0, model.counts(batch))
    finally:
        del ATTENTION.judge
    return (one for one in seen if one[2] <= 128)


@needs_triton
@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_check_compiles_every_attention_that_a_step_of_base_makes(mode: str) -> None:
    from mvle_kernels.attention_triton import cases

    held = {
        (power_of_2(max_q, 16), power_of_2(max_k, 16), q.shape[-1], index is not None)
        for name, q, k, _, _, index, _, max_q, max_k in cases("meta")
        if name.startswith("base")
    }

    assert set(met(mode)) <= held


Signature = tuple[str, frozenset[tuple[str, str]]]


def signature(kernel: Any, arguments: Mapping[str, Any]) -> Signature:
    """What names a binary beside sizes: the kernel, the dtypes of its pointers, the flags that it is compiled with."""
    named = {n: str(x.dtype) if isinstance(x, Tensor) else f"{x}" for n, x in arguments.items()}
    wanted = (n for n, x in arguments.items() if isinstance(x, Tensor | bool) or n.startswith("KIND"))
    return kernel.fn.__name__, frozenset((n, named[n]) for n in wanted)


def launched_by_a_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> set[Signature]:
    """Of one step of tiny through the kernels, its weights bfloat16 as on a GPU."""
    kind = load_config("base").objectives.mim.kind
    shallow = ["model.image.depth=1", "model.text.depth=1", "model.cross_depth=1", "model.decoder_depth=1"]
    overrides = ["batch.total=2", "objectives.itm.group=2", f"objectives.mim.kind={kind}", *shallow, *MODES[mode]]
    config, seen = load_config("tiny", overrides), set[Signature]()
    for file in kernel_files():

        def launch(kernel: Any, *place: Any, launch: Any = file.launch, **arguments: Any) -> None:
            seen.add(signature(kernel, arguments))
            launch(kernel, *place, **arguments)

        monkeypatch.setattr(file, "launch", launch)
    model = model_on_meta(config, 60, torch.bfloat16).to_empty(device=DEVICE)
    model.init_weights(0)
    batch = make_batch(config, 60, (5, 9)).to(DEVICE)
    with use_backend("triton"):
        model(batch, 0, model.counts(batch)).total.backward()
    return seen


@needs_triton
@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_check_compiles_every_kernel_for_the_dtypes_that_a_step_launches_it_with(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = set[Signature]()
    for file in kernel_files():
        for _, call in file.variants():
            with captured() as made:
                call()
            held |= {signature(launch.kernel, launch.arguments) for launch in made}

    seen = launched_by_a_step(mode, monkeypatch)
    assert {"attention_backward_kernel", "token_loss_kernel", "pixel_loss_kernel"} < {kernel for kernel, _ in seen}
    assert not [(kernel, sorted(of)) for kernel, of in seen - held]
