"""What CUDA kernels became: the figures that nvcc's assembler gave of each, for every architecture.

csrc/build.py compiles csrc/cuda whole, with all warnings, and keeps what the compilers said; a spilled register is a
warning, and a warning an error. Here that text is read:

    registers, stack   a thread's registers and bytes of stack (anything spilled lies there)
    shared             bytes of shared memory that a kernel names itself. Ours name none: theirs is asked for at launch,
                       and `launched` has it
"""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
FIGURES = ("registers", "stack", "shared")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def builder() -> ModuleType:
    """csrc/build.py. Raises FileNotFoundError where sources are not there: an installed package has none."""
    path = SOURCES / "build.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here: CUDA kernels are compiled from a clone")
    spec = spec_from_file_location("mvle_csrc_build", path)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    import sys

    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def demangled(symbol: str) -> str:
    """`kernel<type, number>` of a kernel's symbol: names by their length, template arguments as numbers and types.

    Only what kernels here are called: mvle::(file of its own)::kernel<float | c10::BFloat16 | c10::Half, n, ...>.
    """
    at = re.match(r"_ZN", symbol)
    if at is None:
        return symbol
    rest, names = symbol[3:], []
    while found := re.match(r"(\d+)", rest):
        size = int(found[1])
        names.append(rest[found.end() : found.end() + size])
        rest = rest[found.end() + size :]
    arguments = []
    if rest.startswith("I"):
        rest = rest[1:]
        while rest and not rest.startswith("E"):
            if found := re.match(r"L[a-z](\d+)E", rest):
                arguments.append(found[1])
            elif found := re.match(r"N3c10\d+([A-Z]\w*?)E|S\w*_\d+([A-Z]\w*?)E", rest):
                arguments.append(found[1] or found[2])
            elif found := re.match(r"[a-z]", rest):
                arguments.append({"f": "float", "i": "int", "x": "int64", "l": "int64"}.get(found[0], found[0]))
            else:
                return symbol
            rest = rest[found.end() :]
    return names[-1] + (f"<{', '.join(arguments)}>" if arguments else "")


def read(said: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> figures, of what ptxas said."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    entry, stack = None, 0
    for line in said.splitlines():
        if match := ENTRY.search(line):
            entry = demangled(match[1]), match[2]
        elif match := STACK.search(line):
            stack = int(match[1])
        elif (match := USED.search(line)) and entry:
            found[entry] = {"registers": int(match[1]), "stack": stack, "shared": int(match[2] or 0)}
            entry = None
    return found
