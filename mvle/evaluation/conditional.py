"""Were both conditionals learned? Masked words and masked pixels with the true, a wrong, and no partner.

    MLM   p(text | image): nats a masked token, accuracy, and accuracy on classes of words where the set names them
    MIM   p(image | text): mean absolute difference of pixels (0..1, prediction clipped to it) over masked pixels;
          also on the pixels of objects alone (where the set has object masks), and with the whole image masked
          (caption alone)

As likelihoods (docs/method.md): a masked word costs -log p nats, and a masked pixel value those of a Laplace density
around the prediction, whose one scale is the mean absolute difference d itself: 1 + log(2 d). With everything masked
("image alone", "caption alone") they bound, from above, what the partner leaves unknown: H(text | image) in nats a
caption of known length, and the differential entropy h(image | text) in nats a value.

A model that ignores its partner scores the same with each, as one must that was trained without (masking.context=none).
wrong = the next pair of the split that shares neither image nor caption; none = no context at all, cross-attention is
skipped. Masks are fixed by (evaluation.seed, row of the split): the token masks of masking.text_ratio, every chosen
token replaced by the mask token (training leaves a tenth as it is and swaps another); image masks of
masking.image_ratio, or the low end of its range.

background = one colour everywhere, what a model without any knowledge of the pair could paint: the mean colour outside
the objects where object masks are there, else the mean pixel of the evaluated images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mvle_kernels import Packed
from torch import Tensor

from ..data.batch import Batch
from ..model.model import MaskVLM
from .split import MaskedText, Split, low_ratio, mask_words, patch_masks, patch_values

Device = torch.device | str


def conditional(model: MaskVLM, split: Split, seed: int, device: Device) -> dict[str, Any]:
    """The "conditional" part of evaluation.json; "mlm" or "mim" is left out where it was not trained."""
    objectives = model.config.objectives
    out: dict[str, Any] = {}
    if objectives.mlm.weight:
        out["mlm"] = words_by_partner(model, split, seed, device)
    if objectives.mim.weight:
        out["mim"] = pixels_by_partner(model, split, seed, device)
    return out


# ---- words ----------------------------------------------------------------------------------------------------------


def words_by_partner(model: MaskVLM, split: Split, seed: int, device: Device) -> dict[str, Any]:
    """{"true" | "wrong" | "none": {"loss" nats a token, "accuracy", "classes": {name: accuracy}, "together": {...},
    "image_alone": {"loss", "accuracy", "caption": nats a caption}}}.

    loss, accuracy and "together" (the words of a class): words masked as in training, masking.text_ratio of a caption
    at once. "classes": each word of a class masked alone, the rest of its caption read: what it owes to the image.
    "image_alone": every word masked, so that only the image (and how long the caption is) can tell them.
    """
    partners, tokenizer = split.partners(), split.tokenizer
    classes = {name: class_ids(split, known) for name, known in split.word_classes().items()}
    tallies = {name: Tally() for name in ("true", "wrong", "none")}
    for rows in split.chunks():
        batch, images = pairs_and_partners(split, rows, partners)
        words = (model.config, seed, batch.pair_ids, batch.text, tokenizer.mask_id, tokenizer.vocabulary)
        masked, every = mask_words(*words).to(device), mask_words(*words, ratio=1.0).to(device)
        given = {"true": batch.images.to(device), "wrong": images.images.to(device), "none": None}
        for name, context in given.items():
            logits = model.fill(masked.text, masked.positions, context).float()
            loss = F.cross_entropy(logits, masked.targets, reduction="none").double()
            right = (logits.argmax(1) == masked.targets).double()
            tallies[name].add("loss", loss)
            tallies[name].add("accuracy", right)
            for kind, ids in classes.items():
                tallies[name].add(f"{kind} together", right[torch.isin(masked.targets, ids.to(device))])
            logits = model.fill(every.text, every.positions, context).float()
            loss = F.cross_entropy(logits, every.targets, reduction="none").double()
            tallies[name].add("alone", loss)
            tallies[name].add("alone right", (logits.argmax(1) == every.targets).double())
            tallies[name].add("caption", torch.stack([part.sum() for part in loss.split(every.positions.lengths)]))
        for kind, ids in classes.items():
            alone, pair = mask_each(batch.text, ids, tokenizer.mask_id)
            if not len(alone.targets):
                continue
            text, targets, pair = alone.text.to(device), alone.targets.to(device), pair.to(device)
            for name, context in given.items():
                logits = model.fill(text, alone.positions.to(device), None if context is None else context[pair])
                tallies[name].add(kind, (logits.argmax(1) == targets).double())
    return {
        name: {
            "loss": t.mean("loss"),
            "accuracy": t.mean("accuracy"),
            "image_alone": {"loss": t.mean("alone"), "accuracy": t.mean("alone right"), "caption": t.mean("caption")},
        }
        | (
            {
                "classes": {kind: t.mean(kind) for kind in classes},
                "together": {kind: t.mean(f"{kind} together") for kind in classes},
            }
            if classes
            else {}
        )
        for name, t in tallies.items()
    }


def mask_each(text: Packed, ids: Tensor, mask_id: int) -> tuple[MaskedText, Tensor]:
    """Every caption once for each of its words that are in `ids`, with that one word masked; and int64, which caption
    of `text` each of them is."""
    captions, positions, targets, pairs, start = [], [], [], [], 0
    for pair, caption in enumerate(text.unpack()):
        for place in torch.isin(caption, ids.to(caption.dtype)).nonzero().flatten().tolist():
            one = caption.clone()
            targets.append(int(one[place]))
            one[place] = mask_id
            captions.append(one)
            positions.append(start + place)
            pairs.append(pair)
            start += len(one)
    where = Packed.layout_of([1] * len(positions)).with_rows(torch.tensor(positions, dtype=torch.int32))
    masked = Packed.of(captions) if captions else text
    return MaskedText(masked, where, torch.tensor(targets, dtype=torch.int64)), torch.tensor(pairs, dtype=torch.int64)


def class_ids(split: Split, known: set[str]) -> Tensor:
    """Token ids whose text is a word of the class. A word that the tokenizer cuts into several has none."""
    return torch.tensor(
        [i for i in range(split.tokenizer.vocabulary) if split.tokenizer.word(i).lower() in known], dtype=torch.int64
    )


class Tally:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add every element."""
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def mean(self, name: str) -> float | None:
        """Mean of what was added; None if nothing was."""
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None


def pairs_and_partners(
    split: Split, rows: Sequence[int], partners: Sequence[int], extras: bool = False
) -> tuple[Batch, Batch]:
    """The pairs of `rows`, and the pairs that are their wrong partners."""
    return split.batch(rows, extras), split.batch([partners[row] for row in rows])


# ---- pixels ---------------------------------------------------------------------------------------------------------


def pixels_by_partner(model: MaskVLM, split: Split, seed: int, device: Device) -> dict[str, Any]:
    """{"true", "wrong", "none", "background", "objects": {...}, "caption_alone": {...}}: mean absolute differences;
    "nats": {"masked": {...}, "caption_alone": {...}}: the same as nats a value."""
    partners = split.partners()
    paint = background_colour(split)
    some, objects, alone = Tally(), Tally(), Tally()
    for rows in split.chunks():
        batch, others = pairs_and_partners(split, rows, partners, extras=True)
        images, text, other = batch.images.to(device), batch.text.to(device), others.text.to(device)
        masked = patch_masks(model.config, seed, batch.pair_ids, low_ratio(model.config)).to(device)
        whole = torch.ones_like(masked)
        rebuilt = {
            "true": model.reconstruct(images, masked, text),
            "wrong": model.reconstruct(images, masked, other),
            "none": model.reconstruct(images, masked, None),
            "background": paint,
        }
        from_caption = {
            "true": model.reconstruct(images, whole, text),
            "wrong": model.reconstruct(images, whole, other),
            "none": model.reconstruct(images, whole, None),
            "background": paint,
        }
        patch = model.config.model.image.patch
        for name, values in rebuilt.items():
            difference = pixel_difference(values, images, patch)
            some.add(name, difference[masked])
            if "objects" in batch.extras and name != "none":
                objects.add(name, difference[masked][object_values(batch, patch).to(device)[masked]])
        for name, values in from_caption.items():
            alone.add(name, pixel_difference(values, images, patch))
    out: dict[str, Any] = {name: some.mean(name) for name in ("true", "wrong", "none", "background")}
    if objects.counts:
        out["objects"] = {name: objects.mean(name) for name in ("true", "wrong", "background")}
    out["caption_alone"] = {name: alone.mean(name) for name in ("true", "wrong", "none", "background")}
    out["nats"] = {
        "masked": {name: laplace_nats(some.mean(name)) for name in ("true", "wrong", "none", "background")},
        "caption_alone": {name: laplace_nats(value) for name, value in out["caption_alone"].items()},
    }
    return out


def laplace_nats(difference: float | None) -> float | None:
    """Nats a value of a Laplace density whose scale is the mean absolute difference (the likeliest scale there is):
    E[log 2b + |x - m| / b] at b = E|x - m|. None where nothing differs, or nothing was compared."""
    return 1 + math.log(2 * difference) if difference else None


def pixel_difference(rebuilt: Tensor, images: Tensor, patch: int) -> Tensor:
    """|rebuilt - image| float32 [B, N, X]. rebuilt: [B, N, X], or one colour [3], in 0..1 (clipped to it)."""
    target = patch_values(images, patch).float() / 255
    if rebuilt.ndim == 1:
        rebuilt = rebuilt.to(target.device).repeat(patch * patch)
    return (rebuilt.clamp(0, 1) - target).abs()


def object_values(batch: Batch, patch: int) -> Tensor:
    """bool [B, N, X]: which values belong to objects (all three channels of a pixel)."""
    flags = torch.as_tensor(batch.extras["objects"]) > 0
    return patch_values(flags[..., None].expand(*flags.shape, 3), patch)


def background_colour(split: Split) -> Tensor:
    """float32 [3] in 0..1; see the head of the file."""
    total, count = torch.zeros(3, dtype=torch.float64), 0
    for rows in split.chunks():
        batch = split.batch(rows, extras=True)
        pixels = batch.images.reshape(-1, 3)
        if "objects" in batch.extras:
            pixels = pixels[torch.as_tensor(batch.extras["objects"]).flatten() == 0]
        total += pixels.double().sum(0)
        count += len(pixels)
    return (total / max(count, 1) / 255).float()
