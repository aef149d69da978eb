"""What nvcc's assembler says is read right, and what is planted in it is caught by the check."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from mvle_kernels import attention_backward_cuda, attention_cuda, compiled_cuda, regress
from mvle_kernels.compiled_cuda import demangled, read

from .kernel_checks import unavailable

FILE = "_ZN4mvle46_GLOBAL__N__03b914fb_8_views_cu_97b290df_18714"
SAID = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FILE}12embed_kernelIN3c108BFloat16EfLb1EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for {FILE}12embed_kernelIN3c108BFloat16EfLb1EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 51 registers, used 1 barriers, 568 bytes cmem[0]
ptxas info    : Compiling entry function '{FILE}12embed_kernelIN3c108BFloat16EfLb1EEEvPKT_' for 'sm_90a'
ptxas info    : Function properties for {FILE}12embed_kernelIN3c108BFloat16EfLb1EEEvPKT_
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
"""


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("12embed_kernelIN3c108BFloat16EfLb1EEEvPKT_", "embed_kernel<BFloat16, float, 1>"),
        ("12embed_kernelIN3c108BFloat16ES3_Lb0EEEvPKT_", "embed_kernel<BFloat16, BFloat16, 0>"),
        ("12embed_kernelIN3c104HalfENS2_8BFloat16ELb0EEEvPKT_", "embed_kernel<Half, BFloat16, 0>"),
        ("16attention_kernelIN3c104HalfELi128EEEvNS_4RowsIKT_EE", "attention_kernel<Half, 128>"),
        ("12plain_kernelEPKfPf", "plain_kernel"),
    ],
)
def test_a_kernel_is_called_what_its_source_calls_it(symbol: str, name: str) -> None:
    assert demangled(FILE + symbol) == name


def test_figures_are_read_for_each_architecture() -> None:
    kernel = "embed_kernel<BFloat16, float, 1>"
    assert read(SAID) == {
        (kernel, "sm_80"): {"registers": 51, "stack": 0, "shared": 0},
        (kernel, "sm_90a"): {"registers": 54, "stack": 8, "shared": 2048},
    }


def table() -> regress.Table:
    figures = {"csrc/cuda/a / k<BFloat16> / sm_80 nvcc": {"registers": 50}}
    figures["csrc/cuda / base, masked words / k / launch nvcc"] = {"shared": 100_000, "threads": 512, "programs": 1024}
    return {name: dict.fromkeys(regress.FIGURES, 0) | found for name, found in figures.items()}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("sm_80 nvcc", {"stack": 8}, "stack 8 bytes: registers spill"),
        ("sm_80 nvcc", {"registers": 56}, "registers 50 -> 56: more than a tenth up"),
        ("launch nvcc", {"shared": 120_000}, "shared 100000 -> 120000 bytes: more than before"),
        ("launch nvcc", {"shared": 170_000}, "shared 170000 bytes: launch has 166912"),
        ("launch nvcc", {"threads": 1024}, "launch changed: threads 512 -> 1024"),
    ],
)
def test_what_is_planted_is_caught(kind: str, change: dict[str, int], words: str, tmp_path: Path, capsys) -> None:
    file, now = tmp_path / "nvcc-1.0.json", dict(table())
    regress.write(file, now)  # type: ignore[arg-type]
    assert regress.hold(file, now, "", False, False) == 0
    name = next(name for name in now if name.endswith(kind))
    now[name] = {**now[name], **change}  # type: ignore[dict-item]
    capsys.readouterr()
    assert regress.hold(file, now, "", False, False) == 1
    assert words in capsys.readouterr().out


def test_a_release_without_a_baseline_fails_and_says_how_to_make_one(tmp_path: Path, capsys) -> None:
    assert regress.hold(tmp_path / "nvcc-1.0.json", table(), "", False, False) == 1
    assert "nvcc-1.0.json is missing" in (said := capsys.readouterr().out) and regress.HOW in said


def test_without_nvcc_or_sources_the_check_passes_over_cuda_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert regress.check_cuda(tmp_path) == 0
    assert "csrc/cuda is passed over: no nvcc in CUDA_HOME=/nowhere" in capsys.readouterr().out
    monkeypatch.setattr(compiled_cuda, "SOURCES", tmp_path)
    assert regress.check_cuda(tmp_path) == 0
    assert "passed over" in (said := capsys.readouterr().out) and "compiled from a clone" in said


def test_a_warning_of_nvcc_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def warns() -> None:
        raise RuntimeError("compilers warn, and no warning is allowed: Registers are spilled")

    monkeypatch.setattr(compiled_cuda, "kernels", warns)
    assert regress.check_cuda(tmp_path) == 1 and "Registers are spilled" in capsys.readouterr().out


def test_every_op_in_cuda_has_launches_that_are_held() -> None:
    if reason := unavailable("cuda"):
        pytest.skip(reason)
    held = compiled_cuda.launches()
    kernels = {name.split(" / ")[2].split(",")[0] for name in held}
    assert kernels == {
        "ragged_attention",
        "ragged_attention_backward",
        "masked_token_loss",
        "masked_pixel_loss",
        "embed_views",
        "embed_views_backward",
    }
    assert all(figures["shared"] <= 163 * 1024 and figures["programs"] > 0 for figures in held.values())


@pytest.mark.parametrize("head", [16, 32, 64, 128])
def test_no_attention_asks_for_more_shared_memory_than_the_smallest_architectures_have(head: int) -> None:
    """sm_86, sm_89 and sm_120 run what is compiled for sm_80, or the PTX, with 99 KiB a block."""
    if reason := unavailable("cuda"):
        pytest.skip(reason)
    for rows in (1, 17, 33, 197, 1024):
        for keys in (14, 77, 197, 1024):
            q, k = (torch.empty(n, 1, head, dtype=torch.bfloat16) for n in (rows, keys))
            layout = torch.tensor([0, rows]), torch.tensor([0, keys]), None, None, rows, keys
            calls = {
                "forward": partial(attention_cuda.forward, q, k, k, *layout),
                "backward": partial(attention_backward_cuda.backward, q, q, k, k, q, torch.empty(1, rows), *layout),
            }
            for name, figures in compiled_cuda.noted(calls.items()).items():
                assert figures["shared"] <= 99 * 1024, f"{name}, {rows}x{keys}: {figures['shared']} bytes"
