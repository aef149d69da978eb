"""Configs of launches: the table comes before a kernel's rule, and what stands in it is meant for a kernel that is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mvle_kernels import launches, tune

from .kernel_checks import needs_triton

CPU = torch.device("cpu")
RULE = {"BLOCK_X": 64, "num_warps": 4}
BETTER = {"BLOCK_X": 128, "num_warps": 8}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one entry."""
    monkeypatch.setattr(launches, "table", lambda: {"sm_90": {"kernel bfloat16 q256 k16": BETTER}})


def chosen(kernel: str = "kernel", dtype: torch.dtype = torch.bfloat16, q: int = 256, k: int = 16) -> Any:
    return launches.config(kernel, CPU, dtype, {"q": q, "k": k}, RULE)


def test_the_table_comes_before_the_rule(table: None) -> None:
    with launches.target("sm_90"):
        assert chosen() == BETTER


def test_what_the_table_does_not_have_goes_by_the_rule(table: None) -> None:
    assert chosen() == RULE  # the interpreter
    with launches.target("sm_80"):
        assert chosen() == RULE
    with launches.target("sm_90"):
        for other in ({"kernel": "other"}, {"dtype": torch.float16}, {"q": 128}, {"k": 32}):
            assert chosen(**other) == RULE  # type: ignore[arg-type]


def test_targets_nest_and_end_with_an_error_too() -> None:
    assert launches.architecture(CPU) == launches.INTERPRETER
    with launches.target("sm_90"):
        with pytest.raises(KeyError), launches.target("sm_80"):
            assert launches.architecture(CPU) == "sm_80"
            raise KeyError
        assert launches.architecture(CPU) == "sm_90"
    assert launches.architecture(CPU) == launches.INTERPRETER


def test_what_is_tried_comes_before_the_table_and_the_rules_are_told(table: None) -> None:
    tried = {"BLOCK_X": 32, "num_warps": 1}
    with launches.target("sm_90"):
        with launches.trying({"kernel bfloat16 q256 k16": tried}) as asked:
            assert chosen() == tried and chosen(q=7) == RULE
            with launches.trying({}) as inner:
                assert chosen() == RULE
        assert asked == {"kernel bfloat16 q256 k16": RULE, "kernel bfloat16 q7 k16": RULE}
        assert inner == {"kernel bfloat16 q256 k16": RULE}
        assert chosen() == BETTER


def test_a_file_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launches, "TABLE", tmp_path / "launches.json")
    launches.table.cache_clear()
    assert launches.table() == {}
    tune.write(launches.TABLE, {"sm_90": {"kernel bfloat16 q256 k16": BETTER}})
    with launches.target("sm_90"):
        assert chosen() == BETTER
    monkeypatch.undo()
    launches.table.cache_clear()


def strangers(table: dict[str, dict[str, dict[str, int]]], modules: list[Any]) -> list[str]:
    """What the table says of kernels that are not, and of values that they do not take."""
    found = []
    for architecture, configs in table.items():
        known = tune.entries(modules, architecture)
        for key, config in configs.items():
            if key not in known:
                found.append(f"{architecture}: no kernel asks for {key!r}")
            elif wrong := [name for name, n in config.items() if name not in known[key].rule or n < 1 or n & (n - 1)]:
                # stages need not be a power of two
                found += [f"{architecture}, {key}: {name}" for name in wrong if name != "num_stages"]
    return found


@needs_triton
def test_every_entry_names_a_kernel_and_values_that_it_takes() -> None:
    files = sorted(Path(launches.__file__).parent.glob("*_triton.py"))
    assert strangers(launches.table(), [import_module(f"mvle_kernels.{file.stem}") for file in files]) == []


@needs_triton
def test_an_entry_of_no_kernel_is_found() -> None:
    from . import planted_triton

    toy = SimpleNamespace(
        __name__="toy",
        variants=lambda device="meta": [("row", lambda: planted_triton.doubled(torch.empty(2, 24, device=device)))],
    )
    good = {"double float32 x24": {"BLOCK_X": 32, "num_warps": 1, "num_stages": 3}}
    assert strangers({"sm_90": good}, [toy]) == []
    assert len(strangers({"sm_90": {"double float32 x25": {}}}, [toy])) == 1
    assert len(strangers({"sm_90": {"double float32 x24": {"BLOCK_Y": 32}}}, [toy])) == 1
    assert len(strangers({"sm_90": {"double float32 x24": {"BLOCK_X": 33}}}, [toy])) == 1
