"""What this installation has: versions, native parts, backends; and for each thing missing, why and what to type.

    python -m mvle_kernels.info

Native parts are what setup.py compiles where it can: CUDA kernels (csrc/cuda) and the header pass over tar shards
(csrc/host). Each is called there only if it loads. Needs torch alone; starts no GPU work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import cuda_support, optional, triton_support
from .dispatch import OPS, explain

BUILD = Path(__file__).parent / "native.json"
AGAIN = "pip install --no-build-isolation --no-deps --force-reinstall . (in a clone)"
ELSEWHERE = "MVLE_CUDA_LIBRARY=a library that csrc/build.py made, or without the variable: the installed one is taken"


@dataclass(frozen=True)
class Part:
    """Something that may be there: `found` says what is, `missing` why it is not, `remedy` what to type."""

    name: str
    found: str = ""
    missing: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if not self.missing:
            return f"{self.name:<15}{self.found}"
        return f"{self.name:<15}missing: {self.missing}" + (
            f"\n{'':<15}to have it: {self.remedy}" if self.remedy else ""
        )


def _built() -> dict[str, dict[str, str]]:
    """What setup.py noted: {"built": extension -> how, "left out": extension -> why}."""
    return json.loads(BUILD.read_text()) if BUILD.is_file() else {"built": {}, "left out": {}}


def gpu() -> Part:
    """The devices that torch sees."""
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return Part("GPU", missing=why)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Part("GPU", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")


def triton() -> Part:
    """The compiler of most kernels."""
    if triton_support.INSTALLED:
        return Part("triton", version("triton"))
    return Part("triton", missing="not installed", remedy="pip install triton (Linux; torch's CUDA builds bring it)")


def cuda_kernels() -> Part:
    """The shared library from csrc/cuda, or that of MVLE_CUDA_LIBRARY: what a build noted is of the installed one."""
    name, noted, named = "CUDA kernels", _built(), os.environ.get("MVLE_CUDA_LIBRARY")
    remedy = f"nvcc on PATH (CUDA toolkit 12.8 or newer) and torch installed, then {AGAIN}"
    path = cuda_support.library()
    if named and path is None:
        return Part(name, missing=f"MVLE_CUDA_LIBRARY={named} is no file", remedy=ELSEWHERE)
    if path is None:
        without = "this installation was made without compiling them"
        return Part(name, missing=noted["left out"].get("mvle_kernels.libmvle_cuda", without), remedy=remedy)
    if reason := cuda_support.load():
        return Part(name, missing=reason, remedy=ELSEWHERE if named else AGAIN)
    if named and path.resolve() != cuda_support.LIBRARY.resolve():
        return Part(name, f"built elsewhere ({path}, by MVLE_CUDA_LIBRARY)")
    return Part(name, f"{noted['built'].get('mvle_kernels.libmvle_cuda', 'built elsewhere')} ({path})")


def header_pass() -> Part:
    """The extension from csrc/host, which reads the headers of tar shards: whether mvle.data.headers takes it. mvle is
    another package, and this one works where it, or what it needs, is not installed."""
    name, noted = "header pass", _built()
    try:
        module, used = import_module("mvle.data.headers").host()
    except ImportError as error:
        why = f"mvle, which alone reads shards, cannot be imported: {error}"
        return Part(name, missing=why, remedy="pip install --no-build-isolation . (in a clone)")
    if module is not None:
        return Part(name, f"{used} ({noted['built'].get('mvle._host', 'built elsewhere')}; {module.__file__})")
    left_out = noted["left out"].get("mvle._host")
    said = f"{left_out}; indexing takes {used}" if left_out else f"indexing takes {used}"
    return Part(name, missing=said, remedy=f"a C++ compiler and pip install pybind11, then {AGAIN}")


def library(name: str, state: optional.State) -> Part:
    """A library that can serve in the place of our own code; state: its version, and why it cannot be used."""
    found, why = state
    return Part(name, missing=why, remedy=optional.TO_HAVE[name]) if why else Part(name, found or "")


def parts() -> Iterator[Part]:
    """Everything that may or may not be there."""
    yield gpu()
    yield triton()
    yield cuda_kernels()
    yield header_pass()
    yield library("xformers", optional.xformers())
    yield library("apex", optional.apex())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a clone
        return "of a clone"


def lines() -> Iterator[str]:
    """What the program prints."""
    yield f"mvle {_version('mvle')}, torch {torch.__version__}, Python {platform.python_version()} on {sys.platform}"
    yield ""
    yield from map(str, parts())
    yield ""
    yield "Backends of each op, in the order in which they are asked (explain(op, *arguments) judges a call):"
    for name in sorted(OPS):
        yield f"  {explain(name)}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return argparse.ArgumentParser(prog="python -m mvle_kernels.info", description=(__doc__ or "").splitlines()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line does."""
    parser().parse_args(arguments)
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
