"""Which problems are measured where: named shapes of base and large, on a GPU at the size of a step, on a CPU small.

problem = cases(device)["attention 197x197, base, 256 pairs"].problem(device, dtype)
problem.providers["triton"]()          the output, with a graph to problem.leaves
left_out(device)                       sizes that are not measured on this device, and why
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from mvle_kernels import use_backend
from mvle_kernels.dispatch import OPS
from mvle_kernels.recipes import RECIPES
from torch import Tensor

from mvle.data.caption_lengths import typical_lengths

from .kernels import (
    Call,
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

CAPTION = "caption"  # as a number of rows: as many as real captions have
COMPILED = "plain, compiled"
PAIRS = {"cuda": {"base": 256, "large": 64, "577 rows": 64}, "cpu": {"base": 4, "large": 2, "577 rows": 2}}


@dataclass(frozen=True)
class Case:
    """A named problem. make: (device, dtype) -> Problem."""

    name: str
    make: Callable[[torch.device, torch.dtype], Problem]

    @property
    def shape(self) -> str:
        """The name without how many pairs or words there are: what is one on every device."""
        return re.sub(r", \d+ (pairs|masked words)", "", self.name)

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """With every backend that does not refuse it; why the others do."""
        problem = self.make(device, dtype)
        ours = problem.providers["auto"]
        for backend in OPS[problem.op].backends:
            if backend.name == "reference":  # slow and obvious; `plain` is what a user would write
                continue
            call = _by(backend.name, ours)
            try:
                with torch.no_grad():
                    call()
                problem.providers[backend.name] = call
            except ValueError as error:
                problem.skipped[backend.name] = str(error).rpartition(f"{backend.name}: ")[2].split("; ")[0]
        if device.type != "cuda":
            problem.skipped[COMPILED] = "C++ code takes minutes; the step's table has a compiled row"
        return problem


def _by(backend: str, call: Call) -> Call:
    def run() -> Tensor:
        with use_backend(backend):
            return call()

    return run


def add_compiled(problem: Problem, **options: str) -> None:
    """`plain` under torch.compile as a provider: as one graph, or an error. options: of torch.compile.

    Problems share the code of their `plain`, and torch.compile holds a few versions of one code: what it compiled for
    the problem before is forgotten."""
    torch._dynamo.reset()
    problem.providers[COMPILED] = torch.compile(problem.providers["plain"], dynamic=False, fullgraph=True, **options)
    problem.other_leaves[COMPILED] = problem.leaves_of("plain")


# ---- named shapes ---------------------------------------------------------------------------------------------------


def _attention_case(recipe: str, q: str, k: str, pairs: int, *, skewed: bool = False) -> Case:
    """q, k: a number of rows, or CAPTION for captions as long as real ones. skewed: hard negatives too, so
    that a quarter of all read the first pair."""
    size = RECIPES[recipe]
    captions = typical_lengths(pairs, size.tokens)
    queries, contexts = (captions if n == CAPTION else (int(n),) * pairs for n in (q, k))
    index = None
    if skewed:
        index = [*range(pairs), *(0 if i % 2 == 0 else (i * 7 + 1) % pairs for i in range(pairs))]
        queries = (*queries, *queries)
    name = f"attention {q}x{k}, {recipe}, {pairs} pairs" + (", negatives" if skewed else "")
    return Case(name, partial(attention, queries, contexts, size.heads, size.head, index))


def _cases(recipe: str, pairs: int) -> Iterator[Case]:
    size = RECIPES[recipe]
    for q, k in (("197", "197"), ("77", "77"), ("197", CAPTION), (CAPTION, "197"), (CAPTION, CAPTION), ("1", "197")):
        yield _attention_case(recipe, q, k, pairs)
    yield _attention_case(recipe, CAPTION, "197", pairs, skewed=True)
    rows = pairs * (size.patches + 1)
    yield Case(f"sum and norm, {recipe}, {pairs} pairs", partial(sum_and_norm, rows, size.width))
    yield Case(f"feed-forward, {recipe}, {pairs} pairs", partial(feed_forward_part, rows, size.width, size.mlp))
    words = 4 * pairs
    loss = partial(token_loss, words, size.words, size.vocabulary, size.width)
    yield Case(f"token loss, {recipe}, {words} masked words", loss)
    yield Case(f"pixel loss, {recipe}, {pairs} pairs", partial(pixel_loss, pairs, size))
    yield Case(f"patchify, {recipe}, {pairs} pairs", partial(patch_rows, pairs, size))
    for mode in ("replace", "drop"):
        yield Case(f"views, {mode}, {recipe}, {pairs} pairs", partial(views, pairs, size, mode))
    yield Case(f"mask tokens, {recipe}, {pairs} pairs", partial(insertion, pairs, size))
    again = [(7 * i + 1) % pairs for i in range(pairs)]
    for what, lengths in (("images", (size.patches + 1,) * pairs), ("captions", typical_lengths(pairs, size.tokens))):
        yield Case(f"{what} again, {recipe}, {pairs} pairs", partial(repetition, lengths, again, size.width))


def cases(device: torch.device) -> Mapping[str, Case]:
    """Every named shape of base and large, at as many pairs as the device is given."""
    pairs = PAIRS[device.type]
    found = [*_cases("base", pairs["base"]), *_cases("large", pairs["large"])]
    found += [_attention_case("base", "577", k, pairs["577 rows"]) for k in ("577", CAPTION)]
    return {case.name: case for case in found}


def left_out(device: torch.device) -> dict[str, str]:
    """Sizes that are not measured on this device -> why. Every shape is, at some number of pairs."""
    if device.type == "cuda":
        return {}
    here = PAIRS[device.type]
    return {f"{n} pairs of {what}": f"{here[what]} here: more take minutes" for what, n in PAIRS["cuda"].items()}
