"""`python -m mvle_kernels.info` tells what is there, and of what is not: why, and what to type."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from mvle_kernels import cuda_support, dispatch, info, optional
from torch import Tensor


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation of which nothing native was built."""
    monkeypatch.setattr(info, "BUILD", tmp_path / "native.json")
    monkeypatch.setattr(cuda_support, "LIBRARY", tmp_path / "libmvle_cuda.so")
    monkeypatch.delenv("MVLE_CUDA_LIBRARY", raising=False)
    load = cuda_support.load
    load.cache_clear()
    yield tmp_path
    load.cache_clear()


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


def test_the_notes_of_the_build_are_of_the_installed_library_alone(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = {"built": {"mvle_kernels.libmvle_cuda": "nvcc 13.0 for sm_80"}, "left out": {}}
    (elsewhere / "native.json").write_text(json.dumps(noted))
    monkeypatch.setattr(cuda_support, "load", lambda: None)
    for name in ("libmvle_cuda.so", "other.so"):
        (elsewhere / name).touch()
    assert info.cuda_kernels().found == f"nvcc 13.0 for sm_80 ({elsewhere}/libmvle_cuda.so)"
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", str(elsewhere / "other.so"))
    assert info.cuda_kernels().found == f"built elsewhere ({elsewhere}/other.so, by MVLE_CUDA_LIBRARY)"
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", str(elsewhere / "." / "libmvle_cuda.so"))
    assert info.cuda_kernels().found.startswith("nvcc 13.0 for sm_80")


def test_a_library_that_is_named_and_not_there_is_told_by_the_variable_that_names_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", "nowhere/missing.so")
    (elsewhere / "libmvle_cuda.so").touch()  # the installed one is there, and not taken
    part = info.cuda_kernels()
    assert not part.found and part.missing == "MVLE_CUDA_LIBRARY=nowhere/missing.so is no file"
    assert "without the variable" in part.remedy


@pytest.fixture
def extension(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], info.Part]]:
    """What is said of the header pass where mvle has a file `name` with `content` beside it, and no other extension."""
    import mvle
    from mvle.data import headers

    noted = {"built": {"mvle._host": "g++"}, "left out": {}}
    (elsewhere / "native.json").write_text(json.dumps(noted))
    monkeypatch.setattr(mvle, "__path__", [str(elsewhere)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # an editable installation would look in its own clone, too

    def told(name: str, content: str) -> info.Part:
        (elsewhere / name).write_text(content)
        monkeypatch.delitem(sys.modules, "mvle._host", raising=False)
        headers.host.cache_clear()
        return info.header_pass()

    yield told
    monkeypatch.undo()
    sys.modules.pop("mvle._host", None)
    headers.host.cache_clear()


def test_the_header_pass_is_there_if_indexing_would_take_it(extension: Callable[[str, str], info.Part]) -> None:
    from mvle.data.headers import FORM

    part = extension("_host.py", f"FORM = {FORM}")
    assert part.found.startswith("C++ (g++; ") and part.found.endswith("_host.py)"), part


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("_host" + sysconfig.get_config_var("EXT_SUFFIX"), "no library", "C++ is not there: "),
        ("_host.cpython-30-x86_64-linux-gnu.so", "of another Python", "No module named 'mvle._host'"),
        ("_host.py", "FORM = 0", "_host.py is of another version"),
    ],
    ids=["garbage", "of another Python", "of another version"],
)
def test_a_file_that_is_no_header_pass_is_not_called_there(
    name: str, content: str, words: str, extension: Callable[[str, str], info.Part]
) -> None:
    part = extension(name, content)
    assert not part.found and words in part.missing and "indexing takes Python" in part.missing
    assert "C++ compiler" in part.remedy


def test_a_header_pass_that_was_left_out_is_told_with_the_reason_of_the_build(
    elsewhere: Path, extension: Callable[[str, str], info.Part]
) -> None:
    noted = json.dumps({"built": {}, "left out": {"mvle._host": "no C++ compiler on PATH"}})
    assert extension("native.json", noted).missing.startswith("no C++ compiler on PATH; indexing takes Python, since")


WITHOUT_MVLE = """
import sys
sys.modules["mvle"] = None
sys.path.insert(0, sys.argv[1])
from mvle_kernels import info
sys.exit(info.main([]))
"""


def test_it_runs_where_only_the_kernels_are_installed() -> None:
    command = [sys.executable, "-I", "-c", WITHOUT_MVLE, str(Path(info.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "missing: mvle, which alone reads shards, cannot be imported: " in done.stdout


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


def test_a_library_that_is_named_and_not_there_is_told_by_its_name(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVLE_CUDA_LIBRARY", "/nowhere/lib.so")
    assert cuda_support.load() == "MVLE_CUDA_LIBRARY=/nowhere/lib.so names no file"
