"""A run: where it lives, which device and seed it uses, and what its folder holds.

runs/NAME/
    config.yaml        the resolved config
    metrics.jsonl      a row each log line
    tensorboard/       the same rows as events (metrics.tensorboard)
    wandb/             what W&B keeps beside a run, and the id of the run there (metrics.wandb)
    profile/           what the profiler saw (metrics.profile)
    tokenizer/         the tokenizer of the run
    checkpoints/       step_XXXXXXXX/ and `latest`, a text file
    stopped            a run that a signal stopped: after which step (engine/signals.py)
    evaluation.json    what mvle.evaluate found
    report.html        the page of mvle.report
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..section import Section


class RunConfig(Section):
    """Where a run lives and what it runs on."""

    # both are text once the section is made: `name_and_folder` makes the one from the other
    name: str = Field(
        "default", min_length=1, description="what the run is called; null, or left out: the last part of run.folder"
    )
    folder: str = Field(
        "runs/default",
        min_length=1,
        description="folder of everything that the run leaves behind; null, or left out: runs/ and run.name",
    )
    seed: int = Field(0, ge=0, description="key of every random choice: weights, order of pairs, crops, masks")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int | None = Field(
        None, gt=0, description="torch threads of a rank; null: torch's choice. Bitwise resume needs the same number"
    )

    @model_validator(mode="before")
    @classmethod
    def name_and_folder(cls, values: Any) -> Any:
        """Where one is null, or left out, it is made from the other; the defaults where both are."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None or key not in ("name", "folder")}
        if "folder" not in given and isinstance(given.get("name"), str):
            given["folder"] = f"runs/{given['name']}"
        if "name" not in given and isinstance(given.get("folder"), str):
            given["name"] = Path(given["folder"]).name or "default"  # the last part of / is nothing
        return given


class RunFolder:
    """The paths of a run folder. Nothing is created before `create`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.stopped = self.path / "stopped"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"

    def create(self) -> RunFolder:
        """Make the folder and checkpoints/ in it. Raises OSError, naming run.folder, if that cannot be done."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"run.folder must be a folder that can be written; got {self.path}: {error}") from error
        return self

    def write_config(self, text: str) -> None:
        """Write the resolved config (YAML text), whole or not at all."""
        write_text(self.config, text)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: a reader, or a kill at any moment, sees the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.writing")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
