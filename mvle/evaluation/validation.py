"""Validation while training: the four losses, R@1 and the gap between a true and a wrong caption, on fixed pairs.

Ranks share the forwards, and every one returns the same figures, which do not depend on how many there are. Only what
the model registers is called (forward, encode_images, encode_texts, reconstruct), so that it works on a sharded model
too; the contrastive loss must not be gathered meanwhile.
Masks and negatives are fixed by evaluation.seed: the rows of a run differ in the model alone. Losses here are those of
training (words are left or swapped as there), with images masked at the low end of masking.image_ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.model import NAMES, MaskVLM
from .conditional import Tally, pairs_and_partners, pixel_difference
from .ranks import Alone, Ranks, sum_figures, turns
from .retrieval import contrastive_ranks, embed
from .split import Split, SplitError, low_ratio, patch_masks

if TYPE_CHECKING:
    from ..config import Config
    from ..data.shards import ShardSet
    from ..data.tokenizer import Tokenizer

LARGEST_FORWARD = 128  # pairs of one forward here, at most; a gap between captions is measured on so many pairs


class Validation:
    """The first evaluation.pairs pairs of data.val. Raises SplitError where they are too few for a group of ITM."""

    def __init__(self, config: Config, shards: ShardSet, tokenizer: Tokenizer) -> None:
        self.config = config
        self.split = Split(config, shards, tokenizer, config.evaluation.pairs)
        itm = config.objectives.itm
        group = itm.group if itm.weight else 1
        micro = min(config.batch.total, LARGEST_FORWARD, len(self.split))  # not batch.micro, which may change
        self.forward_pairs = max(micro // group * group, group)
        if len(self.split) < group:
            raise SplitError(
                f"data.val must have at least objectives.itm.group ({group}) images within evaluation.pairs "
                f"({config.evaluation.pairs}); got {len(self.split)}. Lower objectives.itm.group or take more pairs."
            )

    @torch.no_grad()
    def run(self, model: MaskVLM, device: torch.device | str, ranks: Ranks | None = None) -> dict[str, float]:
        """val_loss, val_mim, val_mlm, val_itc, val_itm, val_*_accuracy; val_r1_image_to_text and
        val_r1_text_to_image (ITC, first captions); val_mim_true and val_mim_wrong (mean absolute difference of masked
        pixels). Only what is trained. ranks: those that share the work, all of which must call; None: this process."""
        ranks = ranks or Alone()
        objectives = self.config.objectives
        out = self.losses(model, device, ranks)
        if objectives.itc.weight:
            found = embed(model, self.split, device, keep_rows=False, ranks=ranks)
            for name, places in zip(("image_to_text", "text_to_image"), contrastive_ranks(found), strict=True):
                out[f"val_r1_{name}"] = float((places < 1).double().mean())
        if objectives.mim.weight:
            out |= self.caption_gap(model, device, ranks)
        return out

    def losses(self, model: MaskVLM, device: torch.device | str, ranks: Ranks) -> dict[str, float]:
        """Means over whole forwards of `forward_pairs` pairs; the pairs that do not fill one are left out."""
        # every figure is a share of its loss's count, so sums weighted by the counts give the mean over all
        sums: dict[str, float] = {}
        totals = dict.fromkeys(NAMES, 0.0)
        whole = [rows for rows in self.split.chunks(self.forward_pairs) if len(rows) == self.forward_pairs]
        for rows, mine in turns(whole, ranks):
            batch = self.split.batch(rows).to(device)
            counts = model.counts(batch)
            report = model(batch, self.config.evaluation.seed, counts).report
            own = dict(zip(NAMES, counts.tolist(), strict=True))
            for name in NAMES:
                totals[name] += own[name] if mine else 0.0
            for name, value in report.items():
                objective = name.removesuffix("_correct")
                if objective in own:  # not their weighted sum: that is made below, over all pairs
                    sums[name] = sums.get(name, 0.0) + (float(value) * own[objective] if mine else 0.0)
        sums, totals = sum_figures(sums, ranks), sum_figures(totals, ranks)
        out = {}
        for name, total in sums.items():
            objective = name.removesuffix("_correct")
            out[f"val_{name.replace('_correct', '_accuracy')}"] = total / max(totals[objective], 1.0)
        weights = {name: getattr(self.config.objectives, name).weight for name in NAMES}
        return {"val_loss": sum(weights[name] * out[f"val_{name}"] for name in NAMES if name in sums)} | out

    def caption_gap(self, model: MaskVLM, device: torch.device | str, ranks: Ranks) -> dict[str, float]:
        """Masked pixels with the pair's own caption and with another one: does the picture follow the caption?"""
        config, tally = self.config, Tally()
        rows = range(min(LARGEST_FORWARD, len(self.split)))
        batch, others = pairs_and_partners(self.split, rows, self.split.partners())
        images = batch.images.to(device)
        masked = patch_masks(config, config.evaluation.seed, batch.pair_ids, low_ratio(config)).to(device)
        for (name, text), mine in turns([("true", batch.text), ("wrong", others.text)], ranks):
            rebuilt = model.reconstruct(images, masked, text.to(device))
            if mine:
                tally.add(name, pixel_difference(rebuilt, images, config.model.image.patch)[masked])
        return sum_figures({f"val_mim_{name}": tally.mean(name) or 0.0 for name in ("true", "wrong")}, ranks)
