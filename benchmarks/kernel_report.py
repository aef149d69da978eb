"""The table of kernels, for docs/kernels.md, out of a run of the benchmarks.

    pytest benchmarks/test_kernels.py --benchmark-only --benchmark-json=kernels.json
    python -m benchmarks.kernel_report kernels.json      to benchmarks/results/kernels_cpu.json (kernels_gpu.json), and
                                                         from there into docs/kernels.md
    python -m benchmarks.kernel_report                   the document anew

In the document only what stands between `<!-- kernels: begin -->` and `<!-- kernels: end -->` is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .kernel_cases import cases
from .report import RESULTS, ROOT, infos_of, rewrite

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
Row = Mapping[str, Any]
HEAD = ("time", "against plain", "peak memory", "GB/s", "GFLOP/s", "of the roof", "bytes", "launches")


def read_run(path: Path) -> dict[str, Any]:
    """A file of pytest-benchmark, or of --rows (.jsonl) -> {"about", "device", "rows", "skipped"}. Raises ValueError if
    it holds no kernel."""
    infos = infos_of(path)
    found = [i for i in infos if "kernels" in i]
    if not found:
        raise ValueError(
            f"expected rows of benchmarks/test_kernels.py in {path}; got {len(infos)} of other benchmarks."
        )
    rows = [row for i in found for row in i["kernels"]]
    return {"about": found[0]["about"], "device": found[0]["device"], "rows": rows, "skipped": not_measured(found)}


def not_measured(infos: Sequence[Row]) -> dict[str, str]:
    """Providers of an op, and sizes -> why they are not among the rows of these benchmarks."""
    providers = {f"{i['kernels'][0]['op']}: {name}": why for i in infos for name, why in i["skipped"].items()}
    return providers | {size: why for i in infos for size, why in i["left_out"].items()}


def kernel_table(rows: Sequence[Row]) -> str:
    """A Markdown table a case, forward and with its backward."""
    lines = []
    for case, backward in dict.fromkeys((row["case"], row["backward"]) for row in rows):
        own = [row for row in rows if (row["case"], row["backward"]) == (case, backward)]
        lines += ["", f"**{case}, {'forward and backward' if backward else 'forward'}**", ""]
        lines += ["| provider | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
        lines += map(_line, sorted(own, key=lambda row: row["seconds"]))
    return "\n".join(lines)


def _line(row: Row) -> str:
    ratio = row["ratio"]
    cells = (
        f"{row['seconds'] * 1e6:,.0f} us" + ("" if row["captured"] or "launches" in row else " with launches"),
        "" if row["against"] != "plain" else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        f"{row['peak_bytes'] / 2**20:,.1f} MiB",
        f"{row['bytes_per_second'] / 1e9:,.1f}",
        f"{row['flops_per_second'] / 1e9:,.1f}" if row["flops_per_second"] else "",
        f"{row['roof']:.0%}",
        f"{row['bytes'] / 2**20:,.1f} MiB" if "bytes" in row else "",
        f"{row['launches']:,}" if "launches" in row else "",
    )
    return f"| {row['kernel']}{'*' if row['chosen'] else ''} | " + " | ".join(cells) + " |"


def written(results: Sequence[Mapping[str, Any]]) -> str:
    """What stands between the marks."""
    parts = []
    for result in results:
        where = result["about"]
        parts.append(f"{where['device']}, torch {where['torch']}, commit {where['commit']}, {where['date']}:")
        parts.append(kernel_table(result["rows"]))
        parts.append("Not measured there:")
        parts.append("\n".join(f"- {name}: {why}" for name, why in sorted(result["skipped"].items())))
    if all(not r["device"].startswith("cuda") for r in results):
        parts.append("On a GPU: **not measured yet** (`make gpu`).")
    return "\n\n".join(parts)


def keep(path: str) -> Path:
    """Put a run among the results; where it went. Raises ValueError if it is a part of the cases alone."""
    result = read_run(Path(path))
    missing = set(cases(torch.device(result["device"]))) - {row["case"] for row in result["rows"]}
    if missing:
        raise ValueError(f"the table is of all cases; {path} lacks {len(missing)}, among them {min(missing)!r}.")
    kept = RESULTS / f"kernels_{'gpu' if result['device'].startswith('cuda') else 'cpu'}.json"
    kept.write_text(json.dumps(result, indent=1) + "\n")
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The table of kernels out of a run of the benchmarks.")
    parser.add_argument("run", nargs="?", type=Path, help="what --benchmark-json or --rows wrote")
    options = parser.parse_args(arguments)
    if options.run is not None:
        print(f"wrote {keep(str(options.run)).relative_to(ROOT)}")
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("kernels_[cg]pu.json"))]
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), written(results), BEGIN, END))
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
