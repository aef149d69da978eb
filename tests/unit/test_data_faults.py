"""Nothing lost on the side of the data: bad bytes, shards that go or change in mid-run, reads that fail or hang."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvle.data import files as files_module
from mvle.data import loader as loader_module
from mvle.data.batch import Batch
from mvle.data.config import DataConfig
from mvle.data.decode import decode_window
from mvle.data.errors import DataError
from mvle.data.index import index_path
from mvle.data.indexing import index_shard
from mvle.data.loader import Loader, evaluation_batch
from mvle.data.plan import Draw, SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer, train_bpe

from .data_files import make_shards, pair, spoil, write_shard

TOTAL, STEPS = 12, 7  # 48 images: seven steps are nearly two epochs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"picture number {i} again" for i in range(10)] * 3, 320)


def loader_of(shards: ShardSet, tokenizer: Tokenizer, **changes: Any) -> Loader:
    options = {"image_size": 16, "max_tokens": 12, "row_multiple": 8, "steps": STEPS, **changes}
    return Loader(options.pop("config", DataConfig()), plan_of(shards), shards, tokenizer, **options)


def plan_of(shards: ShardSet) -> SamplingPlan:
    return SamplingPlan(shards, seed=1, batch_total=TOTAL, slots=TOTAL, image_ratio=(0.3, 0.8))


def rows_of(shards: ShardSet, step: int) -> list[int]:
    plan = plan_of(shards)
    return [plan.row(int(counter)) for counter in plan.positions(step)]


# --- bad bytes -------------------------------------------------------------------------------------------------------


def shown(batch: Batch) -> list[tuple[Any, ...]]:
    """Each pair as the model gets it: counter, key, ratio, caption, and the pixels that window and flip make."""
    texts = [tuple(text.tolist()) for text in batch.text.unpack()]
    pixels = [image.numpy().tobytes() for image in batch.images]
    return list(zip(batch.pair_ids.tolist(), batch.keys, batch.image_ratio, texts, pixels, strict=True))


def expected(shards: ShardSet, tokenizer: Tokenizer, step: int, bad: set[int], intact: ShardSet) -> list[tuple]:
    """The same of the plan alone: the first of the draws of a counter whose row is not bad."""
    plan, pairs = plan_of(shards), []
    for counter in plan.positions(step).tolist():
        draws = (plan.replacement(counter, attempt) for attempt in range(64))
        draw: Draw = next(draw for draw in draws if draw.row not in bad)
        ids, _ = tokenizer.encode([shards.caption(draw.row, draw.caption)], 12)
        pixels = decode_window(intact.image_bytes(draw.row), draw.window, draw.flip, 16)
        pairs.append((counter, shards.key(draw.row), draw.ratio, tuple(ids[0]), pixels.tobytes()))
    return pairs


def test_any_ranks_and_any_resume_give_the_same_sequence_with_bad_images_in_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    intact = make_shards(tmp_path, [20, 17, 11])
    shutil.copytree(tmp_path, tmp_path / "rotten", copy_function=shutil.copy2)
    shards = ShardSet.open(str(tmp_path / "rotten" / "*.tar"))
    plan = plan_of(shards)
    neighbours = {plan.row(15), plan.row(15, 1), plan.row(15, 2)}  # whose replacement and its replacement fail as well
    bad = neighbours | {0, 21, 47}
    for row in bad:
        spoil(shards, row)

    whole = [expected(shards, tokenizer, step, bad, intact) for step in range(STEPS)]
    replaced = [sum(plan.row(int(c)) in bad for c in plan.positions(step)) for step in range(STEPS)]

    assert sum(replaced) >= 2 * len(bad) - 2 and len({pair[1] for step in whole for pair in step}) == 48 - len(bad)
    for ranks in (1, 2, 3, 4):
        batches = [list(loader_of(shards, tokenizer, rank=rank, ranks=ranks)) for rank in range(ranks)]
        for step in range(STEPS):
            parts = [batches[rank][step] for rank in range(ranks)]
            assert [pair for part in parts for pair in shown(part)] == whole[step], (ranks, step)
            assert sum(part.replaced for part in parts) == replaced[step]
    for start in range(1, STEPS):  # each on another number of ranks than the one before
        ranks = (1, 2, 3, 4)[start % 4]
        resumed = [list(loader_of(shards, tokenizer, rank=r, ranks=ranks, start_step=start)) for r in range(ranks)]
        for step in range(start, STEPS):
            assert [pair for part in resumed for pair in shown(part[step - start])] == whole[step], (start, step)


def test_what_a_loader_met_before_does_not_choose_the_replacement(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    row = plan_of(shards).row(3)
    whole = shards.shard_path(row).read_bytes()
    loader = loader_of(shards, tokenizer)
    spoil(shards, row)
    assert loader.load(0).replaced == 1
    shards.shard_path(row).write_bytes(whole)  # the disk gives the right bytes again

    epoch = next(step for step in range(1, 20) if row in rows_of(shards, step))

    assert shards.key(row) in loader.load(epoch).keys
    assert shown(loader.load(epoch)) == shown(loader_of(shards, tokenizer).load(epoch))


def test_a_bad_image_is_named_on_the_terminal_with_the_rank_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path, [24])
    row = plan_of(shards).row(9)
    spoil(shards, row)
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a run: nobody set up logging, pytest neither

    list(loader_of(shards, tokenizer, rank=1, ranks=2))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"rank 1: image {shards.key(row)} ({shards.shard_path(row)}) is bad")
    assert "checksum" in lines[0]


def test_a_disk_that_begins_to_fail_late_stops_the_run_as_an_early_one_does(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shards = make_shards(tmp_path, [48])
    loader = loader_of(shards, tokenizer, config=DataConfig(max_bad_share=0.0005))  # 5 of the last 10,000
    loader._pairs = 10**8  # months of pairs without one bad image
    for row in range(6):
        spoil(shards, row)
    with pytest.raises(DataError, match="6 images failed within 10000 pairs"):
        list(loader)


# --- shards that go or change ----------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def replace_by_another(path: Path) -> None:
    path.with_name("other").write_bytes(bytes(10_240))
    os.replace(path.with_name("other"), path)


def replace_by_one_of_the_same_size(path: Path) -> None:
    other = write_shard(path.with_name("other"), [(f"s0p{i}", pair(500 + i)) for i in range(48)])
    os.truncate(other, path.stat().st_size)
    os.replace(other, path)


def replace_by_a_longer_one(path: Path) -> None:
    shutil.copy2(path, path.with_name("other"))
    os.truncate(path.with_name("other"), 999_999)  # its images are where they were: only the size tells
    os.replace(path.with_name("other"), path)


def cut(path: Path) -> None:
    os.truncate(path, 3000)


@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "while it is open"])
@pytest.mark.parametrize(
    ("change", "now"),
    [
        (remove, "it is gone"),
        (replace_by_another, "it has 10,240 bytes"),
        (replace_by_a_longer_one, "it has 999,999 bytes"),
        (replace_by_one_of_the_same_size, "written since the run began"),
        (cut, "it has 3,000 bytes"),
    ],
)
def test_a_shard_that_goes_or_changes_in_mid_run_stops_it_at_once(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[Path], None], now: str, opened: bool
) -> None:
    shards = make_shards(tmp_path, [48])
    path, size = shards.shard_path(0), shards.shard_path(0).stat().st_size
    loader = loader_of(shards, tokenizer, steps=2)
    if opened:
        loader.load(0)
    change(path)

    if opened and change is not cut:
        assert len(list(loader)) == 2  # the open file is the old one still, and loses nothing
        shards.close()  # as when other shards push it out
        loader = loader_of(shards, tokenizer, steps=2)
    with pytest.raises(DataError) as caught:
        list(loader)

    text = str(caught.value)
    assert f"the shard {path} changed" in text and now in text and f"{size:,} bytes" in text
    assert text.endswith(f"python -m mvle.data index {path}")
    assert loader.bad == {}


def test_a_shard_that_is_put_back_is_no_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    before = shown(loader_of(shards, tokenizer).load(0))
    shards.close()
    shutil.copyfile(shards.shard_path(0), tmp_path / "copy")
    os.replace(tmp_path / "copy", shards.shard_path(0))
    os.utime(index_path(shards.shard_path(0)))  # as those do who keep a scratch disk from forgetting them
    assert shown(loader_of(shards, tokenizer).load(0)) == before


def test_what_the_message_says_mends_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    path, before = shards.shard_path(0), shards.fingerprint
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match="is gone"):
        loader_of(shards, tokenizer).load(0)
    path.write_bytes(whole)
    index_shard(path)
    assert ShardSet.open([str(path)]).fingerprint == before


@pytest.mark.parametrize("change", [remove, cut])
def test_an_index_that_goes_or_is_cut_in_mid_run_does_no_harm(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[Path], None]
) -> None:
    shards = make_shards(tmp_path, [5, 48])
    before = [shown(batch) for batch in loader_of(shards, tokenizer)]
    index = index_path(shards.shard_path(5))
    assert index.stat().st_size > 4096  # more than a page: a map of the file would end the process (SIGBUS)
    change(index)
    assert [shown(batch) for batch in loader_of(shards, tokenizer)] == before


def test_a_shard_that_a_glob_misses_is_named_by_its_index(tmp_path: Path) -> None:
    make_shards(tmp_path, [3, 3, 3])
    (tmp_path / "part-001.tar").unlink()
    with pytest.raises(DataError, match=r"part-001\.tar is gone, and its index is there"):
        ShardSet.open(str(tmp_path / "*.tar"))


def test_an_index_that_is_made_again_in_mid_run_does_no_harm(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    before = shown(loader_of(shards, tokenizer).load(0))
    index_shard(shards.shard_path(0))
    assert shown(loader_of(shards, tokenizer).load(0)) == before


def test_a_shard_of_an_evaluation_that_is_gone_is_no_bad_image(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [3])
    shards.shard_path(0).unlink()
    with pytest.raises(DataError, match=r"part-000\.tar changed .*it is gone"):
        evaluation_batch(shards, [0], [0], tokenizer, 16, 12)


def test_whatever_ends_the_loaders_thread_reaches_the_one_who_iterates(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As Rust's panics come out of tokenizers: no Exception."""

    def encode(texts: object, limit: object) -> None:
        raise Panic("called unwrap on None")

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(Panic, match="unwrap"):
        list(loader_of(make_shards(tmp_path, [24]), tokenizer))


# --- reads that fail or hang -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    shards = make_shards(tmp_path, [3])
    right = shards.image_bytes(1)
    read, open_file, reads, opens = os.pread, os.open, [], []

    def flaky(fd: int, size: int, offset: int) -> bytes:  # no disk fails when asked to
        reads.append(fd)
        if len(reads) <= 2:
            raise OSError(code, os.strerror(code))
        return read(fd, size, offset)

    def counted(path: Path, flags: int) -> int:
        opens.append(path)
        return open_file(path, flags)

    monkeypatch.setattr(files_module, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(os, "open", counted)
    assert shards.image_bytes(1) == right
    assert (len(reads), len(opens)) == (3, 2)  # each time from a new handle: a stale one stays stale
    assert caplog.text.count(os.strerror(code)) == 2 and "part-000.tar" in caplog.text


def test_a_read_that_fails_for_good_names_the_shard_and_the_reason(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, [12])

    def broken(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files_module, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", broken)
    loader = loader_of(shards, tokenizer)
    with pytest.raises(DataError, match=r"part-000\.tar cannot be read, after 3 tries: .*Input/output error"):
        list(loader)
    assert loader.bad == {}


@contextlib.contextmanager
def hanging(shard: Path) -> Iterator[None]:
    """A shard whose open hangs, as on a server that does not answer: a pipe that nobody writes to."""
    shard.unlink()
    os.mkfifo(shard)
    try:
        yield
    finally:
        release(shard)


def release(shard: Path) -> None:
    """Let whoever hangs go on, and fail."""
    if shard.exists():
        writer = os.open(shard, os.O_RDWR)
        shard.unlink()
        os.close(writer)


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, but not for ever."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def consume(loader: Loader) -> threading.Thread:
    """A thread that takes batches until the loader fails."""

    def take() -> None:
        with contextlib.suppress(DataError):
            list(loader)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread


def test_a_loader_says_what_it_is_at(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [5, 48])
    loader = loader_of(shards, tokenizer)
    assert loader.doing() == "not started"
    with loader:
        batches = iter(loader)
        next(batches)
        until(lambda: "waiting for the trainer" in loader.doing())
        assert loader.doing() in {f"step {step}, waiting for the trainer" for step in (1, 2)}

    stuck = ShardSet.open(str(tmp_path / "*.tar"))
    with hanging(stuck.shard_path(5)), loader_of(stuck, tokenizer) as loader:
        consumer = consume(loader)
        until(lambda: "reading" in loader.doing())
        until(lambda: any(path == stuck.shard_path(5) for path, _ in stuck.reading()))
        assert f"step 0, preparing images: reading {stuck.shard_path(5)} (for 0 s)" in loader.doing()
        assert stuck.image_bytes(0)  # one that hangs holds up no other shard
        release(stuck.shard_path(5))
        consumer.join()


def test_closing_while_a_read_hangs_comes_back_and_says_so(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader_module, "_CLOSE_SECONDS", 0.05)
    shards = make_shards(tmp_path, [48])
    loader = loader_of(shards, tokenizer)
    with hanging(shards.shard_path(0)):
        consumer = consume(loader)
        until(lambda: "reading" in loader.doing())
        loader.close()
        loader.close()
        assert caplog.text.count("leaves a thread behind") == 1 and "part-000.tar" in caplog.text
        consumer.join()  # nor does it leave someone waiting
    until(lambda: not [t for t in threading.enumerate() if t.name == "loader" or t.name.startswith("decode")])


def test_a_process_ends_although_a_read_hangs(tmp_path: Path) -> None:
    make_shards(tmp_path, [12])
    program = textwrap.dedent("""
        import sys, threading, time
        from mvle.data import loader
        from mvle.data.config import DataConfig
        from mvle.data.plan import SamplingPlan
        from mvle.data.shards import ShardSet
        from mvle.data.tokenizer import train_bpe

        loader._CLOSE_SECONDS = 0.1
        shards = ShardSet.open(sys.argv[1])
        import os; os.unlink(sys.argv[1]); os.mkfifo(sys.argv[1])
        plan = SamplingPlan(shards, seed=0, batch_total=12, slots=12)
        batches = loader.Loader(DataConfig(), plan, shards, train_bpe(["a picture"] * 9, 300), 16, 12)
        threading.Thread(target=lambda: next(iter(batches)), daemon=True).start()
        while "reading" not in batches.doing():
            time.sleep(0.01)
        batches.close()
        print("closed")
    """)
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "part-000.tar")], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "closed\n" and "leaves a thread behind that hangs" in result.stderr
