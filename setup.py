"""Which folders are installed, and what is compiled: mvle, its recipes as mvle.configs, and mvle_kernels.

Metadata is in pyproject.toml. Two parts are native, and neither has to be there:

    mvle/_host*.so                    csrc/host by a C++ compiler and pybind11: the header pass over tar shards
    mvle_kernels/libmvle_cuda.so      csrc/cuda by nvcc and torch's headers: CUDA kernels

What cannot be compiled here is left out, and said: while building, and later by `python -m mvle_kernels.info`, from
mvle_kernels/native.json. MVLE_STRICT=1 makes that, and every warning of a compiler, an error. MAX_JOBS,
TORCH_CUDA_ARCH_LIST, CUDA_HOME and CXX are as csrc/build.py has them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STRICT = os.environ.get("MVLE_STRICT") == "1"
HOST, CUDA = "mvle._host", "mvle_kernels.libmvle_cuda"


def load(path: Path) -> ModuleType:
    """A Python file as a module, wherever it lies."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native = load(ROOT / "csrc" / "build.py")
left_out: dict[str, str] = {}  # extension -> why it is not built


def host_extension() -> Extension | None:
    """csrc/host, if there is what it is compiled with."""
    try:
        native.host_compiler()
    except native.Missing as reason:
        left_out[HOST] = str(reason)
        return None
    if importlib.util.find_spec("pybind11") is None:
        left_out[HOST] = "pybind11 is not in the environment that builds: pip install pybind11"
        return None
    import pybind11

    flags = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", *(["-Wall", "-Wextra", "-Werror"] if STRICT else [])]
    sources = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc" / "host").glob("*.cpp"))
    headers = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc" / "host").glob("*.h"))
    return Extension(
        HOST,
        sources,
        include_dirs=[pybind11.get_include()],
        depends=headers,
        extra_compile_args=flags,
        language="c++",
        optional=not STRICT,
    )


def cuda_extension() -> Extension | None:
    """csrc/cuda, if there is what it is compiled with. Not a module of Python's: Build has its own way with it."""
    try:
        native.cuda_home()
        native.torch_include()
        old = native.chosen()[1]
    except (native.Missing, ValueError) as reason:  # ValueError: a list that was set for other packages
        left_out[CUDA] = str(reason)
        return None
    if old:
        print(f"mvle: kernels need compute capability 8.0 or newer; they are not built for {', '.join(old)}.")
    return Extension(CUDA, [], optional=not STRICT)


def note(folder: Path) -> None:
    """Write beside mvle_kernels what `python -m mvle_kernels.info` tells of the build."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"built": built, "left out": left_out}
    (folder / "native.json").write_text(json.dumps(said, indent=2) + "\n")


class BuildPython(build_py):
    """Python files, and with them why native parts are not even tried."""

    def run(self) -> None:
        super().run()
        note(ROOT / "kernels" / "mvle_kernels" if self.editable_mode else Path(self.build_lib) / "mvle_kernels")


class BuildNative(build_ext):
    """Both native parts, each for itself: one that fails takes nothing else with it."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        super().run()
        note(ROOT / "kernels" / "mvle_kernels" if inplace else Path(self.build_lib) / "mvle_kernels")

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        if name == CUDA.rpartition(".")[2]:  # no Python is in its name, since none is in it
            return str(Path(*folders, native.LIBRARY))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA:
                library = Path(self.get_ext_fullpath(ext.name))
                built[CUDA] = native.build_cuda(ROOT / "build" / "cuda", library, strict=STRICT)
            else:
                super().build_extension(ext)
                built[ext.name] = " ".join(self.compiler.compiler_cxx)
        except Exception as error:  # whatever a compiler does is said, and never in the way of an installation
            if STRICT:
                raise
            left_out[ext.name] = f"compiling failed: {error}"


built: dict[str, str] = {}  # extension -> what it was built with and for
extensions = [made for made in (host_extension(), cuda_extension()) if made is not None]
for name, reason in left_out.items():
    print(f"mvle: {name} is left out ({reason}). Everything runs without it; python -m mvle_kernels.info tells more.")
    if STRICT:
        sys.exit(f"MVLE_STRICT=1 demands {name}")

setup(
    packages=[
        *find_packages(include=["mvle", "mvle.*"]),
        "mvle.configs",
        *find_packages("kernels"),
    ],
    package_dir={"mvle": "mvle", "mvle.configs": "configs", "mvle_kernels": "kernels/mvle_kernels"},
    package_data={
        "mvle.configs": ["*.yaml", "*/*.yaml"],
        "mvle": ["py.typed"],
        "mvle_kernels": ["py.typed", "*.json", "baselines/*.json"],
    },
    ext_modules=extensions,
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
