"""The table and the plots of the step, for README and docs/performance.md, out of a run of the benchmarks.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report run.json              what was measured goes to benchmarks/results/step_cpu.json (or
                                                      step_gpu.json), and from all results there into the documents
    python -m benchmarks.report rows.jsonl            the same from what --rows wrote
    python -m benchmarks.report                       the documents anew, from the results that are there
    python -m benchmarks.report run.json --gate       nothing is written; ends with 1 if a ratio to the plain step fell
                                                      below that of the results, beyond the noise of this run

In the documents only what stands between `<!-- step: begin -->` and `<!-- step: end -->` is written.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mvle.engine.host_memory import can_hold_freed_memory

from .measure import Ratio, noise_of, slower
from .shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
DOCUMENTS = {"README.md": "short", "docs/performance.md": "long"}
BEGIN, END = "<!-- step: begin -->", "<!-- step: end -->"
Row = Mapping[str, Any]


# ---- what was measured ----------------------------------------------------------------------------------------------


def commit() -> str:
    """Of the checkout, with a + where it has changes; "unknown" outside one."""
    try:
        run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(device: str) -> dict[str, Any]:
    """Where and with what a measurement was made: belongs to every result."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    found = {"device": name, "date": date.today().isoformat(), "commit": commit(), "torch": torch.__version__}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["memory_held"] = can_hold_freed_memory()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def infos_of(path: Path) -> list[dict[str, Any]]:
    """What each benchmark of a run has to say: of a file of pytest-benchmark, or of --rows (.jsonl)."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]


def read_run(path: Path) -> dict[str, Any]:
    """A file of pytest-benchmark, or of --rows (.jsonl) -> {"about", "rows", "parts", "skipped"}. Raises ValueError if
    it holds no step."""
    infos = infos_of(path)
    rows = [i for i in infos if "provider" in i]
    if not rows:
        raise ValueError(f"expected rows of benchmarks/test_step.py in {path}; got {len(infos)} of other benchmarks.")
    skipped = [] if path.suffix == ".jsonl" else json.loads(path.read_text()).get("skipped", [])
    where = rows[0]["about"]
    rows = [{key: value for key, value in row.items() if key != "about"} for row in rows]
    return {"about": where, "rows": rows, "parts": [i for i in infos if "parts" in i], "skipped": skipped}


def left_out(rows: Sequence[Row]) -> Iterator[str]:
    """The shapes that no row has, and the main providers that a shape lacks in `replace`, with the reason."""
    from .providers import PROVIDERS

    cuda = rows[0]["device"].startswith("cuda")
    main = [name for name in PROVIDERS if not name.startswith("without: ")]
    for name in dict.fromkeys(row["shape"] for row in rows):
        made = {row["provider"] for row in rows if (row["shape"], row["mode"]) == (name, "replace")}
        if made and (less := [provider for provider in main if provider not in made]):
            yield f"{name}, replace: {', '.join(less)}: skipped, or left out so that the whole ends in time"
    for name, shape in SHAPES.items():
        if all(row["shape"] != name for row in rows):
            yield f"{name} ({shape.what}): " + ("a size for CPUs" if cuda else "a size for GPUs, or not asked for")


def timed(rows: Sequence[Row]) -> list[Row]:
    """Those that were made in turn with plain: all but where plain does not fit into the memory of the device."""
    return [row for row in rows if "ratio" in row]


def regressions(rows: Sequence[Row], before: Sequence[Row]) -> Iterator[str]:
    """A line for each provider of ours whose ratio to the plain step fell beyond noise; see measure.py."""
    noise = {(r["shape"], r["mode"]): noise_of(Ratio(**r["ratio"])) for r in timed(rows) if r["provider"] == "plain"}
    most = max(noise.values(), default=0.02)  # of a row whose plain step was not measured against itself
    known = {
        (r["shape"], r["mode"], r["provider"]): r["ratio"]["median"]
        for r in timed(before)
        if r["provider"].startswith("ours")
    }
    for gone in known.keys() - {(r["shape"], r["mode"], r["provider"]) for r in rows}:
        yield f"{', '.join(gone)}: {known[gone]:.2f} times the plain step before; this run has no such row"
    for row in timed(rows):
        key = (row["shape"], row["mode"])
        old = known.get((*key, row["provider"]))
        if old is not None and slower(Ratio(**row["ratio"]), old, noise.get(key, most)):
            now = row["ratio"]["median"]
            yield (
                f"{', '.join(key)}, {row['provider']}: {now:.2f} times the plain step, {old:.2f} before; "
                f"the noise of this run is {noise.get(key, most):.2f}"
            )


# ---- tables ---------------------------------------------------------------------------------------------------------

HEAD = (
    "pairs/s",
    "against plain",
    "by FLOPs",
    "against plain `replace`",
    "use of the roof",
    "peak memory",
    "launches",
    "padding",
)


def step_table(rows: Sequence[Row]) -> str:
    """A Markdown table a shape and mode, as wide as a terminal."""
    lines = []
    for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["mode"]) == (shape, mode)]
        threads = "" if own[0]["device"].startswith("cuda") else f", threads: {own[0]['threads']}"
        lines += ["", f"**{SHAPES[shape].what}, `{mode}`{threads}**", ""]
        lines += ["| provider | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
        lines += map(_line, own)
    return "\n".join(lines)


def _line(row: Row) -> str:
    useful, ratio, other = row.get("useful_flops"), row.get("ratio"), row.get("ratio_to_replace")
    counting = ""
    if row["provider"].startswith("ours") and useful:
        counting = f"{row['plain_flops'] / useful:.2f}"
    cells = (
        f"{n:,.0f}" if (n := row["pairs_per_second"]) >= 100 else f"{n:.3g}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "plain does not fit",
        counting,
        f"{other['median']:.2f}" if other else "",
        f"{row['mfu']:.0%}" if "mfu" in row else "",
        f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        f"{row['launches']:,}" if "launches" in row else "",
        f"{row['padding']:.1%}" if "padding" in row else "",
    )
    return f"| {row['provider']} | " + " | ".join(cells) + " |"


def savings_table(rows: Sequence[Row]) -> str:
    """What the step takes without each saving, in times of the whole step: one column a count."""
    lines = ["| without | time | FLOPs | bytes | launches | peak memory |", "|---|---|---|---|---|---|"]
    for row, own in _savings(rows):
        ratios = [own["ratio"]["median"] / row["ratio"]["median"]]
        ratios += [row[key] / own[key] for key in ("flops", "bytes", "launches", "peak_bytes")]
        name = row["provider"].removeprefix("without: ")
        lines.append(f"| {name} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join(lines)


def _savings(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """(a step without a saving, the whole step of its shape and mode), of the first shape that has them."""
    own = {(r["shape"], r["mode"]): r for r in timed(rows) if r["provider"] == "ours"}
    first = None
    for row in timed(rows):
        key = (row["shape"], row["mode"])
        if row["provider"].startswith("without: ") and first in (None, key) and key in own:
            first = key
            yield row, own[key]


# ---- plots ----------------------------------------------------------------------------------------------------------

BLUE, GREY, GREEN = "#2563c9", "#a9b4be", "#1f7a4d"
WIDTH, LABELS, VALUES, BAR = 720, 290, 70, 22  # pixels


def bars(title: str, unit: str, values: Sequence[tuple[str, Sequence[tuple[float, str]], str]]) -> str:
    """A horizontal bar chart as SVG. values: (label, its pieces from left to right with their colours, text behind)."""
    longest = max(sum(v for v, _ in pieces) for _, pieces, _ in values)
    height = 58 + BAR * len(values)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="14" font-weight="600" fill="#1d2327">{html.escape(title)}</text>',
        f'<text x="10" y="40" fill="#66707a">{html.escape(unit)}</text>',
    ]
    for i, (label, pieces, text) in enumerate(values):
        top, x = 52 + BAR * i, float(LABELS)
        middle = top + BAR / 2 + 2
        parts.append(
            f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end" fill="#1d2327">{html.escape(label)}</text>'
        )
        for value, colour in pieces:
            long = value / longest * (WIDTH - LABELS - VALUES)
            parts.append(f'<rect x="{x:.1f}" y="{top}" width="{long:.1f}" height="{BAR - 6}" fill="{colour}"/>')
            x += long
        parts.append(f'<text x="{x + 6:.1f}" y="{middle}" fill="#1d2327">{html.escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colour(provider: str) -> str:
    return BLUE if provider.startswith("ours") else GREY


def plots(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name of the file, SVG): throughput, memory, saving a switch, share of the step a part."""
    rows, where = result["rows"], result["about"]["device"]
    main = [r for r in rows if not r["provider"].startswith("without: ")]

    def label(row: Row) -> str:
        return f"{row['shape']}, {row['mode']}: {row['provider']}"

    yield (
        "step_throughput",
        bars(
            "Pairs a second, in times of the plain step",
            f"of the same shape and mode, medians of steps made in turn; {where}",
            [
                (label(r), [(r["ratio"]["median"], _colour(r["provider"]))], f"{r['ratio']['median']:.2f}")
                for r in timed(main)
            ],
        ),
    )
    yield (
        "step_memory",
        bars(
            "Peak memory of a step, MiB a pair",
            f"weights, gradients, moments and activations, divided by the pairs of a step; {where}",
            [
                (label(r), [(m, _colour(r["provider"]))], f"{m:,.1f}")
                for r in main
                for m in [r["peak_bytes"] / 2**20 / r["pairs"]]
            ],
        ),
    )
    if saved := list(_savings(rows)):
        shape = f"{saved[0][0]['shape']}, {saved[0][0]['mode']}"
        yield (
            "step_savings",
            bars(
                f"What a step takes without each saving ({shape})",
                "FLOPs (grey) and time (blue), more than the whole step takes, per cent",
                [
                    piece
                    for row, own in saved
                    for flops, time in [
                        (row["flops"] / own["flops"] - 1, own["ratio"]["median"] / row["ratio"]["median"] - 1)
                    ]
                    for piece in (
                        (row["provider"].removeprefix("without: "), [(max(flops, 0), GREY)], f"{flops:+.0%}"),
                        ("", [(max(time, 0), BLUE)], f"{time:+.0%}"),
                    )
                ],
            ),
        )
    if result["parts"]:
        shares = []
        for one in result["parts"]:
            whole = sum(sum(part.values()) for part in one["parts"].values())
            for name, part in sorted(one["parts"].items(), key=lambda p: -sum(p[1].values())):
                pieces = [(part["forward"] / whole, BLUE), (part["backward"] / whole, GREEN)]
                text = f"{sum(part.values()) / whole:.0%}"
                shares.append((f"{one['shape']}, {one['mode']}: {name.replace('_', ' ')}", pieces, text))
        yield "step_parts", bars("Share of the step a part", f"forward blue, backward green; {where}", shares)


# ---- documents ------------------------------------------------------------------------------------------------------


def written(document: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands between the marks. document: "short" or "long"; results: name of the file -> result."""
    parts = []
    for name, result in results.items():
        where = result["about"]
        measured = (
            f"{where['device']}, torch {where['torch']}, commit {where['commit']}, {where['date']} "
            f"([{name}.json]({'' if document == 'short' else '../'}benchmarks/results/{name}.json))"
        )
        rows = [r for r in result["rows"] if document == "long" or not r["provider"].startswith("without: ")]
        parts += [f"{measured}:", step_table(rows)]
        if document == "long":
            if any(r["provider"].startswith("without: ") for r in rows):
                parts += ["", "### What each saving is worth", "", savings_table(rows)]
            parts += [f"![{file}](images/{file}_{name.rsplit('_', 1)[1]}.svg)" for file, _ in plots(result)]
            parts += ["", "Not measured: " + "; ".join([*result.get("skipped", []), *left_out(rows)]) + "."]
    if "step_gpu" not in results:
        parts.append("On a GPU: **not measured yet** (`make gpu`).")
    return "\n\n".join(parts)


def rewrite(text: str, inside: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with `inside` between its marks. Raises ValueError if it has none."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"expected one {begin} and one {end} behind it; got {text.count(begin)} and {text.count(end)}."
        )
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{inside}\n\n{end}{rest.split(end)[1]}"


def committed() -> dict[str, Any]:
    """Name of the file -> result, of all that are under benchmarks/results/."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("step_[cg]pu.json"))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of the step out of a run of the benchmarks.")
    parser.add_argument("run", nargs="?", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--gate", action="store_true", help="compare with the results instead of replacing them")
    options = parser.parse_args(arguments)
    if options.run is not None:
        result = read_run(options.run)
        path = RESULTS / f"step_{'gpu' if result['rows'][0]['device'].startswith('cuda') else 'cpu'}.json"
        if options.gate:
            lines = list(regressions(result["rows"], json.loads(path.read_text())["rows"]))
            print("\n".join(lines) or "no step of ours is slower than it was, beyond noise")
            return int(bool(lines))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    results = committed()
    for name, result in results.items():
        for file, svg in plots(result):
            (IMAGES / f"{file}_{name.rsplit('_', 1)[1]}.svg").write_text(svg)
    for document, length in DOCUMENTS.items():
        path = ROOT / document
        if BEGIN in (text := path.read_text()):
            path.write_text(rewrite(text, written(length, results)))
            print(f"wrote {document}")
        else:
            print(f"left {document} alone: it has no {BEGIN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
