"""What a CPU cannot tell of a kernel: rounding, races, capture, memory. What is not marked `gpu` runs on a CPU too,
interpreted at float32 or emulated, so that a mistake in a test shows before a GPU is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from mvle_kernels import use_backend
from mvle_kernels.dispatch import OPS
from mvle_kernels.recipes import Recipe
from torch import Tensor

from benchmarks.kernels import (
    Problem,
    attention,
    feed_forward_part,
    insertion,
    patch_rows,
    pixel_loss,
    repetition,
    sum_and_norm,
    token_loss,
    views,
)

from .kernel_checks import DEVICE, both_backends, under_test

pytestmark = both_backends
CUDA = DEVICE.type == "cuda"
SMALL = Recipe(48, 2, 96, patches=16, patch=4, tokens=20, words=70, vocabulary=128, masked=8)
SIZE = Recipe(768, 12, 3072) if CUDA else SMALL
PAIRS, REPEATS = (16, 100) if CUDA else (2, 2)
CAPTIONS = (14, 3, 32, 9, 20, 11, 17, 5, 8, 25, 13, 12, 10, 16, 7, 30)[:PAIRS]
ROWS = SIZE.patches + 1
HUB = [*range(PAIRS), *([0] * PAIRS)]  # the first pair is read by more than half of the sequences

Make = Callable[[torch.device, torch.dtype], Problem]
PROBLEMS: dict[str, Make] = {
    "attention of patches": partial(attention, (ROWS,) * PAIRS, (ROWS,) * PAIRS, SIZE.heads, SIZE.head, None),
    "attention of patches to captions": partial(attention, (ROWS,) * PAIRS, CAPTIONS, SIZE.heads, SIZE.head, None),
    "attention of captions to patches": partial(attention, CAPTIONS, (ROWS,) * PAIRS, SIZE.heads, SIZE.head, None),
    "attention to a hub": partial(attention, CAPTIONS * 2, (ROWS,) * PAIRS, SIZE.heads, SIZE.head, HUB),
    "sum and norm": partial(sum_and_norm, PAIRS * ROWS, SIZE.width),
    "feed-forward": partial(feed_forward_part, PAIRS * ROWS, SIZE.width, SIZE.mlp),
    "token loss": partial(token_loss, 4 * PAIRS, SIZE.words, SIZE.vocabulary, SIZE.width),
    "pixel loss": partial(pixel_loss, PAIRS, SIZE),
    "patchify": partial(patch_rows, PAIRS, SIZE),
    "views, replace": partial(views, PAIRS, SIZE, "replace"),
    "views, drop": partial(views, PAIRS, SIZE, "drop"),
    "mask tokens": partial(insertion, PAIRS, SIZE),
    "captions again": partial(repetition, CAPTIONS, HUB, SIZE.width),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def made(name: str, dtype: torch.dtype, like: Problem | None = None) -> Problem:
    """The problem, with the values of another where it is given."""
    problem = PROBLEMS[name](DEVICE, dtype)
    for own, other in zip(problem.leaves, like.leaves if like else [], strict=bool(like)):
        own.data.copy_(other.data)
    return problem


def results(problem: Problem, backend: str) -> list[Tensor]:
    """The output and the gradients of all leaves, for one gradient of the output."""
    with use_backend(backend):
        out = problem.providers["auto"]()
        draw = torch.Generator().manual_seed(1)
        gradient = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.device, out.dtype)
        return [out.detach(), *(torch.autograd.grad(out, problem.leaves, gradient) if problem.leaves else ())]


def with_kernel(name: str) -> Problem:
    """The problem; skips where its op has no kernel of the backend under test. In bfloat16, but where Triton's
    interpreter would cut it."""
    problem = made(name, torch.bfloat16 if CUDA or under_test() == "cuda" else torch.float32)
    if all(b.name != under_test() for b in OPS[problem.op].backends):
        pytest.skip(f"{problem.op} has no kernel in {under_test()}")
    return problem


@every_problem
def test_the_error_is_at_most_twice_that_of_torchs_ops_of_the_same_dtype(name: str) -> None:
    problem = with_kernel(name)
    truth = results(made(name, torch.float64, problem), "reference")
    ours, dense = results(problem, under_test()), results(problem, "dense")

    for i, (own, other, true) in enumerate(zip(ours, dense, truth, strict=True)):
        error, allowed = ((t.double() - true).abs().max().item() for t in (own, other))
        slack = 1e-6 * true.abs().max().item()  # where torch happens to make none
        what = "output" if i == 0 else f"gradient {i - 1}"
        assert error <= 2 * allowed + slack, f"{what}: error {error:.2e}, torch's {allowed:.2e}"


@every_problem
def test_it_is_bitwise_the_same_every_time(name: str) -> None:
    problem = with_kernel(name)
    first = results(problem, under_test())

    for _ in range(REPEATS):
        for one, again in zip(first, results(problem, under_test()), strict=True):
            assert one.equal(again)


def every(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An output, or gradients, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.gpu
@every_problem
def test_it_never_waits_for_the_device_and_can_be_captured(name: str) -> None:
    problem = with_kernel(name)
    step = problem.step("auto", backward=bool(problem.leaves))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend(under_test()):
            expected = every(step())  # compiles, and prepares what a plan keeps
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = every(step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()

    for one, again in zip(expected, captured, strict=True):
        assert one.equal(again) and one.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    wanted = "test_the_error_is and (hub or token or drop)"
    run = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    run += ["-p", "no:cacheprovider", "-k", wanted, __file__]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:]
