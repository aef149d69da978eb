"""The problems that kernels are measured on: what is computed, who computes it, and what the least work would be.

    problem = cases(device)["attention 197x197, base, 256 pairs"].problem(device, dtype)
    problem.providers["triton"]()          the output, with a graph to problem.leaves
    problem.floor(backward=True)           (operations, bytes) that no implementation can do without

Providers of a problem are the backends of the op (kernels/mvle_kernels), the same written plainly in torch, that under
torch.compile, and libraries where they are installed. Floors count each input once, each output once, and in a backward
the same for gradients; operations are those of matrix products, without what is masked or padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mvle_kernels import (
    Packed,
    attention_plan,
    embed_views,
    expand,
    expand_layout,
    insert_mask_tokens,
    masked_pixel_loss,
    masked_token_loss,
    patchify,
    ragged_attention,
    sample_patch_mask,
    use_backend,
)
from mvle_kernels.dispatch import OPS, Op
from mvle_kernels.recipes import RECIPES, Recipe
from torch import Tensor

from mvle.data.caption_lengths import typical_lengths

from .counts import size_of

CAPTION = "caption"  # as a number of rows: as many as real captions have
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
Work = tuple[int, int]  # operations, bytes
Call = Callable[[], Tensor]


@dataclass
class Problem:
    """leaves: what gets a gradient (none: no backward) · providers: name -> call · skipped: name -> why · forward and
    both: least work of a forward, and of a forward and backward."""

    op: str
    leaves: list[Tensor]
    providers: dict[str, Call]
    forward: Work
    both: Work
    skipped: dict[str, str] = field(default_factory=dict)
    other_leaves: dict[str, list[Tensor]] = field(default_factory=dict)  # of a provider that has inputs of its own

    def floor(self, backward: bool) -> Work:
        """(operations, bytes) that any implementation has to do."""
        return self.both if backward else self.forward

    def step(self, provider: str, backward: bool) -> Callable[[], Any]:
        """A call of it: the forward without a graph, or forward and backward with gradients to all leaves."""
        call = self.providers[provider]
        if not backward:
            return torch.no_grad()(call)
        gradient = torch.ones_like(call().detach())
        leaves = self.other_leaves.get(provider, self.leaves)
        return lambda: torch.autograd.grad(call(), leaves, gradient)

    def chosen(self) -> str:
        """The backend that a call takes of itself."""
        judge, found = Op.judge, list[str]()

        def spy(self: Op, *args: Any, **kwargs: Any) -> Any:
            backend, reasons = judge(self, *args, **kwargs)
            found.append(backend.name)
            return backend, reasons

        with mock.patch.object(Op, "judge", spy), torch.no_grad():
            self.providers["auto"]()
        return found[0]


@dataclass(frozen=True)
class Case:
    """A named problem. make: (device, dtype) -> Problem."""

    name: str
    make: Callable[[torch.device, torch.dtype], Problem]

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
        return problem


def _by(backend: str, call: Call) -> Call:
    def run() -> Tensor:
        with use_backend(backend):
            return call()

    return run


def _compiled(problem: Problem) -> Problem:
    """With `plain` under torch.compile as a provider, on a GPU."""
    if problem.leaves and not problem.leaves[0].is_cuda:
        problem.skipped["plain, compiled"] = "C++ code takes minutes; the step's table has a compiled row"
    else:
        problem.providers["plain, compiled"] = torch.compile(problem.providers["plain"], dynamic=False)
    return problem


def _peer(problem: Problem, name: str, module: str, make: Callable[[], Call]) -> None:
    """A library's call as a provider, or why it is none."""
    if find_spec(module) is None:
        problem.skipped[name] = f"{module} is not installed"
    elif not problem.leaves[0].is_cuda:
        problem.skipped[name] = "runs on a GPU alone"
    else:
        problem.providers[name] = make()


def _size(*tensors: Tensor) -> int:
    return sum(map(size_of, tensors))


def _rows_of_patches(images: Tensor, patch: int) -> Tensor:
    """Normalised patches [B, N, X] as a user would write it."""
    mean, std = (torch.tensor(x, device=images.device) for x in (MEAN, STD))
    x = ((images / 255 - mean) / std).unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(
    queries: Sequence[int],
    contexts: Sequence[int],
    heads: int,
    head: int,
    index: Sequence[int] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    """queries, contexts: rows of each sequence; index: the context of each query sequence, None: its own."""
    q_layout, k_layout = (Packed.layout_of(lengths, 16, device) for lengths in (queries, contexts))
    kv_index = None if index is None else torch.tensor(index, dtype=torch.int32, device=device)
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(layout.total, heads, head, generator=draw, device=device).to(dtype).requires_grad_()
        for layout in (q_layout, k_layout, k_layout)
    )
    plan = attention_plan(q_layout, k_layout, kv_index)
    arguments = (q_layout.offsets, k_layout.offsets, q_layout.max_length, k_layout.max_length, kv_index)

    # the strong form of padding: in memory already, and no gather of contexts is charged
    which = list(range(len(queries))) if index is None else list(index)
    most_q, most_k = max(queries), max(contexts)
    padded = [
        torch.randn(len(queries), heads, n, head, generator=draw, device=device).to(dtype).requires_grad_()
        for n in (most_q, most_k, most_k)
    ]
    lengths = torch.tensor([contexts[c] for c in which], device=device)
    valid = (torch.arange(most_k, device=device) < lengths[:, None])[:, None, None]
    mask = None if min(contexts) == most_k else valid
    products = sum(n * contexts[c] for n, c in zip(queries, which, strict=True)) * heads * head * 2
    written = _size(q)
    return Problem(
        "ragged_attention",
        [q, k, v],
        {
            "auto": lambda: ragged_attention(q, k, v, *arguments, plan=plan),
            "plain": lambda: F.scaled_dot_product_attention(*padded, attn_mask=mask),
        },
        (2 * products, _size(q, k, v) + written),
        (7 * products, 2 * _size(q, k, v) + 3 * written),
        other_leaves={"plain": padded},
    )


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


# ---- losses ---------------------------------------------------------------------------------------------------------


def token_loss(rows: int, words: int, vocabulary: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """rows: masked words; vocabulary: rows of the matrix, of which `words` are scored."""
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=draw, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw, device=device) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(vocabulary, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, words, (rows,), generator=draw, device=device)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x, weight[:words], bias[:words]).float(), targets, reduction="sum")

    product = 2 * rows * words * width
    read, logits = _size(x, weight, bias), rows * words * x.element_size()
    problem = Problem(
        "masked_token_loss",
        [x, weight, bias],
        {"auto": lambda: masked_token_loss(x, weight, bias, targets, vocabulary=words)[0], "plain": plain},
        (product, read + 2 * logits),
        (3 * product, 2 * read + 4 * logits),  # logits written and read, their gradient written and read
    )

    def liger() -> Call:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        return lambda: Liger.apply(x, weight[:words], targets, bias[:words], None, -100, 0.0, 0.0, "sum")[0]

    def cut() -> Call:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(x, weight[:words], targets, bias=bias[:words], reduction="sum")

    _peer(problem, "liger-kernel", "liger_kernel", liger)
    _peer(problem, "cut-cross-entropy", "cut_cross_entropy", cut)
    return _compiled(problem)


def pixel_loss(pairs: int, size: Recipe, device: torch.device, dtype: torch.dtype) -> Problem:
    """The masked patches of as many images."""
    draw = torch.Generator(device).manual_seed(0)
    side = int(size.patches**0.5) * size.patch
    images = torch.randint(0, 256, (pairs, side, side, 3), generator=draw, device=device, dtype=torch.uint8)
    rows = torch.cat(
        [
            torch.randperm(size.patches, generator=draw, device=device)[: size.masked].sort().values + b * size.patches
            for b in range(pairs)
        ]
    ).to(torch.int32)
    prediction = torch.randn(len(rows), size.values, generator=draw, device=device).to(dtype).requires_grad_()

    def plain() -> Tensor:
        target = _rows_of_patches(images, size.patch).flatten(0, 1)[rows.long()]
        variance, middle = torch.var_mean(target, -1, keepdim=True)
        return (prediction.float() - (target - middle) / (variance + 1e-6).sqrt()).abs().sum()

    moved = _size(prediction) + prediction.numel()  # a byte of image for each value
    return _compiled(
        Problem(
            "masked_pixel_loss",
            [prediction],
            {
                "auto": lambda: masked_pixel_loss(prediction, images, rows, size.patch, MEAN, STD, "l1", True),
                "plain": plain,
            },
            (0, moved),
            (0, moved + _size(prediction)),
        )
    )


# ---- patches --------------------------------------------------------------------------------------------------------


def patch_rows(pairs: int, size: Recipe, device: torch.device, dtype: torch.dtype) -> Problem:
    """Pixels to normalised rows."""
    draw = torch.Generator(device).manual_seed(0)
    side = int(size.patches**0.5) * size.patch
    images = torch.randint(0, 256, (pairs, side, side, 3), generator=draw, device=device, dtype=torch.uint8)

    def plain() -> Tensor:
        return _rows_of_patches(images, size.patch).to(dtype)

    calls: dict[str, Call] = {"auto": lambda: patchify(images, size.patch, MEAN, STD, dtype), "plain": plain}
    moved = _size(images) * (1 + torch.finfo(dtype).bits // 8)
    return Problem("patchify", [], calls, (0, moved), (0, moved))


def views(pairs: int, size: Recipe, mode: str, device: torch.device, dtype: torch.dtype) -> Problem:
    """The clean and the masked view of each image as one packed buffer."""
    draw = torch.Generator(device).manual_seed(0)
    x, positions, class_token, mask_token = (
        torch.randn(*shape, size.width, generator=draw, device=device).to(dtype).requires_grad_()
        for shape in ((pairs, size.patches), (size.patches + 1,), (), ())
    )
    across = int(size.patches**0.5)
    keep, masked = sample_patch_mask(
        0, torch.arange(pairs, device=device), (across, across), 2, [size.masked // 4] * pairs
    )

    def auto() -> Tensor:
        return embed_views(x, positions, class_token, mask_token, keep, masked, ("clean", mode)).rows

    shown = size.patches - size.masked if mode == "drop" else size.patches
    written = pairs * (size.patches + shown + 2) * size.width * x.element_size()
    moved = _size(x) + written  # a patch is read once for both views
    leaves = [x, positions, class_token, *([] if mode == "drop" else [mask_token])]
    return Problem("embed_views", leaves, {"auto": auto}, (0, moved), (0, 2 * moved))


def insertion(pairs: int, size: Recipe, device: torch.device, dtype: torch.dtype) -> Problem:
    """Mask tokens of `drop` at the masked positions of each image."""
    draw = torch.Generator(device).manual_seed(0)
    across, shown = int(size.patches**0.5), size.patches - size.masked
    pair_ids = torch.arange(pairs, device=device)
    _, masked = sample_patch_mask(0, pair_ids, (across, across), 2, [size.masked // 4] * pairs)
    layout = Packed.layout_of([shown + 1] * pairs, 1, device)
    rows, mask_token, positions = (
        torch.randn(*shape, size.width, generator=draw, device=device).to(dtype).requires_grad_()
        for shape in ((layout.total,), (), (size.patches + 1,))
    )

    def auto() -> Tensor:
        return insert_mask_tokens(layout.with_rows(rows), masked, mask_token, positions).rows

    moved = _size(rows) + pairs * (size.patches + 1) * size.width * rows.element_size()
    return Problem("insert_mask_tokens", [rows, mask_token, positions], {"auto": auto}, (0, moved), (0, 2 * moved))


def repetition(
    lengths: Sequence[int], index: Sequence[int], width: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Sequence index[s] of a buffer again, for each s."""
    draw = torch.Generator(device).manual_seed(0)
    layout = Packed.layout_of(lengths, 1, device)
    rows = torch.randn(layout.total, width, generator=draw, device=device).to(dtype).requires_grad_()
    which = torch.tensor(index, dtype=torch.int32, device=device)
    wanted = expand_layout(layout, which, sum(lengths[i] for i in index))
    moved = (layout.total + wanted.total) * width * rows.element_size()
    return Problem(
        "expand",
        [rows],
        {"auto": lambda: expand(layout.with_rows(rows), which, wanted).rows},
        (0, moved),
        (0, 2 * moved),
    )


# ---- all ------------------------------------------------------------------------------------------------------------


def _cases(recipe: str, pairs: int, rows: int | None = None) -> Iterator[Case]:
    size = RECIPES[recipe]
    for q, k in (("197", "197"), ("77", "77"), ("197", CAPTION), (CAPTION, "197"), (CAPTION, CAPTION), ("1", "197")):
        yield _attention_case(recipe, q, k, pairs)
    yield _attention_case(recipe, CAPTION, "197", pairs, skewed=True)
    words = rows or 4 * pairs
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
    """On a GPU base at 256 pairs and large at 64; on a CPU base at 4."""
    if device.type == "cuda":
        found = [*_cases("base", 256), *_cases("large", 64)]
        found += [_attention_case("base", "577", k, 64) for k in ("577", CAPTION)]
    else:
        found = list(_cases("base", 4))
    return {case.name: case for case in found}
