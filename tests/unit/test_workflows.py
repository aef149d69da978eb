""".github/workflows, CITATION.cff and CHANGELOG.md agree with what the project says of itself elsewhere."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from .documents import fences

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def workflow(name: str) -> dict[Any, Any]:
    """One of them. YAML takes the key `on` for true."""
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_the_repository_and_nothing_else(path: Path) -> None:
    found = yaml.safe_load(path.read_text())

    assert found["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in found["jobs"].values())
    assert all(job["timeout-minutes"] <= 90 for job in found["jobs"].values())
    assert "pull_request_target" not in found[True]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_major_version(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]

    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used), used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_value_is_pasted_into_a_shell_script(path: Path) -> None:
    """They come through the environment, where they cannot be commands."""
    assert not [step["run"] for step in steps(path) if "${{" in step.get("run", "")]


def test_tests_run_on_every_python_with_the_oldest_and_the_newest_torch() -> None:
    matrix = workflow("ci")["jobs"]["tests"]["strategy"]["matrix"]
    needs = {re.split(r"[><=]", need)[0]: need for need in PROJECT["dependencies"]}
    oldest, newest = matrix["torch"]

    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"].startswith(f">={matrix['python'][0]}")
    assert needs["torch"].startswith(f"torch>={oldest.removesuffix('.0')},")
    assert newest == PINNED["torch"]
    belongs = {case["torch"]: case for case in matrix["include"]}
    assert needs["torchvision"] == f"torchvision>={belongs[oldest]['torchvision'].removesuffix('.0')}"
    assert (belongs[newest]["torchvision"], belongs[newest]["triton"]) == (PINNED["torchvision"], PINNED["triton"])
    baselines = {path.stem for path in (ROOT / "kernels" / "mvle_kernels" / "baselines").glob("triton-*.json")}
    assert baselines == {f"triton-{case['triton'].removesuffix('.0')}" for case in belongs.values()}


def test_no_test_is_skipped_for_want_of_a_package_that_could_be_installed_with_the_tests() -> None:
    """But wandb: the extra `test` says why."""
    asked = re.compile(r"""(?:importorskip|skipif\(\s*(?:importlib\.util\.)?find_spec)\(\s*"([\w.]+)""")
    packages = {"nvidia.dali": "nvidia-dali-cuda130"}  # of modules that are named otherwise
    found = {name for path in (ROOT / "tests").rglob("test_*.py") for name in asked.findall(path.read_text())}
    wanted = {packages.get(name, name.partition(".")[0]) for name in found}
    ours = {re.split(r"[\[<>=]", need)[0] for need in PROJECT["optional-dependencies"]["test"]} - {PROJECT["name"]}

    assert "aiohttp" in wanted
    assert (wanted | ours) - set(PINNED) == {"wandb"}


def wanted_here(extra: str) -> Iterator[Requirement]:
    """What an extra of the project needs on this machine."""
    for need in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if need.name == PROJECT["name"]:
            for other in need.extras:
                yield from wanted_here(other)
        elif need.marker is None or need.marker.evaluate():
            yield need


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that `make test` sets up")
def test_the_environment_of_make_test_lacks_nothing_that_tests_ask_for() -> None:
    """So that none of them vanishes there, DALI's least of all."""
    wanted = {need.name: need for need in wanted_here("test")}
    assert {"pytest", "timm"} <= set(wanted)
    assert ("nvidia-dali-cuda130" in wanted) == (
        sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    )
    found = {name: metadata.version(name) for name in wanted}
    assert all(wanted[name].specifier.contains(version) for name, version in found.items()), found


def test_lint_types_tests_and_a_wheel_are_looked_at() -> None:
    scripts = {name: " ".join(s.get("run", "") for s in job["steps"]) for name, job in workflow("ci")["jobs"].items()}

    assert "ruff check ." in scripts["lint"] and "ruff format --check ." in scripts["lint"]
    assert "mypy" in scripts["types"] and "pytest tests" in scripts["tests"]
    assert "python -m build" in scripts["wheel"] and "-m mvle.train ablation/itc extends=tiny" in scripts["wheel"]


def test_the_wheel_is_loaded_by_the_first_block_of_the_readme() -> None:
    script = workflow("ci")["jobs"]["wheel"]["steps"][-1]["run"]
    (line,) = (line for line in script.splitlines() if line.startswith("awk"))
    cut = subprocess.run(
        line.partition(" > ")[0],
        shell=True,
        env={**os.environ, "GITHUB_WORKSPACE": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert cut.stdout == fences("README.md", "python")[0][0]
    exported = re.search(r"-m mvle\.export \S+ --output (\S+)", script)
    assert exported is not None and f'mvle.load("{exported[1]}")' in cut.stdout


def test_the_gpu_job_is_started_by_hand_and_keeps_its_figures() -> None:
    found = workflow("gpu")

    assert list(found[True]) == ["workflow_dispatch"]
    assert "self-hosted" in found["jobs"]["gpu"]["runs-on"]
    make, upload = found["jobs"]["gpu"]["steps"][-2:]
    assert make["run"].startswith("make gpu ")
    assert upload["with"]["path"] == "benchmarks/results/*gpu*.json" and upload["if"] == "always()"


def test_the_citation_has_the_version_of_the_package_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]

    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert paper["title"] == "Masked Vision and Language Modeling for Multi-modal Representation Learning"
    assert paper["title"] in " ".join((ROOT / "README.md").read_text().split())
    assert paper["identifiers"][0]["value"] == "arXiv:2208.02131" and paper["year"] == 2023
    assert paper["authors"][0]["family-names"] == "Kwon"


def test_the_changelog_begins_with_what_is_not_released_and_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()

    assert re.findall(r"^## \[(.*?)\]", text, re.M)[0] == "Unreleased"
    assert PROJECT["version"] in text
