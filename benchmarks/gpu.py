"""`make gpu`: everything that only a GPU can tell, in under ten minutes, without network.

    make gpu                             in the Python environment that `python3` is; PYTHON=... names another
    make gpu WHEELS=folder               small packages that it lacks come from that folder of wheels
    python -m benchmarks.gpu --parts kernels profile      those parts alone whose names begin so
    python -m benchmarks.gpu --exercise  every part on a CPU, at toy size: that it runs, not what it measures

tests    of kernels, and those marked `gpu`                  roofs    products and copies: what no step can pass
kernels  each op beside libraries and its floor
step     ours against all providers, by shape and mode       profile  the step by part, kernels, where the host waits
counts   FLOPs and graph breaks against the baseline         fed      base from shards: how long a step waits for data

Each part is a process with a time of its own, so that none can take the others with it; what does not fit into the
whole time is skipped and said. After each part all that is known is written as JSON (device, commit, versions). On a
GPU that is benchmarks/results/gpu_DEVICE.json; the steps go to step_gpu.json and the kernels to kernels_gpu.json, which
`python -m benchmarks.report` and `python -m benchmarks.kernel_report` read. This file needs nothing but Python, so that
it can say what else is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570  # seconds for all parts
RUNNER = "benchmarks.gpu_parts"
# module -> what pip calls it. torch comes with its CUDA and is never installed from here.
LARGE = {"torch": "torch>=2.11", "numpy": "numpy"}
SMALL = {
    "pydantic": "pydantic>=2.7,<3",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
}
OPTIONAL = {"triton": "compiled providers need it", "transformers": "FLAVA needs it"}
WANTING = 3  # exit code: packages are missing
PACKAGES = ROOT / "runs" / "gpu-packages"


@dataclass(frozen=True)
class Part:
    """name · seconds that it may take · arguments for benchmarks.gpu_parts, on a GPU and as an exercise (None: no)"""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    exercise: tuple[str, ...] | None


def _step(shape: str, mode: str, only: str, seconds: int, exercise: tuple[str, ...] | None = None) -> Part:
    return Part(f"step, {shape}, {mode}, {only}", seconds, ("step", shape, mode, only), exercise)


PARTS = (
    Part("tests", 150, ("tests",), ("tests",)),
    Part("roofs", 30, ("roofs", "8192", "2048"), ("roofs", "256", "16")),
    Part("kernels", 150, ("kernels",), ("kernels",)),
    _step("base-256", "replace", "main", 130, ("step", "tiny", "replace", "main")),
    _step("base-256", "drop", "main", 110, ("step", "tiny", "drop", "main")),
    Part("profile", 45, ("profile", "base-256"), ("profile", "tiny")),
    Part("fed", 90, ("fed", "base", "256", "480", "4096", "60"), ("fed", "tiny", "32", "96", "64", "6")),
    _step("base-256", "replace", "compiled", 120, ("step", "tiny", "replace", "compiled")),
    _step("base-64", "replace", "switches", 70, ("step", "tiny", "replace", "switches")),
    _step("base-256", "drop, late", "main", 30, ("step", "tiny", "drop, late", "main")),
    _step("large-64", "replace", "main", 50),
    _step("large-64", "drop", "main", 40),
    Part("counts", 60, ("counts",), ("counts",)),
    _step("base-256", "drop", "compiled", 90),
    _step("base-64", "drop", "switches", 60),
)


# ---- what is there --------------------------------------------------------------------------------------------------


def missing(wanted: dict[str, str]) -> list[str]:
    """What pip calls the packages that cannot be imported."""
    return [package for module, package in wanted.items() if find_spec(module) is None]


def what_to_bring(packages: Sequence[str]) -> str:
    """How to get wheels on a machine that has a network."""
    quoted = " ".join(f"'{p}'" for p in packages)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"missing in {sys.executable}: {', '.join(packages)}. They are small. Where there is a network:\n"
        f"    pip download --dest wheels --only-binary=:all: --python-version {version} {quoted}\n"
        "then bring the folder here, and:\n"
        "    make gpu WHEELS=wheels"
    )


def install(packages: Sequence[str], wheels: Path) -> str | None:
    """Install into PACKAGES, beside the caller's environment; why it failed, or None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--upgrade", "--find-links", str(wheels), "--target", str(PACKAGES), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()


# ---- the parts ------------------------------------------------------------------------------------------------------


def run_part(part: Part, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """{"status": done | skipped | failed | out of time, "seconds", "reason", and what the part found}."""
    answer = ROOT / "runs" / f"gpu-part-{os.getpid()}.json"
    answer.parent.mkdir(exist_ok=True)
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", RUNNER, str(answer), *arguments]
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            output, code = process.communicate()[0], None
    found = json.loads(answer.read_text()) if answer.is_file() else {}
    answer.unlink(missing_ok=True)
    found["seconds"] = round(time.monotonic() - start, 1)
    if code is None:
        found |= {"status": "out of time", "reason": f"ended after {seconds:.0f} seconds; {_last_lines(output)}"}
    elif code != 0 or "status" not in found:
        found |= {"status": "failed", "reason": f"ended with {code}: {_last_lines(output)}"}
    return found


def _last_lines(output: str, lines: int = 12) -> str:
    kept = [line for line in output.splitlines() if line.strip() and not line.startswith("USDT:")]
    return "\n".join(kept[-lines:])


def run_all(parts: Sequence[Part], exercise: bool, no_device: str | None, limit: float) -> Iterator[tuple[str, Any]]:
    """(name, what came of it) of each part, in order."""
    until = time.monotonic() + limit
    for part in parts:
        arguments = part.exercise if exercise else part.arguments
        name = f"{part.name} ({', '.join(arguments[1:])})" if exercise and arguments else part.name
        left = until - time.monotonic()
        if not exercise and no_device:
            yield name, {"status": "skipped", "reason": no_device}
        elif arguments is None:
            yield name, {"status": "skipped", "reason": "the same as a part above, at toy size"}
        elif left < 10:
            yield name, {"status": "skipped", "reason": f"the {limit:.0f} seconds for all parts are over"}
        else:
            yield name, run_part(part, arguments, min(left, part.seconds * (10 if exercise else 1)))


def look(code: str) -> str:
    """What a line of Python prints in a process of its own; raises RuntimeError with what it said."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(_last_lines(done.stderr))
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All that only a GPU can tell, in under ten minutes.")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for small packages that are missing")
    parser.add_argument("--exercise", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="those alone whose names begin so, e.g. kernels")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--limit", type=float, help=f"seconds for all parts; {LIMIT}, and no limit for an exercise")
    options = parser.parse_args(arguments)
    parts = tuple(p for p in PARTS if options.parts is None or p.name.startswith(tuple(options.parts)))
    if not parts:
        parser.error(f"no part begins with {options.parts}; there are: {'; '.join(p.name for p in PARTS)}")
    paths = [str(PACKAGES), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    sys.path.insert(0, str(ROOT / "kernels"))
    if PACKAGES.is_dir():
        sys.path.insert(0, str(PACKAGES))
    if large := missing(LARGE):
        print(f"{sys.executable} has no {', '.join(large)}; name a Python that has: make gpu PYTHON=/path/to/python")
        return WANTING
    if small := missing(SMALL):
        if options.wheels is None:
            print(what_to_bring(small))
            return WANTING
        if error := install(small, options.wheels):
            print(f"{options.wheels} lacks something: {error}\n{what_to_bring(small)}")
            return WANTING
    for package, why in OPTIONAL.items():
        if find_spec(package) is None:
            print(f"no {package}: {why}, and will be skipped")
    (ROOT / "runs").mkdir(exist_ok=True)
    print(cuda_kernels())
    device = look("import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    no_device = (
        None if device else f"needs a CUDA device; torch {look('import torch; print(torch.__version__)')} sees none"
    )
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    real = bool(device) and not options.exercise
    out = options.out or (ROOT / f"benchmarks/results/gpu_{slug}.json" if real else ROOT / "runs/gpu.json")
    kind = "cuda" if device else "cpu"
    about = look(f"import json; from benchmarks.report import about; print(json.dumps(about('{kind}')))")
    result: dict[str, Any] = {"about": json.loads(about), "exercise": options.exercise, "parts": {}}
    limit = options.limit or (36000 if options.exercise else LIMIT)
    for part, found in run_all(parts, options.exercise, no_device, limit):
        result["parts"][part] = found
        out.write_text(json.dumps(result, indent=1) + "\n")
        took = f" in {found['seconds']} s" if "seconds" in found else ""
        why = "" if found["status"] == "done" else ": " + found["reason"].replace("\n", "\n    ")
        print(f"{part:36} {found['status']}{took}{why}", flush=True)
        for line in found.get("say", []):
            print(f"    {line}")
    if real:
        write_steps(result)
        write_kernels(result)
    print(f"wrote {out}")
    return int(any(found["status"] == "failed" for found in result["parts"].values()))


def cuda_kernels() -> str:
    """Which library of CUDA kernels the parts take: the one that is named or installed, else one that is built now.
    Without any they are skipped, each with this reason."""
    from mvle_kernels import compiled_cuda, cuda_support

    if found := cuda_support.library():
        return f"CUDA kernels: {found}"
    build, folder = compiled_cuda.builder(), ROOT / "build" / "cuda"
    try:
        how = build.build_cuda(folder, folder / build.LIBRARY)
    except (build.Missing, RuntimeError) as reason:
        return (
            f"no CUDA kernels, which are skipped: {reason}. Bring the library along: python csrc/build.py cuda where "
            "nvcc is, then make gpu with MVLE_CUDA_LIBRARY=path"
        )
    os.environ["MVLE_CUDA_LIBRARY"] = str(folder / build.LIBRARY)
    return f"CUDA kernels: built now by {how}"


def write_steps(result: dict[str, Any]) -> None:
    """The rows of all steps as benchmarks/report.py reads them."""
    found = result["parts"].values()
    every = [row for part in found for row in part.get("rows", [])]
    first: dict[tuple[str, str, str], Any] = {}
    for row in every:  # ours is measured again beside its switches and compiled
        first.setdefault((row["shape"], row["mode"], row["provider"]), row)
    rows = list(first.values())
    parts = [one for part in found for one in part.get("step_parts", [])]
    if rows:
        steps = {"about": result["about"], "rows": rows, "parts": parts, "skipped": []}
        (ROOT / "benchmarks" / "results" / "step_gpu.json").write_text(json.dumps(steps, indent=1) + "\n")


def write_kernels(result: dict[str, Any]) -> None:
    """The rows of kernels as benchmarks/kernel_report.py reads them."""
    found = [row for part in result["parts"].values() for row in part.get("kernels", [])]
    if found:
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (path := ROOT / "runs" / "kernels.jsonl").write_text(lines)
        try:
            look(f"from benchmarks.kernel_report import keep; keep({str(path)!r})")
        except RuntimeError as error:  # not all cases were reached: what there is lies in the results of this run
            print(f"kernels_gpu.json is left as it was: {error}")


if __name__ == "__main__":
    sys.exit(main())
