"""A wheel holds all that a run needs: installed by pip into a folder of its own, it trains, exports and loads what it
exported, where nothing of the checkout can be imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from mvle_kernels import compiled_cuda

from mvle.config_files import config_names

from .documents import fences
from .small_run import SMALL, write_shard

ROOT = Path(__file__).parents[2]
SOURCES = ("mvle", "kernels", "configs", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
BUILT = ROOT / "build" / "cuda"  # compiled before by an installation or the check of kernels: not compiled again
USE = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
import mvle, mvle.config, mvle_kernels
from mvle.config_files import config_names, configs_folder
from mvle_kernels.launches import TABLE
site = Path(sys.argv[1]).resolve()
assert all(Path(module.__file__).is_relative_to(site) for module in (mvle, mvle_kernels)), mvle.__file__
assert find_spec("benchmarks") is None and find_spec("tests") is None, sys.path
assert configs_folder() == site / "mvle" / "configs"
assert mvle.config.load_config("ablation/drop", ["extends=tiny"]).masking.mode == "drop"
assert TABLE.is_file(), TABLE
print(json.dumps(config_names()))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheel of a copy of the sources (building leaves files beside them)."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 (pyproject.toml)")
    if not any(d.metadata["Name"] == "pip" for d in distributions()):  # its module is not to be imported here
        pytest.skip("pip is not installed")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "native.json")
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    environment = dict(os.environ)
    if compiled():
        shutil.copytree(BUILT, source / "build" / "cuda")
    else:
        environment["CUDA_HOME"] = "/nowhere"
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile"]
    command = [sys.executable, "-m", *install, "--target", str(folder / "site"), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"


def compiled() -> bool:
    """Whether the CUDA kernels of these sources are compiled already, as an installation would."""
    build = compiled_cuda.builder()
    try:
        command = (*build.cuda_flags(), *build.architectures())
    except build.Missing:
        return False
    return build.up_to_date(command, BUILT)


def start(site: Path, folder: Path, *words: str) -> str:
    """What `python words` prints in a folder, with the wheel and what the environment has beside it. Python's `-S`
    leaves out the environment's own ways to packages, among them an editable installation of the checkout."""
    packages = dict.fromkeys([str(site), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))])
    done = subprocess.run(
        [sys.executable, "-S", "-B", *words],  # -B: nothing is left beside what was installed
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_wheel_has_every_recipe_and_finds_it_from_another_folder(site: Path, tmp_path: Path) -> None:
    assert json.loads(start(site, tmp_path, "-c", USE, str(site))) == config_names()


def test_what_a_wheel_trained_and_exported_is_loaded_by_the_lines_of_the_readme(site: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "pairs.tar")
    data = [f"data.{split}=pairs.tar" for split in ("train", "val", "test")]
    lines = fences("README.md", "python")[0][0]
    assert len([line for line in lines.splitlines() if line]) <= 8

    start(site, tmp_path, "-m", "mvle.train", "tiny", *SMALL, *data)
    start(site, tmp_path, "-m", "mvle.export", "runs/tiny", "--output", "exports/tiny")
    said = start(site, tmp_path, "-c", f"{lines}\nprint(mvle.__file__)").splitlines()

    assert said[-1] == str(site / "mvle" / "__init__.py")
    shown = (r"\[\[-?[\d.]+\]\]", r"\[-?[\d.]+\]", r"\[\[(['\"]).*\1\]\]")  # a similarity, log-odds, a word
    assert all(re.fullmatch(form, line) for form, line in zip(shown, said)), said


def test_a_wheel_has_every_file_of_the_packages_and_no_other(site: Path) -> None:
    """Tables of launches, baselines and marks of types too."""
    folders = {
        "mvle": ROOT / "mvle",
        "mvle_kernels": ROOT / "kernels" / "mvle_kernels",
        "mvle/configs": ROOT / "configs",
    }
    kinds = (".py", ".json", ".typed", ".yaml")
    own = {f"{name}/{p.relative_to(f)}" for name, f in folders.items() for p in f.rglob("*") if p.suffix in kinds}
    own.add("mvle_kernels/native.json")  # which the build writes
    noted = json.loads((site / "mvle_kernels" / "native.json").read_text())
    if "mvle._host" in noted["built"]:
        own.add(f"mvle/_host{sysconfig.get_config_var('EXT_SUFFIX')}")
    if "mvle_kernels.libmvle_cuda" in noted["built"]:
        own.add("mvle_kernels/libmvle_cuda.so")

    assert own == {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file() and ".dist-info" not in str(p)}


def test_native_parts_are_in_a_wheel_or_told_why_not(site: Path, tmp_path: Path) -> None:
    noted = json.loads((site / "mvle_kernels" / "native.json").read_text())
    said = start(site, tmp_path, "-m", "mvle_kernels.info")
    for extension, part in (("mvle._host", "header pass"), ("mvle_kernels.libmvle_cuda", "CUDA kernels")):
        line = next(line for line in said.splitlines() if line.startswith(part))
        assert (extension in noted["built"]) != (extension in noted["left out"])
        assert ("missing: " in line) == (extension in noted["left out"]), line
        assert noted["left out"].get(extension, "") in line
    if shutil.which("c++") and find_spec("pybind11"):
        assert "mvle._host" in noted["built"], noted
    assert ("mvle_kernels.libmvle_cuda" in noted["built"]) == compiled()
