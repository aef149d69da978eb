"""Files of checkpoints: which are whole, which is the newest, how one is published, what is left behind.

    checkpoints/step_00001000/   .metadata and __R_0.distcp (DCP: tensors alone) and meta.json (everything else)
    checkpoints/latest           a text file with the name of the newest
    checkpoints/best.json        which one is the best so far (engine/checkpoint_best.py)
    checkpoints/.step_*.writing  what a killed save left behind; removed at the next start

A checkpoint is whole where meta.json, written last, is there and every file has its size. Tensors carry checksums of
their own (engine/dcp_storage.py), which only those who ask for them wait for.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .run import write_text

PREFIX = "step_"


# --- names -----------------------------------------------------------------------------------------------------------


def folder_of(checkpoints: Path, step: int) -> Path:
    """The checkpoint of a step in a checkpoints/ folder."""
    return checkpoints / f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))


def steps_in(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint, whole or not, ascending."""
    names = (p.name.removeprefix(PREFIX) for p in checkpoints.glob(f"{PREFIX}*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


# --- finding ---------------------------------------------------------------------------------------------------------


def find_latest(
    folder: str | os.PathLike[str], say: Callable[[str], Any] = print, read_tensors: bool = False
) -> Path | None:
    """The newest whole checkpoint of a checkpoints/ folder, or None if there is none at all.

    read_tensors: whole means that every tensor has its checksum, too. Says which ones were passed over, and why.
    Raises CheckpointError if there are some and none is whole.
    """
    folder = Path(folder)
    paths = [folder_of(folder, step) for step in reversed(steps_in(folder))]
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8", errors="replace").strip()
        # first what `latest` names, then what came before it, then (the pointer was set back) what came after
        paths.sort(key=lambda p: (p != named, p > named))
    reasons: list[str] = []
    for path in paths:
        if (problem := what_is_wrong(path, read_tensors)) is None:
            for reason in reasons:
                say(f"passed over a checkpoint: {reason}")
            return path
        reasons.append(problem)
    if reasons:
        raise CheckpointError(
            "no checkpoint can be loaded: " + "; ".join(reasons) + f". Remove {folder} to start the run anew."
        )
    return None


def what_is_wrong(path: Path, read_tensors: bool = False) -> str | None:
    """None for a checkpoint whose every file is there in full, else the reason. read_tensors: see `find_latest`."""
    try:
        meta = read_meta(path)
        expected = dict(meta["files"])
    except FileNotFoundError:
        return f"{path} has no meta.json, which is written last: it is not whole"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}/meta.json cannot be read: {type(error).__name__}: {error}"
    for name, size in expected.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{file} must have {size} bytes; got {'no such file' if found is None else found}"
    metadata = path / ".metadata"
    if "metadata_crc32" in meta and (found := zlib.crc32(metadata.read_bytes())) != meta["metadata_crc32"]:
        return f"{metadata} is damaged: its CRC-32 must be {meta['metadata_crc32']}; got {found}"
    return _damaged_tensors(path) if read_tensors else None


def _damaged_tensors(path: Path) -> str | None:
    from .dcp_storage import SafeReader

    try:
        SafeReader(path).check_tensors()
    except (CheckpointError, OSError) as error:
        return str(error).rstrip(".")
    return None


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """meta.json of one checkpoint."""
    return json.loads((Path(path) / "meta.json").read_text(encoding="utf-8"))


# --- writing ---------------------------------------------------------------------------------------------------------


def start_writing(temporary: Path) -> None:
    """An empty folder under a name that nobody loads."""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def publish(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Give a folder that holds all tensors its meta.json (facts, and how its files must be), its name, and `latest`."""
    facts["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    facts["metadata_crc32"] = zlib.crc32((temporary / ".metadata").read_bytes())
    facts["id"] = uuid.uuid4().hex  # of this save alone: figures name it, so that they are not taken for another's
    write_text(temporary / "meta.json", json.dumps(facts, indent=1) + "\n")
    _sync(temporary)
    aside = final.with_name(f".{final.name}.old")
    if final.exists():  # the run was set back to before this step
        os.rename(final, aside)
    os.rename(temporary, final)
    _sync(final.parent)
    write_text(final.parent / "latest", f"{final.name}\n")
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Undo what a killed save left behind."""
    for path in folder.glob(f".{PREFIX}*.old"):
        real = folder / path.name.removeprefix(".").removesuffix(".old")
        if real.exists():
            shutil.rmtree(path)
        else:  # killed between two renames: the old one is still the one
            os.rename(path, real)
    for path in folder.glob(f".{PREFIX}*.writing"):
        shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
