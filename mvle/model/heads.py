"""The heads: what turns rows into pixels, words, embeddings and match scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mvle_kernels import Packed, round_up
from torch import Tensor, nn

from .config import ModelConfig


class Temperature(nn.Module):
    """The learned temperature of the contrastive loss, kept as its logarithm.

    So a step of the optimizer changes it by a share, whatever its size: as a plain number near 0.07 it would jump by
    percents of itself at each step of a learning rate of 1e-3. Shape [1], since sharding takes no 0-d parameter.
    """

    full_precision = True  # never cast to bf16: its gradient sums over the whole batch
    LOW, HIGH = 0.001, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        """The temperature, [1], in its own dtype."""
        return self.log_value.exp()


class Heads(nn.Module):
    """Pixel head, token head, the two contrastive projections, the temperature and the matching head."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.width
        self.vocabulary = vocabulary
        self.pixels = nn.Linear(width, 3 * config.image.patch**2)
        self.tokens = nn.Linear(width, round_up(vocabulary, 128))  # rows past the vocabulary are never scored
        self.image_projection = nn.Linear(width, config.projection)
        self.text_projection = nn.Linear(width, config.projection)
        self.temperature = Temperature()
        self.match = nn.Linear(width, 2)

    def embed(self, rows: Packed, projection: nn.Linear) -> Tensor:
        """The global row of each sequence, projected, of unit length: float32 (or float64) [S, d]."""
        globals_SD = rows.rows.index_select(0, rows.offsets[:-1])
        z = projection(globals_SD)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)

    def match_logits(self, image_global: Tensor, text_global: Tensor) -> Tensor:
        """Product of the two sides' global rows [P, D] -> [P, 2]: column 1 = they belong together."""
        logits = self.match(image_global * text_global)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
