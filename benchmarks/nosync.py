"""Refuses whatever makes the host wait for the device, so that it can be shown that a step never does.

    with RefuseSyncs() as watch:
        step()                           raises SyncError, which names the op and the lines of our code
    watch.copies                         what went from the host to the device without anybody waiting, by line

Real CPU tensors show who asks for values (.item(), nonzero, a bool as index). They show no copy between host and
device, as there is none. So a forward also runs on fake CUDA tensors, and with its backward on those of another fake
device (`fake_device`); neither needs a GPU. What a CUDA op does inside is not seen: `ASKING` and `TENSOR_VALUE` are
those that wait there by torch's sources. On a GPU, torch.cuda.set_sync_debug_mode("error") is the same question to the
driver.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 3  # frames of our code that are named

VALUE = "gives the host a value"
SIZE = "has as many results as the values say"
ASKING = {
    "_local_scalar_dense": VALUE,
    "equal": VALUE,
    "is_nonzero": VALUE,
    "nonzero": SIZE,
    "masked_select": SIZE,
    "_unique": SIZE,
    "_unique2": SIZE,
    "unique_dim": SIZE,
    "unique_consecutive": SIZE,
    "unique_dim_consecutive": SIZE,
    "bincount": SIZE,
    "multinomial": "looks whether its probabilities are valid",
    "histc": "looks for the smallest and the largest value",
}
# In these a tensor stands for a number: on a GPU its value is asked for.
TENSOR_VALUE = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_", "copy", "lift_fresh"}
# Methods that no dispatch mode sees on a CPU tensor, since nothing has to be computed there.
METHODS = {
    getattr(Tensor, name): name for name in ("tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__")
}


class SyncError(RuntimeError):
    """An op made the host wait for the device."""


class RefuseSyncs(TorchDispatchMode):
    """Inside, every op that waits for the device raises SyncError. copies: lines of our code that sent something from
    the host to the device and did not wait, with how often."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self._methods = _RefuseMethods()

    def __enter__(self) -> RefuseSyncs:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # what FakeTensor asks itself
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if why := _asks(name, args, kwargs):
            raise SyncError(f"{func} waits for the device: it {why}. In {lines()}.")
        result = func(*args, **kwargs)
        self._look_at_devices(func, name, args, kwargs, result)
        return result

    def _look_at_devices(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if name == "lift_fresh" and made != {"cpu"}:
            raise SyncError(f"torch.tensor(…, device=…) waits for the device: use from_host. In {lines()}.")
        if len(given | made) < 2 or "cpu" not in given | made:
            return
        if name not in COPIES:
            raise SyncError(f"{func} waits for the device: it is given tensors of {given} alike. In {lines()}.")
        # copy_(target, source): both are given
        source = args[1] if name in ("copy_", "copy") else args[0]
        if source.device.type != "cpu":
            raise SyncError(f"{func} waits for the device: it copies to the host. In {lines()}.")
        position = 2 if name in ("copy_", "copy") else len(args)
        waits = not kwargs.get("non_blocking", args[position] if len(args) > position else False)
        if waits:
            raise SyncError(
                f"{func} waits for the device: it copies from the host, and not non_blocking. In {lines()}."
            )
        self.copies[lines()] += 1


class _RefuseMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            raise SyncError(f"Tensor.{METHODS[func]} waits for the device: it {VALUE}. In {lines()}.")
        return func(*args, **(kwargs or {}))


def _asks(name: str, args: Any, kwargs: Any) -> str | None:
    """Why an op with these arguments asks the device for something; None if it does not."""
    if name in ASKING:
        return ASKING[name]
    if name == "repeat_interleave" and kwargs.get("output_size", args[1] if len(args) > 1 else None) is None:
        return SIZE + " (unless it is told output_size)"
    if name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
        return "looks for what is True in an index"
    if name in TENSOR_VALUE and isinstance(args[-1], Tensor):
        return "asks for the value to fill in"
    return None


def lines() -> str:
    """The innermost lines of this repository that the call came from, without this file."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < SHOWN:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve() and ".venv" not in path.parts:
            found.append(f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "the backward of an op of torch"


@contextmanager
def fake_device(backward: bool = False) -> Iterator[torch.device]:
    """A device on which every op has a result of the right shape and no values. Build the model inside, on it.

    A fake CUDA device, or, where a backward is wanted and there is no driver, a fake "lazy" one: autograd runs the
    backward of a CUDA device in a thread that needs a driver, and that of a lazy one where it is called. (Where there
    is a driver, FakeTensor makes tensors of no device but a real one.)
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _FusedOptimizers():
        yield torch.device("lazy:0" if backward and not torch.cuda.is_available() else "cuda:0")


class _FusedOptimizers(TorchDispatchMode):
    """Fused optimizers have no fake: what they change has no values here, so there is nothing to be done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func._schema.name in ("aten::_fused_adamw_", "aten::_fused_sgd_"):
            return None
        return func(*args, **(kwargs or {}))
