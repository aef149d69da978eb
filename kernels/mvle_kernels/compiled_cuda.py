"""What CUDA kernels became: the figures that nvcc's assembler gave of each, and how base and large launch them.

csrc/build.py compiles csrc/cuda whole, with all warnings, and keeps what the compilers said; a spilled register is a
warning, and a warning an error. Here that text is read, for every kernel and architecture:

    registers, stack   a thread's registers and bytes of stack (anything spilled lies there)
    shared             bytes of shared memory that a kernel names itself. Ours name none: theirs is asked for at launch

So launches are held, too: the emulation notes what it would run, over tensors whose memory nobody touches.

    threads, shared, programs   of a block: threads, bytes of shared memory; blocks
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from . import attention_backward_cuda, attention_cuda, cuda_support, pixel_loss_cuda, token_loss_cuda, views_cuda
from .attention import readers_a_chunk, readers_of
from .packed import round_up
from .recipes import RECIPES
from .views_op import REPLACED, SUBSET, WHOLE

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def builder() -> ModuleType:
    """csrc/build.py. Raises FileNotFoundError where sources are not there: an installed package has none."""
    path = SOURCES / "build.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here: CUDA kernels are compiled from a clone")
    return _loaded(path)


@cache  # so that its exceptions are the same ones wherever it is asked for
def _loaded(path: Path) -> ModuleType:
    spec = spec_from_file_location("mvle_csrc_build", path)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
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
            if found := re.match(r"L[a-z](\d+)E|N(?:3c10|S\w*?_)\d+([A-Z]\w*?)E", rest):
                arguments.append(found[1] or found[2])
            elif found := re.match(r"S\w*?_", rest):  # a name again: of ours, the type before
                arguments.append(arguments[-1])
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


def kernels() -> tuple[str, dict[str, dict[str, int]]]:
    """(release of nvcc, figures of each `file / kernel / architecture`): compiled now, where anything changed.

    Raises the builder's Missing where there is no nvcc, RuntimeError where it fails or warns, FileNotFoundError where
    there are no sources.
    """
    build = builder()
    folder = SOURCES.parent / "build" / "cuda"
    how = build.build_cuda(folder, folder / build.LIBRARY, strict=True)
    release = re.search(r"nvcc (\d+\.\d+)", how)
    table = {}
    for said in sorted(folder.glob("*.said")):
        if (SOURCES / "cuda" / f"{said.stem}.cu").is_file():
            for (kernel, architecture), figures in read(said.read_text()).items():
                table[f"csrc/cuda/{said.stem} / {kernel} / {architecture} nvcc"] = figures
    return release[1] if release else "unknown", table


# ---- launches -------------------------------------------------------------------------------------------------------


def launches() -> dict[str, dict[str, int]]:
    """How base and large launch each kernel. Raises the builder's Missing where there is no host compiler."""
    return noted(variants())


def noted(calls: Iterable[tuple[str, Callable[[], object]]]) -> dict[str, dict[str, int]]:
    """How each of these (name, call) launches: the emulation notes it, and runs nothing."""
    build = builder()
    path = build.build_emulated(SOURCES.parent / "build" / "emulated")
    cuda_support.emulate(path)
    library = ctypes.CDLL(str(path))
    library.mvle_emulated_noted.restype = ctypes.c_char_p
    table = {}
    for variant, call in calls:
        library.mvle_emulated_note()
        try:
            call()
        finally:
            said = library.mvle_emulated_noted().decode()
        for line in said.splitlines():
            kernel, threads, shared, blocks = line.split("\t")
            figures = {"threads": int(threads), "shared": int(shared), "programs": int(blocks)}
            table[f"csrc/cuda / {variant} / {kernel} / launch nvcc"] = figures
    return table


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held, over tensors whose memory nobody reads."""
    empty = partial(torch.empty, dtype=torch.bfloat16)
    for name, recipe in RECIPES.items():
        B, image, caption = recipe.pairs, recipe.patches + 1, recipe.caption
        numbers = torch.arange(B + 1, dtype=torch.int32)
        shapes = [(image, image), (77, 77), (image, caption), (caption, image), (caption, caption), (577, 577)]
        for a, b, indexed in [*((*p, False) for p in shapes), (1, image, True), (image, caption, True)]:
            q, k = (empty(B * n, recipe.heads, recipe.head) for n in (a, b))
            index = (numbers[1:] * 7) % B if indexed else None
            readers = None if index is None else readers_of(index, B, readers_a_chunk(a))
            layout = numbers * a, numbers * b, index, readers, a, b
            lse = torch.empty(recipe.heads, len(q))
            shape = f"{name}, {a}x{b}{', indexed' if indexed else ''}"
            yield f"{shape}, forward", partial(attention_cuda.forward, q, k, k, *layout)
            yield f"{shape}, backward", partial(attention_backward_cuda.backward, q, q, k, k, q, lse, *layout)
        side = int(recipe.patches**0.5) * recipe.patch
        images = torch.empty(B, side, side, 3, dtype=torch.uint8)
        rows = B * recipe.masked
        against = partial(
            pixel_loss_cuda.forward, empty(rows, recipe.values), images, torch.zeros(rows, dtype=torch.int32)
        )
        yield (
            f"{name}, masked patches",
            partial(against, recipe.patch, [1 / 127.5] * 3, [-1.0] * 3, True, False, True, True),
        )
        R = 4 * B
        row_values = torch.empty(R), torch.empty(R, dtype=torch.int32)
        logits, targets = empty(R, recipe.vocabulary), torch.zeros(R, dtype=torch.int64)
        yield (
            f"{name}, masked words",
            partial(token_loss_cuda.row_losses, logits, targets, *row_values, -1, recipe.words, True),
        )
        x, positions = empty(B, recipe.patches, recipe.width), empty(image, recipe.width)
        for mode, second, listed in (("replace", REPLACED, recipe.masked), ("drop", SUBSET, image - 1 - recipe.masked)):
            shown = image if mode == "replace" else listed + 1
            firsts = [0, B * image, B * image + B * shown]
            total, token = round_up(firsts[-1], 128), positions[0]
            lists = [torch.empty(B * listed, dtype=torch.int32), numbers * listed]
            embed = partial(views_cuda.forward, x, positions, token, token, lists, [WHOLE, second], firsts, total)
            yield f"{name}, {mode}, views", embed
            place = torch.empty(2, B, image, dtype=torch.int32)
            gradient = empty(total, recipe.width)
            yield (
                f"{name}, {mode}, views backward",
                partial(views_cuda.backward, gradient, place, second == REPLACED, torch.bfloat16),
            )
