"""What is masked, how much of it, and what the other side shows meanwhile."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..model.queries import View
from ..section import Section


class MaskingConfig(Section):
    """How much of each side is masked, and how. The paper: 0.6 of 32-pixel cells, 0.3 of the tokens."""

    mode: Literal["replace", "drop"] = Field(
        "replace",
        description="replace: masked patches become a learned token (the paper); drop: the encoder sees the visible "
        "patches only (faster)",
    )
    insert: Literal["cross", "decoder"] = Field(
        "cross", description="where mask tokens enter in drop mode: the image cross encoder, or only the decoder"
    )
    context: Literal["clean", "masked", "none"] = Field(
        "clean",
        description="what MIM and MLM read of the other side: clean, the whole of it (the paper); masked, what its own "
        "mask leaves; none, nothing. Matching reads the whole of both",
    )
    image_ratio: float | tuple[float, float] = Field(
        0.6, description="share of cells masked: a number, or [low, high] drawn for each pair; above 0, at most 1"
    )
    cell: int = Field(32, gt=0, description="side of a masking cell, pixels; a multiple of model.image.patch")
    text_ratio: float = Field(0.3, gt=0, le=1, description="share of a caption's tokens masked, at least one")
    clean_keep: float = Field(
        1.0,
        gt=0,
        le=1,
        description="an approximation, off at 1: in training the clean image view shows this share of its patches, "
        "drawn for each pair; contrast, matching and masked captions read these alone (faster)",
    )

    @field_validator("image_ratio")
    @classmethod
    def check_ratio(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        """0 < low <= high <= 1."""
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 0 < low <= high <= 1:
            raise ValueError(f"expected a share above 0 and at most 1, or [low, high] in that order; got {value}")
        return value

    @property
    def approximation(self) -> str | None:
        """What of it makes a step something else than the paper's, for messages; None: nothing."""
        if self.clean_keep == 1:
            return None
        return f"clean image views show {self.clean_keep:g} of their patches in training (masking.clean_keep)"

    def partner(self, clean: View, masked: View) -> View | None:
        """Which of two views of the other side MIM or MLM reads; None: neither."""
        return {"clean": clean, "masked": masked, "none": None}[self.context]

    @property
    def ratio_range(self) -> tuple[float, float]:
        """image_ratio as [low, high]."""
        return self.image_ratio if isinstance(self.image_ratio, tuple) else (self.image_ratio, self.image_ratio)
