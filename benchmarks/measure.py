"""How a step is measured: seconds, peak memory, share of the step a part, and the roofs of the machine.

Times of two runs on a shared machine cannot be compared. So steps that are compared are made in turn, in one process,
and what is reported is the median of the ratios of neighbours; how far the same step is from itself, measured the same
way, is the noise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mvle.engine.host_memory import give_back_freed_memory

Step = Callable[[], Any]
PART = "part: "  # how the names of record_function begin


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: a step is timed from an idle device to an idle device


def clock(device: torch.device) -> Callable[[], float]:
    """What is read before and after: on a CPU with one thread the time that the process computed, so that other work on
    the machine counts little; else the time that passed."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(step: Step, device: torch.device) -> float:
    """One call, from an idle device to an idle device."""
    now = clock(device)
    wait(device)
    start = now()
    step()
    wait(device)
    return now() - start


# ---- ratios ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as its reference: the median of neighbours' ratios, and their quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(reference: Sequence[float], own: Sequence[float]) -> Ratio:
        """From seconds of the reference and of the step, measured in turn. Raises ValueError if they do not pair up."""
        if len(reference) != len(own) or not own:
            raise ValueError(f"expected a reference for each time, at least one; got {len(reference)} and {len(own)}.")
        ratios = sorted(a / b for a, b in zip(reference, own, strict=True))
        if len(ratios) == 1:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(middle, low, high)


def slower(now: Ratio, before: float, noise: float) -> bool:
    """Whether a ratio has fallen below what it was, beyond noise: not its median alone, its upper quartile too.

    noise: the larger of 2% and how far neighbours of one and the same step were apart (`noise_of`).
    """
    return now.median < before * (1 - 2 * noise) and now.high < before


def noise_of(same: Ratio) -> float:
    """Of a ratio of a step to itself: half the distance of its quartiles, or of its median from 1; at least 2%."""
    return max(0.02, (same.high - same.low) / 2, abs(same.median - 1))


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(
    make: Callable[[], Step], device: torch.device, again: Callable[[Step], None] = lambda step: step()
) -> tuple[int, Step]:
    """(bytes at the fullest moment of making a step and calling it twice, that step): weights, moments, gradients and
    activations, as the allocator gave them out. On a CPU torch's profiler listens to its allocator.

    again: how it is called the second time, for whoever looks at more of it.
    """
    gc.collect()
    give_back_freed_memory()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = make()
        step()
        again(step)
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before, step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step = make()
        step()
        again(step)
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak, step


# ---- roofs ----------------------------------------------------------------------------------------------------------


def matmul_roof(device: torch.device, dtype: torch.dtype, side: int | None = None, rounds: int = 10) -> float:
    """FLOP/s of the best of `rounds` products of two matrices [side, side]: what no step can pass."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    multiply = partial(torch.mm, a, b, out=out)
    for _ in range(3):
        multiply()
    return 2 * side**3 / min(seconds(multiply, device) for _ in range(rounds))


def copy_roof(device: torch.device, mebibytes: int | None = None, rounds: int = 10) -> float:
    """Bytes/s, read and written, of the best of `rounds` copies of a buffer far larger than a cache."""
    size = (mebibytes or (2048 if device.type == "cuda" else 256)) * 2**20
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = partial(target.copy_, source)
    for _ in range(3):
        copy()
    return 2 * size / min(seconds(copy, device) for _ in range(rounds))


def copy_of(device: torch.device, moved: int) -> Step:
    """A copy that moves so many bytes, read and written: what an op without products cannot pass that moves as many.

    Not `copy_roof`: a copy of what fits into the caches is several times as fast as one of 256 MiB (100 and 39 GB/s on
    a CPU with 32 MiB of them), and so is an op: it would reach more than all of a roof that was measured beyond them.
    """
    source, target = (torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device) for _ in range(2))
    return partial(target.copy_, source)


# ---- share of the step a part ---------------------------------------------------------------------------------------


@contextmanager
def named_parts(model: nn.Module) -> Iterator[None]:
    """Forwards of the model and of its children are named in a profile."""
    handles: list[Any] = []
    open_: list[Any] = []

    def enter(name: str, *_: Any) -> None:
        open_.append(record_function(PART + name))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    for name, module in [("the rest of the forward", model), *model.named_children()]:
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts_of(step: Step, model: nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
    """part -> {"forward": seconds, "backward": seconds} of one call, of the model's children, and of what is beside.

    On a GPU kernels are counted, on a CPU time. A node of the backward belongs to the part in whose forward it was
    made: both carry the same sequence number in a profile.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait(device)
    with profile(activities=activities) as seen, named_parts(model):
        step()
        wait(device)
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CPU]

    def cost(event: Any) -> float:
        return (event.device_time_total if cuda else event.cpu_time_total) / 1e6

    found: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    whose: dict[int, str] = {}  # sequence number -> part
    for event in sorted(events, key=lambda e: e.time_range.start):
        above = event.cpu_parent
        if event.name.startswith(PART):
            name = event.name.removeprefix(PART)
            found[name]["forward"] += cost(event)
            if above is not None and (outer := _part_of(above)) is not None:
                found[outer]["forward"] -= cost(event)  # a part's own time is without those within it
        elif event.sequence_nr >= 0 and not _in_backward(event) and (name := _part_of(event)) is not None:
            whose[event.sequence_nr] = name
    for event in events:
        if event.name.startswith(NODE) and not _in_backward(event.cpu_parent):
            part = whose.get(event.sequence_nr, "gradients added up")
            found[part]["backward"] += cost(event)
        elif event.name.startswith("Optimizer.step"):
            found["optimizer"]["forward"] += cost(event)
    return dict(found)


NODE = "autograd::engine::evaluate_function: "


def _in_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(NODE):
            return True
        event = event.cpu_parent
    return False


def _part_of(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(PART):
            return event.name.removeprefix(PART)
        event = event.cpu_parent
    return None
