"""How kernels are launched: block sizes, warps and stages, by architecture, dtype and kind of shape.

A kernel's file has a rule of its own that gives a config for any shape. Where a better one is known it stands in
launches.json, and wins. Nothing is tuned while a model trains: `python -m mvle_kernels.tune` writes the file, on a GPU,
when somebody asks it to.

    {"sm_90": {"attention_forward bfloat16 q256 k16 e64": {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 1}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from .triton_support import capability

TABLE = Path(__file__).parent / "launches.json"
INTERPRETER = "interpreter"
_target: str | None = None
_tried: Mapping[str, Mapping[str, int]] | None = None  # key -> config that comes before the table
_asked: dict[str, Mapping[str, int]] = {}


@cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> key -> config."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@contextmanager
def target(architecture: str) -> Iterator[None]:
    """Choose as for this architecture ("sm_90"), whatever the device: for compiling without one."""
    global _target
    before, _target = _target, architecture
    try:
        yield
    finally:
        _target = before


@contextmanager
def trying(configs: Mapping[str, Mapping[str, int]]) -> Iterator[dict[str, Mapping[str, int]]]:
    """These configs, by key, and else the rules: the table is not looked at. Gives what is asked for, key -> rule."""
    global _tried, _asked
    before, _tried, _asked = (_tried, _asked), configs, {}
    try:
        yield _asked
    finally:
        _tried, _asked = before


def architecture(device: torch.device) -> str:
    """sm_90 and the like; INTERPRETER for a CPU."""
    if _target is not None:
        return _target
    if device.type != "cuda":
        return INTERPRETER
    major, minor = capability(device)
    return f"sm_{major}{minor}"


def key(kernel: str, dtype: torch.dtype, bucket: Mapping[str, int]) -> str:
    """kernel, dtype and the kind of shape as one string."""
    return " ".join([kernel, str(dtype).removeprefix("torch."), *(f"{name}{n}" for name, n in bucket.items())])


def config(
    kernel: str, device: torch.device, dtype: torch.dtype, bucket: Mapping[str, int], rule: Mapping[str, int]
) -> Mapping[str, int]:
    """What the table has for this kind of shape, else what the kernel's own rule says."""
    name = key(kernel, dtype, bucket)
    if _tried is not None:
        _asked[name] = rule
        return _tried.get(name, rule)
    return table().get(architecture(device), {}).get(name, rule)
