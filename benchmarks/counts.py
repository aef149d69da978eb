"""What a step does, as integers that are the same in every run: FLOPs, launches, bytes, graph breaks.

A clock on a shared machine cannot see that a change made a step 3% dearer; a count can. So a change of any of these is
a failing test (tests/unit/test_step_counts.py), and whoever meant it writes the baseline anew:

    python -m benchmarks.counts            what changed against benchmarks/baselines/step_counts.json
    python -m benchmarks.counts --write    the counts of today become the baseline

FLOPs      of matrix products and attention, as torch counts them; attention's backward has 5 products where its forward
           has 2, since it makes the scores again. torch has no formula for attention on a CPU: here it is that of a GPU
launches   ops that compute or move something: neither views, nor memory without content
bytes      what those ops read and write: each tensor that an op takes or gives, once; what it changes in place, twice.
           An upper bound of memory traffic without caches, good for comparing two steps and for nothing else
graph breaks   of torch.compile over the dense pieces of every block, in one step

How ops split into others is torch's affair, so a baseline belongs to a release of torch: under another one FLOPs and
graph breaks are compared, and the rest is skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

BASELINE = Path(__file__).parent / "baselines" / "step_counts.json"
REPRODUCE = "python -m benchmarks.counts --write"
aten = torch.ops.aten
# These hand out memory, or another name for it, and run nothing.
NO_WORK = {
    op.default
    for op in (
        aten.empty_like,
        aten.new_empty,
        aten.empty_strided,
        aten.new_empty_strided,
        aten._unsafe_view,
        aten.lift_fresh,
    )
} | {aten.empty.memory_format}


def _cpu_attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


@dataclass(frozen=True)
class Counts:
    """Of one step; see the head of the file."""

    flops: int
    launches: int
    bytes: int


class Work(TorchDispatchMode):
    """Counts launches and bytes of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func in NO_WORK):
            self.launches += 1
            self.bytes += sum(size_of(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def size_of(tensor: Tensor) -> int:
    """Bytes that its elements take: an expanded one is read again and again, from one place."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride or not size else 1
    return distinct * tensor.element_size()


def count(step: Callable[[], Any]) -> Counts:
    """Counts of one call of `step`. Let it run once before: a first step also makes the optimizer's moments."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops, Work() as work:
        step()
    return Counts(flops.get_total_flops(), work.launches, work.bytes)


@contextmanager
def traced_only() -> Iterator[dict[str, int]]:
    """torch.compile inside traces and generates no code (a CPU needs no compiler then); gives the counters."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        with torch._dynamo.config.patch(recompile_limit=limit):  # prepare_blocks raises it
            yield counters
    torch._dynamo.reset()


def graph_breaks(step_of: Callable[[], Callable[[], Any]]) -> int:
    """Graph breaks in two calls of a step that `step_of` makes (and that compiles)."""
    with traced_only() as counters:
        step = step_of()
        step()
        step()
        if not counters["stats"].get("unique_graphs"):
            raise ValueError("expected a step that compiles; got one in which torch.compile saw nothing.")
        return sum(counters["graph_break"].values())


# ---- the baseline ---------------------------------------------------------------------------------------------------


def step_counts(shape: str = "tiny") -> dict[str, dict[str, dict[str, int]]]:
    """mode -> provider -> counts on a CPU: ours, ours without each saving, and plain; in drop modes ours and plain."""
    from .providers import PROVIDERS, made
    from .shapes import MODES, SHAPES

    here = torch.device("cpu")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for mode in MODES:
        rows = found[mode] = {}
        for name, provider in PROVIDERS.items():
            if name in ("ours", "plain") or (mode == "replace" and name.startswith("without: ")):
                step = made(provider, SHAPES[shape], mode, here)
                step()
                rows[name] = asdict(count(step))
    compiled = partial(made, PROVIDERS["ours, compiled"], SHAPES[shape], "replace", here)
    found["replace"]["ours, compiled"] = {"graph_breaks": graph_breaks(compiled)}
    return found


def differences(now: Mapping[str, Any], baseline: Mapping[str, Any], same_torch: bool) -> list[str]:
    """One line for each count that is not as the baseline has it; FLOPs and graph breaks alone under another torch."""
    lines = []
    for mode, provider in sorted({(m, p) for side in (now, baseline) for m, rows in side.items() for p in rows}):
        new, old = now.get(mode, {}).get(provider), baseline.get(mode, {}).get(provider)
        if new is None or old is None:
            lines.append(f"{mode}: {provider}: {'is no longer counted' if new is None else 'is not in the baseline'}")
            continue
        for name in old:
            if (same_torch or name in ("flops", "graph_breaks")) and new[name] != old[name]:
                change = f" ({new[name] / old[name] - 1:+.2%})" if old[name] else ""
                lines.append(f"{mode}: {provider}: {name} {old[name]:,} -> {new[name]:,}{change}")
    return lines


def release() -> str:
    """The release of torch that a baseline belongs to: 2.14, without patch level and build."""
    return ".".join(torch.__version__.split(".")[:2])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Recount the steps of tiny and compare them with the baseline.")
    parser.add_argument("--write", action="store_true", help="make today's counts the baseline")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    now = step_counts()
    old = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {"torch": release(), "counts": {}}
    print("\n".join(differences(now, old["counts"], old["torch"] == release())) or "as the baseline")
    if options.write:
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps({"torch": release(), "shape": "tiny", "counts": now}, indent=1) + "\n")
        print(f"wrote {BASELINE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
