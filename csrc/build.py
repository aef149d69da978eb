"""Compiles what lies beside this file: used by setup.py, by tests and by the regression check of kernels.

    cuda        csrc/cuda by nvcc into one shared library for all architectures: it needs a torch's headers, no torch
                with CUDA, and loads under every torch from TARGET on
    emulated    the same files by the host's compiler into a library that runs the kernels on the CPU, for tests

Sources are compiled side by side (MAX_JOBS), and again only where they, or a header that they include, changed.
TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX", or torch's names: "Ampere;Hopper") chooses the architectures, CUDA_HOME the
toolkit, CXX the host's compiler.
Needs Python alone; torch is found, not imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = "0x020a000000000000"  # 2.10, the oldest torch whose stable ABI has what is used
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
OLDEST = (8, 0)  # compute capability that kernels need
# torch.utils.cpp_extension's names, since the variable is often set once for all that is built. At the end those of
# torch's CMake: our own three run on every GPU from 8.0 on, by code of their generation or by PTX
NAMED = {
    "Kepler+Tesla": "3.7", "Kepler": "3.5+PTX", "Maxwell+Tegra": "5.3", "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX", "Volta+Tegra": "7.2", "Volta": "7.0+PTX", "Turing": "7.5+PTX", "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX", "Rubin": "10.7+PTX", "Common": ARCHITECTURES, "All": ARCHITECTURES,
}  # fmt: skip
LIBRARY = "libmvle_cuda.so"
NOTES = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


class Missing(Exception):
    """Something to compile with is not there; the message says what, and what to do."""


# ---- what there is ---------------------------------------------------------------------------------------------------


def cuda_home() -> Path:
    """The folder of the CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH. Raises Missing."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named is not None:
        if not (Path(named) / "bin" / "nvcc").is_file():
            raise Missing(f"no nvcc in CUDA_HOME={named}")
        return Path(named)
    found = shutil.which("nvcc")
    if found is None:
        raise Missing("nvcc is not on PATH and CUDA_HOME is not set: install the CUDA toolkit (12.8 or newer)")
    # a script in the place of nvcc may lie anywhere: nvcc itself says where its toolkit is
    said = subprocess.run([found, "-v", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    told = re.search(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    return Path(told[1]).resolve() if told else Path(found).resolve().parent.parent


def torch_include() -> Path:
    """torch's headers. Raises Missing."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Missing(
            "torch is not in the environment that builds: build with --no-build-isolation beside an installed torch"
        )
    return Path(spec.origin).parent / "include"


def host_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, or c++, g++, clang++. Raises Missing."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise Missing(f"no compiler CXX={named}")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Missing("no C++ compiler on PATH: install one (g++ or clang++), or name it in CXX")


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or one for each CPU."""
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def chosen(text: str | None = None) -> tuple[list[str], list[str]]:
    """("8.0", "9.0a", "10.0+PTX") of a list like TORCH_CUDA_ARCH_LIST, separated by semicolons or spaces, with numbers
    in the place of torch's names; and those that are too old for the kernels. Raises ValueError for anything else, and
    where nothing is left."""
    listed = (text or os.environ.get("TORCH_CUDA_ARCH_LIST") or "").strip() or ARCHITECTURES
    named = [NAMED.get(name, name) for name in re.split(r"[;\s]+", listed)]
    taken, old = list[str](), list[str]()
    for name in dict.fromkeys(name for part in named for name in part.split(";") if name):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if number is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must be like {ARCHITECTURES!r} or have names like 'Ampere;Hopper'; "
                f"got {name!r} in it. Name what is to be built for, or unset it for {ARCHITECTURES!r}"
            )
        (taken if (int(number[1]), int(number[2])) >= OLDEST else old).append(name)
    if not taken:
        raise ValueError(
            f"kernels need compute capability 8.0 or newer; TORCH_CUDA_ARCH_LIST={listed!r} has none. "
            f"Add one to it, or unset it for {ARCHITECTURES!r}"
        )
    return taken, old


def architectures(text: str | None = None) -> list[str]:
    """nvcc's flags for what `chosen` takes of a list. Raises ValueError."""
    flags: list[str] = []
    for name in chosen(text)[0]:
        number = name.removesuffix("+PTX").replace(".", "")
        codes = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
        for code in (f"arch=compute_{number},code={kind}_{number}" for kind in codes):
            flags += ["-gencode", code] if code not in flags else []  # "8.0;8.0+PTX" is one code and its PTX
    return flags


# ---- compiling -------------------------------------------------------------------------------------------------------


def common_flags() -> list[str]:
    """For either compiler."""
    include = torch_include()
    # -isystem: torch's headers are not ours to warn about
    return ["-std=c++17", f"-DTORCH_TARGET_VERSION={TARGET}", "-isystem", str(include)]


def cuda_flags() -> list[str]:
    """nvcc and its flags but the architectures. ptxas says what each kernel takes; a spilled register is a warning."""
    flags = [str(cuda_home() / "bin" / "nvcc"), "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    return [*flags, "-Xptxas", "-v,--warn-on-spills", *common_flags()]


def emulated_flags(sanitize: bool = False) -> list[str]:
    """The host's compiler and its flags.

    No contraction: a product and a sum are two roundings, so that results do not hang on the host. Aliasing: kernels
    read memory as other types than it was written, as device code may.
    """
    flags = [*host_compiler(), "-x", "c++", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DMVLE_EMULATED"]
    flags += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-ffp-contract=off"]
    # unroll is nvcc's pragma; clobbered: no local lives across a jump
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    if sanitize:
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    return [*flags, *common_flags()]


@dataclass(frozen=True)
class Unit:
    """A source and its object; beside it, what was compiled and what the compiler said."""

    source: Path
    target: Path
    command: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Of the command, the source, and the headers of its folder; those of torch and CUDA are as their place,
        which is in the command."""
        digest = hashlib.sha256(repr(self.command).encode())
        headers = (file for file in self.source.parent.iterdir() if file.suffix in (".cuh", ".h"))
        for file in [self.source, *sorted(headers)]:
            digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))  # wherever they lie
        return digest.hexdigest()

    def up_to_date(self) -> bool:
        """Whether the object is that of this source."""
        noted = self.target.with_suffix(".made")
        return self.target.is_file() and noted.is_file() and noted.read_text() == self.fingerprint

    def make(self) -> None:
        """Compile. Raises RuntimeError with what the compiler said if that fails."""
        noted, fingerprint = self.target.with_suffix(".made"), self.fingerprint
        noted.unlink(missing_ok=True)
        self.target.with_suffix(".said").write_text(
            run([*self.command, "-c", str(self.source), "-o", str(self.target)])
        )
        noted.write_text(fingerprint)

    @property
    def said(self) -> str:
        """By the compiler."""
        return self.target.with_suffix(".said").read_text()

    @property
    def warnings(self) -> str:
        """What it said but for ptxas's notes."""
        lines = self.said.splitlines()
        return "\n".join(line for line in lines if line.strip() and not NOTES.match(line))


def run(command: Sequence[str]) -> str:
    """What a command said. Raises RuntimeError with that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\nended with {done.returncode}:\n{said}")
    return said


def units(command: Sequence[str], folder: Path) -> list[Unit]:
    """One for every csrc/cuda/*.cu."""
    return [Unit(s, folder / f"{s.stem}.o", tuple(command)) for s in sorted((HERE / "cuda").glob("*.cu"))]


def up_to_date(command: Sequence[str], folder: Path) -> bool:
    """Whether `folder` has the object of every source."""
    return all(unit.up_to_date() for unit in units(command, folder))


def compile_all(command: Sequence[str], folder: Path, strict: bool) -> tuple[list[Path], bool]:
    """Every csrc/cuda/*.cu into `folder`: (objects, whether any was made anew). strict: a warning is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = units(command, folder)
    stale = [unit for unit in wanted if not unit.up_to_date()]
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(Unit.make, stale))
    warned = [f"{unit.source.name}:\n{unit.warnings}" for unit in wanted if unit.warnings]
    if strict and warned:
        raise RuntimeError("compilers warn, and no warning is allowed:\n" + "\n".join(warned))
    return [unit.target for unit in wanted], bool(stale)


def link(command: Sequence[str], objects: Sequence[Path], library: Path) -> None:
    """Objects into a library, which appears whole or not at all. It names libtorch_cpu.so and no path of one: what is
    loaded is the torch that was imported before."""
    library.parent.mkdir(parents=True, exist_ok=True)
    made = library.with_name(f".{library.name}.{os.getpid()}")
    torch = ["-L", str(torch_include().parent / "lib"), "-ltorch_cpu"]
    run([*command, "-shared", *map(str, objects), *torch, "-o", str(made)])
    made.replace(library)


def build_cuda(folder: Path, library: Path, strict: bool = False) -> str:
    """csrc/cuda by nvcc: objects into `folder`, and `library`; says what it was built with and for. Raises Missing,
    ValueError, RuntimeError."""
    flags = [*cuda_flags(), *architectures()]
    objects, changed = compile_all(flags, folder, strict)
    if changed or not library.is_file():
        # the static runtime: a library that loads where no CUDA is installed
        link([flags[0], "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", *architectures()], objects, library)
    codes = [flag.rpartition("code=")[2] for flag in architectures() if "code=" in flag]
    release = re.search(r"release ([\d.]+)", run([flags[0], "--version"]))
    old = chosen()[1]
    without = f"; too old for kernels, and left out of TORCH_CUDA_ARCH_LIST: {', '.join(old)}" if old else ""
    return f"nvcc {release[1] if release else ''} for {', '.join(codes)}{without}"


def build_emulated(folder: Path, strict: bool = False, sanitize: bool = False) -> Path:
    """csrc/cuda by the host's compiler, whole in `folder`. Raises Missing, RuntimeError."""
    library = folder / "libmvle_cuda_emulated.so"
    objects, changed = compile_all(emulated_flags(sanitize), folder, strict)
    if changed or not library.is_file():
        extra = ["-fsanitize=undefined"] if sanitize else []
        link([*host_compiler(), *extra], objects, library)
    return library


if __name__ == "__main__":
    where = Path(sys.argv[2] if len(sys.argv) > 2 else "build") / sys.argv[1]
    print(
        build_cuda(where, where / LIBRARY, strict=True) if sys.argv[1] == "cuda" else build_emulated(where, strict=True)
    )
