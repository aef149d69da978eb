"""What kernels are measured beside computes the same, on every named shape, and no share of the roof lies by method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mvle_kernels.recipes import Recipe
from torch import Tensor

from benchmarks.kernel_cases import COMPILED, PAIRS, Case, add_compiled, cases, left_out
from benchmarks.kernel_report import kernel_table, not_measured
from benchmarks.kernels import Problem, attention, insertion, patch_rows, pixel_loss, repetition, token_loss, views
from benchmarks.measure import copy_of

CPU = torch.device("cpu")
SIZE = Recipe(32, 2, 64, patches=16, patch=4, tokens=20, words=70, vocabulary=128, masked=8)
PROBLEMS: dict[str, Callable[[torch.device, torch.dtype], Problem]] = {
    "token loss": partial(token_loss, 12, SIZE.words, SIZE.vocabulary, SIZE.width),
    "pixel loss": partial(pixel_loss, 3, SIZE),
    "patchify": partial(patch_rows, 3, SIZE),
    "views, replace": partial(views, 3, SIZE, "replace"),
    "views, drop": partial(views, 3, SIZE, "drop"),
    "mask tokens": partial(insertion, 3, SIZE),
    "images again": partial(repetition, (17, 17, 17), [2, 0, 1, 0], SIZE.width),
    "captions again": partial(repetition, (14, 3, 20), [2, 0, 1, 0], SIZE.width),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def results(problem: Problem, provider: str) -> list[Tensor]:
    """The output, and the gradients of all leaves for one gradient of the output."""
    out = problem.providers[provider]()
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    leaves = problem.leaves_of(provider)
    return [out.detach(), *(torch.autograd.grad(out, leaves, gradient) if leaves else ())]


@every_problem
def test_plain_computes_what_the_op_does_with_the_same_gradients(name: str) -> None:
    problem = PROBLEMS[name](CPU, torch.float32)

    for plain, own in zip(results(problem, "plain"), results(problem, "auto"), strict=True):
        torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-4)


@every_problem
def test_plain_is_one_graph_to_torch_compile_forward_and_backward(name: str) -> None:
    problem = PROBLEMS[name](CPU, torch.float32)
    add_compiled(problem, backend="aot_eager")

    for plain, compiled in zip(results(problem, "plain"), results(problem, COMPILED), strict=True):
        torch.testing.assert_close(plain, compiled)


def test_each_shape_of_attention_is_compiled_for_itself_though_all_share_their_code() -> None:
    for n in range(1, 12):  # torch.compile holds 8 versions of one code, and an error of fullgraph says that it gave up
        problem = attention((n, n), (n, n + 1), 2, 8, None, CPU, torch.float32)
        add_compiled(problem, backend="eager")
        torch.testing.assert_close(problem.providers[COMPILED](), problem.providers["plain"]())
        problem.step(COMPILED, backward=True)()


# ---- which shapes ---------------------------------------------------------------------------------------------------


def test_every_named_shape_is_measured_on_a_cpu_too_and_what_is_smaller_there_is_said() -> None:
    here, on_a_gpu = cases(CPU), cases(torch.device("cuda"))

    assert {case.shape for case in here.values()} == {case.shape for case in on_a_gpu.values()}
    assert len({case.shape for case in here.values()}) == len(here) == len(on_a_gpu)
    for recipe in ("base", "large"):
        for shape in (f"attention 197x197, {recipe}", f"token loss, {recipe}", f"images again, {recipe}"):
            assert any(case.shape == shape for case in here.values()), shape
    assert {"attention 577x577, base", "attention 577xcaption, base"} <= {case.shape for case in here.values()}
    assert [line.split(" pairs of ")[1] for line in left_out(CPU)] == list(PAIRS["cuda"])
    assert not left_out(torch.device("cuda"))


def test_a_case_names_every_backend_that_it_does_not_measure() -> None:
    problem = Case("patches", PROBLEMS["views, drop"]).problem(CPU, torch.float32)

    known = {*problem.providers, *problem.skipped}
    assert known == {"auto", "plain", COMPILED, "triton", "cuda", "dense"} and "dense" in problem.providers
    assert all(problem.skipped.values())


# ---- the roof -------------------------------------------------------------------------------------------------------


def test_the_copy_beside_an_op_moves_as_many_bytes_as_the_op_has_to() -> None:
    copy = copy_of(CPU, 1000)
    (source,) = copy.args  # type: ignore[attr-defined]
    target = copy.func.__self__  # type: ignore[attr-defined]

    assert source.nbytes + target.nbytes == 1000 and source.data_ptr() != target.data_ptr()


def test_a_share_of_the_roof_is_of_the_copy_that_was_made_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import test_kernels

    clock = iter([0.001] * 2 + [9.0, 9.0, 9.0] + [0.004, 0.002, 0.001, 0.004, 0.001, 0.0005])
    monkeypatch.setattr(test_kernels, "DEVICE", CPU)
    monkeypatch.setattr(test_kernels, "CALLS", 1)
    monkeypatch.setattr(test_kernels, "seconds", lambda *_: next(clock))
    monkeypatch.setattr(test_kernels, "products", lambda: 1e12)
    bench = SimpleNamespace(extra_info={}, pedantic=lambda turn, rounds: [turn() for _ in range(2)])
    problem = Case("patches", PROBLEMS["patchify"]).problem(CPU, torch.float32)

    test_kernels.measured(bench, problem, "patches", False, ["dense"])

    (row,) = bench.extra_info["kernels"]  # plain, dense and the copy took turns: two turns behind one that warms up
    assert row["kernel"] == "dense" and row["chosen"] and row["ratio"]["median"] == pytest.approx(3.0)
    assert row["seconds"] == pytest.approx(0.0015) and row["roof"] == pytest.approx(0.0005 / 0.0015)
    assert "33%" in kernel_table([row])
    said = not_measured([bench.extra_info])
    assert "256 pairs of base" in said and "patchify: plain, compiled" in said
