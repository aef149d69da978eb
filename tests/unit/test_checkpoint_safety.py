"""A checkpoint from a stranger cannot run code, nor read files outside its folder."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer, load_checkpoint
from mvle.engine.dcp_storage import ALLOWED, PlainWriter, SafeReader, UnsafeCheckpoint
from mvle.engine.errors import CheckpointError
from mvle.engine.optim import OptimConfig, build_optimizer
from mvle.engine.parallel import Parallel

from ..distributed.toy import Toy


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def checkpoint(folder: Path) -> Path:
    model = Toy()
    parallel = Parallel(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(model, OptimConfig())
    return Checkpointer(folder, CheckpointConfig(), parallel).save(0, model, optimizer)


def replace(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a file of a checkpoint, with the size and the checksum that meta.json then expects."""
    (path / name).write_bytes(data)
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][name] = len(data)
    meta["metadata_crc32"] = zlib.crc32((path / ".metadata").read_bytes())
    (path / "meta.json").write_text(json.dumps(meta))


def edit_metadata(path: Path, change) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    replace(path, ".metadata", pickle.dumps(metadata))


def test_code_in_the_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    replace(path, ".metadata", pickle.dumps(Runs(tmp_path / "ran")))

    with pytest.raises(UnsafeCheckpoint, match=r"names posix\.mkdir|names os\.mkdir|names nt\.mkdir"):
        load_checkpoint(path, Toy())

    assert not (tmp_path / "ran").exists()


def test_code_hidden_in_good_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    edit_metadata(path, lambda metadata: setattr(metadata, "planner_data", Runs(tmp_path / "ran")))

    with pytest.raises(UnsafeCheckpoint, match="mkdir"):
        load_checkpoint(path, Toy())

    assert not (tmp_path / "ran").exists()


def test_code_in_a_shard_is_refused_and_not_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    model = Toy()
    torch.save(Runs(tmp_path / "ran"), tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()

    def everything_is_evil(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(evil)

    replace(path, "__0_0.distcp", evil)
    edit_metadata(path, everything_is_evil)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is damaged: .*Weights only load failed"):
        load_checkpoint(path, model)

    assert not (tmp_path / "ran").exists()


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    edit_metadata(path, lambda m: m.state_dict_metadata.update({"model.extra": BytesStorageMetadata()}))

    with pytest.raises(UnsafeCheckpoint, match="expected tensors alone; model.extra is BytesStorageMetadata"):
        load_checkpoint(path, Toy())


@pytest.mark.parametrize("name", ["../../secret.distcp", "/etc/passwd", "sub/x.distcp", "meta.json"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path)

    def point_elsewhere(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = name

    edit_metadata(path, point_elsewhere)

    with pytest.raises(UnsafeCheckpoint, match="files of its own folder"):
        load_checkpoint(path, Toy())


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_refused_in_words(tmp_path: Path, data: bytes) -> None:
    path = checkpoint(tmp_path)
    replace(path, ".metadata", data)

    with pytest.raises(UnsafeCheckpoint, match="damaged|expected the metadata of DCP"):
        load_checkpoint(path, Toy())


def test_all_dtypes_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    tensors = {
        str(d): torch.ones(3).to(d) for d in (torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    }
    tensors["empty"] = torch.zeros(0, 4)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(tensors, storage_writer=PlainWriter(tmp_path), no_dist=True)

    read = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(read, storage_reader=SafeReader(tmp_path), no_dist=True)

    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_what_may_be_unpickled_are_plain_classes_of_torch() -> None:
    assert set(ALLOWED) == {
        "collections",
        "torch",
        "torch.serialization",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.metadata",
    }
