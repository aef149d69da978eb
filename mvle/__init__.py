"""mvle: fast pre-training of masked vision-and-language models (MaskVLM, Kwon et al., ICLR 2023).

`mvle.load(RUN)` opens a trained run, or an export of one, for use; everything else lives in the modules that own it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .engine.stored import Weights
    from .inference import Pretrained

__version__ = "0.1.0"


def load(
    run: str, device: str = "cpu", step: int | Literal["best"] | None = None, weights: Weights = "auto"
) -> Pretrained:
    """Open a run or an exported folder: `encode_images`, `encode_texts`, `match`, `fill`, `reconstruct` (see
    mvle.inference).

    step: of the checkpoint; best: by checkpoint.best; None: the newest. weights: model, ema, or auto: the EMA where the
    run keeps one (optim.ema).
    """
    from .inference import Pretrained

    return Pretrained.open(run, device, step, weights)
