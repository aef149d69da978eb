"""How long a run is, how the learning rate moves meanwhile, and how large images are.

cosine     up in a line, then half a cosine down to the floor
wsd        up in a line, stable at the peak, down in a line to the floor (warm-up, stable, decay)
constant   up in a line, then the peak for as long as the run goes on

Every factor and size is a pure function of the step, so nothing of a schedule is stored: a run that goes on asks again.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..section import Section


class ScheduleConfig(Section):
    """How long a run is, how the learning rate moves meanwhile, and how large images are."""

    steps: int = Field(1000, gt=0, description="optimizer steps of the run")
    kind: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="after the warm-up: cosine falls to optim.min_lr_ratio over the whole run; wsd stays at the peak "
        "and falls at the end; constant stays. Constant, and wsd before its decay, can be made longer later on, if the "
        "warm-up is a number of steps",
    )
    warmup: int | float = Field(
        0.05,
        ge=0,
        description="linear rise to the peak; below 1: share of schedule.steps; otherwise a whole number of steps",
    )
    decay: int | float = Field(
        0.1,
        ge=0,
        description="wsd: linear fall to optim.min_lr_ratio at the end; below 1: share of schedule.steps; otherwise a "
        "whole number of steps",
    )

    resolution: tuple[tuple[int, int | float], ...] = Field(
        (),
        description="an approximation, off if empty: phases [side, until] of smaller images. side: pixels, a multiple "
        "of masking.cell; until: below 1 a share of schedule.steps, otherwise a whole number of steps. Then comes "
        "model.image.size",
    )

    @field_validator("resolution")
    @classmethod
    def check_phases(cls, value: tuple[tuple[int, int | float], ...]) -> tuple[tuple[int, int | float], ...]:
        """Sides, and ends that are parts."""
        for side, until in value:
            if side <= 0:
                raise ValueError(f"expected [side in pixels, until] with a side above 0; got {[side, until]}")
            cls.check_part(until)
        return value

    @field_validator("warmup", "decay")
    @classmethod
    def check_part(cls, value: int | float) -> int | float:
        """A share, or whole steps."""
        if not math.isfinite(value) or (value >= 1 and value != int(value)):
            raise ValueError(f"expected a share below 1 or a whole number of steps; got {value}")
        return value

    @model_validator(mode="after")
    def check_parts_fit(self) -> ScheduleConfig:
        """Warm-up and decay within the run."""
        hint = "A number below 1 is a share of the steps"
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup must be at most schedule.steps ({self.steps}); got {self.warmup} steps. {hint}"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup and schedule.decay must be at most schedule.steps ({self.steps}) together; got "
                f"{self.warmup_steps} + {self.decay_steps} steps. {hint}"
            )
        ends = [0, *(end for _, end in self.phases), self.steps]
        if any(end <= start for start, end in pairwise(ends)):
            raise ValueError(
                f"phases of schedule.resolution must end one after the other, after the first step and before "
                f"schedule.steps ({self.steps}); got ends at steps {ends[1:-1]}. {hint}"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak is reached."""
        return self._steps_of(self.warmup)

    @property
    def decay_steps(self) -> int:
        """Steps of the fall at the end of wsd; 0 for the other kinds."""
        return self._steps_of(self.decay) if self.kind == "wsd" else 0

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(side of the images in pixels, steps done when it ends) of each phase of lower resolution, in order."""
        return tuple((side, self._steps_of(until)) for side, until in self.resolution)

    @property
    def approximation(self) -> str | None:
        """What of it makes a step something else than the paper's, for messages; None: nothing."""
        if not self.phases:
            return None
        parts = ", ".join(f"of {side} pixels until step {end:,}" for side, end in self.phases)
        return f"images {parts} of {self.steps:,}, positions resampled (schedule.resolution)"

    def _steps_of(self, part: int | float) -> int:
        return round(part * self.steps) if part < 1 else int(part)


def learning_rate_factor(step: int, schedule: ScheduleConfig, floor: float) -> float:
    """Share of the peak at `step` (0 for the first): up in a line to 1 at the end of the warm-up, then what
    schedule.kind says; cosine and wsd have `floor` (optim.min_lr_ratio) at the last step."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        left = max(schedule.steps - 1 - step, 0)  # steps after this one
        return 1.0 if left >= schedule.decay_steps else floor + (1 - floor) * left / schedule.decay_steps
    progress = min(1.0, (step + 1 - warmup) / max(schedule.steps - warmup, 1))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def image_size(step: int, schedule: ScheduleConfig, full: int) -> int:
    """Side of the images of `step` (0 for the first), pixels; full: where no phase of lower resolution is on."""
    return next((side for side, end in schedule.phases if step < end), full)


def same_history(
    now: ScheduleConfig, floor_now: float, before: ScheduleConfig, floor_before: float, steps_done: int
) -> bool:
    """Whether both schedules, each with its floor (optim.min_lr_ratio), had equal factors and equally large images in
    all steps done so far (the full size is the model's, and compared with it): then a run of `before` may go on under
    `now`. A constant rate can be made longer, and so can wsd before its decay; a warm-up that is a share of the steps,
    or a cosine, cannot."""
    return all(
        learning_rate_factor(step, now, floor_now) == learning_rate_factor(step, before, floor_before)
        and image_size(step, now, 0) == image_size(step, before, 0)
        for step in range(steps_done)
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
