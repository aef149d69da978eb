"""Libraries that may serve in the place of our own code: whether the right one is installed, and whether it loads.

Each function gives (version, why it cannot be used): one of them is None. Nothing is imported until it is asked.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

State = tuple[str | None, str | None]


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # something hides it, or its parent is no package
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


@cache
def xformers() -> State:
    """xformers with its attention of packed sequences. Its own C++ part is not needed: it calls torch's."""
    if not _found("xformers"):
        return None, "not installed"
    try:
        import_module("xformers.ops.fmha.attn_bias")
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"xformers {_version('xformers')} does not load: {error}"
    return _version("xformers"), None


@cache
def apex() -> State:
    """NVIDIA's apex with the CUDA extension of its fused optimizers. PyPI's package of that name is something else."""
    if not _found("apex"):
        return None, "not installed"
    if not _found("apex.optimizers") or not _found("apex.multi_tensor_apply"):
        return None, f"the installed package apex ({_version('apex')}) is not NVIDIA's: it has no fused optimizers"
    if not _found("amp_C"):
        return None, "NVIDIA's apex is installed without its CUDA extensions (amp_C)"
    try:
        import_module("amp_C")
    except (ImportError, OSError) as error:
        return None, f"apex's CUDA extensions do not load: {error}"
    return _version("apex"), None
