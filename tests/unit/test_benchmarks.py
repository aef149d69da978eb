"""How steps are measured and reported: pairs of times, memory, parts, tables, plots, and the one command for a GPU."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu, report
from benchmarks.measure import Ratio, noise_of, parts_of, peak_memory, slower
from benchmarks.shapes import MODES, SHAPES

CPU = torch.device("cpu")
MIB = 2**20


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_neighbours_and_not_of_medians() -> None:
    # the machine becomes slower by and by: every neighbour says 2, medians of apart runs would not
    assert Ratio.of([2.0, 4.0, 20.0], [1.0, 2.0, 10.0]) == Ratio(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="a reference for each time"):
        Ratio.of([1.0, 2.0], [1.0])


def test_slower_is_what_is_beyond_the_noise_of_the_run() -> None:
    noise = noise_of(Ratio(1.0, 0.95, 1.05))

    assert noise == pytest.approx(0.05)
    assert slower(Ratio(1.3, 1.28, 1.32), 1.5, noise)
    assert not slower(Ratio(1.4, 1.38, 1.42), 1.5, noise)  # within twice the noise
    assert not slower(Ratio(1.3, 1.1, 1.55), 1.5, noise)  # its own times are too far apart to tell
    assert noise_of(Ratio(1.0, 1.0, 1.0)) == 0.02


def test_peak_memory_is_the_fullest_moment_and_not_what_is_left() -> None:
    def make() -> Any:
        weights = torch.zeros(2 * MIB // 4)

        def step() -> None:
            a = torch.ones(3 * MIB // 4)
            b = a + 1
            del a
            b.mul_(2)
            torch.zeros(MIB // 4).add_(weights[0])

        return step

    peak, step = peak_memory(make, CPU)

    assert callable(step) and 8 * MIB <= peak < 8.1 * MIB  # weights, a and b


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(1024, 1024), nn.Linear(1024, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.large(x)).sum()


def test_the_backward_of_a_part_is_found_in_it() -> None:
    model, x = Two(), torch.ones(512, 1024)
    optimizer = torch.optim.SGD(model.parameters())

    def step() -> None:
        model(x).backward()
        optimizer.step()

    step()
    parts = parts_of(step, model, CPU)

    assert {"large", "small", "the rest of the forward", "optimizer"} <= parts.keys()
    for way in ("forward", "backward"):
        assert parts["large"][way] > 3 * parts["small"][way] > 0
    assert not model._forward_hooks and not model.large._forward_pre_hooks


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_captions_are_as_long_as_real_ones_and_fit_the_model(name: str) -> None:
    shape = SHAPES[name]
    lengths, most = shape.lengths(), shape.config().model.text.max_tokens

    assert len(lengths) == shape.pairs and max(lengths) <= most
    if shape.pairs >= 64:
        assert abs(mean(lengths) - 14) < 0.5 and max(lengths) > 20
    assert all(shape.config(mode).batch.total == shape.pairs for mode in MODES)


def test_useful_work_is_less_than_plain_work_and_less_still_where_masked_patches_are_dropped() -> None:
    base = SHAPES["base-64"]

    assert base.useful_flops("replace") < 0.85 * base.plain_flops("replace")
    assert base.useful_flops("drop, late") < base.useful_flops("drop") < base.useful_flops("replace")


# ---- the report -----------------------------------------------------------------------------------------------------


def row(provider: str, ratio: float, **more: Any) -> dict[str, Any]:
    return {
        "shape": "tiny",
        "mode": "replace",
        "provider": provider,
        "pairs": 32,
        "pairs_per_second": 100 * ratio,
        "ratio": {"median": ratio, "low": ratio - 0.01, "high": ratio + 0.01},
        "peak_bytes": 64 * MIB,
        "launches": 2000,
        "flops": 10**9,
        "bytes": 10**8,
        "useful_flops": 10**9,
        "plain_flops": 2 * 10**9,
        "mfu": 0.25,
        "device": "cpu",
        "threads": 1,
        **more,
    }


ROWS = [row("ours", 1.6), row("without: packing", 1.28, flops=12 * 10**8), row("plain", 1.0)]


def test_the_table_says_how_many_times_plain_a_step_is_and_what_counting_promises() -> None:
    line = next(line for line in report.step_table(ROWS).splitlines() if line.startswith("| ours"))

    assert [cell.strip() for cell in line.split("|")[2:5]] == ["160", "1.60 (1.59-1.61)", "2.00"]


def test_where_plain_does_not_fit_a_row_has_no_ratio_and_is_still_a_row() -> None:
    alone = {key: value for key, value in row("ours", 1.6).items() if key != "ratio"}
    result = {"rows": [alone, *ROWS[1:]], "parts": [], "about": {"device": "small"}}

    assert "plain does not fit" in report.step_table([alone])
    assert {name for name, _ in report.plots(result)} == {"step_throughput", "step_memory"}
    assert not list(report.regressions([alone], ROWS))


def test_a_saving_is_read_against_the_whole_step() -> None:
    line = report.savings_table(ROWS).splitlines()[-1]

    assert line == "| packing | 1.25 | 1.20 | 1.00 | 1.00 | 1.00 |"


def test_a_ratio_that_fell_beyond_noise_is_a_regression_and_a_switch_or_peer_is_not() -> None:
    slow = [row("ours", 1.3), row("without: packing", 0.9), row("plain", 1.0)]

    assert [line.split(":")[0] for line in report.regressions(slow, ROWS)] == ["tiny, replace, ours"]
    assert not list(report.regressions(ROWS, ROWS))


def test_the_gate_sees_a_row_that_is_gone_and_one_whose_plain_step_was_not_measured_against_itself() -> None:
    elsewhere = [{**r, "mode": "drop"} for r in ROWS if r["provider"] == "ours"]
    slow = [{**elsewhere[0], "ratio": {"median": 1.1, "low": 1.1, "high": 1.1}}]

    assert [line.split(":")[0] for line in report.regressions([*ROWS, *slow], [*ROWS, *elsewhere])] == [
        "tiny, drop, ours"
    ]
    assert [line.rpartition("; ")[2] for line in report.regressions(ROWS, [*ROWS, *elsewhere])] == [
        "this run has no such row"
    ]


def test_plots_are_pictures_whose_bars_are_as_long_as_their_numbers() -> None:
    parts = [{"shape": "tiny", "mode": "replace", "parts": {"encoder": {"forward": 1.0, "backward": 2.0}}}]
    found = dict(report.plots({"rows": ROWS, "parts": parts, "about": {"device": "a < b"}}))

    assert set(found) == {"step_throughput", "step_memory", "step_savings", "step_parts"}
    drawn = [ElementTree.fromstring(svg) for svg in found.values()]
    bars = [float(r.get("width", 0)) for r in drawn[0] if r.tag.endswith("rect")][1:]
    assert bars[0] / bars[1] == pytest.approx(1.6, rel=0.01)


def test_a_run_is_read_from_either_form_and_one_without_steps_is_refused(tmp_path: Path) -> None:
    lines, run, other = tmp_path / "rows.jsonl", tmp_path / "run.json", tmp_path / "other.json"
    infos = [r | {"about": report.about("cpu")} for r in ROWS]
    lines.write_text("".join(json.dumps(i) + "\n" for i in infos))
    run.write_text(json.dumps({"benchmarks": [{"extra_info": i} for i in infos]}))
    other.write_text(json.dumps({"benchmarks": [{"extra_info": {}}]}))

    assert report.read_run(lines)["rows"] == report.read_run(run)["rows"] == ROWS
    assert report.read_run(run)["about"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="expected rows of"):
        report.read_run(other)


def test_only_what_stands_between_the_marks_is_written() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nbehind"

    assert report.rewrite(text, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nbehind"
    with pytest.raises(ValueError, match="expected one"):
        report.rewrite("no marks", "new")


def test_the_documents_are_those_of_the_committed_results() -> None:
    results = report.committed()

    for document, length in report.DOCUMENTS.items():
        text = (report.ROOT / document).read_text()
        if report.BEGIN in text:
            assert report.rewrite(text, report.written(length, results)) == text, "run python -m benchmarks.report"


def test_what_was_not_measured_is_said() -> None:
    assert any(line.startswith("base-256") for line in report.left_out(ROWS))


# ---- one command for a GPU ------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_the_wheels_to_bring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("pydantic", "yaml") else name)

    assert gpu.main([]) == gpu.WANTING
    said = capsys.readouterr().out
    assert "pip download" in said and "'pydantic>=2.7,<3' 'pyyaml'" in said and "WHEELS=" in said


def test_without_torch_another_python_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "torch" else name)

    assert gpu.main([]) == gpu.WANTING
    assert "has no torch" in capsys.readouterr().out


def test_gpu_says_what_it_lacks_before_it_imports_any_of_it() -> None:
    bare = gpu.subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu"], cwd=gpu.ROOT, capture_output=True, text=True, env={"PATH": ""}
    )

    assert bare.returncode == gpu.WANTING and "has no torch" in bare.stdout, bare.stderr


def test_packages_come_from_a_folder_of_wheels_into_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # asked of the metadata: to look for the module pip undoes what setuptools does to distutils, for all later tests
    if not any(d.metadata["Name"] == "pip" for d in distributions()):
        pytest.skip("pip is not installed")
    wheels, target = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    monkeypatch.setattr(gpu, "PACKAGES", target)
    with zipfile.ZipFile(wheels / "small_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_thing.py", "ANSWER = 42\n")
        wheel.writestr("small_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
        wheel.writestr(
            "small_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("small_thing-1.0.dist-info/RECORD", "")

    assert gpu.install(["small-thing"], wheels) is None
    assert (target / "small_thing.py").is_file()
    assert "another-thing" in (gpu.install(["another-thing"], wheels) or "")


def test_without_a_device_every_part_is_skipped_with_the_reason() -> None:
    found = dict(gpu.run_all(gpu.PARTS, False, "needs a CUDA device", 570))

    assert len(found) == len(gpu.PARTS)
    assert all(f == {"status": "skipped", "reason": "needs a CUDA device"} for f in found.values())


def test_when_the_time_is_over_the_rest_is_skipped() -> None:
    ((_, found),) = gpu.run_all(gpu.PARTS[:1], False, None, 0)

    assert found["status"] == "skipped" and "seconds for all parts are over" in found["reason"]


def test_steps_of_a_gpu_are_kept_once_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    parts = {"main": {"rows": ROWS}, "compiled": {"rows": [row("ours", 9.9), row("ours, compiled", 2.0)]}, "tests": {}}

    gpu.write_steps({"about": {}, "parts": parts})

    rows = json.loads((tmp_path / "benchmarks" / "results" / "step_gpu.json").read_text())["rows"]
    assert rows == [*ROWS, row("ours, compiled", 2.0)]


def test_a_part_that_works_one_that_fails_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{gpu.ROOT}:{gpu.ROOT / 'kernels'}")
    part = gpu.PARTS[1]
    done = gpu.run_part(part, ("roofs", "64", "1"), 60)
    failed = gpu.run_part(part, ("roofs", "not a number", "1"), 60)
    late = gpu.run_part(part, ("roofs", "64", "1"), 0.2)

    assert done["status"] == "done" and done["matmul_flops_per_second"] > 0
    assert failed["status"] == "failed" and "not a number" in failed["reason"]
    assert late["status"] == "out of time"
    json.dumps([done, failed, late])


def test_a_part_that_fails_on_its_way_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"status": "done", "rows": [1]}\')'
    (tmp_path / "half_a_part.py").write_text(f"{write}; sys.exit('the second row is broken')")
    monkeypatch.setattr(gpu, "RUNNER", "half_a_part")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    found = gpu.run_part(gpu.PARTS[0], (), 60)

    assert found["status"] == "failed" and "second row is broken" in found["reason"] and found["rows"] == [1]
