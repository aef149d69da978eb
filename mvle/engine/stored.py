"""A trained model as it lies on disk: in the folder of a run, at one of its checkpoints, or in an exported folder.

An exported folder (mvle/export.py writes it) holds config.yaml, tokenizer/, model.safetensors and meta.json, of the
same form as that of a checkpoint. Nothing here builds a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .checkpoint_best import read_best
from .checkpoint_files import find_latest, folder_of, read_meta, steps_in, what_is_wrong
from .errors import CheckpointError, RunError
from .run import RunFolder

if TYPE_CHECKING:
    from ..config import Config
    from ..data.tokenizer import Tokenizer

Weights = Literal["auto", "model", "ema"]
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Stored:
    """folder: of the run or the export · checkpoint: the folder of meta.json · weights: model (as trained) or ema
    (their slow average): which of the two is taken · exported: the folder is an export."""

    folder: Path
    config: Config
    checkpoint: Path
    meta: Mapping[str, Any]
    weights: Literal["model", "ema"]
    exported: bool

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen."""
        return int(self.meta["step"])

    @property
    def identity(self) -> str:
        """Which save these weights are of, and which of its weights: equal in copies and exports, another after
        training again to the same step."""
        saved = self.meta.get("id")
        if saved is None:  # written before saves had one
            saved = hashlib.blake2b((self.checkpoint / "meta.json").read_bytes(), digest_size=16).hexdigest()
        return f"{saved}/{self.weights}"

    def __str__(self) -> str:
        which = "EMA of the weights" if self.weights == "ema" else "weights as trained"
        return f"{self.folder} at step {self.step} ({which})"

    def read_tokenizer(self) -> Tokenizer:
        """The one that it was trained with."""
        from ..data.tokenizer import Tokenizer

        return Tokenizer.load(RunFolder(self.folder).tokenizer)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by its name, on the CPU. Raises CheckpointError where they are damaged."""
        from .checkpoint_tensors import read_weights

        return self._exported_tensors() if self.exported else read_weights(self.checkpoint, self.weights)

    def fill(self, model: nn.Module) -> None:
        """Load into a model of the same shape. Raises CheckpointError where it is another, or the file is damaged."""
        from .checkpoint_tensors import fill, load_weights

        if self.exported:
            fill(self.checkpoint / MODEL_FILE, self._exported_tensors(), model)
        else:
            load_weights(self.checkpoint, model, self.weights)

    def _exported_tensors(self) -> dict[str, Tensor]:
        file, wanted = self.checkpoint / MODEL_FILE, self.meta.get("sha256", {}).get(MODEL_FILE)
        if wanted is not None and (found := sha256(file)) != wanted:
            raise CheckpointError(f"{file} is damaged: its SHA-256 must be {wanted}; got {found}. Copy it again.")
        return read_file(file)


def sha256(file: Path) -> str:
    """Of a file's content, as hex. About 1 GiB/s."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def find_stored(folder: str | Path, step: int | Literal["best"] | None = None, weights: Weights = "auto") -> Stored:
    """The newest checkpoint of a run (None), that of a step, or the best one; or an exported folder, of one step.

    weights: auto takes the EMA where there is one. Raises RunError where something is missing, ConfigError,
    CheckpointError where no checkpoint is whole, or where weights is ema and there is none.
    """
    from ..config import load_config

    run = RunFolder(folder)
    exported = is_export(run.path)
    if not run.config.is_file():
        raise RunError(
            f"RUN must be the folder of a run or of an export, with its config.yaml; got {folder}. `mvle.train` makes "
            "a run."
        )
    config = load_config(run.config)
    path = run.path if exported else find_checkpoint(run, step)
    if (problem := what_is_wrong(path)) is not None:
        raise CheckpointError(f"{problem}.")
    meta = read_meta(path)
    if exported:
        if step not in (None, meta["step"]):
            raise RunError(f"{folder} is an export of step {meta['step']}, and holds no other; got {step}.")
        if weights not in ("auto", meta["weights"]):
            raise RunError(f"{folder} is an export of weights={meta['weights']}, and holds no others; got {weights}.")
        return Stored(run.path, config, path, meta, meta["weights"], True)
    if weights == "auto":
        from .checkpoint_tensors import has_ema

        weights = "ema" if has_ema(path) else "model"
    return Stored(run.path, config, path, meta, weights, False)


def is_export(folder: Path) -> bool:
    """Whether a folder is (or was meant to be) an export, and no run."""
    return (folder / MODEL_FILE).is_file() or ((folder / "meta.json").is_file() and (folder / "config.yaml").is_file())


def find_checkpoint(run: RunFolder, step: int | Literal["best"] | None) -> Path:
    """The newest checkpoint of a run (None), that of a step, or the best one. Raises RunError, CheckpointError."""
    kept = steps_in(run.checkpoints)
    if not kept:
        raise RunError(f"{run.path} has no checkpoint yet; train it first: python -m mvle.train {run.config}")
    if step is None:
        newest = find_latest(run.checkpoints)
        assert newest is not None, "there are some, so that one is found or an error raised"
        return newest
    if step == "best":
        best = read_best(run.checkpoints)
        if best is None:
            raise RunError(
                f"{run.path} has no best checkpoint ({run.checkpoints / 'best.json'}): training marks one at a "
                "validation where checkpoint.best names a figure, such as val_loss."
            )
        step = best.step
    if step not in kept:
        steps = ", ".join(map(str, kept))
        raise RunError(f"{run.path} has no checkpoint of step {step}; it keeps steps {steps}.")
    return folder_of(run.checkpoints, step)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}.") from error
