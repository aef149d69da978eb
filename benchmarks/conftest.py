"""What benchmarks share: which rows, and the table at the end.

--shape NAME, --mode NAME, --only main | switches | compiled    those rows of test_step.py alone
--rows FILE                                                     each row as a line of JSON, as soon as it is known
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("the step")
    group.addoption("--shape", help="rows of this shape alone (benchmarks/shapes.py)")
    group.addoption("--mode", help="rows of this mode alone")
    group.addoption("--only", choices=("main", "switches", "compiled"), help="these providers alone")
    group.addoption("--rows", type=Path, help="append each row to this file as a line of JSON")


def kind_of(provider: str) -> str:
    """main, switches or compiled."""
    if "compiled" in provider:
        return "compiled"
    return "switches" if provider.startswith("without: ") else "main"


def is_large_switch(known: Mapping[str, Any]) -> bool:
    """Minutes of a CPU, made where they are asked for alone."""
    return "provider" in known and known["shape"] == "vit-s-4" and kind_of(known["provider"].name) == "switches"


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """What was skipped, and why, belongs to a run."""
    output_json["skipped"] = skipped(config.pluginmanager.get_plugin("terminalreporter"))


def skipped(terminalreporter: Any) -> list[str]:
    """Why each skipped row was."""
    return [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    wanted = {name: config.getoption(name) for name in ("shape", "mode")}
    only = config.getoption("only")
    kept = []
    for item in items:
        known = getattr(getattr(item, "callspec", None), "params", {})
        if only != "switches" and is_large_switch(known):
            continue
        fits = all(value is None or known.get(name) == value for name, value in wanted.items())
        if only is not None:
            provider = known.get("provider")
            # savings are read against the whole step, which is measured beside them
            with_them = provider is not None and (kind_of(provider.name) == only or provider.name == "ours")
            fits = fits and (with_them or (provider is None and only == "main"))
        if fits:
            kept.append(item)
    items[:] = kept


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def row(request: Any) -> Iterator[None]:
    path = request.config.getoption("rows")
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    info = {} if benchmark is None else benchmark.extra_info
    if path is not None and info.keys() & {"provider", "parts", "kernels"}:
        with path.open("a") as file:
            file.write(json.dumps(info) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    from .kernel_report import kernel_table, not_measured
    from .report import left_out, step_table

    session = getattr(config, "_benchmarksession", None)
    infos = [bench.extra_info for bench in getattr(session, "benchmarks", ())]
    if kernels := [info for info in infos if "kernels" in info]:
        terminalreporter.section("kernels")
        terminalreporter.write_line(kernel_table([row for info in kernels for row in info["kernels"]]))
        lacking = sorted(f"  {what}: {why}" for what, why in not_measured(kernels).items())
        for line in ("", "Not measured:", *lacking):
            terminalreporter.write_line(line)
    rows = [info for info in infos if "provider" in info]
    if not rows:
        return
    terminalreporter.section("the step")
    terminalreporter.write_line(step_table(rows))
    terminalreporter.write_line("\nNot measured:")
    for line in (*skipped(terminalreporter), *left_out(rows)):
        terminalreporter.write_line(f"  {line}")
