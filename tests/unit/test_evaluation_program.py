"""`python -m mvle.evaluate`: the results file, what is computed again and what is not, and its messages."""

from __future__ import annotations

import json

import pytest

from mvle import evaluate
from mvle.evaluation.tables import aligned, retrieval_rows

from .small_run import small_run, write_shard


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run")


def test_all_writes_the_results_file_and_prints_tables(run, capsys):
    assert evaluate.main(["all", str(run.path)]) == 0
    found = json.loads(run.evaluation.read_text())
    header = {"data", "pairs", "captions", "step", "checkpoint", "fingerprint", "weights"}
    assert set(found) == header | {"retrieval", "itm", "conditional"}
    assert found["retrieval"]["k"] == 5 and found["step"] == 3 and found["pairs"] == 12
    assert set(found["itm"]) == {"balanced_accuracy_random", "balanced_accuracy_hard"}
    out = capsys.readouterr().out
    for words in ("R@1", "reranked, k = 5", "with a wrong image", "painting the background", "written to"):
        assert words in out


def test_figures_of_the_same_checkpoint_are_printed_again_not_computed_again(run, capsys, monkeypatch):
    evaluate.main(["retrieval", str(run.path)])
    first, before = capsys.readouterr().out, run.evaluation.read_text()
    monkeypatch.setattr(evaluate, "compute", lambda *a: pytest.fail("computed again"))
    assert evaluate.main(["retrieval", str(run.path)]) == 0
    again = capsys.readouterr().out
    assert "these are its figures" in again and run.evaluation.read_text() == before
    assert [line for line in first.splitlines() if line.startswith("caption to image")] == [
        line for line in again.splitlines() if line.startswith("caption to image")
    ]


def test_parts_are_merged_into_one_file(run):
    evaluate.main(["retrieval", str(run.path)])
    evaluate.main(["conditional", str(run.path)])
    assert {"retrieval", "itm", "conditional"} < set(json.loads(run.evaluation.read_text()))


def test_other_data_or_another_number_of_pairs_replaces_what_was_there_and_keeps_it_aside(run, tmp_path, capsys):
    evaluate.main(["retrieval", str(run.path)])
    before = run.evaluation.read_text()
    other = write_shard(tmp_path / "other.tar", 7)
    evaluate.main(["conditional", str(run.path), "--data", str(other)])
    found = json.loads(run.evaluation.read_text())
    assert found["data"] == [str(other)] and found["pairs"] == 7 and "retrieval" not in found
    (kept,) = run.path.glob("evaluation.step_3.*.json")
    assert kept.read_text() == before and str(kept) in capsys.readouterr().out
    evaluate.main(["conditional", str(run.path), "--data", str(other), "--pairs", "5"])
    assert json.loads(run.evaluation.read_text())["pairs"] == 5


def test_another_k_is_computed_anew(run):
    evaluate.main(["retrieval", str(run.path)])
    evaluate.main(["retrieval", str(run.path), "--k", "3"])
    assert json.loads(run.evaluation.read_text())["retrieval"]["k"] == 3


def test_json_names_another_file(run, tmp_path):
    target = tmp_path / "figures.json"
    assert evaluate.main(["retrieval", str(run.path), "--captions", "first", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["captions"] == "first" and "itc" in found["retrieval"] and not run.evaluation.exists()


def test_a_run_without_a_matching_head_has_no_reranking(tmp_path):
    run = small_run(tmp_path / "run", objectives={"itm": {"weight": 0}})
    assert evaluate.main(["retrieval", str(run.path)]) == 0
    found = json.loads(run.evaluation.read_text())
    assert "reranked" not in found["retrieval"] and "itm" not in found


def test_retrieval_of_a_run_without_contrast_is_refused_naming_the_key(tmp_path, capsys):
    run = small_run(tmp_path / "run", objectives={"itc": {"weight": 0}, "itm": {"group": 4}})
    assert evaluate.main(["retrieval", str(run.path)]) == 2
    assert "objectives.itc.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "off, parts, skipped",
    [
        (["itc"], {"conditional"}, "retrieval: skipped, since it needs a run that was trained with objectives.itc."),
        (["mlm", "mim"], {"retrieval", "itm"}, "conditional: skipped, since it needs a run that was trained with"),
        (["mlm"], {"retrieval", "itm", "conditional"}, ""),
        (["mim", "itm"], {"retrieval", "conditional"}, ""),
    ],
)
def test_all_evaluates_what_was_trained_and_says_what_was_not(off, parts, skipped, tmp_path, capsys):
    weights = {"itm": {"group": 4}}
    for name in off:
        weights[name] = {**weights.get(name, {}), "weight": 0}
    run = small_run(tmp_path / "run", objectives=weights)
    assert evaluate.main(["all", str(run.path)]) == 0
    assert set(json.loads(run.evaluation.read_text())) & {"retrieval", "itm", "conditional"} == parts
    out = capsys.readouterr().out
    assert skipped in out if skipped else "skipped" not in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["retrieval", "{run}/nowhere"], "RUN must be the folder of a run"),
        (["retrieval", "{run}", "--checkpoint", "7"], "no checkpoint of step 7; it keeps steps 3"),
        (["retrieval", "{run}", "--pairs", "-1"], "--pairs must be 0"),
        (["retrieval", "{run}", "--data", "{run}/none-*.tar"], "none-*.tar"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(run, capsys, arguments, words):
    assert evaluate.main([a.format(run=run.path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mvle.evaluate: ") and words in error


def test_tables_line_up():
    figures = {"k": 32, "itc": {w: {"r1": 0.5, "r5": 1.0, "r10": 1.0} for w in ("image_to_text", "text_to_image")}}
    lines = aligned(retrieval_rows(figures))
    assert len({len(line) for line in lines}) == 1 and lines[1].endswith("0.500  1.000  1.000")
