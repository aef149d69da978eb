"""Libraries that may serve in the place of our own code: whether the right one is installed, and whether it works.

Each function gives (version, why it cannot be used): one of them is None. Nothing is imported until it is asked, and
whatever is wrong with a library is told, not raised. TO_HAVE says what to type for each.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

State = tuple[str | None, str | None]

TO_HAVE = {
    "xformers": "pip install 'xformers>=0.0.35' (older ones are each made for one torch)",
    "apex": "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex, "
    "with nvcc of torch's CUDA (pip install apex gives another package)",
}
APEX_EXTENSION, APEX_KERNEL = "amp_C", "multi_tensor_adam_capturable"
# What importing a library raises that is broken, or made for another torch, Triton or Python.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError)


def _found(module: str) -> ModuleSpec | None:
    """Where a module is; it is not imported."""
    try:
        return find_spec(module)
    except (ImportError, ValueError):  # something hides it
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _said(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


# ---- xformers -------------------------------------------------------------------------------------------------------


@cache
def xformers() -> State:
    """xformers with an attention of packed sequences that works beside this torch, forward and backward. Its own C++
    part is not needed: where that does not load, newer ones call torch's kernels."""
    if _found("xformers") is None:
        return None, "not installed"
    found = _version("xformers")
    try:
        biases, fmha = import_module("xformers.ops.fmha.attn_bias"), import_module("xformers.ops.fmha")
        if "device" not in inspect.signature(biases.BlockDiagonalMask.from_seqlens).parameters:
            return None, f"xformers {found} is too old: it makes masks on the host alone"
        # it warns of this in words that are too strong where it has torch's kernels to call
        unloaded = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None) is not None
        for way, operators in (("forward", fmha.ALL_FW_OPS), ("backward", fmha.ALL_BW_OPS)):
            if not any(_takes(operator, biases.BlockDiagonalMask) for operator in operators):
                reason = "; its C++ part does not load" if unloaded else ""
                return None, f"xformers {found} has no {way} of packed sequences that works beside this torch{reason}"
    except BROKEN as error:
        return None, f"xformers {found} does not load: {_said(error)}"
    return found + (" (its C++ part does not load; it calls torch's kernels)" if unloaded else ""), None


def _takes(operator: Any, mask: type) -> bool:
    return mask in operator.SUPPORTED_ATTN_BIAS_TYPES and operator.is_available()


# ---- apex -----------------------------------------------------------------------------------------------------------


@cache
def apex() -> State:
    """NVIDIA's apex with the CUDA kernel of its fused Adam. PyPI's package of that name is something else.

    The package is looked at and not imported: it imports all that it has, of which we need nothing.
    """
    spec = _found("apex")
    if spec is None:
        return None, "not installed"
    found, folders = _version("apex"), spec.submodule_search_locations or ()
    if not any(Path(folder, "optimizers", "fused_adam.py").is_file() for folder in folders):
        where = ", ".join(folders) or spec.origin
        return None, f"the installed package apex ({found}, in {where}) is not NVIDIA's: it has no fused optimizers"
    if _found(APEX_EXTENSION) is None:
        return None, f"NVIDIA's apex {found} is installed without its CUDA extensions ({APEX_EXTENSION})"
    try:
        extension = import_module(APEX_EXTENSION)
    except BROKEN as error:
        return None, f"the CUDA extensions of apex {found} do not load beside this torch: {_said(error)}"
    if not hasattr(extension, APEX_KERNEL):
        return None, f"apex {found} is too old: its extensions have no {APEX_KERNEL}"
    return found, None
