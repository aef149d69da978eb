"""Libraries of others: what is missing, another package of that name, broken or too old is told, and breaks nothing.

None of them is needed here: folders that lie first on the path stand in for them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mvle_kernels import ragged_attention, use_backend
from mvle_kernels.optional import TO_HAVE, apex, xformers

Install = Callable[[dict[str, str]], None]
OURS = ("apex", "amp_C", "xformers")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes files (path -> text) where imports look first. Whatever is installed here is out of sight."""

    def forget() -> None:
        importlib.invalidate_caches()
        apex.cache_clear()
        xformers.cache_clear()
        for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
            del sys.modules[name]

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name in OURS:  # as if not installed
            if not any(file.split("/")[0].removesuffix(".py") == name for file in files):
                monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]

    installed = {n: module for n, module in sys.modules.items() if n.split(".")[0] in OURS}
    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    monkeypatch.undo()
    forget()
    sys.modules.update(installed)


def metadata(name: str, version: str) -> dict[str, str]:
    """What pip writes down of a package."""
    return {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}


def why(state: tuple[str | None, str | None]) -> str:
    """Why a library cannot be used."""
    version, reason = state
    assert version is None and reason
    return reason


# ---- apex -----------------------------------------------------------------------------------------------------------

# importing it fails, as it does beside a torch that it was not made for
NVIDIAS = {"apex/__init__.py": "raise AttributeError('not for this torch')", "apex/optimizers/fused_adam.py": ""}


def test_what_is_not_there_is_not_installed(install: Install) -> None:
    install({})

    assert why(apex()) == why(xformers()) == "not installed"


def test_the_other_package_called_apex_is_recognised_and_not_imported(install: Install, tmp_path: Path) -> None:
    install({"apex/__init__.py": "import pyramid_mailer", "apex/models.py": "", **metadata("apex", "0.9.10.dev0")})

    said = why(apex())

    assert said.startswith(f"the installed package apex (0.9.10.dev0, in {tmp_path / 'apex'}) is not NVIDIA's")
    assert "apex" not in sys.modules


def test_a_folder_that_happens_to_be_called_apex_is_recognised(install: Install) -> None:
    install({"apex/README.md": "a clone: the package is a folder deeper", "apex/apex/optimizers/fused_adam.py": ""})

    assert "is not NVIDIA's" in why(apex())


def test_an_apex_without_its_extensions_is_recognised(install: Install) -> None:
    install({**NVIDIAS, **metadata("apex", "0.1")})

    assert why(apex()) == "NVIDIA's apex 0.1 is installed without its CUDA extensions (amp_C)"


@pytest.mark.parametrize(
    "line", ["raise ImportError('libcudart.so.12: cannot open')", "raise ImportError('undefined symbol: _ZN3c10')"]
)
def test_an_apex_whose_extensions_do_not_load_says_what_the_loader_said(line: str, install: Install) -> None:
    install({**NVIDIAS, "amp_C.py": line, **metadata("apex", "0.1")})

    (words,) = re.findall("'(.*)'", line)
    assert why(apex()) == f"the CUDA extensions of apex 0.1 do not load beside this torch: ImportError: {words}"


def test_an_apex_without_the_kernel_is_too_old(install: Install) -> None:
    install({**NVIDIAS, "amp_C.py": "def multi_tensor_adam(): ..."})

    assert why(apex()) == "apex of unknown version is too old: its extensions have no multi_tensor_adam_capturable"


def test_an_apex_with_the_kernel_is_taken_whatever_else_of_it_does_not_import(install: Install) -> None:
    install({**NVIDIAS, "amp_C.py": "def multi_tensor_adam_capturable(): ...", **metadata("apex", "0.1")})

    assert apex() == ("0.1", None)


# ---- xformers -------------------------------------------------------------------------------------------------------

MASK = """
class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None): ...
"""
OPERATORS = """
from . import attn_bias
class Op:
    SUPPORTED_ATTN_BIAS_TYPES = {type(None), attn_bias.BlockDiagonalMask}
    is_available = classmethod(lambda cls: True)
class Unbuilt(Op):
    is_available = classmethod(lambda cls: False)
class Causal(Op):
    SUPPORTED_ATTN_BIAS_TYPES = {type(None)}
"""


def packages(forward: str = "Op", backward: str = "Op", mask: str = MASK, error: str = "None") -> dict[str, str]:
    """As much of xformers as is looked at. forward, backward: its operators; error: of loading its C++ part."""
    return {
        "xformers/__init__.py": "from . import _cpp_lib",
        "xformers/_cpp_lib.py": f"_cpp_library_load_exception = {error}",
        "xformers/ops/__init__.py": "from . import fmha",
        "xformers/ops/fmha/__init__.py": f"{OPERATORS}\nALL_FW_OPS = [{forward}]\nALL_BW_OPS = [{backward}]",
        "xformers/ops/fmha/attn_bias.py": mask,
        **metadata("xformers", "0.0.35"),
    }


def test_an_xformers_that_works_is_taken(install: Install) -> None:
    install(packages("Unbuilt, Op", "Unbuilt, Op"))

    assert xformers() == ("0.0.35", None)


def test_an_xformers_that_calls_torchs_kernels_is_taken_without_its_own(install: Install) -> None:
    install(packages("Unbuilt, Op", error="OSError('libtorch')"))

    assert xformers() == ("0.0.35 (its C++ part does not load; it calls torch's kernels)", None)


@pytest.mark.parametrize("operators", ["Unbuilt, Causal", ""])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_an_xformers_that_has_nothing_to_run_is_refused(way: str, operators: str, install: Install) -> None:
    install(packages(**{way: operators}, error="OSError('libtorch')"))

    assert why(xformers()) == (
        f"xformers 0.0.35 has no {way} of packed sequences that works beside this torch; its C++ part does not load"
    )


def test_an_xformers_whose_masks_know_no_device_is_too_old(install: Install) -> None:
    install(packages(mask=MASK.replace(", *, device=None", "")))

    assert why(xformers()) == "xformers 0.0.35 is too old: it makes masks on the host alone"


@pytest.mark.parametrize(
    "file, line, words",
    [
        ("xformers/__init__.py", "import torch; torch._six", "AttributeError: module 'torch' has no attribute '_six'"),
        ("xformers/_cpp_lib.py", "raise OSError('_C.so')", "OSError: _C.so"),
        ("xformers/ops/fmha/__init__.py", "raise ImportError('Requires Flash-Attention >=2.7.1')", "Flash-Attention"),
        ("xformers/ops/fmha/attn_bias.py", "", "AttributeError"),  # a mask that was renamed
    ],
)
def test_an_xformers_that_does_not_load_breaks_no_call(file: str, line: str, words: str, install: Install) -> None:
    install(packages() | {file: line})

    assert why(xformers()).startswith("xformers 0.0.35 does not load: ") and words in why(xformers())
    x, ends = torch.ones(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    with use_backend("xformers|dense"):
        assert ragged_attention(x, x, x, ends, ends, 3, 3).equal(x)


def test_for_each_there_is_something_to_type() -> None:
    assert set(TO_HAVE) == {"apex", "xformers"} and all("pip install" in text for text in TO_HAVE.values())
