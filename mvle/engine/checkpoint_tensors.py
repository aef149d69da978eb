"""Tensors of checkpoints: their names, how they are copied and written, whether they fit, how they are loaded.

Tensors are saved under flat names: model.NAME, ema.NAME, optim.NAME.exp_avg, optim.NAME.exp_avg_sq, optim.NAME.step, as
they are, sharded or not; DCP fits them to whatever sharding loads them. Optimizer state is read from the optimizer
itself: torch's own getter makes a step on a fresh optimizer, after which AdamW counts one step too many.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import CheckpointError, first_cause
from .optim_apex import ApexAdamW
from .parallel import Parallel

MOMENTS = ("exp_avg", "exp_avg_sq")
SHOWN = 6  # lines of one kind in a message


class Average(Protocol):
    """An EMA of the weights, as checkpoints see it."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The average of each trained parameter by its name, shaped and sharded as it is; loading fills it in place."""


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: Average | None = None
) -> dict[str, Tensor]:
    """Every tensor of a run under its flat name, not copied. Parameters that have not been stepped have no moments."""
    tensors = {f"model.{_clean(name)}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optim.{_clean(name)}.{key}"] = value
    if ema is not None:
        tensors |= {f"ema.{_clean(name)}": tensor for name, tensor in ema.tensors().items()}
    return tensors


def _clean(name: str) -> str:
    """The name of a parameter without what torch.compile and activation checkpointing add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


# --- writing ---------------------------------------------------------------------------------------------------------


class Staging:
    """Copies of this rank's parts of tensors in CPU memory, which the next copies use again.

    Not torch's stager: it copies the layout of each DTensor, too, and for that blocked `tiny` on 2 ranks for 130 ms
    instead of 3.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy all; when it returns, the tensors may change."""
        copies, devices = {}, set()
        for name, tensor in tensors.items():
            own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            copy = self.copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (own.shape, own.dtype):
                copy = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            copies[name] = copy.copy_(own, non_blocking=own.is_cuda)
            if own.is_cuda:
                devices.add(own.device)
        for device in devices:
            torch.cuda.synchronize(device)  # sync: what is copied must not change before
        self.copies = copies


def write_tensors(
    folder: Path, tensors: dict[str, Tensor], group: Any = None, staged: Mapping[str, Tensor] | None = None
) -> None:
    """Write this rank's parts into a folder. All ranks of `group` call it; None: the process is alone.

    staged: what to write instead of the tensors (see Staging). Raises DCP's CheckpointException.
    """
    import torch.distributed.checkpoint as dcp

    from .dcp_storage import PlainWriter, StagedPlanner

    if staged is None:
        dcp.save(tensors, storage_writer=PlainWriter(folder), **_among(group))
    else:
        # what is on the CPU needs no copy ahead, for which DCP would open a stream on the GPU
        writer = PlainWriter(folder, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, planner=StagedPlanner(staged), **_among(group))


# --- loading ---------------------------------------------------------------------------------------------------------


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Average | None = None, group: Any = None
) -> None:
    """Fill a run that goes on from a checkpoint, in place, however it is sharded. All ranks of `group` call it.

    Raises CheckpointError where the tensors do not fit, UnsafeCheckpoint where it holds more than tensors.
    """
    from .dcp_storage import SafeReader

    Parallel.reshard(model)
    reader = SafeReader(path)
    stored = reader.shapes()
    _make_state(model, optimizer, stored)
    tensors = state_tensors(model, optimizer, ema)
    _check_fit(path, stored, tensors)
    _read(reader, tensors, group)
    if isinstance(optimizer, ApexAdamW):
        optimizer.share_steps()


def load_weights(path: Path, model: nn.Module, weights: str = "model") -> None:
    """Fill a model alone. weights: model, or ema (what has no average, such as a buffer, is as it was trained).

    Reads the checksums of what it loads. Raises CheckpointError where there is no EMA, where the tensors do not fit or
    are damaged, UnsafeCheckpoint where the checkpoint holds more than tensors.
    """
    from .dcp_storage import SafeReader

    reader = SafeReader(path)
    stored = reader.shapes()
    keys = _keys_of(path, stored, weights)
    tensors = state_tensors(model)
    _check_fit(path, {key: stored[key] for key in stored if key.startswith("model.")}, tensors)
    tensors = {keys[key.removeprefix("model.")]: tensor for key, tensor in tensors.items()}
    reader.check_tensors(tensors)
    _read(reader, tensors, None)


def read_weights(path: Path, weights: str = "model") -> dict[str, Tensor]:
    """The same weights by the names of parameters, float32 on the CPU, whatever model they fit."""
    from .dcp_storage import SafeReader

    reader = SafeReader(path)
    stored = reader.shapes()
    keys = _keys_of(path, stored, weights)
    tensors = {key: torch.empty(stored[key], dtype=torch.float32) for key in keys.values()}
    reader.check_tensors(tensors)
    _read(reader, tensors, None)
    return {name: tensors[key] for name, key in keys.items()}


def fill(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Fill a model by name from tensors that were read from `path`. Raises CheckpointError where they do not fit."""
    own = {key.removeprefix("model."): tensor for key, tensor in state_tensors(model).items()}
    _check_fit(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _keys_of(path: Path, stored: Mapping[str, Any], weights: str) -> dict[str, str]:
    """Name of a parameter -> key of its tensor. weights: model, or ema: the average of each that has one."""
    if weights not in ("model", "ema"):
        raise ValueError(f"weights must be model or ema; got {weights!r}.")
    if weights == "ema" and not _averages(stored):
        raise CheckpointError(f"{path} has no EMA of the weights: the run was trained with optim.ema=null.")
    names = [key.removeprefix("model.") for key in stored if key.startswith("model.")]
    averaged = {name for name in names if weights == "ema" and f"ema.{name}" in stored}
    return {name: f"{'ema' if name in averaged else 'model'}.{name}" for name in names}


def has_ema(path: Path) -> bool:
    """Whether a checkpoint holds an EMA of the weights."""
    from .dcp_storage import SafeReader

    return bool(_averages(SafeReader(path).shapes()))


def _averages(stored: Iterable[str]) -> list[str]:
    return [key for key in stored if key.startswith("ema.")]


def _read(reader: Any, tensors: dict[str, Tensor], group: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as intended
        try:
            dcp.load(tensors, storage_reader=reader, **_among(group))
        except CheckpointException as error:
            raise CheckpointError(f"{reader.path} could not be loaded: {first_cause(error)}.") from error


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Empty moments, sharded as their parameters are, for each parameter that has moments in the checkpoint."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if f"optim.{_clean(name)}.step" in stored:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}


def _among(group: Any) -> dict[str, Any]:
    return {"no_dist": True} if group is None else {"process_group": group}


# --- fitting ---------------------------------------------------------------------------------------------------------


def _check_fit(path: Path, stored: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names and shapes are the same."""
    there, here = bool(_averages(stored)), bool(_averages(tensors))
    if here and not there:
        raise CheckpointError(f"{path} has no EMA of the weights, and the run keeps one (optim.ema).")
    if there and not here:
        raise CheckpointError(f"{path} has an EMA of the weights, and the run keeps none (optim.ema).")
    if problems := _differences(stored, {key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems)}. Was the config of model changed?")


def architecture_differences(path: Path, model: nn.Module) -> list[str]:
    """A line for each tensor, or block, in which the weights of a checkpoint and a model differ; [] where they fit."""
    from .dcp_storage import SafeReader

    stored = SafeReader(path).shapes()
    wanted = {key: tuple(tensor.shape) for key, tensor in state_tensors(model).items()}
    return _differences(_weights(stored), _weights(wanted))


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of the model, by their names in it."""
    return {key.removeprefix("model."): shape for key, shape in shapes.items() if key.startswith("model.")}


def _differences(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lines. Tensors that one side lacks are counted by block: another depth is one line, not one a weight."""
    lines = _shortened([f"only the checkpoint has {what}" for what in _by_block(k for k in stored if k not in wanted)])
    lines += _shortened([f"the checkpoint lacks {what}" for what in _by_block(k for k in wanted if k not in stored)])
    return lines + _shortened(
        [
            f"{k} is {stored[k]} in the checkpoint and {s} in the model"
            for k, s in wanted.items()
            if k in stored and stored[k] != s
        ]
    )


def _by_block(names: Iterable[str]) -> list[str]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r".*?\.\d+(?=\.)", name)  # up to the first number
        blocks.setdefault(block[0] if block else name, []).append(name)
    return [own[0] if len(own) == 1 else f"{block}.* ({len(own)} tensors)" for block, own in blocks.items()]


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more such lines"]
