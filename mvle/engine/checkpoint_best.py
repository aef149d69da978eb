"""The best checkpoint by a figure of validation: checkpoints/best.json names it, and nothing removes it.

{"checkpoint": "step_00001000", "metric": "val_loss", "value": 2.75}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checkpoint_files import folder_of, step_of
from .run import write_text

Figure = Literal[
    "val_loss",
    "val_mim",
    "val_mlm",
    "val_itc",
    "val_itm",
    "val_mlm_accuracy",
    "val_itc_accuracy",
    "val_itm_accuracy",
    "val_r1_image_to_text",
    "val_r1_text_to_image",
]
LOSSES = ("val_loss", "val_mim", "val_mlm", "val_itc", "val_itm")  # lower is better; of the others, higher


@dataclass(frozen=True)
class Best:
    """The best so far."""

    step: int
    metric: str
    value: float

    def beaten_by(self, value: float) -> bool:
        """Whether `value` is better; an equal one is not."""
        return value < self.value if self.metric in LOSSES else value > self.value


def is_better(value: float, best: Best | None) -> bool:
    """Whether a figure is the best so far. One that is not finite never is."""
    return math.isfinite(value) and (best is None or best.beaten_by(value))


def read_best(checkpoints: Path) -> Best | None:
    """What best.json says; None where there is none, or none that can be read."""
    try:
        found = json.loads((checkpoints / "best.json").read_text(encoding="utf-8"))
        return Best(step_of(Path(found["checkpoint"])), str(found["metric"]), float(found["value"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_best(checkpoints: Path, best: Best) -> None:
    """best.json, whole or not at all."""
    name = folder_of(checkpoints, best.step).name
    found = {"checkpoint": name, "metric": best.metric, "value": best.value}
    write_text(checkpoints / "best.json", json.dumps(found) + "\n")


def forget_best(checkpoints: Path) -> None:
    """best.json speaks of a checkpoint that is gone, or of a run that was set back."""
    (checkpoints / "best.json").unlink(missing_ok=True)
