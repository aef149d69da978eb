"""A small set of shapes as real shards, and a run folder with an untrained model: what evaluation tests stand on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from mvle.config import Config
from mvle.data import shapes
from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet
from mvle.data.tar import TarWriter
from mvle.data.tokenizer import Tokenizer, all_captions, train_bpe
from mvle.engine.checkpoint import Checkpointer
from mvle.engine.parallel import Parallel
from mvle.engine.run import RunFolder
from mvle.model.model import MaskVLM

IMAGES = 12
# Overrides that make any recipe one of milliseconds a step, and its run two steps; the data are the caller's to name.
SMALL = (
    *("run.device=cpu", "data.slots=4", "tokenizer.kind=bpe", "tokenizer.vocabulary=400"),
    *("model.width=32", "model.heads=2", "model.image={size: 64, depth: 1}", "model.text.depth=1"),
    *("model.cross_depth=1", "model.decoder_depth=1", "model.projection=16", "objectives.itm.group=4"),
    *("batch.total=8", "schedule.steps=2", "evaluation={every: 1, pairs: 8, k: 4}", "checkpoint.every=1"),
)


def write_shard(path: Path, images: int = IMAGES, repeat_first: bool = False, extras: bool = True) -> Path:
    """Pictures of two objects, two captions each. repeat_first: the last image and its captions equal the first."""
    ids = np.arange(images)
    if repeat_first:
        ids[-1] = 0
    scenes = np.full((images, 4), -1, np.int64)
    scenes[:, 0] = ids * 5 % 60
    scenes[:, 3] = ids * 7 % 60
    placed = shapes.place(scenes, ids)
    pixels, masks = shapes.draw(placed, ids)
    known = {"colour": list(shapes.COLOURS), "shape": list(shapes.SHAPES)}
    with TarWriter(path) as tar:
        for i, objects in enumerate(placed):
            one, two = (f"a {o['size']} {o['colour']} {o['shape']} in the {o['place']}" for o in objects)
            record = {"captions": [f"{one} and {two}", f"{two} and {one}"]}
            tar.add(f"pair{i:04d}.png", shapes.png(pixels[i]))
            tar.add(f"pair{i:04d}.json", json.dumps(record).encode())
            if extras:
                tar.add(f"pair{i:04d}.scene.json", json.dumps({"objects": objects, "words": known}).encode())
                tar.add(f"pair{i:04d}.objects.png", shapes.png(masks[i]))
    index_shard(path)
    return path


def small_config(shard: Path, folder: Path | str = "runs/test", **sections: object) -> Config:
    """A model of one block each."""
    values: dict[str, object] = {
        "run": {"folder": str(folder), "device": "cpu"},
        "data": {"train": [str(shard)], "val": [str(shard)]},
        "tokenizer": {"kind": "bpe", "vocabulary": 400},
        "model": {
            "width": 32,
            "heads": 2,
            "mlp_ratio": 2.0,
            "image": {"size": 64, "patch": 16, "depth": 1},
            "text": {"depth": 1, "max_tokens": 40},
            "cross_depth": 1,
            "decoder_depth": 1,
            "projection": 16,
        },
        "masking": {"cell": 16, "image_ratio": [0.6, 1.0]},
        "objectives": {"itm": {"group": 4}},
        "batch": {"total": 8},
        "evaluation": {"k": 5},
    }
    return Config.from_dict({**values, **sections})


def small_parts(shard: Path, **sections: object) -> tuple[Config, ShardSet, Tokenizer, MaskVLM]:
    """Config, shards, tokenizer and an untrained model in eval."""
    config = small_config(shard, **sections)
    shards = ShardSet.open([str(shard)])
    tokenizer = train_bpe(all_captions(shards), config.tokenizer.vocabulary)
    model = MaskVLM(config, tokenizer.vocabulary, tokenizer.mask_id)
    model.init_weights(0)
    return config, shards, tokenizer, model.eval()


def small_run(folder: Path, **sections: object) -> RunFolder:
    """A run folder with a checkpoint of step 3, and its shard beside it."""
    shard = folder.parent / "pairs.tar"
    if not shard.exists():
        write_shard(shard)
    config, _, tokenizer, model = small_parts(shard, **sections)
    run = RunFolder(folder).create()
    run.write_config(config.to_yaml())
    tokenizer.save(run.tokenizer)
    with Parallel.start(config.parallel, "cpu") as parallel:
        optimizer = torch.optim.AdamW(model.parameters())
        Checkpointer(run.checkpoints, config.checkpoint, parallel).save(3, model, optimizer, {"pairs_seen": 24})
    return run
