"""The plain graph's step under torch.compile: the same mathematics as plain.py, from the same weights.

    ONE_GRAPH   forward and backward of all passes as one graph, the drawing of hard negatives included: what
                torch.compile has the most to work with, and what takes minutes to compile
    PROVIDER    each kind of block, and the two losses over many rows, compiled once and used for every layer and pass:
                what remains in eager mode is embeddings, gathers and the contrastive loss

Shapes are fixed (`dynamic=False`): they are those of the batch, which is the best case for a compiler. In a run, each
other padded length compiles again. The first call of a step compiles.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvle.config import Config
from mvle.data.batch import Batch
from mvle.engine.blocks import COMPILATIONS
from mvle.model.model import MaskVLM

from . import Provider, Step
from .plain import Plain
from .training import plain_step

Compiler = Callable[..., Any]


class Part(Plain):
    """The plain graph over some of its weights."""

    def __init__(self, weights: Mapping[str, Tensor], config: Any, vocabulary: int) -> None:
        self.weights, self.config, self.vocabulary = weights, config, vocabulary


def run(kind: str, weights: Mapping[str, Tensor], config: Any, vocabulary: int, *arguments: Any) -> Tensor:
    """A method of the plain graph over the weights that it reads: what is compiled, once for all layers of a kind."""
    return getattr(Part(weights, config, vocabulary), kind)(*arguments)


class BlockByBlock(Plain):
    """The plain graph whose blocks and heads run compiled; all layers of a kind go by the names of the first."""

    def __init__(self, model: MaskVLM, compiler: Compiler) -> None:
        super().__init__(model)
        self.compiled = compiler(run)

    def piece(self, kind: str, weights: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        return self.compiled(kind, weights, self.config, self.vocabulary, *arguments)

    def named(self, old: str, new: str) -> dict[str, Tensor]:
        """The weights below `old`, as if they were below `new`."""
        return {new + name.removeprefix(old): w for name, w in self.weights.items() if name.startswith(f"{old}.")}

    def image_block(self, name: str, x: Tensor, real: Tensor | None) -> Tensor:
        return self.piece("image_block", self.named(name, "block"), "block", x, real)

    def text_block(self, name: str, x: Tensor, real_BL: Tensor) -> Tensor:
        return self.piece("text_block", self.named(name, "block"), "block", x, real_BL)

    def cross_block(
        self, stage: str, i: int, x: Tensor, real: Tensor | None, context: Tensor | None, context_real: Tensor | None
    ) -> Tensor:
        weights, D = self.named(f"{stage}.blocks.{i}", "stage.blocks.0"), x.shape[-1]
        for name in ("stage.context.kv.weight", "stage.context.kv.bias"):
            weights[name] = self.weights[name.replace("stage", stage, 1)][2 * i * D : 2 * (i + 1) * D]
        return self.piece("cross_block", weights, "stage", 0, x, real, context, context_real)

    def pixel_loss(self, x: Tensor, images: Tensor, masked_BN: Tensor) -> Tensor:
        return self.piece("pixel_loss", self.named("heads.pixels", "heads.pixels"), x, images, masked_BN)

    def word_loss(self, x: Tensor, true_BL: Tensor, chosen: Tensor) -> Tensor:
        return self.piece("word_loss", self.named("heads.tokens", "heads.tokens"), x, true_BL, chosen)


def make(
    config: Config,
    vocabulary: int,
    mask_id: int,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    one_graph: bool = False,
    backend: str = "inductor",
) -> Step:
    """The plain step, compiled; it is not charged for drawing its masks. backend: torch.compile's."""
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, COMPILATIONS)  # torch counts by code, which all steps share
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)

    def losses_of(model: MaskVLM) -> Callable[..., Any]:
        return compiler(Plain(model).losses) if one_graph else BlockByBlock(model, compiler).losses

    return plain_step(config, vocabulary, mask_id, batch, device, dtype, losses_of)


def needs_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code for the device, or None."""
    if device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler: install g++"
    return None


def takes_long(device: torch.device) -> str | None:
    """Why the whole step is not compiled as one graph on the device, or None."""
    if device.type == "cpu":
        return "minutes of compilation on a CPU, for the same step as `plain, compiled`"
    return None


PROVIDER = Provider("plain, compiled", "plain, each kind of block under torch.compile", make, skip=needs_compiler)
ONE_GRAPH = Provider(
    "plain, compiled as one graph",
    "plain, the whole step under torch.compile",
    partial(make, one_graph=True),
    skip=takes_long,
)
