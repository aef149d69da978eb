"""What the report shows of a model: rebuilt pictures, filled words, and what it retrieves. Numbers and pixels, no HTML.

Pairs are the first of the split, never picked by how well they turn out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.retrieval import Embedded, embed
from ..evaluation.split import Split, low_ratio, mask_words, patch_masks, patch_values, to_images

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..inference import OpenedRun

Picture = NDArray[np.uint8]
GREY = 0.5  # what masked patches show


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """One pair: pictures uint8 [height, width, 3]."""

    image: Picture
    masked: Picture
    own: Picture  # rebuilt with its caption
    another: Picture  # rebuilt with another pair's caption
    alone: Picture  # rebuilt from its caption alone: everything was masked
    caption: str
    another_caption: str

    @property
    def pictures(self) -> tuple[Picture, Picture, Picture, Picture, Picture]:
        """In the order of `COLUMNS`."""
        return self.image, self.masked, self.own, self.another, self.alone


COLUMNS = ("image", "masked", "its caption", "another caption", "caption alone")


@dataclass(frozen=True)
class Piece:
    """A stretch of a caption; where it was masked, what the model said with and without the image."""

    text: str
    masked: bool = False
    seeing: str = ""
    blind: str = ""


@dataclass(frozen=True, eq=False)
class Filled:
    """A caption with masked words."""

    image: Picture
    pieces: list[Piece]


@dataclass(frozen=True, eq=False)
class Found:
    """A query and its three best answers: (caption or picture, whether it is right)."""

    query: Picture | str
    answers: list[tuple[Picture | str, bool]]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Everything of a page that needs the model. Empty lists where the objective was not trained."""

    rebuilt: list[Rebuilt]
    filled: list[Filled]
    captions_found: list[Found]
    images_found: list[Found]


def gather(run: OpenedRun, split: Split, rows: int = 8, queries: int = 4) -> Gathered:
    """Ask the model. rows: pairs of the first two sections; queries: of each way of retrieval."""
    objectives = run.config.objectives
    rows, queries = min(rows, len(split)), min(queries, len(split))
    rebuilt = rebuild(run, split, rows) if objectives.mim.weight else []
    filled = fill(run, split, rows) if objectives.mlm.weight else []
    captions_found, images_found = find(run, split, queries) if objectives.itc.weight else ([], [])
    return Gathered(rebuilt, filled, captions_found, images_found)


def rebuild(run: OpenedRun, split: Split, rows: int) -> list[Rebuilt]:
    """The first pairs, rebuilt with their own caption, with the next pair's, and from the caption alone."""
    model, image, device = run.model, run.config.model.image, run.device
    partners = split.partners()[:rows]
    batch = split.batch(range(rows))
    images = batch.images.to(device)
    text, other = batch.text.to(device), split.batch(partners).text.to(device)
    ratio = low_ratio(run.config)
    masked = patch_masks(run.config, run.config.evaluation.seed, batch.pair_ids, ratio).to(device)
    shown = patch_values(images, image.patch).float() / 255
    shown[masked] = GREY
    patches = (
        shown,
        model.reconstruct(images, masked, text),
        model.reconstruct(images, masked, other),
        model.reconstruct(images, torch.ones_like(masked), text),
    )
    masks, own, another, alone = (to_images(values, image.patch, image.grid).cpu().numpy() for values in patches)
    return [
        Rebuilt(pixels, masks[i], own[i], another[i], alone[i], split.captions[i][0], split.captions[partners[i]][0])
        for i, pixels in enumerate(batch.images.numpy())
    ]


def fill(run: OpenedRun, split: Split, rows: int) -> list[Filled]:
    """The first captions with masked words, filled with their image and without any."""
    model, tokenizer, device = run.model, run.tokenizer, run.device
    batch = split.batch(range(rows))
    chosen = mask_words(
        run.config, run.config.evaluation.seed, batch.pair_ids, batch.text, tokenizer.mask_id, tokenizer.vocabulary
    ).to(device)
    seeing = model.fill(chosen.text, chosen.positions, batch.images.to(device)).argmax(1).tolist()
    blind = model.fill(chosen.text, chosen.positions, None).argmax(1).tolist()
    answers = iter(zip(seeing, blind, strict=True))
    captions = zip(batch.images.numpy(), batch.text.unpack(), chosen.text.unpack(), strict=True)
    return [Filled(pixels, pieces_of(t.tolist(), m.tolist(), answers, tokenizer)) for pixels, t, m in captions]


def pieces_of(
    ids: Sequence[int], masked_ids: Sequence[int], answers: Iterator[tuple[int, int]], tokenizer: Tokenizer
) -> list[Piece]:
    """The caption in pieces whose texts, joined, are its text."""
    pieces: list[Piece] = []
    before = ""
    for at in range(1, len(ids) - 1):
        now = tokenizer.decode(ids[1 : at + 1])
        text, before = now[len(before) :], now
        if masked_ids[at] == tokenizer.mask_id and ids[at] != tokenizer.mask_id:
            seeing, blind = next(answers)
            pieces.append(Piece(text, True, tokenizer.word(seeing), tokenizer.word(blind)))
        else:
            pieces.append(Piece(text))
    return pieces


def find(run: OpenedRun, split: Split, queries: int, best: int = 3) -> tuple[list[Found], list[Found]]:
    """The most similar captions of some images, and the most similar images of some captions (first captions)."""
    found: Embedded = embed(run.model, split, run.device, "first", keep_rows=False)
    rows = slice(0, queries)
    best = min(best, len(split))
    captions = (found.image_z[rows] @ found.text_z.T).topk(best, dim=1).indices
    images = (found.text_z[rows] @ found.image_z.T).topk(best, dim=1).indices
    right, right_images = found.right(rows), found.right_images(rows)
    wanted = sorted({*range(queries), *images.flatten().tolist()})
    pixels = dict(zip(wanted, split.batch(wanted).images.numpy(), strict=True))
    to_text = [
        Found(pixels[q], [(split.captions[c][0], bool(right[q, c])) for c in captions[q].tolist()])
        for q in range(queries)
    ]
    to_image = [
        Found(split.captions[q][0], [(pixels[i], bool(right_images[q, i])) for i in images[q].tolist()])
        for q in range(queries)
    ]
    return to_text, to_image
