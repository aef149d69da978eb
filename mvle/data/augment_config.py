"""The section `data.augment`: how images are changed in training, beside crop and flip. augment.py does it."""

from __future__ import annotations

from pydantic import Field

from ..section import Section

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOURS = ("autocontrast", "equalize", "brightness", "contrast", "saturation")
RANDAUGMENT = ("identity", "sharpness", *GEOMETRIC, *COLOURS)  # the number of an op is its place
# What magnitude 10 means, either way.
MOST_SHEAR, MOST_SHIFT, MOST_DEGREES, MOST_FACTOR = 0.3, 0.1, 15.0, 0.9
SMALLEST_SIGMA = 0.1


class FactorConfig(Section):
    """A change by a factor that is drawn for each image."""

    probability: float = Field(0.0, ge=0, le=1, description="share of the images that get it")
    strength: float = Field(0.4, gt=0, le=1, description="the factor is uniform in 1 - strength .. 1 + strength")


class GreyConfig(Section):
    """Pictures without colours."""

    probability: float = Field(0.0, ge=0, le=1, description="share of the images that get it")
    strength: float = Field(1.0, gt=0, le=1, description="how far towards grey; 1: no colour is left")


class BlurConfig(Section):
    """Gaussian blur."""

    probability: float = Field(0.0, ge=0, le=1, description="share of the images that get it")
    strength: float = Field(
        2.0, ge=SMALLEST_SIGMA, le=10, description=f"the sigma is uniform in {SMALLEST_SIGMA} .. strength, in pixels"
    )


class RandAugmentConfig(Section):
    """Ops that are drawn for each image."""

    ops: int = Field(0, ge=0, le=4, description=f"ops an image, one after the other, of: {', '.join(RANDAUGMENT)}")
    magnitude: float = Field(
        7.0,
        ge=0,
        le=10,
        description=f"how strong; 10: shear {MOST_SHEAR}, shift {MOST_SHIFT} of the side, rotation {MOST_DEGREES:.0f} "
        f"degrees, factors 1 +- {MOST_FACTOR}",
    )


class AugmentConfig(Section):
    """How images are changed in training, beside crop and flip; off by default."""

    brightness: FactorConfig = Field(default_factory=FactorConfig, description="brighter or darker")
    contrast: FactorConfig = Field(default_factory=FactorConfig, description="away from or towards the mean grey")
    saturation: FactorConfig = Field(default_factory=FactorConfig, description="away from or towards grey")
    grey: GreyConfig = Field(default_factory=GreyConfig, description="without colours")
    blur: BlurConfig = Field(default_factory=BlurConfig, description="blurred")
    randaugment: RandAugmentConfig = Field(default_factory=RandAugmentConfig, description="ops by lot")
    colour_words: bool = Field(
        False, description="change the colours of an image whose caption names a colour, too; captions become false"
    )

    @property
    def on(self) -> bool:
        """Whether any image is ever changed."""
        chances = (self.brightness, self.contrast, self.saturation, self.grey, self.blur)
        return self.randaugment.ops > 0 or any(one.probability > 0 for one in chances)
