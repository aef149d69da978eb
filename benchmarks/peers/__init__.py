"""Peers: other ways to compute the same step, for agreement in the tests and for comparison of speed.

    plain.py           MaskVLM as the paper says it: the oracle of the tests
    compiled_plain.py  the same under torch.compile
    albef.py           the step of ALBEF at the same encoder sizes
    flava.py           the step of FLAVA (transformers) at the same encoder sizes

Each of the last three has a PROVIDER. All take our Batch, so that every provider meets the same images and captions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mvle.config import Config
from mvle.data.batch import Batch

Step = Callable[[], Any]
Make = Callable[[Config, int, int, Batch, torch.device, torch.dtype], Step]


def _never(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """Who makes a step.

    name         as in a table
    what         one line
    make         (config, vocabulary, mask_id, batch on the device, device, dtype) -> a step: each call of it is one
                 whole optimizer step (forward, backward, clipping, AdamW) over the batch, with weights and an optimizer
                 of its own. dtype: what products are made in; bfloat16 means autocast over float32 weights
    differences  how the mathematics differ from ours, a line each with what it costs; none where they are the same
    skip         (device) -> why it cannot run there, or None
    """

    name: str
    what: str
    make: Make
    differences: tuple[str, ...] = ()
    skip: Callable[[torch.device], str | None] = _never
