"""How a run waits for its data: the loader's figures in each row, and one warning that says what to change."""

from __future__ import annotations

import os

from ..data.config import DataConfig
from ..data.counts import WORK, Counts, Figures, Work

SHARE = 0.05  # of the time; more of it spent waiting is worth a word
ROWS = 3  # in a row, after the first, which has the start in it


class DataWait:
    """Figures of one rank's loader between log lines. decoder: "dali" or "torch" · gpu: whether there is one."""

    def __init__(self, counts: Counts, config: DataConfig, decoder: str, gpu: bool) -> None:
        self._counts, self._config, self._decoder, self._gpu = counts, config, decoder, gpu
        self._before = counts.figures()
        self._waits: list[tuple[float, Figures]] = []  # share and figures of the last rows that waited too long
        self._rows = 0
        self._said = False

    def figures(self, steps: int, seconds: float, share: float) -> dict[str, float]:
        """What a row says of the `steps` since the last one, which took so many seconds.

        read_seconds, decode_seconds, text_seconds  work a step, summed over threads (with DALI decode_seconds is what
                                                    the loader waited for it)
        batches_ready                               when one was taken, on average
        bytes/s                                     encoded bytes read
        share: of the time that was waited, for `advice`.
        """
        now = self._counts.figures()
        new, self._before = now.since(self._before), now
        self._rows += 1
        self._waits = [*self._waits, (share, new)][-ROWS:] if share > SHARE and self._rows > 1 else []
        return {
            "read_seconds": new.read / steps,
            "decode_seconds": new.decode / steps,
            "text_seconds": new.text / steps,
            "batches_ready": new.ready / new.takes if new.takes else 0.0,
            "bytes/s": new.bytes / seconds,
        }

    def advice(self) -> str | None:
        """Once, when the last rows all waited too long: for what, and the setting to change."""
        if self._said or len(self._waits) < ROWS:
            return None
        self._said = True
        share = sum(waited for waited, _ in self._waits) / ROWS
        late = {work: sum(figures.late[work] for _, figures in self._waits) for work in WORK}
        slowest = max(WORK, key=lambda work: late[work])
        begin = f"the model waited for data {share:.0%} of the time in the last {ROWS} rows, "
        takes = sum(figures.takes for _, figures in self._waits)
        if takes and sum(figures.ready for _, figures in self._waits) >= takes:
            return f"{begin}although a batch was ready most times: {slowest} is uneven. Raise data.prefetch."
        return f"{begin}and {slowest} is what it waited for. {self._remedy(slowest)}"

    def _remedy(self, slowest: Work) -> str:
        threads = f"data.threads (it is {self._config.threads}; this process may use {_cores()} cores)"
        if slowest == "reading":
            return f"Put the shards on a nearer or faster disk, or raise {threads}."
        if slowest == "text":
            return "Its thread needs a free core: leave one over, or shorten the captions."
        if 2 * sum(figures.verify for _, figures in self._waits) > sum(f.late_decoding for _, f in self._waits):
            return (
                "Torch decodes each image before DALI is given it, the first time that a rank meets it, since shards "
                f"were indexed with --no-verify: index them without it (python -m mvle.data index SHARDS), or raise "
                f"{threads}."
            )
        if self._gpu and self._decoder == "torch":
            return f"Decode on the GPU (data.decoder=dali), or raise {threads}."
        return f"Raise {threads}, or store smaller images."


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
