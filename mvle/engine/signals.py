"""Signals that ask a run to stop, and the mark that it leaves when it did.

SIGTERM, SIGINT and SIGUSR1 ask: the step in hand is finished, a checkpoint written, and the process ends with a code
that a scheduler understands. runs/NAME/stopped says so to whoever sees files only: torchrun ends with 1 in any case.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .run import write_text

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by a signal; read once a step. name: of the signal, on the ranks that had one."""

    def __init__(self) -> None:
        self.asked, self.name = False, "on another rank"

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever presses Ctrl-C twice means it
        self.asked, self.name = True, signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # not print: a handler may run within a print
            os.write(2, f"mvle.train: {self.name}: the run stops after this step\n".encode())


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """STOP_SIGNALS ask for a clean end inside the block; a second SIGINT interrupts as usual.

    Errors are explained inside it: torchrun terminates the ranks that are left, while they find out which one died.
    """
    flag = StopFlag()
    before = {}
    try:
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, flag)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_stop(path: Path, step: int, name: str) -> None:
    """Leave the mark of a run that was stopped after `step`: JSON with step and signal."""
    write_text(path, json.dumps({"step": step, "signal": name}) + "\n")


def forget_stop(path: Path) -> None:
    """The run goes on: remove the mark, if there is one."""
    path.unlink(missing_ok=True)
