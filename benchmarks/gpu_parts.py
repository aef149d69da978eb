"""The parts of `make gpu`, each a process: python -m benchmarks.gpu_parts ANSWER.json PART ARGUMENTS. See gpu.py.

The answer is written anew whenever something more is known, so that a part that runs out of time keeps what it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mvle.model.model import MaskVLM

from .counts import BASELINE, differences, release, step_counts
from .fed import fed, told
from .kernel_report import kernel_table
from .loader_data import make_shards
from .measure import copy_roof, matmul_roof, parts_of, seconds, wait
from .nosync import RefuseSyncs, SyncError
from .providers import dtype_on, ours
from .report import step_table
from .shapes import MASK, SHAPES

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = 25  # rows of the list of kernels
Answer = Callable[[dict[str, Any]], None]


def kernel_tests() -> list[Path]:
    """Those that run kernels on the device that is there, whoever wrote them."""
    folder = ROOT / "tests" / "kernels"
    return sorted(path for name in ("*triton*", "*_kernels", "on_a_gpu") for path in folder.glob(f"test_{name}.py"))


def tests(answer: Answer) -> None:
    """Tests marked `gpu`, and the tests of kernels whole: they run on whatever device is there."""
    folder, kernels = ROOT / "tests", kernel_tests()
    marked = sorted(p for p in folder.rglob("test_*.py") if "mark.gpu" in p.read_text() and p not in kernels)
    files, say, failed = list[str](), list[str](), list[str]()
    # what only a GPU can tell first: a kernel compiles for each dtype and size that a test has
    for only, path in [*((["-m", "gpu"], p) for p in marked), *(([], p) for p in reversed(kernels))]:
        name = str(path.relative_to(ROOT))
        command = [sys.executable, "-m", "pytest", "-q", *only, "-p", "no:cacheprovider", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode:
            failed += lines[-10:]
        files.append(name)
        say += [f"{name}: {lines[-1] if lines else 'said nothing'}"]
        say += [x for x in lines if x.startswith("SKIPPED")]
        answer({"status": "done", "files": files, "say": say})  # what is known if the time runs out
    if failed:
        raise SystemExit("\n".join(failed))


def kernel_rows(answer: Answer) -> None:
    """benchmarks/test_kernels.py: each op beside libraries and its floor."""
    path = ROOT / "runs" / f"rows-{os.getpid()}.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "-v", "--benchmark-only", "-rs"]
    lines = rows_of(command, path, lambda rows: answer({"status": "done", "kernels": rows, "say": _kernels(rows)}))
    if lines:
        raise SystemExit("\n".join(lines[-12:]))


def _kernels(found: list[dict[str, Any]]) -> list[str]:
    return kernel_table([row for one in found for row in one["kernels"]]).splitlines()


def roofs(answer: Answer, side: str, mebibytes: str) -> None:
    """The best large product and copy, and products as the image encoder of base has them at 64 pairs."""
    dtype = dtype_on(DEVICE)
    product, copy = matmul_roof(DEVICE, dtype, int(side)), copy_roof(DEVICE, int(mebibytes))
    answer(
        {
            "status": "done",
            "matmul_flops_per_second": product,
            "copy_bytes_per_second": copy,
            "say": [f"{dtype} products {product / 1e12:.2f} TFLOP/s, copies {copy / 1e9:.1f} GB/s read and written"],
        }
    )


def step(answer: Answer, shape: str, mode: str, only: str) -> None:
    """The rows of benchmarks/test_step.py of a shape and mode. only: main, switches or compiled."""
    path = ROOT / "runs" / f"rows-{os.getpid()}.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks/test_step.py", "-v", "--benchmark-only", "-rs"]
    command += ["--shape", shape, "--mode", mode, "--only", only]

    def known(found: list[dict[str, Any]]) -> None:
        rows = [one for one in found if "provider" in one]
        parts = [one for one in found if "parts" in one]
        say = step_table(rows).splitlines() if rows else []
        answer({"status": "done", "rows": rows, "step_parts": parts, "say": say})

    lines = rows_of(command, path, known)
    if lines:
        raise SystemExit("\n".join(lines[-12:]))


def rows_of(command: list[str], path: Path, known: Callable[[list[dict[str, Any]]], None]) -> list[str]:
    """Run a benchmark whose rows go to `path`; `known` gets all of them whenever there are more. What it printed if it
    failed, else nothing."""
    command = [*command, "-p", "no:cacheprovider", "--rows", str(path)]
    lines: list[str] = []
    seen = 0

    def read() -> None:
        nonlocal seen
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        if len(found) != seen:
            seen = len(found)
            known(found)

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:  # -v prints a line a row: what is known by then is kept
            lines.append(line.rstrip())
            read()
    read()
    path.unlink(missing_ok=True)
    return lines if process.returncode else []


def profiled(answer: Answer, shape: str) -> None:
    """By mode: seconds of each part of the step, the kernels that take most, and the lines where the host waits."""
    models: list[MaskVLM] = []

    def kept(*arguments: Any) -> MaskVLM:
        models.append(MaskVLM(*arguments))
        return models[-1]

    found: dict[str, Any] = {"status": "done", "modes": {}, "say": []}
    size = SHAPES[shape]
    for mode in ("replace", "drop"):
        batch = size.batch(mode).to(DEVICE)
        run = ours(size.config(mode), size.vocabulary, MASK, batch, DEVICE, dtype_on(DEVICE), model=kept)
        for _ in range(3):
            run()
        parts = parts_of(run, models[-1], DEVICE)
        whole = sum(sum(part.values()) for part in parts.values())
        waits = host_waits(run)
        work = kernels(run)
        busy = sum(k["microseconds"] for k in work) / 1e6
        took = median(seconds(run, DEVICE) for _ in range(5))
        found["modes"][mode] = {"parts": parts, "kernels": work, "host_waits": waits, "busy": busy, "seconds": took}
        shares = sorted(((sum(p.values()) / whole, name) for name, p in parts.items()), reverse=True)
        found["say"] += [f"{mode}: " + ", ".join(f"{name} {share:.0%}" for share, name in shares)]
        found["say"] += [f"{mode}: kernels fill {busy * 1e3:.0f} ms of a step of {took * 1e3:.0f}"]
        found["say"] += [f"{mode}: the host waits for the device: " + (", ".join(waits) or "nowhere")]
        answer(found)


def kernels(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Those that take most time in a step, and all others as one row; on a CPU ops."""
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        run()
        wait(DEVICE)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    # an op is charged with its kernels too, and so is what a hook calls itself: of those neither is one
    events = seen.key_averages()
    own = [e for e in events if not cuda or (e.device_type == DeviceType.CUDA and not e.is_user_annotation)]
    rows = sorted(own, key=lambda e: -getattr(e, key))
    named = [{"name": e.key, "microseconds": getattr(e, key), "calls": e.count} for e in rows[:KERNELS]]
    rest = {"name": "all others", "microseconds": 0.0, "calls": 0}
    for e in rows[KERNELS:]:
        rest["microseconds"] += getattr(e, key)
        rest["calls"] += e.count
    return [*named, rest]


def host_waits(run: Callable[[], Any]) -> list[str]:
    """Lines of ours at which a step waits for the device: on a GPU as torch itself warns of them, on a CPU the first
    that benchmarks/nosync.py refuses."""
    if DEVICE.type != "cuda":
        try:
            with RefuseSyncs():
                run()
        except SyncError as error:
            return [str(error)]
        return []
    wait(DEVICE)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if str(w.message).startswith("called a synchronizing")]
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})


def counts(answer: Answer) -> None:
    """tiny, counted on the CPU of this machine under its release of torch."""
    baseline = json.loads(BASELINE.read_text())
    same = baseline["torch"] == release()
    changed = differences(step_counts(), baseline["counts"], same)
    if changed:
        raise SystemExit("\n".join(changed))
    what = (
        "all counts" if same else f"FLOPs and graph breaks (torch {release()}; the baseline is of {baseline['torch']})"
    )
    answer({"status": "done", "say": [f"{what}: as the baseline"]})


def waits(answer: Answer, config: str, pairs: str, side: str, images: str, steps: str) -> None:
    """benchmarks/fed.py: how much faster the loader is than the step, and how much of the time a run waits for it."""
    with tempfile.TemporaryDirectory(prefix="fed-") as name:
        shards = make_shards(Path(name) / "photos", int(side), int(images), min(64, int(images)))
        rows: list[dict[str, Any]] = []
        for decoder in ("dali", "torch"):
            rows += fed(config, shards, Path(name), int(pairs), int(steps), max(1, int(steps) // 6), [decoder])
            answer({"status": "done", "fed": rows, "say": told(rows)})


PARTS = {
    "tests": tests,
    "roofs": roofs,
    "kernels": kernel_rows,
    "step": step,
    "profile": profiled,
    "fed": waits,
    "counts": counts,
}


def main(arguments: list[str]) -> None:
    path, part, *rest = arguments

    def answer(found: dict[str, Any]) -> None:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(path)

    PARTS[part](answer, *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
