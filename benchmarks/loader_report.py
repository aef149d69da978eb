"""The table of loaders, for docs/performance.md, out of benchmarks/results/loader_cpu.json.

    python -m benchmarks.loader --write
    python -m benchmarks.loader_report

In the document only what stands between `<!-- loader: begin -->` and `<!-- loader: end -->` is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import RESULTS, ROOT, rewrite

DOCUMENT = ROOT / "docs" / "performance.md"
RESULT = RESULTS / "loader_cpu.json"
BEGIN, END = "<!-- loader: begin -->", "<!-- loader: end -->"
HEAD = ("images/s", "against Pillow", "against torchvision", "CPU share", "images a CPU second")
NOT_MEASURED = "**Not measured yet** (`python -m benchmarks.loader --write`)."


def written(result: Mapping[str, Any] | None) -> str:
    """What stands between the marks; None: nothing was measured."""
    if result is None:
        return NOT_MEASURED
    where, setup = result["about"], result["setup"]
    packages = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number)
    parts = [
        f"{where['cpu']}, {where['device']}, torch {where['torch']}, {packages}, commit {where['commit']}, "
        f"{where['date']}; {setup['workers']} threads or processes each, batches of {setup['batch']}, windows of "
        f"{setup['size']} pixels, {setup['rounds']} rounds:"
    ]
    for side, data in setup["data"].items():
        parts.append(f"**JPEGs of {side} pixels (shorter side), {data['mean_bytes'] / 1024:,.0f} KiB on average**")
        lines = ["| loader | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
        own = [row for row in result["rows"] if str(row["side"]) == side]
        lines += map(_line, sorted(own, key=lambda row: -row["images_per_second"]))
        parts.append("\n".join(lines))
    parts.append(f"The plan takes {result['plan_seconds_a_pair'] * 1e6:.1f} microseconds a pair.")
    if result["skipped"]:
        reasons = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in result["skipped"].items())
        parts.append(f"Not measured: {reasons}.")
    return "\n\n".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        f"{row['images_per_second']:,.0f}",
        _ratio(row.get("against_pillow")),
        _ratio(row.get("against_torchvision")),
        f"{row['cpu_share']:.0%}",
        f"{row['images_per_cpu_second']:,.0f}",
    )
    return f"| {row['loader']} | " + " | ".join(cells) + " |"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""


def write(document: Path, result: Path) -> None:
    """The table into the document, or that there is none."""
    found = json.loads(result.read_text()) if result.is_file() else None
    document.write_text(rewrite(document.read_text(), written(found), BEGIN, END))


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description="The table of loaders into docs/performance.md.").parse_args(arguments)
    write(DOCUMENT, RESULT)
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
