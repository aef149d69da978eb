"""Does the matching head know a true pair from a false one? Balanced accuracy: mean of the shares right on each side.

random   the next pair of the split that shares neither image nor caption (its caption with this image)
hard     the caption of the split that is most similar to this image (ITC) and is not equal to its own
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.model import MaskVLM
from .retrieval import Embedded, match_pairs, slices
from .split import Split, SplitError


def first_captions(found: Embedded) -> Tensor:
    """int64 [I]: where the first caption of each image lies among all captions."""
    return torch.searchsorted(found.owner, torch.arange(len(found.image_z)))


def hard_captions(found: Embedded) -> Tensor:
    """int64 [I]: the most similar caption that is not right for the image."""
    parts = []
    for part in slices(len(found.image_z)):
        right = found.right(part)
        if bool(right.all(1).any()):
            raise SplitError("a hard negative was expected for every image; some image has no wrong caption here.")
        similarity = found.image_z[part] @ found.text_z.T
        parts.append(similarity.masked_fill(right, -torch.inf).argmax(1))
    return torch.cat(parts)


def matching(model: MaskVLM, found: Embedded, split: Split, device: torch.device | str) -> dict[str, float]:
    """The "itm" part of evaluation.json."""
    images = list(range(len(split)))
    own = first_captions(found)
    candidates = {"random": own[torch.tensor(split.partners())], "hard": hard_captions(found)}
    true = match_pairs(model, found, images, own.tolist(), device)
    out = {}
    for name, captions in candidates.items():
        false = match_pairs(model, found, images, captions.tolist(), device)
        out[f"balanced_accuracy_{name}"] = balanced_accuracy(true, false)
    return out


def balanced_accuracy(true: Tensor, false: Tensor) -> float:
    """Mean of the share of true pairs with log-odds above 0 and the share of false pairs with log-odds below 0."""
    return float(((true > 0).double().mean() + (false < 0).double().mean()) / 2)
