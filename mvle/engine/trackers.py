"""TensorBoard and W&B beside metrics.jsonl: they get the numbers of every row, under KIND/NAME (train/loss, val/...).

Neither is needed to train. A run that asks for one that is not installed is refused before it starts: nothing here is
left out in silence.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..config import Config
    from .metrics import MetricsConfig
    from .parallel import Parallel
    from .run import RunFolder


class TrackerError(ValueError):
    """A tracker that was asked for and cannot work."""


class Tracker(Protocol):
    """What Metrics asks of a tracker."""

    def record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """The numbers of a row."""

    def close(self, failed: bool) -> None:
        """Send what is left. failed: the run ended by an error."""


class TensorBoard:
    """Events in `folder`. What an earlier process wrote beyond `start` steps is taken back."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=30)

    def record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One event a number."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self, failed: bool) -> None:
        """Write what is queued."""
        self._writer.close()


class WandB:
    """One W&B run for all processes of a run: its id is kept in RUN/wandb/id.

    W&B takes no row back: steps that it has from before a resume are not sent again. In offline mode it cannot be
    asked, and steps that were done twice are stored twice, each by its process.
    """

    def __init__(self, project: str, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        kept = folder / "wandb" / "id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            kept.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=kept.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),  # W&B adds /wandb
                config=dict(settings),
                allow_val_change=True,
            )
        except wandb.errors.Error as error:
            raise TrackerError(
                f"metrics.wandb expected W&B to start for project {project}; got: {str(error).rstrip('.')}. Log in "
                "(wandb login), set WANDB_MODE=offline in the environment, or set metrics.wandb=null."
            ) from error
        self._first = self._run.step  # the next that W&B has no row of

    def record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Numbers of one step are one row at W&B, whatever their kind."""
        if step >= self._first:
            self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=int(failed))


def check_trackers(config: MetricsConfig) -> None:
    """Raise TrackerError, with what to type, where a tracker is asked for whose package is not installed."""
    for package, asked, off in (
        ("tensorboard", config.tensorboard, "false"),
        ("wandb", config.wandb is not None, "null"),
    ):
        spec = importlib.util.find_spec(package) if asked else None
        if asked and (spec is None or spec.origin is None):  # no origin: a mere folder of that name, which W&B makes
            raise TrackerError(
                f"metrics.{package} expected the package {package}; it is not installed. Type\n"
                f"    python -m pip install {package}\n"
                f"or set metrics.{package}={off}."
            )


def open_trackers(config: Config, folder: RunFolder, parallel: Parallel, start: int) -> list[Tracker]:
    """What the config asks for, on rank 0; nothing on other ranks. start: steps done before this process.

    All ranks must call it; where rank 0 cannot start one, all raise TrackerError or OSError.
    """
    metrics = config.metrics
    if not metrics.tensorboard and metrics.wandb is None:
        return []
    check_trackers(metrics)
    trackers: list[Tracker] = []
    error: Exception | None = None
    if parallel.is_main:
        try:
            if metrics.tensorboard:
                trackers.append(TensorBoard(folder.tensorboard, start))
            if metrics.wandb is not None:
                trackers.append(WandB(metrics.wandb, config.run.name, folder.path, config.to_dict()))
        except (TrackerError, OSError) as problem:
            error = problem
    if parallel.vote(error is not None):
        for tracker in trackers:
            tracker.close(failed=True)
        raise error or TrackerError("metrics.tensorboard or metrics.wandb could not start on rank 0, which says why.")
    return trackers
