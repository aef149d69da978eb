"""A wheel holds all that a run needs: used from another folder, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mvle.config_files import config_names

ROOT = Path(__file__).parents[2]
SOURCES = ("mvle", "kernels", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
USE = """
import json, sys
from pathlib import Path
import mvle, mvle.config, mvle_kernels
from mvle.config_files import config_names, configs_folder
from mvle_kernels.launches import TABLE
site = Path(sys.argv[1]).resolve()
assert all(Path(module.__file__).is_relative_to(site) for module in (mvle, mvle_kernels)), mvle.__file__
assert configs_folder() == site / "mvle" / "configs"
assert mvle.config.load_config("ablation/drop", ["extends=tiny"]).masking.mode == "drop"
assert TABLE.is_file(), TABLE
print(json.dumps(config_names()))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources (building leaves files beside them), unpacked as pip does."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 (pyproject.toml)")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_recipe_and_finds_it_from_another_folder(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}

    done = subprocess.run(
        [sys.executable, "-B", "-c", USE, str(site)],  # nothing is left beside what was unpacked
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == config_names()


def test_a_wheel_has_every_file_of_the_packages_and_no_other(site: Path) -> None:
    """Tables of launches, baselines and marks of types too."""
    folders = {
        "mvle": ROOT / "mvle",
        "mvle_kernels": ROOT / "kernels" / "mvle_kernels",
        "mvle/configs": ROOT / "configs",
    }
    kinds = (".py", ".json", ".typed", ".yaml")
    own = {f"{name}/{p.relative_to(f)}" for name, f in folders.items() for p in f.rglob("*") if p.suffix in kinds}

    assert own == {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file() and ".dist-info" not in str(p)}
