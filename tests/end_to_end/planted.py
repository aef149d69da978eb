"""`python -m mvle.train` with a fault planted in it: planted.py FAULT [FAULT ...] train ARGUMENTS OF mvle.train

    record:FOLDER       write down the keys of every step, and the windows, flips and captions that the pairs were shown
                        with, one file a rank and process
    nan:KEY             one value of that pair's pixels is NaN on its way into the model
    nan-after:STEP      all of them are, from that step on
    hang:RANK:STEP      the rank stops working in the middle of the step
    kill:RANK:STEP      kill -9 of the rank in the middle of the step (not again after a restart)
    kill-loading:RANK:N kill -9 of the rank while its loader reads its Nth image
    term:RANK:STEP      SIGTERM to the rank in the middle of the step
    full-disk:STEP      from that step on no file can grow; a checkpoint is there by then

The steps of hang, kill and term are counted from the start of the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from mvle.data import loader, pairs
from mvle.data.batch import Batch
from mvle.data.plan import Draw
from mvle.data.shards import ShardSet
from mvle.engine.train_step import TrainStep
from mvle.model import image_encoder
from mvle.train import leave, main

MARK = torch.tensor([251, 7, 93], dtype=torch.uint8)
RANK = int(os.environ.get("RANK", 0))
patchify, backward, fetch = image_encoder.patchify, TrainStep.backward, pairs.fetch
now = {"backward": 0, "fetched": 0, "last": 0}
lock = threading.Lock()
draws: dict[int, Draw] = {}  # counter -> as it was fetched last


def plant(fault: str) -> None:
    kind, *words = fault.split(":")
    if kind == "record":
        pairs.fetch = loader.fetch = watched
        before_step(lambda self, step, batch: record(Path(words[0]), step, batch))
    elif kind == "nan":
        before_step(lambda self, step, batch: mark(batch, [i for i, key in enumerate(batch.keys) if key == words[0]]))
    elif kind == "nan-after":
        before_step(lambda self, step, batch: mark(batch, range(len(batch) * (step + 1 >= int(words[0])))))
    elif kind == "full-disk":
        before_step(lambda self, step, batch: fill_disk(self) if step + 1 == int(words[0]) else None)
    elif kind == "kill-loading":
        pairs.fetch = loader.fetch = watched
        now["last"] = int(words[1]) if int(words[0]) == RANK else 0
    elif int(words[0]) == RANK:
        TrainStep.backward = mid_step(kind, int(words[1]))  # type: ignore[method-assign]
    image_encoder.patchify = poisoned  # type: ignore[assignment]


def before_step(work: Any) -> None:
    inner = TrainStep.__call__

    def stepped(self: TrainStep, step: int, batch: Batch) -> Any:
        work(self, step, batch)
        return inner(self, step, batch)

    TrainStep.__call__ = stepped  # type: ignore[method-assign]


def watched(shards: ShardSet, draw: Draw) -> Any:
    with lock:
        draws[draw.counter] = draw
        now["fetched"] += 1
        if now["fetched"] == now["last"]:
            os.kill(os.getpid(), signal.SIGKILL)
    return fetch(shards, draw)


def record(folder: Path, step: int, batch: Batch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = batch.pair_ids.tolist()
    with lock:
        shown = [draws.pop(counter) for counter in ids]
    with open(folder / f"{os.getpid()}.jsonl", "a") as file:
        row = {
            "step": step + 1,
            "rank": RANK,
            "keys": batch.keys,
            "ids": ids,
            "shown": [[draw.row, *map(int, draw.window), bool(draw.flip), draw.caption] for draw in shown],
        }
        file.write(json.dumps(row) + "\n")


def mark(batch: Batch, rows: Any) -> None:
    for i in rows:
        batch.images[i] = MARK


def poisoned(images: Any, *arguments: Any) -> Any:
    pixels = patchify(images, *arguments)
    marked = (images == MARK).flatten(1).all(1)
    pixels[marked, 0, 0] = float("nan")
    return pixels


def fill_disk(train_step: TrainStep) -> None:
    latest = Path(train_step.config.run.folder) / "checkpoints" / "latest"
    while not latest.exists():  # one that is being saved in the background
        time.sleep(0.01)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def mid_step(kind: str, at: int) -> Any:
    def broken(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        now["backward"] = now["backward"] + 1
        if now["backward"] == at and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            if kind == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[kind])
        return backward(self, *arguments, **options)

    return broken


if __name__ == "__main__":
    split = sys.argv.index("train")
    for planted in sys.argv[1:split]:
        plant(planted)
    leave(main(sys.argv[split + 1 :]))
