"""`python -m mvle_kernels.info` tells what is there, and of what is not: why, and what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mvle_kernels import cuda_support, dispatch, info, optional
from torch import Tensor


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of which nothing native was built."""
    monkeypatch.setattr(info, "BUILD", tmp_path / "native.json")
    monkeypatch.setattr(cuda_support, "LIBRARY", tmp_path / "libmvle_cuda.so")
    monkeypatch.delenv("MVLE_CUDA_LIBRARY", raising=False)
    cuda_support.load.cache_clear()
    yield tmp_path
    cuda_support.load.cache_clear()


def test_every_part_is_there_or_says_why_and_how_to_have_it() -> None:
    for part in info.parts():
        assert bool(part.found) != bool(part.missing), part
        assert part.found or part.remedy or part.name == "GPU", f"{part.name}: nothing to type"


def test_it_lists_every_op_with_its_backends_in_order() -> None:
    said = "\n".join(info.lines())
    for name, op in dispatch.OPS.items():
        line = next(line for line in said.splitlines() if line.strip().startswith(f"{name}: "))
        places = [line.index(f"{backend.name} (") for backend in op.backends]
        assert places == sorted(places)


def test_what_was_left_out_is_told_with_the_reason_of_the_build(elsewhere: Path) -> None:
    noted = {"built": {}, "left out": {"mvle_kernels.libmvle_cuda": "nvcc is not on PATH"}}
    (elsewhere / "native.json").write_text(json.dumps(noted))
    part = info.cuda_kernels()
    assert part.missing == "nvcc is not on PATH" and "nvcc" in part.remedy and "--no-build-isolation" in part.remedy


def test_a_library_that_does_not_load_is_not_called_there(elsewhere: Path) -> None:
    (elsewhere / "libmvle_cuda.so").write_bytes(b"no library")
    part = info.cuda_kernels()
    assert not part.found and "does not load" in part.missing
    assert "does not load" in (cuda_support.load() or "")


def test_an_installation_without_a_note_says_so(elsewhere: Path) -> None:
    assert "without compiling" in info.cuda_kernels().missing


def test_a_library_that_cannot_be_used_is_told_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "apex", lambda: (None, "another package"))
    monkeypatch.setattr(optional, "xformers", lambda: ("0.0.35", None))
    told = {part.name: str(part) for part in info.parts()}
    assert "missing: another package" in told["apex"] and "APEX_CUDA_EXT=1 pip install" in told["apex"]
    assert told["xformers"].split() == ["xformers", "0.0.35"]


def test_looking_for_the_library_breaks_no_graph(elsewhere: Path) -> None:
    def choose(x: Tensor) -> Tensor:
        return x + 1 if cuda_support.load() else x

    whole = torch.compile(choose, fullgraph=True, backend="eager")
    assert whole(torch.zeros(2)).tolist() == [1, 1]
