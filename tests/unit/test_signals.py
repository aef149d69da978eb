"""Signals ask a run to stop, and what is left behind says so."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mvle.engine.signals import STOP_SIGNALS, forget_stop, note_stop, stop_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_and_does_not_interrupt(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    with stop_on_signals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and stop.name == number.name

    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert f"{number.name}: the run stops after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert stop.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)


def test_the_mark_of_a_stop_is_left_and_removed(tmp_path: Path) -> None:
    mark = tmp_path / "stopped"
    forget_stop(mark)  # there is none

    note_stop(mark, 12, "SIGUSR1")
    assert json.loads(mark.read_text()) == {"step": 12, "signal": "SIGUSR1"}
    forget_stop(mark)
    assert list(tmp_path.iterdir()) == []
