"""The report: one page that needs nothing else, made from a run folder."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mvle import evaluate, report
from mvle.inference import open_run
from mvle.reporting.curves import Line, chart, ticks
from mvle.reporting.gather import Filled, Found, Gathered, Piece, Rebuilt
from mvle.reporting.page import page

from .small_run import small_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = small_run(tmp_path_factory.mktemp("report") / "run")
    rows = [{"step": s, "kind": "train", "loss": 9.0 - s, "mim": 1.0, "pairs/s": 100.0} for s in (1, 2, 3)]
    rows.append({"step": 3, "kind": "val", "val_mim": 0.9, "val_mim_true": 0.3, "val_mim_wrong": 0.4, "val_itc": None})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.main(["all", str(run.path)]) == 0
    assert report.main([str(run.path), "--rows", "3"]) == 0
    return run


def test_the_page_needs_no_other_file(made):
    text = made.report.read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert sources and all(source == "data:image/png;base64," for source in sources)


def test_the_page_has_every_section(made):
    text = made.report.read_text()
    for heading in ("Training", "Figures", "Pictures from captions", "Words from images", "Retrieval"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<svg") == 3, "loss, mim with its validation, and the gap between captions"
    assert text.count('<div class="row">') == 3 and text.count('class="card fill') == 3
    for words in ("with the true image", "caption alone", "reranked, k = 5", "3 of 1,000"):
        assert words in text


def test_a_sheet_of_rebuilt_pictures_lies_beside_it(made):
    with Image.open(made.path / "reconstructions.png") as sheet:
        assert sheet.width == 8 + 5 * 120 and sheet.height > 3 * 112


def test_figures_of_other_weights_are_not_shown(tmp_path, capsys):
    made = small_run(tmp_path / "run")
    assert evaluate.main(["conditional", str(made.path)]) == 0
    assert report.figures(open_run(made.path))
    shutil.copytree(made.path, tmp_path / "copy")
    assert report.figures(open_run(tmp_path / "copy")), "a copy holds the same weights"

    shutil.rmtree(made.checkpoints)  # and trained again, to the same step, by the same config
    small_run(tmp_path / "run")
    assert report.figures(open_run(made.path)) == {}
    assert report.main([str(made.path), "--rows", "1"]) == 0
    assert "Not evaluated yet" in made.report.read_text()
    assert str(made.report) in capsys.readouterr().out
    assert evaluate.main(["conditional", str(made.path)]) == 0
    assert list(made.path.glob("evaluation.step_3.*.json")), "the figures of before are kept aside"


def test_captions_cannot_break_the_page():
    pixels, bad = np.zeros((16, 16, 3), np.uint8), '<script>alert("x")</script> & "quotes"'
    shown = Gathered(
        [Rebuilt(pixels, pixels, pixels, pixels, pixels, bad, bad)],
        [Filled(pixels, [Piece(bad, True, bad, bad), Piece(bad)])],
        [Found(pixels, [(bad, True)])],
        [Found(bad, [(pixels, True)])],
    )
    text = page(bad, [(bad, bad)], [], {}, shown, 0.6)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_right_words_are_told_from_wrong_ones():
    filled = Filled(np.zeros((16, 16, 3), np.uint8), [Piece("a"), Piece(" red", True, "red", "blue"), Piece(" circle")])
    text = page("t", [], [], {}, Gathered([], [filled], [], []), 0.6)
    assert '<span class="ok">red</span>' in text and '<span class="no">blue</span>' in text
    assert 'a <span class="gap">red</span> circle' in text


def test_a_run_without_an_objective_has_no_section_of_it(tmp_path):
    run = small_run(tmp_path / "run", objectives={"mim": {"weight": 0}, "itc": {"weight": 0}, "itm": {"weight": 0}})
    assert report.main([str(run.path)]) == 0
    text = run.report.read_text()
    assert "Pictures from captions" not in text and "<h2>Retrieval" not in text and "Words from images" in text
    assert not (run.path / "reconstructions.png").exists()


def test_a_missing_run_is_said_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("mvle.report: RUN must be the folder of a run")


def test_curves_stay_inside_their_frame():
    svg = chart("loss", [Line("training", "train", [(0, 5.0), (10, 1.25), (20, 3.0)]), Line("none", "val", [])])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg).group(1).split()]
    assert points[0][1] < points[2][1] < points[1][1], "larger is higher"
    assert all(0 < x < 360 and 30 < y < 224 for x, y in points) and "none" not in svg
    assert chart("nothing", [Line("a", "train", [])]) == ""
    assert "<svg" in chart("flat", [Line("a", "train", [(0, 0.0), (5, 0.0)])])


@pytest.mark.parametrize("low, high", [(0, 1), (0.2, 0.21), (0, 2000), (-3, 4), (5, 5)])
def test_ticks_are_few_round_and_cover_the_range(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
