"""`make gpu` runs every test of a kernel, and says which CUDA kernels it has."""

from __future__ import annotations

from pathlib import Path

import pytest
from mvle_kernels import compiled_cuda, cuda_support

from benchmarks import gpu
from benchmarks.gpu_parts import kernel_tests

TESTS = Path(__file__).parents[1] / "kernels"


def test_every_file_that_holds_kernels_against_their_reference_is_run() -> None:
    held = {
        p
        for p in TESTS.glob("test_*.py")
        if "assert_equals_reference(" in p.read_text() or "far_apart(" in p.read_text()
    }
    assert held and held <= set(kernel_tests())


def test_cuda_kernels_are_found_or_built_or_their_absence_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libmvle_cuda.so"
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", str(library))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert cuda_support.library() is None
    assert "no CUDA kernels, which are skipped: no nvcc in CUDA_HOME=/nowhere" in gpu.cuda_kernels()
    monkeypatch.setattr(compiled_cuda.builder(), "build_cuda", lambda folder, library: "nvcc 1.0 for sm_80")
    assert gpu.cuda_kernels() == "CUDA kernels: built now by nvcc 1.0 for sm_80"
    library.touch()
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", str(library))
    assert gpu.cuda_kernels() == f"CUDA kernels: {library}"


def test_parts_are_named_by_how_they_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "stepp"])
    assert "no part begins with ['stepp']; there are: tests; roofs; kernels; step, base-256" in capsys.readouterr().err
