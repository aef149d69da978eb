"""The problems that kernels are measured on: what is computed, who computes it, and what the least work would be.

    problem = patch_rows(256, RECIPES["base"], device, dtype)
    problem.providers["plain"]()           the output, with a graph to problem.leaves
    problem.floor(backward=True)           (operations, bytes) that no implementation can do without

Providers of a problem are `auto` (the op's own choice), `plain` (what a user of torch would write), and libraries where
they are installed; kernel_cases.py adds each backend, and `plain` under torch.compile. Floors count each input once,
each output once, and in a backward the same for gradients; operations are those of matrix products, without what is
masked or padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mvle_kernels import (
    Packed,
    add_norm,
    attention_plan,
    embed_views,
    expand,
    expand_layout,
    feed_forward,
    insert_mask_tokens,
    masked_pixel_loss,
    masked_token_loss,
    patchify,
    ragged_attention,
    sample_patch_mask,
)
from mvle_kernels.dispatch import Op
from mvle_kernels.patches import expanded_rows, mask_of
from mvle_kernels.recipes import Recipe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .counts import size_of
from .plain_ops import dropped_views, inserted, replaced_views, rows_of_patches

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

    def leaves_of(self, provider: str) -> list[Tensor]:
        """What gets a gradient from a call of this provider."""
        return self.other_leaves.get(provider, self.leaves)

    def step(self, provider: str, backward: bool) -> Callable[[], Any]:
        """A call of it: the forward without a graph, or forward and backward with gradients to all leaves."""
        call = self.providers[provider]
        if not backward:
            return torch.no_grad()(call)
        gradient = torch.ones_like(call().detach())
        leaves = self.leaves_of(provider)
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
    problem = Problem(
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

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*padded)

    if mask is not None:
        problem.skipped["cudnn"] = "takes padding as equal lengths alone here"
    elif q.is_cuda:
        problem.providers["cudnn"], problem.other_leaves["cudnn"] = cudnn, padded
    else:
        problem.skipped["cudnn"] = "runs on a GPU alone"
    return problem


# ---- blocks ---------------------------------------------------------------------------------------------------------


def sum_and_norm(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """The start of a branch: a sum that a block goes on with, and its layer norm. Both are read."""
    draw = torch.Generator(device).manual_seed(0)
    x, y, weight, bias = (
        torch.randn(*shape, generator=draw, device=device).to(dtype).requires_grad_()
        for shape in ((rows, width), (rows, width), (width,), (width,))
    )

    def read(s: Tensor, h: Tensor) -> Tensor:
        return _Both.apply(s, h)

    def plain() -> Tensor:
        s = x + y
        return read(s, F.layer_norm(s, (width,), weight, bias, 1e-6))

    one = rows * width * x.element_size()
    return Problem(
        "add_norm",
        [x, y, weight, bias],
        {"auto": lambda: read(*add_norm(x, y, weight, bias, 1e-6)), "plain": plain},
        (0, 4 * one),
        (0, 8 * one),  # s and two gradients read, one written
    )


class _Both(torch.autograd.Function):
    """h, whose gradient is that of s too: two results that are read, at no cost."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad


def feed_forward_part(rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """Linear, GELU, linear."""
    draw = torch.Generator(device).manual_seed(0)
    shapes = ((rows, width), (inner, width), (inner,), (width, inner), (width,))
    scales = (1.0, width**-0.5, 0.1, inner**-0.5, 0.1)
    leaves = [
        (torch.randn(*shape, generator=draw, device=device) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    x, w1, b1, w2, b2 = leaves
    product, wide = 4 * rows * width * inner, rows * inner * x.element_size()
    read = _size(*leaves) + rows * width * x.element_size()
    return Problem(
        "feed_forward",
        leaves,
        {
            "auto": lambda: feed_forward(*leaves),
            "plain": lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        },
        (product, read + 4 * wide),  # written and read by each product
        (3 * product, 3 * read + 10 * wide),
    )


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
    return problem


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
        target = rows_of_patches(images, size.patch, MEAN, STD).flatten(0, 1)[rows.long()]
        variance, middle = torch.var_mean(target, -1, keepdim=True)
        return (prediction.float() - (target - middle) / (variance + 1e-6).sqrt()).abs().sum()

    moved = _size(prediction) + prediction.numel()  # a byte of image for each value
    return Problem(
        "masked_pixel_loss",
        [prediction],
        {
            "auto": lambda: masked_pixel_loss(prediction, images, rows, size.patch, MEAN, STD, "l1", True),
            "plain": plain,
        },
        (0, moved),
        (0, moved + _size(prediction)),
    )


# ---- patches --------------------------------------------------------------------------------------------------------


def patch_rows(pairs: int, size: Recipe, device: torch.device, dtype: torch.dtype) -> Problem:
    """Pixels to normalised rows."""
    draw = torch.Generator(device).manual_seed(0)
    side = int(size.patches**0.5) * size.patch
    images = torch.randint(0, 256, (pairs, side, side, 3), generator=draw, device=device, dtype=torch.uint8)

    def plain() -> Tensor:
        return rows_of_patches(images, size.patch, MEAN, STD).to(dtype)

    calls: dict[str, Call] = {"auto": lambda: patchify(images, size.patch, MEAN, STD, dtype), "plain": plain}
    moved = _size(images) * (1 + torch.finfo(dtype).bits // 8)
    return Problem("patchify", [], calls, (0, moved), (0, moved))


def _covered(masked: Packed, patches: int) -> Tensor:
    """bool [B, N + 1]: where an image shows mask tokens; never at its class token, position 0."""
    return F.pad(mask_of(masked, patches), (1, 0))


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

    covered = _covered(masked, size.patches)
    kept = torch.cat([keep.offsets.new_zeros(pairs, 1), keep.rows.view(pairs, -1) + 1], 1).long()

    def plain() -> Tensor:
        if mode == "drop":
            return dropped_views(x, positions, class_token, kept)
        return replaced_views(x, positions, class_token, mask_token, covered)

    shown = size.patches - size.masked if mode == "drop" else size.patches
    written = pairs * (size.patches + shown + 2) * size.width * x.element_size()
    moved = _size(x) + written  # a patch is read once for both views
    leaves = [x, positions, class_token, *([] if mode == "drop" else [mask_token])]
    return Problem("embed_views", leaves, {"auto": auto, "plain": plain}, (0, moved), (0, 2 * moved))


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

    covered = _covered(masked, size.patches)
    place = ((~covered).cumsum(1) - 1).clamp(min=0)

    def plain() -> Tensor:
        return inserted(rows, mask_token, positions, covered, place)

    moved = _size(rows) + pairs * (size.patches + 1) * size.width * rows.element_size()
    calls: dict[str, Call] = {"auto": auto, "plain": plain}
    return Problem("insert_mask_tokens", [rows, mask_token, positions], calls, (0, moved), (0, 2 * moved))


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
    whole, long = min(lengths) == max(lengths), which.long()
    single = expanded_rows(which, layout, wanted)

    def plain() -> Tensor:
        return rows.unflatten(0, (len(lengths), -1))[long].flatten(0, 1) if whole else rows[single]

    return Problem(
        "expand",
        [rows],
        {"auto": lambda: expand(layout.with_rows(rows), which, wanted).rows, "plain": plain},
        (0, moved),
        (0, 2 * moved),
    )
