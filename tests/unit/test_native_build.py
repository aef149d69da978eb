"""What is compiled, when, and what happens where it cannot be: an installation is never in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mvle_kernels import compiled_cuda

ROOT = Path(__file__).parents[2]
SOURCES = ("mvle", "kernels", "configs", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def build() -> ModuleType:
    return compiled_cuda.builder()


@pytest.fixture
def folder(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with one file, its header, and no torch."""
    try:
        build.host_compiler()
    except build.Missing as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "torch_include", lambda: tmp_path / "include")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "a.cuh").write_text("int answer() { return 42; }\n")
    (tmp_path / "cuda" / "a.cu").write_text('#include "a.cuh"\n')
    return tmp_path


def compiled(build: ModuleType, folder: Path, strict: bool = False) -> bool:
    """Whether anything was compiled."""
    return build.compile_all(build.emulated_flags(), folder / "objects", strict)[1]


# ---- what is compiled again -----------------------------------------------------------------------------------------


def test_sources_are_compiled_when_they_their_headers_or_the_command_change(
    build: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(build, folder) and not compiled(build, folder)
    (folder / "cuda" / "a.cuh").write_text("int answer() { return 43; }\n")
    assert compiled(build, folder) and not compiled(build, folder)
    (folder / "cuda" / "a.cu").write_text('#include "a.cuh"\nint other() { return answer(); }\n')
    assert compiled(build, folder) and not compiled(build, folder)
    monkeypatch.setattr(build, "TARGET", "0x020b000000000000")
    assert compiled(build, folder) and not compiled(build, folder)


def test_what_failed_is_compiled_again_and_said(build: ModuleType, folder: Path) -> None:
    (folder / "cuda" / "a.cu").write_text("int answer( { }\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*a\.cu"):
            compiled(build, folder)
    (folder / "cuda" / "a.cu").write_text("int answer() { return 1; }\n")
    assert compiled(build, folder)


def test_a_warning_is_an_error_where_that_is_asked_for_also_of_what_was_compiled_before(
    build: ModuleType, folder: Path
) -> None:
    (folder / "cuda" / "a.cu").write_text("int answer() { int unused = 1; return 42; }\n")
    assert compiled(build, folder)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)no warning is allowed.*a\.cu.*unused"):
            compiled(build, folder, strict=True)


def test_notes_of_the_assembler_are_no_warnings_and_spills_are(build: ModuleType, tmp_path: Path) -> None:
    unit = build.Unit(tmp_path / "a.cu", tmp_path / "a.o", ())
    notes = [
        "ptxas info    : 0 bytes gmem",
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "ptxas info    : Used 32 registers, used 0 barriers, 416 bytes cmem[0]",
    ]
    (tmp_path / "a.said").write_text("\n".join(notes))
    assert unit.warnings == ""
    spilt = "ptxas warning : Registers are spilled to local memory in function '_Z1kv', 8 bytes spill stores"
    (tmp_path / "a.said").write_text("\n".join([*notes, spilt]))
    assert unit.warnings == spilt


# ---- what it is compiled with ---------------------------------------------------------------------------------------


def test_architectures_are_those_of_the_list(build: ModuleType) -> None:
    flags = build.architectures("8.0;9.0a 10.0+PTX")
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]
    assert build.architectures("8.0;8.0+PTX;") == build.architectures("8.0+PTX")
    for text, words in (("7.5", "8.0 or newer"), ("Volta;7.5", "has none"), ("9.0;x", "got 'x'"), ("all-major", "got")):
        with pytest.raises(ValueError, match=words):
            build.architectures(text)


def test_architectures_by_name_are_those_that_torch_knows(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    for text in ("Ampere;Hopper", "Ada 8.0", "Ampere+Tegra;9.0a"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        flags = build.architectures()
        assert sorted(f"{a}={b}" for a, b in zip(flags[::2], flags[1::2])) == cpp_extension._get_cuda_arch_flags()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    for text in ("Common", "All", " ", ""):
        assert build.architectures(text) == build.architectures(build.ARCHITECTURES)


def test_architectures_that_are_too_old_are_told_apart(build: ModuleType) -> None:
    taken, old = build.chosen("Turing;7.5 8.0 8.6 9.0 10.0 12.0+PTX")
    assert (taken, old) == (["8.0", "8.6", "9.0", "10.0", "12.0+PTX"], ["7.5+PTX", "7.5"])


def test_what_is_missing_is_told_with_what_to_do(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    for ask, words in (
        (build.cuda_home, "install the CUDA toolkit"),
        (build.host_compiler, r"install one \(g\+\+ or clang\+\+\)"),
        (build.torch_include, "--no-build-isolation beside an installed torch"),
    ):
        with pytest.raises(build.Missing, match=words):
            ask()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CXX", "no-compiler -x")
    with pytest.raises(build.Missing, match="no nvcc in CUDA_HOME=/nowhere"):
        build.cuda_home()
    with pytest.raises(build.Missing, match="no compiler CXX=no-compiler"):
        build.host_compiler()


def test_as_many_compilers_run_at_once_as_are_allowed(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert build.jobs() == (os.cpu_count() or 1)


# ---- what make compiles again ---------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which make finds an installation of earlier, whose Python notes what it is called with."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> calls\n')
    python.chmod(0o755)
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        os.utime(file, (1e9, 1e9))
    (tmp_path / ".venv" / ".installed").touch()
    for place in ("mvle", "build/lib.linux/mvle"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "_host.so").write_text("of older sources")
    return tmp_path


def make_test(clone: Path) -> list[str]:
    """What `make test` calls Python with."""
    (clone / "calls").unlink(missing_ok=True)
    done = subprocess.run(["make", "test"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (clone / "calls").read_text().splitlines()


COMPILES = "setup.py --quiet build_ext --inplace"


@pytest.mark.parametrize("name", ["csrc/host/headers.cpp", "csrc/build.py"])
def test_make_compiles_the_header_pass_again_before_tests_where_its_sources_changed(name: str, clone: Path) -> None:
    tests = make_test(clone)
    assert COMPILES not in tests and tests[-1] == "-m pytest tests"  # the installation compiled them
    later = (clone / ".venv" / ".compiled").stat().st_mtime + 1
    for when in (later, later + 1):  # a change, and one more
        os.utime(clone / name, (when, when))
        assert make_test(clone) == [COMPILES, *tests]
        os.utime(clone / ".venv" / ".compiled", (when, when))
        assert make_test(clone) == tests
    assert not list(clone.rglob("_host*.so")), "what older sources gave is still there"


def test_make_compiles_nothing_again_for_kernels_that_tests_compile_themselves(clone: Path) -> None:
    before = make_test(clone)
    later = (clone / ".venv" / ".compiled").stat().st_mtime + 1
    os.utime(clone / "csrc" / "cuda" / "views.cu", (later, later))
    assert make_test(clone) == before


# ---- what an installation does without ------------------------------------------------------------------------------


def setup(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build, in a copy of the sources."""
    shutil.rmtree(source / "made", ignore_errors=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CXX", "CC")}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", "made"]
    return subprocess.run(command, cwd=source, env={**clean, **environment}, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 (pyproject.toml)")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "native.json")
            shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def noted(source: Path) -> dict[str, Any]:
    (found,) = source.rglob("made/lib*/mvle_kernels/native.json")
    return json.loads(found.read_text())


def test_without_any_compiler_everything_but_the_native_parts_is_built(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = setup(source, PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    for name, words in (("mvle._host", "no C++ compiler"), ("mvle_kernels.libmvle_cuda", "nvcc is not on PATH")):
        assert f"{name} is left out ({words}" in done.stdout and noted(source)["left out"][name].startswith(words)
    assert noted(source)["built"] == {} and not list(source.rglob("*.so"))
    assert list(source.rglob("made/lib*/mvle/__init__.py"))


def test_a_compiler_that_fails_is_told_and_in_the_way_only_where_native_parts_are_demanded(
    source: Path, tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    fails.chmod(0o755)
    environment = {"CXX": str(fails), "CC": str(fails), "CUDA_HOME": "/nowhere"}
    done = setup(source, **environment)
    assert done.returncode == 0, done.stderr
    assert noted(source)["left out"]["mvle._host"].startswith("compiling failed")

    strict = setup(source, MVLE_STRICT="1", **environment)
    assert strict.returncode != 0 and "MVLE_STRICT=1 demands mvle_kernels.libmvle_cuda" in strict.stderr + strict.stdout


def test_no_list_of_architectures_is_in_the_way_of_an_installation(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    # a compiler that notes its command and leaves what it was to make
    nvcc = '#!/bin/sh\necho "$@" >> "$0.log"\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n'
    (home / "bin" / "nvcc").write_text(nvcc)
    (home / "bin" / "nvcc").chmod(0o755)
    environment = {"CUDA_HOME": str(home), "CXX": "no-compiler", "MVLE_STRICT": "0"}
    name = "mvle_kernels.libmvle_cuda"
    for text, codes in (("7.5 8.0 9.0+PTX", "sm_80, sm_90, compute_90"), ("Ampere", "sm_80, sm_86, compute_86")):
        done = setup(source, TORCH_CUDA_ARCH_LIST=text, **environment)
        assert done.returncode == 0, done.stderr
        assert f"for {codes}" in noted(source)["built"][name]
        assert ("not built for 7.5." in done.stdout) == ("TORCH_CUDA_ARCH_LIST: 7.5" in noted(source)["built"][name])
        assert ("not built for" in done.stdout) == ("7.5" in text)
    assert "compute_75" not in (home / "bin" / "nvcc.log").read_text()
    for text, words in (("all-major", "got 'all-major' in it"), ("7.5", "'7.5' has none")):
        done = setup(source, TORCH_CUDA_ARCH_LIST=text, **environment)
        assert done.returncode == 0, done.stderr
        assert f"{name} is left out" in done.stdout and words in noted(source)["left out"][name]
    strict = setup(source, TORCH_CUDA_ARCH_LIST="all-major", CUDA_HOME=str(home), MVLE_STRICT="1")
    assert strict.returncode != 0 and f"MVLE_STRICT=1 demands {name}" in strict.stderr
