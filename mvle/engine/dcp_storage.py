"""DCP on a file system, without the two places where DCP would unpickle what it finds, and with checksums looked at.

A DCP checkpoint's `.metadata` is a pickle, and entries that are no tensors are pickles too. Checkpoints travel between
people, so `SafeReader` reads the first through an unpickler that knows DCP's own plain classes alone, and refuses the
second. The shards themselves are read by torch with weights_only=True.

A shard is a row of small zip files, one a tensor. torch.save writes a CRC-32 into each; torch.load does not look at it
and takes a flipped bit for a weight (of 300 planted flips it noticed 34). `check_tensors` does, so that no checksum of
our own has to be computed while training waits. It reads about 1 GiB/s a core.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from .errors import CheckpointError

# Plain data classes, and what tensors' sizes and layouts are made of. None of them acts when it is built.
ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # a look-up by name
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",  # then refused by name
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint that holds something other than tensors."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeCheckpoint(f"it names {module}.{name}, which no checkpoint of tensors needs")


class SafeReader(FileSystemReader):
    """Reads tensors, and nothing else. Raises UnsafeCheckpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata, checked to describe tensors in files of its own folder."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except UnsafeCheckpoint as error:
            raise UnsafeCheckpoint(f"{path} is refused: {error}. Load only checkpoints that mvle wrote.") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnsafeCheckpoint(f"{path} is damaged: {type(error).__name__}: {error}.") from None
        _check(path, metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each tensor of the checkpoint."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def check_tensors(self, names: Collection[str] | None = None) -> None:
        """Raise CheckpointError where the bytes of a tensor are not those that were written. names: None: all."""
        stored = self.read_metadata().storage_data
        wanted = [(index.fqn, info) for index, info in stored.items() if names is None or index.fqn in names]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for problem in threads.map(lambda entry: self._damage(*entry), wanted):
                if problem:
                    raise CheckpointError(f"{problem}.")

    def _damage(self, name: str, info: Any) -> str | None:
        path = Path(self.path) / info.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                record = archive.testzip()
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # more particular about bookkeeping
        except Exception as error:  # a flipped bit of a zip file's own numbers surfaces as nearly anything
            record = f"{type(error).__name__}: {str(error)[:100]}"
        return record and f"{path} is damaged: the bytes of {name} are not those that were written ({record})"


def _check(path: Path, metadata: Any) -> None:
    entries = getattr(metadata, "state_dict_metadata", None)
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(entries, dict)
        or not isinstance(metadata.storage_data, dict)
    ):
        raise UnsafeCheckpoint(f"{path} is refused: expected the metadata of DCP; got {type(metadata).__name__}.")
    for key, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UnsafeCheckpoint(f"{path} is refused: expected tensors alone; {key} is {type(entry).__name__}.")
    for info in metadata.storage_data.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".distcp"):
            raise UnsafeCheckpoint(f"{path} is refused: expected files of its own folder; it names {name!r}.")


class PlainWriter(FileSystemWriter):
    """Writes what SafeReader reads: the metadata names no path of the machine that wrote it."""

    def storage_meta(self) -> StorageMeta | None:
        """Nothing but the id of this save."""
        return StorageMeta(save_id=self.save_id)


class StagedPlanner(DefaultSavePlanner):
    """Plans a save by the tensors of a run, and writes copies of them.

    staged: name -> this rank's part, in CPU memory. Of the tensors themselves, which training changes meanwhile, only
    names, shapes and shardings are read.
    """

    def __init__(self, staged: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy."""
        return self.staged[index.fqn]
