"""Which checkpoint of a run is opened, and which of its weights: trained, or their EMA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvle import evaluate, report
from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.ema import Ema
from mvle.engine.errors import CheckpointError
from mvle.engine.parallel import Parallel
from mvle.engine.run import RunFolder
from mvle.inference import Pretrained, RunError, open_run

from .small_run import small_parts, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Checkpoints of steps 3, 5 (the best, with an EMA) and 7."""
    run = small_run(tmp_path_factory.mktemp("weights") / "run")
    _, _, _, model = small_parts(run.path.parent / "pairs.tar")
    ema, optimizer = Ema(model, 0.9), torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for shadow in ema.tensors().values():
            shadow.add_(0.01)
    config = CheckpointConfig(keep=5, best="val_loss")
    checkpoints = Checkpointer(run.checkpoints, config, Parallel(0, 1, torch.device("cpu")))
    checkpoints.save(5, model, optimizer, {"pairs_seen": 40}, ema)
    checkpoints.mark_best(5, {"val_loss": 1.0})
    checkpoints.save(7, model, optimizer, {"pairs_seen": 56})
    return run


@pytest.mark.parametrize(
    ("step", "weights", "found"),
    [
        (None, "auto", (7, "model")),
        (3, "auto", (3, "model")),
        (5, "auto", (5, "ema")),
        ("best", "ema", (5, "ema")),
        ("best", "model", (5, "model")),
    ],
)
def test_a_run_opens_at_a_step_or_the_best_with_the_weights_asked_for(run, step, weights, found) -> None:
    opened = Pretrained.open(run.path, step=step, weights=weights).run

    assert (opened.step, opened.weights) == found
    _, _, _, model = small_parts(run.path.parent / "pairs.tar")
    for name, parameter in model.named_parameters():
        expected = parameter + 0.01 if opened.weights == "ema" else parameter
        assert torch.equal(opened.model.get_parameter(name), expected), name


def test_what_is_not_there_is_said(run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step_00000007 has no EMA of the weights"):
        open_run(run.path, weights="ema")
    with pytest.raises(RunError, match="no checkpoint of step 4; it keeps steps 3, 5, 7"):
        open_run(run.path, step=4)
    with pytest.raises(RunError, match="has no best checkpoint .*checkpoint.best names a figure, such as val_loss"):
        open_run(small_run(tmp_path / "run").path, step="best")


def test_figures_say_of_which_weights_they_are_and_those_of_others_are_kept_aside(run, capsys) -> None:
    assert evaluate.main(["retrieval", str(run.path), "--checkpoint", "best"]) == 0
    average = json.loads(run.evaluation.read_text())
    assert "at step 5 (EMA of the weights): 12 images" in capsys.readouterr().out

    assert evaluate.main(["retrieval", str(run.path), "--checkpoint", "5", "--weights", "model"]) == 0
    trained = json.loads(run.evaluation.read_text())
    assert "at step 5 (weights as trained): 12 images" in capsys.readouterr().out

    assert (average["weights"], trained["weights"]) == ("ema", "model")
    assert average["step"] == trained["step"] == 5 and average["fingerprint"] != trained["fingerprint"]
    (kept,) = run.path.glob("evaluation.step_5.*.json")
    assert json.loads(kept.read_text()) == average


def test_the_page_says_which_weights_it_shows_and_shows_figures_of_no_others(run) -> None:
    assert evaluate.main(["retrieval", str(run.path), "--checkpoint", "5", "--weights", "model"]) == 0

    for weights, said, evaluated in (("model", "as trained", True), ("ema", "EMA (slow average)", False)):
        assert report.main([str(run.path), "--rows", "1", "--checkpoint", "5", "--weights", weights]) == 0
        page = run.report.read_text()
        assert said in page and ("Not evaluated yet" in page) != evaluated


@pytest.mark.parametrize("program", [evaluate, report])
def test_a_checkpoint_is_a_step_or_best(program, run, capsys) -> None:
    what = ["all"] if program is evaluate else []
    with pytest.raises(SystemExit):
        program.main([*what, str(run.path), "--checkpoint", "newest"])

    assert "--checkpoint: expected a step (a number) or best; got 'newest'" in capsys.readouterr().err
