"""Small models and batches for tests: every part of the real thing, at a size that takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mvle_kernels import Packed

from mvle.data.batch import Batch
from mvle.model.config import KernelsConfig, ModelConfig
from mvle.model.model import MaskVLM
from mvle.objectives.config import ObjectivesConfig
from mvle.objectives.masking import MaskingConfig

VOCABULARY, BOS, EOS, MASK = 50, 0, 2, 4
NAMES = ("mim", "mlm", "itc", "itm")


@dataclass(frozen=True)
class ModelSections:
    """The sections of a config that the model reads."""

    model: ModelConfig
    masking: MaskingConfig
    objectives: ObjectivesConfig
    kernels: KernelsConfig


def make_config(
    mode: str = "replace",
    insert: str = "cross",
    weights: Sequence[float] = (1, 1, 1, 1),
    *,
    group: int = 4,
    cross_depth: int = 2,
    decoder_depth: int = 1,
    cell: int = 16,
    row_multiple: int = 16,
    kind: str = "l1",
    per_patch: bool = False,
    text_ratio: float = 0.3,
    clean_keep: float = 1.0,
    context: str = "clean",
) -> ModelSections:
    """Width 32, two heads, 64 px images of 16 patches; weights in the order mim, mlm, itc, itm."""
    mim, mlm, itc, itm = weights
    return ModelSections(
        ModelConfig.model_validate(
            {
                "width": 32,
                "heads": 2,
                "mlp_ratio": 2.0,
                "image": {"size": 64, "patch": 16, "depth": 2, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.3)},
                "text": {"depth": 2, "max_tokens": 16},
                "cross_depth": cross_depth,
                "decoder_depth": decoder_depth,
                "projection": 16,
            }
        ),
        MaskingConfig.model_validate(
            {
                "mode": mode,
                "insert": insert,
                "cell": cell,
                "text_ratio": text_ratio,
                "clean_keep": clean_keep,
                "context": context,
            }
        ),
        ObjectivesConfig.model_validate(
            {
                "mim": {"weight": mim, "kind": kind, "per_patch": per_patch},
                "mlm": {"weight": mlm},
                "itc": {"weight": itc},
                "itm": {"weight": itm, "group": group},
            }
        ),
        KernelsConfig(row_multiple=row_multiple),
    )


def make_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> MaskVLM:
    """A model whose every parameter matters: initial weights plus noise, so that no bias is 0 and no norm is 1."""
    model = MaskVLM(config, VOCABULARY, MASK)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "temperature" not in name:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def make_batch(
    lengths: Sequence[int] = (3, 11, 6, 8, 4, 4, 16, 5),
    *,
    ratios: Sequence[float] | None = None,
    equal_images: Sequence[tuple[int, int]] = ((0, 1),),
    equal_texts: Sequence[tuple[int, int]] = (),
    row_multiple: int = 16,
    seed: int = 0,
    side: int = 64,
    first_id: int = 2**33 + 5,
) -> Batch:
    """One pair a caption length. equal_images, equal_texts: pairs (a, b) where b gets the image or caption of a."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    captions = [torch.randint(5, VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    for caption in captions:
        if len(caption):
            caption[0], caption[-1] = BOS, EOS
    images = torch.randint(0, 256, (B, side, side, 3), generator=generator, dtype=torch.uint8)
    image_ids, text_ids = torch.arange(B) + 100, torch.arange(B) + 500
    for a, b in equal_images:
        images[b], image_ids[b] = images[a], image_ids[a]
    for a, b in equal_texts:
        captions[b], text_ids[b] = captions[a], text_ids[a]
    return Batch(
        images,
        Packed.of(captions, row_multiple),
        torch.arange(B) + first_id,
        image_ids,
        text_ids,
        [f"pair-{i}" for i in range(B)],
        tuple(ratios or [0.6] * B),
    )


def reordered(batch: Batch, order: Sequence[int]) -> Batch:
    """The pairs `order` of a batch, as a batch of their own."""
    captions = batch.text.unpack()
    index = torch.tensor(order)
    return Batch(
        batch.images[index],
        Packed.of([captions[i] for i in order], 8),
        batch.pair_ids[index],
        batch.image_ids[index],
        batch.text_ids[index],
        [batch.keys[i] for i in order],
        tuple(batch.image_ratio[i] for i in order),
    )
