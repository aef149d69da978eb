"""How much memory a forward and backward take beside weights and gradients, found without having it.

The real model, with its real blocks and its real checkpointing, runs on fake tensors: each has a shape, a dtype and a
storage of so many bytes, and no memory. `LiveBytes` adds up the storages that are alive. What a kernel takes inside a
call is not seen, nor what an allocator rounds up or cannot use.

torch's own tracker (torch.distributed._tools.MemTracker) finds the same bytes, and by module; for that it walks over
all modules at each new peak, which takes 45 s for the large recipe instead of 5.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from mvle_kernels import Packed, contrastive_loss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..data.batch import Batch
from ..data.caption_lengths import GOLDEN, typical_lengths
from ..model.model import MaskVLM
from .blocks import ActivationCheckpointing, prepare_blocks

if TYPE_CHECKING:
    from ..config import Config


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that ops make while it is active: `live` now, `peak` at most. `ignore`: storages that
    were there before, which an op may return again.
    A storage that is resized counts as what it then is: sharding empties its buffers so."""

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: Any = WeakIdKeyDictionary()  # storage -> [bytes], None for those to ignore
        for tensor in ignore:
            self._sizes[tensor.untyped_storage()] = None

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized()  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._sizes:
            return
        size = [0]
        self._sizes[storage] = size
        weakref.finalize(storage, self._set, size, 0)
        self._set(size, storage.nbytes())

    def _set(self, size: list[int], now: int) -> None:
        self.live += now - size[0]
        size[0] = now
        self.peak = max(self.peak, self.live)

    def _resized(self) -> Any:
        resize = self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if (known := self._sizes.get(storage)) is not None:
                self._set(known, size)
            return out

        return resize_


def typical_batch(config: Config, pairs: int) -> Batch:
    """Black images and captions of one word, as long as captions are; ratios spread evenly over masking.image_ratio."""
    size = config.model.image.size
    captions = [torch.zeros(n, dtype=torch.int32) for n in typical_lengths(pairs, config.model.text.max_tokens)]
    ids = torch.arange(pairs)
    return Batch(
        images=torch.zeros(pairs, size, size, 3, dtype=torch.uint8),
        text=Packed.of(captions, config.kernels.row_multiple),
        pair_ids=ids,
        image_ids=ids,
        text_ids=ids,
        keys=[""] * pairs,
        image_ratio=typical_ratios(config, pairs),
    )


def typical_ratios(config: Config, pairs: int) -> tuple[float, ...]:
    """Shares of masked cells, spread evenly over masking.image_ratio."""
    low, high = config.masking.ratio_range
    return tuple(low + (high - low) * ((0.5 + pair * GOLDEN) % 1.0) for pair in range(pairs))


def model_on_meta(config: Config, vocabulary: int, dtype: torch.dtype = torch.float32) -> MaskVLM:
    """The model's shapes, in `dtype` but for modules of full precision, as sharding casts them on a GPU."""
    with torch.device("meta"):
        model = MaskVLM(config, vocabulary, mask_id=0)
        for module in model.modules():
            if not getattr(module, "full_precision", False):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
    return model


def activation_bytes(
    config: Config, vocabulary: int, pairs: Sequence[int], checkpointing: ActivationCheckpointing, dtype: torch.dtype
) -> list[int]:
    """For each number of pairs, the most bytes alive at once in a forward and backward, beside weights, their gradients
    and the batch itself."""
    model = model_on_meta(config, vocabulary, dtype)
    prepare_blocks(model, checkpointing, compiled=False)
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for number in pairs:
            batch = typical_batch(config, number)
            before = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
            before += [batch.images, batch.text.rows, batch.text.offsets, batch.pair_ids]
            with LiveBytes(before) as tracker:
                model(batch, 0, model.counts(batch)).total.backward()
            peaks.append(tracker.peak)
    return peaks


def contrast_bytes() -> float:
    """Bytes alive at most in the contrastive loss, for each of the pairs of pairs that it compares."""

    def peak(pairs: int) -> int:
        z = torch.empty(pairs, 1, requires_grad=True)
        ids = torch.arange(pairs)
        with LiveBytes([z, ids]) as tracker:
            contrastive_loss(z, z, torch.ones(1, requires_grad=True), ids, ids)[0].backward()
        return tracker.peak

    with FakeTensorMode(allow_non_fake_inputs=True):
        few, many = peak(512), peak(1024)
    return (many - 2 * few) / (1024**2 - 2 * 512**2)  # what grows with the number of pairs alone cancels out
