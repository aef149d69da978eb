"""Whether a checkpoint belongs to the run that would go on from it; if not, what differs, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import Config, ConfigError, differences
from .checkpoint_tensors import architecture_differences
from .schedule import same_history

if TYPE_CHECKING:
    from .run import RunFolder

FINGERPRINTS = {
    "data": "the shards hold other pairs, or sources have other weights or another order (data.train), or shards were "
    "indexed anew with other rules",
    "tokenizer": "the words have other numbers (tokenizer)",
    "architecture": "the model has other parameters (model, masking.mode)",
}


def identity(config: Config, fingerprints: Mapping[str, str], contrast_size: int) -> dict[str, Any]:
    """What a checkpoint's meta.json says of its run. fingerprints: of data, tokenizer and architecture;
    contrast_size: pairs that a row of the contrastive loss is compared with."""
    return {"config": config.to_dict(), "contrast_size": contrast_size, "fingerprints": dict(fingerprints)}


def refuse_other_run(
    path: Path, meta: Mapping[str, Any], own: Mapping[str, Any], folder: RunFolder, model: nn.Module
) -> None:
    """Raise ConfigError, with what differs, where the checkpoint at `path` (meta: its meta.json) is of another run than
    `own`, whose model is `model`.

    A longer or otherwise changed schedule is the same run as long as it would have had the same learning rates, and
    images of the same size, until now: a constant rate can go on for ever, and a cosine cannot be stretched.
    """
    now, before = Config.from_dict(own["config"]), Config.from_dict(meta["config"])
    ignore: tuple[str, ...] = ()
    if same_history(
        now.schedule, now.optim.min_lr_ratio, before.schedule, before.optim.min_lr_ratio, int(meta["step"])
    ):
        ignore = ("schedule", "optim.min_lr_ratio")
    problems = [
        f"{key}: {old!r} in the checkpoint, {new!r} now"
        for key, new, old in differences(now, before)
        if not f"{key}.".startswith(tuple(f"{i}." for i in ignore))
    ]
    if any(problem.startswith("schedule.") for problem in problems):
        problems.append(
            f"(another schedule is fine if the {meta['step']} steps done have the same rates and image sizes in it; "
            f"their warm-up was schedule.warmup={before.schedule.warmup_steps} steps)"
        )
    for name, value in own["fingerprints"].items():
        if (old := meta["fingerprints"][name]) != value:
            problems.append(f"fingerprint of the {name}: {old} in the checkpoint, {value} now: {FINGERPRINTS[name]}")
            if name == "architecture":
                problems += [f"    {line}" for line in architecture_differences(path, model)]
    if meta["contrast_size"] != own["contrast_size"]:
        problems.append(
            f"pairs that the contrastive loss compares: {meta['contrast_size']} in the checkpoint, "
            f"{own['contrast_size']} now (it was written before micro-batches shared one contrast)"
        )
    if problems:
        raise ConfigError(
            f"{folder.path} holds another run (run.folder); what differs:\n    "
            + "\n    ".join(problems)
            + "\nChoose another run.folder for a new run, or start with what the checkpoint has."
        )
