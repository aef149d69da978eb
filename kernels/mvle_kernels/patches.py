"""Images to patch rows, and the views of an image that the encoder and the cross encoder read.

patchify      uint8 or float pixels [B, height, width, 3] -> normalised rows [B, N, X], X ordered (row, column, channel)
embed_views   patch embeddings of all N patches -> one Packed that holds each wanted view of each image
insert_mask_tokens   class + visible rows (`drop`) -> full-length sequences, a mask token at every masked position
expand        whole sequences again, in the order an index says (hard negatives)

Cost     all are bound by bytes: each element is read once and written once.
Exact    gathers with gathers as backward, or sums in a fixed order; bitwise repeatable on a CPU.
Limits   square patches that divide the image; float32, float64, bfloat16.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cuda_support, triton_support
from .dispatch import Op
from .layout import equal_length, has_tail, padded_length
from .packed import Packed, concatenate, from_host, round_up, row_index

PATCHIFY = Op("patchify")
EMBED_VIEWS = Op("embed_views")
INSERT = Op("insert_mask_tokens")
EXPAND = Op("expand")

PatchView = str | Packed  # a view of an image by name, or the patches that it shows


# ---- patchify -------------------------------------------------------------------------------------------------------


def as_patches(images: Tensor, patch: int) -> Tensor:
    """[B, height, width, 3] -> a view [B, rows, columns, patch, patch, 3]; no element moves."""
    B, height, width, channels = images.shape
    return images.view(B, height // patch, patch, width // patch, patch, channels).transpose(2, 3)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """(scale, shift) with pixel * scale + shift = (pixel / 255 - mean) / std: two numbers where the channels are alike,
    which costs no copy to the device, else two tensors [3]."""
    values = [*(1 / (255 * s) for s in std), *(-m / s for m, s in zip(mean, std, strict=True))]
    if len({*values[:3]}) == len({*values[3:]}) == 1:
        return values[0], values[3]
    scale, shift = from_host(values, dtype, device).split(3)
    return scale, shift


def channel_scales(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(scale, shift) as `scale_and_shift` has them, three numbers each: what kernels take."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _refuse_patchify(
    images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> str | None:
    if dtype not in triton_support.DTYPES:
        return f"gives float32, bfloat16, float16; got {str(dtype).removeprefix('torch.')}"
    return triton_support.refuse(images, dtypes=(torch.uint8,))


def _unasked(tensor: Tensor | Packed, *_: Any) -> str | None:
    return triton_support.unasked(tensor.rows if isinstance(tensor, Packed) else tensor)


@PATCHIFY.register("triton", "a byte in, a value out, in one pass", _refuse_patchify, _unasked)
def _patchify_triton(*arguments: Any) -> Tensor:
    from .patches_triton import patchify

    return patchify(*arguments)


@PATCHIFY.register("reference", "plain torch")
@PATCHIFY.register("dense", "one plain torch pass is the fastest on a CPU")  # applied bottom up: dense is asked first
def _patchify(images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    compute = torch.promote_types(dtype, torch.float32)
    scale, shift = scale_and_shift(mean, std, compute, images.device)
    rows = as_patches(images, patch).to(compute) * scale + shift
    return rows.flatten(3).flatten(1, 2).to(dtype)


def patchify(
    images: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 images [B, height, width, 3] -> (pixel / 255 - mean) / std as rows [B, N, X] of `dtype`.

    X = patch * patch * 3, ordered (row in patch, column in patch, channel); N runs over rows of patches first.
    Raises ValueError if the image is not uint8 [B, height, width, 3] or its sides are not multiples of `patch`.
    """
    check_images(images, patch)
    return PATCHIFY(images, patch, mean, std, dtype)


def check_images(images: Tensor, patch: int) -> None:
    """Raise ValueError unless images are uint8 [B, height, width, 3] with sides that are multiples of `patch`."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 of shape [B, height, width, 3]; got {images.dtype} {tuple(images.shape)}."
        )
    if images.shape[1] % patch or images.shape[2] % patch:
        raise ValueError(f"image sides must be multiples of the patch, {patch}; got {tuple(images.shape[1:3])}.")


# ---- the views of an image ------------------------------------------------------------------------------------------


def mask_of(masked: Packed, patches: int) -> Tensor:
    """Packed masked patch numbers -> bool [B, N], True = masked."""
    sequence, _, _ = row_index(masked)
    flags = torch.zeros((masked.sequences + 1) * patches, dtype=torch.bool, device=masked.rows.device)
    # tail rows fall into the spare last sequence; not `flags[…] = True`, which on a GPU waits for a copy of the True
    flags.index_fill_(0, sequence * patches + masked.rows.long(), True)
    return flags.view(-1, patches)[:-1]


def _refuse_views(
    refuse: Callable[..., str | None],
    x_BND: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    keep: Packed | None,
    masked: Packed | None,
    views: Sequence[PatchView],
    row_multiple: int,
) -> str | None:
    lists = [{"replace": masked, "drop": keep}.get(view) if isinstance(view, str) else view for view in views]
    if any(p.lengths is None for p in lists if p is not None):
        return "takes lists of patches whose lengths the host knows"
    of_lists = [t for p in lists if p is not None for t in (p.rows, p.offsets)]
    others = (positions, class_token, mask_token)
    return _first_refusal(refuse, others) or refuse(x_BND, *others, *of_lists)


def _first_refusal(refuse: Callable[..., str | None], tensors: Sequence[Tensor]) -> str | None:
    for tensor in tensors:  # a loop: torch.compile of 2.11 traces no name that is bound inside a generator
        if reason := refuse(tensor):
            return reason
    return None


@EMBED_VIEWS.register(
    "triton", "all views in one pass, and back in one", partial(_refuse_views, triton_support.refuse), _unasked
)
def _embed_views_triton(*arguments: Any) -> Packed:
    from .views_op import embed_views

    return embed_views(*(*arguments, "triton"))


@EMBED_VIEWS.register(
    "cuda", "the same, a warp for each row", partial(_refuse_views, cuda_support.refuse), cuda_support.unasked
)
def _embed_views_cuda(*arguments: Any) -> Packed:
    from .views_op import embed_views

    return embed_views(*(*arguments, "cuda"))


@EMBED_VIEWS.register("dense", "whole views as one batch, dropped patches by one gather")
def _embed_views_dense(
    x_BND: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    keep: Packed | None,
    masked: Packed | None,
    views: Sequence[PatchView],
    row_multiple: int,
) -> Packed:
    B, N, D = x_BND.shape
    x_BND = x_BND + positions[1:]
    first_B1D = (class_token + positions[0]).expand(B, 1, D)
    device = x_BND.device
    parts = []
    for view in views:
        shown = keep if view == "drop" else view
        if isinstance(shown, Packed):
            assert shown.lengths is not None
            layout = Packed.layout_of([n + 1 for n in shown.lengths], 1, device, N + 1)
            sequence, position, _ = row_index(layout)
            kept = shown.offsets.long()[sequence] + (position - 1).clamp(min=0)
            patch = shown.rows.long()[kept.clamp(max=max(shown.total - 1, 0))] if shown.total else kept * 0
            column = torch.where(position == 0, 0, patch + 1)
            whole = torch.cat([first_B1D, x_BND], 1).flatten(0, 1)
            parts.append(layout.with_rows(whole.index_select(0, sequence * (N + 1) + column)))
            continue
        rows = x_BND
        if view == "replace":
            assert masked is not None
            rows = torch.where(mask_of(masked, N)[..., None], mask_token + positions[1:], x_BND)
        layout = Packed.layout_of([N + 1] * B, 1, device)
        parts.append(layout.with_rows(torch.cat([first_B1D, rows], 1).flatten(0, 1)))
    return concatenate(parts, row_multiple)


@EMBED_VIEWS.register("reference", "one sequence at a time")
def _embed_views_reference(
    x_BND: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    keep: Packed | None,
    masked: Packed | None,
    views: Sequence[PatchView],
    row_multiple: int,
) -> Packed:
    sequences = []
    for view in views:
        for b in range(len(x_BND)):
            rows = list(x_BND[b])
            if view == "replace":
                assert masked is not None
                for n in masked.unpack()[b].tolist():
                    rows[n] = mask_token
            chosen: Sequence[int] = range(len(rows))
            shown = keep if view == "drop" else view
            if isinstance(shown, Packed):
                chosen = shown.unpack()[b].tolist()
            sequences.append(torch.stack([class_token + positions[0]] + [rows[n] + positions[n + 1] for n in chosen]))
    return Packed.of(sequences, row_multiple)


def embed_views(
    x_BND: Tensor,
    positions: Tensor,
    class_token: Tensor,
    mask_token: Tensor,
    keep: Packed | None,
    masked: Packed | None,
    views: Sequence[PatchView],
    row_multiple: int = 1,
) -> Packed:
    """Patch embeddings x [B, N, D] -> Packed: for each view in order, for each image: class token, then its patches.

    views: "clean" (all N), "replace" (all N, masked ones become mask_token [D]), "drop" (the kept ones only), or a
    Packed of its own with the patches to show, each at most once. positions [N + 1, D], row 0 for the class token [D],
    are added last. keep, masked: Packed int32 as `sample_patch_mask` gives them; None where no view needs them. Raises
    ValueError for an unknown view or a missing mask.
    """
    for view in views:
        if isinstance(view, Packed):
            continue
        needs = {"clean": True, "replace": masked is not None, "drop": keep is not None}
        if not needs.get(view, False):
            raise ValueError(
                f"views must be clean, replace (needs masked), drop (needs keep) or Packed patches; got {view!r}."
            )
    return EMBED_VIEWS(x_BND, positions, class_token, mask_token, keep, masked, views, row_multiple)


def _refuse_insert(
    rows: Packed, masked: Packed, mask_token: Tensor, positions: Tensor, row_multiple: int
) -> str | None:
    lists = (rows.offsets, masked.rows, masked.offsets)
    refuse, parameters = triton_support.refuse, (mask_token, positions)
    return _first_refusal(refuse, parameters) or refuse(rows.rows, *parameters, *lists)


@INSERT.register("triton", "one pass each way, no index of rows", _refuse_insert, _unasked)
def _insert_triton(*arguments: Any) -> Packed:
    from .insert_triton import insert_mask_tokens

    return insert_mask_tokens(*arguments)


@INSERT.register("dense", "one gather, and a choice between it and mask tokens")
def _insert_dense(rows: Packed, masked: Packed, mask_token: Tensor, positions: Tensor, row_multiple: int) -> Packed:
    N = positions.shape[0] - 1
    masked_BN = mask_of(masked, N)
    B = len(masked_BN)
    rank = torch.cumsum(~masked_BN, 1) * ~masked_BN  # 1-based place among the visible; 0 (the class row) if masked
    index = rows.offsets.long()[:-1, None] + torch.cat([rank.new_zeros(B, 1), rank], 1)
    whole = rows.rows.index_select(0, index.flatten()).unflatten(0, (B, N + 1))
    covered = torch.cat([masked_BN.new_zeros(B, 1), masked_BN], 1)
    whole = torch.where(covered[..., None], mask_token + positions, whole)
    layout = Packed.layout_of([N + 1] * B, row_multiple, whole.device)
    tail = whole.new_zeros(layout.total - B * (N + 1), whole.shape[-1])
    return layout.with_rows(torch.cat([whole.flatten(0, 1), tail]))


@INSERT.register("reference", "one sequence at a time")
def _insert_reference(rows: Packed, masked: Packed, mask_token: Tensor, positions: Tensor, row_multiple: int) -> Packed:
    ends, sequences = rows.offsets.tolist(), []
    for start, gone in zip(ends, masked.unpack(), strict=False):
        visible = iter(range(start, rows.total))
        numbers = {n + 1 for n in gone.tolist()}
        whole = [mask_token + q if p in numbers else rows.rows[next(visible)] for p, q in enumerate(positions)]
        sequences.append(torch.stack(whole))
    return Packed.of(sequences, row_multiple)


def insert_mask_tokens(
    rows: Packed, masked: Packed, mask_token: Tensor, positions: Tensor, row_multiple: int = 1
) -> Packed:
    """Sequences of class + visible patches -> full length N + 1, each masked patch n becoming mask_token +
    positions[n + 1]. rows Packed [T, D]; masked Packed int32; mask_token [D]; positions [N + 1, D]."""
    return INSERT(rows, masked, mask_token, positions, row_multiple)


# ---- expand ---------------------------------------------------------------------------------------------------------


def expand_layout(layout: Packed, index: Tensor, capacity: int | None = None, row_multiple: int = 1) -> Packed:
    """The layout of `expand`. Where all sequences have one length the host knows the result; else lengths are None and
    T is `capacity` (default: as if every sequence had max_length) rounded up."""
    if (length := equal_length(layout)) is not None:
        return Packed.layout_of([length] * index.numel(), row_multiple, index.device, layout.max_length)
    ends = layout.offsets.long()
    lengths = (ends[1:] - ends[:-1])[index.long()]
    offsets = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)]).to(torch.int32)
    total = index.numel() * layout.max_length if capacity is None else capacity
    total = round_up(total, row_multiple)
    return Packed(layout.rows[:0], offsets, None, layout.max_length, total, layout.shortest)


def expanded_rows(index: Tensor, source: Packed, target: Packed) -> Tensor:
    """Row of `source` for each row of `target`, int64 [T]; row 0 for the tail. Made once for an index and a layout."""
    known = target.cache.get("expanded_rows")
    if known is None or known[0] is not index or known[1] is not source.offsets:
        with torch.inference_mode(False):  # as `once` has it
            sequence, position, real = row_index(target)
            which = index.long()[sequence.clamp(max=index.numel() - 1)]
            known = (index, source.offsets, (source.offsets.long()[which] + position) * real)
        target.cache["expanded_rows"] = known
    return known[2]


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, source: Packed, target: Packed) -> Tensor:
        _, _, real = row_index(target)
        ctx.rows = expanded_rows(index, source, target)
        ctx.target, ctx.shape, ctx.real = target, rows.shape, real
        ctx.length = equal_length(source)
        ctx.index = index
        out = rows.index_select(0, ctx.rows)
        return out.masked_fill_(~real[:, None], 0) if has_tail(target) else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        total = grad.new_zeros(ctx.shape)
        if ctx.length is not None:  # whole sequences at a time: long slices
            copies = ctx.index.numel()
            grad = grad[: copies * ctx.length].reshape(copies, -1)
            whole = total[: (len(total) // ctx.length) * ctx.length].view(-1, grad.shape[1])
            sum_into(whole, ctx.index.long(), grad)
        else:
            sum_into(total, ctx.rows, grad * ctx.real[:, None] if has_tail(ctx.target) else grad)
        return total, None, None, None


def sum_into(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index[i]] += values[i], in a fixed order: serial on a CPU, sorted on a GPU (no float atomics)."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


LONGEST = 65535 * 8  # rows of a sequence: programs along a grid's second axis, and rows of one


def _refuse_expand(rows: Packed, index: Tensor, layout: Packed) -> str | None:
    if (longest := padded_length(rows)) > LONGEST:
        return f"takes sequences of at most {LONGEST} rows; got {longest}"
    return triton_support.refuse(rows.rows, index, rows.offsets, layout.offsets)


@EXPAND.register("triton", "one pass each way, no index of rows, no sort", _refuse_expand, _unasked)
def _expand_triton(*arguments: Any) -> Packed:
    from .expand_triton import expand

    return expand(*arguments)


@EXPAND.register("dense", "one gather; its backward sums whole sequences in order")
def _expand_dense(rows: Packed, index: Tensor, layout: Packed) -> Packed:
    if index.numel() == 0 or rows.total == 0:
        return layout.with_rows(rows.rows.new_zeros(layout.total, *rows.rows.shape[1:]))
    return layout.with_rows(_Expand.apply(rows.rows, index, rows, layout))


@EXPAND.register("reference", "one sequence at a time")
def _expand_reference(rows: Packed, index: Tensor, layout: Packed) -> Packed:
    ends = rows.offsets.tolist()
    sequences = [rows.rows[ends[i] : ends[i + 1]] for i in index.tolist()]
    out = torch.cat([*sequences, rows.rows[:0]])
    return layout.with_rows(torch.cat([out, out.new_zeros(layout.total - len(out), *out.shape[1:])]))


def expand(rows: Packed, index: Tensor, layout: Packed | None = None) -> Packed:
    """Sequence index[s] of `rows` again as sequence s of the result; the backward sums copies in a fixed order.

    rows Packed [T, D]; index int32 or int64 [S']; layout: what `expand_layout` gave, if made before. With a layout
    whose capacity is smaller than the sequences drawn, rows would be lost: choose the capacity as a bound.
    """
    return EXPAND(rows, index, layout if layout is not None else expand_layout(rows, index))
