"""Checkpoints: written whole or not at all, found again, and loaded on any number of ranks.

    checkpoints/step_00001000/   .metadata and __R_0.distcp (DCP: tensors alone) and meta.json (everything else)
    checkpoints/latest           a text file with the name of the newest
    checkpoints/.step_*.writing  what a killed save left behind; removed at the next start

Tensors are saved under flat names: model.NAME, optim.NAME.exp_avg, optim.NAME.exp_avg_sq, optim.NAME.step, as they
are, sharded or not; DCP fits them to whatever sharding loads them. Optimizer state is read from the optimizer itself:
torch's own getter makes a step on a fresh optimizer, after which AdamW counts one step too many.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..section import Section
from .errors import CheckpointError
from .parallel import Parallel
from .run import write_text

PREFIX = "step_"
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: int = Field(1000, gt=0, description="steps between checkpoints; the last step has one always")
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept")


class Checkpointer:
    """Saves, finds and loads the checkpoints of a run. All ranks call each method together.

    Making one removes what a killed save left behind.
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig, parallel: Parallel) -> None:
        self.folder, self.config, self.parallel = Path(folder), config, parallel
        if parallel.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.folder)
        parallel.barrier()

    def due(self, step: int) -> bool:
        """Whether `step` (steps done) is one of checkpoint.every."""
        return step % self.config.every == 0

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the state after `step` steps; returns its folder.

        meta (JSON values) is stored with it; step, ranks, threads, versions and the sizes of the files are added.
        Raises CheckpointError on every rank if any rank could not write; what was there before stays as it was.
        """
        final = self.folder / f"{PREFIX}{step:08d}"
        temporary = self.folder / f".{final.name}.writing"
        self.parallel.reshard(model)
        facts = {
            **(meta or {}),
            "step": step,
            "ranks": self.parallel.ranks,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        # 1) an empty folder under a name that nobody loads
        self._together(step, temporary, lambda: _fresh(temporary), main_only=True)
        # 2) every rank its tensors
        self._together(step, temporary, lambda: self._write(temporary, state_tensors(model, optimizer)))
        # 3) meta.json last, then the real name, then the pointer
        self._together(step, temporary, lambda: _publish(temporary, final, facts), main_only=True)
        if self.parallel.is_main:
            self._purge(step)
        self.parallel.barrier()
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole: the one that `latest` names, else the next older; None if there is none.

        Says which ones were passed over, and why. Raises CheckpointError where there are some and all are broken.
        """
        step, problem = -2, ""
        if self.parallel.is_main:
            try:
                path = find_latest(self.folder)
                step = -1 if path is None else step_of(path)
            except CheckpointError as error:
                step, problem = -2, str(error)
        step = self.parallel.agree(step)  # one rank looks, so that all load the same
        if step == -2:
            raise CheckpointError(problem or f"none of the checkpoints in {self.folder} is whole; see rank 0.")
        return None if step == -1 else self.folder / f"{PREFIX}{step:08d}"

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Load into the model and its optimizer, in place; returns meta.json. See `load_checkpoint`."""
        return load_checkpoint(path, model, optimizer, self.parallel)

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        import torch.distributed.checkpoint as dcp

        from .dcp_storage import PlainWriter

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as intended
            dcp.save(tensors, storage_writer=PlainWriter(folder, sync_files=True), **_group(self.parallel))

    def _together(self, step: int, temporary: Path, work: Callable[[], None], main_only: bool = False) -> None:
        """Do a part of a save; if it fails on any rank, undo and raise on all."""
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

        reason = ""
        try:
            if self.parallel.is_main or not main_only:
                work()
        except (OSError, CheckpointException) as error:
            reason = _reason(error)
        if not self.parallel.vote(bool(reason)):
            return
        if self.parallel.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free / 2**20
        raise CheckpointError(
            f"the checkpoint of step {step} was not written: {reason or 'another rank failed'}. Checkpoints that were "
            f"there before are whole. {self.folder} has {free:,.0f} MiB free: make room and start again, or lower "
            "checkpoint.keep."
        )

    def _purge(self, step: int) -> None:
        """Keep the newest checkpoint.keep. Steps beyond the one just written belong to a run that was set back: they
        count as oldest."""
        steps = sorted((step_of(p) for p in _folders(self.folder)), key=lambda s: (s <= step, s), reverse=True)
        for old in steps[self.config.keep :]:
            try:
                shutil.rmtree(self.folder / f"{PREFIX}{old:08d}")
            except OSError as error:
                self.parallel.say(f"the old checkpoint of step {old} could not be removed: {error}")


# --- finding ---------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))


def find_latest(folder: str | os.PathLike[str], say: Callable[[str], Any] = print) -> Path | None:
    """The newest whole checkpoint of a checkpoints/ folder, or None if there is none at all.

    Raises CheckpointError if there are some and none is whole.
    """
    folder = Path(folder)
    paths = sorted(_folders(folder), reverse=True)
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        # first what `latest` names, then what came before it, then (the pointer was set back) what came after
        paths.sort(key=lambda p: (p != named, p > named))
    reasons: list[str] = []
    for path in paths:
        if (problem := what_is_wrong(path)) is None:
            for reason in reasons:
                say(f"passed over a checkpoint: {reason}")
            return path
        reasons.append(problem)
    if reasons:
        raise CheckpointError(
            "no checkpoint can be loaded: " + "; ".join(reasons) + f". Remove {folder} to start the run anew."
        )
    return None


def what_is_wrong(path: Path) -> str | None:
    """None for a checkpoint whose every file is there in full, else the reason."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        expected = dict(meta["files"])
    except FileNotFoundError:
        return f"{path} has no meta.json, which is written last: it is not whole"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}/meta.json cannot be read: {type(error).__name__}: {error}"
    for name, size in expected.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{file} must have {size} bytes; got {'no such file' if found is None else found}"
    return None


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """meta.json of one checkpoint."""
    return json.loads((Path(path) / "meta.json").read_text(encoding="utf-8"))


def latest_meta(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """meta.json of the newest whole checkpoint, or None if there is none; no tensor is read. Raises CheckpointError."""
    path = find_latest(folder, say=lambda _: None) if Path(folder).is_dir() else None
    return None if path is None else read_meta(path)


def _folders(folder: Path) -> list[Path]:
    return [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]


# --- tensors ---------------------------------------------------------------------------------------------------------


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor of a run under its flat name, not copied. Parameters that have not been stepped have no moments."""
    tensors = {f"model.{_clean(name)}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optim.{_clean(name)}.{key}"] = value
    return tensors


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a model, and its optimizer if given, in place; returns meta.json.

    Model and optimizer may be sharded otherwise than those that were saved, or not at all. Without `parallel` the
    process is on its own. Raises CheckpointError where the tensors do not fit, UnsafeCheckpoint where it holds more
    than tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from .dcp_storage import SafeReader

    path = Path(path)
    if (problem := what_is_wrong(path)) is not None:
        raise CheckpointError(f"{problem}.")
    Parallel.reshard(model)
    reader = SafeReader(path)
    stored = reader.shapes()
    if optimizer is not None:
        _make_state(model, optimizer, stored)
    tensors = state_tensors(model, optimizer)
    _check_fit(path, stored, tensors, with_optimizer=optimizer is not None)
    try:
        _read(reader, tensors, parallel)
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be loaded: {_reason(error)}.") from error
    return read_meta(path)


def _read(reader: Any, tensors: dict[str, Tensor], parallel: Parallel | None) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, **_group(parallel))


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Empty moments, sharded as their parameters are, for each parameter that has moments in the checkpoint."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if f"optim.{_clean(name)}.step" in stored:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}


def _check_fit(
    path: Path, stored: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], with_optimizer: bool
) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing = [key for key in wanted if key not in stored]
    extra = [k for k in stored if k not in wanted and (with_optimizer or k.startswith("model."))]
    shapes = [f"{k} is {stored[k]} there and {s} here" for k, s in wanted.items() if k in stored and stored[k] != s]
    problems = [
        f"{what} {', '.join(found[:4])}{' and more' if len(found) > 4 else ''}"
        for what, found in (("it lacks", missing), ("the model lacks", extra), ("shapes differ:", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems)}. Was the config of model changed?")


def _clean(name: str) -> str:
    """The name of a parameter without what torch.compile and activation checkpointing add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _group(parallel: Parallel | None) -> dict[str, Any]:
    if parallel is None or parallel.cpu_group is None:
        return {"no_dist": True}
    return {"process_group": parallel.cpu_group}


# --- files -----------------------------------------------------------------------------------------------------------


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    facts["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    write_text(temporary / "meta.json", json.dumps(facts, indent=1) + "\n")
    _sync(temporary)
    aside = final.with_name(f".{final.name}.old")
    if final.exists():  # the run was set back to before this step
        os.rename(final, aside)
    os.rename(temporary, final)
    _sync(final.parent)
    write_text(final.parent / "latest", f"{final.name}\n")
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f".{PREFIX}*.old"):
        real = folder / path.name.removeprefix(".").removesuffix(".old")
        if real.exists():
            shutil.rmtree(path)
        else:  # killed between two renames: the old one is still the one
            os.rename(path, real)
    for path in folder.glob(f".{PREFIX}*.writing"):
        shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, from inside DCP's wrapping."""
    for inner, *_ in getattr(error, "failures", {}).values():
        return _reason(inner)
    causes = [error]
    while (above := causes[-1].__cause__ or causes[-1].__context__) is not None and above not in causes:
        causes.append(above)
    cause = next((c for c in causes if isinstance(c, OSError)), error)  # a full disk hides behind torch's own error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
