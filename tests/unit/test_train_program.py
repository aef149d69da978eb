"""What `python -m mvle.train` takes and refuses before it trains."""

from __future__ import annotations

import os
import sys

import pytest

from mvle.train import FINISHED, UNUSABLE, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--resume"], "options are --dry-run and --help; got --resume. Keys are key.sub=value"),
        (["--dry-run"], "CONFIG must be a YAML file or the name of a packaged recipe; got none"),
        (["tiny", "optim.lr"], "must be key.sub=value"),
        (["--dry-run", "no-such-config"], "there is no config no-such-config"),
    ],
)
def test_what_it_does_not_know_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == UNUSABLE
    said = capsys.readouterr().err
    assert said.startswith("mvle.train: ") and message in said


def test_help_has_the_exit_codes_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--help"]) == FINISHED
    said = capsys.readouterr().out
    assert "75 stopped by SIGTERM" in said and "--dry-run" in said
    assert "first_timeout" in said
    assert main([]) == UNUSABLE


def test_help_into_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--help"]) == FINISHED
