"""What all CUDA kernels share: the library that holds them, and whether it can run.

    library, load       the shared library beside this file, built from csrc/cuda where nvcc was there; loaded when a
                        call first needs it
    emulate             the same kernels built for a CPU, for checks: csrc/cuda/emulated.h
    refuse, unasked     why a call cannot go to them, and why it does not go there of itself
    native              the functions of the library that serves a tensor

The library needs no Python and no CUDA of torch's: one file serves every supported torch (csrc/build.py says how).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .triton_support import DTYPES, OLDEST, capability

LIBRARY = Path(__file__).parent / "libmvle_cuda.so"
HALVES = (torch.bfloat16, torch.float16)
_emulated: Path | None = None


def library() -> Path | None:
    """The library of CUDA kernels: that of MVLE_CUDA_LIBRARY, or the installed one; None where there is none."""
    named = os.environ.get("MVLE_CUDA_LIBRARY")
    found = Path(named) if named else LIBRARY
    return found if found.is_file() else None


def _once_for_all(function: Callable[[], str | None]) -> Callable[[], str | None]:
    """torch.compile of 2.11 does not trace a look at a file. This is what torch.compiler.assume_constant_result does,
    which itself would import all of torch.compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
@_once_for_all
def load() -> str | None:
    """Load the library, once; why it cannot be had, or None."""
    found = library()
    if found is None:
        if named := os.environ.get("MVLE_CUDA_LIBRARY"):
            return f"MVLE_CUDA_LIBRARY={named} names no file"
        return "the CUDA kernels were not built: python -m mvle_kernels.info says why"
    try:
        torch.ops.load_library(str(found))
    except OSError as error:
        return f"{found} does not load: {error.__cause__ or error}"
    return None


def emulate(path: Path) -> None:
    """Load kernels built for the CPU (csrc/build.py, `emulated`): calls there can demand them from here on."""
    global _emulated
    if _emulated is None:
        torch.ops.load_library(str(path))
        _emulated = path


def refuse(*tensors: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why no CUDA kernel can take these tensors, or None. dtypes: of the first; the others are whatever they are."""
    device = tensors[0].device
    if device.type == "cpu":
        if _emulated is None:
            return "needs a GPU; for checks on a CPU build csrc/cuda for it (csrc/build.py), then `emulate`"
    elif device.type != "cuda":
        return f"needs a GPU of NVIDIA's; got a tensor on {device.type}"
    elif (found := capability(device)) < OLDEST:
        if not found[0]:
            return "needs a GPU; torch sees none"
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}; {torch.cuda.get_device_name(device)} is older"
    elif reason := load():
        return reason
    if any(t.device != device for t in tensors):
        return f"needs all tensors on one device; got {sorted({str(t.device) for t in tensors})}"
    if tensors[0].dtype not in dtypes:
        return f"takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}; got {tensors[0].dtype}"
    return None


def unasked(tensor: Tensor, *_: Any) -> str | None:
    """Why a call does not come here of itself, though it could; None on a GPU."""
    return "the emulation is for checks; demand cuda to have it" if tensor.device.type == "cpu" else None


def native(tensor: Tensor) -> Any:
    """The functions of the library that runs on a tensor's device, by name."""
    return torch.ops.mvle_cuda if tensor.is_cuda else torch.ops.mvle_cuda_emulated
