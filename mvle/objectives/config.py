"""Which objectives are trained, and with what weight. Weight 0 = not asked for and not computed at all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..section import Section


class MimConfig(Section):
    """Masked image modelling: masked pixels rebuilt from the visible ones and the whole caption."""

    weight: float = Field(1.0, ge=0, description="weight of the loss; 0: not computed")
    kind: Literal["l1", "mse", "l1+mse"] = Field("l1", description="distance of pixels; l1 is the paper's")
    per_patch: bool = Field(False, description="normalise each target patch by its own mean and deviation (MAE)")


class MlmConfig(Section):
    """Masked language modelling: masked words rebuilt from the visible ones and the whole image."""

    weight: float = Field(1.0, ge=0, description="weight of the loss; 0: not computed")


class ItcConfig(Section):
    """Image-text contrast of the two global tokens."""

    weight: float = Field(1.0, ge=0, description="weight of the loss; 0: not computed")


class ItmConfig(Section):
    """Image-text matching with hard negatives."""

    weight: float = Field(1.0, ge=0, description="weight of the loss; 0: not computed")
    group: int = Field(
        32,
        ge=2,
        description="negatives are drawn among this many consecutive pairs; divides batch.micro, so that they do not "
        "depend on the number of ranks",
    )


class ObjectivesConfig(Section):
    """The four losses of the paper; it adds them with weight 1 each."""

    mim: MimConfig = Field(default_factory=MimConfig, description="masked image modelling")
    mlm: MlmConfig = Field(default_factory=MlmConfig, description="masked language modelling")
    itc: ItcConfig = Field(default_factory=ItcConfig, description="image-text contrast")
    itm: ItmConfig = Field(default_factory=ItmConfig, description="image-text matching")

    @model_validator(mode="after")
    def check(self) -> ObjectivesConfig:
        """Something must be trained."""
        if not any(o.weight for o in (self.mim, self.mlm, self.itc, self.itm)):
            raise ValueError("at least one of mim, mlm, itc, itm needs a weight above 0; all are 0")
        return self
