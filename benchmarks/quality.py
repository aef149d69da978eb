"""One question: what do the faster ways to train cost in quality? `replace`, `drop`, late insertion, clean_keep 0.5.

    python -m benchmarks.quality tiny --seeds 3              trains and evaluates what is not there yet, then the table
    python -m benchmarks.quality flickr8k 'data.train=…' 'data.val=…'
    python -m benchmarks.quality tiny --only-read            the table of the runs that are there

Runs lie in runs/quality/RECIPE-WAY-SEED; the figures of each, with the CPU seconds of its training, go to
benchmarks/results/quality_RECIPE.json. Everything but masking is the recipe's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mvle.engine.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, tuple[str, ...]] = {
    "replace": (),
    "drop": ("masking.mode=drop",),
    "drop, late insertion": ("masking.mode=drop", "masking.insert=decoder"),
    "replace, clean_keep 0.5 (approximation)": ("masking.clean_keep=0.5",),
}
# name in the table -> where it stands: keys into evaluation.json, or into the last validation row
FIGURES: dict[str, tuple[str, ...]] = {
    "R@1 image to caption": ("retrieval", "itc", "image_to_text", "r1"),
    "R@1 caption to image": ("retrieval", "itc", "text_to_image", "r1"),
    "matching, hard negatives": ("itm", "balanced_accuracy_hard"),
    "masked words, nats, true image": ("conditional", "mlm", "true", "loss"),
    "masked pixels, true caption": ("conditional", "mim", "true"),
    "masked pixels, wrong caption": ("conditional", "mim", "wrong"),
    "pixels from the caption alone": ("conditional", "mim", "caption_alone", "true"),
    "val_loss": ("val_loss",),
}


def folder_of(recipe: str, way: str, seed: int, root: Path) -> Path:
    """Where a run lies."""
    name = "".join(c if c.isalnum() else "-" for c in way)
    return root / f"{recipe}-{name}-{seed}"


def train(recipe: str, way: str, seed: int, folder: Path, overrides: Sequence[str]) -> None:
    """Train and evaluate one run, unless it is there; its CPU seconds go beside it."""
    if (folder / "evaluation.json").is_file():
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    program = [sys.executable, "-m"]
    settings = [f"run.seed={seed}", f"run.folder={folder}", *WAYS[way], *overrides]
    subprocess.run([*program, "mvle.train", recipe, *settings], check=True, cwd=ROOT)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    subprocess.run([*program, "mvle.evaluate", "all", str(folder)], check=True, cwd=ROOT)
    (folder / "cpu_seconds.json").write_text(json.dumps(seconds))


def figures(folder: Path) -> dict[str, float]:
    """The figures of one run. Raises FileNotFoundError if it was not evaluated."""
    found = json.loads((folder / "evaluation.json").read_text())
    found |= read_rows(folder / "metrics.jsonl", "val")[-1]
    values = {}
    for name, keys in FIGURES.items():
        value: Any = found
        for key in keys:
            value = value[key]
        values[name] = float(value)
    seconds = folder / "cpu_seconds.json"
    if seconds.is_file():
        values["CPU seconds of training"] = json.loads(seconds.read_text())
    return values


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a row for each figure, a column for each way; medians, and the range over the seeds."""
    ways = [way for way, runs in found.items() if runs]
    lines = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name in FIGURES:
        cells = []
        for way in ways:
            values = [run[name] for run in found[way]]
            cells.append(f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the faster ways to train cost in quality.")
    parser.add_argument("recipe", help="tiny or flickr8k")
    parser.add_argument("overrides", nargs="*", help="key=value for every run, such as the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="where runs lie")
    parser.add_argument("--only-read", action="store_true", help="train nothing; runs that are missing are said")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in WAYS:
            folder = folder_of(options.recipe, way, seed, options.runs)
            if not options.only_read:
                train(options.recipe, way, seed, folder, options.overrides)
            if (folder / "evaluation.json").is_file():
                found[way].append({"seed": seed, **figures(folder)})
            else:
                print(f"not there: {folder}")
    out = ROOT / "benchmarks" / "results" / f"quality_{options.recipe}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
