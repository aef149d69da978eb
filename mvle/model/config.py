"""How large the model is. tiny, base and large are the sizes of the recipes; base and large have timm's ViT-B/16 and
ViT-L/16 shape on the image side and RoBERTa's base and large shape on the text side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mvle_kernels.dispatch import read_demand
from pydantic import Field, field_validator, model_validator

from ..section import Section

if TYPE_CHECKING:
    from torch import Tensor


class ImageEncoderConfig(Section):
    """A pre-norm ViT over square images."""

    size: int = Field(224, gt=0, description="side of the square input, pixels")
    patch: int = Field(16, gt=0, description="side of a patch, pixels; divides model.image.size")
    depth: int = Field(12, gt=0, description="blocks of the image encoder")
    mean: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5), description="subtracted from pixels in 0..1, per channel (red, green, blue)"
    )
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="then divided by, per channel; each above 0")
    pretrained: str | None = Field(
        None,
        min_length=1,
        description="first weights of the image encoder: a ViT of timm by name (vit_base_patch16_224.augreg_in21k), or "
        "a local folder or file; null: drawn from run.seed. A run that goes on needs it no more",
    )

    @model_validator(mode="after")
    def check(self) -> ImageEncoderConfig:
        """Whole patches, and a real scale."""
        if self.size % self.patch:
            raise ValueError(f"size must be a multiple of patch ({self.patch}); got {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in each channel; got {self.std}")
        return self

    def of(self, images: Tensor) -> ImageEncoderConfig:
        """The same with the size, and so the grid, of these images, [B, side, side, 3]: smaller ones in a phase of
        lower resolution. Raises ValueError for images that are not square."""
        height, width = images.shape[1:3]
        if height != width:
            raise ValueError(f"images must be square, [B, side, side, 3]; got {tuple(images.shape)}.")
        return self if height == self.size else self.model_copy(update={"size": height})

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.size // self.patch, self.size // self.patch


class TextEncoderConfig(Section):
    """A post-norm RoBERTa."""

    depth: int = Field(12, gt=0, description="blocks of the text encoder")
    max_tokens: int = Field(32, ge=3, description="longest caption, in tokens with its bos and eos; longer is cut")
    pretrained: str | None = Field(
        None,
        min_length=1,
        description="first weights of the text encoder: a RoBERTa of the Hugging Face hub by name (roberta-base), or a "
        "local folder or file; null: drawn from run.seed. A run that goes on needs it no more",
    )


class ModelConfig(Section):
    """Sizes of the encoders, the cross encoders, the decoder and the heads."""

    width: int = Field(768, gt=0, description="width of every block; a multiple of model.heads")
    heads: int = Field(12, gt=0, description="attention heads of every block")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a feed-forward layer / model.width")
    image: ImageEncoderConfig = Field(default_factory=ImageEncoderConfig, description="the image encoder")
    text: TextEncoderConfig = Field(default_factory=TextEncoderConfig, description="the text encoder")
    cross_depth: int = Field(3, gt=0, description="blocks of each cross encoder (self, cross, feed-forward)")
    decoder_depth: int = Field(3, gt=0, description="blocks of the image decoder, which reads the caption too")
    projection: int = Field(256, gt=0, description="width of the contrastive space")
    temperature: float = Field(0.07, gt=0.001, lt=0.5, description="initial temperature of the contrastive loss")
    dropout: float = Field(0.0, description="must be 0: dropout would break sharing and rank invariance")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="first weights of everything that fits: the folder of a run (its newest checkpoint) or of an "
        "export; null: none. Weights alone are taken. A run that goes on needs it no more",
    )
    init_std: float | None = Field(
        None,
        gt=0,
        description="deviation of initial weights, cut at two of them; null: 0.02 at width 768, and otherwise by the "
        "inverse root of the width",
    )

    @model_validator(mode="after")
    def check(self) -> ModelConfig:
        """Whole heads; no dropout; one source of first weights."""
        named = [side for side in ("image", "text") if getattr(self, side).pretrained is not None]
        if self.init_from is not None and named:
            keys = " and ".join(f"model.{side}.pretrained" for side in named)
            raise ValueError(
                f"init_from gives the encoders their first weights, and so does {keys}: expected one of them; got "
                f"model.init_from={self.init_from}. Set the other to null"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads ({self.heads}); got {self.width}")
        if self.dropout != 0:
            raise ValueError(
                f"dropout must be 0; got {self.dropout}. Blocks are shared between objectives and results may not "
                "depend on the number of ranks: both need a forward without dropout"
            )
        return self

    @property
    def initial_std(self) -> float:
        """model.init_std, or its default for the width."""
        return self.init_std or 0.02 * (768 / self.width) ** 0.5


class KernelsConfig(Section):
    """Which implementation computes an op, and how packed buffers are rounded."""

    backend: str = Field(
        "auto",
        description="auto: each call chooses; triton, dense or reference: forced for every op that has it; "
        "triton|dense: the first that can; op=backend,…: for those ops",
    )
    compile: bool = Field(
        False,
        description="torch.compile the dense parts of every block; the first step is slow, a CPU needs a C++ compiler",
    )
    row_multiple: int = Field(
        16, gt=0, description="packed buffers are rounded up to a multiple of this many rows, so that shapes repeat"
    )

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        read_demand(backend, "kernels.backend")
        return backend
